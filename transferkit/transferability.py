"""Which pre-trained model, and which of its layers? The one idea: score features, train nothing.

A transferability score sees what a frozen model makes of a few labelled items of the target, and
says with a little linear algebra how far the labels can be read off it. Scores are numbers to rank
candidates by, on the same items; they are no forecast of an accuracy. The probes at the end of the
list are: they count how often a simple learner is right about an item that it has not seen.

Features are real arrays or CPU tensors `(n, D)`, a row an item; labels are class numbers `(n,)`, of
which only equality matters. Everything is computed in float64, from one singular value
decomposition where one is needed.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from transferkit import data, devices, engine, evaluation, layers, models, objectives, preflight
from transferkit import plan as plans
from transferkit.checks import whole
from transferkit.show import Table

Score = Callable[[np.ndarray, np.ndarray], float]

_ROUNDS = 1000  # of the fixed point; ten are enough unless the optimum lies at the edge
_CLOSE = 1e-9  # relative change of alpha / beta at which it has arrived
_EDGE = 1e-12  # alpha / beta stays within this factor of the largest eigenvalue, both ways
_PENALTIES = np.logspace(-4, 2, 13)  # of the linear probe, in units of the total variance


# ---- what is given ------------------------------------------------------------------------------


def _classes(labels: Any, least: int = 1) -> np.ndarray:
    # the labels as 0 .. C-1, which are all there
    given = np.asarray(labels)
    if given.ndim != 1 or given.dtype.kind not in "iub":
        raise ValueError(
            f"labels are {given.dtype} of shape {given.shape}, but class numbers (n,) are "
            "expected: convert with .astype(int)"
        )
    names, codes = np.unique(given, return_inverse=True)
    sizes = np.bincount(codes)
    if len(names) < 2:
        raise ValueError(
            f"the labels hold {len(names)} class, but at least 2 are expected: draw items of each "
            "class, with split.take(n)"
        )
    if sizes.min() < least:
        raise ValueError(
            f"class {names[sizes.argmin()]} has {sizes.min()} item, but at least {least} of each "
            "are expected: draw more items, or leave the class out"
        )
    return codes


def _features(features: Any, count: int) -> np.ndarray:
    found = np.asarray(features, dtype=np.float64)
    if found.ndim != 2 or len(found) != count or not found.shape[1]:
        raise ValueError(
            f"features have shape {found.shape} and there are {count} labels, but one row of "
            f"numbers for each, ({count}, D), is expected: pool what has more axes"
        )
    if not np.isfinite(found).all():
        raise ValueError(
            f"{np.sum(~np.isfinite(found))} of the features are NaN or infinite: compute them in "
            "fp32, and look at the inputs of the items concerned"
        )
    return found


def _one_hot(codes: np.ndarray) -> np.ndarray:
    return np.eye(codes.max() + 1)[codes]


def _centred(features: Any, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # Left singular vectors (n, r) and singular values (r,) of the centred features, without the
    # directions in which they do not vary.
    x = _features(features, len(codes))
    left, sizes, _ = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    kept = sizes > max(x.shape) * np.finfo(float).eps * max(sizes.max(), np.abs(x).max())
    return left[:, kept], sizes[kept]


# ---- from a source model's classes --------------------------------------------------------------


def nce(source_classes: Any, labels: Any) -> float:
    """Negative conditional entropy of the labels, given the source model's classes, in nats.

    0 if the class that the source model names decides the label, and minus the entropy of the
    labels if it says nothing about them.

    Args:
        source_classes: what the source model says of each item, class numbers `(n,)`.
        labels: of the target, class numbers `(n,)`.

    Raises:
        ValueError: the two do not fit, or there is a single label.

    Source: Tran, Nguyen & Hassner (2019), "Transferability and hardness of supervised
    classification tasks", ICCV: the negative of H(Y | Z), of the empirical joint distribution.

    Example:
        >>> tk.nce([3, 3, 8, 8], [0, 0, 1, 1]), round(tk.nce([3, 3, 3, 3], [0, 0, 1, 1]), 4)
        (0.0, -0.6931)
    """
    codes, given = _classes(labels), np.asarray(source_classes)
    if given.shape != codes.shape or given.dtype.kind not in "iub":
        raise ValueError(
            f"source_classes are {given.dtype} of shape {given.shape}, but one class number for "
            f"each of {len(codes)} labels is expected: pass tk.predict(model, data).classes"
        )
    return _expected_log(_one_hot(np.unique(given, return_inverse=True)[1]), codes)


def leep(probabilities: Any, labels: Any) -> float:
    """Log expected empirical prediction: the mean log-likelihood of a classifier made by counting.

    The classifier draws a source class from what the source model says, then a label from the
    labels that went with this class. At most 0. With probabilities that are all 0 or 1 it is `nce`;
    with the same probabilities for each item, minus the entropy of the labels. A source class that
    never gets any probability changes nothing.

    Args:
        probabilities: of the source model's classes, `(n, Z)`, each row adding up to 1.
        labels: of the target, class numbers `(n,)`.

    Raises:
        ValueError: the rows are no probabilities, the two do not fit, or there is a single label.

    Source: Nguyen, Hassner, Seeger & Archambeau (2020), "LEEP: a new measure to evaluate
    transferability of learned representations", ICML, eqs. 1 and 2.

    Example:
        >>> said = np.array([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0], [0.1, 0.9, 0.0], [0.2, 0.8, 0.0]])
        >>> round(tk.leep(said, [0, 0, 1, 1]), 4)
        -0.2955
    """
    codes = _classes(labels)
    shares = _features(probabilities, len(codes))
    if shares.min() < 0 or not np.allclose(shares.sum(axis=1), 1, atol=1e-3):
        raise ValueError(
            f"probabilities lie in [{shares.min():.3g}, {shares.max():.3g}] and a row adds up to "
            f"{shares.sum(axis=1)[0]:.3g}, but probabilities are expected: pass "
            "tk.predict(model, data).probabilities, not logits"
        )
    return _expected_log(shares, codes)


def _expected_log(shares: np.ndarray, codes: np.ndarray) -> float:
    joint = _one_hot(codes).T @ shares / len(codes)  # (C, Z)
    total = joint.sum(axis=0)
    given = np.divide(joint, total, out=np.zeros_like(joint), where=total > 0)  # label given class
    expected = (given[codes] * shares).sum(axis=1)
    return min(0.0, float(np.log(expected).mean()))  # rounding may leave it above


# ---- from features ------------------------------------------------------------------------------


class Evidence(NamedTuple):
    """The largest evidence of one column of targets, and where it is.

    `log_evidence` in nats, for all items together; `alpha` and `beta`, the precisions of the
    weights' prior and of the noise; `gamma`, the number of directions that the targets decide.
    """

    log_evidence: float
    alpha: float
    beta: float
    gamma: float


def evidence(features: Any, targets: Any) -> list[Evidence]:
    """The largest evidence of a Bayesian linear regression, for each column of targets.

    The model is `y = F w + noise`, with `w ~ N(0, I / alpha)` and `noise ~ N(0, I / beta)`, and
    without an intercept. The evidence, the density of `y` with `w` integrated out, is raised to a
    peak by MacKay's fixed point in `alpha / beta`, from the largest eigenvalue of `F'F` over `n`.
    For features that say next to nothing there can be a second peak, and it may be the higher one.
    The ratio is kept within 1e-12 of that eigenvalue, either way: with at least as many directions
    as items the optimum may lie at no noise at all, and with features that say nothing at weights
    of exactly zero.

    Args:
        features: `(n, D)`.
        targets: real numbers `(n,)` or `(n, K)`.

    Raises:
        ValueError: the shapes do not fit, something is not finite, or a column is zero throughout.

    Source: You, Liu, Wang & Long (2021), "LogME: practical assessment of pre-trained models for
    transfer learning", ICML, eq. 2 and its fixed point.

    Example:
        >>> f = np.array([[1.0, 0.0], [2.0, 1.0], [3.0, 0.0], [4.0, 1.0]])
        >>> found = tk.transferability.evidence(f, [1.1, 1.9, 3.1, 3.9])[0]
        >>> round(found.log_evidence, 3), round(found.gamma, 2)
        (-0.973, 1.99)
    """
    y = np.asarray(targets, dtype=np.float64)
    y = y[:, None] if y.ndim == 1 else y
    if y.ndim != 2 or not np.isfinite(y).all() or not (y != 0).any(axis=0).all():
        raise ValueError(
            f"targets have shape {y.shape}, but columns of finite numbers, none of them zero "
            "throughout, are expected: one-hot rows of the classes that are there, say"
        )
    x = _features(features, len(y))
    n = len(y)
    left, sizes, _ = np.linalg.svd(x, full_matrices=False)
    s2 = sizes[:, None] ** 2  # eigenvalues of F'F, (r, 1)
    along = (left.T @ y) ** 2  # of y, its length in each direction, squared: (r, K)
    beyond = np.maximum((y**2).sum(axis=0) - along.sum(axis=0), 0.0)  # what no weights reach
    ratio = _fixed_point(s2, along, beyond, n)
    gamma, _, weights, missed = _moments(s2, along, beyond, n, ratio)
    beta = n / np.maximum(missed + ratio * weights, np.finfo(float).tiny)  # best for this ratio
    occam = np.log(ratio / (s2 + ratio)).sum(axis=0) / 2
    value = n / 2 * (np.log(beta) - math.log(2 * math.pi) - 1) + occam
    return [Evidence(*row) for row in np.stack([value, ratio * beta, beta, gamma], 1).tolist()]


def _moments(
    s2: np.ndarray, along: np.ndarray, beyond: np.ndarray, n: int, ratio: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    # gamma, n - gamma (without cancellation), |m|^2 and |Fm - y|^2 at a ratio alpha / beta
    kept, lost = s2 / (s2 + ratio), ratio / (s2 + ratio)
    weights = (kept * along / (s2 + ratio)).sum(axis=0)
    missed = (lost**2 * along).sum(axis=0) + beyond
    return kept.sum(axis=0), lost.sum(axis=0) + n - len(s2), weights, missed


def _fixed_point(s2: np.ndarray, along: np.ndarray, beyond: np.ndarray, n: int) -> np.ndarray:
    # The ratio alpha / beta for which alpha = gamma / |m|^2 and beta = (n - gamma) / |Fm - y|^2.
    top = s2.max() or 1.0
    low, high = _EDGE * top, top / _EDGE
    ratio = np.full(along.shape[1], top / n)
    for _ in range(_ROUNDS):
        gamma, free, weights, missed = _moments(s2, along, beyond, n, ratio)
        above, below = gamma * missed, free * weights
        moved = np.divide(above, below, out=np.full_like(ratio, high), where=above < high * below)
        moved = np.maximum(moved, low)
        arrived = np.abs(moved - ratio) <= _CLOSE * ratio
        ratio = moved
        if arrived.all():
            break
    return ratio


def logme(features: Any, labels: Any) -> float:
    """Logarithm of the maximum evidence, per item: the mean over the classes, one against the rest.

    Each class is a column of zeros and ones, taken for a regression: see `evidence`. Not changed by
    rotating the features or by multiplying all with one number; changed by shifting them, and by
    stretching one column. Items that stand there twice make it far too high where `D >= n`, for
    then the labels seem to have no noise: remove duplicates first.

    Args:
        features: `(n, D)`.
        labels: class numbers `(n,)`, or real numbers `(n,)` for a regression.

    Raises:
        ValueError: as `evidence`, or there is a single class.

    Source: You et al. (2021), as `evidence`.

    Example:
        >>> f = np.array([[1.0, 0.2], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.2]])
        >>> tk.logme(f, [0, 0, 1, 1]) > tk.logme(f, [0, 1, 0, 1])
        True
    """
    given = np.asarray(labels)
    targets = given if given.dtype.kind == "f" else _one_hot(_classes(given))
    return float(np.mean([found.log_evidence for found in evidence(features, targets)])) / len(
        given
    )


def h_score(features: Any, labels: Any, shrinkage: bool = False) -> float:
    """How much of the features' variance, in their own units, lies between the classes.

    The trace of `inv(cov(f)) cov(E[f | y])`, from 0 to C - 1. Not changed by any invertible linear
    map of the features. With `D >= n - 1` directions it is C - 1 whatever the labels are, and says
    nothing: then use `shrinkage`.

    Args:
        features: `(n, D)`; directions without variance are left out.
        labels: class numbers `(n,)`.
        shrinkage: pull the covariance to a multiple of the identity, as far as Ledoit and Wolf
            estimate to be best, and count the between-class part by what is left of it.

    Raises:
        ValueError: the shapes do not fit, something is not finite, or there is a single class.

    Source: Bao et al. (2019), "An information-theoretic approach to transferability in task
    transfer learning", ICIP; the shrinkage: Ibrahim, Ponomareva & Mazumder (2022), "Newer is not
    always better", ECML PKDD, with Ledoit & Wolf (2004), doi:10.1016/S0047-259X(03)00096-4.

    Example:
        >>> f = np.array([[1.0, 0.2], [1.0, -0.2], [-1.0, 0.2], [-1.0, -0.2]])
        >>> round(tk.h_score(f, [0, 0, 1, 1]), 6), round(abs(tk.h_score(f, [0, 1, 1, 0])), 6)
        (1.0, 0.0)
    """
    codes = _classes(labels)
    left, sizes = _centred(features, codes)
    if not len(sizes):
        return 0.0
    sums = _one_hot(codes).T @ left  # (C, r)
    between = (sums**2 / np.bincount(codes)[:, None]).sum(axis=0)  # share of each direction
    if not shrinkage:
        return float(between.sum())
    n, width = len(codes), np.asarray(features).shape[1]
    variances = sizes**2 / n
    mean = variances.sum() / width
    distance = (variances**2).sum() - width * mean**2
    fourth = (((left * sizes) ** 2).sum(axis=1) ** 2).sum() / n - (variances**2).sum()
    share = min(1.0, fourth / n / distance) if distance > 0 else 1.0
    kept = (1 - share) * variances
    return float((kept * between / (kept + share * mean)).sum()) if share < 1 else 0.0


def knn_accuracy(features: Any, labels: Any, k: int = 5) -> float:
    """How often the commonest label of the k nearest other items is that of the item, in [0, 1].

    Near is the Euclidean distance: scale features first where their units differ. On a tie the
    smallest class number wins.

    Args:
        features: `(n, D)`.
        labels: class numbers `(n,)`.
        k: how many neighbours, 1 to n - 1.

    Raises:
        ValueError: the shapes do not fit, something is not finite, there is a single class, or
            there are not so many neighbours.

    Example:
        >>> f = np.array([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2]])
        >>> tk.knn_accuracy(f, [0, 0, 0, 1, 1, 1], k=1)
        1.0
    """
    codes = _classes(labels)
    x = _features(features, len(codes))
    if not whole(k) or k >= len(codes):
        raise ValueError(f"k is {k}: give 1 to {len(codes) - 1}, one less than there are items")
    x = x - x.mean(axis=0)
    squares = (x**2).sum(axis=1)
    distances = squares[:, None] + squares - 2 * x @ x.T
    np.fill_diagonal(distances, np.inf)
    nearest = np.argsort(distances, axis=1, kind="stable")[:, :k]
    votes = _one_hot(codes)[nearest].sum(axis=1)
    return float((votes.argmax(axis=1) == codes).mean())


def centroid_accuracy(features: Any, labels: Any) -> float:
    """How often the nearest class mean, made without the item, is that of its class, in [0, 1].

    Args:
        features: `(n, D)`.
        labels: class numbers `(n,)`, each at least twice.

    Raises:
        ValueError: the shapes do not fit, something is not finite, or a class has a single item.

    Example:
        >>> f = np.array([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2]])
        >>> tk.centroid_accuracy(f, [0, 0, 0, 1, 1, 1])
        1.0
    """
    codes = _classes(labels, least=2)
    x = _features(features, len(codes))
    sizes = np.bincount(codes)
    means = _one_hot(codes).T @ x / sizes[:, None]
    distances = ((x[:, None] - means) ** 2).sum(axis=2)
    own = np.arange(len(x)), codes
    distances[own] *= (sizes[codes] / (sizes[codes] - 1)) ** 2  # the mean without the item
    return float((distances.argmin(axis=1) == codes).mean())


def probe_accuracy(features: Any, labels: Any) -> float:
    """How often a linear probe is right about the item that it was not trained on, in [0, 1].

    The probe is a ridge regression with intercept on one-hot rows, of features that are scaled to
    unit variance; it names the class of the largest output. Leaving each item out once takes no
    training: the outputs follow from one decomposition. The penalty is the best of 13, so that the
    value is a little too high.

    Args:
        features: `(n, D)`; columns without variance are left out.
        labels: class numbers `(n,)`, each at least twice.

    Raises:
        ValueError: the shapes do not fit, something is not finite, or a class has a single item.

    Source: for the left-out outputs, Allen (1974), "The relationship between variable selection and
    data augmentation and a method for prediction", doi:10.1080/00401706.1974.10489157.

    Example:
        >>> f = np.array([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2]])
        >>> tk.probe_accuracy(f, [0, 0, 0, 1, 1, 1])
        1.0
    """
    codes = _classes(labels, least=2)
    x = _features(features, len(codes))
    x, n = x - x.mean(axis=0), len(codes)
    spread = x.std(axis=0)
    varies = spread > np.finfo(float).eps * n * max(np.abs(x).max(), 1.0)
    if not varies.any():
        return float((_one_hot(codes).sum(axis=0).argmax() == codes).mean())
    left, sizes, _ = np.linalg.svd(x[:, varies] / spread[varies], full_matrices=False)
    penalties = _PENALTIES * (sizes**2).sum()
    return max(_left_out(left, sizes**2 / (sizes**2 + p), codes) for p in penalties)


def _left_out(left: np.ndarray, shrunk: np.ndarray, codes: np.ndarray) -> float:
    y = _one_hot(codes)
    fitted = y.mean(axis=0) + left * shrunk @ (left.T @ y)
    levers = (left**2 @ shrunk + 1 / len(y))[:, None]
    outputs = y - (y - fitted) / (1 - levers)  # of the fit without the item
    return float((outputs.argmax(axis=1) == codes).mean())


SCORES: dict[str, Score] = {
    "logme": logme,
    "h_score": partial(h_score, shrinkage=True),
    "knn": knn_accuracy,
    "centroid": centroid_accuracy,
    "probe": probe_accuracy,
}


# ---- candidates side by side --------------------------------------------------------------------


class Layer(NamedTuple):
    """What comes out of a layer group: `features`, float32 `(n, width)`, `seconds` of the pass up
    to here, and `mib`, the memory of the weights up to here and of the largest state of a batch.
    """

    features: np.ndarray
    seconds: float
    mib: float


def layer_features(
    model: nn.Module, items: Any, *, batch_size: int = 64, precision: str = "fp32",
    device: str | torch.device | None = None, clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Layer]:  # fmt: skip
    """The features after each layer group but the last, from one pass over the data.

    What has more axes than `(batch, width)` is averaged: over the real tokens of a text, over the
    places of an image. A group without parameters counts as part of the one before it.

    Args:
        model: a `Staged` or an `nn.Sequential`, whose last group is the head; in eval mode.
        items: what `predict` accepts.
        clock: says the seconds; `time.process_time` counts those of all threads together.

    Raises:
        TypeError: the model has no order of calls, or a state is none of the above.
        ValueError: the data are empty, or `batch_size` is below 1.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), nn.Linear(3, 2))
        >>> found = tk.transferability.layer_features(model, torch.randn(6, 4))
        >>> {name: layer.features.shape for name, layer in found.items()}
        {'0': (6, 8), '2': (6, 3)}
    """
    where = evaluation._where(model, items, batch_size, precision, device)
    stages, batches = _candidate_layers(model), where.batches()
    names = list(dict.fromkeys(name for name, _ in stages))
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    seconds, states = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    with evaluation._inference(model):
        for batch in data.stream(where.source, batches, None, 0):
            state, found = batch.to(where.device).inputs, {}
            for name, module in stages:
                started = clock()
                with where.autocast():
                    state = module(state)
                found[name] = _pooled(state, name).float().cpu()  # waits for the device
                seconds[name] += clock() - started
                parts = [state] if isinstance(state, Tensor) else list(state.values())
                states[name] = max(states[name], preflight._size(parts))
            for name, part in found.items():
                rows[name].append(part)
    back = np.argsort(np.concatenate(batches), kind="stable")
    layered, spent, weights, largest = {}, 0.0, 0, 0
    for name in names:
        modules = [module for other, module in stages if other == name]
        weights += sum(preflight._size(list(module.parameters())) for module in modules)
        spent, largest = spent + seconds[name], max(largest, states[name])
        features = torch.cat(rows[name]).numpy()[back]
        layered[name] = Layer(features, spent, (weights + largest) / 2**20)
    return layered


def _candidate_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    # every group but the head, those without parameters under the name of the one before
    found: list[tuple[str, nn.Module]] = []
    for name, module in layers._in_order(model)[:-1]:
        bare = next(module.parameters(), None) is None
        found.append((found[-1][0] if bare and found else name, module))
    if not found:
        raise ValueError(
            "the model is a head alone, but layers before it are expected: score its inputs"
        )
    return found


def _pooled(state: Any, name: str) -> Tensor:
    if isinstance(state, dict) and {"hidden", "mask"} <= state.keys():
        return models.MeanPool()(state)
    if not isinstance(state, Tensor) or state.dim() < 2:
        raise TypeError(
            f"after {name!r} the state is a {type(state).__name__}, but a tensor (batch, ...) or a "
            "dictionary with hidden and mask is expected: score what predict gives for a prefix"
        )
    if state.dim() == 4:  # (batch, channels, height, width)
        return state.mean(dim=(2, 3))
    return state.mean(dim=1) if state.dim() == 3 else state  # (batch, tokens, width)


class Cost(NamedTuple):
    """What a training is expected to take: wall-clock `minutes`, and `mib` of tensors."""

    minutes: float
    mib: float


def predict_cost(
    model: nn.Module, train: Any, plan: Any = None, *, objective: Any = None, sample: int = 64,
    clock: Callable[[], float] = time.perf_counter, **settings: Any,
) -> Cost:  # fmt: skip
    """What `fit` would take on these data, from a short training that leaves no trace.

    Each phase is run for one epoch and for three on a few items, drawn at random. The difference
    gives the seconds of an epoch, the rest those of what a phase does once, such as caching
    features; both are taken to grow with the number of items. Validation is not in it. The memory
    is that of `tk.check`, of the phase that takes most: weights, gradients, moments and what
    autograd keeps, not what operators need while they run.

    Args:
        train, plan, objective, settings: what `fit` is to get; one epoch of `finetune` without a
            plan, classification without an objective.
        sample: how many items are tried; take several batches, for a single one says little.
        clock: says the seconds; `time.process_time` counts those of all threads together.

    Raises:
        ValueError: `sample` is below 1, or what `fit` would raise.

    Example:
        >>> data = torch.randn(100, 4), torch.arange(100) % 2
        >>> cost = tk.transferability.predict_cost(nn.Linear(4, 2), data, tk.finetune(5))
        >>> cost.minutes > 0, cost.mib > 0
        (True, True)
    """
    if not whole(sample):
        raise ValueError(f"sample is {sample}: give a number of items of at least 1, such as 64")
    objective = objectives.Classification() if objective is None else objective
    phases = plans.check(plans.finetune(1) if plan is None else plan)
    report = preflight.check(model, objective, train, plan=phases, **settings)
    source = data.as_source(train, model)
    few = _Few(source, sample)
    seconds = 0.0
    for phase in phases:
        one, three = (
            _timed(model, objective, few, replace(phase, epochs=epochs), clock, settings)
            for epochs in (1, 3)
        )
        epoch = max(0.0, (three - one) / 2)
        seconds += max(0.0, one - epoch) + phase.epochs * epoch
    scale = len(source) / len(few)
    return Cost(scale * seconds / 60, max(row["total"] for row in report.phases))


def _timed(
    model: nn.Module, objective: Any, few: _Few, phase: plans.Phase,
    clock: Callable[[], float], settings: Mapping[str, Any],
) -> float:  # fmt: skip
    device = devices.resolve_device(settings.get("device", "auto"))
    with preflight.untouched(model, device):
        started = clock()
        engine.fit(
            model, copy.deepcopy(objective), few, plan=phase, **{**settings, "progress": False}
        )
        return clock() - started


class _Few:
    """A source of some items of another, drawn at random."""

    def __init__(self, source: data.Source, count: int):
        drawn = np.random.default_rng(0).permutation(len(source))[:count]
        self.source, self.rows = source, np.sort(drawn)
        self.labels = None if source.labels is None else source.labels[torch.from_numpy(self.rows)]
        self.lengths = None if source.lengths is None else source.lengths[self.rows]
        self.views = source.views

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(
        self, indices: Sequence[int] | np.ndarray, epoch: int | None, seed: int
    ) -> data.Batch:
        batch = self.source.fetch(self.rows[np.asarray(indices)], epoch, seed)
        return replace(batch, index=torch.as_tensor(np.asarray(indices)))

    def fingerprint(self) -> None:
        return None


def rank_models(
    candidates: Mapping[str, nn.Module], train: Any, plan: Any = None, *,
    scores: Mapping[str, Score] | None = None, by: str = "logme", **settings: Any,
) -> Table:  # fmt: skip
    """A table of candidates, the best first: scores of their features, minutes and memory.

    The features are what reaches the head. No candidate is changed. What training it by the plan
    would take is predicted: see `predict_cost`.

    Args:
        candidates: models by name, each with a head for the labels as last layer group.
        train: labelled items of the target that each of the models can read.
        scores: functions of features `(n, D)` and labels `(n,)` by name; `SCORES` by default.
        by: the score that orders the table, the largest first.
        plan, settings: as in `predict_cost`.

    Raises:
        ValueError: no candidate is given, `by` is no score, there are no labels, or what a score,
            `predict_cost` or `layer_features` would raise.

    Example:
        >>> train = torch.eye(4).repeat(25, 1) + torch.randn(100, 4) / 9, torch.arange(100) % 4
        >>> def network(hidden):
        ...     return nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 4))
        >>> table = tk.rank_models({"wide": network(32), "narrow": network(1)}, train, by="probe")
        >>> [row["model"] for row in table], list(table[0])[-2:]
        (['wide', 'narrow'], ['minutes', 'MiB'])
    """
    if not candidates:
        raise ValueError("there are no candidates: give models by name, such as {'small': model}")
    scores = _known(scores, by)
    rows = Table()
    reading = {k: v for k, v in settings.items() if k in ("batch_size", "precision", "device")}
    for name, model in candidates.items():
        source = data.as_source(train, model)
        features = list(layer_features(model, source, **reading).values())[-1].features
        parameters = sum(parameter.numel() for parameter in model.parameters())
        row = {"model": name, "parameters": parameters, "width": features.shape[1]}
        row |= _scored(features, source.labels, scores)
        cost = predict_cost(model, source, plan, **settings)
        rows.append(row | {"minutes": cost.minutes, "MiB": cost.mib})
    return _ordered(rows, by)


def rank_layers(
    model: nn.Module, items: Any, *, scores: Mapping[str, Score] | None = None, by: str = "logme",
    **settings: Any,
) -> Table:  # fmt: skip
    """A table of the layers of a model, the best first: scores, and what the pass up to each takes.

    `minutes` are those of the pass over `items`, `MiB` those of the weights up to the layer and of
    the largest state of a batch. A layer below the last can be had with
    `tk.models.load(..., layers=k)`.

    Args:
        items: labelled items of the target.
        scores, by: as in `rank_models`; `settings`: as in `layer_features`.

    Raises:
        ValueError, TypeError: `by` is no score, there are no labels, or what a score or
            `layer_features` would raise.

    Example:
        >>> x, y = torch.randn(60, 4), torch.arange(60) % 2
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3), nn.Linear(3, 2))
        >>> sorted(row["layer"] for row in tk.rank_layers(model, (x, y)))
        ['0', '2']
    """
    scores = _known(scores, by)
    source = data.as_source(items, model)
    rows = Table()
    for name, layer in layer_features(model, source, **settings).items():
        row = {"layer": name, "width": layer.features.shape[1]}
        row |= _scored(layer.features, source.labels, scores)
        rows.append(row | {"minutes": layer.seconds / 60, "MiB": layer.mib})
    return _ordered(rows, by)


def _known(scores: Mapping[str, Score] | None, by: str) -> Mapping[str, Score]:
    scores = SCORES if scores is None else scores
    if by not in scores:
        raise ValueError(f"by is {by!r}: give the name of a score, one of {', '.join(scores)}")
    return scores


def _scored(
    features: np.ndarray, labels: Tensor | None, scores: Mapping[str, Score]
) -> dict[str, float]:
    if labels is None:
        raise ValueError(
            "the data have no labels, but a score asks how far they can be read off the features: "
            "label some items, such as 20 of each class"
        )
    return {name: float(score(features, labels.numpy())) for name, score in scores.items()}


def _ordered(rows: Table, by: str) -> Table:
    # the best first, and last what has no value
    return Table(sorted(rows, key=lambda row: (math.isnan(row[by]), -row[by])))
