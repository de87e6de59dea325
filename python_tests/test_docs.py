"""The documentation: public names have docstrings and a place in the API pages, links lead somewhere, blocks run, and
what is said in several places is the same.

A page runs from top to bottom in one namespace, but those whose sections `test_gallery.py` runs one by one. A block
that cannot run everywhere says so in the line above it, `<!-- not run: needs a GPU -->`.
"""

import contextlib
import importlib
import inspect
import json
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import matplotlib
import pytest
import torch
from setuptools.command.egg_info import FileList

import bioplaus_kernels as bk

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"(?:<!-- not run: (needs \w.*?) -->\n+)?^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<!\\)\]\(([^)\s]+)\)")


def _public(name: str, found: object, seen: set[int]) -> Iterator[tuple[str, object]]:
    """Everything of ours that is reached by public names: modules, classes with their methods, functions."""
    if id(found) in seen:
        return
    seen.add(id(found))
    yield name, found
    if inspect.ismodule(found):
        for part in getattr(found, "__all__", [n for n in vars(found) if not n.startswith("_")]):
            child = getattr(found, part)
            home = child.__name__ if inspect.ismodule(child) else getattr(child, "__module__", "")
            if str(home).startswith(bk.__name__) and (inspect.ismodule(child) or callable(child)):
                yield from _public(f"{name}.{part}", child, seen)
    elif inspect.isclass(found):
        for part, member in vars(found).items():
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if not part.startswith("_") and inspect.isfunction(function):
                yield f"{name}.{part}", getattr(found, part)


def _documented(found: object) -> bool:
    # A class has its own; what overrides a method has that method's.
    return bool(vars(found).get("__doc__") if inspect.isclass(found) else inspect.getdoc(found))


def _without_docstring(module: ModuleType) -> list[str]:
    return [name for name, found in _public("bk", module, set()) if not _documented(found)]


def test_every_public_name_has_a_docstring() -> None:
    names = [name for name, _ in _public("bk", bk, set())]
    assert len(names) > 300 and "bk.nn.Conv2d" in names and "bk.DirectFeedback.restore" in names
    assert _without_docstring(bk) == []


def test_a_missing_docstring_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bk.Report, "__doc__", None)
    monkeypatch.setattr(bk.optim.BatchManhattan.step, "__doc__", "")
    assert set(_without_docstring(bk)) == {"bk.optim.BatchManhattan.step", "bk.Report"}


def test_api_pages_have_every_public_name() -> None:
    shown = []
    for page in sorted((DOCS / "api").glob("*.md")):
        for path in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE):
            module, _, name = path.rpartition(".")
            shown.append(getattr(importlib.import_module(module), name))
    for name in bk.__all__:
        found = getattr(bk, name)
        assert inspect.ismodule(found) or name == "__version__" or found in shown, name
    for module in (bk.nn, bk.direct, bk.optim, bk.distributed):
        for name in getattr(module, "__all__", ()):
            found = getattr(module, name)
            assert not inspect.isclass(found) or not found.__module__.startswith(bk.__name__) or found in shown, name


def _markdown() -> list[Path]:
    tracked = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    # Of a copy without git, the folders that have some.
    found = tracked.split() or [str(p.relative_to(ROOT)) for p in (*ROOT.glob("*.md"), *DOCS.rglob("*.md"))]
    return [ROOT / name for name in found if not re.search(r"docs/results/.*/notes\.md", name)]


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    words = [re.sub(r"[^\w\- ]", "", re.sub(r"`", "", heading.lower())).strip() for heading in headings]
    return {re.sub(r"[\s]+", "-", word) for word in words}


def dead_links(page: Path, text: str) -> list[str]:
    """Links of a page that name no file or heading of the repository."""
    dead = []
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)
    for link in LINK.findall(prose):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path
        if not target.exists() or (anchor and anchor not in _anchors(target.read_text() if path else text)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", _markdown(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert dead_links(page, page.read_text()) == []


def test_a_dead_link_is_seen() -> None:
    there = "[a](rules.md) [b](rules.md#scale) [c](#here) [d](https://x.y) `[e](no.md)`\n# Here\n"
    text = f"{there}[b](no.md) [d](rules.md#no) ![g](no.png)"
    assert dead_links(DOCS / "index.md", text) == ["no.md", "rules.md#no", "no.png"]


def test_lines_of_a_docstring_are_a_list_where_they_are_of_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "griffe", SimpleNamespace(Extension=object))
    markdown = runpy.run_path(str(ROOT / "scripts" / "docstrings.py"))["markdown"]
    text = "uSF: B = s * sign(W).\n\nscale: its size.\n*args, other: the rest; its\nstate: a key."
    assert markdown(text, {"scale", "args", "other"}) == (
        "uSF: B = s \\* sign(W).\n\n\n* `scale`: its size.\n* `*args`, `other`: the rest; its\n  state: a key."
    )


def test_a_source_build_is_told_of_as_it_is() -> None:
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    wanted = {"torch", *(re.match(r"[\w-]+", name)[0] for name in required)}
    said = {}
    for page in _markdown():
        lines = re.findall(r"pip install (torch .*)", page.read_text())
        said[str(page.relative_to(ROOT))] = [set(line.split()) for line in lines]
    assert said["README.md"] and said["docs/index.md"] and said["docs/install.md"]
    assert all(names == wanted for found in said.values() for names in found), said


