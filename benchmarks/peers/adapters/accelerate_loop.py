"""Hugging Face Accelerate: the loop of its documentation, written out."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.peers.adapters.base import Adapter, Settings
from benchmarks.peers.tasks import IGNORED, Items, Task, cross_entropy

_USER = "left to the loop, which is the user's"


class Accelerate(Adapter):
    key, title = "accelerate", "Accelerate"
    packages = ("accelerate",)
    setup = (
        "The documented loop: `prepare`, then for each batch `with accelerator.accumulate(model)`, "
        "`accelerator.backward(loss)`, the steps of torch's optimiser and schedule, `zero_grad`. "
        "`model.train()` begins each epoch. `cpu=True`."
    )
    notes: ClassVar[dict[str, str]] = {
        "accumulate": "`gradient_accumulation_steps=4`.",
        "frozen": "`requires_grad_(False)` on the backbone; `model.train()` is a line of the loop.",
        "resume": "`save_state` after each update, then `load_state` and `skip_first_batches`.",
        "evaluate": "`gather_for_metrics` on the logits; the loss is that of all of them together.",
    }
    not_offered: ClassVar[dict[str, str]] = {
        "groups.decay": _USER,
        "groups.equal": _USER,
        "unused": _USER,
        "best.nan": _USER,
        "best.restored": _USER,
    }
    settings: ClassVar[Settings] = {
        "accumulate": {"the documented recipe for samples of variable size": {"counted": True}},
        "frozen": {"`backbone.eval()` after `model.train()`": {"set_eval": True}},
        "resume": {
            "`use_seedable_sampler=True`": {"use_seedable_sampler": True},
        },
        "groups.decay": {"torch's AdamW over all parameters": {}},
    }

    def _accelerator(self, task: Task, **config: Any) -> Accelerator:
        AcceleratorState._reset_state(reset_partial_state=True)  # as in a fresh process
        GradientState._reset_state()
        set_seed(task.seed)
        if config.get("use_seedable_sampler"):
            config["data_seed"] = task.seed
        return Accelerator(
            gradient_accumulation_steps=task.accumulate,
            dataloader_config=DataLoaderConfiguration(**config),
            cpu=True,
        )

    def train(
        self, task: Task, counted: bool = False, set_eval: bool = False, **config: Any
    ) -> None:
        if task.frozen:
            task.model.backbone.requires_grad_(False)
        accelerator = self._accelerator(task, **config)
        optimizer = task.torch_optimizer()
        loader = DataLoader(Items(task.train), batch_size=task.batch_size, shuffle=True)
        parts = (task.model, optimizer, loader, task.torch_schedule(optimizer))
        model, optimizer, loader, schedule = accelerator.prepare(*parts)
        if counted:
            return _counted(accelerator, task, model, optimizer, loader)
        first, done = self._resumed(accelerator, task, len(loader))
        for epoch in range(first, task.epochs):
            model.train()
            if set_eval:
                model.backbone.eval()
            loader.set_epoch(epoch)
            skips = epoch == first and done
            batches = accelerator.skip_first_batches(loader, done) if skips else loader
            for made, (inputs, labels) in enumerate(batches, done if skips else 0):
                with accelerator.accumulate(model):
                    loss = task.loss(model(inputs), labels)
                    accelerator.backward(loss)
                    optimizer.step()
                    if schedule is not None:
                        schedule.step()
                    optimizer.zero_grad()
                if task.keeps:
                    accelerator.save_state(str(task.directory / "state"))
                    text = str(epoch * len(loader) + made + 1)
                    (task.directory / "batches").write_text(text)
        return None

    def _resumed(self, accelerator: Accelerator, task: Task, batches: int) -> tuple[int, int]:
        # The epoch to go on in, and how many batches of it were done.
        if not task.resume:
            return 0, 0
        accelerator.load_state(str(task.directory / "state"))
        return divmod(int((task.directory / "batches").read_text()), batches)

    def evaluate(self, task: Task, batch_size: int) -> float:
        accelerator = self._accelerator(task)
        loader = DataLoader(Items(task.held_out), batch_size=batch_size)
        model, loader = accelerator.prepare(task.model, loader)
        model.eval()
        found = []
        for inputs, labels in loader:
            with torch.no_grad():
                logits = model(inputs)
            found.append(accelerator.gather_for_metrics((logits, labels)))
        logits, labels = (torch.cat(part) for part in zip(*found, strict=True))
        return float(task.loss(logits, labels))


def _counted(accelerator: Accelerator, task: Task, model, optimizer, loader) -> None:
    # The documented loop for samples of variable size: sums, divided by the count of the group.
    model.train()
    for _ in range(task.epochs):
        batches = list(loader)
        for at in range(0, len(batches), task.accumulate):
            group = batches[at : at + task.accumulate]
            count = sum(_count(labels, task.class_weights) for _, labels in group)
            for inputs, labels in group:
                loss = cross_entropy(model(inputs), labels, task.class_weights, "sum")
                accelerator.backward(loss * task.accumulate / count)
            optimizer.step()
            optimizer.zero_grad()


def _count(labels: Tensor, weights: tuple[float, ...] | None) -> Tensor:
    counting = labels[labels != IGNORED]
    if weights is None:
        return torch.tensor(len(counting))
    return torch.tensor(weights, dtype=torch.float64)[counting].sum()
