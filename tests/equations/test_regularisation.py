"""The formulas of *Regularisation*, each computed in another way than the lab does."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from derivations import definitions, names_of
from flips import signs, with_one_sign_turned
from scipy import integrate, optimize, special, stats
from test_losses import close, slopes
from torch import nn

import transferkit as tk

LAB = "loss-math/regularisation"
IMPORTED = {"dataclass": dataclass, "log_softmax": special.log_softmax}


@pytest.fixture(scope="module")
def lab():
    """lab(name) gives what the lab calls so."""
    return names_of(definitions(LAB).values(), **IMPORTED)


# -- penalties and early stopping on a quadratic --------------------------------------------------


def quadratic(seed=0, width=4, rows=9):
    """Matrix H, minimum and start; `rows` below `width` gives directions without a slope."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, width))
    return x.T @ x / rows, random.normal(size=width), random.normal(size=width)


def energy(w, hessian, lowest):
    return 0.5 * (w - lowest) @ hessian @ (w - lowest)


@pytest.mark.equation("eq-regularisation-quadratic")
def test_a_loss_near_its_minimum_is_the_quadratic_up_to_a_cubic_error():
    x = np.random.default_rng(1).normal(size=(40, 3))
    y = np.arange(40) % 2

    def loss(w):
        return np.mean(np.logaddexp(0, x @ w) - y * (x @ w))

    lowest = optimize.minimize(loss, np.zeros(3), tol=1e-14).x
    hessian = np.array([slopes(lambda w, j=j: slopes(loss, w, 1e-3)[j], lowest, 1e-3)
                        for j in range(3)])  # fmt: skip
    way = np.array([0.3, -0.2, 0.5])
    gaps = [
        abs(loss(lowest + h * way) - loss(lowest) - energy(lowest + h * way, hessian, lowest))
        for h in (1.0, 0.25)
    ]
    assert gaps[1] < gaps[0] / 16  # the quadratic term itself falls by 16 only
    assert gaps[0] < 0.1 * energy(lowest + way, hessian, lowest)


@pytest.mark.equation(
    "eq-regularisation-objective", "eq-regularisation-system", "eq-regularisation-l2-share"
)
def test_the_penalised_minimum_is_found_by_a_minimiser_and_by_the_librarys_penalty(lab):
    for seed, weight in ((0, 0.3), (1, 2.0)):
        hessian, lowest, start = quadratic(seed, rows=9 - 6 * seed)
        expected = optimize.minimize(
            lambda w, h=hessian, m=lowest, s=start, a=weight: (
                energy(w, h, m) + a / 2 * ((w - s) ** 2).sum()
            ),
            start,
            tol=1e-13,
        ).x
        system = (hessian + weight * np.eye(4)) @ (expected - start)
        close(system, hessian @ (lowest - start), rel=1e-5, abs=1e-6)
        found = lab("penalised_minimum")(hessian, lowest, start, weight)
        close(found, expected, rel=1e-5, abs=1e-6)
        model = tk.Staged([("body", nn.Linear(4, 1, bias=False)), ("head", nn.Identity())])
        with torch.no_grad():
            model.body.weight.copy_(torch.from_numpy(start))
        objective = tk.l2_sp(tk.regression(), model, alpha=weight)
        with torch.no_grad():
            model.body.weight.copy_(torch.from_numpy(found))
        objective.penalty(model).backward()
        close(model.body.weight.grad[0], -hessian @ (found - lowest), rel=1e-9, abs=1e-12)


@pytest.mark.equation("eq-regularisation-l2-share")
def test_the_share_is_that_of_one_dimension(lab):
    kappa = np.array([0.0, 0.1, 1.0, 50.0])
    # one weight, minimum at 1, start at 0: the share is the place itself
    for weight in (0.1, 1.0):
        places = [
            optimize.minimize_scalar(lambda w, k=k, a=weight: k * (w - 1) ** 2 + a * w**2).x
            for k in kappa
        ]
        close(lab("l2_share")(kappa, weight), places, rel=1e-6, abs=1e-7)


