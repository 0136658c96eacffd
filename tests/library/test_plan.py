"""Phases and plans as values: what they hold, how they nest, and what is said about bad ones."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch
from torch import nn

import transferkit as tk
from transferkit import plan


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))


def _data():
    torch.manual_seed(1)
    return torch.randn(8, 4), torch.randint(0, 2, (8,))


def test_a_plan_may_be_nested_and_is_one_list_of_phases():
    one, two, three = tk.linear_probe(1), tk.finetune(2), tk.finetune(3)
    assert plan.check(one) == [one]
    assert plan.check([one, [two, (three,)]]) == [one, two, three]
    assert plan.check(phase for phase in (one, two)) == [one, two]


@pytest.mark.parametrize("bad", [[], [[]], "finetune", [tk.finetune(1), ["probe"]], None, [3]])
def test_a_plan_of_something_else_is_refused(bad):
    with pytest.raises(ValueError, match=r"the plan is .*: give phases, such as"):
        plan.check(bad)


def test_gradual_unfreezing_opens_one_more_layer_group_in_each_phase():
    phases = tk.gradual_unfreezing(3, epochs=2, lr=1e-3, layer_decay=1 / 2.6)
    assert [phase.last for phase in phases] == [1, 2, 3]
    assert [phase.name for phase in phases] == ["unfreeze 1", "unfreeze 2", "unfreeze 3"]
    assert {(phase.epochs, phase.lr, phase.layer_decay) for phase in phases} == {(2, 1e-3, 1 / 2.6)}
    named = tk.gradual_unfreezing(2, epochs=[1, 4], name="open")
    assert [(phase.name, phase.epochs) for phase in named] == [("open 1", 1), ("open 2", 4)]


@pytest.mark.parametrize("bad", [{"groups": 0}, {"groups": 3, "epochs": [1, 2]}])
def test_gradual_unfreezing_needs_a_number_of_epochs_for_each_phase(bad):
    with pytest.raises(ValueError, match="one number of epochs or one for each phase"):
        tk.gradual_unfreezing(**bad)


def test_a_phase_that_does_not_fit_is_refused_before_the_first_is_trained():
    model = _model()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"'unfreeze 3' trains the last 3 .* has 2 with"):
        tk.fit(model, tk.classification(), _data(), plan=tk.gradual_unfreezing(3))
    assert all(map(torch.equal, before, model.parameters()))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_probe_before_fine_tuning_is_those_two_phases():
    probe, tune = tk.probe_then_finetune(2, 3, 1e-2, 1e-4, cache=False, layer_decay=0.9)
    assert probe == tk.linear_probe(2, 1e-2, cache=False)
    assert tune == tk.finetune(3, 1e-4, layer_decay=0.9)


def test_rates_and_patterns_are_kept_as_plain_values():
    phase = tk.finetune(1, rates={"head": 1, "layer.*": 2e-5}, train="*.bias")
    assert phase.rates == (("head", 1.0), ("layer.*", 2e-5)) and phase.train == ("*.bias",)
    assert phase == tk.finetune(1, rates=[["head", 1.0], ("layer.*", 2e-5)], train=["*.bias"])
    stored = json.loads(json.dumps(asdict(phase)))
    assert tk.Phase(**stored) == phase and hash(phase) == hash(tk.Phase(**stored))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": ()}, r"train is \(\): give None \(all\) or at least one pattern"),
        ({"rates": {"head": 0.0}}, r"rates is .*: give rates above 0.*freeze them"),
        ({"rates": {"head": math.nan}}, "give rates above 0"),
        ({"rates": 1e-3}, r"rates is 0\.001: give a pattern with its rate for each"),
        ({"rates": {"head": "fast"}}, "give a pattern with its rate"),
        ({"rates": ["head"]}, "give a pattern with its rate"),
    ],
)
def test_bad_rates_and_patterns_are_named_when_the_phase_is_made(settings, message):
    with pytest.raises(ValueError, match=message):
        tk.finetune(1, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rates": {"heads": 1e-3}}, "no parameter or module is called 'heads'"),
        ({"rates": {"0": 1e-3}, "last": 1}, r"'finetune': all that '0' matches is frozen.*`last`"),
        ({"rates": {"*": 1e-3, "2": 1e-2}}, "before '2' already gave a rate.*special pattern"),
        ({"train": ["2", "0.bias"], "last": 1}, "all that '0.bias' matches is frozen"),
        ({"train": "head"}, "no parameter or module is called 'head'"),
    ],
)
def test_a_pattern_that_does_nothing_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tk.fit(_model(), tk.classification(), _data(), plan=tk.finetune(1, **settings))


def test_a_run_with_rates_by_name_is_found_again(tmp_path):
    phase = tk.finetune(2, rates={"2": 1e-2}, train=("2", "*.bias"))
    settings = {"plan": phase, "directory": tmp_path}
    first = tk.fit(_model(), tk.classification(), _data(), **settings)
    again = tk.fit(_model(), tk.classification(), _data(), **settings)
    assert again.history == first.history
    other = tk.finetune(2, rates={"2": 1e-3}, train=("2", "*.bias"))
    with pytest.raises(ValueError, match="holds another run"):
        tk.fit(_model(), tk.classification(), _data(), plan=other, directory=tmp_path)
