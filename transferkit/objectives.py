"""What training minimises. The one idea: an objective returns sums and counts, never a mean.

The means of several micro-batches cannot be averaged without an error as soon as the micro-batches
differ in size or in the weight of their classes. Sums and counts can be added: the engine adds both
over the micro-batches of a step and divides once, so that the gradient is that of one big batch.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import add
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from transferkit.data import Batch

Number = float | int | Tensor

IGNORED = -100  # a label of this value does not count, as in torch.nn.functional.cross_entropy


class Loss:
    """The sum and the count of every term of an objective, over some items.

    The value that training minimises is `sum(weight * total / count)` over the terms. Two losses of
    one objective add up term by term, totals with totals and counts with counts, so that
    `(loss_a + loss_b).mean()` is the loss of both batches together.

    Args:
        total: sum of the per-item losses, a tensor of shape `()`.
        items: what to divide it by: the number of items, or the sum of their weights, whole or not;
            a Python number or a tensor of shape `()` on the device of `total`.

    Attributes:
        names, weights, totals, counts: tuples with one entry a term.

    Raises:
        TypeError: `total` is not a tensor.
        ValueError: `total` or `items` is a tensor with dimensions.

    Example:
        >>> halves = tk.Loss(torch.tensor(6.0), 2) + tk.Loss(torch.tensor(3.0), 1)
        >>> halves.mean()
        tensor(3.)
    """

    __slots__ = ("counts", "names", "totals", "weights")

    names: tuple[str, ...]
    weights: tuple[Number, ...]
    totals: tuple[Tensor, ...]
    counts: tuple[Number, ...]

    def __init__(self, total: Tensor, items: Number) -> None:
        self._set(("loss",), (1.0,), (total,), (items,))

    @classmethod
    def terms(cls, named: Mapping[str, tuple[Number, Tensor, Number]]) -> Loss:
        """A loss of several terms, `{"name": (weight, total, count)}`, each with its own count.

        Raises:
            ValueError: no term was given, or a total or a count has dimensions.
            TypeError: a total is not a tensor.
        """
        if not named:
            raise ValueError("the loss has no terms: pass {name: (weight, total, count)}")
        loss = cls.__new__(cls)
        weights, totals, counts = zip(*named.values(), strict=True)
        loss._set(tuple(named), weights, totals, counts)
        return loss

    def _set(
        self, names: tuple[str, ...], weights: tuple[Number, ...], totals: tuple[Tensor, ...],
        counts: tuple[Number, ...],
    ) -> None:  # fmt: skip
        for name, total, count in zip(names, totals, counts, strict=True):
            if not isinstance(total, Tensor):
                raise TypeError(
                    f"the total of {name!r} is {total!r}, but a tensor is expected: "
                    "return the sum of the per-item losses, not a Python number"
                )
            for what, value in (("total", total), ("count", count)):
                if isinstance(value, Tensor) and value.dim():
                    raise ValueError(
                        f"the {what} of {name!r} has shape {tuple(value.shape)}, but a scalar is "
                        "expected: sum it over the items first"
                    )
        self.names, self.weights, self.totals, self.counts = names, weights, totals, counts

    def __add__(self, other: Loss) -> Loss:
        """Both batches together: totals and counts added term by term.

        Raises:
            ValueError: the two have different terms.
        """
        if self.names != other.names:
            raise ValueError(
                f"cannot add a loss with the terms {list(other.names)} to one with "
                f"{list(self.names)}: an objective must return the same terms for every batch"
            )
        loss = Loss.__new__(Loss)
        loss.names, loss.weights = self.names, self.weights
        loss.totals = tuple(a + b for a, b in zip(self.totals, other.totals, strict=True))
        loss.counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        return loss

    def detach(self) -> Loss:
        """The same numbers without their graph, to be kept for the log."""
        loss = Loss.__new__(Loss)
        loss.names, loss.weights = self.names, self.weights
        loss.totals = tuple(total.detach() for total in self.totals)
        loss.counts = self.counts
        return loss

    def mean(self, counts: tuple[Number, ...] | None = None) -> Tensor:
        """The weighted sum of the terms, each divided by its count: shape `()`, with its graph.

        Args:
            counts: one count a term in place of this loss's own. With the counts of the whole step,
                the means of its micro-batches add up to the mean of the step, so that each may go
                backward on its own.

        A term that counted nothing contributes 0, not NaN.
        """
        counts = self.counts if counts is None else counts
        parts = zip(self.weights, self.totals, counts, strict=True)
        means = [_weigh(weight, _divide(total, count)) for weight, total, count in parts]
        return reduce(add, means)

    def means(self) -> dict[str, Tensor]:
        """Every term's own mean, unweighted, for the log: `{name: tensor of shape ()}`."""
        parts = zip(self.names, self.totals, self.counts, strict=True)
        return {name: _divide(total.detach(), count) for name, total, count in parts}

    def __repr__(self) -> str:
        return f"Loss({', '.join(self.names)})"  # the numbers stay on their device


