"""Rule 2: `run.replay` rebuilds the very batches of any update, and its learning rate."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import noisy_flip, some_images, some_texts, tiny_convnet, tiny_encoder
from test_precision import Overflows
from test_resume import PowerCut, _stopped_after

import transferkit as tk
from transferkit.engine import Training

PLAN = [
    tk.finetune(2, lr=0.05, last=1, name="same name", warmup=0.3),
    tk.finetune(3, lr=0.02, layer_decay=0.5, name="same name", schedule="linear"),
]


def _observed(make, source, objective=None, **given):
    # The batches of every update as the step was given them, and the rates it used.
    seen, step = [], Training.step

    def watched(self, micro):
        seen.append((self.phase.name, self.state.epoch + 1, copy.deepcopy(list(micro))))
        step(self, micro)
        rates = [float(part["lr"]) for part in self.optimizer.param_groups]
        seen[-1] += (max(rates),)  # the head's

    given = {"plan": PLAN, "batch_size": 4, "precision": "fp32"} | given
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "step", watched)
        run = tk.fit(make(), objective or tk.classification(), source, **given)
    return run, seen


def _inputs(batch):
    return batch.inputs.values() if isinstance(batch.inputs, dict) else [batch.inputs]


def _assert_replays(run, seen, updates=None):
    for at in updates or range(len(seen)):
        again, (phase, epoch, batches, rate) = run.replay(at + 1), seen[at]
        assert (again.phase, again.epoch) == (phase, epoch)
        assert again.lr == pytest.approx(rate, rel=1e-6)
        assert len(again.batches) == len(batches)
        for own, other in zip(again.batches, batches, strict=True):
            assert all(map(torch.equal, _inputs(own), _inputs(other)))
            assert torch.equal(own.labels, other.labels)
            assert torch.equal(own.index, other.index)


@pytest.mark.usefixtures("device")
@settings(max_examples=12, deadline=None)
@given(
    count=st.integers(3, 30),
    size=st.integers(1, 8),
    accumulate=st.integers(1, 4),
    seed=st.integers(0, 10**6),
    texts=st.booleans(),
)
def test_every_update_of_a_run_of_two_phases_is_drawn_again(count, size, accumulate, seed, texts):
    source = some_texts(count) if texts else some_images(count, noisy_flip)
    make = tiny_encoder if texts else tiny_convnet
    how = {"batch_size": size, "accumulate": accumulate, "seed": seed}
    run, seen = _observed(make, source, **how)
    _assert_replays(run, seen)


def test_a_phase_that_ended_early_is_counted_as_it_was():
    held_out = some_images(6, seed=1)
    plan = [tk.finetune(9, lr=1.0, schedule="linear", name=name) for name in ("one", "two")]
    run, seen = _observed(
        tiny_convnet, some_images(20), validation=held_out, plan=plan, patience=1, accumulate=2
    )
    assert {"one", "two"} == {row["phase"] for row in run.history} and len(run.history) < 18
    _assert_replays(run, seen)


def test_a_run_that_was_interrupted_and_resumed_is_drawn_again(tmp_path):
    source, how = some_images(20, noisy_flip), {"save_every": 0.0, "directory": tmp_path}
    _, seen = _observed(tiny_convnet, source)
    for updates in (3, 9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Training, "step", _stopped_after(updates))
            with pytest.raises(PowerCut):
                tk.fit(
                    tiny_convnet(), tk.classification(), source, plan=PLAN, batch_size=4,
                    precision="fp32", **how,
                )  # fmt: skip
    run, _ = _observed(tiny_convnet, source, **how)
    _assert_replays(run, seen)


@pytest.mark.usefixtures("device")
def test_rates_are_those_of_the_updates_that_fp16_made(monkeypatch):
    monkeypatch.setattr(Overflows, "chosen", 5)
    run, seen = _observed(tiny_convnet, some_images(16), Overflows(), precision="fp16")
    skipped = [at for at in range(len(seen)) if run.replay(at + 1).skipped]
    assert len(skipped) == sum(row["skipped"] for row in run.history) >= len(run.history)
    _assert_replays(run, seen)


def test_with_cached_features_the_inputs_are_drawn_again():
    source, plan = some_images(12, noisy_flip, views=2), [tk.linear_probe(3, lr=0.1), PLAN[1]]
    run, seen = _observed(tiny_convnet, source, plan=plan)
    assert [batch.index.tolist() for batch in run.replay(2).batches] == [
        batch.index.tolist() for batch in seen[1][2]
    ]
    batch = run.replay(5).batches[0]  # in the second epoch, so of the second view
    for at, item in enumerate(batch.index.tolist()):
        assert torch.equal(batch.inputs[at], source.fetch([item], 1, 0).inputs[0])
    _assert_replays(run, seen, range(9, len(seen)))


def test_a_step_that_was_not_made_is_refused():
    run, seen = _observed(tiny_convnet, some_images(8))
    for step in (0, len(seen) + 1):
        with pytest.raises(ValueError, match=rf"step is {step}, but the run made 10 updates"):
            run.replay(step)