@pytest.mark.equation("eq-regularisation-stopped-share")
def test_the_share_after_some_steps_is_what_gradient_descent_walks(lab):
    hessian, lowest, start = quadratic(2)
    kappa, vectors = np.linalg.eigh(hessian)
    w, rate = start.copy(), 0.9 / kappa.max()
    for steps in range(1, 30):
        w = w - rate * slopes(lambda at: energy(at, hessian, lowest), w)
        walked = (vectors.T @ (w - start)) / (vectors.T @ (lowest - start))
        close(lab("stopped_share")(kappa, rate, steps), walked, rel=1e-6, abs=1e-8)


@pytest.mark.equation("eq-regularisation-match")
def test_the_matching_weight_goes_exactly_as_far_and_tends_to_one_by_rate_times_steps(lab):
    for kappa, rate, steps in ((0.5, 0.3, 4), (0.02, 0.3, 10), (2.0, 0.1, 3)):
        place = 0.0
        for _ in range(steps):
            place -= rate * kappa * (place - 1)
        root = optimize.brentq(lambda a, k=kappa, p=place: k / (k + a) - p, 1e-9, 1e6, xtol=1e-13)
        close(lab("matching_weight")(kappa, rate, steps), root, rel=1e-7)
    close(lab("matching_weight")(1e-6, 0.1, 50), 1 / (0.1 * 50), rel=1e-4)


@pytest.mark.equation("eq-regularisation-ahead")
def test_stopping_goes_at_least_as_far_as_the_penalty_and_by_a_fifth_at_most():
    a = np.linspace(1e-6, 60, 200_001)
    gap = 1 / (1 + a) - np.exp(-a)
    assert gap.min() >= 0
    assert gap.max() == pytest.approx(0.2036, abs=1e-4)
    assert a[gap.argmax()] == pytest.approx(2.513, abs=1e-3)
    for steps in (1, 3, 20, 10_000):  # kappa * rate between 0 and 1
        share = np.linspace(0, 1, 1001)
        left = (1 - share) ** steps
        assert (left <= np.exp(-share * steps) + 1e-15).all()
        assert (1 - left >= share * steps / (share * steps + 1) - 1e-12).all()


# -- penalty or decay -----------------------------------------------------------------------------


@pytest.mark.equation("eq-regularisation-steps")
def test_the_two_rules_are_those_of_torch_and_equal_without_momentum(lab):
    random = np.random.default_rng(3)
    w, slope, rate, weight = random.normal(size=4), random.normal(size=4), 0.05, 0.7
    theirs = torch.tensor(w, requires_grad=True)
    theirs.grad = torch.tensor(slope)
    torch.optim.SGD([theirs], lr=rate, weight_decay=weight).step()
    close(lab("coupled_step")(w, slope, rate, weight), theirs.detach(), rel=1e-12)
    penalised = slopes(lambda v: slope @ v + weight / 2 * v @ v, w)
    close(lab("decoupled_step")(w, slope, rate, weight), w - rate * penalised, rel=1e-7)


@pytest.mark.equation("eq-regularisation-idle")
def test_a_weight_without_gradient_shrinks_by_the_product_and_nearly_by_the_exponential():
    w = torch.tensor([[3.0]], requires_grad=True)
    model = nn.Linear(1, 1, bias=False)
    model.weight = nn.Parameter(w.detach().clone())
    rates = [0.01 * factor for factor in (1, 2, 3, 4, 5)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.3)
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        model.weight.grad = torch.zeros(1, 1)
        optimizer.step()
    close(model.weight.item() / 3, math.prod(1 - 0.3 * rate for rate in rates), rel=1e-12)
    close(model.weight.item() / 3, math.exp(-0.3 * sum(rates)), rel=1e-3)


@pytest.mark.equation("eq-regularisation-adam-first")
@pytest.mark.parametrize("weight", [0.0, 0.5, 10.0])
def test_the_first_step_of_adam_is_the_sign_of_gradient_and_penalty(weight):
    w, slope = np.array([2.0, -1.0, 0.5]), np.array([3.0, 3.0, -0.2])
    theirs = torch.tensor(w, requires_grad=True)
    theirs.grad = torch.tensor(slope)
    torch.optim.Adam([theirs], lr=0.1, weight_decay=weight).step()
    close(theirs.detach(), w - 0.1 * np.sign(slope + weight * w), abs=1e-6)
    theirs = torch.tensor(w, requires_grad=True)
    theirs.grad = torch.tensor(slope)
    torch.optim.AdamW([theirs], lr=0.1, weight_decay=weight).step()
    close(theirs.detach(), (1 - 0.1 * weight) * w - 0.1 * np.sign(slope), abs=1e-6)


