"""The formulas of the chapter on image models, each computed a second way."""

import copy

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import sklearn.utils.class_weight
import torch
from torch import nn

import transferkit as tk


def case(seed=0, n=40, classes=3):
    random = np.random.default_rng(seed)
    labels = np.r_[np.arange(classes), random.integers(0, classes, n - classes)]
    return random.normal(size=(n, classes)), labels


def batch(logits, labels):
    inputs = torch.as_tensor(logits)
    return inputs, tk.data.Batch(inputs, torch.as_tensor(labels), torch.arange(len(labels)))


# -- the loss -----------------------------------------------------------------------------------


@pytest.mark.equation("eq-weighted-cross-entropy")
def test_weighted_cross_entropy_is_the_weighted_log_loss_of_scikit_learn():
    logits, labels = case()
    weights = np.array([0.5, 2.0, 3.5])
    powers = np.exp(logits)
    expected = sklearn.metrics.log_loss(
        labels, powers / powers.sum(1, keepdims=True), sample_weight=weights[labels]
    )
    outputs, items = batch(logits, labels)
    ours = tk.classification(class_weights=weights).loss(outputs, items).mean()
    assert float(ours) == pytest.approx(expected, rel=1e-9)


@pytest.mark.equation("eq-weighted-cross-entropy")
def test_a_weight_of_three_is_the_same_as_showing_the_item_three_times():
    logits, labels = case(1)
    repeats = np.where(labels == 1, 3, 1)
    outputs, items = batch(logits, labels)
    weighted = tk.classification(class_weights=(1, 3, 1)).loss(outputs, items).mean()
    outputs, items = batch(np.repeat(logits, repeats, 0), np.repeat(labels, repeats))
    repeated = tk.classification().loss(outputs, items).mean()
    assert float(weighted) == pytest.approx(float(repeated), rel=1e-12)


@pytest.mark.equation("eq-balanced-weights")
def test_balanced_weights_are_scikit_learns_and_give_every_class_the_same_say():
    _, labels = case(2, n=97)
    counts = np.bincount(labels)
    weights = len(labels) / (3 * counts)
    expected = sklearn.utils.class_weight.compute_class_weight(
        "balanced", classes=np.arange(3), y=labels
    )
    assert weights == pytest.approx(expected, rel=1e-12)
    logits = np.random.default_rng(2).normal(size=(97, 3))
    outputs, items = batch(logits, labels)
    weighted = tk.classification(class_weights=weights).loss(outputs, items).mean()
    by_class = []
    for label in range(3):
        outputs, items = batch(logits[labels == label], labels[labels == label])
        by_class.append(float(tk.classification().loss(outputs, items).mean()))
    assert float(weighted) == pytest.approx(np.mean(by_class), rel=1e-9)


@pytest.mark.equation("eq-threshold")
@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.9])
def test_a_threshold_on_the_probability_is_one_on_the_difference_of_the_logits(threshold):
    logits, _ = case(3, n=500, classes=2)
    powers = np.exp(logits)
    by_probability = powers[:, 1] / powers.sum(1) >= threshold
    by_logits = logits[:, 1] - logits[:, 0] >= np.log(threshold / (1 - threshold))
    assert 0 < by_probability.sum() < 500
    assert (by_probability == by_logits).all()


# -- BatchNorm ----------------------------------------------------------------------------------


def maps(seed=0):
    images = np.random.default_rng(seed).normal(2.0, 3.0, size=(6, 4, 5, 5))
    layer = nn.BatchNorm2d(4, momentum=0.1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1.0, 2.0, -1.0]))
        layer.bias.copy_(torch.tensor([0.0, 1.0, -3.0, 0.2]))
        layer.running_mean.copy_(torch.tensor([1.0, -1.0, 0.0, 5.0]))
        layer.running_var.copy_(torch.tensor([4.0, 1.0, 0.25, 2.0]))
    return images, layer


def normalised(images, mean, var, layer):
    def shaped(values):
        return np.asarray(values).reshape(1, -1, 1, 1)

    scale, offset = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    centred = (images - shaped(mean)) / np.sqrt(shaped(var) + layer.eps)
    return shaped(scale) * centred + shaped(offset)