def as_numbers(losses: Iterable[Loss]) -> list[tuple[float, ...]]:
    """For each of some losses of one objective its totals and then its counts, as Python numbers.

    This waits for the device, once a column.

    Example:
        >>> losses = [tk.Loss(torch.tensor(6.0), 2), tk.Loss(torch.tensor(3.0), 1)]
        >>> tk.objectives.as_numbers(losses)
        [(6.0, 2), (3.0, 1)]
    """
    columns = zip(*(loss.totals + loss.counts for loss in losses), strict=True)
    return list(zip(*map(_read, columns), strict=True))


def _read(values: tuple[Any, ...]) -> Sequence[float]:
    return torch.stack(values).tolist() if isinstance(values[0], Tensor) else values


def mean_of_sums(weights: Sequence[float], sums: Sequence[float]) -> float:
    """The loss of several terms, of the totals of all of them and, after these, their counts.

    Example:
        >>> tk.objectives.mean_of_sums([1.0, 0.5], [6.0, 8.0, 3.0, 2.0])  # 6 / 3 + 0.5 * 8 / 2
        4.0
    """
    parts = zip(weights, sums[: len(weights)], sums[len(weights) :], strict=True)
    return sum(weight * total / (count or 1.0) for weight, total, count in parts)


def _divide(total: Tensor, count: Number) -> Tensor:
    if isinstance(count, Tensor):
        count = count.to(total.dtype)
        return total / torch.where(count == 0, torch.ones_like(count), count)
    return total / (count or 1)


def _weigh(weight: Number, mean: Tensor) -> Tensor:
    # the common weight of 1 costs no operation; a weight on the device is not looked at
    return mean if not isinstance(weight, Tensor) and weight == 1 else weight * mean


def forward(model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> Tensor:
    """Call `model` on the inputs of a batch and give its outputs as one tensor.

    A tensor is passed as it is. A dictionary is passed whole to a staged model (one that has
    `stage_names`) and as keywords to any other module. Of an output with a `logits` field, as the
    models of transformers return it, that field is taken.

    Raises:
        TypeError: the model returned neither a tensor nor something with `logits`.
        ValueError: the model cannot take such inputs; what it said and the remedy are named.

    Example:
        >>> tk.objectives.forward(nn.Linear(4, 2), torch.randn(3, 4)).shape
        torch.Size([3, 2])
    """
    try:
        if isinstance(inputs, Tensor) or hasattr(model, "stage_names"):
            outputs = model(inputs)
        else:
            outputs = model(**inputs)
    except Exception as error:
        if type(error) not in _MISFITS:  # an exhausted memory, say, is no fault of the inputs
            raise
        raise ValueError(_misfit(model, inputs, error)) from error
    outputs = getattr(outputs, "logits", outputs)
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"the model returned a {type(outputs).__name__}, but a tensor, or an output with a "
            "`logits` field, is expected: wrap the model so that it returns its logits"
        )
    return outputs


