"""The card: its name and peak, its memory, and the steps in which nothing may wait for it.

Whatever measures takes a device, and has a small form for the processor by which tests prove it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import transferkit as tk
from benchmarks.counters import READING

HALVES = ("bf16", "fp16")
# What a card's matrix units make of dense products in bf16 and fp16 that are summed in float32, in
# 10^12 operations a second: the vendor's data sheets, where those give the number with sparsity
# half of it. The first part that begins the card's name, as torch gives it, counts.
PEAKS = (
    ("NVIDIA B200", 2250.0, 2250.0, "HGX B200 data sheet"),
    ("NVIDIA H200 NVL", 835.5, 835.5, "H200 data sheet"),
    ("NVIDIA H200", 989.5, 989.5, "H200 data sheet"),
    ("NVIDIA H100 NVL", 835.5, 835.5, "H100 data sheet"),
    ("NVIDIA H100 PCIe", 756.5, 756.5, "H100 data sheet"),
    ("NVIDIA H100 80GB HBM3", 989.5, 989.5, "H100 data sheet"),
    ("NVIDIA A100", 312.0, 312.0, "A100 data sheet"),
    ("NVIDIA L40S", 362.05, 362.05, "L40S data sheet"),
    ("NVIDIA L4", 121.0, 121.0, "L4 data sheet"),
    ("NVIDIA A10", 125.0, 125.0, "A10 data sheet"),
    ("Tesla V100-SXM2", None, 125.0, "V100 data sheet"),
    ("Tesla V100-PCIE", None, 112.0, "V100 data sheet"),
    ("Tesla T4", None, 65.0, "T4 data sheet"),
)


def name(device: torch.device) -> str:
    """The name of the card, or "" for a processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def large(device: torch.device) -> bool:
    """Whether the card has memory for large batches; with small ones a fast card waits."""
    found = device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory
    return found > 32 * 2**30


def peak(card: str, precision: str) -> tuple[float, str] | None:
    """The card's dense peak in operations a second, and where the number is from.

    None for a card that is not in the table or is divided among several users, and for float32,
    whose products take the matrix units only in part.
    """
    if precision not in HALVES or " MIG " in card:
        return None
    for known, bf16, fp16, source in PEAKS:
        if _is(card, known):
            tera = bf16 if precision == "bf16" else fp16
            return None if tera is None else (1e12 * tera, source)
    return None


def _is(card: str, known: str) -> bool:
    # an "NVIDIA L40" is no "NVIDIA L4", but an "NVIDIA A100-SXM4-80GB" is an "NVIDIA A100"
    return card.startswith(known) and not card[len(known) :][:1].isalnum()


def precisions(device: torch.device) -> list[str]:
    """What the device computes in: float32, and the halves that its matrix units know."""
    if device.type != "cuda":
        return ["fp32", "bf16"]
    major = torch.cuda.get_device_capability(device)[0]
    return ["fp32", *["bf16"] * (major >= 8), *["fp16"] * (major >= 7)]


def utilisation(operations: float, rate: float, card: str, precision: str) -> float | None:
    r"""Model FLOPs utilisation (Chowdhery et al. 2022, Appendix B), or None for an unknown peak.

    $$\mathrm{MFU} = \frac{F \, r}{P}$$

    Args:
        operations: F, floating-point operations that training needs for one item, forward and
            backward, by `operations_of`; what is computed again to save memory does not count.
        rate: r, items a second.
        card, precision: they give P, the dense peak.
    """
    found = peak(card, precision)
    return None if found is None else operations * rate / found[0]


def operations_of(model: nn.Module, inputs: Tensor | dict[str, Tensor], labels: Tensor) -> float:
    """Operations of matrix products and convolutions in a forward and backward pass, an item.

    A product of an (m, k) and a (k, n) matrix has 2mkn. They are counted where the model is, best
    on the processor, with a few items: attention is made there of plain products.
    """
    counter = FlopCounterMode(display=False)
    model.train()
    with counter, sdpa_kernel(SDPBackend.MATH):
        cross_entropy(model(inputs), labels).backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / len(labels)


class _NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator._schema.name in READING:
            raise RuntimeError(f"called a synchronizing operation: {operator._schema.name}")
        return operator(*args, **(kwargs or {}))


@contextmanager
def waits_refused(device: torch.device) -> Iterator[None]:
    """Raise a RuntimeError where the host would wait for the card.

    On a processor, where nothing waits, for the operators that would wait on a card.
    """
    if device.type != "cuda":
        with _NoReads():
            yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class Memory:
    """The most memory of the card that was in use at once inside the block, in bytes.

    Attributes:
        most: beyond what was in use when it began; None on a processor, which does not say.
    """

    def __init__(self, device: torch.device):
        self.device, self.most = device, None

    def __enter__(self) -> Memory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *_: Any) -> None:
        if self.device.type == "cuda":
            self.most = torch.cuda.max_memory_allocated(self.device) - self.before


def about(device: torch.device) -> dict[str, Any]:
    """What the report says of the card."""
    if device.type != "cuda":
        return {"card": ""}
    found = torch.cuda.get_device_properties(device)
    known = peak(found.name, "bf16") or peak(found.name, "fp16")
    said = f"{known[0] / 1e12:g} TFLOP/s ({known[1]})" if known else "unknown: MFU is left out"
    return {
        "card": found.name,
        "card_memory_gib": round(found.total_memory / 2**30, 1),
        "capability": f"{found.major}.{found.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "peak": said,
        "faster": tk.devices.resolve_precision("auto", device),
    }
