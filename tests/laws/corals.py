"""What public implementations compute under the name of CORAL, each from its formula.

Read in the repositories named here; the functions below were written anew from the formulas. With
the covariances C_S and C_T over n - 1, the dimension d, the means m_S and m_T:

| name | formula | where it is computed so |
|---|---|---|
| `paper` | ||C_S - C_T||²_F / (4 d²) | [1], [2], [3] |
| `unsquared` | ||C_S - C_T||_F / (4 d²) | [4] |
| `means_too` | mean of (C_S - C_T)² + mean of (m_S - m_T)² | [5], [6] |
| `over_items` | mean of (A_S - A_T)² / (4 n²), A = X'ᵀX', X' of items minus their own mean | [7] |

1. Sun & Saenko (2016), Eqs. 1 to 3
2. KevinMusgrave/pytorch-adapt, src/pytorch_adapt/layers/coral_loss.py
3. jindongwang/transferlearning, code/DeepDA/loss_funcs/coral.py
4. jindongwang/transferlearning, code/deep/DeepCoral/Coral.py
5. facebookresearch/DomainBed, domainbed/algorithms.py, AbstractMMD without Gaussian kernels, which
   its CORAL is
6. thuml/Transfer-Learning-Library, tllib/alignment/coral.py; its docstring states the formula of
   the paper
7. LuXC20zzZ/DHDA_A-CL, loss_fn/CORAL.py

`means_too` is 4 times the paper's value plus the squared distance of the means over d: it is not
zero between a sample and its translate. `unsquared` grows with the second power of a common scale.
`over_items` is no function of the two covariances at all.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _covariance(rows: Tensor) -> Tensor:
    return torch.atleast_2d(torch.cov(rows.T, correction=1))


def paper(x: Tensor, y: Tensor) -> Tensor:
    """The definition: squared Frobenius norm over 4 d²."""
    return torch.linalg.matrix_norm(_covariance(x) - _covariance(y)) ** 2 / (4 * x.shape[1] ** 2)


def unsquared(x: Tensor, y: Tensor) -> Tensor:
    """The norm itself, where the definition has its square."""
    return torch.linalg.matrix_norm(_covariance(x) - _covariance(y)) / (4 * x.shape[1] ** 2)


def means_too(x: Tensor, y: Tensor) -> Tensor:
    """Means of squared differences, of the covariances and of the means as well."""
    apart = x.mean(0) - y.mean(0)
    return (_covariance(x) - _covariance(y)).square().mean() + apart.square().mean()


def over_items(x: Tensor, y: Tensor) -> Tensor:
    """Centred along the wrong axis, not divided by n - 1, and over 4 n² where d² is meant."""
    first, second = (rows - rows.mean(1, keepdim=True) for rows in (x, y))
    return (first.T @ first - second.T @ second).square().mean() / (4 * len(x) ** 2)
