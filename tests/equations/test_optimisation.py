"""The formulas of *Optimisation*: the lab's rules against torch's, closed forms and sums."""

import math

import numpy as np
import pytest
import torch
from derivations import definitions, names_of
from flips import assert_seen
from scipy import optimize, stats
from torch import nn

import transferkit as tk

LAB = "loss-math/optimisation"
IMPORTED = {"SEED": 0, "BATCH": 16}


# -- the lab's functions, and the same with one sign turned round ---------------------------------


@pytest.fixture(scope="module")
def lab():
    """lab(name) gives what the lab calls so."""
    return names_of(definitions(LAB).values(), **IMPORTED)


def close(ours, expected, rel=1e-10, abs=1e-12):
    assert np.asarray(ours) == pytest.approx(np.asarray(expected), rel=rel, abs=abs)


# -- descent in a valley --------------------------------------------------------------------------


@pytest.mark.equation("eq-optimisation-shrink")
def test_each_error_shrinks_by_its_own_factor_and_in_any_basis(lab):
    curvatures, start = np.array([0.3, 1.0, 4.0]), np.array([1.0, -2.0, 0.5])
    path = lab("descend")(curvatures, start, 0.2, 12)
    powers = np.arange(13)[:, None]
    close(path, (1 - 0.2 * curvatures) ** powers * start)
    # the same by autograd on a rotated quadratic whose minimum is elsewhere
    turn = stats.ortho_group.rvs(3, random_state=0)
    hessian, minimum = turn @ np.diag(curvatures) @ turn.T, np.array([2.0, 0.0, -1.0])
    weight = torch.tensor(minimum + turn @ start, requires_grad=True)
    for row in path:
        error = weight - torch.tensor(minimum)
        close(turn.T @ error.detach().numpy(), row)
        (gradient,) = torch.autograd.grad(error @ torch.tensor(hessian) @ error / 2, weight)
        weight = (weight - 0.2 * gradient).detach().requires_grad_()


@pytest.mark.equation("eq-optimisation-best-rate")
@pytest.mark.parametrize(("low", "high"), [(1.0, 100.0), (0.2, 3.0), (2.0, 2.5)])
def test_no_rate_of_many_has_a_smaller_worst_factor(lab, low, high):
    rate, factor = lab("best_rate")(low, high)

    def worst(lr):
        return max(abs(1 - lr * kappa) for kappa in np.linspace(low, high, 9))

    found = optimize.minimize_scalar(worst, bounds=(0, 3 / high), method="bounded",
                                     options={"xatol": 1e-12})  # fmt: skip
    close([rate, factor], [found.x, found.fun], rel=1e-6)
    condition = high / low
    close(factor, (condition - 1) / (condition + 1))


def companion(lr, beta, kappa):
    """What one step of momentum does to (error now, error before)."""
    return np.array([[1 + beta - lr * kappa, -beta], [1.0, 0.0]])


@pytest.mark.equation("eq-optimisation-characteristic")
@pytest.mark.parametrize(("lr", "beta"), [(0.1, 0.0), (0.3, 0.5), (0.02, 0.9)])
def test_the_error_obeys_the_equation_of_two_steps_back(lab, lr, beta):
    kappa = 1.7
    errors = lab("descend")(np.array([kappa]), [1.3], lr, 30, beta)[:, 0]
    close(errors[2:], (1 + beta - lr * kappa) * errors[1:-1] - beta * errors[:-2])
    pair = np.array([errors[1], errors[0]])
    close(np.linalg.matrix_power(companion(lr, beta, kappa), 29) @ pair, errors[30:28:-1])
    roots = np.roots([1, -(1 + beta - lr * kappa), beta])
    expected = np.linalg.eigvals(companion(lr, beta, kappa))
    close(sorted(np.abs(roots)), sorted(np.abs(expected)), rel=1e-7)


@pytest.mark.equation("eq-optimisation-window")
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_inside_the_window_both_roots_have_the_size_of_the_root_of_beta_outside_one_is_larger(beta):
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    for product in np.linspace(0.01, 4, 57):
        sizes = np.abs(np.linalg.eigvals(companion(product, beta, 1.0)))
        if low < product < high:
            close(sizes, np.full(2, math.sqrt(beta)))
        else:
            assert sizes.max() > math.sqrt(beta) > sizes.min()


