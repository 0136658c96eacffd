"""The laws that hold for any library that trains, and what each library answers.

Every law is a function of an adapter: it makes a task, has it trained, and returns a deviation that
is 0 where the law holds. Nothing in here knows a library. `make peers` asks all of them, in the
peers' own environment, and writes `book/recorded/peer-laws.json`; the book's tests ask transferkit
again. Everything runs in float64 on one thread of the CPU, in one process, within a few minutes.
"""

from __future__ import annotations

import json
import math
import platform
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.peers.adapters.base import Adapter
from benchmarks.peers.tasks import (
    Task,
    Witness,
    cross_entropy,
    distance,
    items,
    network,
    run,
    state_of,
    twin_in_inference,
)
from benchmarks.threads import one_thread

RECORD = Path(__file__).resolve().parents[2] / "book" / "recorded" / "peer-laws.json"
ADAPTERS = {
    "transferkit": "own.Transferkit",
    "hf-trainer": "hf_trainer.HFTrainer",
    "hf-trainer-counted": "hf_trainer.HFTrainerCounted",
    "accelerate": "accelerate_loop.Accelerate",
    "lightning": "lightning_module.Lightning",
    "fastai": "fastai_learner.Fastai",
}
WEIGHTS = (0.3, 1.0, 2.5)
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Found:
    """What a measurement gave: a deviation, 0 where the law holds, and how a table says it."""

    figure: float
    shown: str = ""


@dataclass(frozen=True)
class Law:
    """One law: its number among those of the library, what it asks, and how that is measured."""

    key: str
    number: int
    asks: str
    figure: str
    tolerance: float
    measure: Callable[..., Found]

    @property
    def limit(self) -> str:
        """The tolerance in words: a power of ten, or nothing where it is 0."""
        if not self.tolerance:
            return ""
        return "10" + f"{math.log10(self.tolerance):.0f}".translate(_RAISED)

    def about(self) -> dict:
        """What a record says of it."""
        named = ("number", "asks", "figure", "tolerance", "limit")
        return {name: getattr(self, name) for name in named}


LAWS: list[Law] = []


def law(key: str, number: int, asks: str, figure: str, tolerance: float = 0.0) -> Callable:
    """Declare a function of an adapter to measure a law."""

    def declare(measure: Callable[..., Found]) -> Callable[..., Found]:
        LAWS.append(Law(key, number, asks, figure, tolerance, measure))
        return measure

    return declare


# Law 1: accumulation -----------------------------------------------------------------------


def _first_update(adapter: Adapter, count: int, options: dict, **given: Any) -> Found:
    # One update by plain descent at rate 1 is the gradient; it is compared with torch's of one
    # batch that holds all items.
    inputs, labels = items(count, tokens=given.pop("tokens", None))
    model, reference = network(), network()
    weights = given.get("class_weights")
    cross_entropy(reference(inputs), labels, weights).backward()
    gradient = torch.cat([p.grad.flatten() for p in reference.parameters()])
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    task = Task(model, (inputs, labels), accumulate=4, lr=1.0, clips=False, **given)
    witness = run(adapter, task, **options)
    update = before - torch.cat([p.detach().flatten() for p in model.parameters()])
    if len(witness.trained) == 0:
        return Found(1.0, "no update in the epoch")
    return _compared(update, gradient)


def _compared(update: Tensor, gradient: Tensor) -> Found:
    error = float((update - gradient).norm() / gradient.norm())
    times = float(update @ gradient / (gradient @ gradient))
    straight = float((update - times * gradient).norm() / gradient.norm()) < 1e-6
    percent = f"{100 * error:.3g} %"
    if straight and error > 1e-6:
        percent += f" (× {times:.3f})"
    return Found(error, percent)


_UPDATE = "relative error of the update"


@law("accumulate.equal", 1, "Four equal micro-batches train like one batch", _UPDATE, 1e-6)
def accumulate_equal(adapter: Adapter, **options: Any) -> Found:
    return _first_update(adapter, 16, options)


@law("accumulate.short", 1, "… and a last group of two instead of four", _UPDATE, 1e-6)
def accumulate_short(adapter: Adapter, **options: Any) -> Found:
    return _first_update(adapter, 8, options)


@law("accumulate.ragged", 1, "… and a last batch of two items instead of four", _UPDATE, 1e-6)
def accumulate_ragged(adapter: Adapter, **options: Any) -> Found:
    return _first_update(adapter, 14, options)


@law("accumulate.weighted", 1, "… and classes of different weight", _UPDATE, 1e-6)
def accumulate_weighted(adapter: Adapter, **options: Any) -> Found:
    return _first_update(adapter, 16, options, class_weights=WEIGHTS)


