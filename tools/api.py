"""The reference of the library, made from its docstrings: every public name with its signature."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import transferkit

SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Example):$")
ENTRY = re.compile(r"(?P<name>\*{0,2}[\w., *]+?)(?: \((?P<kind>[^)]*)\))?: (?P<text>.+)$")
TITLES = {
    "Args": "Arguments",
    "Attributes": "Attributes",
    "Returns": "Returns",
    "Raises": "Raises",
    "Example": "Example",
}
WIDTH = 88


def reference() -> str:
    """Return a table of the modules, then a section for each with an entry for each public name."""
    found = {name: _import(name) for name in transferkit._MODULES}
    rows = [f"| [`{name}`](#api-{name}) | {_first(part)} |" for name, part in found.items()]
    table = "\n".join(["| Module | What it is for |", "|---|---|", *rows])
    sections = (piece for name, part in found.items() for piece in module(part, name))
    return "\n\n".join([table, *sections])


def _first(found: ModuleType) -> str:
    """The first sentence of a module's docstring."""
    text = " ".join(inspect.cleandoc(found.__doc__ or "").split("\n\n")[0].split())
    return text.split(". ")[0].removesuffix(".") + "."


def _import(name: str) -> ModuleType:
    return importlib.import_module(f"transferkit.{name}")


def module(found: ModuleType, name: str) -> Iterator[str]:
    """Yield the parts of a module's section: title, what it is for, its public names."""
    yield f"(api-{name})=\n## `transferkit.{name}`"
    yield inspect.cleandoc(found.__doc__ or "")
    short = {target: alias for alias, target in _aliases(name)}
    for key, value in public(found):
        title = f"tk.{short.get(key, f'{name}.{key}')}"
        # names of labels do not tell small letters from capitals
        yield f"(api-{name}-{'class-' * inspect.isclass(value)}{key})=\n### `{title}`"
        yield f"```python\n{signature(key, value)}\n```"
        yield markdown(inspect.getdoc(value) or "")
        if inspect.isclass(value):
            yield from methods(value)


def _aliases(name: str) -> Iterator[tuple[str, str]]:
    """The names under which `transferkit` itself offers what the module defines."""
    found = _import(name)
    for alias, home in transferkit._NAMES.items():
        if home == name:
            yield alias, getattr(getattr(found, alias), "__name__", alias)


def public(found: ModuleType) -> Iterator[tuple[str, Any]]:
    """Yield the public functions and classes that a module defines, in the order of its text."""
    own = [
        (key, value)
        for key, value in vars(found).items()
        if not key.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == found.__name__
        and value.__name__ == key
    ]
    return iter(sorted(own, key=lambda pair: inspect.getsourcelines(pair[1])[1]))


def methods(kind: type) -> Iterator[str]:
    """Yield an entry for each public method that the class itself defines and explains."""
    for key, value in vars(kind).items():
        value = getattr(value, "__func__", value)
        if key.startswith("_") or not inspect.isfunction(value) or not value.__doc__:
            continue
        text = markdown(inspect.getdoc(value) or "")
        yield f"```python\n{signature(f'{kind.__name__}.{key}', value)}\n```"
        yield text


def signature(name: str, value: Any) -> str:
    """Return the call as one would write it, a line for each argument where it is long."""
    if inspect.isclass(value) and issubclass(value, BaseException):
        return name
    found = inspect.signature(value)
    texts, starred = [], False
    for key, parameter in found.parameters.items():
        if key in ("self", "cls"):
            continue
        starred |= parameter.kind is parameter.VAR_POSITIONAL
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            texts.append("*")
            starred = True
        texts.append(_parameter(value, parameter))
    annotation = found.return_annotation
    result = "" if inspect.isclass(value) or annotation is found.empty else f" -> {annotation}"
    line = f"{name}({', '.join(texts)}){result}"
    if len(line) <= WIDTH:
        return line
    inner = "".join(f"    {text},\n" for text in texts)
    return f"{name}(\n{inner}){result}"


def _parameter(value: Any, parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    text, default = stars + parameter.name, parameter.default
    if parameter.annotation is not parameter.empty:
        text += f": {parameter.annotation}"
    if default is parameter.empty:
        return text
    if dataclasses.is_dataclass(value) and not isinstance(default, (int, float, str, tuple)):
        made = value.__dataclass_fields__[parameter.name].default_factory
        default = default if made is dataclasses.MISSING else made()
    return f"{text} = {default!r}"


def markdown(text: str) -> str:
    """Return a docstring with its sections as headed lists."""
    lines, pieces = text.split("\n"), []
    while lines:
        found = SECTION.match(lines[0])
        if not found:
            pieces.append(lines.pop(0))
            continue
        lines.pop(0)
        body = []
        while lines and (not lines[0].strip() or lines[0].startswith("    ")):
            body.append(lines.pop(0))
        block = textwrap.dedent("\n".join(body)).strip()
        pieces += ["", f"*{TITLES[found[1]]}*", "", _section(found[1], block), ""]
    return "\n".join(pieces)


def _section(name: str, block: str) -> str:
    if name == "Example":
        return f"```pycon\n{block}\n```"
    entries: list[str] = []
    for line in block.split("\n"):
        found = None if line.startswith(" ") else ENTRY.match(line)
        if found and name != "Returns":
            names = ", ".join(f"`{part.strip()}`" for part in found["name"].split(","))
            entries.append(f"- {names}: {found['text']}")
        elif entries:
            entries[-1] += f" {line.strip()}"
        else:
            entries.append(line.strip())
    return "\n".join(entries)
