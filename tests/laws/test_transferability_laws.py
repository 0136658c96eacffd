"""Laws of the transferability scores: LEEP survives an unused source class (12)."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import transferkit as tk


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**32 - 1), used=st.integers(1, 6), unused=st.integers(1, 4),
    items=st.integers(4, 30),
)  # fmt: skip
def test_leep_survives_an_unused_source_class(seed, used, unused, items):
    random = np.random.default_rng(seed)
    shares, labels = random.dirichlet(np.ones(used), items), np.arange(items) % 2
    place = np.sort(random.permutation(used + unused)[:used])  # classes without any probability
    wide = np.zeros((items, used + unused))
    wide[:, place] = shares
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no division by zero on the way
        assert tk.leep(wide, labels) == pytest.approx(tk.leep(shares, labels), abs=1e-12)


def test_leep_stays_finite_where_an_item_has_nothing_but_a_class_of_its_own():
    shares = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    expected = 2 / 3 * np.log(1 / 2)
    assert tk.leep(shares, [0, 0, 1]) == pytest.approx(expected, abs=1e-12)
