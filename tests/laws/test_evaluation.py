"""Law 5: what evaluation says does not depend on how the items are batched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference
from small_models import some_images, some_texts, tiny_convnet, tiny_encoder
from torch import nn

import transferkit as tk


@pytest.mark.parametrize("make", [tiny_convnet, tiny_encoder])
@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 23), size=st.integers(1, 30))
def test_evaluation_does_not_depend_on_the_batch_size(make, count, size):
    model = make()
    data = some_images(count) if make is tiny_convnet else some_texts(count)
    metrics = [tk.accuracy, tk.macro_f1]
    some = tk.evaluate(model, tk.classification(), data, metrics, size, precision="fp32")
    one = tk.evaluate(model, tk.classification(), data, metrics, 1, precision="fp32")
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


def test_scores_agree_with_scikit_learn():
    model, data = tiny_convnet(), some_images(40)
    scores = tk.evaluate(model, tk.classification(), data, [tk.accuracy, tk.macro_f1])
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
