"""Laws 12 and 13: what the measures and adaptations compute, and that no target label matters."""

from __future__ import annotations

from itertools import combinations

import corals
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import same, state_of
from test_resume import PowerCut, _rows, _stopped_after
from torch import nn

import transferkit as tk
from transferkit.adapt import _Adapting
from transferkit.engine import Training

DOUBLE = torch.float64
FEW = settings(max_examples=20, deadline=None)


def sample(count, width=3, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=DOUBLE) + shift


# ---- law 12: the measures ------------------------------------------------------------------------


def naive_mmd(x, y, bandwidths, estimator):
    def kernel(a, b):
        square = float((a - b).square().sum())
        return sum(torch.tensor(-square / (2 * s**2), dtype=DOUBLE).exp() for s in bandwidths)

    def within(rows):
        n = len(rows)
        pairs = [(i, j) for i in range(n) for j in range(n) if estimator == "biased" or i != j]
        total = sum(kernel(rows[i], rows[j]) for i, j in pairs)
        return total / (n * n if estimator == "biased" else n * (n - 1))

    across = sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))
    return within(x) + within(y) - 2 * across


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@FEW
@given(
    n=st.integers(2, 6), m=st.integers(2, 6), scale=st.floats(0.1, 10.0), seed=st.integers(0, 99)
)
def test_mmd_is_the_estimator_its_docstring_names(n, m, scale, seed, estimator):
    x, y = scale * sample(n, seed=seed), scale * sample(m, seed=seed + 1, shift=0.5)
    found = tk.mmd(x, y, (0.5, 2.0), estimator)
    torch.testing.assert_close(found, naive_mmd(x, y, (0.5, 2.0), estimator), rtol=1e-9, atol=1e-9)


def test_only_the_unbiased_mmd_has_mean_zero_under_equality():
    # Over all ways to deal seven points out as three and four, which are equally likely when both
    # samples come from one distribution, the mean is exact.
    points = sample(7)
    means = {}
    for estimator in ("unbiased", "biased"):
        values = []
        for chosen in combinations(range(7), 3):
            rest = [at for at in range(7) if at not in chosen]
            values.append(tk.mmd(points[list(chosen)], points[rest], (1.0,), estimator))
        means[estimator] = float(torch.stack(values).mean())
        assert (min(values) < 0) == (estimator == "unbiased")
    assert abs(means["unbiased"]) < 1e-12
    assert means["biased"] > 0.1


@FEW
@given(shift=st.floats(-100, 100), seed=st.integers(0, 99))
def test_coral_is_zero_between_a_sample_and_its_translate(shift, seed):
    x = sample(8, seed=seed)
    assert float(tk.coral(x, x + shift)) < 1e-20
    assert float(tk.coral(x, 2.0 * x)) > 1e-4


@FEW
@given(scale=st.floats(0.05, 20.0), seed=st.integers(0, 99))
def test_coral_scales_with_the_fourth_power_of_both_sides(scale, seed):
    x, y = sample(8, seed=seed), sample(5, seed=seed + 1)
    expected = scale**4 * tk.coral(x, y)
    torch.testing.assert_close(tk.coral(scale * x, scale * y), expected, rtol=1e-9, atol=0)


@FEW
@given(n=st.integers(2, 9), m=st.integers(2, 9), width=st.integers(1, 5), seed=st.integers(0, 99))
def test_coral_is_the_definition_of_its_paper_and_of_none_of_the_others(n, m, width, seed):
    x, y = sample(n, width, seed), 2 * sample(m, width, seed + 1, shift=3.0)
    paper = corals.paper(x, y)
    torch.testing.assert_close(tk.coral(x, y), paper)
    apart = (x.mean(0) - y.mean(0)).square().mean()
    torch.testing.assert_close(corals.means_too(x, y), 4 * paper + apart)
    norm = (4 * width**2 * paper).sqrt()
    torch.testing.assert_close(corals.unsquared(x, y), norm / (4 * width**2))


