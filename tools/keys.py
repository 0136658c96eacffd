"""The input key of a lab: it changes when, and only when, the lab's result could change.

A lab's inputs are the code of its cells, the modules of `transferkit` that it reaches, the locked
versions, the assets manifest, the profile and the Python version. Modules are found by reading
imports, never by running them; where reading cannot tell, all modules count. Words change no
result: text cells, comments and docstrings are not in the key.
"""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from tools import labs

PACKAGE = labs.ROOT / "transferkit"
# Its import by name builds a model again from a file of the lab's own, so the lab reaches what it
# names by having made that model; see LOADERS there.
REBUILDS = "checkpoint"


def key(lab: labs.Lab, profile: str) -> str:
    """Return the SHA-256 of all inputs of `lab` in `profile`."""
    notebook = lab.notebook()
    cells = [(labs.source(c), sorted(labs.tags(c))) for _, c in labs.code_cells(notebook)]
    parts = {
        "cells": cells,
        "declared": lab.declared,
        "profile": profile,
        "python": platform.python_version(),
        "modules": {p.stem: _program(p, p.stat().st_mtime_ns) for p in modules(notebook)},
        "lock": _hash(labs.ROOT / "requirements.lock"),
        "assets": _hash(PACKAGE / "assets.toml"),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def modules(notebook: dict) -> set[Path]:
    """Return the files of `transferkit` that a notebook reaches, directly or through others."""
    names = table()
    code = "\n".join(plain(labs.source(c)) for _, c in labs.code_cells(notebook))
    tree = ast.parse(code)
    waiting = used(tree, names) | _called(tree) | {"__init__"}
    reached: set[str] = set()
    while waiting:
        name = waiting.pop()
        reached.add(name)
        file = PACKAGE / f"{name}.py"
        if name != "__init__" and file.exists():
            waiting |= _needs(file, file.stat().st_mtime_ns) - reached
    return {p for n in reached if (p := PACKAGE / f"{n}.py").exists()}


@lru_cache(maxsize=256)
def _needs(file: Path, _time: int) -> frozenset[str]:
    return frozenset(used(ast.parse(file.read_text("utf-8")), table(), file.stem == REBUILDS))


def _called(tree: ast.AST) -> set[str]:
    """Return the modules that a string names, such as the command of a program of its own."""
    words = (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant))
    texts = (word for word in words if isinstance(word, str))
    return {name for text in texts for name in re.findall(r"\btransferkit\.(\w+)", text)}


def table() -> dict[str, str]:
    """Return the public names of `transferkit` and the module behind each, read from source."""
    found = {path.stem: path.stem for path in PACKAGE.glob("*.py")}
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    for node in tree.body:
        if "_NAMES" in _bound(node):
            found |= ast.literal_eval(node.value)
    return found


def used(tree: ast.AST, names: dict[str, str], rebuilds: bool = False) -> set[str]:
    """Return the modules of `transferkit` that this code names; all of them when in doubt.

    An import by a computed name is such a doubt, unless it `rebuilds` what the lab has made.
    """
    found: set[str] = set()
    aliases: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                first, *rest = item.name.split(".")
                if first == "transferkit":
                    found |= set(rest[:1])
                    aliases.add(item.asname or first)
        elif isinstance(node, ast.ImportFrom):
            found |= _imported(node, names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in aliases:
            found |= {names[node.attr]} if node.attr in names else set()
            node.value.id = None  # accounted for: what is left below is a use we cannot read
    doubtful = any(isinstance(n, ast.Name) and n.id in aliases for n in ast.walk(tree))
    dynamic = any(
        isinstance(n, ast.Attribute) and n.attr == "import_module" for n in ast.walk(tree)
    )
    return set(names.values()) if doubtful or (dynamic and not rebuilds) else found


def _imported(node: ast.ImportFrom, names: dict[str, str]) -> set[str]:
    path = (node.module or "").split(".")
    if node.level == 0:
        if path[0] != "transferkit":
            return set()
        path = path[1:] or [""]
    if path[0]:
        return {path[0]}
    if any(item.name == "*" for item in node.names):
        return set(names.values())
    return {names[item.name] for item in node.names if item.name in names}


def plain(code: str) -> str:
    """Drop lines that only IPython understands."""
    return re.sub(r"^(\s*)[%!].*$", r"\1pass", code, flags=re.MULTILINE)


@lru_cache(maxsize=256)
def _program(path: Path, _time: int) -> str:
    """Return the SHA-256 of what a module does: its syntax tree without docstrings.

    Of the package's own module the table of public names is left out, too: a new name elsewhere
    changes no lab, and a name that moved changes the modules that its users reach.
    """
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            words = body[0].value
            if isinstance(words, ast.Constant) and isinstance(words.value, str):
                node.body = body[1:]
    if path.stem == "__init__":
        tree.body = [node for node in tree.body if not set(_bound(node)) & {"_NAMES", "_MODULES"}]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _bound(node: ast.stmt) -> Iterator[str]:
    targets = node.targets if isinstance(node, ast.Assign) else []
    return (target.id for target in targets if isinstance(target, ast.Name))


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""
