"""The first forward after convert_, which proves that a rule acts."""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from proving import Reads, mlp, outcomes, pending, reason, x
from small import gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bioplaus_kernels as bk
from bioplaus_kernels._watch import Watch

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_first_forward_with_gradients_proves() -> None:
    report = bk.convert_(model := mlp(), "usf")
    assert outcomes(report) == {"0": "converted", "2": "converted"}
    with torch.no_grad():
        model(x())
    assert pending(model)
    model(x())
    assert report.proven == ["0", "2"] and not pending(model)
    assert not any(vars(m).keys() & {"used", "is_plain"} for m in model.modules())
    assert (model._forward_hooks, model._forward_hooks_always_called, model._forward_pre_hooks) == ({}, {}, {})


def test_a_read_weight_raises_once() -> None:
    report = bk.convert_(model := Reads(), "usf")
    with pytest.raises(RuntimeError, match=r"^read: its weight goes into TBackward0 .* see \(root\) \(Reads\)"):
        model(x())
    assert outcomes(report) == {"read": "read", "called": "proven", "spare": "unused", "norm": "left"}
    model(x()).sum().backward()


def test_an_error_in_the_forward_leaves_the_proof_to_the_next() -> None:
    report = bk.convert_(model := mlp(), "usf")
    with pytest.raises(ValueError, match="input"):
        model(x(3, 5))
    assert pending(model) and "used" not in vars(model[0])
    model(x())
    assert report.proven == ["0", "2"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_prove_themselves(copied: Callable[[nn.Module], nn.Module]) -> None:
    bk.convert_(model := Reads(), "usf")
    other = copied(model)
    for m in (other, model):
        with pytest.raises(RuntimeError, match="without a call of the layer"):
            m(x())
        m(x())
        assert not pending(m)


def test_torch_save() -> None:
    bk.convert_(model := mlp(), "usf")
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    loaded(x())
    assert not pending(loaded)


def test_under_functional_call_and_autograd_grad() -> None:
    report = bk.convert_(model := mlp(), "usf")
    weights = {n: (p * 2).detach().requires_grad_() for n, p in model.named_parameters()}
    torch.autograd.grad(torch.func.functional_call(model, weights, x()).sum(), list(weights.values()))
    assert report.proven == ["0", "2"]
    bk.convert_(model := Reads(), "usf")
    weights = {n: (p * 2) for n, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="read: its weight goes into"):
        torch.func.functional_call(model, weights, x())


def test_back_propagation_for_a_while_is_no_proof() -> None:
    report = bk.convert_(model := mlp(), "usf")
    with bk.metrics.backprop(model):
        model(x())
    assert pending(model) and report.proven == []
    model(x())
    assert report.proven == ["0", "2"]


def test_hooks_of_a_part_and_of_the_whole() -> None:
    part = bk.convert_((model := nn.Sequential(mlp(), nn.Linear(4, 4)))[0], "usf")
    whole = bk.convert_(model, "fa", filter_fn=lambda m, name: name == "1")
    model(x())
    assert part.proven == ["0", "2"] and whole.proven == ["1"]
    assert not any("used" in vars(m) for m in model.modules())


def test_a_second_conversion_takes_the_hooks_place() -> None:
    model = mlp()
    bk.convert_(model, "usf")
    bk.convert_(model, "fa")
    assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 1
    bk.convert_(model, None)
    assert not pending(model)


def test_the_first_forward_is_the_same_as_the_second() -> None:
    model, given = mlp(), torch.randn(3, 4)
    bk.convert_(model, "usf")
    first, second = (gradients(model, given.clone().requires_grad_()) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_a_replaced_layer_is_named() -> None:
    report = bk.convert_(model := mlp(), "usf")
    model[2] = nn.Linear(4, 6)
    with pytest.warns(UserWarning, match="2 was replaced by a Linear: convert_ the model again"):
        model(x())
    assert report.left == ["2"] and report.proven == ["0"]


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models_say_so_or_stay_silent(whole: bool) -> None:
    report = bk.convert_(model := nn.Sequential(mlp(), nn.Tanh()), "usf")
    torch.compiler.reset()
    if whole:
        torch.compile(model, backend="aot_eager", fullgraph=True)(x()).sum().backward()
        assert pending(model) and report.proven == []
        assert bk.check(torch.compile(model, backend="aot_eager"), x()).names("proven") == [
            "_orig_mod.0.0",
            "_orig_mod.0.2",
        ]
    else:
        model[0].compile(backend="aot_eager", fullgraph=True)
        model(x()).sum().backward()
        assert reason(report, "0.0") == "not proven: compiled or replicated, cannot be seen"
        assert bk.check(model, x()).proven == ["0.0", "0.2"]


def test_a_part_compiled_after_the_conversion() -> None:
    report = bk.convert_(model := nn.Sequential(mlp(), nn.Linear(4, 4)), "usf")
    torch.compiler.reset()
    model[0] = torch.compile(model[0], backend="aot_eager", fullgraph=True)
    model(x())
    assert report.proven == ["1"] and reason(report, "0.2") == "not proven: compiled or replicated, cannot be seen"


def test_a_layer_within_an_adapter() -> None:
    class Adapter(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base_layer, self.down, self.up = base, nn.Linear(4, 2), nn.Linear(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.up(self.down(x))

    report = bk.convert_(model := mlp(), "usf")
    model.requires_grad_(False)
    model[2] = Adapter(model[2])
    model(x())
    assert outcomes(report) == {"0": "converted", "2": "converted"} and "is frozen" in reason(report, "2")
    model[2].base_layer.requires_grad_(True)
    assert bk.check(model, x()).proven == ["0", "2.base_layer"]


def test_exporting_is_silent() -> None:
    bk.convert_(model := mlp(), "usf")
    with torch.no_grad():
        for strict in (False, True):
            torch.export.export(model, (x().detach(),), strict=strict)
    assert pending(model)


def test_a_checkpointed_first_layer_is_computed_again_as_it_was() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Conv1d(2, 2, 1), nn.Tanh(), nn.Conv1d(2, 2, 1))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    report = bk.convert_(model := Checkpointed(), "usf")
    model(torch.randn(1, 2, 3)).sum().backward()
    assert outcomes(report) == {"inner.0": "converted", "inner.2": "proven"}
    assert reason(report, "inner.0").startswith("not proven: its input needs no gradient")


def test_a_replica_is_not_watched() -> None:
    layer = bk.nn.Linear(4, 4, feedback="usf")
    watch = Watch(layer)
    assert not vars(layer._replicate_for_data_parallel()).keys() & {"used", "is_plain"}
    watch.close()


def test_another_threads_forward_is_its_own() -> None:
    report = bk.convert_(model := mlp(), "usf")

    def other(module: nn.Module, *_: Any) -> None:
        thread = threading.Thread(target=model, args=(torch.randn(3, 4),))
        handle.remove()
        thread.start()
        thread.join()

    handle = model[1].register_forward_pre_hook(other)
    model(torch.randn(3, 4))
    assert outcomes(report) == {"0": "converted", "2": "proven"} and not pending(model)


class Frozen(nn.Module):
    """A frozen layer that is called, and read or not."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.first, self.second, self.reads = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False), reads

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = self.second(h)
        return y + F.linear(h, self.second.weight) if self.reads else y


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.filterwarnings("ignore:a rule does not act everywhere")
def test_a_frozen_weight_is_proven_by_check_alone(reads: bool) -> None:
    report = bk.convert_(model := Frozen(reads), "usf")
    model(x())
    assert outcomes(report) == {"first": "proven", "second": "converted"}
    assert reason(report, "second") == (
        "not proven: B acts, but its weight is frozen, and only check sees whether it is read besides"
    )
    expected = "called and read" if reads else "proven"
    assert outcomes(bk.check(model, x()))["second"] == expected
    assert outcomes(bk.convert_(Frozen(reads), "usf", example=x()))["second"] == expected


def test_a_frozen_weight_that_is_not_called() -> None:
    report = bk.convert_(model := Reads().requires_grad_(False), "usf")
    model(x())
    assert reason(report, "read") == "not proven: not called, and its weight is frozen, so only check sees a read"


class Tree(nn.Module):
    """A model that calls itself."""

    def __init__(self, reads: bool = False) -> None:
        super().__init__()
        self.leaf, self.node, self.reads = nn.Linear(4, 4), nn.Linear(4, 4), reads

    def forward(self, tree: Any) -> Tensor:
        if isinstance(tree, Tensor):
            return F.linear(tree, self.node.weight) if self.reads else self.leaf(tree)
        return self.node(self(tree[0]) + self(tree[1]))


def test_a_model_that_calls_itself_is_proven_by_its_outermost_call() -> None:
    tree = ((x(), x()), x())
    report = bk.convert_(model := Tree(), "usf")
    model(tree)
    assert report.proven == ["leaf", "node"] and not pending(model)
    bk.convert_(model := Tree(reads=True), "usf")
    with pytest.warns(UserWarning, match="node: its weight goes into"):
        model(tree)


def test_a_forward_that_was_interrupted_is_over() -> None:
    report = bk.convert_(model := mlp(), "usf")

    def interrupt(*_: Any) -> None:
        handle.remove()
        raise KeyboardInterrupt

    handle = model[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x())
    model(x())
    assert report.proven == ["0", "2"] and not pending(model) and "used" not in vars(model[0])


def test_an_error_within_a_model_that_calls_itself() -> None:
    report = bk.convert_(model := Tree(), "usf")
    with pytest.raises(ValueError, match="features in the last dimension"):
        model(((x(3, 5), x()), x()))
    model((x(), x()))
    assert report.proven == ["leaf", "node"] and not pending(model)


class Inside(nn.Module):
    """A weight that is called, or read."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.layer, self.reads = nn.Linear(4, 4), reads

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight) if self.reads else self.layer(x)


def _blocks(reads: bool) -> nn.Sequential:
    return nn.Sequential(nn.Sequential(nn.Linear(4, 4), Inside(reads), nn.Tanh()), nn.Linear(4, 5), nn.Identity())


@pytest.mark.parametrize("logits", [None, "1"])
@pytest.mark.parametrize("part", ["", "0"])
@pytest.mark.parametrize("rule", ["dfa", "shallow"])
def test_a_block_of_direct_feedback_is_proven_by_what_is_differentiated(rule: str, part: str, logits: Any) -> None:
    model, given = _blocks(False), torch.randn(3, 4)
    report = bk.convert_(model.get_submodule(part), "usf")
    direct = bk.DirectFeedback(model, ["0"], rule, example=given, logits=logits)
    assert report.proven == []
    direct(given)
    name = "1.layer" if part else "0.1.layer"
    # Nothing that a block returns has a gradient, and the part has no other output.
    unseen = "converted" if part else "unused"
    assert outcomes(report)[name] == ("proven" if rule == "dfa" else unseen)
    assert outcomes(bk.check(direct, given))["model.0.1.layer"] == ("proven" if rule == "dfa" else "unused")


@pytest.mark.parametrize("logits", [None, "1"])
def test_a_read_within_a_block_of_direct_feedback(logits: Any) -> None:
    bk.convert_(model := _blocks(True), "usf")
    given = torch.randn(3, 4)
    direct = bk.DirectFeedback(model, ["0"], "dfa", example=given, logits=logits)
    with pytest.raises(RuntimeError, match=r"0\.1\.layer: its weight goes into TBackward0"):
        direct(given)
    direct(given).sum().backward()
