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
from torch.utils.checkpoint import checkpoint

from transferkit.show import Table

_NORMALISES_BY_BATCH = nn.modules.batchnorm._NormBase  # BatchNorm and InstanceNorm, all sizes
_NO_CODE = SimpleNamespace(co_names=())
_Unit = tuple[str, tuple[nn.Module, ...], dict[str, nn.Parameter]]


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
        ValueError: there is no stage, or a name is empty, used twice, that of a method, or the
            beginning of another.
        TypeError: something in it is no pair of a name and a module.

    Example:
        >>> body = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> model = tk.Staged([("body", body), ("head", nn.Linear(8, 2))], labels=["no", "yes"])
        >>> model(torch.randn(3, 4)).shape, model.labels
        (torch.Size([3, 2]), ['no', 'yes'])
    """

    def __init__(
        self, stages: Sequence[tuple[str, nn.Module]], labels: Sequence[str] | None = None,
        prepare: Callable[[Any], Any] | None = None, name: str = "", weights_hash: str = "",
    ):  # fmt: skip
        super().__init__()
        self.stage_names = _checked_names(stages)
        for stage, module in stages:
            *levels, last = stage.split(".")
            parent: nn.Module = self
            for level in levels:
                if level not in parent._modules:
                    parent.add_module(level, nn.Module())
                parent = parent.get_submodule(level)
            parent.add_module(last, module)
        self.labels = None if labels is None else list(labels)
        self.prepare, self.name, self.weights_hash = prepare, name, weights_hash
        self.recipe: dict[str, Any] | None = None

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


def _checked_names(stages: Sequence[tuple[str, nn.Module]]) -> list[str]:
    for stage in stages:
        pair = isinstance(stage, (tuple, list)) and len(stage) == 2
        if not pair or not isinstance(stage[0], str) or not isinstance(stage[1], nn.Module):
            raise TypeError(
                f"a stage is {stage!r}, but a pair of a name and a module is expected: give "
                'stages such as ("head", nn.Linear(8, 2))'
            )
    names = [name for name, _ in stages]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"the stages are {names}: give one or more, all distinct")
    for name in names:
        inside = [other for other in names if other.startswith(f"{name}.")]
        taken = [level for level in name.split(".") if not level or level in _TAKEN]
        if inside or taken:
            what = f"is the beginning of {inside[0]!r}" if inside else "is taken or empty"
            raise ValueError(f"the stage name {name!r} {what}: choose another, such as 'blocks.0'")
    return names


_TAKEN = {*dir(Staged), *vars(nn.Module()), "labels", "name", "prepare", "recipe", "stage_names"}


@dataclass(frozen=True)
class Group:
    """One layer group: its modules, and the parameters that no earlier group holds.

    Example:
        >>> group = tk.layers.groups(nn.Sequential(nn.Linear(4, 2)))[0]
        >>> group.name, list(group.parameters), group.trainable
        ('0', ['0.weight', '0.bias'], True)
    """

    name: str
    modules: tuple[nn.Module, ...]
    parameters: dict[str, nn.Parameter]

    @property
    def trainable(self) -> bool:
        """Whether at least one of its parameters is trained."""
        return any(parameter.requires_grad for parameter in self.parameters.values())


def _units(module: nn.Module, prefix: str = "") -> list[_Unit]:
    # (name, modules, own parameters) in the order of registration. A child that holds its layers in
    # a ModuleList is opened: such a list has no forward, so its entries are the layers.
    own = {prefix + name: p for name, p in module._parameters.items() if p is not None}
    units: list[_Unit] = [(f"{prefix}(own)", (), own)] if own else []
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

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [(group.name, len(group.parameters)) for group in tk.layers.groups(model)]
        [('0', 2), ('1', 0), ('2', 2)]
    """
    units = _units(model)
    if isinstance(model, Staged):
        units = [(name, (stage,), {}) for name, stage in model._pairs()]
    elif isinstance(model, nn.Sequential):
        units = [(name, (child,), {}) for name, child in model.named_children()]
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

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> sorted(tk.layers.matching(model, ["*.bias"]))
        ['0.bias', '2.bias']
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

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> tk.freeze(model, "0")
        >>> [name for name, part in model.named_parameters() if part.requires_grad]
        ['2.weight', '2.bias']
    """
    _switch(model, patterns, False)


def unfreeze(model: nn.Module, *patterns: str) -> None:
    """Undo `freeze` for the parameters that match; without a pattern, for all.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> tk.freeze(model)
        >>> tk.unfreeze(model, "*.bias")
        >>> [name for name, part in model.named_parameters() if part.requires_grad]
        ['0.bias', '2.bias']
    """
    _switch(model, patterns, True)


def active(found: Sequence[Group]) -> list[bool]:
    """For each group whether training changes what it does, that is, whether it is in train mode.

    A group with parameters is active if one of them is trained. A group without, such as a dropout
    between two others, goes with the next group that has some: the dropout before a head is the
    head's. Where there is nothing in it that training changes, it is never active.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 2))
        >>> tk.freeze(model, "0")
        >>> tk.layers.active(tk.layers.groups(model))
        [False, True, True]
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

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        >>> tk.freeze(model, "[01]")
        >>> tk.layers.apply_modes(model)
        >>> [layer.training for layer in model]
        [False, False, True]
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
    """How many groups at the input side training leaves unchanged: where features can be cached.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> tk.freeze(model, "0")
        >>> tk.layers.frozen_prefix(model)
        2
    """
    flags = active(groups(model))
    return flags.index(True) if True in flags else len(flags)


