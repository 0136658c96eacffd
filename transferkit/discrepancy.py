"""How far apart two samples lie. The one idea: a measure is a plain function of two tables of rows.

None of them looks at a label: they compare the items of a source with those of a target, as they
are or as features of a model. All but `proxy_a_distance`, which trains a classifier, have gradients
and read nothing back to the host, so that an objective can lower them: see `adapt.align`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the median distance: the default bandwidths
_FOLDS = 5


def _rows(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    # Two tables of floating-point numbers, of as many columns, in float32 at least.
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"the samples have shapes {tuple(x.shape)} and {tuple(y.shape)}, but (n, d) and (m, d) "
            "with at least 2 rows each are expected: give one row of features an item"
        )
    if not (x.is_floating_point() and y.is_floating_point()):
        raise TypeError(
            f"the samples are {x.dtype} and {y.dtype}, but floating-point numbers are expected: "
            "convert them with .float()"
        )
    wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return x.to(wide), y.to(wide)


def mmd(
    x: Any, y: Any, bandwidths: Sequence[float] | None = None, estimator: str = "unbiased"
) -> Tensor:
    r"""The squared maximum mean discrepancy of two samples, by a sum of Gaussian kernels.

    With $k(a, b) = \sum_\sigma \exp(-\lVert a - b \rVert^2 / (2\sigma^2))$, n rows x and m rows y,
    the unbiased estimator (Gretton et al. 2012, Eq. 3) is

    $$\frac{1}{n(n-1)} \sum_{i \ne j} k(x_i, x_j) + \frac{1}{m(m-1)} \sum_{i \ne j} k(y_i, y_j)
      - \frac{2}{nm} \sum_{i, j} k(x_i, y_j)$$

    It has mean 0 where both samples come from one distribution, so that it is then often negative.
    The biased one (the square of their Eq. 5) divides by $n^2$ and $m^2$ instead
    and sums over $i = j$, too: it is never negative, and of mean above 0 without any difference.

    Args:
        x, y: `(n, d)` and `(m, d)`, at least two rows each.
        bandwidths: every $\sigma$, above 0. None takes 1/4, 1/2, 1, 2 and 4 times the median
            distance between two rows of both samples together, which counts as a constant; the
            unbiased estimator is then unbiased only nearly, for the median is of the same rows.
        estimator: "unbiased" or "biased".

    Returns:
        A tensor of shape `()`, with gradients.

    Raises:
        ValueError: the shapes do not fit, a bandwidth is not above 0, or there is no such
            estimator.
        TypeError: the samples are not floating-point numbers.

    Example:
        >>> x = torch.randn(100, 2, dtype=torch.float64)
        >>> bool(tk.mmd(x, x + 1.0) > tk.mmd(x, x + 0.5) > 0)
        True
        >>> tk.mmd(torch.zeros(3, 1), torch.ones(4, 1), [1.0])  # 2 - 2 exp(-1/2)
        tensor(0.7869)
    """
    x, y = _rows(x, y)
    if estimator not in ("unbiased", "biased"):
        raise ValueError(f"estimator is {estimator!r}: give 'unbiased' or 'biased'")
    if bandwidths is not None and not (len(bandwidths) and all(0 < s < np.inf for s in bandwidths)):
        raise ValueError(f"bandwidths are {bandwidths}: give numbers above 0, or None for a median")
    squares = _squared_distances(torch.cat([x, y]))
    widths = _median_widths(squares) if bandwidths is None else [2.0 * s**2 for s in bandwidths]
    kernel = sum(torch.exp(-squares / width) for width in widths)
    n, m, own = len(x), len(y), len(widths) * (estimator == "biased")  # k(a, a), if it counts

    def within(block: Tensor, count: int) -> Tensor:
        others = block.sum() - block.diagonal().sum()
        return (others + own * count) / (count * (count - 1 if estimator == "unbiased" else count))

    return within(kernel[:n, :n], n) + within(kernel[n:, n:], m) - 2 * kernel[:n, n:].mean()


def _squared_distances(rows: Tensor) -> Tensor:
    # of every two rows, (n, n); centred, for large common offsets would cost all digits
    with torch.autocast(rows.device.type, enabled=False):
        rows = rows - rows.mean(0)
        lengths = rows.square().sum(1)
        return (lengths.unsqueeze(1) + lengths - 2 * rows @ rows.T).clamp(min=0)


def _median_widths(squares: Tensor) -> list[Tensor]:
    # 2 sigma² for the default bandwidths: on the device, and 1 where all rows are equal
    with torch.no_grad():
        above = torch.ones_like(squares, dtype=torch.bool).triu(1)
        # the diagonal and what is below it go to the end, where the median of the rest is not
        ordered = squares.masked_fill(~above, torch.inf).flatten().sort().values
        count = len(squares) * (len(squares) - 1) // 2
        median = ordered[(count - 1) // 2]
        median = torch.where(median > 0, median, torch.ones_like(median))
    return [2.0 * multiple**2 * median for multiple in _MULTIPLES]


def coral(x: Any, y: Any) -> Tensor:
    r"""The distance of two covariance matrices, the CORAL loss (Sun & Saenko 2016, Eqs. 1 to 3).

    $$\frac{1}{4d^2} \lVert C_X - C_Y \rVert_F^2, \qquad
      C_X = \frac{1}{n-1} \sum_i (x_i - \bar x)(x_i - \bar x)^\top$$

    It is 0 between a sample and its translate, since it does not see the means, and grows with the
    fourth power of a common scale: the same value says something else in other units.

    Args:
        x, y: `(n, d)` and `(m, d)`, at least two rows each.

    Returns:
        A tensor of shape `()`, with gradients.

    Raises:
        ValueError: the shapes do not fit.
        TypeError: the samples are not floating-point numbers.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [2.0, 0.0]])  # variances 2 and 0
        >>> tk.coral(x, torch.tensor([[0.0, 0.0], [0.0, 2.0]]))  # (2² + 2²) / (4 * 2²)
        tensor(0.5000)
        >>> tk.coral(x, x + 7.0)
        tensor(0.)
    """
    x, y = _rows(x, y)
    return (_covariance(x) - _covariance(y)).square().sum() / (4 * x.shape[1] ** 2)


def _covariance(rows: Tensor) -> Tensor:
    with torch.autocast(rows.device.type, enabled=False):
        centred = rows - rows.mean(0)
        return centred.T @ centred / (len(rows) - 1)


def wasserstein(x: Any, y: Any, projections: int = 128, seed: int = 0) -> Tensor:
    r"""The Wasserstein-1 distance of two samples in one dimension; of more columns, a sliced one.

    In one dimension it is the area between the two quantile functions (Peyré & Cuturi 2019, Section
    2.6), exact for any two sizes:

    $$W_1 = \int_0^1 \lvert F_X^{-1}(u) - F_Y^{-1}(u) \rvert\, du$$

    Of rows of more columns it is the mean of this over random directions on which they are
    projected (Bonneel et al. 2015): 0 for equal samples, and at most $W_1$ itself.

    Args:
        x, y: `(n,)` and `(m,)`, or `(n, d)` and `(m, d)`, at least two rows each.
        projections: how many directions, where there is more than one column.
        seed: of the directions, which are the same in every call.

    Returns:
        A tensor of shape `()`, with gradients.

    Raises:
        ValueError: the shapes do not fit, or `projections` is below 1.
        TypeError: the samples are not floating-point numbers.

    Example:
        >>> tk.wasserstein(torch.tensor([0.0, 1.0, 3.0]), torch.tensor([5.0, 6.0, 8.0]))
        tensor(5.)
    """
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    flat = x.dim() == y.dim() == 1
    x, y = _rows(*((x.unsqueeze(1), y.unsqueeze(1)) if flat else (x, y)))
    if projections < 1:
        raise ValueError(f"projections is {projections}: give at least 1, such as 128")
    if x.shape[1] > 1:
        ways = _kept(_ways, x, x.shape[1], projections, seed).to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            x, y = x @ ways, y @ ways
    left, right, widths = _kept(_steps, x, len(x), len(y))
    gaps = (x.sort(dim=0).values[left] - y.sort(dim=0).values[right]).abs()
    return (widths.to(x.dtype).unsqueeze(1) * gaps).sum(0).mean() / (len(x) * len(y))


def _kept(make: Callable[..., Any], like: Tensor, *numbers: int) -> Any:
    # Made and copied to the device once; a fake or wrapped tensor must neither fill nor read it.
    return (make if type(like) is Tensor else make.__wrapped__)(*numbers, like.device)


@lru_cache(maxsize=32)
def _ways(columns: int, projections: int, seed: int, device: torch.device) -> Tensor:
    # Random directions, one a column. Never an inference tensor, even if evaluation comes first.
    with torch.inference_mode(False):
        random = torch.Generator().manual_seed(seed)
        ways = torch.randn(columns, projections, generator=random, dtype=torch.float64)
        return (ways / ways.norm(dim=0)).float().to(device)


@lru_cache(maxsize=32)
def _steps(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    # The steps of both quantile functions: which row of each is meant, and the width of the step.
    # In units of 1 / (n m), where all steps end at whole numbers.
    ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)
    steps = ((ends - 1) // m, (ends - 1) // n, np.diff(ends, prepend=0))
    with torch.inference_mode(False):
        left, right, widths = (torch.from_numpy(part).to(device) for part in steps)
        return left, right, widths


def proxy_a_distance(x: Any, y: Any, seed: int = 0, regularisation: float = 1.0) -> float:
    r"""How well a linear classifier tells two samples apart: 2(1 - 2ε), about 0 if not at all.

    Ben-David et al. (2007) approximate the A-distance of two samples by the error ε of a
    classifier that is trained to say which one a row is from. Here it is a logistic regression on
    standardised columns, and ε its error on held-out rows: each of five parts is judged by a
    classifier of the other four. Errors in both samples weigh the same, whatever their sizes. At 2
    every row is told apart; by chance, values a little below 0 occur where none is. It is a lower
    bound in spirit: another class of classifiers may find what a line does not.

    Args:
        x, y: `(n, d)` and `(m, d)`, at least five rows each; scikit-learn does the rest.
        seed: of the division into parts.
        regularisation: strength of the L2 penalty, 1 / C of scikit-learn.

    Raises:
        ValueError: the shapes do not fit, there are fewer than five rows, or the regularisation is
            not above 0.
        TypeError: the samples are not floating-point numbers.

    Example:
        >>> x = torch.randn(200, 2)
        >>> round(tk.proxy_a_distance(x, x + 100.0), 2)
        2.0
        >>> abs(tk.proxy_a_distance(x, torch.randn(200, 2))) < 0.5
        True
    """
    x, y = (part.detach().cpu().double().numpy() for part in _rows(x, y))
    if min(len(x), len(y)) < _FOLDS or not 0.0 < regularisation < np.inf:
        raise ValueError(
            f"there are {len(x)} and {len(y)} rows and regularisation is {regularisation}: give "
            f"at least {_FOLDS} rows of each, and a number above 0, such as 1.0"
        )
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows, which = np.concatenate([x, y]), np.repeat([0, 1], [len(x), len(y)])
    line = LogisticRegression(C=1 / regularisation, class_weight="balanced", max_iter=1000)
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
    said = cross_val_predict(make_pipeline(StandardScaler(), line), rows, which, cv=folds)
    error = np.mean([np.mean(said[which == part] != part) for part in (0, 1)])
    return float(2 * (1 - 2 * error))