def test_rules_whose_b_learns_are_named_where_it_matters() -> None:
    trained, learning = set(), set()
    for name, rule in {**bk.feedback.RULES, "low_rank": lambda: bk.LowRank(learned=True)}.items():
        layer = bk.nn.Linear(4, 3, bias=False, feedback=rule())
        if not layer.feedback.fixed:
            learning.add(name)
        if any(parameter.requires_grad for key, parameter in layer.named_parameters() if key != "weight"):
            trained.add(name)
    for page, around, wanted in (
        ("swap.md", r"rules that train a B of their own \((.*?)\)", trained),
        ("pitfalls.md", r"the optimizer trains (.*?)\. Ev", trained),
        ("rules.md", r"A B that learns \((.*?)\)", learning),
    ):
        said = re.search(around, (DOCS / page).read_text(), re.DOTALL)[1]
        assert set(re.findall(r"`(\w+)`", said)) == wanted, page


@pytest.mark.parametrize("page", ["README.md", "docs/rules.md"])
def test_a_table_of_rules_has_each_name_and_its_defaults(page: str) -> None:
    names = set()
    for line in (ROOT / page).read_text().splitlines():
        cells = [re.findall(r"`(.+?)`", cell) for cell in line.split(" | ")[:2]]
        given = [cell.strip('"') for cell in cells[0] if cell.startswith('"')]
        for name, rule in zip(given, cells[1] if len(cells) > 1 else (), strict=False):
            if name in bk.feedback.RULES:
                names.add(name)
                assert eval(f"feedback.{rule}", {"feedback": bk.feedback}) == bk.feedback.RULES[name]()
    assert names == set(bk.feedback.RULES)


def test_the_navigation_names_each_page_once() -> None:
    text = (DOCS / ".nav.yml").read_text()
    named = re.findall(r"[\w/-]+\.(?:md|ipynb)", text)
    assert len(set(named)) == len(named)
    assert {path.name for path in DOCS.glob("*.md")} <= set(named)


def test_a_release_is_the_same_one_everywhere() -> None:
    cited = dict(
        re.findall(r"^(version|date-released|license|  - name): (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    newest = re.search(r"^## (.*), (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert (cited["version"], cited["date-released"]) == (bk.__version__, newest[2]) and newest[1] == bk.__version__
    assert (cited["license"], [{"name": cited["  - name"]}]) == (project["license"], project["authors"])


def test_an_sdist_has_what_a_clone_has() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("a copy without git")
    # setuptools takes these itself.
    own = {"LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"}
    files = FileList()
    with contextlib.chdir(ROOT):
        files.findall()
        for line in Path("MANIFEST.in").read_text().splitlines():
            files.process_template_line(line)
    left = [name for name in tracked if name not in own and not name.startswith((".", "bioplaus_kernels/"))]
    assert set(left) <= set(files.files), set(left) - set(files.files)


def test_pictures_are_no_wider_than_a_page() -> None:
    # A wider one is made smaller, and what is written in it cannot be read.
    drawn = [*DOCS.glob("pictures/*.png"), *DOCS.glob("results/**/*.png")]
    wide = {path: int.from_bytes(path.read_bytes()[16:20]) for path in drawn}
    assert len(wide) > 20 and [path for path, pixels in wide.items() if pixels > 760] == []


def blocks(text: str) -> Iterator[tuple[int, str, str]]:
    """Line, reason not to run, and code of each block."""
    for found in BLOCK.finditer(text):
        yield text.count("\n", 0, found.start(2)), found[1] or "", found[2]


BY_SECTION = set(re.findall(r'sections\("([\w-]+\.md)"\)', (ROOT / "python_tests" / "test_gallery.py").read_text()))
PAGES = [p for p in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))) if "```python" in p.read_text()]


def test_every_page_with_code_runs_once() -> None:
    whole = {"README.md", "index.md", "inside.md", "own-rule.md", "swap.md", "tutorial.md"}
    assert whole <= {page.name for page in PAGES} - BY_SECTION
    assert {page.name for page in PAGES} >= BY_SECTION


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in BY_SECTION], ids=lambda p: p.name)
def test_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": __name__}
    for line, reason, block in blocks(page.read_text()):
        if not reason:
            # With the page's own line numbers.
            exec(compile("\n" * line + block, str(page), "exec"), names)


def test_a_block_that_needs_something_is_marked() -> None:
    text = (
        "<!-- not run: needs a GPU -->\n```python\na\n```\n\n```python\nb\n```\n<!-- not run: -->\n```python\nc\n```\n"
    )
    assert [(reason, code) for _, reason, code in blocks(text)] == [("needs a GPU", "a\n"), ("", "b\n"), ("", "c\n")]
    assert [line for line, _, _ in blocks(text)] == [2, 6, 10]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:matplotlib")
@pytest.mark.parametrize("path", sorted(DOCS.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn: list[int] = []
    monkeypatch.setattr(plt, "show", lambda: drawn.extend(plt.get_fignums()) or plt.close("all"))
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {"__name__": __name__}
    for i, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"{path.name}, cell {i + 1}", "exec"), names)
    # Its outputs are kept, as the site shows them: what prints has printed, what draws has drawn.
    kinds = [output["output_type"] for cell in cells for output in cell["outputs"]]
    assert kinds.count("display_data") == len(drawn) > 0 and "error" not in kinds
    assert ("stream" in kinds) == bool(capsys.readouterr().out)
