"""Scores of features against closed forms, counting and scikit-learn; what they do not care for."""

from __future__ import annotations

import functools
import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import multivariate_normal, ortho_group
from sklearn.covariance import ledoit_wolf
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics import mutual_info_score
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from torch import nn

import transferkit as tk
from transferkit import transferability

pytestmark = pytest.mark.usefixtures("one_thread")

OF_FEATURES = {
    "logme": tk.logme,
    "h_score": tk.h_score,
    "h_score, shrinkage": lambda x, y: tk.h_score(x, y, shrinkage=True),
    "knn": lambda x, y: tk.knn_accuracy(x, y, k=1),  # of several, ties go by the class number
    "centroid": tk.centroid_accuracy,
    "probe": tk.probe_accuracy,
}


def case(seed=0, n=60, width=7, classes=3, pull=1.0):
    """Features whose means differ between the classes, and the labels."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    means = pull * random.normal(size=(classes, width))
    mixed = random.normal(size=(width, width))
    return (means[labels] + random.normal(size=(n, width))) @ mixed + 0.5, labels


def said(seed=0, n=40, classes=5):
    return np.random.default_rng(seed).dirichlet(np.full(classes, 0.5), n)


def entropy(labels):
    shares = np.bincount(labels) / len(labels)
    return -(shares * np.log(shares)).sum()


# -- LEEP and NCE ---------------------------------------------------------------------------------


def test_leep_of_a_table_made_by_hand():
    # P(y, z): y=0: (0.9+0.6)/3, (0.1+0.4)/3; y=1: 0.2/3, 0.8/3
    shares, labels = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]), [0, 0, 1]
    zero = np.array([1.5 / 1.7, 0.5 / 1.3])  # P(0 | z)
    expected = np.log([zero @ [0.9, 0.1], zero @ [0.6, 0.4], (1 - zero) @ [0.2, 0.8]]).mean()
    assert tk.leep(shares, labels) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_nce_is_minus_the_entropy_of_the_labels_that_the_source_classes_leave(seed):
    random = np.random.default_rng(seed)
    source, labels = random.integers(0, 6, 80), random.integers(0, 3, 80)
    expected = mutual_info_score(source, labels) - entropy(labels)
    assert tk.nce(source, labels) == pytest.approx(expected, abs=1e-12)
    counted = 0.0
    for z, y in zip(source, labels, strict=True):
        counted += np.log(np.sum((source == z) & (labels == y)) / np.sum(source == z)) / 80
    assert tk.nce(source, labels) == pytest.approx(counted, abs=1e-12)


def test_leep_of_a_source_that_is_sure_is_nce_and_of_one_that_says_nothing_minus_the_entropy():
    source, labels = np.arange(40) % 5, np.arange(40) % 3
    assert tk.leep(np.eye(5)[source], labels) == pytest.approx(tk.nce(source, labels), abs=1e-12)
    same = np.tile([0.2, 0.3, 0.5], (40, 1))
    assert tk.leep(same, labels) == pytest.approx(-entropy(labels), abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_leep_lies_between_minus_the_entropy_and_zero_and_above_the_soft_nce(seed):
    shares, labels = said(seed), np.arange(40) % 3
    joint = np.eye(3)[labels].T @ shares / 40
    soft = (joint * np.log(joint / joint.sum(0))).sum()
    assert -entropy(labels) - 1e-12 <= soft <= tk.leep(shares, labels) + 1e-12
    assert tk.leep(shares, labels) <= 0


def test_leep_and_nce_do_not_care_what_source_classes_and_labels_are_called():
    shares, labels = said(), np.arange(40) % 3
    source, renamed = shares.argmax(1), np.array([7, -2, 4])[labels]
    assert tk.leep(shares[:, ::-1], renamed) == pytest.approx(tk.leep(shares, labels), abs=1e-12)
    assert tk.nce(9 - source, renamed) == pytest.approx(tk.nce(source, labels), abs=1e-12)


# -- LogME ----------------------------------------------------------------------------------------


def density(x, y, alpha, beta):
    """log N(y; 0, I / beta + x x' / alpha), without weights, posterior or determinant lemma."""
    covariance = np.eye(len(y)) / beta + x @ x.T / alpha
    return multivariate_normal(np.zeros(len(y)), covariance).logpdf(y)


@pytest.mark.parametrize(("n", "width"), [(30, 4), (20, 20), (15, 40)])
def test_the_evidence_is_the_density_of_the_targets_at_the_precisions_found(n, width):
    x, _ = case(1, n, width)
    y = x[:, 0] - x[:, 1] + np.random.default_rng(2).normal(size=n)
    found = transferability.evidence(x, y)[0]
    assert found.log_evidence == pytest.approx(density(x, y, found.alpha, found.beta), rel=1e-8)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("n", "width"), [(40, 3), (25, 25), (20, 60)])
