"""Domain adaptation. The one idea: one pass over both domains, and terms added to the source loss.

A batch of `target.pair` holds labelled items of the source and unlabelled ones of the target. The
model sees both in one forward pass; the source loss looks at the first half of its outputs, and
each adaptation adds a term of both halves: `dann` and `cdan` of a discriminator, `align` of a
distance, `confusion` of the answers. A BatchNorm that is trained averages over both domains. They
couple the items of a batch, so accumulation is refused. They can be put around each other:
`tk.confusion(tk.dann())` has both terms, of the same pass.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transferkit import checkpoint, evaluation
from transferkit.checks import real
from transferkit.data import Batch, as_source, in_sequence, stream
from transferkit.layers import Staged
from transferkit.objectives import Classification, Loss, _at_least_float32
from transferkit.regularised import L2SP, _Around, _terms
from transferkit.target import sides, stacked

_SOURCE = Classification()  # what is learned from the source, where nothing else is said

# ---- weights that change ------------------------------------------------------------------------


@dataclass(frozen=True)
class Ramp:
    r"""A weight that rises from `start` to `end` over a phase, fast at first (Ganin et al. 2016).

    With the share p of the updates that the phase has made, in [0, 1), and the steepness $\gamma$,

    $$\text{start} + (\text{end} - \text{start})\,
      \Bigl(\frac{2}{1 + \exp(-\gamma p)} - 1\Bigr)$$

    With `ramp(0, 1)` and $\gamma = 10$ this is their schedule of $\lambda$ (Section 5.2.2). It
    follows from the number of the update alone, so that a run that resumes has the same weights.

    Args:
        start, end: at least 0.
        steepness: $\gamma$, above 0.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> weight = tk.ramp(0, 1)
        >>> [round(weight(share), 2) for share in (0.0, 0.1, 0.5, 1.0)]
        [0.0, 0.46, 0.99, 1.0]
    """

    start: float
    end: float
    steepness: float = 10.0

    def __post_init__(self) -> None:
        for name, least in (("start", 0.0), ("end", 0.0), ("steepness", 1e-9)):
            value = getattr(self, name)
            if not real(value) or not least <= value < float("inf"):
                expected = "a number of at least 0" if least == 0.0 else "a number above 0"
                raise ValueError(f"{name} is {value!r}: give {expected}, as in tk.ramp(0, 1)")

    def __call__(self, share: float) -> float:
        """The weight when this share of the updates has been made."""
        # 2 / (1 + exp(-x)) - 1 = tanh(x / 2)
        return self.start + (self.end - self.start) * math.tanh(self.steepness * share / 2)


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float | Tensor) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * slope, None


def grad_reverse(x: Tensor, weight: float | Tensor = 1.0) -> Tensor:
    r"""The tensor as it is; its gradient is multiplied by $-\lambda$ (Ganin et al. 2016, Sec. 4.2).

    What comes after it lowers a loss, and what comes before raises the same loss, in one backward
    pass.

    Args:
        x: any tensor.
        weight: $\lambda$, a number or a tensor of shape `()`.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> y = tk.grad_reverse(x, 0.5)
        >>> (3 * y).sum().backward()
        >>> y.tolist(), x.grad.tolist()
        ([1.0, 1.0], [-1.5, -1.5])
    """
    return _Reversal.apply(x, weight)


# ---- the discriminator --------------------------------------------------------------------------


class TwoHeads(nn.Module):
    """A head that also carries a domain discriminator, which takes no part in what it says.

    Attributes:
        task: the head as it was.
        discriminator: rows of features to one logit, of being from the source.
    """

    def __init__(self, task: nn.Module, discriminator: nn.Module):
        super().__init__()
        self.task, self.discriminator = task, discriminator

    def forward(self, features: Any) -> Any:
        return self.task(features)


def with_discriminator(
    model: Staged, *, conditional: bool = False, hidden: int = 256, inputs: int | None = None,
    seed: int = 0,
) -> Staged:  # fmt: skip
    """Give a model's head a domain discriminator, for `dann` or `cdan`.

    The discriminator is a part of the head, `head.discriminator.*`; the head itself becomes
    `head.task.*`. So it is in the head's layer group: it is trained with the head's rate in every
    phase, is stored and resumed with the model, moves with it and shows in `summary`. What the
    model says does not change. `without_discriminator` takes it out again.

    Args:
        model: changed in place.
        conditional: whether it sees features and answers together, as `cdan` asks.
        hidden: width of its two hidden layers.
        inputs: the width of its inputs; by default that of the head's, where `conditional` times
            the number of its outputs.
        seed: of its first weights.

    Returns:
        The same model.

    Raises:
        TypeError: the model is not a staged one, whose head is known.
        ValueError: it has a discriminator, its head no linear layer, or a number is below 1.

    Example:
        >>> model = tk.Staged([("body", nn.Linear(4, 8)), ("head", nn.Linear(8, 2))])
        >>> tk.summary(tk.with_discriminator(model, hidden=16))
        group  parameters  trainable  mode
        body           40         40  train
        head          451        451  train
        total         491        491
    """
    _staged(model)
    name = model.stage_names[-1]
    head = model.get_submodule(name)
    if isinstance(head, TwoHeads):
        raise ValueError(
            "the model has a discriminator already: use it, or call tk.without_discriminator(model)"
        )
    inputs = _width(head, conditional) if inputs is None else inputs
    if inputs < 1 or hidden < 1:
        raise ValueError(f"inputs is {inputs} and hidden {hidden}: give at least 1, such as 256")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        below = [nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
        discriminator = nn.Sequential(*below, nn.Linear(hidden, 1))
    first = next(model.parameters(), torch.empty(0))
    _put(model, name, TwoHeads(head, discriminator.to(first.device)).train(head.training))
    if model.recipe is not None:
        arguments = {"base": model.recipe, "inputs": inputs, "hidden": hidden}
        model.recipe = {"loader": "transferkit.adapt.rebuild", "arguments": arguments}
    return model


def _width(head: nn.Module, conditional: bool) -> int:
    linear = [module for module in head.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(
            "the head has no linear layer that says how wide the features are: pass inputs=..."
        )
    return linear[0].in_features * (linear[-1].out_features if conditional else 1)


def without_discriminator(model: Staged) -> Staged:
    """Take the discriminator out again: the plain architecture, with the weights as they are.

    Args:
        model: changed in place.

    Returns:
        The same model.

    Raises:
        TypeError: the model is not a staged one.
        ValueError: it has no discriminator.

    Example:
        >>> model = tk.Staged([("body", nn.Linear(4, 8)), ("head", nn.Linear(8, 2))])
        >>> model = tk.without_discriminator(tk.with_discriminator(model))
        >>> [name for name, _ in model.named_parameters()]
        ['body.weight', 'body.bias', 'head.weight', 'head.bias']
    """
    _staged(model)
    name = model.stage_names[-1]
    head = model.get_submodule(name)
    if not isinstance(head, TwoHeads):
        raise ValueError("the model has no discriminator, so there is nothing to take out")
    _put(model, name, head.task)
    recipe = model.recipe or {}
    if recipe.get("loader") == "transferkit.adapt.rebuild":
        model.recipe = recipe["arguments"]["base"]
    return model


def rebuild(base: Mapping[str, Any], inputs: int, hidden: int) -> Staged:
    """The architecture of a model with a discriminator, from what `run.save` stored of it."""
    model = checkpoint.build(base, "the file of the model with a discriminator")
    return with_discriminator(model, inputs=inputs, hidden=hidden)


def _staged(model: Any) -> None:
    if not isinstance(model, Staged):
        raise TypeError(
            f"the model is a {type(model).__name__}, but a staged one, whose head is known, is "
            "expected: wrap it as tk.Staged([(name, stage), ...]) with the head last"
        )


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    *levels, last = name.split(".")
    model.get_submodule(".".join(levels)).add_module(last, module)


# ---- the objectives -----------------------------------------------------------------------------


@dataclass
class _Seen:
    # What one forward pass over both domains gave; the first rows are of the source.
    model: nn.Module
    outputs: Tensor
    features: dict[str | None, Tensor]
    rows: int  # of each domain

    def domains(self) -> Tensor:
        """1 for the rows of the source, 0 for those of the target, `(2n,)`."""
        return (torch.arange(2 * self.rows, device=self.outputs.device) < self.rows).float()


class _Adapting(_Around):
    # An objective that adds `term` to the loss of the one inside, of one pass over both domains.
    additive: ClassVar[bool] = False
    acts_below_head: ClassVar[bool] = True  # features of pairs cannot be cached
    looks_inside: ClassVar[bool] = True  # at the features, and not at the outputs alone
    at: str | None = None
    weight: float | Ramp = 1.0
    share = 1.0  # of the updates of the phase that are made; outside `fit` the end of a ramp

    def __post_init__(self) -> None:
        if not isinstance(self.weight, Ramp) and not (
            real(self.weight) and 0.0 <= self.weight < float("inf")
        ):
            raise ValueError(
                f"weight is {self.weight!r}: give a number of at least 0, or tk.ramp(0, 1)"
            )
        inner = self.objective
        while isinstance(inner, L2SP):  # which leaves the loss itself alone
            inner = inner.objective
        if isinstance(inner, _Adapting):
            return
        if isinstance(inner, _Around) or not getattr(inner, "additive", False):
            raise TypeError(
                f"it is put around a {type(inner).__name__}, but an objective of the source with "
                "one loss an item, or another adaptation, is expected: give tk.classification()"
            )

    def before(self, update: int, updates: int) -> None:
        """The engine says which update of the phase comes next."""
        for part in self._parts():
            object.__setattr__(part, "share", update / updates)

    def _parts(self) -> list[_Adapting]:
        # this one and those inside, the innermost first
        found, inner = [], self
        while isinstance(inner, _Around):
            found += [inner] if isinstance(inner, _Adapting) else []
            inner = inner.objective
        return found[::-1]

    def _base(self) -> Any:
        inner = self
        while isinstance(inner, _Adapting):
            inner = inner.objective
        return inner

    def _now(self) -> float:
        return self.weight(self.share) if isinstance(self.weight, Ramp) else self.weight

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the model says; of a batch of pairs, about its source items.

        Raises:
            ValueError: the batch is of pairs, and the model cannot be adapted to it.
        """
        both = sides(batch)
        if both is None:
            return self._base().outputs(model, batch)
        for part in self._parts():
            part.check(model)
        return self._base().outputs(model, Batch(both[0], batch.labels, batch.index))

    def check(self, model: nn.Module) -> None:
        """Raise what is wrong with the model, before anything is trained."""
        if self.looks_inside:
            _place(model, self.at)

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        both = sides(batch)
        if both is None:
            raise ValueError(
                "the batch holds no items of a target: wrap the training data as "
                "tk.pair(source, target)"
            )
        base, parts, rows = self._base(), self._parts(), len(batch)
        with _watching(model, {part.at for part in parts if part.looks_inside}) as features:
            outputs = base.outputs(model, Batch(stacked(both), None, batch.index))
        own = Batch(both[0], batch.labels, batch.index)
        terms = _terms(base.loss(outputs[:rows], own))
        seen = _Seen(model, outputs, features, rows)
        for part in parts:
            name, term = part.term(seen)
            if name in terms:
                raise ValueError(f"two adaptations add a term {name!r}: leave one of them out")
            terms[name] = term
        return Loss.terms(terms)

    def term(self, seen: _Seen) -> tuple[str, tuple[float, Tensor, float | Tensor]]:
        """The name of what is added, with its weight, total and count."""
        raise NotImplementedError


