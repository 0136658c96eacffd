"""The formulas of the chapter on the objective, each computed in another way than the lab does."""

import ast
import copy
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.special
import scipy.stats
import torch
from flips import signs, with_one_sign_turned
from torch import nn
from torch.nn import functional as F

import transferkit as tk

LAB = Path(__file__).parents[2] / "notebooks" / "loss-math" / "objective.ipynb"
IMPORTS = "import numpy as np\nfrom scipy.special import log_softmax, softmax\n"


def source_of(name):
    """The cell of the lab that defines the function and nothing else."""
    cells = json.loads(LAB.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    (source,) = [source for source in sources if source.startswith(f"def {name}(")]
    return source


def made_from(source):
    names = {}
    exec(IMPORTS + source, names)
    return names[ast.parse(source).body[0].name]


def of_the_lab(name):
    return made_from(source_of(name))


def network(seed=0, n=7):
    """Inputs, labels, (W, b) and (V, c) of a small network, nothing in it zero."""
    random = np.random.default_rng(seed)
    x, y = random.normal(size=(n, 4)), random.integers(0, 3, n)
    theta = (random.normal(size=(5, 4)), random.normal(size=5))
    phi = (random.normal(size=(3, 5)), random.normal(size=3))
    return x, y, theta, phi


def loss_by_loops(x, y, parts):
    """The mean loss from the definitions alone, for real or complex parameters."""
    w, b, v, c = parts
    total = 0.0
    for row, label in zip(x, y, strict=True):
        f = [np.tanh(sum(w[k, j] * row[j] for j in range(4)) + b[k]) for k in range(5)]
        z = [sum(v[a, k] * f[k] for k in range(5)) + c[a] for a in range(3)]
        total += -np.log(np.exp(z[label]) / sum(np.exp(value) for value in z))
    return total / len(y)


def by_complex_steps(x, y, parts):
    """Gradients by L(w + ih).imag / h, which subtracts nothing and so loses no digit."""
    found = []
    for place, part in enumerate(parts):
        slopes = np.zeros(part.shape)
        for index in np.ndindex(part.shape):
            moved = [array.astype(complex) for array in parts]
            moved[place][index] += 1e-30j
            slopes[index] = loss_by_loops(x, y, moved).imag / 1e-30
        found.append(slopes)
    return found


def regression(seed=0, n=9, width=4):
    random = np.random.default_rng(seed)
    x, start = random.normal(size=(n, width)), random.normal(size=width)
    return x, random.normal(size=n), start


# -- the derivations as the lab has them, and every sign in them turned round --------------------


def check_losses(losses):
    x, y, theta, phi = network()
    expected = loss_by_loops(x, y, (*theta, *phi))
    assert losses(x, y, theta, phi).mean() == pytest.approx(expected, rel=1e-12)


def check_gradients(gradients):
    x, y, theta, phi = network()
    (grad_w, grad_b), (grad_v, grad_c) = gradients(x, y, theta, phi)
    found = (grad_w, grad_b, grad_v, grad_c)
    for ours, expected in zip(found, by_complex_steps(x, y, (*theta, *phi)), strict=True):
        assert ours == pytest.approx(expected, abs=1e-13)


def check_posterior_mode(posterior_mode):
    # labels and weights are jointly Gaussian: the mean of the weights, given the labels
    x, y, start = regression()
    noise, width = 0.7, 0.4
    of_labels = width**2 * x @ x.T + noise**2 * np.eye(len(y))
    gain = np.linalg.solve(of_labels, width**2 * x).T
    expected = start + gain @ (y - x @ start)
    assert posterior_mode(x, y, start, noise, width) == pytest.approx(expected, abs=1e-12)


def check_nearest_minimum(nearest_minimum):
    # the nearest point of the set of minima, by Lagrange's conditions
    x, y, start = regression(n=3, width=7)
    system = np.block([[np.eye(7), x.T], [x, np.zeros((3, 3))]])
    expected = np.linalg.solve(system, np.r_[start, y])[:7]
    assert nearest_minimum(x, y, start) == pytest.approx(expected, abs=1e-12)


CHECKS = {
    "losses": check_losses,
    "gradients": check_gradients,
    "posterior_mode": check_posterior_mode,
    "nearest_minimum": check_nearest_minimum,
}


def sign_errors(name):
    """(line, source) for each + and - of a function of the lab, turned into the other."""
    tree = ast.parse(source_of(name))
    wrong = with_one_sign_turned(tree)
    return [
        (sign.lineno, ast.unparse(other)) for sign, other in zip(signs(tree), wrong, strict=True)
    ]


PLANTED = [(name, line, source) for name in CHECKS for line, source in sign_errors(name)]


@pytest.mark.equation("eq-objective-backprop", "eq-objective-mode", "eq-objective-nearest")
@pytest.mark.parametrize("name", CHECKS)
def test_the_derivation_in_the_lab_is_right(name):
    CHECKS[name](of_the_lab(name))


@pytest.mark.equation("eq-objective-backprop", "eq-objective-mode", "eq-objective-nearest")
@pytest.mark.parametrize(
    ("name", "line", "source"), PLANTED, ids=[f"{n}-{i}" for n, i, _ in PLANTED]
)
def test_a_sign_error_planted_in_a_derivation_of_the_lab_is_caught(name, line, source):
    with pytest.raises(AssertionError):
        CHECKS[name](made_from(source))


@pytest.mark.equation("eq-objective-backprop")
def test_enough_signs_were_planted():
    counts = {name: sum(n == name for n, _, _ in PLANTED) for name in CHECKS}
    assert counts == {"losses": 3, "gradients": 4, "posterior_mode": 2, "nearest_minimum": 2}


# -- the objective and its gradients -------------------------------------------------------------


@pytest.mark.equation("eq-objective-total")
def test_the_objective_is_the_sum_over_examples_divided_by_their_number():
    x, y, theta, phi = network()
    features = np.tanh(x @ theta[0].T + theta[1])
    logits = torch.from_numpy(features @ phi[0].T + phi[1])
    batch = tk.data.Batch(logits, torch.from_numpy(y), torch.arange(len(y)))
    loss = tk.classification().loss(logits, batch)
    each = [loss_by_loops(x[i : i + 1], y[i : i + 1], (*theta, *phi)) for i in range(len(y))]
    assert float(loss.totals[0]) == pytest.approx(math.fsum(each), rel=1e-12)
    assert float(loss.mean()) == pytest.approx(math.fsum(each) / len(y), rel=1e-12)


def jacobian(function, point, h=1e-6):
    """Matrix of partial derivatives by central differences, one column a coordinate."""
    columns = []
    for place in range(point.size):
        step = np.zeros(point.size)
        step[place] = h
        ends = [function(point + sign * step.reshape(point.shape)) for sign in (1, -1)]
        columns.append((ends[0] - ends[1]) / (2 * h))
    return np.stack(columns, axis=1)


@pytest.mark.equation("eq-objective-gradients")
def test_the_chain_of_jacobians_is_the_gradient_of_autograd():
    # a backbone of two layers and a head that is not linear: the formula does not know them
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Sigmoid())
    head = nn.Sequential(nn.Linear(2, 5), nn.Softplus(), nn.Linear(5, 3))
    x, y = torch.randn(6, 3), torch.randint(0, 3, (6,))
    F.cross_entropy(head(backbone(x)), y).backward()

    def run(module, point, inputs):
        copied = copy.deepcopy(module)
        nn.utils.vector_to_parameters(torch.from_numpy(point), copied.parameters())
        return copied(inputs).detach().numpy()

    theta, phi = (
        nn.utils.parameters_to_vector(part.parameters()).detach().numpy()
        for part in (backbone, head)
    )
    by_theta, by_phi = np.zeros(theta.size), np.zeros(phi.size)
    for row, label in zip(x, y.tolist(), strict=True):
        f = backbone(row).detach()
        z = head(f).detach().numpy()
        g = jacobian(lambda z, label=label: np.array([-z[label] + np.log(np.exp(z).sum())]), z)[0]
        z_by_phi = jacobian(lambda p, f=f: run(head, p, f), phi)
        z_by_f = jacobian(lambda f: head(torch.from_numpy(f)).detach().numpy(), f.numpy())
        f_by_theta = jacobian(lambda p, row=row: run(backbone, p, row), theta)
        by_phi += z_by_phi.T @ g / len(y)
        by_theta += f_by_theta.T @ z_by_f.T @ g / len(y)
    for module, ours in ((backbone, by_theta), (head, by_phi)):
        expected = torch.cat([p.grad.flatten() for p in module.parameters()]).numpy()
        assert ours == pytest.approx(expected, abs=1e-8)


