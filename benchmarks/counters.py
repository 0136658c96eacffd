"""What a step costs in numbers that no other program can disturb: calls, operators, reads.

Every system steps an optimizer of torch, so a hook behind that step divides a run into updates.
The median over the updates is the ordinary step; the mean also holds log points and the beginnings
of epochs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

# What makes the host wait for the device: operators, and methods that hand a tensor's values over.
READING = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::equal"}
HANDING_OVER = {"cpu", "numpy", "tolist"}


@dataclass
class Counts:
    """Of one update: Python functions called, operators dispatched, values read by the host."""

    calls: float
    operators: float
    reads: float
    reads_mean: float


class _Operators(TorchDispatchMode):
    count = reads = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += 1
        self.reads += operator._schema.name in READING
        return operator(*args, **(kwargs or {}))


def count(run: Callable[[], Any]) -> Counts:
    """Count what a run does in each of its updates; it is made twice, and must have several.

    A read of a floating-point tensor by `.cpu()`, `.numpy()` or `.tolist()` costs nothing where the
    tensor lies on the host, but would wait on a GPU; so it counts.

    Raises:
        ValueError: the run made fewer than four updates.
    """
    calls, handed = _python(run)
    with _Operators() as mode:
        marks = _marked(run, lambda: (mode.count, mode.reads))
    operators, scalars = (_differences(column) for column in zip(*marks, strict=True))
    reads = [a + b for a, b in zip(scalars, handed, strict=True)]
    return Counts(median(calls), median(operators), median(reads), sum(reads) / len(reads))


def _python(run: Callable[[], Any]) -> tuple[list[int], list[int]]:
    calls = handed = 0

    def note(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls, handed
        if event == "call":
            calls += 1
        elif event == "c_call" and argument.__name__ in HANDING_OVER:
            tensor = argument.__self__
            handed += isinstance(tensor, Tensor) and tensor.is_floating_point()

    sys.setprofile(note)
    try:
        marks = _marked(run, lambda: (calls, handed))
    finally:
        sys.setprofile(None)
    first, second = (_differences(column) for column in zip(*marks, strict=True))
    return [number - 2 for number in first], second  # less `after` and `look` below


def _marked(run: Callable[[], Any], look: Callable[[], tuple]) -> list[tuple]:
    # what `look` says after each step of an optimizer
    marks: list[tuple] = []

    def after(*_: Any) -> None:
        marks.append(look())

    hook = register_optimizer_step_post_hook(after)
    try:
        run()
    finally:
        hook.remove()
    if len(marks) < 4:
        raise ValueError(f"the run made {len(marks)} updates, but at least 4 are needed to count")
    return marks


def _differences(values: tuple[int, ...]) -> list[int]:
    return [b - a for a, b in pairwise(values)]


class Lengths(nn.Module):
    """Stands for a model of texts and adds up what it is given: real tokens, and with padding."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(Tensor(2).zero_())
        self.padded = self.real = 0

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        mask = inputs["attention_mask"]
        if self.training:
            self.padded += mask.numel()
            self.real += int(mask.sum())
        return self.weight.expand(len(mask), 2)
