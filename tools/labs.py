"""What the book is made of: pages, labs, and what the executed copy of a lab says.

Every other program of the pipeline asks this module where things lie, so that the tests can
build tiny books in a temporary folder: a book is its root folder and nothing else.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import yaml

from transferkit.claims import CLAIM_MIME, FIGURE_MIME

ROOT = Path(__file__).resolve().parents[1]
CHECKED = "nbval-check-output"
PARTS = ("concepts", "loss-math", "fine-tuning", "applications", "frontiers")


@dataclass(frozen=True, order=True)
class Finding:
    """One thing that is wrong, where it is, and what to do about it."""

    path: str
    line: int
    message: str

    def __str__(self) -> str:
        place = f"{self.path}:{self.line}" if self.line else self.path
        return f"{place}: {self.message}"


@dataclass(frozen=True)
class Book:
    """A book is a folder with ``_config.yml``, ``_toc.yml``, ``book/`` and ``notebooks/``."""

    root: Path = ROOT

    @property
    def build(self) -> Path:
        return self.root / "_build"

    @property
    def executed(self) -> Path:
        return self.build / "executed"

    @property
    def figures(self) -> Path:
        return self.build / "figures"

    @property
    def html(self) -> Path:
        return self.build / "html"

    def relative(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def config(self) -> dict:
        return yaml.safe_load((self.root / "_config.yml").read_text("utf-8")) or {}

    def repository(self) -> str:
        """Return the public address of the project, or "" while it has none."""
        return ((self.config().get("repository") or {}).get("url") or "").rstrip("/")

    def documents(self) -> list[str]:
        """Return the names in ``_toc.yml``, in reading order, without suffix."""
        table = yaml.safe_load((self.root / "_toc.yml").read_text("utf-8"))
        return list(_files(table))

    def pages(self) -> list[Path]:
        """Return the Markdown pages of the table of contents."""
        paths = [self.root / f"{name}.md" for name in self.documents()]
        return [path for path in paths if path.exists()]

    def chapters(self) -> list[Path]:
        """Return the pages that are chapters: those in the folder of a part."""
        return [p for p in self.pages() if p.parent.name in PARTS and p.stem != "index"]

    def labs(self) -> list[Lab]:
        """Return the labs of the table of contents."""
        names = [n.removeprefix("notebooks/") for n in self.documents() if _is_lab(n)]
        return [Lab(self, name) for name in names]

    def lab(self, name: str) -> Lab:
        """Return the lab called `name`: one of the table of contents, or one not yet listed there.

        Raises:
            KeyError: there is no lab of this name.
        """
        for lab in [*self.labs(), Lab(self, name)]:
            if name in (lab.name, lab.short) and lab.source.exists():
                return lab
        known = ", ".join(lab.name for lab in self.labs()) or "none"
        raise KeyError(f"no lab is called {name!r}; those of _toc.yml are: {known}")

    def claims(self) -> dict[str, dict]:
        """Return every claim of the executed labs by name, with the lab that made it."""
        return {name: claim for lab in self.labs() for name, claim in lab.claims().items()}

    def recorded(self) -> dict[str, dict]:
        """Return every claim of the recorded full-size runs by name."""
        return {name: claim for lab in self.labs() for name, claim in lab.recorded_claims().items()}


def _files(node) -> Iterator[str]:
    if isinstance(node, dict):
        for key in ("root", "file"):
            if key in node:
                yield re.sub(r"\.(md|ipynb)$", "", node[key])
        for value in node.values():
            yield from _files(value)
    elif isinstance(node, list):
        for value in node:
            yield from _files(value)


def _is_lab(document: str) -> bool:
    return document.startswith("notebooks/")


@dataclass(frozen=True)
class Lab:
    """A lab is ``notebooks/<part>/<name>.ipynb``; its executed copy lies in ``_build``."""

    book: Book
    name: str

    @property
    def short(self) -> str:
        return self.name.rsplit("/", 1)[-1]

    @property
    def source(self) -> Path:
        return self.book.root / "notebooks" / f"{self.name}.ipynb"

    @property
    def executed(self) -> Path:
        return self.book.executed / f"{self.name}.ipynb"

    @property
    def record(self) -> Path:
        return self.book.root / "book" / "recorded" / f"{self.short}.json"

    def notebook(self) -> dict:
        return read(self.source)

    @cached_property
    def declared(self) -> dict:
        """Return what the notebook says a run must make: its claims and figures."""
        return self.notebook()["metadata"].get("transferkit", {})

    def result(self) -> dict | None:
        """Return the executed notebook, or None where the lab was not executed.

        Its text is that of the source today: words may change without a new run.
        """
        if not self.executed.exists():
            return None
        result, written = read(self.executed), self.notebook()
        ran = [cell for _, cell in code_cells(result)]
        if [source(cell) for cell in ran] != [source(c) for _, c in code_cells(written)]:
            return result  # the code changed: what was executed is shown as it was
        outputs = iter(ran)
        cells = [next(outputs) if c["cell_type"] == "code" else c for c in written["cells"]]
        return {**result, "cells": cells}

    def run(self) -> dict:
        """Return the stamp of the last execution, {} where there was none."""
        result = self.result()
        return result["metadata"].get("transferkit", {}).get("run", {}) if result else {}

    def claims(self) -> dict[str, dict]:
        result = self.result()
        found = displays(result, CLAIM_MIME) if result else []
        return {c["name"]: {**c, "lab": self.name, "run": self.run()} for _, c in found}

    def figures(self) -> dict[str, dict]:
        result = self.result()
        return {f["name"]: f for _, f in displays(result, FIGURE_MIME)} if result else {}

    def recording(self) -> dict:
        """Return the record of the last run at full size, {} where there was none."""
        return json.loads(self.record.read_text("utf-8")) if self.record.exists() else {}

    def recorded_claims(self) -> dict[str, dict]:
        record = self.recording()
        claims = record.get("claims", [])
        return {c["name"]: {**c, "lab": self.name, "run": record} for c in claims}


def machine(run: dict) -> str:
    """Return what a run was computed on: the processor, and the GPU if one was used."""
    gpu = run.get("device", "cpu")
    threads = "1 thread" if run["threads"] == 1 else f"{run['threads']} threads"
    return f"{run['cpu']} ({threads})" + ("" if gpu == "cpu" else f" with {gpu}")


def read(path: Path) -> dict:
    """Read a notebook; a small cache keeps one copy for each state of the file."""
    state = path.stat()
    return _read(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=256)
def _read(path: Path, _time: int, _size: int) -> dict:
    return json.loads(path.read_text("utf-8"))


def source(cell: dict) -> str:
    """Return the text of a cell, which the file format keeps as a string or a list."""
    text = cell["source"]
    return text if isinstance(text, str) else "".join(text)


def tags(cell: dict) -> list[str]:
    return cell.get("metadata", {}).get("tags", [])


def code_cells(notebook: dict) -> list[tuple[int, dict]]:
    """Return (index, cell) of the code cells."""
    return [(i, c) for i, c in enumerate(notebook["cells"]) if c["cell_type"] == "code"]


def displays(notebook: dict, mime: str) -> list[tuple[int, dict]]:
    """Return (cell index, data) of every output that carries this MIME type."""
    return [
        (index, output["data"][mime])
        for index, cell in code_cells(notebook)
        for output in cell.get("outputs", [])
        if mime in output.get("data", {})
    ]


def seed(notebook: dict) -> int | None:
    """Return the SEED of the parameters cell."""
    for _, cell in code_cells(notebook):
        if "parameters" in tags(cell):
            return parameters(source(cell)).get("SEED")
    return None


def parameters(code: str) -> dict:
    """Return the names that a cell binds to literals."""
    found = {}
    for node in ast.parse(code).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            found.update({t.id: node.value.value for t in node.targets if isinstance(t, ast.Name)})
    return found


def shortcomings(notebook: dict, declared: dict, profile: str = "cpu") -> list[str]:
    """Say what an executed notebook lacks: a lab has run when every step it declares was made.

    Those that only a run at full size makes are `metadata.transferkit.full-claims` and
    `full-figures`.
    """
    found = []
    for index, cell in code_cells(notebook):
        outputs = cell.get("outputs", [])
        if cell.get("execution_count") is None:
            found.append(f"cell {index} was not executed")
        for output in outputs:
            found += [f"cell {index} {what}" for what in _blemishes(output)]
    for kind, mime in (("claim", CLAIM_MIME), ("figure", FIGURE_MIME)):
        made = Counter(data["name"] for _, data in displays(notebook, mime))
        wanted = [*declared.get(f"{kind}s", [])]
        wanted += declared.get(f"full-{kind}s", []) if profile == "full" else []
        found += [f"{kind} {n} is declared but was not made" for n in wanted if n not in made]
        found += [
            f"{kind} {n} was made but is not declared: add it to metadata.transferkit.{kind}s"
            for n in made
            if n not in wanted
        ]
        found += [f"{kind} {n} was made {k} times, not once" for n, k in made.items() if k > 1]
    return found


def _blemishes(output: dict) -> Iterator[str]:
    if output["output_type"] == "error":
        yield f"raised {output['ename']}: {output['evalue']}"
    if output.get("name") == "stderr":
        text = output["text"] if isinstance(output["text"], str) else "".join(output["text"])
        yield f"wrote to stderr: {text.strip()[:300]}"
    data = output.get("data", {})
    if any(mime.startswith("image/") for mime in data) and FIGURE_MIME not in data:
        yield "shows an image without alt text: show it by tk.figure(name, figure, alt=…)"