@pytest.mark.equation("eq-batchnorm-train")
def test_in_training_batchnorm_uses_the_mean_and_the_biased_variance_of_the_batch():
    images, layer = maps()
    expected = normalised(images, images.mean((0, 2, 3)), images.var((0, 2, 3)), layer)
    ours = layer.train()(torch.from_numpy(images)).detach().numpy()
    assert ours == pytest.approx(expected, abs=1e-10)


@pytest.mark.equation("eq-batchnorm-eval")
def test_in_evaluation_batchnorm_uses_what_it_has_stored_and_looks_at_one_image_alone():
    images, layer = maps()
    expected = normalised(images, layer.running_mean, layer.running_var, layer)
    together = layer.eval()(torch.from_numpy(images)).detach().numpy()
    alone = layer(torch.from_numpy(images[:1])).detach().numpy()
    assert together == pytest.approx(expected, abs=1e-10)
    assert alone == pytest.approx(expected[:1], abs=1e-10)


@pytest.mark.equation("eq-running-statistics")
def test_each_training_batch_moves_the_statistics_by_a_tenth_and_the_variance_is_unbiased():
    images, layer = maps(4)
    mean = 0.9 * layer.running_mean.numpy() + 0.1 * images.mean((0, 2, 3))
    var = 0.9 * layer.running_var.numpy() + 0.1 * images.var((0, 2, 3), ddof=1)
    with torch.no_grad():
        layer.train()(torch.from_numpy(images))
    assert layer.running_mean.numpy() == pytest.approx(mean, abs=1e-12)
    assert layer.running_var.numpy() == pytest.approx(var, abs=1e-12)


@pytest.mark.equation("eq-running-decay")
def test_after_t_batches_the_old_mean_counts_for_nine_tenths_to_the_t():
    images, layer = maps(5)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.running_mean += 7.0  # the same but for the mean it started from
        for _ in range(12):
            layer.train()(torch.from_numpy(images))
            other.train()(torch.from_numpy(images))
    left = (other.running_mean - layer.running_mean).numpy()
    assert left == pytest.approx(7.0 * 0.9**12, rel=1e-9)


# -- cutting ------------------------------------------------------------------------------------


class Counting(nn.Linear):
    """A layer that counts the items it has seen."""

    seen = 0

    def forward(self, inputs):
        self.seen += len(inputs)
        return super().forward(inputs)


@pytest.mark.equation("eq-cut")
def test_the_two_sides_of_a_cut_compose_to_the_model():
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
    inputs = torch.randn(11, 5)
    first, second = (layer.weight.detach().numpy() for layer in (model[0], model[2]))
    hidden = np.tanh(inputs.numpy() @ first.T + model[0].bias.detach().numpy())
    lower, upper = tk.layers.split(model, 2)
    assert lower(inputs).detach().numpy() == pytest.approx(hidden, abs=1e-12)
    expected = hidden @ second.T + model[2].bias.detach().numpy()
    assert upper(lower(inputs)).detach().numpy() == pytest.approx(expected, abs=1e-12)