def test_of_four_corals_only_those_of_covariances_alone_are_zero_between_translates():
    x = sample(40, 5)
    moved = x + torch.arange(5.0, dtype=DOUBLE)
    assert float(corals.paper(x, moved)) < 1e-20
    assert float(corals.unsquared(x, moved)) < 1e-9
    assert float(corals.means_too(x, moved)) == pytest.approx(30 / 5)  # (0 + 1 + 4 + 9 + 16) / 5
    assert float(corals.over_items(x, moved)) > 1e-2
    powers = {}
    for measure in (corals.paper, corals.unsquared, corals.means_too, corals.over_items):
        pair = x, sample(40, 5, seed=1, shift=1.0)
        grown = measure(*(3 * part for part in pair)) / measure(*pair)
        powers[measure.__name__] = float(grown.log() / torch.tensor(3.0, dtype=DOUBLE).log())
    assert powers["paper"] == pytest.approx(4)
    assert powers["unsquared"] == pytest.approx(2)
    assert 2 < powers["means_too"] < 4
    assert powers["over_items"] == pytest.approx(4)


@FEW
@given(weight=st.floats(0.0, 100.0), seed=st.integers(0, 99))
def test_the_gradient_of_gradient_reversal_is_exactly_minus_lambda_times(weight, seed):
    def slope(change):
        x = sample(4, seed=seed).float().requires_grad_()
        (change(x).sin() * torch.arange(12.0).view(4, 3)).sum().backward()
        return x.grad

    x = sample(4, seed=seed).float()
    assert torch.equal(tk.grad_reverse(x, weight), x)
    assert torch.equal(slope(lambda x: tk.grad_reverse(x, weight)), -weight * slope(lambda x: x))


# ---- the adaptations -----------------------------------------------------------------------------


def tiny(conditional=None, dropout=0.0, seed=0):
    """An MLP with BatchNorm and three classes; None gives no discriminator."""
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(dropout))
    model = tk.Staged([("body", body), ("head", nn.Linear(6, 3))], labels=["a", "b", "c"])
    if conditional is None:
        return model
    return tk.with_discriminator(model, conditional=conditional, hidden=5)


ADAPTATIONS = {
    "dann": (tk.dann(), False),
    "cdan": (tk.cdan(), True),
    "cdan with entropy": (tk.cdan(entropy=True), True),
    "mmd": (tk.align(tk.mmd, weight=tk.ramp(0, 2)), None),
    "coral": (tk.align(tk.coral, weight=3.0), None),
    "wasserstein": (tk.align(tk.wasserstein, at="body", projections=5), None),
    "confusion": (tk.confusion(weight=tk.ramp(0, 1)), None),
    "three": (tk.confusion(tk.align(tk.coral, tk.dann(weight=0.5))), False),
}
SOURCE = sample(22, 4).float(), torch.arange(22) % 3
TARGET = sample(17, 4, 1, 1.0).float(), torch.arange(17) % 3
HELD_OUT = sample(12, 4, 2, 1.0).float(), torch.arange(12) % 3
PLAN = tk.finetune(4, lr=0.03)


def adapted(name, target=TARGET, held_out=HELD_OUT, **changes):
    objective, conditional = ADAPTATIONS[name]
    model = tiny(conditional, dropout=0.2)
    how = {"plan": PLAN, "batch_size": 6, "patience": 2, "precision": "fp32"} | changes
    run = tk.fit(model, objective, tk.pair(SOURCE, target), tk.unlabelled(held_out), **how)
    return state_of(model), _rows(run), run


POISON = {
    "permuted": lambda labels: labels.flip(0),
    "NaN": lambda labels: torch.full((len(labels),), torch.nan),
    "out of range": lambda labels: torch.full((len(labels),), -7).index_fill(
        0, torch.tensor([0]), 999
    ),
    "gone": lambda labels: None,
}


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("name", ADAPTATIONS)
def test_target_labels_change_nothing_bit_for_bit(name, poison):
    weights, rows, run = adapted(name)
    spoil = POISON[poison]
    spoiled = [(x, spoil(y)) for x, y in (TARGET, HELD_OUT)]
    others, other_rows, other_run = adapted(name, *spoiled)
    assert same(weights, others)
    assert rows == other_rows
    assert run.best["epoch"] == other_run.best["epoch"]


