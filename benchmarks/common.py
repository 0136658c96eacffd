"""What the measurements share: systems take turns, the least of the turns counts, and the result
goes into one file with the machine and the versions it was measured with.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import transferkit as tk
from benchmarks.systems import System
from benchmarks.tasks import Rows, Task, Texts
from tools.execute import commit, processor
from transferkit import figures

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("torch", "numpy", "scikit-learn", "transformers", "accelerate", "lightning", "fastai",
            "skorch", "timm")  # fmt: skip
CPU = torch.device("cpu")
Row = dict[str, Any]


def say(text: str) -> None:
    """One line on how far the measurement is."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Discard what libraries write to the terminal: the benchmark would time the terminal."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def timed(system: System, task: Task) -> tuple[float, nn.Module]:
    """Seconds that a system takes to train a fresh model, and that model.

    The model is made before the clock starts; loaders, optimizers and trainers after.
    """
    model = task.build()
    gc.collect()
    with silence():
        torch.manual_seed(task.seed)
        start = time.perf_counter()
        system.train(model, task)
        if task.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start, model


def moments(system: System, task: Task) -> tuple[list[float], float]:
    """When each update of a run ended, in seconds after the first, and the seconds of the whole.

    A hook behind the optimizer's step notes them, so that what a system does once (loaders,
    trainers, a feature cache) can be told apart from what it does in every step.
    """
    clock = Clock(task.device)
    hook = register_optimizer_step_post_hook(lambda *_: clock.mark())
    try:
        whole, _ = timed(system, task)
    finally:
        hook.remove()
    return clock.moments(), whole


class Clock:
    """Moments in the time of a device.

    On a CUDA card they are events, which the card notes when it has done what was asked of it
    before; the host does not wait for them. Elsewhere they are the host's time.
    """

    def __init__(self, device: str | torch.device):
        self.cuda = torch.device(device).type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Note this moment."""
        mark = torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter()
        if self.cuda:
            mark.record()
        self._marks.append(mark)

    def moments(self) -> list[float]:
        """The seconds of each mark after the first one; waits for the device."""
        if not self.cuda:
            return [mark - self._marks[0] for mark in self._marks]
        torch.cuda.synchronize()
        return [self._marks[0].elapsed_time(mark) / 1e3 for mark in self._marks]


def warm_up(system: System, task: Task) -> None:
    """Train on two batches: imports and first calls must not be timed."""
    timed(system, task.but(data=task.data.first(2 * task.batch_size), epochs=1))


def turns(
    what: str, candidates: Mapping[str, Callable[[int], float]], repeats: int
) -> dict[str, list[float]]:
    """Let candidates take turns; each round begins with another one.

    What was imported for all of them is put out of the garbage collector's sight, for some of them
    call it, and would pay for the others.

    Args:
        candidates: functions of the number of the round that return seconds.

    Returns:
        The seconds of every candidate, one number a round.
    """
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.freeze()
    for turn in range(repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(candidates[name](turn))
            say(f"{what}, round {turn + 1} of {repeats}: {name} {seconds[name][-1]:.3f} s")
    gc.unfreeze()
    return seconds


def accuracy(model: nn.Module, data: Rows | Texts) -> float:
    """The share of right answers, by one function for all systems, in float32."""
    where = {"precision": "fp32", "device": "cpu"}
    return tk.evaluate(model, tk.classification(), data.source(), [tk.accuracy], **where)[
        "accuracy"
    ]


def precision(system: System, device: torch.device = CPU) -> str:
    """What a system computes in here: bf16 where it is tuned and the device good at it.

    Never fp16, for the loops written by hand do not scale the loss.
    """
    good = tk.devices.resolve_precision("auto", device)
    return good if system.tuned and good != "fp16" else "fp32"


def absent(system: System) -> Row:
    """The row of a system that is not installed."""
    say(f"{system.name}: not installed ({', '.join(system.missing())})")
    return {"system": system.name, "missing": system.missing()}


def table(
    title: str, columns: Sequence[tuple[str, str, str]], rows: Sequence[Row],
    chart: tuple[str, str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A table as the result file holds it.

    Args:
        columns: key in the rows, heading, format of a number ("" for text).
        chart: of the column that is also drawn: key, label of the axis, "linear" or "log".
    """
    return {"title": title, "columns": columns, "rows": list(rows), "chart": chart}


def notes(systems: Sequence[System]) -> dict[str, Sequence[str]]:
    """The deviations that the tables must be read with."""
    return {system.name: system.notes for system in systems if system.notes}


def about(repeats: int, tiny: bool, started: float, device: str = "cpu") -> Row:
    """The machine, the versions, the circumstances of a measurement that began at `started`."""
    versions = {"python": platform.python_version()}
    for name in VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "seconds": time.time() - started,
        "repeats": repeats,
        "tiny": tiny,
        "device": device,
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(pages / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "precision": tk.devices.resolve_precision("auto", torch.device(device)),
        "compiler": compiler(),
        "versions": versions,
        "commit": commit(ROOT),
    }


def compiler() -> str | None:
    """The name of the C++ compiler that torch would use, if there is one."""
    return next(filter(shutil.which, (os.environ.get("CXX") or "g++", "c++", "clang++")), None)


def load() -> float:
    """How many programs wanted the processor in the last minute, on average."""
    return round(os.getloadavg()[0], 2)


def save(folder: Path, parts: Mapping[str, Any], targets: Sequence[Row]) -> None:
    """Write `benchmarks.json`, and a chart for every table that has one."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"parts": parts, "targets": targets}, indent=1, ensure_ascii=False)
    partial = folder / "benchmarks.json.partial"
    partial.write_text(text + "\n", "utf-8")
    os.replace(partial, folder / "benchmarks.json")
    for part in parts.values():
        for name, found in part["tables"].items():
            if found["chart"]:
                _draw(folder / f"benchmarks-{name}.svg", found)


def _draw(path: Path, found: Mapping[str, Any]) -> None:
    # Bars, or dots on a logarithmic axis, where a bar's length would mean nothing; each with its
    # number.
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    key, label, scale = found["chart"]
    rows = [row for row in found["rows"] if row.get(key)]
    names, values = [row["system"] for row in rows], [row[key] for row in rows]
    figures.use_style()
    plt.rcParams["svg.fonttype"], plt.rcParams["svg.hashsalt"] = "path", "transferkit"
    figure, axis = plt.subplots(figsize=(7.0, 1.3 + 0.42 * len(rows)))
    colours = figures.COLOURS
    ours = [colours["blue" if name.startswith("transferkit") else "sky"] for name in names]
    if scale == "log":
        axis.scatter(values, names, color=ours, s=80)
    else:
        axis.barh(names, values, color=ours)
    for at, value in enumerate(values):
        how = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
        axis.annotate(_short(value), (value, at), **how)
    axis.margins(x=0.18)
    axis.set(xlabel=label, ylabel="system", xscale=scale)
    if scale == "linear":
        axis.locator_params(axis="x", nbins=5)
        axis.xaxis.set_major_formatter("{x:,g}")
    axis.invert_yaxis()
    axis.grid(axis="y", visible=scale == "log")
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
