"""What an objective promises: sums and counts that add up to the loss of one big batch."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from transferkit.metrics import accuracy
from transferkit.objectives import (
    IGNORED,
    Loss,
    classification,
    forward,
    regression,
    spans,
    token_classification,
)


def batch(labels, inputs=None):
    return SimpleNamespace(inputs=inputs, labels=torch.as_tensor(labels))


def problem(seed, items, classes):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(items, classes, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, classes, (items,), generator=generator)
    weights = torch.rand(classes, dtype=torch.float64, generator=generator) + 0.05
    return logits, labels, weights


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    items=st.integers(1, 40),
    classes=st.integers(2, 7),
    smoothing=st.sampled_from([0.0, 0.1, 0.6]),
    weighted=st.booleans(),
)
def test_one_big_batch_agrees_with_cross_entropy_of_torch(
    seed, items, classes, smoothing, weighted
):
    logits, labels, weights = problem(seed, items, classes)
    objective = classification(smoothing, weights if weighted else None)
    expected = F.cross_entropy(
        logits, labels, weight=weights if weighted else None, label_smoothing=smoothing
    )
    assert objective.loss(logits, batch(labels)).mean().item() == pytest.approx(
        expected.item(), rel=1e-12
    )


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    cuts=st.lists(st.integers(1, 29), max_size=4, unique=True),
    weighted=st.booleans(),
)
def test_any_ragged_grouping_gives_the_gradient_of_one_big_batch(seed, cuts, weighted):
    logits, labels, weights = problem(seed, 30, 4)
    objective = classification(0.1, weights if weighted else None)
    whole = logits.clone().requires_grad_()
    objective.loss(whole, batch(labels)).mean().backward()

    parts = logits.clone().requires_grad_()
    edges = [0, *sorted(cuts), 30]
    groups = [slice(a, b) for a, b in pairwise(edges)]
    counts = [objective.counts(batch(labels[group]))[0] for group in groups]
    for group in groups:
        objective.loss(parts[group], batch(labels[group])).mean((sum(counts),)).backward()
    torch.testing.assert_close(parts.grad, whole.grad, rtol=0, atol=1e-12)


def test_the_mean_of_means_would_not_give_the_big_batch():
    # The guard of the two laws above: the naive average differs on this very problem.
    logits, labels, weights = problem(3, 30, 4)
    labels = labels.sort().values
    objective = classification(0.0, weights)
    first = objective.loss(logits[:7], batch(labels[:7]))
    second = objective.loss(logits[7:], batch(labels[7:]))
    whole = objective.loss(logits, batch(labels)).mean()
    assert (first + second).mean().item() == pytest.approx(whole.item(), rel=1e-12)
    assert abs((first.mean() + second.mean()) / 2 - whole) > 1e-2


@pytest.mark.parametrize("weights", [None, (0.5, 2.0, 1 / 3, 4.0)])
def test_counts_are_known_before_the_forward_pass(weights):
    logits, labels, _ = problem(0, 11, 4)
    objective = classification(0.0, weights)
    assert objective.counts(batch(labels)) == objective.loss(logits, batch(labels)).counts


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_whole_type_give_the_same_loss(dtype):
    logits, labels, weights = problem(0, 12, 3)
    objective = classification(0.1, weights)
    expected = objective.loss(logits, batch(labels)).mean()
    assert objective.loss(logits, batch(labels.to(dtype))).mean() == expected


def test_every_term_is_divided_by_its_own_count():
    def loss(a, n, b, m):
        return Loss.terms(
            {"task": (1.0, torch.tensor(a), n), "hint": (0.5, torch.tensor(b), torch.tensor(m))}
        )

    both = loss(6.0, 2, 8.0, 0.5) + loss(3.0, 1, 2.0, 4.5)
    assert both.mean().item() == pytest.approx(9 / 3 + 0.5 * 10 / 5)
    assert both.means() == {"task": torch.tensor(3.0), "hint": torch.tensor(2.0)}


@pytest.mark.parametrize("count", [0, torch.tensor(0.0)])
def test_a_term_that_counted_nothing_contributes_zero_and_no_gradient(count):
    logits = torch.ones(3, requires_grad=True)
    value = Loss((logits * 0).sum(), count).mean()
    value.backward()
    assert value.item() == 0
    assert torch.equal(logits.grad, torch.zeros(3))


def test_losses_with_different_terms_do_not_add():
    other = Loss.terms({"hint": (1.0, torch.tensor(1.0), 1)})
    with pytest.raises(ValueError, match="same terms"):
        Loss(torch.tensor(1.0), 1) + other


@pytest.mark.parametrize(
    ("total", "items", "error", "message"),
    [
        (3.0, 1, TypeError, "a tensor is expected"),
        (torch.ones(4), 4, ValueError, r"shape \(4,\)"),
        (torch.tensor(4.0), torch.ones(4), ValueError, "count of 'loss'"),
    ],
)
def test_a_loss_that_is_not_summed_is_refused(total, items, error, message):
    with pytest.raises(error, match=message):
        Loss(total, items)


def test_a_loss_without_terms_is_refused():
    with pytest.raises(ValueError, match="no terms"):
        Loss.terms({})


def test_detach_keeps_the_numbers_and_drops_the_graph():
    weight = torch.tensor(2.0, requires_grad=True)
    loss = Loss(weight * 3, 2).detach()
    assert not loss.totals[0].requires_grad
    assert loss.mean().item() == 3


class CountReads(TorchDispatchMode):
    """Counts what makes a program wait for its device: scalars read and tensors copied to it."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        self.reads += "_local_scalar_dense" in name or "nonzero" in name or "lift_fresh" in name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.125]])