def _place(model: nn.Module, at: str | None) -> tuple[nn.Module, bool]:
    # The module, and whether its inputs are meant (those of the head) and not its outputs.
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "a compiled model does not show the features inside it: leave compile=... out"
        )
    if at is None:
        names = getattr(model, "stage_names", None)
        if names is None:
            raise ValueError(
                f"the model is a {type(model).__name__}, whose head is not known: make it a "
                "tk.Staged with the head last, or name the module whose output is meant, at=..."
            )
        return model.get_submodule(names[-1]), True
    try:
        return model.get_submodule(at), False
    except AttributeError:
        raise ValueError(
            f"at is {at!r}, but the model has no such module: give a name of "
            "model.named_modules(), or leave it out"
        ) from None


@contextmanager
def _watching(model: nn.Module, places: set[str | None]) -> Iterator[dict[str | None, Tensor]]:
    # Meanwhile, what the modules at these places are given or give is remembered.
    found: dict[str | None, Tensor] = {}
    hooks = []
    for at in places:
        module, before = _place(model, at)

        def keep(value: Any, at: str | None = at) -> None:
            if not isinstance(value, Tensor) or value.dim() != 2:
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                where = "what enters the head" if at is None else f"what {at!r} gives"
                raise Misplaced(
                    f"{where} is {shape}, but features (n, d) are expected: name a module that "
                    'gives one row an item, such as at="pool"'
                )
            found[at] = value

        if before:
            hook = module.register_forward_pre_hook(lambda _, inputs, keep=keep: keep(inputs[0]))
        else:
            hook = module.register_forward_hook(lambda _, __, output, keep=keep: keep(output))
        hooks.append(hook)
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    if found.keys() != places:
        unused = sorted(str(at) for at in places - found.keys())
        raise ValueError(f"the module at {unused[0]!r} takes no part in the pass: name another")


