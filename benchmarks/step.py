"""What the engine adds to a step: Python calls, operators and time, against loops written by hand.

Run it with `python benchmarks/step.py`. The three loops do the same updates: forward, loss,
backward, clipping by norm, fused AdamW, a cosine schedule. They take turns, and each time is the
least of five. Numbers of calls are exact; times depend on the machine and on what else it does.
"""

from __future__ import annotations

import math
import os
import sys
import time

os.environ["TRANSFERKIT_PROGRESS"] = "0"

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import transferkit as tk

ITEMS, WIDTH, BATCH, EPOCHS = 3200, 384, 32, 3
UPDATES = EPOCHS * ITEMS // BATCH


class Operators(TorchDispatchMode):
    """Counts the operators that reach the dispatcher."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += 1
        return operator(*args, **(kwargs or {}))


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, 2)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH // 4, 4, WIDTH, batch_first=True, dropout=0.0)
    return nn.Sequential(
        nn.Unflatten(1, (4, WIDTH // 4)),
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        nn.Flatten(),
        nn.Linear(WIDTH, 2),
    )


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(ITEMS, WIDTH, generator=generator)
    return inputs, (inputs[:, 0] > 0).long()


def _train(model: nn.Module, batches) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    parameters, update = list(model.parameters()), 0
    for _ in range(EPOCHS):
        for inputs, labels in batches():
            optimizer.param_groups[0]["lr"] = 5e-4 * (1 + math.cos(math.pi * update / UPDATES))
            loss = nn.functional.cross_entropy(model(inputs), labels)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad()
            update += 1


def sliced(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> None:
    """The least that a careful user would write: shuffled slices of tensors in memory."""

    def batches():
        for index in torch.randperm(ITEMS).split(BATCH):
            yield inputs[index], labels[index]

    _train(model, batches)


def loaded(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> None:
    """What most write: a DataLoader over a TensorDataset."""
    dataset = torch.utils.data.TensorDataset(inputs, labels)
    loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH, shuffle=True)
    _train(model, lambda: loader)


def engine(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> None:
    """`tk.fit` with the same plan."""
    plan = [tk.finetune(EPOCHS, lr=1e-3, warmup=0.0, weight_decay=0.0)]
    tk.fit(
        model,
        tk.classification(),
        (inputs, labels),
        plan=plan,
        batch_size=BATCH,
        precision="fp32",
        device="cpu",
    )


def calls(loop, model: nn.Module, *arrays: torch.Tensor) -> float:
    """Calls of Python functions in one update."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        loop(model, *arrays)
    finally:
        sys.setprofile(None)
    return count / UPDATES


def operators(loop, model: nn.Module, *arrays: torch.Tensor) -> float:
    """Operators that one update dispatches."""
    with Operators() as counter:
        loop(model, *arrays)
    return counter.count / UPDATES


def main() -> None:
    torch.set_num_threads(1)
    arrays = data()
    for make in (linear, encoder):
        times = {loop: math.inf for loop in (sliced, loaded, engine)}
        for _ in range(5):
            for loop in times:
                model, start = make(), time.perf_counter()
                loop(model, *arrays)
                times[loop] = min(times[loop], (time.perf_counter() - start) / UPDATES)
        print(f"{make.__name__}: {UPDATES} updates of {BATCH} items, one thread")
        for loop, seconds in times.items():
            numbers = (calls(loop, make(), *arrays), operators(loop, make(), *arrays))
            print(
                f"  {loop.__name__:8} {1e6 * seconds:7.0f} µs an update"
                f" {seconds / times[sliced]:5.2f} x {numbers[0]:7.1f} Python calls"
                f" {numbers[1]:7.1f} operators"
            )


if __name__ == "__main__":
    main()
