"""The report on the card: what was recorded, in words."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FAILED, STOPPED, INTERRUPTED = "failed", "stopped", "interrupted"
FORMULA = """\
Images and tokens a second are those of steady updates, between events of the card. Model FLOP/s are
F r and MFU is F r / P: F operations of matrix products and convolutions for one image or token,
forward and backward, nothing counted twice that is computed again; r images or tokens a second; P
the card's dense peak in that precision. MFU is left out for float32 and for unknown peaks."""


def wrong(part: Mapping[str, Any]) -> list[str]:
    """What is not well in a part: how it ended, and its rows that are not good."""
    found = [part["end"]] if part["end"] else []
    rows = [row for table in part["tables"].values() for row in table["rows"]]
    for row in rows:
        if row.get("good") is False or row.get("error"):
            precision = f", {row['precision']}" if row.get("precision") else ""
            found.append(f"{row['system']}{precision}")
    return found if found or rows else ["nothing was measured"]


def text(result: Mapping[str, Any]) -> str:
    """The whole report as Markdown."""
    from tools import benchmarks

    parts = result["parts"]
    lines = ["# On the card", "", *_verdict(parts), ""]
    for name, part in parts.items():
        lines += [benchmarks.table(part["tables"][name]), ""]
        lines += [f"*{name}: {part['end']}; what it had measured stands above.*", ""] * bool(
            part["end"]
        )
    said = [benchmarks.notes(result), benchmarks.machine(result)]
    return "\n".join([*lines, FORMULA, "", *filter(None, said)]) + "\n"


def _verdict(parts: Mapping[str, Any]) -> list[str]:
    found = {name: wrong(part) for name, part in parts.items()}
    lines = [f"- {name}: {'; '.join(what)}" for name, what in found.items() if what]
    well = [name for name, what in found.items() if not what]
    summary = f"{len(well)} of {len(parts)} parts are well: {', '.join(well) or 'none'}."
    return [summary, *[""] * bool(lines), *lines]


def save(folder: Path, parts: Mapping[str, Any]) -> None:
    """Write `gpu.json` and `gpu.txt`, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    result = {"parts": parts}
    kept = {"gpu.json": json.dumps(result, indent=1, ensure_ascii=False) + "\n"}
    kept["gpu.txt"] = text(result)
    for name, content in kept.items():
        partial = folder / f"{name}.partial"
        partial.write_text(content, "utf-8")
        os.replace(partial, folder / name)
