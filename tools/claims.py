"""Numbers in prose: each measured one carries a mark that ties it to an executed claim.

A page says ``0.86<!--claim:six-steps.accuracy-->``. The build prints the executed value with as
many decimals in its place, and fails when the written or the executed number lies outside the
interval that the lab asserts. ``recorded:`` marks refer to the stored full-size runs instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from tools import prose

MARK = re.compile(
    r"(?:(?P<number>[+\-−]?\d+(?:,\d{3})*(?:\.\d+)?)(?P<percent>\s?%)?)?"
    r"<!--\s*(?P<kind>claim|recorded):\s*(?P<name>[\w.-]*)\s*-->"
)
MEASURED = re.compile(
    r"(?<![\w.,/-])[+\-−]?\d+(?:,\d{3})*(?:\.\d+(?![\w.]*\.\d)|(?=\s?%))(?:\s?%)?"
)
VERSION = re.compile(r"\b(?:Python|CPython|torch|CUDA|version|v)\s?\d+(?:\.\d+)+\+?|\d+\.\d+\.\d+")
EXCUSE = re.compile(r"<!--\s*not-measured:\s*\S.*?-->", re.DOTALL)
CITED = re.compile(r"\{cite[\w:]*\}`")


@dataclass(frozen=True)
class Mark:
    """A marked number of a page: as written, and where."""

    number: str
    percent: str
    kind: str
    name: str
    start: int
    end: int

    @property
    def decimals(self) -> int:
        return len(self.number.partition(".")[2])

    @property
    def scale(self) -> float:
        return 100.0 if self.percent else 1.0

    @property
    def value(self) -> float:
        return float(self.number.replace(",", "").replace("−", "-")) / self.scale

    def printed(self, value: float) -> str:
        """Return `value` in the form of the written number: decimals, commas, signs, percent."""
        sign = "+" if self.number.startswith("+") else ""
        comma = "," if "," in self.number else ""
        text = f"{value * self.scale:{sign}{comma}.{self.decimals}f}"
        if float(text.replace(",", "")) == 0:
            text = text.lstrip("+-")
        return text.replace("-", "−") + self.percent


def marks(text: str) -> list[Mark]:
    """Return the marks of a page; those in code or comments do not count."""
    masked = prose.mask(text, comments=False)
    return [
        Mark(m["number"] or "", m["percent"] or "", m["kind"], m["name"], m.start(), m.end())
        for m in MARK.finditer(masked)
    ]


def fault(mark: Mark, known: dict[str, dict]) -> str:
    """Say what is wrong with a mark, "" when nothing is."""
    label = f"{mark.kind}:{mark.name}"
    if not mark.number:
        return f"the mark {label} has no number directly before it"
    if mark.name not in known:
        where = "executed lab" if mark.kind == "claim" else "file of book/recorded"
        return f"{label}: no {where} makes this claim{_nearest(mark.name, known)}"
    claim = known[mark.name]
    low, high = claim["low"], claim["high"]
    if not claim.get("evaluated", True):
        return f"{label}: not evaluated in the {claim.get('profile')} profile: run `make book`"
    if not low <= claim["value"] <= high:
        return f"{label}: the lab gave {claim['value']:.6g}, outside [{low:.6g}, {high:.6g}]"
    slack = 0.5000001 * 10.0**-mark.decimals / mark.scale
    if not low - slack <= mark.value <= high + slack:
        return (
            f"{label}: the page says {mark.number}{mark.percent}, outside [{low:.6g}, {high:.6g}]; "
            f"the lab gave {mark.printed(claim['value'])}"
        )
    return ""


def substitute(
    text: str, known: dict[str, dict[str, dict]], show: Callable[[Mark, str], str]
) -> str:
    """Put the executed value, as `show` renders it, in the place of every sound mark."""
    pieces, place = [], 0
    for mark in marks(text):
        pool = known[mark.kind]
        if fault(mark, pool):
            continue
        pieces += [text[place : mark.start], show(mark, mark.printed(pool[mark.name]["value"]))]
        place = mark.end
    return "".join([*pieces, text[place:]])


def unmarked(text: str) -> list[tuple[int, str]]:
    """Return (line, number) of decimals and percentages that no mark, source or excuse covers.

    A citation covers its paragraph, ``<!--not-measured: why-->`` its line, or the table or list
    right below it when it stands on a line of its own.
    """
    lines = text.split("\n")
    masked = MARK.sub(lambda m: " " * len(m[0]), prose.mask(text, comments=False))
    masked = prose.COMMENT.sub(lambda m: prose.blank(m[0]), masked)
    masked = VERSION.sub(lambda m: " " * len(m[0]), masked)
    covered = _covered(lines)
    found = []
    for number, line in enumerate(masked.split("\n"), 1):
        if number not in covered and not line.lstrip().startswith("#"):
            found += [(number, m[0]) for m in MEASURED.finditer(line)]
    return found


def _covered(lines: list[str]) -> set[int]:
    covered: set[int] = set()
    start = 0
    for end in range(len(lines) + 1):
        if end < len(lines) and lines[end].strip():
            continue
        paragraph = "\n".join(lines[start:end])
        alone = re.match(r"\s*<!--\s*not-measured:", paragraph)
        if CITED.search(paragraph) or alone:
            covered |= set(range(start + 1, end + 1))
        if alone and EXCUSE.fullmatch(paragraph.strip()):  # it excuses the block below
            below = next((i for i in range(end, len(lines)) if lines[i].strip()), len(lines))
            while below < len(lines) and lines[below].strip():
                below += 1
                covered.add(below)
        covered |= {start + 1 + n for n, li in enumerate(lines[start:end]) if EXCUSE.search(li)}
        start = end + 1
    return covered


def _nearest(name: str, known: dict[str, dict]) -> str:
    import difflib

    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else ""
