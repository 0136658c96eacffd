"""Several processes that train one model. The one idea: a rank is a share of each step's batches.

`torchrun --nproc-per-node=N script.py` starts the script N times; each process is a rank. The order
of the batches stays the one of a single process: in every round each rank takes the next batch, so
that N ranks make the step that one process makes when it accumulates N times as many batches. Sums
are added over the ranks and divided once by a count that was added, too. Without torchrun nothing
in here does anything.
"""

from __future__ import annotations

import atexit
import copy
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from transferkit import layers, optim
from transferkit.devices import Autocast

if TYPE_CHECKING:
    from transferkit.data import Batch
    from transferkit.objectives import Loss

T = TypeVar("T")
Penalty = Callable[[nn.Module], Tensor | float]

_PATIENCE = timedelta(hours=2)  # others wait so long for what only the first rank does


def start() -> None:
    """Join the processes that torchrun started, once; `fit`, `evaluate` and `predict` call it.

    Tensors of the host travel by gloo, those of NVIDIA GPUs by NCCL; the rank's GPU becomes the
    current one. Nothing happens without torchrun, in a single process, or where the script has made
    a process group, which must carry tensors of the host, too. The group ends with the process.

    Raises:
        ValueError: there are more processes on this machine than GPUs.

    Example:
        >>> tk.distributed.start()  # without torchrun nothing happens
        >>> tk.distributed.ranks()
        1
    """
    if not dist.is_available() or dist.is_initialized() or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return
    backend = "gloo"
    if torch.cuda.is_available():
        here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > gpus:
            raise ValueError(
                f"torchrun started {here} processes on a machine with {gpus} GPUs: start "
                f"--nproc-per-node={gpus}, or hide the GPUs with CUDA_VISIBLE_DEVICES="
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=_PATIENCE)
    atexit.register(_end)


def _end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def ranks() -> int:
    """How many processes train together; 1 without torchrun.

    Example:
        >>> tk.distributed.ranks()
        1
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them, from 0; rank 0 alone writes and speaks.

    Example:
        >>> tk.distributed.rank()
        0
    """
    return dist.get_rank() if ranks() > 1 else 0


def wait() -> None:
    """Until every rank is here.

    Example:
        >>> tk.distributed.wait()  # a single process goes on at once
    """
    if ranks() > 1:
        add_up(0.0)


@contextmanager
def in_turn() -> Iterator[None]:
    """The first rank of each machine does this before the others, which find what it left.

    Example:
        >>> with tk.distributed.in_turn():
        ...     print("made by the first, found by the others")
        made by the first, found by the others
    """
    first = ranks() == 1 or os.environ.get("LOCAL_RANK", str(rank())) == "0"
    if not first:
        wait()
    try:
        yield
    finally:
        if first:
            wait()


def share(batches: Sequence[T]) -> Sequence[T]:
    """This rank's batches: one of each round of as many as there are ranks.

    In a last round that is too short for all, the ranks that are left out are idle: they repeat its
    first batch, which counts for nothing, to take part in what all do together.

    Example:
        >>> tk.distributed.share(["batch 0", "batch 1", "batch 2"])  # rank 1 of 2: batch 1, batch 2
        ['batch 0', 'batch 1', 'batch 2']
    """
    many, own = ranks(), rank()
    if many == 1:
        return batches
    firsts = range(0, len(batches), many)
    return [batches[at + own if at + own < len(batches) else at] for at in firsts]


