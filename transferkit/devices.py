"""Where a model computes, and in what precision. The one idea: detect, never assume."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


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
    """The precision to compute in, "fp32", "bf16" or "fp16".

    "auto" takes what is faster. That is bf16 on NVIDIA GPUs from compute capability 8 and on
    processors with AMX tiles: the avx512_bf16 instructions alone do not help, for on a processor
    that has them and no tiles MiniLM and EfficientNet took 1.5 to 2 times as long to train as in
    float32. On GPUs of capability 7, whose tensor cores know no bf16, it is fp16; older ones have
    no such cores.

    Raises:
        ValueError: another precision is asked for.
    """
    if precision not in ("auto", "fp32", *_HALVES):
        raise ValueError(f"precision is {precision!r}: give 'auto', 'fp32', 'bf16' or 'fp16'")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)[0]
        return "bf16" if capability >= 8 else "fp16" if capability == 7 else "fp32"
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return "bf16" if device.type == "cpu" and tiles() else "fp32"


def autocast(device: torch.device, precision: str) -> Callable[[], AbstractContextManager]:
    """What makes the context in which a forward pass computes in that precision."""
    if precision == "fp32":
        return nullcontext
    return lambda: torch.autocast(device.type, _HALVES[precision])


def compiled(model: nn.Module, backend: bool | str | Callable) -> nn.Module:
    """The model compiled for each length of its inputs, and for any number of items.

    Args:
        backend: True for that of torch, or another one that `torch.compile` takes.
    """
    how = {} if backend is True else {"backend": backend}
    return torch.compile(model, dynamic=False, **how)


def of_any_count(inputs: Tensor | dict[str, Tensor]) -> None:
    """Tell the compiler not to make a version of its own for this number of items."""
    for tensor in inputs.values() if isinstance(inputs, dict) else [inputs]:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)


def many_versions() -> AbstractContextManager:
    """Where code may be compiled more often than eight times, by several phases or runs.

    Beyond its limit torch would go on without compiling, and say so in its log alone.
    """
    limits = {"recompile_limit": 1024, "accumulated_recompile_limit": 8192}
    return torch._dynamo.config.patch(**limits)


def generators(device: torch.device) -> list[torch.Generator]:
    """What computing on this device draws from: the host's default generator, then its own.

    Its own is that of this very device: with several cards the current one may be another.
    """
    if device.type == "cpu":
        return [torch.default_generator]
    if device.type == "mps":
        return [torch.default_generator, torch.mps._get_default_mps_generator()]
    module = torch.get_device_module(device)
    module.init()  # before it there are none; later it does nothing
    at = module.current_device() if device.index is None else device.index
    return [torch.default_generator, module.default_generators[at]]


def seed_dropout(device: torch.device, seed: int) -> None:
    """Set the generators that dropout on this device draws from."""
    # Only the generators in use: `torch.manual_seed` visits every kind of device, 70 times slower.
    for generator in generators(device):
        generator.manual_seed(seed)
