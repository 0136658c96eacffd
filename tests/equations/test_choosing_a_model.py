"""The formulas of the chapter on choosing a model, each computed in another way than the lab."""

import itertools

import numpy as np
import pytest
import scipy.stats
from derivations import definitions, names_of
from flips import with_one_sign_turned
from sklearn.linear_model import Ridge
from sklearn.metrics import mutual_info_score
from torch import nn

import transferkit as tk
from transferkit import transferability

LAB = definitions("fine-tuning/choosing-a-model")


# -- the lab's functions, and the same with one sign turned round ---------------------------------


def of_the_lab(name):
    return names_of([LAB[name]])(name)


# -- tools ----------------------------------------------------------------------------------------


def entropy(labels):
    return scipy.stats.entropy(np.bincount(labels))


def said(seed=0, n=30, sources=4):
    random = np.random.default_rng(seed)
    return random.dirichlet(np.full(sources, 0.7), n), random.permutation(np.arange(n) % 3)


def regression(seed=0, n=12, width=4):
    random = np.random.default_rng(seed)
    features = random.normal(size=(n, width))
    return features, features @ random.normal(size=width) + random.normal(size=n)


def density(features, y, alpha, beta):
    """The same evidence as a Gaussian density of the targets, without weights."""
    covariance = np.eye(len(y)) / beta + features @ features.T / alpha
    return scipy.stats.multivariate_normal(np.zeros(len(y)), covariance).logpdf(y)


def posterior(features, y, alpha, beta):
    precision = alpha * np.eye(features.shape[1]) + beta * features.T @ features
    return precision, beta * np.linalg.inv(precision) @ features.T @ y


# -- through the source's classes -----------------------------------------------------------------


@pytest.mark.equation("eq-choosing-nce")
@pytest.mark.parametrize("seed", range(5))
def test_nce_is_the_mutual_information_minus_the_entropy_of_the_labels(seed):
    q, y = said(seed)
    assert np.isclose(tk.nce(q.argmax(1), y), mutual_info_score(q.argmax(1), y) - entropy(y))


@pytest.mark.equation("eq-choosing-joint", "eq-choosing-leep")
@pytest.mark.parametrize("seed", range(5))
def test_leep_is_what_drawing_a_source_class_and_then_a_label_gives(seed):
    q, y = said(seed)
    total = 0.0
    for i in range(len(y)):  # by loops over items and classes, from the definitions alone
        right = 0.0
        for s in range(q.shape[1]):
            same = sum(q[j, s] for j in range(len(y)) if y[j] == y[i])
            right += q[i, s] * same / sum(q[:, s])
        total += np.log(right)
    assert np.isclose(tk.leep(q, y), total / len(y), rtol=1e-12)
    joint = np.array([[q[y == c, s].sum() / len(y) for s in range(4)] for c in range(3)])
    assert np.isclose(joint.sum(), 1)


@pytest.mark.equation("eq-choosing-leep-bounds")
@pytest.mark.parametrize("seed", range(20))
def test_leep_lies_between_its_bounds_and_meets_them(seed):
    q, y = said(seed, sources=1 + seed % 6)
    joint = np.array([q[y == c].sum(0) / len(y) for c in range(3)])
    inside = entropy(y) + scipy.stats.entropy(joint.sum(0)) - scipy.stats.entropy(joint.ravel())
    soft = inside - entropy(y)  # mutual information minus entropy
    assert -entropy(y) - 1e-12 <= soft <= tk.leep(q, y) + 1e-12 <= 1e-12
    sure = np.eye(q.shape[1])[q.argmax(1)]
    assert np.isclose(tk.leep(sure, y), tk.nce(q.argmax(1), y))
    assert np.isclose(tk.leep(np.ones((30, 1)), y), -entropy(y))
    assert np.isclose(tk.leep(np.eye(3)[y], y), 0)


# -- H-score --------------------------------------------------------------------------------------


@pytest.mark.equation("eq-choosing-h")
def test_the_h_score_is_the_trace_and_no_linear_map_changes_it():
    features, _ = regression(1, 30, 5)
    y = np.arange(30) % 3
    means = np.stack([features[y == c].mean(0) for c in y])
    spread, between = (np.cov(part, rowvar=False) for part in (features, means))
    assert np.isclose(tk.h_score(features, y), np.trace(np.linalg.inv(spread) @ between))
    moved = features @ np.random.default_rng(2).normal(size=(5, 5)) + 3
    assert np.isclose(tk.h_score(moved, y), tk.h_score(features, y))


