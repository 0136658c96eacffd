"""The formulas of *Neighbours*, each computed in another way than the lab computes it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import transferkit as tk

LAB = Path(__file__).parents[2] / "notebooks" / "concepts" / "neighbours.ipynb"


def from_the_lab(name):
    """A class as the lab defines it: its cell is run, with nothing but what it imports."""
    cells = json.loads(LAB.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    (source,) = [source for source in sources if source.startswith(f"class {name}")]
    names = {"torch": torch, "nn": nn, "tk": tk}
    exec(source, names)
    return names[name]


def batch(inputs, labels):
    return tk.data.Batch(inputs, labels, torch.arange(len(labels)))


@pytest.mark.equation("eq-neighbours-order")
@pytest.mark.parametrize("counts", [(7, 3), (4, 0), (0, 5)])
def test_the_joint_objective_is_the_sum_of_two_means_and_so_is_its_gradient(counts):
    old, new = counts
    torch.manual_seed(0)
    backbone, digit, day = nn.Linear(6, 4), nn.Linear(4, 10), nn.Linear(4, 5)

    def model(inputs):
        features = torch.tanh(backbone(inputs))
        return torch.cat([digit(features), day(features)], dim=1)

    inputs = torch.randn(old + new, 6)
    labels = torch.cat([torch.arange(old) % 10, 10 + torch.arange(new) % 5])
    shuffle = torch.randperm(old + new)
    value = from_the_lab("TwoTasks")()(model, batch(inputs[shuffle], labels[shuffle])).mean()
    (joint,) = torch.autograd.grad(value, backbone.weight)

    parts = []
    for head, rows, first in ((digit, slice(0, old), 0), (day, slice(old, None), 10)):
        if len(labels[rows]):
            scores = head(torch.tanh(backbone(inputs[rows])))
            parts.append(nn.functional.cross_entropy(scores, labels[rows] - first))
    assert value.item() == pytest.approx(sum(part.item() for part in parts), abs=1e-12)
    (apart,) = torch.autograd.grad(sum(parts), backbone.weight)
    assert torch.allclose(joint, apart, atol=1e-12)


@pytest.mark.equation("eq-neighbours-order")
def test_in_sequence_the_source_is_left_behind_and_jointly_it_is_not():
    # losses ‖w − a‖² / 2 and ‖w − b‖² / 2: in sequence w → b, jointly w → the mean of both
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    sequence, joint = torch.zeros(2), torch.zeros(2)
    for goal in (a, b):
        for _ in range(400):
            sequence = sequence - 0.1 * (sequence - goal)
    for _ in range(400):
        joint = joint - 0.1 * ((joint - a) + (joint - b))
    assert torch.allclose(sequence, b, atol=1e-10)
    assert torch.allclose(joint, (a + b) / 2, atol=1e-10)


@pytest.mark.equation("eq-neighbours-pull")
@pytest.mark.parametrize("n", [2, 20])
def test_the_error_of_a_pulled_mean_is_its_variance_and_its_squared_bias(n):
    rng = np.random.default_rng(n)
    sigma, delta, weight = 2.0, 0.7, 0.3
    means = rng.normal(0.0, sigma, (200_000, n)).mean(axis=1)  # the target's mean is 0
    found = (((1 - weight) * means + weight * delta) ** 2).mean()
    expected = (1 - weight) ** 2 * sigma**2 / n + weight**2 * delta**2
    assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.equation("eq-neighbours-best-pull")
@pytest.mark.parametrize("n", [1, 10, 1000])
def test_no_weight_on_a_fine_grid_is_better_than_the_best_pull(n):
    sigma, delta = 2.0, 0.7
    best = (sigma**2 / n) / (sigma**2 / n + delta**2)

    def error(weight):
        return (1 - weight) ** 2 * sigma**2 / n + weight**2 * delta**2

    grid = np.linspace(0, 1, 100_001)
    assert grid[error(grid).argmin()] == pytest.approx(best, abs=1e-5)


@pytest.mark.equation("eq-neighbours-inputs")
def test_a_shared_branch_gives_the_features_of_each_photograph_side_by_side():
    branch, photographs = from_the_lab("Branch")(), torch.rand(5, 2, 8, 8)
    features = branch(photographs)
    assert features.shape == (5, 128)
    apart = [branch(photographs[:, [view]]) for view in (0, 1)]
    assert torch.allclose(features, torch.cat(apart, dim=1))


@pytest.mark.equation("eq-neighbours-inputs")
def test_the_gradient_of_a_shared_branch_is_the_sum_over_the_photographs():
    branch, photographs = from_the_lab("Branch")(), torch.rand(5, 2, 8, 8)
    weight, head = branch.layers[0].weight, torch.randn(128)
    (both,) = torch.autograd.grad((branch(photographs) @ head).sum(), weight)
    apart = torch.zeros_like(both)
    for view in (0, 1):
        part = (branch(photographs[:, [view]]) @ head[64 * view : 64 * view + 64]).sum()
        apart += torch.autograd.grad(part, weight)[0]
    assert torch.allclose(both, apart)


@pytest.mark.equation("eq-neighbours-interaction")
def test_the_interaction_is_zero_where_effects_add_and_is_the_same_either_way_round():
    add = {("scratch", 1): 0.70, ("transfer", 1): 0.78, ("scratch", 2): 0.80, ("transfer", 2): 0.88}
    rng = np.random.default_rng(0)
    draws = {key: value + rng.normal(0, 0.01, 6) for key, value in add.items()}
    for table, expected in ((add, 0.0), (draws, None)):
        by_start = (table["transfer", 2] - table["scratch", 2]) - (
            table["transfer", 1] - table["scratch", 1]
        )
        by_inputs = (table["transfer", 2] - table["transfer", 1]) - (
            table["scratch", 2] - table["scratch", 1]
        )
        assert np.allclose(by_start, by_inputs)
        if expected is not None:
            assert by_start == pytest.approx(expected, abs=1e-12)


@pytest.mark.equation("eq-neighbours-drop")
def test_the_effect_under_noise_is_the_clean_effect_less_the_difference_of_the_drops():
    rng = np.random.default_rng(0)
    for clean_with, clean_without, noisy_with, noisy_without in rng.uniform(0, 1, (20, 4)):
        drops = (clean_with - noisy_with) - (clean_without - noisy_without)
        effect = noisy_with - noisy_without
        assert effect == pytest.approx((clean_with - clean_without) - drops, abs=1e-12)
