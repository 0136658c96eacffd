"""skorch's NeuralNetClassifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.systems import System
from benchmarks.tasks import Rows, Task


class _ByName(nn.Module):
    # skorch calls a module with a dictionary's entries as arguments
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model({"input_ids": input_ids, "attention_mask": attention_mask})


def train(model: nn.Module, task: Task) -> None:
    """A NeuralNetClassifier with a loss on logits and the two callbacks that the recipe needs."""
    from skorch import NeuralNetClassifier
    from skorch.callbacks import GradientNormClipping, LRScheduler

    rows = isinstance(task.data, Rows)
    schedule = torch.optim.lr_scheduler.LambdaLR
    collate = {} if rows else {"iterator_train__collate_fn": task.data.collate}
    net = NeuralNetClassifier(
        model if rows else _ByName(model),
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.AdamW,
        optimizer__weight_decay=0.0,
        optimizer__fused=True,
        lr=task.lr,
        max_epochs=task.epochs,
        batch_size=task.batch_size,
        iterator_train__shuffle=True,
        train_split=None,
        callbacks=[
            LRScheduler(schedule, step_every="batch", lr_lambda=task.factor),
            GradientNormClipping(task.clip),
        ],
        device=task.device,
        verbose=0,
        **collate,
    )
    if rows:
        net.fit(task.data.inputs, task.data.labels)
    else:
        net.fit(task.data.dataset(), y=None)


SYSTEMS = [
    System(
        "skorch",
        train,
        ("skorch",),
        notes=("No validation split, nothing printed.",),
    )
]
