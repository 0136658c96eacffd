"""What `fit`, `evaluate` and `predict` say about bad arguments, and what a run shows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import transferkit as tk
from transferkit import devices

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _an_own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRANSFERKIT_CACHE", str(tmp_path / "cache"))


def _data(count: int = 40, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 4, generator=generator)
    return inputs, (inputs[:, 0] > 0).long()


def _model(outputs: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, outputs))


def _fit(model=None, data=None, objective=None, plan=None, **settings):
    return tk.fit(
        model or _model(),
        objective or tk.classification(),
        data or _data(),
        plan=plan or [tk.finetune(2, lr=0.05)],
        **settings,
    )


def test_training_learns():
    run = _fit(
        data=_data(400),
        validation=_data(200, seed=1),
        plan=[tk.linear_probe(2), tk.finetune(10, lr=0.02)],
        metrics=[tk.accuracy],
    )
    assert run.best["accuracy"] > 0.95
    assert run.evaluate(_data(200, seed=2))["accuracy"] > 0.93


BAD = [
    ({"batch_size": 0}, "batch_size is 0: give at least 1"),
    ({"accumulate": 0}, "accumulate is 0: give at least 1"),
    ({"clip": 0.0}, r"clip is 0\.0: give a norm above 0, or None"),
    ({"ema": 1.0}, r"ema is 1\.0: give a number in \(0, 1\) such as 0\.999, or None"),
    ({"precision": "fp8"}, "precision is 'fp8': give 'auto', 'fp32', 'bf16' or 'fp16'"),
    ({"device": "abacus"}, "device is 'abacus': give 'auto', 'cpu' or 'cuda'"),
    ({"restore": "first"}, "restore is 'first': give 'best' or 'last'"),
    ({"patience": 0, "validation": _data()}, "patience is 0: give at least 1, or None"),
    ({"patience": 1}, "patience needs validation data"),
    ({"metrics": [tk.accuracy], "monitor": "recall"}, r"'recall': give one of .'accuracy', 'l"),
    ({"monitor": "accuracy"}, r"monitor is 'accuracy': give one of \['loss'\], or add the metric"),
    ({"plan": ["finetune"]}, r"the plan is \['finetune'\]: give phases"),
    ({"plan": [tk.finetune(1, last=3)]}, "the last 3 layer groups, but the model has 2"),
    ({"data": (torch.zeros(0, 4), torch.zeros(0).long())}, "the data are empty"),
    ({"data": (torch.zeros(2, 4), torch.tensor([0, 2]))}, "labels hold 2 but the head has 2"),
    ({"data": (torch.zeros(2, 4), torch.tensor([0, -1]))}, "labels hold -1"),
    ({"validation": (torch.zeros(2, 4), torch.tensor([0, 5]))}, "labels hold 5"),
    ({"validation": torch.zeros(2, 4)}, "no labels to score"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_argument_is_named_with_the_remedy_before_anything_is_trained(settings, message):
    model = _model()
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=message):
        _fit(model, **settings)
    if "no labels" not in message:
        assert torch.equal(before, model[0].weight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs is 0: give a whole number of at least 1"),
        ({"epochs": 1.5}, r"epochs is 1\.5"),
        ({"epochs": 1, "lr": 0.0}, r"lr is 0\.0: give a number above 0"),
        ({"epochs": 1, "lr": math.nan}, "lr is nan"),
        ({"epochs": 1, "last": 0}, "last is 0"),
        ({"epochs": 1, "layer_decay": 1.5}, r"layer_decay is 1\.5: give a number in \(0, 1\]"),
        ({"epochs": 1, "warmup": 1.0}, r"warmup is 1\.0: give a share in \[0, 1\)"),
        ({"epochs": 1, "schedule": "sine"}, "schedule is 'sine': give one of cosine, linear"),
        ({"epochs": 1, "optimizer": "adam"}, "optimizer is 'adam': give one of adamw, sgd"),
        ({"epochs": 1, "weight_decay": -1.0}, r"weight_decay is -1\.0"),
    ],
)
def test_a_phase_checks_its_values(settings, message):
    with pytest.raises(ValueError, match=message):
        tk.finetune(**settings)


def test_an_empty_plan_is_refused():
    with pytest.raises(ValueError, match=r"the plan is \[\]: give phases, such as"):
        tk.fit(_model(), tk.classification(), _data(), plan=[])


def test_a_plan_that_trains_nothing_is_refused():
    model = _model()
    tk.freeze(model)
    with pytest.raises(ValueError, match=r"phase 'finetune' trains no parameter.*tk\.unfreeze"):
        _fit(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_head_that_does_not_fit_the_label_names_is_refused():
    model = tk.Staged([("head", nn.Linear(4, 2))], labels=["a", "b", "c"])
    with pytest.raises(ValueError, match="the model has 3 labels but 2 outputs"):
        _fit(model)


def test_nan_in_the_inputs_is_traced_to_the_item():
    inputs, labels = _data()
    inputs[17, 2] = math.nan
    with pytest.raises(FloatingPointError, match=r"update \d+ .*inputs of items \[17\] are not f"):
        _fit(data=(inputs, labels), batch_size=4, accumulate=2)


def test_nan_names_the_update_even_where_the_inputs_are_fine():
    class Breaks(nn.Linear):
        calls = 0

        def forward(self, inputs):
            self.calls += self.training
            return super().forward(inputs) * (math.nan if self.calls == 7 else 1.0)

    with pytest.raises(FloatingPointError, match=r"at update 7 \(phase 'finetune', epoch 2\): the"):
        _fit(Breaks(4, 2), batch_size=8)


def test_weights_that_an_infinite_gradient_spoils_are_found():
    class Steep(tk.classification):
        def loss(self, outputs, batch):
            loss = super().loss(outputs, batch)
            return tk.Loss(loss.totals[0] + (outputs.sum() * 0.0 + 1e-45).sqrt() * 1e38, 1)

    with pytest.raises(FloatingPointError, match="the weights became NaN or infinite at update 1 "):
        _fit(objective=Steep(), plan=[tk.finetune(1)], batch_size=40)


def test_a_failed_run_gives_back_flags_and_modes():
    model = _model()
    tk.freeze(model, "0.bias")
    inputs, labels = _data()
    inputs[:] = math.nan
    with pytest.raises(FloatingPointError):
        _fit(model, data=(inputs, labels), plan=[tk.linear_probe(1, cache=False)])
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert not model.training


def test_prediction_and_evaluation_check_their_data():
    with pytest.raises(ValueError, match="the data are empty"):
        tk.predict(_model(), torch.zeros(0, 4))
    with pytest.raises(TypeError, match="the data are a int"):
        tk.evaluate(_model(), tk.classification(), 5)
    with pytest.raises(ValueError, match="batch_size is 0"):
        tk.predict(_model(), torch.zeros(3, 4), 0)


def test_the_training_loss_is_the_mean_of_the_epoch_even_where_items_weigh_differently():
    data, objective = _data(64), tk.classification(class_weights=(0.01, 10.0))
    model = _model()
    expected = tk.evaluate(model, objective, data, precision="fp32")["loss"]
    run = _fit(model, data, objective, [tk.finetune(1, lr=1e-12)], batch_size=6, accumulate=3)
    assert run.history[0]["train_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_history_prints_as_a_table_and_plots():
    pytest.importorskip("matplotlib")
    plan = [tk.linear_probe(1), tk.finetune(2, lr=0.05)]
    run = _fit(validation=_data(20, 1), plan=plan, metrics=[tk.accuracy, tk.macro_f1])
    lines = str(run.table()).splitlines()
    assert lines[0].split() == ["epoch", "phase", "train_loss", "loss", "accuracy", "macro_f1",
                                "seconds"]  # fmt: skip
    assert len(lines) == 4 and "linear_probe" in lines[1]
    axes = run.plot().axes
    assert [axis.get_ylabel() for axis in axes] == ["loss", "on validation data"]
    assert [len(axis.lines) for axis in axes] == [3, 3]  # two curves and a line between phases


def _curves(run, panel):
    lines = run.plot().axes[panel].lines
    return [line.get_ydata() for line in lines], [line.get_xdata() for line in lines]


def test_curves_of_two_phases_of_one_name_are_divided_where_the_second_began():
    pytest.importorskip("matplotlib")
    plan = [tk.finetune(2, lr=0.05), tk.finetune(1, lr=0.01)]
    run = _fit(validation=_data(20, 1), plan=plan, metrics=[tk.accuracy])
    values, places = _curves(run, 0)
    assert list(values[0]) == [row["train_loss"] for row in run.history]
    assert list(values[1]) == [row["loss"] for row in run.history]
    assert list(places[0]) == [1, 2, 3] and list(places[2]) == [2.5, 2.5]
    assert list(_curves(run, 1)[0][0]) == [row["accuracy"] for row in run.history]


def test_nan_is_a_gap_in_a_curve_and_its_name_stands_at_the_last_value():
    pytest.importorskip("matplotlib")
    told = iter([0.5, math.nan, 0.7, math.nan])

    def score(logits, labels):
        return next(told)

    plan = [tk.finetune(4, lr=0.01)]
    run = _fit(validation=_data(20, 1), plan=plan, metrics=[score], monitor="loss")
    assert np.array_equal(_curves(run, 1)[0][0], [0.5, math.nan, 0.7, math.nan], equal_nan=True)
    (name,) = run.plot().axes[1].texts
    assert name.get_text().strip() == "score" and name.xy == (3, 0.7)


def test_without_validation_data_only_the_training_loss_is_drawn():
    pytest.importorskip("matplotlib")
    run = _fit(metrics=[tk.accuracy])
    (axis,) = run.plot().axes
    assert len(axis.lines) == 1 and [text.get_text() for text in axis.texts] == ["  train_loss"]


def test_names_of_curves_that_meet_stand_apart():
    pytest.importorskip("matplotlib")
    history = [{"epoch": 1, "train_loss": 1.0}, {"epoch": 2, "train_loss": 0.5}]
    history = [row | {"loss": row["train_loss"] + 0.001} for row in history]
    (axis,) = tk.show.curves(history, []).axes
    low, high = axis.get_ylim()
    first, second = (text.xyann[1] for text in axis.texts)
    assert second - first > 0.08 * (high - low)


def test_fit_is_silent_where_nobody_looks(capfd):
    _fit(validation=_data(20, 1))
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_probabilities_sum_to_one_and_classes_are_their_largest():
    found = tk.predict(_model(3), _data(9)[0])
    assert found.labels is None and found.probabilities.shape == (9, 3)
    assert np.allclose(found.probabilities.sum(1), 1.0, atol=1e-6)
    assert np.array_equal(found.classes, found.probabilities.argmax(1))


def test_bf16_is_chosen_only_where_the_processor_has_tiles(monkeypatch):
    cpu = torch.device("cpu")
    for tiles, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda tiles=tiles: tiles)
        assert devices.resolve_precision("auto", cpu) == expected
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert devices.resolve_precision("auto", cpu) == "fp32"
    assert devices.resolve_precision("bf16", cpu) == "bf16"


@pytest.mark.parametrize(
    ("capability", "expected"), [((6, 1), "fp32"), ((7, 5), "fp16"), ((8, 0), "bf16")]
)
def test_the_half_precision_is_chosen_that_a_gpu_has(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert devices.resolve_precision("auto", torch.device("cuda")) == expected


def test_training_in_bf16_keeps_the_weights_in_float32():
    model = _model()
    run = _fit(model, precision="bf16")
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert run.predict(_data()).logits.dtype == np.float32
