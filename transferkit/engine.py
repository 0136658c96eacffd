"""Training. The one idea: one optimizer step at a time, and nothing hidden.

`Training.step` is the whole of what happens in a step. A run's state is the model, the optimizer's
moments and a few counters; order and augmentation follow from (seed, epoch), dropout and the
learning rate from (seed, update). So the state can be stored between any two steps, and a run that
resumes from it does not differ from one that was never interrupted.
"""

from __future__ import annotations

import bisect
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor, nn

from transferkit import cache, checkpoint, data, devices, distributed, evaluation, layers, optim
from transferkit.checks import functions, real, require, whole
from transferkit.evaluation import Metric, Predictions
from transferkit.objectives import Loss, Number, as_numbers, mean_of_sums
from transferkit.objectives import check as check_parts
from transferkit.plan import Phase, Stopping, begin, check
from transferkit.show import Bar, Table, choices, curves

_LOOK_EVERY = 50  # updates between two looks at the losses: each look waits for the device
_SMALLEST_SCALE = 2.0**-20  # of the loss in fp16: 36 updates have been skipped in a row
_DECIDE_RESULT = (
    "monitor", "patience", "batch_size", "accumulate", "precision", "clip", "seed", "restore",
    "ema", "ranks", "parallel",
)  # fmt: skip


@dataclass
class State:
    """All of a run's state but the tensors: numbers that go into a checkpoint as they are.

    Example:
        >>> state = tk.engine.State()
        >>> state.epoch, state.total, state.best
        (0, 0, None)
    """

    phase: int = 0  # phases finished
    starts: list[int] = field(default_factory=list)  # epochs finished when each phase began
    epoch: int = 0  # epochs finished, in the run
    phase_epoch: int = 0  # epochs finished, in this phase
    batch: int = 0  # batches drawn in this epoch
    update: int = 0  # updates made in this phase
    total: int = 0  # updates made in the run
    sums: list[float] = field(default_factory=list)  # this epoch's totals and counts, term by term
    weights: list[float] = field(default_factory=list)  # of the terms
    seconds: float = 0.0  # spent on this epoch
    feature_seconds: float = 0.0  # what computing cached features took
    skipped: list[int] = field(default_factory=list)  # updates of the run that fp16 did not make
    best: dict[str, Any] | None = None  # the row of the history with the best value
    history: list[dict[str, Any]] = field(default_factory=list)


