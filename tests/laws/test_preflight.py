"""Law 9: `check` and `lr_find` leave no trace, and what they say is what is so."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from small_models import (
    noisy_flip,
    same,
    some_images,
    some_texts,
    state_of,
    tiny_convnet,
    tiny_encoder,
)
from torch import nn

import transferkit as tk
from transferkit import cache, engine, preflight

PLAN = [tk.linear_probe(2, lr=0.01), tk.finetune(2, lr=0.01, last=2, rates={"head": 0.1})]


def _data(make):
    return some_texts(22) if make is tiny_encoder else some_images(22, noisy_flip, views=2)


def _check(model, objective, data):
    return tk.check(model, objective, data, plan=PLAN, batch_size=4, accumulate=2)


def _find(model, objective, data):
    return tk.lr_find(model, objective, data, phase=PLAN[1], updates=12, batch_size=4)


def _whole_state(model):
    gradients = {
        f"grad {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }
    plain = {
        "modes": [module.training for module in model.modules()],
        "trained": [parameter.requires_grad for parameter in model.parameters()],
        "places": [tensor.data_ptr() for tensor in model.state_dict().values()],
        "objects": [id(tensor) for tensor in [*model.parameters(), *model.buffers()]],
        "with gradient": sorted(gradients),
        "hooks": [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()],
        "python": random.getstate(),
    }
    drawn = {"torch": torch.get_rng_state(), "numpy": torch.tensor(np.random.get_state()[1])}
    return state_of(model) | gradients | drawn, plain


class Noisy(tk.classification):
    """Draws from every generator, and remembers how often it was asked."""

    calls = 0

    def outputs(self, model, batch):
        outputs = super().outputs(model, batch)
        object.__setattr__(self, "calls", self.calls + 1)
        return outputs * (1 + 0.01 * random.random() + 0.01 * float(np.random.rand()))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("look", [_check, _find])
@pytest.mark.parametrize("make", [tiny_convnet, tiny_encoder])
def test_a_look_leaves_no_trace(look, make):
    model = make()
    tk.freeze(model, "layer.0" if make is tiny_encoder else "stem")
    model.train()
    model.head.eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model.register_buffer("seen", torch.zeros(3), persistent=False)
    objective, gradient = Noisy(), model.head.weight.grad
    before, plain = _whole_state(model)
    look(model, objective, _data(make))
    after, plain_after = _whole_state(model)
    assert same(before, after) and plain == plain_after
    assert model.head.weight.grad is gradient and objective.calls == 0
    assert not list(cache.directory().rglob("*.bin"))


def test_a_look_that_fails_leaves_no_trace_either(monkeypatch):
    def broken(self, micro):
        step(self, micro)
        with torch.no_grad():
            self.model.head.weight.fill_(math.nan)
            self.model.register_buffer("left", torch.ones(1))
            self.model.head.noted, self.model.head.added = 1, 1
            self.model.head.remembered.add_(1.0)  # no buffer, but a tensor all the same
            self.model.stem[1].running_mean = torch.ones(6)  # another tensor, not other values
        raise RuntimeError("planned")

    step = engine.Training.step
    monkeypatch.setattr(engine.Training, "step", broken)
    model = tiny_convnet()
    model.head.noted, model.head.remembered = 0, torch.zeros(2)
    before, plain = _whole_state(model)
    for look in (_check, _find):
        with pytest.raises(RuntimeError, match="planned"):
            look(model, tk.classification(), some_images(22))
        after, plain_after = _whole_state(model)
        assert same(before, after) and plain == plain_after
        assert model.head.noted == 0 and not hasattr(model.head, "added")
        assert torch.equal(model.head.remembered, torch.zeros(2))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("make", [tiny_convnet, tiny_encoder])
def test_a_run_after_a_look_equals_a_run_without(make):
    def fit(looks):
        model, objective, data = make(), tk.classification(), _data(make)
        for look in looks:
            look(model, objective, data)
        how = {"plan": PLAN, "batch_size": 4, "accumulate": 2}
        run = tk.fit(model, objective, data, **how)
        return state_of(model), [row["train_loss"] for row in run.history]

    weights, losses = fit([])
    after, losses_after = fit([_check, _find])
    assert same(weights, after) and losses == losses_after


def test_the_update_that_is_tried_is_the_step_of_the_engine(monkeypatch):
    seen = []
    step = engine.Training.step
    monkeypatch.setattr(engine.Training, "step", lambda self, micro: seen.append(step(self, micro)))
    _check(tiny_convnet(), tk.classification(), some_images(22))
    assert len(seen) == len(PLAN)
    _find(tiny_convnet(), tk.classification(), some_images(22))
    assert len(seen) == len(PLAN) + 12


def test_the_report_says_what_goes_in_and_what_each_phase_trains():
    model = tiny_convnet()
    tk.freeze(model, "blocks.0.0")
    plan = [*PLAN, tk.finetune(1, train="*.bias")]
    report = tk.check(model, tk.classification(), some_images(22), plan=plan, batch_size=4)
    shapes = {row["what"]: (row["type"], row["shape"], row["range"]) for row in report.shapes}
    assert shapes == {
        "input": ("float32", "(4, 3, 8, 8)", ""),
        "labels": ("int64", "(4,)", "0 to 2 of 3 names"),
        "outputs": ("float32", "(4, 3)", ""),
    }
    norm = ["blocks.0.1.weight", "blocks.0.1.bias"]
    assert list(report.trained) == ["1 linear_probe", "2 finetune", "3 finetune"]
    assert sorted(report.trained["1 linear_probe"]) == ["head.bias", "head.weight"]
    assert sorted(report.trained["2 finetune"]) == sorted([*norm, "head.bias", "head.weight"])
    assert sorted(report.trained["3 finetune"]) == sorted(
        ["stem.0.bias", "stem.1.bias", norm[1], "head.bias"]
    )
    rows = {row["group"]: row for row in report.groups}
    assert rows["stem"]["1 linear_probe"] == "frozen" and rows["stem"]["3 finetune"] == 12
    assert rows["blocks.0"]["2 finetune"] == 16 and rows["pool"]["2 finetune"] == ""
    assert report.unreached == report.host_reads == {}
    first = some_images(22).fetch(range(4), None, 0)
    untrained = tiny_convnet()
    untrained.eval()
    expected = nn.functional.cross_entropy(untrained(first.inputs), first.labels)
    assert report.loss == pytest.approx(float(expected.detach()), abs=0.5)
    printed = str(report)
    for words in ("(4, 3, 8, 8)", "0 to 2 of 3 names", "frozen", "memory in MiB", "3 finetune"):
        assert words in printed
    assert printed.endswith("no step reads anything back to the host")


def test_texts_are_tried_at_their_longest():
    data = some_texts(22)
    report = tk.check(tiny_encoder(), tk.classification(), data, batch_size=4)
    shapes = [row["shape"] for row in report.shapes if row["what"].startswith("input")]
    assert shapes == [f"(4, {data.lengths.max()})"] * 2


class Waiting(nn.Module):
    """A head that looks at its values, twice, and a branch that nothing reaches."""

    def __init__(self):
        super().__init__()
        self.unused, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, inputs):
        scale = self.head.bias.abs().max().item()
        return self.head(inputs[inputs[:, 0] > -math.inf] * (scale + 1))


def test_the_report_names_host_reads_with_their_line_and_what_is_not_reached(recwarn):
    data = (torch.randn(8, 4), torch.randint(0, 2, (8,)))
    report = tk.check(Waiting(), tk.classification(), data, plan=tk.finetune(1), batch_size=8)
    line = Waiting.forward.__code__.co_firstlineno + 1
    assert report.host_reads == {
        f"_local_scalar_dense at test_preflight.py:{line}": 1,
        f"index at test_preflight.py:{line + 1}": 1,
    }
    assert report.unreached == {"1 finetune": ["unused.weight", "unused.bias"]}
    assert "does not reach 2 trained: unused.weight, unused.bias" in str(report)
    assert f"test_preflight.py:{line}, 1 times" in str(report)
    assert not recwarn.list


@pytest.mark.parametrize("size", [1, 16])
def test_the_memory_is_that_of_weights_gradients_moments_and_what_backward_needs(size):
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 20), nn.Linear(20, 10))
    data = (torch.randn(16, 40), torch.randint(0, 10, (16,)))
    plan = [tk.finetune(1), tk.finetune(1, last=1), tk.finetune(1, optimizer="sgd")]
    report = tk.check(model, tk.classification(), data, plan=plan, batch_size=size)
    weights = [40 * 30 + 30, 30 * 20 + 20, 20 * 10 + 10]
    everything = sum(weights)
    # Of float32 kept: what each linear layer reads (tanh keeps its result, which the next one
    # reads), the log-probabilities, and the labels in int64; and the sum of the class weights.
    whole = size * 4 * (40 + 30 + 20 + 10 + 2) + 4
    top = size * 4 * (20 + 10 + 2) + 4
    counters = 6 * 4  # one a parameter, of AdamW
    expected = [
        (everything, everything, 2 * everything * 4 + counters, whole),
        (everything, weights[2], 2 * weights[2] * 4 + counters // 3, top),
        (everything, everything, everything * 4, whole),
    ]
    for row, (held, trained, moments, activations) in zip(report.phases, expected, strict=True):
        found = [
            row[n] * 2**20 for n in ("weights", "gradients", "moments", "activations", "total")
        ]
        parts = [4 * held, 4 * trained, moments, activations]
        assert found == pytest.approx([*parts, sum(parts)]) and row["trained"] == trained


def test_memory_that_backward_has_used_is_not_counted_twice():
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 10))
    data = (torch.randn(32, 40), torch.randint(0, 10, (32,)))
    one, four = (
        tk.check(model, tk.classification(), data, batch_size=8, accumulate=parts).phases[0]
        for parts in (1, 4)
    )
    assert four["activations"] == pytest.approx(one["activations"])


@pytest.mark.parametrize("look", [_check, _find])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, d: setattr(m, "labels", ["a", "b"]), "2 labels but 3 outputs"),
        (lambda m, d: setattr(d, "labels", d.labels + 1), "labels hold 3 but the head has 3"),
        (lambda m, d: tk.freeze(m, "head", "blocks"), "trains no parameter"),
    ],
)
def test_what_fit_would_refuse_is_refused(look, change, message):
    model, data = tiny_convnet(), some_images(22)
    change(model, data)
    with pytest.raises(ValueError, match=message):
        look(model, tk.classification(), data)


def test_errors_of_a_later_phase_are_found():
    model, data = tiny_convnet(), some_images(22, noisy_flip)
    with pytest.raises(ValueError, match="data look different in every epoch"):
        tk.check(model, tk.classification(), data, plan=[tk.finetune(1), tk.linear_probe(1)])
    with pytest.raises(ValueError, match="'open 4' trains the last 4"):
        plan = [tk.finetune(1), tk.gradual_unfreezing(4, name="open")]
        tk.check(model, tk.classification(), data, plan=plan)
    with pytest.raises(TypeError, match="unexpected keyword argument 'batchsize'"):
        tk.check(model, tk.classification(), data, batchsize=4)


@pytest.mark.parametrize("look", [_check, _find])
def test_a_loss_that_is_not_finite_is_refused_with_its_cause(look):
    data = some_texts(22)
    model = tiny_encoder()
    with torch.no_grad():
        model.head.bias.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="inputs are finite, so look at the weights"):
        look(model, tk.classification(), data)
    images = torch.full((22, 3, 8, 8), math.nan)
    with pytest.raises(FloatingPointError, match="inputs are not finite, so clean"):
        look(tiny_convnet(), tk.classification(), (images, torch.zeros(22).long()))


def _parabola(**settings):
    # The loss is w², its gradient 2 w: plain descent multiplies w by 1 - 2 lr.
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(2.0)
    data = (torch.ones(8, 1, dtype=torch.float64), torch.zeros(8, 1, dtype=torch.float64))
    phase = tk.finetune(1, lr=0.3, optimizer="sgd", momentum=0.0, weight_decay=0.0)
    how = {"phase": phase, "clip": None, "batch_size": 4, "precision": "fp32"}
    return tk.lr_find(model, tk.regression(), data, **(how | settings))


def test_the_losses_are_those_of_descent_at_rising_rates():
    test = _parabola(low=1e-3, high=10.0, updates=60)
    rates = np.array([1e-3 * 1e4 ** (at / 59) for at in range(60)])
    weights = 2.0 * np.cumprod([1.0, *(1 - 2 * rates)])
    count = len(test.rates)
    assert test.rates == pytest.approx(rates[:count])
    assert test.losses == pytest.approx(weights[:count] ** 2, rel=1e-9, abs=1e-200)
    # It ends as soon as the running mean is above the first loss: only rates above 1 can raise it.
    # Four times the lowest is less here.
    mean, ended = 0.0, None
    for at, loss in enumerate(test.losses, 1):
        mean = 0.9 * mean + 0.1 * loss
        smooth = mean / (1 - 0.9**at)
        assert test.smoothed[at - 1] == pytest.approx(smooth, rel=1e-9)
        ended = at if smooth > 4.001 and ended is None else ended
    assert count == ended < 60 and rates[count - 1] > 1.0


def test_the_suggestion_is_where_the_loss_falls_fastest():
    test = _parabola(low=1e-4, high=0.5, updates=200)
    # Where w² falls fastest over log lr, from the closed form, looked at on its own.
    rates = np.geomspace(1e-4, 0.5, 200)
    losses = 4.0 * np.cumprod([1.0, *(1 - 2 * rates[:-1])]) ** 2
    steepest = rates[np.gradient(losses, np.log(rates)).argmin()]
    assert abs(math.log(test.suggestion / steepest)) < 0.15
    assert "falls fastest at" in repr(test)


def test_where_the_loss_never_falls_nothing_is_suggested():
    test = _parabola(low=2.0, high=3.0, updates=20)
    assert test.suggestion is None and "never fell" in repr(test)
    test.plot()


def test_a_test_of_rates_follows_its_seed_and_respects_what_is_frozen(monkeypatch):
    rates, step = [], engine.Training.step

    def watched(self, micro):
        step(self, micro)
        rates.append({n: part["lr"] for part in self.optimizer.param_groups for n in part["names"]})

    monkeypatch.setattr(engine.Training, "step", watched)
    model, data = tiny_encoder(), some_texts(22)
    tk.freeze(model, "layer.0", "head.bias")
    phase = tk.finetune(3, lr=0.02, layer_decay=0.5, rates={"layer.1.norm": 0.2}, last=3)
    how = {"phase": phase, "updates": 12, "batch_size": 4}
    found = [tk.lr_find(model, tk.classification(), data, seed=seed, **how) for seed in (3, 3, 4)]
    assert np.array_equal(found[0].losses, found[1].losses)
    assert not np.array_equal(found[0].losses, found[2].losses)
    for rate, seen in zip(found[0].rates, rates, strict=False):
        assert set(seen) == {
            "head.weight",
            *(n for n, _ in tiny_encoder().named_parameters() if n.startswith("layer.1")),
        }
        assert seen["head.weight"] == pytest.approx(rate)
        assert seen["layer.1.norm.bias"] == pytest.approx(rate * 10)
        assert seen["layer.1.mix.in_proj_weight"] == pytest.approx(rate / 2)


def test_each_update_of_the_test_sees_the_batches_of_fit_and_a_dropout_of_its_own(monkeypatch):
    def indices(call):
        seen, step = [], engine.Training.step

        def watched(self, micro):
            made = (self.state.update, self.state.total)
            seen.append(([batch.index.tolist() for batch in micro], made))
            step(self, micro)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine.Training, "step", watched)
            call(tiny_convnet(), tk.classification(), some_images(22))
        return seen

    how = {"batch_size": 4, "accumulate": 2, "seed": 5}
    fitted = indices(lambda *what: tk.fit(*what, plan=tk.finetune(4), **how))
    tested = indices(lambda *what: tk.lr_find(*what, updates=12, **how))
    assert tested == fitted


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"low": 0.0}, "low is 0.0: give a rate above 0"),
        ({"low": 1.0, "high": 0.5}, "high is 0.5: give a rate above low, 1"),
        ({"updates": 3}, "updates is 3: give at least 10"),
    ],
)
def test_rates_that_cannot_be_tried_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        _parabola(**settings)


def test_the_plot_has_labelled_axes():
    figure = _parabola(low=1e-4, high=0.5, updates=50).plot()
    (axis,) = figure.axes
    assert axis.get_xlabel() == "learning rate" and axis.get_ylabel() == "loss"
    assert axis.get_xscale() == "log" and len(axis.lines) == 3
    figure.canvas.draw()


def test_an_objective_shares_with_the_model_what_it_shared_before():
    # A copy of it must not hold on to parameters of its own in place of the model's.
    class Watching(tk.classification):
        def outputs(self, model, batch):
            assert self.head is model.head
            return super().outputs(model, batch)

    model, objective = tiny_convnet(), Watching()
    object.__setattr__(objective, "head", model.head)
    preflight.check(model, objective, some_images(22))
