"""The formulas of *Loss functions*: the lab's derivations against SciPy and finite differences."""

import math
from dataclasses import dataclass
from decimal import Decimal, getcontext

import numpy as np
import pytest
import sklearn.metrics
import torch
from derivations import definitions, names_of, slopes
from flips import assert_seen
from scipy import optimize, special, stats
from torch import nn

import transferkit as tk

LAB = "loss-math/losses"
IMPORTED = {"dataclass": dataclass, "minimize_scalar": optimize.minimize_scalar}


# -- the lab's functions, and the same with one sign turned round ---------------------------------


@pytest.fixture(scope="module")
def lab():
    """lab(name) gives what the lab calls so."""
    return names_of(definitions(LAB).values(), **IMPORTED)


# -- tools ----------------------------------------------------------------------------------------


def close(ours, expected, rel=1e-6, abs=1e-9):
    assert np.asarray(ours) == pytest.approx(np.asarray(expected), rel=rel, abs=abs)


def case(seed=0, n=9, classes=4):
    random = np.random.default_rng(seed)
    labels = np.r_[np.arange(classes), random.integers(0, classes, n - classes)]
    return 2 * random.normal(size=(n, classes)), labels


def log_loss(logits, labels, weights=None):
    """Scikit-learn's, of probabilities that SciPy computed."""
    p = special.softmax(logits, axis=1)
    each = None if weights is None else np.asarray(weights)[labels]
    return sklearn.metrics.log_loss(
        labels, p, sample_weight=each, labels=np.arange(logits.shape[1])
    )


def library(objective, logits, labels):
    """The mean of one of the library's objectives."""
    outputs = torch.as_tensor(logits)
    items = tk.data.Batch(outputs, torch.as_tensor(labels), torch.arange(len(labels)))
    return float(objective.loss(outputs, items).mean())


# -- from likelihood to cross-entropy -------------------------------------------------------------


@pytest.mark.equation("eq-losses-softmax")
def test_softmax_is_scipys_and_ratios_are_exponentials_of_differences(lab):
    logits, _ = case()
    p = lab("softmax")(logits)
    close(p, special.softmax(logits, axis=1), rel=1e-12)
    close(p[:, 2] / p[:, 1], np.exp(logits[:, 2] - logits[:, 1]), rel=1e-10)
    close(lab("softmax")(logits + 7.5), p, rel=1e-10)


@pytest.mark.equation("eq-losses-likelihood")
def test_the_likelihood_is_e_to_the_minus_n_times_the_mean_loss(lab):
    logits, labels = case(1)
    chances = special.softmax(logits, axis=1)[np.arange(len(labels)), labels]
    likelihood = math.prod(chances.tolist())
    loss = lab("cross_entropy")(logits, labels)
    close(math.exp(-len(labels) * loss), likelihood, rel=1e-10, abs=0)
    close(loss, -math.log(likelihood) / len(labels), rel=1e-12)


@pytest.mark.equation("eq-losses-logits")
def test_the_loss_from_logits_is_the_log_loss_of_scikit_learn_and_the_librarys(lab):
    logits, labels = case(2)
    expected = log_loss(logits, labels)
    close(lab("cross_entropy")(logits, labels), expected, rel=1e-12)
    close(library(tk.classification(), logits, labels), expected, rel=1e-12)
    by_scipy = special.logsumexp(logits, axis=1) - logits[np.arange(len(labels)), labels]
    close(by_scipy.mean(), expected, rel=1e-12)


@pytest.mark.equation("eq-losses-lse-slope")
def test_the_slope_of_the_log_sum_exp_is_the_softmax(lab):
    logits, _ = case(17)
    by_sum = slopes(lambda z: sum(special.logsumexp(row) for row in z), logits)
    close(lab("softmax")(logits), by_sum)


@pytest.mark.equation("eq-losses-gradient")
def test_the_gradient_by_the_logits_is_probability_minus_truth(lab):
    logits, labels = case(3)
    ours = lab("cross_entropy_gradient")(logits, labels)
    close(ours, slopes(lambda z: log_loss(z, labels), logits))
    close(ours.sum(axis=1), np.zeros(len(labels)), abs=1e-15)