def test_a_training_step_reads_no_scalar(weights):
    logits, labels, _ = problem(0, 8, 3)
    objective = classification(0.1, weights)
    logits.requires_grad_()
    objective.loss(logits, batch(labels))  # the first call may copy the weights to the device
    with CountReads() as counted:
        loss = objective.loss(logits, batch(labels))
        (loss + loss.detach()).mean().backward()
        loss.means()
    assert counted.reads == 0


def test_class_weights_first_met_in_evaluation_can_still_be_trained_with():
    labels = torch.tensor([0, 1, 2])
    objective = classification(class_weights=[0.3, 0.4, 0.77])
    with torch.inference_mode():
        objective.loss(torch.zeros(3, 3), batch(labels))
    logits = torch.zeros(3, 3, requires_grad=True)
    objective.loss(logits, batch(labels)).mean().backward()
    assert torch.isfinite(logits.grad).all()


def test_a_rehearsal_on_fake_tensors_leaves_no_trace_on_the_real_step():
    from torch._subclasses.fake_tensor import FakeTensorMode

    objective = classification(class_weights=[0.21, 0.43, 0.91])
    for _ in range(2):
        with FakeTensorMode():
            fake = objective.loss(torch.zeros(3, 3), batch(torch.zeros(3, dtype=torch.long)))
        assert fake.mean().shape == ()
        real = objective.loss(torch.zeros(3, 3), batch([0, 1, 2])).mean()
        assert real.item() == pytest.approx(torch.log(torch.tensor(3.0)).item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_summed_in_single_precision(dtype):
    logits = torch.full((4096, 2), 0.5, dtype=dtype)
    loss = classification().loss(logits, batch(torch.zeros(4096, dtype=torch.long)))
    assert loss.totals[0].dtype == torch.float32
    assert loss.mean().item() == pytest.approx(0.693147, rel=1e-5)


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 3)])
def test_regression_agrees_with_the_mean_squared_error_of_torch(shape):
    torch.manual_seed(0)
    outputs = torch.randn(6, shape[1] if len(shape) > 1 else 1, dtype=torch.float64)
    labels = torch.randn(shape, dtype=torch.float64)
    expected = F.mse_loss(outputs.reshape(shape), labels)
    loss = regression().loss(outputs, batch(labels))
    assert loss.mean().item() == pytest.approx(expected.item(), rel=1e-12)
    assert regression().counts(batch(labels)) == loss.counts


def test_regression_refuses_to_score_every_pair_of_items():
    with pytest.raises(ValueError, match=r"\(6, 2\)"):
        regression().loss(torch.zeros(6, 2), batch(torch.zeros(6)))


@pytest.mark.parametrize(
    ("objective", "labels", "outputs", "error", "message"),
    [
        (classification(), [0, 7], 3, ValueError, r"labels hold 7 but the head has 3 .* 8 names"),
        (classification(), [0, -1], 3, ValueError, "hold -1"),
        (classification(), [0.0, 1.0], 3, TypeError, "float"),
        (classification(), [[0, 1], [1, 0]], 2, ValueError, "argmax"),
        (classification(), [0, 1], 1, ValueError, "two outputs"),
        (classification(class_weights=[1, 2]), [0, 1], 3, ValueError, "hold 2 weights"),
        (regression(), [1.0, float("nan")], 1, ValueError, "1 values that are NaN"),
        (regression(), [1.0, 2.0], 2, ValueError, "2 outputs"),
        (regression(), [[1.0, 2.0]], 3, ValueError, "3 outputs"),
    ],
)
def test_labels_that_do_not_fit_the_head_are_named(objective, labels, outputs, error, message):
    with pytest.raises(error, match=message):
        objective.validate(torch.tensor(labels), outputs)