@law("accumulate.tokens", 1, "… and a loss per token, in unequal sequences", _UPDATE, 1e-6)
def accumulate_tokens(adapter: Adapter, **options: Any) -> Found:
    return _first_update(adapter, 16, options, tokens=6)


# Law 2: frozen means frozen ----------------------------------------------------------------


def _frozen(adapter: Adapter, model: nn.Module, options: dict, **given: Any) -> None:
    task = Task(model, items(20), frozen=True, epochs=3, **given)
    run(adapter, task, **options)


@law("frozen.buffers", 2, "A frozen BatchNorm keeps its statistics", "largest drift")
def frozen_buffers(adapter: Adapter, **options: Any) -> Found:
    model = network(normalise="batch")
    before = state_of(model)
    _frozen(adapter, model, options)
    kept = [name for name in before if "running" in name]
    after = state_of(model)
    drift = distance({n: before[n] for n in kept}, {n: after[n] for n in kept})
    return Found(drift, _number(drift))


@law("frozen.output", 2, "… and computes in training what it computes in use", "largest difference")
def frozen_output(adapter: Adapter, **options: Any) -> Found:
    model = network(normalise="batch")
    twin, differences = twin_in_inference(model), []

    def compare(module, inputs, output):
        if torch.is_grad_enabled():
            differences.append(float((output - twin.backbone(*inputs)).abs().max()))

    model.backbone.register_forward_hook(compare)
    _frozen(adapter, model, options)
    return Found(max(differences), _number(max(differences)))


@law("frozen.dropout", 2, "Dropout in a frozen part is off", "share of the batches")
def frozen_dropout(adapter: Adapter, **options: Any) -> Found:
    model, modes = network(dropout=0.5), []

    def look(module, inputs, output):
        if torch.is_grad_enabled():
            modes.append(module.training)

    model.backbone.dropout.register_forward_hook(look)
    _frozen(adapter, model, options)
    share = sum(modes) / len(modes)
    return Found(share, f"on in {100 * share:.0f} %" if share else "off")


def _moved(adapter: Adapter, options: dict, names: tuple[str, ...]) -> Found:
    model = network(normalise="batch")
    before = {n: p.detach().clone() for n, p in model.backbone.named_parameters()}
    _frozen(adapter, model, options, optimizer="adamw", weight_decay=0.5)
    after = dict(model.backbone.named_parameters())
    kept = [name for name in before if name.startswith(names)]
    change = distance({n: before[n] for n in kept}, {n: after[n] for n in kept})
    return Found(change, _number(change))


@law("frozen.decay", 2, "Frozen weights do not move, weight decay or not", "largest change")
def frozen_decay(adapter: Adapter, **options: Any) -> Found:
    return _moved(adapter, options, ("linear", "hidden"))


@law("frozen.norm", 2, "… nor do the weights of a frozen BatchNorm", "largest change")
def frozen_norm(adapter: Adapter, **options: Any) -> Found:
    return _moved(adapter, options, ("norm",))


# Law 4: resuming ---------------------------------------------------------------------------

_CUT = 8  # updates: two batches into the second epoch of six


def _resumed(
    adapter: Adapter, options: dict, dropout: float = 0.0
) -> tuple[float, Witness, Witness]:
    def task(folder: str, **given: Any) -> Task:
        model = network(dropout=dropout)
        return Task(model, items(22), epochs=2, keeps=True, directory=Path(folder), **given)

    with tempfile.TemporaryDirectory() as folder:
        whole = task(folder)
        run(adapter, whole, **options)
    with tempfile.TemporaryDirectory() as folder:
        first = run(adapter, task(folder), stop_after=_CUT, **options)
        again = task(folder, resume=True)
        second = run(adapter, again, **options)
    return distance(state_of(whole.model), state_of(again.model)), first, second


_ONCE = "A run cut off in mid-epoch sees every item of that epoch once"


@law("resume.items", 4, _ONCE, "items repeated or left out")
def resume_items(adapter: Adapter, **options: Any) -> Found:
    _, first, second = _resumed(adapter, options)
    seen = Counter(i for update in first.trained[6:] + second.trained for i in update)
    repeated = sum(count - 1 for count in seen.values())
    missed = sum(i not in seen for i in range(22))
    shown = f"{repeated} repeated, {missed} left out" if repeated + missed else "none"
    return Found(repeated + missed, shown)


@law("resume.weights", 4, "… and ends like one that was not cut off", "largest difference")
def resume_weights(adapter: Adapter, **options: Any) -> Found:
    difference, _, _ = _resumed(adapter, options)
    return Found(difference, _number(difference))


@law("resume.dropout", 4, "… with dropout, too", "largest difference")
def resume_dropout(adapter: Adapter, **options: Any) -> Found:
    difference, _, _ = _resumed(adapter, options, 0.3)
    return Found(difference, _number(difference))


