"""Features computed once, and scikit-learn's logistic regression on them."""

from __future__ import annotations

import torch

import transferkit as tk
from benchmarks.systems import System
from benchmarks.systems.bare import features
from benchmarks.tasks import Task

PENALTY = 0.03  # the inverse of its strength


def train(model: tk.Staged, task: Task) -> None:
    """Fit the two outputs of a linear head; its weights are put into the model."""
    from sklearn.linear_model import LogisticRegression

    rows = features(model.eval(), task)
    found = LogisticRegression(C=PENALTY, max_iter=1000).fit(
        rows.inputs.numpy(), rows.labels.numpy()
    )
    head = model.get_submodule("head")
    with torch.no_grad():  # the score s of the second class is the difference of the outputs
        for target, score in ((head.weight, found.coef_[0]), (head.bias, found.intercept_[0])):
            half = torch.as_tensor(score, dtype=torch.float32) / 2
            target[0].copy_(-half)
            target[1].copy_(half)


SYSTEMS = [
    System(
        "features once + scikit-learn",
        train,
        ("sklearn",),
        tuned=True,
        notes=(
            "L-BFGS to convergence in place of epochs of AdamW. Its penalty was chosen before the "
            "run on the validation texts, as was the learning rate of the others.",
        ),
    )
]
