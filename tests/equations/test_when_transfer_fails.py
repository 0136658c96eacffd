"""The formulas of *When transfer fails*: the lab against brute force and exact cases."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from derivations import definitions, names_of, slopes
from flips import assert_seen
from scipy import optimize, special, stats
from scipy.spatial import distance
from torch import nn
from torch.nn import functional as F

import transferkit as tk

LAB = "loss-math/when-transfer-fails"
IMPORTED = {"F": F}


# -- the lab's functions, and the same with one sign turned round ---------------------------------


@pytest.fixture(scope="module")
def lab():
    """lab(name) gives what the lab calls so."""
    return names_of(definitions(LAB).values(), **IMPORTED)


# -- tools ----------------------------------------------------------------------------------------


def close(ours, expected, rel=1e-8, abs=1e-11):
    assert np.asarray(ours) == pytest.approx(np.asarray(expected), rel=rel, abs=abs)


def two_samples(seed=0, n=7, m=5, width=3):
    random = np.random.default_rng(seed)
    return random.normal(size=(n, width)), 1 + 2 * random.normal(size=(m, width))


def distributions(seed, size=5):
    """Two distributions over the same few points."""
    return np.random.default_rng(seed).dirichlet(np.ones(size), size=2)


# -- MMD ------------------------------------------------------------------------------------------


@pytest.mark.equation("eq-shift-mmd")
def test_the_squared_distance_of_mean_feature_vectors_is_three_mean_kernels():
    # a kernel with finitely many features: (1 + a b)² = 1 + (√2 a)(√2 b) + a² b²
    points, (p, q) = np.array([-1.0, 0.5, 2.0, 3.0, -2.5]), distributions(0)
    features = np.stack([np.ones(5), math.sqrt(2) * points, points**2], axis=1)
    kernel = (1 + np.outer(points, points)) ** 2
    expected = p @ kernel @ p + q @ kernel @ q - 2 * p @ kernel @ q
    close(np.sum((features.T @ (p - q)) ** 2), expected)


def pairs_of_kernels(a, b, width):
    """Mean kernels over the pairs within a, within b (no row with itself) and between."""

    def k(u, v):
        return math.exp(-(distance.euclidean(u, v) ** 2) / (2 * width**2))

    within = [np.mean([k(u, v) for u, v in itertools.permutations(part, 2)]) for part in (a, b)]
    return *within, np.mean([k(u, v) for u in a for v in b])


@pytest.mark.equation("eq-shift-mmd-estimate")
def test_the_unbiased_estimate_is_made_of_pairs_of_different_rows(lab):
    a, b = two_samples()
    within_a, within_b, between = pairs_of_kernels(a, b, 1.7)
    expected = within_a + within_b - 2 * between
    close(lab("mmd_unbiased")(a, b, 1.7), expected)
    close(float(tk.mmd(a, b, [1.7])), expected)


@pytest.mark.equation("eq-shift-mmd-bias")
def test_the_bias_is_what_the_pairs_of_a_row_with_itself_add(lab):
    a, b = two_samples(1)
    within_a, within_b, _ = pairs_of_kernels(a, b, 2.0)
    ours = lab("mmd_biased")(a, b, 2.0) - lab("mmd_unbiased")(a, b, 2.0)
    close(ours, (1 - within_a) / len(a) + (1 - within_b) / len(b))
    close(lab("mmd_biased")(a, b, 2.0), float(tk.mmd(a, b, [2.0], estimator="biased")))
    # exactly, over all samples of size 2 and 3 from a distribution on three points
    points, p = np.array([[0.0], [1.0], [3.0]]), np.array([0.2, 0.5, 0.3])
    kernel = lab("kernel")(points, points, 1.0)
    mean = {"mmd_biased": 0.0, "mmd_unbiased": 0.0}
    for drawn in itertools.product(range(3), repeat=5):
        at = list(drawn)
        for name in mean:
            mean[name] += p[at].prod() * lab(name)(points[at[:2]], points[at[2:]], 1.0)
    close(mean["mmd_unbiased"], 0.0)
    close(mean["mmd_biased"], (1 - p @ kernel @ p) * (1 / 2 + 1 / 3))


# -- CORAL ----------------------------------------------------------------------------------------


@pytest.mark.equation("eq-shift-coral")
def test_coral_is_made_of_numpys_covariances_and_the_other_two_are_not_it(lab):
    a, b = two_samples(2)
    gap = np.cov(a.T) - np.cov(b.T)
    close(lab("coral")(a, b), np.linalg.norm(gap) ** 2 / (4 * 3**2))
    close(float(tk.coral(a, b)), np.linalg.norm(gap) ** 2 / (4 * 3**2))
    close(lab("coral_root")(a, b), np.linalg.norm(gap) / (4 * 3**2))
    means = np.mean((np.mean(a, axis=0) - np.mean(b, axis=0)) ** 2)
    close(lab("coral_with_means")(a, b), means + np.mean(gap**2))
    close(lab("coral")(a, a + 3.0), 0.0)
    close(lab("coral_with_means")(a, a + 3.0), 9.0)


@pytest.mark.equation("eq-shift-coral-gradient")
def test_the_gradient_of_coral_is_that_of_finite_differences(lab):
    a, b = two_samples(3)

    def loss(rows):
        return np.sum((np.cov(rows.T) - np.cov(b.T)) ** 2) / (4 * 3**2)

    ours = lab("coral_gradient")(a, b)
    close(ours, slopes(loss, a), rel=1e-6, abs=1e-8)
    close(ours.sum(axis=0), np.zeros(3))  # it moves no mean


# -- one dimension --------------------------------------------------------------------------------


@pytest.mark.equation("eq-shift-wasserstein")
def test_the_area_between_the_distribution_functions_is_the_cheapest_way_to_carry(lab):
    random = np.random.default_rng(4)
    a, b = random.normal(size=6), random.normal(size=6).round(1) + 0.5
    cheapest = optimize.linear_sum_assignment(np.abs(a[:, None] - b))
    expected = np.abs(a[:, None] - b)[cheapest].mean()
    close(np.mean(np.abs(np.sort(a) - np.sort(b))), expected)
    close(lab("wasserstein")(a, b), expected)
    c = random.normal(size=9)  # of other size
    close(lab("wasserstein")(a, c), stats.wasserstein_distance(a, c))
    close(float(tk.wasserstein(a, c)), stats.wasserstein_distance(a, c))


def cuts(a, b):
    """Answers of every cut, in both directions, on both samples."""
    values = np.sort(np.r_[-9, a, b, 9])
    for c in (values[1:] + values[:-1]) / 2:
        yield a > c, b > c
        yield a < c, b < c


def shares(one, other):
    return abs(Fraction(int(np.sum(one)), len(one)) - Fraction(int(np.sum(other)), len(other)))


@pytest.mark.equation("eq-shift-a-distance")
def test_the_distance_of_a_class_is_told_by_its_best_domain_classifier(lab):
    random = np.random.default_rng(5)
    a, b = random.normal(size=6), random.normal(size=8) + 0.7
    best = max(shares(one, other) for one, other in cuts(a, b))
    error = min((np.mean(~one) + np.mean(other)) / 2 for one, other in cuts(a, b))
    close(lab("a_distance_of_cuts")(a, b), float(2 * best))
    close(2 * (1 - 2 * error), float(2 * best))
    close(2 * stats.ks_2samp(a, b).statistic, float(2 * best))


@pytest.mark.equation("eq-shift-disagreement")
@pytest.mark.parametrize("seed", range(4))
def test_the_disagreements_of_two_cuts_are_intervals(lab, seed):
    random = np.random.default_rng(seed)
    a, b = random.normal(size=5), 2 * random.normal(size=6)
    best = max(
        shares(one_a != other_a, one_b != other_b)
        for (one_a, one_b), (other_a, other_b) in itertools.combinations(cuts(a, b), 2)
    )
    close(lab("disagreement_distance")(a, b), float(2 * best))
    assert lab("disagreement_distance")(a, b) >= lab("a_distance_of_cuts")(a, b) - 1e-12


# -- the bound ------------------------------------------------------------------------------------


def exact_terms(points, labels, p, q, heads):
    """For each head the exact terms of the bound, on a finite domain, as fractions."""

    def error(shares, h):
        return sum(s for s, said, right in zip(shares, h, labels, strict=True) if said != right)

    def apart(shares, h, g):
        return sum(s for s, one, other in zip(shares, h, g, strict=True) if one != other)

    distance = 2 * max(abs(apart(p, h, g) - apart(q, h, g)) for h in heads for g in heads)
    joint = min(error(p, h) + error(q, h) for h in heads)
    return [(error(p, h), distance, joint, error(q, h)) for h in heads]


@pytest.mark.equation("eq-shift-bound")
@pytest.mark.parametrize("seed", range(6))
def test_the_bound_holds_for_every_cut_on_a_finite_line_and_is_reached(seed):
    random = np.random.default_rng(seed)
    points = range(4)
    p, q = ([Fraction(int(c), int(sum(w))) for c in w] for w in random.integers(1, 9, (2, 4)))
    heads = [[int(x >= c) for x in points] for c in range(5)]
    heads += [[1 - said for said in h] for h in heads]
    labels = random.integers(0, 2, 4).tolist()
    for source, distance_, joint, target in exact_terms(points, labels, p, q, heads):
        assert target <= source + distance_ / 2 + joint
    # two points, all of the source on one and all of the target on the other
    ends = exact_terms(range(2), [0, 1], [1, 0], [0, 1], [[0, 0], [0, 1], [1, 0], [1, 1]])
    assert (0, 2, 0, 1) in ends  # source error 0, bound 1, target error 1


@pytest.mark.equation("eq-shift-bound")
@pytest.mark.parametrize("seed", range(4))
def test_the_bound_does_not_need_two_classes(seed):
    random = np.random.default_rng(seed)
    p, q = ([Fraction(int(c), int(sum(w))) for c in w] for w in random.integers(1, 9, (2, 4)))
    heads, labels = random.integers(0, 3, (6, 4)).tolist(), random.integers(0, 3, 4).tolist()
    for source, distance_, joint, target in exact_terms(range(4), labels, p, q, heads):
        assert target <= source + distance_ / 2 + joint


@pytest.mark.equation("eq-shift-bound")
def test_the_labs_terms_are_those_of_an_exhaustive_search(lab):
    random = np.random.default_rng(6)
    a, b = random.normal(size=7), random.normal(size=9) + 0.5
    y_a, y_b = (a + random.normal(size=7) > 0).astype(int), (b > 1).astype(int)
    said = list(cuts(a, b))
    terms = lab("bound_terms")(a, y_a, b, y_b, cut=0.3)
    joint = min(np.mean(one != y_a) + np.mean(other != y_b) for one, other in said)
    close(terms["joint error"], joint)
    close(lab("best_joint_error")(-a, y_a, -b, y_b), joint)
    close(terms["source error"], np.mean((a > 0.3) != y_a))
    close(terms["target error"], np.mean((b > 0.3) != y_b))
    close(terms["half distance"], lab("disagreement_distance")(a, b) / 2)
    close(lab("bound")(terms), sum(terms.values()) - terms["target error"])
    assert terms["target error"] <= lab("bound")(terms)


# -- the floor under aligned features -------------------------------------------------------------


def every_head(p_s, p_t, eta_s, eta_t):
    """Both errors of each head on a finite set of feature values; eta: P(y = 1 | value)."""
    for h in itertools.product((0, 1), repeat=len(p_s)):
        h = np.array(h)
        yield tuple(p @ np.where(h == 1, 1 - eta, eta) for p, eta in ((p_s, eta_s), (p_t, eta_t)))


@pytest.mark.equation("eq-shift-floor", "eq-shift-zhao")
@pytest.mark.parametrize("seed", range(8))
def test_no_head_is_below_the_floors(lab, seed):
    random = np.random.default_rng(seed)
    p_s, p_t = random.dirichlet(np.ones(4), size=2)
    if seed % 2:
        p_t = 0.95 * p_s + 0.05 * p_t  # nearly aligned
    eta_s, eta_t = random.beta(0.4, 0.4, size=(2, 4)) * np.array([[1.0], [0.4]])
    pi_s, pi_t = p_s @ eta_s, p_t @ eta_t
    least = min(sum(errors) for errors in every_head(p_s, p_t, eta_s, eta_t))
    arguments = [1 - pi_s, pi_s], [1 - pi_t, pi_t], p_s, p_t
    by_shares = max(0.0, abs(pi_s - pi_t) - np.maximum(p_s - p_t, 0).sum())
    close(lab("floor_by_shares")(*arguments), by_shares)
    root = [distance.jensenshannon(*pair, base=2) for pair in (arguments[:2], arguments[2:])]
    close(lab("floor_by_divergence")(*arguments), max(0.0, root[0] - root[1]) ** 2 / 2)
    assert least >= by_shares - 1e-12
    assert least >= lab("floor_by_divergence")(*arguments) - 1e-12


@pytest.mark.equation("eq-shift-floor")
def test_the_floor_is_reached_by_one_value_of_the_features(lab):
    # everything looks alike; the source is half positive, the target one in ten
    one = np.ones(1)
    least = min(sum(errors) for errors in every_head(one, one, np.array([0.5]), np.array([0.1])))
    close(least, 0.6)  # 0.5 + 0.1: saying no everywhere
    close(lab("floor_by_shares")([0.5, 0.5], [0.9, 0.1], one, one), 0.4)
    separable = [every_head(np.array([a, 1 - a]), np.array([b, 1 - b]), np.array([1.0, 0.0]),
                            np.array([1.0, 0.0])) for a, b in ((0.5, 0.1),)]  # fmt: skip
    assert min(sum(errors) for errors in separable[0]) == 0  # without alignment: no error at all


@pytest.mark.equation("eq-shift-zhao")
def test_divergence_and_entropy_are_scipys(lab):
    for seed in range(5):
        p, q = distributions(seed)
        subsets = [list(s) for k in range(6) for s in itertools.combinations(range(5), k)]
        close(lab("variation")(p, q), max(np.sum((p - q)[at]) for at in subsets))
        close(lab("js_divergence")(p, q), distance.jensenshannon(p, q, base=2) ** 2)
        close(lab("entropy_bits")(p), stats.entropy(p, base=2))
    close(lab("js_divergence")([1, 0], [0, 1]), 1.0)


# -- two players ----------------------------------------------------------------------------------


def players(seed=7):
    random = np.random.default_rng(seed)
    w, v, u = random.normal(size=(2, 3)), random.normal(size=2), random.normal(size=2)
    source, target = random.normal(size=(6, 3)), random.normal(size=(4, 3)) + 1
    return w, v, u, source, np.array([0, 1, 1, 0, 1, 0]), target


def both_losses(w, v, u, source, labels, target):
    """Task and domain loss, one row after the other, from the definition."""

    def loss(row, head, answer):
        chance = special.expit(sum(head * (w @ row)))
        return -math.log(chance if answer else 1 - chance)

    task = np.mean([loss(row, v, label) for row, label in zip(source, labels, strict=True)])
    rows = [(row, 1) for row in source] + [(row, 0) for row in target]
    return task, np.mean([loss(row, u, domain) for row, domain in rows])


@pytest.mark.equation("eq-shift-adversarial")
def test_both_losses_are_mean_log_losses(lab):
    arguments = players()
    close(lab("adversarial_losses")(*arguments), both_losses(*arguments))


@pytest.mark.equation("eq-shift-updates")
@pytest.mark.parametrize("weight", [0.0, 0.7, 2.0])
def test_each_player_gets_the_gradient_of_its_own_loss(lab, weight):
    w, v, u, *data = players(8)
    by_w, by_v, by_u = lab("adversarial_gradients")(w, v, u, *data, weight)

    def of_features(w):
        task, domain = both_losses(w, v, u, *data)
        return task - weight * domain

    close(by_w, slopes(of_features, w), rel=1e-6, abs=1e-8)
    close(by_v, slopes(lambda v: both_losses(w, v, u, *data)[0], v), rel=1e-6, abs=1e-8)
    close(by_u, slopes(lambda u: both_losses(w, v, u, *data)[1], u), rel=1e-6, abs=1e-8)


@pytest.mark.equation("eq-shift-reversal")
def test_one_backward_pass_through_the_reversal_gives_all_three(lab):
    w, v, u, source, labels, target = players(9)
    expected = lab("adversarial_gradients")(w, v, u, source, labels, target, 0.6)
    parameters = [torch.tensor(part, requires_grad=True) for part in (w, v, u)]
    features = [torch.tensor(rows) @ parameters[0].T for rows in (source, target)]
    both = torch.cat(features)
    domains = torch.tensor([1.0] * len(source) + [0.0] * len(target))
    task = F.binary_cross_entropy_with_logits(
        features[0] @ parameters[1], torch.tensor(1.0 * labels)
    )
    domain = F.binary_cross_entropy_with_logits(tk.grad_reverse(both, 0.6) @ parameters[2], domains)
    assert torch.equal(tk.grad_reverse(both, 0.6), both)  # forwards it does nothing
    (task + domain).backward()
    for ours, wanted in zip(parameters, expected, strict=True):
        close(ours.grad.numpy(), wanted)


@pytest.mark.equation("eq-shift-best-domain")
@pytest.mark.parametrize("seed", range(4))
def test_the_best_domain_classifier_is_left_with_log_two_minus_the_divergence(lab, seed):
    p, q = distributions(seed)

    def loss(z):
        says = special.expit(z)
        return -0.5 * sum(p * np.log(says) + q * np.log(1 - says))

    found = optimize.minimize(loss, np.zeros(5), tol=1e-12)
    close(lab("best_domain_loss")(p, q), found.fun, rel=1e-8)
    close(special.expit(found.x), p / (p + q), rel=1e-3)
    close(lab("best_domain_loss")(p, q), math.log(2) - distance.jensenshannon(p, q) ** 2)
    close(lab("best_domain_loss")(p, p), math.log(2))


@pytest.mark.equation("eq-shift-adversarial", "eq-shift-coral", "eq-shift-mmd-estimate")
def test_networks_side_by_side_have_the_librarys_losses(lab):
    torch.manual_seed(0)
    source, target = torch.randn(3, 8, 5), 1 + torch.randn(3, 6, 5)
    for i in range(3):
        assert lab("coral_each")(source, target)[i] == pytest.approx(tk.coral(source[i], target[i]))
        rows = torch.cat([source[i], target[i]])
        width = torch.cdist(rows, rows).flatten().median().item()
        expected = tk.mmd(source[i], target[i], [width], estimator="biased")
        assert lab("mmd_each")(source, target)[i] == pytest.approx(expected)
    networks = lab("Networks")(3, 5, hidden=5)
    each = lab("adversarial_each")(networks, source, target, 0.5)
    for i in range(3):
        guess = nn.Sequential(nn.Linear(5, 16, bias=False), nn.ReLU(), nn.Linear(16, 1, bias=False))
        with torch.no_grad():
            guess[0].weight.copy_(networks.guess[i].T)
            guess[2].weight.copy_(networks.domain[i].T)
        said = guess(torch.cat([source[i], target[i]]))[:, 0]
        domains = torch.tensor([1.0] * 8 + [0.0] * 6)
        assert each[i].item() == pytest.approx(
            F.binary_cross_entropy_with_logits(said, domains).item()
        )


# -- negative transfer, foretold ------------------------------------------------------------------


def finite_domain(seed):
    """A handful of rows of each class; draws are made from them, with replacement."""
    random = np.random.default_rng(seed)
    return [random.normal(size=(3, 2)) + c for c in (0, 1)]


def truth_of(rows):
    """Difference of the class means, and the noise of one label: twice both total variances."""
    return rows[1].mean(0) - rows[0].mean(0), 2 * sum(part.var(axis=0).sum() for part in rows)


def every_draw(rows, each):
    """The differences of class means of all samples with `each` labels of a class."""
    means = [[part[list(at)].mean(0) for at in itertools.product(range(3), repeat=each)]
             for part in rows]  # fmt: skip
    return np.array([one - other for one in means[1] for other in means[0]])


@pytest.mark.equation("eq-shift-noise")
@pytest.mark.parametrize("each", [1, 2, 3])
def test_the_noise_of_a_difference_of_means_over_all_samples(lab, each):
    rows = finite_domain(10)
    delta, noise = truth_of(rows)
    found = np.square(every_draw(rows, each) - delta).sum(axis=1).mean()
    close(lab("expected_alone")(2 * each, noise), found)


@pytest.mark.equation("eq-shift-pooled")
def test_the_error_of_the_pooled_difference_over_all_pairs_of_samples(lab):
    target, source = finite_domain(11), finite_domain(12)
    (delta_t, noise_t), (delta_s, noise_s) = truth_of(target), truth_of(source)
    own, more = every_draw(target, 1), every_draw(source, 2)  # n = 2 and N_S = 4
    pooled = (2 * own[:, None] + 4 * more[None]) / 6
    found = np.square(pooled - delta_t).sum(axis=2).mean()
    gap = np.square(delta_s - delta_t).sum()
    close(lab("expected_pooled")(2, 4, gap, noise_t, noise_s), found)


@pytest.mark.equation("eq-shift-noise", "eq-shift-break-even")
def test_the_labs_estimates_of_gap_and_noise_have_no_bias_over_all_pairs_of_samples(lab):
    target, source = finite_domain(11), finite_domain(12)
    labels, found = np.array([0, 0, 1, 1]), []
    for rows in (target, source):
        draws = itertools.product(range(3), repeat=4)
        samples = [np.concatenate([rows[0][[a, b]], rows[1][[c, d]]]) for a, b, c, d in draws]
        found.append([lab("class_moments")(sample, labels) for sample in samples])
        close(np.mean([noise for _, noise, _ in found[-1]]), truth_of(rows)[1])
    gaps = [np.square(one - other).sum() - own_one - own_other
            for (one, _, own_one), (other, _, own_other) in itertools.product(*found)]  # fmt: skip
    close(np.mean(gaps), np.square(truth_of(source)[0] - truth_of(target)[0]).sum())


CASES = [(300, 2.0, 150.0, 120.0), (50, 2.8, 60.0, 90.0), (1000, 5.0, 100.0, 100.0)]


@pytest.mark.equation("eq-shift-break-even")
@pytest.mark.parametrize("case", CASES)
def test_at_break_even_pooling_changes_nothing(lab, case):
    n_s, gap, noise_t, noise_s = case

    def difference(log_n):
        share = math.exp(log_n) / (math.exp(log_n) + n_s)
        pooled = (1 - share) ** 2 * (gap + noise_s / n_s) + share**2 * noise_t / math.exp(log_n)
        return pooled - noise_t / math.exp(log_n)

    root = math.exp(optimize.brentq(difference, -5, 15))
    close(lab("break_even")(*case), root, rel=1e-6)
    equal = lab("break_even")(n_s, gap, noise_t, noise_t)
    close(gap, noise_t * (1 / equal + 1 / n_s))  # the short form, for equal noise
    assert lab("break_even")(10, 0.1, 100.0, 50.0) == math.inf


@pytest.mark.equation("eq-shift-share")
@pytest.mark.parametrize("case", CASES)
def test_the_best_share_has_the_least_error_and_never_hurts(lab, case):
    n_s, gap, noise_t, noise_s = case
    for n in (10, 200):

        def error(share, n=n):
            return (1 - share) ** 2 * (gap + noise_s / n_s) + share**2 * noise_t / n

        found = optimize.minimize_scalar(error, bounds=(0, 1), method="bounded",
                                         options={"xatol": 1e-12})  # fmt: skip
        ours = lab("best_share")(n, *case)
        close(ours, found.x, rel=1e-5)
        assert error(ours) <= min(error(1), error(0), error(n / (n + n_s)))


# -- planted errors -------------------------------------------------------------------------------

SEEN_BY = {
    "kernel": test_the_unbiased_estimate_is_made_of_pairs_of_different_rows,
    "mmd_unbiased": test_the_unbiased_estimate_is_made_of_pairs_of_different_rows,
    "mmd_biased": test_the_bias_is_what_the_pairs_of_a_row_with_itself_add,
    "covariance": test_coral_is_made_of_numpys_covariances_and_the_other_two_are_not_it,
    "coral": test_coral_is_made_of_numpys_covariances_and_the_other_two_are_not_it,
    "coral_root": test_coral_is_made_of_numpys_covariances_and_the_other_two_are_not_it,
    "coral_with_means": test_coral_is_made_of_numpys_covariances_and_the_other_two_are_not_it,
    "coral_gradient": test_the_gradient_of_coral_is_that_of_finite_differences,
    "gaps": test_the_area_between_the_distribution_functions_is_the_cheapest_way_to_carry,
    "disagreement_distance": lambda lab: [
        test_the_disagreements_of_two_cuts_are_intervals(lab, seed) for seed in range(4)
    ],
    "best_joint_error": test_the_labs_terms_are_those_of_an_exhaustive_search,
    "bound": test_the_labs_terms_are_those_of_an_exhaustive_search,
    "variation": test_divergence_and_entropy_are_scipys,
    "entropy_bits": test_divergence_and_entropy_are_scipys,
    "js_divergence": test_divergence_and_entropy_are_scipys,
    "floor_by_shares": lambda lab: [test_no_head_is_below_the_floors(lab, s) for s in range(8)],
    "floor_by_divergence": lambda lab: [test_no_head_is_below_the_floors(lab, s) for s in range(8)],
    "sigmoid": lambda lab: test_each_player_gets_the_gradient_of_its_own_loss(lab, 0.7),
    "binary_loss": test_both_losses_are_mean_log_losses,
    "adversarial_gradients": lambda lab:
        test_each_player_gets_the_gradient_of_its_own_loss(lab, 0.7),
    "best_domain_loss": lambda lab:
        test_the_best_domain_classifier_is_left_with_log_two_minus_the_divergence(lab, 0),
    "coral_each": test_networks_side_by_side_have_the_librarys_losses,
    "mmd_each": test_networks_side_by_side_have_the_librarys_losses,
    "class_moments":
        test_the_labs_estimates_of_gap_and_noise_have_no_bias_over_all_pairs_of_samples,
    "expected_pooled": test_the_error_of_the_pooled_difference_over_all_pairs_of_samples,
    "break_even": lambda lab: test_at_break_even_pooling_changes_nothing(lab, CASES[0]),
    "best_share": lambda lab:
        test_the_best_share_has_the_least_error_and_never_hurts(lab, CASES[0]),
}  # fmt: skip


@pytest.mark.equation(
    "eq-shift-mmd-estimate",
    "eq-shift-mmd-bias",
    "eq-shift-coral",
    "eq-shift-coral-gradient",
    "eq-shift-wasserstein",
    "eq-shift-disagreement",
    "eq-shift-bound",
    "eq-shift-floor",
    "eq-shift-zhao",
    "eq-shift-updates",
    "eq-shift-best-domain",
    "eq-shift-pooled",
    "eq-shift-break-even",
    "eq-shift-share",
)
@pytest.mark.parametrize("name", SEEN_BY)
def test_one_sign_turned_round_in_a_derivation_is_seen(name):
    assert_seen(SEEN_BY[name], LAB, name, (AssertionError, ValueError), **IMPORTED)