@pytest.mark.equation("eq-losses-head-gradient")
def test_the_gradients_of_a_linear_head_are_those_of_finite_differences(lab):
    random = np.random.default_rng(4)
    _, labels = case(4)
    features, weights = random.normal(size=(9, 5)), random.normal(size=(4, 5))
    bias = random.normal(size=4)

    def loss(features, weights, bias):
        logits = [[sum(w * f) + b for w, b in zip(weights, bias, strict=True)] for f in features]
        return log_loss(np.array(logits), labels)

    ours = lab("head_gradients")(features, weights, bias, labels)
    close(ours[0], slopes(lambda w: loss(features, w, bias), weights))
    close(ours[1], slopes(lambda b: loss(features, weights, b), bias))
    close(ours[2], slopes(lambda f: loss(f, weights, bias), features))


@pytest.mark.equation("eq-losses-hessian")
def test_the_second_derivatives_are_the_covariance_of_the_drawn_class(lab):
    logits, _ = case(5)
    for z in logits:
        p, ours = special.softmax(z), lab("cross_entropy_hessian")(z)
        rows = [slopes(lambda z, c=c: special.softmax(z)[c], z) for c in range(4)]
        close(ours, np.array(rows))
        assert np.linalg.eigvalsh(ours).min() > -1e-12
        direction = np.array([0.3, -2.0, 1.0, 5.0])
        mean = (p * direction).sum()
        close(direction @ ours @ direction, (p * (direction - mean) ** 2).sum(), rel=1e-9)


# -- two classes ----------------------------------------------------------------------------------


def binary_case(seed=0, n=11):
    random = np.random.default_rng(seed)
    return 2 * random.normal(size=n), np.r_[0, 1, random.integers(0, 2, n - 2)]


@pytest.mark.equation("eq-losses-sigmoid")
def test_of_two_classes_only_the_difference_of_the_logits_counts(lab):
    logits, _ = case(6, classes=2)
    second = special.softmax(logits, axis=1)[:, 1]
    close(lab("sigmoid")(logits[:, 1] - logits[:, 0]), second, rel=1e-12)


@pytest.mark.equation("eq-losses-bce")
def test_the_repaired_binary_formula_is_the_log_loss_and_the_two_class_case(lab):
    z, y = binary_case()
    p = special.expit(z)
    printed_with_bracket = -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))
    close(printed_with_bracket, sklearn.metrics.log_loss(y, p), rel=1e-12)
    close(lab("binary_cross_entropy")(z, y), printed_with_bracket, rel=1e-12)
    close(library(tk.classification(), np.stack([0 * z, z], 1), y), printed_with_bracket, rel=1e-12)


@pytest.mark.equation("eq-losses-bce-gradient")
def test_the_binary_gradient_is_probability_minus_label(lab):
    z, y = binary_case(1)
    ours = lab("binary_gradient")(z, y)
    close(ours, slopes(lambda z: sklearn.metrics.log_loss(y, special.expit(z)), z))


@pytest.mark.equation("eq-losses-bce-printed")
def test_the_gradient_of_the_printed_formula_raises_every_logit(lab):
    z, y = binary_case(2)

    def printed(z):
        p = special.expit(z)
        terms = zip(y, p, strict=True)
        first, second = zip(*[(y * np.log(p), (1 - y) * np.log(1 - p)) for y, p in terms],
                            strict=True)  # fmt: skip
        return -1 / len(y) * sum(first) + 1 / len(y) * sum(second)

    ours = lab("printed_gradient")(z, y)
    close(lab("printed_loss")(z, y), printed(z), rel=1e-10)
    close(ours, slopes(printed, z))
    assert (ours < 0).all()


# -- numbers --------------------------------------------------------------------------------------


@pytest.mark.equation("eq-losses-gaussian")
@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0])
def test_minus_the_log_of_a_gaussian_density_is_a_scaled_squared_error_and_a_constant(sigma):
    random = np.random.default_rng(7)
    y, predicted = random.normal(size=(2, 8))
    formula = (y - predicted) ** 2 / (2 * sigma**2) + 0.5 * np.log(2 * np.pi * sigma**2)
    close(formula, -stats.norm(predicted, sigma).logpdf(y), rel=1e-10)


@pytest.mark.equation("eq-losses-mse", "eq-losses-mse-gradient")
def test_mean_squared_error_and_its_gradient(lab):
    random = np.random.default_rng(8)
    y, predicted = random.normal(size=(2, 8))
    expected = sklearn.metrics.mean_squared_error(y, predicted)
    close(lab("squared_error")(predicted, y), expected, rel=1e-12)
    close(library(tk.regression(), predicted, y), expected, rel=1e-12)
    ours = lab("squared_error_gradient")(predicted, y)
    close(ours, slopes(lambda z: sklearn.metrics.mean_squared_error(y, z), predicted))


