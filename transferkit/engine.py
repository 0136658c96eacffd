"""Training, evaluation, prediction. The one idea: one optimizer step at a time, and nothing hidden.

`Training.step` is the whole of what happens in a step. A run's state is the model, the optimizer's
moments and a few counters; order and augmentation follow from (seed, epoch), dropout and the
learning rate from (seed, update). So the state can be stored between any two steps, and a run that
resumes from it does not differ from one that was never interrupted.
"""

from __future__ import annotations

import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from transferkit import cache, checkpoint, data, devices, layers, optim, plan, show
from transferkit.objectives import Loss, forward
from transferkit.plan import Phase, check, require

_LOOK_EVERY = 50  # updates between two looks at the losses: each look waits for the device
_DECIDE_RESULT = (
    "monitor", "patience", "batch_size", "accumulate", "precision", "clip", "seed", "restore",
)  # fmt: skip


@dataclass(frozen=True)
class Predictions:
    """What a model says about each item, in the order of the data.

    Attributes:
        logits: float32 `(n, C)`.
        labels: `(n,)`, or None where the data have none.
        index: int64 `(n,)`, the items' numbers.
    """

    logits: np.ndarray
    labels: np.ndarray | None
    index: np.ndarray

    @property
    def probabilities(self) -> np.ndarray:
        """The softmax of the logits, float32 `(n, C)`."""
        powers = np.exp(self.logits - self.logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    @property
    def classes(self) -> np.ndarray:
        """The number of the largest logit, int64 `(n,)`."""
        return self.logits.argmax(axis=1)


def _outputs(model, outputs, source, batch_size, autocast, device) -> tuple[Tensor, data.Batch]:
    # The outputs for the whole source, float32 on the host in the order of the items, and a batch
    # that holds all labels. The modes of the modules are as before when it returns.
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but at least 1 is expected: try 64")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    batches = data.in_sequence(len(source), batch_size, source.lengths)
    found, labels = [], []
    try:
        # not inference_mode: what a model caches now must serve in training later
        with torch.no_grad():
            for batch in data.stream(source, batches, None, 0):
                with autocast():
                    found.append(outputs(model, batch.to(device)).float())
                labels.append(batch.labels)
    finally:
        for module, mode in modes:
            module.training = mode
    back = torch.from_numpy(np.argsort(np.concatenate(batches), kind="stable"))
    known = None if labels[0] is None else torch.cat(labels)[back]
    everything = data.Batch({}, known, torch.arange(len(source)))
    return torch.cat(found).cpu()[back], everything


def _scores(objective, metrics, outputs: Tensor, batch: data.Batch) -> dict[str, float]:
    # From all outputs at once, so that no score depends on how they were batched.
    if batch.labels is None:
        raise ValueError("the data have no labels to score: use predict for unlabelled data")
    logits, labels = outputs.numpy(), batch.labels.cpu().numpy()
    scores = {"loss": float(objective.loss(outputs, batch).mean())}
    return scores | {metric.__name__: float(metric(logits, labels)) for metric in metrics}


def predict(
    model: nn.Module, data: Any, batch_size: int = 64, *, precision: str = "auto",
    device: str | torch.device | None = None,
) -> Predictions:  # fmt: skip
    """What the model says about every item, once, in the order of the data.

    Args:
        model: called in eval mode; its training modes are as before afterwards.
        data: a source, a pair of tensors, a torch data set, or a split the model can prepare.
        batch_size: changes speed and memory alone.
        precision, device: as in `fit`; None leaves the model where it is.

    Raises:
        ValueError: the data are empty or `batch_size` is below 1.
    """
    settings = (data, batch_size, precision, device)
    outputs, batch = _apply(model, lambda part, batch: forward(part, batch.inputs), *settings)
    labels = None if batch.labels is None else batch.labels.cpu().numpy()
    return Predictions(outputs.numpy(), labels, batch.index.numpy())


def evaluate(
    model: nn.Module, objective: Any, data: Any, metrics: Sequence[Callable] = (),
    batch_size: int = 64, *, precision: str = "auto", device: str | torch.device | None = None,
) -> dict[str, float]:  # fmt: skip
    """The mean loss and the metrics of a model on data: `{"loss": ..., "accuracy": ...}`.

    Every item counts once; the scores are computed from all outputs together.

    Args:
        metrics: functions of logits `(n, C)` and labels `(n,)`, both arrays; else as in `predict`.

    Raises:
        ValueError: the data are empty or have no labels, or `batch_size` is below 1.
    """
    outputs, batch = _apply(model, objective.outputs, data, batch_size, precision, device)
    return _scores(objective, metrics, outputs, batch)


def _apply(model, outputs, items, batch_size, precision, device) -> tuple[Tensor, data.Batch]:
    if device is None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
    device = devices.resolve_device(device)
    source = data.as_source(items, model.to(device))
    autocast = devices.autocast(device, devices.resolve_precision(precision, device))
    return _outputs(model, outputs, source, batch_size, autocast, device)


@dataclass
class State:
    """All of a run's state but the tensors: numbers that go into a checkpoint as they are."""

    phase: int = 0  # phases finished
    epoch: int = 0  # epochs finished, in the run
    phase_epoch: int = 0  # epochs finished, in this phase
    batch: int = 0  # batches drawn in this epoch
    update: int = 0  # updates made in this phase
    total: int = 0  # updates made in the run
    sums: list[float] = field(default_factory=list)  # this epoch's totals and counts, term by term
    weights: list[float] = field(default_factory=list)  # of the terms
    seconds: float = 0.0  # spent on this epoch
    feature_seconds: float = 0.0  # what computing cached features took
    best: dict | None = None  # the row of the history with the best value
    history: list[dict] = field(default_factory=list)


class Training:
    """One run of `fit`: what is fixed for the run, what is fixed for a phase, and the state."""

    def __init__(self, model, objective, train, validation, phases, metrics, settings, progress):
        self.model, self.objective, self.metrics = model, objective, metrics
        self.source, self.held_out = train, validation
        self.phases, self.settings, self.progress = phases, settings, show.Bar(progress)
        # what acts once an update: the objective, and the way in which the model is adapted
        acting = (objective, getattr(model, "adaptation", None))
        self.penalties = [part.penalty for part in acting if hasattr(part, "penalty")]
        self.after_update = [part.updated for part in acting if hasattr(part, "updated")]
        self.autocast = devices.autocast(settings.device, settings.precision)
        higher = {m.__name__: getattr(m, "higher_is_better", True) for m in metrics}
        self.stopping = plan.Stopping(higher.get(settings.monitor, False), settings.patience)
        self.allowed = {n for n, p in model.named_parameters() if p.requires_grad}
        self.state, self.best, self.moments = State(), {}, {}
        self.losses: list[tuple[int, Loss]] = []  # (update, loss), since the last look
        self.whole = self.busy = self.stop = self.interrupted = False
        self.saved = self.started = time.monotonic()
        self.save_cost, self.best_file = 0.0, None
        if settings.directory is not None:
            self._resume()

    def run(self) -> None:
        """All phases that are not yet done."""
        while self.state.phase < len(self.phases):
            self._enter(self.phases[self.state.phase])
            while self.state.phase_epoch < self.phase.epochs and not self.stopping.exhausted:
                self._epoch()
            self._leave()

    def _enter(self, phase: Phase) -> None:
        # Build, once, all that depends on what the phase trains.
        self.phase, self.checked, self.whole = phase, False, False
        self.optimizer = optim.build(phase, plan.select(phase, self.model, self.allowed))
        layers.apply_modes(self.model)
        parts = [zip(g["names"], g["params"], strict=True) for g in self.optimizer.param_groups]
        self.parameters = {name: parameter for part in parts for name, parameter in part}
        self.live, self.train, self.validation = self.model, self.source, self.held_out
        if phase.cache:
            self._attach_cache()
        checkpoint.fill_moments(self.model, self.optimizer, self.moments)
        self.moments = {}
        batches = math.ceil(len(self.train) / self.settings.batch_size)
        self.updates = phase.epochs * math.ceil(batches / self.settings.accumulate)
        self.progress.begin(phase.name, self.updates, self.state.update)
        if self.held_out is not None and self.settings.restore == "best":
            # What this phase moves and none before did still has the best epoch's value.
            self.best |= {n: t.clone() for n, t in self._moving().items() if n not in self.best}
        self.whole = True

    @contextmanager
    def _undivided(self) -> Iterator[None]:
        # Ctrl-C waits until this is done; if it fails half-way, the state is not whole any more.
        self.whole, self.busy = False, True
        yield
        self.whole, self.busy = True, False
        if self.stop:
            raise KeyboardInterrupt

    def _attach_cache(self) -> None:
        cache.refuse(self.objective, self.model, self.source)
        prefix, self.live = layers.split(self.model, layers.frozen_prefix(self.model))
        prefix.eval()  # as its modules are already, being frozen
        device, seed = self.settings.device, self.settings.seed

        def compute(part: nn.Module, batch: data.Batch) -> Any:
            with torch.no_grad(), self.autocast():
                return part(batch.to(device).inputs)

        about = f"{self.settings.precision} {device.type}"
        self.train = cache.cached(prefix, self.source, compute, about, seed, augmented=True)
        seconds = self.train.seconds
        if self.held_out is not None:
            self.validation = cache.cached(prefix, self.held_out, compute, about)
            seconds += self.validation.seconds
        if self.state.update == 0:  # counted once, as measured when they were computed
            self.state.feature_seconds += seconds

    def _moving(self) -> dict[str, Tensor]:
        # What training changes in this phase: parameters, and buffers of modules in train mode.
        names = set(self.parameters)
        for path, module in self.model.named_modules():
            if module.training:
                names |= {f"{path}.{name}".lstrip(".") for name in module._buffers}
        return {n: t for n, t in checkpoint.tensors_of(self.model).items() if n in names}

    def _leave(self) -> None:
        with self._undivided(), torch.no_grad():
            own, state = checkpoint.tensors_of(self.model), self.state
            for name, tensor in self.best.items():
                own[name].copy_(tensor)
            state.phase, state.phase_epoch, state.update = state.phase + 1, 0, 0
            self.optimizer = None
            self.stopping.phase_best, self.stopping.waited = None, 0  # of the phase that is done
        self._save()

    def _epoch(self) -> None:
        state, settings = self.state, self.settings
        self.started = time.monotonic()
        batches = self._order()[state.batch :]
        how = (settings.seed, settings.workers, settings.device.type == "cuda")
        stream = data.stream(self.train, batches, state.epoch, *how)
        while micro := list(islice(stream, settings.accumulate)):
            with self._undivided():
                self.step(micro)
                state.batch += len(micro)
                state.update += 1
                state.total += 1
            self._between_steps()
        self._look()
        row = {"epoch": state.epoch + 1, "phase": self.phase.name, "train_loss": self._mean_loss()}
        if self.validation is not None:
            size, outputs = max(64, settings.batch_size), self.objective.outputs
            where = (size, self.autocast, settings.device)
            found = _outputs(self.live, outputs, self.validation, *where)
            row |= _scores(self.objective, self.metrics, *found)
        row["seconds"] = state.seconds + time.monotonic() - self.started
        with self._undivided():
            self._close_epoch(row)
        # At most a tenth of the time goes into storing what short epochs did.
        if time.monotonic() - self.saved >= min(settings.save_every, 10 * self.save_cost):
            self._save()

    def _order(self) -> list[np.ndarray]:
        size, seed = self.settings.batch_size, self.settings.seed
        return data.order(len(self.train), size, seed, self.state.epoch, self.train.lengths)

    def _close_epoch(self, row: dict) -> None:
        state = self.state
        state.history.append(row)
        state.epoch, state.phase_epoch = state.epoch + 1, state.phase_epoch + 1
        state.batch, state.sums, state.seconds = 0, [], 0.0
        self.started = time.monotonic()
        if self.validation is not None and self.stopping.observe(row[self.settings.monitor]):
            state.best = row
            if self.settings.restore == "best":
                self.best |= {name: tensor.clone() for name, tensor in self._moving().items()}
        self.progress.note(row)

    def step(self, micro: Sequence[data.Batch]) -> None:
        """One update of the parameters, by the gradient of the mean over all of `micro`.

        Nothing in here reads a value back from the device: no loss is looked at, and no norm.
        """
        state, phase, device = self.state, self.phase, self.settings.device
        scale = optim.factor(phase.schedule, state.update, self.updates, phase.warmup)
        optim.set_rates(self.optimizer, scale)
        micro = [batch.to(device) for batch in micro]
        counts = None
        if len(micro) > 1:
            # The divisor of the whole step, known before the first backward: so each micro-batch
            # adds its share of the one mean, whatever the sizes.
            counts = tuple(map(sum, zip(*map(self.objective.counts, micro), strict=True)))
        for part, batch in enumerate(micro):
            # the negative number keeps it apart from the augmentation of any item
            devices.seed_dropout(device, data.mix(self.settings.seed, state.total, -1 - part))
            with self.autocast():
                loss = self.objective(self.live, batch)
            value = loss.mean(counts)
            if part == 0:
                for penalty in self.penalties:
                    value = value + penalty(self.model)
            if not self.checked and not value.requires_grad:
                raise ValueError(
                    f"the objective reaches none of the parameters that phase {phase.name!r} "
                    "trains: it must call the model, and detach nothing"
                )
            value.backward()
            self.losses.append((state.total, loss.detach()))
        if not self.checked:
            self._name_unreached()
        if self.settings.clip is not None:
            parameters = self.parameters.values()
            nn.utils.clip_grad_norm_(parameters, self.settings.clip, foreach=True)
        self.optimizer.step()
        for updated in self.after_update:
            updated(self.model, state.update, self.updates)
        self.optimizer.zero_grad(set_to_none=True)

    def _name_unreached(self) -> None:
        self.checked = True
        names = [name for name, p in self.parameters.items() if p.grad is None]
        if names:
            few = f"{len(names)} trainable parameters, the first {', '.join(names[:5])}"
            what = f"the objective does not reach {few}: freeze them, or use their output"
            warnings.warn(what, stacklevel=2)

    def _between_steps(self) -> None:
        if len(self.losses) >= _LOOK_EVERY:
            self._look()
        self.progress.advance()
        if time.monotonic() - self.saved >= self.settings.save_every:
            self._save()

    def _look(self) -> None:
        # The one place of an epoch that waits for the device.
        if not self.losses:
            return
        state, (_, last) = self.state, self.losses[-1]
        columns = zip(*(loss.totals + loss.counts for _, loss in self.losses), strict=True)
        rows = zip(*map(_read, columns), strict=True)
        for (update, _), row in zip(self.losses, rows, strict=True):
            if not all(map(math.isfinite, row)):
                self._fail(update, "the loss became NaN or infinite")
            state.sums = [a + b for a, b in zip(state.sums or [0.0] * len(row), row, strict=True)]
        state.weights = [float(weight) for weight in last.weights]
        self.losses.clear()
        norms = torch._foreach_norm([parameter.detach() for parameter in self.parameters.values()])
        if not math.isfinite(torch.stack(norms).sum().item()):
            self._fail(state.total - 1, "the weights became NaN or infinite")

    def _mean_loss(self) -> float:
        sums, terms = self.state.sums, len(self.state.weights)
        parts = zip(self.state.weights, sums[:terms], sums[terms:], strict=True)
        return sum(weight * total / (count or 1.0) for weight, total, count in parts)

    def _fail(self, update: int, what: str) -> None:
        # The order is a function of (seed, epoch): the batches of that update are drawn again.
        state, settings, bad = self.state, self.settings, []
        start = math.ceil(state.batch / settings.accumulate) - (state.total - update)
        start *= settings.accumulate
        for items in self._order()[start : start + settings.accumulate]:
            batch = self.train.fetch(items, state.epoch, settings.seed)
            inputs = batch.inputs
            for tensor in inputs.values() if isinstance(inputs, dict) else [inputs]:
                fine = torch.isfinite(tensor.reshape(len(batch), -1)).all(dim=1)
                bad += batch.index[~fine].tolist()
        where = f"update {update + 1} (phase {self.phase.name!r}, epoch {state.epoch + 1})"
        remedy = f"the inputs are finite, so lower lr (now {self.phase.lr:g}) or set clip=1.0"
        if bad:
            remedy = f"the inputs of items {sorted(bad)[:10]} are not finite, so clean them"
        raise FloatingPointError(f"{what} at {where}: {remedy}")

    def _identity(self) -> dict:
        # What a stored state must agree with, to be gone on from.
        decisive = {name: getattr(self.settings, name) for name in _DECIDE_RESULT}
        plain = hasattr(self.objective, "__dataclass_fields__")
        tensors = checkpoint.tensors_of(self.model)
        adaptation = getattr(self.model, "adaptation", None)
        return decisive | {
            "plan": [asdict(phase) for phase in self.phases],
            "objective": repr(self.objective) if plain else type(self.objective).__qualname__,
            "metrics": [metric.__name__ for metric in self.metrics],
            "data": self._content(self.source),
            "validation": self._content(self.held_out),
            "model": data.content_hash([(n, t.shape, t.dtype) for n, t in tensors.items()])[:16],
            "adaptation": adaptation and [adaptation.method, adaptation.settings],
            "trainable": data.content_hash(sorted(self.allowed))[:16],
            "weights": checkpoint.weights_hash(tensors),
        }

    def _content(self, source: data.Source | None) -> list | None:
        if source is None:
            return None
        labels = None if source.labels is None else data.content_hash(source.labels)[:16]
        return [len(source), labels, (source.fingerprint() or "unknown")[:16]]

    def _save(self) -> None:
        if self.settings.directory is None:
            return
        self._look()  # a state with NaN is never stored
        state, now = self.state, time.monotonic()
        state.seconds, self.started = state.seconds + now - self.started, now
        about = {"state": asdict(state), "stopping": asdict(self.stopping)}
        about |= {"identity": self.identity, "labels": getattr(self.model, "labels", None)}
        best_file = None
        if self.best:
            epoch = 0 if state.best is None else state.best["epoch"]
            best_file = about["best_file"] = f"best-{epoch}-{len(self.best)}.safetensors"
        fresh = self.best if best_file != self.best_file else {}
        directory = self.settings.directory
        checkpoint.save_run(directory, self.model, self.optimizer, about, fresh)
        self.best_file, self.saved = best_file, time.monotonic()
        self.save_cost = self.saved - now

    def _resume(self) -> None:
        self.identity = self._identity()
        stored = checkpoint.load_run(self.settings.directory, self.identity)
        if stored is not None:
            weights, self.moments, self.best, about = stored
            checkpoint.fill(self.model, weights, self.settings.directory / checkpoint.LAST)
            self.stopping = plan.Stopping(**about["stopping"])
            self.state = State(**about["state"])
            self.identity, self.best_file = about["identity"], about.get("best_file")


def _read(values: Sequence[float | Tensor]) -> Sequence[float]:
    return torch.stack(values).tolist() if isinstance(values[0], Tensor) else values


@contextmanager
def _interruptible(training: Training) -> Iterator[None]:
    # Ctrl-C in the middle of a step waits for its end, so that the state that is stored is whole; a
    # second one does not wait. Only the main thread receives signals.
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        if training.stop or not training.busy:
            raise KeyboardInterrupt
        training.stop = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Run:
    """The result of `fit`.

    Attributes:
        model: in eval mode, with the weights of the best epoch; if interrupted, the latest.
        history: one dictionary an epoch: epoch, phase, train_loss; with validation data also loss
            and each metric; seconds.
        best: the row of the history whose weights the model has.
        seconds: of all epochs, and of computing cached features, as measured when that was done.
        interrupted: whether Ctrl-C ended it early.
    """

    def __init__(self, training: Training):
        state, settings = training.state, training.settings
        self.model, self.objective = training.model, training.objective
        self.metrics, self.plan, self.settings = training.metrics, training.phases, settings
        self.history, self.interrupted = state.history, training.interrupted
        kept = state.best if settings.restore == "best" and not self.interrupted else None
        self.best = kept or (state.history[-1] if state.history else None)
        self.seconds = state.feature_seconds + sum(row["seconds"] for row in state.history)

    def __repr__(self) -> str:
        return f"Run of {len(self.history)} epochs, {self.seconds:.1f} s\n{self.table()}"

    def table(self) -> show.Table:
        """The history, which prints as a table."""
        return show.Table(self.history)

    def plot(self) -> Any:
        """A matplotlib figure of losses and metrics over the epochs, phases divided by lines."""
        return show.curves(self.history, [metric.__name__ for metric in self.metrics])

    def evaluate(self, data: Any, batch_size: int = 64) -> dict[str, float]:
        """Loss and metrics on other data, in the precision of the run; see `evaluate`."""
        what = (self.model, self.objective, data, self.metrics, batch_size)
        return evaluate(*what, precision=self.settings.precision)

    def predict(self, data: Any, batch_size: int = 64) -> Predictions:
        """What the model says about other data, in the precision of the run; see `predict`."""
        return predict(self.model, data, batch_size, precision=self.settings.precision)

    def save(self, directory: str | Path) -> Path:
        """Write the model so that `transferkit.load(directory)` gives it back."""
        names = [phase.name for phase in self.plan]
        result = {"best epoch": self.best, "plan": names, "seed": self.settings.seed}
        return checkpoint.save_model(directory, self.model, result)


def fit(
    model: nn.Module, objective: Any, train: Any, validation: Any = None, *,
    plan: Sequence[Phase] | Phase, metrics: Sequence[Callable] = (), monitor: str | None = None,
    patience: int | None = None, batch_size: int = 32, accumulate: int = 1,
    precision: str = "auto", clip: float | None = 1.0, seed: int = 0, restore: str = "best",
    directory: str | Path | None = None, save_every: float = 60.0, workers: int = 0,
    progress: bool | None = None, device: str | torch.device = "auto",
) -> Run:  # fmt: skip
    """Train a model by a plan of phases. It is changed in place and ends in eval mode.

    Args:
        objective: what is minimised, such as `classification()`.
        train, validation: what `predict` accepts; validation is scored after each epoch.
        plan: phases, such as `[linear_probe(1), finetune(3)]`.
        metrics, monitor: functions of logits and labels; the name of the one (the first), or
            "loss", that chooses the best epoch.
        patience: epochs of a phase without improvement after which it ends.
        batch_size, accumulate: items in a batch, and batches in an update.
        precision: "fp32", "bf16", or "auto": see `devices.resolve_precision`.
        clip: the largest norm of the gradient.
        restore: "best" gives the model the weights of the best epoch, "last" leaves the last.
        directory, save_every: where to keep the state, and to go on from if it is there; how many
            seconds pass between two states within an epoch.
        workers: processes that fetch batches; they change nothing but speed.
        progress: whether to show a bar; by default where somebody looks.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names the remedy.
        FloatingPointError: the loss became NaN or infinite; the message names the update.
    """
    given = dict(locals())
    return _conduct(_prepare(**given))


def _prepare(model, objective, train, validation, plan, metrics, progress, **given) -> Training:
    phases, metrics, given = check(plan), list(metrics), SimpleNamespace(**given)
    known = [*(metric.__name__ for metric in metrics), "loss"]
    given.monitor = known[0] if given.monitor is None else given.monitor
    limits = (given.clip is None or given.clip > 0, given.patience is None or given.patience >= 1)
    require(
        given,
        batch_size=(given.batch_size >= 1, "at least 1, such as 32"),
        accumulate=(given.accumulate >= 1, "at least 1; 1 switches it off"),
        clip=(limits[0], "a norm above 0, or None"),
        patience=(limits[1], "at least 1, or None"),
        restore=(given.restore in ("best", "last"), "'best' or 'last'"),
        monitor=(given.monitor in known, f"one of {known}, or add the metric to metrics=[...]"),
    )
    if validation is None and given.patience is not None:
        raise ValueError("patience needs validation data to watch: pass some, or leave it out")
    additive = getattr(objective, "additive", False) and hasattr(objective, "counts")
    if given.accumulate > 1 and not additive:
        raise ValueError(
            f"accumulate is {given.accumulate}, but the objective {type(objective).__name__} "
            "couples the items of a batch (additive is False) or has no counts(batch): parts of a "
            "batch would give another gradient; use accumulate=1 with a larger batch_size"
        )
    given.device = devices.resolve_device(given.device)
    given.precision = devices.resolve_precision(given.precision, given.device)
    given.directory = given.directory and Path(given.directory)
    train = data.as_source(train, model.to(given.device))
    validation = None if validation is None else data.as_source(validation, model)
    _check_outputs(model, objective, [train, validation], given)
    return Training(model, objective, train, validation, phases, metrics, given, progress)


def _check_outputs(model, objective, sources, settings) -> None:
    # One item through the model: finds a wrong shape or label before anything is trained.
    model.eval()
    with torch.no_grad(), devices.autocast(settings.device, settings.precision)():
        batch = sources[0].fetch(np.zeros(1, np.int64), None, 0).to(settings.device)
        width = objective.outputs(model, batch).shape[-1]
    labels = getattr(model, "labels", None)
    if labels is not None and len(labels) != width:
        raise ValueError(
            f"the model has {len(labels)} labels but {width} outputs: give its head one for each"
        )
    for source in sources:
        if source is not None and source.labels is not None and hasattr(objective, "validate"):
            objective.validate(source.labels, width)


def _conduct(training: Training) -> Run:
    directory, random = training.settings.directory, torch.get_rng_state()
    try:
        with _interruptible(training):
            training.run()
    except KeyboardInterrupt:
        training.interrupted = True
        if training.whole:  # else something is half done, and the last stored state stands
            training._save()
        after = "pass directory=... to be able to resume"
        if directory is not None:
            after = f"call fit again to resume from {directory}"
        print(f"interrupted after {training.state.total} updates: {after}")
    finally:
        training.progress.close()
        for name, parameter in training.model.named_parameters():
            parameter.requires_grad_(name in training.allowed)
            parameter.grad = None
        training.model.eval()
        torch.set_rng_state(random)
    return Run(training)
