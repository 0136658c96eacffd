"""Adapters keep the laws: the backbone stays, runs resume, files are whole, nothing waits."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from small_models import same, some_images, some_texts, state_of, tiny_bert, tiny_convnet
from test_counters import NONE, _counted_steps, _host_reads
from test_resume import PowerCut, _rows, _stopped_after
from test_save import FRESH

import transferkit as tk
from transferkit import cache, checkpoint
from transferkit.engine import Training

ON_TEXT = [
    (tk.lora, {"r": 4, "dropout": 0.1}),
    (tk.adalora, {"r": 2, "start": 4}),
    (tk.ia3, {}),
    (tk.adapters, {"bottleneck": 4}),
    (tk.prefix, {"length": 3}),
]
ON_IMAGES = [
    (tk.lora, {"r": 4, "targets": "all"}),
    (tk.ia3, {"targets": "all"}),
    (tk.adapters, {"bottleneck": 4, "targets": "all"}),
]
CASES = [(tiny_bert, *case) for case in ON_TEXT] + [(tiny_convnet, *case) for case in ON_IMAGES]
TUNE = tk.finetune(3, lr=0.03, weight_decay=0.1)


def _data(make, count, seed=0):
    return some_texts(count, seed) if make is tiny_bert else some_images(count, seed=seed)


def _fit(make, method, how, plan=TUNE, model=None, **settings):
    model = method(make(), **how) if model is None else model
    given = {"batch_size": 4, "precision": "fp32"} | settings
    run = tk.fit(model, tk.classification(), _data(make, 22), plan=plan, **given)
    return model, run


@pytest.mark.parametrize(("make", "method", "how"), CASES)
def test_training_lowers_the_loss_and_leaves_the_backbone_bit_for_bit(make, method, how):
    plain = make()
    model, run = _fit(make, method, how)
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"]
    before = state_of(plain)
    after = {n.replace(".base_layer.", "."): tensor for n, tensor in state_of(model).items()}
    backbone = [name for name in before if not name.startswith("head")]
    assert all(torch.equal(before[name], after[name]) for name in backbone)  # statistics, too
    start = state_of(method(make(), **how))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    moved = state_of(model)
    still = [n for n in trained if torch.equal(start[n], moved[n]) and ".lora_E" not in n]
    assert len(trained) > 2 and not still  # AdaLoRA may take all rank away from a matrix


@pytest.mark.parametrize(("make", "method", "how"), CASES)
def test_a_group_with_adapters_trains_while_its_frozen_batchnorm_does_not(make, method, how):
    model = method(make(), **how)
    tk.layers.apply_modes(model)
    rows = {row["group"]: row for row in tk.summary(model)}
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert rows["total"]["trainable"] == sum(trained.values())
    for name in model.stage_names:
        inside = sum(size for own, size in trained.items() if own.startswith(f"{name}."))
        assert rows[name]["trainable"] == inside
        if make is tiny_bert:
            assert rows[name]["mode"] == ("train" if inside else "eval")
    batchnorms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert not any(module.training for module in batchnorms)
    if make is tiny_bert:
        assert model.get_submodule("layer.1.block.output.dropout").training


def test_adapters_take_the_rate_of_their_layer_group():
    model = tk.lora(tiny_bert(), r=2)
    parts = tk.optim.parameter_groups(tk.layers.groups(model), lr=1.0, layer_decay=0.5)
    rates = {name: part["lr"] for part in parts for name in part["names"]}
    assert rates.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    expected = {"head": 1.0, "layer.1": 0.5, "layer.0": 0.25}
    for name, rate in rates.items():
        assert rate == next(value for start, value in expected.items() if name.startswith(start))


@pytest.mark.parametrize(("make", "method", "how"), CASES)
def test_a_step_reads_nothing_back_to_the_host(make, method, how, monkeypatch):
    counts = _counted_steps(method(make(), **how), _data(make, 12), monkeypatch)
    assert _host_reads(counts) == NONE


@pytest.mark.parametrize(("make", "method", "how"), CASES)
def test_a_step_runs_on_fake_tensors_and_in_bf16(make, method, how, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Enough(Exception):
        pass

    _, run = _fit(make, method, how, tk.finetune(1, lr=0.01), precision="bf16")
    assert math.isfinite(run.history[0]["train_loss"])
    step = Training.step

    def fake(self, micro):
        with FakeTensorMode(allow_non_fake_inputs=True):
            step(self, micro)
        raise Enough

    monkeypatch.setattr(Training, "step", fake)
    with pytest.raises(Enough):
        _fit(make, method, how, tk.finetune(1, lr=0.01))


@pytest.mark.parametrize(("make", "method", "how"), [CASES[0], CASES[1], CASES[4], CASES[5]])
@pytest.mark.parametrize("stopped", [2, 7, 11])
def test_a_run_with_adapters_resumes_bit_for_bit(make, method, how, stopped, tmp_path, monkeypatch):
    plan = [tk.linear_probe(1, cache=False), tk.finetune(1, lr=0.03, layer_decay=0.5)]
    settings = {"plan": plan, "directory": tmp_path, "save_every": 0.0}
    with monkeypatch.context() as patch:
        patch.setattr(Training, "step", _stopped_after(stopped))
        with pytest.raises(PowerCut):
            _fit(make, method, how, **settings)
    model, run = _fit(make, method, how, **settings)
    whole, expected = _fit(make, method, how, plan=plan)
    assert same(state_of(model), state_of(whole)) and _rows(run) == _rows(expected)


def test_a_run_does_not_go_on_with_adapters_of_another_scale(tmp_path):
    settings = {"plan": tk.finetune(1), "directory": tmp_path}
    _fit(tiny_convnet, tk.lora, {"alpha": 8.0, "targets": "all"}, **settings)
    with pytest.raises(ValueError, match=r"another run \(adaptation: \['lora', .*8\.0"):
        _fit(tiny_convnet, tk.lora, {"alpha": 16.0, "targets": "all"}, **settings)


def test_adalora_ends_with_its_budget_divided_between_the_matrices():
    model, run = _fit(tiny_bert, tk.adalora, {"r": 2, "start": 4}, tk.finetune(4, lr=0.03))
    layers = [m for m in model.modules() if hasattr(m, "kept")]
    ranks = [int(layer.kept.sum()) for layer in layers]
    assert len(ranks) == 8 and sum(ranks) == 2 * 8 and len(set(ranks)) > 1
    for layer in layers:
        assert torch.equal(layer.lora_E["default"] != 0, layer.kept == 1)
    outputs = run.predict(some_texts(9)).logits
    tk.merge(model)
    assert np.abs(run.predict(some_texts(9)).logits - outputs).max() < 1e-5


def test_a_phase_that_freezes_the_adapters_divides_nothing():
    how = {"r": 2, "start": 4}
    model, _ = _fit(tiny_bert, tk.adalora, how, tk.linear_probe(2, cache=False))
    assert all(m.kept.all() for m in model.modules() if hasattr(m, "kept"))


def test_what_acts_after_each_update_sees_the_step_and_its_gradients():
    seen = []

    class Watching(tk.classification):
        def updated(self, model, update, updates):
            seen.append((update, updates, model.head.weight.grad is not None))

    settings = {"plan": tk.finetune(2), "batch_size": 4, "accumulate": 2}
    tk.fit(tiny_convnet(), Watching(), some_images(22), **settings)
    assert seen == [(update, 6, True) for update in range(6)]


def test_below_the_first_adapter_features_are_cached_and_change_nothing():
    how = {"r": 4, "targets": "layer.1"}
    phase = {"epochs": 3, "lr": 0.03}
    live, slow = _fit(tiny_bert, tk.lora, how, tk.finetune(**phase))
    fast, quick = _fit(tiny_bert, tk.lora, how, tk.finetune(**phase, cache=True))
    left, right = state_of(live), state_of(fast)
    assert max((left[n] - right[n]).abs().max() for n in left) < 1e-5
    assert quick.history[-1]["train_loss"] == pytest.approx(slow.history[-1]["train_loss"])
    folders = list((cache.directory() / "features").iterdir())
    assert len(folders) == 1


def _with_a_change(alpha):
    model = tk.lora(tiny_bert(), r=4, alpha=alpha)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    return model


def test_cached_features_do_not_confuse_adapters_that_differ_in_scale_alone():
    probe = tk.linear_probe(2, lr=0.1)
    for alpha in (1.0, 30.0, None):

        def fresh(alpha=alpha):
            return tiny_bert() if alpha is None else _with_a_change(alpha)

        _, quick = _fit(tiny_bert, None, None, probe, model=fresh())
        live = tk.linear_probe(2, lr=0.1, cache=False)
        _, slow = _fit(tiny_bert, None, None, live, model=fresh())
        assert quick.history[-1]["train_loss"] == pytest.approx(slow.history[-1]["train_loss"])
    assert len(list((cache.directory() / "features").iterdir())) == 3


def test_a_fresh_process_reads_an_adapted_model_from_its_folder(tmp_path):
    labels = ["functional", "defective"]
    model = tk.models.load("efficientnet-lite0", labels, pretrained=False, layers=2, size=32)
    plain = set(model.state_dict())
    tk.lora(model, r=2, targets=["blocks.*"])
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    data = (images, torch.tensor([0, 1] * 3))
    plan = tk.finetune(2, lr=0.05)
    run = tk.fit(model, tk.classification(), data, plan=plan, precision="fp32")
    run.save(tmp_path / "model")
    stored, _ = checkpoint.read(tmp_path / "model" / "model.safetensors")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained - plain and trained <= stored.keys() == set(model.state_dict())
    np.save(tmp_path / "images.npy", images.numpy())
    arguments = [tmp_path / "model", tmp_path / "images.npy", tmp_path / "logits.npy"]
    command = [sys.executable, "-c", FRESH, *map(str, arguments)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert answer.stdout.strip() == str(labels)
    expected = run.predict(images).logits
    assert np.abs(np.load(tmp_path / "logits.npy") - expected).max() < 1e-6


LITE0, MINILM = {"name": "efficientnet-lite0", "size": 32}, {"name": "minilm-l6"}


@pytest.mark.parametrize(
    ("backbone", "method", "how"),
    [
        (LITE0, tk.ia3, {"targets": "blocks.1"}),
        (LITE0, tk.adapters, {"bottleneck": 3, "targets": "blocks.1"}),
        (MINILM, tk.prefix, {"length": 2}),
    ],
)
def test_every_method_is_rebuilt_from_the_folder(backbone, method, how, tmp_path, shared_assets):
    model = tk.models.load(labels=["a", "b"], pretrained=False, layers=2, **backbone)
    method(model, **how)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.uniform_(-1, 1)
    checkpoint.save_model(tmp_path, model, {})
    again = tk.load(tmp_path)
    assert same(state_of(again), state_of(model)) and again.adaptation == model.adaptation
    assert [p.requires_grad for p in again.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]


def test_a_model_that_was_merged_after_training_is_stored_as_the_plain_one(tmp_path):
    model = tk.models.load("efficientnet-lite0", ["a", "b"], pretrained=False, layers=2, size=32)
    plain = set(model.state_dict())
    tk.lora(model, r=2, targets="all")
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    data, plan = (images, torch.tensor([0, 1] * 3)), tk.finetune(2, lr=0.05)
    run = tk.fit(model, tk.classification(), data, plan=plan, precision="fp32")
    logits = run.predict(images).logits
    tk.merge(model)
    run.save(tmp_path)
    again = tk.load(tmp_path)
    assert set(again.state_dict()) == plain and getattr(again, "adaptation", None) is None
    assert np.abs(tk.predict(again, images, precision="fp32").logits - logits).max() < 1e-5


def test_a_prefix_is_keys_and_values_in_front_of_the_texts_own():
    model = tk.prefix(tiny_bert(dropout=0.0), length=3)
    wrapper = model.get_submodule("layer.0.block.attention.self")
    plain, (batch, length, width, heads) = wrapper.base_layer, (2, 5, 8, 2)
    with torch.no_grad():
        wrapper.keys.normal_()
        wrapper.values.normal_()
    hidden = torch.randn(batch, length, width)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    found, _ = wrapper(hidden, attention_mask=mask[:, None, None, :])
    for item in range(batch):
        real = mask[item]
        for head in range(heads):
            part = slice(4 * head, 4 * head + 4)
            queries, keys, values = (
                layer(hidden[item])[:, part] for layer in (plain.query, plain.key, plain.value)
            )
            keys = torch.cat([wrapper.keys[head], keys[real]])
            values = torch.cat([wrapper.values[head], values[real]])
            expected = (queries @ keys.T / 2.0).softmax(-1) @ values
            assert torch.allclose(found[item, :, part], expected, atol=1e-5)
    added = [p.numel() for n, p in model.named_parameters() if n.endswith((".keys", ".values"))]
    assert sum(added) == 2 * 2 * 3 * width  # layers, keys and values, length, width


def test_a_prefix_does_not_let_padding_in():
    model = tk.prefix(tiny_bert(dropout=0.0), length=2).eval()
    source = some_texts(6)
    together = model(source.fetch(range(6), None, 0).inputs)
    alone = torch.cat([model(source.fetch([at], None, 0).inputs) for at in range(6)])
    assert (together - alone).abs().max() < 1e-5


@pytest.mark.parametrize(("make", "method", "how"), CASES)
def test_a_saved_adapter_belongs_to_its_backbone(make, method, how, tmp_path):
    model, run = _fit(make, method, how)
    tk.peft.save_adapter(model, tmp_path)
    again = tk.peft.load_adapter(make(), tmp_path)
    logits = tk.predict(again, _data(make, 9), precision="fp32").logits
    assert np.array_equal(logits, run.predict(_data(make, 9)).logits)
    with pytest.raises(ValueError, match="made for a backbone with other weights"):
        tk.peft.load_adapter(make(seed=3), tmp_path)