@pytest.mark.equation("eq-losses-squared-probability")
def test_squared_error_on_a_probability_fades_where_the_answer_is_wrong_and_sure(lab):
    z, y = binary_case(3)
    ours = lab("squared_probability_gradient")(z, y)
    close(ours, slopes(lambda z: sklearn.metrics.mean_squared_error(y, special.expit(z)), z))
    wrong, one = np.array([-20.0]), np.array([1])
    assert abs(lab("squared_probability_gradient")(wrong, one)[0]) < 1e-8
    assert abs(lab("binary_gradient")(wrong, one)[0]) > 0.99


# -- back-propagation by hand ---------------------------------------------------------------------


def two_layers(seed=0):
    random = np.random.default_rng(seed)
    x, y = random.normal(size=(7, 3)), random.normal(size=(7, 2))
    return x, y, random.normal(size=(4, 3)), random.normal(size=(2, 4))


@pytest.mark.equation("eq-losses-forward")
def test_the_two_layer_network_is_that_of_torch(lab):
    x, _, w_x, w_y = two_layers()
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(w_x))
        model[2].weight.copy_(torch.tensor(w_y))
        expected = model(torch.tensor(x)).numpy()
    close(lab("forward")(x, w_x, w_y)[1], expected, rel=1e-12)


@pytest.mark.equation("eq-losses-backprop")
def test_the_gradients_by_hand_are_those_of_finite_differences(lab):
    x, y, w_x, w_y = two_layers(1)

    def loss(w_x, w_y):
        total = 0.0
        for example, wanted in zip(x, y, strict=True):
            said = [sum(w * np.tanh(w_x @ example)) for w in w_y]
            total += sum((a - b) ** 2 for a, b in zip(said, wanted, strict=True))
        return total / len(x)

    by_w_x, by_w_y = lab("backward")(x, y, w_x, w_y)
    close(by_w_x, slopes(lambda w: loss(w, w_y), w_x))
    close(by_w_y, slopes(lambda w: loss(w_x, w), w_y))


# -- stable forms ---------------------------------------------------------------------------------


def exact_log_sum_exp(values, minus=0.0):
    """With digits enough that the difference is exact where most of them cancel."""
    getcontext().prec = 60
    return float(sum(Decimal(value).exp() for value in values).ln() - Decimal(minus))


@pytest.mark.equation("eq-losses-lse", "eq-losses-lse-bounds")
def test_the_shifted_log_sum_exp_is_exact_where_exponentials_overflow(lab):
    logits, _ = case(9)
    for rows in (logits, 1000 * logits, logits - 5000):
        ours = lab("log_sum_exp")(rows)
        close(ours, [exact_log_sum_exp(row.tolist()) for row in rows], rel=1e-12)
        top = rows.max(axis=1)
        assert (ours >= top).all() and (ours <= top + np.log(rows.shape[1])).all()
    assert lab("log_sum_exp")(np.zeros((1, 4)))[0] == pytest.approx(np.log(4), rel=1e-14)


@pytest.mark.equation("eq-losses-bce-stable")
@pytest.mark.parametrize("z", [-2000.0, -30.0, -0.5, 0.0, 0.5, 30.0, 2000.0])
@pytest.mark.parametrize("y", [0, 1])
def test_the_stable_binary_form_is_exact(lab, z, y):
    expected = exact_log_sum_exp([0.0, z], minus=y * z)
    close(lab("binary_cross_entropy")(np.array([z]), np.array([y])), expected, rel=1e-12, abs=1e-40)


# -- changed targets and weights ------------------------------------------------------------------


def smoothed(logits, labels, epsilon):
    """The mean of minus sum q log p, one example and class after the other."""
    classes, total = logits.shape[1], 0.0
    for row, label in zip(special.log_softmax(logits, axis=1), labels, strict=True):
        for c, log_p in enumerate(row):
            total -= ((1 - epsilon) * (c == label) + epsilon / classes) * log_p
    return total / len(labels)


@pytest.mark.equation("eq-losses-smoothing", "eq-losses-smoothing-gradient")
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.6])
def test_label_smoothing_moves_the_target_and_the_gradient_with_it(lab, epsilon):
    logits, labels = case(10)
    expected = smoothed(logits, labels, epsilon)
    close(library(tk.classification(label_smoothing=epsilon), logits, labels), expected, rel=1e-12)
    ours = lab("smoothing_gradient")(logits, labels, epsilon)
    close(ours, slopes(lambda z: smoothed(z, labels, epsilon), logits))


