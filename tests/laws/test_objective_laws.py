"""Laws of the objectives: sums of parts (1), no cache below the cut (3), resume (4), no host reads
(10), and what L2-SP and distillation promise (12)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import (
    Block,
    Embed,
    noisy_flip,
    same,
    some_images,
    some_texts,
    state_of,
    tiny_convnet,
    tiny_encoder,
)
from test_counters import HOST_READS, Counter
from torch import nn

import transferkit as tk
from transferkit import data, devices
from transferkit.engine import Training


class PerToken(nn.Module):
    def __init__(self, width, outputs):
        super().__init__()
        self.scores = nn.Linear(width, outputs)

    def forward(self, state):
        return self.scores(state["hidden"])


def tokens_model(outputs, dropout=0.2):
    torch.manual_seed(0)
    stages = [("embeddings", Embed(8)), ("layer.0", Block(8, dropout))]
    return tk.Staged([*stages, ("head", PerToken(8, outputs))])


class Tagged:
    """Texts whose every token has a label, its number modulo 3; one in five has none."""

    labels = views = None

    def __init__(self, count):
        self.texts = some_texts(count)
        self.lengths = self.texts.lengths

    def __len__(self):
        return len(self.texts)

    def fetch(self, indices, epoch, seed):
        batch = self.texts.fetch(indices, epoch, seed)
        ids = batch.inputs["input_ids"]
        tags = (ids % 3).masked_fill((ids % 5 == 0), -100)
        return data.Batch(batch.inputs, tags, batch.index)

    def fingerprint(self):
        return self.texts.fingerprint()


def spanned(count):
    """Texts with a span of each, of which every third is not known."""
    texts = some_texts(count)
    ends = torch.from_numpy(texts.lengths) - 1
    labels = torch.stack([ends // 2, ends], 1)
    labels[::3] = -100
    texts.labels = labels
    return texts


def masked(count):
    return tk.masked(some_texts(count), mask=1, special=(0,), vocabulary=50, rate=0.3)


def numbers(count):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 4, generator=generator)
    return data.tensors(inputs, torch.randint(0, 3, (count,), generator=generator))


def network(outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs))


def projected(dropout=0.0):
    model = tiny_encoder(dropout=dropout)
    return tk.Staged([*model._pairs()[:-1], ("head", nn.Linear(8, 6))])


WEIGHTED = tk.classification(0.1, (0.3, 1.0, 2.5))
# name: objective, model, data; the objective is made after the model, for it may copy its weights
ADDITIVE = {
    "tokens": (lambda m: tk.token_classification(0.1, (0.3, 1.0, 2.5)), tokens_model, 3, Tagged),
    "spans": (lambda m: tk.spans(), tokens_model, 2, spanned),
    "masked": (lambda m: tk.masked_lm(), tokens_model, 50, masked),
    "reconstruction": (lambda m: tk.reconstruction(), network, 4, numbers),
    "distillation": (lambda m: tk.distillation(WEIGHTED, network()), network, 3, numbers),
    "l2_sp": (lambda m: tk.l2_sp(WEIGHTED, m, 0.5, 0.2), network, 3, numbers),
    "fgm": (lambda m: tk.adversarial(WEIGHTED, 0.3), network, 3, numbers),
    "fgm of tokens": (
        lambda m: tk.adversarial(tk.token_classification(), 0.3), tokens_model, 3, Tagged
    ),
    "all": (
        lambda m: tk.l2_sp(tk.adversarial(tk.distillation(WEIGHTED, network()), 0.2), m, 0.5),
        network, 3, numbers,
    ),
}  # fmt: skip


def _moved_off(model):
    # so that the anchor and the teacher differ from the model that is trained
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.sin(torch.arange(parameter.numel())).view_as(parameter)


def _trained(name, count, size, accumulate, seed):
    make, build, outputs, source = ADDITIVE[name]
    model = build(outputs, 0.0) if build is tokens_model else build(outputs)
    objective, items = make(model.double()), source(count)
    if hasattr(objective, "teacher"):
        objective.teacher.double()
    if source is numbers:
        items.inputs = items.inputs.double()
    _moved_off(model)
    phase = tk.finetune(1, lr=0.3, optimizer="sgd", momentum=0.0, weight_decay=0.0, warmup=0.0)
    run = tk.fit(
        model, objective, items, plan=[phase], batch_size=size, accumulate=accumulate, clip=None,
        precision="fp32", seed=seed,
    )  # fmt: skip
    return torch.cat([p.detach().flatten() for p in model.parameters()]), run.history


@pytest.mark.parametrize("name", ADDITIVE)
@settings(max_examples=5, deadline=None)
@given(
    count=st.integers(1, 17), size=st.integers(1, 5), accumulate=st.integers(2, 4),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_accumulated_and_ragged_batches_train_like_one_big_batch(
    name, count, size, accumulate, seed
):
    parts, history = _trained(name, count, size, accumulate, seed)
    order = data.order

    def joined(count, _, seed, epoch, lengths):
        batches = order(count, size, seed, epoch, lengths)
        starts = range(0, len(batches), accumulate)
        return [np.concatenate(batches[at : at + accumulate]) for at in starts]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "order", joined)
        whole, expected = _trained(name, count, size * accumulate, 1, seed)
    assert (parts - whole).abs().max() < 1e-9
    assert history[0]["train_loss"] == pytest.approx(expected[0]["train_loss"], rel=1e-9, abs=1e-12)


def test_accumulated_mixup_is_the_mean_over_the_mixtures_of_its_micro_batches():
    inputs, labels = torch.randn(10, 4, dtype=torch.float64), torch.randint(0, 3, (10,))
    model, total, weight = network().double(), 0.0, torch.tensor([0.3, 1.0, 2.5]).double()
    phase = tk.finetune(1, lr=0.3, optimizer="sgd", momentum=0.0, weight_decay=0.0, warmup=0.0)
    for part, items in enumerate(data.order(10, 4, 7, 0)):
        devices.seed_dropout(torch.device("cpu"), data.mix(7, 0, -1 - part))
        share = torch.distributions.Beta(torch.tensor(0.2), torch.tensor(0.2)).sample()
        x, y = inputs[items], labels[items]
        other = torch.randperm(len(items))
        outputs = model(share * x + (1 - share) * x[other])
        for portion, target in ((share, y), (1 - share, y[other])):
            loss = nn.functional.cross_entropy(outputs, target, weight, reduction="sum")
            total = total + portion * loss
    slopes = torch.autograd.grad(total / weight[labels].sum(), model.parameters())
    expected = [p - 0.3 * slope for p, slope in zip(model.parameters(), slopes, strict=True)]
    objective = tk.mixup(tk.classification(class_weights=weight))
    tk.fit(
        model, objective, (inputs, labels), plan=[phase], batch_size=4, accumulate=3, clip=None,
        precision="fp32", seed=7,
    )  # fmt: skip
    for found, right in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(found.detach(), right.detach(), rtol=1e-6, atol=1e-7)


def test_contrastive_training_refuses_accumulation():
    source = tk.two_views(some_texts(8))
    with pytest.raises(ValueError, match=r"Contrastive couples.*accumulate=1"):
        tk.fit(projected(), tk.contrastive(), source, plan=[tk.finetune(1)], accumulate=2)


# What draws at random, or stands for a kind of task: model, objective of it, data.
RANDOM = {
    "masked": (lambda: tokens_model(50), lambda m: tk.masked_lm(), masked),
    "two views": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8)),
        lambda m: tk.contrastive(0.5),
        lambda count: tk.two_views(some_images(count, noisy_flip)),
    ),
    "pairs": (
        lambda: projected(0.2),
        lambda m: tk.contrastive(0.5, across=True),
        lambda count: tk.two_views(some_texts(count), some_texts(count, seed=1)),
    ),
    "mixup": (tiny_convnet, lambda m: tk.mixup(tk.classification(), 1.0), some_images),
    "pgd": (tiny_convnet, lambda m: tk.adversarial(tk.classification(), 0.1, 3), some_images),
    "fgm of tokens": (tiny_encoder, lambda m: tk.adversarial(WEIGHTED, 0.5), some_texts),
    "l2_sp": (tiny_convnet, lambda m: tk.l2_sp(tk.classification(), m), some_images),
    "tokens": (lambda: tokens_model(3), lambda m: tk.token_classification(), Tagged),
    "spans": (lambda: tokens_model(2), lambda m: tk.spans(), spanned),
    "reconstruction": (
        lambda: network(4), lambda m: tk.reconstruction(), lambda count: numbers(count)
    ),
    "distillation": (
        tiny_encoder, lambda m: tk.distillation(WEIGHTED, tiny_encoder(3)), some_texts
    ),
}  # fmt: skip


class PowerCut(Exception):
    pass


def _fit(name, directory=None, epochs=2, lr=0.01, count=18, **more):
    torch.manual_seed(0)
    build, make, source = RANDOM[name]
    model = build()
    phase = tk.finetune(epochs, lr=lr, weight_decay=0.0)
    run = tk.fit(
        model, make(model), source(count), plan=[phase], batch_size=6, directory=directory,
        save_every=0.0, **more,
    )  # fmt: skip
    return model, run


@pytest.mark.parametrize("name", ["masked", "two views", "mixup", "pgd", "l2_sp", "distillation"])
def test_a_run_with_random_tasks_resumes_bit_for_bit(name, tmp_path):
    step, made = Training.step, []

    def failing(self, micro):
        if len(made) == 4:
            raise PowerCut
        made.append(None)
        step(self, micro)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "step", failing)
        with pytest.raises(PowerCut):
            _fit(name, tmp_path)
    model, run = _fit(name, tmp_path)
    expected, whole = _fit(name)
    assert len(made) == 4 and same(state_of(model), state_of(expected))
    losses = [[row["train_loss"] for row in each.history] for each in (run, whole)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", RANDOM)
def test_training_lowers_the_loss(name):
    _, run = _fit(name, epochs=25, lr=0.03, count=24)
    losses = [row["train_loss"] for row in run.history]
    assert np.mean(losses[-4:]) < 0.93 * losses[0]


@pytest.mark.parametrize("name", RANDOM)
def test_a_step_reads_nothing_back_to_the_host(name, monkeypatch):
    counts, step = [], Training.step

    def counted(self, micro):
        with Counter() as counter:
            step(self, micro)
        counts.append(counter.seen)

    monkeypatch.setattr(Training, "step", counted)
    _fit(name, count=12)
    assert len(counts) == 4
    for read in HOST_READS:
        assert sum(count[read] for count in counts) == 0, read


@pytest.mark.parametrize("name", ["masked", "two views", "pairs", "mixup", "pgd", "fgm of tokens",
                                  "reconstruction", "distillation"])  # fmt: skip
def test_the_cache_refuses_what_acts_below_the_cut(name):
    build, make, source = RANDOM[name]
    model = build()
    with pytest.raises(ValueError, match=r"changes what the frozen layers see.*cache=False"):
        tk.fit(model, make(model), source(6), plan=[tk.linear_probe(1)])


def test_spans_train_on_cached_features_as_on_live_layers():
    heads = []
    for cached in (True, False):
        model = tokens_model(2)
        probe = tk.linear_probe(2, lr=0.1, cache=cached, optimizer="sgd")
        tk.fit(model, tk.spans(), spanned(9), plan=[probe], batch_size=4)
        heads.append(model.head.scores.weight.detach())
    assert (heads[0] - heads[1]).abs().max() < 1e-5
    assert not torch.equal(heads[0], tokens_model(2).head.scores.weight)


# ---- law 12: L2-SP ------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), alpha=st.floats(0.0, 5.0), beta=st.sampled_from([0.0, 0.7]))
def test_l2_sp_is_zero_at_the_start_and_exact_after_a_known_move(seed, alpha, beta):
    model = tiny_convnet(seed).double()
    objective = tk.l2_sp(tk.classification(), model, alpha, beta)
    head = {n: p for n, p in model.named_parameters() if n.startswith("head")}
    expected = beta / 2 * sum(p.detach().square().sum() for p in head.values())
    assert objective.penalty(model).item() == pytest.approx(expected.item() if beta else 0.0)
    assert not set(head) & set(objective.anchor)
    body = {n: p for n, p in model.named_parameters() if n not in head}
    assert set(objective.anchor) == set(body)
    moves = {name: torch.randn_like(parameter) for name, parameter in body.items()}
    with torch.no_grad():
        for name, parameter in body.items():
            parameter += moves[name]
    expected = expected + alpha / 2 * sum(move.square().sum() for move in moves.values())
    penalty = objective.penalty(model)
    assert penalty.item() == pytest.approx(expected.item())
    slopes = torch.autograd.grad(penalty, [*body.values()])
    for slope, move in zip(slopes, moves.values(), strict=True):
        torch.testing.assert_close(slope, alpha * move)


def test_the_anchor_of_l2_sp_is_a_copy_that_training_does_not_move():
    model = tiny_convnet()
    before = state_of(model)
    objective = tk.l2_sp(tk.classification(), model, 10.0)
    plan = [tk.finetune(3, lr=0.01, weight_decay=0.0)]
    tk.fit(model, objective, some_images(12), plan=plan)
    assert all(torch.equal(objective.anchor[name], before[name]) for name in objective.anchor)
    assert objective.penalty(model).item() > 0
    free = tiny_convnet()
    tk.fit(free, tk.classification(), some_images(12), plan=plan)

    def moved(model):
        after = state_of(model)
        return sum(float((after[n] - before[n]).square().sum()) for n in objective.anchor)

    assert moved(model) < 0.5 * moved(free)


def test_frozen_parameters_contribute_nothing_to_l2_sp():
    model = tiny_convnet()
    objective = tk.l2_sp(tk.classification(), model, 1.0, 1.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0
    tk.freeze(model)
    assert objective.penalty(model).item() == 0
    tk.unfreeze(model, "stem")
    count = sum(parameter.numel() for parameter in model.stem.parameters())
    assert objective.penalty(model).item() == pytest.approx(count / 2, rel=1e-5)
    tk.unfreeze(model)
    tk.fit(model, objective, some_images(8), plan=[tk.linear_probe(1)])  # and the cache may stay


def test_the_penalty_of_the_inner_objective_is_kept():
    model = tiny_convnet().double()
    inner = tk.l2_sp(tk.classification(), model, 1.0)
    _moved_off(model)
    twice = tk.mixup(tk.l2_sp(inner, tiny_convnet().double(), 2.0))
    torch.testing.assert_close(twice.penalty(model), 3 * inner.penalty(model))


def test_only_the_last_stage_is_taken_for_the_head():
    model = tiny_convnet()
    bare = tk.Staged([*model._pairs()[:-1], ("head", nn.Identity())])
    objective = tk.l2_sp(tk.contrastive(), bare)
    assert set(objective.anchor) == {name for name, _ in bare.named_parameters()}
    plain = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Softmax(1))
    assert set(tk.l2_sp(tk.classification(), plain).anchor) == {"0.weight", "0.bias"}
    with pytest.raises(ValueError, match="nothing to anchor"):
        tk.l2_sp(tk.classification(), nn.Sequential(nn.Linear(2, 2)))


def test_l2_sp_names_what_does_not_fit():
    model = tiny_convnet()
    objective = tk.l2_sp(tk.classification(), model)
    with pytest.raises(ValueError, match=r"the anchor holds 'stem\.0\.weight'.*which the model"):
        objective.penalty(tiny_encoder())
    for settings_of in ({"alpha": -0.1}, {"beta": float("nan")}):
        with pytest.raises(ValueError, match="at least 0"):
            tk.l2_sp(tk.classification(), model, **settings_of)


def test_a_run_never_goes_on_with_another_anchor(tmp_path):
    def fit(model):
        objective = tk.l2_sp(tk.classification(), model)
        tk.fit(model, objective, some_images(8), plan=[tk.finetune(1)], directory=tmp_path)

    model = tiny_convnet()
    fit(model)
    with pytest.raises(ValueError, match=r"another run \(objective: "):
        fit(model)  # the trained model itself is given, so the anchor is its trained weights
    fit(tiny_convnet())


# ---- law 12: distillation -----------------------------------------------------------------------


def _soft_gradient(heat, logits, taught):
    logits = logits.clone().requires_grad_()
    items = data.Batch(
        logits, torch.zeros(len(logits), dtype=torch.long), torch.arange(len(logits))
    )
    teacher = nn.Linear(3, 3).double()
    with torch.no_grad():
        teacher.weight.copy_(torch.eye(3))
        teacher.bias.copy_(taught - logits[0])
    loss = tk.distillation(tk.classification(), teacher, heat, 1.0)(nn.Identity(), items)
    return torch.autograd.grad(loss.mean(), logits)[0]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), heat=st.floats(0.5, 50.0))
def test_distillation_carries_the_square_of_its_temperature(seed, heat):
    generator = torch.Generator().manual_seed(seed)
    logits, taught = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    found = _soft_gradient(heat, logits[None], taught)[0]
    expected = heat * (torch.softmax(logits / heat, 0) - torch.softmax(taught / heat, 0))
    torch.testing.assert_close(found, expected)  # T² of the loss, 1/T of the chain rule


def test_at_high_temperature_the_gradient_is_that_of_matching_logits():
    logits, taught = torch.tensor([[1.0, -2.0, 1.0], [0.5, 1.0, -1.5]]).double()
    limit = (logits - taught) / 3  # Hinton et al. 2015, Section 2.1, for logits of mean 0
    errors = [(_soft_gradient(heat, logits[None], taught)[0] - limit).norm() for heat in (50, 500)]
    assert errors[0] < 0.05 * limit.norm() and errors[1] < 0.15 * errors[0]


@pytest.mark.parametrize("name", ["both domains", "both views"])
def test_around_a_batch_coupled_objective_the_teacher_speaks_of_every_row_once(name):
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 5, 4, generator=generator).double()
    if name == "both domains":
        pairs, inner = tk.pair((first, torch.arange(5) % 3), second), tk.align(tk.coral)
        batch, rows = pairs.fetch(range(5), 0, 0), torch.cat([first, second])
    else:
        batch = data.Batch(torch.stack([first, second], 1), None, torch.arange(5))
        inner, rows = tk.contrastive(), batch.inputs.flatten(0, 1)
    torch.manual_seed(0)
    model, teacher = (
        tk.Staged([("body", nn.Linear(4, 6)), ("head", nn.Linear(6, 3))]).double() for _ in range(2)
    )
    found = tk.distillation(inner, teacher, temperature=2.0, weight=1.0)(model, batch)
    old, new = (torch.softmax(m(rows) / 2.0, 1) for m in (teacher, model))
    each = 2.0**2 * (old * (old / new).log()).sum(1)
    torch.testing.assert_close(found.mean(), each.mean())
    assert dict(zip(found.names, found.counts, strict=True))["teacher"] == 10


def test_an_adversarial_step_that_fails_leaves_no_hook_behind():
    model, items = tiny_encoder(), some_texts(3).fetch(range(3), 0, 0)
    items.labels = None
    with pytest.raises(ValueError, match="no labels"):
        tk.adversarial(tk.classification(), 0.1)(model, items)
    assert not any(module._forward_hooks for module in model.modules())