@pytest.mark.parametrize(
    ("objective", "labels", "outputs"),
    [
        (classification(class_weights=[1, 2, 1]), [0, 2], 3),
        (classification(), torch.empty(0, dtype=torch.long), 3),
        (regression(), [0.5, 2.0], 1),
        (regression(), [[0.5, 2.0]], 2),
    ],
)
def test_labels_that_fit_the_head_pass(objective, labels, outputs):
    objective.validate(torch.as_tensor(labels), outputs)


@pytest.mark.parametrize(
    "settings_of",
    [
        {"label_smoothing": 1.0},
        {"label_smoothing": -0.1},
        {"class_weights": [1.0, -1.0]},
        {"class_weights": [0.0, 0.0]},
        {"class_weights": [1.0, float("nan")]},
        {"class_weights": [1.0, float("inf")]},
    ],
)
def test_settings_outside_their_range_are_refused(settings_of):
    with pytest.raises(ValueError, match="expected"):
        classification(**settings_of)


def test_objectives_are_values():
    assert classification(0.1, torch.tensor([1.0, 2.0])) == classification(0.1, [1, 2])
    assert len({classification(), classification(), regression(), regression()}) == 2


@pytest.mark.parametrize("objective", [classification(), regression()])
def test_items_without_labels_are_refused(objective):
    unlabelled = SimpleNamespace(inputs=None, labels=None)
    with pytest.raises(ValueError, match="no labels"):
        objective.loss(torch.zeros(2, 3), unlabelled)
    with pytest.raises(ValueError, match="no labels"):
        objective.counts(unlabelled)


class Keywords(torch.nn.Module):
    def forward(self, left, right):
        return SimpleNamespace(logits=left + right)


class StagedTwin(torch.nn.Module):
    stage_names = ("head",)

    def forward(self, inputs):
        return inputs["left"] + inputs["right"]


@pytest.mark.parametrize("model", [Keywords(), StagedTwin()])
def test_a_dictionary_goes_whole_to_staged_models_and_as_keywords_to_others(model):
    inputs = {"left": torch.ones(2, 3), "right": torch.ones(2, 3)}
    assert torch.equal(forward(model, inputs), torch.full((2, 3), 2.0))


def test_an_objective_called_on_a_model_and_a_batch_gives_the_loss():
    torch.manual_seed(0)
    model, x, y = torch.nn.Linear(5, 3), torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    loss = classification()(model, batch(y, inputs=x))
    torch.testing.assert_close(loss.mean(), F.cross_entropy(model(x), y))


def test_a_model_that_returns_no_logits_is_named():
    with pytest.raises(TypeError, match="returned a tuple"):
        forward(torch.nn.LSTM(3, 3), torch.zeros(2, 3))


def tagged(seed, items, length, classes):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(items, length, classes, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, classes, (items, length), generator=generator)
    labels[torch.rand(items, length, generator=generator) < 0.4] = IGNORED
    weights = torch.rand(classes, dtype=torch.float64, generator=generator) + 0.05
    return logits, labels, weights


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    items=st.integers(1, 9),
    length=st.integers(1, 7),
    smoothing=st.sampled_from([0.0, 0.2]),
    weighted=st.booleans(),
)
def test_tokens_agree_with_cross_entropy_of_torch_over_the_labelled_ones(
    seed, items, length, smoothing, weighted
):
    logits, labels, weights = tagged(seed, items, length, 4)
    objective = token_classification(smoothing, weights if weighted else None)
    loss = objective.loss(logits, batch(labels))
    assert objective.counts(batch(labels)) == loss.counts
    known = labels != IGNORED
    if not known.any():
        assert loss.mean().item() == 0
        return
    expected = F.cross_entropy(
        logits[known],
        labels[known],
        weight=weights if weighted else None,
        label_smoothing=smoothing,
    )
    assert loss.mean().item() == pytest.approx(expected.item(), rel=1e-12)
    rows, kept = objective.scored(logits, batch(labels))
    assert torch.equal(rows, logits[known]) and torch.equal(kept, labels[known])


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.125]])
def test_a_training_step_on_tokens_and_spans_reads_no_scalar(weights):
    logits, labels, _ = tagged(0, 8, 5, 3)
    objective = token_classification(0.1, weights)
    places = torch.tensor([[0, 1]] * 7 + [[IGNORED, IGNORED]])
    scores = logits[..., :2].clone().requires_grad_()
    logits.requires_grad_()
    objective.loss(logits, batch(labels))  # the first call may copy the weights to the device
    with CountReads() as counted:
        objective.loss(logits, batch(labels)).mean().backward()
        spans().loss(scores, batch(places)).mean().backward()
    assert counted.reads == 0


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), items=st.integers(1, 9), length=st.integers(1, 7))
def test_spans_agree_with_the_mean_of_two_cross_entropies(seed, items, length):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(items, length, 2, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, length, (items, 2), generator=generator)
    labels[torch.rand(items, 2, generator=generator) < 0.2] = IGNORED
    loss = spans().loss(scores, batch(labels))
    assert spans().counts(batch(labels)) == loss.counts
    expected = 0.0
    for at in (0, 1):
        if (labels[:, at] != IGNORED).any():
            expected += F.cross_entropy(scores[..., at], labels[:, at]).item() / 2
    assert loss.mean().item() == pytest.approx(expected, rel=1e-12)


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), length=st.integers(1, 7))
def test_the_decoded_span_is_the_best_that_does_not_end_before_it_starts(seed, length):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, length, 2, generator=generator)
    found = spans().decode(scores)
    for row, (start, end) in zip(scores, found.tolist(), strict=True):
        valid = [(a, b) for a in range(length) for b in range(a, length)]
        best = max(valid, key=lambda span: float(row[span[0], 0] + row[span[1], 1]))
        assert (start, end) == best