class Sealed(tk.data.Tensors):
    """A target whose labels must not be looked at."""

    labels = property(lambda self: pytest.fail("a label of the target was looked at"))

    def __init__(self, inputs):
        self.inputs = inputs

    def fetch(self, indices, epoch, seed):
        index = torch.as_tensor(indices)
        return tk.data.Batch(self.inputs[index], torch.full((len(index),), torch.nan), index)


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_no_label_of_the_target_is_ever_asked_for(name, tmp_path):
    sealed = [Sealed(x) for x, _ in (TARGET, HELD_OUT)]
    assert same(adapted(name, *sealed, directory=tmp_path)[0], adapted(name)[0])


def test_self_training_and_adabn_look_at_no_label_of_the_target_either():
    def ends(target, held_out):
        model = tiny()
        how = {"plan": PLAN, "rounds": 2, "threshold": 0.4, "precision": "fp32"}
        validation = tk.unlabelled(held_out, "entropy")
        runs = tk.self_training(model, tk.classification(), SOURCE, target, validation, **how)
        return state_of(tk.adabn(model, target)), [_rows(run) for run in runs]

    plain = ends(TARGET, HELD_OUT)
    sealed = ends(*(Sealed(x) for x, _ in (TARGET, HELD_OUT)))
    assert same(plain[0], sealed[0])
    assert plain[1] == sealed[1]


@pytest.mark.parametrize("cached", [False, True])
def test_what_is_reported_changes_nothing_bit_for_bit(cached):
    def ends(report):
        model, plan = tiny(), [tk.linear_probe(2, lr=0.1, cache=cached), PLAN]
        how = {"plan": plan, "patience": 1, "report": report, "metrics": [tk.accuracy]}
        run = tk.fit(model, tk.classification(), SOURCE, tk.unlabelled(HELD_OUT), **how)
        rows = [{k: v for k, v in row.items() if "target" not in k} for row in _rows(run)]
        return state_of(model), rows, run

    weights, rows, _ = ends(None)
    others, other_rows, run = ends({"target": TARGET})
    assert same(weights, others)
    assert rows == other_rows
    last = {f"target {name}": value for name, value in run.evaluate(TARGET).items()}
    assert {name: run.best[name] for name in last} == pytest.approx(last)


