"""Target data whose labels nobody looks at. The one idea: what must not be known is not handed on.

`pair` puts unlabelled target items beside labelled source items, `unlabelled` chooses an epoch by
what the model says about the target, and `pseudo_labels` takes the model's own answers for labels.
None of them passes a label of the target on, so that training and selection cannot depend on any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transferkit import engine, evaluation
from transferkit.data import Batch, Source, as_source, content_hash, mix
from transferkit.metrics import softmax

SOURCE, TARGET = "source", "target"
_SIDE = 1  # keeps the draws of the target apart from those of the source


class Pair:
    """A source of labelled source items, each beside an unlabelled item of the target.

    The inputs of a batch are `{"source": ..., "target": ...}`, or, where items are dictionaries,
    `{"source input_ids": ..., "target input_ids": ..., ...}`; its labels are those of the source.
    The labels of the target are never fetched. An epoch goes once through the source. The target
    goes round as often as that takes, shuffled in each round, and the next epoch goes on where this
    one ended: which item is beside which follows from (seed, epoch, index), so that nothing has to
    be kept, and in the long run all items of the target are seen equally often.

    For `dann`, `cdan`, `align` and `confusion`. Texts of all lengths share a batch.

    Args:
        source, target: what `fit` accepts. The target may have labels; they are not looked at.
        model: prepares splits of data sets, if there are some.

    Raises:
        ValueError, TypeError: as `data.as_source`.

    Example:
        >>> source = torch.zeros(6, 4), [0, 1, 0, 1, 0, 1]
        >>> pair = tk.pair(source, torch.ones(5, 4))
        >>> batch = pair.fetch([1, 4], 0, 0)
        >>> {name: part.shape for name, part in batch.inputs.items()}, batch.labels
        ({'source': torch.Size([2, 4]), 'target': torch.Size([2, 4])}, tensor([1, 0]))
    """

    lengths = views = None

    def __init__(self, source: Any, target: Any, model: nn.Module | None = None):
        self.source, self.target = as_source(source, model), as_source(target, model)
        self.labels = self.source.labels
        self.name = " and ".join(filter(None, (getattr(p, "name", "") for p in (source, target))))

    def __len__(self) -> int:
        return len(self.source)

    def fetch(self, indices: Sequence[int] | np.ndarray, epoch: int | None, seed: int) -> Batch:
        own = self.source.fetch(indices, epoch, seed)
        partners = self.partners(np.asarray(indices), epoch, seed)
        other = self.target.fetch(partners, epoch, mix(seed, _SIDE))
        parts = ((SOURCE, own.inputs), (TARGET, other.inputs))
        inputs: dict[str, Tensor] = {}
        for side, part in parts:
            named = {"": part} if isinstance(part, Tensor) else part
            inputs |= {f"{side} {name}".strip(): tensor for name, tensor in named.items()}
        return Batch(inputs, own.labels, own.index)

    def partners(self, indices: np.ndarray, epoch: int | None, seed: int) -> np.ndarray:
        """Which item of the target is beside each of these items of the source: int64 `(n,)`."""
        places = (epoch or 0) * len(self.source) + indices
        rounds, places = np.divmod(places, len(self.target))
        found = np.empty_like(places)
        for number in np.unique(rounds).tolist():
            here = rounds == number
            found[here] = _shuffled(len(self.target), mix(seed, _SIDE, number))[places[here]]
        return found

    def fingerprint(self) -> str | None:
        parts = [self.source.fingerprint(), self.target.fingerprint()]
        return None if None in parts else content_hash("pair", len(self.target), *parts)


@lru_cache(maxsize=64)
def _shuffled(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(count)


def sides(batch: Batch) -> tuple[Any, Any] | None:
    """The inputs of both sides of a batch of `pair`, or None if it is another batch.

    Example:
        >>> pair = tk.pair((torch.zeros(3, 2), [0, 1, 0]), torch.ones(3, 2))
        >>> source, target = tk.target.sides(pair.fetch([0], 0, 0))
        >>> source.tolist(), target.tolist()
        ([[0.0, 0.0]], [[1.0, 1.0]])
    """
    inputs = batch.inputs
    if isinstance(inputs, Tensor) or {name.split(" ")[0] for name in inputs} != {SOURCE, TARGET}:
        return None
    if SOURCE in inputs:
        return inputs[SOURCE], inputs[TARGET]
    halves = (
        {n.split(" ", 1)[1]: part for n, part in inputs.items() if n.split(" ")[0] == side}
        for side in (SOURCE, TARGET)
    )
    return tuple(halves)


def stacked(parts: Sequence[Any], padding: int = 0) -> Any:
    """Inputs of several batches as those of one; tokens are padded to the longest of all.

    Raises:
        ValueError: the items differ in shape, and are no tokens.

    Example:
        >>> parts = [{"input_ids": torch.ones(1, size, dtype=torch.long)} for size in (2, 3)]
        >>> tk.target.stacked(parts)["input_ids"]
        tensor([[1, 1, 0],
                [1, 1, 1]])
    """
    if not isinstance(parts[0], Tensor):
        names, pads = list(parts[0]), {"input_ids": padding}
        return {name: stacked([part[name] for part in parts], pads.get(name, 0)) for name in names}
    shapes = sorted({tuple(part.shape[1:]) for part in parts})
    if len(shapes) > 1:
        if any(part.dim() != 2 or part.is_floating_point() for part in parts):
            raise ValueError(
                f"the items are of the shapes {shapes[0]} and {shapes[1]}, but one shape is "
                "expected of all: prepare source and target in the same way"
            )
        longest = max(part.shape[1] for part in parts)
        parts = [F.pad(part, (0, longest - part.shape[1]), value=padding) for part in parts]
    return torch.cat(list(parts))


# ---- choosing an epoch without labels -----------------------------------------------------------


def information(logits: np.ndarray) -> float:
    r"""Information maximisation: the entropy of the mean answer minus the mean of the entropies.

    $$H\Bigl(\frac1n \sum_i p_i\Bigr) - \frac1n \sum_i H(p_i), \qquad H(p) = -\sum_c p_c \log p_c$$

    in nats, at least 0 and at most log C: high where each answer is sure and all classes occur
    (Bridle et al. 1992). A model that always says the same class has 0, however sure it is.

    Args:
        logits: `(n, C)`.

    Example:
        >>> round(tk.target.information(np.array([[9.0, -9.0], [-9.0, 9.0]])), 3)  # log 2
        0.693
    """
    shares = _probabilities(logits)
    return _entropy(shares.mean(0)) - _entropy(shares)


def certainty(logits: np.ndarray) -> float:
    """Minus the mean entropy of the answers, in nats: 0 where every answer is sure.

    A model that always says the same class has the best value, too: see `information`.

    Args:
        logits: `(n, C)`.

    Example:
        >>> round(tk.target.certainty(np.zeros((3, 2))), 3)  # -log 2
        -0.693
    """
    return -_entropy(_probabilities(logits))


def _probabilities(logits: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits)
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"logits have shape {logits.shape}, but (n, C) with at least 2 classes are expected: "
            "these scores are for classification"
        )
    return softmax(logits)


def _entropy(shares: np.ndarray) -> float:
    logs = np.log(np.where(shares > 0, shares, 1.0))  # 0 log 0 is 0
    return float(-(shares * logs).sum(-1).mean())


SCORES: dict[str, Callable[[np.ndarray], float]] = {"im": information, "entropy": certainty}


class Unlabelled:
    """Validation data without labels, for `fit`: a score of the model's answers chooses the epoch.

    The history has the score under its name, and `monitor` is that name unless another is given;
    higher is better. Metrics that need labels are not computed on it. No score is a measure of how
    right the answers are: a model that is surely wrong has a good one.

    Args:
        target: what `fit` accepts; its labels, if it has some, are not looked at.
        score: "im" (`information`), or "entropy" (`certainty`, so that higher is better here, too).
        model: prepares a split of a data set, if it is one.

    Raises:
        ValueError: there is no such score, or what `data.as_source` raises.

    Example:
        >>> source, target = (torch.randn(8, 4), torch.arange(8) % 2), torch.randn(8, 4)
        >>> how = {"plan": tk.finetune(2), "monitor": "im"}
        >>> run = tk.fit(nn.Linear(4, 2), tk.classification(), source, tk.unlabelled(target), **how)
        >>> [name for name in run.best if name != "seconds"]
        ['epoch', 'phase', 'train_loss', 'im']
    """

    labels = None

    def __init__(self, target: Any, score: str = "im", model: nn.Module | None = None):
        if score not in SCORES:
            raise ValueError(f"score is {score!r}: give one of {', '.join(SCORES)}")
        self.source, self.score = as_source(target, model), score
        self.lengths, self.views = self.source.lengths, self.source.views
        self.name = getattr(target, "name", "")
        self.monitors = {score: True}  # what `fit` may watch, and whether higher is better

    def __len__(self) -> int:
        return len(self.source)

    def fetch(self, indices: Sequence[int] | np.ndarray, epoch: int | None, seed: int) -> Batch:
        batch = self.source.fetch(indices, epoch, seed)
        return Batch(batch.inputs, None, batch.index)

    def fingerprint(self) -> str | None:
        return self.source.fingerprint()

    def scores(
        self, objective: Any, outputs: evaluation.Outputs, metrics: Any, model: nn.Module,
        where: evaluation.Where,
    ) -> dict[str, float]:  # fmt: skip
        """What `evaluation.scores` is for labelled data; the metrics are left out."""
        found, _ = evaluation._outputs(model, outputs, where)
        if isinstance(found, list):
            raise TypeError(
                "the model says something about each token, but the scores are of one answer an "
                "item: give the objective labelled validation data"
            )
        return {self.score: SCORES[self.score](found.numpy())}


# ---- the model's own answers as labels ----------------------------------------------------------


class Relabelled:
    """Some items of a source with other labels; see `pseudo_labels`, which makes it.

    Attributes:
        items: their numbers in the source, int64 `(n,)`.
        share: how many of all items these are, in (0, 1].

    Example:
        >>> some = tk.target.Relabelled(tk.data.tensors(torch.eye(3)), np.array([2, 0]), [1, 0])
        >>> batch = some.fetch([0], None, 0)
        >>> batch.inputs, batch.labels
        (tensor([[0., 0., 1.]]), tensor([1]))
    """

    def __init__(self, source: Source, items: np.ndarray, labels: Any):
        self.source, self.items, self.labels = source, items, torch.as_tensor(labels)
        self.lengths = None if source.lengths is None else source.lengths[items]
        self.views, self.share = source.views, len(items) / len(source)

    def __len__(self) -> int:
        return len(self.items)

    def fetch(self, indices: Sequence[int] | np.ndarray, epoch: int | None, seed: int) -> Batch:
        index = torch.as_tensor(indices)
        batch = self.source.fetch(self.items[index.numpy()], epoch, seed)
        return Batch(batch.inputs, self.labels[index], index)

    def fingerprint(self) -> str | None:
        inner = self.source.fingerprint()
        return None if inner is None else content_hash(inner, torch.from_numpy(self.items))


def pseudo_labels(
    model: nn.Module, target: Any, threshold: float = 0.9, batch_size: int = 64,
    precision: str = "auto",
) -> Relabelled:  # fmt: skip
    """Those items of the target of which the model is sure, labelled by what it says (Lee 2013).

    Args:
        model: gives logits `(n, C)`.
        target: what `predict` accepts; its labels, if it has some, are not looked at.
        threshold: the least probability of the likeliest class, in [0, 1).
        batch_size, precision: as in `predict`.

    Raises:
        ValueError: the threshold is out of range, or no item passes it.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0], [0.1, 0.0], [0.0, 5.0]])
        >>> found = tk.pseudo_labels(nn.Identity(), logits, threshold=0.9)
        >>> found.items.tolist(), found.labels.tolist(), round(found.share, 2)
        ([0, 2], [0, 1], 0.67)
    """
    if not 0.0 <= threshold < 1.0:
        raise ValueError(f"threshold is {threshold}: give a probability in [0, 1), such as 0.9")
    source = as_source(target, model)
    said = evaluation.predict(model, source, batch_size, precision=precision)
    shares = _probabilities(said.logits)
    (items,) = np.nonzero(shares.max(1) >= threshold)
    if not len(items):
        raise ValueError(
            f"of no item is the model sure with probability {threshold} (at most "
            f"{shares.max():.3f}): lower the threshold, or train it longer on the source first"
        )
    return Relabelled(source, items, shares.argmax(1)[items])


class Joined:
    """Several sources of the same kind as one, such as the source and the pseudo-labelled target.

    Args:
        sources: what `fit` accepts, all with labels or none.

    Raises:
        ValueError: there are none, or only some have labels.

    Example:
        >>> joined = tk.joined((torch.zeros(2, 3), [0, 1]), (torch.ones(4, 3), [1, 1, 0, 0]))
        >>> batch = joined.fetch([5, 0], None, 0)
        >>> len(joined), batch.inputs[:, 0], batch.labels
        (6, tensor([1., 0.]), tensor([0, 0]))
    """

    def __init__(self, *sources: Any):
        self.sources = [as_source(source) for source in sources]
        known = [source.labels for source in self.sources]
        if not known or len({labels is None for labels in known}) > 1:
            have = [labels is not None for labels in known]
            raise ValueError(f"of the sources to be joined these have labels: {have}: all or none")
        self.labels = None if known[0] is None else torch.cat(known)
        lengths = [source.lengths for source in self.sources]
        self.lengths = None if any(part is None for part in lengths) else np.concatenate(lengths)
        views = {source.views for source in self.sources}
        self.views = views.pop() if len(views) == 1 else None
        self.starts = np.cumsum([0, *map(len, self.sources)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def fetch(self, indices: Sequence[int] | np.ndarray, epoch: int | None, seed: int) -> Batch:
        index = np.asarray(indices)
        which = np.searchsorted(self.starts, index, side="right") - 1
        batches, places = [], []
        for number in np.unique(which).tolist():
            (here,) = np.nonzero(which == number)
            items, own = index[here] - self.starts[number], mix(seed, number) if number else seed
            batches.append(self.sources[number].fetch(items, epoch, own))
            places.append(here)
        back = torch.from_numpy(np.argsort(np.concatenate(places)))
        padding = getattr(self.sources[0], "padding", 0)
        joined = stacked([batch.inputs for batch in batches], padding)
        several = isinstance(joined, dict)
        inputs = {n: part[back] for n, part in joined.items()} if several else joined[back]
        labels = None if self.labels is None else self.labels[torch.from_numpy(index)]
        return Batch(inputs, labels, torch.from_numpy(index))

    def fingerprint(self) -> str | None:
        parts = [source.fingerprint() for source in self.sources]
        return None if None in parts else content_hash("joined", *parts)


def self_training(
    model: nn.Module, objective: Any, source: Any, target: Any, validation: Any = None, *,
    rounds: int = 3, threshold: float = 0.9, directory: str | Path | None = None, **settings: Any,
) -> list[engine.Run]:  # fmt: skip
    """Train on the source, then several times on it and on what the model is sure of in the target.

    Each round labels the target anew by `pseudo_labels` and goes on from the weights of the round
    before. Mistakes of which the model is sure are learned, too: the threshold does not remove
    them, so watch a `report=` on labelled source data, at least.

    Args:
        model, objective, source, validation, settings: as in `fit`; `plan` is that of every round.
        target: what `fit` accepts; its labels, if it has some, are not looked at.
        rounds: how many follow the first training, on the source alone.
        threshold: see `pseudo_labels`.
        directory: each round keeps its state in a folder of its own below this one.

    Returns:
        The runs, `rounds + 1` of them.

    Raises:
        ValueError: `rounds` is below 1, no item passes the threshold, or what `fit` raises.

    Example:
        >>> source, target = (torch.eye(4), [0, 1, 0, 1]), torch.eye(4) + 0.1
        >>> how = {"rounds": 1, "threshold": 0.5, "plan": tk.finetune(2, lr=0.1)}
        >>> runs = tk.self_training(nn.Linear(4, 2), tk.classification(), source, target, **how)
        >>> [len(run.history) for run in runs]
        [2, 2]
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}: give at least 1, such as 3")
    source, target = as_source(source, model), as_source(target, model)
    runs: list[engine.Run] = []
    for number in range(rounds + 1):
        precision = settings.get("precision", "auto")
        sure = [pseudo_labels(model, target, threshold, precision=precision)] if number else []
        given = Joined(source, *sure) if sure else source
        folder = None if directory is None else Path(directory) / f"round {number}"
        runs.append(engine.fit(model, objective, given, validation, directory=folder, **settings))
    return runs


pair, unlabelled, joined = Pair, Unlabelled, Joined
