"""Rules of the tests that bind the formulas: each names its formula and runs in float64."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    """Refuse a test in this folder that names no formula: it would bind nothing.

    Raises:
        pytest.UsageError: a test has no `equation` mark, or a label that is not `eq-...`.
    """
    here = __file__.rpartition("/")[0]
    for item in items:
        if not str(item.path).startswith(f"{here}/"):
            continue
        labels = [label for mark in item.iter_markers("equation") for label in mark.args]
        wrong = [label for label in labels if not str(label).startswith("eq-")]
        if not labels or wrong:
            raise pytest.UsageError(
                f"{item.nodeid} is marked with {labels}, but the labels of formulas, eq-..., are "
                'expected: decorate it with @pytest.mark.equation("eq-...")'
            )


@pytest.fixture(autouse=True)
def in_double_precision():
    """Compute in float64 from one seed, so that a formula is checked to rounding error."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)
