"""The formulas of *Three routes*, each computed in another way than page and lab do."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import transferkit as tk


@pytest.mark.equation("eq-three-routes-between")
@pytest.mark.parametrize("pull", [0.0, 0.3, 5.0])
def test_the_printed_minimum_is_where_gradient_descent_with_the_pull_ends(pull):
    a = torch.randn(6, 4)
    curvature = a.T @ a / 6 + 0.1 * torch.eye(4)
    own, start = torch.randn(4), torch.randn(4)
    theta = start.clone().requires_grad_()
    descent = torch.optim.SGD([theta], lr=0.1)
    for _ in range(5000):
        descent.zero_grad()
        gap = theta - own
        loss = gap @ curvature @ gap / 2 + pull / 2 * (theta - start).square().sum()
        loss.backward()
        descent.step()
    identity = torch.eye(4)
    printed = torch.linalg.solve(curvature + pull * identity, curvature @ own + pull * start)
    assert torch.allclose(theta.detach(), printed, atol=1e-8)


@pytest.mark.equation("eq-three-routes-between")
def test_its_two_ends_are_the_parameter_and_the_feature_route():
    curvature = torch.diag(torch.tensor([0.5, 1.0, 3.0]))
    own, start = torch.randn(3), torch.randn(3)

    def minimum(pull):
        return torch.linalg.solve(curvature + pull * torch.eye(3), curvature @ own + pull * start)

    assert torch.allclose(minimum(0.0), own)
    assert torch.allclose(minimum(1e9), start, atol=1e-7)


@pytest.mark.equation("eq-three-routes-pull")
def test_the_library_adds_this_penalty_and_leaves_the_head_alone():
    model = tk.Staged([("body", nn.Linear(3, 4)), ("head", nn.Linear(4, 2))], labels=["a", "b"])
    objective = tk.l2_sp(tk.classification(), model, alpha=0.7)
    start = [p.detach().clone() for p in model.body.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    by_hand = 0.0
    for parameter, old in zip(model.body.parameters(), start, strict=True):
        for now, then in zip(parameter.flatten().tolist(), old.flatten().tolist(), strict=True):
            by_hand += 0.7 / 2 * (now - then) ** 2
    assert objective.penalty(model).item() == pytest.approx(by_hand)


@pytest.mark.equation("eq-three-routes-parts")
def test_the_two_parts_of_the_effect_add_up_to_the_whole_draw_by_draw_and_in_the_mean():
    rng = np.random.default_rng(0)
    parameters, structure = rng.uniform(0.6, 0.9, 5), rng.uniform(0.5, 0.8, 5)
    blind = rng.uniform(0.4, 0.8, (4, 5)).mean(axis=0)
    whole = tk.paired_interval(parameters, blind)
    parts = [tk.paired_interval(parameters, structure), tk.paired_interval(structure, blind)]
    assert whole.mean == pytest.approx(sum(part.mean for part in parts), abs=1e-12)
    widths = [part.high - part.low for part in (whole, *parts)]
    assert widths[0] < sum(widths[1:])  # the intervals do not add up


@pytest.mark.equation("eq-three-routes-mask")
def test_the_gradient_of_a_masked_weight_is_the_masked_gradient():
    weight, mask = torch.randn(3, 5), torch.rand(3, 5) > 0.5
    x, y = torch.randn(7, 5), torch.randint(0, 3, (7,))

    def loss(effective):
        return nn.functional.cross_entropy(x @ effective.T, y)

    printed = weight.clone().requires_grad_()
    loss(printed * mask).backward()
    numeric, step = torch.zeros_like(weight), 1e-6  # by finite differences
    for place in np.ndindex(*weight.shape):
        moved = torch.zeros_like(weight)
        moved[place] = step
        rise = loss((weight + moved) * mask) - loss((weight - moved) * mask)
        numeric[place] = rise / (2 * step)
    inner = (weight * mask).requires_grad_()
    loss(inner).backward()
    assert torch.allclose(numeric, mask * inner.grad, atol=1e-8)
    assert torch.allclose(printed.grad, numeric, atol=1e-8)
    assert (numeric[~mask] == 0).all()


@pytest.mark.equation("eq-three-routes-bits")
def test_a_mask_is_one_of_so_many_and_the_gamma_function_counts_them():
    total, kept = 196 * 64, round(0.05 * 196 * 64)
    exact = math.log2(math.comb(total, kept))
    natural = math.lgamma(total + 1) - math.lgamma(kept + 1) - math.lgamma(total - kept + 1)
    assert natural / math.log(2) == pytest.approx(exact, rel=1e-9)
    # a code for each connection, of the entropy of one of them, is hardly longer
    share = kept / total
    entropy = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
    assert exact < total * entropy < 1.01 * exact


@pytest.mark.equation("eq-three-routes-bits")
def test_small_masks_can_be_counted_one_by_one():
    masks = [bits for bits in np.ndindex(*[2] * 6) if sum(bits) == 2]
    assert math.log2(len(masks)) == pytest.approx(math.log2(math.comb(6, 2)))


@pytest.mark.equation("eq-three-routes-pile")
def test_gradients_that_nobody_clears_add_up_and_those_of_a_model_at_rest_multiply():
    x, y = torch.randn(20, 4), torch.randn(20, 2)
    resting, moving = nn.Linear(4, 2), nn.Linear(4, 2)
    (once,) = torch.autograd.grad(nn.functional.mse_loss(resting(x), y), [resting.weight])
    for _ in range(100):
        nn.functional.mse_loss(resting(x), y).backward()
    assert torch.allclose(resting.weight.grad, 100 * once)
    total = torch.zeros(2, 4)
    for _ in range(5):
        nn.functional.mse_loss(moving(x), y).backward()
        (own,) = torch.autograd.grad(nn.functional.mse_loss(moving(x), y), [moving.weight])
        total += own
        with torch.no_grad():
            moving.weight.sub_(0.1 * own)
    assert torch.allclose(moving.weight.grad, total)
    assert not torch.allclose(total, 5 * own)


@pytest.mark.equation("eq-three-routes-routes")
@pytest.mark.parametrize(
    ("route", "transfer", "learns"),
    [("parameters", True, True), ("features", True, False), ("structure", False, True)],
)
def test_each_route_keeps_what_its_line_says(route, transfer, learns):
    torch.set_default_dtype(torch.float32)

    def network(seed):
        torch.manual_seed(seed)
        stages = [("body", nn.Sequential(nn.Linear(3, 4), nn.Tanh())), ("head", nn.Linear(4, 2))]
        return tk.Staged(stages, labels=["a", "b"])

    source, model = network(0), network(1)
    if transfer:
        model.body.load_state_dict(source.body.state_dict())
    start = model.body[0].weight.detach().clone()
    assert start.equal(source.body[0].weight) == transfer
    head = model.head.weight.detach().clone()
    x, y = torch.randn(16, 3), torch.arange(16) % 2
    plan = tk.finetune(2, lr=0.01) if learns else tk.linear_probe(2, lr=0.01, cache=False)
    tk.fit(model, tk.classification(), (x, y), plan=plan, precision="fp32", device="cpu")
    assert model.body[0].weight.equal(start) != learns
    assert not model.head.weight.equal(head)
