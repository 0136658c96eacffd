"""What `test_distributed` has every rank do: `torchrun ... ranks.py <chapter> <folder> [...]`.

Each rank writes what it found to files named by check and rank. Imported, it gives the same models,
data and settings to a single process.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from small_models import noisy_flip, some_images, some_texts, state_of, tiny_convnet, tiny_encoder
from test_accumulation import OBJECTIVES, Contrastive
from test_counters import HOST_READS, Counter
from torch import nn

import transferkit as tk
from transferkit import cache, checkpoint, distributed
from transferkit.engine import Training

PARALLEL = ("ddp", "fsdp")
INTERRUPTED = ((2, False), (8, True))  # after so many updates; by Ctrl-C on one rank
SGD = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01}


def cases() -> list[tuple]:
    """Objectives, sizes, accumulation on each of two ranks, clipping: ragged in all ways."""
    draw = random.Random(0)
    fixed = [(at, 7, 3, 1, None, 0) for at in range(len(OBJECTIVES))]  # one batch in the last step
    return fixed + [
        (draw.randrange(3), draw.randint(3, 23), draw.randint(1, 4), draw.randint(1, 3),
         draw.choice([None, 0.1]), draw.randrange(99)) for _ in range(5)
    ]  # fmt: skip


def numbers(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs `(count, 4)`, float64, and labels of three classes."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (count,), generator=generator)


def small(case: tuple, ranks: int, parallel: str | None) -> tuple[nn.Module, tk.Run]:
    """A fit of one case: a single process accumulates as many batches as the ranks share."""
    objective, count, size, accumulate, clip, seed = case
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3)).double()
    run = tk.fit(
        model, OBJECTIVES[objective], numbers(count, seed), numbers(5, 1), metrics=[tk.accuracy],
        plan=[tk.finetune(2, lr=0.5, **SGD)], batch_size=size, clip=clip, precision="fp32",
        accumulate=accumulate * 2 // ranks, seed=seed, parallel=parallel,
    )  # fmt: skip
    return model, run


def texts(ranks: int, parallel: str | None) -> tuple[nn.Module, tk.Run]:
    """An encoder in two phases: a head on cached features, then all layers."""
    model = tiny_encoder().double()
    plan = [tk.linear_probe(2, lr=0.1, **SGD), tk.finetune(2, lr=0.1, layer_decay=0.5, **SGD)]
    run = tk.fit(
        model, tk.classification(), some_texts(30), some_texts(11, 1), plan=plan, batch_size=4,
        metrics=[tk.accuracy], precision="fp32", accumulate=2 // ranks, parallel=parallel,
    )  # fmt: skip
    return model, run


def pictures(parallel: str, directory: Path | None = None, workers: int = 0):
    """Two phases with dropout, BatchNorm, augmentation and AdamW; the last step is ragged."""
    plan = [tk.linear_probe(2, lr=0.02, cache=False), tk.finetune(2, lr=0.03, layer_decay=0.8)]
    model, data = tiny_convnet(), some_images(26, noisy_flip)
    run = tk.fit(
        model, tk.classification(), data, some_images(26), plan=plan, batch_size=3,
        metrics=[tk.accuracy], monitor="loss", parallel=parallel, directory=directory,
        workers=int(workers), save_every=0.0,
    )  # fmt: skip
    return model, run


def keep(folder: Path, name: str, model: nn.Module | dict, run: tk.Run | None = None, **more):
    """Write a model's state and a run's history."""
    state = state_of(model) if isinstance(model, nn.Module) else model
    rows = [] if run is None else [{**row, "seconds": 0} for row in run.history]
    about = {"history": rows, **more}
    checkpoint.write(folder / f"{name}-{distributed.rank()}.safetensors", state, about)


def _message(kind: type[BaseException], call) -> str:
    with pytest.raises(kind) as error:
        call()
    return str(error.value)


class _Broken(nn.Linear):
    # its outputs become NaN on the second rank alone
    def forward(self, inputs):
        return super().forward(inputs) * (float("nan") if distributed.rank() else 1.0)


class _Spare(nn.Module):
    # a layer that only the first so many forward passes use
    def __init__(self, uses: int = 0):
        super().__init__()
        self.used, self.spare, self.uses = nn.Linear(4, 3), nn.Linear(4, 3), uses

    def forward(self, inputs):
        self.uses -= self.training
        return self.used(inputs) + (self.spare(inputs) if self.uses >= 0 else 0)


def laws(folder: Path) -> None:
    """Training, evaluation, cache, refusals, on two ranks that are never interrupted."""
    features, fill = [], cache._fill
    cache._fill = lambda *arguments: features.append(0) or fill(*arguments)
    for parallel in PARALLEL:
        for at, case in enumerate(cases()):
            keep(folder, f"small-{at}-{parallel}", *small(case, 2, parallel))
        keep(folder, f"texts-{parallel}", *texts(2, parallel), features=len(features))
        model, run = pictures(parallel)
        run.save(folder / f"model-{parallel}")
        keep(folder, f"pictures-{parallel}", model, run, best=run.best["epoch"])
        keep(folder, f"reads-{parallel}", {}, reads=reads(parallel))
    model, found = tiny_encoder(), {}
    for count, size in ((1, 1), (2, 5), (3, 1), (9, 2), (10, 4)):
        made = tk.predict(model, some_texts(count), size, precision="fp32")
        found[f"{count}-{size}"] = torch.from_numpy(made.logits)
        found[f"labels-{count}-{size}"] = torch.from_numpy(made.labels)
    data, scores = some_texts(9), [tk.accuracy, tk.macro_f1]
    keep(folder, "predict", found, scores=tk.evaluate(model, tk.classification(), data, scores, 2))
    for parallel in PARALLEL:
        model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
        plan = [tk.finetune(1)]
        tk.fit(model, tk.classification(), numbers(9), plan=plan, batch_size=3, parallel=parallel)
        keep(folder, f"normalised-{parallel}", model)
    for kind in (torch.bool, torch.bfloat16, torch.int64):  # as many rows as the batch's number
        parts = [torch.full((number, 2), number, dtype=kind) for number in range(1, 6)]
        made = distributed.collect(list(distributed.share(parts)), 5)
        assert all(map(torch.equal, made, parts))
    refusals(folder)


def reads(parallel: str) -> dict[str, int]:
    """How often the steps of a run made the host wait for the device, by operator."""
    step, counter = Training.step, Counter()

    def counted(self, micro):
        with counter:
            step(self, micro)

    Training.step = counted
    try:
        pictures(parallel)
    finally:
        Training.step = step
    assert sum(counter.seen.values()) > 100
    return {name: counter.seen[name] for name in HOST_READS}


def refusals(folder: Path) -> None:
    """What is refused, on every rank, and what is said, on the first."""
    told, plan, data = {}, [tk.finetune(1)], numbers(12)

    def fit(model, objective=None, given=data, **more):
        return tk.fit(model, objective or tk.classification(), given, plan=plan, **more)

    def line(kind=nn.Linear):
        torch.manual_seed(0)
        return kind(4, 3).double()

    told["coupled"] = _message(ValueError, lambda: fit(line(), Contrastive()))
    told["nan"] = _message(FloatingPointError, lambda: fit(line(_Broken)))
    own = numbers(12 + distributed.rank())
    told["differ"] = _message(ValueError, lambda: fit(line(), given=own))
    told["sometimes"] = _message(RuntimeError, lambda: fit(line(lambda *_: _Spare(2))))
    tied = line()
    tied = nn.Sequential(tied, nn.Tanh(), nn.Linear(3, 4), tied)
    told["shared"] = _message(ValueError, lambda: fit(tied.double(), parallel="fsdp"))
    told["parallel"] = _message(ValueError, lambda: fit(line(), parallel="horovod"))
    for parallel in PARALLEL:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = line(lambda *_: _Spare())
            before = model.spare.weight.clone()
            fit(model, parallel=parallel, batch_size=4)
        told[f"unreached-{parallel}"] = [str(one.message) for one in caught]
        assert torch.equal(before, model.spare.weight)
    torch.manual_seed(distributed.rank())  # the ranks start with weights of their own
    model = nn.Linear(4, 3).double()
    fit(model)
    keep(folder, "refusals", model, told=told)


class PowerCut(Exception):
    """What interrupts a run."""


def _interrupted(parallel: str, directory: Path, updates: int, stop: bool) -> None:
    # After so many updates: an exception on all ranks, or Ctrl-C that one of them receives.
    step, made = Training.step, 0

    def failing(self, micro):
        nonlocal made
        made += 1
        if made > updates and not stop:
            raise PowerCut
        if made == updates and stop and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGINT)
        step(self, micro)

    Training.step = failing
    try:
        with contextlib.suppress(PowerCut):
            _, run = pictures(parallel, directory)
            assert run.interrupted and stop
    finally:
        Training.step = step


def resume(folder: Path) -> None:
    """Interruptions that all ranks survive, and what the runs end with."""
    for parallel in PARALLEL:
        keep(folder, f"whole-{parallel}", *pictures(parallel))
        for updates, stop in INTERRUPTED:
            directory = folder / f"{parallel}-{updates}"
            _interrupted(parallel, directory, updates, stop)
            made = checkpoint.read(directory / checkpoint.LAST)[1]["state"]["total"]
            assert made == updates, (made, updates)
            keep(folder, f"{updates}-{parallel}", *pictures(parallel, directory, workers=stop))


def slow(folder: Path) -> None:
    """A run that says when it stores its state, so that it can be killed."""
    save = checkpoint.save_run

    def told(*arguments):
        os.write(1, f"saving {os.getpid()}\n".encode())  # whole, whoever else writes
        time.sleep(0.03)
        save(*arguments)

    checkpoint.save_run = told
    pictures("fsdp", folder / "killed")


def go_on(folder: Path) -> None:
    """The killed run to its end, with worker processes; then one rank fails."""
    keep(folder, "revived", *pictures("fsdp", folder / "killed", 1))
    if distributed.rank() == 1:
        raise PowerCut("a rank that fails alone")
    pictures("ddp")


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.start()
    {"laws": laws, "resume": resume, "slow": slow, "go_on": go_on}[sys.argv[1]](Path(sys.argv[2]))