class Training:
    """One run of `fit`: what is fixed for the run, what is fixed for a phase, and the state.

    Example:
        >>> data = torch.randn(8, 4), torch.arange(8) % 2
        >>> run = tk.fit(nn.Linear(4, 2), tk.classification(), data, plan=tk.finetune(1))
        >>> run.settings.batch_size, run.settings.clip  # what is fixed for the run
        (32, 1.0)
    """

    def __init__(
        self, model: nn.Module, objective: Any, train: data.Source, validation: data.Source | None,
        phases: list[Phase], metrics: list[Metric], settings: SimpleNamespace,
        progress: bool | None,
    ):  # fmt: skip
        self.model, self.objective, self.metrics = model, objective, metrics
        self.source, self.held_out = train, validation
        # what is scored after each epoch; only what has no name chooses the best one
        self.watched = ({} if validation is None else {None: validation}) | settings.report
        self.phases, self.settings = phases, settings
        self.progress = Bar(progress if distributed.rank() == 0 else False)
        # what acts once an update: the objective, and the way in which the model is adapted
        acting: tuple[Any, ...] = (objective, getattr(model, "adaptation", None))
        self.penalties = [part.penalty for part in acting if hasattr(part, "penalty")]
        self.before_update = [part.before for part in acting if hasattr(part, "before")]
        self.after_update = [part.updated for part in acting if hasattr(part, "updated")]
        # of several ranks: how they train this phase
        self.parallel: distributed.Replicas | distributed.Shards | None = None
        self.autocast = devices.autocast(settings.device, settings.precision)
        higher = {m.__name__: getattr(m, "higher_is_better", True) for m in metrics}
        higher |= getattr(validation, "monitors", {})
        self.stopping = Stopping(higher.get(settings.monitor, False), settings.patience)
        self.allowed = {n for n, p in model.named_parameters() if p.requires_grad}
        self.state, self.save_cost = State(), 0.0
        self.best: dict[str, Tensor] = {}
        self.moments: dict[str, Tensor] = {}
        self.averages: dict[str, Tensor] = {}
        self.average: optim.Average | None = None
        self.losses: list[tuple[int, Loss]] = []  # (update, loss), since the last look
        self.flags: list[tuple[int, Tensor]] = []  # (update, whether it was skipped), likewise
        self.scaler = devices.Scaler(settings.device) if settings.precision == "fp16" else None
        self.whole = self.busy = self.stop = self.interrupted = self.idle = False
        self.saved = self.started = time.monotonic()
        self.best_file: str | None = None
        if self.after_update and (settings.parallel == "fsdp" or settings.precision == "fp16"):
            raise ValueError(
                "what adapts the model after each update needs whole, finite gradients: use "
                "precision='bf16' or 'fp32', and parallel='ddp'"
            )
        if settings.ranks > 1:
            distributed.same_weights(model)
        if settings.directory is not None:
            self._resume()
        if settings.ranks > 1:
            self._compare()

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
        self.optimizer = begin(phase, self.model, self.allowed)
        layers.apply_modes(self.model)
        self.parameters = optim.named(self.optimizer)
        self.live, self.train, self.seen = self.model, self.source, dict(self.watched)
        self.penalty: distributed.Penalty | None = self._penalty if self.penalties else None
        if phase.cache:
            self._attach_cache()
        self._wrap()
        if self.settings.ranks > 1:
            self._divide()
        self.updates = phase.epochs * _updates(len(self.train), self.settings)
        if len(self.state.starts) == self.state.phase:
            self.state.starts.append(self.state.epoch - self.state.phase_epoch)
        if self.scaler is not None:
            first = self.state.total - self.state.update
            skipped = sum(update >= first for update in self.state.skipped)
            factors = [self._factor(update) for update in range(self.updates)]
            self.scaler.begin(self.optimizer, factors, skipped)
        checkpoint.fill_moments(self.optimizer, self.moments)
        if self.settings.ema is not None:
            self.average = optim.Average(self.settings.ema, self.parameters)
            for name, value in self.averages.items():
                self.average.tensors[name].copy_(value)
        self.moments, self.averages = {}, {}
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
        if self.stop and self.settings.ranks == 1:  # several stop together, between two steps
            raise KeyboardInterrupt

    def _penalty(self, model: nn.Module) -> Tensor | float:
        total: Tensor | float = sum(penalty(model) for penalty in self.penalties)
        return total

    def _divide(self) -> None:
        # Of several ranks: what depends on the phase.
        settings = self.settings
        kind: type[distributed.Replicas] | type[distributed.Shards] = distributed.Replicas
        if settings.parallel == "fsdp":
            kind = distributed.Shards
        parallel = kind(self.model, self.live, self.objective, self.optimizer, self.penalty)
        self.live, self.parameters = parallel.live, parallel.parameters
        self.plain = self.live
        self.parallel, self.penalty = parallel, parallel.penalty
        first = self.train.fetch(self._order()[0], self.state.epoch, settings.seed)
        parallel.rehearse(first.to(settings.device), self.autocast)

    def _attach_cache(self) -> None:
        cache.refuse(self.objective, self.model, self.source)
        prefix, self.live = layers.split(self.model, layers.frozen_prefix(self.model))
        prefix.eval()  # as its modules are already, being frozen
        device, seed = self.settings.device, self.settings.seed

        def compute(part: nn.Module, batch: data.Batch) -> Any:
            with torch.no_grad(), self.autocast():
                return part(batch.to(device).inputs)

        about = f"{self.settings.precision} {device.type}"
        features = cache.cached(prefix, self.source, compute, about, seed, augmented=True)
        seen = {n: cache.cached(prefix, part, compute, about) for n, part in self.watched.items()}
        self.train, self.seen = features, {**seen}
        if self.state.update == 0:  # counted once, as measured when they were computed
            self.state.feature_seconds += sum(p.seconds for p in (features, *seen.values()))

    def _wrap(self) -> None:
        # Training may call another form of the model, evaluation calls the plain one.
        self.plain = self.live
        if self.settings.recompute:
            self.live = layers.recomputing(self.live)
        if self.settings.compile:
            self.train = _rounded(self.train)
            self.live = devices.compiled(self.live, self.settings.compile)

    def _moving(self) -> dict[str, Tensor]:
        # What training changes in this phase: parameters, and buffers of modules in train mode.
        if self.parallel is not None:
            self.parallel.gather()
        names = set(self.parameters)
        for path, module in self.model.named_modules():
            if module.training:
                names |= {f"{path}.{name}".lstrip(".") for name in module._buffers}
        return {n: t for n, t in checkpoint.tensors_of(self.model).items() if n in names}

    def _leave(self) -> None:
        with self._undivided(), torch.no_grad():
            if self.parallel is not None:
                self.parallel.gather()
                self._unite()
            own, state = checkpoint.tensors_of(self.model), self.state
            if self.average is not None:
                self.average.exchange()
            if state.best is None:
                self.best = {}  # no epoch was ever better than NaN: the last weights stay
            for name, tensor in self.best.items():
                own[name].copy_(tensor)
            state.phase, state.phase_epoch, state.update = state.phase + 1, 0, 0
            del self.optimizer
            self.average = None
            self.stopping.phase_best, self.stopping.waited = None, 0  # of the phase that is done
        self._save()

    def _unite(self) -> None:
        # The end of what `_divide` began, with the weights as they were gathered last.
        if self.parallel is not None:
            self.parallel.close()
        self.live, self.parallel = self.model, None

    def _epoch(self) -> None:
        state, settings = self.state, self.settings
        self.started = time.monotonic()
        order = self._order()
        batches = distributed.share(order[state.batch :])
        how = (settings.seed, settings.workers, settings.device.type == "cuda")
        stream = data.stream(self.train, batches, state.epoch, *how)
        while micro := list(islice(stream, settings.accumulate)):
            drawn = state.batch + len(micro) * settings.ranks
            self.idle = drawn - settings.ranks + settings.rank >= len(order)
            with self._undivided():
                self.step(micro)
                state.batch = drawn if drawn < len(order) else len(order)
                state.update += 1
                state.total += 1
            self._between_steps()
        self._look()
        row: dict[str, Any] = {"epoch": state.epoch + 1, "phase": self.phase.name}
        row["train_loss"] = mean_of_sums(state.weights, state.sums)
        objective = self.objective if self.parallel is None else self.parallel
        for name, source in self.seen.items():
            size = max(64, settings.batch_size)
            where = evaluation.Where(source, size, self.autocast, settings.device)
            what = (self.objective, objective.outputs, self.metrics, self.plain, where)
            with self._averaged():
                found = getattr(self.watched[name], "scores", evaluation.scores)(*what)
            row |= {key if name is None else f"{name} {key}": v for key, v in found.items()}
        if self.scaler is not None:
            first = state.total - math.ceil(state.batch / _share(settings))
            row["skipped"] = sum(update >= first for update in state.skipped)
        row["seconds"] = state.seconds + time.monotonic() - self.started
        row = distributed.of_first(row)
        with self._undivided():
            self._close_epoch(row)
        # At most a tenth of the time goes into storing what short epochs did.
        due = time.monotonic() - self.saved >= min(settings.save_every, 10 * self.save_cost)
        if any(distributed.agree(due)):
            self._save()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        # With the averaged weights, if there are some. Meanwhile the state is not whole.
        if self.average is None:
            yield
            return
        self.whole = False
        self.average.exchange()
        try:
            yield
        finally:
            self.average.exchange()
            self.whole = True

    def _order(self) -> list[np.ndarray]:
        size, seed = self.settings.batch_size, self.settings.seed
        return data.order(len(self.train), size, seed, self.state.epoch, self.train.lengths)

    def _close_epoch(self, row: dict[str, Any]) -> None:
        state = self.state
        state.history.append(row)
        state.epoch, state.phase_epoch = state.epoch + 1, state.phase_epoch + 1
        state.batch, state.sums, state.seconds = 0, [], 0.0
        self.started = time.monotonic()
        if self.held_out is not None and self.stopping.observe(row[self.settings.monitor]):
            state.best = row
            if self.settings.restore == "best":
                found = self._moving() | (self.average.tensors if self.average else {})
                self.best |= {name: tensor.clone() for name, tensor in found.items()}
        self.progress.note(row)

    def step(self, micro: Sequence[data.Batch]) -> None:
        """One update of the parameters, by the gradient of the mean over all of `micro`.

        Nothing in here reads a value back from the device: no loss is looked at, and no norm.
        """
        state, settings, scaler = self.state, self.settings, self.scaler
        device, parallel = settings.device, self.parallel
        counts: tuple[Number, ...] | None = None
        rates = self._factor(state.update) if scaler is None else scaler.factor(state.update)
        optim.set_rates(self.optimizer, rates)
        for before in self.before_update:
            before(state.update, self.updates)
        micro = [batch.to(device) for batch in micro]
        if settings.compile:
            for batch in micro:
                devices.of_any_count(batch.inputs)
        if parallel is not None:
            counts = distributed.counts(self.objective, micro, self.idle, device)
        elif len(micro) > 1:
            # the divisor of the whole step, so that each micro-batch adds its share of one mean
            counts = tuple(map(sum, zip(*map(self.objective.counts, micro), strict=True)))
        for part, batch in enumerate(micro):
            place = part * settings.ranks + settings.rank  # below 0: apart from what items draw
            devices.seed_dropout(device, data.mix(settings.seed, state.total, -1 - place))
            with self.autocast():
                if parallel is None:
                    loss = self.objective(self.live, batch)
                else:
                    last = part + 1 == len(micro)
                    loss = parallel.loss(batch, last, last and self.idle)
            value = loss.mean(counts)
            if self.penalty is not None and part == 0:
                value = value + self.penalty(self.model)
            if not self.checked and not value.requires_grad:
                raise ValueError(
                    f"the objective reaches none of the parameters that phase {self.phase.name!r} "
                    "trains: it must call the model, and detach nothing"
                )
            (value if scaler is None else value * scaler.scale).backward()
            self.losses.append((state.total, loss.detach()))
        if parallel is not None:
            parallel.finish(self.idle)
        if not self.checked:
            self._name_unreached()
        parameters, clip = self.parameters.values(), self.settings.clip
        if scaler is None:
            if clip is not None:
                nn.utils.clip_grad_norm_(parameters, clip, foreach=True)
            self.optimizer.step()
        else:
            norm = scaler.unscale([p.grad for p in parameters if p.grad is not None])
            if clip is not None:
                nn.utils.clip_grads_with_norm_(parameters, clip, norm, foreach=True)
            scaler.step(self.optimizer)
            self.flags.append((state.total, scaler.found))
        for updated in self.after_update:
            updated(self.model, state.update, self.updates)
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(state.update + 1, scaler)

    def _factor(self, update: int) -> float:
        return optim.factor(self.phase.schedule, update, self.updates, self.phase.warmup)

    def _name_unreached(self) -> None:
        self.checked = True
        names = [name for name, p in self.parameters.items() if p.grad is None]
        if names and distributed.rank() == 0:
            few = f"{len(names)} trainable parameters, the first {', '.join(names[:5])}"
            what = f"the objective does not reach {few}: freeze them, or use their output"
            warnings.warn(what, stacklevel=2)

    def _between_steps(self) -> None:
        if len(self.losses) >= _LOOK_EVERY:
            self._look()
        self.progress.advance()
        due = time.monotonic() - self.saved >= self.settings.save_every
        if self.settings.ranks > 1:
            self.stop, due = distributed.agree(self.stop, due)
            if self.stop:
                raise KeyboardInterrupt
        if due:
            self._save()

    def _look(self) -> None:
        # The one place of an epoch that waits for the device.
        if not self.losses:
            return
        state, (_, last) = self.state, self.losses[-1]
        rows = distributed.add_up(as_numbers(loss for _, loss in self.losses))
        for (update, _), row in zip(self.losses, rows, strict=True):
            if not all(map(math.isfinite, row)):
                self._fail(update, "the loss became NaN or infinite")
            state.sums = [a + b for a, b in zip(state.sums or [0.0] * len(row), row, strict=True)]
        state.weights = [float(weight) for weight in last.weights]
        self.losses.clear()
        if self.scaler is not None:
            flags = torch.stack([found for _, found in self.flags]).tolist()
            parts = zip(self.flags, flags, strict=True)
            state.skipped += [update for (update, _), skipped in parts if skipped]
            self.flags.clear()
            if self.scaler.scale.item() < _SMALLEST_SCALE:
                self._fail(state.total - 1, "every gradient has been infinite for some time")
        weights = [distributed.local(parameter.detach()) for parameter in self.parameters.values()]
        norms = torch._foreach_norm(weights)
        if not math.isfinite(distributed.add_up(torch.stack(norms).sum().item())):
            self._fail(state.total - 1, "the weights became NaN or infinite")

    def _fail(self, update: int, what: str) -> NoReturn:
        bad = []
        drawn = _drawn_again(update, self.train, self.state, self.phases, self.settings)
        for batch in drawn.batches:
            inputs = batch.inputs
            for tensor in inputs.values() if isinstance(inputs, dict) else [inputs]:
                fine = torch.isfinite(tensor.reshape(len(batch), -1)).all(dim=1).cpu()
                bad += batch.index[~fine].tolist()
        where = f"update {update + 1} (phase {drawn.phase!r}, epoch {drawn.epoch})"
        remedy = f"the inputs are finite, so lower lr (now {self.phase.lr:g}) or set clip=1.0"
        if self.scaler is not None:
            remedy += ", or train in 'fp32', for fp16 ends at 65,504"
        if bad:
            remedy = f"the inputs of items {sorted(bad)[:10]} are not finite, so clean them"
        raise FloatingPointError(f"{what} at {where}: {remedy}")

    def recipe(self) -> dict[str, Any]:
        """How the run trains: all that decides its result but data and model, as plain values."""
        decisive = {name: getattr(self.settings, name) for name in _DECIDE_RESULT}
        plain = hasattr(self.objective, "__dataclass_fields__")
        return decisive | {
            "compile": bool(self.settings.compile) or None,
            "plan": [asdict(phase) for phase in self.phases],
            "objective": repr(self.objective) if plain else type(self.objective).__qualname__,
            "metrics": [metric.__name__ for metric in self.metrics],
        }

    def _identity(self) -> dict[str, Any]:
        # What a stored state must agree with, to be gone on from.
        adaptation = getattr(self.model, "adaptation", None)
        tensors = checkpoint.tensors_of(self.model)
        return self.recipe() | {
            "data": self._content(self.source),
            "validation": self._content(self.held_out),
            "model": data.content_hash([(n, t.shape, t.dtype) for n, t in tensors.items()])[:16],
            "adaptation": adaptation and [adaptation.method, adaptation.settings],
            "trainable": data.content_hash(sorted(self.allowed))[:16],
            "weights": checkpoint.weights_hash(tensors),
        }

    def _compare(self) -> None:
        # That every rank trains the same; where a state was read, also that all read the same.
        identity = self._identity() if self.settings.directory is None else self.identity
        distributed.alike(identity | {"state": asdict(self.state)})

    def _content(self, source: data.Source | None) -> list[Any] | None:
        if source is None:
            return None
        labels = None if source.labels is None else data.content_hash(source.labels)[:16]
        return [len(source), labels, (source.fingerprint() or "unknown")[:16]]

    def learned_from(self) -> dict[str, dict[str, Any]]:
        """What is known of the data without reading them again: for the model card."""
        found: dict[str, dict[str, Any]] = {}
        for part, source in (("data", self.source), ("validation", self.held_out)):
            if source is None:
                continue
            found[part] = {"name": getattr(source, "name", ""), "items": len(source)}
            if source.labels is not None:
                found[part]["labels sha256"] = data.content_hash(source.labels)[:16]
            if (known := getattr(self, "identity", {}).get(part, ["unknown"])[-1]) != "unknown":
                found[part]["inputs sha256"] = known
        return found

    def _save(self) -> None:
        if self.settings.directory is None:
            return
        self._look()  # a state with NaN is never stored
        if self.parallel is not None:
            self.parallel.gather()
        state, now = self.state, time.monotonic()
        state.seconds, self.started = state.seconds + now - self.started, now
        about: dict[str, Any] = {"state": asdict(state), "stopping": asdict(self.stopping)}
        if self.scaler is not None:
            about["scaler"] = self.scaler.state()
        about |= {"identity": self.identity, "labels": getattr(self.model, "labels", None)}
        best_file = None
        if self.best:
            epoch = 0 if state.best is None else state.best["epoch"]
            best_file = about["best_file"] = f"best-{epoch}-{len(self.best)}.safetensors"
        fresh = self.best if best_file != self.best_file else {}
        directory = self.settings.directory
        averages = self.average.tensors if self.average else {}
        optimizer = getattr(self, "optimizer", None)  # there is none between two phases
        checkpoint.save_run(directory, self.model, optimizer, about, fresh, averages)
        self.best_file, self.saved = best_file, time.monotonic()
        self.save_cost = self.saved - now

    def _resume(self) -> None:
        self.identity = self._identity()
        stored = checkpoint.load_run(self.settings.directory, self.identity)
        if stored is not None:
            weights, self.moments, self.averages, self.best, about = stored
            checkpoint.fill(self.model, weights, self.settings.directory / checkpoint.LAST)
            self.stopping = Stopping(**about["stopping"])
            self.state = State(**about["state"])
            if self.scaler is not None:
                self.scaler = devices.Scaler(self.settings.device, **about["scaler"])
            self.identity, self.best_file = about["identity"], about.get("best_file")


