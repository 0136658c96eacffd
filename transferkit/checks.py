"""What arguments may be. The one idea: say what is wrong, and what to do, before all else."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any


def real(value: object) -> bool:
    """Whether it is one real number, of Python or NumPy, and no truth value.

    Example:
        >>> tk.checks.real(0.5), tk.checks.real(True)
        (True, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool)


def whole(value: object, least: int = 1) -> bool:
    """Whether it is a whole number of at least `least`, of an integer type.

    Example:
        >>> [tk.checks.whole(value) for value in (2, 2.0, 0, True)]
        [True, False, False, False]
    """
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def require(values: object, **rules: tuple[bool, str]) -> None:
    """Raise a ValueError for the first attribute that is not good: rules are (good, expected).

    Example:
        >>> from types import SimpleNamespace
        >>> given = SimpleNamespace(epochs=0)
        >>> tk.checks.require(given, epochs=(given.epochs > 0, "at least 1"))
        Traceback (most recent call last):
            ...
        ValueError: epochs is 0: give at least 1
    """
    for name, (good, expected) in rules.items():
        if not good:
            raise ValueError(f"{name} is {getattr(values, name)!r}: give {expected}")


def functions(metrics: Any) -> list[Callable[..., float]]:
    """The metrics as a list: one function, or several.

    Raises:
        TypeError: one of them is no function with a name.

    Example:
        >>> [metric.__name__ for metric in tk.checks.functions(tk.accuracy)]
        ['accuracy']
    """
    listed = [metrics] if callable(metrics) or isinstance(metrics, str) else list(metrics)
    for metric in listed:
        if not (callable(metric) and hasattr(metric, "__name__")):
            what = f"a metric is {metric!r}, but a function of logits and labels with a name is"
            raise TypeError(f"{what} expected: pass functions, such as metrics=[tk.accuracy]")
    return listed