@pytest.mark.equation("eq-objective-logit-gradient")
@pytest.mark.parametrize("label", [0, 2])
def test_the_gradient_by_the_logits_is_probabilities_minus_the_label(label):
    z = np.array([0.3, -1.2, 2.0, 0.1])
    slopes = []
    for place in range(4):
        moved = z.astype(complex)
        moved[place] += 1e-30j
        slopes.append((-moved[label] + np.log(np.exp(moved).sum())).imag / 1e-30)
    p = scipy.special.softmax(z)
    assert slopes == pytest.approx(p - np.eye(4)[label], abs=1e-14)
    assert sum(slopes) == pytest.approx(0, abs=1e-14)


@pytest.mark.equation("eq-objective-central")
def test_central_differences_of_a_cubic_err_by_exactly_h_squared():
    # third derivative 6, so h^2 / 6 times it is h^2, and there are no further terms
    for h in (0.5, 0.25, 0.125):
        found = ((2 + h) ** 3 - (2 - h) ** 3) / (2 * h)
        assert found - 3 * 2**2 == h**2


@pytest.mark.equation("eq-objective-central")
def test_the_error_of_central_differences_falls_with_the_square_of_the_step():
    errors = [(np.exp(1 + h) - np.exp(1 - h)) / (2 * h) - np.e for h in (1e-2, 1e-3)]
    assert errors[0] / errors[1] == pytest.approx(100, rel=1e-3)
    assert errors[1] == pytest.approx(1e-6 / 6 * np.e, rel=1e-3)


