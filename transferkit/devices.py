"""Where a model computes, and in what precision. The one idea: detect, never assume."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

Autocast = Callable[[], AbstractContextManager[Any]]

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


def autocast(device: torch.device, precision: str) -> Autocast:
    """What makes the context in which a forward pass computes in that precision."""
    if precision == "fp32":
        return nullcontext
    return lambda: torch.autocast(device.type, _HALVES[precision])


def refuse_half(model: nn.Module) -> None:
    """See that what is trained in fp16 has weights that keep small updates.

    Raises:
        ValueError: a trained parameter is float16.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            raise ValueError(
                f"the parameter {name} is float16, in which small updates are lost: call "
                "model.float(), and fit computes in fp16 where that is safe"
            )


class Scaler:
    """Loss scaling for fp16 (Micikevicius et al. 2018), of which the host reads nothing in a step.

    The loss is multiplied by a factor, so that small gradients do not vanish in half precision, and
    the gradient is divided by it once. If the gradient is not finite, the update is skipped: the
    parameters, the moments and the schedule stay, and the factor halves. It doubles after 2,000
    updates in a row that were made. These are the numbers of `torch.amp.GradScaler`, which does not
    tell whether an update was skipped unless the host waits for it.

    Attributes:
        scale: the factor, a tensor `()`.
        found: 1 if the last update was skipped, else 0, a new tensor `()` at each update.
        skipped: how many updates of the phase were skipped, int64 `(1,)`.

    Example:
        >>> model, cpu = nn.Linear(2, 1, bias=False), torch.device("cpu")
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
        >>> scaler = tk.devices.Scaler(cpu, scale=4.0)
        >>> scaler.begin(optimizer, [1.0], skipped=0)
        >>> model.weight.grad = torch.full((1, 2), torch.inf)
        >>> norm = scaler.unscale([model.weight.grad])
        >>> scaler.step(optimizer)  # is skipped
        >>> scaler.scale.item(), scaler.skipped.item()
        (2.0, 1)
    """

    def __init__(self, device: torch.device, scale: float = 2.0**16, clean: int = 0):
        self.device = device
        self.scale = torch.tensor(scale, dtype=torch.float32, device=device)
        self._clean = torch.tensor(clean, dtype=torch.int32, device=device)  # updates in a row

    def begin(
        self, optimizer: torch.optim.Optimizer, factors: Sequence[float], skipped: int
    ) -> None:
        """Start, or go on with, a phase whose schedule has these factors, one an update."""
        self._factors = torch.tensor(factors, dtype=torch.float32, device=self.device)
        self.skipped = torch.tensor([skipped], device=self.device)
        for part in optimizer.param_groups:
            if part.get("momentum"):
                # torch takes empty memory for these in the first update, and skipping that one
                # would leave it unset
                for parameter in part["params"]:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def factor(self, update: int) -> Tensor:
        """What the rates are multiplied by: the schedule at the number of updates really made."""
        return self._factors.index_select(0, update - self.skipped)

    def unscale(self, gradients: list[Tensor]) -> Tensor:
        """Divide the gradients by the factor, in place; their norm, `()`, which decides `found`."""
        torch._foreach_mul_(gradients, self.scale.reciprocal())
        norm = nn.utils.get_total_norm(gradients, foreach=True)
        self.found = torch.isfinite(norm).logical_not().float()
        return norm

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the parameters, unless the gradient is not finite, and the factor."""
        # the fused kernels look at it on the device
        optimizer.found_inf = self.found  # type: ignore[attr-defined]  # torch declares it nowhere
        optimizer.step()
        torch._amp_update_scale_(self.scale, self._clean, self.found, 2.0, 0.5, 2000)
        self.skipped += self.found.long()

    def state(self) -> dict[str, float]:
        """The arguments that make it again; this waits for the device."""
        return {"scale": self.scale.item(), "clean": self._clean.item()}


def compiled(model: nn.Module, backend: bool | str | Callable[..., Any]) -> nn.Module:
    """The model compiled for each length of its inputs, and for any number of items.

    Args:
        backend: True for that of torch, or another one that `torch.compile` takes.
    """
    how: dict[str, Any] = {} if backend is True else {"backend": backend}
    # of a module torch makes a module, which its signature does not say
    return cast(nn.Module, torch.compile(model, dynamic=False, **how))


def of_any_count(inputs: Tensor | dict[str, Tensor]) -> None:
    """Tell the compiler not to make a version of its own for this number of items."""
    for tensor in inputs.values() if isinstance(inputs, dict) else [inputs]:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)


def many_versions() -> AbstractContextManager[Any]:
    """Where code may be compiled more often than eight times, by several phases or runs.

    Beyond its limit torch would go on without compiling, and say so in its log alone.
    """
    limits = {"recompile_limit": 1024, "accumulated_recompile_limit": 8192}
    return cast(AbstractContextManager[Any], torch._dynamo.config.patch(limits))


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
