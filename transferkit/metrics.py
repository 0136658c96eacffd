"""How good a model is, and how sure we are of it. The one idea: a metric is a plain function of all
logits and labels, computed once, so that neither the size nor the order of the batches matters.

Every metric takes `logits`, real numbers of shape `(n, C)`, and `labels`, class numbers of shape
`(n,)`, as NumPy arrays or CPU tensors, and returns one `float`. It carries `higher_is_better`.
Logits that hold NaN make every metric NaN: a diverged model is never the best one. Tests compare
with scikit-learn; SciPy is loaded only where a quantile or a tail probability is asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np

Metric = Callable[[np.ndarray, np.ndarray], float]
F = TypeVar("F", bound=Callable[..., float])


def _metric(higher_is_better: bool) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        @wraps(function)
        def checked(logits: np.ndarray, labels: np.ndarray, **settings: Any) -> float:
            logits, labels = _checked(logits, labels)
            if np.isnan(logits).any():
                return float("nan")
            return function(logits, labels, **settings)

        vars(checked)["higher_is_better"] = higher_is_better
        return cast(F, checked)  # what is called like the function, and checks what it is given

    return decorate


def _checked(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    logits, labels = np.asarray(logits), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(
            f"logits have shape {logits.shape} and labels {labels.shape}, but (n, C) and (n,) with "
            "at least one item are expected: pass the scores of all classes, not the predicted ones"
        )
    if labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels are of type {labels.dtype}, but class numbers are expected: convert with "
            ".astype(int); measured values need another metric"
        )
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"labels run from {labels.min()} to {labels.max()} but the logits have "
            f"{logits.shape[1]} columns: labels must lie in [0, {logits.shape[1] - 1}]"
        )
    return logits, labels


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities of shape `(n, C)` in float64, each row adding up to 1."""
    found: np.ndarray = np.exp(_log_softmax(logits))
    return found


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted: np.ndarray = np.asarray(logits, dtype=np.float64)
    shifted = shifted - shifted.max(axis=1, keepdims=True)
    shifted = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def confusion_matrix(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How often each class (row) was taken for each class (column): int64 of shape `(C, C)`.

    The prediction is the class with the largest logit, the first of them on a tie.

    Raises:
        ValueError: the shapes do not fit or a label is out of range.

    Example:
        >>> logits, labels = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]]), np.array([0, 1, 1])
        >>> tk.confusion_matrix(logits, labels).tolist()
        [[1, 0], [1, 1]]
    """
    logits, labels = _checked(logits, labels)
    classes = logits.shape[1]
    cells = labels.astype(np.int64) * classes + logits.argmax(axis=1)
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


@_metric(higher_is_better=True)
def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of the items whose largest logit is that of their label, in [0, 1].

    Example:
        >>> logits, labels = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]]), np.array([0, 1, 1])
        >>> round(tk.accuracy(logits, labels), 3)
        0.667
    """
    return float((logits.argmax(axis=1) == labels).mean())


@_metric(higher_is_better=True)
def balanced_accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the classes of the share found of each (recall), in [0, 1].

    Classes without an item in `labels` are left out. Guessing gives 1/C whatever the class shares.

    Example:
        >>> logits, labels = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]]), np.array([0, 1, 1])
        >>> tk.balanced_accuracy(logits, labels)
        0.75
    """
    table = confusion_matrix(logits, labels)
    items = table.sum(axis=1)
    return float((table.diagonal()[items > 0] / items[items > 0]).mean())


@_metric(higher_is_better=True)
def macro_f1(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the classes of F1 = 2 TP / (2 TP + FP + FN), in [0, 1].

    Classes that are neither a label nor a prediction are left out, as in scikit-learn.

    Example:
        >>> logits, labels = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]]), np.array([0, 1, 1])
        >>> round(tk.macro_f1(logits, labels), 3)
        0.667
    """
    table = confusion_matrix(logits, labels)
    sums = table.sum(axis=0) + table.sum(axis=1)
    return float((2 * table.diagonal()[sums > 0] / sums[sums > 0]).mean())


