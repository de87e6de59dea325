"""Batch Manhattan and the no-sign-change clamp (Liao et al. 2016; Xiao et al. 2018's code)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .backends.reference import checks


class BatchManhattan(torch.optim.Optimizer):
    """SGD on the sign of the gradient: of each step's w, gradient g and momentum buffer v,

        g ← sign(g)        where `manhattan`, before decay and momentum
        g ← g + weight_decay · w
        v ← momentum · v + g
        w ← w − lr · v
        w ← s · max(s · w, 1e-10)        where `no_sign_change`, s the sign of w before the step, 0 counting as positive

    Liao et al. 2016, in the order of Xiao et al. 2018's code. `no_sign_change` keeps every weight on its
    side of zero; it leaves out Parameters of fewer than two dimensions (biases, norms), and a half type that has no
    1e-10 takes its smallest normal number. A locally-connected layer's bias by position counts as weight unless it has
    a group of its own without the clamp. `manhattan=False` is SGD, alone or with the clamp.

    Every argument may differ between parameter groups, as Xiao et al. have it for the last layer:
    `BatchManhattan([{"params": body}, {"params": head, "lr": 0.1, "manhattan": False}], lr=1e-3)`.

    lr: a float, or a 0-dim tensor, with which a step is capturable in a CUDA graph. foreach: multi-tensor kernels
    (None and True), or a loop over Parameters of one tensor each (False); the results are the same.
    State: `momentum_buffer` of each Parameter, where momentum is not 0. `.grad` is not changed.

    Raises ValueError for a number out of range, TypeError for complex Parameters, sparse gradients and other types.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        manhattan: bool = True,
        no_sign_change: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "manhattan": manhattan,
            "no_sign_change": no_sign_change,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """torch.optim's, with the group's own arguments checked."""
        checks.instance("param_group", param_group, dict, "a dictionary")
        if "params" not in param_group:
            checks.fail("param_group", "a dictionary with 'params'", repr(param_group))
        group = self.defaults | param_group
        for name in ("lr", "momentum", "weight_decay"):
            if name != "lr" or not isinstance(group[name], Tensor):
                group[name] = checks.not_negative(name, group[name])
            elif group[name].dim():
                checks.fail("lr", "a number or a 0-dim tensor", f"shape {tuple(group[name].shape)}")
        for name in ("manhattan", "no_sign_change"):
            checks.boolean(name, group[name])
        if group["foreach"] is not None and not isinstance(group["foreach"], bool):
            checks.fail("foreach", "True, False or None", repr(group["foreach"]), TypeError)
        param_group.update(group)
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.is_complex():
                self.param_groups.pop()
                checks.fail("params", "real Parameters", p.dtype, TypeError)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` computes the loss anew and returns it."""
        loss = None
        if closure is not None:
            checks.function("closure", closure, "a function that computes the loss, or None")
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.layout != torch.strided for p in params):
                checks.fail("params", "dense gradients", "a sparse one", TypeError)
            for some in [[p] for p in params] if group["foreach"] is False else [params] * bool(params):
                self._update(some, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
        delta: Any = [p.grad for p in params]
        if group["manhattan"]:
            delta = torch._foreach_sign(delta)
        if decay != 0:
            delta = torch._foreach_add(delta, params, alpha=decay)
        if momentum != 0:
            states = [self.state[p] for p in params]
            for p, state in zip(params, states, strict=True):
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
            buffers = [state["momentum_buffer"] for state in states]
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, delta)
            delta = buffers
        kept = [p for p in params if p.dim() > 1] if group["no_sign_change"] else []
        if kept:
            # sign(sign(w) + ½) is 1 at 0.
            signs = torch._foreach_sign(kept)
            torch._foreach_add_(signs, 0.5)
            torch._foreach_sign_(signs)
        if isinstance(lr, Tensor):
            torch._foreach_sub_(params, torch._foreach_mul(delta, lr))
        else:
            torch._foreach_add_(params, delta, alpha=-lr)
        if kept:
            torch._foreach_mul_(kept, signs)
            torch._foreach_clamp_min_(kept, [max(1e-10, torch.finfo(p.dtype).tiny) for p in kept])
            torch._foreach_mul_(kept, signs)
