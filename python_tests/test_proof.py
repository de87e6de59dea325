"""What proves that a rule acts: convert_'s example, its first forward, and check."""

import copy
import io
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import fresh
import pytest
import torch
import torch.nn.functional as F
from small import gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bioplaus_kernels as bk
from bioplaus_kernels.proof import Once, Watch

pytestmark = pytest.mark.usefixtures("one_thread")


def x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (3, 4)), requires_grad=True)


def outcomes(report: bk.Report) -> dict[str, str]:
    return {row.name: row.outcome for row in report.rows}


def reason(report: bk.Report, name: str) -> str:
    return next(row.reason for row in report.rows if row.name == name)


def pending(model: nn.Module) -> bool:
    hooks = [*model._forward_hooks.values(), *model._forward_pre_hooks.values()]
    return any(isinstance(hook, Once) for hook in hooks)


class Reads(nn.Module):
    """A layer that is called, one whose weight is read, one that is neither."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called, self.spare = (nn.Linear(4, 4) for _ in range(3))
        self.norm, self.dropout = nn.BatchNorm1d(4), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.norm(self.called(x @ self.read.weight.t())))


class Autoencoder(nn.Module):
    """Tied: the encoder's weight decodes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.encoder = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.encoder(self.first(x))), self.encoder.weight.t())


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


# The example.


def test_an_example_proves_each_row_or_says_why_not() -> None:
    model = Reads()
    report = bk.convert_(model, "usf", example=x())
    assert outcomes(report) == {"read": "left", "called": "proven", "spare": "unused", "norm": "left"}
    assert reason(report, "read") == (
        "its weight goes into TBackward0 without a call of the layer; see (root) (Reads); "
        "to allow it: bioplaus_kernels.register(test_proof.Reads)"
    )
    assert type(model.read) is nn.Linear and type(model.spare) is bk.nn.Linear
    assert not pending(model)
    assert str(report).splitlines()[-1] == "1 proven, 1 unused, 2 left"


@pytest.mark.parametrize("example", [x(), (x(),), {"x": x()}])
def test_an_example_is_a_tensor_a_tuple_or_a_dict(example: Any) -> None:
    assert bk.convert_(Reads(), "usf", example=example).proven == ["called"]


def test_resnet18s_rows_are_proven_but_for_the_first() -> None:
    model = pytest.importorskip("torchvision").models.resnet18(num_classes=4)
    report = bk.convert_(model, "usf", last_layer="backprop", example=torch.randn(1, 3, 64, 64))
    convolutions = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert report.proven == convolutions[1:] and report.converted == convolutions
    assert reason(report, "conv1") == "not proven: its input needs no gradient, so none goes through B"


@pytest.mark.parametrize("rule", ["usf", "fa", "kp"])
def test_attention_is_proven_by_both_its_projections(rule: str) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    report = bk.convert_(model, rule, example=x(2, 3, 8))
    assert report.proven == report.converted and len(report.proven) == 6
    other = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
    assert bk.convert_(other, rule, example=(x(3, 2, 8), x(5, 2, 4), x(5, 2, 6))).proven == [""]


@pytest.mark.parametrize("layer", ["LocallyConnected1d", "LocallyConnectedTranspose1d"])
def test_locally_connected_layers_are_proven(layer: str) -> None:
    size = {"output_size" if "Transpose" in layer else "input_size": 4}
    model = nn.Sequential(getattr(bk.nn, layer)(2, 2, 1, **size))
    assert bk.convert_(model, "fa", example=x(1, 2, 4)).proven == ["0"]


def test_called_and_read_is_a_row_and_one_warning() -> None:
    model = Autoencoder()
    with pytest.warns(UserWarning, match="does not act everywhere: encoder: its weight goes into TBackward0"):
        report = bk.convert_(model, "usf", example=x())
    assert outcomes(report) == {"first": "proven", "encoder": "called and read"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x()).sum().backward()


def test_autocast_hides_no_read() -> None:
    model = Reads()
    bk.convert_(model, "usf")
    with torch.autocast("cpu", torch.bfloat16):
        assert outcomes(bk.check(model, x())) == {"read": "read", "called": "proven", "spare": "unused"}


def test_non_reentrant_checkpointing_is_seen_and_reentrant_is_not() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.inner, self.reentrant = mlp(), reentrant

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=self.reentrant)

    assert bk.convert_(Checkpointed(False), "usf", example=x()).proven == ["inner.0", "inner.2"]
    report = bk.convert_(Checkpointed(True), "usf", example=x())
    assert report.converted == ["inner.0", "inner.2"] and report.proven == []
    assert "called without gradients, as in reentrant checkpointing" in reason(report, "inner.0")


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


