"""An extension of griffe, which reads the docstrings for the site: they are plain text, and the site wants Markdown."""

from __future__ import annotations

import ast
import inspect
import re
from typing import Any

import griffe

_ARGUMENT = re.compile(r"^(\*{0,2}\w+(?:, \*{0,2}\w+)*): (?=\S)")


def markdown(text: str, parameters: set[str]) -> str:
    """Stars that are no list's as they are, and lines `name: what it is` of parameters as a list."""
    lines: list[str] = []
    within = False
    for line in text.splitlines():
        if line.startswith("    "):
            lines.append(line)
            continue
        star, rest = (line[:2], line[2:]) if line.startswith("* ") else ("", line)
        found = _ARGUMENT.match(rest) if not star else None
        if found and not parameters.issuperset(found[1].replace("*", "").split(", ")):
            found = None
        # Code keeps its stars.
        parts = re.split(r"(`[^`]*`)", rest[found.end() :] if found else rest)
        rest = "".join(part if i % 2 else part.replace("*", r"\*") for i, part in enumerate(parts))
        if found:
            names = ", ".join(f"`{name}`" for name in found[1].split(", "))
            lines += ([] if within else [""]) + [f"* {names}: {rest}"]
        elif star:
            lines += ([] if within else [""]) + [star + rest]
        else:
            lines.append(f"  {rest}" if within and rest else rest)
        within = bool(rest) and (bool(found) or bool(star) or within)
    return "\n".join(lines)


def formatted(found: griffe.Class) -> str | None:
    """The docstring that a class makes of a constant of its module, `__doc__ = _DOC.format(d=2)`."""
    call = found.members.get("__doc__")
    made = re.fullmatch(r"(\w+)\.format\((\w+)=(\d+)\)", str(getattr(call, "value", "")))
    if not made:
        return None
    text = ast.literal_eval(str(found.module.members[made[1]].value))
    return inspect.cleandoc(text.format(**{made[2]: made[3]}))


def parameters(found: griffe.Object) -> set[str]:
    """What a call takes: a function's parameters, a class's attributes and those of its `__init__`, bases' too."""
    if isinstance(found, griffe.Function):
        return {parameter.name for parameter in found.parameters}
    if not isinstance(found, griffe.Class):
        return set()
    names = {name for name, member in found.members.items() if isinstance(member, griffe.Attribute)}
    names |= parameters(found.members["__init__"]) if "__init__" in found.members else set()
    for base in found.bases:
        parent = found.module.members.get(str(base))
        names |= parameters(parent) if isinstance(parent, griffe.Class) else set()
    return names


class Markdown(griffe.Extension):
    """Every docstring as Markdown."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if isinstance(obj, griffe.Class) and (text := formatted(obj)):
            obj.docstring = griffe.Docstring(text, parent=obj)
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value, parameters(obj))