@pytest.mark.equation("eq-regularisation-scaled")
def test_with_a_fixed_scale_decay_ends_at_the_minimum_of_a_scaled_penalty(lab):
    hessian, lowest, start = quadratic(4)
    scale, weight, rate = np.array([0.2, 1.0, 3.0, 0.5]), 0.4, 0.02
    ends = []
    for decoupled in (True, False):
        w = start.copy()
        for _ in range(20_000):
            slope = hessian @ (w - lowest)
            step = (slope + (0 if decoupled else weight) * w) / scale
            w = w - rate * step - (rate * weight * w if decoupled else 0)
        ends.append(w)
    close(lab("scaled_minimum")(hessian, lowest, scale, weight), ends[0], rel=1e-8)
    expected = optimize.minimize(
        lambda w: energy(w, hessian, lowest) + weight / 2 * (scale * w**2).sum(), start, tol=1e-13
    ).x
    close(ends[0], expected, rel=1e-4, abs=1e-5)
    close(ends[1], lab("penalised_minimum")(hessian, lowest, 0 * start, weight), rel=1e-8)


# -- dropout --------------------------------------------------------------------------------------


def all_masks(width, rate):
    """Every mask of `width` units, in the scale of inverted dropout, with its probability."""
    for bits in np.ndindex(*[2] * width):
        kept = sum(bits)
        yield np.array(bits) / (1 - rate), (1 - rate) ** kept * rate ** (width - kept)


def linear_data(seed=5, n=8, width=4):
    random = np.random.default_rng(seed)
    return random.normal(size=(n, width)), random.normal(size=n), random.normal(size=width)


@pytest.mark.equation("eq-regularisation-mask", "eq-regularisation-spread")
def test_mean_and_variance_of_a_dropped_value_over_both_outcomes():
    for rate in (0.1, 0.5, 0.8):
        outcomes = [(mask[0] * 3.0, chance) for mask, chance in all_masks(1, rate)]
        mean = sum(value * chance for value, chance in outcomes)
        variance = sum((value - mean) ** 2 * chance for value, chance in outcomes)
        close(mean, 3.0, rel=1e-12)
        close(variance, 9 * rate / (1 - rate), rel=1e-12)
        squared = sum((5 - value) ** 2 * chance for value, chance in outcomes)
        close(squared, (5 - mean) ** 2 + variance, rel=1e-12)
    layer = nn.Dropout(0.25).train()
    assert set(layer(torch.ones(1000)).unique().tolist()) == {0.0, 1 / 0.75}


@pytest.mark.equation("eq-regularisation-dropout")
def test_the_loss_of_dropout_is_the_mean_over_every_mask(lab):
    x, y, w = linear_data()
    for rate in (0.1, 0.5):
        mean = sum(
            chance * np.mean([(t - (row * mask) @ w) ** 2 for row, t in zip(x, y, strict=True)])
            for mask, chance in all_masks(4, rate)
        )
        close(lab("dropout_loss")(w, x, y, rate), mean, rel=1e-12)


@pytest.mark.equation("eq-regularisation-dropout-minimum")
def test_the_minimum_of_dropout_is_where_the_mean_over_every_mask_is_least(lab):
    x, y, w = linear_data(6)
    for rate in (0.2, 0.6):
        masks = list(all_masks(4, rate))
        expected = optimize.minimize(
            lambda w, m=masks: sum(c * np.mean((y - (x * mask) @ w) ** 2) for mask, c in m),
            w,
            tol=1e-13,
        ).x
        close(lab("dropout_minimum")(x, y, rate), expected, rel=1e-5, abs=1e-6)
        lowest = np.linalg.lstsq(x, y, rcond=None)[0]
        close(lab("dropped")(x.T @ x / len(y), lowest, rate), expected, rel=1e-5, abs=1e-6)


