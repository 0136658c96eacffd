"""What `make bench` recorded, as Markdown: for the page of the appendix, and for the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from tools import labs

FILE = "book/recorded/benchmarks.json"


def recorded(book: labs.Book) -> dict[str, Any]:
    """Return the result file.

    Raises:
        FileNotFoundError: nothing was recorded.
    """
    path = book.root / FILE
    if not path.exists():
        raise FileNotFoundError(f"{FILE} is missing: run `make bench` on an idle machine")
    return json.loads(path.read_text("utf-8"))


def directives() -> dict[str, Callable[[labs.Book], str]]:
    """Return the directives of the page by name: a table each, the targets, notes, machine."""

    def one(name: str) -> Callable[[labs.Book], str]:
        return lambda book: table(_tables(recorded(book))[name])

    tables = {f"benchmarks-{name}": one(name) for name in ("linear", "bert", "epoch", "frozen")}
    return {
        **tables,
        "benchmarks-options": one("options"),
        "benchmarks-targets": lambda book: targets(recorded(book)),
        "benchmarks-notes": lambda book: notes(recorded(book)),
        "benchmarks-machine": lambda book: machine(recorded(book)),
    }


def report(result: Mapping[str, Any]) -> str:
    """Return everything, for the terminal."""
    tables = [table(found) for found in _tables(result).values()]
    return "\n\n".join([*tables, targets(result), notes(result), machine(result)])


def _tables(result: Mapping[str, Any]) -> dict[str, Any]:
    parts = result["parts"].values()
    return {name: found for part in parts for name, found in part["tables"].items()}


def table(found: Mapping[str, Any]) -> str:
    """Return a table under its title; what is not installed, or failed, says so in its row."""
    columns = found["columns"]
    headings = [heading for _, heading, _ in columns]
    lines = [f"**{found['title']}**", "", _line(headings)]
    lines.append(_line(["--:" if form else "---" for _, _, form in columns]))
    for row in found["rows"]:
        why = f"not installed: {', '.join(row['missing'])}" if row.get("missing") else ""
        why = why or row.get("error", "")
        if why:
            cells = [str(row.get(key, "")) for key, _, form in columns if not form][:1]
            cells += [why, *[""] * (len(columns) - 2)]
        else:
            cells = [_cell(row.get(key), form) for key, _, form in columns]
        lines.append(_line(cells))
    return "\n".join(lines)


def targets(result: Mapping[str, Any]) -> str:
    """Return the targets, what was reached, and the ceiling."""
    headings = ["target", "limit", "measured", "reached", "ceiling, or why"]
    lines = [_line(headings), _line(["---"] * len(headings))]
    verdicts = {True: "yes", False: "**no**", None: "not measured"}
    for row in result["targets"]:
        cells = [row["target"], row["limit"], row["value"], verdicts[row["reached"]], row["why"]]
        lines.append(_line(cells))
    return "\n".join(lines)


def notes(result: Mapping[str, Any]) -> str:
    """Return what each system does otherwise than the others, or than its documentation."""
    found: dict[str, list[str]] = {}
    for part in result["parts"].values():
        found |= part["notes"]
    return "\n".join(f"- {name}: {' '.join(texts)}" for name, texts in found.items())


def machine(result: Mapping[str, Any]) -> str:
    """Return when each part was measured, and on what; what parts have in common is said once."""
    runs = {name: part["about"] for name, part in result["parts"].items()}
    lines = [f"- {name}: {_occasion(run)}" for name, run in runs.items()]
    return "\n".join([*lines, *dict.fromkeys(f"- {_place(run)}" for run in runs.values())])


def _occasion(run: Mapping[str, Any]) -> str:
    pieces = [
        f"{run['started'][:16].replace('T', ' ')} UTC, {run['seconds'] / 60:.0f} min",
        f"least of {run['repeats']}",
        "one thread" if run["threads"] == 1 else f"{run['threads']} threads",
        f"commit {run['commit'] or 'unknown'}",
    ]
    if "load" in run:
        pieces.append(f"load {run['load']:g} before the run")
    if run["tiny"]:
        pieces.append("**the tiny setting: these numbers mean nothing**")
    return "; ".join(pieces)


def _place(run: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
    card = ""
    if run.get("card"):
        card = (
            f"{run['card']}, {run['card_memory_gib']:g} GiB, capability {run['capability']}, CUDA "
            f"{run['cuda']}, dense peak {run['peak']}; "
        )
    return (
        f"{card}{run['cpu']}, {run['cores']} cores, {run['memory_gib']:g} GiB, {run['system']}; "
        f"the faster precision here is {run['precision']}; C++ compiler: "
        f"{run['compiler'] or 'none'}; {versions}"
    )


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any, form: str) -> str:
    if value is None:
        return "–"
    return format(value, form) if form else str(value)
