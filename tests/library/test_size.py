"""The library stays small: lines, functions, what imports what, and what an import costs."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest

import transferkit

PACKAGE = Path(transferkit.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
CORE = (
    "engine", "evaluation", "data", "layers", "optim", "plan", "cache", "checkpoint", "distributed",
)  # fmt: skip
UNDER_THE_CORE = ("checks", "objectives", "devices", "show")  # what the core itself stands on
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def lines_of_code(text: str) -> int:
    """How many lines hold code: neither blank, nor comment, nor docstring."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        holds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, holds) and ast.get_docstring(node, clean=False) is not None:
            said = node.body[0]
            documented |= set(range(said.lineno, said.end_lineno + 1))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - documented)


def test_lines_of_code_are_counted_without_docstrings_comments_and_blank_lines():
    text = '''"""A module,
of two lines."""

import os  # a comment beside code counts as code


def f(a,
      b):
    """Said."""
    # only a comment
    text = """not
    a docstring"""

    return text
'''
    assert lines_of_code(text) == 1 + 2 + 2 + 1


def test_the_core_can_be_read_in_an_evening():
    sizes = {path.stem: lines_of_code(path.read_text("utf-8")) for path in FILES}
    core = {name: sizes[name] for name in CORE if name in sizes}
    assert len(core) == len(CORE)
    assert sum(core.values()) <= 2200, core


def test_the_whole_library_stays_under_its_limit_of_lines_of_code():
    sizes = {path.name: lines_of_code(path.read_text("utf-8")) for path in FILES}
    assert sum(sizes.values()) <= 7800, sizes


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_function_is_longer_than_sixty_lines(path):
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [
        node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, functions)
    ]
    sizes = {node.name: node.end_lineno - node.lineno + 1 for node in found}
    assert {name: size for name, size in sizes.items() if size > 60} == {}


def _imports(path: Path) -> set[str]:
    # Names of the package's modules that a file imports, anywhere in it, for types alone as well.
    known, found = {other.stem for other in FILES}, set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transferkit"):
            inside = node.module.removeprefix("transferkit").lstrip(".")
            found |= {inside.split(".")[0]} if inside else {one.name for one in node.names} & known
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{path.name} has a relative import, which this test cannot read")
        elif isinstance(node, ast.Import):
            dotted = (one.name.split(".") for one in node.names)
            found |= {parts[1] for parts in dotted if parts[0] == "transferkit" and len(parts) > 1}
    return found


def test_the_core_imports_none_of_the_higher_modules():
    allowed = {*CORE, *UNDER_THE_CORE}
    paths = [path for path in FILES if path.stem in allowed and path.parent == PACKAGE]
    assert {path.stem: _imports(path) - allowed for path in paths if _imports(path) - allowed} == {}
    assert "data" in _imports(PACKAGE / "engine.py")  # the test can see an import


def test_the_types_of_the_core_and_of_what_it_stands_on_are_checked_strictly():
    told = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text("utf-8"))["tool"]["mypy"]
    assert told["strict"]
    assert {Path(name).stem for name in told["files"]} >= {*CORE, *UNDER_THE_CORE}
    assert all((PACKAGE.parent / name).is_file() for name in told["files"])


def test_no_modules_of_the_core_import_each_other_in_a_circle():
    open_ones = {p.stem: _imports(p) - {p.stem} for p in FILES if p.stem in CORE}
    open_ones = {name: needs & open_ones.keys() for name, needs in open_ones.items()}
    while free := {name for name, needs in open_ones.items() if not needs}:
        open_ones = {n: needs - free for n, needs in open_ones.items() if n not in free}
    assert open_ones == {}


def _loaded(statement: str) -> set[str]:
    program = f"import sys\n{statement}\nprint(*sorted(sys.modules))"
    command = [sys.executable, "-c", program]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return set(answer.stdout.split())


def test_importing_the_library_loads_nothing_until_a_name_is_used():
    alone = _loaded("import transferkit as tk; dir(tk)")
    assert not {"torch", "numpy"} & alone
    assert not [name for name in alone if name.startswith("transferkit.")]


def test_the_core_costs_little_more_than_torch_and_needs_no_other_package():
    torch_alone = _loaded("import torch")
    core = _loaded("import transferkit as tk; tk.fit, tk.finetune, tk.classification, tk.load")
    extra = core - torch_alone
    assert len(extra) <= 50, sorted(extra)
    heavy = {"matplotlib", "sklearn", "scipy", "pandas", "transformers", "timm", "torchvision",
             "peft", "IPython", "tqdm"}  # fmt: skip
    assert heavy & {name.split(".")[0] for name in extra} == set()
