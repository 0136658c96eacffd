"""Layer groups of a model. The one idea: a model is an ordered list of groups, input to output.

Freezing, layer-wise learning rates, training modes and the feature cache are all read off this one
list, so that they cannot disagree about where the model is cut.
"""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from transferkit.show import Table

_NORMALISES_BY_BATCH = nn.modules.batchnorm._NormBase  # BatchNorm and InstanceNorm, all sizes
_NO_CODE = SimpleNamespace(co_names=())


class Staged(nn.Module):
    """A model as an ordered list of named stages, from the input to the head.

    What goes from stage to stage is a tensor or a dictionary of tensors, the batch first. A dot in
    a stage's name makes a level of nesting, so that parameters are called `layer.0.query.weight`.

    Args:
        stages: pairs (name, module); the last is the head.
        labels: names of the classes, in the order of the outputs.
        prepare: turns a split of a data set into a source for this model.
        name, weights_hash: what it is called, and which pre-trained weights it started from.

    Attributes:
        recipe: `{"loader": "transferkit....", "arguments": {...}}`, how to build the architecture
            again, or None. Set by the loader; `transferkit.load` reads it.

    Raises:
        ValueError: there is no stage, or two have the same name.
    """

    def __init__(
        self, stages: Sequence[tuple[str, nn.Module]], labels: Sequence[str] | None = None,
        prepare: Callable[[Any], Any] | None = None, name: str = "", weights_hash: str = "",
    ):  # fmt: skip
        super().__init__()
        self.stage_names = [stage for stage, _ in stages]
        if not stages or len(set(self.stage_names)) < len(stages):
            raise ValueError(f"the stages are {self.stage_names}: give one or more, all distinct")
        for stage, module in stages:
            *levels, last = stage.split(".")
            parent: nn.Module = self
            for level in levels:
                parent = parent._modules.setdefault(level, nn.Module())
            parent.add_module(last, module)
        self.labels = None if labels is None else list(labels)
        self.prepare, self.name, self.weights_hash = prepare, name, weights_hash
        self.recipe: dict | None = None

    def run(self, state: Any, start: int = 0, stop: int | None = None) -> Any:
        """Apply the stages `start` to `stop` (exclusive) to the state before stage `start`."""
        for name in self.stage_names[start:stop]:
            state = self.get_submodule(name)(state)
        return state

    def forward(self, inputs: Tensor | dict[str, Tensor]) -> Any:
        return self.run(inputs)

    def _pairs(self) -> list[tuple[str, nn.Module]]:
        # looked up each time: a stage may have been replaced, by a new head or an adapter
        return [(name, self.get_submodule(name)) for name in self.stage_names]


@dataclass(frozen=True)
class Group:
    """One layer group: its modules, and the parameters that no earlier group holds."""

    name: str
    modules: tuple[nn.Module, ...]
    parameters: dict[str, nn.Parameter]

    @property
    def trainable(self) -> bool:
        """Whether at least one of its parameters is trained."""
        return any(parameter.requires_grad for parameter in self.parameters.values())


def _units(module: nn.Module, prefix: str = "") -> list[tuple[str, tuple[nn.Module, ...], dict]]:
    # (name, modules, own parameters) in the order of registration. A child that holds its layers in
    # a ModuleList is opened: such a list has no forward, so its entries are the layers.
    own = {prefix + name: p for name, p in module._parameters.items() if p is not None}
    units = [(f"{prefix}(own)", (), own)] if own else []
    for name, child in module.named_children():
        path = prefix + name
        listed = isinstance(child, nn.ModuleList)
        if listed or any(isinstance(inner, nn.ModuleList) for inner in child.modules()):
            units += _units(child, path + ".")
        else:
            units.append((path, (child,), {}))
    return units


