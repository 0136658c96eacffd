"""What a run does. The one idea: a plan is a list of phases, and a phase fixes what is trained.

Optimizer, parameter groups and feature cache are built once per phase. A phase is a value: it can
be printed, compared and stored, and names the whole recipe. Functions that describe a whole
strategy, such as `gradual_unfreezing`, return a list of phases, to be used alone or beside others.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from transferkit import optim
from transferkit.checks import real, require, whole
from transferkit.layers import groups, matching
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
        train: of these layer groups only the parameters that one of these patterns matches, such as
            `("*.bias", "head")` (Ben Zaken et al. 2022); None trains all of them.
        cache: compute the output of the frozen layer groups once and train on that.
        layer_decay: the rate of each layer group is that of the next one times this, in (0, 1].
        rates: peak rates by name, `{"head": 1e-3, "layer.*": 2e-5}`, kept as a tuple of pairs. The
            first pattern that matches a parameter gives its rate as it stands, without layer decay,
            which shapes the rates of all others.
        warmup: share of the updates over which the rate rises, in [0, 1).
        weight_decay: of parameters with at least two dimensions.
        schedule: "cosine", "linear" or "constant" after the warm-up.
        optimizer: "adamw" or "sgd".
        momentum: of "sgd".

    Patterns are those of `layers.matching`: a parameter's own name, or that of a module it is in.

    Raises:
        ValueError: a value is outside its range.

    Example:
        >>> phase = tk.Phase("biases", epochs=2, lr=1e-3, train=("head", "*.bias"))
        >>> phase.schedule, phase.warmup, phase.weight_decay
        ('cosine', 0.06, 0.01)
    """

    name: str
    epochs: int
    lr: float
    last: int | None = None
    train: tuple[str, ...] | None = None
    cache: bool = False
    layer_decay: float = 1.0
    rates: tuple[tuple[str, float], ...] = ()
    warmup: float = 0.06
    weight_decay: float = 0.01
    schedule: str = "cosine"
    optimizer: str = "adamw"
    momentum: float = 0.9

    def __post_init__(self) -> None:
        for name in ("lr", "layer_decay", "warmup", "weight_decay", "momentum"):
            require(self, **{name: (real(getattr(self, name)), "one number")})
        if self.train is not None:
            patterns = [self.train] if isinstance(self.train, str) else self.train
            object.__setattr__(self, "train", tuple(patterns))
        object.__setattr__(self, "rates", _pairs(self.rates))
        named = all(0 < rate < math.inf for _, rate in self.rates)
        require(
            self,
            epochs=(whole(self.epochs), "a whole number of at least 1"),
            lr=(0 < self.lr < math.inf, "a number above 0, such as 2e-5"),
            last=(self.last is None or whole(self.last), "None (all) or at least 1"),
            train=(self.train != (), "None (all) or at least one pattern, such as '*.bias'"),
            rates=(named, "rates above 0; to keep parameters from being trained, freeze them"),
            layer_decay=(0 < self.layer_decay <= 1, "a number in (0, 1], such as 0.9"),
            warmup=(0 <= self.warmup < 1, "a share in [0, 1), such as 0.06"),
            weight_decay=(0 <= self.weight_decay < math.inf, "a number of at least 0"),
            momentum=(0 <= self.momentum < 1, "a number in [0, 1), such as 0.9"),
            schedule=(self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            optimizer=(self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
        )


def _pairs(rates: Any) -> tuple[tuple[str, float], ...]:
    try:
        found = rates.items() if isinstance(rates, Mapping) else rates
        return tuple((str(pattern), float(rate)) for pattern, rate in found)
    except (TypeError, ValueError):
        remedy = 'give a pattern with its rate for each, such as {"head": 1e-3, "layer.*": 2e-5}'
        raise ValueError(f"rates is {rates!r}: {remedy}") from None


def linear_probe(epochs: int, lr: float = 1e-3, cache: bool = True, **settings: Any) -> Phase:
    """Train the head alone on the features of the frozen backbone, computed once if `cache`.

    Further settings are those of `Phase`; there is no weight decay unless one is given.

    Example:
        >>> phase = tk.linear_probe(5)
        >>> phase.name, phase.last, phase.cache, phase.weight_decay
        ('linear_probe', 1, True, 0.0)
    """
    settings = {"name": "linear_probe", "last": 1, "weight_decay": 0.0, **settings}
    return Phase(epochs=epochs, lr=lr, cache=cache, **settings)


def finetune(epochs: int, lr: float = 2e-5, last: int | None = None, **settings: Any) -> Phase:
    """Train the whole model, or its last few layer groups; further settings as in `Phase`.

    Example:
        >>> phase = tk.finetune(3, lr=5e-5, layer_decay=0.9)
        >>> phase.name, phase.epochs, phase.last
        ('finetune', 3, None)
    """
    return Phase(**{"name": "finetune", "epochs": epochs, "lr": lr, "last": last, **settings})


def gradual_unfreezing(
    groups: int, epochs: int | Sequence[int] = 1, lr: float = 2e-5, **settings: Any
) -> list[Phase]:
    """Phases that train the last layer group, then the last two, and so on (Howard & Ruder 2018).

    The layers nearest to the output know least that is general, so they change first. Howard and
    Ruder train each stage for one epoch and the last, of all layers, until it has converged, with
    `layer_decay=1 / 2.6`. Where not all of a deep model is to be opened one by one, a last phase
    may do the rest: `[tk.gradual_unfreezing(3), tk.finetune(2)]`.

    Args:
        groups: how many phases, each with one more layer group that has parameters.
        epochs: of each phase, one number or one for every phase.
        lr, settings: of every phase, as in `Phase`; `name` is continued by the phase's number.

    Raises:
        ValueError: `groups` is below 1, or there is not one number of epochs for every phase.

    Example:
        >>> [(phase.name, phase.last) for phase in tk.gradual_unfreezing(3)]
        [('unfreeze 1', 1), ('unfreeze 2', 2), ('unfreeze 3', 3)]
    """
    each = list(epochs) if isinstance(epochs, Sequence) else [epochs] * groups
    if groups < 1 or len(each) != groups:
        what = f"groups is {groups} and epochs is {epochs}"
        raise ValueError(f"{what}: give at least 1, and one number of epochs or one for each phase")
    name = settings.pop("name", "unfreeze")
    settings["lr"] = lr
    return [Phase(f"{name} {at}", count, last=at, **settings) for at, count in enumerate(each, 1)]


def probe_then_finetune(
    probe: int, epochs: int, probe_lr: float = 1e-3, lr: float = 2e-5, cache: bool = True,
    **settings: Any,
) -> list[Phase]:  # fmt: skip
    """A linear probe, then the whole model from there: LP-FT (Kumar et al. 2022).

    A new head sends random gradients into the backbone, which distort its features before the head
    fits them; one that was fitted first does not. Fine-tuning starts at the best epoch of the
    probe, with a new optimizer and a new warm-up.

    Args:
        probe, probe_lr, cache: epochs and rate of `linear_probe`, and whether it keeps features.
        epochs, lr, settings: of `finetune`.

    Example:
        >>> [(phase.name, phase.epochs) for phase in tk.probe_then_finetune(5, 2)]
        [('linear_probe', 5), ('finetune', 2)]
    """
    return [linear_probe(probe, probe_lr, cache), finetune(epochs, lr, **settings)]


def check(plan: Phase | Iterable[Any], model: nn.Module | None = None) -> list[Phase]:
    """The plan as one list: a phase, or phases and lists of phases, however nested.

    Args:
        model: with one, every phase must find in it what it asks for, before the first is trained.

    Raises:
        ValueError: it is empty, something in it is no phase, or one does not fit the model.

    Example:
        >>> phases = tk.plan.check([tk.linear_probe(1), tk.gradual_unfreezing(2)])
        >>> [phase.name for phase in phases]
        ['linear_probe', 'unfreeze 1', 'unfreeze 2']
    """
    phases = list(_flat(plan))
    if not phases or not all(isinstance(phase, Phase) for phase in phases):
        raise ValueError(f"the plan is {phases}: give phases, such as [tk.finetune(epochs=3)]")
    if model is not None:
        allowed = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        for phase in phases:
            rates(phase, model, trained(phase, model, allowed))
    return phases


def _flat(plan: Any) -> Iterator[Any]:
    if not isinstance(plan, Iterable) or isinstance(plan, str):
        yield plan
        return
    for part in plan:
        yield from _flat(part)


def begin(phase: Phase, model: nn.Module, allowed: set[str]) -> torch.optim.Optimizer:
    """Set which parameters the phase trains, and build its optimizer over them.

    The optimizer of every phase is new, also for parameters that the phase before trained: their
    moments were those of other weights (a phase starts from the best epoch so far, not from the
    last), with other layers and another rate, and a bias correction of AdamW that starts again for
    all keeps old and new parameters in step. The warm-up is what it needs for its first updates.

    Raises:
        ValueError: as `trained` and `rates`.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> allowed = {name for name, _ in model.named_parameters()}
        >>> optimizer = tk.plan.begin(tk.linear_probe(1), model, allowed)
        >>> list(tk.optim.named(optimizer)), model[0].weight.requires_grad
        (['2.weight', '2.bias'], False)
    """
    names = trained(phase, model, allowed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
        parameter.grad = None
    return optim.build(
        groups(model), optimizer=phase.optimizer, lr=phase.lr, weight_decay=phase.weight_decay,
        layer_decay=phase.layer_decay, rates=rates(phase, model, names), momentum=phase.momentum,
    )  # fmt: skip


def trained(phase: Phase, model: nn.Module, allowed: set[str]) -> set[str]:
    """Names of the parameters that the phase trains.

    Args:
        allowed: names of the parameters that were not frozen before the run.

    Raises:
        ValueError: the phase asks for more layer groups than there are, a pattern matches nothing
            that can be trained, or nothing at all is left to train.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> allowed = {name for name, _ in model.named_parameters()}
        >>> sorted(tk.plan.trained(tk.finetune(1, train="*.bias"), model, allowed))
        ['0.bias', '2.bias']
    """
    holders = [group for group in groups(model) if group.parameters]
    last = len(holders) if phase.last is None else phase.last
    if last > len(holders):
        raise ValueError(
            f"phase {phase.name!r} trains the last {last} layer groups, but the model has "
            f"{len(holders)} with parameters: lower `last`, or leave it out to train all"
        )
    names = {name for group in holders[-last:] for name in group.parameters} & allowed
    if phase.train is not None:
        names = {name for one in phase.train for name in _hits(phase, model, one, names)}
    if not names:
        raise ValueError(
            f"phase {phase.name!r} trains no parameter, but at least one is expected: all it would "
            "train is frozen; call tk.unfreeze(model, ...), or give the model a head"
        )
    return names


def rates(phase: Phase, model: nn.Module, names: set[str]) -> dict[str, float]:
    """The peak rates that the phase gives by name, one for each parameter that a pattern matches.

    Args:
        names: of the parameters that it trains.

    Raises:
        ValueError: a pattern matches nothing that is trained, or nothing that those before it left.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> allowed = {name for name, _ in model.named_parameters()}
        >>> phase = tk.finetune(1, lr=2e-5, rates={"2": 1e-3})
        >>> sorted(tk.plan.rates(phase, model, allowed).items())
        [('2.bias', 0.001), ('2.weight', 0.001)]
    """
    found: dict[str, float] = {}
    for pattern, rate in phase.rates:
        new = _hits(phase, model, pattern, names) - found.keys()
        if not new:
            raise ValueError(
                f"phase {phase.name!r}: patterns before {pattern!r} already gave a rate to all it "
                "matches, and the first decides: put the special pattern before the general"
            )
        found |= dict.fromkeys(new, rate)
    return found


def _hits(phase: Phase, model: nn.Module, pattern: str, names: set[str]) -> set[str]:
    hits = matching(model, [pattern]) & names
    if not hits:
        raise ValueError(
            f"phase {phase.name!r}: all that {pattern!r} matches is frozen, but something trained "
            "is expected: raise `last`, call tk.unfreeze(model, ...), or leave the pattern out"
        )
    return hits


@dataclass
class Stopping:
    """What early stopping knows: the best epoch of the run, and how long the phase has waited.

    The weights kept are those of the best epoch of the run so far, so a phase that only does harm
    is undone. Patience looks at the current phase alone: a newly unfrozen model may first get
    worse. NaN is never better than anything.

    Example:
        >>> stopping = tk.plan.Stopping(higher=True, patience=2)
        >>> [stopping.observe(value) for value in (0.7, 0.8, 0.75, 0.79)]
        [True, True, False, False]
        >>> stopping.exhausted
        True
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
