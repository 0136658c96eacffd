"""Loops written by hand: the least that the recipe takes, and what most people write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import transferkit as tk
from benchmarks.systems import System
from benchmarks.tasks import Rows, Task, Texts

Batch = tuple[Tensor | dict[str, Tensor], Tensor]


def loop(model: nn.Module, task: Task, batches: Callable[[int], Iterable[Batch]]) -> None:
    """The recipe: forward, loss, backward, clipping, fused AdamW, a rate that falls to 0."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=task.lr, weight_decay=0.0, fused=True)
    update, half, away = 0, task.precision == "bf16", task.device != "cpu"
    for epoch in range(task.epochs):
        for inputs, labels in batches(epoch):
            if away:
                inputs, labels = onto(inputs, task.device), onto(labels, task.device)
            optimizer.param_groups[0]["lr"] = task.lr * task.factor(update)
            if half:
                with torch.autocast(task.device, torch.bfloat16):
                    outputs = model(inputs)
            else:
                outputs = model(inputs)
            F.cross_entropy(outputs.float(), labels).backward()
            nn.utils.clip_grad_norm_(parameters, task.clip, foreach=True)
            optimizer.step()
            optimizer.zero_grad()
            update += 1


def onto(part: Tensor | dict[str, Tensor], device: str) -> Tensor | dict[str, Tensor]:
    """Inputs or labels on a device, copied without waiting where their memory is pinned."""
    if isinstance(part, Tensor):
        return part.to(device, non_blocking=True)
    return {name: tensor.to(device, non_blocking=True) for name, tensor in part.items()}


def sliced(model: nn.Module, task: Task) -> None:
    """Shuffled slices of tensors in memory."""
    loop(model, task, _slices(task.data, task.batch_size))


def _slices(rows: Rows, size: int) -> Callable[[int], Iterator[Batch]]:
    def batches(epoch: int) -> Iterator[Batch]:
        for index in torch.randperm(len(rows.labels)).split(size):
            yield rows.inputs[index], rows.labels[index]

    return batches


def loaded(model: nn.Module, task: Task) -> None:
    """A `DataLoader` over the items."""
    how = {"batch_size": task.batch_size, "shuffle": True, "collate_fn": task.data.collate}
    how["pin_memory"] = task.device != "cpu"
    loader = DataLoader(task.data.dataset(), **how)
    loop(model, task, lambda epoch: loader)


def bucketed(model: nn.Module, task: Task) -> None:
    """A `DataLoader` whose batches hold texts of similar length."""
    dataset, lengths = task.data.dataset(), task.data.lengths

    def batches(epoch: int) -> DataLoader:
        order = tk.data.order(len(lengths), task.batch_size, task.seed, epoch, lengths)
        sampler = [batch.tolist() for batch in order]
        how = {"collate_fn": task.data.collate, "pin_memory": task.device != "cpu"}
        return DataLoader(dataset, batch_sampler=sampler, **how)

    loop(model, task, batches)


def features(model: tk.Staged, task: Task) -> Rows:
    """What the frozen stages make of every text, computed once, texts of one length together."""
    data: Texts = task.data
    stop = len(model.stage_names) - 1
    found = torch.empty(0)
    half = task.precision == "bf16"
    with torch.no_grad(), torch.autocast(task.device, torch.bfloat16, half):
        for index in tk.data.in_sequence(len(data.labels), 64, data.lengths):
            inputs, _ = data.collate([(data.tokens[i], data.labels[i]) for i in index])
            states = model.run(onto(inputs, task.device), stop=stop).float().cpu()
            if not len(found):
                found = states.new_empty(len(data.labels), states.shape[1])
            found[torch.from_numpy(index)] = states
    return Rows(found, data.labels)


def once(model: tk.Staged, task: Task) -> None:
    """Features computed once, then the head trained on slices of them."""
    rows = features(model.eval(), task)
    head = model.get_submodule("head")
    loop(head, task.but(data=rows, precision="fp32"), _slices(rows, task.batch_size))


def one_pass(model: tk.Staged, task: Task) -> None:
    """The features alone, and nothing trained: no system with a backbone can do with less."""
    features(model.eval(), task)


SYSTEMS = [
    System("bare loop", sliced),
    System("bare loop, DataLoader", loaded),
    System(
        "bare loop, length buckets",
        bucketed,
        tuned=True,
        notes=("Its batches are those that transferkit draws: what remains is the framework.",),
    ),
    System(
        "bare loop, features once",
        once,
        tuned=True,
        notes=("What a careful user writes by hand for a frozen backbone.",),
    ),
    System(
        "one pass over the backbone",
        one_pass,
        tuned=True,
        notes=("It trains nothing: the time below which no system can come.",),
    ),
]
