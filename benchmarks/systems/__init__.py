"""The systems that are compared: each trains a model in place by a task's recipe.

An adapter is as thin as the documentation of its library allows. Where it deviates from that, or
from the other adapters, its notes say so; they are printed with the results.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from torch import nn

from benchmarks.tasks import Task

MODULES = ("bare", "transferkit", "hf_trainer", "lightning", "fastai", "skorch", "scikit_learn")


@dataclass(frozen=True)
class System:
    """One way to train.

    Attributes:
        name: as the tables show it.
        train: trains the model in place.
        needs: modules that must be installed.
        tuned: whether it computes in bf16 where the processor is good at it; else in float32.
        notes: deviations, in whole sentences.
    """

    name: str
    train: Callable[[nn.Module, Task], None]
    needs: tuple[str, ...] = ()
    tuned: bool = False
    notes: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        """The modules it needs that are not installed."""
        return [module for module in self.needs if find_spec(module) is None]


def known() -> dict[str, System]:
    """Every system by name; libraries are imported when one trains, not before."""
    modules = [importlib.import_module(f"{__name__}.{module}") for module in MODULES]
    return {system.name: system for module in modules for system in module.SYSTEMS}


def chosen(names: Sequence[str]) -> list[System]:
    """The systems of these names, installed or not, in this order."""
    return [known()[name] for name in names]