@pytest.mark.equation("eq-optimisation-best-momentum")
@pytest.mark.parametrize(("low", "high"), [(1.0, 100.0), (0.2, 3.0)])
def test_no_rate_and_momentum_of_many_have_a_smaller_worst_factor(lab, low, high):
    rate, beta, factor = lab("best_with_momentum")(low, high)

    def worst(lr, beta):
        kappas = np.linspace(low, high, 21)
        return max(abs(np.linalg.eigvals(companion(lr, beta, k))).max() for k in kappas)

    close(worst(rate, beta), factor, rel=1e-6)
    tried = [
        worst(lr, b)
        for lr in rate * np.geomspace(0.5, 2, 17)
        for b in np.clip(beta + np.linspace(-0.2, 0.2, 17), 0, 0.999)
    ]
    assert min(tried) > factor - 1e-6
    root = math.sqrt(high / low)
    close(factor, (root - 1) / (root + 1))


@pytest.mark.equation("eq-optimisation-best-momentum")
def test_a_worst_factor_allows_no_larger_condition_number_than_the_proof_says():
    random = np.random.default_rng(9)
    for _ in range(2000):
        beta, low, high = random.uniform(-0.5, 1), random.uniform(0, 1), random.uniform(1, 4)
        worst = max(abs(np.linalg.eigvals(companion(1.0, beta, k))).max() for k in (low, high))
        if worst < 1:
            smallest = (1 - worst) * (1 - beta / worst)
            assert low >= smallest - 1e-12
            assert high <= (1 + worst) * (1 + beta / worst) + 1e-12
            assert high / low <= ((1 + worst) / (1 - worst)) ** 2 * (1 + 1e-9)


@pytest.mark.equation("eq-optimisation-momentum", "eq-optimisation-terminal")
def test_momentum_is_torchs_and_moves_at_last_by_the_rate_over_one_minus_beta(lab):
    gradients = np.random.default_rng(0).normal(size=(20, 3, 4))
    against_torch(lab("momentum"), {"lr": 0.07, "beta": 0.8}, gradients,
                  lambda p: torch.optim.SGD(p, lr=0.07, momentum=0.8))  # fmt: skip
    against_torch(lab("sgd"), {"lr": 0.07}, gradients, lambda p: torch.optim.SGD(p, lr=0.07))
    w, state = np.zeros(1), {}
    for _ in range(300):
        before, w = w, lab("momentum")(w, np.array([2.5]), state, lr=0.01, beta=0.9)
    close(before - w, [0.01 / (1 - 0.9) * 2.5], rel=1e-9)


@pytest.mark.equation("eq-optimisation-noise")
@pytest.mark.parametrize(("lr", "kappa", "variance"), [(0.1, 1.0, 1.0), (0.5, 3.0, 0.2)])
def test_the_noise_floor_is_where_the_mean_square_stays(lab, lr, kappa, variance):
    mean_square = 7.0
    for _ in range(2000):  # E[((1 - lr kappa) e - lr noise)^2], the noise independent of e
        mean_square = (1 - lr * kappa) ** 2 * mean_square + lr**2 * variance
    close(lab("noise_floor")(lr, kappa, variance), mean_square, rel=1e-9)
    random = np.random.default_rng(1)
    errors = np.zeros(20_000)
    for _ in range(150):
        noise = math.sqrt(variance) * random.normal(size=len(errors))
        errors -= lr * (kappa * errors + noise)
    close((errors**2).mean(), mean_square, rel=0.05)


# -- rules that remember --------------------------------------------------------------------------


def against_torch(ours, settings, gradients, make):
    """Our rule and torch's, fed the same gradients: equal after every step."""
    start = np.random.default_rng(5).normal(size=gradients.shape[1:])
    w, state, weight = start, {}, nn.Parameter(torch.tensor(start))
    optimiser = make([weight])
    for g in gradients:
        w = ours(w, g, state, **settings)
        weight.grad = torch.tensor(g)
        optimiser.step()
        close(w, weight.detach().numpy())


def gradients(steps=25, shape=(3, 4), seed=2):
    return np.random.default_rng(seed).normal(size=(steps, *shape)) * np.geomspace(
        0.01, 10, shape[-1]
    )


@pytest.mark.equation("eq-optimisation-adam", "eq-optimisation-l2")
@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_adam_is_torchs_with_and_without_a_penalty_in_the_gradient(lab, penalty):
    settings = {"lr": 0.02, "penalty": penalty, "eps": 1e-5}
    theirs = {"lr": 0.02, "weight_decay": penalty, "eps": 1e-5}
    against_torch(lab("adam"), settings, gradients(), lambda p: torch.optim.Adam(p, **theirs))


