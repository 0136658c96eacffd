"""The formulas of the chapter on strategies, each computed a second way."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import transferkit as tk


def residual(head, features, label):
    """p - y for one item: what a softmax says minus what is true."""
    return F.softmax(head(features), -1) - F.one_hot(torch.tensor(label), head.out_features)


# -- a new head -----------------------------------------------------------------------------------


@pytest.mark.equation("eq-strategies-feature-gradient")
def test_the_gradient_of_the_features_is_the_head_transposed_times_the_residual():
    head, features = nn.Linear(5, 3), torch.randn(5)
    ours = head.weight.T @ residual(head, features, 2)
    for at in range(5):
        step = 1e-6 * F.one_hot(torch.tensor(at), 5)
        above, below = (F.cross_entropy(head(features + s), torch.tensor(2)) for s in (step, -step))
        assert float(ours[at].detach()) == pytest.approx(
            float(((above - below) / 2e-6).detach()), abs=1e-8
        )


@pytest.mark.equation("eq-strategies-feature-gradient")
def test_under_a_zero_head_no_gradient_reaches_the_body_and_the_head_learns_all_the_same():
    body, head = nn.Linear(4, 6), nn.Linear(6, 3)
    nn.init.zeros_(head.weight)
    F.cross_entropy(head(body(torch.randn(8, 4))), torch.randint(3, (8,))).backward()
    assert float(body.weight.grad.abs().max()) == 0.0
    assert float(head.weight.grad.abs().max()) > 0.0


@pytest.mark.equation("eq-strategies-random-head")
def test_over_all_signs_of_a_random_head_the_gradient_is_zero_in_the_mean_and_not_in_size():
    spread, pull = 0.3, torch.tensor([0.7, -0.2, -0.5])
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=6))).view(-1, 3, 2)
    found = torch.einsum("kcd,c->kd", spread * signs, pull)
    assert found.mean(0).abs().max() < 1e-12
    expected = spread**2 * 2 * float(pull.square().sum())
    assert float(found.square().sum(1).mean()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.equation("eq-strategies-random-head")
def test_with_torchs_own_head_the_size_does_not_depend_on_the_width():
    pull = torch.tensor([-0.9] + 9 * [0.1])
    for width in (16, 256):
        size = np.mean([
            float((nn.Linear(width, 10).weight.T @ pull).square().sum().detach())
            for _ in range(600)
        ])  # fmt: skip
        assert size == pytest.approx(float(pull.square().sum()) / 3, rel=0.05)


@pytest.mark.equation("eq-strategies-distortion")
def test_one_step_moves_other_features_by_their_overlap_with_the_item_trained_on():
    body, head, rate = nn.Linear(4, 6, bias=False), nn.Linear(6, 3), 0.1
    item, across = torch.tensor([1.0, 2.0, 0.0, 0.0]), torch.tensor([2.0, -1.0, 3.0, 0.0])
    others = torch.stack([item, across, torch.randn(4)])
    before = body(others).detach()
    pull = (head.weight.T @ residual(head, body(item), 1)).detach()
    optimizer = torch.optim.SGD(body.parameters(), lr=rate)
    F.cross_entropy(head(body(item)), torch.tensor(1)).backward()
    optimizer.step()
    expected = -rate * (others @ item)[:, None] * pull
    assert torch.allclose(body(others).detach() - before, expected, atol=1e-12)
    assert expected[1].abs().max() == 0.0  # orthogonal to what was trained on: it stays


# -- which layer can repair what ------------------------------------------------------------------


@pytest.mark.equation("eq-strategies-undo")
def test_a_first_layer_undoes_a_change_of_brightness_and_contrast():
    layer, other = nn.Conv2d(1, 7, 3), nn.Conv2d(1, 7, 3)
    images, shift, scale = torch.rand(5, 1, 9, 9), 0.3, -0.4
    with torch.no_grad():
        other.weight.copy_(layer.weight / scale)
        other.bias.copy_(layer.bias - shift / scale * layer.weight.sum((1, 2, 3)))
    assert torch.allclose(other(shift + scale * images), layer(images), atol=1e-12)


# -- rates and phases -----------------------------------------------------------------------------


@pytest.mark.equation("eq-strategies-first-step")
@pytest.mark.parametrize("decay", [1.0, 0.5, 0.1])
def test_adams_first_step_is_the_groups_rate_times_the_root_of_its_size(decay):
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 2))
    names = {name for name, _ in model.named_parameters()}
    phase = tk.finetune(1, lr=0.01, layer_decay=decay, weight_decay=0.0)
    optimizer = tk.plan.begin(phase, model, names)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    (100 * F.cross_entropy(model(torch.randn(20, 6)), torch.randint(2, (20,)))).backward()
    optimizer.step()
    gone = [float((p - q).detach().norm()) for p, q in zip(model.parameters(), before, strict=True)]
    sizes = [parameter.numel() for parameter in model.parameters()]
    for depth, at in enumerate((4, 2, 0)):  # weight and bias of each group, from the head
        expected = 0.01 * decay**depth * math.sqrt(sizes[at] + sizes[at + 1])
        assert math.hypot(gone[at], gone[at + 1]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.equation("eq-strategies-gradual")
def test_a_group_learns_in_all_phases_from_the_one_that_opens_it():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    names, epochs = {name for name, _ in model.named_parameters()}, (3, 1, 2, 5)
    learnt = dict.fromkeys(names, 0)
    for phase in tk.gradual_unfreezing(4, epochs=epochs):
        for name in tk.plan.trained(phase, model, names):
            learnt[name] += phase.epochs
    for depth in range(4):
        assert learnt[f"{3 - depth}.weight"] == sum(epochs[depth:])


# -- the price ------------------------------------------------------------------------------------

WIDTHS = [6, 10, 16, 8, 12, 4]


def chain():
    return nn.Sequential(*[nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(WIDTHS)])


def forward_flops(items=1):
    return [2 * items * a * b for a, b in itertools.pairwise(WIDTHS)]


@pytest.mark.equation("eq-strategies-step-cost")
@pytest.mark.parametrize(("first", "end"), [(0, 5), (0, 1), (2, 3), (1, 4), (4, 5), (3, 5)])
def test_a_step_costs_one_forward_below_three_for_what_learns_and_two_above(first, end):
    model, items = chain().requires_grad_(False), 7
    model[first:end].requires_grad_(True)
    with FlopCounterMode(display=False) as counted:
        model(torch.randn(items, WIDTHS[0])).square().sum().backward()
    each = forward_flops(items)
    below, own, above = sum(each[:first]), sum(each[first:end]), sum(each[end:])
    assert counted.get_total_flops() == below + 3 * own - each[first] + 2 * above


@pytest.mark.equation("eq-strategies-run-cost")
@pytest.mark.parametrize("cache", [False, True])
def test_with_a_cache_what_lies_below_is_paid_once_and_without_it_every_epoch(
    cache, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRANSFERKIT_CACHE", str(tmp_path))
    items, epochs, first = 60, 5, 3
    data = torch.randn(items, WIDTHS[0]), torch.arange(items) % 4
    plan = tk.finetune(epochs, last=5 - first, cache=cache, lr=1e-3)
    with FlopCounterMode(display=False) as counted:
        tk.fit(chain(), tk.classification(), data, plan=plan, batch_size=12, precision="fp32")
    each = forward_flops()
    below, rest = sum(each[:first]), 3 * sum(each[first:]) - each[first]
    expected = items * ((1 if cache else epochs) * below + epochs * rest)
    look = 10 * sum(each)  # items that a fit sends through first, to find a wrong shape
    assert expected <= counted.get_total_flops() <= expected + look


@pytest.mark.equation("eq-strategies-bytes")
@pytest.mark.parametrize("last", [1, 2, 5])
def test_weights_gradients_and_moments_take_the_printed_bytes(last):
    model = chain().to(torch.float32)
    names = {name for name, _ in model.named_parameters()}
    optimizer = tk.plan.begin(tk.finetune(1, last=last), model, names)
    model(torch.randn(3, WIDTHS[0], dtype=torch.float32)).square().sum().backward()
    optimizer.step()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    gradients = sum(
        p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None
    )
    moments = sum(
        part.numel() * part.element_size()
        for state in optimizer.state.values()
        for name, part in state.items()
        if name.startswith("exp_avg")
    )
    everything = sum(p.numel() for p in model.parameters())
    learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert weights + gradients + moments == 4 * everything + 12 * learns