@pytest.mark.equation("eq-cache-cost")
@pytest.mark.parametrize("epochs", [2, 6])
def test_with_a_cache_the_frozen_part_sees_each_item_once_and_without_it_once_an_epoch(
    epochs, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRANSFERKIT_CACHE", str(tmp_path))
    seen = {}
    for cache in (True, False):
        body, head = Counting(4, 3), Counting(3, 2)
        data = (torch.randn(50, 4), torch.arange(50) % 2)
        plan = tk.linear_probe(epochs, cache=cache)
        tk.fit(
            nn.Sequential(body, head), tk.classification(), data, plan=plan, batch_size=10,
            precision="fp32",
        )  # fmt: skip
        seen[cache] = (body.seen, head.seen)
    look = 10  # items that a fit may send through first: to find a wrong shape, to name the cache
    assert 50 <= seen[True][0] <= 50 + look
    assert 50 * epochs <= seen[False][0] <= 50 * epochs + look
    assert 50 * epochs <= seen[True][1] <= 50 * epochs + look


# -- scores -------------------------------------------------------------------------------------


def table(logits, labels):
    said = logits.argmax(1)
    return [int(((said == s) & (labels == t)).sum()) for t, s in ((1, 1), (0, 0), (0, 1), (1, 0))]


@pytest.mark.equation("eq-balanced-accuracy")
def test_balanced_accuracy_is_the_mean_recall():
    logits, labels = case(6, n=200, classes=2)
    tp, tn, fp, fn = table(logits, labels)
    expected = (tp / (tp + fn) + tn / (tn + fp)) / 2
    assert expected == pytest.approx(
        sklearn.metrics.balanced_accuracy_score(labels, logits.argmax(1)), rel=1e-12
    )
    assert tk.balanced_accuracy(logits, labels) == pytest.approx(expected, rel=1e-12)


@pytest.mark.equation("eq-macro-f1")
def test_macro_f1_is_the_mean_over_both_classes():
    logits, labels = case(7, n=200, classes=2)
    tp, tn, fp, fn = table(logits, labels)
    expected = (2 * tp / (2 * tp + fp + fn) + 2 * tn / (2 * tn + fp + fn)) / 2
    assert expected == pytest.approx(
        sklearn.metrics.f1_score(labels, logits.argmax(1), average="macro"), rel=1e-12
    )
    assert tk.macro_f1(logits, labels) == pytest.approx(expected, rel=1e-12)


@pytest.mark.equation("eq-mcc")
def test_mcc_is_the_correlation_of_two_columns_of_zeros_and_ones():
    logits, labels = case(8, n=200, classes=2)
    logits[:, 1] += 2 * labels
    tp, tn, fp, fn = table(logits, labels)
    expected = (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert expected == pytest.approx(np.corrcoef(labels, logits.argmax(1))[0, 1], rel=1e-12)
    assert tk.mcc(logits, labels) == pytest.approx(expected, rel=1e-12)


@pytest.mark.equation("eq-balanced-accuracy", "eq-mcc")
def test_the_constant_answer_has_balanced_accuracy_one_half_and_no_correlation():
    _, labels = case(9, n=100, classes=2)
    constant = np.tile([1.0, 0.0], (100, 1))
    assert tk.balanced_accuracy(constant, labels) == 0.5
    assert tk.mcc(constant, labels) == 0.0


# -- the comparison -----------------------------------------------------------------------------


@pytest.mark.equation("eq-paired-interval")
def test_without_overlap_the_paired_interval_is_that_of_the_paired_t_test():
    random = np.random.default_rng(10)
    a, b = random.normal(size=(2, 7))
    expected = scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
    ours = tk.paired_interval(a, b)
    assert (ours.low, ours.high) == pytest.approx((expected.low, expected.high), rel=1e-9)


@pytest.mark.equation("eq-paired-interval")
@pytest.mark.parametrize("k", [3, 5, 10])
def test_overlapping_folds_widen_the_interval_as_printed(k):
    random = np.random.default_rng(k)
    a, b = random.normal(size=(2, k))
    difference = a - b
    spread = np.sqrt(np.sum((difference - difference.mean()) ** 2) / (k - 1))
    half = scipy.stats.t(k - 1).isf(0.025) * spread * np.sqrt(1 / k + 1 / (k - 1))
    ours = tk.paired_interval(a, b, test_per_train=1 / (k - 1))
    assert ours.mean == pytest.approx(difference.mean(), rel=1e-12)
    assert ours.high - ours.mean == pytest.approx(half, rel=1e-9)


@pytest.mark.equation("eq-paired-interval")
@pytest.mark.parametrize("k", [3, 5, 10])
def test_when_folds_correlate_by_one_in_k_the_interval_covers_the_truth_19_times_in_20(k):
    random, covered = np.random.default_rng(k), {0.0: 0, 1 / (k - 1): 0}
    for _ in range(2000):
        d = np.sqrt(1 / k) * random.normal() + np.sqrt(1 - 1 / k) * random.normal(size=k)
        for ratio in covered:
            found = tk.paired_interval(d, np.zeros(k), test_per_train=ratio)
            covered[ratio] += found.low <= 0 <= found.high
    assert covered[1 / (k - 1)] / 2000 == pytest.approx(0.95, abs=0.02)
    assert covered[0.0] / 2000 < 0.90