class Misplaced(ValueError):
    """What a module gives is no table of features; a kind of its own, to be told as it is."""


@dataclass(frozen=True)
class Dann(_Adapting):
    r"""Features from which a discriminator cannot tell the domain: DANN (Ganin et al. 2016).

    The discriminator D learns to tell source (1) from target (0); between it and the features lies
    `grad_reverse`, so that the features learn the opposite. With the n source items $x_i$ and
    the n target items $x'_i$ of a batch, the features f and the reversal $R_\lambda$,

    $$\frac1n \sum_i \ell(x_i, y_i) \;-\; \frac{1}{2n} \sum_i \bigl[
      \log D(R_\lambda(f(x_i))) + \log\bigl(1 - D(R_\lambda(f(x'_i)))\bigr) \bigr]$$

    The weight is $\lambda$: it multiplies the gradient of the features alone, and the
    discriminator always learns at the full rate, as in their experiments (Section 5.2.2). Their
    objective adds the means of both domains, which is twice the second term here. Near log 2 this
    term says that the discriminator fails, because the features agree or because it is too weak.

    Train on `pair`, with a model of `with_discriminator`. In evaluation, and in use, the
    discriminator takes no part: loss, outputs and checks are those of the inner objective.

    Args:
        objective: of the source, with one loss an item; or another adaptation.
        weight: $\lambda$, a number of at least 0 or a `ramp`.
        at: the name of the module whose outputs `(n, d)` are meant; by default the features are
            what enters the head.

    Raises:
        TypeError: the objective is another.
        ValueError: the weight is out of range; when called, the batch is not of pairs, or the model
            has no discriminator of this width.

    Example:
        >>> body, head = nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 2)
        >>> model = tk.with_discriminator(tk.Staged([("body", body), ("head", head)]))
        >>> source, target = (torch.randn(8, 4), torch.arange(8) % 2), torch.randn(8, 4) + 1.0
        >>> plan = tk.finetune(2, lr=0.01)
        >>> run = tk.fit(model, tk.dann(weight=tk.ramp(0, 1)), tk.pair(source, target), plan=plan)
        >>> len(run.history)
        2
    """

    objective: Any = _SOURCE
    weight: float | Ramp = Ramp(0.0, 1.0)
    at: str | None = None

    def check(self, model: nn.Module) -> None:
        super().check(model)
        _discriminator(model)

    def term(self, seen: _Seen) -> tuple[str, tuple[float, Tensor, float | Tensor]]:
        rows = grad_reverse(seen.features[self.at], self._now())
        each = _told_apart(seen, rows)
        return "domain", (1.0, each.sum(), len(each))


