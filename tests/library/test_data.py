"""Sources: what a batch holds, what it depends on, and what is said about bad data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import transferkit as tk
from transferkit import data


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 300),
    size=st.integers(1, 40),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
    bucketed=st.booleans(),
)
def test_an_epoch_holds_every_item_once_and_follows_from_seed_and_epoch(
    count, size, seed, epoch, bucketed
):
    lengths = np.arange(count) % 17 + 1 if bucketed else None
    batches = data.order(count, size, seed, epoch, lengths)
    assert sorted(np.concatenate(batches).tolist()) == list(range(count))
    assert len(batches) == -(-count // size) and sum(len(b) < size for b in batches) <= 2
    assert size < 3 or count == 1 or min(map(len, batches)) > 1  # BatchNorm cannot train on one
    again = data.order(count, size, seed, epoch, lengths)
    assert all(map(np.array_equal, batches, again))


def test_epochs_and_seeds_differ_in_order():
    orders = {
        tuple(np.concatenate(data.order(50, 10, seed, epoch)).tolist())
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(*[st.integers(-5, 2**63)] * 3), min_size=2, max_size=30, unique=True))
def test_seeds_of_different_items_differ(triples):
    assert len({data.mix(*triple) for triple in triples}) == len(triples)
    assert all(0 <= data.mix(*triple) < 2**63 for triple in triples)


def test_augmentation_follows_from_seed_epoch_and_index_alone():
    def noise(images, generator):
        return images + torch.randn(images.shape, generator=generator)

    source = data.images(np.zeros((9, 4, 4), np.uint8), None, 4, [0.0] * 3, [1.0] * 3, noise)
    together = source.fetch([5, 2, 7], 3, 11).inputs
    torch.manual_seed(99)
    alone = source.fetch([2], 3, 11).inputs
    assert torch.equal(together[1:2], alone)
    for epoch, seed in ((4, 11), (3, 12)):
        assert not torch.equal(source.fetch([2], epoch, seed).inputs, alone)
    assert not source.fetch([2], None, 11).inputs.any()


def test_images_are_resized_normalised_and_grey_ones_get_three_channels():
    array = np.full((2, 6, 8), 51, np.uint8)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 0.1]
    inputs = data.images(array, [0, 1], 4, mean, std).fetch([1, 0], 0, 0).inputs
    assert inputs.shape == (2, 3, 4, 4) and inputs.dtype == torch.float32
    expected = (0.2 - torch.tensor(mean)) / torch.tensor(std)
    assert torch.allclose(inputs, expected.view(1, 3, 1, 1).expand(2, 3, 4, 4), atol=1e-6)
    colours = data.images(np.zeros((2, 4, 4, 3), np.uint8), None, 4, mean, std)
    assert colours.fetch([0], 0, 0).inputs.shape == (1, 3, 4, 4)


class Letters:
    pad_token_id = 9

    def __call__(self, texts, truncation, max_length):
        return {"input_ids": [[ord(c) - 96 for c in text][:max_length] for text in texts]}


def test_texts_are_padded_to_the_longest_of_the_batch():
    source = data.texts(["abc", "b", "abcdef"], [0, 1, 2], Letters(), 4)
    batch = source.fetch([1, 0], 0, 0)
    assert batch.inputs["input_ids"].tolist() == [[2, 9, 9], [1, 2, 3]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch.labels.tolist() == [1, 0] and source.lengths.tolist() == [3, 1, 4]


def test_fingerprints_tell_data_apart():
    def texts(*rows, limit=4):
        return data.texts(rows, None, Letters(), limit).fingerprint()

    assert texts("ab", "c") == texts("ab", "c") != texts("a", "bc")
    wide, tall = (data.tensors(torch.zeros(shape)) for shape in ((2, 3), (3, 2)))
    assert wide.fingerprint() != tall.fingerprint()
    pixels = np.zeros((2, 4, 4), np.uint8)
    plain = data.images(pixels, None, 4, [0.0] * 3, [1.0] * 3)
    assert plain.fingerprint() != data.images(pixels, None, 4, [0.5] * 3, [1.0] * 3).fingerprint()
    assert plain.augmented(lambda images, generator: images).fingerprint() is None


@pytest.mark.parametrize(
    "dataset",
    [
        [(torch.zeros(2), 1), (torch.ones(2), 0)],
        [{"x": torch.zeros(2), "labels": 1}, {"x": torch.ones(2), "labels": 0}],
    ],
    ids=["pairs", "dictionaries"],
)
def test_data_sets_of_torch_are_sources(dataset):
    batch = data.as_source(dataset).fetch([1, 0], 0, 0)
    inputs = batch.inputs if isinstance(batch.inputs, torch.Tensor) else batch.inputs["x"]
    assert inputs.tolist() == [[1.0, 1.0], [0.0, 0.0]] and batch.labels.tolist() == [0, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_fetch_the_same_batches_in_order(workers):
    source = data.tensors(torch.arange(10.0), torch.arange(10))
    batches = data.order(10, 3, 0, 0)
    random = torch.get_rng_state()
    found = list(data.stream(source, batches, 0, 0, workers))
    assert [batch.index.tolist() for batch in found] == [batch.tolist() for batch in batches]
    assert torch.equal(random, torch.get_rng_state())


EMPTY = (torch.zeros(0, 2), torch.zeros(0))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: data.as_source(EMPTY), ValueError, "the data are empty"),
        (lambda: data.as_source([]), ValueError, "the data are empty"),
        (lambda: data.tensors(torch.zeros(3), [1, 2]), ValueError, "3 items but 2 labels"),
        (lambda: data.as_source({"a": 1}), TypeError, "the data are a dict"),
        (lambda: data.as_source(7), TypeError, "the data are a int"),
        (lambda: data.texts(["a", ""], None, Letters(), 4), ValueError, "text 1 has no tokens"),
        (
            lambda: data.images(np.zeros((2, 4, 4)), None, 4, [0.0] * 3, [1.0] * 3),
            ValueError,
            r"float64 of shape \(2, 4, 4\), but uint8",
        ),
        (
            lambda: data.images(np.zeros((2, 4, 4, 4), np.uint8), None, 4, [0.0] * 3, [1.0] * 3),
            ValueError,
            "uint8 of shape",
        ),
        (
            lambda: data.examples([(1.0, 2.0, 3.0)]).fetch([0], 0, 0),
            TypeError,
            "has 3 parts",
        ),
    ],
)
def test_bad_data_are_named_with_what_is_expected(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_split_needs_a_model_that_can_prepare_it():
    class Split:
        kind, inputs = "text", ["a"]

    with pytest.raises(TypeError, match=r"Linear cannot prepare a split.*tk\.models\.load"):
        tk.predict(nn.Linear(2, 2), Split())


def test_batches_are_pinned_for_a_gpu_alone_and_cost_nothing_on_a_processor(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    source = tk.data.tensors(torch.randn(6, 2), torch.arange(6))
    batches = tk.data.order(6, 4, 0, 0)
    plain = list(tk.data.stream(source, batches, 0, 0))
    assert not pinned and all(batch.to(torch.device("cpu")) is batch for batch in plain)
    list(tk.data.stream(source, batches, 0, 0, pin=True))
    assert len(pinned) == 4  # inputs and labels of two batches
    tk.fit(torch.nn.Linear(2, 6), tk.classification(), source, plan=[tk.finetune(1)], device="cpu")
    assert len(pinned) == 4


def test_rounded_texts_are_the_same_texts_in_batches_of_few_lengths():
    class Words:
        def __call__(self, texts, truncation, max_length):
            return {"input_ids": [[int(t) for t in text.split()] for text in texts]}

    rows = [" ".join(["5"] * (1 + at * 7 % 61)) for at in range(61)]
    plain = tk.data.texts(rows, None, Words(), 99)
    rounded, found = plain.rounded(), set()
    for batch in tk.data.order(61, 3, 0, 0, plain.lengths):
        own, other = (source.fetch(batch, None, 0).inputs for source in (rounded, plain))
        found.add(own["input_ids"].shape[1])
        for name in own:
            length = other[name].shape[1]
            assert torch.equal(own[name][:, :length], other[name])
            assert not own[name][:, length:].any()
    assert len(found) <= 8 and max(found) == 61 and plain.sizes is None
    assert plain.fingerprint() == rounded.fingerprint()