@pytest.mark.equation("eq-objective-update")
def test_one_update_is_that_of_torch_and_of_the_library():
    x, y, theta, phi = network()
    slopes = by_complex_steps(x, y, (*theta, *phi))
    rates = (0.1, 0.1, 0.5, 0.5)
    parts = zip((*theta, *phi), rates, slopes, strict=True)
    expected = [part - rate * slope for part, rate, slope in parts]
    backbone = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
    model = tk.Staged([("backbone", backbone), ("head", nn.Linear(5, 3))])
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), (*theta, *phi), strict=True):
            parameter.copy_(torch.from_numpy(value))
    data = (torch.from_numpy(x), torch.from_numpy(y))
    plain = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "warmup": 0.0}
    plan = tk.finetune(1, lr=0.5, rates={"backbone": 0.1}, schedule="constant", **plain)
    by_torch = copy.deepcopy(model)
    groups = [{"params": by_torch.backbone.parameters(), "lr": 0.1}]
    groups.append({"params": by_torch.head.parameters(), "lr": 0.5})
    F.cross_entropy(by_torch(data[0]), data[1]).backward()
    torch.optim.SGD(groups).step()
    tk.fit(model, tk.classification(), data, plan=plan, clip=None, precision="fp32", device="cpu")
    for one in (model, by_torch):
        for parameter, value in zip(one.parameters(), expected, strict=True):
            assert parameter.detach().numpy() == pytest.approx(value, abs=1e-12)


# -- freezing ------------------------------------------------------------------------------------


def kept(model, x, y):
    """Numbers that autograd keeps, told by their storage; parameters are not counted."""
    storages, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        place = tensor.untyped_storage().data_ptr()
        if tensor.is_floating_point() and place not in own and tensor.numel() > 1:
            storages[place] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        F.cross_entropy(model(x), y)
    return sum(storages.values())


@pytest.mark.equation("eq-objective-saved")
@pytest.mark.parametrize("frozen", range(4))
def test_numbers_kept_for_the_backward_pass_follow_the_formula(frozen):
    widths, n = (7, 6, 5, 4, 3), 11
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    for layer in layers[:frozen]:
        layer.requires_grad_(False)
    parts = [part for layer in layers[:-1] for part in (layer, nn.Tanh())]
    model = nn.Sequential(*parts, layers[-1])
    x, y = torch.randn(n, 7), torch.randint(0, 3, (n,))
    by_hand = {0: 7 + 6 + 5 + 4 + 3, 1: 6 + 5 + 4 + 3, 2: 5 + 4 + 3, 3: 4 + 3}
    assert kept(model, x, y) == n * by_hand[frozen]


@pytest.mark.equation("eq-objective-saved")
def test_freezing_the_head_alone_saves_nothing():
    model = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(11, 7), torch.randint(0, 3, (11,))
    before = kept(model, x, y)
    model[2].requires_grad_(False)
    assert kept(model, x, y) == before == 11 * (7 + 6 + 3)


# -- sum or mean ---------------------------------------------------------------------------------


