"""The Markdown page of results: tables, pictures and notes, and beside it the logs that it is made of.

A file notes.md in the folder of a table goes below that table. Its lines

<!-- runs: fa, dfa -->

name the rows that the text below them, to the next such line, speaks of. `write` adds a digest of each row's logs, and
says so above the text where runs are missing or have changed since. Who has read the text again takes the digests away,
and they are made anew.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from recipes import pictures
from recipes.checkpoint import write as write_whole
from recipes.report import Run, changes, collect, layers, order, short, table

RUNS = re.compile(r"^<!-- runs: (.*) -->$", re.MULTILINE)

HEAD = """# Results

Made by `python -m recipes report`, from the logs in [{folder}]({folder}). Errors are those of the best epoch. "best on"
says what chose it: validation images, which were held out of training, or the test images themselves, as in the papers,
and then errors are a little too good. "last" is the last epoch's, which nothing chose. "train error" is on as many
training images as there are test images. Figures are means over the seeds that are listed, ± their standard deviation;
a row with one seed has none. Collapsed runs end within three standard errors of chance; they and diverged ones are in
no order. Runs of "uncommitted code" cannot be made again from a commit. "W to B" is the angle of the weights to the
feedback at the end of training, and "to BP" that of the weights' gradient to back-propagation's on one batch.
"""


def write(roots: list[Path], to: Path) -> list[str]:
    """Write the Markdown page `to`, and beside it a folder of its name with the logs it is made of and the pictures.

    That folder is a root itself, after `roots`, so that nothing is lost from a page by writing it again: a table that
    `roots` do not have stays, as does the longer run. Returns a line for each note whose runs are missing or changed.
    Raises ValueError as `collect` does, and for a `to` that is no .md or a page that this did not make.
    """
    if to.suffix != ".md":
        raise ValueError(f"--to: got {to}, want a file whose name ends in .md")
    if to.exists() and not to.read_text().startswith(HEAD.partition(",")[0]):
        raise ValueError(f"--to: got {to}, which is no page of report and would be lost; want another name")
    folder = to.with_suffix("")
    parts, stale = [HEAD.format(folder=folder.name)], []
    kept = [folder] if any(folder.glob("*/*/*/log.jsonl")) else []
    tables = collect([*roots, *kept])
    folder.mkdir(parents=True, exist_ok=True)
    shown = {name: [r for r in rows if not r[0].searched] for name, rows in tables.items()}
    shown = {name: rows for name, rows in shown.items() if rows and rows[0][0].score == "test_error"}
    if shown:
        pictures.overview(shown, folder / "overview.png")
        parts.append(f"![overview]({folder.name}/overview.png)\n")
    for name, rows in tables.items():
        place = folder / name
        for r in (r for runs in rows for r in runs):
            copy = place / r.folder.parent.name / r.folder.name
            for file in ("log.jsonl", "reconstructions.png"):
                if (r.folder / file).exists() and copy.resolve() != r.folder.resolve():
                    copy.mkdir(parents=True, exist_ok=True)
                    write_whole(copy / file, (r.folder / file).read_bytes())
        parts.append(f"## {name}\n")
        if trained := [runs for runs in rows if not runs[0].searched]:
            parts += _trained(name, trained, place, to.parent)
        for runs in (r for r in rows if r[0].searched):
            row = runs[0].folder.parent.name
            pictures.histogram(runs, place / f"{row}.png")
            best = min(runs, key=lambda r: r.rank)
            drawn = ", ".join(f"{key} = {value}" for key, value in best.header["drawn"].items())
            text = f"{len(runs)} trials, best {short(best.chosen)} {abs(best.rank):.4f} with {drawn}."
            parts.append(f"### {row}\n\n{text}\n\n![histogram]({folder.name}/{name}/{row}.png)\n")
        if (place / "notes.md").exists():
            text, found = notes(place / "notes.md", rows)
            parts.append(text)
            stale += found
    write_whole(to, "\n".join(part for part in parts if part.strip()).encode())
    return stale


def notes(path: Path, rows: list[list[Run]]) -> tuple[str, list[str]]:
    """The text of a file of notes with what has become of the runs it speaks of, and that in a line for each part.

    Digests that are not there yet are added to the file.
    """
    text = path.read_text()
    digests = {runs[0].folder.parent.name: digest(runs) for runs in rows}
    stale = []

    def added(found: re.Match[str]) -> str:
        named = [entry.split() for entry in found[1].split(",")]
        entries = [" ".join([row, *(then or filter(None, [digests.get(row)]))]) for row, *then in named]
        return f"<!-- runs: {', '.join(entries)} -->"

    def said(found: re.Match[str]) -> str:
        named = [entry.split() for entry in found[1].split(",")]
        changed = [row for row, *then in named if row in digests and then != [digests[row]]]
        missing = [row for row, *_ in named if row not in digests]
        why = [f"runs of {', '.join(changed)} have changed since this was written"] if changed else []
        why += [f"there are no runs of {', '.join(missing)} here"] if missing else []
        if not why:
            return found[0]
        stale.append(f"{path}: {'; '.join(why)}")
        return f"{found[0]}\n\n**With care: {'; '.join(why)}.**"

    complete = RUNS.sub(added, text)
    if complete != text:
        write_whole(path, complete.encode())
    told = RUNS.sub(said, complete)
    if not complete.startswith("<!-- runs: "):
        stale.append(f"{path}: does not start with a line <!-- runs: ROW, ROW --> of the rows it speaks of")
        told = f"**With care: of runs that are not named.**\n\n{told}"
    return told, stale


def digest(runs: list[Run]) -> str:
    """Six hexadecimal digits of what was trained and came out, of all seeds."""
    content = [(r.folder.name, r.header["experiment"], r.rows) for r in runs]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:6]


def _trained(name: str, rows: list[list[Run]], place: Path, parent: Path) -> list[str]:
    """The parts of a page on a table's rows."""
    one = rows[0][0]
    title = f"{name}, trained on {one.header['experiment']['data']['name']}"
    changed = {f"{k} = {v}" for runs in rows for r in runs for k, v in changes(r).items() if k != "data.name"}
    title += f" with {', '.join(sorted(changed))}" if changed else ""
    pictures.curves(rows, title, place / "curves.png")
    parts = [f"{title}.\n", table(rows, "github") + "\n", layers(rows) + "\n", order(rows) + "\n", _made(rows)]
    parts.append(f"![curves]({(place / 'curves.png').relative_to(parent)})\n")
    if pictures.angles(rows, title, place / "angles.png"):
        parts.append(f"![angles]({(place / 'angles.png').relative_to(parent)})\n")
    for runs in rows:
        image = place / runs[0].folder.parent.name / runs[0].folder.name / "reconstructions.png"
        if image.exists():
            parts.append(f"{runs[0].header['row']}: ![reconstructions]({image.relative_to(parent)})\n")
    return parts


def _made(rows: list[list[Run]]) -> str:
    headers = [r.header for runs in rows for r in runs]
    facts = [", ".join(sorted({h[key] for h in headers})) for key in ("processor", "versions", "commit")]
    commands = "\n".join(sorted({_command(h) for h in headers}))
    return "{}; {}; commit {}.\n\n```\n{}\n```\n".format(*facts, commands)


def _command(header: dict[str, Any]) -> str:
    command = re.sub(r"(experiments/[\w-]+)/[\w-]+\.toml", r"\1.toml", header["command"])
    # What does not say was made before there were validation images.
    return command if "validation" in header["experiment"]["data"] else f"{command} --set data.validation=0"
