"""What a phase changes and what is kept; law 9: NaN is never best, best weights are restored."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from small_models import same, some_images, state_of, tiny_convnet

import transferkit as tk
from transferkit import engine


def _fit(monkeypatch, values, higher=True, plan=None, **settings):
    # A metric that says what the test wants, and the weights as they were at each epoch.
    told, states = iter(values), []

    def told_score(logits, labels):
        return next(told)

    told_score.higher_is_better = higher
    close = engine.Training._close_epoch

    def watched(self, row):
        states.append(state_of(self.model))
        close(self, row)

    monkeypatch.setattr(engine.Training, "_close_epoch", watched)
    model = tiny_convnet()
    run = tk.fit(
        model,
        tk.classification(),
        some_images(8),
        some_images(4, seed=1),
        plan=plan or [tk.finetune(len(values), lr=0.01)],
        metrics=[told_score],
        **settings,
    )
    return model, run, states


@pytest.mark.parametrize("higher", [True, False])
def test_nan_is_never_the_best(monkeypatch, higher):
    values = [math.nan, 0.3, math.nan, 0.3]
    model, run, states = _fit(monkeypatch, values, higher)
    assert run.best["epoch"] == 2
    assert same(state_of(model), states[1])


def test_the_weights_of_the_best_epoch_are_restored(monkeypatch):
    model, run, states = _fit(monkeypatch, [0.1, 0.9, 0.5, 0.2])
    assert run.best["epoch"] == 2 and run.best["told_score"] == 0.9
    assert same(state_of(model), states[1])


def test_where_lower_is_better_the_lowest_is_restored(monkeypatch):
    model, run, states = _fit(monkeypatch, [0.9, 0.2, 0.1, 0.5], higher=False)
    assert run.best["epoch"] == 3
    assert same(state_of(model), states[2])


def test_the_last_weights_stay_if_asked_for(monkeypatch):
    model, run, states = _fit(monkeypatch, [0.9, 0.2], restore="last")
    assert run.best["epoch"] == 2
    assert same(state_of(model), states[1])


def test_each_phase_starts_from_the_best_weights_of_those_before(monkeypatch):
    starts = []
    epoch = engine.Training._epoch

    def watched(self):
        if self.state.phase_epoch == 0:
            starts.append(state_of(self.model))
        epoch(self)

    monkeypatch.setattr(engine.Training, "_epoch", watched)
    plan = [tk.linear_probe(3, lr=0.1), tk.finetune(2, lr=0.01)]
    _, _, states = _fit(monkeypatch, [0.2, 0.8, 0.4, 0.3, 0.9], plan=plan)
    assert same(starts[1], states[1])


def test_a_phase_that_only_does_harm_is_undone(monkeypatch):
    plan = [tk.linear_probe(2, lr=0.1), tk.finetune(2, lr=0.01)]
    model, run, states = _fit(monkeypatch, [0.2, 0.8, 0.4, 0.3], plan=plan)
    assert run.best["epoch"] == 2 and run.best["phase"] == "linear_probe"
    assert same(state_of(model), states[1])


def test_patience_counts_within_a_phase(monkeypatch):
    plan = [tk.finetune(6, lr=0.01, name="one"), tk.finetune(6, lr=0.01, name="two")]
    values = [0.5, 0.6, 0.1, 0.2] + [0.3, 0.4, 0.4, math.nan] + [1.0] * 4
    _, run, _ = _fit(monkeypatch, values, plan=plan, patience=2)
    assert [row["phase"] for row in run.history] == ["one"] * 4 + ["two"] * 4


def test_fit_leaves_the_random_state_of_the_caller_alone(monkeypatch):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    model, data = tiny_convnet(), some_images(8)
    torch.manual_seed(7)
    tk.fit(model, tk.classification(), data, plan=[tk.finetune(1)])
    assert torch.equal(torch.rand(3), expected)


def test_two_runs_with_one_seed_agree_bit_for_bit_and_another_seed_differs():
    def trained(seed):
        model = tiny_convnet()
        tk.fit(
            model, tk.classification(), some_images(10), plan=[tk.finetune(2, lr=0.01)], seed=seed,
            batch_size=4,
        )  # fmt: skip
        return state_of(model)

    assert same(trained(0), trained(0))
    assert not same(trained(0), trained(1))


def test_where_no_epoch_has_a_value_the_last_weights_stay(monkeypatch):
    plan = [tk.linear_probe(1, lr=0.1, cache=False), tk.finetune(2, lr=0.01)]
    model, run, states = _fit(monkeypatch, [math.nan] * 3, plan=plan)
    assert run.best["epoch"] == 3 and same(state_of(model), states[2])


def test_a_best_epoch_after_a_phase_of_nan_is_restored_whole(monkeypatch):
    plan = [tk.finetune(2, lr=0.01), tk.linear_probe(2, lr=0.1, cache=False)]
    model, run, states = _fit(monkeypatch, [math.nan, math.nan, 0.5, 0.2], plan=plan)
    assert run.best["epoch"] == 3 and same(state_of(model), states[2])


def _changed_in_each_phase(plan, make=tiny_convnet):
    states, model = [], make()

    def watched(self):
        states.append(state_of(self.model))
        return updates(self)

    updates = engine.Training._epoch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Training, "_epoch", watched)
        tk.fit(model, tk.classification(), some_images(8), plan=plan)
    states.append(state_of(model))
    return [
        {name for name in before if not torch.equal(before[name], after[name])}
        for before, after in pairwise(states)
    ]


def test_gradual_unfreezing_changes_one_more_layer_group_in_each_phase():
    head, block, stem = _changed_in_each_phase(tk.gradual_unfreezing(3, lr=0.01))
    first = {name.split(".")[0] for name in head}
    assert first == {"head"}
    assert {name.split(".")[0] for name in block} == {"head", "blocks"}
    assert {name.split(".")[0] for name in stem} == {"head", "blocks", "stem"}
    assert stem == set(tiny_convnet().state_dict())


def test_a_phase_that_trains_biases_alone_changes_nothing_else():
    bias = tk.finetune(1, lr=0.01, last=2, train=("blocks.*.bias", "head"))
    (changed,) = _changed_in_each_phase([bias])
    names = {"blocks.0.0.bias", "blocks.0.1.bias", "head.weight", "head.bias"}
    statistics = {f"blocks.0.1.{part}" for part in
                  ("running_mean", "running_var", "num_batches_tracked")}  # fmt: skip
    assert changed == names | statistics  # its BatchNorm is trained, so it follows the batches
    convolution = tk.finetune(1, lr=0.01, last=2, train=("blocks.0.0.bias", "head"))
    (changed,) = _changed_in_each_phase([convolution])
    assert changed == {"blocks.0.0.bias", "head.weight", "head.bias"}


def test_what_is_trained_by_name_can_be_cached_below():
    def weights(cache):
        model = tiny_convnet()
        phase = tk.finetune(2, lr=0.01, train=("blocks.0.*", "head.bias"), cache=cache)
        tk.fit(model, tk.classification(), some_images(12), plan=phase, batch_size=4)
        return state_of(model)

    live, cached = weights(False), weights(True)
    assert not same(live, state_of(tiny_convnet()))
    for name, tensor in live.items():
        assert torch.allclose(tensor.float(), cached[name].float(), atol=1e-5)
    everywhere = tk.finetune(1, train="*.bias", cache=True)
    with pytest.raises(ValueError, match="no features to cache"):
        tk.fit(tiny_convnet(), tk.classification(), some_images(8), plan=everywhere)
