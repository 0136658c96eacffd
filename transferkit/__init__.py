"""transferkit: the small library under the book on transfer learning.

The public names live here and are loaded on first use, so that ``import transferkit as tk``
costs next to nothing and a reader who only wants ``tk.datasets`` never pays for the rest.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = (
    "adapt",
    "apply",
    "assets",
    "backbones",
    "cache",
    "checkpoint",
    "checks",
    "claims",
    "data",
    "datasets",
    "devices",
    "discrepancy",
    "distributed",
    "engine",
    "evaluation",
    "figures",
    "layers",
    "metrics",
    "models",
    "objectives",
    "optim",
    "peft",
    "pictures",
    "plan",
    "preflight",
    "pretext",
    "profiles",
    "regularised",
    "show",
    "target",
    "transferability",
    "vectors",
)

_NAMES = {
    # training: the verbs, the plan, the result
    "fit": "engine",
    "evaluate": "evaluation",
    "predict": "evaluation",
    "Loss": "objectives",
    "Run": "engine",
    "load": "checkpoint",
    "linear_probe": "plan",
    "finetune": "plan",
    "gradual_unfreezing": "plan",
    "probe_then_finetune": "plan",
    "Phase": "plan",
    # before training: what leaves no trace
    "check": "preflight",
    "lr_find": "preflight",
    # models and their layer groups
    "Staged": "layers",
    "staged": "backbones",
    "freeze": "layers",
    "unfreeze": "layers",
    "summary": "layers",
    # parameter-efficient fine-tuning, and arithmetic with weights
    "lora": "peft",
    "adalora": "peft",
    "ia3": "peft",
    "adapters": "peft",
    "prefix": "peft",
    "merge": "peft",
    "interpolate": "vectors",
    "task_vector": "vectors",
    # objectives
    "classification": "objectives",
    "regression": "objectives",
    "token_classification": "objectives",
    "spans": "objectives",
    "masked": "pretext",
    "masked_lm": "pretext",
    "two_views": "pretext",
    "contrastive": "pretext",
    "reconstruction": "pretext",
    "mixup": "regularised",
    "distillation": "regularised",
    "l2_sp": "regularised",
    "adversarial": "regularised",
    # adaptation to a target without labels
    "pair": "target",
    "unlabelled": "target",
    "pseudo_labels": "target",
    "joined": "target",
    "self_training": "target",
    "dann": "adapt",
    "cdan": "adapt",
    "align": "adapt",
    "confusion": "adapt",
    "ramp": "adapt",
    "grad_reverse": "adapt",
    "with_discriminator": "adapt",
    "without_discriminator": "adapt",
    "adabn": "adapt",
    # how far apart source and target are
    "mmd": "discrepancy",
    "coral": "discrepancy",
    "wasserstein": "discrepancy",
    "proxy_a_distance": "discrepancy",
    # metrics
    "accuracy": "metrics",
    "balanced_accuracy": "metrics",
    "macro_f1": "metrics",
    "mcc": "metrics",
    "auroc": "metrics",
    "confusion_matrix": "metrics",
    "mean_interval": "metrics",
    "paired_interval": "metrics",
    "bootstrap_interval": "metrics",
    # choosing a model: scores of its features, and what training it would take
    "leep": "transferability",
    "nce": "transferability",
    "logme": "transferability",
    "h_score": "transferability",
    "knn_accuracy": "transferability",
    "centroid_accuracy": "transferability",
    "probe_accuracy": "transferability",
    "rank_models": "transferability",
    "rank_layers": "transferability",
    # evidence: what a lab prints, draws and asserts
    "profile": "profiles",
    "claim": "claims",
    "figure": "figures",
}

__all__ = ["__version__", *_MODULES, *_NAMES]


def __getattr__(name: str) -> Any:
    value: Any
    if name in _NAMES:
        value = getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module 'transferkit' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