@dataclass(frozen=True)
class Cdan(_Adapting):
    r"""DANN whose discriminator sees features and answers together: CDAN (Long et al. 2018).

    Its inputs are all products $f_j\, g_c$ of a feature and the probability of a class (their
    multilinear map), so that the domains are matched class by class. No gradient flows
    through the probabilities, as in the authors' code. With `entropy` an item weighs
    $1 + \exp(-H(g))$ (CDAN+E), so that sure answers count for more, and the term is divided by the
    sum of the weights.

    Train on `pair`, with a model of `with_discriminator(model, conditional=True)`.

    Args:
        objective, weight, at: as in `Dann`; the model gives logits `(n, C)`.
        entropy: whether to weigh the items by the certainty of their answers.

    Raises:
        TypeError, ValueError: as `Dann`.

    Example:
        >>> model = tk.Staged([("body", nn.Linear(4, 8)), ("head", nn.Linear(8, 2))])
        >>> model = tk.with_discriminator(model, conditional=True)
        >>> batch = tk.pair((torch.randn(6, 4), [0, 1] * 3), torch.randn(6, 4)).fetch([0, 1], 0, 0)
        >>> loss = tk.cdan()(model, batch)
        >>> loss.names, loss.counts
        (('loss', 'domain'), (2, 4))
    """

    objective: Any = _SOURCE
    weight: float | Ramp = Ramp(0.0, 1.0)
    entropy: bool = False
    at: str | None = None

    def check(self, model: nn.Module) -> None:
        super().check(model)
        _discriminator(model)

    def term(self, seen: _Seen) -> tuple[str, tuple[float, Tensor, float | Tensor]]:
        shares = _answers(seen.outputs).softmax(1).detach()
        rows = grad_reverse(seen.features[self.at], self._now())
        each = _told_apart(seen, (shares.unsqueeze(2) * rows.unsqueeze(1)).flatten(1))
        if not self.entropy:
            return "domain", (1.0, each.sum(), len(each))
        sure = 1 + torch.exp(-torch.special.entr(shares).sum(1))
        return "domain", (1.0, (sure * each).sum(), sure.sum())


