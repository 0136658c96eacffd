"""A look before training. The one idea: the engine's own step, made a few times and then undone.

`check` makes one update in each phase of a plan and tells what it met; `lr_find` makes updates at
rising rates. Both run inside `untouched`, so that the training that follows is bit for bit the one
that it would have been.
"""

from __future__ import annotations

import copy
import math
import random
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from inspect import signature
from itertools import islice
from operator import add
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from transferkit import cache, data, devices, distributed, engine, layers, show
from transferkit.checks import require
from transferkit.plan import Phase, finetune

_READS = {"_local_scalar_dense", "item", "nonzero", "equal", "masked_select", "_unique2"}
_INDEXES = {"index", "index_put", "index_put_"}  # by a mask they must know how many it lets through
_PASSED_OVER = (str(Path(torch.__file__).parent), __file__)  # a line in there says nothing
_KEPT = 0.9  # the share of the running mean of losses that the next update keeps
_WINDOW = 5  # one part in so many of the updates shows the slope at their middle
_TOO_HIGH = 4.0  # times the lowest loss: the rates have become too large


@contextmanager
def untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Undo, bit for bit, what happens to a model and to random generators inside the block.

    Restored are values, device and `requires_grad` of parameters and buffers, gradients, training
    modes and other attributes of modules, and the generators of torch (on the CPU and on `device`),
    NumPy and Python. Parameters that are frozen when it begins are not copied: no step of training
    writes them.
    """
    modules = [(m, dict(vars(m)), dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    parameters = list(model.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    own = [value for _, attributes, *_ in modules for value in attributes.values()]
    others = [value for value in own if isinstance(value, Tensor) and value.is_leaf]
    kept = []
    for tensor in [*gradients, *parameters, *model.buffers(), *others]:
        moves = tensor.requires_grad or not isinstance(tensor, nn.Parameter)
        values = tensor.detach().clone() if moves else None
        kept.append((tensor, tensor.data, values, tensor.requires_grad, tensor.grad))
    numpy, python = np.random.get_state(), random.getstate()
    drawn = [(own, own.get_state()) for own in devices.generators(device)]
    try:
        yield
    finally:
        for module, *before in modules:
            now = (vars(module), module._parameters, module._buffers)
            for names, own in zip(now, before, strict=True):
                names.clear()  # a forward pass may have added to them
                names.update(own)
        for tensor, place, values, trained, gradient in kept:
            tensor.data = place  # where it was, if the model was moved to another device
            if values is not None:
                place.copy_(values)
            tensor.requires_grad_(trained)
            tensor.grad = gradient
        np.random.set_state(numpy)
        random.setstate(python)
        for generator, before in drawn:
            generator.set_state(before)


@contextmanager
def _rehearsed(model, objective, train, validation, phases, settings) -> Iterator[engine.Training]:
    # What `fit` would run with these arguments. The objective is a copy, for it may keep a state of
    # its own; what it shares with the model stays shared.
    arguments = signature(engine.fit).bind(
        model, objective, train, validation, plan=phases, **settings
    )
    arguments.apply_defaults()
    given = arguments.arguments | {"directory": None, "progress": False, "compile": False}
    if distributed.ranks() > 1:
        raise ValueError(
            f"{distributed.ranks()} ranks look before training: look in a single process, whose "
            "findings hold for each of them"
        )
    with untouched(model, devices.resolve_device(given["device"])):
        shared = [*model.modules(), *model.parameters(), *model.buffers()]
        given["objective"] = copy.deepcopy(objective, {id(part): part for part in shared})
        yield engine._prepare(**given)


class _HostReads(TorchDispatchMode):
    """Counts the operators that make the host wait for the device, by the line that calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        name = operator._schema.name.removeprefix("aten::")
        masked = name in _INDEXES and any(_is_mask(index) for index in args[1])
        if name in _READS or masked or _comes_back(args, result):
            self.found[f"{name} at {_line()}"] += 1
        return result


def _is_mask(index: Any) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _comes_back(args: Sequence[Any], result: Any) -> bool:
    # a copy from an accelerator to the host
    on_host = isinstance(result, Tensor) and result.device.type == "cpu"
    return on_host and any(isinstance(a, Tensor) and a.device.type != "cpu" for a in args)


def _line() -> str:
    # the innermost line of Python that is neither torch's nor this module's
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PASSED_OVER):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