# Law 5: evaluation -------------------------------------------------------------------------


def _losses(adapter: Adapter, weights: tuple[float, ...] | None, options: dict) -> Found:
    held_out, found = items(10, seed=1), []
    for size in (1, 3, 4, 10):
        model = network(dropout=0.5)
        task = Task(model, items(8), held_out, class_weights=weights, batch_size=size)
        found.append(_evaluated(adapter, task, size, options)[0])
    spread = max(found) / min(found) - 1
    return Found(spread, f"{100 * spread:.2g} %")


def _evaluated(adapter: Adapter, task: Task, size: int, options: dict) -> tuple[float, Counter]:
    witness, losses = Witness(task.model), []

    class Once:
        def train(self, task: Task) -> None:
            losses.append(adapter.evaluate(task, size, **options))

    run(Once(), task)
    return losses[0], Counter(witness.seen)


_LOSS = "largest to smallest, in batches of 1, 3, 4 and 10"


@law("evaluate.loss", 5, "The mean loss does not depend on the batch size", _LOSS, 1e-6)
def evaluate_loss(adapter: Adapter, **options: Any) -> Found:
    return _losses(adapter, None, options)


@law("evaluate.weighted", 5, "… nor with classes of different weight", _LOSS, 1e-6)
def evaluate_weighted(adapter: Adapter, **options: Any) -> Found:
    return _losses(adapter, WEIGHTS, options)


@law("evaluate.items", 5, "Every item is evaluated once", "items left out or seen twice")
def evaluate_items(adapter: Adapter, **options: Any) -> Found:
    task = Task(network(), items(8), items(10, seed=1))
    _, seen = _evaluated(adapter, task, 4, options)
    wrong = sum(seen[i] != 1 for i in range(10))
    return Found(wrong, f"{wrong} of 10" if wrong else "none")


# Law 6: parameter groups -------------------------------------------------------------------


@law("groups.decay", 6, "Biases and normalisation weights are not decayed", "parameters decayed")
def groups_decay(adapter: Adapter, **options: Any) -> Found:
    # AdamW's decay is added to the update: whatever ends elsewhere with decay than without has it.
    ends = []
    for decay in (0.5, 0.0):
        model = network(normalise="layer")
        given = {"optimizer": "adamw", "weight_decay": decay, "batch_size": 8}
        run(adapter, Task(model, items(8), **given), **options)
        ends.append(dict(model.named_parameters()))
    moved = [n for n, p in ends[0].items() if not torch.equal(p, ends[1][n])]
    flat = [n for n, p in ends[0].items() if p.dim() == 1]
    decayed = [name for name in moved if name in flat]
    if "head.weight" not in moved:
        raise RuntimeError(f"{adapter.key} decays no weight at all: nothing was measured")
    return Found(len(decayed), f"{len(decayed)} of {len(flat)}")


@law("groups.equal", 6, "Unfreezing takes up all parameters, those of equal value too", "left out")
def groups_equal(adapter: Adapter, **options: Any) -> Found:
    model = network()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()  # as many start
    before = {n: p.detach().clone() for n, p in model.backbone.named_parameters()}
    task = Task(model, items(12), frozen=True, epochs=2, unfreeze_at=1)
    run(adapter, task, **options)
    after = dict(model.backbone.named_parameters())
    left = [name for name in before if torch.equal(before[name], after[name])]
    return Found(len(left), f"{len(left)} of {len(before)}" + "".join(f": `{n}`" for n in left))


@law("groups.rates", 6, "Two rates keep their ratio under a schedule", "largest error", 1e-6)
def groups_rates(adapter: Adapter, **options: Any) -> Found:
    task = Task(network(), items(24), epochs=2, lr=(0.01, 0.1), schedule="linear")
    rates = run(adapter, task, **options).rates
    if len({head for _, head in rates}) < 3:
        raise RuntimeError(f"{adapter.key} follows no schedule: {rates}")
    worst = max(abs(backbone / head / 0.1 - 1) for backbone, head in rates)
    return Found(worst, f"{100 * worst:.2g} %")


# Laws 7, 9 and 10: unused parameters, the best epoch, reads --------------------------------


@law("unused", 7, "Trainable parameters that no loss reaches are named", "not named")
def unused(adapter: Adapter, **options: Any) -> Found:
    said = run(adapter, Task(network(unused=True), items(8)), **options).said
    missing = sum(f"spare.{name}" not in said for name in ("weight", "bias"))
    return Found(missing, f"{missing} of 2" if missing else "none")


