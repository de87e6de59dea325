"""Every block of the pages below, in docs/, runs as it is printed."""

import re
from pathlib import Path

import pytest
import torch

import bioplaus_kernels as bk

DOCS = Path(__file__).parents[1] / "docs"


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def sections(page: str) -> tuple[list[str], dict[str, list[str]]]:
    """Of a page, what runs before each section, and the sections by name."""
    first, *rest = (DOCS / page).read_text().split("\n## ")
    return blocks(first), {part.partition("\n")[0]: blocks(part) for part in rest}


SETUP, BLOCKS = sections("algorithms.md")
PITFALLS_SETUP, PITFALLS = sections("pitfalls.md")
REGISTER_SETUP, REGISTER = sections("register.md")


def test_every_algorithm_is_there_in_ten_lines() -> None:
    every = SETUP + [block for part in BLOCKS.values() for block in part]
    assert all(len(block.strip().splitlines()) <= 10 for block in every)
    for name in (*bk.feedback.RULES, *bk.direct.RULES, *bk.targetprop.VARIANTS):
        assert any(f'"{name}"' in block for block in every), name


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("section", BLOCKS)
def test_a_section_runs(section: str) -> None:
    assert SETUP and BLOCKS[section], "no code"
    names: dict[str, object] = {}
    for block in SETUP + BLOCKS[section]:
        exec(compile(block, f"algorithms.md: {section}", "exec"), names)
    # A section that trains learns.
    if "optimizer.step()" in "".join(BLOCKS[section]) and "range(20)" in "".join(BLOCKS[section]):
        model, x, y = (names[n] for n in ("model", "x", "y"))
        assert torch.nn.functional.cross_entropy(model(x), y) < 1.2


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("section", PITFALLS)
def test_a_pitfall_is_as_it_says(section: str) -> None:
    assert PITFALLS_SETUP and PITFALLS[section], "no code"
    assert all(3 <= len(block.strip().splitlines()) <= 8 for block in PITFALLS[section])
    names: dict[str, object] = {"__name__": __name__}
    try:
        for block in PITFALLS_SETUP + PITFALLS[section]:
            exec(compile(block, f"pitfalls.md: {section}", "exec"), names)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("section", REGISTER)
def test_a_class_is_registered(section: str) -> None:
    assert REGISTER_SETUP and REGISTER[section], "no code"
    names: dict[str, object] = {"__name__": __name__}
    for block in REGISTER_SETUP + REGISTER[section]:
        exec(compile(block, f"register.md: {section}", "exec"), names)


def test_the_rules_of_a_users_own_train() -> None:
    names: dict[str, object] = {"__name__": __name__}
    *_, block = blocks((DOCS / "own-rule.md").read_text())
    exec(compile(block, "own-rule.md", "exec"), names)
    model, x = names["model"], torch.randn(8, 20, requires_grad=True)
    assert isinstance(model, torch.nn.Module)
    first, last = (model[i].feedback_matrix() for i in (0, 2))
    assert torch.linalg.matrix_rank(first) == 8 and set(last.unique().tolist()) == {-1.0, 0.0, 1.0}
    torch.testing.assert_close(torch.autograd.grad(model[0](x).sum(), x)[0], torch.ones(8, 64) @ first)
    model(x).square().sum().backward()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("section", sections("locally-connected.md")[1])
def test_a_section_on_locally_connected_nets_runs(section: str) -> None:
    setup, parts = sections("locally-connected.md")
    # The initialisation is of the layer before.
    before = parts["Padding"] if section == "Initialisation" else []
    assert parts[section], "no code"
    names: dict[str, object] = {}
    for block in setup + before + parts[section]:
        exec(compile(block, f"locally-connected.md: {section}", "exec"), names)
