"""Where a model computes, and in what precision. The one idea: detect, never assume."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """The device to train on: the accelerator if there is one, else the CPU.

    Raises:
        ValueError: torch knows no such device, or this machine has none.
    """
    if device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if found is None else found
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device is {device!r}: give 'auto', 'cpu' or 'cuda'") from error
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device is {device!r}, but torch cannot use it on this machine: give 'auto' or 'cpu', "
            "or install the build of torch for that device"
        ) from error
    return found


def resolve_precision(precision: str, device: torch.device) -> str:
    """The precision to compute in, "fp32" or "bf16".

    "auto" takes bf16 where it is faster: NVIDIA GPUs from compute capability 8, processors with AMX
    tiles. The avx512_bf16 instructions alone do not help: on a processor that has them and no tiles
    MiniLM and EfficientNet took 1.5 to 2 times as long to train as in float32.

    Raises:
        ValueError: another precision is asked for.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision is {precision!r}: give 'auto', 'fp32' or 'bf16'")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        good = torch.cuda.get_device_capability(device)[0] >= 8
    else:
        tiles = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        good = device.type == "cpu" and tiles()
    return "bf16" if good else "fp32"


def autocast(device: torch.device, precision: str) -> Callable[[], AbstractContextManager]:
    """What makes the context in which a forward pass computes in that precision."""
    if precision == "fp32":
        return nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


def seed_dropout(device: torch.device, seed: int) -> None:
    """Set the generators that dropout on this device draws from."""
    # Only the generators in use: `torch.manual_seed` visits every kind of device, 70 times slower.
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
