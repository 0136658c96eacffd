"""How fast the card trains: images and tokens a second, how much of its peak, and beside others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import transferkit as tk
from benchmarks import common
from benchmarks.gpu import card
from benchmarks.gpu.steps import Note, convolutions, image_model, minilm
from benchmarks.systems import System, bare, chosen
from benchmarks.tasks import Task, random_texts
from benchmarks.tax import SKIPPED

TURNS = 3  # of each system beside the others
PEERS = ("bare loop, DataLoader", "bare loop, length buckets", "transferkit", "HF Trainer",
         "HF Trainer, tuned")  # fmt: skip


@dataclass(frozen=True)
class Resident:
    """A batch on the device that is every batch of an epoch: what remains is to compute.

    It is what a task trains on, and what `tk.fit` takes as a source.

    Attributes:
        inputs: one batch, a tensor or a dictionary of such.
        target: int64 `(batch,)`, its labels.
        batches: how many there are in an epoch.
        labels: those of the whole epoch, on the host.
    """

    inputs: Tensor | dict[str, Tensor]
    target: Tensor
    batches: int
    labels: Tensor = field(init=False)
    collate = lengths = None
    views = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", self.target.cpu().repeat(self.batches))

    def __len__(self) -> int:
        return len(self.labels)

    def source(self) -> tk.data.Source:
        return self

    def first(self, count: int) -> Resident:
        return replace(self, batches=max(1, count // len(self.target)))

    def fetch(self, indices: Sequence[int], epoch: int | None, seed: int) -> tk.data.Batch:
        """The beginning of the batch, as many items as were asked for."""
        count, inputs = len(indices), self.inputs
        single = isinstance(inputs, Tensor)
        inputs = inputs[:count] if single else {name: t[:count] for name, t in inputs.items()}
        return tk.data.Batch(inputs, self.target[:count], torch.as_tensor(indices))

    def fingerprint(self) -> None:
        return None

    def each(self, epoch: int) -> Iterator[tuple[Any, Tensor]]:
        """The batches of an epoch, as a loop written by hand takes them."""
        return iter([(self.inputs, self.target)] * self.batches)


def _loop(model: nn.Module, task: Task) -> None:
    bare.loop(model, task, task.data.each)


LOOP = System("bare loop", _loop)


def columns(unit: str) -> tuple[tuple[str, str, str], ...]:
    """Those of a table in images or tokens a second."""
    return (
        ("system", "system", ""),
        ("precision", "precision", ""),
        ("batch", "items a batch", ",.0f"),
        ("rate", f"{unit} a second", ",.0f"),
        ("milliseconds", "ms an update", ",.2f"),
        ("teraflops", "model TFLOP/s", ",.1f"),
        ("mfu", "MFU", ".1%"),
        ("memory", "most memory, GiB", ",.1f"),
    )


IMAGES, TOKENS = columns("images"), columns("tokens")


def images(device: torch.device, tiny: bool, note: Note) -> None:
    """Training an image network, all layers, on a batch that lies on the card."""
    build = convolutions if tiny else image_model()[1]
    size, side = (4, 16) if tiny else (256 if card.large(device) else 64, 224)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(size, 3, side, side, generator=generator)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    _speeds(device, tiny, note, build(), pixels, 1)


def tokens(device: torch.device, tiny: bool, note: Note) -> None:
    """Training MiniLM's shape, all layers, on a batch of full texts that lies on the card."""
    size, length = (4, 16) if tiny else (512 if card.large(device) else 128, 128)
    texts = random_texts(size, length, length)
    inputs, _ = texts.collate([*texts.dataset()])
    _speeds(device, tiny, note, minilm(tiny), inputs, length)


def _speeds(
    device: torch.device, tiny: bool, note: Note, model: nn.Module, inputs: Any, units: int
) -> None:
    # `units` are the tokens of an item, or 1 for an image
    size = len(inputs if isinstance(inputs, Tensor) else inputs["input_ids"])
    target = torch.arange(size) % 2
    few = Resident(inputs, target, 1).fetch([0, 1], None, 0)
    operations = card.operations_of(model, few.inputs, few.labels) / units
    there = Resident(bare.onto(inputs, str(device)), target.to(device), 5 if tiny else 40)
    task = Task(there, model, epochs=1, lr=1e-4, batch_size=size, device=str(device))
    (own,) = chosen(["transferkit"])
    for precision in card.precisions(device):
        for system in (LOOP, own):
            if system is LOOP and precision == "fp16":
                continue  # it has no scaler of the loss
            run = partial(_speed, system, task.but(precision=precision), operations, units)
            row = {"system": system.name, "precision": precision, "batch": size}
            note(row | safely(run))


def safely(run: Callable[[], common.Row]) -> common.Row:
    """What a run found, or that it needs more memory than the card has."""
    try:
        return run()
    except torch.OutOfMemoryError as error:
        return {"error": str(error).splitlines()[0]}


def _speed(system: System, task: Task, operations: float, units: int) -> common.Row:
    device = torch.device(task.device)
    common.warm_up(system, task)
    with card.Memory(device) as used:
        moments, _ = common.moments(system, task)
    seconds = _steady(moments)
    rate = units * task.batch_size / seconds
    row = {"rate": rate, "milliseconds": 1e3 * seconds, "teraflops": operations * rate / 1e12}
    row["mfu"] = card.utilisation(operations, rate, card.name(device), task.precision)
    return row | {"memory": used.most and used.most / 2**30}


def _steady(moments: Sequence[float]) -> float:
    # the seconds of an update when everything is warm
    return (moments[-1] - moments[SKIPPED - 1]) / (len(moments) - SKIPPED)


# ---- beside others -------------------------------------------------------------------------------

BESIDE = (
    ("system", "system", ""),
    ("rate", "real tokens a second", ",.0f"),
    ("milliseconds", "ms an update", ",.2f"),
    ("precision", "precision", ""),
    ("start_up", "start-up, s", ",.1f"),
)


def peers(device: torch.device, tiny: bool, note: Note) -> None:
    """An epoch of MiniLM's shape on texts of 8 to 128 tokens from the host's memory, in turns."""
    count, size = (24, 4) if tiny else (6400, 64)
    texts = random_texts(count, 8, 16 if tiny else 128)
    task = Task(texts, minilm(tiny), epochs=1, lr=1e-4, batch_size=size, device=str(device))
    systems = {system.name: system for system in chosen(PEERS)}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in systems}

    def tell(name: str) -> None:
        least, start_up = (min(part) for part in zip(*found[name], strict=True))
        row = {"system": name, "rate": texts.lengths.sum() / (least * task.updates)}
        row |= {"milliseconds": 1e3 * least, "start_up": start_up}
        note(row | {"precision": common.precision(systems[name], device)})

    def clock(name: str) -> Callable[[int], float]:
        own = task.but(precision=common.precision(systems[name], device))
        common.warm_up(systems[name], own)

        def run(turn: int) -> float:
            moments, whole = common.moments(systems[name], own.but(seed=turn))
            seconds = _steady(moments)
            found[name].append((seconds, max(0.0, whole - seconds * len(moments))))
            tell(name)
            return seconds

        return run

    candidates = {}
    for name, system in systems.items():
        if system.missing():
            note(common.absent(system))
            continue
        try:
            candidates[name] = clock(name)
        except Exception as error:  # of one library, which must not cost the others their rows
            note({"system": name, "error": f"{type(error).__name__}: {error}".splitlines()[0]})
    common.turns("beside others", candidates, 1 if tiny else TURNS)