_MISFITS = (RuntimeError, TypeError, KeyError, IndexError, ValueError, AssertionError)


def _misfit(model: nn.Module, inputs: Tensor | Mapping[str, Any], error: Exception) -> str:
    # what was given, what the model said to it, and what to do
    said = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    single = isinstance(inputs, Tensor)
    parts = {"": inputs} if isinstance(inputs, Tensor) else inputs
    held = ", ".join(f"{name!r}: {_kind(part)}" for name, part in parts.items())
    held = _kind(inputs) if single else f"{{{held}}}"
    weights = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    types = {part.dtype for part in parts.values() if isinstance(part, Tensor)}
    remedy = "give items of the shape and type that the model was made for"
    if not single and {name.split(" ")[0] for name in inputs} == {"source", "target"}:
        remedy = "pairs are for adaptation: pass tk.dann(), tk.align(tk.mmd) or another"
    elif "more than 1 value per channel" in said:
        remedy = "BatchNorm cannot train on one item: raise batch_size, or freeze its layer group"
    elif "index out of range" in said:
        remedy = "a number is outside the model's vocabulary: use the tokenizer made for it"
    elif "Long, Int" in said:
        remedy = "the model reads whole numbers: convert the inputs with .long()"
    elif isinstance(error, KeyError) or ("argument" in said and not single):
        remedy = "name the entries of an item as the model's forward method does"
    elif "type" in said and weights not in types:
        remedy = f"its weights are {weights}, so convert the inputs with .to({weights})"
        if torch.uint8 in types:
            remedy += "; images are scaled and normalised by tk.data.images"
    return f"{type(model).__name__} cannot take inputs of {held} ({said}): {remedy}"


def _kind(part: Any) -> str:
    if not isinstance(part, Tensor):
        return type(part).__name__
    return f"{str(part.dtype).removeprefix('torch.')} {tuple(part.shape)}"


def check(model: Any, objective: Any) -> None:
    """See that a model and an objective are what training can use.

    Raises:
        TypeError: one of them is not, or is a class that was not called.

    Example:
        >>> tk.objectives.check(nn.Linear, tk.classification())
        Traceback (most recent call last):
            ...
        TypeError: the model is the class Linear, but an nn.Module is expected: ...
    """
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(
            f"the model is {what}, but an nn.Module is expected: build it, or wrap it in one"
        )
    if isinstance(objective, type) or not callable(getattr(objective, "outputs", None)):
        given = objective if isinstance(objective, type) else type(objective)
        raise TypeError(
            f"the objective is {'the class ' * isinstance(objective, type)}{given.__name__}, but "
            "one with loss(outputs, batch) as sums and counts is expected: pass "
            "tk.classification() or tk.regression()"
        )