class _Saved:
    """Bytes that autograd keeps for the backward pass, `most` at one time; weights do not count."""

    class Holder:
        """One reference to a storage; autograd drops it when it has used it."""

        def __init__(self, account: _Saved, tensor: Tensor):
            self.account, self.tensor = account, tensor
            account.change(tensor, 1)

        def __del__(self) -> None:
            self.account.change(self.tensor, -1)

    def __init__(self, model: nn.Module):
        tensors = [*model.parameters(), *model.buffers()]
        self.users = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors)
        self.now = self.most = 0

    def change(self, tensor: Tensor, by: int) -> None:
        storage = tensor.untyped_storage()
        before = self.users[storage.data_ptr()]
        self.users[storage.data_ptr()] = before + by
        if 0 in (before, before + by):
            self.now += by * storage.nbytes()
            self.most = max(self.most, self.now)

    def hooks(self) -> saved_tensors_hooks:
        """The context in which they are counted."""
        return saved_tensors_hooks(lambda t: _Saved.Holder(self, t), lambda held: held.tensor)


def _size(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True)
class Report:
    """What `check` found; prints as text.

    Attributes:
        shapes: a table of what goes in and comes out: type, shape, and the range of the labels.
        groups: a table of the layer groups: parameters, and how many each phase trains.
        phases: a table of the phases: parameters trained, and an estimate of the memory in MiB of
            weights (with buffers), gradients, the optimizer's moments and what autograd keeps of
            one batch of the longest items. It leaves out what operators need while they run.
        trained: the names of the parameters that each phase trains.
        unreached: those of them that got no gradient: freeze them, or use their output.
        host_reads: operators that make the host wait for the device, with the line, and how often.
        loss: of the first batch, before any update.
    """

    shapes: show.Table
    groups: show.Table
    phases: show.Table
    trained: dict[str, list[str]]
    unreached: dict[str, list[str]]
    host_reads: dict[str, int]
    loss: float

    def __repr__(self) -> str:
        lines = [str(self.shapes), "", f"loss of the first batch: {self.loss:.4g}", ""]
        lines += [str(self.groups), "", "memory in MiB", str(self.phases), ""]
        for phase, names in self.unreached.items():
            few = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            lines.append(f"{phase}: the objective does not reach {len(names)} trained: {few}")
        if not self.unreached:
            lines.append("the objective reaches every parameter that is trained")
        for read, times in self.host_reads.items():
            lines.append(f"the host waits for the device: {read}, {times} times")
        if not self.host_reads:
            lines.append("no step reads anything back to the host")
        return "\n".join(lines)


def check(
    model: nn.Module, objective: Any, train: Any, validation: Any = None, *,
    plan: Any = None, **settings: Any,
) -> Report:  # fmt: skip
    """Try everything that `fit` would do, with one update in each phase, and leave no trace.

    The model, the random generators and the disk are as before afterwards; features are not cached.
    The update is made on the longest items, where lengths are known, so that too little memory
    shows here.

    Args:
        model, objective, train, validation, plan, settings: what `fit` is to get; without a plan,
            all that is not frozen is trained.

    Raises:
        ValueError, TypeError: what `fit` would raise before or in its first step, in any phase.
        FloatingPointError: the loss of a first batch is NaN or infinite.

    Example:
        >>> data = torch.randn(8, 4), torch.arange(8) % 2
        >>> report = tk.check(nn.Linear(4, 2), tk.classification(), data)
        >>> report.unreached, report.host_reads
        ({}, {})
    """
    plan = finetune(1) if plan is None else plan
    with _rehearsed(model, objective, train, validation, plan, settings) as training:
        micro = _longest(training)
        shapes = _shapes(training, micro[0])
        visits = {
            f"{at} {phase.name}": _visit(training, phase, micro)
            for at, phase in enumerate(training.phases, 1)
        }
    found = list(visits.values())
    return Report(
        shapes=shapes,
        groups=show.Table(_group_row(group, visits) for group in layers.groups(model)),
        phases=show.Table({"phase": label, **visit.memory} for label, visit in visits.items()),
        trained={label: list(visit.trained) for label, visit in visits.items()},
        unreached={label: visit.missed for label, visit in visits.items() if visit.missed},
        host_reads=dict(sum((visit.reads for visit in found), Counter())),
        loss=found[0].loss,
    )


def _longest(training: engine.Training) -> list[data.Batch]:
    # as many batches as an update takes, of the longest items
    source, given = training.source, training.settings
    items = data.in_sequence(len(source), given.batch_size, source.lengths)[: given.accumulate]
    return [batch.to(given.device) for batch in data.stream(source, items, 0, given.seed)]


