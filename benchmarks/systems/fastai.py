"""fastai's Learner."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from benchmarks.systems import System
from benchmarks.tasks import Task


def train(model: nn.Module, task: Task) -> None:
    """A Learner over fastai's own DataLoader, with torch's optimizer."""
    from fastai.callback.core import Callback, CancelValidException
    from fastai.callback.schedule import ParamScheduler, SchedLin
    from fastai.callback.training import GradientClip
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    class NoValidation(Callback):
        def before_validate(self) -> None:
            raise CancelValidException

    how = {} if task.data.collate is None else {"create_batch": task.data.collate}
    loader = DataLoader(task.data.dataset(), bs=task.batch_size, shuffle=True, **how)
    learner = Learner(
        DataLoaders(loader, loader, device=torch.device(task.device)),
        model,
        loss_func=nn.CrossEntropyLoss(),
        opt_func=partial(OptimWrapper, opt=torch.optim.AdamW, weight_decay=0.0, fused=True),
        cbs=[GradientClip(task.clip), NoValidation()],
    )
    with learner.no_bar(), learner.no_logging():
        learner.fit(task.epochs, task.lr, cbs=ParamScheduler({"lr": SchedLin(task.lr, 0.0)}))


SYSTEMS = [
    System(
        "fastai",
        train,
        ("fastai",),
        notes=(
            "torch's AdamW through OptimWrapper in place of fastai's own Adam; no bar, no log, no "
            "validation.",
        ),
    )
]