def test_no_pair_of_precisions_has_more_evidence(n, width, seed):
    x, labels = case(seed, n, width, classes=2)
    y = (labels == 0).astype(float)
    found = transferability.evidence(x, y)[0]
    for alpha in found.alpha * np.logspace(-2, 2, 9):
        for beta in found.beta * np.logspace(-2, 2, 9):
            if beta / alpha < 1e10:  # beyond, the covariance is not one for the computer
                assert density(x, y, alpha, beta) <= found.log_evidence + 1e-6 * n


def test_the_fixed_point_is_where_a_search_along_the_ratio_ends():
    x, labels = case(3, 80, 6, classes=2)
    y = labels.astype(float)
    found = transferability.evidence(x, y)[0]

    def worse(log_ratio):
        kernel = np.eye(80) + x @ x.T * np.exp(-log_ratio)
        beta = 80 / (y @ np.linalg.solve(kernel, y))
        return -density(x, y, np.exp(log_ratio) * beta, beta)

    best = minimize_scalar(worse, bounds=(-10, 10), method="bounded", options={"xatol": 1e-10})
    assert found.log_evidence == pytest.approx(-best.fun, rel=1e-9)
    assert np.log(found.alpha / found.beta) == pytest.approx(best.x, abs=1e-4)


def test_the_two_precisions_meet_their_own_equations():
    x, labels = case(4, 60, 5, classes=2)
    y = labels.astype(float)
    found = transferability.evidence(x, y)[0]
    mean = np.linalg.solve(found.alpha / found.beta * np.eye(5) + x.T @ x, x.T @ y)
    assert found.alpha == pytest.approx(found.gamma / (mean @ mean), rel=1e-6)
    assert found.beta == pytest.approx((60 - found.gamma) / ((x @ mean - y) ** 2).sum(), rel=1e-6)


def test_logme_is_the_mean_over_the_classes_and_a_regression_is_one_column():
    x, labels = case(5)
    each = [transferability.evidence(x, labels == c)[0].log_evidence for c in range(3)]
    assert tk.logme(x, labels) == pytest.approx(np.mean(each) / 60, rel=1e-12)
    y = x @ np.arange(7.0)
    assert tk.logme(x, y) == transferability.evidence(x, y)[0].log_evidence / 60


@pytest.mark.parametrize(
    "x",
    [np.zeros((20, 3)), np.ones((20, 3)), np.full((20, 3), 1e-200), np.full((20, 3), 1e100),
     np.eye(2)[np.arange(20) % 2], np.eye(20)],
    ids=["zeros", "ones", "tiny", "huge", "labels themselves", "one column an item"],
)  # fmt: skip
def test_scores_stay_finite_and_silent_where_features_are_degenerate(x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for score in OF_FEATURES.values():
            assert np.isfinite(score(x, np.arange(20) % 2))


# -- H-score --------------------------------------------------------------------------------------


def between(x, labels):
    means = np.stack([x[labels == c].mean(0) for c in labels])
    return np.cov(means, rowvar=False, bias=True)


@pytest.mark.parametrize("seed", range(3))
def test_the_h_score_is_its_trace_of_explicit_covariances(seed):
    x, labels = case(seed)
    expected = np.trace(np.linalg.inv(np.cov(x, rowvar=False, bias=True)) @ between(x, labels))
    assert tk.h_score(x, labels) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "width"), [(60, 7), (20, 50)])