def quadratic(seed=0):
    """Squared error of a linear model, halved: its gradient, matrix H of the mean, minimum."""
    x, y, _ = regression(seed)
    hessian = x.T @ x / len(y)
    lowest = np.linalg.lstsq(x, y, rcond=None)[0]
    return x, y, hessian, lowest


@pytest.mark.equation("eq-objective-sum-rate")
def test_the_sum_with_a_rate_divided_by_n_takes_the_steps_of_the_mean():
    x, y, theta, phi = network(1)
    paths = []
    for reduction, rate in (("mean", 0.3), ("sum", 0.3 / len(y))):
        head = nn.Linear(5, 3)
        with torch.no_grad():
            head.weight.copy_(torch.from_numpy(phi[0]))
            head.bias.copy_(torch.from_numpy(phi[1]))
        f = torch.from_numpy(np.tanh(x @ theta[0].T + theta[1]))
        stepper = torch.optim.SGD(head.parameters(), lr=rate)
        path = []
        for _ in range(20):
            stepper.zero_grad()
            F.cross_entropy(head(f), torch.from_numpy(y), reduction=reduction).backward()
            stepper.step()
            path.append(head.weight.detach().clone().numpy())
        paths.append(np.array(path))
    assert paths[0] == pytest.approx(paths[1], abs=1e-12)


@pytest.mark.equation("eq-objective-stable")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_descent_on_a_quadratic_converges_below_the_limit_and_diverges_above(reduction):
    x, y, hessian, lowest = quadratic()
    times = 1 if reduction == "mean" else len(y)
    limit = 2 / (times * np.linalg.eigvalsh(hessian).max())
    far = {}
    for share in (0.98, 1.02):
        w = lowest + 1e-3 * np.ones(4)
        for _ in range(2000):
            residual = x @ w - y
            w = w - share * limit * times * np.mean(x * residual[:, None], axis=0)
        far[share] = np.abs(w - lowest).max()
    assert far[0.98] < 1e-10
    assert far[1.02] > 1e3


@pytest.mark.equation("eq-objective-travel")
@pytest.mark.parametrize("size", [1, 4, 12])
def test_for_small_rates_the_way_of_an_epoch_depends_on_the_batch_for_the_mean_alone(size):
    x, y, start = regression(n=12)
    gradient = x.T @ (x @ start - y) / 12
    for reduction, expected in (("mean", 12 / size * gradient), ("sum", 12 * gradient)):
        rate, w = 1e-9, start.copy()
        for at in range(0, 12, size):
            rows = slice(at, at + size)
            total = x[rows].T @ (x[rows] @ w - y[rows])
            w = w - rate * (total / size if reduction == "mean" else total)
        assert -(w - start) / rate == pytest.approx(expected, rel=1e-5)


# -- accumulation --------------------------------------------------------------------------------


def model_and_items(n, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, torch.randn(n, 4), torch.randint(0, 3, (n,))


def accumulated(model, x, y, sizes, divide):
    """What backward leaves in .grad when each part's sum is divided by `divide(size)`."""
    model.zero_grad()
    for xs, ys in zip(x.split(sizes), y.split(sizes), strict=True):
        total = F.cross_entropy(model(xs), ys, reduction="sum")
        (total / divide(len(ys))).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]).numpy()


@pytest.mark.equation("eq-objective-accumulate")
@pytest.mark.parametrize("sizes", [(11,), (5, 6), (4, 4, 3), (1,) * 11])
def test_sums_over_the_count_of_all_give_the_gradient_of_the_whole(sizes):
    model, x, y = model_and_items(11)
    found = accumulated(model, x, y, sizes, lambda _: 11)
    parts = [p.detach().numpy() for p in model.parameters()]
    expected = np.concatenate([g.ravel() for g in by_complex_steps(x.numpy(), y.numpy(), parts)])
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.equation("eq-objective-means")
@pytest.mark.parametrize("sizes", [(8, 3), (4, 4, 3), (1, 10)])
def test_the_mean_of_means_is_a_weighted_sum_with_the_weights_of_the_formula(sizes):
    model, x, y = model_and_items(11)
    found = accumulated(model, x, y, sizes, lambda size: len(sizes) * size)
    weights = of_the_lab("weights_of_means")(sizes)
    assert weights.sum() == pytest.approx(1, rel=1e-12)
    expected = sum(
        weight * accumulated(model, x[i : i + 1], y[i : i + 1], (1,), lambda _: 1)
        for i, weight in enumerate(weights)
    )
    assert found == pytest.approx(expected, abs=1e-12)
    assert found != pytest.approx(accumulated(model, x, y, sizes, lambda _: 11), abs=1e-3)