def test_spans_score_the_exact_match_of_labelled_items():
    scores = torch.full((4, 3, 2), -5.0)
    for item, (start, end) in enumerate([(0, 1), (1, 1), (2, 2), (0, 2)]):
        scores[item, start, 0] = scores[item, end, 1] = 5.0
    labels = torch.tensor([[0, 1], [1, 2], [2, 2], [IGNORED, IGNORED]])
    rows, right = spans().scored(scores, batch(labels))
    assert accuracy(rows.numpy(), right.numpy()) == pytest.approx(2 / 3)


class Scores(torch.nn.Module):
    stage_names = ("head",)

    def forward(self, inputs):
        return inputs["scores"]


@pytest.mark.parametrize("name", ["attention_mask", "mask"])
def test_padding_is_no_place_where_a_span_can_be(name):
    scores, mask = torch.randn(2, 5, 2), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    inputs = {"scores": scores, name: mask.bool() if name == "mask" else mask}
    items = batch([[0, 2], [1, 4]], inputs)
    found = spans()(Scores(), items)
    alone = spans().loss(scores[:1, :3], batch([[0, 2]])) + spans().loss(
        scores[1:], batch([[1, 4]])
    )
    torch.testing.assert_close(found.mean(), alone.mean())
    assert torch.equal(spans().decode(spans().outputs(Scores(), items))[0] < 3, torch.ones(2) > 0)


@pytest.mark.parametrize(
    ("objective", "labels", "outputs", "error", "message"),
    [
        (token_classification(), [0, 1], 3, ValueError, r"one class number a token, \(n, L\)"),
        (token_classification(), [[0, 5, -100]], 3, ValueError, "hold 5 but the head has 3"),
        (token_classification(), [[0, -1, -100]], 3, ValueError, "hold -1"),
        (token_classification(), [[0.0]], 3, TypeError, "float"),
        (spans(), [[0.0, 1.0]], 2, TypeError, "whole places"),
        (spans(), [0, 1], 2, ValueError, r"\(n, 2\) and 2 are expected"),
        (spans(), [[0, 1]], 3, ValueError, "the head 3 outputs"),
        (spans(), [[-1, 1]], 2, ValueError, "hold -1 but places start at 0"),
        (spans(), [[0, 1], [3, 2]], 2, ValueError, "item 1 ends before it starts"),
    ],
)
def test_token_labels_that_do_not_fit_are_named(objective, labels, outputs, error, message):
    with pytest.raises(error, match=message):
        objective.validate(torch.tensor(labels), outputs)


@pytest.mark.parametrize(
    ("objective", "labels", "outputs"),
    [
        (token_classification(class_weights=[1, 2, 1]), [[0, 2, -100]], 3),
        (spans(), [[0, 0], [2, 5], [-100, -100], [3, -100]], 2),
    ],
)
def test_token_labels_that_fit_pass(objective, labels, outputs):
    objective.validate(torch.tensor(labels), outputs)


def test_outputs_that_are_not_one_row_a_token_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\).*score every token"):
        token_classification().loss(torch.zeros(2, 3), batch([[0, 1], [1, 0]]))
    with pytest.raises(ValueError, match="every token two scores"):
        spans().loss(torch.zeros(2, 3, 3), batch([[0, 1], [1, 1]]))
