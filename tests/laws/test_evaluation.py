"""Law 5: what evaluation says does not depend on how the items are batched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference
from small_models import (
    some_images,
    some_tagged,
    some_texts,
    tiny_convnet,
    tiny_encoder,
    tiny_tagger,
)
from torch import nn

import transferkit as tk


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("make", [tiny_convnet, tiny_encoder])
@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 23), size=st.integers(1, 30))
def test_evaluation_does_not_depend_on_the_batch_size(make, count, size):
    model = make()
    data = some_images(count) if make is tiny_convnet else some_texts(count)
    what = (model, tk.classification(), data, [tk.accuracy, tk.macro_f1])
    where = {"precision": "fp32", "device": "auto"}
    some, one = tk.evaluate(*what, size, **where), tk.evaluate(*what, 1, **where)
    assert some == pytest.approx(one, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 23), size=st.integers(1, 30))
def test_every_item_is_predicted_once_in_the_order_of_the_data(count, size):
    model, data = tiny_encoder().eval(), some_texts(count)
    found = tk.predict(model, data, size, precision="fp32")
    assert found.logits.shape == (count, 3) and found.logits.dtype == np.float32
    assert np.array_equal(found.index, np.arange(count))
    assert np.array_equal(found.labels, data.labels.numpy())
    with torch.no_grad():
        alone = [model(data.fetch([i], None, 0).inputs) for i in range(count)]
    assert np.abs(found.logits - torch.cat(alone).numpy()).max() < 1e-5


def test_no_item_is_seen_twice_and_none_is_padded():
    seen = []

    class Counting(nn.Linear):
        def forward(self, inputs):
            seen.append(len(inputs))
            return super().forward(inputs)

    tk.predict(Counting(4, 2), torch.randn(10, 4), 4)
    assert seen == [4, 4, 2]


@pytest.mark.usefixtures("device")
def test_scores_agree_with_scikit_learn():
    model, data = tiny_convnet(), some_images(40)
    scores = tk.evaluate(
        model, tk.classification(), data, [tk.accuracy, tk.macro_f1], device="auto"
    )
    found = tk.predict(model, data)
    powers = np.exp(found.logits.astype(np.float64))
    expected = {
        "loss": reference.log_loss(found.labels, powers / powers.sum(1, keepdims=True)),
        "accuracy": reference.accuracy_score(found.labels, found.classes),
        "macro_f1": reference.f1_score(found.labels, found.classes, average="macro"),
    }
    assert scores == pytest.approx(expected, abs=1e-5)


def test_the_weighted_loss_is_that_of_all_items_together():
    model, data, weights = tiny_convnet().eval(), some_images(13), (0.2, 1.0, 3.0)
    found = tk.evaluate(model, tk.classification(class_weights=weights), data, batch_size=4)
    with torch.no_grad():
        batch = data.fetch(range(13), None, 0)
        loss = nn.functional.cross_entropy(
            model(batch.inputs), batch.labels, weight=torch.tensor(weights)
        )
    assert found["loss"] == pytest.approx(float(loss), abs=1e-6)


def test_evaluation_changes_no_mode_no_weight_and_no_random_state():
    model = tiny_convnet().train()
    model.stem.eval()
    modes = [module.training for module in model.modules()]
    mean, random = model.stem[1].running_mean.clone(), torch.get_rng_state()
    tk.evaluate(model, tk.classification(), some_images(9), [tk.accuracy])
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(mean, model.stem[1].running_mean)
    assert torch.equal(random, torch.get_rng_state())


def test_a_data_set_with_random_transforms_leaves_the_random_state_alone():
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, at):
            return torch.randn(4), at % 2

    model, random = nn.Linear(4, 2), torch.get_rng_state()
    tk.predict(model, Noisy())
    tk.fit(model, tk.classification(), Noisy(), plan=[tk.finetune(1)])
    assert torch.equal(random, torch.get_rng_state())


def test_evaluation_never_augments():
    def fails(images, generator):
        raise AssertionError("augmented")

    tk.evaluate(tiny_convnet(), tk.classification(), some_images(5).augmented(fails))


class Tokens:
    """Cross-entropy of every real token; metrics see one row a token."""

    additive = True
    acts_below_head = False

    def outputs(self, model, batch):
        return model(batch.inputs)

    def counts(self, batch):
        return ((batch.labels != -100).sum(),)

    def loss(self, outputs, batch):
        flat = outputs.flatten(0, 1), batch.labels.flatten()
        return tk.Loss(nn.functional.cross_entropy(*flat, reduction="sum"), *self.counts(batch))

    def scored(self, outputs, batch):
        real = batch.labels != -100
        return outputs[real], batch.labels[real]

    def __call__(self, model, batch):
        return self.loss(self.outputs(model, batch), batch)


def _each_alone(model, data):
    with torch.no_grad():
        fetched = [data.fetch([at], None, 0) for at in range(len(data))]
        return [(model(b.inputs)[0].numpy(), b.labels[0].numpy()) for b in fetched]


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 23), size=st.integers(1, 30))
def test_scores_of_tokens_are_those_of_every_text_alone_in_the_order_of_the_data(count, size):
    model, data, seen = tiny_tagger().eval(), some_tagged(count), []

    def accuracy(logits, labels):
        seen.append((logits, labels))
        return tk.accuracy(logits, labels)

    scores = tk.evaluate(model, Tokens(), data, [accuracy], size, precision="fp32")
    rows, labels = (np.concatenate(part) for part in zip(*_each_alone(model, data), strict=True))
    assert np.array_equal(seen[0][1], labels)
    assert np.abs(seen[0][0] - rows).max() < 1e-5
    powers = np.exp(rows.astype(np.float64))
    loss = reference.log_loss(labels, powers / powers.sum(1, keepdims=True), labels=[0, 1, 2])
    expected = {"loss": loss, "accuracy": reference.accuracy_score(labels, rows.argmax(1))}
    assert scores == pytest.approx(expected, abs=1e-5)


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 23), size=st.integers(1, 30))
def test_predictions_of_tokens_are_one_array_a_text_without_its_padding(count, size):
    model, data = tiny_tagger().eval(), some_tagged(count)
    found = tk.predict(model, data, size, precision="fp32")
    assert len(found.logits) == len(found.labels) == count
    for at, (logits, labels) in enumerate(_each_alone(model, data)):
        assert found.logits[at].shape == logits.shape == (data.lengths[at], 3)
        assert np.abs(found.logits[at] - logits).max() < 1e-5
        assert np.array_equal(found.labels[at], labels)
        assert np.array_equal(found.classes[at], found.logits[at].argmax(1))
        assert np.allclose(found.probabilities[at].sum(1), 1.0, atol=1e-6)


def test_the_streamed_loss_loses_nothing_in_many_batches():
    # a float32 sum of 300 and so many large and small losses would
    class Given(Tokens):
        def outputs(self, model, batch):
            return batch.inputs

        def loss(self, outputs, batch):
            return tk.Loss(outputs.sum(), len(batch))

    losses = torch.full((4000, 1), 1e-3)
    losses[0] = 3e4
    found = tk.evaluate(nn.Linear(1, 1), Given(), (losses, torch.zeros(4000)), batch_size=1)
    assert found["loss"] == pytest.approx(losses.double().mean().item(), rel=1e-12)


def test_training_on_tokens_is_scored_after_each_epoch():
    model = tiny_tagger()
    run = tk.fit(
        model, Tokens(), some_tagged(40), some_tagged(10, 1), metrics=[tk.accuracy],
        plan=[tk.finetune(8, lr=0.05)], batch_size=8, accumulate=2,
    )  # fmt: skip
    assert run.best["accuracy"] > 0.6
    assert run.evaluate(some_tagged(10, 1))["accuracy"] == pytest.approx(run.best["accuracy"])


def test_outputs_of_tokens_need_lengths_and_an_objective_that_scores_them():
    model, data = tiny_tagger(), some_tagged(9)
    with pytest.raises(TypeError, match=r"Classification scores items: give it a method scored"):
        tk.evaluate(model, tk.classification(), data)
    # items that say nothing of their lengths
    texts = [{k: v[0] for k, v in data.fetch([at], None, 0).inputs.items()} for at in range(9)]
    with pytest.raises(ValueError, match=r"shapes \(.*cannot be put together: give the source"):
        tk.predict(model, texts, 1)


def test_outputs_of_rows_of_one_length_are_one_array():
    found = tk.predict(nn.Linear(4, 2), (torch.randn(5, 7, 4), torch.zeros(5)), 2)
    assert found.logits.shape == (5, 7, 2) and found.classes.shape == (5, 7)
