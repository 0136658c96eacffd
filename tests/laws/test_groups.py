"""Laws 6 and 7: parameter groups, layer decay, and what a phase trains."""

from __future__ import annotations

import copy
import warnings
from fnmatch import fnmatchcase

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import some_images, state_of, tiny_convnet, tiny_encoder
from torch import nn

import transferkit as tk
from transferkit import layers, optim, plan
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


def _matched(name: str, pattern: str) -> bool:
    # the rule in other words: the whole name, or the path to a module around it
    ends = [at for at, letter in enumerate(name) if letter == "."] + [len(name)]
    return any(fnmatchcase(name[:end], pattern) for end in ends)


PATTERNS = ["*.bias", "*norm*", "head", "layer.[01]", "layer.1.mix", "head.weight"]


@settings(max_examples=40, deadline=None)
@given(
    last=st.integers(1, 4),
    train=st.one_of(st.none(), st.lists(st.sampled_from(PATTERNS), min_size=1, unique=True)),
    rates=st.lists(st.sampled_from(PATTERNS), unique=True, max_size=3),
    layer_decay=st.sampled_from([1.0, 0.5]),
    frozen=st.sets(st.integers(0, 15), max_size=6),
)
def test_a_phase_gives_each_parameter_that_it_trains_one_rate(
    last, train, rates, layer_decay, frozen
):
    model = tiny_encoder()
    for at, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(at not in frozen)
    allowed = {name for name, p in model.named_parameters() if p.requires_grad}
    named = {pattern: 10.0 + at for at, pattern in enumerate(rates)}
    phase = tk.finetune(1, 0.5, last, train=train, rates=named, layer_decay=layer_decay)
    depths = {"head": 0, "layer.1": 1, "layer.0": 2, "embeddings": 3}
    trained, expected = set(), {}
    for name in allowed:
        depth = next(depth for start, depth in depths.items() if name.startswith(start))
        if depth < last and (train is None or any(_matched(name, one) for one in train)):
            trained.add(name)
            first = next((rate for one, rate in named.items() if _matched(name, one)), None)
            expected[name] = 0.5 * layer_decay**depth if first is None else first
    idle = [one for one in train or [] if not any(_matched(name, one) for name in trained)]
    for at, one in enumerate(rates):
        rest = [n for n in trained if not any(_matched(n, before) for before in rates[:at])]
        idle += [] if any(_matched(name, one) for name in rest) else [one]
    if idle or not trained:
        with pytest.raises(
            ValueError, match=r"matches is frozen|first decides|trains no parameter"
        ):
            plan.begin(phase, model, allowed)
        return
    parts = plan.begin(phase, model, allowed).param_groups
    found = {}
    for part in parts:
        for name, parameter in zip(part["names"], part["params"], strict=True):
            assert name not in found and parameter is dict(model.named_parameters())[name]
            assert part["weight_decay"] == (0.01 if parameter.dim() > 1 else 0.0)
            found[name] = part["lr"]
    assert found == pytest.approx(expected)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


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
    phase = tk.finetune(1, lr=1.0, train=("0", "2.weight"), rates={"2": 3.0})
    parts = plan.begin(phase, model, set(names)).param_groups
    rates = {name: part["lr"] for part in parts for name in part["names"]}
    assert rates == {"0.weight": 1.0, "0.bias": 1.0, "2.weight": 3.0}


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
    how = {"schedule": schedule, "warmup": 0.3}
    phase = tk.finetune(2, lr=0.1, layer_decay=0.5, rates={"blocks.*.bias": 0.7}, **how)
    model = tiny_convnet()
    tk.fit(model, tk.classification(), some_images(12), plan=[phase], batch_size=4)
    depth = {"head": 0, "blocks": 1, "stem": 2}
    assert {update for update, *_ in seen} == set(range(6))
    for _, names, rate, scale in seen:
        for name in names:
            peak = 0.1 * 0.5 ** depth[name.split(".")[0]]
            peak = 0.7 if name.startswith("blocks") and name.endswith("bias") else peak
            assert rate == pytest.approx(peak * scale)


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


def _by_hand(model, data, stages, carry):
    # Full-batch AdamW at a constant rate, stage by stage: with new optimizers, or with one whose
    # moments are carried on.
    model = copy.deepcopy(model)
    kept = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    for parameters, updates in stages(model):
        own = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0)
        for _ in range(updates):
            loss = nn.functional.cross_entropy(model(data[0]), data[1])
            model.zero_grad()
            for parameter, gradient in zip(
                parameters, torch.autograd.grad(loss, parameters), strict=True
            ):
                parameter.grad = gradient
            (kept if carry else own).step()
    return model(data[0])


def test_a_phase_that_unfreezes_goes_on_with_a_new_optimizer_for_old_and_new_parameters():
    torch.manual_seed(0)
    data = (torch.randn(6, 4, dtype=torch.float64), torch.randint(0, 3, (6,)))
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    def stages(twin):
        return [(list(twin[2].parameters()), 3), (list(twin.parameters()), 2)]

    fresh, carried = (_by_hand(model, data, stages, carry) for carry in (False, True))
    same = {"schedule": "constant", "warmup": 0.0, "weight_decay": 0.0, "lr": 0.01}
    phases = tk.gradual_unfreezing(2, epochs=[3, 2], **same)
    tk.fit(model, tk.classification(), data, plan=phases, clip=None, precision="fp32")
    outputs = model(data[0])
    assert (outputs - fresh).abs().max() < 1e-9 < 1e-4 < (outputs - carried).abs().max()


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
