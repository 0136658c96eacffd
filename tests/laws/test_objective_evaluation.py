"""Law 5 for objectives of tokens, spans, hidden tokens, pairs and reconstruction."""

from __future__ import annotations

import numpy as np
import pytest
from test_objective_laws import RANDOM

import transferkit as tk


def exact(rows, labels):
    return float((rows.argmax(1) == labels).mean())


def closeness(rows, target):
    return float(-np.abs(rows - target).mean())


METRICS = {
    "masked": [tk.accuracy],
    "tokens": [tk.accuracy, tk.macro_f1],
    "spans": [exact],
    "reconstruction": [closeness],
    "mixup": [tk.accuracy],
    "pgd": [tk.accuracy],
    "distillation": [tk.accuracy],
    "l2_sp": [tk.accuracy],
    "two views": [],
    "pairs": [],
}


@pytest.mark.parametrize("name", METRICS)
def test_evaluation_does_not_depend_on_the_batch_size(name):
    build, make, source = RANDOM[name]
    model, items = build(), source(11)
    scores = [
        tk.evaluate(model, make(model), items, METRICS[name], size, precision="fp32")
        for size in (1, 4, 11)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert scores[0] == pytest.approx(scores[2], abs=1e-6)


@pytest.mark.parametrize("name", METRICS)
def test_validation_chooses_the_epoch_with_the_lowest_loss(name):
    build, make, source = RANDOM[name]
    model = build()
    run = tk.fit(
        model, make(model), source(16), source(9), plan=[tk.finetune(3, lr=0.01)],
        metrics=METRICS[name], monitor="loss", batch_size=6,
    )  # fmt: skip
    assert run.best["loss"] == min(row["loss"] for row in run.history)
    assert run.evaluate(source(9))["loss"] == pytest.approx(run.best["loss"], rel=1e-5)
