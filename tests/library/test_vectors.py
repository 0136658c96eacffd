"""Mixtures of models and task vectors, against the formulas, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import transferkit as tk


def _model(seed: int, labels=("a", "b")) -> tk.Staged:
    # two fine-tuned relatives have different weights, statistics and counters
    torch.manual_seed(seed)
    stem = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten())
    head = nn.Linear(12, len(labels))
    model = tk.Staged([("stem", stem), ("body", nn.Linear(12, 12)), ("head", head)], labels)
    model.train()
    for _ in range(seed + 1):
        model(torch.randn(6, 1, 4, 4))
    return model


def _tensors(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


BACKBONE = ["stem.0.weight", "stem.0.bias", "stem.1.weight", "stem.1.bias", "body.weight",
            "body.bias"]  # fmt: skip


@settings(max_examples=20)
@given(weight=st.floats(0, 1))
def test_a_mixture_is_the_weighted_mean_of_every_number(weight):
    a, b = _model(0), _model(1)
    mixed = tk.interpolate(a, b, weight)
    left, right, found = _tensors(a), _tensors(b), _tensors(mixed)
    for name, tensor in found.items():
        if tensor.is_floating_point():
            expected = (1 - weight) * left[name].double() + weight * right[name].double()
            assert (tensor.double() - expected).abs().max() < 1e-6
        else:
            assert torch.equal(tensor, right[name])
    assert not mixed.training and a.training and b.training


def test_the_ends_of_the_line_are_the_two_models():
    a, b = _model(0), _model(1)
    images = torch.randn(4, 1, 4, 4)
    for weight, model in ((0.0, a), (1.0, b)):
        assert torch.equal(tk.interpolate(a, b, weight)(images), model.eval()(images))


def test_what_cannot_be_mixed_is_refused():
    with pytest.raises(ValueError, match=r"weight is 1\.5: give a share"):
        tk.interpolate(_model(0), _model(1), 1.5)
    with pytest.raises(ValueError, match=r"labels \['a', 'b'\] and \['a', 'c'\]"):
        tk.interpolate(_model(0), _model(1, ("a", "c")), 0.5)
    other = _model(1)
    other.head = nn.Linear(12, 5)
    with pytest.raises(ValueError, match=r"does not fit the model: 2 tensors differ.*head\.bias"):
        tk.interpolate(_model(0), other, 0.5)
    with pytest.raises(ValueError, match="holds lora, whose parameters do not add up"):
        tk.interpolate(_model(0), tk.lora(_model(1), targets="body"), 0.5)


def test_a_task_vector_leads_from_the_base_to_the_fine_tuned_backbone_and_back():
    base, tuned = _model(0), _model(1, ("x", "y", "z"))
    vector = tk.task_vector(tuned, base)
    assert sorted(vector.tensors) == sorted(BACKBONE)
    there = vector.apply(base)
    back = (-vector).apply(there)
    start, end = _tensors(base), _tensors(tuned)
    for name, tensor in _tensors(there).items():
        if name in BACKBONE:
            assert torch.allclose(tensor, end[name], atol=1e-6)
            assert torch.allclose(_tensors(back)[name], start[name], atol=1e-6)
        else:  # the head and BatchNorm's statistics
            assert torch.equal(tensor, start[name])
    assert all(torch.equal(tensor, start[name]) for name, tensor in _tensors(base).items())


@settings(max_examples=15)
@given(scale=st.floats(-2, 2))
def test_vectors_add_and_scale(scale):
    base, one, two = (_model(seed) for seed in range(3))
    both = tk.task_vector(one, base) + tk.task_vector(two, base)
    found, states = _tensors(both.apply(base, scale)), [_tensors(m) for m in (base, one, two)]
    for name in BACKBONE:
        start, first, second = (state[name].double() for state in states)
        expected = start + scale * (first - start + second - start)
        assert (found[name].double() - expected).abs().max() < 1e-5


def test_vectors_of_other_architectures_are_refused():
    vector = tk.task_vector(_model(1), _model(0))
    small = tk.Staged([("body", nn.Linear(12, 12)), ("head", nn.Linear(12, 2))])
    with pytest.raises(ValueError, match="the task vector does not fit the model: 4 tensors"):
        vector.apply(small)
    with pytest.raises(ValueError, match="the other task vector does not fit"):
        vector + tk.task_vector(small, small)
    with pytest.raises(ValueError, match="holds ia3"):
        tk.task_vector(tk.ia3(_model(1), targets="body"), _model(0))
