"""Mix-up, distillation, L2-SP and adversarial training against their formulas."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import transferkit as tk
from transferkit import regularised


def problem(seed=0, items=8, width=4, classes=3):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(items, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (items,), generator=generator)
    return tk.data.Batch(inputs, labels, torch.arange(items))


def network(seed=0, width=4, classes=3, dropout=0.0):
    torch.manual_seed(seed)
    layers = [nn.Linear(width, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, classes)]
    return nn.Sequential(*layers).double()


# ---- mix-up -------------------------------------------------------------------------------------


def _drawn(alpha, items, seed):
    # The share and the partners that a step of this seed draws.
    torch.manual_seed(seed)
    alpha = torch.tensor(alpha)
    return torch.distributions.Beta(alpha, alpha).sample(), torch.randperm(items)


@settings(max_examples=25)
@given(seed=st.integers(0, 9999), items=st.integers(1, 9), alpha=st.sampled_from([0.2, 1.0]))
def test_mixup_is_the_cross_entropy_against_the_mixed_label_of_the_mixed_input(seed, items, alpha):
    batch, model = problem(seed, items), network()
    share, partner = _drawn(alpha, items, seed)
    hot = F.one_hot(batch.labels, 3).double()
    mixed, target = (share * x + (1 - share) * x[partner] for x in (batch.inputs, hot))
    torch.manual_seed(seed)
    found = tk.mixup(tk.classification(), alpha)(model, batch).mean()
    assert found.item() == pytest.approx(F.cross_entropy(model(mixed), target).item(), rel=1e-6)


def test_mixup_of_measured_values_has_the_gradient_of_the_mixed_value():
    batch, model = problem(1, classes=5), network(classes=1)
    batch.labels = batch.labels.double()
    share, partner = _drawn(0.2, 8, 3)
    mixed, target = (share * x + (1 - share) * x[partner] for x in (batch.inputs, batch.labels))
    expected = torch.autograd.grad(F.mse_loss(model(mixed)[:, 0], target), model.parameters())
    torch.manual_seed(3)
    loss = tk.mixup(tk.regression())(model, batch).mean()
    found = torch.autograd.grad(loss, model.parameters())
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-9)


def test_mixup_knows_its_counts_whatever_it_draws():
    objective = tk.mixup(tk.classification(class_weights=(0.5, 2.0, 1.0)))
    batch = problem(2)
    for seed in range(5):
        torch.manual_seed(seed)
        assert objective(network(), batch).counts == objective.counts(batch)


def test_the_shares_of_mixup_follow_the_beta_distribution():
    model, batch = nn.Linear(1, 1).double(), problem(items=2)
    batch.inputs, batch.labels = torch.tensor([[0.0], [1.0]]).double(), torch.zeros(2)
    seen = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].max().item()))
    torch.manual_seed(0)
    while len(seen) < 400:
        tk.mixup(tk.regression(), 0.5)(model, batch)
    shares = torch.tensor(seen)  # 1 where both partners are themselves, else max(share, 1 - share)
    shares = shares[shares < 1]
    expected = 0.5 + 1 / math.pi  # the mean of max(b, 1 - b) for b ~ Beta(1/2, 1/2)
    assert abs(shares.mean().item() - expected) < 4 * shares.std().item() / len(shares) ** 0.5


def test_mixup_leaves_evaluation_alone():
    batch, model = problem(), network()
    objective = tk.mixup(tk.classification())
    loss = objective.loss(objective.outputs(model, batch), batch)
    assert loss.mean() == tk.classification()(model, batch).mean()


@pytest.mark.parametrize(
    "inner",
    [
        tk.contrastive(),
        tk.adversarial(tk.classification(), 0.1),
        tk.mixup(tk.classification()),
        tk.l2_sp(tk.distillation(tk.classification(), nn.Linear(4, 3)), network()),
    ],
    ids=["contrastive", "adversarial", "mixup", "distillation"],
)
def test_mixup_refuses_objectives_it_cannot_mix(inner):
    with pytest.raises(TypeError, match="put it inside"):
        tk.mixup(inner)


def test_mixup_refuses_tokens_and_items_without_labels():
    objective, model = tk.mixup(tk.classification()), network()
    with pytest.raises(TypeError, match=r"int64.*adversarial\(\) for texts"):
        objective(model, tk.data.Batch(torch.zeros(2, 4).long(), torch.zeros(2), torch.arange(2)))
    with pytest.raises(TypeError, match="are dict"):
        objective(model, tk.data.Batch({}, torch.zeros(2), torch.arange(2)))
    with pytest.raises(TypeError, match="have no labels"):
        objective(model, tk.data.Batch(torch.zeros(2, 4), None, torch.arange(2)))
    with pytest.raises(ValueError, match=r"alpha is 0\.0"):
        tk.mixup(tk.classification(), 0.0)


# ---- distillation -------------------------------------------------------------------------------


@settings(max_examples=25)
@given(seed=st.integers(0, 9999), heat=st.floats(0.5, 8.0), weight=st.floats(0.0, 1.0))
def test_distillation_is_the_weighted_sum_with_the_squared_temperature(seed, heat, weight):
    batch, model, teacher = problem(seed), network(1), network(2)
    found = tk.distillation(tk.classification(), teacher, heat, weight)(model, batch)
    logits, taught = model(batch.inputs), teacher(batch.inputs)
    old, new = (torch.softmax(z / heat, 1) for z in (taught, logits))
    soft = heat**2 * (old * (old / new).log()).sum(1).mean()
    expected = (1 - weight) * F.cross_entropy(logits, batch.labels) + weight * soft
    assert found.mean().item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)
    assert found.counts == tk.distillation(tk.classification(), teacher).counts(batch)


def test_the_teacher_is_a_copy_in_eval_mode_that_nothing_trains():
    batch, model = problem(), network(dropout=0.5).train()
    objective = tk.distillation(tk.classification(), model, weight=1.0)
    model.eval()
    assert objective(model, batch).mean().abs() < 1e-12  # it agrees with itself
    with torch.no_grad():
        model[0].weight += 1.0
    assert objective(model, batch).mean() > 1e-3
    objective(model, batch).mean().backward()
    assert all(p.grad is None for p in objective.teacher.parameters())
    assert not objective.teacher.training and objective.teacher[0].weight is not model[0].weight


def test_with_mixup_inside_the_teacher_sees_the_mixed_inputs():
    batch, model, teacher = problem(), network(1), network(2)
    share, partner = _drawn(0.2, 8, 5)
    mixed = share * batch.inputs + (1 - share) * batch.inputs[partner]
    objective = tk.distillation(tk.mixup(tk.classification()), teacher, weight=1.0)
    torch.manual_seed(5)
    found = objective(model, batch).mean()
    logits, taught = (m(mixed).div(2).log_softmax(1) for m in (model, teacher))
    expected = 4 * F.kl_div(logits, taught, log_target=True, reduction="batchmean")
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_distillation_names_what_does_not_fit():
    batch, model = problem(), network()
    with pytest.raises(ValueError, match=r"calls the model 2 times.*put distillation inside"):
        tk.distillation(tk.adversarial(tk.classification(), 0.1), model)(model, batch)
    with pytest.raises(ValueError, match=r"\(8, 3\) and the teacher's \(8, 5\)"):
        tk.distillation(tk.classification(), network(classes=5))(model, batch)
    for settings_of in ({"temperature": 0.0}, {"weight": 1.5}, {"weight": -0.1}):
        with pytest.raises(ValueError, match="are expected"):
            tk.distillation(tk.classification(), model, **settings_of)


def test_two_teachers_make_two_objectives():
    one, same, other = (tk.distillation(tk.classification(), network(s)) for s in (1, 1, 2))
    assert one == same != other and repr(one) == repr(same) != repr(other)


# ---- adversarial training -----------------------------------------------------------------------


def test_the_fast_gradient_is_the_largest_first_order_increase_of_the_given_norm():
    batch, model = problem(), network()
    inputs = batch.inputs.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(model(inputs), batch.labels), inputs)
    for norm, expected in (
        ("l2", 0.1 * slope / slope.norm(dim=1, keepdim=True)),
        ("linf", 0.1 * slope.sign()),
    ):
        move = tk.adversarial(tk.classification(), 0.1, norm=norm).perturbation(model, batch)
        torch.testing.assert_close(move, expected)
    assert all(parameter.grad is None for parameter in model.parameters())


@settings(max_examples=20)
@given(seed=st.integers(0, 9999), epsilon=st.floats(1e-5, 1e-3))
def test_the_loss_grows_by_epsilon_times_the_norm_of_the_gradient(seed, epsilon):
    batch, model = problem(seed), network(seed)
    inputs = batch.inputs.clone().requires_grad_()
    each = F.cross_entropy(model(inputs), batch.labels, reduction="none")
    (slope,) = torch.autograd.grad(each.sum(), inputs)
    move = tk.adversarial(tk.classification(), epsilon).perturbation(model, batch)
    moved = F.cross_entropy(model(batch.inputs + move), batch.labels, reduction="none")
    growth = (moved - each).detach()
    torch.testing.assert_close(growth, epsilon * slope.norm(dim=1), rtol=0, atol=4 * epsilon**2)


@settings(max_examples=20)
@given(
    seed=st.integers(0, 9999),
    steps=st.integers(1, 5),
    norm=st.sampled_from(["l2", "linf"]),
    step=st.sampled_from([None, 0.01, 3.0]),
)
def test_the_move_stays_in_its_ball_for_each_item(seed, steps, norm, step):
    objective = tk.adversarial(tk.classification(), 0.3, steps, norm, step=step)
    batch = problem(seed)
    move = objective.perturbation(network(seed), batch)
    size = move.flatten(1).norm(dim=1) if norm == "l2" else move.abs().amax(1)
    assert move.shape == batch.inputs.shape and size.max() <= 0.3 * (1 + 1e-9)


def test_more_steps_find_a_larger_loss_than_the_random_start():
    batch, model = problem(), network()
    torch.manual_seed(0)
    losses = []
    for step in (1e-12, None):
        objective = tk.adversarial(tk.classification(), 1.0, 5, clean=0.0, step=step)
        losses.append(objective(model, batch).mean().item())
    assert losses[1] > losses[0] + 0.1


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_random_starts_fill_the_ball_evenly(norm):
    objective = tk.adversarial(tk.classification(), 2.0, 2, norm)
    torch.manual_seed(0)
    start = objective._start(torch.zeros(4000, 3))
    radius = start.norm(dim=1) / 2 if norm == "l2" else start.abs().amax(1) / 2
    shares = (radius.detach() ** 3).sort().values  # even in [0, 1] in three dimensions
    assert (shares - torch.linspace(0, 1, 4000)).abs().max() < 1.9 / 4000**0.5
    assert start.mean(0).abs().max() < 0.1


def test_the_training_loss_is_the_clean_one_and_that_at_the_move():
    batch, model = problem(), network()
    inner = tk.classification(class_weights=(1.0, 2.0, 0.5))
    for clean in (0.0, 1.0, 0.25):
        objective = tk.adversarial(inner, 0.2, clean=clean)
        move = objective.perturbation(model, batch)
        moved = tk.data.Batch(batch.inputs + move, batch.labels, batch.index)
        expected = clean * inner(model, batch).mean() + inner(model, moved).mean()
        loss = objective(model, batch)
        assert loss.mean().item() == pytest.approx(expected.item(), rel=1e-12)
        assert loss.counts == objective.counts(batch)
        fixed = torch.autograd.grad(expected, model.parameters())
        found = torch.autograd.grad(loss.mean(), model.parameters())
        for left, right in zip(found, fixed, strict=True):  # the move itself has no gradient
            torch.testing.assert_close(left, right)


def test_every_pass_of_a_step_draws_the_same_dropout_and_mixup():
    batch, model = problem(), network(dropout=0.5).train()
    masks = []
    model[2].register_forward_hook(lambda m, i, output: masks.append(output.detach() == 0))
    for objective in (
        tk.adversarial(tk.classification(), 0.1),
        tk.adversarial(tk.mixup(tk.classification()), 0.1, 3),
    ):
        masks.clear()
        before = torch.get_rng_state()
        objective(model, batch)
        assert len(masks) in (2, 5) and all(torch.equal(masks[0], mask) for mask in masks)
        assert not torch.equal(before, torch.get_rng_state())
    # the clean part is what the inner objective alone would have drawn
    torch.manual_seed(1)
    alone = tk.mixup(tk.classification())(model, batch).mean()
    torch.manual_seed(1)
    loss = tk.adversarial(tk.mixup(tk.classification()), 0.1)(model, batch)
    assert loss.means()["loss"] == alone


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"other": nn.Linear(5, 5), "table": nn.Embedding(20, 5)})
        self.head = nn.Linear(5, 3)

    def forward(self, input_ids):
        return self.head(self.body["other"](self.body["table"](input_ids)).tanh().mean(1))


def test_the_embeddings_of_tokens_are_moved_where_inputs_cannot_be():
    torch.manual_seed(0)
    model = Tokens()
    ids, labels = torch.randint(0, 20, (6, 4)), torch.randint(0, 3, (6,))
    batch = tk.data.Batch({"input_ids": ids}, labels, torch.arange(6))
    objective = tk.adversarial(tk.classification(), 0.5)
    move = objective.perturbation(model, batch)
    assert move.shape == (6, 4, 5)
    torch.testing.assert_close(move.flatten(1).norm(dim=1), torch.full((6,), 0.5))
    table = model.body["table"](ids)
    expected = model.head(model.body["other"](table + move).tanh().mean(1))
    found = objective(model, batch).means()["adversarial loss"]
    torch.testing.assert_close(found, F.cross_entropy(expected, labels))
    assert not model.body["table"]._forward_hooks
    named = tk.adversarial(tk.classification(), 0.5, at="body.other").perturbation(model, batch)
    assert not torch.allclose(named, move)


def test_adversarial_training_names_what_does_not_fit():
    batch, model = problem(), network()
    for settings_of in ({"epsilon": 0.0}, {"steps": 0}, {"norm": "l1"}, {"clean": -1}, {"step": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(settings_of))} is .*: give"):
            tk.adversarial(tk.classification(), **{"epsilon": 0.1, **settings_of})
    with pytest.raises(ValueError, match=r"no such module"):
        tk.adversarial(tk.classification(), 0.1, at="stem")(model, batch)
    batch.inputs = batch.inputs.long()
    with pytest.raises(ValueError, match=r"no nn\.Embedding"):
        tk.adversarial(tk.classification(), 0.1)(model, batch)

    class Lists(nn.Module):
        def forward(self, inputs):
            return [inputs]

    listed = nn.Sequential(nn.Linear(4, 4), Lists())
    with pytest.raises(ValueError, match="gives a list"):
        tk.adversarial(tk.classification(), 0.1, at="1")(listed, problem_in_float32())
    listed[1].spare = nn.Linear(4, 4)
    listed[1].forward = lambda inputs: inputs
    with pytest.raises(ValueError, match=r"'1\.spare' takes no part"):
        tk.adversarial(tk.classification(), 0.1, at="1.spare")(listed, problem_in_float32())


def problem_in_float32():
    batch = problem()
    batch.inputs = batch.inputs.float()
    return batch


def test_an_item_without_a_gradient_is_not_moved_and_small_ones_are_not_lost():
    tiny = torch.tensor([[3e-25, 4e-25], [0.0, 0.0]])
    found = regularised._unit(tiny)
    assert torch.allclose(found, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


# ---- all of them --------------------------------------------------------------------------------


def test_wrapped_objectives_are_values_that_copy_and_answer_for_the_inner_one():
    model = network()
    inner = tk.token_classification()
    for objective in (
        tk.adversarial(inner, 0.1),
        tk.mixup(inner),
        tk.l2_sp(inner, model),
        tk.distillation(inner, model),
    ):
        # what is read back was written on this line: nothing from outside is unpickled
        for twin in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
            assert twin == objective and hash(twin) == hash(objective)
        assert objective.additive and objective.scored == inner.scored
        assert objective.validate == inner.validate
        assert hasattr(objective, "penalty") == isinstance(objective, regularised.L2SP)
        with pytest.raises(AttributeError, match="nothing"):
            _ = objective.nothing
    assert not tk.adversarial(tk.contrastive(), 0.1).additive
