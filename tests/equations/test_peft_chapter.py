"""The formulas of *A few parameters beside the model*, each computed in another way."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import transferkit as tk
from transferkit.models import bert, text_stages
from transferkit.peft import Bottleneck, Prefixed, Rescaled

WIDTH, INNER, HEADS, LAYERS = 12, 24, 3, 2
CONFIG = {
    "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS,
    "intermediate_size": INNER, "vocab_size": 30, "max_position_embeddings": 16,
}  # fmt: skip


def encoder():
    """A small BERT with a head, in float64, whose layers alone can be adapted."""
    torch.manual_seed(1)
    stages = text_stages(bert(CONFIG, None), None, "small")
    return tk.Staged([*stages, ("head", nn.Linear(WIDTH, 2))]).double()


def added(model):
    """How many parameters a method trains beside the head."""
    parts = model.named_parameters()
    return sum(part.numel() for name, part in parts if part.requires_grad and "head" not in name)


@pytest.mark.equation("eq-peft-gradient-rank")
def test_the_gradient_of_a_matrix_is_a_sum_of_one_outer_product_an_input():
    x, layer, y = torch.randn(5, 9), nn.Linear(9, 7), torch.randn(5, 7)
    outputs = layer(x)
    outputs.retain_grad()
    torch.tanh(outputs).sub(y).square().sum().backward()
    by_hand = sum(torch.outer(outputs.grad[i], x[i]) for i in range(5))
    assert torch.allclose(layer.weight.grad, by_hand, atol=1e-12)
    assert torch.linalg.matrix_rank(layer.weight.grad) == 5
    for _ in range(2):  # two steps on the same inputs leave the rank where it is
        before = layer.weight.detach().clone()
        layer.zero_grad()
        torch.tanh(layer(x)).sub(y).square().sum().backward()
        with torch.no_grad():
            layer.weight -= 0.1 * layer.weight.grad
        assert torch.linalg.matrix_rank(layer.weight.detach() - before, rtol=1e-9) <= 5


def lora_layer(r=3, alpha=6.0, inputs=9, outputs=7, seed=0):
    """One linear layer with LoRA of the library, its weight of before, and its factors."""
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(inputs, outputs, bias=False))
    model = tk.Staged([("body", body), ("head", nn.Linear(outputs, 2))]).double()
    weight = body[0].weight.detach().clone()
    tk.lora(model, r=r, alpha=alpha, targets="all", seed=seed)
    layer = model.body[0]
    return layer, weight, layer.lora_A.default.weight, layer.lora_B.default.weight


@pytest.mark.equation("eq-peft-gradients")
def test_the_gradients_of_both_factors_are_the_whole_gradient_seen_through_the_other():
    layer, weight, a, b = lora_layer()
    with torch.no_grad():
        b.normal_()
    x, y = torch.randn(11, 9), torch.randn(11, 7)
    F.mse_loss(torch.tanh(layer(x)), y).backward()
    changed = (weight + 2.0 * b.detach() @ a.detach()).requires_grad_()
    F.mse_loss(torch.tanh(x @ changed.T), y).backward()
    whole = changed.grad
    assert torch.allclose(b.grad, 2.0 * whole @ a.detach().T, atol=1e-12)
    assert torch.allclose(a.grad, 2.0 * b.detach().T @ whole, atol=1e-12)
    step = 1e-6  # and against finite differences
    with torch.no_grad():
        old = F.mse_loss(torch.tanh(layer(x)), y)
        b[2, 1] += step
        new = F.mse_loss(torch.tanh(layer(x)), y)
    assert ((new - old) / step).item() == pytest.approx(b.grad[2, 1].item(), rel=1e-4)


@pytest.mark.equation("eq-peft-first-step")
def test_a_first_step_of_gradient_descent_is_the_whole_one_seen_through_a():
    layer, weight, a, b = lora_layer()
    x, y = torch.randn(11, 9), torch.randn(11, 7)
    start = a.detach().clone()
    optimiser = torch.optim.SGD([a, b], lr=0.1)
    F.mse_loss(layer(x), y).backward()
    assert (a.grad == 0).all() and (b.grad != 0).any()
    optimiser.step()
    assert torch.equal(a.detach(), start)
    change = 2.0 * b.detach() @ a.detach()
    whole = weight.clone().requires_grad_()
    F.mse_loss(x @ whole.T, y).backward()
    expected = -0.1 * 2.0**2 * whole.grad @ start.T @ start
    assert torch.allclose(change, expected, atol=1e-12)
    drawn = torch.stack([lora_layer(seed=s)[2].detach() for s in range(400)])
    mean = (drawn.mT @ drawn).mean(0)  # of A'A: r / (3 d) times the identity
    assert torch.allclose(mean, 3 / (3 * 9) * torch.eye(9), atol=0.03)


@pytest.mark.equation("eq-peft-adam-step")
@pytest.mark.parametrize(("r", "alpha", "d"), [(8, 16.0, 384), (4, 8.0, 64), (1, 2.0, 100)])
def test_the_first_step_of_adam_with_lora_is_shorter_by_the_factor_of_the_page(r, alpha, d):
    squares = []
    for seed in range(8):
        layer, _, a, b = lora_layer(r, alpha, d, 50, seed)
        optimiser = torch.optim.Adam([a, b], lr=1.0, eps=1e-15)
        layer(torch.randn(6, d)).square().sum().backward()
        optimiser.step()
        squares.append(((alpha / r) * b.detach() @ a.detach()).square().mean().item())
    assert math.sqrt(np.mean(squares)) == pytest.approx(alpha / math.sqrt(3 * r * d), rel=0.15)
    whole = nn.Linear(d, 50)
    optimiser = torch.optim.Adam(whole.parameters(), lr=1.0, eps=0.0)
    before = whole.weight.detach().clone()
    whole(torch.randn(6, d)).square().sum().backward()
    optimiser.step()
    size = (whole.weight.detach() - before).square().mean().sqrt().item()
    assert size == pytest.approx(1.0, rel=1e-6)


@pytest.mark.equation("eq-peft-orthogonality")
def test_the_penalty_of_adalora_is_the_distance_of_both_grams_from_the_identity():
    model = tk.adalora(encoder(), r=2, start=4, orthogonality=0.5)
    expected = 0.0
    for module in model.modules():
        if hasattr(module, "lora_E"):
            p, q = module.lora_B.default.detach(), module.lora_A.default.detach()
            for gram in (p.T @ p, q @ q.T):
                eigenvalues = torch.linalg.eigvalsh(gram)  # of a symmetric matrix
                expected += 0.5 * (eigenvalues - 1).square().sum()
    assert torch.allclose(model.adaptation.penalty(model), torch.as_tensor(expected))


@pytest.mark.equation("eq-peft-budget")
def test_the_budget_of_adalora_falls_along_a_cubic_from_start_to_end():
    model = tk.adalora(encoder(), r=2, start=6, warmup=0.1, final=0.3)
    allocation, matrices, updates = model.adaptation, 8, 200
    first, last = 20, 200 - 1 - 60
    for update in range(updates):
        found = allocation.budget(matrices, update, updates)
        if update < first:
            expected = 6 * matrices
        else:
            left = max(0.0, 1 - (update - first + 1) / (last - first + 1))
            expected = 2 * matrices + math.floor((6 - 2) * matrices * left**3)
        assert found == expected
    assert allocation.budget(matrices, last, updates) == 2 * matrices


@pytest.mark.equation("eq-peft-sensitivity")
def test_taking_a_weight_away_changes_the_loss_by_minus_weight_times_gradient():
    x, y = torch.randn(20, 4), torch.randn(20)
    for size in (1e-2, 1e-3):
        weight = torch.tensor([0.5, size, -0.3, 0.2], requires_grad=True)
        loss = (torch.tanh(x @ weight) - y).square().mean()
        (gradient,) = torch.autograd.grad(loss, weight)
        without = weight.detach().clone()
        without[1] = 0.0
        change = (torch.tanh(x @ without) - y).square().mean() - loss
        first = -(weight.detach()[1] * gradient[1])
        assert abs((change - first).item()) < 2 * size**2  # what is left is of second order


@pytest.mark.equation("eq-peft-prefix")
def test_a_prefix_mixes_attention_to_itself_with_attention_to_the_text():
    attention = bert(CONFIG, None).double().encoder.layer[0].attention.self.eval()
    wrapped = Prefixed(attention, 4)
    with torch.no_grad():
        wrapped.keys.normal_()
        wrapped.values.normal_()
    hidden = torch.randn(1, 6, WIDTH)
    found, _ = wrapped(hidden, attention_mask=None)
    size = WIDTH // HEADS
    for head in range(HEADS):
        part = slice(size * head, size * (head + 1))
        q, k, v = (f(hidden[0])[:, part] for f in (attention.query, attention.key, attention.value))
        of_text = (q @ k.T / math.sqrt(size)).exp()
        of_prefix = (q @ wrapped.keys[head].T / math.sqrt(size)).exp()
        share = of_prefix.sum(1) / (of_prefix.sum(1) + of_text.sum(1))
        to_text = of_text / of_text.sum(1, keepdim=True) @ v
        to_prefix = of_prefix / of_prefix.sum(1, keepdim=True) @ wrapped.values[head]
        mixed = (1 - share)[:, None] * to_text + share[:, None] * to_prefix
        assert torch.allclose(found[0, :, part], mixed, atol=1e-9)


@pytest.mark.equation("eq-peft-ia3")
def test_factors_of_outputs_or_inputs_are_a_plain_layer_with_other_weights():
    x = torch.randn(5, 6)
    for inputs in (False, True):
        layer = nn.Linear(6, 4)
        wrapped = Rescaled(layer, inputs)
        with torch.no_grad():
            wrapped.scale.normal_()
        s, weight, bias = wrapped.scale.detach(), layer.weight.clone(), layer.bias.clone()
        matrix = weight @ torch.diag(s) if inputs else torch.diag(s) @ weight
        shift = bias if inputs else s * bias
        assert torch.allclose(wrapped(x), x @ matrix.T + shift, atol=1e-12)


@pytest.mark.equation("eq-peft-adapter")
def test_an_adapter_adds_what_comes_through_its_bottleneck():
    layer = nn.Linear(5, 6)
    wrapped, x = Bottleneck(layer, 3), torch.randn(4, 5)
    assert torch.equal(wrapped(x), layer(x))
    nn.init.normal_(wrapped.up.weight)
    y = layer(x).detach().numpy()
    d, b, u, c = (
        p.detach().numpy() for p in (*wrapped.down.parameters(), *wrapped.up.parameters())
    )
    inner = y @ d.T + b
    gelu = np.vectorize(lambda t: t * 0.5 * (1 + math.erf(t / math.sqrt(2))))
    assert np.allclose(wrapped(x).detach().numpy(), y + gelu(inner) @ u.T + c, atol=1e-12)


@pytest.mark.equation("eq-peft-counts")
def test_each_method_adds_as_many_parameters_as_its_formula_says():
    d, h, k, r, w, p = WIDTH, INNER, LAYERS, 3, 5, 4
    assert added(tk.lora(encoder(), r=r)) == k * 8 * d * r
    assert added(tk.adalora(encoder(), r=2, start=r)) == k * 4 * r * (2 * d + 1)
    assert added(tk.adapters(encoder(), bottleneck=w)) == k * 2 * (2 * d * w + w + d)
    assert added(tk.prefix(encoder(), length=p)) == k * 2 * d * p
    assert added(tk.ia3(encoder())) == k * (2 * d + h)
    model = encoder()
    tk.freeze(model)
    tk.unfreeze(model, *[f"layer.{i}.*.bias" for i in range(k)])
    assert added(model) == k * (8 * d - d + h)


@pytest.mark.equation("eq-peft-operations")
@pytest.mark.parametrize("layers", [2, 5, 12])
def test_the_products_of_a_step_are_those_that_a_counter_sees(layers):
    d, n = 8, 16
    one = 2 * n * d * d

    def counted(trained, cached=False, biases=False):
        stack = nn.Sequential(*(nn.Linear(d, d) for _ in range(layers)))
        stack.requires_grad_(False)
        for layer in list(stack)[layers - trained :]:
            layer.bias.requires_grad_(True)
            layer.weight.requires_grad_(not biases)
        part = stack[layers - trained :] if cached else stack
        with FlopCounterMode(display=False) as counter:
            part(torch.randn(n, d)).sum().backward()
        return counter.get_total_flops() / one

    assert counted(layers) == 3 * layers - 1
    assert counted(layers, biases=True) == 2 * layers - 1
    for k in range(1, layers):
        assert counted(k) == layers + 2 * k - 1
        assert counted(k, cached=True) == 3 * k - 1


@pytest.mark.equation("eq-peft-interpolation")
def test_between_two_models_lies_the_start_plus_a_share_of_the_task_vector():
    start, end = encoder(), encoder()
    with torch.no_grad():
        for part in end.parameters():
            part.add_(torch.randn_like(part))
        end.head.load_state_dict(start.head.state_dict())
    mixed = dict(tk.interpolate(start, end, 0.3).named_parameters())
    stepped = dict(tk.task_vector(end, start).apply(start, 0.3).named_parameters())
    for name, part in start.named_parameters():
        expected = part + 0.3 * (dict(end.named_parameters())[name] - part)
        assert torch.allclose(mixed[name], expected, atol=1e-12)
        assert torch.allclose(stepped[name], expected, atol=1e-12)


@pytest.mark.equation("eq-peft-mixed-loss")
def test_between_two_linear_heads_the_loss_is_at_most_the_mixture_of_the_losses():
    x, y = torch.randn(40, 6), torch.randint(3, (40,))
    for seed in range(20):
        torch.manual_seed(seed)
        a, b = nn.Linear(6, 3), nn.Linear(6, 3)
        ends = [F.cross_entropy(head(x), y).item() for head in (a, b)]
        for weight in (0.2, 0.5, 0.9):
            mixed = F.cross_entropy(tk.interpolate(a, b, weight)(x), y).item()
            assert mixed <= (1 - weight) * ends[0] + weight * ends[1] + 1e-12


@pytest.mark.equation("eq-peft-lora")
def test_the_layer_of_the_page_is_that_of_the_library():
    page = Path(__file__).parents[2] / "book" / "fine-tuning" / "peft.md"
    listing = page.read_text("utf-8").split("```python\nclass LowRank", 1)[1].split("```", 1)[0]
    names = {"nn": nn, "torch": torch, "math": math}
    exec("class LowRank" + listing, names)
    theirs = tk.lora(encoder(), r=3, alpha=6.0)
    ours = names["lora_by_hand"](encoder(), r=3, alpha=6.0).double()
    wrapped = {n: m for n, m in ours.named_modules() if isinstance(m, names["LowRank"])}
    assert len(wrapped) == 4 * LAYERS
    with torch.no_grad():
        for name, module in wrapped.items():
            module.a.copy_(theirs.get_submodule(name).lora_A.default.weight)
    batch = {"input_ids": torch.randint(30, (6, 8)), "attention_mask": torch.ones(6, 8).long()}
    for model in (ours, theirs):
        model.eval()
        optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
        for _ in range(5):
            optimiser.zero_grad()
            F.cross_entropy(model(batch), torch.arange(6) % 2).backward()
            optimiser.step()
    moved = (theirs(batch) - encoder().eval()(batch)).abs().max()
    assert moved > 1e-3 and torch.allclose(ours(batch), theirs(batch), atol=1e-10)
    layer = theirs.get_submodule(next(iter(wrapped)))
    change = 2.0 * layer.lora_B.default.weight @ layer.lora_A.default.weight
    x = torch.randn(3, WIDTH)
    expected = layer.base_layer(x) + x @ change.T
    assert torch.allclose(layer(x), expected, atol=1e-12)
    assert torch.linalg.matrix_rank(change) <= 3
