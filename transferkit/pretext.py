"""Tasks that need no labels. The one idea: what was hidden, paired or compressed is the label.

A source makes the task (`masked` hides tokens, `two_views` shows an item twice) as a pure function
of (seed, epoch, index); the objective only scores it. So evaluation is the same every time, and an
interrupted run goes on with the very same tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transferkit.data import Batch, Source, content_hash, randomness
from transferkit.objectives import (
    IGNORED,
    Loss,
    Number,
    TokenClassification,
    _at_least_float32,
    _labels,
    _Supervised,
    forward,
)


class Masked:
    """A source of texts some of whose tokens are hidden, for masked language modelling.

    Every token that is not special is chosen with probability `rate`. Of the chosen, 80 % become
    the mask token, 10 % a random token and 10 % stay (Devlin et al. 2019, Section 3.1). The labels
    of a batch, int64 `(batch, length)`, are the tokens at the chosen places and -100 elsewhere.
    Which ones follows from (seed, epoch, index): others in each epoch (Liu et al. 2019, Section
    4.1), and always the same in evaluation.

    Args:
        source: of `{"input_ids", "attention_mask"}`, both int64 `(batch, length)`, as
            `data.texts` gives it, or of one such tensor of tokens, all of them real; its labels are
            not looked at.
        tokenizer: one of transformers, from which is taken what is None below.
        rate: probability in (0, 1) that a token has to be predicted.
        mask: the number of the mask token.
        special: numbers of the tokens that are neither hidden nor drawn.
        vocabulary: how many tokens there are.

    Raises:
        ValueError: the rate is outside (0, 1), or the tokenizer lacks what is not given.

    Example:
        >>> texts = tk.data.tensors(torch.arange(40).reshape(4, 10))
        >>> source = tk.masked(texts, rate=0.5, mask=1, special=[0, 1], vocabulary=40)
        >>> batch = source.fetch(range(4), 0, 0)
        >>> hidden = batch.labels != -100
        >>> torch.equal(batch.labels[hidden], texts.inputs[hidden])
        True
    """

    labels = views = None

    def __init__(
        self, source: Source, tokenizer: Any = None, rate: float = 0.15, *,
        mask: int | None = None, special: Sequence[int] | None = None,
        vocabulary: int | None = None,
    ):  # fmt: skip
        if not 0.0 < rate < 1.0:
            raise ValueError(f"rate is {rate}, but a share in (0, 1) is expected: 0.15 is usual")
        named_mask, named_special = _special(tokenizer)
        mask = named_mask if mask is None else mask
        special = named_special if special is None else special
        vocabulary = vocabulary or (len(tokenizer) if hasattr(tokenizer, "__len__") else None)
        for name, value in (("mask", mask), ("special", special), ("vocabulary", vocabulary)):
            if value is None:
                expected = "but it is needed to hide tokens"
                raise ValueError(f"the tokenizer has no {name}, {expected}: pass {name}=...")
        self.source, self.lengths, self.rate, self.mask = source, source.lengths, rate, mask
        self.special = torch.tensor(sorted({*special, mask}))
        self.ordinary = torch.arange(vocabulary)
        self.ordinary = self.ordinary[~torch.isin(self.ordinary, self.special)]

    def __len__(self) -> int:
        return len(self.source)

    def fetch(self, indices: Sequence[int] | np.ndarray, epoch: int | None, seed: int) -> Batch:
        batch = self.source.fetch(indices, epoch, seed)
        single = isinstance(batch.inputs, Tensor)
        ids = batch.inputs if single else batch.inputs["input_ids"]
        mask = None if single else batch.inputs.get("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        # Two numbers a token, of its own text alone: no padding moves them.
        draws = torch.ones(2, *ids.shape, dtype=torch.float64)
        for row, item in enumerate(batch.index.tolist()):
            random = randomness(seed, -1 if epoch is None else epoch, item)
            count = int(real[row].sum())
            draws[:, row, real[row]] = torch.rand(2, count, generator=random, dtype=torch.float64)
        chosen = (draws[0] < self.rate) & real & ~torch.isin(ids, self.special)
        fate = draws[0] / self.rate  # of a chosen token, even in [0, 1)
        last = len(self.ordinary) - 1
        drawn = self.ordinary[(draws[1] * (last + 1)).long().clamp(max=last)]
        hidden = torch.where(fate < 0.8, self.mask, torch.where(fate < 0.9, drawn, ids))
        hidden = torch.where(chosen, hidden, ids)
        inputs = hidden if single else {**batch.inputs, "input_ids": hidden}
        return Batch(inputs, torch.where(chosen, ids, IGNORED), batch.index)

    def fingerprint(self) -> str | None:
        inner = self.source.fingerprint()
        how = (self.rate, self.mask, self.special, len(self.ordinary))
        return None if inner is None else content_hash(inner, *how)


def _special(tokenizer: Any) -> tuple[int | None, list[int] | None]:
    # The mask token and all special ones. A tokenizer that was read from one file names few of them
    # itself, but has them among the tokens that were added to its vocabulary.
    known = getattr(tokenizer, "all_special_ids", None)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    added = {number: token.content for number, token in added.items() if token.special}
    masks = [number for number, text in added.items() if text.lower() in ("[mask]", "<mask>")]
    mask = getattr(tokenizer, "mask_token_id", None)
    mask = masks[0] if mask is None and masks else mask
    return mask, None if known is None else [*known, *added]


@dataclass(frozen=True)
class MaskedLM(TokenClassification):
    """Cross-entropy of the hidden tokens, which the model names from those around them.

    A model gives logits `(n, L, V)` over the V tokens of its vocabulary; `masked` gives the labels
    `(n, L)`, the hidden token or -100 (Devlin et al. 2019, Section 3.1). The loss is the
    mean over the hidden tokens of all texts; its exponential is the perplexity of a hidden token.
    Arguments are those of `TokenClassification`.

    Example:
        >>> texts = tk.data.tensors(torch.arange(24).reshape(4, 6) % 9)
        >>> source = tk.masked(texts, rate=0.5, mask=1, special=[0, 1], vocabulary=9)
        >>> list(tk.evaluate(nn.Embedding(9, 9), tk.masked_lm(), source, tk.accuracy))
        ['loss', 'accuracy']
    """

    acts_below_head: ClassVar[bool] = True  # what is hidden differs in every epoch

    def validate(self, labels: Any, outputs_dim: int) -> None:
        """Check hidden tokens given with the data, `(n, L)`; see `TokenClassification`.

        Raises:
            ValueError: the data have labels of another kind.
        """
        labels = torch.as_tensor(labels)
        if labels.dim() != 2:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}, but the hidden tokens, (n, L), are "
                "expected: wrap the texts as tk.masked(texts, tokenizer)"
            )
        super().validate(labels, outputs_dim)


class TwoViews:
    """A source that shows every item twice, for contrastive learning: inputs `(batch, 2, ...)`.

    Of one source, the two are its looks in the epochs 2e and 2e + 1, two draws of its augmentation;
    in evaluation those of the epochs 0 and 1, always the same. Of two sources, such as the two
    sides of sentence pairs, they are item i of each, as it looks in epoch e. Texts are padded to
    the longest of the batch.

    Args:
        source: labels are taken from it; where it has none, an item's label is its number.
        other: as long as `source`; its item i belongs to item i there.

    Raises:
        ValueError: the sources differ in length.

    Example:
        >>> source = tk.two_views(tk.data.tensors(torch.randn(6, 4)))
        >>> source.fetch([0, 5], 0, 0).inputs.shape
        torch.Size([2, 2, 4])
    """

    views = None

    def __init__(self, source: Source, other: Source | None = None):
        self.source, self.other = source, other
        if other is not None and len(other) != len(source):
            what = f"the sources have {len(source)} and {len(other)} items"
            raise ValueError(f"{what}: give pairs, item i of one with item i of the other")
        self.labels = source.labels
        self.lengths, second = source.lengths, None if other is None else other.lengths
        if second is not None and self.lengths is not None:
            self.lengths = np.maximum(self.lengths, second)

    def __len__(self) -> int:
        return len(self.source)

    def fetch(self, indices: Sequence[int] | np.ndarray, epoch: int | None, seed: int) -> Batch:
        if self.other is None:
            looks = [(self.source, 2 * (epoch or 0) + view) for view in range(2)]
        else:
            looks = [(self.source, epoch), (self.other, epoch)]
        one, two = (source.fetch(indices, at, seed) for source, at in looks)
        if isinstance(one.inputs, Tensor):
            inputs = torch.stack([one.inputs, two.inputs], dim=1)
        else:
            padding = {"input_ids": getattr(self.source, "padding", 0)}
            inputs = {
                name: _side_by_side(part, two.inputs[name], padding.get(name, 0))
                for name, part in one.inputs.items()
            }
        labels = one.index if one.labels is None else one.labels
        return Batch(inputs, labels, one.index)

    def fingerprint(self) -> str | None:
        parts = [self.source, self.other] if self.other is not None else [self.source]
        inner = [source.fingerprint() for source in parts]
        return None if None in inner else content_hash("two views", *inner)


def _side_by_side(left: Tensor, right: Tensor, padding: int) -> Tensor:
    # (batch, length) twice, of lengths that may differ, to (batch, 2, length)
    both = torch.full((len(left), 2, max(left.shape[1], right.shape[1])), padding, dtype=left.dtype)
    both[:, 0, : left.shape[1]], both[:, 1, : right.shape[1]] = left, right
    return both


@dataclass(frozen=True)
class Contrastive:
    r"""Find the other view of an item among all items of the batch.

    `two_views` gives n items in two views each; the model's outputs $z$ (of its projection
    head, if it has one) are scaled to length 1. For each row a of the 2n rows, with the positives
    $P(a)$ among the candidates $A(a)$ and the temperature $\tau$,

    $$\ell_a = -\frac{1}{|P(a)|} \sum_{p \in P(a)}
      \log \frac{\exp(z_a \cdot z_p / \tau)}{\sum_{c \in A(a)} \exp(z_a \cdot z_c / \tau)}$$

    and the loss is the mean over the rows. By default the candidates are all other rows and the one
    positive is the other view: NT-Xent (Chen et al. 2020, Eq. 1). With `across` the candidates are
    the n rows of the other view alone: InfoNCE (van den Oord et al. 2018, Eq. 4) in both directions
    with in-batch negatives, for pairs of sentences. With `supervised` all candidates of the same
    label are positives (Khosla et al. 2020, Eq. 2).

    The items of a batch are each other's negatives, so the loss of a batch is not a sum over its
    items: accumulation is refused. Evaluation takes all items as one batch, and needs memory for
    `(2n)²` numbers.

    Args:
        temperature: $\tau$, above 0.
        across: whether the candidates come from the other view alone.
        supervised: whether items of one label belong together.

    Raises:
        ValueError: the temperature is not above 0.

    Example:
        >>> pairs = tk.two_views(tk.data.tensors(torch.eye(4)))
        >>> found = tk.evaluate(nn.Identity(), tk.contrastive(temperature=1.0), pairs)
        >>> round(found["loss"], 3)  # log(1 + 6 / e)
        1.165
    """

    temperature: float = 0.1
    across: bool = False
    supervised: bool = False

    additive: ClassVar[bool] = False
    acts_below_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(
                f"temperature is {self.temperature}, but a number above 0 is expected: 0.1 is usual"
            )

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        return self.loss(self.outputs(model, batch), batch)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The embeddings of both views, `(n, 2, d)`, from inputs `(n, 2, ...)`, in one pass.

        Raises:
            ValueError: the inputs are not two views an item.
        """
        inputs = batch.inputs
        named = {"": inputs} if isinstance(inputs, Tensor) else inputs
        first = next(iter(named.values()))
        if first.dim() < 2 or first.shape[1] != 2:
            raise ValueError(
                f"the inputs have shape {tuple(first.shape)}, but two views an item, (n, 2, ...), "
                "are expected: wrap the data as tk.two_views(source)"
            )
        rows = {name: part.flatten(0, 1) for name, part in named.items()}
        return forward(model, rows[""] if named is not inputs else rows).unflatten(0, (-1, 2))

    def loss(self, outputs: Tensor, batch: Batch) -> Loss:
        """Sum over the 2n rows of embeddings `(n, 2, d)`, in float32 at least."""
        items, device = len(outputs), outputs.device
        with torch.autocast(device.type, enabled=False):  # bf16 has three digits: too few here
            rows = F.normalize(_at_least_float32(outputs).flatten(0, 1), dim=1)
            similar = rows @ rows.T / self.temperature
        belongs = _labels(batch) if self.supervised else torch.arange(items, device=device)
        belongs = belongs.repeat_interleave(2)  # the views of item i are the rows 2i and 2i + 1
        place = torch.arange(2 * items, device=device)
        seat = place % 2 if self.across else place
        candidate = seat.unsqueeze(1) != seat
        positive = (belongs.unsqueeze(1) == belongs) & candidate
        chances = similar.masked_fill(~candidate, -torch.inf).log_softmax(1)
        each = chances.masked_fill(~positive, 0.0).sum(1) / positive.sum(1)
        return Loss(-each.sum(), 2 * items)


