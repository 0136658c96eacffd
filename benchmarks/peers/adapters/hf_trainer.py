"""The Trainer of Hugging Face transformers, with models that compute their own loss."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from benchmarks.peers.adapters.base import Adapter, Settings
from benchmarks.peers.tasks import Items, Task, cross_entropy

NAMES = ("inputs", "labels")


class LossInside(nn.Module):
    """A model with its loss, in the way of the library's classification heads.

    As there, `forward` takes any keyword, and the loss is the mean of the batch it is given
    (`BertForSequenceClassification` of the pinned version is one such).
    """

    def __init__(self, task: Task):
        super().__init__()
        self.network, self.weights = task.model, task.class_weights
        self.keeps_eval = False

    def train(self, mode: bool = True) -> LossInside:
        super().train(mode)
        if self.keeps_eval:
            self.network.backbone.eval()
        return self

    def forward(self, inputs: Tensor, labels: Tensor | None = None, **kwargs: Any) -> dict:
        logits = self.network(inputs)
        return {"loss": cross_entropy(logits, labels, self.weights), "logits": logits}


class LossCounted(LossInside):
    """A model whose loss divides by the count it is told, as the library's language models do."""

    def forward(
        self, inputs: Tensor, labels: Tensor | None = None,
        num_items_in_batch: Tensor | None = None, **kwargs: Any,
    ) -> dict:  # fmt: skip
        if num_items_in_batch is None:
            return super().forward(inputs, labels)
        logits = self.network(inputs)
        total = cross_entropy(logits, labels, self.weights, "sum")
        return {"loss": total / num_items_in_batch, "logits": logits}


class HFTrainer(Adapter):
    key, title = "hf-trainer", "HF Trainer, loss of the batch"
    packages = ("transformers", "accelerate")
    model_type: type[nn.Module] = LossInside
    setup = (
        "`Trainer(model, TrainingArguments(...), train_dataset=...)`. The model computes the mean "
        "loss of its batch in `forward`, which takes any keyword, as the library's classification "
        "heads do. `use_cpu=True`, `disable_tqdm=True`; the schedule and the optimiser are named "
        "by `lr_scheduler_type` and `optim`."
    )
    notes: ClassVar[dict[str, str]] = {
        "accumulate": "`gradient_accumulation_steps=4`, `max_grad_norm=0`.",
        "frozen": "`requires_grad_(False)` on the backbone.",
        "resume": '`save_strategy="steps"`, `save_steps=1`, `resume_from_checkpoint`.',
        "groups.rates": "Two groups of SGD handed over as `optimizers=(optimizer, None)`.",
        "best.nan": '`load_best_model_at_end=True`, `metric_for_best_model="score"`.',
        "best.restored": "Defaults.",
    }
    not_offered: ClassVar[dict[str, str]] = {
        "groups.equal": "the optimiser is made once, and nothing is unfrozen in mid-run",
        "unused": "no such check in one process",
    }
    settings: ClassVar[Settings] = {
        "accumulate": {"`model.accepts_loss_kwargs = False`": {"accepts": False}},
        "frozen": {
            "`backbone.eval()` before `train()`": {"set_eval": True},
            "a model whose own `train()` keeps the backbone in eval mode": {"keeps_eval": True},
        },
        "unused": {"what the run said": {}},
        "best.restored": {"`load_best_model_at_end=True`": {"best": True}},
        "reads": {"`logging_nan_inf_filter=False`": {"logging_nan_inf_filter": False}},
    }

    def _trainer(
        self, task: Task, accepts: bool | None = None, keeps_eval: bool = False, **given: Any
    ) -> Trainer:
        AcceleratorState._reset_state(reset_partial_state=True)  # as in a fresh process
        GradientState._reset_state()
        model = self.model_type(task)
        model.keeps_eval = keeps_eval
        if accepts is not None:
            model.accepts_loss_kwargs = accepts
        optimizers, score = (None, None), None
        if isinstance(task.lr, tuple):
            optimizers = (task.torch_optimizer(), None)
        else:
            given |= {"learning_rate": task.lr, "weight_decay": task.weight_decay}
            given |= {"optim": {"sgd": "sgd", "adamw": "adamw_torch"}[task.optimizer]}
        if not task.clips:
            given |= {"max_grad_norm": 0.0}
        if task.keeps:
            given |= {"save_strategy": "steps", "save_steps": 1}
        if task.score is not None:
            given |= {"eval_strategy": "epoch", "save_strategy": "epoch"}
            score = lambda _: {"score": task.score()}  # noqa: E731
        if task.best:
            given |= {"load_best_model_at_end": True, "metric_for_best_model": "score"}
            given |= {"greater_is_better": True}
        arguments = TrainingArguments(
            output_dir=str(task.directory),
            num_train_epochs=task.epochs,
            per_device_train_batch_size=task.batch_size,
            gradient_accumulation_steps=task.accumulate,
            lr_scheduler_type=task.schedule,
            seed=task.seed,
            use_cpu=True,
            disable_tqdm=True,
            **given,
        )
        return Trainer(
            model,
            arguments,
            train_dataset=Items(task.train, NAMES),
            eval_dataset=None if task.held_out is None else Items(task.held_out, NAMES),
            compute_metrics=score,
            optimizers=optimizers,
        )

    def train(
        self, task: Task, set_eval: bool = False, best: bool | None = None, **given: Any
    ) -> None:
        if best is not None:
            task.best = best
        if task.frozen:
            task.model.backbone.requires_grad_(False)
        if set_eval:
            task.model.backbone.eval()
        last = get_last_checkpoint(str(task.directory)) if task.resume else None
        self._trainer(task, **given).train(resume_from_checkpoint=last)

    def evaluate(self, task: Task, batch_size: int) -> float:
        trainer = self._trainer(task, per_device_eval_batch_size=batch_size)
        return trainer.evaluate()["eval_loss"]


class HFTrainerCounted(HFTrainer):
    key, title = "hf-trainer-counted", "HF Trainer, loss by count"
    model_type = LossCounted
    setup = (
        "As before, but the model's `forward` accepts `num_items_in_batch` and divides the sum of "
        "its losses by that, as the library's language models do."
    )
    settings: ClassVar[Settings] = {
        name: given for name, given in HFTrainer.settings.items() if name != "accumulate"
    }


def first_update_of_a_library_head(accumulate: int, folder: str) -> tuple[Tensor, Tensor]:
    """The first update of a small `BertForSequenceClassification`, and the gradient of one batch.

    Sixteen items in `accumulate` equal micro-batches, by SGD at rate 1 without dropout: the figure
    that shows `LossInside` to be a fair copy of the library's own heads.

    Args:
        folder: where the Trainer may write.
    """
    from transformers import BertConfig, BertForSequenceClassification

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 8, "max_position_embeddings": 8, "num_labels": 3}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForSequenceClassification(BertConfig(**sizes, **quiet)).double()
    tokens, labels = torch.randint(1, 20, (16, 6)), torch.randint(0, 3, (16,))
    model(tokens, labels=labels).loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    data = Items((tokens, labels), ("input_ids", "labels"))
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=16 // accumulate,
        gradient_accumulation_steps=accumulate,
        num_train_epochs=1,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    Trainer(model, arguments, train_dataset=data).train()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    return before - after, gradient
