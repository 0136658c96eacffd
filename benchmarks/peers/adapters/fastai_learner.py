"""fastai: a Learner on DataLoaders, with its own optimizers and callbacks."""

from __future__ import annotations

from typing import Any, ClassVar

from fastai.basics import (
    SGD,
    Adam,
    Callback,
    DataLoaders,
    Learner,
    params,
    set_seed,
)
from fastai.callback.all import BnFreeze, GradientAccumulation, SaveModelCallback
from torch import nn

from benchmarks.peers.adapters.base import Adapter, Settings
from benchmarks.peers.tasks import Items, Task


class Watched(Callback):
    """Tells the witness of updates, for fastai's optimizers are not torch's."""

    order = 100

    def __init__(self, task: Task):
        self.task = task

    def before_step(self):
        self.task.cut(self.opt)

    def after_step(self):
        self.task.updated(self.opt)


def halves(model: nn.Module) -> list[list[nn.Parameter]]:
    """The splitter: the parameters of the backbone, and those of the head."""
    return [params(model.backbone), params(model.head)]


class Fastai(Adapter):
    key, title = "fastai", "fastai"
    packages = ("fastai",)
    setup = (
        "`Learner(DataLoaders.from_dsets(...), model, loss_func, opt_func=...)` with a splitter "
        "into backbone and head, and `fit`. fastai's own `SGD` and `Adam` (which decays as AdamW "
        "does), `SGD` without momentum. The loss is torch's cross-entropy, its value in float32, "
        'as the recorder needs it. `device="cpu"`.'
    )
    notes: ClassVar[dict[str, str]] = {
        "accumulate": (
            "`GradientAccumulation(n_acc=16)`, which counts items. A group that is not full waits "
            "for the next epoch, and is not applied at the end of the fit. A last batch that is "
            "not full is dropped by default."
        ),
        "frozen": "`learn.freeze()`, which leaves frozen normalisation layers trainable.",
        "groups.equal": "`freeze()`, one epoch, `unfreeze()`, one more.",
        "groups.rates": "`fit_one_cycle(lr_max=slice(...))`, its own schedule, instead of a line.",
        "best.nan": '`SaveModelCallback(monitor="score")`.',
        "best.restored": "Defaults.",
        "reads": "The loss is copied to the host at every step, for the recorder.",
    }
    not_offered: ClassVar[dict[str, str]] = {
        "resume": "a fit can start at an epoch (`start_epoch`), not in the middle of one",
        "unused": "no such check",
    }
    settings: ClassVar[Settings] = {
        "accumulate.ragged": {"`n_acc=14`, `drop_last=False`": {"n_acc": 14, "drop_last": False}},
        "accumulate.short": {"`n_acc=8`": {"n_acc": 8}},
        "frozen": {
            "`train_bn=False`": {"train_bn": False},
            "`train_bn=False` and `BnFreeze`": {"train_bn": False, "freezer": True},
        },
        "unused": {"what the run said": {}},
        "best.restored": {"`SaveModelCallback`": {"best": True}},
        "reads": {"`no_bar()`": {"bar": False}},
    }

    def _learner(self, task: Task, drop_last: bool | None = None, **given: Any) -> Learner:
        set_seed(task.seed)
        pairs = [task.train, task.held_out or task.train]  # it validates after each epoch
        if drop_last is not None:
            given["drop_last"] = drop_last
        dls = DataLoaders.from_dsets(
            *map(Items, pairs), path=task.directory, bs=task.batch_size, device="cpu",
            **{k: given.pop(k) for k in ("drop_last",) if k in given},
        )  # fmt: skip
        sgd = lambda *arguments, **named: SGD(*arguments, mom=0.0, **named)  # noqa: E731
        return Learner(
            dls,
            task.model,
            lambda logits, labels: task.loss(logits, labels).float(),
            opt_func=Adam if task.optimizer == "adamw" else sgd,
            splitter=halves,
            wd=task.weight_decay,
            path=task.directory,
            **given,
        )

    def train(
        self, task: Task, n_acc: int | None = None, freezer: bool = False,
        best: bool | None = None, bar: bool = True, **given: Any,
    ) -> None:  # fmt: skip
        callbacks: list[Callback] = [Watched(task)]
        if task.accumulate > 1:
            callbacks.append(GradientAccumulation(n_acc or task.accumulate * task.batch_size))
        if freezer:
            callbacks.append(BnFreeze())
        if task.score is not None:

            def score(predictions, labels):
                return task.score()

            given["metrics"] = [score]
        if best if best is not None else task.best:
            callbacks.append(SaveModelCallback(monitor="score"))
        learn = self._learner(task, cbs=callbacks, **given)
        if task.frozen:
            learn.freeze()
        if isinstance(task.lr, tuple):
            return learn.fit_one_cycle(task.epochs, lr_max=slice(*task.lr))
        if task.unfreeze_at is not None:
            learn.fit(task.unfreeze_at, task.lr)
            learn.unfreeze()
            return learn.fit(task.epochs - task.unfreeze_at, task.lr)
        if bar:
            return learn.fit(task.epochs, task.lr)
        with learn.no_bar():
            return learn.fit(task.epochs, task.lr)

    def evaluate(self, task: Task, batch_size: int) -> float:
        learn = self._learner(task)
        learn.dls = DataLoaders.from_dsets(
            Items(task.train), Items(task.held_out), bs=batch_size, device="cpu"
        )
        return float(learn.validate()[0])
