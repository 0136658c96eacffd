"""Law 1: accumulation and ragged groups give the gradient of one big batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import transferkit as tk
from transferkit import data

WEIGHTS = (0.3, 1.0, 2.5)


@dataclass(frozen=True)
class TwoTerms:
    """Cross-entropy, plus squared logits that count only the items of class 0."""

    additive = True
    acts_below_head = False
    anchor: float = 0.1

    def outputs(self, model, batch):
        return model(batch.inputs)

    def counts(self, batch):
        return len(batch), (batch.labels == 0).sum()

    def loss(self, outputs, batch):
        first, second = self.counts(batch)
        entropy = nn.functional.cross_entropy(outputs, batch.labels, reduction="sum")
        squares = (outputs.square().sum(1) * (batch.labels == 0)).sum()
        return tk.Loss.terms({"entropy": (1.0, entropy, first), "size": (0.5, squares, second)})

    def __call__(self, model, batch):
        return self.loss(self.outputs(model, batch), batch)

    def penalty(self, model):
        return self.anchor * sum(parameter.square().sum() for parameter in model.parameters())


class Contrastive:
    """An objective that couples the items of a batch."""

    additive = False
    acts_below_head = False

    def outputs(self, model, batch):
        return model(batch.inputs)

    def loss(self, outputs, batch):
        return tk.Loss((outputs @ outputs.T).square().sum(), len(batch) ** 2)

    def __call__(self, model, batch):
        return self.loss(self.outputs(model, batch), batch)


OBJECTIVES = [
    tk.classification(label_smoothing=0.1),
    tk.classification(class_weights=WEIGHTS),
    TwoTerms(),
]


def _trained(objective, count, seed, batch_size, accumulate, clip=None):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (count,), generator=generator)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    phase = tk.finetune(1, lr=0.5, optimizer="sgd", momentum=0.0, weight_decay=0.0, warmup=0.0)
    run = tk.fit(
        model,
        objective,
        (inputs, labels),
        plan=[phase],
        batch_size=batch_size,
        accumulate=accumulate,
        clip=clip,
        precision="fp32",
        seed=seed,
    )
    return torch.cat([p.detach().flatten() for p in model.parameters()]).cpu(), run.history


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("objective", OBJECTIVES, ids=["smoothed", "weighted", "two terms"])
@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 24),
    size=st.integers(1, 9),
    accumulate=st.integers(2, 5),
    seed=st.integers(0, 10**6),
    clip=st.sampled_from([None, 0.05]),
)
def test_accumulated_and_ragged_batches_train_like_one_big_batch(
    objective, count, size, accumulate, seed, clip
):
    # Small batches, several a step and the last group short, against the same items in one batch.
    parts, history = _trained(objective, count, seed, size, accumulate, clip)
    order = data.order

    def joined(count, _, seed, epoch, lengths):
        batches = order(count, size, seed, epoch, lengths)
        starts = range(0, len(batches), accumulate)
        return [np.concatenate(batches[at : at + accumulate]) for at in starts]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "order", joined)
        whole, expected = _trained(objective, count, seed, size * accumulate, 1, clip)
    assert (parts - whole).abs().max() < 1e-9
    assert history[0]["train_loss"] == pytest.approx(expected[0]["train_loss"], rel=1e-9)


@pytest.mark.usefixtures("device")
def test_a_step_is_the_gradient_that_torch_computes_for_all_items():
    count, seed = 11, 3
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (count,), generator=generator)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    weight = torch.tensor(WEIGHTS, dtype=torch.float64)
    nn.functional.cross_entropy(model(inputs), labels, weight=weight).backward()
    stepped = torch.cat([(p - 0.5 * p.grad).detach().flatten() for p in model.parameters()])
    found, _ = _trained(OBJECTIVES[1], count, seed, 3, 4)
    assert (found - stepped).abs().max() < 1e-9


def test_the_history_says_the_mean_of_every_term_over_the_items_of_the_epoch():
    objective, count, seed = TwoTerms(), 11, 4
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (count,), generator=generator)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    logits = model(inputs)
    entropy = nn.functional.cross_entropy(logits, labels)
    expected = entropy + 0.5 * logits[labels == 0].square().sum(1).mean()
    _, history = _trained(objective, count, seed, 3, 4)
    assert history[0]["train_loss"] == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.usefixtures("device")
def test_the_penalty_counts_once_a_step_whatever_the_accumulation():
    strong = TwoTerms(anchor=10.0)
    parts, _ = _trained(strong, 12, 0, 3, 4)
    whole, _ = _trained(strong, 12, 0, 12, 1)
    assert (parts - whole).abs().max() < 1e-9


def test_an_objective_that_couples_the_items_refuses_accumulation():
    with pytest.raises(ValueError, match=r"Contrastive couples.*accumulate=1"):
        _trained(Contrastive(), 8, 0, 2, 2)
    _trained(Contrastive(), 8, 0, 8, 1)
