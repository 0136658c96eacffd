"""What a lab asserts about its results. The one idea: a sentence of the book that states a number
rests on a claim, which fails when the number leaves the interval that the sentence allows.

The record of a claim travels in the executed notebook, as an output of type `CLAIM_MIME`; the build
reads it there, compares the prose with it and lists it in the appendix. Only the standard library
is imported here, so that the build's own programs can use this module without loading torch.
"""

from __future__ import annotations

import math
import re
import sys
from numbers import Integral
from typing import Any

CLAIM_MIME = "application/vnd.transferkit.claim+json"
FIGURE_MIME = "application/vnd.transferkit.figure+json"
NAME = re.compile(r"[a-z0-9-]+\.[a-z0-9-]+")

_profile: str | None = None
_opened: list[str] = []


class ClaimError(AssertionError):
    """A result left the interval that its claim allows."""


def note_profile(name: str) -> None:
    """Remember the profile of the run that begins here, in which no test split is open yet."""
    global _profile
    _profile = name
    _opened.clear()


def note_test_opened(name: str) -> None:
    """Remember that the test split of the data set `name` was opened: every later claim says so."""
    if name not in _opened:
        _opened.append(name)


def claim(name: str, value: Any, *, low: float, high: float, seeds: int = 1) -> None:
    """Assert that `low <= value <= high`, show a one-line receipt and record it in the notebook.

    In the profile `smoke` the sizes are too small to mean anything: the claim is recorded as not
    evaluated and never raises for its value. A wrong name or interval raises in every profile.

    Args:
        name: `lab.result` in lower-case letters, digits and hyphens: `image-model.frozen-accuracy`.
        value: one number, also a NumPy or torch scalar; shares as fractions, not percent.
        low, high: the interval that the prose may rely on, both ends included.
        seeds: how many seeds, folds or repetitions the value is a mean of.

    Raises:
        ClaimError: the value is outside the interval, NaN or infinite (not in `smoke`).
        ValueError: the name, the interval or `seeds` is malformed.
        TypeError: the value is not a number.

    Example:
        >>> tk.claim("image-model.frozen-accuracy", 0.86, low=0.8, high=0.9, seeds=3)
        claim image-model.frozen-accuracy: 0.86 in [0.8, 0.9] (3 seeds, ...)
    """
    check_name(name)
    low, high = _number(low, "low"), _number(high, "high")
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(
            f"the claim {name} allows [{low}, {high}], but two finite ends with low <= high are "
            "expected: swap them or give both"
        )
    if not isinstance(seeds, Integral) or isinstance(seeds, bool) or seeds < 1:
        raise ValueError(
            f"the claim {name} has seeds={seeds!r}, but a whole number of at least 1 is expected: "
            "say how many runs the value is a mean of"
        )
    value = _number(value, "value")
    evaluated = _profile != "smoke"
    if evaluated and not low <= value <= high:
        raise ClaimError(
            f"the claim {name} has the value {value:.6g}, but [{low:g}, {high:g}] is expected "
            f"({_circumstances(seeds)}): find out what changed the result; only if the new value "
            "is right, correct the interval and every sentence that rests on it"
        )
    record = {
        "name": name,
        "value": value if math.isfinite(value) else None,
        "low": low,
        "high": high,
        "seeds": int(seeds),
        "profile": _profile,
        "evaluated": evaluated,
        "test_opened": list(_opened),
    }
    outcome = f"{value:.4g} in [{low:g}, {high:g}]" if evaluated else "not evaluated"
    show({CLAIM_MIME: record, "text/plain": f"claim {name}: {outcome} ({_circumstances(seeds)})"})


def check_name(name: str) -> None:
    """Raise ValueError unless `name` reads `lab.result`, as claims and figures are named."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(
            f"the name is {name!r}, but `lab.result` in lower-case letters, digits and hyphens is "
            "expected, such as image-model.frozen-accuracy"
        )


def show(bundle: dict[str, Any]) -> None:
    """Display a bundle of representations by MIME type; outside IPython print its `text/plain`."""
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None:
        from IPython.display import display

        display(bundle, raw=True)
    else:
        print(bundle["text/plain"])


def _number(value: Any, what: str) -> float | int:
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"the claim's {what} is {value!r}, but one number is expected: reduce it first, for "
            "example with .mean()"
        ) from error


def _circumstances(seeds: int) -> str:
    parts = ["1 seed" if seeds == 1 else f"{seeds} seeds", f"profile {_profile or 'not set'}"]
    if _opened:
        parts.append(f"test opened: {', '.join(_opened)}")
    return ", ".join(parts)