@pytest.mark.equation("eq-optimisation-l2")
def test_adamw_is_torchs_and_not_adam_with_the_same_penalty(lab):
    against_torch(lab("adamw"), {"lr": 0.02, "decay": 0.3}, gradients(),
                  lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.3))  # fmt: skip
    w, g = np.array([1.0, -2.0]), np.array([3.0, 0.5])
    apart = lab("adamw")(w, g, {}, 0.1, decay=0.3) - lab("adam")(w, g, {}, 0.1, penalty=0.3)
    # at the first step the penalty changes no sign of a gradient, so Adam does not see it
    close(apart, [-0.1 * 0.3 * 1.0, 0.1 * 0.3 * 2.0 - 2 * 0.1], abs=1e-6)


@pytest.mark.equation("eq-optimisation-unroll", "eq-optimisation-bias")
@pytest.mark.parametrize("beta", [0.9, 0.999])
def test_the_running_mean_is_a_weighted_sum_whose_weights_add_up_to_the_correction(beta):
    g = np.random.default_rng(3).normal(size=40)
    running = 0.0
    for t, value in enumerate(g, 1):
        running = beta * running + (1 - beta) * value
        weights = (1 - beta) * beta ** np.arange(t - 1, -1, -1)
        close(running, weights @ g[:t])
        close(weights.sum(), 1 - beta**t)
    kept = []
    for seed in range(3000):  # over many runs the corrected mean of squares is that of one gradient
        s, noise = 0.0, 1.5 * np.random.default_rng(seed).normal(size=5)
        for value in noise:
            s = beta * s + (1 - beta) * value**2
        kept.append(s / (1 - beta**5))
    close(np.mean(kept), 1.5**2, rel=0.05)


@pytest.mark.equation("eq-optimisation-first-step")
def test_the_first_step_is_the_rate_whatever_the_gradient_is(lab):
    g = np.array([1e-3, -5.0, 2e4, -1e-8])
    step = lab("adam")(np.zeros(4), g, {}, 0.1)
    close(step, -0.1 * g / (np.abs(g) + 1e-8))
    close(step[:3], -0.1 * np.sign(g[:3]), rel=2e-5)
    close(step[3], 0.05)
    uncorrected = 0.1 * 0.1 * 3.0 / math.sqrt(0.001 * 3.0**2)
    close(uncorrected, math.sqrt(10) * 0.1)


@pytest.mark.equation("eq-optimisation-cauchy")
@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.999), (0.5, 0.9)])
def test_the_running_mean_is_at_most_the_root_of_that_of_squares_times_a_constant(beta1, beta2):
    random = np.random.default_rng(8)
    for _ in range(50):
        g = random.normal(size=60) * np.exp(3 * random.normal(size=60))
        back = np.arange(59, -1, -1)
        m = abs(((1 - beta1) * beta1**back * g).sum())
        root = math.sqrt(((1 - beta2) * beta2**back * g**2).sum())
        middle = (1 - beta1) * (beta1**back * abs(g)).sum()
        assert m <= middle
        assert middle <= (1 - beta1) * root / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))


@pytest.mark.equation("eq-optimisation-adam-bound")
@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.999), (0.5, 0.9)])
def test_no_step_of_adam_is_larger_than_the_bound_and_one_series_comes_near(lab, beta1, beta2):
    bound = (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))

    def steps(series):
        w, state, sizes = np.zeros(1), {}, []
        for g in series:
            before = w
            w = lab("adam")(w, np.array([g]), state, 1.0, beta1=beta1, beta2=beta2, eps=0.0)
            sizes.append(abs(float((w - before)[0])))
        return sizes

    random = np.random.default_rng(4)
    for scale in (0.0, 1.0, 5.0):
        assert max(steps(random.normal(size=200) * np.exp(scale * random.normal(size=200)))) < bound
    worst = (beta1 / beta2) ** np.arange(399, -1, -1.0)
    assert 0.8 * bound < steps(np.r_[np.full(4000, 1e-120), worst])[-1] <= bound * (1 + 1e-9)


