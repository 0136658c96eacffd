"""transferkit: `tk.fit` with a plan of one phase."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from torch import nn

import transferkit as tk
from benchmarks.systems import System
from benchmarks.tasks import Task


def train(model: nn.Module, task: Task) -> None:
    """The whole model, or the head on features that are computed once and kept."""
    recipe = {"lr": task.lr, "schedule": "linear", "warmup": 0.0, "weight_decay": 0.0}
    phase = tk.linear_probe if task.head_only else tk.finetune
    tk.fit(
        model,
        tk.classification(),
        task.data.source(),
        plan=phase(task.epochs, **recipe),
        batch_size=task.batch_size,
        clip=task.clip,
        precision=task.precision,
        seed=task.seed,
        device=task.device,
        progress=False,
    )


@contextmanager
def empty_cache() -> Iterator[None]:
    """A feature cache of its own, empty at first and removed afterwards."""
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.dict(os.environ, {"TRANSFERKIT_CACHE": folder}),
    ):
        yield


def cold(model: nn.Module, task: Task) -> None:
    """With an empty cache: the features are computed in this run."""
    with empty_cache():
        train(model, task)


SYSTEMS = [
    System("transferkit", cold, tuned=True),
    System(
        "transferkit, features on disk",
        train,
        tuned=True,
        notes=("A second run on the same data, backbone and precision finds the features.",),
    ),
]
