"""Fine-tuning a text encoder: a step of a small BERT, and an epoch of MiniLM on film reviews."""

from __future__ import annotations

import time
from statistics import fmean
from typing import Any

import transferkit as tk
from benchmarks import common, tax
from benchmarks.counters import Lengths
from benchmarks.systems import System, chosen
from benchmarks.tasks import Task, Texts, film_reviews, random_texts, small_bert
from benchmarks.threads import one_thread

STEP = ("bare loop, DataLoader", "transferkit", "HF Trainer", "HF Trainer, tuned", "Lightning",
        "fastai", "skorch")  # fmt: skip
EPOCH = ("bare loop, DataLoader", "bare loop, length buckets", *STEP[1:])
MEASURE = "HF Trainer"
COLUMNS = (
    ("system", "system", ""),
    ("seconds", "s an epoch", ",.1f"),
    ("speedup", "times as fast as HF Trainer", ".2f"),
    ("padding", "padded/real tokens", ".2f"),
    ("accuracy", "accuracy", ".3f"),
    ("lowest", "lowest", ".3f"),
    ("highest", "highest", ".3f"),
    ("precision", "precision", ""),
)


def measure(tiny: bool) -> dict[str, Any]:
    """The part of the result file that is about fine-tuning a text encoder."""
    began, repeats = time.time(), 1 if tiny else 3
    systems = chosen(EPOCH)
    steps = _steps(systems, tiny, repeats)
    task, validation = _reviews(tiny)
    rows = compare("MiniLM", systems, task, validation, repeats)
    for row, system in zip(rows, systems, strict=True):
        if "missing" not in row:
            row["padding"] = padding(system, task)
    size = f"{len(task.data.tokens):,} texts in batches of {task.batch_size}"
    model = "a small BERT with random weights" if tiny else "MiniLM"
    title = f"One epoch of {model}, every parameter trained: {size}"
    epoch = common.table(title, COLUMNS, rows, ("seconds", "seconds an epoch", "linear"))
    return {
        "about": common.about(repeats, tiny, began),
        "tables": {"bert": steps, "epoch": epoch},
        "notes": common.notes(systems),
    }


def _steps(systems: list[System], tiny: bool, repeats: int) -> dict[str, Any]:
    # texts of one length, so that all systems compute the same in a step
    width = 16 if tiny else 128
    texts = random_texts(256 if tiny else 1600, 32, 32)
    task = Task(texts, small_bert(hidden=width), epochs=1 if tiny else 3, lr=5e-5)
    entries = {system.name: (system, task) for system in systems if system.name in STEP}
    with one_thread():
        rows = tax.steps("small BERT", entries, repeats)
    title = f"A BERT of 2 layers and {width} dimensions, 32 texts of 32 tokens a batch, one thread"
    return common.table(title, tax.COLUMNS, rows)


def _reviews(tiny: bool) -> tuple[Task, Texts]:
    if tiny:
        texts = random_texts(128, 3, 30)
        return Task(texts, small_bert(layers=1, hidden=16), epochs=1, lr=1e-3), texts
    model = tk.models.load("minilm-l6", labels=["rotten", "fresh"])
    train, validation = film_reviews(model, 1600, 800)
    return Task(train, model, epochs=1, lr=5e-5), validation


def compare(
    what: str, systems: list[System], task: Task, validation: Texts, repeats: int
) -> list[common.Row]:
    """Whole runs of every system: the least seconds, and the accuracy over as many seeds."""
    ready = [system for system in systems if not system.missing()]
    scores: dict[str, list[float]] = {system.name: [] for system in ready}

    def clock(system: System):
        own = task.but(precision=common.precision(system))
        common.warm_up(system, own)

        def run(turn: int) -> float:
            seconds, model = common.timed(system, own.but(seed=turn))
            scores[system.name].append(common.accuracy(model, validation))
            return seconds

        return run

    seconds = common.turns(what, {system.name: clock(system) for system in ready}, repeats)
    measure = min(seconds.get(MEASURE, [float("nan")]))
    rows = []
    for system in systems:
        if system not in ready:
            rows.append(common.absent(system))
            continue
        own, least = scores[system.name], min(seconds[system.name])
        row = {"system": system.name, "seconds": least, "all_seconds": seconds[system.name]}
        row |= {"speedup": measure / least if MEASURE in seconds else None}
        row |= {"accuracy": fmean(own), "lowest": min(own), "highest": max(own)}
        rows.append(row | {"accuracies": own, "precision": common.precision(system)})
    return rows


def padding(system: System, task: Task) -> float:
    """Tokens that the model computes for one real token, counted by a model that only counts."""
    counter, precision = Lengths(), common.precision(system)
    with common.silence():
        system.train(tk.Staged([("head", counter)]).train(), task.but(precision=precision))
    return counter.padded / counter.real
