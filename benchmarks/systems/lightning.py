"""PyTorch Lightning."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.systems import System
from benchmarks.tasks import Task


def train(model: nn.Module, task: Task) -> None:
    """A LightningModule and its Trainer."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, batch_index: int) -> torch.Tensor:
            inputs, labels = batch
            return F.cross_entropy(self.model(inputs), labels)

        def configure_optimizers(self) -> dict[str, Any]:
            parameters = [p for p in self.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(parameters, lr=task.lr, weight_decay=0.0, fused=True)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, task.factor)
            scheduler = {"scheduler": schedule, "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

    trainer = L.Trainer(
        max_epochs=task.epochs,
        accelerator=task.device,
        gradient_clip_val=task.clip,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    how = {"batch_size": task.batch_size, "shuffle": True, "collate_fn": task.data.collate}
    trainer.fit(Module(), DataLoader(task.data.dataset(), **how))


SYSTEMS = [
    System(
        "Lightning",
        train,
        ("lightning",),
        notes=("No logger, checkpoints, progress bar or summary.",),
    )
]