def test_the_shrunk_h_score_is_its_trace_with_scikit_learns_covariance(n, width):
    x, labels = case(1, n, width)
    covariance, share = ledoit_wolf(x)
    expected = np.trace(np.linalg.inv(covariance) @ ((1 - share) * between(x, labels)))
    assert tk.h_score(x, labels, shrinkage=True) == pytest.approx(expected, rel=1e-9)


def test_with_as_many_directions_as_items_the_h_score_says_nothing():
    x, labels = case(2, 20, 30)
    shuffled = np.random.default_rng(0).permutation(labels)
    assert tk.h_score(x, labels) == pytest.approx(2, abs=1e-9)
    assert tk.h_score(x, shuffled) == pytest.approx(2, abs=1e-9)
    assert tk.h_score(x, labels, shrinkage=True) > tk.h_score(x, shuffled, shrinkage=True)


# -- learners -------------------------------------------------------------------------------------


def left_out(model, x, labels):
    return cross_val_score(model, x, labels, cv=LeaveOneOut()).mean()


@pytest.mark.parametrize("k", [1, 4, 5])
def test_neighbours_are_those_of_scikit_learn(k):
    x, labels = case(6, pull=0.5)
    expected = left_out(KNeighborsClassifier(k), x, labels)
    assert 0.3 < expected < 1 and tk.knn_accuracy(x, labels, k) == expected


def test_neighbours_are_found_far_from_the_origin():
    x, labels = case(6, pull=0.5)
    assert tk.knn_accuracy(x + 1e8, labels) == tk.knn_accuracy(x, labels)


def test_centroids_are_those_of_scikit_learn():
    x, labels = case(7, pull=0.5)
    labels[:5] = 0  # classes of unequal sizes
    expected = left_out(NearestCentroid(), x, labels)
    assert 0.3 < expected < 1 and tk.centroid_accuracy(x, labels) == pytest.approx(expected)


@pytest.mark.parametrize(("n", "width", "classes"), [(30, 7, 3), (20, 5, 2), (15, 20, 3)])
def test_the_probe_is_the_best_ridge_classifier_that_was_trained_anew_without_each_item(
    n, width, classes
):
    x, labels = case(8, n, width, classes, pull=0.5)
    x = (x - x.mean(0)) / x.std(0)
    penalties = transferability._PENALTIES * (x**2).sum()
    expected = [left_out(RidgeClassifier(penalty), x, labels) for penalty in penalties]
    assert len(set(expected)) > 2
    assert tk.probe_accuracy(x, labels) == pytest.approx(max(expected))


@pytest.mark.parametrize("name", ["h_score", "knn", "centroid", "probe"])
def test_a_column_that_is_the_same_for_all_items_changes_nothing(name):
    score, (x, labels) = OF_FEATURES[name], case(8, pull=0.5)
    wider = np.column_stack([x, np.full(60, 3.0)])
    assert score(wider, labels) == pytest.approx(score(x, labels), rel=1e-9)


# -- what leaves scores alone ---------------------------------------------------------------------


@pytest.mark.parametrize("name", OF_FEATURES)
def test_scores_do_not_care_what_the_labels_are_called_nor_in_which_order_items_stand(name):
    score, (x, labels) = OF_FEATURES[name], case(9, pull=0.6)
    order = np.random.default_rng(0).permutation(60)
    expected = score(x, labels)
    assert score(x, np.array([5, 9, 6])[labels]) == pytest.approx(expected, rel=1e-9)
    assert score(x[order], labels[order]) == pytest.approx(expected, rel=1e-9)
    assert score(torch.tensor(x), torch.tensor(labels)) == pytest.approx(expected, rel=1e-9)


TURN = ortho_group.rvs(7, random_state=0)
STRETCH = np.diag([40.0, 1, 1, 1, 1, 1, 0.02])
MAPS = {
    "turned": lambda x: x @ TURN,
    "doubled": lambda x: 2 * x,
    "shifted": lambda x: x + 3.0,
    "stretched": lambda x: x @ STRETCH,
}
KEPT = {
    "logme": {"turned", "doubled"},
    "h_score": {"turned", "doubled", "shifted", "stretched"},
    "h_score, shrinkage": {"turned", "doubled", "shifted"},
    "knn": {"turned", "doubled", "shifted"},
    "centroid": {"turned", "doubled", "shifted"},
    "probe": {"doubled", "shifted", "stretched"},
}