@pytest.mark.equation("eq-regularisation-dropout-convex")
def test_the_mean_cross_entropy_over_every_mask_is_at_least_that_without_one():
    random = np.random.default_rng(7)
    for _ in range(20):
        x, weights = random.normal(size=4), 2 * random.normal(size=(3, 4))
        mean = sum(
            chance * (special.logsumexp(weights @ (x * mask)) - (weights @ (x * mask))[0])
            for mask, chance in all_masks(4, 0.3)
        )
        assert mean >= special.logsumexp(weights @ x) - (weights @ x)[0]


# -- changed labels -------------------------------------------------------------------------------


def two_labels(seed=8):
    random = np.random.default_rng(seed)
    z = 2 * random.normal(size=(6, 4))
    return z, np.array([0, 1, 2, 3, 1, 0]), np.array([2, 1, 0, 0, 3, 2])


@pytest.mark.equation("eq-regularisation-mixup", "eq-regularisation-linear-label")
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_loss_of_a_mixed_label_is_the_mixture_of_the_losses(lab, share):
    z, first, second = two_labels()
    each = [-special.log_softmax(z, axis=1)[np.arange(6), labels] for labels in (first, second)]
    expected = np.mean([share * a + (1 - share) * b for a, b in zip(*each, strict=True)])
    target = lab("mixed")(np.eye(4)[first], np.eye(4)[second], share)
    close(lab("target_loss")(z, target), expected, rel=1e-12)
    by_torch = nn.functional.cross_entropy(torch.tensor(z), torch.tensor(target))
    close(by_torch, expected, rel=1e-12)


@pytest.mark.equation("eq-regularisation-mixup")
def test_the_librarys_mixture_is_a_mixture_of_two_items_and_two_losses(lab):
    random = np.random.default_rng(9)
    x, y = torch.tensor(random.normal(size=(7, 3))), torch.tensor([0, 1, 0, 1, 1, 0, 1])
    model, seen = nn.Linear(3, 2), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.manual_seed(3)
    batch = tk.data.Batch(x, y, torch.arange(7))
    loss = tk.mixup(tk.classification(), alpha=1.0)(model, batch).mean()
    torch.manual_seed(3)  # the same draws again, by hand
    concentration = torch.full((), 1.0)
    share = float(torch.distributions.Beta(concentration, concentration).sample())
    partner = torch.randperm(7)
    close(seen[0], lab("mixed")(x.numpy(), x[partner].numpy(), share), rel=1e-6)
    target = lab("mixed")(np.eye(2)[y], np.eye(2)[y[partner]], share)
    close(loss.item(), lab("target_loss")(model(seen[0]).detach().numpy(), target), rel=1e-6)


@pytest.mark.equation("eq-regularisation-mixup-floor")
def test_the_loss_of_a_mixture_of_two_classes_is_at_least_the_entropy_of_the_shares():
    random = np.random.default_rng(10)
    for share in (0.05, 0.3, 0.5):
        floor = stats.entropy([share, 1 - share])
        for z in 5 * random.normal(size=(200, 4)):
            log_p = special.log_softmax(z)
            assert -share * log_p[0] - (1 - share) * log_p[1] >= floor
        best = np.array([math.log(share), math.log(1 - share), -50.0, -50.0])
        log_p = special.log_softmax(best)
        close(-share * log_p[0] - (1 - share) * log_p[1], floor, rel=1e-9)
    mean = integrate.quad(lambda share: stats.entropy([share, 1 - share]), 0, 1)[0]
    close(mean, 0.5, rel=1e-8)