@_metric(higher_is_better=True)
def mcc(logits: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation coefficient, in [-1, 1]; 0 for a constant prediction or constant labels.

    Source: for more than two classes, Gorodkin (2004), "Comparing two K-category assignments by a
    K-category correlation coefficient", doi:10.1016/j.compbiolchem.2004.09.006.

    Example:
        >>> logits, labels = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]]), np.array([0, 1, 1])
        >>> tk.mcc(logits, labels)
        0.5
    """
    table = confusion_matrix(logits, labels).astype(np.float64)
    n, true, predicted = table.sum(), table.sum(axis=1), table.sum(axis=0)
    scale = np.sqrt((n * n - true @ true) * (n * n - predicted @ predicted))
    return float((n * table.trace() - true @ predicted) / scale) if scale else 0.0


@_metric(higher_is_better=True)
def auroc(logits: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve: how often a positive item outranks a negative one, ties for half.

    With two classes the score of an item is its logit of class 1 minus that of class 0; with more,
    the mean over the classes of one against the rest, scored by the softmax probability. NaN with
    a warning if a class has no item in `labels`: the area is then not defined.

    Example:
        >>> logits, labels = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]]), np.array([0, 1, 1])
        >>> tk.auroc(logits, labels)
        0.75
    """
    if missing := sorted(set(range(logits.shape[1])) - set(np.unique(labels).tolist())):
        warnings.warn(
            f"auroc is NaN, for the labels hold no item of class {missing[0]}: score on data that "
            "hold every class, or use another metric",
            stacklevel=3,
        )
        return float("nan")
    if logits.shape[1] == 2:
        return _area(logits[:, 1].astype(np.float64) - logits[:, 0], labels == 1)
    scores = softmax(logits)
    return float(np.mean([_area(scores[:, c], labels == c) for c in range(logits.shape[1])]))


def _area(scores: np.ndarray, positive: np.ndarray) -> float:
    # The Mann-Whitney statistic; equal scores share the mean of their ranks.
    _, place, repeats = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(repeats) - (repeats - 1) / 2)[place]
    positives = positive.sum()
    wins = ranks[positive].sum() - positives * (positives + 1) / 2
    return float(wins / (positives * (len(scores) - positives)))


