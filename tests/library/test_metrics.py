"""Metrics and intervals agree with scikit-learn, with SciPy and with their own definitions."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from transferkit import metrics
from transferkit.metrics import (
    Interval,
    bootstrap_interval,
    mcnemar,
    mean_interval,
    paired_interval,
)

ALL = [
    metrics.accuracy,
    metrics.balanced_accuracy,
    metrics.macro_f1,
    metrics.mcc,
    metrics.auroc,
    metrics.log_loss,
    metrics.expected_calibration_error,
]


@st.composite
def scored(draw, max_classes=5):
    """Logits on a coarse grid, so that ties are common, with labels that may miss classes."""
    rng = np.random.default_rng(draw(st.integers(0, 100_000)))
    items, classes = draw(st.integers(1, 40)), draw(st.integers(2, max_classes))
    logits = np.round(rng.normal(size=(items, classes)) * 2) / 2
    return logits, rng.integers(0, draw(st.integers(1, classes)), items)


@settings(max_examples=150)
@given(scored())
def test_metrics_of_decisions_agree_with_scikit_learn(problem):
    logits, labels = problem
    guesses = logits.argmax(1)
    classes = np.arange(logits.shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = {
            metrics.accuracy: reference.accuracy_score(labels, guesses),
            metrics.balanced_accuracy: reference.balanced_accuracy_score(labels, guesses),
            metrics.macro_f1: reference.f1_score(labels, guesses, average="macro"),
            metrics.mcc: reference.matthews_corrcoef(labels, guesses),
        }
        table = reference.confusion_matrix(labels, guesses, labels=classes)
    for metric, value in expected.items():
        assert metric(logits, labels) == pytest.approx(value, abs=1e-12), metric.__name__
    assert np.array_equal(metrics.confusion_matrix(logits, labels), table)


@settings(max_examples=100)
@given(scored())
def test_metrics_of_scores_agree_with_scikit_learn(problem):
    logits, labels = problem
    classes = np.arange(logits.shape[1])
    probabilities = metrics.softmax(logits)
    assert metrics.log_loss(logits, labels) == pytest.approx(
        reference.log_loss(labels, probabilities, labels=classes), rel=1e-9, abs=1e-12
    )
    assume(len(np.unique(labels)) == logits.shape[1])
    if logits.shape[1] == 2:
        expected = reference.roc_auc_score(labels, logits[:, 1] - logits[:, 0])
    else:
        expected = reference.roc_auc_score(labels, probabilities, multi_class="ovr")
    assert metrics.auroc(logits, labels) == pytest.approx(expected, abs=1e-12)


def test_calibration_error_of_a_case_worked_by_hand():
    # Confidences 0.75, 0.75 (one right) and 0.95 (right) in ten bins: 2/3 * 0.25 + 1/3 * 0.05.
    shares = np.array([[0.75, 0.25], [0.75, 0.25], [0.05, 0.95]])
    value = metrics.expected_calibration_error(np.log(shares), np.array([0, 1, 1]), bins=10)
    assert value == pytest.approx(2 / 3 * 0.25 + 1 / 3 * 0.05)


def test_calibration_bins_are_closed_to_the_right():
    # 0.5 belongs to (0, 0.5], so the two bins keep opposite gaps apart: |-0.5| and |0.9|, halved.
    logits = np.log(np.array([[0.5, 0.5], [0.9, 0.1]]))
    value = metrics.expected_calibration_error(logits, np.array([0, 1]), bins=2)
    assert value == pytest.approx((0.5 + 0.9) / 2)


def test_a_model_that_says_nothing_has_the_log_loss_of_its_number_of_classes():
    assert metrics.log_loss(np.zeros((6, 5)), np.arange(6) % 5) == pytest.approx(math.log(5))


def test_log_loss_of_huge_logits_stays_finite():
    assert metrics.log_loss(np.array([[0.0, 1e4]]), np.array([0])) == pytest.approx(1e4)


@pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.__name__)
def test_no_metric_depends_on_the_order_of_the_items(metric):
    rng = np.random.default_rng(0)
    logits, labels, order = rng.normal(size=(50, 3)), np.arange(50) % 3, rng.permutation(50)
    value = metric(logits, labels)
    assert metric(logits[order], labels[order]) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.__name__)
def test_every_metric_says_whether_higher_is_better(metric):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    good = np.eye(3)[labels] * 4 + rng.normal(size=(300, 3)) * 0.1
    bad = np.eye(3)[(labels + 1) % 3] * 4 + rng.normal(size=(300, 3)) * 0.1
    gain = metric(good, labels) - metric(bad, labels)
    assert (gain > 0) == metric.higher_is_better


@pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.__name__)
def test_a_diverged_model_is_nan_for_every_metric(metric):
    logits = np.zeros((4, 2))
    logits[2, 1] = np.nan
    assert math.isnan(metric(logits, np.array([0, 1, 0, 1])))


def test_the_area_is_undefined_when_a_class_is_missing():
    assert math.isnan(metrics.auroc(np.zeros((3, 2)), np.array([1, 1, 1])))


@pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.__name__)
def test_tensors_and_single_precision_give_plain_floats(metric):
    torch.manual_seed(0)
    logits, labels = torch.randn(30, 3), torch.arange(30) % 3
    value = metric(logits, labels)
    assert type(value) is float
    assert value == pytest.approx(metric(logits.double().numpy(), labels.numpy()), abs=1e-6)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((3, 2)), np.array([0, 1]), "scores of all classes"),
        (np.zeros(3), np.array([0, 1, 1]), "scores of all classes"),
        (np.zeros((0, 2)), np.array([], dtype=int), "at least one item"),
        (np.zeros((2, 2)), np.array([0, 2]), "2 columns"),
        (np.zeros((2, 2)), np.array([0, -1]), "2 columns"),
        (np.zeros((2, 2)), np.array([0.0, 1.0]), "class numbers"),
    ],
)
def test_inputs_that_do_not_fit_are_named(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        metrics.accuracy(logits, labels)


@settings(max_examples=50)
@given(
    values=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30),
    level=st.sampled_from([0.8, 0.95, 0.99]),
)
def test_the_mean_interval_agrees_with_scipy(values, level):
    from scipy import stats

    assume(np.std(values) > 1e-6)
    interval = mean_interval(values, level)
    low, high = stats.t.interval(
        level, len(values) - 1, loc=np.mean(values), scale=stats.sem(values)
    )
    assert (interval.low, interval.high) == pytest.approx((low, high), rel=1e-9, abs=1e-9)
    assert (interval.mean, interval.n) == (pytest.approx(np.mean(values)), len(values))


def test_the_paired_interval_excludes_zero_exactly_when_the_paired_t_test_rejects():
    from scipy import stats

    rng = np.random.default_rng(0)
    verdicts = set()
    for shift in np.linspace(0, 1.5, 40):
        a, b = rng.normal(size=6) + shift, rng.normal(size=6)
        interval = paired_interval(a, b, level=0.9)
        apart = not interval.low <= 0 <= interval.high
        assert apart == (stats.ttest_rel(a, b).pvalue < 0.1)
        verdicts.add(apart)
    assert verdicts == {True, False}


def test_pairing_removes_what_the_pairs_share():
    fold = np.array([0.1, 0.5, 0.9, 0.3])
    gain = np.array([0.02, 0.03, 0.02, 0.03])
    paired = paired_interval(fold + gain, fold)
    assert paired.low > 0
    assert mean_interval(fold).high - mean_interval(fold).low > 10 * (paired.high - paired.low)


def test_means_of_overlapping_folds_get_the_wider_interval_of_nadeau_and_bengio():
    values = [0.1, 0.2, 0.4, 0.3]
    plain, folds = mean_interval(values), mean_interval(values, test_per_train=1 / 3)
    assert folds.mean == plain.mean
    widening = (folds.high - folds.low) / (plain.high - plain.low)
    assert widening == pytest.approx(math.sqrt((1 / 4 + 1 / 3) / (1 / 4)))
    assert paired_interval(values, [0.0] * 4, test_per_train=1 / 3) == folds


def test_the_mean_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    intervals = [mean_interval(rng.normal(3.0, 2.0, 5), level=0.9) for _ in range(2000)]
    covered = np.mean([i.low <= 3.0 <= i.high for i in intervals])
    assert covered == pytest.approx(0.9, abs=0.027)  # four standard errors


def test_the_bootstrap_interval_agrees_with_the_binomial_it_imitates():
    # Accuracy within one class of n items: the standard error is sqrt(p (1 - p) / n).
    labels = np.zeros(400, dtype=int)
    logits = np.eye(2)[(np.arange(400) < 100).astype(int)]
    interval = bootstrap_interval(metrics.accuracy, logits, labels, repeats=2000)
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert (interval.mean, interval.n) == (0.75, 400)
    assert interval.low == pytest.approx(0.75 - half, abs=0.004)
    assert interval.high == pytest.approx(0.75 + half, abs=0.004)


def test_the_bootstrap_keeps_the_size_of_every_class():
    sizes = []

    def spy(logits, labels):
        sizes.append(tuple(np.bincount(labels)))
        return 0.0

    bootstrap_interval(spy, np.zeros((13, 3)), np.array([0] * 10 + [1] * 2 + [2]), repeats=100)
    assert set(sizes) == {(10, 2, 1)}


def test_the_bootstrap_is_a_function_of_its_seed():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(40, 2)), np.arange(40) % 2
    first, again, other = (
        bootstrap_interval(metrics.log_loss, logits, labels, repeats=100, seed=seed)
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


@settings(max_examples=60)
@given(only_a=st.integers(0, 25), only_b=st.integers(0, 25), both=st.integers(0, 5))
def test_mcnemar_is_the_exact_binomial_test_of_the_disagreements(only_a, only_b, both):
    from scipy.stats import binomtest

    assume(only_a + only_b > 0)
    a = np.array([True] * only_a + [False] * only_b + [True, False] * both)
    b = np.array([False] * only_a + [True] * only_b + [True, False] * both)
    result = mcnemar(a, b)
    assert result[:2] == (only_a, only_b)
    assert result.p_value == pytest.approx(binomtest(only_a, only_a + only_b).pvalue, rel=1e-9)


def test_mcnemar_of_models_that_never_disagree_finds_nothing():
    assert mcnemar(np.array([True, False]), np.array([True, False])) == (0, 0, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([0.5]), "at least two"),
        (lambda: mean_interval([0.5, float("nan")]), "finite"),
        (lambda: mean_interval([[0.5], [0.6]]), "at least two"),
        (lambda: mean_interval([0.5, 0.6], level=95), "level is 95"),
        (lambda: mean_interval([0.5, 0.6], test_per_train=-1), "1/\\(k - 1\\)"),
        (lambda: paired_interval([0.5, 0.6], [0.5]), "pairs"),
        (lambda: mcnemar(np.array([1, 0]), np.array([0, 1])), "booleans"),
        (
            lambda: bootstrap_interval(metrics.mcc, np.zeros((2, 2)), np.array([0, 1]), repeats=5),
            "at least 100",
        ),
    ],
)
def test_intervals_that_cannot_be_formed_say_why(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_interval_reads_well_and_takes_a_format():
    interval = Interval(0.8611, 0.8518, 0.8702, 5)
    assert str(interval) == "0.861 [0.852, 0.870] (n=5)"
    assert f"{interval:.1%}" == "86.1% [85.2%, 87.0%] (n=5)"
