"""What a run does. The one idea: a plan is a list of phases, and a phase fixes what is trained.

Optimizer, parameter groups and feature cache are built once per phase. A phase is a value: it can
be printed, compared and stored, and names the whole recipe.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from torch import nn

from transferkit.layers import Group, groups
from transferkit.optim import OPTIMIZERS, SCHEDULES


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one set of trainable layer groups.

    Args:
        name: what it is called in the history.
        epochs: how many times the data are seen, at least 1.
        lr: peak learning rate, that of the head.
        last: how many layer groups with parameters are trained, counted from the output; None
            trains all.
        cache: compute the output of the frozen layer groups once and train on that.
        layer_decay: the rate of each layer group is that of the next one times this, in (0, 1].
        warmup: share of the updates over which the rate rises, in [0, 1).
        weight_decay: of parameters with at least two dimensions.
        schedule: "cosine", "linear" or "constant" after the warm-up.
        optimizer: "adamw" or "sgd".
        momentum: of "sgd".

    Raises:
        ValueError: a value is outside its range.
    """

    name: str
    epochs: int
    lr: float
    last: int | None = None
    cache: bool = False
    layer_decay: float = 1.0
    warmup: float = 0.06
    weight_decay: float = 0.01
    schedule: str = "cosine"
    optimizer: str = "adamw"
    momentum: float = 0.9

    def __post_init__(self) -> None:
        for name in ("lr", "layer_decay", "warmup", "weight_decay", "momentum"):
            require(self, **{name: (real(getattr(self, name)), "one number")})
        require(
            self,
            epochs=(whole(self.epochs), "a whole number of at least 1"),
            lr=(0 < self.lr < math.inf, "a number above 0, such as 2e-5"),
            last=(self.last is None or whole(self.last), "None (all) or at least 1"),
            layer_decay=(0 < self.layer_decay <= 1, "a number in (0, 1], such as 0.9"),
            warmup=(0 <= self.warmup < 1, "a share in [0, 1), such as 0.06"),
            weight_decay=(0 <= self.weight_decay < math.inf, "a number of at least 0"),
            momentum=(0 <= self.momentum < 1, "a number in [0, 1), such as 0.9"),
            schedule=(self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            optimizer=(self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
        )


def real(value: object) -> bool:
    """Whether it is one real number, of Python or NumPy, and no truth value."""
    return isinstance(value, Real) and not isinstance(value, bool)


def whole(value: object, least: int = 1) -> bool:
    """Whether it is a whole number of at least `least`, of an integer type."""
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= least


def require(values: object, **rules: tuple[bool, str]) -> None:
    """Raise a ValueError for the first attribute that is not good: rules are (good, expected)."""
    for name, (good, expected) in rules.items():
        if not good:
            raise ValueError(f"{name} is {getattr(values, name)!r}: give {expected}")


def linear_probe(epochs: int, lr: float = 1e-3, cache: bool = True, **settings) -> Phase:
    """Train the head alone on the features of the frozen backbone, computed once if `cache`.

    Further settings are those of `Phase`; there is no weight decay unless one is given.
    """
    settings = {"name": "linear_probe", "last": 1, "weight_decay": 0.0, **settings}
    return Phase(epochs=epochs, lr=lr, cache=cache, **settings)


def finetune(epochs: int, lr: float = 2e-5, last: int | None = None, **settings) -> Phase:
    """Train the whole model, or its last few layer groups; further settings as in `Phase`."""
    return Phase(**{"name": "finetune", "epochs": epochs, "lr": lr, "last": last, **settings})


def check(plan: Sequence[Phase] | Phase) -> list[Phase]:
    """The plan as a list.

    Raises:
        ValueError: it is empty, or something in it is no phase.
    """
    phases = list(plan) if isinstance(plan, (list, tuple)) else [plan]
    if not phases or not all(isinstance(phase, Phase) for phase in phases):
        raise ValueError(f"the plan is {phases}: give phases, such as [tk.finetune(epochs=3)]")
    return phases


def select(phase: Phase, model: nn.Module, allowed: set[str]) -> list[Group]:
    """Set which parameters the phase trains, and return the model's layer groups.

    Args:
        allowed: names of the parameters that were not frozen before the run.

    Raises:
        ValueError: the phase asks for more layer groups than there are.
    """
    found = groups(model)
    holders = [group for group in found if group.parameters]
    last = len(holders) if phase.last is None else phase.last
    if last > len(holders):
        raise ValueError(
            f"phase {phase.name!r} trains the last {last} layer groups, but the model has "
            f"{len(holders)} with parameters: lower `last`, or leave it out to train all"
        )
    for at, group in enumerate(holders):
        for name, parameter in group.parameters.items():
            parameter.requires_grad_(bool(at >= len(holders) - last and name in allowed))
            parameter.grad = None
    return found


@dataclass
class Stopping:
    """What early stopping knows: the best epoch of the run, and how long the phase has waited.

    The weights kept are those of the best epoch of the run so far, so a phase that only does harm
    is undone. Patience looks at the current phase alone: a newly unfrozen model may first get
    worse. NaN is never better than anything.
    """

    higher: bool
    patience: int | None
    best: float | None = None
    phase_best: float | None = None
    waited: int = 0

    def observe(self, value: float) -> bool:
        """Note the value of an epoch; whether it is the best of the run."""
        if math.isnan(value):
            warnings.warn(
                "the value that chooses the best epoch is NaN, and such an epoch is never the "
                "best: see that the validation data hold every class and no NaN, or choose another "
                "monitor",
                stacklevel=2,
            )
        if self._beats(value, self.phase_best):
            self.phase_best, self.waited = value, 0
        else:
            self.waited += 1
        better = self._beats(value, self.best)
        if better:
            self.best = value
        return better

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and self.waited >= self.patience

    def _beats(self, value: float, best: float | None) -> bool:
        better = best is None or (value > best if self.higher else value < best)
        return better and not math.isnan(value)
