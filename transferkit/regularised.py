"""Objectives around an objective. The one idea: what is not changed is asked of the inner one.

Each of these adds something to the training loss of another objective and leaves evaluation alone:
outputs, loss, counts and checks are the inner one's. They can be put around each other: mix-up
innermost, then distillation, then adversarial training; L2-SP anywhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transferkit.checkpoint import tensors_of, weights_hash
from transferkit.devices import generators
from transferkit.layers import Staged, groups
from transferkit.objectives import (
    Loss,
    Number,
    _at_least_float32,
    forward,
)

if TYPE_CHECKING:
    from transferkit.data import Batch


class _Around:
    # `additive`, `outputs`, `loss`, `counts`, `validate`, `scored`, `penalty`: what a class does
    # not define is the inner objective's, and is missing where that lacks it.
    objective: Any

    def __getattr__(self, name: str) -> Any:
        if name == "objective" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.objective, name)

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        return self.objective(model, batch)


def _terms(loss: Loss, weight: float = 1.0, prefix: str = "") -> dict[str, tuple]:
    parts = zip(loss.names, loss.weights, loss.totals, loss.counts, strict=True)
    return {prefix + name: (weight * own, total, count) for name, own, total, count in parts}


@dataclass(frozen=True)
class Mixup(_Around):
    r"""Train on mixtures of two items and of their losses (Zhang et al. 2018).

    $$\tilde x_i = \lambda x_i + (1 - \lambda)\, x_{\pi(i)}, \qquad
      \tilde\ell_i = \lambda\, \ell(f(\tilde x_i), y_i)
        + (1 - \lambda)\, \ell(f(\tilde x_i), y_{\pi(i)})$$

    with one $\lambda \sim \mathrm{Beta}(\alpha, \alpha)$ and one random permutation $\pi$ a batch.
    For cross-entropy that is the loss against the mixed label, for squared error it has the same
    gradient. Evaluation sees the items as they are.

    Partners come from the same batch; with accumulation, from the same micro-batch. Given the
    pairs the loss is a sum over the items, and its count that of the items as they are, so
    accumulation gives the exact mean over all mixtures of the step; but one big batch would have
    drawn other pairs.

    Args:
        objective: one with one loss an item, such as `classification()`.
        alpha: above 0; small values mix little (0.2), 1 draws $\lambda$ evenly from [0, 1].

    Raises:
        ValueError: alpha is not above 0.
        TypeError: the objective is another; when called, the items have no labels, or inputs that
            are not one tensor of floating-point numbers.

    Example:
        >>> data = torch.randn(8, 4), torch.arange(8) % 2
        >>> objective = tk.mixup(tk.classification(), alpha=0.2)
        >>> run = tk.fit(nn.Linear(4, 2), objective, data, plan=tk.finetune(1))
        >>> len(run.history)
        1
    """

    objective: Any
    alpha: float = 0.2

    acts_below_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha < float("inf"):
            raise ValueError(
                f"alpha is {self.alpha}, but a number above 0 is expected: 0.2 is usual"
            )
        inner = self.objective
        while isinstance(inner, L2SP):  # which leaves the loss itself alone
            inner = inner.objective
        if isinstance(inner, _Around) or not getattr(inner, "additive", False):
            raise TypeError(
                f"mix-up is put around a {type(inner).__name__}, but an objective with one loss an "
                "item is expected: put it inside, distillation(mixup(classification()), teacher)"
            )

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        inputs, labels = batch.inputs, batch.labels
        if labels is None or not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            what = type(inputs).__name__ if not isinstance(inputs, Tensor) else inputs.dtype
            what = "have no labels" if labels is None else f"are {what}"
            raise TypeError(
                f"the items {what}, but mix-up needs labels and inputs of floating-point numbers: "
                "tokens cannot be mixed; use adversarial() for texts"
            )
        # All on the device: the shares and pairs follow from the seed of the step.
        concentration = torch.full((), self.alpha, device=inputs.device)
        beta = torch.distributions.Beta(concentration, concentration, validate_args=False)
        share = beta.sample()
        partner = torch.randperm(len(inputs), device=inputs.device)
        mixed = torch.lerp(inputs[partner], inputs, share.to(inputs.dtype))
        batch = replace(batch, inputs=mixed)
        outputs = self.objective.outputs(model, batch)
        own = self.objective.loss(outputs, batch)
        other = self.objective.loss(outputs, replace(batch, labels=labels[partner]))
        # A permutation changes no sum of counts, so the count is that of the items as they are.
        pairs = zip(own.totals, other.totals, strict=True)
        totals = [share * first + (1 - share) * second for first, second in pairs]
        parts = zip(own.names, own.weights, totals, own.counts, strict=True)
        return Loss.terms({name: (weight, total, count) for name, weight, total, count in parts})


class _Watched:
    # A model that remembers what it was called with and what it said.
    def __init__(self, model: nn.Module):
        self.model, self.calls = model, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        outputs = self.model(*inputs, **named)
        self.calls.append((named or inputs[0], outputs))
        return outputs


@dataclass(frozen=True)
class Distillation(_Around):
    r"""Learn from the probabilities of a teacher, too (Hinton et al. 2015, Section 2).

    With logits $z$ of the model and $v$ of the teacher, the temperature T and the share $\beta$,

    $$(1 - \beta)\, L(z, y) + \beta\, T^2 \, \frac1n \sum_i \mathrm{KL}\bigl(
      \mathrm{softmax}(v_i / T) \,\|\, \mathrm{softmax}(z_i / T)\bigr)$$

    where L is the inner objective. The factor T² keeps the gradient of the second term of one size
    while T changes; for large T it tends to $(z - v)/C$ for logits of mean 0. The teacher sees what
    the model saw, mixed inputs included, and n counts these rows: those of both domains around an
    adaptation, both views of an item around `contrastive()`. Evaluation looks at the inner
    objective alone.

    Args:
        objective: one that calls the model once, for outputs `(n, C)`.
        teacher: a model of the same inputs and C outputs; a copy of it is kept, in eval mode, and
            is not trained.
        temperature: T, above 0.
        weight: $\beta$ in [0, 1].

    Raises:
        ValueError: a value is outside its range; when called, the objective calls the model more
            than once, or the outputs of model and teacher differ in shape.

    Example:
        >>> batch = tk.data.Batch(torch.randn(3, 4), torch.tensor([0, 1, 0]), torch.arange(3))
        >>> objective = tk.distillation(tk.classification(), teacher=nn.Linear(4, 2))
        >>> loss = objective(nn.Linear(4, 2), batch)
        >>> loss.names, loss.weights, loss.counts
        (('loss', 'teacher'), (0.5, 0.5), (3, 3))
    """

    objective: Any
    teacher: nn.Module = field(repr=False, compare=False)
    temperature: float = 2.0
    weight: float = 0.5
    origin: str = field(init=False)  # the hash of the teacher's weights: part of a run's identity

    acts_below_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 < self.temperature < float("inf") or not 0.0 <= self.weight <= 1.0:
            raise ValueError(
                f"temperature is {self.temperature} and weight {self.weight}, but a number above 0 "
                "and a share in [0, 1] are expected: 2 and 0.5 are usual"
            )
        # A copy: were it the model itself, or trained on, it would teach something else each step.
        object.__setattr__(self, "teacher", copy.deepcopy(self.teacher).eval())
        object.__setattr__(self, "origin", weights_hash(tensors_of(self.teacher)))

    def counts(self, batch: Batch) -> tuple[Number, ...]:
        """The counts of an additive inner objective, then the number of items: a row for each."""
        return (*self.objective.counts(batch), len(batch))

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        watched = _Watched(model)
        hard = self.objective(watched, batch)
        if len(watched.calls) != 1:
            raise ValueError(
                f"the objective {type(self.objective).__name__} calls the model "
                f"{len(watched.calls)} times, but once is expected: put distillation inside, as in "
                "adversarial(distillation(...))"
            )
        inputs, outputs = watched.calls[0]
        outputs = getattr(outputs, "logits", outputs)
        with torch.no_grad():
            _onto(self.teacher, outputs.device)
            taught = forward(self.teacher, inputs)
        if outputs.dim() != 2 or outputs.shape != taught.shape:
            raise ValueError(
                f"the model's outputs have shape {tuple(outputs.shape)} and the teacher's "
                f"{tuple(taught.shape)}, but both must be (n, C): give both heads the same classes"
            )
        soft, target = (
            (_at_least_float32(logits) / self.temperature).log_softmax(1)
            for logits in (outputs, taught)
        )
        total = F.kl_div(soft, target, reduction="sum", log_target=True) * self.temperature**2
        terms = _terms(hard, 1 - self.weight) | {"teacher": (self.weight, total, len(outputs))}
        return Loss.terms(terms)


def _onto(model: nn.Module, device: torch.device) -> None:
    # Moved once: to ask every parameter in every step would cost more than the rest.
    first = next(model.parameters(), None)
    if first is not None and first.device != device:
        model.to(device)


@dataclass(frozen=True)
class L2SP(_Around):
    r"""Pull the parameters towards where they started (L2-SP, Li et al. 2018).

    $$L(w) + \frac{\alpha}{2} \lVert w_S - w_S^0 \rVert^2 + \frac{\beta}{2} \lVert w_H \rVert^2$$

    where L is the inner objective, $w_H$ the head and $w_S$ all parameters before it. The penalty
    is added once an update, whatever the accumulation; frozen parameters contribute nothing. Set
    the phase's `weight_decay=0.0`, which would pull towards 0. Made by `l2_sp`.

    Attributes:
        anchor: $w_S^0$ by parameter name, copies.
        origin: their hash, so that a run never goes on with another anchor.
    """

    objective: Any
    alpha: float
    beta: float
    origin: str
    anchor: dict[str, Tensor] = field(repr=False, compare=False)

    def penalty(self, model: nn.Module) -> Tensor:
        """The penalty terms, of shape `()`, with that of the inner objective if it has one.

        Raises:
            ValueError: the model lacks a parameter of the anchor, or has it in another shape.
        """
        named = dict(model.named_parameters())
        for name, start in self.anchor.items():
            if name not in named or named[name].shape != start.shape:
                raise ValueError(
                    f"the anchor holds {name!r} {tuple(start.shape)}, which the model lacks: call "
                    "l2_sp with this very model, after it got its final layers"
                )
        inner = getattr(self.objective, "penalty", None)
        total = next(iter(named.values())).new_zeros(()) if inner is None else inner(model)
        moved = {n: p for n, p in named.items() if p.requires_grad and n in self.anchor}
        for name, parameter in moved.items():
            if self.anchor[name].device != parameter.device:  # only in the first step
                self.anchor[name] = self.anchor[name].to(parameter.device)
        if moved:
            starts = [self.anchor[name] for name in moved]
            total = total + _squares(torch._foreach_sub([*moved.values()], starts), self.alpha)
        head = [p for n, p in named.items() if p.requires_grad and n not in self.anchor]
        return total + _squares(head, self.beta) if head and self.beta else total


def _squares(tensors: list[Tensor], weight: float) -> Tensor:
    return 0.5 * weight * torch.stack([tensor.square().sum() for tensor in tensors]).sum()


def l2_sp(objective: Any, model: nn.Module, alpha: float = 0.1, beta: float = 0.0) -> L2SP:
    """Make an objective pull the model towards its weights of now; see `L2SP`.

    Call it before `fit`, with the pre-trained model: the anchor is a copy of the parameters as they
    are at this moment, without those of the last layer group, the head, which starts at random. To
    resume a run, make model and objective as at its start; another anchor is refused by name.

    Args:
        alpha, beta: at least 0, for the parameters before the head and for the head.

    Raises:
        ValueError: alpha or beta is negative or not finite, or nothing comes before the head.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> objective = tk.l2_sp(tk.classification(), model, alpha=0.1)
        >>> objective.penalty(model).item()  # nothing has moved yet
        0.0
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0.0 <= value < float("inf"):
            raise ValueError(f"{name} is {value}, but a number of at least 0 is expected: try 0.1")
    found = groups(model)
    # the last stage of a staged model is its head even where it has no parameters
    holders = found if isinstance(model, Staged) else [g for g in found if g.parameters]
    anchor = {
        name: parameter.detach().clone()
        for group in holders[:-1]
        for name, parameter in group.parameters.items()
    }
    if not anchor:
        raise ValueError(
            "the model has one layer group with parameters, the head, so there is nothing to "
            "anchor: use the weight_decay of the phase"
        )
    return L2SP(objective, alpha, beta, weights_hash(anchor), anchor)


