"""What a step does on the card: does anything wait, how exact is it, what is compiled and kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.optim.optimizer import register_optimizer_step_pre_hook

import transferkit as tk
from benchmarks import common
from benchmarks.gpu import card
from benchmarks.systems.transferkit import empty_cache
from benchmarks.tasks import random_rows, random_texts, small_bert
from transferkit.engine import Training

Note = Callable[[common.Row], None]
STARTING = 3  # steps until everything is made that is made once
EXACT = {"fp32": 5e-3, "bf16": 5e-2, "fp16": 1e-2}  # relative error that a gradient may have
LIKE = 0.05  # by how much the loss of a compiled run may differ, relatively


@dataclass(frozen=True)
class Case:
    """A run of `tk.fit`: a model, data, and settings."""

    name: str
    model: Callable[[], nn.Module]
    source: Callable[[], Any]
    settings: dict[str, Any] = field(default_factory=dict)
    objective: Callable[[nn.Module], Any] = lambda model: tk.classification()

    def fit(self, device: torch.device, **more: Any) -> tk.Run:
        """The run on a device, in a directory of its own for what it keeps."""
        model = self.model()
        given = {"plan": tk.finetune(1, lr=1e-4), "batch_size": 32, "progress": False}
        given |= {"device": device, **self.settings, **more}
        with empty_cache():
            return tk.fit(model, self.objective(model), self.source(), **given)


# ---- what the host waits for ---------------------------------------------------------------------

WAITS = (
    ("system", "steps of", ""),
    ("precision", "precision", ""),
    ("steps", "steps watched", ",.0f"),
    ("found", "the host waited for", ""),
)


def waits(device: torch.device, tiny: bool, note: Note) -> None:
    """Steps under `torch.cuda.set_sync_debug_mode("error")`, after the first few."""
    steps = 3 if tiny else 12
    for case in _cases(tiny, 32 * (STARTING + steps)):
        for precision in card.precisions(device)[-1 if tiny else 0 :]:
            row = {"system": case.name, "precision": precision}
            watched, found = steady(case, device, precision=precision)
            note(row | {"steps": watched, "found": found or "nothing", "good": not found})


def steady(case: Case, device: torch.device, **settings: Any) -> tuple[int, str]:
    """How many steps after the first few waited for nothing, and what the next one waited for.

    Raises:
        RuntimeError, ValueError: something else went wrong.
    """
    made, step = 0, Training.step

    def watched(self: Training, micro: Any) -> None:
        nonlocal made
        made += 1
        with card.waits_refused(device) if made > STARTING else nullcontext():
            step(self, micro)

    with patch.object(Training, "step", watched):
        try:
            case.fit(device, **settings)
        except (RuntimeError, ValueError) as error:  # a forward pass that fails is a ValueError
            if "synchronizing" not in str(error):
                raise
            return max(0, made - STARTING - 1), str(error).splitlines()[0]
    return max(0, made - STARTING), ""


def _cases(tiny: bool, count: int) -> list[Case]:
    def texts() -> tk.data.Source:
        return random_texts(count, 8, 32).source()

    def bert() -> nn.Module:
        return small_bert(layers=1, hidden=16) if tiny else small_bert()

    def linear() -> nn.Module:
        torch.manual_seed(0)
        return tk.Staged([("backbone", nn.Linear(64, 64)), ("head", nn.Linear(64, 2))])

    def rows() -> tk.data.Source:
        return random_rows(count, 64).source()

    def once(**settings: Any) -> dict[str, Any]:
        return {"plan": tk.finetune(1, lr=1e-4, **settings)}

    plain = Case("a small BERT", bert, texts)
    if tiny:
        return [plain]
    weighted = tk.classification(label_smoothing=0.1, class_weights=(1.0, 2.0))
    cached = {"plan": tk.linear_probe(1)}
    return [
        plain,
        Case("the same, 2 batches an update", bert, texts, {"batch_size": 16, "accumulate": 2}),
        Case("the same, averaged weights", bert, texts, {"ema": 0.99}),
        Case("the same, recomputed", bert, texts, {"recompute": True}),
        Case("the same, SGD", bert, texts, once(optimizer="sgd")),
        Case("the same, smoothed and weighted", bert, texts, {}, lambda model: weighted),
        Case("the same, L2-SP", bert, texts, {}, lambda m: tk.l2_sp(tk.classification(), m)),
        Case("a head on cached features", linear, rows, cached),
        Case("two layers, mix-up", linear, rows, {}, lambda m: tk.mixup(tk.classification())),
        Case(*image_model(), lambda: _pixels(count, 64)),
    ]


def image_model() -> tuple[str, Callable[[], nn.Module]]:
    """The name of an image network and what builds it, with random weights."""
    if find_spec("timm"):
        name = "efficientnet-lite0"
        return name, lambda: tk.models.load(name, ["good", "bad"], pretrained=False)
    import torchvision

    def build() -> nn.Module:
        torch.manual_seed(0)
        return tk.staged(torchvision.models.efficientnet_b0(num_classes=2), ["good", "bad"])

    return "efficientnet_b0", build


def _pixels(count: int, side: int) -> tk.data.Source:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, side, side, 3), generator=generator, dtype=torch.uint8)
    half = (0.5, 0.5, 0.5)
    return tk.data.images(pixels.numpy(), torch.arange(count) % 2, side, half, half)


# ---- half precision against the truth ------------------------------------------------------------

PRECISION = (
    ("system", "model", ""),
    ("precision", "precision", ""),
    ("apart", "gradient, relative error", ".1e"),
    ("limit", "at most", ".0e"),
    ("skipped", "updates skipped", ",.0f"),
)


def precision(device: torch.device, tiny: bool, note: Note) -> None:
    """Gradients that the engine made, against those in float64 on the processor."""
    batch = 8 if tiny else 64
    width = {"layers": 1, "hidden": 16} if tiny else {}
    bert = Case("a small BERT", lambda: small_bert(dropout=0.0, **width),
                lambda: random_texts(batch, 8, 32).source())  # fmt: skip
    found = [bert] if tiny else [bert, Case("a small convolutional network", convolutions,
                                            lambda: _pixels(batch, 32))]  # fmt: skip
    for case in found:
        exact = Case(case.name, lambda case=case: case.model().double(),
                     lambda case=case: _Doubled(case.source()))  # fmt: skip
        truth, _ = gradient(exact, torch.device("cpu"), "fp32", batch, 1)
        for each in card.precisions(device):
            own, skipped = gradient(case, device, each, batch, 24)
            error = ((own - truth).norm() / truth.norm()).item()
            row = {"system": case.name, "precision": each, "apart": error, "limit": EXACT[each]}
            note(row | {"skipped": skipped, "good": error <= EXACT[each]})


class _Doubled:
    # a source whose numbers are float64
    labels = lengths = None
    views = 1

    def __init__(self, source: tk.data.Source):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def fetch(self, indices: Any, epoch: int | None, seed: int) -> tk.data.Batch:
        batch = self.source.fetch(indices, epoch, seed)
        if isinstance(batch.inputs, Tensor):
            batch.inputs = batch.inputs.double()
        return batch


def convolutions() -> nn.Module:
    """Two convolutions, a mean over the pixels and a head of two outputs."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2))