def collect(parts: list[Tensor], count: int, longest: int | None = None) -> list[Tensor]:
    """What all ranks made of `count` batches dealt out by `share`, in the order of the batches.

    Args:
        parts: one tensor `(rows, ...)` for each of this rank's batches; the rows may differ.
        longest: the second dimension may differ, too, and is filled up with zeros to this.

    Returns:
        `count` tensors on the host, the same on every rank; what idle ranks made is left out.

    Example:
        >>> parts = [torch.zeros(2, 3), torch.zeros(1, 3)]
        >>> [len(part) for part in tk.distributed.collect(parts, 2)]
        [2, 1]
    """
    if ranks() == 1:
        return parts
    if longest is not None:
        fill = (0, 0) * (parts[0].dim() - 2)
        parts = [nn.functional.pad(p, (*fill, 0, int(longest) - p.shape[1])) for p in parts]
    sizes = _gathered(torch.tensor([len(part) for part in parts]))
    own = torch.cat(parts).cpu()
    padded = own.new_zeros(int(sizes.sum(1).max()), *own.shape[1:])
    padded[: len(own)] = own
    # as bytes, for not every type can travel
    found = _gathered(padded.reshape(-1).view(torch.uint8)).view(own.dtype)
    found = found.view(ranks(), *padded.shape)
    each = zip(found, sizes, strict=True)
    split = [part[: size.sum()].split(size.tolist()) for part, size in each]
    return [split[at % ranks()][at // ranks()] for at in range(count)]


def _gathered(own: Tensor) -> Tensor:
    # Tensors of one shape from all ranks, stacked.
    everyone = own.new_empty(ranks(), *own.shape)
    dist.all_gather(list(everyone.unbind()), own)
    return everyone


def add_up(values: Any) -> Any:
    """Numbers, or lists of lists of them, summed over the ranks: the same on each, in float64.

    Example:
        >>> tk.distributed.add_up([[1.0, 2.0]])  # on two ranks [[2.0, 4.0]]
        [[1.0, 2.0]]
    """
    if ranks() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def agree(*flags: bool) -> list[bool]:
    """For each flag whether any rank raised it, so that all ranks decide alike.

    Example:
        >>> tk.distributed.agree(True, False)
        [True, False]
    """
    return [raised > 0 for raised in add_up([float(flag) for flag in flags])]


def of_first(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with the floats of rank 0: times differ, and other processors round otherwise.

    Example:
        >>> tk.distributed.of_first({"loss": 0.5, "phase": "finetune"})
        {'loss': 0.5, 'phase': 'finetune'}
    """
    if ranks() == 1:
        return dict(row)
    names = [name for name, value in row.items() if isinstance(value, float)]
    values = torch.tensor([row[name] for name in names], dtype=torch.float64)
    dist.broadcast(values, 0)
    return dict(row) | dict(zip(names, values.tolist(), strict=True))


def alike(about: Mapping[str, Any]) -> None:
    """Check that every rank says the same; the ranks wait for each other.

    Raises:
        ValueError: on all ranks, if they differ in something; it is named.

    Example:
        >>> dist = torch.distributed  # torchrun does this, of as many processes as it starts
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> tk.distributed.alike({"seed": 0})  # else a ValueError names the seed
        >>> dist.destroy_process_group()
    """
    everyone: list[Any] = [None] * ranks()
    dist.all_gather_object(everyone, dict(about))
    for other, theirs in enumerate(everyone):
        for name, value in everyone[0].items():
            if theirs.get(name) != value:
                raise ValueError(
                    f"the ranks differ in {name} ({value!r} on rank 0, {theirs.get(name)!r} on "
                    f"rank {other}): give all the same, seeds too, and a directory that all share"
                )


def same_weights(model: nn.Module) -> None:
    """Give the model of every rank the parameters and buffers of rank 0.

    Example:
        >>> dist = torch.distributed  # torchrun does this, of as many processes as it starts
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> tk.distributed.same_weights(nn.Linear(4, 2))
        >>> dist.destroy_process_group()
    """
    with torch.no_grad():
        for tensor in model.state_dict().values():
            flat = tensor.contiguous().reshape(-1)
            dist.broadcast(flat.view(torch.uint8), 0)  # as bytes, for not every type can travel
            tensor.copy_(flat.view(tensor.shape))


def counts(
    objective: Any, micro: Sequence[Batch], idle: bool, device: torch.device
) -> tuple[Tensor, ...]:
    """The counts of a step over all its batches on all ranks: scalar tensors on the device.

    Args:
        idle: whether the last of `micro` repeats another rank's.

    Example:
        >>> dist = torch.distributed  # torchrun does this, of as many processes as it starts
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> batch = tk.data.Batch(torch.randn(3, 4), torch.tensor([0, 1, 0]), torch.arange(3))
        >>> tk.distributed.counts(tk.classification(), [batch, batch], False, torch.device("cpu"))
        (tensor(6., dtype=torch.float64),)
        >>> dist.destroy_process_group()
    """
    rows = [objective.counts(batch) for batch in micro]
    rows[-1] = tuple(0 * value for value in rows[-1]) if idle else rows[-1]
    own = torch.stack([_scalar(sum(column), device) for column in zip(*rows, strict=True)])
    dist.all_reduce(own)
    return own.unbind()


def _scalar(value: float | Tensor, device: torch.device) -> Tensor:
    # filled on the device: a copy from the host would wait for it
    if isinstance(value, Tensor):
        return value.to(device, torch.float64)
    return torch.full((), value, dtype=torch.float64, device=device)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of one that is divided among the ranks (all must ask).

    Example:
        >>> tk.distributed.whole(torch.ones(2))
        tensor([1., 1.])
    """
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(tensor: Tensor) -> Tensor:
    """The tensor itself, or this rank's part of a divided one.

    Example:
        >>> tk.distributed.local(torch.ones(2))
        tensor([1., 1.])
    """
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def divided_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, known to every rank, on the device of a parameter and divided like it.

    Example:
        >>> tk.distributed.divided_like(torch.ones(2), torch.zeros(2))
        tensor([1., 1.])
    """
    if tensor.shape != parameter.shape:
        return tensor.to(parameter.device)
    if not hasattr(parameter, "placements"):
        # in its layout, too: the fused kernels go through both as they lie in memory
        return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)  # nothing else has placements
    where = (parameter.device_mesh, parameter.placements)
    return distribute_tensor(tensor.to(parameter.device), *where, src_data_rank=None)


class _Carrier(nn.Module):
    # Calls a function of a model as its own forward pass, which is what DDP and FSDP2 hook into:
    # so the function, an objective, may call any part of the model, as it does on one rank.
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self.model, *arguments)


@dataclass(eq=False, repr=False)
class _Parallel:
    # What both ways have in common. There is one object for each phase.
    model: nn.Module
    live: nn.Module
    objective: Any
    optimizer: torch.optim.Optimizer
    penalty: Penalty | None  # added to a rank's first value of a step

    def __post_init__(self) -> None:
        self.parameters = optim.named(self.optimizer)
        self.unreached: set[str] = set()
        self.moved: list[Tensor] = []  # buffers that a forward pass changes

    def rehearse(self, batch: Batch, autocast: Autocast) -> None:
        """One step's forward and backward pass, of which nothing stays.

        It finds the parameters that the objective does not reach, and the buffers that it changes.
        """
        before = [(buffer, buffer.clone()) for buffer in self.live.buffers()]
        self._pass(batch, autocast)
        self.moved = [buffer for buffer, old in before if not torch.equal(buffer, old)]
        with torch.no_grad():
            for buffer, old in before:
                buffer.copy_(old)

    def _loss(self, batch: Batch, last: bool) -> Loss:
        raise NotImplementedError  # each of the two ways has its own

    def _pass(self, batch: Batch, autocast: Autocast) -> None:
        with autocast():
            value = self.loss(batch, True, False).mean()
        if self.penalty is not None:
            value = value + self.penalty(self.model)
        if value.requires_grad:  # else the first step says what is wrong
            value.backward()
        self.unreached = {name for name, p in self.parameters.items() if p.grad is None}
        for parameter in self.parameters.values():
            parameter.grad = None

    def loss(self, batch: Batch, last: bool, idle: bool) -> Loss:
        """The objective of a batch.

        Args:
            last: whether no other batch of this rank follows in the step.
            idle: whether it only keeps the others company: then it counts for nothing.
        """
        loss = self._loss(batch, last)
        if not idle:
            return loss
        totals, counts = [0 * value for value in loss.totals], [0 * value for value in loss.counts]
        terms = zip(loss.weights, totals, counts, strict=True)
        return type(loss).terms(dict(zip(loss.names, terms, strict=True)))

    def finish(self, idle: bool) -> None:
        """After the last backward pass of a step: gradients and buffers are then those of all.

        Buffers such as BatchNorm's statistics become the mean over the ranks that were not idle.

        Raises:
            RuntimeError: a parameter is reached by some batches and not by others.
        """
        for name, parameter in self.parameters.items():
            if (parameter.grad is None) != (name in self.unreached):
                raise RuntimeError(
                    f"the objective reaches {name} with some batches and not with others, which "
                    "several ranks cannot train: freeze it, or always use its output, if need be "
                    "times 0, or train in one process"
                )
        if self.moved:
            parts = [buffer.detach().double().reshape(-1) for buffer in self.moved]
            mean = torch.cat([*parts, parts[0].new_ones(1)]).mul_(float(not idle))
            dist.all_reduce(mean)
            mean = mean[:-1].div_(mean[-1])
            for buffer, part in zip(self.moved, mean.split([len(p) for p in parts]), strict=True):
                buffer.copy_(part.view_as(buffer))

    def gather(self) -> None:
        """Give the model the weights as they are now, if it is not the model that is trained."""

    def close(self) -> None:
        """The model is trained no more in this phase."""


class Replicas(_Parallel):
    """Every rank holds the whole model: DistributedDataParallel (Li et al. 2020) for one phase.

    Gradients are added up, not averaged, while the last backward pass of a step goes on.

    Args:
        model, live: the model, and the part of it that the phase runs.
        optimizer: over the parameters that the phase trains.
        penalty: a function of the model, added once a step, or None.

    Example:
        >>> dist = torch.distributed  # torchrun does this, of as many processes as it starts
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> batch = tk.data.Batch(torch.randn(3, 4), torch.tensor([0, 1, 0]), torch.arange(3))
        >>> model = nn.Linear(4, 2)
        >>> optimizer = tk.optim.build(tk.layers.groups(model), lr=0.1)
        >>> ranks = tk.distributed.Replicas(model, model, tk.classification(), optimizer, None)
        >>> ranks.rehearse(batch, tk.devices.autocast(torch.device("cpu"), "fp32"))
        >>> ranks.loss(batch, last=True, idle=False).mean().backward()
        >>> ranks.finish(idle=False)
        >>> model.weight.grad.shape
        torch.Size([2, 4])
        >>> dist.destroy_process_group()
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = self.penalty
        if whole is not None:  # the ranks' gradients are added up
            self.penalty = lambda model: whole(model) / ranks()
        self.wrapped: nn.parallel.DistributedDataParallel | None = None

    def rehearse(self, batch: Batch, autocast: Autocast) -> None:
        super().rehearse(batch, autocast)
        if len(self.unreached) == len(self.parameters):
            return
        for name in self.unreached:  # DDP would wait for their gradients
            self.parameters[name].requires_grad_(False)
        ddp = nn.parallel.DistributedDataParallel
        known = inspect.signature(ddp).parameters  # torch 2.14 has a new name for the first
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        how: dict[str, Any] = {name: False, "init_sync": False, "gradient_as_bucket_view": True}
        self.wrapped = ddp(_Carrier(self.live), **how)
        self.wrapped.register_comm_hook(None, _sum_up)
        for name in self.unreached:
            self.parameters[name].requires_grad_(True)
        # It arranges its buckets anew after its first pass. That one is a rehearsal, too, so that a
        # run that resumes adds in the same order as one that was never interrupted.
        super().rehearse(batch, autocast)

    def _loss(self, batch: Batch, last: bool) -> Loss:
        if self.wrapped is None:
            loss: Loss = self.objective(self.live, batch)
            return loss
        self.wrapped.require_backward_grad_sync = last  # what no_sync() sets
        loss = self.wrapped(self.objective, batch)
        return loss

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The objective's outputs for a batch."""
        return cast(Tensor, self.objective.outputs(model, batch))


# DDP compares annotations with classes, and here they would be strings
def _sum_up(_, bucket):  # type: ignore[no-untyped-def]
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


class Shards(_Parallel):
    """Parameters, gradients and moments divided among the ranks: FSDP2, `fully_shard`, for a phase.

    A sharded twin of the live model is trained, one unit for each layer group; the model itself
    waits on the host (with a penalty, where it is), and `gather` brings it up to date. A module
    that holds parameters must be used by calling it. The optimizer's parameters are replaced.

    A penalty on parameters sees them whole: they are gathered once a step for it.

    Raises:
        ValueError: two modules share a parameter, which the units would part.

    Example:
        >>> dist = torch.distributed  # torchrun does this, of as many processes as it starts
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> batch = tk.data.Batch(torch.randn(3, 4), torch.tensor([0, 1, 0]), torch.arange(3))
        >>> model = nn.Linear(4, 2)
        >>> optimizer = tk.optim.build(tk.layers.groups(model), lr=0.1)
        >>> ranks = tk.distributed.Shards(model, model, tk.classification(), optimizer, None)
        >>> ranks.loss(batch, last=True, idle=False).mean().backward()
        >>> ranks.finish(idle=False)
        >>> optimizer.step()
        >>> ranks.gather()  # now the model has what its divided twin learned
        >>> ranks.close()
        >>> dist.destroy_process_group()
    """

    def __post_init__(self) -> None:
        live = self.live
        if len(list(live.parameters())) < len(list(live.named_parameters(remove_duplicate=False))):
            raise ValueError(
                "the model uses a parameter in two places, and parallel='fsdp' would make two of "
                "it: use parallel='ddp'"
            )
        self.plain, self.device = live, next(live.parameters()).device
        self.whole_penalty, self.penalty = self.penalty, None
        if self.whole_penalty is None:
            self.model.to("cpu")
        self.live = copy.deepcopy(live)
        self.carrier = _sharded(self.live, self.device)
        twins = dict(self.live.named_parameters())
        for group in self.optimizer.param_groups:
            group["params"] = [twins[name] for name in group["names"]]
            if "momentum" in group:  # divided tensors have no fused kernel of SGD
                group |= {"fused": False, "foreach": True}
        super().__post_init__()

    def _loss(self, batch: Batch, last: bool) -> Loss:
        loss: Loss = self.carrier(self._told, batch)[1]
        return loss

    def _told(self, model: nn.Module, batch: Batch) -> tuple[tuple[Tensor, ...], Loss]:
        loss = self.objective(model, batch)
        return loss.totals, loss  # FSDP2 looks for tensors in what a forward pass returns

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The objective's outputs for a batch."""
        return cast(Tensor, self.carrier(self.objective.outputs, batch))

    def finish(self, idle: bool) -> None:
        super().finish(idle)
        if self.whole_penalty is None:
            return
        full = {name: whole(p.detach()).requires_grad_() for name, p in self.parameters.items()}
        named = {f"model.{name}": tensor for name, tensor in full.items()}
        value = torch.func.functional_call(_Carrier(self.model), named, (self.whole_penalty,))
        if not value.requires_grad:
            return
        gradients = torch.autograd.grad(value, list(full.values()), allow_unused=True)
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            if gradient is not None:
                part = divided_like(gradient, parameter)
                parameter.grad = part if parameter.grad is None else parameter.grad + part

    def gather(self) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                self.plain.get_parameter(name).copy_(whole(parameter.detach()))
            for own, trained in zip(self.plain.buffers(), self.live.buffers(), strict=True):
                own.copy_(trained)

    def close(self) -> None:
        self.model.to(self.device)


def _sharded(twin: nn.Module, device: torch.device) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(device.type, (ranks(),))
    for group in layers.groups(twin):
        for module in group.modules:
            if any(True for _ in module.parameters()):
                fully_shard(module, mesh=mesh)
    # At rest the root, too, is divided: what looks at the parameters finds them alike.
    carrier = _Carrier(twin)
    fully_shard(carrier, mesh=mesh, reshard_after_forward=True)
    for module in carrier.modules():
        if isinstance(module, FSDPModule):  # sums, not means
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return carrier