@lru_cache(maxsize=32)
def _kept_on_device(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    # Copied once, not at every step: a copy from pageable memory waits for the device. Never an
    # inference tensor, even if evaluation comes first: training could not save it for backward.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def _constant(values: tuple[float, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    if type(like) is not Tensor:  # a fake or wrapped tensor must neither fill nor read the cache
        return like.new_tensor(values, dtype=dtype)
    return _kept_on_device(values, like.device, dtype)


def _at_least_float32(outputs: Tensor) -> Tensor:
    return outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs


def _labels(batch: Batch) -> Tensor:
    if batch.labels is None:
        raise ValueError(
            "the items have no labels, but this objective learns from them: pass (inputs, labels)"
        )
    return batch.labels


class _Supervised(ABC):
    """What objectives that score the outputs of one forward pass have in common."""

    additive: ClassVar[bool] = True
    acts_below_head: ClassVar[bool] = False

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        return self.loss(self.outputs(model, batch), batch)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the model says about the batch: see `forward`."""
        return forward(model, batch.inputs)

    @abstractmethod
    def loss(self, outputs: Tensor, batch: Batch) -> Loss:
        """Sums and counts of what the outputs cost."""


@dataclass(frozen=True)
class Classification(_Supervised):
    r"""Cross-entropy of a softmax over the classes; two classes are two outputs.

    With logits $z$ of shape `(n, C)`, labels $y$, class weights $w$ and smoothing $\varepsilon$,

    $$\ell_i = -\sum_c w_c\,\bigl[(1-\varepsilon)\,\mathbb{1}(c = y_i) + \varepsilon/C\bigr]\,
      \log\mathrm{softmax}(z_i)_c$$

    The total is $\sum_i \ell_i$, the count $\sum_i w_{y_i}$ ($n$ without weights): one big batch
    gives `torch.nn.functional.cross_entropy` with its default reduction.

    Args:
        label_smoothing: $\varepsilon$ in [0, 1), the probability spread evenly over all classes
            (Szegedy et al. 2016).
        class_weights: one weight of at least 0 a class, in the order of the labels; any sequence or
            tensor of numbers, kept as a tuple.

    Raises:
        ValueError: `label_smoothing` is outside [0, 1); a class weight is negative or not finite,
            or all are 0.

    Example:
        >>> batch = tk.data.Batch(torch.randn(3, 4), torch.tensor([0, 1, 0]), torch.arange(3))
        >>> loss = tk.classification(label_smoothing=0.1)(nn.Linear(4, 2), batch)
        >>> loss.counts, loss.mean().shape
        ((3,), torch.Size([]))
    """

    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}, but a value in [0, 1) is expected: "
                "0.1 is usual, 0 switches it off"
            )
        if self.class_weights is None:
            return
        weights = tuple(float(weight) for weight in self.class_weights)
        if not any(weights) or not all(0.0 <= weight < float("inf") for weight in weights):
            raise ValueError(
                f"class_weights are {weights}, but finite weights of at least 0, not all 0, are "
                "expected: for balance use n / (C * items of the class)"
            )
        object.__setattr__(self, "class_weights", weights)

    def counts(self, batch: Batch) -> tuple[Number, ...]:
        """The counts that `loss` will return for this batch, known without a forward pass."""
        if self.class_weights is None:
            return (len(_labels(batch)),)
        labels = _labels(batch).long()  # as an index, uint8 would be a mask
        # float64, where there is one, so that adding thousands of batches loses nothing
        dtype = torch.float32 if labels.device.type == "mps" else torch.float64
        return (_constant(self.class_weights, labels, dtype)[labels].sum(),)

    def loss(self, outputs: Tensor, batch: Batch) -> Loss:
        """Sum of the cross-entropies of logits `(n, C)` against `batch.labels`, whole, `(n,)`.

        Half-precision logits are scored in float32. The labels are trusted, for to look at them
        would stop the device at every step: `validate` checks them once.
        """
        return Loss(self._entropy(outputs, _labels(batch).long()), *self.counts(batch))

    def _entropy(self, outputs: Tensor, labels: Tensor) -> Tensor:
        logits = _at_least_float32(outputs)
        weights = None
        if self.class_weights is not None:
            weights = _constant(self.class_weights, logits, logits.dtype)
        if logits.ndim != 2:
            raise ValueError(
                f"the outputs have shape {tuple(logits.shape)}, but logits (n, C) are expected: "
                "pool or flatten them, so that an item has one row"
            )
        try:
            return F.cross_entropy(
                logits,
                labels,
                weight=weights,
                ignore_index=IGNORED,
                reduction="sum",
                label_smoothing=self.label_smoothing,
            )
        except IndexError as error:  # only the processor says so
            raise ValueError(
                f"a label does not fit the {logits.shape[1]} outputs of the head ({error}): number "
                "the classes from 0 and give the head one output for each"
            ) from error

    def validate(self, labels: Any, outputs_dim: int) -> None:
        """Check the labels of a whole data set against the head, once, before training.

        Args:
            labels: whole numbers of shape `(n,)`, a tensor or an array, on any device.
            outputs_dim: the number of outputs of the head, C.

        Warns if there is one class only, which may be meant.

        Raises:
            TypeError: the labels are not whole numbers.
            ValueError: a label is outside [0, C), the labels are not one an item, the head has
                fewer than two outputs, or the class weights are not C.
        """
        labels = torch.as_tensor(labels)
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(
                f"labels are {labels.dtype}, but whole class numbers are expected: "
                "convert them, or use regression() for measured values"
            )
        if labels.dim() != 1:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}, but one class number an item, (n,), is "
                "expected: for one-hot rows pass labels.argmax(1)"
            )
        if outputs_dim < 2:
            raise ValueError(
                f"the head has {outputs_dim} output, but classification needs at least 2: two "
                "classes are two outputs, so pass labels=[...] with both names"
            )
        if self.class_weights is not None and len(self.class_weights) != outputs_dim:
            raise ValueError(
                f"class_weights hold {len(self.class_weights)} weights but the head has "
                f"{outputs_dim} outputs: pass one weight a class"
            )
        if not len(labels):
            return
        low, high = int(labels.min()), int(labels.max())
        if low < 0:
            raise ValueError(
                f"labels hold {low} but class numbers start at 0: drop the unlabelled items first"
            )
        if high >= outputs_dim:
            raise ValueError(
                f"labels hold {high} but the head has {outputs_dim} outputs: "
                f"pass labels=[...] with {high + 1} names"
            )
        if low == high and len(labels) > 1:
            warnings.warn(
                f"all {len(labels)} labels are {low}, one class of {outputs_dim}: a model that is "
                "trained on them learns to say this class always, and AUROC is not defined on "
                "them; unless it is meant, see how the data were split",
                stacklevel=2,
            )


@dataclass(frozen=True)
class TokenClassification(Classification):
    r"""Cross-entropy of every labelled token, such as the name tags of words.

    Logits have the shape `(n, L, C)`, labels `(n, L)`; a token whose label is -100 (padding,
    special tokens, the later pieces of a word) does not count. With the loss $\ell$ and the weights
    $w$ of `Classification`,

    $$\sum_{t\,:\,y_t \ne -100} \ell_t \Big/ \sum_{t\,:\,y_t \ne -100} w_{y_t}$$

    so every labelled token weighs the same, however the texts are cut into batches. Arguments and
    errors are those of `Classification`.

    Example:
        >>> tags = torch.tensor([[0, 1, -100], [1, -100, -100]])
        >>> batch = tk.data.Batch(torch.randn(2, 3, 8), tags, torch.arange(2))
        >>> tk.token_classification()(nn.Linear(8, 2), batch).counts
        (tensor(3),)
    """

    def counts(self, batch: Batch) -> tuple[Number, ...]:
        """How many tokens of the batch are labelled, or the sum of their weights: a tensor."""
        labels = _labels(batch).long()
        known = labels != IGNORED
        if self.class_weights is None:
            return (known.sum(),)
        dtype = torch.float32 if labels.device.type == "mps" else torch.float64
        weights = _constant(self.class_weights, labels, dtype)[labels.clamp(min=0)]
        return ((weights * known).sum(),)

    def loss(self, outputs: Tensor, batch: Batch) -> Loss:
        """Sum of the cross-entropies of logits `(n, L, C)` against whole labels `(n, L)`.

        Raises:
            ValueError: the outputs are not one row a token.
        """
        labels = _labels(batch).long()
        if outputs.dim() != 3 or outputs.shape[:2] != labels.shape:
            raise ValueError(
                f"the outputs have shape {tuple(outputs.shape)} and the labels "
                f"{tuple(labels.shape)}, but (n, L, C) and (n, L) are expected: the head must "
                "score every token, with no pooling before it"
            )
        total = self._entropy(outputs.flatten(0, 1), labels.flatten())
        return Loss(total, *self.counts(batch))

    def scored(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """What metrics see: the logits `(m, C)` and labels `(m,)` of the m labelled tokens."""
        labels = _labels(batch).long()
        known = labels != IGNORED
        return outputs[known], labels[known]

    def validate(self, labels: Any, outputs_dim: int) -> None:
        """Check the labels of a whole data set, `(n, L)`, against the head; see `Classification`.

        Raises:
            TypeError, ValueError: as there; also where the labels are not one a token.
        """
        labels = torch.as_tensor(labels)
        if labels.dim() != 2:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}, but one class number a token, (n, L), "
                "is expected: pad the rows with -100, which does not count"
            )
        super().validate(labels[labels != IGNORED], outputs_dim)


@dataclass(frozen=True)
class Spans(_Supervised):
    r"""Where a span of tokens starts and ends, such as an answer in a text.

    The head gives two scores a token, `(n, L, 2)`; the labels `(n, 2)` are the places of the first
    and the last token. The loss is half the sum of two cross-entropies over the L places, of the
    start and of the end (Devlin et al. 2019, Section 4.2), each divided by how many items have such
    a label; -100 says that there is none, as where the answer was cut off. Where the inputs hold an
    attention mask, padding is no place, so that no item depends on the length of its batch.

    Example:
        >>> scores = torch.tensor([[[0.0, 3.0], [4.0, 0.0], [0.0, 2.0]]])  # of three tokens
        >>> tk.spans().decode(scores)
        tensor([[1, 2]])
    """

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The scores `(n, L, 2)`, minus infinity on padding."""
        scores, inputs = forward(model, batch.inputs), batch.inputs
        if not isinstance(inputs, Mapping):
            return scores
        # cached features call it "mask", as the states between the layers do
        masks = [inputs[name] for name in ("attention_mask", "mask") if name in inputs]
        return scores.masked_fill(masks[0].unsqueeze(-1) == 0, -torch.inf) if masks else scores

    def counts(self, batch: Batch) -> tuple[Number, ...]:
        """How many items have a start, and how many an end: two tensors."""
        known = _labels(batch).long() != IGNORED
        return known[:, 0].sum(), known[:, 1].sum()

    def loss(self, outputs: Tensor, batch: Batch) -> Loss:
        """Two terms, "start" and "end", of scores `(n, L, 2)` and labels `(n, 2)`.

        Raises:
            ValueError: the shapes are others.
        """
        scores, labels = _at_least_float32(outputs), _labels(batch).long()
        if scores.dim() != 3 or scores.shape[2] != 2 or labels.shape != (len(scores), 2):
            raise ValueError(
                f"the outputs have shape {tuple(scores.shape)} and the labels "
                f"{tuple(labels.shape)}, but (n, L, 2) and (n, 2) are expected: the head gives "
                "every token two scores, and an item's label is the places of first and last token"
            )
        counts = self.counts(batch)
        terms: dict[str, tuple[Number, Tensor, Number]] = {}
        for at, name in enumerate(("start", "end")):
            what = (scores[..., at], labels[:, at])
            total = F.cross_entropy(*what, ignore_index=IGNORED, reduction="sum")
            terms[name] = (0.5, total, counts[at])
        return Loss.terms(terms)

    def decode(self, outputs: Tensor) -> Tensor:
        """The best span of each item that does not end before it starts, int64 `(n, 2)`."""
        scores = outputs[:, :, 0].unsqueeze(2) + outputs[:, :, 1].unsqueeze(1)
        length = scores.shape[1]
        backward = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril(-1)
        best = scores.masked_fill(backward, -torch.inf).flatten(1).argmax(1)
        return torch.stack([best // length, best % length], dim=1)

    def scored(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """What metrics see: for each labelled item a row (wrong, right) and the label 1.

        A row is (0, 1) where `decode` gives exactly the labels, so `accuracy` is the exact match.
        """
        labels = _labels(batch).long()
        right = (self.decode(outputs) == labels).all(1)[(labels != IGNORED).all(1)].long()
        return F.one_hot(right, 2).to(outputs.dtype), torch.ones_like(right)

    def validate(self, labels: Any, outputs_dim: int) -> None:
        """Check the spans of a whole data set, once, before training.

        Raises:
            TypeError: they are not whole numbers.
            ValueError: they are not two an item, one is negative and not -100, one ends before it
                starts, or the head does not give two scores a token.
        """
        labels = torch.as_tensor(labels)
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(
                f"labels are {labels.dtype}, but whole places are expected: convert them"
            )
        if labels.dim() != 2 or labels.shape[1] != 2 or outputs_dim != 2:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)} and the head {outputs_dim} outputs, but "
                "(n, 2) and 2 are expected: the places of first and last token, and a score of each"
            )
        if ((labels < 0) & (labels != IGNORED)).any():
            raise ValueError(
                f"labels hold {int(labels[labels != IGNORED].min())} but places start at 0: mark "
                "an item without a span by -100"
            )
        turned = (labels[:, 1] < labels[:, 0]) & (labels != IGNORED).all(1)
        if turned.any():
            raise ValueError(
                f"the span of item {int(turned.long().argmax())} ends before it starts: give the "
                "places of its first and its last token"
            )


@dataclass(frozen=True)
class Regression(_Supervised):
    r"""Squared error, $\ell = \sum (z - y)^2$ over the values of an item, divided by their number.

    The total is the sum over all values, the count how many there are: one big batch gives
    `torch.nn.functional.mse_loss`. Its unit is that of the label, squared.

    Example:
        >>> batch = tk.data.Batch(torch.ones(2, 1), torch.tensor([1.0, 3.0]), torch.arange(2))
        >>> tk.regression()(nn.Identity(), batch).mean()
        tensor(2.)
    """

    def counts(self, batch: Batch) -> tuple[Number, ...]:
        """The counts that `loss` will return for this batch, known without a forward pass."""
        return (_labels(batch).numel(),)

    def loss(self, outputs: Tensor, batch: Batch) -> Loss:
        """Sum of the squared errors of outputs `(n, d)` against labels of the same shape.

        Labels `(n,)` go with outputs `(n, 1)` or `(n,)`.

        Raises:
            ValueError: the shapes differ; broadcasting them would score every pair of items.
        """
        outputs, labels = _at_least_float32(outputs), _labels(batch)
        if labels.dim() == outputs.dim() - 1 and outputs.shape[-1] == 1:
            outputs = outputs.squeeze(-1)
        if outputs.shape != labels.shape:
            raise ValueError(
                f"the outputs have shape {tuple(outputs.shape)} but the labels "
                f"{tuple(labels.shape)}: give the head one output for each value of a label"
            )
        errors = outputs - labels.to(outputs.dtype)
        return Loss(errors.square().sum(), labels.numel())

    def validate(self, labels: Any, outputs_dim: int) -> None:
        """Check the values of a whole data set against the head, once, before training.

        Args:
            labels: numbers of shape `(n,)` or `(n, d)`, a tensor or an array, on any device.
            outputs_dim: the number of outputs of the head, d.

        Raises:
            ValueError: the labels are not d a row, or one is NaN or infinite.
        """
        labels = torch.as_tensor(labels)
        width = 1 if labels.dim() == 1 else labels.shape[-1]
        if labels.dim() not in (1, 2) or width != outputs_dim:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)} but the head has {outputs_dim} outputs: "
                "give the head one output for each value of a label"
            )
        bad = int((~torch.isfinite(labels)).sum())
        if bad:
            raise ValueError(
                f"labels hold {bad} values that are NaN or infinite, but finite values are "
                "expected: drop those items or fill them in"
            )


classification, token_classification, spans = Classification, TokenClassification, Spans
regression = Regression
