"""Optimisers and schedules. The one idea: parameter groups and learning rates are pure data.

`parameter_groups` decides from names and shapes alone which parameter gets which rate and decay;
`factor` gives the schedule as a function of the update. Neither keeps a state, so a run that
resumes finds the same rates, and a test can read them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from transferkit.devices import Scaler
from transferkit.layers import Group

SCHEDULES = ("cosine", "linear", "constant")
OPTIMIZERS = ("adamw", "sgd")


def parameter_groups(
    found: Sequence[Group], *, lr: float, weight_decay: float = 0.0, layer_decay: float = 1.0,
    rates: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Divide the trainable parameters of layer groups by learning rate and weight decay.

    The last layer group that has parameters gets the rate `lr`, the one before `lr * layer_decay`,
    and so on towards the input; a parameter that `rates` names gets that rate instead. Parameters
    with fewer than two dimensions (biases, normalisation weights) are never decayed.

    Returns:
        What a torch optimizer takes: for each combination that occurs a dictionary of `params`,
        their `names`, `lr`, the same as `peak`, and `weight_decay`. Every trainable parameter is
        in exactly one.

    Example:
        >>> groups = tk.layers.groups(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)))
        >>> parts = tk.optim.parameter_groups(groups, lr=0.1, weight_decay=0.01, layer_decay=0.5)
        >>> for part in parts:
        ...     print(part["names"], part["lr"], part["weight_decay"])
        ['1.weight'] 0.1 0.01
        ['1.bias'] 0.1 0.0
        ['0.weight'] 0.05 0.01
        ['0.bias'] 0.05 0.0
    """
    holders = [group for group in found if group.parameters]
    parts: dict[tuple[float, float], dict[str, Any]] = {}
    for depth, group in enumerate(reversed(holders)):
        for name, parameter in group.parameters.items():
            if not parameter.requires_grad:
                continue
            rate = (rates or {}).get(name, lr * layer_decay**depth)
            decay = weight_decay if parameter.dim() > 1 else 0.0
            empty = {"params": [], "names": [], "peak": rate, "lr": rate, "weight_decay": decay}
            part = parts.setdefault((rate, decay), empty)
            part["params"].append(parameter)
            part["names"].append(name)
    return list(parts.values())


def factor(schedule: str, update: int, updates: int, warmup: float) -> float:
    """What the peak learning rate is multiplied by at an update of a phase.

    Over the first `warmup` (a share) of the updates it rises in equal steps to 1; then it stays
    ("constant"), or falls to 0 after the last update in a straight line ("linear") or half a cosine
    ("cosine").

    Args:
        update: number of the update, from 0.
        updates: how many the phase has.

    Example:
        >>> [round(tk.optim.factor("linear", at, 10, warmup=0.2), 3) for at in (0, 1, 2, 6, 9)]
        [0.333, 0.667, 1.0, 0.5, 0.125]
    """
    rising = math.ceil(warmup * updates)
    if update < rising:
        return (update + 1) / (rising + 1)
    if schedule == "constant":
        return 1.0
    done = (update - rising) / max(1, updates - rising)
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def build(
    found: Sequence[Group], *, lr: float, optimizer: str = "adamw", weight_decay: float = 0.0,
    layer_decay: float = 1.0, rates: Mapping[str, float] | None = None, momentum: float = 0.9,
) -> torch.optim.Optimizer:  # fmt: skip
    """The optimizer over the trainable parameters of layer groups, divided by `parameter_groups`.

    The fused kernels are used on every device: on a processor their update of a small transformer
    takes 7 ms where the loop over tensors takes 22, and they read nothing back to the host.

    Args:
        optimizer: "adamw" or "sgd"; `momentum` is of "sgd".

    Raises:
        ValueError: nothing in the layer groups is trained.

    Example:
        >>> optimizer = tk.optim.build(tk.layers.groups(nn.Linear(4, 2)), lr=0.1, optimizer="sgd")
        >>> type(optimizer).__name__, optimizer.param_groups[0]["names"]
        ('SGD', ['weight', 'bias'])
    """
    decays = {"weight_decay": weight_decay, "layer_decay": layer_decay}
    parts = parameter_groups(found, lr=lr, rates=rates, **decays)
    if optimizer == "sgd":
        return torch.optim.SGD(parts, lr=lr, momentum=momentum, fused=True)
    return torch.optim.AdamW(parts, lr=lr, fused=True)


def named(optimizer: torch.optim.Optimizer) -> dict[str, torch.nn.Parameter]:
    """The parameters that an optimizer of `build` moves, by name.

    Example:
        >>> optimizer = tk.optim.build(tk.layers.groups(nn.Linear(4, 2)), lr=0.1)
        >>> {name: tuple(part.shape) for name, part in tk.optim.named(optimizer).items()}
        {'weight': (2, 4), 'bias': (2,)}
    """
    parts = [zip(g["names"], g["params"], strict=True) for g in optimizer.param_groups]
    return {name: parameter for part in parts for name, parameter in part}


def set_rates(optimizer: torch.optim.Optimizer, scale: float | Tensor) -> None:
    """Give every parameter group its peak rate times `scale`.

    A Python number, or a tensor of one element on the device, as fp16 has it: nothing waits.

    Example:
        >>> optimizer = tk.optim.build(tk.layers.groups(nn.Linear(4, 2)), lr=0.1)
        >>> tk.optim.set_rates(optimizer, 0.5)
        >>> optimizer.param_groups[0]["lr"]
        0.05
    """
    for part in optimizer.param_groups:
        part["lr"] = part["peak"] * scale


class Average:
    """An exponential moving average of parameters as they train (Polyak & Juditsky 1992).

    After n updates it is the weighted mean of the parameters after each of them, where those of i
    updates ago weigh `decay**i`: at first the plain mean of the few there are, in which the start
    of training does not count, later about that of the last `1 / (1 - decay)`.

    Args:
        decay: in (0, 1), such as 0.999.
        parameters: what trains, by name.

    Attributes:
        tensors: the averages, by name.

    Example:
        >>> weight = torch.zeros(1)
        >>> average = tk.optim.Average(0.5, {"weight": weight})
        >>> for made in (1, 2):  # two updates, after which the weight is 1 and 2
        ...     weight = weight.fill_(made)
        ...     average.update(made)
        >>> average.tensors["weight"]  # (0.5 * 1 + 1 * 2) / (0.5 + 1)
        tensor([1.6667])
    """

    def __init__(self, decay: float, parameters: Mapping[str, Tensor]):
        self.decay = decay
        self._live = [parameter.detach() for parameter in parameters.values()]
        self.tensors = {name: value.detach().clone() for name, value in parameters.items()}

    def update(self, made: int, scaler: Scaler | None = None) -> None:
        """Take in the parameters after an update; one that fp16 skipped does not count.

        Args:
            made: updates of the phase with this one, skipped ones too.
        """
        share: float | Tensor
        if scaler is None:
            share = (1 - self.decay) / -math.expm1(made * math.log(self.decay))
        else:
            counted = (made - scaler.skipped.squeeze()).clamp(min=1)
            share = (self.decay - 1) / torch.expm1(counted * math.log(self.decay))
            share = share * (1 - scaler.found)
        own = list(self.tensors.values())
        moves = torch._foreach_sub(self._live, own)
        torch._foreach_mul_(moves, share)
        torch._foreach_add_(own, moves)

    def exchange(self) -> None:
        """Give the averages to the parameters and theirs to the averages; twice changes nothing."""
        own, kept = list(self.tensors.values()), [value.clone() for value in self._live]
        torch._foreach_copy_(self._live, own)
        torch._foreach_copy_(own, kept)
