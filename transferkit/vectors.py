"""Arithmetic with weights. The one idea: models fine-tuned from one start lie close together.

So close that straight lines between them pass through good models too: a mixture of two can be
better than both on shifted data, and differences from the common start can be added and taken away.
Every function returns a new model in eval mode and leaves those it was given alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from transferkit import checkpoint, layers


@dataclass(frozen=True)
class TaskVector:
    """What fine-tuning added to the parameters of a backbone, by their names.

    `u + v` is the vector of both tasks, `-v` that of unlearning one.
    """

    tensors: Mapping[str, Tensor]

    def __add__(self, other: TaskVector) -> TaskVector:
        """Raises: ValueError: the two are not of one architecture."""
        checkpoint.check(self.tensors, other.tensors, "the other task vector")
        return TaskVector({name: own + other.tensors[name] for name, own in self.tensors.items()})

    def __neg__(self) -> TaskVector:
        return TaskVector({name: -tensor for name, tensor in self.tensors.items()})

    def apply(self, model: nn.Module, scale: float = 1.0) -> nn.Module:
        """A copy of a model with `scale` times this vector added to its backbone.

        The head stays the model's own, and so do the statistics of its BatchNorm layers: these
        belong to the weights of before and should be estimated again.

        Raises:
            ValueError: the backbone's parameters have other names or shapes.
        """
        changed = copy.deepcopy(model).eval()
        own = _backbone(changed)
        checkpoint.check(own, self.tensors, "the task vector")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.add_(self.tensors[name].to(tensor), alpha=scale)
        return changed


def task_vector(finetuned: nn.Module, base: nn.Module) -> TaskVector:
    """The difference of two models' backbones, parameter by parameter (Ilharco et al. 2023).

    The head, which belongs to one task, and buffers such as BatchNorm's statistics, which could not
    be negated, are left out.

    Raises:
        ValueError: names or shapes differ, or a model holds adapters that were not merged.

    Example:
        >>> base, tuned = (
        ...     nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2)
        ... )
        >>> vector = tk.task_vector(tuned, base)
        >>> torch.allclose(vector.apply(base)[0].weight, tuned[0].weight, atol=1e-6)
        True
    """
    ours, theirs = _backbone(finetuned), _backbone(base)
    checkpoint.check(ours, theirs, "the base")
    return TaskVector({name: own.detach() - theirs[name].detach().to(own)
                       for name, own in ours.items()})  # fmt: skip


def interpolate(a: nn.Module, b: nn.Module, weight: float) -> nn.Module:
    """The model `(1 - weight) * a + weight * b`, tensor by tensor (WiSE-FT: Wortsman et al. 2022).

    The head is mixed like the rest, so `a` should have one that was trained, as after a linear
    probe. BatchNorm's means and variances are mixed too, which only approximates those of the mixed
    weights; its counters, and whatever else is no floating-point number, are those of `b`.

    Raises:
        ValueError: `weight` is outside [0, 1], names, shapes or labels differ, or a model holds
            adapters that were not merged.

    Example:
        >>> a, b = nn.Linear(4, 2), nn.Linear(4, 2)
        >>> middle = tk.interpolate(a, b, 0.5)
        >>> torch.allclose(middle.weight, (a.weight + b.weight) / 2)
        True
    """
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"weight is {weight!r}: give a share of b in [0, 1]")
    labels = [getattr(model, "labels", None) for model in (a, b)]
    if labels[0] != labels[1]:
        raise ValueError(f"the models have the labels {labels[0]} and {labels[1]}: mix equals only")
    start = checkpoint.tensors_of(_merged(a))
    mixed = copy.deepcopy(_merged(b)).eval()
    end = checkpoint.tensors_of(mixed)
    checkpoint.check(end, start, "the first model")
    with torch.no_grad():
        for name, tensor in end.items():
            if tensor.is_floating_point():
                tensor.copy_(torch.lerp(start[name].to(tensor), tensor, weight))
    return mixed


def _merged(model: nn.Module) -> nn.Module:
    adaptation = getattr(model, "adaptation", None)
    if adaptation is not None:
        what = f"the model holds {adaptation.method}, whose parameters do not add up as weights do"
        raise ValueError(f"{what}: call tk.merge(model) first, where the method allows it")
    return model


def _backbone(model: nn.Module) -> dict[str, Tensor]:
    head = layers.groups(_merged(model))[-1].parameters
    return {name: p for name, p in model.named_parameters() if name not in head}
