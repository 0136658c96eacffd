"""Gates on the labs as git holds them: runnable alone, and without outputs nobody checks."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator

from tools import keys, labs
from tools.labs import CHECKED, Book, Finding, Lab
from tools.notebooks import install_cell

WIDTH = 100
NAME = re.compile(r"[a-z0-9][a-z0-9-]*")


def lint(book: Book) -> Iterator[Finding]:
    """A lab has its parameters, declares what it makes, and stores only checked outputs."""
    names: dict[str, str] = {}
    for lab in book.labs():
        path = book.relative(lab.source)
        if not lab.source.exists():
            yield Finding(path, 0, "is in _toc.yml but does not exist")
            continue
        for message in [*_metadata(lab), *_frame(lab), *_cells(lab), *_install(lab)]:
            yield Finding(path, 0, message)
        if names.setdefault(lab.short, lab.name) != lab.name:
            yield Finding(path, 0, f"shares its short name with {names[lab.short]}")


def _metadata(lab: Lab) -> Iterator[str]:
    declared = lab.declared
    if declared.get("lab") != lab.name:
        yield f"metadata.transferkit.lab is {declared.get('lab')!r}, not {lab.name!r}"
    for kind in ("claims", "figures", "full-claims", "full-figures"):
        for name in declared.get(kind, []):
            head, _, tail = name.partition(".")
            if head != lab.short or not NAME.fullmatch(tail):
                yield f"{name} in metadata.transferkit.{kind} is not {lab.short}.lower-case-words"
        if not declared.get(kind) and not kind.startswith("full-"):
            yield f"metadata.transferkit.{kind} declares nothing: a lab is there to show something"
    if lab.notebook()["metadata"].get("kernelspec", {}).get("name") != "python3":
        yield "metadata.kernelspec.name is not python3"


def _frame(lab: Lab) -> Iterator[str]:
    notebook = lab.notebook()
    first = notebook["cells"][0]
    label = f"(lab-{lab.short})="
    if first["cell_type"] != "markdown" or not labs.source(first).startswith(f"{label}\n# "):
        yield f"the first cell is not Markdown with {label} and, below it, a # title"
    tagged = [c for _, c in labs.code_cells(notebook) if "parameters" in labs.tags(c)]
    if len(tagged) != 1:
        yield f"{len(tagged)} cells are tagged parameters, not one"
    elif labs.parameters(labs.source(tagged[0])) != {"PROFILE": "cpu", "SEED": 0}:
        yield 'the parameters cell is not PROFILE = "cpu" and SEED = 0'
    code = "\n".join(labs.source(c) for _, c in labs.code_cells(notebook))
    if not re.search(r"tk\.profile\(PROFILE, SEED\)", code):
        yield "no cell calls tk.profile(PROFILE, SEED)"
    if not any(CHECKED in labs.tags(c) for _, c in labs.code_cells(notebook)):
        yield f"no cell is tagged {CHECKED}: let at least one show shapes, counts or a hash"


def _cells(lab: Lab) -> Iterator[str]:
    for index, cell in labs.code_cells(lab.notebook()):
        code, where = labs.source(cell), f"cell {index}"
        if not code.strip():
            yield f"{where} is empty"
        if "install" not in labs.tags(cell):
            yield from (f"{where}: {message}" for message in _code(code))
        stored = cell.get("outputs") or cell.get("execution_count") is not None
        if CHECKED not in labs.tags(cell) and stored:
            yield f"{where} stores outputs that nothing checks: python -m tools.notebooks strip"
    yield from unguarded(lab.notebook())


def unguarded(notebook: dict) -> Iterator[str]:
    """Say which checked cells have nothing to be compared with: nbval passes those in silence."""
    for index, cell in labs.code_cells(notebook):
        whole = cell.get("outputs") and cell.get("execution_count") is not None
        if CHECKED in labs.tags(cell) and not whole:
            yield (
                f"cell {index} is tagged {CHECKED} but stores no output to compare with, so the "
                "check would pass whatever it prints: python -m tools.notebooks store"
            )


def _code(code: str) -> Iterator[str]:
    for line in code.splitlines():
        if len(line) > WIDTH:
            yield f"line of {len(line)} characters, more than {WIDTH}: {line[:40]}…"
        if line.lstrip()[:1] in ("%", "!"):
            yield f"{line.strip()[:40]}: no magics, a lab is plain Python"
    try:
        tree = ast.parse(keys.plain(code))
    except SyntaxError as error:
        yield f"does not parse: {error}"
        return
    for name in _imports(tree):
        if (labs.ROOT / name).is_dir() and name != "transferkit":
            yield f"imports {name}: a lab imports transferkit and the field's libraries only"
    figures = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tk.figure"
    ]
    if len(figures) > 1:
        yield "calls tk.figure more than once: one figure a cell"


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [item.name for item in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.level:
                yield "."
        yield from (name.split(".")[0] for name in names if name.split(".")[0] not in _STDLIB)


_STDLIB = set(sys.stdlib_module_names)


def _install(lab: Lab) -> Iterator[str]:
    found = [c for _, c in labs.code_cells(lab.notebook()) if "install" in labs.tags(c)]
    wanted = install_cell(lab.book)
    have = [labs.source(c) for c in found]
    if have != ([wanted] if wanted else []):
        yield "the install cell does not fit repository.url: python -m tools.notebooks sync"


def agreement(book: Book) -> Iterator[Finding]:
    """What a checked cell stores is what it printed when the lab was executed."""
    for lab in book.labs():
        result = lab.result() if lab.source.exists() else None
        if not result or len(result["cells"]) != len(lab.notebook()["cells"]):
            continue
        for (index, stored), (_, made) in zip(
            labs.code_cells(lab.notebook()), labs.code_cells(result), strict=False
        ):
            if CHECKED in labs.tags(stored) and _text(stored) != _text(made):
                yield Finding(
                    book.relative(lab.source),
                    0,
                    f"cell {index} stores another output than the executed lab printed; either it "
                    "depends on the profile or the machine, or: python -m tools.notebooks store",
                )


def _text(cell: dict) -> str:
    pieces = []
    for output in cell.get("outputs", []):
        text = output.get("text") or output.get("data", {}).get("text/plain", "")
        pieces.append(text if isinstance(text, str) else "".join(text))
    return "".join(pieces)
