"""Laws 1, 3, 4, 5, 7 and 10 on several ranks: the same script, the same training, nothing hangs."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from small_models import same, some_images, some_texts, state_of, tiny_convnet, tiny_encoder
from test_counters import NONE

import transferkit as tk
from transferkit import checkpoint, distributed

SCRIPT = str(Path(__file__).parent / "ranks.py")
ROOT = str(Path(__file__).parents[2])


def _start(many: int, *arguments: object, cache: Path) -> subprocess.Popen:
    # Loopback alone is used; the port is a free one.
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={many}"]
    environment = os.environ | {
        "TRANSFERKIT_CACHE": str(cache), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, *torchrun, SCRIPT, *map(str, arguments)], env=environment, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def _run(many: int, chapter: str, folder: Path) -> None:
    process = _start(many, chapter, folder, cache=folder / "cache")
    out, err = process.communicate(timeout=540)
    assert process.returncode == 0, (out + err)[-4000:]


def _read(folder: Path, name: str, rank: int = 0) -> tuple[dict, dict]:
    return checkpoint.read(folder / f"{name}-{rank}.safetensors")


def _distance(left: dict, right: dict) -> float:
    assert left.keys() == right.keys()
    return max((left[n].double() - right[n].double()).abs().max().item() for n in left)


def _values(history: list[dict]) -> list[float]:
    return [v for row in history for n, v in row.items() if isinstance(v, float) and n != "seconds"]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    _run(2, "laws", folder)
    return folder


@pytest.fixture(scope="module")
def alone():
    return [ranks.small(case, 1, None) for case in ranks.cases()]


@pytest.mark.parametrize("parallel", ranks.PARALLEL)
def test_two_ranks_train_like_one_that_accumulates_twice_as_much(parallel, two_ranks, alone):
    for at, (model, run) in enumerate(alone):
        for rank in (0, 1):
            state, about = _read(two_ranks, f"small-{at}-{parallel}", rank)
            assert _distance(state, state_of(model)) < 1e-9, ranks.cases()[at]
            assert _values(about["history"]) == pytest.approx(_values(run.history), rel=1e-6)
            trained = [row["train_loss"] for row in about["history"]]
            assert trained == pytest.approx([r["train_loss"] for r in run.history], rel=1e-9)


@pytest.mark.parametrize("parallel", ranks.PARALLEL)
def test_phases_on_cached_and_live_features_train_as_on_one_rank(parallel, two_ranks):
    model, run = ranks.texts(1, None)
    state, about = _read(two_ranks, f"texts-{parallel}")
    assert _distance(state, state_of(model)) < 1e-9
    assert _values(about["history"]) == pytest.approx(_values(run.history), rel=1e-6)


def test_one_rank_computes_the_features_and_the_others_find_them(two_ranks):
    # Those of the training and of the validation data, once for both kinds of parallel training.
    assert _read(two_ranks, "texts-fsdp", 0)[1]["features"] == 2
    assert _read(two_ranks, "texts-fsdp", 1)[1]["features"] == 0


def test_both_kinds_train_alike_and_every_rank_ends_with_the_same(two_ranks):
    histories = []
    for parallel in ranks.PARALLEL:
        (first, about), (second, other) = (
            _read(two_ranks, f"pictures-{parallel}", rank) for rank in (0, 1)
        )
        assert same(first, second) and about == other and about["best"] > 2
        histories.append([row[name] for row in about["history"] for name in ("loss", "train_loss")])
    assert histories[0] == pytest.approx(histories[1], rel=1e-3)


@pytest.mark.parametrize("parallel", ranks.PARALLEL)
def test_statistics_of_batchnorm_are_the_mean_over_the_ranks_that_drew_a_batch(parallel, two_ranks):
    # Three batches: one for each rank, then one for the first rank alone.
    inputs, _ = ranks.numbers(9)
    means = [inputs[batch].mean(0) for batch in tk.data.order(9, 3, seed=0, epoch=0)]
    expected = 0.9 * 0.1 * (means[0] + means[1]) / 2 + 0.1 * means[2]
    for rank in (0, 1):
        state, _ = _read(two_ranks, f"normalised-{parallel}", rank)
        assert (state["0.running_mean"] - expected).abs().max() < 1e-12
        assert state["0.num_batches_tracked"] == 2


@pytest.mark.parametrize("parallel", ranks.PARALLEL)
def test_a_model_trained_on_two_ranks_loads_in_one_process(parallel, two_ranks):
    model = tk.load(two_ranks / f"model-{parallel}", model=tiny_convnet(seed=5))
    assert same(state_of(model), _read(two_ranks, f"pictures-{parallel}")[0])


def test_every_item_is_predicted_once_in_order_on_any_number_of_ranks(two_ranks):
    model = tiny_encoder()
    for rank in (0, 1):
        found, about = _read(two_ranks, "predict", rank)
        for name in [name for name in found if not name.startswith("labels")]:
            count, size = map(int, name.split("-"))
            expected = tk.predict(model, some_texts(count), size, precision="fp32")
            assert np.array_equal(found[name].numpy(), expected.logits)
            assert np.array_equal(found[f"labels-{name}"].numpy(), expected.labels)
        scores = [tk.accuracy, tk.macro_f1]
        expected = tk.evaluate(model, tk.classification(), some_texts(9), scores, 2)
        assert about["scores"] == expected


@pytest.mark.parametrize("parallel", ranks.PARALLEL)
def test_a_step_of_two_ranks_reads_nothing_back_to_the_host(parallel, two_ranks):
    for rank in (0, 1):
        assert _read(two_ranks, f"reads-{parallel}", rank)[1]["reads"] == NONE


def test_what_is_refused_or_warned_of_is_said_with_its_remedy(two_ranks):
    first, second = (_read(two_ranks, "refusals", rank)[1]["told"] for rank in (0, 1))
    assert "2 ranks" in first["coupled"] and "in a single process" in first["coupled"]
    assert "the loss became NaN" in first["nan"] and "update 1 " in first["nan"]
    assert "differ in data ([12, " in first["differ"]
    assert "two places" in first["shared"] and "parallel='ddp'" in first["shared"]
    assert "reaches spare.weight with some batches and not with others" in first["sometimes"]
    assert "parallel is 'horovod': give None, 'ddp' or 'fsdp'" in first["parallel"]
    for parallel in ranks.PARALLEL:
        (said,) = first[f"unreached-{parallel}"]
        assert "2 trainable parameters, the first spare.weight" in said
        assert second.pop(f"unreached-{parallel}") == []  # rank 0 alone speaks
    assert second.items() <= first.items()


def test_ranks_that_start_with_other_weights_end_with_the_same(two_ranks):
    assert same(_read(two_ranks, "refusals", 0)[0], _read(two_ranks, "refusals", 1)[0])


def test_resume_on_three_ranks_equals_no_interruption(tmp_path):
    # Exceptions on all ranks, and Ctrl-C on one, after which all stop with the same update.
    _run(3, "resume", tmp_path)
    for parallel in ranks.PARALLEL:
        for rank in range(3):
            whole, about = _read(tmp_path, f"whole-{parallel}", rank)
            for updates, _ in ranks.INTERRUPTED:
                state, found = _read(tmp_path, f"{updates}-{parallel}", rank)
                assert same(state, whole) and found["history"] == about["history"]


def test_kill_9_of_all_ranks_then_resume_and_a_rank_that_fails_ends_all(two_ranks, tmp_path):
    process = _start(2, "slow", tmp_path, cache=tmp_path / "cache")
    pids = set()
    for _ in range(2 * 9):  # both ranks say so, each of nine times
        word, pid = process.stdout.readline().split()
        assert word == "saving"
        pids.add(int(pid))
    time.sleep(random.Random(0).uniform(0.0, 0.06))
    process.kill()  # before the ranks, so that it tells them nothing
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert 0 < checkpoint.read(tmp_path / "killed" / checkpoint.LAST)[1]["state"]["total"] < 20
    process = _start(2, "go_on", tmp_path, cache=tmp_path / "cache")
    _, err = process.communicate(timeout=540)
    whole, about = _read(two_ranks, "pictures-fsdp")
    for rank in (0, 1):
        state, found = _read(tmp_path, "revived", rank)
        assert same(state, whole) and found["history"] == about["history"]
    assert process.returncode != 0 and "a rank that fails alone" in err


def test_a_run_of_two_ranks_is_not_gone_on_from_by_one(two_ranks, tmp_path):
    ranks.pictures(None, tmp_path)
    path = tmp_path / checkpoint.LAST
    tensors, about = checkpoint.read(path)
    about["identity"] |= {"ranks": 2, "parallel": "ddp"}  # as two ranks write it
    checkpoint.write(path, tensors, about)
    with pytest.raises(ValueError, match=r"ranks: 2 → 1"):
        ranks.pictures(None, tmp_path)


def test_without_torchrun_nothing_happens(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    monkeypatch.setenv("WORLD_SIZE", "1")
    distributed.start()
    assert not torch.distributed.is_initialized() and distributed.ranks() == 1
    batches = [np.arange(3)]
    assert distributed.share(batches) is batches
    tk.fit(tiny_convnet(), tk.classification(), some_images(4), plan=tk.finetune(1),
           parallel="fsdp")  # fmt: skip
