"""What a person sees of a model and a run. The one idea: looking changes nothing.

Tables, the progress bar, the curves and the model card are made from plain rows and numbers that
the engine hands over; no training code depends on what is shown.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class Table(list[dict[str, Any]]):
    """Rows (dictionaries with mostly the same keys) that print as a table."""

    def __repr__(self) -> str:
        names = list(dict.fromkeys(name for row in self for name in row))
        cells = [names, *([_cell(row.get(name)) for name in names] for row in self)]
        widths = [max(len(row[at]) for row in cells) for at in range(len(names))]
        words = [all(isinstance(row.get(name, ""), str) for row in self) for name in names]
        return "\n".join(
            "  ".join(
                text.ljust(width) if is_word else text.rjust(width)
                for text, width, is_word in zip(row, widths, words, strict=True)
            ).rstrip()
            for row in cells
        )

    __str__ = __repr__


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def choices(
    history: Sequence[dict[str, Any]], best: Mapping[str, Any] | None, report: Mapping[str, Any],
    metrics: Sequence[Callable[..., float]],
) -> Table:  # fmt: skip
    """The history as a table or, if something was reported, its chosen, last and oracle epochs.

    Args:
        report: what was reported, by name; the oracle is the best epoch on the last one.
        metrics: the first one says which epoch is the best, else the loss.
    """
    if not report or not history or best is None:
        return Table(history)
    name = metrics[0].__name__ if metrics else "loss"
    higher = bool(metrics) and getattr(metrics[0], "higher_is_better", True)
    key = f"{list(report)[-1]} {name}"
    known = [row for row in history if math.isfinite(row.get(key, math.nan))]
    rows = {"chosen": best, "last": history[-1]}
    if known:
        rows["oracle"] = (max if higher else min)(known, key=lambda row: row[key])
    return Table({"": which, **row} for which, row in rows.items())


class Bar:
    """A progress bar where somebody looks, on a terminal or in a notebook; silent elsewhere.

    Args:
        show: whether to show it; None decides by where it would go and TRANSFERKIT_PROGRESS.
    """

    def __init__(self, show: bool | None):
        if show is None:
            shell = sys.modules.get("IPython")
            kernel = shell is not None and "ZMQ" in type(shell.get_ipython()).__name__
            wanted = os.environ.get("TRANSFERKIT_PROGRESS") != "0"
            show = wanted and (kernel or sys.stderr.isatty())
        self.show = show
        self.bar: Any = None

    def begin(self, name: str, updates: int, done: int) -> None:
        """Start the bar of a phase."""
        self.close()
        if self.show:
            with warnings.catch_warnings():  # tqdm may miss the widgets of notebooks
                warnings.simplefilter("ignore")
                from tqdm.auto import tqdm
            self.bar = tqdm(total=updates, initial=done, desc=name, unit="update")

    def advance(self) -> None:
        """One update was made."""
        if self.bar is not None:
            self.bar.update()

    def note(self, row: Mapping[str, Any]) -> None:
        """Show the numbers of an epoch beside the bar."""
        if self.bar is not None:
            self.bar.set_postfix({n: f"{v:.4g}" for n, v in row.items() if isinstance(v, float)})

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def curves(
    history: Sequence[Mapping[str, Any]], metrics: Sequence[str], starts: Sequence[int] = ()
) -> Any:
    """A matplotlib figure of losses and metrics over the epochs, phases divided by lines.

    A value that is NaN leaves a gap; what was never measured is not drawn.

    Args:
        metrics: names of those in the history.
        starts: how many epochs were finished when each phase began.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in history]
    lines = {n: [row.get(n, math.nan) for row in history] for n in ("train_loss", "loss", *metrics)}
    lines = {n: values for n, values in lines.items() if any(map(math.isfinite, values))}
    panels = {"loss": [n for n in lines if n not in metrics]}
    panels["on validation data"] = [n for n in lines if n in metrics]
    panels = {title: names for title, names in panels.items() if names or title == "loss"}
    figure = Figure(figsize=(6.0, 2.8 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        ends = []
        for name in names:
            (line,) = axis.plot(epochs, lines[name], marker="o", markersize=3)
            last = max(at for at, value in enumerate(lines[name]) if math.isfinite(value))
            ends.append((lines[name][last], epochs[last], name, line.get_color()))
        low, high = axis.get_ylim()
        height = -math.inf
        for value, epoch, name, color in sorted(ends):  # names of lines that meet stand apart
            height = max(value, height + 0.09 * (high - low))
            place = {"xytext": (epoch, height), "va": "center", "color": color}
            axis.annotate(f"  {name}", (epoch, value), **place)
        for start in starts[1:]:
            if start < len(epochs):
                axis.axvline(start + 0.5, color="0.7", linewidth=0.8)
        axis.set(xlabel="epoch", ylabel=title)
        if epochs:
            axis.set_xlim(epochs[0] - 0.5, epochs[-1] + max(0.5, 0.25 * len(epochs)))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def rate_curve(
    rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float],
    suggestion: float | None,
) -> Any:  # fmt: skip
    """A matplotlib figure of the losses that `lr_find` met over the rate, with its suggestion."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 3.2), layout="constrained")
    axis = figure.subplots()
    axis.plot(rates, losses, color="0.7", linewidth=0.8, label="each batch")
    axis.plot(rates, smoothed, label="running mean")
    if suggestion is not None:
        label = f"falls fastest, {suggestion:.2g}"
        axis.axvline(suggestion, color="0.3", linestyle="--", linewidth=0.8, label=label)
    axis.set(xscale="log", xlabel="learning rate", ylabel="loss")
    fall = smoothed[0] - min(smoothed)
    if fall > 0:  # the fall fills the picture; the losses at the end would leave none of it
        axis.set_ylim(min(smoothed) - fall / 2, smoothed[0] + fall)
    axis.legend()
    return figure


_UNKNOWN = "Not stated."
_SETTINGS = ("seed", "batch_size", "accumulate", "precision", "clip", "patience", "restore")


def card(about: Mapping[str, Any], parameters: int) -> str:
    """A model card in Markdown (Mitchell et al. 2019), from what `checkpoint.save_model` stores.

    It states what the run knows and what the notes add; of the rest it says that it is not stated.
    """
    result, notes = about["result"], dict(about["notes"])
    task = [f"- Objective: `{result['objective']}`"] if "objective" in result else []
    if about["labels"]:
        task.append(f"- Labels: {', '.join(map(str, about['labels']))}")
    training = [_phase_line(phase) for phase in result.get("plan", [])]
    training += [f"- {name}: {result[name]}" for name in _SETTINGS if name in result]
    load = "tk.load(directory)" if about["recipe"] else "tk.load(directory, model=...)"
    sections = {
        "Task": task,
        "Intended use": [],
        "Limitations": [],
        "Data": [_data_line(*part) for part in result.get("data", {}).items()],
        "Training": training,
        "Results": _results(result),
        "Versions": [f"- {name} {version}" for name, version in about["versions"].items()],
        "How to load": ["```python", "import transferkit as tk", "", f"model = {load}", "```"],
    }
    start = about["weights_hash"]
    origin = f", from the pre-trained weights `{start}`" if start else ""
    lines = [f"# {about['name']}", "", f"{parameters:,} parameters{origin}.", ""]
    for heading, facts in sections.items():
        known = [part for part in (notes.pop(heading, ""), "\n".join(facts)) if part]
        lines += [f"## {heading}", "", "\n\n".join(known) or _UNKNOWN, ""]
    for heading, text in notes.items():
        lines += [f"## {heading}", "", text, ""]
    return "\n".join(lines)


def _phase_line(phase: Mapping[str, Any]) -> str:
    values = {name: value for name, value in phase.items() if value is not None and value != ()}
    name = values.pop("name")
    return f"- Phase `{name}`: {', '.join(f'{key} {value}' for key, value in values.items())}"


def _data_line(part: str, known: Mapping[str, Any]) -> str:
    facts = [known["name"]] if known["name"] else []
    facts.append(f"{known['items']:,} items")
    facts += [f"{key} `{known[key]}`" for key in known if key.endswith("sha256")]
    return f"- {'training' if part == 'data' else part}: {', '.join(facts)}"


def _results(result: Mapping[str, Any]) -> list[str]:
    best = dict(result.get("best epoch") or {})
    if not best:
        return []
    epoch, phase = best.pop("epoch"), best.pop("phase")
    best.pop("seconds", None)
    scored = best.keys() - {"train_loss", "skipped"}
    where = "validation data, but for train_loss" if scored else "training data"
    if any(" " in name for name in scored):
        where += " and for what names other data"
    lines = [f"Epoch {epoch}, in the phase `{phase}`, on the {where}:", ""]
    return lines + [f"- {name}: {_cell(value)}" for name, value in best.items()]