def _discriminator(model: nn.Module) -> nn.Module:
    names = getattr(model, "stage_names", None)
    head = None if names is None else model.get_submodule(names[-1])
    if not isinstance(head, TwoHeads):
        raise ValueError(
            "the model has no domain discriminator: call tk.with_discriminator(model) before fit, "
            "with conditional=True for cdan"
        )
    return head.discriminator


def _told_apart(seen: _Seen, rows: Tensor) -> Tensor:
    # The discriminator's cross-entropy of each row.
    discriminator = _discriminator(seen.model)
    if rows.shape[1] != discriminator[0].in_features:
        raise ValueError(
            f"the discriminator takes {discriminator[0].in_features} values a row, but "
            f"{rows.shape[1]} come: make it with inputs={rows.shape[1]}, or for cdan with "
            "conditional=True and for dann without"
        )
    logits = _at_least_float32(discriminator(rows).squeeze(1))
    domains = seen.domains().to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, domains, reduction="none")


def _answers(outputs: Tensor) -> Tensor:
    if outputs.dim() != 2 or outputs.shape[1] < 2:
        raise ValueError(
            f"the outputs have shape {tuple(outputs.shape)}, but logits (n, C) of at least 2 "
            "classes are expected: this adaptation is for classification"
        )
    return _at_least_float32(outputs)


@dataclass(frozen=True)
class Alignment(_Adapting):
    """The source loss plus a distance between the features of source and target; made by `align`.

    Attributes:
        measure: the function of two samples.
        name, settings: what it is called, and its further arguments: part of a run's identity.
    """

    objective: Any
    name: str
    settings: tuple[tuple[str, Any], ...]
    measure: Callable[..., Tensor] = field(repr=False, compare=False)
    weight: float | Ramp = 1.0
    at: str | None = None

    def term(self, seen: _Seen) -> tuple[str, tuple[float, Tensor, float | Tensor]]:
        features = seen.features[self.at]
        parts = features[: seen.rows], features[seen.rows :]
        return self.name, (self._now(), self.measure(*parts, **dict(self.settings)), 1)