@_metric(higher_is_better=False)
def log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean cross-entropy of the softmax, in nats; ln C for a model that says nothing."""
    return -float(_log_softmax(logits)[np.arange(len(labels)), labels].mean())


@_metric(higher_is_better=False)
def expected_calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Mean gap between confidence (the largest probability) and accuracy, in [0, 1].

    The items are put into `bins` intervals of equal width, each open to the left and closed to the
    right, by their confidence; the gaps of the intervals are weighted by their number of items. The
    value depends on `bins` and is biased upwards for few items.

    Source: Guo et al. (2017), "On calibration of modern neural networks", eq. 3.
    """
    probabilities = softmax(logits)
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(bin_of, weights=confidence - correct, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval: `0.861 [0.852, 0.870] (n=5)`.

    A format applies to the three numbers: `f"{interval:.1%}"` gives `86.1% [85.2%, 87.0%] (n=5)`.
    """

    mean: float
    low: float
    high: float
    n: int

    def __format__(self, spec: str) -> str:
        mean, low, high = (format(x, spec or ".3f") for x in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}] (n={self.n})"

    def __str__(self) -> str:
        return format(self, "")


def mean_interval(
    values: Sequence[float] | np.ndarray, level: float = 0.95, test_per_train: float = 0.0
) -> Interval:
    """Mean of repeated runs with Student's t interval.

    Args:
        values: one result a seed or fold, shape `(n,)`, at least 2.
        level: the coverage, in (0, 1).
        test_per_train: 0 for independent runs. For runs whose training sets overlap, such as the
            folds of a cross-validation, the number of tested by that of training items: 1/(k - 1)
            for k folds. The variance of the mean is then s² (1/n + test_per_train), because
            overlapping runs vary less than independent ones would.

    Raises:
        ValueError: fewer than two values, one is not finite, or `level` is outside (0, 1).

    Source: for `test_per_train`, Nadeau & Bengio (2003), "Inference for the generalization error",
    doi:10.1023/A:1024068626366.

    Example:
        >>> print(tk.mean_interval([0.81, 0.83, 0.85]))
        0.830 [0.780, 0.880] (n=3)
    """
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or len(found) < 2 or not np.isfinite(found).all():
        raise ValueError(
            f"the values are {found.tolist()}, but at least two finite numbers are expected: "
            "an interval needs several seeds or folds"
        )
    _check_level(level)
    if not 0.0 <= test_per_train < float("inf"):
        raise ValueError(
            f"test_per_train is {test_per_train}, but a ratio of at least 0 is expected: 1/(k - 1) "
            "for k folds"
        )
    from scipy.stats import t

    n, mean = len(found), found.mean()
    half = t.ppf((1 + level) / 2, n - 1) * found.std(ddof=1) * np.sqrt(1 / n + test_per_train)
    return Interval(float(mean), float(mean - half), float(mean + half), n)


def paired_interval(
    a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, level: float = 0.95,
    test_per_train: float = 0.0,
) -> Interval:  # fmt: skip
    """Mean of `a - b` with Student's t interval, for runs on the same seeds or folds in one order.

    An interval without 0 says that the two differ at this level; see `mean_interval` for the
    arguments and for folds.

    Raises:
        ValueError: the two do not have the same length, or as in `mean_interval`.

    Example:
        >>> print(tk.paired_interval([0.81, 0.83, 0.85], [0.80, 0.81, 0.82]))
        0.020 [-0.005, 0.045] (n=3)
    """
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.shape != right.shape:
        raise ValueError(
            f"a has shape {left.shape} and b {right.shape}, but pairs are expected: give one "
            "result of each for every seed or fold"
        )
    return mean_interval(left - right, level, test_per_train)


def bootstrap_interval(
    metric: Metric,
    logits: np.ndarray,
    labels: np.ndarray,
    level: float = 0.95,
    repeats: int = 1000,
    seed: int = 0,
) -> Interval:
    """A metric on one test set with its percentile bootstrap interval, for one trained model.

    Items are drawn with replacement within each class, so that every draw has the class sizes of
    the test set: no class vanishes, and the interval holds for these class shares. It speaks of the
    choice of test items, not of seeds; items that belong together (one film, one patient) make it
    too narrow. `mean` is the metric on the items as they are, `n` their number.

    Raises:
        ValueError: the shapes do not fit, `level` is outside (0, 1) or `repeats` is below 100.

    Source: Efron & Tibshirani (1993), "An introduction to the bootstrap", chapter 13.

    Example:
        >>> logits, labels = np.eye(2).repeat(20, axis=0), np.repeat([0, 1], 20)
        >>> print(tk.bootstrap_interval(tk.accuracy, logits, labels))
        1.000 [1.000, 1.000] (n=40)
    """
    logits, labels = _checked(logits, labels)
    _check_level(level)
    if repeats < 100:
        raise ValueError(f"repeats is {repeats}, but at least 100 are expected: 1000 is usual")
    rng = np.random.default_rng(seed)
    classes = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    results = np.empty(repeats)
    for i in range(repeats):
        drawn = np.concatenate([rng.choice(items, len(items)) for items in classes])
        results[i] = metric(logits[drawn], labels[drawn])
    low, high = np.quantile(results, [(1 - level) / 2, (1 + level) / 2])
    return Interval(metric(logits, labels), float(low), float(high), len(labels))


class McNemar(NamedTuple):
    """Items that only the first model got right, only the second, and the two-sided p-value."""

    only_a: int
    only_b: int
    p_value: float


def mcnemar(correct_a: np.ndarray, correct_b: np.ndarray) -> McNemar:
    """Exact McNemar test of two models on the same test items.

    The null hypothesis is that an item on which the models disagree is as likely to be won by
    either; the p-value is that of the two-sided binomial test, 1 if they never disagree.

    Args:
        correct_a, correct_b: whether each model was right, boolean of shape `(n,)`.

    Raises:
        ValueError: the two are not boolean arrays of one shape `(n,)`.

    Source: McNemar (1947), doi:10.1007/BF02295996.
    """
    a, b = np.asarray(correct_a), np.asarray(correct_b)
    if a.dtype != bool or b.dtype != bool or a.ndim != 1 or a.shape != b.shape:
        raise ValueError(
            f"got {a.dtype} of shape {a.shape} and {b.dtype} of shape {b.shape}, but booleans of "
            "one shape (n,) are expected: pass logits.argmax(1) == labels for both models"
        )
    from scipy.stats import binom

    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    tail = binom.cdf(min(only_a, only_b), only_a + only_b, 0.5)
    return McNemar(only_a, only_b, min(1.0, 2 * float(tail)))


def _check_level(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level is {level}, but a share in (0, 1) is expected: 0.95 is usual")