@pytest.mark.equation("eq-optimisation-stuck")
def test_rates_that_shrink_by_a_factor_leave_every_weight_in_a_box(lab):
    lr, factor = 1e-2, 0.9
    rates = lr * factor ** np.arange(400)
    close(rates.sum(), lr / (1 - factor), rel=1e-9)
    w, state = np.array([100.0, -40.0]), {}
    start = w
    for rate in rates:
        w = lab("adam")(w, 2 * w, state, rate)
    c = 0.1 / math.sqrt(0.001 * (1 - 0.81 / 0.999))
    assert (np.abs(w - start) <= c * lr / (1 - factor)).all()
    assert (np.abs(w) > 39).all()  # it has stopped, and nowhere near the minimum at zero


@pytest.mark.equation("eq-optimisation-output")
@pytest.mark.parametrize("width", [4, 64])
def test_adams_first_step_moves_a_logit_by_the_rate_times_the_sum_of_features(width):
    features, head = torch.randn(1, width), nn.Linear(width, 3, bias=False)
    optimiser = torch.optim.Adam(head.parameters(), lr=1e-3, eps=1e-30)
    before = head(features)
    nn.functional.cross_entropy(before, torch.tensor([1])).backward()
    g = before.detach().softmax(1)[0] - torch.tensor([0.0, 1.0, 0.0])
    plain = before.detach() - 0.1 * g * features.square().sum()
    optimiser.step()
    moved = (head(features) - before)[0].detach()
    close(moved, -1e-3 * g.sign() * features.abs().sum(), rel=1e-8)
    with torch.no_grad():
        head.weight.add_(1e-3 * g.sign()[:, None] * features.sign())  # back where it was
        head.weight.sub_(0.1 * head.weight.grad)
    close(head(features).detach(), plain, rel=1e-8)


@pytest.mark.equation("eq-optimisation-left")
def test_decoupled_decay_shrinks_the_mean_by_the_same_factor_whatever_the_noise(lab):
    for scale in (0.01, 1.0, 100.0):
        # pairs of opposite noise: their mean keeps only what the decay does
        noise = scale * np.random.default_rng(6).normal(size=(50, 200))
        total = np.zeros((2, 200))
        for row, sign in enumerate((1, -1)):
            w, state = np.ones(200), {}
            for g in noise:
                w = lab("adamw")(w, sign * g, state, 0.01, decay=0.5)
            total[row] = w
        close(total.mean(axis=0), np.full(200, (1 - 0.01 * 0.5) ** 50), rel=1e-9)


# -- a second moment in two vectors ---------------------------------------------------------------


@pytest.mark.equation("eq-optimisation-factored")
def test_the_product_keeps_row_and_column_means_and_is_the_nearest_by_divergence():
    v = np.random.default_rng(7).gamma(1.0, size=(3, 4))
    rows, columns = v.mean(axis=1, keepdims=True), v.mean(axis=0, keepdims=True)
    product = rows @ columns / rows.mean()
    close(product.mean(axis=1, keepdims=True), rows)
    close(product.mean(axis=0, keepdims=True), columns)
    outer = np.outer([1.0, 2.0, 5.0], [3.0, 0.1, 1.0, 2.0])  # of rank one: nothing is lost
    again = outer.mean(axis=1, keepdims=True) * outer.mean(axis=0) / outer.mean()
    close(again, outer)

    def divergence(logs):
        w = np.exp(logs[:3, None] + logs[None, 3:])
        return (v * np.log(v / w) - v + w).sum()

    found = optimize.minimize(divergence, np.zeros(7), tol=1e-14)
    close(np.exp(found.x[:3, None] + found.x[None, 3:]), product, rel=1e-4)


@pytest.mark.equation("eq-optimisation-adafactor")
@pytest.mark.parametrize("lr", [0.01, 0.5])
def test_adafactor_is_torchs(lab, lr):
    growing = gradients(8) * np.geomspace(1, 1e4, 8)[:, None, None]  # the clipping has to act
    for series in (gradients(30), growing):
        against_torch(
            lab("adafactor"), {"lr": lr}, series, lambda p: torch.optim.Adafactor(p, lr=lr)
        )


@pytest.mark.equation("eq-optimisation-memory")
@pytest.mark.parametrize("shape", [(30, 50), (7,), (2, 3, 4)])
def test_what_is_remembered_is_what_torch_holds(lab, shape):
    makes = {
        "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
        "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "AdamW": torch.optim.AdamW,
        "Adafactor": torch.optim.Adafactor,
    }
    for rule, make in makes.items():
        weight = nn.Parameter(torch.ones(shape))
        weight.grad = torch.ones(shape)
        optimiser = make([weight])
        optimiser.step()
        values = [v for v in optimiser.state[weight].values() if torch.is_tensor(v) and v.dim()]
        if rule == "Adafactor" and len(shape) > 2:
            assert sum(v.numel() for v in values) == 2 * 3 + 2 * 4
        assert lab("remembered")(shape, rule) == sum(v.numel() for v in values)