def align(
    measure: Callable[..., Tensor], objective: Any = _SOURCE, *,
    weight: float | Ramp = 1.0, at: str | None = None, **settings: Any,
) -> Alignment:  # fmt: skip
    """The source loss plus `weight` times a distance between the features of source and target.

    With `mmd` this is a deep adaptation network of one adapted layer (Long et al. 2015), with
    `coral` Deep CORAL (Sun & Saenko 2016). Which weight makes it matter depends on the scale of the
    features, most of all for `coral`, which grows with its fourth power. Train on `pair`; a batch
    needs at least two items.

    Args:
        measure: a function of two samples `(n, d)` and `(m, d)` that gives a tensor of shape `()`
            with gradients, such as `tk.mmd` or `tk.coral`.
        objective: of the source, with one loss an item; or another adaptation.
        weight: a number of at least 0, or a `ramp`.
        at: the name of the module whose outputs `(n, d)` are meant; by default the features are
            what enters the head.
        settings: of the measure, such as `bandwidths=(1.0, 2.0)`.

    Raises:
        TypeError: the measure is no function with a name, or the objective is another.
        ValueError: the weight is out of range; when called, the batch is not of pairs, or the
            features are not one row an item.

    Example:
        >>> model = tk.Staged([("body", nn.Linear(4, 8)), ("head", nn.Linear(8, 2))])
        >>> batch = tk.pair((torch.randn(6, 4), [0, 1] * 3), torch.randn(6, 4)).fetch([0, 1], 0, 0)
        >>> loss = tk.align(tk.coral, weight=0.5)(model, batch)
        >>> loss.names, loss.weights
        (('loss', 'coral'), (1.0, 0.5))
    """
    if not callable(measure) or not hasattr(measure, "__name__"):
        raise TypeError(
            f"the measure is {measure!r}, but a function of two samples is expected: give tk.mmd "
            "or tk.coral, and their arguments beside it"
        )
    fixed = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in settings.items())
    return Alignment(objective, measure.__name__, fixed, measure, weight, at)


@dataclass(frozen=True)
class Confusion(_Adapting):
    r"""Minimum class confusion on the target (MCC, Jin et al. 2020).

    With the probabilities $\hat y_i = \mathrm{softmax}(z_i / T)$ of the n target items, the
    weights $w_i \propto 1 + \exp(-H(\hat y_i))$ with sum n, and C classes,

    $$\frac1C \sum_{c} \sum_{c' \ne c} \frac{K_{cc'}}{\sum_{c''} K_{cc''}}, \qquad
      K = \sum_i w_i\, \hat y_i\, \hat y_i^\top$$

    is how much probability two classes share in the same items. It looks at the answers alone and
    needs no discriminator. No gradient flows through the weights, as in the authors' code.

    Args:
        objective: of the source, with one loss an item; or another adaptation.
        weight: a number of at least 0, or a `ramp`.
        temperature: T, above 0.

    Raises:
        TypeError: the objective is another.
        ValueError: a value is out of range; when called, the batch is not of pairs, or the outputs
            are not logits `(n, C)`.

    Example:
        >>> model = tk.Staged([("body", nn.Linear(4, 8)), ("head", nn.Linear(8, 3))])
        >>> batch = tk.pair((torch.randn(6, 4), [0, 1] * 3), torch.randn(6, 4)).fetch([0, 1], 0, 0)
        >>> tk.confusion()(model, batch).names
        ('loss', 'confusion')
    """

    objective: Any = _SOURCE
    weight: float | Ramp = 1.0
    temperature: float = 2.5

    looks_inside: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not real(self.temperature) or not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature!r}: give a number above 0")

    def term(self, seen: _Seen) -> tuple[str, tuple[float, Tensor, float | Tensor]]:
        shares = (_answers(seen.outputs)[seen.rows :] / self.temperature).softmax(1)
        with torch.no_grad():
            sure = 1 + torch.exp(-torch.special.entr(shares).sum(1))
            sure = sure * len(sure) / sure.sum()
        with torch.autocast(shares.device.type, enabled=False):
            shared = (shares * sure.unsqueeze(1)).T @ shares
        shared = shared / shared.sum(1, keepdim=True)
        classes = shares.shape[1]
        return "confusion", (self._now(), shared.sum() - shared.diagonal().sum(), classes)


