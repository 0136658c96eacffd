"""Masked language modelling, contrastive learning, reconstruction: the tasks and their losses."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import transferkit as tk
from transferkit.objectives import IGNORED
from transferkit.pretext import Contrastive, MaskedLM, Reconstruction

PAD, START, END, MASK, WORDS = 0, 1, 2, 3, 200


class Numbers:
    """A tokenizer of numbers that sets a first and a last token, as those of transformers do."""

    pad_token_id, mask_token_id = PAD, MASK
    all_special_ids = (PAD, START, END, MASK)

    def __len__(self):
        return WORDS

    def __call__(self, texts, truncation, max_length):
        rows = [[START, *map(int, text.split()), END] for text in texts]
        return {"input_ids": rows}


def some_numbers(count: int, longest: int = 30, seed: int = 0) -> tk.data.Texts:
    random = np.random.default_rng(seed)
    rows = [random.integers(4, WORDS, random.integers(1, longest)) for _ in range(count)]
    return tk.data.texts([" ".join(map(str, row)) for row in rows], None, Numbers(), 512)


def batch(inputs=None, labels=None, count=0):
    return tk.data.Batch(inputs, labels, torch.arange(count))


# ---- masked tokens ------------------------------------------------------------------------------


def _within(found: int, of: int, share: float) -> bool:
    # four standard deviations of a binomial: one false alarm in 16,000
    return abs(found - of * share) < 4 * (of * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("rate", [0.15, 0.4])
@pytest.mark.parametrize("seed", [0, 1])
def test_of_the_chosen_tokens_80_are_masked_10_drawn_and_10_stay(rate, seed):
    source = some_numbers(400, 60)
    plain = source.fetch(range(400), 0, seed).inputs
    hidden = tk.masked(source, Numbers(), rate).fetch(range(400), 0, seed)
    ids, found, labels = plain["input_ids"], hidden.inputs["input_ids"], hidden.labels
    ordinary = ids > MASK
    chosen = labels != IGNORED
    assert not (chosen & ~ordinary).any() and torch.equal(found[~chosen], ids[~chosen])
    assert torch.equal(labels[chosen], ids[chosen])
    count = int(chosen.sum())
    assert _within(count, int(ordinary.sum()), rate)
    assert _within(int((found[chosen] == MASK).sum()), count, 0.8)
    stays = 0.1 + 0.1 / (WORDS - 4)  # a drawn token may be the one that was there
    assert _within(int((found[chosen] == ids[chosen]).sum()), count, stays)
    drawn = found[chosen & (found != MASK) & (found != ids)]
    assert drawn.min() > MASK and drawn.max() < WORDS and len(drawn.unique()) > 50
    assert torch.equal(hidden.inputs["attention_mask"], plain["attention_mask"])


@settings(max_examples=25)
@given(
    items=st.lists(st.integers(0, 29), min_size=1, max_size=8, unique=True),
    epoch=st.one_of(st.none(), st.integers(0, 50)),
    seed=st.integers(0, 2**40),
)
def test_what_is_hidden_follows_from_seed_epoch_and_index_alone(items, epoch, seed):
    source = tk.masked(some_numbers(30), Numbers(), 0.5)
    together = source.fetch(items, epoch, seed)
    for row, item in enumerate(items):
        alone = source.fetch([item], epoch, seed)
        length = alone.labels.shape[1]
        assert torch.equal(together.labels[row, :length], alone.labels[0])
        assert (together.labels[row, length:] == IGNORED).all()
        ids = together.inputs["input_ids"][row, :length]
        assert torch.equal(ids, alone.inputs["input_ids"][0])


def test_other_epochs_and_seeds_hide_other_tokens_and_evaluation_always_the_same():
    source = tk.masked(some_numbers(20), Numbers(), 0.5)
    looks = [source.fetch(range(20), *when).labels for when in ((0, 0), (1, 0), (0, 1), (None, 0))]
    assert all(not torch.equal(a, b) for i, a in enumerate(looks) for b in looks[:i])
    assert torch.equal(source.fetch(range(20), None, 0).labels, looks[3])


def test_plain_tensors_of_tokens_are_masked_too():
    ids = torch.randint(4, 50, (6, 9))
    source = tk.masked(tk.data.tensors(ids), mask=3, special=(0,), vocabulary=50)
    found = source.fetch([4, 1], 0, 0)
    chosen = found.labels != IGNORED
    assert torch.equal(torch.where(chosen, found.labels, found.inputs), ids[[4, 1]])
    assert len(source) == 6 and source.lengths is None and source.labels is None


def test_a_masked_source_says_what_it_depends_on():
    def fingerprint(seed=0, **settings):
        return tk.masked(some_numbers(5, seed=seed), Numbers(), **settings).fingerprint()

    assert fingerprint() == fingerprint() is not None
    assert (
        len({fingerprint(), fingerprint(seed=1), fingerprint(rate=0.2), fingerprint(mask=2)}) == 4
    )


def test_special_tokens_that_a_tokenizer_only_lists_as_added_ones_are_found():
    def token(content, special=True):
        return SimpleNamespace(content=content, special=special)

    class FromFile(Numbers):
        mask_token_id, all_special_ids = None, (PAD,)
        added_tokens_decoder = {7: token("[CLS]"), 9: token("[MASK]"), 11: token("word", False)}  # noqa: RUF012

    source = tk.masked(some_numbers(3), FromFile())
    assert source.mask == 9 and source.special.tolist() == [0, 7, 9]


@pytest.mark.parametrize(
    ("settings_of", "message"),
    [
        ({"tokenizer": Numbers(), "rate": 0.0}, "rate is 0.0"),
        ({"tokenizer": Numbers(), "rate": 1.0}, "rate is 1.0"),
        ({}, r"no mask.*pass mask="),
        ({"mask": 3}, r"no special.*pass special="),
        ({"mask": 3, "special": ()}, r"no vocabulary.*pass vocabulary="),
    ],
)
def test_a_masked_source_names_what_it_lacks(settings_of, message):
    with pytest.raises(ValueError, match=message):
        tk.masked(some_numbers(2), **settings_of)


def test_the_masked_loss_is_the_cross_entropy_of_the_hidden_tokens():
    hidden = tk.masked(some_numbers(7), Numbers(), 0.3).fetch(range(7), 0, 0)
    logits = torch.randn(*hidden.labels.shape, WORDS, dtype=torch.float64)
    loss = MaskedLM().loss(logits, hidden)
    expected = F.cross_entropy(logits.flatten(0, 1), hidden.labels.flatten())
    assert loss.mean().item() == pytest.approx(expected.item(), rel=1e-12)
    assert MaskedLM().counts(hidden) == loss.counts
    with pytest.raises(ValueError, match=r"tk\.masked"):
        MaskedLM().validate(torch.tensor([0, 1]), WORDS)
    with pytest.raises(ValueError, match="no labels"):
        MaskedLM().counts(batch(count=1))


# ---- two views ----------------------------------------------------------------------------------


def _images(augment=None, views=None):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    return tk.data.images(pixels, list(range(6)), 4, [0.5] * 3, [0.5] * 3, augment, views)


def _noise(images, generator):
    return images + torch.randn(images.shape, generator=generator)


def test_the_two_views_are_two_draws_of_the_augmentation_new_in_every_epoch():
    source = _images(_noise)
    views = tk.two_views(source)
    found = views.fetch([3, 1], 5, 7)
    assert found.inputs.shape == (2, 2, 3, 4, 4) and found.labels.tolist() == [3, 1]
    for view in (0, 1):
        assert torch.equal(found.inputs[:, view], source.fetch([3, 1], 10 + view, 7).inputs)
    assert not torch.equal(found.inputs[:, 0], found.inputs[:, 1])
    seen = [*found.inputs.unbind(1), *views.fetch([3, 1], 6, 7).inputs.unbind(1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    evaluated = views.fetch([3, 1], None, 0).inputs
    assert torch.equal(evaluated, views.fetch([3, 1], None, 0).inputs)
    assert not torch.equal(evaluated[:, 0], evaluated[:, 1])


def test_pairs_of_texts_are_padded_together_each_with_its_own_mask():
    left, right = some_numbers(8, 6), some_numbers(8, 12, seed=1)
    pairs = tk.two_views(left, right)
    assert pairs.lengths.tolist() == np.maximum(left.lengths, right.lengths).tolist()
    found = pairs.fetch([5, 0], 0, 0)
    length = int(pairs.lengths[[5, 0]].max())
    assert found.inputs["input_ids"].shape == (2, 2, length) and found.labels.tolist() == [5, 0]
    for side, source in enumerate((left, right)):
        for row, item in enumerate((5, 0)):
            alone = source.fetch([item], 0, 0).inputs["input_ids"][0]
            real = found.inputs["attention_mask"][row, side].bool()
            assert torch.equal(found.inputs["input_ids"][row, side][real], alone)
            assert (found.inputs["input_ids"][row, side][~real] == PAD).all()


def test_views_say_what_they_depend_on_and_refuse_pairs_of_other_lengths():
    texts = some_numbers(4)
    assert tk.two_views(texts).fingerprint() != texts.fingerprint()
    assert tk.two_views(_images(_noise)).fingerprint() is None
    with pytest.raises(ValueError, match="4 and 5 items"):
        tk.two_views(texts, some_numbers(5))


# ---- contrastive --------------------------------------------------------------------------------


def _embeddings(seed: int, items: int, width: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(items, 2, width, dtype=torch.float64, generator=generator)


@settings(max_examples=30)
@given(seed=st.integers(0, 9999), items=st.integers(1, 9), heat=st.floats(0.05, 2.0))
def test_across_the_views_the_loss_is_the_cross_entropy_of_the_similarity_matrix(seed, items, heat):
    pair = _embeddings(seed, items)
    loss = Contrastive(heat, across=True).loss(pair, batch(count=items))
    one, two = (F.normalize(pair[:, view], dim=1) for view in (0, 1))
    similar, diagonal = one @ two.T / heat, torch.arange(items)
    expected = (F.cross_entropy(similar, diagonal) + F.cross_entropy(similar.T, diagonal)) / 2
    assert loss.mean().item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)


def _by_loops(pair: np.ndarray, labels: list[int], heat: float) -> float:
    # The formula of Khosla et al. as it is printed, row by row.
    rows = [(view / np.linalg.norm(view), label) for item, label in zip(pair, labels, strict=True)
            for view in item]  # fmt: skip
    losses = []
    for a, (row, label) in enumerate(rows):
        others = [other for b, other in enumerate(rows) if b != a]
        below = sum(np.exp(row @ other / heat) for other, _ in others)
        positives = [other for other, same in others if same == label]
        logs = [np.log(np.exp(row @ other / heat) / below) for other in positives]
        losses.append(-np.mean(logs))
    return float(np.mean(losses))


@settings(max_examples=30)
@given(
    seed=st.integers(0, 9999),
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=7),
    supervised=st.booleans(),
)
def test_the_loss_is_the_printed_formula(seed, labels, supervised):
    pair = _embeddings(seed, len(labels))
    objective = Contrastive(0.5, supervised=supervised)
    found = objective.loss(pair, batch(labels=torch.tensor(labels), count=len(labels)))
    own = labels if supervised else list(range(len(labels)))
    assert found.mean().item() == pytest.approx(_by_loops(pair.numpy(), own, 0.5), rel=1e-9)


def test_the_gradient_is_finite_and_has_no_part_along_an_embedding():
    pair = _embeddings(0, 6).requires_grad_()
    torch.autograd.gradcheck(lambda z: Contrastive(0.3).loss(z, batch(count=6)).mean(), pair)
    Contrastive(0.3).loss(pair, batch(count=6)).mean().backward()
    assert (pair.grad * pair).sum(-1).abs().max() < 1e-12  # only directions count


def test_both_views_go_through_the_model_in_one_pass_whatever_they_are():
    model = nn.Linear(4, 3)
    views = torch.randn(5, 2, 4)
    found = Contrastive().outputs(model, batch(views, count=5))
    torch.testing.assert_close(found, torch.stack([model(views[:, 0]), model(views[:, 1])], 1))

    class Sums(nn.Module):
        stage_names = ("head",)

        def forward(self, inputs):
            return inputs["input_ids"].float() * inputs["attention_mask"]

    ids, mask = torch.arange(12).view(2, 2, 3), torch.ones(2, 2, 3)
    inputs = {"input_ids": ids, "attention_mask": mask}
    assert torch.equal(Contrastive().outputs(Sums(), batch(inputs, count=2)), ids.float())
    with pytest.raises(ValueError, match=r"\(5, 4\).*tk\.two_views"):
        Contrastive().outputs(model, batch(views[:, 0], count=5))


def test_half_precision_embeddings_are_compared_in_single_precision():
    pair = _embeddings(0, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = Contrastive().loss(pair, batch(count=8)).mean()
    assert loss.item() == Contrastive().loss(pair.float(), batch(count=8)).mean().item()


@pytest.mark.parametrize("heat", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_none_is_refused(heat):
    with pytest.raises(ValueError, match="temperature is"):
        Contrastive(heat)


# ---- reconstruction -----------------------------------------------------------------------------


def test_reconstruction_is_the_mean_squared_error_against_the_inputs():
    inputs = torch.randn(5, 3, 4, dtype=torch.float64)
    outputs = torch.randn_like(inputs)
    items = batch(inputs, torch.zeros(5), 5)
    loss = Reconstruction().loss(outputs, items)
    assert loss.mean().item() == pytest.approx(F.mse_loss(outputs, inputs).item(), rel=1e-12)
    assert Reconstruction().counts(items) == loss.counts == (60,)
    rows, target = Reconstruction().scored(outputs, items)
    assert rows.shape == target.shape == (5, 12)


def test_reconstruction_refuses_other_shapes_and_tokens():
    with pytest.raises(ValueError, match="decoder"):
        Reconstruction().loss(torch.zeros(2, 3), batch(torch.zeros(2, 4), None, 2))
    with pytest.raises(TypeError, match=r"int64.*masked_lm"):
        Reconstruction().counts(batch(torch.zeros(2, 4, dtype=torch.long), None, 2))
    with pytest.raises(TypeError, match=r"are dict.*masked_lm"):
        Reconstruction().counts(batch({"input_ids": torch.zeros(2, 4)}, None, 2))