@pytest.mark.equation("eq-regularisation-mixup-linear")
@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixing_shrinks_both_covariances_alike_and_leaves_least_squares_alone(lab, alpha):
    x, y, _ = linear_data(11, n=6, width=2)
    x, y = x - x.mean(axis=0), y - y.mean()
    shares, chances = special.roots_jacobi(12, alpha - 1, alpha - 1)
    shares, chances = (shares + 1) / 2, chances / chances.sum()  # exact for these polynomials
    gram, cross = np.zeros((2, 2)), np.zeros(2)
    for share, chance in zip(shares, chances, strict=True):
        for i in range(6):
            for j in range(6):
                row = share * x[i] + (1 - share) * x[j]
                gram += chance * np.outer(row, row) / 36
                cross += chance * row * (share * y[i] + (1 - share) * y[j]) / 36
    close(gram, lab("mixup_spread")(alpha) * x.T @ x / 6, rel=1e-9)
    close(cross, lab("mixup_spread")(alpha) * x.T @ y / 6, rel=1e-9)
    lowest = np.linalg.lstsq(x, y, rcond=None)[0]
    close(np.linalg.solve(gram, cross), lowest, rel=1e-9)

    def mixed_losses(line):  # of two errors, as the library has it; with an intercept
        total = 0.0
        for share, chance in zip(shares, chances, strict=True):
            said = (share * x[:, None] + (1 - share) * x) @ line[:2] + line[2]
            each = share * (said - y[:, None]) ** 2 + (1 - share) * (said - y) ** 2
            total += chance * each.mean()
        return total

    close(slopes(mixed_losses, np.r_[lowest, 0.0]), np.zeros(3), abs=1e-8)
    centre = np.array([2.0, -1.0])  # not centred: the same weights, the intercept moves along
    x, y = x + centre, y + 3.0
    close(slopes(mixed_losses, np.r_[lowest, 3.0 - lowest @ centre]), np.zeros(3), abs=1e-8)


@pytest.mark.equation("eq-regularisation-smoothing")
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5])
def test_smoothing_is_cross_entropy_and_a_divergence_from_the_even_answer(lab, epsilon):
    z, labels, _ = two_labels(12)
    even = np.full(4, 1 / 4)
    p = special.softmax(z, axis=1)
    expected = np.mean([
        (1 - epsilon) * -math.log(row[label]) + epsilon * (stats.entropy(even, row) + math.log(4))
        for row, label in zip(p, labels, strict=True)
    ])  # fmt: skip
    close(lab("smoothed_as_penalty")(z, labels, epsilon), expected, rel=1e-10)
    by_torch = nn.functional.cross_entropy(
        torch.tensor(z), torch.tensor(labels), label_smoothing=epsilon
    )
    close(by_torch, expected, rel=1e-10)


# -- adversarial training -------------------------------------------------------------------------


@pytest.mark.equation("eq-regularisation-dual", "eq-regularisation-fgm")
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_no_move_in_the_ball_raises_a_linear_function_more(lab, norm):
    random = np.random.default_rng(13)
    slope, radius = random.normal(size=3), 0.7
    move = lab("worst_move")(slope, radius, norm)
    length = np.abs(move).max() if norm == "linf" else np.linalg.norm(move)
    close(length, radius, rel=1e-12)
    if norm == "linf":  # a linear function is largest at a corner
        corners = radius * (2 * np.array(list(np.ndindex(2, 2, 2))) - 1)
        best = (corners @ slope).max()
    else:
        place = optimize.minimize(lambda d: -slope @ d / np.linalg.norm(d), np.ones(3), tol=1e-12)
        best = -radius * place.fun
    close(slope @ move, best, rel=1e-7)
    close(lab("dual_norm")(slope, norm) * radius, best, rel=1e-7)
    inputs = torch.tensor(random.normal(size=(1, 3)))
    model = nn.Linear(3, 2)
    batch = tk.data.Batch(inputs, torch.tensor([0]), torch.arange(1))
    by_library = tk.adversarial(tk.classification(), radius, norm=norm).perturbation(model, batch)
    inputs.requires_grad_()
    nn.functional.cross_entropy(model(inputs), torch.tensor([0])).backward()
    ours = lab("worst_move")(inputs.grad[0].numpy(), radius, norm)
    close(by_library[0], ours, rel=1e-9)


def logistic_case(seed=14):
    random = np.random.default_rng(seed)
    return random.normal(size=3), 0.4, random.normal(size=(6, 3)), np.array([1, -1, 1, 1, -1, -1])