# -- schedules, layers, the finder ----------------------------------------------------------------


@pytest.mark.equation("eq-optimisation-schedule", "eq-optimisation-area")
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("updates", [1, 10, 77])
def test_the_schedule_is_torchs_and_its_sum_does_not_depend_on_the_warm_up(warmup, updates):
    rising = math.ceil(warmup * updates)
    falling = updates - rising
    torchs = torch.optim.lr_scheduler
    for kind in ("linear", "cosine"):
        optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        if kind == "linear":
            schedule = torchs.LinearLR(optimiser, 1.0, 1e-300, total_iters=max(1, falling))
        else:
            schedule = torchs.CosineAnnealingLR(optimiser, T_max=max(1, falling))
        expected = [(at + 1) / (rising + 1) for at in range(rising)]
        for _ in range(falling):
            expected.append(optimiser.param_groups[0]["lr"])
            optimiser.step()
            schedule.step()
        ours = [tk.optim.factor(kind, at, updates, warmup) for at in range(updates)]
        close(ours, expected, rel=1e-9)
        close(sum(ours), (updates + 1) / 2 if falling else updates / 2, rel=1e-9)


@pytest.mark.equation("eq-optimisation-layers")
def test_layer_decay_gives_each_layer_its_power_of_the_factor():
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(4)])
    parts = tk.optim.parameter_groups(tk.layers.groups(model), lr=0.1, layer_decay=0.5)
    rates = {name: part["lr"] for part in parts for name in part["names"]}
    close([rates[f"{at}.weight"] for at in range(4)], [0.0125, 0.025, 0.05, 0.1])


@pytest.mark.equation("eq-optimisation-finder")
def test_the_finder_multiplies_the_rate_by_the_same_factor_from_update_to_update():
    data = torch.randn(64, 4), torch.arange(64) % 2
    found = tk.lr_find(nn.Linear(4, 2), tk.classification(), data, updates=20, low=1e-6, high=1e-2,
                       device="cpu", precision="fp32")  # fmt: skip
    close(
        found.rates, [1e-6 * (1e-2 / 1e-6) ** (i / 19) for i in range(len(found.rates))], rel=1e-9
    )


# -- planted errors -------------------------------------------------------------------------------

# A turned sign gives another number, none at all, or a complex one, which cannot be compared.
SEEN = (AssertionError, ZeroDivisionError, TypeError)
SEEN_BY = {
    "descend": test_each_error_shrinks_by_its_own_factor_and_in_any_basis,
    "best_rate": lambda lab: test_no_rate_of_many_has_a_smaller_worst_factor(lab, 1.0, 100.0),
    "best_with_momentum":
        lambda lab: test_no_rate_and_momentum_of_many_have_a_smaller_worst_factor(lab, 0.2, 3.0),
    "noise_floor":
        lambda lab: test_the_noise_floor_is_where_the_mean_square_stays(lab, 0.5, 3.0, 0.2),
    "sgd": test_momentum_is_torchs_and_moves_at_last_by_the_rate_over_one_minus_beta,
    "momentum": test_momentum_is_torchs_and_moves_at_last_by_the_rate_over_one_minus_beta,
    "adam":
        lambda lab: test_adam_is_torchs_with_and_without_a_penalty_in_the_gradient(lab, 0.3),
    "adamw": test_adamw_is_torchs_and_not_adam_with_the_same_penalty,
    "adafactor": lambda lab: test_adafactor_is_torchs(lab, 0.5),
}  # fmt: skip


@pytest.mark.equation(
    "eq-optimisation-shrink",
    "eq-optimisation-best-rate",
    "eq-optimisation-best-momentum",
    "eq-optimisation-noise",
    "eq-optimisation-momentum",
    "eq-optimisation-adam",
    "eq-optimisation-l2",
    "eq-optimisation-adafactor",
)
@pytest.mark.parametrize("name", SEEN_BY)
def test_one_sign_turned_round_in_a_derivation_is_seen(name):
    assert_seen(SEEN_BY[name], LAB, name, SEEN, **IMPORTED)
