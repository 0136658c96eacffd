"""Law 4: a run that resumes equals a run that was never interrupted, bit for bit."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import (
    noisy_flip,
    same,
    some_images,
    some_texts,
    state_of,
    tiny_convnet,
    tiny_encoder,
)

import transferkit as tk
from transferkit import cache, checkpoint
from transferkit.engine import Training

PLAN = [
    tk.linear_probe(2, lr=0.02, cache=False),
    tk.finetune(2, lr=0.01, layer_decay=0.5, schedule="linear"),
]
UPDATES = 2 * 2 * 3  # phases, epochs, updates of two batches of 4 from 22 items


class PowerCut(Exception):
    pass


def _fit(directory=None, workers=0, make=tiny_convnet, plan=PLAN, **settings):
    model = make()
    some = some_texts(22) if make is tiny_encoder else some_images(22, noisy_flip)
    held_out = some_texts(10, 1) if make is tiny_encoder else some_images(10, seed=1)
    run = tk.fit(
        model, tk.classification(), some, held_out, plan=plan, metrics=[tk.accuracy], batch_size=4,
        accumulate=2, directory=directory, workers=workers, save_every=0.0, **settings,
    )  # fmt: skip
    return model, run


def _stopped_after(updates: int, error: type[BaseException] = PowerCut):
    # A step that fails in its middle, when so many have been made.
    made = 0
    step = Training.step

    def failing(self, micro):
        nonlocal made
        if made == updates:
            raise error
        made += 1
        step(self, micro)

    return failing


def _rows(run):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in run.history]


def _agrees(left, right):
    assert same(state_of(left[0]), state_of(right[0]))
    assert _rows(left[1]) == _rows(right[1])
    assert left[1].best["epoch"] == right[1].best["epoch"]


@pytest.fixture(scope="module")
def uninterrupted():
    return {make: _fit(make=make, device="cpu") for make in (tiny_convnet, tiny_encoder)}


@pytest.fixture(scope="module")
def uninterrupted_there(device):
    """The same, wherever the laws are asked now."""
    return {make: _fit(make=make) for make in (tiny_convnet, tiny_encoder)}


@pytest.mark.parametrize("make", [tiny_convnet, tiny_encoder])
@settings(max_examples=12, deadline=None)
@given(first=st.integers(0, UPDATES - 1), second=st.integers(0, UPDATES - 1))
def test_resume_at_any_step_equals_no_interruption(
    make, first, second, uninterrupted_there, tmp_path_factory
):
    # With dropout, BatchNorm, augmentation, moments, two phases, and two interruptions.
    directory = tmp_path_factory.mktemp("run")
    for updates in (first, second):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Training, "step", _stopped_after(updates))
            with contextlib.suppress(PowerCut):
                _fit(directory, make=make)
    _agrees(_fit(directory, make=make), uninterrupted_there[make])


def test_resume_with_another_number_of_workers_changes_nothing(uninterrupted_there, tmp_path):
    for updates, workers in ((4, 2), (5, 1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Training, "step", _stopped_after(updates))
            with pytest.raises(PowerCut):
                _fit(tmp_path / "run", workers=workers)
    _agrees(_fit(tmp_path / "run"), uninterrupted_there[tiny_convnet])


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_model_in_channels_last_resumes_too(optimizer, tmp_path):
    # Its moments lie in memory as its weights do, for the fused kernels go through both in step.
    def make():
        return tiny_convnet().to(memory_format=torch.channels_last)

    plan = [tk.finetune(2, lr=0.01, optimizer=optimizer)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "step", _stopped_after(4))
        with pytest.raises(PowerCut):
            _fit(tmp_path, make=make, plan=plan)
    _agrees(_fit(tmp_path, make=make, plan=plan), _fit(make=make, plan=plan))


@pytest.mark.usefixtures("device")
def test_a_data_set_of_torch_with_random_transforms_resumes_too(tmp_path):
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, at):
            return torch.full((3, 8, 8), float(at)) + torch.randn(3, 8, 8), at % 3

    def fit(directory=None, workers=0):
        model = tiny_convnet()
        phase = tk.finetune(2, lr=0.01)
        run = tk.fit(
            model, tk.classification(), Noisy(), plan=[phase], batch_size=3, directory=directory,
            workers=workers, save_every=0.0,
        )  # fmt: skip
        return model, run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "step", _stopped_after(5))
        with pytest.raises(PowerCut):
            fit(tmp_path, workers=2)
    _agrees(fit(tmp_path), fit())


@pytest.mark.usefixtures("device")
def test_resume_on_cached_features(tmp_path):
    plan = [tk.linear_probe(4, lr=0.02)]

    def fit(directory=None):
        model = tiny_convnet()
        run = tk.fit(
            model, tk.classification(), some_images(22), plan=plan, batch_size=4, save_every=0.0,
            directory=directory,
        )  # fmt: skip
        return model, run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "step", _stopped_after(9))
        with pytest.raises(PowerCut):
            fit(tmp_path)
    _agrees(fit(tmp_path), fit())


def test_a_finished_run_is_returned_without_training(uninterrupted, tmp_path):
    _fit(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "step", _stopped_after(0))
        _agrees(_fit(tmp_path), uninterrupted[tiny_convnet])


def test_early_stopping_remembers_its_patience(tmp_path):
    plan = [tk.finetune(30, lr=0.3, schedule="constant")]
    whole = _fit(plan=plan, patience=2)
    assert len(whole[1].history) < 30
    for updates in (3, 4, 5):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Training, "step", _stopped_after(updates))
            with contextlib.suppress(PowerCut):
                _fit(tmp_path, plan=plan, patience=2)
    _agrees(_fit(tmp_path, plan=plan, patience=2), whole)


def test_ctrl_c_waits_for_the_step_and_gives_the_run_so_far(uninterrupted, tmp_path, capsys):
    step = Training.step
    made = 0

    def interrupted(self, micro):
        nonlocal made
        made += 1
        if made == 5:
            os.kill(os.getpid(), signal.SIGINT)  # arrives in the middle of the step
        step(self, micro)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "step", interrupted)
        model, run = _fit(tmp_path)
    assert run.interrupted and len(run.history) == 1 and not model.training
    assert "interrupted after 5 updates" in capsys.readouterr().out
    assert checkpoint.read(tmp_path / checkpoint.LAST)[1]["state"]["total"] == 5
    _agrees(_fit(tmp_path), uninterrupted[tiny_convnet])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_fit_runs_in_a_thread_where_signals_cannot_be_received(uninterrupted):
    results = []
    thread = threading.Thread(target=lambda: results.append(_fit()))
    thread.start()
    thread.join(60)
    _agrees(results[0], uninterrupted[tiny_convnet])


def _raising_at(call, function):
    calls = 0

    def raising(*arguments, **named):
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return function(*arguments, **named)

    return raising


def test_the_interrupted_model_itself_may_be_given_again(uninterrupted, tmp_path):
    # As in a notebook whose training cell is run once more.
    model = tiny_convnet()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_between_steps", _raising_at(5, Training._between_steps))
        _fit(tmp_path, make=lambda: model)
    assert checkpoint.read(tmp_path / checkpoint.LAST)[1]["state"]["total"] == 5
    _agrees(_fit(tmp_path, make=lambda: model), uninterrupted[tiny_convnet])


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("where", ["_enter", "_moving", "_close_epoch", "_leave", "_order"])
def test_ctrl_c_anywhere_in_the_engine_leaves_a_whole_state(where, call, uninterrupted, tmp_path):
    # Twice at the same place, so that a resumed run is interrupted, too.
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Training, where, _raising_at(call, getattr(Training, where)))
            _fit(tmp_path)
    _agrees(_fit(tmp_path), uninterrupted[tiny_convnet])


def test_ctrl_c_while_features_are_computed_keeps_the_moments(tmp_path):
    plan = [tk.linear_probe(4, lr=0.02)]

    def fit(directory=None):
        model = tiny_convnet()
        run = tk.fit(
            model, tk.classification(), some_images(22), plan=plan, batch_size=4, save_every=0.0,
            directory=directory,
        )  # fmt: skip
        return model, run

    for target, name, call in ((Training, "step", 9), (cache, "cached", 1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, name, _raising_at(call, getattr(target, name)))
            fit(tmp_path)
    _agrees(fit(tmp_path), fit())


def test_weights_of_a_run_whose_state_is_gone_are_not_taken_for_the_best(tmp_path):
    def fit(seed):
        model, plan = tiny_convnet(), [tk.finetune(1, lr=0.01)]
        data, held_out = some_images(22), some_images(10, seed=1)
        tk.fit(
            model, tk.classification(), data, held_out, plan=plan, directory=tmp_path, seed=seed
        )  # fmt: skip
        return model

    fit(0)
    (tmp_path / checkpoint.LAST).unlink()
    model = fit(3)
    (path,) = tmp_path.glob("best-*")
    stored = checkpoint.read(path)[0]
    assert same(stored, {n: t for n, t in state_of(model).items() if n in stored})


def test_a_directory_with_another_run_is_refused_and_what_differs_is_named(tmp_path):
    _fit(tmp_path)
    with pytest.raises(ValueError, match=r"holds another run \(seed: 0 → 1\).*another directory"):
        _fit(tmp_path, seed=1)
    with pytest.raises(ValueError, match="plan: "):
        _fit(tmp_path, plan=PLAN[:1])
    with pytest.raises(ValueError, match="model: "):
        _fit(tmp_path, make=tiny_encoder)
    with pytest.raises(ValueError, match="weights: "):
        _fit(tmp_path, make=lambda: tiny_convnet(seed=1))


@pytest.mark.parametrize("changed", ["data", "labels", "validation"])
def test_a_directory_of_a_run_on_other_data_is_refused(changed, tmp_path):
    def fit(data, held_out):
        plan = [tk.finetune(1)]
        tk.fit(tiny_convnet(), tk.classification(), data, held_out, plan=plan, directory=tmp_path)

    data, held_out, other = some_images(8), some_images(6, seed=1), some_images(8, seed=2)
    fit(data, held_out)
    if changed == "labels":
        other = some_images(8)
        other.labels = 2 - other.labels
    arguments = (data, other) if changed == "validation" else (other, held_out)
    with pytest.raises(ValueError, match="validation: " if changed == "validation" else "data: "):
        fit(*arguments)


def test_a_damaged_checkpoint_is_named_with_the_remedy(tmp_path):
    _fit(tmp_path)
    path = tmp_path / checkpoint.LAST
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"last\.safetensors cannot be read.*delete it"):
        _fit(tmp_path)


KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from test_resume import _fit
from transferkit import checkpoint

save = checkpoint.save_run

def told(*arguments):
    print("saving", flush=True)
    sys.stdin.readline()
    save(*arguments)

checkpoint.save_run = told
torch.set_num_threads(1)
_fit(sys.argv[2])
"""


def test_kill_9_at_any_moment_leaves_the_last_checkpoint_readable(uninterrupted, tmp_path):
    # Killed while it writes its second, seventh and fifth state, each time going on from the last.
    here, directory = str(Path(__file__).parent), tmp_path / "run"
    moments = random.Random(0)
    reached = []
    for saves in (2, 7, 5):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, here, str(directory)],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(saves):  # it waits for a line before each, so that it cannot run ahead
            assert process.stdout.readline() == "saving\n"
            process.stdin.write("\n")
            process.stdin.flush()
        time.sleep(moments.uniform(0.0, 0.003))
        process.kill()
        process.communicate()
        _, about = checkpoint.read(directory / checkpoint.LAST)
        reached.append(about["state"]["total"])
    assert 0 < reached[0] < reached[1] <= reached[2] < UPDATES
    _agrees(_fit(directory), uninterrupted[tiny_convnet])
    assert len(list(directory.glob("*best-*"))) == 1
