"""Gates on words: spelling, British forms, and what belongs to one machine or is unfinished."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from tools import labs, prose
from tools.labs import Book, Finding

FORBIDDEN = {
    r"(?<![\w.:/])/(?:home|Users|root|work|tmp|mnt)/\w[\w./-]*": "a path of one machine",
    r"\b(?:TODO|FIXME|XXX|TBD)\b": "unfinished",
    r"(?i)\blorem ipsum\b|\bcoming soon\b": "a placeholder",
}
# Right in British English too, at least in one of their senses.
BOTH = """
acknowledgment acknowledgments analog artifact artifacts biased dialog dialogs disk disks focused
focuses focusing judgment judgments license licensed licenses licensing math meter meters
overwritable program programs refocused refocuses refocusing routing story writable
"""
# Words of the field and names that the dictionaries take for slips.
KNOWN = "ans,fo,fpr,hist,inout,mape,nce,nd,ot,som,te"


def sources(book: Book) -> list[Path]:
    """Return what readers read: pages, labs, and the texts at the root."""
    found = book.pages() + [lab.source for lab in book.labs() if lab.source.exists()]
    return found + sorted(book.root.glob("*.md"))


def forbidden(book: Book) -> Iterator[Finding]:
    """No path of one machine and nothing unfinished reaches a reader."""
    for path in sources(book):
        text = path.read_text("utf-8")
        if path.suffix == ".ipynb":
            text = "\n".join(labs.source(cell) for cell in labs.read(path)["cells"])
        for pattern, what in FORBIDDEN.items():
            for match in re.finditer(pattern, text):
                line = prose.line_of(text, match.start()) if path.suffix == ".md" else 0
                yield Finding(book.relative(path), line, f"{match[0]}: {what}")


def spelling(book: Book) -> Iterator[Finding]:
    """Words are spelled right, and the British way where both exist; code is not looked at."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "american").write_text("\n".join(american()) + "\n", "utf-8")
        for path in sources(book):
            copy = folder / "text" / book.relative(path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(_words(path), "utf-8")
        command = [sys.executable, "-m", "codespell_lib", "-D", "-", "-D", "american"]
        command += ["--ignore-words-list", KNOWN, "text"]
        answer = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    for match in re.finditer(r"^text/(.+?):(\d+): (.+)$", answer.stdout, re.MULTILINE):
        line = int(match[2]) if match[1].endswith(".md") else 0
        yield Finding(match[1], line, f"spelling: {match[3]}")


def american() -> list[str]:
    """Return codespell's table of British words turned round: American → British."""
    table = files("codespell_lib").joinpath("data/dictionary_en-GB_to_en-US.txt")
    pairs = [line.split("->") for line in table.read_text("utf-8").split() if "->" in line]
    both = set(BOTH.split())
    return sorted(f"{us}->{uk}" for uk, us in pairs if us not in both and "," not in us)


def _words(path: Path) -> str:
    if path.suffix == ".ipynb":
        cells = [c for c in labs.read(path)["cells"] if c["cell_type"] == "markdown"]
        return "\n\n".join(prose.mask(labs.source(cell)) for cell in cells)
    return prose.mask(path.read_text("utf-8")).replace("**", "")
