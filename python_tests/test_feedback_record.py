"""What identifies a layer's feedback in a state_dict, a file or a pickle, those of version 0.1 among them."""

import copy
import gzip
import io
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from mlp import every_rule, mlp, x
from small import assert_equal, gradients
from torch import nn

import bioplaus_kernels as bk
from bioplaus_kernels.feedback import decode, encode

pytestmark = pytest.mark.usefixtures("one_thread")


def test_hostile_records() -> None:
    record = decode(mlp("fa").state_dict()["0.feedback_state"])
    assert record is not None and record.key is not None
    for other in (
        record._replace(fields="x"),
        record._replace(sums=[1]),
        record._replace(key=record.key._replace(seed="zz")),
        record._replace(key=record.key._replace(version=99)),
        record._replace(key=None),
    ):
        model = mlp("fa")
        with pytest.raises(RuntimeError, match=r"0.feedback_state: expected"):
            model.load_state_dict(model.state_dict() | {"0.feedback_state": encode(other)})
        model(x()).sum().backward()
    assert decode(torch.zeros(64, dtype=torch.complex64)) is None
    old = {n: t for n, t in mlp("fa").state_dict().items() if "state" not in n} | {"0.feedback_key": 3}
    with pytest.raises(RuntimeError, match=r"0.feedback_key: expected a tensor"):
        mlp("fa").load_state_dict(old)


def test_the_record_of_a_layer() -> None:
    model = mlp("fa", seed=12)
    record = decode(model.state_dict()["0.feedback_state"])
    assert record is not None and str(record) == "FeedbackAlignment(scale='xavier', entries='uniform', stored=False)"
    assert record.key is not None and record.key.seed == 12 and record.key.name == "0.weight"
    assert torch.equal(record.key.tensor(), bk.feedback.feedback_key(12, "0.weight"))
    assert decode(encode(record)) == record and decode(encode(record).float() + 0.4) == record


def test_describe(tmp_path: Any) -> None:
    from bioplaus_kernels.describe import describe_file

    model = nn.ModuleDict({"body": mlp("fa", seed=4), "head": bk.nn.Linear(3, 2, feedback=bk.SignSymmetry(scale=0.5))})
    text = str(bk.describe(model))
    named = ["weight", "body.0.weight", "body.2.weight", "head.weight"]
    assert [line.split()[0] for line in text.splitlines()] == named
    assert text.splitlines()[1].endswith("stored=False)  4") and "SignSymmetry(scale=0.5)" in text
    assert str(bk.describe(model.state_dict())) == text
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "a.pt")
    assert str(describe_file(tmp_path / "a.pt")).splitlines()[1].split()[0] == "model.body.0.weight"
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert str(describe_file(tmp_path / "dcp")) == text
    direct = bk.DirectFeedback(mlp(None), ["1"], example=x())
    assert "DFA(scale='nokland'" in str(bk.describe(direct)) and "blocks=['1']" in str(bk.describe(direct.state_dict()))
    assert str(bk.describe(nn.Linear(2, 2))) == "no weight with feedback"
    for content in ("nothing of the kind", ""):
        (tmp_path / "b.pt").write_text(content)
        with pytest.raises(ValueError, match=r"b.pt: cannot be read as a checkpoint \(\w+: "):
            describe_file(tmp_path / "b.pt")
    torch.save([model.state_dict()], tmp_path / "c.bin")
    assert "0.body.0.weight" in str(describe_file(tmp_path / "c.bin"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: expected a checkpoint of torch.distributed, or files \*.safetensors"):
        describe_file(tmp_path / "empty")
    assert "on the meta device" in str(bk.describe(model.to("meta").state_dict()))
    with pytest.raises(FileNotFoundError, match="no such file"):
        describe_file(tmp_path / "c.pt")
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module or a state_dict .*FILE\), got int"):
        bk.describe(3)


@pytest.fixture(params=[False, True], ids=["alone", "group"])
def group(request: Any) -> Iterator[None]:
    if request.param:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    if request.param:
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("rule", ["fa", "concordance", "kp", "fa_signed_init"])
def test_checkpoints_in_place(rule: str, tmp_path: Any) -> None:
    """torch.distributed.checkpoint writes into the tensors of the state_dict that it is given, any number of times."""
    models, other = [mlp(rule, seed=seed) for seed in (1, 2)], mlp(rule, seed=3)
    for i, model in enumerate(models):
        dcp.save(model.state_dict(), checkpoint_id=tmp_path / str(i), no_dist=True)
    into = other.state_dict()
    for i in (0, 1, 0):
        dcp.load(into, checkpoint_id=tmp_path / str(i), no_dist=True)
        assert_equal(gradients(other, x()), gradients(models[i], x()))


def test_what_ddp_leaves_alone() -> None:
    model = mlp("fa")
    assert model._ddp_params_and_buffers_to_ignore == ["0.feedback_state", "2.feedback_state"]
    model[0].reset_feedback()  # each rank's own draw
    assert model._ddp_params_and_buffers_to_ignore == ["2.feedback_state"]
    bk.convert_(model, "fa_signed_init")  # of the weights a rank began with
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")
    bk.convert_(model, "concordance", filter_fn=lambda m, name: name == "2")
    assert model._ddp_params_and_buffers_to_ignore == ["2.feedback_signs", "2.feedback_state"]
    bk.convert_(model, None)
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")


# Version 0.1.


@every_rule
def test_a_checkpoint_of_version_0_1(rule: str) -> None:
    model = mlp(rule)
    old = {n: t for n, t in model.state_dict().items() if not n.endswith("state")}
    if model[0].feedback.seeded:
        for i in (0, 2):
            old[f"{i}.feedback_key"] = torch.tensor([1, model[i].feedback_key[1], 0])
    other = mlp(rule, seed=8)
    if rule == "brsf":
        with pytest.warns(UserWarning, match=r"brsf: a key of layout version 1 takes its stream from 64 elements"):
            other.load_state_dict(old)
        assert other[0].feedback_key.tolist() == old["0.feedback_key"].tolist()
        return
    other.load_state_dict(old)
    assert_equal(gradients(other, x()), gradients(model, x()))
    again = mlp(rule, seed=9)
    again.load_state_dict(other.state_dict())
    assert_equal(gradients(again, x()), gradients(model, x()))


def test_pickled_modules_and_state_dicts_that_version_0_1_wrote() -> None:
    """Made by 0.1.0: a linear layer, a convolution and attention by every rule, their state_dicts, and every B."""
    found = pickle.loads(gzip.decompress((Path(__file__).parent / "data/version_0_1_0.pickle.gz").read_bytes()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for rule, model in found["models"].items():
            fresh = copy.deepcopy(model)
            for layer in fresh.modules():
                if isinstance(layer, bk.nn.FeedbackLayer):
                    layer.reset_feedback()
            fresh.load_state_dict(found["states"][rule])
            again = pickle.loads(pickle.dumps(model))
            again.load_state_dict(model.state_dict())
            for own in (model, fresh, again):
                for layer, b in zip(own.values(), found["b"][rule], strict=True):
                    assert torch.equal(layer.feedback_matrix(), b)
                below = torch.randn(2, 4, requires_grad=True)
                own["linear"](below).sum().backward()
                assert below.grad.isfinite().all()


def test_a_stranger_in_the_file() -> None:
    file = io.BytesIO()
    torch.save(mlp("fa").state_dict() | {"0.feedback_other": torch.zeros(1)}, file)
    file.seek(0)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*feedback_other"):
        mlp("fa").load_state_dict(torch.load(file))