def _shapes(training: engine.Training, batch: data.Batch) -> show.Table:
    training.model.eval()
    with torch.no_grad(), training.autocast():
        outputs = training.objective.outputs(training.model, batch)
    inputs = batch.inputs if isinstance(batch.inputs, dict) else {"": batch.inputs}
    tensors = {f"input {name}".strip(): tensor for name, tensor in inputs.items()}
    tensors |= {} if batch.labels is None else {"labels": batch.labels}
    table = show.Table()
    for name, tensor in (tensors | {"outputs": outputs}).items():
        row = {"what": name, "type": str(tensor.dtype).removeprefix("torch.")}
        table.append(row | {"shape": str(tuple(tensor.shape)), "range": ""})
    if batch.labels is not None:
        labels = batch.labels if training.source.labels is None else training.source.labels
        extent = f"{labels.min().item():g} to {labels.max().item():g}"
        names = getattr(training.model, "labels", None)
        table[-2]["range"] = extent + (f" of {len(names)} names" if names else "")
    return table


@dataclass(frozen=True)
class _Visit:
    # what one update in one phase told
    trained: Mapping[str, int]  # elements of each parameter
    missed: list[str]
    reads: Counter
    memory: dict[str, float]
    loss: float


def _visit(training: engine.Training, phase: Phase, micro: list[data.Batch]) -> _Visit:
    training._enter(replace(phase, cache=False))  # live, for the cache would be left on the disk
    model, parameters = training.model, training.parameters
    if phase.cache:
        cache.refuse(training.objective, model, training.source)
    reached: set[str] = set()
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: reached.add(name))
        for name, parameter in parameters.items()
    ]
    saved, reads = _Saved(model), _HostReads()
    try:
        with warnings.catch_warnings(), saved.hooks(), reads:
            warnings.filterwarnings("ignore", "the objective does not reach")  # the report says it
            training.step(micro)
    finally:
        for hook in hooks:
            hook.remove()
    moments = [part for state in training.optimizer.state.values() for part in state.values()]
    held = {
        "weights": _size([*model.parameters(), *model.buffers()]),
        "gradients": _size(list(parameters.values())),
        "moments": _size([part for part in moments if isinstance(part, Tensor)]),
        "activations": saved.most,
    }
    counts = {name: parameter.numel() for name, parameter in parameters.items()}
    memory: dict[str, float] = {"trained": sum(counts.values())}
    memory |= {name: size / 2**20 for name, size in held.items()}
    memory["total"] = sum(held.values()) / 2**20
    missed = [name for name in parameters if name not in reached]
    return _Visit(counts, missed, reads.found, memory, _first_loss(training, micro))


def _first_loss(training: engine.Training, micro: Sequence[data.Batch]) -> float:
    value = _take_loss(training)
    if not math.isfinite(value):
        parts = [b.inputs.values() if isinstance(b.inputs, dict) else [b.inputs] for b in micro]
        fine = all(bool(torch.isfinite(tensor).all()) for part in parts for tensor in part)
        remedy = "look at the weights and the labels" if fine else "clean the inputs"
        are = "are" if fine else "are not"
        raise FloatingPointError(
            f"the loss of the first batch is {value}, but a finite number is expected; the inputs "
            f"{are} finite, so {remedy}"
        )
    return value


def _take_loss(training: engine.Training) -> float:
    # the mean over the micro-batches of the update that was just made; waits for the device
    losses = [loss for _, loss in training.losses]
    training.losses.clear()
    return float(reduce(add, losses).mean())


def _group_row(group: layers.Group, visits: Mapping[str, _Visit]) -> dict[str, Any]:
    row = {"group": group.name, "parameters": sum(p.numel() for p in group.parameters.values())}
    for label, visit in visits.items():
        count = sum(visit.trained.get(name, 0) for name in group.parameters)
        row[label] = count or ("frozen" if group.parameters else "")
    return row