@pytest.mark.equation("eq-losses-smoothing-gap")
@pytest.mark.parametrize(("epsilon", "classes"), [(0.1, 2), (0.1, 10), (0.5, 3)])
def test_the_smoothed_loss_is_least_at_a_finite_gap(epsilon, classes):
    def loss(gap):
        logits = np.zeros((1, classes))
        logits[0, 0] = gap
        return smoothed(logits, np.array([0]), epsilon)

    found = optimize.minimize_scalar(loss, bounds=(-5, 20), method="bounded",
                                     options={"xatol": 1e-10})  # fmt: skip
    formula = math.log((1 - epsilon + epsilon / classes) / (epsilon / classes))
    close(found.x, formula, rel=1e-5)
    q = np.full(classes, epsilon / classes)
    q[0] += 1 - epsilon
    close(found.fun, stats.entropy(q), rel=1e-9)  # the floor: the entropy of the target


@pytest.mark.equation("eq-losses-weights-gradient")
def test_class_weights_scale_the_gradient_of_their_class(lab):
    logits, labels = case(11)
    weights = np.array([0.5, 1.0, 2.0, 4.0])
    ours = lab("weighted_gradient")(logits, labels, weights)
    close(ours, slopes(lambda z: log_loss(z, labels, weights), logits))
    expected = log_loss(logits, labels, weights)
    close(library(tk.classification(class_weights=weights), logits, labels), expected, rel=1e-9)


@pytest.mark.equation("eq-losses-weights-shift")
@pytest.mark.parametrize(("share", "weights"), [(0.3, (0.7, 1.7)), (0.05, (1.0, 19.0))])
def test_class_weights_move_the_best_logit_by_the_logarithm_of_their_ratio(share, weights):
    def expected_loss(z):
        p = special.expit(z)
        return -weights[1] * share * np.log(p) - weights[0] * (1 - share) * np.log(1 - p)

    found = optimize.minimize_scalar(expected_loss, bounds=(-10, 10), method="bounded",
                                     options={"xatol": 1e-10})  # fmt: skip
    close(found.x, special.logit(share) + math.log(weights[1] / weights[0]), rel=1e-5, abs=1e-6)


def focal(logits, labels, gamma):
    right = special.softmax(logits, axis=1)[np.arange(len(labels)), labels]
    return np.mean([-((1 - p) ** gamma) * math.log(p) for p in right])


@pytest.mark.equation("eq-losses-focal")
def test_the_labs_focal_loss_is_the_formula_and_cross_entropy_where_gamma_is_zero(lab):
    logits, labels = case(12)
    for gamma in (0.5, 1.0, 2.0, 5.0):
        close(library(lab("Focal")(gamma=gamma), logits, labels), focal(logits, labels, gamma))
    close(library(lab("Focal")(gamma=0.0), logits, labels), log_loss(logits, labels), rel=1e-12)


@pytest.mark.equation("eq-losses-focal-gradient")
def test_the_focal_gradient_and_its_limits(lab):
    logits, labels = case(13)
    ours = lab("focal_gradient")
    for gamma in (1.0, 2.0, 3.5):
        close(ours(logits, labels, gamma), slopes(lambda z, g=gamma: focal(z, labels, g), logits))
    close(ours(logits, labels, 0.0), slopes(lambda z: log_loss(z, labels), logits))
    hopeless, good = np.array([[0.0, 30.0]]), np.array([[0.0, -12.0]])
    first = np.array([0])
    close(ours(hopeless, first, 2.0)[0, 0], -1, rel=1e-6)  # as cross-entropy
    assert abs(ours(good, first, 2.0)[0, 0]) < 1e-15 < 1e-6 < special.expit(-12.0)


# -- calibration ----------------------------------------------------------------------------------


@pytest.mark.equation("eq-losses-proper")
def test_the_expected_loss_is_entropy_plus_divergence_and_least_for_the_truth():
    random = np.random.default_rng(14)
    truth, said = random.dirichlet(np.ones(5), size=2)
    drawn = sklearn.metrics.log_loss(np.arange(5), np.tile(said, (5, 1)), sample_weight=truth)
    close(drawn, stats.entropy(truth) + stats.entropy(truth, said), rel=1e-9)
    assert drawn > stats.entropy(truth)


@pytest.mark.equation("eq-losses-ece")
def test_the_calibration_error_of_two_bins_by_hand():
    sure = np.repeat([0.7, 0.9], [4, 6])  # two of four and five of six are right
    labels = np.array([1, 1, 0, 0, 1, 1, 1, 1, 1, 0])
    logits = np.stack([np.zeros(10), special.logit(sure)], axis=1)
    expected = 4 / 10 * abs(0.7 - 2 / 4) + 6 / 10 * abs(0.9 - 5 / 6)
    for bins in (5, 10, 20):
        close(tk.metrics.expected_calibration_error(logits, labels, bins=bins), expected)


