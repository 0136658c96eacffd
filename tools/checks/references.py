"""Gates on references: what a page points at exists, and a paragraph is not cut by its marks."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tools import equations, prose
from tools.labs import Book, Finding

ROLE = re.compile(r"\{(?P<role>ref|eq|numref|prf:ref|term)\}`(?P<inside>[^`]+)`")
TARGET = re.compile(r"(?:(?P<text>.*)\s)?<(?P<label>[^<>]+)>", re.DOTALL)
ANCHOR = re.compile(r"^\s*\((?P<label>[\w:.-]+)\)=\s*$")
SPAN = re.compile(r"\{#(?P<label>[\w-]+)\}")
NUMBERED = re.compile(r"figure|exercise|solution|prf:\w+")
MARK = re.compile(r"(?:<!--.*?-->)+[ \t]*\S")
APART = re.compile(r"\s*([|#%:`(]|<!--)")  # lines that are no part of a paragraph


def check(book: Book) -> Iterator[Finding]:
    """What a role names exists, with a title where no text is given; no comment cuts a text."""
    known = _labels(book)
    for path, text in equations.texts(book):
        for number, message in [*_roles(text, known), *_cuts(text)]:
            yield Finding(book.relative(path), number if path.suffix == ".md" else 0, message)


def _roles(text: str, known: dict[str, set[str]]) -> Iterator[tuple[int, str]]:
    read = "\n".join(_prose(text))
    for match in ROLE.finditer(read):
        message = _fault(match["role"], match["inside"], known)
        if message:
            yield prose.line_of(read, match.start()), f"{match[0]}: {message}"


def _cuts(text: str) -> Iterator[tuple[int, str]]:
    before = ""
    for number, line in enumerate(_prose(text), 1):
        if MARK.match(line) and before.strip() and not APART.match(before):
            yield (
                number,
                "a comment begins this line and would cut the paragraph: move it to the end of "
                "the line before",
            )
        before = line


def _prose(text: str) -> list[str]:
    """Return the lines, those of code and formulas empty: in them a role is no role."""
    lines = text.split("\n")
    for block in prose.blocks(text):
        if not block.name or block.name in prose.LITERAL:
            lines[block.line - 1 : block.end] = [""] * (block.end - block.line + 1)
    return lines


def _labels(book: Book) -> dict[str, set[str]]:
    """Return what there is to point at: labels with and without a title, formulas, terms."""
    known: dict[str, set[str]] = {name: set() for name in ("titled", "bare", "eq", "prf", "term")}
    for _, text in equations.texts(book):
        lines = text.split("\n")
        for number, line in enumerate(lines):
            if match := ANCHOR.match(line):
                after = (later for later in lines[number + 1 :] if later.strip())
                after = (later for later in after if not re.match(r"%|\s*\(.*\)=\s*$", later))
                titled = re.match(r"#+ ", next(after, ""))
                known["titled" if titled else "bare"].add(match["label"])
            known["bare"].update(SPAN.findall(line))
        for block in prose.blocks(text):
            label = block.options.get("label") or block.options.get("name") or ""
            if block.name == "math":
                known["eq"].add(label)
            elif NUMBERED.fullmatch(block.name):
                known["prf" if block.name.startswith("prf:") else "titled"].add(label)
            elif block.name == "glossary":
                known["term"] |= {entry.casefold() for entry in block.body if entry[:1].strip()}
    return known


def _fault(role: str, inside: str, known: dict[str, set[str]]) -> str:
    match = TARGET.fullmatch(inside.strip())
    label = " ".join((match["label"] if match else inside).split())
    if role == "term":
        there = label.casefold() in known["term"]
        return "" if there else "no such term in the glossary: add it, or link an entry there is"
    places = {"eq": known["eq"], "prf:ref": known["prf"]}.get(role, known["titled"])
    if label in places or (role == "ref" and match and label in known["bare"] | known["prf"]):
        return ""
    if role == "ref" and label in known["bare"]:
        return f"no title stands there: give a text, {{ref}}`… <{label}>`"
    return "nothing has this label"