@pytest.mark.equation("eq-objective-effective")
@pytest.mark.parametrize("sizes", [(2, 1), (3, 1), (4,), (1, 1, 2)])
def test_the_variance_over_all_draws_is_that_of_the_effective_number(sizes):
    # every sequence of values that can be drawn, each as probable as the others
    values, n = (-1.0, 0.0, 3.0), sum(sizes)
    weights = of_the_lab("weights_of_means")(sizes)
    effective = of_the_lab("effective_number")(weights)
    means = [np.dot(weights, draw) for draw in itertools.product(values, repeat=n)]
    assert np.var(means) == pytest.approx(np.var(values) / effective, rel=1e-12)
    assert effective <= n


@pytest.mark.equation("eq-objective-unbiased")
@pytest.mark.parametrize("sizes", [(3, 1), (2, 2), (4, 1)])
def test_over_all_orders_the_mean_of_means_is_right_on_average(sizes):
    values = np.random.default_rng(0).normal(size=sum(sizes))
    weights = of_the_lab("weights_of_means")(sizes)
    orders = [np.dot(weights, order) for order in itertools.permutations(values)]
    assert np.mean(orders) == pytest.approx(values.mean(), abs=1e-12)
    assert np.ptp(orders) > 0 or len(set(sizes)) == 1


@pytest.mark.equation("eq-objective-lines")
def test_words_and_lines_differ_by_the_covariance_of_length_and_loss():
    lines = [[0.2, 0.1, 0.9, 0.4], [2.0], [0.3, 1.5], [0.5, 0.5, 0.1]]
    by_words = np.mean([loss for line in lines for loss in line])
    by_lines = np.mean([np.mean(line) for line in lines])
    lengths, means = [len(line) for line in lines], [np.mean(line) for line in lines]
    covariance = np.cov(lengths, means, ddof=0)[0, 1]
    assert by_words - by_lines == pytest.approx(covariance / np.mean(lengths), abs=1e-15)
    assert by_words < by_lines  # the long lines are the easy ones here


# -- the start, and what is transferred ----------------------------------------------------------


@pytest.mark.equation("eq-objective-nearest")
@pytest.mark.parametrize("seed", [0, 1])
def test_descent_ends_at_the_minimum_nearest_to_its_start(seed):
    x, y, start = regression(seed, n=3, width=7)
    w = torch.tensor(start, requires_grad=True)
    stepper = torch.optim.SGD([w], lr=0.1)
    for _ in range(20_000):
        stepper.zero_grad()
        F.mse_loss(torch.from_numpy(x) @ w, torch.from_numpy(y)).backward()
        stepper.step()
    check_nearest_minimum(of_the_lab("nearest_minimum"))
    found = of_the_lab("nearest_minimum")(x, y, start)
    assert w.detach().numpy() == pytest.approx(found, abs=1e-8)
    assert x @ found == pytest.approx(y, abs=1e-12)
    free = scipy.linalg.null_space(x)
    for direction in free.T:  # any other minimum is farther away
        assert np.linalg.norm(found + 0.1 * direction - start) > np.linalg.norm(found - start)


def tuned(kind, source, seed=0):
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
    model = tk.Staged([("backbone", backbone), ("head", nn.Linear(5, 3))])
    if kind != "structure":
        model.backbone.load_state_dict(source)
    x, y, _, _ = network()
    plan = tk.finetune(2, lr=0.01, last=1 if kind == "feature" else None)
    data = (torch.from_numpy(x), torch.from_numpy(y))
    tk.fit(model, tk.classification(), data, plan=plan, precision="fp32", device="cpu")
    return model.state_dict()


@pytest.mark.equation("eq-objective-maps")
def test_each_kind_of_transfer_depends_on_what_its_map_names():
    sources = [nn.Sequential(nn.Linear(4, 5), nn.Tanh()).state_dict() for _ in range(2)]
    for kind in ("parameter", "feature", "structure"):
        one, other = (tuned(kind, source) for source in sources)
        again = tuned(kind, sources[0], seed=1)
        name = "backbone.0.weight"
        assert one[name].equal(other[name]) == (kind == "structure")
        assert one[name].equal(sources[0]["0.weight"]) == (kind == "feature")
        # another random start: it decides the head, and the backbone where that is random, too
        assert not one["head.weight"].equal(again["head.weight"])
        if kind == "feature":
            assert one[name].equal(again[name])


