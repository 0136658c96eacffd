"""What the library is meant to reach, what it reached, and where the ceiling is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.frozen import CEILING

Row = dict[str, Any]
OURS, BUCKETS, TRAINER = "transferkit", "bare loop, length buckets", "HF Trainer"
PEERS = (TRAINER, "HF Trainer, tuned", "Lightning", "fastai")
EQUAL = 0.01  # how much accuracy a faster system may lack


def targets(parts: Mapping[str, Any]) -> list[Row]:
    """The targets of the parts that were measured, each with value, limit and ceiling."""
    tables = {name: found for part in parts.values() for name, found in part["tables"].items()}
    rows = {name: {row["system"]: row for row in found["rows"]} for name, found in tables.items()}
    found: list[Row] = []
    for name, judge in (("linear", _step), ("bert", _step), ("epoch", _epoch), ("frozen", _frozen)):
        if name in rows:
            subject = {"linear": "linear model", "bert": "small BERT"}.get(name, "")
            found += [row for row in judge(rows[name], subject)]
    return found


def _target(text: str, limit: str, value: str, reached: bool | None, why: str = "") -> Row:
    return {"target": text, "limit": limit, "value": value, "reached": reached, "why": why}


def _step(rows: Mapping[str, Row], subject: str) -> Iterator[Row]:
    own, first = rows[OURS], next(iter(rows.values()))
    yield _target(f"host reads in a step, {subject}", "0", f"{own['reads']:.0f}", own["reads"] == 0)
    more = own["operators"] - first["operators"]
    yield _target(
        f"operators above {first['system']}, {subject}", "at most 4", f"{more:+.0f}", more <= 4
    )
    yield _target(
        f"Python calls against {first['system']}, {subject}",
        "at most 1.25 times",
        f"{own['calls_ratio']:.2f} times",
        own["calls_ratio"] <= 1.25,
    )
    peers = {name: rows[name] for name in PEERS if "tax" in rows.get(name, {})}
    faster = [name for name, row in peers.items() if row["tax"] <= own["tax"]]
    absent = [name for name in PEERS if name not in peers]
    least = min((row["tax"] for row in peers.values()), default=None)
    yield _target(
        f"tax on a step below every peer's but perhaps skorch's, {subject}",
        "-" if least is None else f"below {least:,.0f} µs",
        f"{own['tax']:,.0f} µs",
        None if absent else not faster,
        f"not installed: {', '.join(absent)}" if absent else ", ".join(faster),
    )


def _epoch(rows: Mapping[str, Row], _: str) -> Iterator[Row]:
    own, trainer, bare = rows[OURS], rows[TRAINER], rows[BUCKETS]
    yield _target(
        "padded/real tokens of MiniLM's epoch",
        "at most 1.10",
        f"{own['padding']:.2f}",
        own["padding"] <= 1.10,
    )
    ceiling = "the ceiling is a bare loop over the same length buckets"
    yield _faster(
        "an epoch of MiniLM, against HF Trainer's defaults", 1.5, own, trainer, bare, ceiling
    )


def _frozen(rows: Mapping[str, Row], _: str) -> Iterator[Row]:
    own, trainer, one = rows[OURS], rows[TRAINER], rows[CEILING]
    ceiling = "the ceiling is one pass over the backbone, with nothing trained"
    yield _faster(
        "a frozen backbone, against HF Trainer's defaults", 10, own, trainer, one, ceiling
    )


def _faster(text: str, wanted: float, own: Row, trainer: Row, best: Row, ceiling: str) -> Row:
    limit = f"at least {wanted:g} times as fast"
    if "missing" in trainer:
        return _target(text, limit, "-", None, f"not installed: {', '.join(trainer['missing'])}")
    ratio, top = trainer["seconds"] / own["seconds"], trainer["seconds"] / best["seconds"]
    lacking = trainer["accuracy"] - own["accuracy"]
    value = f"{ratio:.2f} times, accuracy {own['accuracy']:.3f} against {trainer['accuracy']:.3f}"
    why = f"{ceiling}: {top:.2f} times"
    return _target(text, limit, value, ratio >= wanted and lacking <= EQUAL, why)
