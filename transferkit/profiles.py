"""How large a run is, and on what it runs. The one idea: a profile changes sizes and repetitions,
never the code path, so that one lab is a test (`smoke`), a page (`cpu`) and an experiment (`full`).
"""

from __future__ import annotations

import html
import os
import platform
import random
from dataclasses import dataclass
from importlib import util
from numbers import Integral
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

import transferkit
from transferkit import claims, devices

NAMES = ("smoke", "cpu", "full")
VARIABLE = "TRANSFERKIT_PROFILE"

T = TypeVar("T")

_current: Profile | None = None


@dataclass(frozen=True)
class Profile:
    """The card of a run: what was asked for and what it runs on.

    Attributes:
        name: `smoke`, `cpu` or `full`.
        seed: the seed that Python, NumPy and torch were given.
        precision: `fp32` or `bf16`, for the lab to pass to `fit`; claimed numbers are in `fp32`.
        device: the device of torch that training will use.
        machine: the name of that device, as the system gives it.
        threads: the threads torch computes with, and `cores`, those the process may run on.
        versions: name and version of what the results depend on.
        origin: where the name came from, for the card.
    """

    name: str
    seed: int
    precision: str
    device: str
    machine: str
    threads: int
    cores: int
    versions: tuple[tuple[str, str], ...]
    origin: str = ""

    def pick(self, *, smoke: T, cpu: T, full: T) -> T:
        """The value for this profile: `profile.pick(smoke=1, cpu=5, full=20)`."""
        return {"smoke": smoke, "cpu": cpu, "full": full}[self.name]

    def rows(self) -> list[tuple[str, str]]:
        """The card as pairs of a name and a text."""
        return [
            ("profile", self.name + self.origin),
            ("seed", str(self.seed)),
            ("precision", self.precision),
            ("device", f"{self.device}, {self.machine}"),
            ("threads", f"{self.threads} of {self.cores} usable cores"),
            ("versions", ", ".join(f"{name} {version}" for name, version in self.versions)),
        ]

    def __str__(self) -> str:
        return "\n".join(f"{name:<10}{text}" for name, text in self.rows())

    def _repr_html_(self) -> str:
        cells = (
            f'<tr><th scope="row" style="text-align:left">{name}</th>'
            f'<td style="text-align:left">{html.escape(text)}</td></tr>'
            for name, text in self.rows()
        )
        return f'<table aria-label="The card of this run">{"".join(cells)}</table>'


def profile(name: str, seed: int = 0, precision: str = "fp32") -> Profile:
    """Begin a run: choose its size, seed Python, NumPy and torch, and show the card of the run.

    The environment variable TRANSFERKIT_PROFILE takes the place of `name`, so that one notebook is
    tested small and run large. The claims of the run know the profile; figures get their style.

    Args:
        name: `smoke` (every line runs), `cpu` (the results of the book) or `full` (full size).
        seed: a whole number in [0, 2**32).
        precision: `fp32`, `bf16`, or `auto` for the faster of the two on this machine.

    Raises:
        ValueError: there is no such profile or precision, or the seed is out of range.

    Example:
        >>> profile = tk.profile("cpu", seed=1)
        profile   cpu
        seed      1
        ...
        >>> profile.pick(smoke=1, cpu=5, full=20)
        5
    """
    global _current
    name, origin = _chosen(name)
    if not isinstance(seed, Integral) or not 0 <= seed < 2**32:
        raise ValueError(
            f"the seed is {seed}, but a whole number in [0, 2**32) is expected: pass 0"
        )
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    claims.note_profile(name)
    if util.find_spec("matplotlib"):
        from transferkit import figures

        figures.use_style()
    device = devices.resolve_device()
    _current = Profile(
        name=name,
        seed=seed,
        precision=devices.resolve_precision(precision, device),
        device=device.type,
        machine=torch.cuda.get_device_name() if device.type == "cuda" else _processor(),
        threads=torch.get_num_threads(),
        cores=_usable_cores(),
        versions=(
            ("Python", platform.python_version()),
            ("torch", torch.__version__),
            ("numpy", np.__version__),
            ("transferkit", transferkit.__version__),
        ),
        origin=origin,
    )
    claims.show({"text/html": _current._repr_html_(), "text/plain": str(_current)})
    return _current


def current() -> Profile:
    """The profile of the run that `profile` began last.

    Raises:
        RuntimeError: no run was begun.
    """
    if _current is None:
        raise RuntimeError(
            "no profile was chosen, but one is expected: begin with tk.profile(PROFILE, SEED)"
        )
    return _current


def _chosen(name: str) -> tuple[str, str]:
    override = os.environ.get(VARIABLE)
    chosen, origin = (override, f" (set by {VARIABLE})") if override else (name, "")
    if chosen not in NAMES:
        raise ValueError(
            f"the profile is {chosen!r}{origin}, but one of {', '.join(NAMES)} is expected: cpu "
            "gives the results of the book"
        )
    return chosen, origin


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
