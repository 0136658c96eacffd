"""Laws 6 and 7: parameter groups, layer decay, and what a phase trains."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import some_images, state_of, tiny_convnet, tiny_encoder
from torch import nn

import transferkit as tk
from transferkit import layers, optim
from transferkit.engine import Training


def _groups(model, **settings):
    given = {"lr": 1.0, "weight_decay": 0.1, "layer_decay": 0.5}
    return optim.parameter_groups(layers.groups(model), **(given | settings))


@settings(max_examples=40, deadline=None)
@given(
    make=st.sampled_from([tiny_convnet, tiny_encoder]),
    frozen=st.sets(st.integers(0, 15)),
    layer_decay=st.sampled_from([1.0, 0.7]),
)
def test_parameter_groups_partition_the_trainable_parameters(make, frozen, layer_decay):
    model = make()
    for at, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(at not in frozen)
    parts = _groups(model, layer_decay=layer_decay)
    inside = [id(parameter) for part in parts for parameter in part["params"]]
    trainable = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    assert len(inside) == len(set(inside)) and set(inside) == set(trainable)
    for part in parts:
        assert part["names"] == [trainable[id(parameter)] for parameter in part["params"]]


def test_biases_and_normalisation_weights_are_not_decayed():
    for part in _groups(tiny_encoder()):
        for name, parameter in zip(part["names"], part["params"], strict=True):
            one_dimensional = name.endswith("bias") or "norm" in name
            assert one_dimensional == (parameter.dim() == 1)
            assert part["weight_decay"] == (0.0 if one_dimensional else 0.1)


def test_parameters_that_are_equal_in_value_are_not_confused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    tk.freeze(model, "1")
    names = sorted(name for part in _groups(model) for name in part["names"])
    assert names == ["0.bias", "0.weight", "2.bias", "2.weight"]


def test_a_shared_parameter_is_trained_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    names = sorted(name for part in _groups(model) for name in part["names"])
    assert names == ["0.bias", "0.weight", "1.bias"]


@pytest.mark.parametrize("schedule", optim.SCHEDULES)
def test_layer_decay_changes_the_rate_under_every_schedule(schedule, monkeypatch):
    seen = []
    step = Training.step

    def watched(self, micro):
        step(self, micro)
        scale = optim.factor(schedule, self.state.update, 6, 0.3)
        for part in self.optimizer.param_groups:
            seen.append((self.state.update, part["names"], part["lr"], scale))

    monkeypatch.setattr(Training, "step", watched)
    phase = tk.finetune(2, lr=0.1, layer_decay=0.5, schedule=schedule, warmup=0.3)
    model = tiny_convnet()
    tk.fit(model, tk.classification(), some_images(12), plan=[phase], batch_size=4)
    depth = {"head": 0, "blocks": 1, "stem": 2}
    assert {update for update, *_ in seen} == set(range(6))
    for _, names, rate, scale in seen:
        for name in names:
            assert rate == pytest.approx(0.1 * 0.5 ** depth[name.split(".")[0]] * scale)


def test_layer_decay_changes_how_far_layers_move():
    def moved(layer_decay):
        model = tiny_convnet()
        before = state_of(model)
        phase = tk.finetune(1, lr=0.01, layer_decay=layer_decay, weight_decay=0.0)
        tk.fit(model, tk.classification(), some_images(4), plan=[phase], batch_size=4)
        after = state_of(model)
        return {n: float((after[n] - before[n]).abs().max()) for n in before if "weight" in n}

    even, decayed = moved(1.0), moved(0.1)
    assert decayed["head.weight"] == pytest.approx(even["head.weight"], rel=1e-3)
    assert decayed["stem.0.weight"] == pytest.approx(0.01 * even["stem.0.weight"], rel=0.05)


@settings(max_examples=60, deadline=None)
@given(
    updates=st.integers(1, 200),
    warmup=st.floats(0, 0.9),
    schedule=st.sampled_from(optim.SCHEDULES),
)
def test_a_schedule_rises_to_its_peak_then_never_rises(updates, warmup, schedule):
    rates = [optim.factor(schedule, update, updates, warmup) for update in range(updates)]
    assert all(0 < rate <= 1 for rate in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    if updates - updates * warmup > 1:
        assert max(rates) == 1.0


def test_a_phase_starts_with_fresh_moments_for_what_it_trains(monkeypatch):
    first = {}
    step = Training.step

    def watched(self, micro):
        if self.phase.name not in first:
            names = [name for part in self.optimizer.param_groups for name in part["names"]]
            first[self.phase.name] = (names, len(self.optimizer.state))
        step(self, micro)

    monkeypatch.setattr(Training, "step", watched)
    plan = [tk.linear_probe(1), tk.finetune(1, last=2), tk.finetune(1, name="all")]
    tk.fit(tiny_convnet(), tk.classification(), some_images(8), plan=plan)
    assert [len(names) for names, _ in first.values()] == [2, 6, 10]
    assert all(moments == 0 for _, moments in first.values())


class SideBranch(nn.Module):
    def __init__(self):
        super().__init__()
        self.unused, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, inputs):
        return self.head(inputs)


def test_fit_names_trainable_parameters_that_the_objective_never_reaches():
    data = (torch.randn(8, 4), torch.randint(0, 2, (8,)))
    with pytest.warns(UserWarning, match=r"does not reach 2 .*unused\.weight, unused\.bias"):
        tk.fit(SideBranch(), tk.classification(), data, plan=[tk.finetune(2)])
    model = SideBranch()
    tk.freeze(model, "unused")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tk.fit(model, tk.classification(), data, plan=[tk.finetune(2)])


def test_an_objective_that_reaches_nothing_is_refused():
    class Detached(tk.classification):
        def outputs(self, model, batch):
            return super().outputs(model, batch).detach()

    data = (torch.randn(8, 4), torch.randint(0, 2, (8,)))
    with pytest.raises(ValueError, match="reaches none of the parameters"):
        tk.fit(nn.Linear(4, 2), Detached(), data, plan=[tk.finetune(1)])
