"""Lightning: a LightningModule as in its documentation, and a Trainer."""

from __future__ import annotations

from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from benchmarks.peers.adapters.base import Adapter, Settings
from benchmarks.peers.tasks import Items, Task


class Module(L.LightningModule):
    """The module of the documentation: a loss, a log, an optimizer."""

    def __init__(self, task: Task):
        super().__init__()
        self.network = task.model
        self.task = task

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        loss = self.task.loss(self.network(inputs), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        inputs, labels = batch
        self.log("val_loss", self.task.loss(self.network(inputs), labels))

    def on_validation_epoch_end(self):
        if self.task.score is not None and not self.trainer.sanity_checking:
            self.log("score", self.task.score())

    def configure_optimizers(self):
        optimizer = self.task.torch_optimizer()
        schedule = self.task.torch_schedule(optimizer)
        if schedule is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Unfreezing(BaseFinetuning):
    """The documented callback: a layer of the backbone after the other, each a group of its own."""

    def __init__(self, epoch: int | None, train_bn: bool = True):
        super().__init__()
        self.epoch, self.train_bn = epoch, train_bn

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.network.backbone, train_bn=self.train_bn)

    def finetune_function(self, pl_module, current_epoch, optimizer):
        if current_epoch == self.epoch:
            rate = optimizer.param_groups[0]["lr"]
            for layer in reversed(list(pl_module.network.backbone)):
                self.unfreeze_and_add_param_group(layer, optimizer, lr=rate)


class Lightning(Adapter):
    key, title = "lightning", "Lightning"
    packages = ("lightning", "torchdata")
    setup = (
        "A `LightningModule` with `training_step`, `validation_step` and `configure_optimizers` "
        "as in the documentation (torch's optimiser, its schedule once a step), and "
        '`Trainer(accelerator="cpu", devices=1)`.'
    )
    notes: ClassVar[dict[str, str]] = {
        "accumulate": "`accumulate_grad_batches=4`.",
        "frozen": (
            "`requires_grad_(False)` and `eval()` on the backbone in the module, as "
            "`LightningModule.freeze()` does; `fit` leaves the modes as they are."
        ),
        "resume": (
            "`ModelCheckpoint(every_n_train_steps=1, save_last=True)`, `fit(ckpt_path=...)`. With "
            "torch's own `DataLoader` it warns that the loader is not resumable."
        ),
        "groups.equal": (
            "`BaseFinetuning`, each layer added by `unfreeze_and_add_param_group`, so that each "
            "may have a rate of its own. A warning says that some are skipped."
        ),
        "best.nan": (
            '`ModelCheckpoint(monitor="score", mode="max")`, then `best_model_path` loaded.'
        ),
        "best.restored": (
            "The fit itself loads nothing; `validate`, `test` and `predict` take "
            '`ckpt_path="best"`.'
        ),
    }
    not_offered: ClassVar[dict[str, str]] = {
        "groups.decay": "left to `configure_optimizers`, which is the user's",
        "unused": "no such check in one process",
    }
    settings: ClassVar[Settings] = {
        "frozen": {
            "`requires_grad_(False)` alone": {"sets_eval": False},
            "`BaseFinetuning.freeze()`": {"train_bn": True, "sets_eval": False},
            "`BaseFinetuning.freeze(train_bn=False)`": {"train_bn": False, "sets_eval": False},
        },
        "resume": {"torchdata's `StatefulDataLoader`": {"loader": StatefulDataLoader}},
        "groups.decay": {"torch's AdamW over all parameters": {}},
        "unused": {"what the run said": {}},
        "best.restored": {"`best_model_path` loaded afterwards": {"best": True}},
        "reads": {"`enable_progress_bar=False`": {"enable_progress_bar": False}},
    }

    def train(
        self, task: Task, sets_eval: bool = True, train_bn: bool | None = None,
        best: bool | None = None, loader: type = DataLoader, **given: Any,
    ) -> None:  # fmt: skip
        L.seed_everything(task.seed, verbose=False)
        if best is not None:
            task.best = best
        callbacks, keeping = [], None
        if task.unfreeze_at is not None or train_bn is not None:
            callbacks.append(Unfreezing(task.unfreeze_at, train_bn is not False))
        elif task.frozen:
            task.model.backbone.requires_grad_(False)
            if sets_eval:
                task.model.backbone.eval()
        if task.keeps:
            keeping = ModelCheckpoint(task.directory, every_n_train_steps=1, save_last=True)
        elif task.best:
            keeping = ModelCheckpoint(task.directory, monitor="score", mode="max")
        module = Module(task)
        if callbacks:  # as documented: the optimizer starts with what is trained
            callbacks[0].freeze_before_training(module)
        last = task.directory / "last.ckpt" if task.resume else None
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=task.epochs,
            accumulate_grad_batches=task.accumulate,
            callbacks=[*callbacks, keeping] if keeping else callbacks,
            default_root_dir=task.directory,
            **given,
        )
        held_out = None
        if task.held_out is not None:
            held_out = DataLoader(Items(task.held_out), batch_size=task.batch_size)
        batches = loader(Items(task.train), batch_size=task.batch_size, shuffle=True)
        trainer.fit(module, batches, held_out, ckpt_path=last)
        if task.best:
            stored = torch.load(keeping.best_model_path, weights_only=True)
            module.load_state_dict(stored["state_dict"])

    def evaluate(self, task: Task, batch_size: int) -> float:
        trainer = L.Trainer(accelerator="cpu", devices=1, default_root_dir=task.directory)
        loader = DataLoader(Items(task.held_out), batch_size=batch_size)
        return trainer.validate(Module(task), loader, verbose=False)[0]["val_loss"]