@pytest.mark.parametrize("name", ADAPTATIONS)
@pytest.mark.parametrize("updates", [2, 6])
def test_an_adaptation_resumes_in_mid_epoch_bit_for_bit(name, updates, tmp_path):
    plan = [tk.finetune(1, lr=0.03), tk.finetune(1, lr=0.01)]  # of four updates each: two ramps
    whole = adapted(name, plan=plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "step", _stopped_after(updates))
        with pytest.raises(PowerCut):
            adapted(name, plan=plan, directory=tmp_path, save_every=0.0)
    resumed = adapted(name, plan=plan, directory=tmp_path, save_every=0.0)
    assert same(whole[0], resumed[0])
    assert whole[1] == resumed[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_replay_gives_the_very_pairs_of_an_update(workers, monkeypatch):
    seen, step = [], Training.step

    def watched(self, micro):
        seen.append(micro[0])
        step(self, micro)

    monkeypatch.setattr(Training, "step", watched)
    run = adapted("dann", workers=workers)[2]
    for number in (1, 4, 7):
        (again,) = run.replay(number).batches
        assert same(again.inputs, seen[number - 1].inputs)
        assert torch.equal(again.labels, seen[number - 1].labels)


@pytest.mark.parametrize(
    "how", [{"recompute": True}, {"precision": "bf16"}, {"ema": 0.9}, {"clip": None}], ids=str
)
@pytest.mark.parametrize("name", ["three", "mmd", "wasserstein"])
def test_adaptation_goes_with_the_other_settings_of_fit(name, how):
    _, rows, run = adapted(name, **how)
    assert all(row["train_loss"] > 0 for row in rows)
    assert torch.isfinite(run.model(TARGET[0])).all()


def test_the_ramp_follows_the_updates_of_each_phase(monkeypatch):
    seen = []
    monkeypatch.setattr(_Adapting, "_now", lambda self: seen.append(self.share) or 1.0)
    plan = [tk.finetune(1, lr=0.03), tk.finetune(2, lr=0.01)]
    adapted("dann", plan=plan)
    assert seen == [at / 4 for at in range(4)] + [at / 8 for at in range(8)]


# ---- what each adds, by a loop over items --------------------------------------------------------


def _parts(name):
    # One batch in float64, with the model's features and logits of both halves.
    objective, conditional = ADAPTATIONS[name]
    model = tiny(conditional).double().eval()
    batch = tk.pair((SOURCE[0].double(), SOURCE[1]), TARGET[0].double()).fetch(range(5), 0, 0)
    rows = torch.cat([batch.inputs["source"], batch.inputs["target"]])
    features = model.body(rows)
    return objective, model, batch, features, model.head(features)


def test_dann_lowers_what_it_says_and_its_features_learn_the_opposite_of_the_discriminator():
    _, model, batch, features, logits = _parts("dann")
    loss = tk.dann(weight=0.7)(model, batch)
    task = nn.functional.cross_entropy(logits[:5], batch.labels)
    said = torch.sigmoid(model.head.discriminator(features)).squeeze(1)
    domain = -(said[:5].log().sum() + (1 - said[5:]).log().sum()) / 10
    torch.testing.assert_close(loss.mean(), task + domain)
    body, judge = list(model.body.parameters()), list(model.head.discriminator.parameters())
    ours = torch.autograd.grad(loss.mean(), body + judge)
    expected = torch.autograd.grad(task - 0.7 * domain, body, retain_graph=True)
    expected += torch.autograd.grad(domain, judge)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("entropy", [False, True])
def test_cdan_judges_products_of_features_and_probabilities(entropy):
    _, model, batch, features, logits = _parts("cdan")
    shares = logits.softmax(1)
    total, weights = 0.0, 0.0
    for row in range(10):
        products = [shares[row, c] * features[row, f] for c in range(3) for f in range(6)]
        said = torch.sigmoid(model.head.discriminator(torch.stack(products)))[0]
        unsure = -sum(p * p.log() for p in shares[row])
        weight = 1 + torch.exp(-unsure) if entropy else 1.0
        total = total - weight * (said if row < 5 else 1 - said).log()
        weights = weights + weight
    loss = tk.cdan(weight=1.0, entropy=entropy)(model, batch)
    assert loss.names == ("loss", "domain")
    torch.testing.assert_close(loss.means()["domain"], (total / weights).detach())


@pytest.mark.parametrize("measure", [tk.mmd, tk.coral])
def test_align_measures_what_enters_the_head_unless_another_place_is_named(measure):
    _, model, batch, features, logits = _parts("coral")
    expected = measure(features[:5], features[5:])
    loss = tk.align(measure, weight=2.0)(model, batch)
    torch.testing.assert_close(loss.totals[1], expected)
    task = nn.functional.cross_entropy(logits[:5], batch.labels)
    torch.testing.assert_close(loss.mean(), task + 2 * expected)
    elsewhere = tk.align(measure, at="head")(model, batch)
    torch.testing.assert_close(elsewhere.totals[1], measure(logits[:5], logits[5:]))


def test_confusion_is_what_classes_share_in_the_items_of_the_target():
    _, model, batch, _, logits = _parts("confusion")
    shares = (logits[5:] / 2.5).softmax(1)
    sure = [1 + torch.exp(sum(p * p.log() for p in row)) for row in shares]
    weights = [5 * one / sum(sure) for one in sure]
    total = 0.0
    for c in range(3):
        row = [sum(w * s[c] * s[k] for w, s in zip(weights, shares, strict=True)) for k in range(3)]
        total = total + sum(row[k] for k in range(3) if k != c) / sum(row)
    loss = tk.confusion()(model, batch)
    torch.testing.assert_close(loss.means()["confusion"], (total / 3).detach())


def test_each_adaptation_couples_the_items_and_says_so():
    for objective, _ in ADAPTATIONS.values():
        assert objective.additive is False
    with pytest.raises(ValueError, match="couples the items of a batch"):
        adapted("dann", accumulate=2)
    with pytest.raises(ValueError, match="features cannot be cached"):
        adapted("mmd", plan=tk.linear_probe(1))


def test_a_frozen_body_is_adapted_right_without_a_cache():
    model = tiny(False)
    before = state_of(model.body)
    tk.fit(model, tk.dann(), tk.pair(SOURCE, TARGET), plan=tk.linear_probe(2, cache=False))
    assert same(before, state_of(model.body))
