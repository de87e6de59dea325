"""Every block of docs/algorithms.md and docs/rules.md runs as it is printed."""

import re
from pathlib import Path

import pytest
import torch

import bioplaus_kernels as bk

PAGE = Path(__file__).parents[1] / "docs" / "algorithms.md"
SECTIONS = PAGE.read_text().split("\n## ")
SETUP = re.findall(r"```python\n(.*?)```", SECTIONS[0], re.DOTALL)
BLOCKS = {part.partition("\n")[0]: re.findall(r"```python\n(.*?)```", part, re.DOTALL) for part in SECTIONS[1:]}


def test_every_algorithm_is_there_in_ten_lines() -> None:
    blocks = SETUP + [block for part in BLOCKS.values() for block in part]
    assert all(len(block.strip().splitlines()) <= 10 for block in blocks)
    for name in (*bk.feedback.RULES, *bk.direct.RULES, *bk.targetprop.VARIANTS):
        assert any(f'"{name}"' in block for block in blocks), name


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("section", BLOCKS)
def test_a_section_runs(section: str) -> None:
    assert SETUP and BLOCKS[section], "no code"
    names: dict[str, object] = {}
    for block in SETUP + BLOCKS[section]:
        exec(compile(block, f"{PAGE.name}: {section}", "exec"), names)
    # A section that trains learns.
    if "optimizer.step()" in "".join(BLOCKS[section]) and "range(20)" in "".join(BLOCKS[section]):
        model, x, y = (names[n] for n in ("model", "x", "y"))
        assert torch.nn.functional.cross_entropy(model(x), y) < 1.2


def test_the_rules_of_a_users_own_train() -> None:
    names: dict[str, object] = {"__name__": __name__}
    (block,) = re.findall(r"```python\n(.*?)```", (PAGE.parent / "rules.md").read_text(), re.DOTALL)
    exec(compile(block, "rules.md", "exec"), names)
    model, x = names["model"], torch.randn(8, 20, requires_grad=True)
    assert isinstance(model, torch.nn.Module)
    first, last = (model[i].feedback_matrix() for i in (0, 2))
    assert torch.linalg.matrix_rank(first) == 8 and set(last.unique().tolist()) == {-1.0, 0.0, 1.0}
    torch.testing.assert_close(torch.autograd.grad(model[0](x).sum(), x)[0], torch.ones(8, 64) @ first)
    model(x).square().sum().backward()