def _in_order(model: nn.Module) -> list[tuple[str, nn.Module]]:
    # The stages by name, where calling them one after the other is all the model does.
    if type(model).forward not in (Staged.forward, nn.Sequential.forward):
        what = f"a {type(model).__name__} cannot be cut, for its forward method hides the order"
        remedy = (
            "make it tk.staged(model), if it is of torchvision or timm, or wrap it as tk.Staged("
        )
        raise TypeError(f"{what} of its layers: {remedy}[(name, stage), ...])")
    return model._pairs() if isinstance(model, Staged) else list(model.named_children())


def split(model: nn.Module, boundary: int | str) -> tuple[nn.Module, nn.Module]:
    """Cut a model in two that share its modules: `model(x) == suffix(prefix(x))`.

    The prefix of a `Staged` prepares the same inputs, so that it takes the same splits of data.

    Args:
        model: a `Staged` or an `nn.Sequential`.
        boundary: the first group of the suffix, by number or name.

    Raises:
        TypeError: the model has no order of calls that could be cut.
        ValueError: there is no such boundary, or one side would be empty.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> prefix, suffix = tk.layers.split(model, 2)
        >>> inputs = torch.randn(3, 4)
        >>> torch.equal(suffix(prefix(inputs)), model(inputs))
        True
    """
    pairs = _in_order(model)
    found = [group.name for group in groups(model)]
    at = found.index(boundary) if isinstance(boundary, str) and boundary in found else boundary
    if not isinstance(at, int) or isinstance(at, bool) or not 0 < at < len(found):
        expected = f"a number from 1 to {len(found) - 1} or one of {found[1:]}"
        raise ValueError(f"the boundary is {boundary!r}: give {expected}")
    if isinstance(model, Staged):
        lower = Staged(pairs[:at], prepare=model.prepare, name=model.name)
        return lower, Staged(pairs[at:], model.labels)
    return nn.Sequential(OrderedDict(pairs[:at])), nn.Sequential(OrderedDict(pairs[at:]))


class _Recomputing(Staged):
    again: set[str]  # names of the stages that are computed twice

    def run(self, state: Any, start: int = 0, stop: int | None = None) -> Any:
        for name in self.stage_names[start:stop]:
            stage = self.get_submodule(name)
            again = name in self.again
            state = checkpoint(stage, state, use_reentrant=False) if again else stage(state)
        return state


def recomputing(model: nn.Module) -> Staged:
    """The same model, which computes its layer groups again in the backward pass.

    This is gradient checkpointing (Chen et al. 2016): of each group from the first trained one on,
    only the input is kept, which saves memory and takes about a third more time. Dropout draws the
    same numbers again. Not computed again are the last group, for which nothing would be saved, and
    groups with a BatchNorm in train mode, whose statistics would take in every batch twice.

    Raises:
        TypeError: the model has no order of calls that could be cut.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> twin, inputs = tk.layers.recomputing(model), torch.randn(3, 4)
        >>> torch.equal(twin(inputs), model(inputs))
        True
    """
    pairs = _in_order(model)
    twin = _Recomputing(pairs)
    twin.again = {
        name
        for name, stage in pairs[frozen_prefix(model) : -1]
        if not any(isinstance(m, _NORMALISES_BY_BATCH) and m.training for m in stage.modules())
    }
    return twin


def summary(model: nn.Module) -> Table:
    """A table of the layer groups: parameters, how many are trained, and the mode in training.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> tk.freeze(model, "0")
        >>> tk.summary(model)
        group  parameters  trainable  mode
        0              40          0  eval
        1               0          0  eval
        2              18         18  train
        total          58         18
    """
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