def _rounded(source: data.Source) -> data.Source:
    # for compiled models: what has lengths then has few of them
    if source.lengths is None:
        return source
    if not hasattr(source, "rounded"):
        raise TypeError(
            f"compile=True needs batches of a few lengths, but a {type(source).__name__} makes "
            "them of all: give it a method rounded(), as tk.data.Texts has, or set compile=False"
        )
    return cast(data.Source, source.rounded())


@dataclass(frozen=True)
class Update:
    """One update of a run, drawn again.

    Attributes:
        batches: what it saw, one batch or, with accumulation, several, on the host.
        lr: the learning rate of the head then.
        phase, epoch: the name of the phase, and the epoch as the history counts it.
        skipped: whether fp16 made no step of it.

    Example:
        >>> data = torch.randn(8, 4), torch.arange(8) % 2
        >>> plan = tk.finetune(1, lr=0.1, warmup=0.0, schedule="constant")
        >>> run = tk.fit(nn.Linear(4, 2), tk.classification(), data, plan=plan, batch_size=4)
        >>> update = run.replay(2)
        >>> update.lr, update.epoch, len(update.batches[0])
        (0.1, 1, 4)
    """

    batches: list[data.Batch]
    lr: float
    phase: str
    epoch: int
    skipped: bool


def _updates(count: int, settings: SimpleNamespace) -> int:
    # in an epoch
    return math.ceil(math.ceil(count / int(settings.batch_size)) / _share(settings))