@pytest.mark.equation("eq-objective-argmin")
def test_what_training_finds_depends_on_the_start_and_the_minimum_does_not():
    def loss(w):
        return (w**2 - 1) ** 2 + 0.3 * w

    grid = np.linspace(-2, 2, 400_001)
    lowest = grid[np.argmin(loss(grid))]
    ends = {}
    for start in (-1.5, 1.5):
        w = start
        for _ in range(2000):
            w -= 0.01 * (4 * w * (w**2 - 1) + 0.3)
        ends[start] = w
    assert ends[-1.5] == pytest.approx(lowest, abs=1e-4)
    assert ends[1.5] > 0.9


# -- the most probable weights -------------------------------------------------------------------


def log_posterior(w, x, y, start, noise, width):
    """From the densities, up to a constant that does not depend on w."""
    labels = scipy.stats.norm(x @ w, noise).logpdf(y).sum()
    return labels + scipy.stats.norm(start, width).logpdf(w).sum()


@pytest.mark.equation("eq-objective-bayes")
def test_minus_the_log_posterior_is_loss_and_penalty_up_to_a_constant():
    x, y, start = regression()
    noise, width = 0.7, 0.4
    points = np.random.default_rng(1).normal(size=(5, 4))
    gaps = []
    for w in points:
        losses = (y - x @ w) ** 2 / (2 * noise**2)
        penalty = ((w - start) ** 2).sum() / (2 * width**2)
        gaps.append(-log_posterior(w, x, y, start, noise, width) - losses.sum() - penalty)
    assert gaps == pytest.approx([gaps[0]] * 5, rel=1e-12)


@pytest.mark.equation("eq-objective-l2sp")
def test_the_librarys_penalty_with_this_weight_has_the_minimum_of_the_posterior():
    # gradient of the library's objective, at the mode found from the densities alone
    x, y, start = regression()
    noise, width = 0.7, 0.4
    found = scipy.optimize.minimize(
        lambda w: -log_posterior(w, x, y, start, noise, width), start, tol=1e-12
    ).x
    model = tk.Staged([("body", nn.Linear(4, 1, bias=False)), ("head", nn.Identity())])
    with torch.no_grad():
        model.body.weight.copy_(torch.from_numpy(start))
    objective = tk.l2_sp(tk.regression(), model, alpha=2 * noise**2 / (len(y) * width**2))
    with torch.no_grad():
        model.body.weight.copy_(torch.from_numpy(found))
    inputs = torch.from_numpy(x)
    batch = tk.data.Batch(inputs, torch.from_numpy(y)[:, None], torch.arange(len(y)))
    (objective(model, batch).mean() + objective.penalty(model)).backward()
    assert model.body.weight.grad.abs().max() < 1e-5


@pytest.mark.equation("eq-objective-worth")
@pytest.mark.parametrize("n", [1, 4, 100])
def test_for_a_mean_the_source_counts_as_so_many_labels(n):
    y, noise, width, start = np.random.default_rng(n).normal(size=n), 0.6, 0.3, 2.0
    worth = noise**2 / width**2
    assert worth == pytest.approx(4)
    grid = np.linspace(-3, 3, 600_001)
    posterior = -((y[:, None] - grid) ** 2).sum(0) / (2 * noise**2)
    posterior -= (grid - start) ** 2 / (2 * width**2)
    # as if four more labels had been seen, each with the value of the source
    expected = np.mean(np.r_[y, np.full(4, start)])
    assert grid[posterior.argmax()] == pytest.approx(expected, abs=2e-5)
    assert (n * y.mean() + worth * start) / (n + worth) == pytest.approx(expected, abs=1e-12)


@pytest.mark.equation("eq-objective-wide")
def test_a_very_wide_prior_leaves_the_minimum_that_is_nearest_to_the_source():
    x, y, start = regression(n=3, width=7)
    mode = of_the_lab("posterior_mode")
    system = np.block([[np.eye(7), x.T], [x, np.zeros((3, 3))]])
    nearest = np.linalg.solve(system, np.r_[start, y])[:7]
    gaps = [np.abs(mode(x, y, start, 1.0, width) - nearest).max() for width in (1e1, 1e2, 1e3)]
    assert gaps[0] > 10 * gaps[1] > 100 * gaps[2]
    assert gaps[2] < 1e-5
