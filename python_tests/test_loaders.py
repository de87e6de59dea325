"""Checkpoints that other libraries load: transformers, accelerate, safetensors."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from small import RULES, assert_equal, gradients
from torch import Tensor, nn

import bioplaus_kernels as bk
from bioplaus_kernels.describe import describe_file

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY = {rule.name + ("-stored" if getattr(rule, "stored", False) else ""): rule for rule in RULES.values()}
EVERY |= {"kp": bk.KolenPollack()}
EVERY.pop("backprop")
FAST = ("kp",)
every_rule = pytest.mark.parametrize(
    "rule", [pytest.param(rule, marks=[] if rule in FAST else pytest.mark.slow) for rule in EVERY]
)


class Config(transformers.PretrainedConfig):
    model_type = "two_layers"

    def __init__(self, rule: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rule = rule


class Model(transformers.PreTrainedModel):
    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        rule = EVERY.get(config.rule)
        self.a, self.b = bk.nn.Linear(40, 30, feedback=rule), bk.nn.Linear(30, 40, feedback=rule)
        self.post_init()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def x() -> Tensor:
    return torch.randn(2, 40, generator=torch.Generator().manual_seed(3)).requires_grad_()


def layers(model: nn.Module) -> list[bk.nn.FeedbackLayer]:
    return [model.a, model.b]


@every_rule
def test_from_pretrained_of_its_own(rule: str, tmp_path: Path) -> None:
    saved = Model(Config(rule))
    saved.save_pretrained(tmp_path)
    assert [line.split("(")[0].split() for line in str(describe_file(tmp_path)).splitlines()[1:]] == [
        [f"{name}.weight", type(EVERY[rule]).__name__] for name in "ab"
    ]
    expected = gradients(saved, x())
    assert_equal(gradients(Model.from_pretrained(tmp_path), x()), expected)
    torch._dynamo.reset()
    compiled = torch.compile(Model.from_pretrained(tmp_path), backend="aot_eager")
    for a, e in zip(gradients(compiled, x()), expected, strict=True):
        torch.testing.assert_close(a, e)
    torch._dynamo.reset()
    whole = torch.compile(Model.from_pretrained(tmp_path), backend="aot_eager", fullgraph=True)
    if rule == "usf":
        whole(x())
    elif transformers.__version__ >= "5":  # before, it gave layers what it had by load_state_dict, one tensor at a time
        with pytest.raises(Exception, match=r"call the model once without torch.compile"):
            whole(x())


@every_rule
def test_from_pretrained_of_plain_weights(rule: str, tmp_path: Path) -> None:
    Model(Config()).save_pretrained(tmp_path)
    for _ in range(3):  # memory that is not written holds other things each time
        model = Model.from_pretrained(tmp_path, config=Config(rule))
        if rule == "fa_signed_init":
            with pytest.raises(RuntimeError, match="was lost"):
                model(x())
            continue
        assert all(grad.isfinite().all() for grad in gradients(model, x()))
        for layer in layers(model):
            b = layer.feedback_matrix()
            assert 0.8 < float(b.square().mean().sqrt()) / layer.rms() < 1.2 or EVERY[rule].scale == "match"
            if EVERY[rule].keyed:
                # What the layer's own key draws, not what was in the memory.
                key = layer.feedback_record().key
                layer.reset_feedback(lambda name, key=key: key)
                assert torch.equal(layer.feedback_matrix(), b)


@every_rule
def test_init_empty_weights(rule: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    full = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 40))
    accelerate.Accelerator().save_model(full, tmp_path / "plain")
    bk.convert_(full, EVERY[rule], seed=2)
    accelerate.Accelerator().save_model(full, tmp_path / "own")
    for source in ("plain", "own"):
        with accelerate.init_empty_weights():
            model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 40))
            bk.convert_(model, EVERY[rule], seed=2)
        accelerate.load_checkpoint_in_model(model, str(tmp_path / source), device_map={"": "cpu"})
        if source == "plain" and rule == "fa_signed_init":
            with pytest.raises(RuntimeError, match="was lost"):
                model(x())
            continue
        assert_equal(gradients(model, x()), gradients(full, x()))