def _chosen(
    adapter: Adapter, values: list[float], wanted: int, options: dict, **given: Any
) -> Found:
    # Which epoch's weights the model ends with, when the epochs score like this.
    model, told, states = network(), iter(values), []

    def score() -> float:
        states.append(state_of(model))
        return next(told)

    given |= {"held_out": items(4, seed=1), "epochs": len(values), "score": score}
    run(adapter, Task(model, items(8), **given), **options)
    end = [distance(state, state_of(model)) for state in states]
    kept = end.index(min(end)) + 1
    return Found(end[wanted - 1], f"epoch {kept}, best was {wanted}")


_BEST = "distance from the best weights"


@law("best.nan", 9, "An epoch that scored NaN is never the best", _BEST)
def best_nan(adapter: Adapter, **options: Any) -> Found:
    return _chosen(adapter, [math.nan, 0.3, 0.9, 0.5], 3, options, best=True)


@law("best.restored", 9, "The best weights are restored by default", _BEST)
def best_restored(adapter: Adapter, **options: Any) -> Found:
    return _chosen(adapter, [0.3, 0.9, 0.5, 0.2], 2, options)


class _Reads(TorchDispatchMode):
    """Counts what waits for a value: the operators that hand one to Python."""

    NAMES = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::equal")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator._schema.name in self.NAMES
        return operator(*args, **(kwargs or {}))


class _Copies(TorchFunctionMode):
    """Counts calls of `Tensor.cpu`, which wait for the device where there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function is Tensor.cpu
        return function(*args, **(kwargs or {}))


@law("reads", 10, "A step waits for no value of the device", "reads an update")
def reads(adapter: Adapter, **options: Any) -> Found:
    # The difference of 40 and 20 updates: what an epoch reads once does not count. By plain
    # descent, for on a CPU the counters of other optimizers are read without any waiting.
    counts = []
    for updates in (20, 40):
        with _Reads() as values, _Copies() as copies:
            run(adapter, Task(network(), items(4 * updates)), listens=False, **options)
        counts.append(values.count + copies.count)
    each = (counts[1] - counts[0]) / 20
    return Found(each, f"{each:.3g}")


# Asking ------------------------------------------------------------------------------------


def _number(value: float) -> str:
    return f"{value:.2g}"


def _told(given: dict[str, Any], key: str) -> Any:
    # What an adapter says for a law: for this very law, or for all of its kind.
    return given.get(key, given.get(key.partition(".")[0]))


def adapter_of(key: str) -> Adapter:
    """The adapter of a system by its key, which imports its library."""
    module, _, name = ADAPTERS[key].partition(".")
    return getattr(import_module(f"benchmarks.peers.adapters.{module}"), name)()


def asked(adapter: Adapter) -> Iterator[tuple[Law, list[dict]]]:
    """Every law with what an adapter answers: the defaults first, then its settings."""
    for each in LAWS:
        why = _told(adapter.not_offered, each.key)
        rows = []
        if why is None:
            rows.append(_row(each, adapter, "", {}))
        else:
            rows.append({"setting": "", "outcome": "not offered", "figure": None, "shown": why})
        for setting, options in (_told(adapter.settings, each.key) or {}).items():
            rows.append(_row(each, adapter, setting, options))
        yield each, rows


def _row(each: Law, adapter: Adapter, setting: str, options: dict) -> dict:
    found = each.measure(adapter, **options)
    holds = found.figure <= each.tolerance
    shown = found.shown
    if holds and found.figure > 0:
        shown = f"below {each.limit}"
    return {
        "setting": setting,
        "outcome": "holds" if holds else "differs",
        "figure": found.figure,
        "shown": shown,
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _library_head() -> dict:
    from benchmarks.peers.adapters import hf_trainer

    found = {}
    for accumulate in (1, 4):
        with tempfile.TemporaryDirectory() as folder:
            update, gradient = hf_trainer.first_update_of_a_library_head(accumulate, folder)
        found[str(accumulate)] = float(update @ gradient / (gradient @ gradient))
    return found


def main() -> None:
    """Ask every library and write the record."""
    systems, results = {}, {each.key: {} for each in LAWS}
    with one_thread():
        for key in ADAPTERS:
            adapter = adapter_of(key)
            systems[key] = {
                "title": adapter.title,
                "packages": list(adapter.packages),
                "setup": adapter.setup,
                "notes": adapter.notes,
            }
            for each, rows in asked(adapter):
                results[each.key][key] = rows
                print(f"{key:20} {each.key:20}", *(f"{r['setting']} {r['shown']};" for r in rows))
        head = _library_head()
    packages = sorted({p for system in systems.values() for p in system["packages"]} | {"torch"})
    own = import_module("transferkit").__version__
    versions = {p: own if p == "transferkit" else metadata.version(p) for p in packages}
    record = {
        "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": _processor(), "threads": 1, "device": "cpu"},
        "versions": {"python": platform.python_version(), **versions},
        "laws": {each.key: each.about() for each in LAWS},
        "systems": systems,
        "results": results,
        "library_head": head,
    }
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