def gradient(
    case: Case, device: torch.device, precision: str, batch: int, updates: int
) -> tuple[Tensor, int]:
    """The gradient of the last of some updates that move nothing, float64 on the host.

    The rate is so small that every update sees the same weights; in fp16 the first ones are those
    in which the factor of the loss finds its size.

    Returns:
        The gradient `(parameters,)`, and how many updates fp16 skipped.
    """
    found: list[Tensor] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        found[:] = [p.grad for group in optimizer.param_groups for p in group["params"]]

    plan = tk.finetune(updates, lr=1e-30, optimizer="sgd", momentum=0.0, weight_decay=0.0,
                       schedule="constant", warmup=0.0)  # fmt: skip
    hook = register_optimizer_step_pre_hook(look)
    try:
        run = case.fit(device, plan=plan, precision=precision, batch_size=batch, clip=None)
    finally:
        hook.remove()
    flat = torch.cat([part.detach().double().cpu().flatten() for part in found])
    return flat, sum(row.get("skipped", 0) for row in run.history)


# ---- compiled, phase by phase --------------------------------------------------------------------

COMPILED = (
    ("system", "steps", ""),
    ("phases", "phases", ",.0f"),
    ("versions", "versions compiled", ",.0f"),
    ("most", "at most", ",.0f"),
    ("set_up", "s to set up", ",.1f"),
    ("milliseconds", "ms an update", ",.2f"),
    ("loss", "training loss at the end", ".4f"),
)


