"""What every library is given, and how it is watched. The one idea: nothing here knows a library.

A `Task` says what a training run is. A `Witness` looks at the model and at the optimizer, never at
the library between them, so that all libraries are seen through the same glass.
"""

from __future__ import annotations

import copy
import io
import logging
import os
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer as hooks

CLASSES, FEATURES = 3, 5
IGNORED = -100  # the label of a token that does not count, as torch's cross-entropy has it


class PowerCut(Exception):
    """Raised in the middle of an update, as if the machine had stopped."""


class Entrance(nn.Module):
    """Cuts off the last feature, the item's number, and tells it to whoever listens."""

    def __init__(self) -> None:
        super().__init__()
        self.listeners: list[Callable[[Tensor], None]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        for listener in self.listeners:
            listener(inputs[..., -1])
        return inputs[..., :-1]


def network(
    seed: int = 0, *, normalise: str | None = None, dropout: float = 0.0, unused: bool = False
) -> nn.Sequential:
    """A backbone and a head in float64: inputs `(n, ..., 6)` to logits `(n, ..., 3)`.

    Args:
        normalise: "batch", "layer" or None, what follows the backbone's linear layer.
        unused: give the backbone a layer that no output depends on.
    """
    torch.manual_seed(seed)
    norm = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, None: lambda width: nn.Identity()}
    layers = [
        ("entrance", Entrance()),
        ("linear", nn.Linear(FEATURES, 8)),
        ("norm", norm[normalise](8)),
        ("tanh", nn.Tanh()),
        ("hidden", nn.Linear(8, 8)),
        ("dropout", nn.Dropout(dropout)),
    ]
    backbone = nn.Sequential(OrderedDict(layers))
    if unused:
        backbone.entrance.spare = nn.Linear(2, 2)
    head = nn.Linear(8, CLASSES)
    model = nn.Sequential(OrderedDict(backbone=backbone, head=head)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1  # no bias is zero, so that decay would move it
    return model


def items(count: int, seed: int = 0, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """Inputs whose last feature is the item's number, and labels; of `tokens` tokens each if given.

    Of the tokens between one and all count; the labels of the others are `IGNORED`.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (count,) if tokens is None else (count, tokens)
    inputs = torch.randn(*shape, FEATURES + 1, generator=generator, dtype=torch.float64)
    inputs[..., -1] = torch.arange(count).reshape(-1, *[1] * (len(shape) - 1))
    labels = torch.randint(0, CLASSES, shape, generator=generator)
    if tokens is not None:
        lengths = torch.randint(1, tokens + 1, (count, 1), generator=generator)
        labels[torch.arange(tokens) >= lengths] = IGNORED
    return inputs, labels


def cross_entropy(
    logits: Tensor, labels: Tensor, weights: tuple[float, ...] | None, reduction: str = "mean"
) -> Tensor:
    """The cross-entropy as torch defines it; tokens are taken out of their sequences first."""
    weight = None if weights is None else logits.new_tensor(weights)
    flat, labels = logits.reshape(-1, CLASSES), labels.reshape(-1)
    return nn.functional.cross_entropy(flat, labels, weight, reduction=reduction)


@dataclass
class Task:
    """One training run, as every library is asked to make it.

    Attributes:
        model: takes inputs, gives logits; has a `backbone` and a `head`.
        train, held_out: inputs and labels.
        class_weights: of the cross-entropy, one a class, or None.
        batch_size, accumulate, epochs: items in a batch, batches in an update, passes.
        optimizer: "sgd" (without momentum) or "adamw"; `weight_decay` is its.
        lr: of all parameters, or (of the backbone, of the head).
        schedule: "constant", or "linear" from `lr` to 0.
        frozen: the backbone is not to be trained.
        unfreeze_at: an epoch, counted from 0, from which it is trained after all.
        score: gives the value of an epoch, the larger the better; called once when it was scored.
        best: the model is to end with the weights of the best epoch.
        clips: whether the library's own clipping of gradients, if it has some, stays switched on.
        directory: where a run may keep its state; `keeps` asks to, after each update, and `resume`
            to go on from what is there.
        updated: called with the optimizer after each update, by libraries whose optimizer is not
            torch's; `cut` before it.
    """

    model: nn.Module
    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor] | None = None
    class_weights: tuple[float, ...] | None = None
    batch_size: int = 4
    accumulate: int = 1
    epochs: int = 1
    optimizer: str = "sgd"
    lr: float | tuple[float, float] = 0.1
    weight_decay: float = 0.0
    schedule: str = "constant"
    frozen: bool = False
    unfreeze_at: int | None = None
    score: Callable[[], float] | None = None
    best: bool = False
    clips: bool = True
    directory: Path = field(default_factory=Path)
    keeps: bool = False
    resume: bool = False
    seed: int = 0
    cut: Callable[[Any], None] | None = None
    updated: Callable[[Any], None] | None = None

    @property
    def updates(self) -> int:
        """How many updates the run makes."""
        batches = -(-len(self.train[0]) // self.batch_size)
        return self.epochs * -(-batches // self.accumulate)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy of a batch, as most write it."""
        return cross_entropy(logits, labels, self.class_weights)

    def parameter_groups(self) -> list[dict]:
        """The trained parameters for torch's optimizers, with the two rates where there are two."""
        parts = {"backbone": self.model.backbone, "head": self.model.head}
        rates = self.lr if isinstance(self.lr, tuple) else (self.lr, self.lr)
        found = []
        for (_, part), rate in zip(parts.items(), rates, strict=True):
            trained = [p for p in part.parameters() if p.requires_grad]
            if trained:
                found.append({"params": trained, "lr": rate})
        if not isinstance(self.lr, tuple):  # one group, as most write it
            found = [{"params": [p for part in found for p in part["params"]], "lr": self.lr}]
        return found

    def torch_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of torch that the task names, torch's defaults otherwise."""
        kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[self.optimizer]
        rate = max(self.lr) if isinstance(self.lr, tuple) else self.lr
        return kind(self.parameter_groups(), lr=rate, weight_decay=self.weight_decay)

    def torch_schedule(self, optimizer: torch.optim.Optimizer) -> Any:
        """The schedule of torch that the task names, one step an update; None if it is constant."""
        if self.schedule == "constant":
            return None
        scale = lambda update: 1 - update / self.updates  # noqa: E731
        return torch.optim.lr_scheduler.LambdaLR(optimizer, scale)


class Items(torch.utils.data.Dataset):
    """A data set of torch: `(input, label)`, or a dictionary of both by these names."""

    def __init__(self, pair: tuple[Tensor, Tensor], names: tuple[str, str] | None = None):
        self.pair, self.names = pair, names

    def __len__(self) -> int:
        return len(self.pair[0])

    def __getitem__(self, at: int) -> Any:
        values = tuple(part[at] for part in self.pair)
        return values if self.names is None else dict(zip(self.names, values, strict=True))


class Witness:
    """Sees what a model computes and what its optimizer does, whoever drives them.

    Attributes:
        trained: for each update the numbers of the items it was made of.
        seen: the numbers of all items that went through the model without a gradient.
        rates: for each update the rates of the backbone's and of the head's weight.
        said: what was printed, warned and logged.
    """

    def __init__(self, model: nn.Module, stop_after: int | None = None, listens: bool = True):
        self.model, self.stop_after, self.said = model, stop_after, ""
        self.trained: list[list[int]] = []
        self.pending: list[int] = []
        self.seen: list[int] = []
        self.rates: list[tuple[float, float]] = []
        if listens:
            model.backbone.entrance.listeners.append(self._listen)

    def _listen(self, numbers: Tensor) -> None:
        first = numbers if numbers.dim() == 1 else numbers[..., 0]
        (self.pending if torch.is_grad_enabled() else self.seen).extend(first.long().tolist())

    def cut(self, optimizer: Any, *_: Any) -> None:
        """Before an update: the power may fail."""
        if self.stop_after is not None and len(self.trained) == self.stop_after:
            raise PowerCut

    def updated(self, optimizer: Any, *_: Any) -> None:
        """After an update: note what it was made of, and at which rates."""
        self.trained.append(self.pending[:])
        self.pending.clear()
        rate = {id(p): part["lr"] for part in optimizer.param_groups for p in part["params"]}
        parts = (self.model.backbone.linear.weight, self.model.head.weight)
        self.rates.append(tuple(rate.get(id(part), 0.0) for part in parts))

    @contextmanager
    def watching(self) -> Iterator[Witness]:
        """See every optimizer of torch for a while; others call `cut` and `updated` themselves."""
        before = hooks.register_optimizer_step_pre_hook(self.cut)
        after = hooks.register_optimizer_step_post_hook(self.updated)
        try:
            yield self
        finally:
            before.remove()
            after.remove()


@contextmanager
def _heard(witness: Witness) -> Iterator[None]:
    # Keep all that a library says from the terminal, and remember it.
    text, known = io.StringIO(), logging.Logger.manager.loggerDict.values()
    loggers = [logging.getLogger(), *(x for x in known if isinstance(x, logging.Logger))]
    before = [(logger, logger.handlers) for logger in loggers]
    for logger in loggers:
        if logger.handlers or not logger.propagate or logger.parent is None:
            logger.handlers = [logging.StreamHandler(text)]
    try:
        with (
            warnings.catch_warnings(record=True) as caught,
            redirect_stdout(text),
            redirect_stderr(text),
        ):
            warnings.simplefilter("always")
            yield
    finally:
        for logger, handlers in before:
            logger.handlers = handlers
        witness.said = "\n".join([text.getvalue(), *(str(warning.message) for warning in caught)])


def run(
    adapter: Any, task: Task, stop_after: int | None = None, listens: bool = True, **options: Any
) -> Witness:
    """Have an adapter train, in a directory of its own if the task has none, under observation.

    Args:
        stop_after: the power fails in the update after so many.
        listens: note the items that go through the model, which reads their numbers.
        options: the settings of the adapter that are asked for.
    """
    witness = Witness(task.model, stop_after, listens)
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, witness.watching(), _heard(witness):
        if task.directory == Path():
            task = replace(task, directory=Path(folder))
        task = replace(task, cut=witness.cut, updated=witness.updated)
        os.chdir(task.directory)  # some write their logs where they were started
        try:
            adapter.train(task, **options)
        except PowerCut:
            pass
        finally:
            os.chdir(before)
    return witness


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The largest difference of two states of one model."""
    return max(float((left[name] - right[name]).detach().abs().max()) for name in left)


def twin_in_inference(model: nn.Module) -> nn.Module:
    """A copy of the model in inference mode, to which nobody listens."""
    twin = copy.deepcopy(model).eval()
    twin.backbone.entrance.listeners.clear()
    return twin.requires_grad_(False)
