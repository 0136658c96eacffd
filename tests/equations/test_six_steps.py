"""The formulas of *The six steps*, each computed in another way than the page derives it."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import nn

import transferkit as tk


@pytest.mark.equation("eq-six-updates")
@pytest.mark.parametrize(("items", "size", "epochs"), [(200, 32, 5), (64, 32, 2), (65, 32, 2)])
def test_the_updates_of_a_recipe_are_those_that_a_run_makes(items, size, epochs):
    data = torch.randn(items, 3), torch.arange(items) % 2
    plan = tk.finetune(epochs)
    model = nn.Linear(3, 2)
    run = tk.fit(model, tk.classification(), data, plan=plan, batch_size=size, device="cpu")
    updates = epochs * math.ceil(items / size)
    run.replay(updates)
    with pytest.raises(ValueError, match=f"made {updates} updates"):
        run.replay(updates + 1)


def step_limit(t, first=0.9, second=0.999):
    """c_t of the page, from its closed form."""
    ratio = first**2 / second
    top = (1 - first) ** 2 * (1 - second**t) * (1 - ratio**t)
    return math.sqrt(top / ((1 - first**t) ** 2 * (1 - second) * (1 - ratio)))


def steps_of_adam(gradients):
    """The sizes of Adam's steps at rate 1 for one weight and a row of gradients."""
    weight = torch.zeros(1, requires_grad=True)
    optimiser = torch.optim.Adam([weight], lr=1.0, eps=0.0)
    sizes = []
    for gradient in gradients:
        before = weight.item()
        weight.grad = torch.tensor([float(gradient)])
        optimiser.step()
        sizes.append(abs(weight.item() - before))
    return sizes


@pytest.mark.equation("eq-six-step")
@pytest.mark.parametrize("t", [1, 2, 7, 35])
def test_no_step_of_adam_is_longer_than_the_bound_and_one_reaches_it(t):
    rng = np.random.default_rng(t)
    for scale in (0.1, 1.0, 10.0):
        gradients = rng.normal(size=t) * scale ** np.arange(t)
        for at, size in enumerate(steps_of_adam(gradients), 1):
            assert size <= step_limit(at) * (1 + 1e-9)
    worst = (0.9 / 0.999) ** np.arange(t)[::-1]  # the case of equality of Cauchy and Schwarz
    assert steps_of_adam(worst)[-1] == pytest.approx(step_limit(t), rel=1e-9)


@pytest.mark.equation("eq-six-travel")
def test_a_weight_travels_no_farther_than_the_sum_of_the_bounds():
    rates = 2e-5 * np.linspace(1, 0.1, 35)
    weight = torch.zeros(50, requires_grad=True)
    optimiser = torch.optim.Adam([weight], lr=1.0)
    for rate in rates:
        optimiser.param_groups[0]["lr"] = rate
        optimiser.zero_grad()
        (weight * torch.randn(50)).sum().backward()
        optimiser.step()
    limit = sum(step_limit(t) * rate for t, rate in enumerate(rates, 1))
    assert weight.abs().max().item() <= limit
    assert limit < 1.4 * rates.sum()
    assert max(map(step_limit, range(1, 36))) < 1.4  # what the page says of the first 35 updates


@pytest.mark.equation("eq-six-met")
@pytest.mark.parametrize(("copies", "share"), [(2, 0.7), (3, 0.7), (4, 0.5)])
def test_the_chance_to_meet_a_copy_is_that_of_all_ways_to_split(copies, share):
    met = total = 0.0
    for sides in itertools.product((True, False), repeat=copies):  # True: in the training lines
        weight = math.prod(share if side else 1 - share for side in sides)
        if not sides[0]:  # the line is in the test
            total += weight
            met += weight * any(sides[1:])
    assert met / total == pytest.approx(1 - (1 - share) ** (copies - 1))


@pytest.mark.equation("eq-six-lookup")
def test_the_look_up_is_right_on_all_it_met_and_on_the_usual_of_the_rest():
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=300)
    lines = np.repeat(np.arange(300), rng.integers(1, 4, size=300))
    order = rng.permutation(len(lines))
    train, test = lines[order[:400]], lines[order[400:]]
    usual = np.bincount(labels[train]).argmax()
    said = np.array([labels[text] if text in train else usual for text in test])
    met = np.isin(test, train)
    s, u = met.mean(), np.mean(labels[test[~met]] == usual)
    assert np.mean(said == labels[test]) == pytest.approx(s + (1 - s) * u)


@pytest.mark.equation("eq-six-all-right")
@pytest.mark.parametrize("n", [1, 2, 35, 200])
def test_the_lower_end_for_all_right_is_that_of_clopper_and_pearson(n):
    interval = binomtest(n, n).proportion_ci(0.95, method="exact")
    assert 0.025 ** (1 / n) == pytest.approx(interval.low, rel=1e-9)
    assert interval.high == 1
