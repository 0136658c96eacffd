"""The Trainer of transformers, with its defaults and tuned."""

from __future__ import annotations

import tempfile
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from benchmarks.systems import System
from benchmarks.tasks import Rows, Task


class _RowsModel(nn.Module):
    # The Trainer asks a model for its loss; arguments are named like the columns of the data.
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(inputs)
        return {"loss": F.cross_entropy(logits.float(), labels), "logits": logits}


class _TextModel(_RowsModel):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict:
        return super().forward({"input_ids": input_ids, "attention_mask": attention_mask}, labels)


class _Columns(Dataset):
    # items as dictionaries
    def __init__(self, task: Task, name: str):
        self.items, self.name = task.data.dataset(), name

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        inputs, label = self.items[index]
        return {self.name: inputs, "labels": label}


def defaults(model: nn.Module, task: Task) -> None:
    """As the arguments come, but for the recipe."""
    _train(model, task)


def tuned(model: nn.Module, task: Task) -> None:
    """Nothing logged, stored or shown; texts of similar length together; bf16 where it is good."""
    quiet = {"logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True}
    if not isinstance(task.data, Rows):
        quiet["train_sampling_strategy"] = "group_by_length"
    _train(model, task, bf16=task.precision == "bf16", logging_nan_inf_filter=False, **quiet)


def _train(model: nn.Module, task: Task, **more: Any) -> None:
    from transformers import Trainer, TrainingArguments

    rows = isinstance(task.data, Rows)

    def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        pairs = [(item["input_ids"], item["labels"]) for item in items]
        inputs, labels = task.data.collate(pairs)
        return {**inputs, "labels": labels}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=task.epochs,
            per_device_train_batch_size=task.batch_size,
            learning_rate=task.lr,
            lr_scheduler_type="linear",
            max_grad_norm=task.clip,
            seed=task.seed,
            use_cpu=task.device == "cpu",
            **more,
        )
        trainer = Trainer(
            model=(_RowsModel if rows else _TextModel)(model),
            args=arguments,
            train_dataset=_Columns(task, "inputs" if rows else "input_ids"),
            data_collator=None if rows else collate,
        )
        trainer.train()


_NEEDS = ("transformers", "accelerate")
_BOTH = (
    "The model is wrapped in a module that returns its loss, as the Trainer asks of one.",
    "Texts are padded by the collator of the benchmark, not by DataCollatorWithPadding.",
)
SYSTEMS = [
    System(
        "HF Trainer",
        defaults,
        _NEEDS,
        notes=(
            *_BOTH,
            "Its defaults draw batches of all lengths, log, show a bar (what is written to the "
            "terminal is discarded), and store the model and the optimizer at the end.",
        ),
    ),
    System(
        "HF Trainer, tuned",
        tuned,
        _NEEDS,
        tuned=True,
        notes=(
            *_BOTH,
            "Grouping by length, bf16 where the processor has AMX; no logs, no filter for NaN, "
            "nothing stored, no bar.",
        ),
    ),
]