@pytest.mark.equation("eq-choosing-h-limit")
@pytest.mark.parametrize("width", [3, 28, 29, 60])
def test_the_h_score_is_a_trace_of_projections_and_full_rank_makes_it_blind(width):
    features = np.random.default_rng(width).normal(size=(30, width))
    for y in (np.arange(30) % 4, np.random.default_rng(0).permutation(np.arange(30) % 4)):
        onto_classes = (y[:, None] == y) / np.bincount(y)[y]
        basis = np.linalg.svd(features - features.mean(0), full_matrices=False)[0][:, :29]
        basis = basis[:, : min(width, 29)]
        assert np.isclose(tk.h_score(features, y), np.trace(basis.T @ onto_classes @ basis))
        assert np.isclose(tk.h_score(features, y), 3) == (width >= 29)


# -- evidence -------------------------------------------------------------------------------------


@pytest.mark.equation("eq-choosing-evidence-integral", "eq-choosing-evidence")
def test_the_evidence_is_the_integral_over_the_weights(log_evidence=None):
    log_evidence = log_evidence or of_the_lab("log_evidence")
    features, y = regression(3, 5, 2)
    alpha, beta = 0.7, 1.9

    # by sums over a fine grid of both weights, which are exact for what falls off so fast
    line = np.linspace(-9, 9, 361)
    grid = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
    missed = ((y - grid @ features.T) ** 2).sum(axis=1)
    likelihood = (beta / (2 * np.pi)) ** (5 / 2) * np.exp(-beta * missed / 2)
    prior = alpha / (2 * np.pi) * np.exp(-alpha * (grid**2).sum(axis=1) / 2)
    expected = np.log((likelihood * prior).sum() * (line[1] - line[0]) ** 2)
    assert np.isclose(log_evidence(features, y, alpha, beta), expected, rtol=1e-9)


@pytest.mark.equation("eq-choosing-evidence")
@pytest.mark.parametrize(("n", "width"), [(12, 4), (6, 6), (5, 9)])
def test_the_evidence_is_a_gaussian_density_of_the_targets(n, width, log_evidence=None):
    log_evidence = log_evidence or of_the_lab("log_evidence")
    features, y = regression(4, n, width)
    for alpha, beta in itertools.product((0.1, 1.0, 5.0), (0.3, 2.0)):
        ours, theirs = (f(features, y, alpha, beta) for f in (log_evidence, density))
        assert np.isclose(ours, theirs, rtol=1e-9)


@pytest.mark.equation("eq-choosing-square")
def test_the_square_is_complete():
    features, y = regression(5)
    alpha, beta = 0.6, 2.5
    precision, best = posterior(features, y, alpha, beta)

    def energy(w):
        return beta / 2 * ((y - features @ w) ** 2).sum() + alpha / 2 * (w**2).sum()

    for w in np.random.default_rng(0).normal(size=(5, 4)):
        away = w - best
        assert np.isclose(energy(w), energy(best) + away @ precision @ away / 2)


@pytest.mark.equation("eq-choosing-gamma", "eq-choosing-slopes")
def test_the_slopes_are_those_of_finite_differences(evidence_slopes=None):
    evidence_slopes = evidence_slopes or of_the_lab("evidence_slopes")
    for n, width in ((12, 4), (5, 8)):
        features, y = regression(6, n, width)
        alpha, beta, h = 0.8, 1.7, 1e-5
        by_alpha = density(features, y, alpha + h, beta) - density(features, y, alpha - h, beta)
        by_beta = density(features, y, alpha, beta + h) - density(features, y, alpha, beta - h)
        expected = np.array([by_alpha, by_beta]) / (2 * h)
        assert np.allclose(evidence_slopes(features, y, alpha, beta), expected, rtol=1e-5)
        precision, best = posterior(features, y, alpha, beta)
        scale = beta * np.linalg.eigvalsh(features.T @ features)
        gamma = (scale / (alpha + scale)).sum()
        assert np.isclose(gamma, width - alpha * np.trace(np.linalg.inv(precision)))
        missed = ((y - features @ best) ** 2).sum()
        printed = (gamma / alpha - best @ best) / 2, ((n - gamma) / beta - missed) / 2
        assert np.allclose(printed, expected, rtol=1e-5)