@pytest.mark.equation("eq-regularisation-worst-linear")
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_worst_loss_of_a_linear_model_is_the_best_of_a_search(lab, norm):
    w, b, x, y = logistic_case()
    radius, total = 0.3, 0.0
    for row, label in zip(x, y, strict=True):
        if norm == "linf":
            moves = radius * (2 * np.array(list(np.ndindex(2, 2, 2))) - 1)
        else:
            angles = np.random.default_rng(15).normal(size=(200_000, 3))
            moves = radius * angles / np.linalg.norm(angles, axis=1, keepdims=True)
        total += np.logaddexp(0, -label * ((row + moves) @ w + b)).max()
    close(lab("worst_linear_loss")(w, b, x, y, radius, norm), total / 6, rel=1e-4)


@pytest.mark.equation("eq-regularisation-distance")
def test_an_answer_can_be_changed_exactly_if_the_boundary_is_within_the_radius(lab):
    w, b, x, _ = logistic_case(16)
    for row in x:
        z = row @ w + b
        # the nearest point of the boundary, by Lagrange's conditions
        system = np.block([[np.eye(3), w[:, None]], [w[None], np.zeros((1, 1))]])
        nearest = np.linalg.solve(system, np.r_[row, -b])[:3]
        distance = np.linalg.norm(nearest - row)
        close(distance, abs(z) / np.linalg.norm(w), rel=1e-9)
        for radius, changed in ((0.99 * distance, False), (1.01 * distance, True)):
            move = lab("worst_move")(-np.sign(z) * w, radius, "l2")
            assert (np.sign((row + move) @ w + b) != np.sign(z)) == changed


@pytest.mark.equation("eq-regularisation-project")
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_projection_is_the_nearest_point_of_the_ball(lab, norm):
    random = np.random.default_rng(17)
    for move in 2 * random.normal(size=(10, 3)):
        found = lab("project")(move, 1.0, norm)
        inside = random.uniform(-1, 1, size=(20_000, 3))
        if norm == "l2":
            inside = inside[np.linalg.norm(inside, axis=1) <= 1]
        length = np.abs(found).max() if norm == "linf" else np.linalg.norm(found)
        assert length <= 1 + 1e-12
        nearest = np.linalg.norm(inside - move, axis=1).min()
        assert nearest >= np.linalg.norm(found - move) - 1e-12
    close(lab("project")(np.array([0.1, -0.2, 0.3]), 1.0, norm), [0.1, -0.2, 0.3], rel=1e-12)


@pytest.mark.equation("eq-regularisation-pgd")
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_projected_ascent_ends_where_a_constrained_search_does(lab, norm):
    centre = np.array([1.5, -0.2])  # a concave hill whose top lies outside the ball
    height = lambda d: -np.sum((d - centre) ** 2 * [1.0, 3.0])  # noqa: E731
    slope = lambda d: slopes(height, d)  # noqa: E731
    found = lab("climb")(slope, np.array([0.3, 0.4]), 1.0, norm, 0.002, 3000)
    rule = {"l2": lambda d: 1 - d @ d, "linf": lambda d: 1 - np.abs(d)}[norm]
    best = optimize.minimize(
        lambda d: -height(d), np.zeros(2), constraints={"type": "ineq", "fun": rule}, tol=1e-12
    )
    close(height(found), -best.fun, rel=2e-2)


def searched_worst(w, b, x, y, radius, norm):
    """The mean worst loss by trying every corner, or by a search that may leave no ball."""
    if norm == "linf":
        corners = radius * (2 * np.array(list(np.ndindex(2, 2, 2))) - 1)
        every = np.logaddexp(0, -y[:, None] * ((x[:, None] + corners) @ w + b))
        return every.max(axis=1).mean()
    inside = {"type": "ineq", "fun": lambda move: radius**2 - move @ move}
    found = [
        optimize.minimize(
            lambda move, row=row, label=label: label * ((row + move) @ w + b),
            np.zeros(3),
            constraints=inside,
            tol=1e-13,
        ).fun
        for row, label in zip(x, y, strict=True)
    ]
    return np.logaddexp(0, -np.array(found)).mean()


