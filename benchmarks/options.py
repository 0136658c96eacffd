"""What single options are worth on this machine: each one off and on, and all else the same.

The loops are plain torch; the last column says whether transferkit has the option on here.
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import transferkit as tk
from benchmarks import common
from benchmarks.tasks import random_texts, small_bert

BATCH = 32
KEPT = "TORCHINDUCTOR_CACHE_DIR"
COLUMNS = (
    ("system", "option", ""),
    ("what", "of what", ""),
    ("off", "ms without", ",.1f"),
    ("on", "ms with", ",.1f"),
    ("speedup", "times as fast", ".2f"),
    ("set_up", "s to set up", ".1f"),
    ("used", "in transferkit here", ""),
)


@dataclass(frozen=True)
class Option:
    """An option, what is done without it and with it, and what it needs."""

    name: str
    what: str
    off: Callable[[], Any]
    on: Callable[[], Any]
    used: bool
    missing: tuple[str, ...] = ()


def measure(tiny: bool) -> dict[str, Any]:
    """The part of the result file that is about single options."""
    began, repeats, steps = time.time(), 1 if tiny else 5, 2 if tiny else 10
    with _empty_compiler_cache():
        rows = [_row(option, repeats, steps) for option in _options(tiny)]
    title = f"One option at a time, batches of {BATCH}"
    return {
        "about": common.about(repeats, tiny, began),
        "tables": {"options": common.table(title, COLUMNS, rows)},
        "notes": {},
    }


@contextmanager
def _empty_compiler_cache() -> Iterator[None]:
    # so that the time to set up is that of a first run
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, {KEPT: folder}):
        yield


def _row(option: Option, repeats: int, steps: int) -> common.Row:
    row = {"system": option.name, "what": option.what, "used": "yes" if option.used else "no"}
    if option.missing:
        return row | {"missing": option.missing}
    option.off()
    start = time.perf_counter()
    option.on()
    first = time.perf_counter() - start

    def clock(run: Callable[[], Any]) -> Callable[[int], float]:
        def steps_of(turn: int) -> float:
            start = time.perf_counter()
            for _ in range(steps):
                run()
            return time.perf_counter() - start

        return steps_of

    ways = {"without": clock(option.off), "with": clock(option.on)}
    seconds = common.turns(f"{option.name}, {option.what}", ways, repeats)
    off, on = (min(seconds[way]) / steps for way in ways)
    row |= {"off": 1e3 * off, "on": 1e3 * on, "speedup": off / on, "all_seconds": seconds}
    return row | {"set_up": max(0.0, first - on)}


def _options(tiny: bool) -> Iterator[Option]:
    # made one after the other, so that only one pair of models is in memory
    half = tk.devices.resolve_precision("auto", torch.device("cpu")) == "bf16"
    text, texts = _text_model(tiny), random_texts(BATCH, 32, 32)
    inputs, labels = texts.collate([*texts.dataset()])
    yield _fused(text)
    yield Option("bf16 autocast", "training step of the text model",
                 _training(text, inputs, labels), _training(text, inputs, labels, half=True),
                 half)  # fmt: skip
    missing = () if common.compiler() else ("a C++ compiler",)
    # in the tiny setting torch traces the model but spares the compiler
    compiled = torch.compile(copy.deepcopy(text), backend="eager" if tiny else "inductor")
    yield Option("torch.compile", "training step of the text model",
                 _training(text, inputs, labels), _training(compiled, inputs, labels),
                 False, missing)  # fmt: skip
    yield from _image_options(tiny, half)


def _text_model(tiny: bool) -> nn.Module:
    if tiny:
        return small_bert(layers=1, hidden=16).train()
    return tk.models.load("minilm-l6", labels=["rotten", "fresh"]).train()


def _fused(model: nn.Module) -> Option:
    # the update alone, of all parameters, with gradients that are there already
    ways = []
    for fused in (None, True):
        parameters = list(copy.deepcopy(model).parameters())
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 1e-3)
        ways.append(torch.optim.AdamW(parameters, lr=1e-6, fused=fused).step)
    return Option("fused AdamW", "update of the text model's parameters", *ways, used=True)


def _training(model: nn.Module, inputs: Any, labels: Tensor, half: bool = False) -> Callable:
    # forward, loss and backward
    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            outputs = model(inputs)
        F.cross_entropy(outputs.float(), labels).backward()
        model.zero_grad()

    return step


def _inference(model: nn.Module, inputs: Tensor, half: bool = False) -> Callable:
    model = copy.deepcopy(model).eval()

    def step() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            model(inputs)

    return step


def _image_options(tiny: bool, half: bool) -> Iterator[Option]:
    if tiny:
        torch.manual_seed(0)
        convolution = nn.Conv2d(3, 8, 3, stride=2)
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        model = nn.Sequential(convolution, nn.BatchNorm2d(8), pool, nn.Linear(8, 2))
    elif find_spec("timm"):
        model = tk.models.load("efficientnet-lite0", labels=["good", "bad"])
    else:
        yield Option(
            "channels_last", "training step of the image model", *[None] * 2, True, ("timm",)
        )
        return
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(BATCH, 3, *[16 if tiny else 128] * 2, generator=generator)
    last, labels = pixels.contiguous(memory_format=torch.channels_last), torch.arange(BATCH) % 2
    model.train()
    yield Option("channels_last", "training step of the image model",
                 _training(model, pixels, labels), _training(model, last, labels),
                 True)  # fmt: skip
    yield Option("channels_last", "inference with the image model",
                 _inference(model, pixels), _inference(model, last), True)  # fmt: skip
    yield Option("bf16 autocast", "inference with the image model",
                 _inference(model, last), _inference(model, last, half=True), half)  # fmt: skip
