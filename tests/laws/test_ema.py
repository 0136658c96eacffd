"""The moving average of the weights: its formula, that it is evaluated, kept and resumed."""

from __future__ import annotations

import pytest
import torch
from small_models import same, some_images, state_of, tiny_convnet
from test_precision import Overflows
from test_resume import PowerCut, _agrees, _stopped_after

import transferkit as tk
from transferkit import engine, evaluation

PLAN = [tk.linear_probe(2, lr=0.1, cache=False), tk.finetune(3, lr=0.02, schedule="constant")]
EACH = 4  # updates an epoch


def _fit(monkeypatch, **settings):
    # The weights after each update, and as they are when an epoch is closed.
    after, closed = [], []
    step, close = engine.Training.step, engine.Training._close_epoch

    def stepped(self, micro):
        step(self, micro)
        after.append(state_of(self.model))

    def watched(self, row):
        closed.append(state_of(self.model))
        close(self, row)

    monkeypatch.setattr(engine.Training, "step", stepped)
    monkeypatch.setattr(engine.Training, "_close_epoch", watched)
    given = {"plan": PLAN, "batch_size": 4, "precision": "fp32", "objective": tk.classification()}
    given |= settings
    model = tiny_convnet()
    run = tk.fit(model, given.pop("objective"), some_images(16), **given)
    return model, run, after, closed


def _mean(states, decay, name):
    # the definition: the parameters of i updates ago weigh decay**i
    weights = torch.tensor([decay**i for i in range(len(states))][::-1], dtype=torch.float64)
    values = torch.stack([state[name].double() for state in states])
    return torch.einsum("n,n...->...", weights / weights.sum(), values)


def _assert_means(found, states, decay):
    for name, value in found.items():
        if "running" in name or "num_batches" in name:
            assert torch.equal(value, states[-1][name])  # buffers are not averaged
        else:
            assert (value - _mean(states, decay, name)).abs().max() < 1e-6


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("decay", [0.3, 0.9, 0.999])
def test_a_phase_ends_with_the_weighted_mean_of_the_weights_after_its_updates(decay, monkeypatch):
    plan = [tk.finetune(3, lr=0.02, schedule="constant")]
    model, _, after, _ = _fit(monkeypatch, ema=decay, plan=plan)
    assert len(after) == 3 * EACH
    _assert_means(state_of(model), after, decay)


def test_each_phase_has_an_average_of_its_own_and_starts_from_the_last(monkeypatch):
    starts = []
    enter = engine.Training._enter

    def watched(self, phase):
        starts.append(state_of(self.model))
        enter(self, phase)

    monkeypatch.setattr(engine.Training, "_enter", watched)
    model, _, after, _ = _fit(monkeypatch, ema=0.8)
    _assert_means(starts[1], after[: 2 * EACH], 0.8)
    _assert_means(state_of(model), after[2 * EACH :], 0.8)


@pytest.mark.usefixtures("device")
def test_training_itself_is_not_changed_by_the_average(monkeypatch):
    settings = {"plan": PLAN[1:], "validation": some_images(6, seed=1)}
    _, _, after, closed = _fit(monkeypatch, ema=0.9, **settings)
    monkeypatch.undo()
    _, _, plain, _ = _fit(monkeypatch, **settings)
    assert all(map(same, after, plain))
    assert same(closed[0], plain[EACH - 1])  # given back after the evaluation


def test_the_average_is_evaluated_and_the_best_one_restored(monkeypatch):
    held_out = some_images(30, seed=1)
    model, run, after, _ = _fit(
        monkeypatch, ema=0.7, plan=PLAN[1:], validation=held_out, metrics=[tk.accuracy]
    )
    _assert_means(state_of(model), after[: run.best["epoch"] * EACH], 0.7)
    own = {name: run.best[name] for name in ("loss", "accuracy")}
    assert run.evaluate(held_out) == pytest.approx(own, abs=1e-6)
    for row in run.history:
        states = after[: row["epoch"] * EACH]
        with torch.no_grad():
            model.load_state_dict(states[-1])
            for name, parameter in model.named_parameters():
                parameter.copy_(_mean(states, 0.7, name))
        assert run.evaluate(held_out)["loss"] == pytest.approx(row["loss"], abs=1e-5)


@pytest.mark.usefixtures("device")
def test_an_update_that_fp16_skips_does_not_count(monkeypatch):
    monkeypatch.setattr(Overflows, "chosen", 5)
    settings = {"plan": PLAN[1:], "precision": "fp16", "objective": Overflows()}
    model, run, after, _ = _fit(monkeypatch, ema=0.8, **settings)
    skipped = [at for at in range(1, len(after)) if _parameters_agree(after[at - 1], after[at])]
    assert sum(row["skipped"] for row in run.history) >= len(skipped) >= 2
    made = [state for at, state in enumerate(after) if at not in skipped]
    found = state_of(model)
    _assert_means({name: found[name] for name, _ in model.named_parameters()}, made, 0.8)


def _parameters_agree(left, right):
    return all(torch.equal(left[n], right[n]) for n, _ in tiny_convnet().named_parameters())


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_resume_equals_no_interruption(precision, tmp_path):
    def fit(directory=None):
        model = tiny_convnet()
        run = tk.fit(
            model, tk.classification(), some_images(16), some_images(6, seed=1), plan=PLAN,
            batch_size=4, ema=0.9, directory=directory, save_every=0.0, precision=precision,
        )  # fmt: skip
        return model, run

    for updates in (3, 7, 5):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine.Training, "step", _stopped_after(updates))
            with pytest.raises(PowerCut):
                fit(tmp_path)
    _agrees(fit(tmp_path), fit())


def test_ctrl_c_in_an_evaluation_keeps_the_weights_that_train(tmp_path):
    def fit(directory=None):
        model = tiny_convnet()
        run = tk.fit(
            model, tk.classification(), some_images(16), some_images(6, seed=1), plan=PLAN,
            batch_size=4, ema=0.9, directory=directory, save_every=0.0,
        )  # fmt: skip
        return model, run

    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "_at_once", interrupted)
        assert fit(tmp_path)[1].interrupted
    _agrees(fit(tmp_path), fit())