@pytest.mark.equation("eq-choosing-fixed-point")
def test_iterating_the_two_equations_ends_where_the_slopes_vanish_and_the_library_ends():
    features, y = regression(7, 30, 4)
    alpha = beta = 1.0
    for _ in range(300):
        precision, best = posterior(features, y, alpha, beta)
        gamma = 4 - alpha * np.trace(np.linalg.inv(precision))
        alpha, beta = gamma / (best @ best), (30 - gamma) / ((y - features @ best) ** 2).sum()
    found = transferability.evidence(features, y)[0]
    assert np.allclose([found.alpha, found.beta, found.gamma], [alpha, beta, gamma], rtol=1e-6)
    assert np.allclose(of_the_lab("evidence_slopes")(features, y, alpha, beta), 0, atol=1e-6)
    around = [density(features, y, alpha * a, beta * b) for a in (0.9, 1.1) for b in (0.9, 1.1)]
    assert max(around) < found.log_evidence


# -- left out, order, cost ------------------------------------------------------------------------


@pytest.mark.equation("eq-choosing-left-out")
def test_the_output_without_an_item_follows_from_the_fit_with_it():
    features, y = regression(8)
    rows, n = np.arange(len(y)), len(y)
    x = features - features.mean(0)
    smoother = x @ np.linalg.inv(x.T @ x + 2.0 * np.eye(4)) @ x.T + 1 / n
    short = y - (y - smoother @ y) / (1 - smoother.diagonal())
    refitted = [Ridge(2.0).fit(features[rows != i], y[rows != i]) for i in rows]
    long = [model.predict(features[[i]])[0] for i, model in enumerate(refitted)]
    assert np.allclose(short, long)


@pytest.mark.equation("eq-choosing-kendall")
def test_tau_is_scipys_with_ties_and_with_candidates_that_were_drawn_twice(kendall=None):
    kendall = kendall or of_the_lab("kendall")
    random = np.random.default_rng(9)
    for _ in range(5):
        one, other = random.integers(0, 5, 12), random.integers(0, 6, 12)
        expected = scipy.stats.kendalltau(one, other).statistic
        assert np.isclose(kendall(one, other, np.ones(12)), expected)
        drawn = random.integers(0, 12, 12)
        expected = scipy.stats.kendalltau(one[drawn], other[drawn]).statistic
        weights = np.bincount(drawn, minlength=12)
        assert np.isclose(kendall(one, other, weights), expected)
    assert kendall(np.ones(4), np.arange(4), np.ones(4)) == 0


@pytest.mark.equation("eq-choosing-cost")
def test_the_seconds_are_exact_where_each_item_takes_as_long(monkeypatch):
    class Clock:
        now = 0.0

    def fit(model, objective, train, *, plan, **settings):
        Clock.now += len(train) * (0.3 + 0.05 * plan.epochs)

    data = tk.data.tensors(np.random.default_rng(0).normal(size=(50, 3)).astype("f4"), [0, 1] * 25)
    model, phase = nn.Linear(3, 2).float(), tk.finetune(7)
    report = tk.check(model, tk.classification(), data)
    monkeypatch.setattr(transferability.preflight, "check", lambda *_, **__: report)
    monkeypatch.setattr(transferability.engine, "fit", fit)
    cost = transferability.predict_cost(model, data, phase, sample=10, clock=lambda: Clock.now)
    assert np.isclose(60 * cost.minutes, 50 * (0.3 + 0.05 * 7))


SEEN_BY = {
    "log_evidence": lambda lab: test_the_evidence_is_a_gaussian_density_of_the_targets(12, 4, lab),
    "evidence_slopes": test_the_slopes_are_those_of_finite_differences,
    "kendall": test_tau_is_scipys_with_ties_and_with_candidates_that_were_drawn_twice,
}


@pytest.mark.equation("eq-choosing-evidence", "eq-choosing-slopes", "eq-choosing-kendall")
@pytest.mark.parametrize("name", SEEN_BY)
def test_one_sign_turned_round_in_a_derivation_is_seen(name):
    wrong = list(with_one_sign_turned(LAB[name]))
    assert wrong
    for tree in wrong:
        with np.errstate(all="ignore"), pytest.raises((AssertionError, ValueError)):
            SEEN_BY[name](names_of([tree])(name))
