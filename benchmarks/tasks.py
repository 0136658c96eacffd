"""What is trained: one data set, one model, one recipe, the same for every system.

The recipe is what the peers have in common: AdamW (fused) without weight decay, a rate that falls
in a straight line from its peak to 0, clipping by norm, shuffled batches.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import transferkit as tk


@dataclass(frozen=True)
class Rows:
    """Inputs `(n, width)` float32 and labels `(n,)` int64, in memory."""

    inputs: Tensor
    labels: Tensor
    collate = None

    def dataset(self) -> Dataset:
        """The items `(input, label)` as the peers take them."""
        return TensorDataset(self.inputs, self.labels)

    def source(self) -> tk.data.Source:
        """The same items as transferkit takes them."""
        return tk.data.tensors(self.inputs, self.labels)

    def first(self, count: int) -> Rows:
        return Rows(self.inputs[:count], self.labels[:count])


@dataclass(frozen=True)
class Texts:
    """Texts as int64 tensors of token ids, without the padding's 0, and labels `(n,)` int64."""

    tokens: Sequence[Tensor]
    labels: Tensor

    def dataset(self) -> Dataset:
        """The items `(tokens, label)`, of unequal length: `collate` makes a batch of them."""
        return _Pairs(self)

    def source(self) -> tk.data.Source:
        """The same items as transferkit takes them."""
        rows = [row.tolist() for row in self.tokens]
        return tk.data.texts(rows, self.labels, _Tokenised(), max(map(len, rows)))

    def first(self, count: int) -> Texts:
        return Texts(self.tokens[:count], self.labels[:count])

    @property
    def lengths(self) -> np.ndarray:
        return np.fromiter(map(len, self.tokens), np.int64, len(self.tokens))

    @staticmethod
    def collate(items: Sequence[tuple[Tensor, Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
        """A batch, padded to its longest text."""
        tokens, labels = zip(*items, strict=True)
        ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}, torch.stack(labels)


class _Pairs(Dataset):
    def __init__(self, texts: Texts):
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts.tokens)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.texts.tokens[index], self.texts.labels[index]


class _Tokenised:
    # a tokenizer for texts that are token ids already
    pad_token_id = 0

    def __call__(self, rows: list, truncation: bool, max_length: int) -> dict[str, list]:
        return {"input_ids": rows}


@dataclass(frozen=True)
class Task:
    """What a system trains.

    Attributes:
        model: the initial model, which every run copies; a `tk.Staged` whose last stage is "head"
            where the task is on texts or trains the head alone.
        head_only: all but the head is frozen.
        precision: "fp32" or "bf16".
        device: "cpu" or "cuda", where it is trained.
    """

    data: Rows | Texts
    model: nn.Module
    epochs: int
    lr: float
    batch_size: int = 32
    clip: float = 1.0
    head_only: bool = False
    precision: str = "fp32"
    seed: int = 0
    device: str = "cpu"

    @property
    def updates(self) -> int:
        """How many updates a run makes."""
        return self.epochs * math.ceil(len(self.data.labels) / self.batch_size)

    def but(self, **changes: Any) -> Task:
        """The same task with other settings."""
        return replace(self, **changes)

    def build(self) -> nn.Module:
        """A fresh copy of the initial model, on its device, in train mode, frozen as is said."""
        model = copy.deepcopy(self.model).train().to(self.device)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not self.head_only or name.startswith("head."))
        return model

    def factor(self, update: int) -> float:
        """What the peak rate is multiplied by at an update, from 0."""
        return max(0.0, 1.0 - update / self.updates)


def random_rows(count: int, width: int) -> Rows:
    """Normal inputs; the label is the sign of the first column."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, width, generator=generator)
    return Rows(inputs, (inputs[:, 0] > 0).long())


def random_texts(count: int, shortest: int, longest: int, vocabulary: int = 1000) -> Texts:
    """Random tokens in texts of random length; the label is the parity of the first token."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    tokens = [torch.randint(1, vocabulary, (length,), generator=generator) for length in lengths]
    return Texts(tokens, torch.stack([row[0] % 2 for row in tokens]))


def film_reviews(model: tk.Staged, train: int, validation: int) -> tuple[Texts, Texts]:
    """So many snippets of the training and of the validation split, tokenised."""
    reviews, found = tk.datasets.load("film-reviews"), []
    for split, count in ((reviews.train, train), (reviews.validation, validation)):
        chosen = split.take(count)
        source = model.prepare(chosen)
        found.append(Texts(source.tokens.split(source.lengths.tolist()), source.labels))
    return found[0], found[1]


def small_bert(
    layers: int = 2, hidden: int = 128, dropout: float = 0.1, heads: int = 2, vocabulary: int = 1000
) -> tk.Staged:
    """A BERT encoder with random weights, a mean pool and a head of two."""
    torch.manual_seed(0)
    config = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": 128,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    stages = tk.models.text_stages(tk.models.bert(config, None), None, "small BERT")
    return tk.Staged([*stages, ("head", nn.Linear(hidden, 2))], labels=["even", "odd"])


def without_dropout(model: nn.Module) -> nn.Module:
    """The model with every dropout set to 0, in place."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model