@dataclass(frozen=True)
class RateTest:
    """What `lr_find` found.

    Attributes:
        rates: the learning rate of each update, that of the head, float64 `(n,)`, rising.
        losses: the loss of each update's batch, before the update, float64 `(n,)`.
        smoothed: their running mean, by which the test decides when to end.
        suggestion: the rate at which the loss falls fastest, or None if it never fell.
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    suggestion: float | None

    def __repr__(self) -> str:
        tried = f"rates from {self.rates[0]:.2g} to {self.rates[-1]:.2g}"
        if self.suggestion is None:
            return f"{tried}: the loss never fell, so none is suggested; try lower rates"
        return f"{tried}: the loss falls fastest at {self.suggestion:.2g}"

    def plot(self) -> Any:
        """A matplotlib figure of the loss over the rate, on a logarithmic axis."""
        return show.rate_curve(self.rates, self.losses, self.smoothed, self.suggestion)


def lr_find(
    model: nn.Module, objective: Any, train: Any, *, phase: Phase | None = None,
    low: float = 1e-7, high: float = 10.0, updates: int = 100, **settings: Any,
) -> RateTest:  # fmt: skip
    """The learning-rate range test (Smith 2017), at exponentially rising rates; leaves no trace.

    Makes `updates` updates, in the order of the data that `fit` would draw, and raises the rate
    from one to the next by the same factor. It ends early when the loss is not finite, or its
    running mean (0.9 of it is kept, with the bias correction of Adam) is above its first value and
    four times its lowest. The suggestion is the rate of the steepest descent up to there: around it
    the straight line through a fifth of the losses, over the logarithm of the rate, falls fastest.
    It is a place to begin: a short test on noisy batches says little, so look at the plot.

    Args:
        phase: what is trained and how: frozen parameters stay so, and the rates of layer groups and
            of names keep their ratio to that of the head; its schedule and cache are not used. All
            that is not frozen is trained without one.
        low, high: the first rate and the last.
        settings: those of `fit` that matter here: batch_size, accumulate, precision, clip, seed and
            device.

    Raises:
        ValueError: the rates or their number are out of range, or what `fit` would raise.
        FloatingPointError: the loss of the first batch is NaN or infinite.

    Example:
        >>> data = torch.randn(8, 4), torch.arange(8) % 2
        >>> test = tk.lr_find(nn.Linear(4, 2), tk.classification(), data, updates=20)
        >>> len(test.losses) == len(test.rates) <= 20
        True
    """
    whole = SimpleNamespace(low=low, high=high, updates=updates)
    require(
        whole,
        low=(0 < low < math.inf, "a rate above 0, such as 1e-7"),
        high=(low < high < math.inf, f"a rate above low, {low:g}"),
        updates=(updates >= 10, "at least 10, such as 100"),
    )
    phase = finetune(1) if phase is None else phase
    phase = replace(phase, schedule="constant", warmup=0.0, cache=False, epochs=updates)
    rates = np.geomspace(low, high, updates)
    with _rehearsed(model, objective, train, None, phase, settings) as training:
        training._enter(phase)
        losses, smoothed = _rise(training, rates / phase.lr)
    rates = rates[: len(losses)]
    return RateTest(rates, losses, smoothed, _steepest(rates, losses, smoothed))


def _rise(training: engine.Training, ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # losses and their running mean, one an update, until the ratios end or the loss runs away
    peaks = [part["peak"] for part in training.optimizer.param_groups]
    losses, smoothed, mean = [], [], 0.0
    for ratio, micro in zip(ratios.tolist(), _updates(training), strict=False):
        for part, peak in zip(training.optimizer.param_groups, peaks, strict=True):
            part["peak"] = peak * ratio
        training.step(micro)
        training.state.update += 1
        training.state.total += 1  # so that each update draws a dropout of its own
        value = _take_loss(training) if losses else _first_loss(training, micro)
        if not math.isfinite(value):
            break
        losses.append(value)
        mean = _KEPT * mean + (1 - _KEPT) * losses[-1]
        smoothed.append(mean / (1 - _KEPT ** len(losses)))
        lowest = min(smoothed)
        if smoothed[-1] > max(smoothed[0], lowest + (_TOO_HIGH - 1) * abs(lowest)):
            break
    return np.array(losses), np.array(smoothed)


def _updates(training: engine.Training) -> Iterator[list[data.Batch]]:
    # the batches of one update after the other, epoch after epoch
    given = training.settings
    while True:
        stream = data.stream(
            training.train, training._order(), training.state.epoch, given.seed, given.workers
        )
        while micro := list(islice(stream, given.accumulate)):
            yield micro
        training.state.epoch += 1


def _steepest(rates: np.ndarray, losses: np.ndarray, smoothed: np.ndarray) -> float | None:
    # By least squares, the slope of the line through an odd number of losses around each: single
    # batches are too noisy for the difference of neighbours. The rates are evenly spaced in log.
    half = len(losses) // _WINDOW // 2
    if half < 1:
        return None
    offsets = np.arange(-half, half + 1)
    slopes = np.correlate(losses, offsets, "valid")  # times a constant
    slopes = slopes[: max(1, int(smoothed.argmin()) + 1 - half)]
    at = int(slopes.argmin())
    return float(rates[half + at]) if slopes[at] < 0 else None