def groups(model: nn.Module) -> list[Group]:
    """The layer groups of a model, from the input to the output; together they hold all of it.

    The stages of a `Staged`, the children of a `Sequential`, else the top-level children, of which
    those that keep layers in a `ModuleList` (the encoders of transformers) are opened. A parameter
    that two groups share belongs to the first.
    """
    if isinstance(model, Staged):
        units = [(name, (stage,), {}) for name, stage in model._pairs()]
    elif isinstance(model, nn.Sequential):
        units = [(name, (child,), {}) for name, child in model.named_children()]
    else:
        units = _units(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: list[Group] = []
    for name, modules, own in units:
        inside = [p for module in modules for p in module.parameters()] + list(own.values())
        # popped by identity: equal values are not the same parameter, shared ones are
        parameters = {names.pop(id(p)): p for p in inside if id(p) in names}
        found.append(Group(name, modules, parameters))
    return found


def matching(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Names of the parameters that a pattern matches, by their own name or a module's they are in.

    Patterns are those of a shell: `"head"`, `"layer.[0-3]"`, `"*.bias"`; `*` also crosses dots.

    Raises:
        ValueError: a pattern matches nothing; the nearest names are listed.
    """
    parents = {}
    for name, _ in model.named_parameters():
        parts = name.split(".")
        parents[name] = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    chosen: set[str] = set()
    for pattern in patterns:
        hits = {n for n, ups in parents.items() if any(fnmatchcase(up, pattern) for up in ups)}
        if not hits:
            known = sorted({up for ups in parents.values() for up in ups})
            near = difflib.get_close_matches(pattern, known, n=4, cutoff=0.3) or known[:4]
            raise ValueError(
                f"no parameter or module is called {pattern!r}: the nearest names are "
                f"{', '.join(near)}; tk.summary(model) lists the layer groups"
            )
        chosen |= hits
    return chosen


def _switch(model: nn.Module, patterns: Sequence[str], trainable: bool) -> None:
    parameters = dict(model.named_parameters())
    for name in matching(model, patterns or ["*"]):
        parameters[name].requires_grad_(trainable)
        parameters[name].grad = None


def freeze(model: nn.Module, *patterns: str) -> None:
    """Keep the parameters that match from being trained; without a pattern, all of them.

    A phase of `fit` never trains what was frozen before. Patterns and errors as in `matching`.
    """
    _switch(model, patterns, False)


def unfreeze(model: nn.Module, *patterns: str) -> None:
    """Undo `freeze` for the parameters that match; without a pattern, for all."""
    _switch(model, patterns, True)


def active(found: Sequence[Group]) -> list[bool]:
    """For each group whether training changes what it does, that is, whether it is in train mode.

    A group with parameters is active if one of them is trained. A group without, such as a dropout
    between two others, goes with the next group that has some: the dropout before a head is the
    head's. Where there is nothing in it that training changes, it is never active.
    """
    follows = next((g.trainable for g in reversed(found) if g.parameters), False)
    flags = []
    for group in reversed(found):
        if group.parameters:
            follows = group.trainable
            flags.append(follows)
        else:
            inside = [inner for module in group.modules for inner in module.modules()]
            flags.append(follows and any(map(_varies, inside)))
    return flags[::-1]


def _varies(module: nn.Module) -> bool:
    # whether its code looks at the mode: dropout, noise, BatchNorm do, a pooling does not
    methods = [part for kind in type(module).__mro__ for part in vars(kind).values()
               if kind not in (nn.Module, object)]  # fmt: skip
    return any("training" in getattr(m, "__code__", _NO_CODE).co_names for m in methods)


def apply_modes(model: nn.Module) -> None:
    """Set every module to train or eval mode by what is trained: frozen means inference mode.

    Active groups go to train mode, all others to eval mode: no dropout, and BatchNorm uses its
    stored statistics and leaves them alone. Inside an active group a BatchNorm whose own weights
    are frozen is in eval mode too.
    """
    found = groups(model)
    for module in model.modules():  # those that only hold groups keep this mode
        held = [parameter.requires_grad for parameter in module.parameters()]
        module.training = any(held) or not held
    for group, flag in zip(found, active(found), strict=True):
        for inner in (inner for module in group.modules for inner in module.modules()):
            own = [parameter.requires_grad for parameter in inner.parameters(recurse=False)]
            normalises = isinstance(inner, _NORMALISES_BY_BATCH) and own
            inner.training = flag and (any(own) or not normalises)


def frozen_prefix(model: nn.Module) -> int:
    """How many groups at the input side training leaves unchanged: where features can be cached."""
    flags = active(groups(model))
    return flags.index(True) if True in flags else len(flags)


def split(model: nn.Module, boundary: int | str) -> tuple[nn.Module, nn.Module]:
    """Cut a model in two that share its modules: `model(x) == suffix(prefix(x))`.

    The prefix of a `Staged` prepares the same inputs, so that it takes the same splits of data.

    Args:
        model: a `Staged` or an `nn.Sequential`.
        boundary: the first group of the suffix, by number or name.

    Raises:
        TypeError: the model has no order of calls that could be cut.
        ValueError: there is no such boundary, or one side would be empty.
    """
    if type(model).forward not in (Staged.forward, nn.Sequential.forward):
        what = f"a {type(model).__name__} cannot be cut, for its forward method hides the order"
        raise TypeError(f"{what} of its layers: wrap it as tk.Staged([(name, stage), ...])")
    found = [group.name for group in groups(model)]
    at = found.index(boundary) if boundary in found else boundary
    if not isinstance(at, int) or not 0 < at < len(found):
        expected = f"a number from 1 to {len(found) - 1} or one of {found[1:]}"
        raise ValueError(f"the boundary is {boundary!r}: give {expected}")
    if isinstance(model, Staged):
        pairs = model._pairs()
        lower = Staged(pairs[:at], prepare=model.prepare, name=model.name)
        return lower, Staged(pairs[at:], model.labels)
    pairs = list(model.named_children())
    return nn.Sequential(OrderedDict(pairs[:at])), nn.Sequential(OrderedDict(pairs[at:]))


def summary(model: nn.Module) -> Table:
    """A table of the layer groups: parameters, how many are trained, and the mode in training."""
    found = groups(model)
    rows = Table()
    for group, flag in zip(found, active(found), strict=True):
        sizes = [(p.numel(), p.numel() * p.requires_grad) for p in group.parameters.values()]
        row = {"group": group.name, "parameters": sum(size for size, _ in sizes)}
        row |= {"trainable": sum(size for _, size in sizes), "mode": "train" if flag else "eval"}
        rows.append(row)
    totals = {name: sum(row[name] for row in rows) for name in ("parameters", "trainable")}
    rows.append({"group": "total", **totals, "mode": ""})
    return rows
