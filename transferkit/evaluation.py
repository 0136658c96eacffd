"""What a model says and how good it is. The one idea: an evaluation changes nothing.

Every item counts once, whatever the size of the batches and the number of ranks, and no score
depends on either. The model is in eval mode meanwhile and afterwards in the modes it was in. `fit`
scores its validation data by the same functions, so that what chose an epoch can be had again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from transferkit import data, devices, distributed
from transferkit.checks import functions, whole
from transferkit.objectives import Loss, as_numbers, check, forward, mean_of_sums

Metric = Callable[..., float]  # of logits and labels, with a name
Outputs = Callable[[nn.Module, data.Batch], Tensor]
Rows = Tensor | list[Tensor]  # one tensor or, where items have many lengths, one for each


@dataclass(frozen=True)
class Predictions:
    """What a model says about each item, in the order of the data.

    Attributes:
        logits: float32 `(n, C)`, or `(n, length, C)` where all items are as long; of a model that
            says something about each token of texts of many lengths, a list with one array
            `(length, C)` an item, its padding cut off.
        labels: `(n,)`, or as the logits without `C`, or None where the data have none.
        index: int64 `(n,)`, the items' numbers.

    Example:
        >>> said = tk.predict(nn.Linear(4, 3), torch.randn(5, 4))
        >>> said.logits.shape, said.probabilities.shape, said.classes.shape, said.labels
        ((5, 3), (5, 3), (5,), None)
    """

    logits: np.ndarray | list[np.ndarray]
    labels: np.ndarray | list[np.ndarray] | None
    index: np.ndarray

    @property
    def probabilities(self) -> np.ndarray | list[np.ndarray]:
        """The softmax of the logits over the classes, in their shape."""
        return self._each(_softmax)

    @property
    def classes(self) -> np.ndarray | list[np.ndarray]:
        """The number of the largest logit, int64, in the shape of the logits without `C`."""
        return self._each(lambda logits: logits.argmax(axis=-1))

    def _each(self, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray | list[np.ndarray]:
        logits = self.logits
        return [*map(function, logits)] if isinstance(logits, list) else function(logits)


def _softmax(logits: np.ndarray) -> np.ndarray:
    shares: np.ndarray = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    return shares


def predict(
    model: nn.Module, data: Any, batch_size: int = 64, *, precision: str = "auto",
    device: str | torch.device | None = None,
) -> Predictions:  # fmt: skip
    """What the model says about every item, once, in the order of the data.

    Args:
        model: called in eval mode; its training modes are as before afterwards.
        data: a source, a pair of tensors, a torch data set, or a split the model can prepare.
        batch_size: changes speed and memory alone.
        precision, device: as in `fit`; None leaves the model where it is.

    Raises:
        ValueError: the data are empty, `batch_size` is below 1, or the outputs of items differ in
            shape and the data do not say how long each is.

    Example:
        >>> model, inputs = nn.Sequential(nn.Linear(4, 3), nn.Dropout()), torch.randn(5, 4)
        >>> said = tk.predict(model, inputs, precision="fp32")
        >>> np.array_equal(said.classes, model.eval()(inputs).argmax(1))
        True
    """
    where = _where(model, data, batch_size, precision, device)
    found, labels = _outputs(model, lambda part, batch: forward(part, batch.inputs), where)

    def arrays(part: Rows) -> np.ndarray | list[np.ndarray]:
        return [row.numpy() for row in part] if isinstance(part, list) else part.cpu().numpy()

    known = None if labels is None else arrays(labels)
    return Predictions(arrays(found), known, np.arange(len(where.source)))


def evaluate(
    model: nn.Module, objective: Any, data: Any, metrics: Sequence[Metric] | Metric = (),
    batch_size: int = 64, *, precision: str = "auto", device: str | torch.device | None = None,
) -> dict[str, float]:  # fmt: skip
    """The mean loss and the metrics of a model on data: `{"loss": ..., "accuracy": ...}`.

    Every item counts once; the metrics are computed from all outputs together. An objective with a
    method `scored(outputs, batch) -> (rows (m, C), labels (m,))` says what metrics see of a batch:
    the tokens that are not padding, say. Its loss is then summed over the batches, in float64, and
    no outputs are kept but the rows that metrics ask for.

    Args:
        metrics: functions of logits `(n, C)` and labels `(n,)`, both arrays; else as in `predict`.

    Raises:
        ValueError: the data are empty or have no labels, or `batch_size` is below 1.
        TypeError: the outputs are not one row an item, and the objective has no `scored`.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
        >>> data = logits, torch.tensor([0, 1, 1])
        >>> scores = tk.evaluate(nn.Identity(), tk.classification(), data, [tk.accuracy])
        >>> {name: round(value, 3) for name, value in scores.items()}
        {'loss': 0.794, 'accuracy': 0.667}
    """
    check(model, objective)
    where = _where(model, data, batch_size, precision, device)
    what = (objective, objective.outputs, functions(metrics), model, where)
    return getattr(where.source, "scores", scores)(*what)


class Where(NamedTuple):
    """What is evaluated, in batches of which size, in which precision, and on which device.

    Example:
        >>> source, cpu = tk.data.tensors(torch.randn(5, 4)), torch.device("cpu")
        >>> where = tk.evaluation.Where(source, 2, tk.devices.autocast(cpu, "fp32"), cpu)
        >>> [items.tolist() for items in where.batches()]
        [[0, 1], [2, 3], [4]]
    """

    source: data.Source
    batch_size: int
    autocast: devices.Autocast
    device: torch.device

    def batches(self) -> list[np.ndarray]:
        """The numbers of the items of each batch: see `data.in_sequence`."""
        return data.in_sequence(len(self.source), self.batch_size, self.source.lengths)


def _where(
    model: nn.Module, items: Any, batch_size: int, precision: str, device: str | torch.device | None
) -> Where:
    if not whole(batch_size):
        raise ValueError(f"batch_size is {batch_size}, but at least 1 is expected: try 64")
    distributed.start()
    if device is None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
    device = devices.resolve_device(device)
    source = data.as_source(items, model.to(device))
    autocast = devices.autocast(device, devices.resolve_precision(precision, device))
    return Where(source, batch_size, autocast, device)


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    # Eval mode without gradients. The modes of the modules are as before when it ends.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # not inference_mode: what a model caches now must serve in training later
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def scores(
    objective: Any, outputs: Outputs, metrics: Sequence[Metric], model: nn.Module, where: Where
) -> dict[str, float]:
    """The mean loss and the metrics, as `evaluate` gives them; `fit` asks after each epoch.

    Args:
        outputs: a function of the model and a batch: that of the objective, or of several ranks.

    Raises:
        ValueError, TypeError: as `evaluate`.

    Example:
        >>> source, cpu = tk.data.tensors(torch.eye(2), [0, 1]), torch.device("cpu")
        >>> where = tk.evaluation.Where(source, 64, tk.devices.autocast(cpu, "fp32"), cpu)
        >>> what = tk.classification()
        >>> found = tk.evaluation.scores(what, what.outputs, [tk.accuracy], nn.Identity(), where)
        >>> found["accuracy"]
        1.0
    """
    if hasattr(objective, "scored"):
        return _streamed(objective, outputs, metrics, model, where)
    return _at_once(objective, metrics, *_outputs(model, outputs, where))


def _outputs(model: nn.Module, outputs: Outputs, where: Where) -> tuple[Rows, Rows | None]:
    # The outputs for the whole source, float32 on the host in the order of the items, and the
    # labels. Outputs, and labels, for each token are a list with a tensor an item.
    # Several ranks share the batches, and each gets everything.
    source, batches = where.source, where.batches()
    found: list[Tensor] = []
    labels: list[Tensor] = []
    own = distributed.share(batches)
    with _inference(model):
        for batch in data.stream(source, own, None, 0):
            with where.autocast():
                found.append(outputs(model, batch.to(where.device)).float())
            if batch.labels is not None:
                labels.append(batch.labels)
    lengths = source.lengths
    if lengths is not None and not all(
        part.dim() > 2 and part.shape[1] == lengths[items].max()
        for part, items in zip(found, own, strict=True)
    ):
        lengths = None
    known = None
    if labels:
        by_token = labels[0].shape == found[0].shape[:2]
        known = _joined(labels, batches, lengths if by_token else None)
    return _joined(found, batches, lengths), known


def _joined(parts: list[Tensor], batches: list[np.ndarray], lengths: np.ndarray | None) -> Rows:
    # In the order of the items: one tensor or, with lengths, for each item its own tokens.
    back = np.argsort(np.concatenate(batches), kind="stable")
    shapes = sorted({tuple(part.shape[1:]) for part in parts})
    if len(shapes) > 1 and lengths is None:
        raise ValueError(
            f"the batches have items of the shapes {shapes[0]} and {shapes[1]}, which cannot be "
            "put together: give the source `lengths`, or let the model return one row an item"
        )
    parts = distributed.collect(parts, len(batches), None if lengths is None else lengths.max())
    if lengths is None:
        return torch.cat(parts).cpu()[torch.from_numpy(back)]
    rows = [row for part in parts for row in part.cpu()]
    return [rows[at][:length] for at, length in zip(back, lengths, strict=True)]


def _at_once(
    objective: Any, metrics: Sequence[Metric], outputs: Rows, labels: Rows | None
) -> dict[str, float]:
    # From all outputs at once, so that no score depends on how they were batched.
    if labels is None:
        raise ValueError("the data have no labels to score: use predict for unlabelled data")
    if isinstance(outputs, list) or isinstance(labels, list):
        raise TypeError(
            f"the model says something about each token, but the objective "
            f"{type(objective).__name__} scores items: give it a method scored(outputs, batch)"
        )
    batch = data.Batch({}, labels, torch.arange(len(labels)))
    scores = {"loss": float(objective.loss(outputs, batch).mean())}
    given = outputs.numpy(), labels.cpu().numpy()
    return scores | {metric.__name__: float(metric(*given)) for metric in metrics}


def _streamed(
    objective: Any, outputs: Outputs, metrics: Sequence[Metric], model: nn.Module, where: Where
) -> dict[str, float]:
    # Batch by batch, for outputs that are not one row an item and too many to keep. Every item is
    # asked for its own rows, so that metrics see them in the order of the items. Of several ranks
    # each does all of it.
    losses: list[Loss] = []
    rows: dict[int, list[Tensor]] = {}
    with _inference(model):
        for batch in data.stream(where.source, where.batches(), None, 0):
            batch = batch.to(where.device)
            with where.autocast():
                found = outputs(model, batch)
            losses.append(objective.loss(found, batch))
            for at, item in enumerate(batch.index.tolist() if metrics else ()):
                scored = objective.scored(found[at : at + 1], batch.item(at))
                rows[item] = [part.cpu() for part in scored]
    sums = list(map(math.fsum, zip(*as_numbers(losses), strict=True)))
    scores = {"loss": mean_of_sums([float(weight) for weight in losses[-1].weights], sums)}
    if not metrics:
        return scores
    columns = zip(*(rows[item] for item in range(len(where.source))), strict=True)
    logits, labels = map(torch.cat, columns)
    given = logits.float().numpy(), labels.numpy()
    return scores | {metric.__name__: float(metric(*given)) for metric in metrics}
