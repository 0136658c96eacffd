"""transferkit: `tk.fit` with a plan of one or two phases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import transferkit as tk
from benchmarks.peers.adapters.base import Adapter, Settings
from benchmarks.peers.tasks import IGNORED, Task, cross_entropy


@dataclass(frozen=True)
class Tokens:
    """Cross-entropy over the tokens that count: sums and counts, as every additive objective."""

    additive = True
    acts_below_head = False

    def outputs(self, model, batch):
        return model(batch.inputs)

    def counts(self, batch):
        return ((batch.labels != IGNORED).sum(),)

    def loss(self, outputs, batch):
        return tk.Loss(cross_entropy(outputs, batch.labels, None, "sum"), *self.counts(batch))

    def __call__(self, model, batch):
        return self.loss(self.outputs(model, batch), batch)


class Transferkit(Adapter):
    key, title = "transferkit", "transferkit"
    packages = ("transferkit",)
    setup = (
        "`tk.fit` with `tk.finetune` phases without warm-up, in float64 on the CPU. Where the "
        "backbone is frozen, a linear probe precedes, with `cache=False`: with the cache on, which "
        "is the default, the frozen part would not run at all, and there would be nothing to see."
    )
    notes: ClassVar[dict[str, str]] = {
        "accumulate.tokens": "An objective of twenty lines that returns sums and counts.",
        "accumulate": "`clip=None`.",
    }

    def train(self, task: Task) -> None:
        weights = task.class_weights
        tokens = task.train[1].dim() > 1
        metrics = []
        if task.score is not None:

            def score(logits, labels):
                return task.score()

            metrics = [score]
        tk.fit(
            task.model,
            Tokens() if tokens else tk.classification(class_weights=weights),
            task.train,
            task.held_out if metrics else None,
            plan=self._plan(task),
            metrics=metrics,
            batch_size=task.batch_size,
            accumulate=task.accumulate,
            precision="fp32",
            device="cpu",
            seed=task.seed,
            progress=False,
            **({} if task.clips else {"clip": None}),
            **({"directory": task.directory, "save_every": 0.0} if task.keeps else {}),
        )

    def _plan(self, task: Task) -> list[tk.Phase]:
        backbone, head = task.lr if isinstance(task.lr, tuple) else (task.lr, task.lr)
        settings: ClassVar[Settings] = {
            "lr": head,
            "schedule": task.schedule,
            "optimizer": task.optimizer,
        }
        settings |= {"momentum": 0.0, "warmup": 0.0, "weight_decay": task.weight_decay}
        if not task.frozen:
            return [tk.finetune(task.epochs, layer_decay=backbone / head, **settings)]
        probe = tk.linear_probe(task.unfreeze_at or task.epochs, cache=False, **settings)
        rest = task.epochs - (task.unfreeze_at or task.epochs)
        return [probe, tk.finetune(rest, **settings)] if rest else [probe]

    def evaluate(self, task: Task, batch_size: int) -> float:
        objective = tk.classification(class_weights=task.class_weights)
        given = {"batch_size": batch_size, "precision": "fp32", "device": "cpu"}
        return tk.evaluate(task.model, objective, task.held_out, **given)["loss"]
