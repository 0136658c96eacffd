"""Labelled formulas and what each one rests on: a test, a definition in code, or a theorem.

The kind stands on the line before the formula: ``% kind: checked``, ``% kind: definition
transferkit.objectives.classification`` or ``% kind: theorem citation-key``.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tools import labs, prose
from tools.labs import Finding

KIND = re.compile(r"^%\s*kind:\s*(?P<kind>\S+)\s*(?P<target>\S*)\s*$")
KINDS = ("checked", "definition", "theorem")
FREE = {"exercise", "solution", "prf:proof"}
IMPORTS = """
import json, pkgutil, sys
for name in json.load(sys.stdin):
    try:
        pkgutil.resolve_name(name)
    except Exception as error:
        print(f"{name}\t{type(error).__name__}: {error}")
"""


@dataclass(frozen=True)
class Equation:
    """A displayed formula, its kind, and the tests that compute it."""

    label: str
    kind: str
    target: str
    path: Path
    line: int
    tests: tuple[str, ...] = ()


def equations(book: labs.Book) -> list[Equation]:
    """Return the labelled formulas of all pages and labs, with the tests marked for each."""
    tests = marked_tests(book.root / "tests")
    found = []
    for path, text in texts(book):
        lines = text.split("\n")
        for block in prose.blocks(text):
            if block.name == "math" and (label := block.options.get("label")):
                kind = KIND.match(lines[block.line - 2].strip()) if block.line > 1 else None
                found.append(
                    Equation(
                        label,
                        kind["kind"] if kind else "",
                        kind["target"] if kind else "",
                        path,
                        block.line,
                        tuple(tests.get(label, ())),
                    )
                )
    return found


def texts(book: labs.Book) -> list[tuple[Path, str]]:
    """Return the Markdown of every page, and of every lab cell that displays a formula."""
    found = [(path, path.read_text("utf-8")) for path in book.pages()]
    for lab in book.labs():
        if lab.source.exists():
            cells = lab.notebook()["cells"]
            found += [(lab.source, labs.source(c)) for c in cells if c["cell_type"] == "markdown"]
    return found


def marked_tests(folder: Path) -> dict[str, list[str]]:
    """Return the tests that carry ``pytest.mark.equation(label, …)``, by label."""
    found: dict[str, list[str]] = {}
    for path in sorted((folder / "equations").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
                for label in _labels(node):
                    found.setdefault(label, []).append(f"{path.name}::{node.name}")
    return found


def _labels(function: ast.FunctionDef) -> list[str]:
    calls = [n for d in function.decorator_list for n in ast.walk(d) if isinstance(n, ast.Call)]
    marks = [c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "equation"]
    return [a.value for call in marks for a in call.args if isinstance(a, ast.Constant)]


def check(book: labs.Book) -> list[Finding]:
    """Every displayed formula has a label and a kind, and what its kind promises exists."""
    found = [finding for path, text in texts(book) for finding in _unlabelled(book, path, text)]
    known = equations(book)
    keys = bibliography(book.root / "book" / "references.bib")
    broken = _unimportable(sorted({e.target for e in known if e.kind == "definition"}))
    for equation in known:
        message = _fault(equation, keys, broken)
        if message:
            text = f"{equation.label}: {message}"
            found.append(Finding(book.relative(equation.path), equation.line, text))
    labels = [e.label for e in known]
    for label in sorted({x for x in labels if labels.count(x) > 1}):
        found.append(Finding("book", 0, f"the label {label} is used {labels.count(label)} times"))
    for label, tests in marked_tests(book.root / "tests").items():
        if label not in labels:
            found.append(
                Finding("tests/equations", 0, f"{tests[0]} checks {label}: no such formula")
            )
    return found


def _fault(equation: Equation, keys: set[str], broken: dict[str, str]) -> str:
    if not equation.label.startswith("eq-"):
        return "labels of formulas start with eq-"
    if equation.kind not in KINDS:
        said = f"unknown kind {equation.kind!r}" if equation.kind else "no kind"
        choice = "`% kind: checked`, `definition NAME` or `theorem KEY`"
        return f"{said}: write {choice} on the line before"
    if equation.kind == "definition":
        if not equation.target:
            return "a definition names the code that implements it"
        return broken.get(equation.target, "")
    if equation.kind == "theorem" and equation.target not in keys:
        return f"a theorem cites its source: {equation.target!r} is not in references.bib"
    if not equation.tests:
        return f'no test carries @pytest.mark.equation("{equation.label}") in tests/equations'
    return ""


def _unlabelled(book: labs.Book, path: Path, text: str):
    for block in prose.blocks(text):
        free = FREE & {name.strip() for name in block.parents}
        if block.name == "math" and not block.options.get("label") and not free:
            yield Finding(book.relative(path), block.line, "displayed formula without a label")
    blank = text
    for block in prose.blocks(text):
        if block.name in FREE or not block.name or block.name in prose.LITERAL:
            blank = _without(blank, block)
    plain = re.sub(r"`[^`\n]*`", lambda m: " " * len(m[0]), blank)
    for match in re.finditer(
        r"(?<![\\$])\$\$(?!\$)(?=[\s\S]*?\$\$)|\\begin\{(?:align|equation)", plain
    ):
        line = prose.line_of(plain, match.start())
        if plain.count("$$", 0, match.start()) % 2 == 0:
            message = "displayed formula as $$…$$: use a {math} block with label and kind"
            yield Finding(book.relative(path), line, message)


def _without(text: str, block: prose.Block) -> str:
    lines = text.split("\n")
    lines[block.line : block.end] = [""] * (block.end - block.line)
    return "\n".join(lines)


def _unimportable(names: list[str]) -> dict[str, str]:
    """Return the names that do not import, with the reason; asked of a separate program."""
    names = [name for name in names if name]
    if not names:
        return {}
    command = [sys.executable, "-c", IMPORTS]
    answer = subprocess.run(
        command, input=json.dumps(names), capture_output=True, text=True, cwd=labs.ROOT, check=True
    )
    pairs = [line.split("\t", 1) for line in answer.stdout.splitlines() if "\t" in line]
    return {name: f"{name} does not import: {why}" for name, why in pairs}


def bibliography(path: Path) -> set[str]:
    """Return the citation keys of a BibTeX file."""
    return (
        set(re.findall(r"@\w+\{\s*([^,\s]+)", path.read_text("utf-8"))) if path.exists() else set()
    )


def table(book: labs.Book) -> str:
    """Return the coverage table of the equations appendix in MyST."""
    rows = ["| formula | kind | rests on | page |", "|---|---|---|---|"]
    for equation in equations(book):
        rest = f"`{equation.target}`" if equation.kind == "definition" else ""
        if equation.kind == "theorem":
            rest = f"{{cite:t}}`{equation.target}`; "
        rest += ", ".join(f"`{test}`" for test in equation.tests)
        page = "/" + book.relative(equation.path)
        rows.append(
            f"| {{eq}}`{equation.label}` `{equation.label}` | {equation.kind} | {rest} "
            f"| [](<{page}>) |"
        )
    return "\n".join(rows) if len(rows) > 2 else "No formula has a label yet."