@pytest.mark.parametrize("change", MAPS)
@pytest.mark.parametrize("name", OF_FEATURES)
def test_what_a_change_of_the_features_does_to_a_score(name, change):
    score, (x, labels) = OF_FEATURES[name], case(10, pull=0.6)
    same = score(MAPS[change](x), labels) == pytest.approx(score(x, labels), rel=1e-7)
    # Turning changes which columns the probe scales, but an accuracy may come out the same.
    assert same == (change in KEPT[name]) or (name, change) == ("probe", "turned")


@pytest.mark.parametrize("name", OF_FEATURES)
def test_better_separated_classes_score_higher(name):
    labels = np.arange(200) % 2
    noise = np.random.default_rng(1).normal(size=(200, 5))
    means = np.eye(5)[labels]
    scores = [OF_FEATURES[name](pull * means + noise, labels) for pull in (0, 1, 3)]
    assert scores == sorted(scores) and scores[0] < scores[2]


# -- layers, costs and tables ---------------------------------------------------------------------


def network(hidden=8, classes=3):
    torch.manual_seed(0)
    stages = [nn.Linear(7, hidden), nn.ReLU(), nn.Linear(hidden, 4), nn.Linear(4, classes)]
    return nn.Sequential(*stages)


def tensors(seed=11, n=60):
    x, labels = case(seed, n)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(labels)


def test_the_features_of_a_layer_are_those_of_the_cut_model():
    model, (x, labels) = network(), tensors()
    model.train()
    found = transferability.layer_features(model, (x, labels), batch_size=7)
    assert list(found) == ["0", "2"] and model.training
    for name, stop in (("0", 2), ("2", 3)):
        expected = model[:stop](x).detach().numpy()
        assert np.allclose(found[name].features, expected, atol=1e-6)
    assert found["0"].seconds <= found["2"].seconds and found["0"].mib < found["2"].mib


def test_features_stand_in_the_order_of_the_items_where_batches_are_sorted_by_length():
    model, (x, labels) = network(), tensors()
    source = tk.data.tensors(x, labels)
    source.lengths = np.random.default_rng(0).permutation(60) + 1
    found = transferability.layer_features(model, source, batch_size=7)["2"].features
    assert np.allclose(found, model[:3](x).detach().numpy(), atol=1e-6)


def test_states_with_more_axes_are_averaged_and_padding_is_not_counted():
    class Embed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 3)

        def forward(self, state):
            return {"hidden": self.table(state["ids"]), "mask": state["ids"] > 0}

    ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    model = tk.Staged([("embed", Embed()), ("head", nn.Identity())])
    items = [{"ids": row, "labels": 0} for row in ids]
    found = transferability.layer_features(model, items)["embed"].features
    table = model.embed.table.weight.detach()
    assert np.allclose(found, torch.stack([table[ids[0]].mean(0), table[ids[1, :2]].mean(0)]))
    images = tk.Staged([("conv", nn.Conv2d(1, 2, 3)), ("head", nn.Identity())])
    x = torch.randn(4, 1, 5, 5)
    found = transferability.layer_features(images, x)["conv"].features
    assert np.allclose(found, images.conv(x).mean((2, 3)).detach(), atol=1e-6)


def test_layers_and_models_are_ranked_by_the_score_asked_for_and_nothing_is_changed():
    model, pair = network(), tensors()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    table = tk.rank_layers(model, pair, by="centroid")
    assert [row["centroid"] for row in table] == sorted(r["centroid"] for r in table)[::-1]
    assert list(table[0])[:3] == ["layer", "width", "logme"]
    ranked = tk.rank_models(
        {"small": network(1), "large": model}, pair, tk.finetune(2), by="knn", sample=20
    )
    assert {row["model"] for row in ranked} == {"small", "large"}
    expected = tk.knn_accuracy(model[:3](pair[0]).detach().numpy(), pair[1])
    assert next(row for row in ranked if row["model"] == "large")["knn"] == expected
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_score_that_is_not_a_number_comes_last():
    scores = {"odd": lambda x, y: float("nan") if x.shape[1] == 8 else 1.0}
    assert [r["layer"] for r in tk.rank_layers(network(), tensors(), scores=scores, by="odd")] == [
        "2", "0",
    ]  # fmt: skip


