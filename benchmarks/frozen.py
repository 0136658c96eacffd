"""A frozen backbone over 20 epochs: only the head learns, so the features could be kept."""

from __future__ import annotations

import time
from typing import Any

import transferkit as tk
from benchmarks import common
from benchmarks.encoder import COLUMNS as EPOCH_COLUMNS
from benchmarks.encoder import compare
from benchmarks.systems import chosen
from benchmarks.systems.transferkit import empty_cache
from benchmarks.tasks import Task, Texts, film_reviews, random_texts, small_bert, without_dropout

SYSTEMS = ("bare loop, DataLoader", "one pass over the backbone", "bare loop, features once",
           "features once + scikit-learn", "transferkit", "transferkit, features on disk",
           "HF Trainer", "HF Trainer, tuned", "Lightning", "fastai", "skorch")  # fmt: skip
CEILING = "one pass over the backbone"
COLUMNS = tuple(
    ("seconds", "s for all epochs", ",.1f") if key == "seconds" else (key, heading, form)
    for key, heading, form in EPOCH_COLUMNS
    if key != "padding"
)


def measure(tiny: bool) -> dict[str, Any]:
    """The part of the result file that is about a frozen backbone."""
    began, repeats = time.time(), 1 if tiny else 3
    task, validation = _reviews(tiny)
    systems = chosen(SYSTEMS)
    with empty_cache():
        _fill(task)
        rows = compare("frozen backbone", systems, task, validation, repeats)
    for row in rows:
        if row["system"] == CEILING:  # it trains nothing
            row |= dict.fromkeys(("accuracy", "lowest", "highest"))
    model = "a small BERT with random weights" if tiny else "MiniLM"
    title = (
        f"{task.epochs} epochs of a linear head on {model}, frozen: "
        f"{len(task.data.tokens):,} texts in batches of {task.batch_size}"
    )
    return {
        "about": common.about(repeats, tiny, began),
        "tables": {
            "frozen": common.table(
                title, COLUMNS, rows, ("seconds", "seconds for all epochs", "log")
            )
        },
        "notes": common.notes(systems),
        "epochs": task.epochs,
    }


def _fill(task: Task) -> None:
    # so that the system that finds its features on disk does
    (ready,) = chosen(["transferkit, features on disk"])
    common.timed(ready, task.but(precision=common.precision(ready), epochs=1))


def _reviews(tiny: bool) -> tuple[Task, Texts]:
    # Without dropout: all systems see the same features, and none draws masks that no one learns by
    if tiny:
        texts = random_texts(128, 3, 30)
        model = small_bert(layers=1, hidden=16, dropout=0.0)
        return Task(texts, model, epochs=2, lr=1e-2, head_only=True), texts
    model = without_dropout(tk.models.load("minilm-l6", labels=["rotten", "fresh"]))
    train, validation = film_reviews(model, 400, 800)
    return Task(train, model, epochs=20, lr=1e-3, head_only=True), validation