@dataclass(frozen=True)
class Adversarial(_Around):
    r"""Train on inputs or embeddings moved to where the loss is larger.

    The move $\delta$ is the same in shape as what it is added to, and its norm in each item at most
    $\epsilon$. With one step it is found from the gradient $g$ of the loss at 0: $\delta =
    \epsilon\, g / \lVert g \rVert_2$ for each item, the fast gradient method (Miyato et al. 2017,
    Section 3), or $\epsilon\, \mathrm{sign}(g)$ with `norm="linf"`. With more steps a random start
    in the ball is moved by the gradient and put back into the ball each time: projected gradient
    descent (Madry et al. 2018, Section 2.1). The training loss is `clean` times that at 0 plus that
    at $\delta$, as the terms of the inner objective and again as "adversarial" ones; it is additive
    where the inner one is. Evaluation is not perturbed.

    Every pass sees the same dropout and the same mix-up. A BatchNorm that is trained averages over
    all passes. The results are not clipped to a range of valid pixels.

    Args:
        objective: any, also one with mix-up or distillation.
        epsilon: the radius, above 0; for normalised inputs in their units.
        steps: how many times the gradient is taken.
        norm: "l2" over all values of an item, or "linf", each value for itself.
        at: the name of the module whose output tensor `(n, ...)` is moved; by default the inputs
            where they are floating-point numbers, else the output of the first `nn.Embedding`.
        clean: weight of the loss at 0: 1 as Miyato et al., 0 as Madry et al.
        step: length of a step; by default epsilon, or 2.5 epsilon / steps where there are several.

    Raises:
        ValueError: a value is outside its range; when called, there is no module to move, or it
            gives something else than a tensor.

    Example:
        >>> batch = tk.data.Batch(torch.randn(3, 4), torch.tensor([0, 1, 0]), torch.arange(3))
        >>> objective = tk.adversarial(tk.classification(), epsilon=0.1)
        >>> move = objective.perturbation(nn.Linear(4, 2), batch)
        >>> torch.allclose(move.norm(dim=1), torch.tensor(0.1))
        True
    """

    objective: Any
    epsilon: float
    steps: int = 1
    norm: str = "l2"
    at: str | None = None
    clean: float = 1.0
    step: float | None = None

    acts_below_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        good = {
            "epsilon": (0.0 < self.epsilon < float("inf"), "a number above 0"),
            "steps": (self.steps >= 1 and self.steps == int(self.steps), "at least 1"),
            "norm": (self.norm in ("l2", "linf"), "'l2' or 'linf'"),
            "clean": (0.0 <= self.clean < float("inf"), "a number of at least 0"),
            "step": (self.step is None or self.step > 0.0, "None or a number above 0"),
        }
        for name, (fine, expected) in good.items():
            if not fine:
                raise ValueError(f"{name} is {getattr(self, name)!r}: give {expected}")

    def counts(self, batch: Batch) -> tuple[Number, ...]:
        """The counts of the inner objective, twice where the clean loss is part of it."""
        counts = tuple(self.objective.counts(batch))
        return counts + counts if self.clean else counts

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        first, move = self._search(model, batch)
        moved = self._loss(model, batch, [move])
        if not self.clean:
            return moved
        return Loss.terms(_terms(first, self.clean) | _terms(moved, 1.0, "adversarial "))

    def perturbation(self, model: nn.Module, batch: Batch) -> Tensor:
        """The move that a training step on this batch would make: `(n, ...)`."""
        return self._search(model, batch)[1]

    def _search(self, model: nn.Module, batch: Batch) -> tuple[Loss | None, Tensor]:
        # The clean loss with its graph, and the move. The random state is then that of before the
        # first pass, so that the next pass draws what all passes drew.
        held: list[Tensor] = []
        place = self._place(model, batch)
        if place is None:  # drawn before the passes, as it must be for them to draw the same
            held.append(self._start(batch.inputs))
        device = next(iter(model.parameters())).device
        again, first = _rewinder(device), None
        if self.clean and self.steps > 1:
            first = self.objective(model, batch)
            again()
        for number in range(self.steps):
            loss = self._loss(model, batch, held)
            again()
            if not held:
                what = f"the module at {self.at!r} takes no part in the forward pass"
                raise ValueError(f"{what}: name one that does")
            keep = self.clean and self.steps == 1  # at 0, where the one step starts
            first = loss if keep else first
            parts = zip(loss.weights, loss.totals, strict=True)
            value = sum(weight * total for weight, total in parts)
            (slope,) = torch.autograd.grad(value, held[0], retain_graph=bool(keep))
            held[0] = self._moved(held[0].detach(), slope)
            if number + 1 < self.steps:
                held[0].requires_grad_()
        return first, held[0]

    def _loss(self, model: nn.Module, batch: Batch, held: list[Tensor]) -> Loss:
        # The inner loss with the move in `held` added; an empty list is given the start.
        place = self._place(model, batch)
        if place is None:
            return self.objective(model, replace(batch, inputs=batch.inputs + held[0]))

        def add(module: nn.Module, inputs: Any, output: Any) -> Tensor:
            if not isinstance(output, Tensor):
                what = f"the module at {self.at!r} gives a {type(output).__name__}"
                raise ValueError(f"{what}, but one tensor is expected: name an embedding")
            if not held:
                held.append(self._start(output))
            return output + held[0]

        hook = place.register_forward_hook(add)
        try:
            return self.objective(model, batch)
        finally:
            hook.remove()

    def _place(self, model: nn.Module, batch: Batch) -> nn.Module | None:
        if self.at is not None:
            named = dict(model.named_modules())
            if self.at not in named:
                raise ValueError(
                    f"at is {self.at!r}, but the model has no such module: give a name of "
                    "model.named_modules(), or leave it out"
                )
            return named[self.at]
        if isinstance(batch.inputs, Tensor) and batch.inputs.is_floating_point():
            return None
        found = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
        if found is None:
            raise ValueError(
                "the inputs are no floating-point numbers and the model has no nn.Embedding: name "
                "the module whose output is to be moved, at=..."
            )
        return found

    def _start(self, values: Tensor) -> Tensor:
        if self.steps == 1:
            return torch.zeros_like(values).requires_grad_()
        if self.norm == "linf":
            return torch.empty_like(values).uniform_(-self.epsilon, self.epsilon).requires_grad_()
        # evenly from the ball: an even direction, and the d-th root of an even number as radius
        even = torch.rand(len(values), device=values.device, dtype=values.dtype)
        radius = self.epsilon * even ** (1.0 / values[0].numel())
        return (_rows(radius, values) * _unit(torch.randn_like(values))).requires_grad_()

    def _moved(self, move: Tensor, slope: Tensor) -> Tensor:
        several = 2.5 * self.epsilon / self.steps if self.steps > 1 else self.epsilon
        step = several if self.step is None else self.step
        if self.norm == "linf":
            return (move + step * slope.sign()).clamp(-self.epsilon, self.epsilon)
        move = move + step * _unit(slope)
        return move * (self.epsilon / _norms(move).clamp(min=self.epsilon))


def _rows(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def _norms(tensor: Tensor) -> Tensor:
    # of each item, in a shape that can be multiplied with all
    return _rows(torch.linalg.vector_norm(tensor.flatten(1), dim=1), tensor)


def _unit(tensor: Tensor) -> Tensor:
    # The largest value first: the squares of small gradients would be 0. No gradient, no move.
    tensor = tensor / tensor.abs().flatten(1).amax(1).clamp(min=1e-30).view(
        -1, *[1] * (tensor.dim() - 1)
    )
    return tensor / _norms(tensor).clamp(min=1e-12)


def _rewinder(device: torch.device) -> Callable[[], None]:
    # A function that sets the random generators in use back to where they are now.
    states = [(generator, generator.get_state()) for generator in generators(device)]

    def again() -> None:
        for generator, state in states:
            generator.set_state(state)

    return again


mixup, distillation, adversarial = Mixup, Distillation, Adversarial
