"""Adaptation to a target without labels: what it does, and what is said about bad input."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import nn

import transferkit as tk
from transferkit import target

pytestmark = pytest.mark.usefixtures("one_thread")

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(40, 4, generator=GENERATOR)
Y = (X[:, 0] > 0).long()
TARGET = X + 2.0


def make(conditional=None, width=6, **settings) -> tk.Staged:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, width), nn.ReLU())
    model = tk.Staged([("body", body), ("head", nn.Linear(width, 2))], labels=["no", "yes"])
    if conditional is None:
        return model
    return tk.with_discriminator(model, conditional=conditional, hidden=5, **settings)


# ---- measures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(5, 5), (7, 4), (2, 9)])
def test_wasserstein_in_one_dimension_is_that_of_scipy(n, m):
    x, y = X[:n, 0].double(), 2 * X[10 : 10 + m, 1].double() + 1
    assert float(tk.wasserstein(x, y)) == pytest.approx(wasserstein_distance(x, y))


def test_the_sliced_distance_of_a_translate_is_the_mean_length_of_its_projection():
    x = X.double()
    found = float(tk.wasserstein(x, x + 1.0, projections=4000))
    # of a vector of length 2 in 4 dimensions: 2 * 4 / (3 pi)
    assert found == pytest.approx(8 / (3 * np.pi), rel=0.05)
    assert float(tk.wasserstein(x, x[torch.randperm(40, generator=GENERATOR)])) < 1e-12


@pytest.mark.parametrize("measure", [tk.mmd, tk.coral, tk.wasserstein])
def test_measures_have_right_gradients(measure):
    x, y = X[:5].double().requires_grad_(), X[5:9].double()
    settings = {"bandwidths": (1.0, 3.0)} if measure is tk.mmd else {}
    assert torch.autograd.gradcheck(lambda x: measure(x, y, **settings), x)


def test_the_default_bandwidths_are_multiples_of_the_median_distance():
    x, y = X[:6].double(), TARGET[:5].double()
    median = float(torch.pdist(torch.cat([x, y])).median())
    widths = [median * multiple for multiple in (0.25, 0.5, 1, 2, 4)]
    torch.testing.assert_close(tk.mmd(x, y), tk.mmd(x, y, widths))
    assert float(tk.mmd(torch.ones(3, 2), torch.ones(4, 2))) == 0.0  # no distance at all


def test_mmd_keeps_its_digits_far_from_zero():
    x, y = X, TARGET
    torch.testing.assert_close(tk.mmd(x + 1000, y + 1000), tk.mmd(x, y), rtol=1e-3, atol=1e-4)


def test_half_precision_is_measured_in_float32():
    assert tk.coral(X.bfloat16(), X.bfloat16() * 2).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(tk.mmd(X, TARGET), tk.mmd(X, TARGET))
        assert tk.coral(X, TARGET).dtype == torch.float32


def test_the_proxy_distance_is_of_held_out_rows_and_does_not_change():
    noise = torch.randn(60, 40, generator=GENERATOR)  # more columns than a line needs to overfit
    x, y = noise[:30], noise[30:]
    assert tk.proxy_a_distance(x, y) < 1.0
    assert tk.proxy_a_distance(x, y, seed=3) == tk.proxy_a_distance(x, y, seed=3)
    assert tk.proxy_a_distance(X, TARGET[:15]) > 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tk.mmd(X, X[:, :2]), r"\(40, 4\) and \(40, 2\), but \(n, d\) and \(m, d\)"),
        (lambda: tk.coral(X[:1], X), "at least 2 rows"),
        (lambda: tk.mmd(X, X, ()), "give numbers above 0, or None"),
        (lambda: tk.mmd(X, X, (1.0, -1.0)), "give numbers above 0, or None"),
        (lambda: tk.mmd(X, X, estimator="linear"), "give 'unbiased' or 'biased'"),
        (lambda: tk.coral(X.long(), X.long()), r"convert them with .float\(\)"),
        (lambda: tk.wasserstein(X, X, projections=0), "at least 1, such as 128"),
        (lambda: tk.proxy_a_distance(X[:4], X), "at least 5 rows of each"),
        (lambda: tk.proxy_a_distance(X, X, regularisation=0), "a number above 0"),
    ],
)
def test_measures_name_what_is_wrong_with_their_input(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


# ---- pairs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("items", "others"), [(6, 9), (9, 4), (5, 5), (3, 40)])
def test_the_target_goes_round_and_every_item_is_seen_equally_often(items, others):
    pair = tk.pair((torch.zeros(items, 1), [0] * items), torch.arange(float(others)).view(-1, 1))
    seen = np.zeros(others, int)
    for epoch in range(7):
        for start in (0, items // 2):  # fetched in parts, as batches are
            end = items if start else items // 2
            batch = pair.fetch(range(start, end), epoch, 3)
            np.add.at(seen, batch.inputs["target"].long().flatten().numpy(), 1)
        assert seen.max() - seen.min() <= 1
    assert seen.sum() == 7 * items


def test_partners_follow_from_seed_epoch_and_index_alone_and_change():
    pair = tk.pair((X, Y), TARGET)
    whole = pair.fetch(range(40), 2, 5).inputs["target"]
    assert torch.equal(pair.fetch([7, 3], 2, 5).inputs["target"], whole[[7, 3]])
    assert not torch.equal(pair.fetch(range(40), 3, 5).inputs["target"], whole)
    assert not torch.equal(pair.fetch(range(40), 2, 6).inputs["target"], whole)


class Words:
    pad_token_id = 9

    def __call__(self, texts, truncation, max_length):
        return {"input_ids": [[int(t) for t in text.split()][:max_length] for text in texts]}


def test_pairs_of_texts_keep_both_masks_and_are_padded_together_for_the_pass():
    source = tk.data.texts(["1 2 3", "4"], [0, 1], Words(), 8)
    batch = tk.pair(source, tk.data.texts(["5 6 7 8"], None, Words(), 8)).fetch([0, 1], 0, 0)
    assert sorted(batch.inputs) == [
        "source attention_mask", "source input_ids", "target attention_mask", "target input_ids",
    ]  # fmt: skip
    both = target.stacked(target.sides(batch))
    assert both["input_ids"].shape == (4, 4)
    assert both["attention_mask"].sum(1).tolist() == [3, 1, 4, 4]


def test_an_augmentation_draws_otherwise_for_the_target():
    def noise(images, generator):
        return images + torch.randn(images.shape, generator=generator)

    pixels, norm = np.zeros((4, 6, 6), np.uint8), ([0.0], [1.0])
    images = tk.data.images(pixels, [0] * 4, 6, *norm, noise)
    batch = tk.pair(images, images).fetch([0], 1, 0)
    assert not torch.equal(batch.inputs["source"], batch.inputs["target"])


def test_a_pair_says_what_it_depends_on_but_not_on_target_labels():
    prints = {
        tk.pair((X, Y), (TARGET, Y)).fingerprint(),
        tk.pair((X, Y), (TARGET, 1 - Y)).fingerprint(),
        tk.pair((X, Y), TARGET).fingerprint(),
    }
    assert len(prints) == 1
    assert tk.pair((X, Y), TARGET + 1).fingerprint() not in prints
    assert tk.pair((X, Y), tk.data.examples([(x, 0) for x in X])).fingerprint() is None


# ---- objectives ----------------------------------------------------------------------------------


def test_adaptation_brings_the_features_of_a_shifted_target_nearer():
    found = {}
    for name, objective in (("plain", tk.align(tk.mmd, weight=0.0)), ("mmd", tk.align(tk.mmd))):
        model = make()
        plan = tk.finetune(30, lr=0.02)
        tk.fit(model, objective, tk.pair((X, Y), TARGET), plan=plan, batch_size=20)
        with torch.no_grad():
            found[name] = float(tk.mmd(model.body(X), model.body(TARGET)))
    assert found["mmd"] < 0.5 * found["plain"]


def test_a_model_with_a_discriminator_says_the_same_and_is_plain_again_without():
    plain, model = make(), make(False)
    assert torch.equal(plain(X), model(X))
    again = tk.without_discriminator(model)
    assert again.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(again(X), plain(X))


def test_a_discriminator_starts_alike_and_draws_from_no_generator_of_the_run():
    before = torch.get_rng_state()
    one, two = (tk.with_discriminator(make(), seed=4) for _ in range(2))
    torch.manual_seed(0)
    make()
    expected = torch.get_rng_state()
    tk.with_discriminator(make())
    assert torch.equal(torch.get_rng_state(), expected)
    torch.set_rng_state(before)
    for left, right in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(left, right)


def test_the_discriminator_learns_at_the_rate_of_the_head():
    model, rates = make(False), {}
    phase = tk.finetune(1, lr=0.1, layer_decay=0.5)
    names = {name for name, _ in model.named_parameters()}
    for part in tk.plan.begin(phase, model, names).param_groups:
        rates |= dict.fromkeys(part["names"], part["lr"])
    assert {n: r for n, r in rates.items() if n.startswith("head.")} == {
        n: 0.1 for n in names if n.startswith("head.")
    }
    assert rates["body.0.weight"] == 0.05


def test_a_run_with_a_discriminator_is_saved_and_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(tk.checkpoint, "LOADERS", (*tk.checkpoint.LOADERS, "test_adapt.again"))
    monkeypatch.setitem(__import__("sys").modules, "test_adapt", __import__(__name__))
    model = again()
    tk.with_discriminator(model, conditional=True, hidden=7)
    run = tk.fit(model, tk.cdan(), tk.pair((X, Y), TARGET), plan=tk.finetune(1))
    run.save(tmp_path)
    loaded = tk.load(tmp_path)
    assert torch.equal(loaded(X), model(X))
    assert loaded.labels == ["no", "yes"]
    assert torch.equal(loaded.head.discriminator[0].weight, model.head.discriminator[0].weight)
    assert tk.without_discriminator(loaded).recipe == {
        "loader": "test_adapt.again",
        "arguments": {},
    }


def again():
    model = make()
    model.recipe = {"loader": "test_adapt.again", "arguments": {}}
    return model


def test_check_finds_that_everything_is_reached_and_nothing_waits():
    report = tk.check(make(False), tk.dann(), tk.pair((X, Y), TARGET), tk.unlabelled(TARGET))
    assert (report.unreached, report.host_reads) == ({}, {})


def test_a_shipped_head_with_dropout_takes_a_discriminator():
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 2))
    model = tk.Staged([("body", nn.Linear(4, 6)), ("head", head)])
    tk.with_discriminator(model, conditional=True)
    assert model.head.discriminator[0].in_features == 12


def test_l2_sp_goes_around_an_adaptation_and_into_it():
    model = make(False)
    pair, plan = tk.pair((X, Y), TARGET), tk.finetune(1, lr=0.1)
    outside = tk.fit(copy.deepcopy(model), tk.l2_sp(tk.dann(), model), pair, plan=plan)
    inside = tk.fit(
        copy.deepcopy(model), tk.dann(tk.l2_sp(tk.classification(), model)), pair, plan=plan
    )
    assert torch.equal(outside.model(X), inside.model(X))


def test_evaluation_is_that_of_the_source_objective():
    model = make(False)
    expected = tk.evaluate(model, tk.classification(), (X, Y), tk.accuracy)
    assert tk.evaluate(model, tk.confusion(tk.dann()), (X, Y), tk.accuracy) == expected
    regression = tk.align(tk.coral, tk.regression())
    model = tk.Staged([("body", nn.Linear(4, 3)), ("head", nn.Linear(3, 1))])
    run = tk.fit(model, regression, tk.pair((X, X[:, 0]), TARGET), plan=tk.finetune(1))
    assert len(run.history) == 1


class Flat(nn.Linear):
    """A head that takes squares."""

    def forward(self, squares):
        return super().forward(squares.flatten(1))


FIT = {
    "no pair": (
        lambda: (make(False), tk.dann(), (X, Y)),
        r"wrap the training data as tk.pair\(source, target\)",
    ),
    "a pair without adaptation": (
        lambda: (make(), tk.classification(), tk.pair((X, Y), TARGET)),
        r"pairs are for adaptation: pass tk.dann\(\)",
    ),
    "no discriminator": (
        lambda: (make(), tk.dann(), tk.pair((X, Y), TARGET)),
        r"call tk.with_discriminator\(model\) before fit",
    ),
    "a discriminator of another kind": (
        lambda: (make(False), tk.cdan(), tk.pair((X, Y), TARGET)),
        "takes 6 values a row, but 12 come: .*conditional=True",
    ),
    "no such module": (
        lambda: (make(), tk.align(tk.mmd, at="tail"), tk.pair((X, Y), TARGET)),
        "at is 'tail', but the model has no such module",
    ),
    "a module of no features": (
        lambda: (
            tk.Staged([("a", nn.Linear(4, 4)), ("b", nn.Unflatten(1, (2, 2))), ("c", Flat(4, 2))]),
            tk.align(tk.mmd),
            tk.pair((X, Y), TARGET),
        ),
        r"what enters the head is \(64, 2, 2\), but features \(n, d\)",
    ),
    "a head that is not known": (
        lambda: (nn.Sequential(nn.Linear(4, 2)), tk.align(tk.mmd), tk.pair((X, Y), TARGET)),
        "whose head is not known: make it a tk.Staged",
    ),
    "one term twice": (
        lambda: (make(), tk.align(tk.mmd, tk.align(tk.mmd)), tk.pair((X, Y), TARGET)),
        "two adaptations add a term 'mmd'",
    ),
    "no logits": (
        lambda: (
            tk.Staged([("body", nn.Linear(4, 3)), ("head", nn.Linear(3, 1))]),
            tk.confusion(tk.regression()),
            tk.pair((X, X[:, 0]), TARGET),
        ),
        "this adaptation is for classification",
    ),
    "source and target of other widths": (
        lambda: (make(), tk.align(tk.mmd), tk.pair((X, Y), X[:, :3])),
        r"of the shapes \(3,\) and \(4,\), but one shape",
    ),
}


@pytest.mark.parametrize("case", FIT)
def test_fit_says_what_is_wrong_with_an_adaptation(case):
    given, message = FIT[case]
    with pytest.raises(ValueError, match=message):
        tk.fit(*given(), plan=tk.finetune(1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tk.dann(tk.mixup(tk.classification())), "is put around a Mixup"),
        (lambda: tk.dann(tk.contrastive()), "is put around a Contrastive"),
        (lambda: tk.dann(weight=-1), "weight is -1: give a number of at least 0, or tk.ramp"),
        (lambda: tk.dann(weight=lambda share: share), "give a number of at least 0, or tk.ramp"),
        (lambda: tk.align("mmd"), "give tk.mmd or tk.coral"),
        (lambda: tk.confusion(temperature=0), "temperature is 0: give a number above 0"),
        (lambda: tk.ramp(-1, 1), "start is -1: give a number of at least 0"),
        (lambda: tk.ramp(0, 1, steepness=0), "steepness is 0: give a number above 0"),
        (lambda: tk.with_discriminator(nn.Linear(4, 2)), r"wrap it as tk.Staged\("),
        (lambda: tk.with_discriminator(make(False)), "has a discriminator already"),
        (lambda: tk.with_discriminator(make(), hidden=0), "give at least 1, such as 256"),
        (
            lambda: tk.with_discriminator(tk.Staged([("a", nn.Linear(4, 2)), ("b", nn.Tanh())])),
            "pass inputs=...",
        ),
        (lambda: tk.without_discriminator(make()), "nothing to take out"),
        (lambda: tk.adabn(make(), X), "no BatchNorm layer with running statistics"),
        (lambda: tk.adabn(nn.BatchNorm1d(4), X[:1]), "give at least 2, better hundreds"),
        (lambda: tk.unlabelled(X, "loss"), "give one of im, entropy"),
        (lambda: tk.pair((X, Y), 3), "the data are a int, but .* a torch data set is expected"),
        (lambda: tk.pseudo_labels(make(), X, threshold=1.0), "give a probability in"),
        (lambda: tk.pseudo_labels(make(), X, threshold=0.9999), "lower the threshold"),
        (lambda: tk.joined((X, Y), X), "all or none"),
        (lambda: tk.joined(), "all or none"),
        (
            lambda: tk.self_training(
                make(), tk.classification(), (X, Y), X, rounds=0, plan=tk.finetune(1)
            ),
            "rounds is 0: give at least 1",
        ),
    ],
)
def test_adaptation_names_what_is_wrong_with_its_arguments(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


# ---- selection -----------------------------------------------------------------------------------


def test_the_scores_are_what_they_say():
    logits = np.log(np.array([[0.8, 0.2], [0.3, 0.7]]))
    entropy = -np.mean(
        [0.8 * np.log(0.8) + 0.2 * np.log(0.2), 0.3 * np.log(0.3) + 0.7 * np.log(0.7)]
    )
    mean = -(0.55 * np.log(0.55) + 0.45 * np.log(0.45))
    assert target.certainty(logits) == pytest.approx(-entropy)
    assert target.information(logits) == pytest.approx(mean - entropy)
    collapsed = np.array([[50.0, 0.0]] * 3)
    assert target.information(collapsed) == pytest.approx(0, abs=1e-12)
    assert target.certainty(collapsed) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("score", ["im", "entropy"])
def test_the_epoch_with_the_best_score_is_chosen(score):
    model, held_out = make(), tk.unlabelled((TARGET, Y), score)
    run = tk.fit(model, tk.classification(), (X, Y), held_out, plan=tk.finetune(6, lr=0.3))
    values = [row[score] for row in run.history]
    assert run.best[score] == max(values)
    assert run.settings.monitor == score
    found = tk.evaluate(model, tk.classification(), held_out, tk.accuracy, precision="fp32")
    assert found == pytest.approx({score: max(values)})


def test_a_metric_cannot_choose_where_there_are_no_labels():
    with pytest.raises(ValueError, match=r"monitor is 'accuracy': give one of \['im'\]"):
        tk.fit(
            make(), tk.classification(), (X, Y), tk.unlabelled(TARGET), plan=tk.finetune(1),
            metrics=tk.accuracy, monitor="accuracy",
        )  # fmt: skip


def test_a_report_needs_names():
    with pytest.raises(ValueError, match="give data by name"):
        tk.fit(make(), tk.classification(), (X, Y), plan=tk.finetune(1), report=(TARGET, Y))


def test_unlabelled_data_choose_on_cached_features_too():
    run = tk.fit(
        make(), tk.classification(), (X, Y), tk.unlabelled(TARGET), plan=tk.linear_probe(2),
        metrics=tk.accuracy, report={"target": (TARGET, Y)},
    )  # fmt: skip
    assert {"im", "target accuracy", "target loss"} <= set(run.best)


def test_the_table_shows_the_chosen_the_last_and_the_oracle_epoch(tmp_path):
    report = {"source": (X, Y), "target": (TARGET, Y)}
    run = tk.fit(
        make(), tk.classification(), (X, Y), tk.unlabelled(TARGET), report=report,
        metrics=[tk.accuracy], plan=tk.finetune(6, lr=0.3, schedule="constant"),
    )  # fmt: skip
    table = run.table()
    assert [row[""] for row in table] == ["chosen", "last", "oracle"]
    assert table[0]["epoch"] == run.best["epoch"]
    assert table[1]["epoch"] == 6
    card = (run.save(tmp_path) / "README.md").read_text("utf-8")
    assert "on the validation data, but for train_loss and for what names other data" in card
    assert table[2]["target accuracy"] == max(row["target accuracy"] for row in run.history)
    assert "oracle" in repr(run)
    assert "im" in [text.get_text().strip() for axis in run.plot().axes for text in axis.texts]


def test_without_a_report_the_table_is_the_history():
    run = tk.fit(make(), tk.classification(), (X, Y), (X, Y), plan=tk.finetune(2))
    assert run.table() == run.history


# ---- statistics and pseudo-labels ----------------------------------------------------------------


def test_adabn_has_mean_and_variance_of_all_items_whatever_the_last_batch():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    before = copy.deepcopy(model.state_dict())
    adapted = tk.adabn(model, TARGET * 3 + 100, batch_size=13)  # 13, 13 and 14 of 40
    rows = (TARGET * 3 + 100).double()
    torch.testing.assert_close(adapted[0].running_mean.double(), rows.mean(0))
    torch.testing.assert_close(adapted[0].running_var.double(), rows.var(0), rtol=1e-5, atol=0)
    assert not adapted.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert torch.equal(adapted[1].weight, model[1].weight)


def test_adabn_of_images_is_over_items_and_places():
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.Flatten(), nn.Dropout(0.9))
    images = torch.randn(10, 3, 4, 4, generator=GENERATOR)
    adapted = tk.adabn(model, images, batch_size=3)
    values = model[0](images).detach().transpose(0, 1).flatten(1)
    torch.testing.assert_close(adapted[1].running_mean, values.mean(1))
    torch.testing.assert_close(adapted[1].running_var, values.var(1))


def test_pseudo_labels_are_the_answers_of_which_the_model_is_sure():
    logits = torch.tensor([[4.0, 0.0], [0.1, 0.0], [0.0, 5.0], [0.0, 0.2]])
    found = tk.pseudo_labels(nn.Identity(), (logits, [7, 7, 7, 7]), threshold=0.9)
    batch = found.fetch([1, 0], None, 0)
    assert torch.equal(batch.inputs, logits[[2, 0]])
    assert batch.labels.tolist() == [1, 0]
    assert found.fingerprint() is not None


def test_joined_sources_are_fetched_in_any_order():
    texts = [tk.data.texts(rows, [at] * 2, Words(), 8) for at, rows in enumerate(
        [["1 2 3", "4"], ["5", "6 7 8 8"]])]  # fmt: skip
    joined = tk.joined(*texts)
    batch = joined.fetch([3, 0, 2], 0, 0)
    assert batch.labels.tolist() == [1, 0, 1]
    assert batch.inputs["input_ids"].tolist() == [[6, 7, 8, 8], [1, 2, 3, 9], [5, 9, 9, 9]]
    assert joined.lengths.tolist() == [3, 1, 1, 4]
    assert len(joined) == len(joined.labels) == 4


def test_self_training_learns_what_the_model_is_sure_of(tmp_path):
    model, objective = make(), tk.classification()
    how = {"plan": tk.finetune(20, lr=0.05), "rounds": 2, "threshold": 0.6, "directory": tmp_path}
    runs = tk.self_training(model, objective, (X, Y), (X + 0.3, 1 - Y), **how)
    assert [len(run.history) for run in runs] == [20] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round 0", "round 1", "round 2"]
    assert tk.evaluate(model, objective, (X + 0.3, Y), tk.accuracy)["accuracy"] > 0.7