def _share(settings: SimpleNamespace) -> int:  # the batches of a step, of all ranks together
    return int(settings.accumulate * settings.ranks)


def _drawn_again(
    update: int, source: data.Source, state: State, phases: list[Phase], settings: SimpleNamespace
) -> Update:
    # Order and augmentation are functions of (seed, epoch, index), and the schedule one of the
    # updates that the phase had made: nothing of it was kept.
    source = _rounded(source) if settings.compile else source
    each = _updates(len(source), settings)
    epoch, at = divmod(update, each)
    number = bisect.bisect_right(state.starts, epoch) - 1
    phase, first = phases[number], state.starts[number] * each
    made = update - first - sum(first <= other < update for other in state.skipped)
    lr = phase.lr * optim.factor(phase.schedule, made, phase.epochs * each, phase.warmup)
    size, seed, each = settings.batch_size, settings.seed, _share(settings)
    order = data.order(len(source), size, seed, epoch, source.lengths)
    batches = [source.fetch(items, epoch, seed) for items in order[at * each : (at + 1) * each]]
    return Update(batches, lr, phase.name, epoch + 1, update in state.skipped)


@contextmanager
def _interruptible(training: Training) -> Iterator[None]:
    # Ctrl-C in the middle of a step waits for its end, so that the state that is stored is whole; a
    # second one does not wait. Only the main thread receives signals.
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        if training.settings.ranks == 1 and (training.stop or not training.busy):
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

    Example:
        >>> data = torch.randn(8, 4), torch.arange(8) % 2
        >>> how = {"plan": tk.finetune(2), "metrics": [tk.accuracy]}
        >>> run = tk.fit(nn.Linear(4, 2), tk.classification(), data, data, **how)
        >>> len(run.history), sorted(run.evaluate(data))
        (2, ['accuracy', 'loss'])
    """

    def __init__(self, training: Training):
        state, settings = training.state, training.settings
        self.model, self.objective = training.model, training.objective
        self.metrics, self.plan, self.settings = training.metrics, training.phases, settings
        self.history, self.interrupted = state.history, training.interrupted
        self._source, self._state = training.source, state
        kept = state.best if settings.restore == "best" and not self.interrupted else None
        self.best = kept or (state.history[-1] if state.history else None)
        self._about = training.recipe() | {"data": training.learned_from()}
        self.seconds = state.feature_seconds + sum(row["seconds"] for row in state.history)

    def __repr__(self) -> str:
        return f"Run of {len(self.history)} epochs, {self.seconds:.1f} s\n{self.table()}"

    def table(self) -> Table:
        """The history, which prints as a table; with `report=` three epochs of it.

        These are the one that was chosen, the last, and the oracle: the best one by the first
        metric (or the loss) on the data that `report` names last, which nothing else looks at.
        """
        return choices(self.history, self.best, self.settings.report, self.metrics)

    def plot(self) -> Any:
        """A matplotlib figure of losses and metrics over the epochs, phases divided by lines."""
        names = [*(metric.__name__ for metric in self.metrics), self.settings.monitor]
        return curves(self.history, [n for n in names if n != "loss"], self._state.starts)

    def replay(self, step: int) -> Update:
        """What an update saw, drawn again: its batches, augmented as then, and its learning rate.

        With cached features these are the inputs of which the features were computed.

        Args:
            step: number of the update in the run, from 1, as messages name it.

        Raises:
            ValueError: the run made no such update.
        """
        if not 1 <= step <= self._state.total:
            made = f"the run made {self._state.total} updates"
            raise ValueError(f"step is {step}, but {made}: give a number from 1 to that")
        return _drawn_again(step - 1, self._source, self._state, self.plan, self.settings)

    def evaluate(self, data: Any, batch_size: int = 64) -> dict[str, float]:
        """Loss and metrics on other data, in the precision of the run; see `evaluate`."""
        what = (self.model, self.objective, data, self.metrics, batch_size)
        return evaluation.evaluate(*what, precision=self.settings.precision)

    def predict(self, data: Any, batch_size: int = 64) -> Predictions:
        """What the model says about other data, in the precision of the run; see `predict`."""
        return evaluation.predict(self.model, data, batch_size, precision=self.settings.precision)

    def save(self, directory: str | Path, notes: Mapping[str, str] | None = None) -> Path:
        """Write the model, so that `transferkit.load(directory)` gives it back, and a model card.

        Of several ranks the first one writes.

        Args:
            notes: what only a person knows, by the card's heading: `{"Intended use": "..."}`.
        """
        result = {"best epoch": self.best, **self._about}
        if distributed.rank() > 0:
            return Path(directory)
        return checkpoint.save_model(directory, self.model, result, notes)


def fit(
    model: nn.Module, objective: Any, train: Any, validation: Any = None, *,
    plan: Sequence[Any] | Phase, metrics: Sequence[Metric] | Metric = (),
    monitor: str | None = None, patience: int | None = None, batch_size: int = 32,
    accumulate: int = 1, precision: str = "auto", clip: float | None = 1.0,
    ema: float | None = None, seed: int = 0, restore: str = "best",
    report: Mapping[str, Any] | None = None, directory: str | Path | None = None,
    save_every: float = 60.0, workers: int = 0, progress: bool | None = None,
    compile: bool | str | Callable[..., Any] = False, recompute: bool = False,
    device: str | torch.device = "auto", parallel: str | None = None,
) -> Run:  # fmt: skip
    """Train a model by a plan of phases. It is changed in place and ends in eval mode.

    Started by `torchrun --nproc-per-node=N`, N processes train it together; each must make the same
    calls of `fit`, `evaluate` and `predict`, and gets the same results. See `distributed`.

    Args:
        objective: what is minimised, such as `classification()`.
        train, validation: what `predict` accepts; validation (or `unlabelled`) is scored per epoch.
        plan: phases, such as `[linear_probe(1), finetune(3)]`.
        metrics, monitor: functions of logits and labels; the name of the one (the first), or
            "loss", that chooses the best epoch.
        patience: epochs of a phase without improvement on its own best after which it ends.
        batch_size, accumulate: items in a batch, and batches in an update (on each of several
            ranks: an update of N ranks sees N times as many).
        precision: "fp32", "bf16", "fp16", or "auto": see `devices.resolve_precision`. Weights stay
            in float32. In fp16 an update whose gradient overflows is skipped: see `devices.Scaler`.
        clip: the largest norm of the gradient.
        ema: the decay, such as 0.999, of a moving average of the trained weights that is evaluated,
            and with which each phase ends, in place of the weights, not buffers: `optim.Average`.
        restore: "best" gives the model, at the end of each phase, the weights of the run's best
            epoch so far, so that a phase that only does harm is undone; "last" leaves the last.
        report: more labelled data by name, such as `{"target": data}`, scored after each epoch.
            That only goes into the history, as "target accuracy": nothing is chosen by it.
        directory, save_every: where to keep the state, and to go on from if it is there; how many
            seconds pass between two states within an epoch. On a GPU the run that goes on is the
            same bit for bit with `torch.use_deterministic_algorithms(True)`.
        workers: processes that fetch batches; they change nothing but speed.
        compile: True, or a backend of `torch.compile`, compiles the model once a phase and for each
            length of batches, of which there are then eight at most. Evaluation is not compiled.
        recompute: whether layer groups are computed again in the backward pass, which takes less
            memory and more time: see `layers.recomputing`.
        progress: whether to show a bar; by default where somebody looks.
        parallel: with several ranks, "ddp" (the default) keeps the whole model on each, "fsdp"
            divides weights, gradients and moments among them; a single process needs neither.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names the remedy.
        FloatingPointError: the loss became NaN or infinite; the message names the update.

    Example:
        >>> data = torch.eye(4).repeat(50, 1), torch.arange(200) % 2
        >>> model, plan = nn.Linear(4, 2), [tk.finetune(epochs=10, lr=0.1)]
        >>> run = tk.fit(model, tk.classification(), data, data, plan=plan, metrics=[tk.accuracy])
        >>> run.best["accuracy"]
        1.0
    """
    given = dict(locals())
    distributed.start()
    return _conduct(_prepare(**given))


def _prepare(
    model: nn.Module, objective: Any, train: Any, validation: Any, plan: Any, metrics: Any,
    progress: bool | None, **settings: Any,
) -> Training:  # fmt: skip
    check_parts(model, objective)
    phases, metrics, given = check(plan, model), functions(metrics), SimpleNamespace(**settings)
    known = [*getattr(validation, "monitors", [*(metric.__name__ for metric in metrics), "loss"])]
    given.monitor = known[0] if given.monitor is None else given.monitor
    limits = (given.clip is None or (real(given.clip) and given.clip > 0),
              given.patience is None or whole(given.patience))  # fmt: skip
    require(
        given,
        batch_size=(whole(given.batch_size), "at least 1, such as 32"),
        accumulate=(whole(given.accumulate), "at least 1; 1 switches it off"),
        seed=(whole(given.seed, 0) and given.seed < 2**63, "a whole number in [0, 2**63)"),
        workers=(whole(given.workers, 0), "a number of processes; 0 fetches in this one"),
        save_every=(real(given.save_every) and given.save_every >= 0, "seconds, at least 0"),
        clip=(limits[0], "a norm above 0, or None"),
        patience=(limits[1], "at least 1, or None"),
        ema=(given.ema is None or 0 < given.ema < 1, "a number in (0, 1) such as 0.999, or None"),
        restore=(given.restore in ("best", "last"), "'best' or 'last'"),
        report=(isinstance(given.report or {}, Mapping), 'data by name, as {"target": data}'),
        monitor=(given.monitor in known, f"one of {known}, or add the metric to metrics=[...]"),
        parallel=(given.parallel in (None, "ddp", "fsdp"), "None, 'ddp' or 'fsdp'"),
    )
    if validation is None and given.patience is not None:
        raise ValueError("patience needs validation data to watch: pass some, or leave it out")
    given.ranks, given.rank = distributed.ranks(), distributed.rank()
    given.parallel = (given.parallel or "ddp") if given.ranks > 1 else None
    additive = getattr(objective, "additive", False) and hasattr(objective, "counts")
    if given.accumulate * given.ranks > 1 and not additive:
        shared = f" on {given.ranks} ranks" if given.ranks > 1 else ""
        remedy = "train in a single process" if given.ranks > 1 else "use accumulate=1"
        raise ValueError(
            f"accumulate is {given.accumulate}{shared}, but the objective "
            f"{type(objective).__name__} couples the items of a batch (additive is False) or has "
            f"no counts(batch): parts of a batch would give another gradient; {remedy} with a "
            "larger batch_size"
        )
    given.seed = int(given.seed)  # of NumPy it would overflow where it is mixed
    given.device = devices.resolve_device(given.device)
    given.precision = devices.resolve_precision(given.precision, given.device)
    if given.ranks > 1:
        _refuse_alone(given)
    if given.precision == "fp16":
        devices.refuse_half(model)
    given.directory = given.directory and Path(given.directory)
    train = data.as_source(train, model.to(given.device))
    validation = None if validation is None else data.as_source(validation, model)
    given.report = {k: data.as_source(part, model) for k, part in (given.report or {}).items()}
    if given.compile:
        _rounded(train)
    width = _width(model, objective, train, given)
    for source in (train, validation, *given.report.values()):
        if source is not None and source.labels is not None and hasattr(objective, "validate"):
            objective.validate(source.labels, width)
    return Training(model, objective, train, validation, phases, metrics, given, progress)


def _refuse_alone(given: SimpleNamespace) -> None:
    alone = {"compile": given.compile, "recompute": given.recompute}
    if given.parallel == "fsdp":
        alone |= {"ema": given.ema, "precision='fp16'": given.precision == "fp16"}
    for name, asked in alone.items():
        if asked:
            raise ValueError(
                f"{name} was asked for on {given.ranks} ranks with parallel={given.parallel!r}, "
                "where it is not offered: leave it out, or train in a single process"
            )


def _width(model: nn.Module, objective: Any, train: data.Source, settings: SimpleNamespace) -> int:
    # One item through the model: finds a wrong shape or label before anything is trained.
    model.eval()
    with torch.no_grad(), devices.autocast(settings.device, settings.precision)():
        batch = train.fetch(np.zeros(1, np.int64), None, 0).to(settings.device)
        outputs = objective.outputs(model, batch)
    if not outputs.ndim:
        raise ValueError(
            "the model gives a single number for a batch of one item, but a row for each item is "
            "expected: let it keep the first dimension, with squeeze(-1) and not squeeze()"
        )
    width: int = outputs.shape[-1]
    labels = getattr(model, "labels", None)
    if labels is not None and len(labels) != width:
        raise ValueError(
            f"the model has {len(labels)} labels but {width} outputs: give its head one for each"
        )
    by_item = hasattr(objective, "validate") and not hasattr(objective, "scored")
    if by_item and train.labels is None and batch.labels is not None:
        objective.validate(batch.labels, width)  # of one item: the others come as they are fetched
    return width


def _conduct(training: Training) -> Run:
    directory = training.settings.directory
    random = [(own, own.get_state()) for own in devices.generators(training.settings.device)]
    try:
        limits = devices.many_versions() if training.settings.compile else nullcontext()
        with _interruptible(training), limits:
            training.run()
    except KeyboardInterrupt:
        training.interrupted = True
        if training.whole:  # else something is half done, and the last stored state stands
            if training.parallel is not None:
                training.parallel.gather()
            training._save()
        after = "pass directory=... to be able to resume"
        if directory is not None:
            after = f"call fit again to resume from {directory}"
        if distributed.rank() == 0:
            print(f"interrupted after {training.state.total} updates: {after}")
    finally:
        training.progress.close()
        training._unite()
        for name, parameter in training.model.named_parameters():
            parameter.requires_grad_(name in training.allowed)
            parameter.grad = None
        training.model.eval()
        for generator, before in random:
            generator.set_state(before)
    return Run(training)