def test_a_parameter_of_two_modules_is_nobodys_fault() -> None:
    class Language(nn.Module):
        def __init__(self, calls: bool) -> None:
            super().__init__()
            self.embedding, self.head, self.calls = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False), calls
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            y = self.embedding(x)
            return self.head(y) if self.calls else y

    tokens = torch.arange(6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = bk.convert_(Language(True), "usf", example=tokens)
        assert report.proven == ["head"] and reason(report, "head") == "its weight is embedding's too"
        report = bk.convert_(model := Language(False), "usf")
        model(tokens)
    assert outcomes(report)["head"] == "unused" and "only that was called" in reason(report, "head")


def test_parametrized_weights() -> None:
    model = mlp()
    bk.convert_(model, "usf")
    nn.utils.parametrizations.weight_norm(model[0])
    assert bk.check(model, x()).proven == ["0", "2"]

    class Penalty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = model[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).sum() + self.layer.weight.sum()

    with pytest.warns(UserWarning, match="layer: its weight goes into"):
        bk.convert_(whole := Penalty(), "usf")
        whole(x())


def test_frozen_weights() -> None:
    model = Reads().requires_grad_(False)
    report = bk.convert_(model, "usf", example=x())
    assert outcomes(report) == {"read": "left", "called": "proven", "spare": "unused", "norm": "left"}
    assert not any(p.requires_grad for p in model.parameters())
    report = bk.convert_(model := Reads().requires_grad_(False), "usf")
    model(x())
    assert outcomes(report)["called"] == "proven"
    assert reason(report, "read") == "not proven: not called, and its weight is frozen, so a read cannot be seen"


class Output:
    __slots__ = ("hidden", "parts")

    def __init__(self, parts: Any) -> None:
        self.parts, self.hidden = parts, self


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: Output([{"y": y}]),
        lambda y: torch.distributions.Normal(y, 1.0),
        lambda y: {"aux": None, "y": (y, "text")},
    ],
)
def test_outputs_of_any_kind(wrap: Callable[[Tensor], Any]) -> None:
    model = mlp()
    model.register_forward_hook(lambda module, args, y: wrap(y))
    assert bk.convert_(model, "usf", example=x()).proven == ["0", "2"]


def test_outer_modes_do_not_matter() -> None:
    model = mlp()
    bk.convert_(model, "usf")
    with torch.no_grad():
        assert bk.check(model, x()).proven == ["0", "2"]
    with torch.inference_mode():
        assert bk.check(model, torch.randn(1, 4)).names("converted", "proven") == ["0", "2"]


def test_an_example_whose_outputs_have_no_gradient_proves_nothing() -> None:
    model = mlp()
    model.register_forward_hook(lambda module, args, y: y.detach())
    report = bk.convert_(model, "usf", example=x())
    assert outcomes(report) == {"0": "converted", "2": "converted"} and reason(report, "0") == "not proven yet"
    assert pending(model)


def test_an_example_that_raises_leaves_the_proof_to_the_first_forward() -> None:
    with pytest.raises(ValueError, match="input"):
        bk.convert_(model := mlp(), "usf", example=x(3, 5))
    assert pending(model) and "used" not in vars(model[0])


# The first forward.


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
    assert report.proven == ["0", "2"]


def test_exporting_is_silent() -> None:
    bk.convert_(model := mlp(), "usf")
    with torch.no_grad():
        for strict in (False, True):
            torch.export.export(model, (x().detach(),), strict=strict)
    assert pending(model)


# Sharded models.

SHARDED = {
    "usf": bk.SignSymmetry(),
    "usf-match": bk.SignSymmetry(scale="match"),
    "fa": bk.FeedbackAlignment(),
    "fa_signed_init": bk.SignedInit(),
    "kp": bk.KolenPollack(),
}