@dataclass(frozen=True)
class Reconstruction(_Supervised):
    r"""Squared error between the inputs and what the model makes of them: an autoencoder's loss.

    $\sum (f(x) - x)^2$ over all values, divided by their number; labels are not looked at. For
    inputs that are one tensor `(n, ...)` (Hinton and Salakhutdinov 2006).

    Example:
        >>> tk.evaluate(nn.Identity(), tk.reconstruction(), torch.randn(5, 4))
        {'loss': 0.0}
    """

    acts_below_head: ClassVar[bool] = True  # it compares with the raw inputs, not with features

    def counts(self, batch: Batch) -> tuple[Number, ...]:
        """How many values the inputs of the batch have."""
        return (self._target(batch).numel(),)

    def loss(self, outputs: Tensor, batch: Batch) -> Loss:
        """Sum of the squared errors of outputs of the shape of the inputs.

        Raises:
            TypeError: the inputs are not one tensor of floating-point numbers.
            ValueError: the shapes differ.
        """
        outputs, target = _at_least_float32(outputs), self._target(batch)
        if outputs.shape != target.shape:
            raise ValueError(
                f"the outputs have shape {tuple(outputs.shape)} but the inputs "
                f"{tuple(target.shape)}: the decoder must end in the shape of the inputs"
            )
        return Loss((outputs - target.to(outputs.dtype)).square().sum(), target.numel())

    def scored(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """What metrics see: the reconstructions `(n, d)` and, as labels, the inputs `(n, d)`."""
        return outputs.flatten(1), self._target(batch).flatten(1)

    def _target(self, batch: Batch) -> Tensor:
        inputs = batch.inputs
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            what = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
            raise TypeError(
                f"the inputs are {what}, but one tensor of floating-point numbers is expected: "
                "for texts use masked_lm()"
            )
        return inputs


masked, two_views = Masked, TwoViews
masked_lm, contrastive, reconstruction = MaskedLM, Contrastive, Reconstruction