# ---- without any training -----------------------------------------------------------------------


def adabn(
    model: nn.Module, target: Any, batch_size: int = 64, *, precision: str = "auto",
    device: str | torch.device | None = None,
) -> nn.Module:  # fmt: skip
    """A copy of a model whose BatchNorm layers have the statistics of the target (Li et al. 2017).

    Mean and variance of each layer are those over all items of the target (their Algorithm 1), of
    one pass in which each batch is normalised by itself. Weights stay; no label is looked at.

    Args:
        model: is not changed.
        target: what `predict` accepts.
        batch_size: large enough for a batch to be normalised by itself: a layer sees the items as
            the layers below it normalised their batch.
        precision, device: as in `predict`.

    Returns:
        The copy, in eval mode.

    Raises:
        ValueError: no layer has statistics to be replaced, or there are fewer than two items.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
        >>> target = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
        >>> adapted = tk.adabn(model, target)
        >>> adapted[0].running_mean, adapted[0].running_var
        (tensor([2., 0.]), tensor([2., 0.]))
    """
    model = copy.deepcopy(model).eval()
    norms = [
        module for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]  # fmt: skip
    if not norms:
        raise ValueError(
            "the model has no BatchNorm layer with running statistics, so there is nothing to "
            "adapt: LayerNorm, for one, keeps none"
        )
    where = evaluation._where(model, as_source(target, model), batch_size, precision, device)
    count = len(where.source)
    batches = in_sequence(count, batch_size, where.source.lengths)
    if count < 2:
        raise ValueError(f"the target has {count} item: give at least 2, better hundreds")
    if len(batches) > 1 and len(batches[-1]) == 1:  # which cannot be normalised by itself
        batches[-2:] = [torch.cat([torch.as_tensor(part) for part in batches[-2:]]).numpy()]
    moments = {norm: _Moments(norm) for norm in norms}
    hooks = [norm.register_forward_pre_hook(moments[norm]) for norm in norms]
    for norm in norms:
        norm.train()
    with torch.no_grad():
        for batch in stream(where.source, batches, None, 0):
            with where.autocast():
                evaluation.forward(model, batch.to(where.device).inputs)
        for norm, hook in zip(norms, hooks, strict=True):
            hook.remove()
            moments[norm].settle()
    return model.eval()


class _Moments:
    # Sums over what enters a BatchNorm layer, channel by channel, in float64 where there is one.
    def __init__(self, norm: nn.modules.batchnorm._BatchNorm):
        self.norm, self.count = norm, 0
        self.sum: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def __call__(self, norm: nn.Module, inputs: tuple[Tensor]) -> None:
        wide = torch.float32 if inputs[0].device.type == "mps" else torch.float64
        values = inputs[0].detach().to(wide).transpose(0, 1).flatten(1)
        # about a fixed number near the mean, so that no digits are lost
        self.shift = values.mean(1, keepdim=True) if not self.count else self.shift
        values = values - self.shift
        self.count += values.shape[1]
        self.sum, self.squares = self.sum + values.sum(1), self.squares + values.square().sum(1)

    def settle(self) -> None:
        mean = self.sum / self.count
        variance = (self.squares / self.count - mean.square()) * self.count / (self.count - 1)
        self.norm.running_mean.copy_(mean + self.shift.squeeze(1))
        self.norm.running_var.copy_(variance.clamp(min=0))


ramp, dann, cdan, confusion = Ramp, Dann, Cdan, Confusion