class Block(nn.Module):
    """Two layers, one of which may be read."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.first, self.second, self.reads = nn.Linear(4, 4), nn.Linear(4, 4), reads

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return y @ self.second.weight.t() if self.reads else self.second(y)


def _sharded(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=1)
    try:
        found: dict[Any, Any] = {}
        for rule in SHARDED:
            for first in ("convert", "shard"):
                model = nn.Sequential(Block(False), Block(False))
                torch.manual_seed(0)
                try:
                    if first == "convert":
                        report = bk.convert_(model, SHARDED[rule])
                    fully_shard(model[0]), fully_shard(model)
                    if first == "shard":
                        report = bk.convert_(model, SHARDED[rule])
                    model(x()).sum().backward()
                    found[rule, first] = report.proven
                except ValueError as error:
                    found[rule, first] = str(error)
        report = bk.convert_(model := nn.Sequential(Block(True)), "usf")
        fully_shard(model[0]), fully_shard(model)
        model(x())
        found["read"] = outcomes(report), reason(report, "0.second")
        found["layer"] = bk.convert_(fully_shard(nn.Linear(4, 4)), "usf").rows[0].reason
        torch.save(found, f"{folder}/found")
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    if not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    folder = tmp_path_factory.mktemp("sharded")
    torch.multiprocessing.start_processes(_sharded, (str(folder),), nprocs=1, start_method=fresh.START_METHOD)
    return torch.load(folder / "found")


@pytest.mark.parametrize("rule", SHARDED)
def test_converted_then_sharded_is_proven(rule: str, sharded: dict[Any, Any]) -> None:
    assert sharded[rule, "convert"] == ["0.first", "0.second", "1.first", "1.second"]


@pytest.mark.parametrize("rule", SHARDED)
def test_sharded_then_converted_works_or_says_the_order(rule: str, sharded: dict[Any, Any]) -> None:
    keeps = rule in ("kp", "fa_signed_init")
    expected = "this one is sharded already: convert_ first, then fully_shard"
    assert expected in sharded[rule, "shard"] if keeps else sharded[rule, "shard"] == sharded[rule, "convert"]
    assert sharded["layer"] == "sharded by itself: convert_ first, then fully_shard"


def test_a_sharded_weight_that_is_not_called_is_never_proven(sharded: dict[Any, Any]) -> None:
    found, why = sharded["read"]
    assert found == {"0.first": "proven", "0.second": "converted"}
    assert why == "not proven: not called, and its weight is sharded, so a read cannot be seen"


# check.


class Moving(nn.Module):
    """Buffers that a call replaces, registers, grows and writes, and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("cache", torch.zeros(0))
        self.register_buffer("count", torch.tensor(0))
        self.alias, self.seen = self.count, [1]

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + x.detach().mean(0)
        self.cache.resize_(3).fill_(1)
        self.alias += 1
        self.steps = 1
        self.seen.append(2)
        self.register_buffer("born", torch.ones(2))
        self.register_forward_hook(lambda *_: None)
        return self.layer(x)


def test_check_leaves_everything_as_it_was() -> None:
    model = Moving()
    bk.convert_(model, "fa")
    model.layer.weight.grad = torch.ones(4, 4)
    given, before, contents = x(), dict(vars(model)), {n: b.clone() for n, b in model.named_buffers()}
    objects, hooks = dict(model.named_buffers()), dict(model._forward_hooks)
    state, versions = torch.get_rng_state(), {n: b._version for n, b in model.layer.named_buffers()}
    assert bk.check(model, given).proven == ["layer"]
    assert vars(model) == before and model.seen == [1] and dict(model._forward_hooks) == hooks
    assert list(dict(model.named_buffers())) == list(contents)
    for name, buffer in model.named_buffers():
        assert buffer is objects[name] and torch.equal(buffer, contents[name])
    assert {n: b._version for n, b in model.layer.named_buffers()} == versions
    assert torch.equal(model.layer.weight.grad, torch.ones(4, 4)) and torch.equal(torch.get_rng_state(), state)
    assert pending(model)


def test_check_between_a_forward_and_its_backward() -> None:
    """Batch norm has saved its running statistics."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)).train()
    bk.convert_(model, "fa", example=x())
    loss = model.eval()(x()).sum()
    bk.check(model.train(), x())
    loss.backward()


def test_check_restores_when_the_model_raises() -> None:
    bk.convert_(model := nn.Sequential(nn.BatchNorm1d(5), nn.Linear(4, 4)), "fa")
    with pytest.raises(ValueError, match="input"):
        bk.check(model, x(3, 5))
    assert not model[1]._forward_pre_hooks and "used" not in vars(model[1])
    assert model[0].num_batches_tracked == 0


def test_check_of_a_model_without_rules() -> None:
    model = Reads()
    report = bk.check(model, x=x())
    assert outcomes(report) == {"read": "read", "called": "called", "spare": "unused"}


def test_check_refuses_unknown_shapes() -> None:
    with pytest.raises(ValueError, match=r"model: expected one that was called, .*got a lazy 0"):
        bk.check(nn.Sequential(nn.LazyLinear(4)), x())


def test_wrapped_models() -> None:
    accelerate = pytest.importorskip("accelerate")
    bk.convert_(model := mlp(), "usf")
    accelerate.hooks.add_hook_to_module(model[0], accelerate.hooks.ModelHook())
    assert bk.check(nn.DataParallel(model), x()).proven == ["module.0", "module.2"]
    assert bk.convert_(model, None).restored == ["0", "2"]
    assert type(model[0]) is bk.nn.Linear and type(model[2]) is nn.Linear
    assert all(g.isfinite().all() for g in gradients(model, x()))