def loud(seed=15, n=400, factor=3.0):
    """Logits three times as large as those that the labels were drawn from."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(n, 3))
    drawn = [random.choice(3, p=p) for p in special.softmax(logits, axis=1)]
    return factor * logits, np.array(drawn)


@pytest.mark.equation("eq-losses-temperature")
def test_the_fitted_temperature_is_the_best_of_many_and_changes_no_class(lab):
    logits, labels = loud()
    found = lab("fit_temperature")(logits, labels)
    tried = np.geomspace(1, 10, 400)
    best = tried[np.argmin([log_loss(logits / t, labels) for t in tried])]
    close(found, best, rel=7e-3)
    close(found, 3.0, rel=0.25)
    assert ((logits / found).argmax(axis=1) == logits.argmax(axis=1)).all()


@pytest.mark.equation("eq-losses-temperature-slope")
def test_at_the_best_temperature_the_expected_logit_is_that_of_the_right_class(lab):
    logits, labels = loud(16)
    slope = lab("temperature_slope")
    for inverse in (0.1, 0.5, 2.0):
        numerical = slopes(lambda b: log_loss(b[0] * logits, labels), np.array([inverse]))
        close(slope(logits, labels, inverse), numerical[0])
    best = 1 / lab("fit_temperature")(logits, labels)
    assert abs(slope(logits, labels, best)) < 1e-4


# -- planted errors -------------------------------------------------------------------------------

SEEN_BY = {
    "log_sum_exp": test_the_shifted_log_sum_exp_is_exact_where_exponentials_overflow,
    "softmax": test_softmax_is_scipys_and_ratios_are_exponentials_of_differences,
    "cross_entropy": test_the_loss_from_logits_is_the_log_loss_of_scikit_learn_and_the_librarys,
    "cross_entropy_gradient": test_the_gradient_by_the_logits_is_probability_minus_truth,
    "cross_entropy_hessian": test_the_second_derivatives_are_the_covariance_of_the_drawn_class,
    "head_gradients": test_the_gradients_of_a_linear_head_are_those_of_finite_differences,
    "sigmoid": test_of_two_classes_only_the_difference_of_the_logits_counts,
    "binary_cross_entropy":
        test_the_repaired_binary_formula_is_the_log_loss_and_the_two_class_case,
    "binary_gradient": test_the_binary_gradient_is_probability_minus_label,
    "printed_loss": test_the_gradient_of_the_printed_formula_raises_every_logit,
    "printed_gradient": test_the_gradient_of_the_printed_formula_raises_every_logit,
    "squared_error": test_mean_squared_error_and_its_gradient,
    "squared_error_gradient": test_mean_squared_error_and_its_gradient,
    "squared_probability_gradient":
        test_squared_error_on_a_probability_fades_where_the_answer_is_wrong_and_sure,
    "backward": test_the_gradients_by_hand_are_those_of_finite_differences,
    "smoothing_gradient": lambda lab:
        test_label_smoothing_moves_the_target_and_the_gradient_with_it(lab, 0.1),
    "weighted_gradient": test_class_weights_scale_the_gradient_of_their_class,
    "Focal": test_the_labs_focal_loss_is_the_formula_and_cross_entropy_where_gamma_is_zero,
    "focal_gradient": test_the_focal_gradient_and_its_limits,
    "temperature_slope":
        test_at_the_best_temperature_the_expected_logit_is_that_of_the_right_class,
}  # fmt: skip


@pytest.mark.equation(
    "eq-losses-softmax",
    "eq-losses-logits",
    "eq-losses-gradient",
    "eq-losses-hessian",
    "eq-losses-head-gradient",
    "eq-losses-bce",
    "eq-losses-bce-gradient",
    "eq-losses-bce-printed",
    "eq-losses-mse-gradient",
    "eq-losses-squared-probability",
    "eq-losses-backprop",
    "eq-losses-smoothing-gradient",
    "eq-losses-weights-gradient",
    "eq-losses-focal",
    "eq-losses-focal-gradient",
    "eq-losses-temperature-slope",
)
@pytest.mark.parametrize("name", SEEN_BY)
def test_one_sign_turned_round_in_a_derivation_is_seen(name):
    assert_seen(SEEN_BY[name], LAB, name, **IMPORTED)
