"""What each system adds to a step: the same updates of a linear model, where nothing else costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

import transferkit as tk
from benchmarks import common, counters
from benchmarks.systems import System, chosen
from benchmarks.tasks import Task, random_rows
from benchmarks.threads import one_thread

SYSTEMS = ("bare loop", "bare loop, DataLoader", "transferkit", "HF Trainer", "HF Trainer, tuned",
           "Lightning", "fastai", "skorch")  # fmt: skip
CACHED = "transferkit, cached features"
SKIPPED = 4  # updates until everything is warm
COLUMNS = (
    ("system", "system", ""),
    ("microseconds", "µs an update", ",.0f"),
    ("tax", "µs more than the first", ",.0f"),
    ("ratio", "time, times the first", ".2f"),
    ("calls", "Python calls", ",.0f"),
    ("calls_ratio", "calls, times the first", ".2f"),
    ("operators", "operators", ",.0f"),
    ("reads", "host reads", ".0f"),
    ("reads_mean", "host reads, mean", ".2f"),
    ("start_up", "start-up, ms", ",.0f"),
)


def measure(tiny: bool) -> dict[str, Any]:
    """The part of the result file that is about a linear model."""
    began, repeats = time.time(), 1 if tiny else 5
    rows, width = random_rows(256 if tiny else 3200, 384), 384
    torch.manual_seed(0)
    plain = Task(rows, nn.Linear(width, 2), epochs=1 if tiny else 6, lr=1e-3)
    stages = [("backbone", nn.Linear(width, width)), ("head", nn.Linear(width, 2))]
    probe = plain.but(model=tk.Staged(stages), head_only=True)
    systems = chosen(SYSTEMS)
    entries = {system.name: (system, plain) for system in systems}
    entries[CACHED] = (entries["transferkit"][0], probe)
    with one_thread():
        found = steps("linear model", entries, repeats)
        about = common.about(repeats, tiny, began)
    title = f"A linear model of {width} inputs, batches of {plain.batch_size}, one thread"
    chart = ("microseconds", "microseconds an update", "linear")
    tables = {"linear": common.table(title, COLUMNS, found, chart)}
    return {"about": about, "tables": tables, "notes": common.notes(systems)}


def steps(what: str, entries: Mapping[str, tuple[System, Task]], repeats: int) -> list[common.Row]:
    """Seconds, calls, operators and reads of an update, the first entry being the measure."""
    ready = {name: entry for name, entry in entries.items() if not entry[0].missing()}
    candidates, counted = {}, {}
    start_up: dict[str, list[float]] = {name: [] for name in ready}
    for name, (system, task) in ready.items():
        common.warm_up(system, task)
        counted[name] = _count(system, task)
        candidates[name] = _clock(system, task, start_up[name])
    seconds = common.turns(what, candidates, repeats)
    rows: list[common.Row] = []
    for name, (system, task) in entries.items():
        if name not in ready:
            rows.append(common.absent(system))
            continue
        update = min(seconds[name]) / (task.updates - SKIPPED)
        row = {"system": name, "microseconds": 1e6 * update, **vars(counted[name])}
        row |= {"start_up": 1e3 * min(start_up[name]), "all_seconds": seconds[name]}
        first = rows[0] if rows else row
        row["tax"] = row["microseconds"] - first["microseconds"]
        row["ratio"] = row["microseconds"] / first["microseconds"]
        row["calls_ratio"] = row["calls"] / first["calls"]
        rows.append(row)
    return rows


def _clock(system: System, task: Task, start_up: list[float]) -> Callable[[int], float]:
    # From the end of one update to the end of the last; the rest of the run is the start-up.
    def run(turn: int) -> float:
        marks, whole = common.moments(system, task.but(seed=turn))
        seconds = marks[-1] - marks[SKIPPED - 1]
        start_up.append(max(0.0, whole - seconds * len(marks) / (len(marks) - SKIPPED)))
        return seconds

    return run


def _count(system: System, task: Task) -> counters.Counts:
    few = task.but(data=task.data.first(8 * task.batch_size), epochs=2)
    with common.silence():
        return counters.count(lambda: system.train(few.build(), few))
