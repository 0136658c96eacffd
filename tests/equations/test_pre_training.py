"""The formulas of the chapter on pre-training, each computed a second way."""

import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import nn

import transferkit as tk


def batch(inputs=None, labels=None, count=0):
    return tk.data.Batch(inputs, labels, torch.arange(count))


# -- reconstruction -------------------------------------------------------------------------------


@pytest.mark.equation("eq-pre-training-reconstruction")
def test_reconstruction_is_the_sum_over_all_values_divided_by_their_number():
    images = torch.rand(5, 1, 3, 4)
    rebuilt = images + torch.randn_like(images)
    total = 0.0
    for i in range(5):  # one number at a time, as the formula is printed
        for j, value in enumerate(images[i].flatten()):
            total += float(rebuilt[i].flatten()[j] - value) ** 2
    found = tk.reconstruction().loss(rebuilt, batch(images, count=5)).mean()
    assert float(found) == pytest.approx(total / (5 * 12), rel=1e-12)


@pytest.mark.equation("eq-pre-training-reconstruction")
def test_its_gradient_is_twice_the_error_by_the_number_of_values():
    images = torch.rand(4, 6)
    rebuilt = torch.rand(4, 6, requires_grad=True)
    tk.reconstruction().loss(rebuilt, batch(images, count=4)).mean().backward()
    torch.testing.assert_close(rebuilt.grad, 2 * (rebuilt.detach() - images) / 24)


@pytest.mark.equation("eq-pre-training-pca")
def test_no_linear_autoencoder_beats_pca_and_one_reaches_it():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 6)) @ np.diag([4.0, 3.0, 2.0, 1.0, 0.5, 0.2])
    x -= x.mean(0)
    values = np.linalg.eigvalsh(x.T @ x / len(x))  # ascending
    bound = values[:4].sum() / 6  # the four that two components leave out
    pca = PCA(2).fit(x)
    left = x - pca.inverse_transform(pca.transform(x))
    assert (left**2).mean() == pytest.approx(bound, rel=1e-9)

    inputs = torch.from_numpy(x)
    objective, items = tk.reconstruction(), batch(inputs, count=len(x))
    for _ in range(200):  # random ones
        maps = torch.randn(6, 2), torch.randn(2, 6)
        assert float(objective.loss(inputs @ maps[0] @ maps[1], items).mean()) > bound
    model = nn.Sequential(nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False))
    optimiser = torch.optim.LBFGS(model.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = objective.loss(model(inputs), items).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    assert closure().item() == pytest.approx(bound, rel=1e-5)


# -- contrast -------------------------------------------------------------------------------------


def nt_xent(pairs, temperature):
    """Equation 1 of Chen et al. with loops, in NumPy: pairs (B, 2, d)."""
    views = [view / np.linalg.norm(view) for pair in pairs for view in pair]
    total = 0.0
    for a, own in enumerate(views):
        other = views[a + 1 if a % 2 == 0 else a - 1]
        below = sum(np.exp(own @ c / temperature) for i, c in enumerate(views) if i != a)
        total -= np.log(np.exp(own @ other / temperature) / below)
    return total / len(views)


@pytest.mark.equation("eq-pre-training-nt-xent")
@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("items", [2, 7])
def test_the_contrastive_loss_is_the_printed_formula_row_by_row(items, temperature):
    pairs = torch.randn(items, 2, 5)
    found = tk.contrastive(temperature).loss(pairs, batch(count=items)).mean()
    assert float(found) == pytest.approx(nt_xent(pairs.numpy(), temperature), rel=1e-10)


@pytest.mark.equation("eq-pre-training-nt-xent")
def test_the_length_of_an_embedding_does_not_count():
    pairs = torch.randn(4, 2, 5)
    longer = pairs * torch.rand(4, 2, 1).add(0.1)
    first, second = (tk.contrastive().loss(p, batch(count=4)).mean() for p in (pairs, longer))
    torch.testing.assert_close(first, second)


# -- hidden tokens --------------------------------------------------------------------------------


@pytest.mark.equation("eq-pre-training-masked")
def test_the_masked_loss_is_the_mean_over_the_hidden_places_of_all_texts():
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(3, 6, 9))  # texts, places, tokens
    hidden = {(0, 1): 4, (0, 5): 8, (2, 0): 3}  # the second text has none
    labels = torch.full((3, 6), -100)
    total = 0.0
    for (text, at), token in hidden.items():
        labels[text, at] = token
        powers = np.exp(scores[text, at])
        total -= np.log(powers[token] / powers.sum())
    found = tk.masked_lm().loss(torch.from_numpy(scores), batch(labels=labels, count=3)).mean()
    assert float(found) == pytest.approx(total / len(hidden), rel=1e-12)


@pytest.mark.equation("eq-pre-training-masked")
def test_scores_at_places_that_were_not_hidden_get_no_gradient():
    scores = torch.randn(2, 4, 5, requires_grad=True)
    labels = torch.tensor([[-100, 2, -100, -100], [1, -100, -100, 4]])
    tk.masked_lm().loss(scores, batch(labels=labels, count=2)).mean().backward()
    moved = scores.grad.abs().sum(-1) > 0
    assert torch.equal(moved, labels >= 0)


# -- yardsticks -----------------------------------------------------------------------------------


@pytest.mark.equation("eq-pre-training-chance")
def test_who_knows_nothing_has_the_printed_losses():
    items, classes, tokens = 6, 10, 50
    alike = torch.ones(items, 2, 3)
    contrastive = tk.contrastive(0.3).loss(alike, batch(count=items)).mean()
    assert float(contrastive) == pytest.approx(math.log(2 * items - 1), rel=1e-12)

    labels = torch.tensor([3, 1, 9, 0, 0, 7])
    named = tk.classification().loss(torch.zeros(items, classes), batch(labels=labels)).mean()
    assert float(named) == pytest.approx(math.log(classes), rel=1e-12)

    labels = torch.randint(0, tokens, (items, 8))
    equal = torch.full((items, 8, tokens), 1.7)
    masked = tk.masked_lm().loss(equal, batch(labels=labels, count=items)).mean()
    assert float(masked) == pytest.approx(math.log(tokens), rel=1e-12)

    images = torch.rand(400, 3)
    mean = images.mean(0).expand_as(images)
    error = tk.reconstruction().loss(mean, batch(images, count=400)).mean()
    assert float(error) == pytest.approx(float(images.var(0, correction=0).mean()), rel=1e-12)
