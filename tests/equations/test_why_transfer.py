"""The formulas of *Why transfer*, each computed in another way than the lab computes it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import transferkit as tk

LAB = Path(__file__).parents[2] / "notebooks" / "concepts" / "why-transfer.ipynb"


def function_of_the_lab(name):
    """The function as the lab defines it: its cell is run, with nothing but what it imports."""
    cells = json.loads(LAB.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    (source,) = [source for source in sources if source.lstrip().startswith(f"def {name}(")]
    names = {}
    exec("import numpy as np\nfrom sklearn.isotonic import IsotonicRegression", names)
    exec(source, names)
    return names[name]


@pytest.mark.equation("eq-transfer-effect")
def test_the_transfer_effect_is_the_difference_of_the_two_mean_accuracies():
    # in thousandths, added up by hand: 2.211 / 3 − 2.001 / 3 = 0.07
    found = tk.paired_interval([0.712, 0.731, 0.768], [0.655, 0.690, 0.656])
    assert found.mean == pytest.approx(0.07, abs=1e-12)


@pytest.mark.equation("eq-paired-t")
def test_the_interval_of_the_effect_is_that_of_the_paired_t_test():
    rng = np.random.default_rng(0)
    without = rng.normal(0.65, 0.03, 5)
    transfer = without + rng.normal(0.05, 0.01, 5)
    found = tk.paired_interval(transfer, without)
    expected = stats.ttest_rel(transfer, without).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.equation("eq-paired-t")
def test_the_interval_covers_the_true_effect_as_often_as_it_promises():
    rng = np.random.default_rng(1)
    luck = rng.normal(0, 0.05, (4000, 5))  # of a draw, shared by both methods
    a = 0.70 + luck + rng.normal(0, 0.01, luck.shape)
    b = 0.65 + luck + rng.normal(0, 0.01, luck.shape)
    found = [tk.paired_interval(x, y) for x, y in zip(a, b, strict=True)]
    covered = np.mean([interval.low <= 0.05 <= interval.high for interval in found])
    assert covered == pytest.approx(0.95, abs=4 * np.sqrt(0.95 * 0.05 / len(a)))


@pytest.mark.equation("eq-label-saving")
@pytest.mark.parametrize("factor", [1.0, 2.5, 6.0])
def test_a_learning_curve_shifted_by_a_factor_saves_exactly_that_factor(factor):
    # accuracy linear in log n: with transfer n labels are worth factor * n without
    labels_needed = function_of_the_lab("labels_needed")
    sizes = [16, 64, 256, 1024, 4096]
    without = 0.5 + 0.04 * np.log(sizes)
    for n in (40, 100, 600):
        target = 0.5 + 0.04 * np.log(factor * n)
        assert labels_needed(sizes, without, target) / n == pytest.approx(factor, rel=1e-9)


@pytest.mark.equation("eq-label-saving")
def test_labels_needed_is_the_inverse_of_any_rising_curve():
    labels_needed = function_of_the_lab("labels_needed")
    rng = np.random.default_rng(2)
    sizes = 16 * 2 ** np.arange(10)
    curve = np.sort(rng.uniform(0.5, 0.9, len(sizes)))
    for target in rng.uniform(curve[0], curve[-1], 50):
        n = labels_needed(sizes, curve, target)
        assert np.interp(np.log(n), np.log(sizes), curve) == pytest.approx(target, abs=1e-12)


@pytest.mark.equation("eq-label-saving")
def test_a_dip_is_pooled_and_an_unreached_target_gives_the_last_size():
    labels_needed = function_of_the_lab("labels_needed")
    sizes, curve = [10, 100, 1000, 10000], [0.5, 0.7, 0.6, 0.8]  # pooled: 0.5, 0.65, 0.65, 0.8
    assert labels_needed(sizes, curve, 0.575) == pytest.approx(np.sqrt(10 * 100))
    assert labels_needed(sizes, curve, 0.725) == pytest.approx(np.sqrt(1000 * 10000))
    assert labels_needed(sizes, curve, 0.9) == 10000


class Counting(nn.Module):
    """A frozen backbone that counts the items it reads."""

    def __init__(self):
        super().__init__()
        self.linear, self.read = nn.Linear(3, 4), 0

    def forward(self, x):
        self.read += len(x)
        return torch.tanh(self.linear(x))


def passes(trials, epochs, n, *, cache):
    """Items that a frozen backbone reads while a head is trained `trials` times."""
    x, y = torch.randn(n, 3), torch.arange(n) % 2
    backbone = Counting()
    for trial in range(trials):
        model = tk.Staged([("backbone", backbone), ("head", nn.Linear(4, 2))], labels=["a", "b"])
        phase = tk.linear_probe(epochs, lr=10.0 ** -(trial + 1), cache=cache)
        tk.fit(model, tk.classification(), (x, y), plan=[phase], batch_size=4, precision="fp32")
    return backbone.read


@pytest.mark.equation("eq-encoder-passes")
@pytest.mark.parametrize(("cache", "expected"), [(True, 20), (False, 2 * 3 * 20)])
def test_a_frozen_backbone_reads_each_item_once_or_in_every_epoch_of_every_trial(
    cache, expected, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRANSFERKIT_CACHE", str(tmp_path))
    # twenty more items: the few that each fit looks at beforehand do not depend on n
    assert passes(2, 3, 28, cache=cache) - passes(2, 3, 8, cache=cache) == expected


@pytest.mark.equation("eq-encoder-passes")
def test_with_a_cache_more_epochs_cost_the_backbone_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSFERKIT_CACHE", str(tmp_path))
    assert passes(1, 9, 8, cache=True) == passes(1, 2, 8, cache=True)