class Clock:
    """A clock that only an epoch of training moves."""

    def __init__(self, monkeypatch, once, epoch):
        self.now = 0.0
        fit = tk.engine.fit

        @functools.wraps(fit)
        def timed(model, objective, train, *, plan, **settings):
            self.now += once * len(train) + epoch * len(train) * plan.epochs
            return fit(model, objective, train, plan=plan, **settings)

        monkeypatch.setattr(tk.engine, "fit", timed)

    def __call__(self):
        return self.now


def test_the_predicted_minutes_are_exact_where_each_item_takes_as_long(monkeypatch):
    clock = Clock(monkeypatch, once=0.5, epoch=2.0)
    plan = [tk.linear_probe(10, cache=False), tk.finetune(4)]
    cost = transferability.predict_cost(network(), tensors(), plan, sample=20, clock=clock)
    assert cost.minutes * 60 == pytest.approx(60 * (0.5 + 10 * 2.0) + 60 * (0.5 + 4 * 2.0))
    expected = tk.check(network(), tk.classification(), tensors(), plan=plan)
    assert cost.mib == max(row["total"] for row in expected.phases)


# -- bad input ------------------------------------------------------------------------------------

X, Y = case()
BAD = {
    "one class": (lambda: tk.logme(X, np.zeros(60, int)), "hold 1 class.*draw items of each"),
    "labels of two axes": (lambda: tk.h_score(X, np.eye(60, dtype=int)), r"\(60, 60\).*class num"),
    "measured labels": (lambda: tk.h_score(X, Y + 0.5), r"float64.*convert with \.astype\(int\)"),
    "unequal lengths": (lambda: tk.logme(X[:-1], Y), r"\(59, 7\) and there are 60 labels"),
    "tokens": (lambda: tk.knn_accuracy(X[:, None], Y), "pool what has more axes"),
    "NaN": (lambda: tk.logme(np.where(X > 1, np.nan, X), Y), "NaN or infinite: compute them in"),
    "too many neighbours": (lambda: tk.knn_accuracy(X, Y, 60), "k is 60: give 1 to 59"),
    "a class with one item": (lambda: tk.centroid_accuracy(X[:4], [0, 0, 0, 8]),
                              "class 8 has 1 item, but at least 2"),
    "logits": (lambda: tk.leep(X, Y), r"tk\.predict\(model, data\)\.probabilities, not logits"),
    "probabilities for classes": (lambda: tk.nce(said(), Y), r"data\)\.classes"),
    "a column of zeros": (lambda: transferability.evidence(X, np.zeros(60)), "one-hot rows"),
    "unknown score": (lambda: tk.rank_layers(network(), tensors(), by="auc"),
                      "by is 'auc': give the name of a score, one of logme, h_score, knn"),
    "no candidates": (lambda: tk.rank_models({}, tensors()), "give models by name"),
    "no labels": (lambda: tk.rank_layers(network(), tensors()[0]), "label some items"),
    "a head alone": (lambda: tk.rank_layers(nn.Sequential(nn.Linear(7, 3)), tensors()),
                     "head alone.*score its inputs"),
    "an empty sample": (lambda: transferability.predict_cost(network(), tensors(), sample=0),
                        "sample is 0: give a number of items"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_answered_with_a_remedy(name):
    call, expected = BAD[name]
    with pytest.raises(ValueError, match=expected):
        call()


def test_a_state_that_cannot_be_scored_is_refused():
    class Pair(nn.Module):
        def forward(self, x):
            return {"left": x, "right": x}

    model = tk.Staged([("pair", Pair()), ("head", nn.Identity())])
    with pytest.raises(TypeError, match="after 'pair' the state is a dict"):
        tk.rank_layers(model, tensors())