def compiled(device: torch.device, tiny: bool, note: Note) -> None:
    """`torch.compile` in two phases on texts of two lengths, beside the same run without it."""
    width = {"layers": 1, "hidden": 16} if tiny else {"hidden": 256, "heads": 4}
    count, epochs = (64, 1) if tiny else (2048, 2)
    short, long = random_texts(count // 2, 24, 24), random_texts(count // 2, 64, 64)
    joined = type(short)([*short.tokens, *long.tokens], torch.cat([short.labels, long.labels]))
    plan = [tk.finetune(epochs, lr=1e-4, last=2, name="the last layers"),
            tk.finetune(epochs, lr=1e-4, name="all layers")]  # fmt: skip
    case = Case("compiled", lambda: small_bert(dropout=0.0, **width), joined.source,
                {"plan": plan, "batch_size": 16 if tiny else 64})  # fmt: skip
    plain = None
    for name in ("as it is", "compiled"):
        counter = CompileCounter() if tiny else CompileCounterWithBackend("inductor")
        row, shapes = _run(case, device, False if plain is None else counter)
        row |= {"system": name, "versions": counter.frame_count, "most": len(shapes)}
        row["good"] = counter.frame_count <= len(shapes)
        if plain is not None:
            row["good"] &= abs(row["loss"] - plain["loss"]) <= LIKE * plain["loss"]
        plain = plain or row
        note(row)


def _run(case: Case, device: torch.device, compile: Any) -> tuple[common.Row, set]:
    # Seconds of the steady steps and of all before them, the last loss, and (phase, length) pairs.
    clock, shapes, step = common.Clock(device), set(), Training.step

    def watched(self: Training, micro: Any) -> None:
        clock.mark()
        shapes.update((self.phase.name, b.inputs["input_ids"].shape[1]) for b in micro)
        step(self, micro)

    with patch.object(Training, "step", watched):
        run = case.fit(device, compile=compile)
    clock.mark()
    moments = clock.moments()
    each = [after - before for before, after in pairwise(moments)]
    usual = median(each)
    row = {"phases": len({phase for phase, _ in shapes}), "milliseconds": 1e3 * usual}
    row["set_up"] = max(0.0, moments[-1] - usual * len(each))
    return row | {"loss": run.history[-1]["train_loss"]}, shapes


# ---- memory --------------------------------------------------------------------------------------

MEMORY = (
    ("system", "what is trained", ""),
    ("measured", "most in use, MiB", ",.0f"),
    ("estimate", "estimate of tk.check, MiB", ",.0f"),
)


def memory(device: torch.device, tiny: bool, note: Note) -> None:
    """The card's memory in training MiniLM's shape, and what `tk.check` says of it before."""
    batch, length = (8, 16) if tiny else (128, 128)
    texts = random_texts(4 * batch, length, length)
    case = Case("memory", lambda: minilm(tiny), texts.source, {"batch_size": batch})
    ways = {
        "all layers": {},
        "all layers, recomputed": {"recompute": True},
        "the last two layer groups": {"plan": tk.finetune(1, last=2)},
        "the head alone": {"plan": tk.linear_probe(1, cache=False)},
        "the head alone, cached features": {"plan": tk.linear_probe(1)},
    }
    whole = None
    case.fit(device, **ways["the head alone"])  # the work space of the products stays from now on
    for name, settings in ways.items():
        with card.Memory(device) as used:
            case.fit(device, **settings)
        row = {"system": name, "measured": used.most and used.most / 2**20}
        row["estimate"] = _estimate(case, device, settings)
        row["good"] = whole is None or used.most is None or used.most < whole
        whole = whole or used.most
        note(row)


def minilm(tiny: bool = False) -> tk.Staged:
    """The shape of MiniLM-L6 (Wang et al. 2020) with random weights: speed asks for no others."""
    if tiny:
        return small_bert(layers=1, hidden=16)
    return small_bert(layers=6, hidden=384, heads=12, vocabulary=30522)


def _estimate(case: Case, device: torch.device, settings: dict[str, Any]) -> float:
    given = {"plan": tk.finetune(1), "batch_size": case.settings["batch_size"], **settings}
    model = case.model()
    (row,) = tk.check(model, tk.classification(), case.source(), device=device, **given).phases
    return row["total"]