@pytest.mark.equation("eq-regularisation-danskin")
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_slope_of_the_worst_loss_is_that_at_the_worst_move(lab, norm):
    w, b, x, y = logistic_case(18)
    moves = np.array([lab("worst_move")(-label * w, 0.3, norm) for label in y])
    held = slopes(lambda v: np.mean(np.logaddexp(0, -y * ((x + moves) @ v + b))), w)
    whole = slopes(lambda v: lab("worst_linear_loss")(v, b, x, y, 0.3, norm), w)
    close(held, whole, rel=1e-6)
    searched = slopes(lambda v: searched_worst(v, b, x, y, 0.3, norm), w, 1e-4)
    close(held, searched, rel=1e-5)


# -- planted errors -------------------------------------------------------------------------------

SEEN_BY = {
    "l2_share": test_the_share_is_that_of_one_dimension,
    "stopped_share": test_the_share_after_some_steps_is_what_gradient_descent_walks,
    "penalised_minimum":
        test_the_penalised_minimum_is_found_by_a_minimiser_and_by_the_librarys_penalty,
    "matching_weight":
        test_the_matching_weight_goes_exactly_as_far_and_tends_to_one_by_rate_times_steps,
    "coupled_step": test_the_two_rules_are_those_of_torch_and_equal_without_momentum,
    "decoupled_step": test_the_two_rules_are_those_of_torch_and_equal_without_momentum,
    "scaled_minimum": test_with_a_fixed_scale_decay_ends_at_the_minimum_of_a_scaled_penalty,
    "dropout_loss": test_the_loss_of_dropout_is_the_mean_over_every_mask,
    "dropout_minimum":
        test_the_minimum_of_dropout_is_where_the_mean_over_every_mask_is_least,
    "mixed": lambda lab: test_the_loss_of_a_mixed_label_is_the_mixture_of_the_losses(lab, 0.3),
    "target_loss":
        lambda lab: test_the_loss_of_a_mixed_label_is_the_mixture_of_the_losses(lab, 0.3),
    "mixup_spread": lambda lab:
        test_mixing_shrinks_both_covariances_alike_and_leaves_least_squares_alone(lab, 0.2),
    "smoothed_as_penalty": lambda lab:
        test_smoothing_is_cross_entropy_and_a_divergence_from_the_even_answer(lab, 0.1),
    "worst_linear_loss": lambda lab:
        test_the_worst_loss_of_a_linear_model_is_the_best_of_a_search(lab, "linf"),
    "project": lambda lab: test_the_projection_is_the_nearest_point_of_the_ball(lab, "linf"),
    "climb": lambda lab: test_projected_ascent_ends_where_a_constrained_search_does(lab, "l2"),
}  # fmt: skip

PLANTED = [(name, at) for name in SEEN_BY for at, _ in enumerate(signs(definitions(LAB)[name]))]


@pytest.mark.equation("eq-regularisation-l2-share", "eq-regularisation-fgm")
def test_every_derivation_with_a_sign_is_among_those_that_are_broken():
    pure = {name for name, node in definitions(LAB).items() if any(True for _ in signs(node))}
    tools = {"squares", "error", "stopped", "dropped", "parity", "tune", "moved", "pixels",
             "attacked", "shaken", "first_step", "with_temperature"}  # fmt: skip
    assert pure - tools <= set(SEEN_BY)
    assert all(any(name == planted for planted, _ in PLANTED) for name in SEEN_BY)


@pytest.mark.equation(
    "eq-regularisation-l2-share",
    "eq-regularisation-stopped-share",
    "eq-regularisation-match",
    "eq-regularisation-steps",
    "eq-regularisation-scaled",
    "eq-regularisation-dropout",
    "eq-regularisation-dropout-minimum",
    "eq-regularisation-linear-label",
    "eq-regularisation-mixup-linear",
    "eq-regularisation-smoothing",
    "eq-regularisation-worst-linear",
    "eq-regularisation-project",
    "eq-regularisation-pgd",
)
@pytest.mark.parametrize(("name", "at"), PLANTED, ids=[f"{n}-{at}" for n, at in PLANTED])
def test_one_sign_turned_round_in_a_derivation_is_seen(name, at):
    nodes = definitions(LAB)
    tree = list(with_one_sign_turned(nodes[name]))[at]
    broken = names_of((nodes | {name: tree}).values(), **IMPORTED)
    with np.errstate(all="ignore"), pytest.raises((AssertionError, ValueError)):
        SEEN_BY[name](broken)
