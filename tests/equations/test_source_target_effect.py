"""The formulas of *Source, target and transfer effect*, each computed in another way."""

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad
from sklearn.linear_model import LogisticRegression
from torch import nn

SIZE = 400_000


def two_classes(rng, middle, difference, deviation=1.0, n=SIZE):
    """Balanced Gaussian classes around middle ± difference / 2: inputs and labels."""
    y = rng.integers(0, 2, n)
    middle, difference = np.asarray(middle, float), np.asarray(difference, float)
    x = middle + (y[:, None] - 0.5) * difference
    return x + deviation * rng.standard_normal(x.shape), y


def nearest_mean(x, y):
    """The head that compares the distances to the two class means: direction and threshold."""
    one, other = x[y == 1].mean(0), x[y == 0].mean(0)
    return one - other, (one + other) @ (one - other) / 2


@pytest.mark.equation("eq-effect-matrix", "eq-effect-loss")
def test_with_no_label_the_loss_is_the_effect_of_the_own_domain_minus_that_of_the_source():
    rng = np.random.default_rng(0)
    domains = [((0, 0), (2, 0)), ((1, 3), (1.5, 1.5))]
    train = [two_classes(rng, *domain, n=2000) for domain in domains]
    test = [two_classes(rng, *domain, n=2000) for domain in domains]
    heads = [LogisticRegression().fit(*part) for part in train]
    accuracy = np.array([[head.score(*part) for part in test] for head in heads])
    majority = [max(y.mean(), 1 - y.mean()) for _, y in test]
    effect = accuracy - np.array(majority)
    for s, t in ((0, 1), (1, 0)):
        wrong = [(head.predict(test[t][0]) != test[t][1]).mean() for head in heads]
        assert effect[t, t] - effect[s, t] == pytest.approx(wrong[s] - wrong[t], abs=1e-12)


@pytest.mark.equation("eq-effect-two-domains")
@pytest.mark.parametrize("degrees", [0, 40, 90, 150])
@pytest.mark.parametrize("shift", [0.0, 1.2])
def test_the_accuracy_of_a_head_from_another_domain_follows_angle_and_offset(degrees, shift):
    rng = np.random.default_rng(1)
    turned = 3.0 * np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))])
    source, target = ((0.0, 0.0), turned), ((5.0, 1.0), (2.0, 0.0))
    unit = turned / np.linalg.norm(turned)
    target = (unit * shift + np.array([-unit[1], unit[0]]) * 5, target[1])  # offset b is the shift
    w, threshold = nearest_mean(*two_classes(rng, *source, deviation=0.8))
    x, y = two_classes(rng, *target, deviation=0.8)
    measured = np.mean((x @ w > threshold) == y)
    half = 2.0 * np.cos(np.radians(degrees)) / 2
    cdf = stats.norm.cdf
    formula = (cdf((half + shift) / 0.8) + cdf((half - shift) / 0.8)) / 2
    assert measured == pytest.approx(formula, abs=0.01)


@pytest.mark.equation("eq-effect-two-domains")
def test_centring_each_domain_removes_the_offset_and_nothing_else():
    rng = np.random.default_rng(2)
    x_s, y_s = two_classes(rng, (0, 0), (2, 0))
    x_t, y_t = two_classes(rng, (4, -3), (2, 1))
    w, threshold = nearest_mean(x_s - x_s.mean(0), y_s)
    centred = np.mean(((x_t - x_t.mean(0)) @ w > threshold) == y_t)
    assert centred == pytest.approx(stats.norm.cdf(1.0), abs=0.01)  # half of delta_T along u is 1


@pytest.mark.equation("eq-effect-weighted")
def test_pooling_all_labels_is_the_weighted_objective_with_a_share_of_n_by_n_plus_n_s():
    x_t, x_s = torch.randn(20, 3), torch.randn(300, 3)
    y_t, y_s = torch.randint(2, (20,)), torch.randint(2, (300,))
    head = nn.Linear(3, 2)

    def mean_loss(x, y):
        return nn.functional.cross_entropy(head(x), y)

    share = 20 / 320
    pooled = mean_loss(torch.cat([x_t, x_s]), torch.cat([y_t, y_s]))
    weighted = share * mean_loss(x_t, y_t) + (1 - share) * mean_loss(x_s, y_s)
    for a, b in zip(
        torch.autograd.grad(pooled, head.parameters()),
        torch.autograd.grad(weighted, head.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.equation("eq-effect-weighted")
def test_weights_of_the_rows_give_the_same_head_as_rows_written_several_times():
    rng = np.random.default_rng(3)
    x_t, y_t = two_classes(rng, (0, 0), (1, 0), n=20)
    x_s, y_s = two_classes(rng, (0, 0), (0, 1), n=80)
    rows, labels = np.r_[x_t, x_s], np.r_[y_t, y_s]
    half = np.r_[np.full(20, 0.5 / 20), np.full(80, 0.5 / 80)] * 160
    settings = {"C": 0.1, "tol": 1e-10, "max_iter": 5000}
    weighted = LogisticRegression(**settings).fit(rows, labels, half)
    written = np.r_[np.repeat(x_t, 4, axis=0), x_s], np.r_[np.repeat(y_t, 4), y_s]
    repeated = LogisticRegression(**settings).fit(*written)
    assert weighted.coef_ == pytest.approx(repeated.coef_, abs=1e-6)


@pytest.mark.equation("eq-effect-pull")
@pytest.mark.parametrize("share", [20 / 320, 0.5, 1.0])
def test_the_mean_direction_lies_between_those_of_target_and_source(share):
    rng = np.random.default_rng(4)
    delta_t, delta_s = np.array([2.0, 0.0]), np.array([-1.0, 1.0])
    found = []
    for _ in range(4000):
        means = []
        for n, delta in ((20, delta_t), (300, delta_s)):
            y = np.tile([0, 1], n // 2)
            x = (y[:, None] - 0.5) * delta + rng.standard_normal((n, 2))
            means.append(x[y == 1].mean(0) - x[y == 0].mean(0))
        found.append(share * means[0] + (1 - share) * means[1])
    expected = share * delta_t + (1 - share) * delta_s
    assert np.mean(found, axis=0) == pytest.approx(expected, abs=0.03)


@pytest.mark.equation("eq-effect-pull")
def test_pooled_with_the_opposite_code_the_head_turns_round_when_the_source_is_larger():
    delta = np.array([1.5, 0.0])
    for n, source in ((40, 20), (40, 60)):
        share = n / (n + source)
        direction = share * delta + (1 - share) * (-delta)
        assert direction == pytest.approx((n - source) / (n + source) * delta)
        assert (direction[0] > 0) == (n > source)


@pytest.mark.equation("eq-effect-a-distance")
@pytest.mark.parametrize("gap", [0.0, 0.7, 2.0, 6.0])
def test_with_the_best_classifier_it_is_twice_the_total_variation_of_the_two_distributions(gap):
    p, q = stats.norm(0, 1), stats.norm(gap, 1)
    area, _ = quad(lambda x: abs(p.pdf(x) - q.pdf(x)), -10, 16, points=[gap / 2], limit=200)
    error = stats.norm.cdf(-gap / 2)  # of the threshold half way, the best there is
    assert 2 * (1 - 2 * error) == pytest.approx(area, abs=1e-6)  # twice the variation, area / 2
