"""What only a card shows: where tensors are, which generators are drawn from, what is copied how.

Where there is no card, the step still runs on torch's device "meta", which has shapes and no
values. It refuses to compute with a tensor on the host beside one of its own, and to tell the host
a value.
"""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from small_models import (
    same,
    some_images,
    some_tagged,
    some_texts,
    state_of,
    tiny_convnet,
    tiny_encoder,
    tiny_tagger,
)
from torch.utils._pytree import tree_leaves

import transferkit as tk
from transferkit import devices, engine, optim

AWAY = torch.device("meta")
PLAN = tk.finetune(1, lr=0.01, layer_decay=0.5)


def _steps_away(monkeypatch, model, objective, source, **settings):
    # Two steps of the engine with a model that is not on the host; the devices of what they made.
    arguments = {"plan": PLAN, "batch_size": 4, "device": "cpu"} | settings
    made = []
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_conduct", made.append)
        tk.fit(model, objective, source, **arguments)
    (training,) = made
    batches = [source.fetch(range(at, at + 4), 0, 0) for at in (0, 4)]
    monkeypatch.setattr(devices, "generators", lambda device: [torch.default_generator])
    # torch offers its kernels for many tensors on a few devices, and has them for this one, too
    optimizers = importlib.import_module("torch.optim.optimizer")
    known = [*optimizers._get_fused_kernels_supported_devices(), AWAY.type]
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: known)
    clipping = importlib.import_module("torch.nn.utils.clip_grad")
    monkeypatch.setattr(clipping, "_device_has_foreach_support", lambda *_: True)
    for name in ("_fused_adamw_", "_fused_sgd_", "_amp_update_scale_"):  # these it lacks
        monkeypatch.setattr(torch, name, _all_away)
    model.to(AWAY)
    training.settings.device, training.autocast = AWAY, nullcontext
    if training.scaler is not None:
        training.scaler = optim.Scaler(AWAY)
    training._enter(training.phases[0])
    for _ in range(2):
        training.step(batches[: training.settings.accumulate])
        training.state.update += 1
        training.state.total += 1
    return {tensor.device for tensor in _parts(training)}


def _all_away(*arguments, **named):
    tensors = [part for part in tree_leaves([arguments, named]) if isinstance(part, torch.Tensor)]
    assert len(tensors) > 1 and {tensor.device for tensor in tensors} == {AWAY}


def _parts(training):
    yield from training.model.parameters()
    yield from training.model.buffers()
    for state in training.optimizer.state.values():
        yield from state.values()
    for _, loss in training.losses:
        yield from loss.totals


PAIRED = tk.classification(label_smoothing=0.1, class_weights=(1.0, 2.0, 0.5))
CASES = {
    "plain": (tk.classification(), {}),
    "weighted": (PAIRED, {"accumulate": 2}),
    "fp16": (tk.classification(), {"precision": "fp16", "ema": 0.9}),
    "sgd": (PAIRED, {"plan": tk.finetune(1, optimizer="sgd")}),
    "fp16, sgd": (PAIRED, {"precision": "fp16", "plan": tk.finetune(1, optimizer="sgd")}),
    "recomputed": (tk.classification(), {"recompute": True, "ema": 0.9}),
    "one group": (tk.classification(), {"plan": tk.finetune(1, last=1)}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("make", [tiny_convnet, tiny_encoder])
def test_a_step_mixes_nothing_of_the_host_with_the_card_and_reads_nothing(make, case, monkeypatch):
    source = some_images(8) if make is tiny_convnet else some_texts(8)
    objective, settings = CASES[case]
    found = _steps_away(monkeypatch, make(), objective, source, **settings)
    assert found == {AWAY}


def test_so_does_a_step_on_tokens_and_one_with_a_penalty(monkeypatch):
    found = _steps_away(
        monkeypatch, tiny_tagger(), tk.token_classification(), some_tagged(8), accumulate=2
    )
    assert found == {AWAY}
    model = tiny_convnet()
    objective = tk.l2_sp(tk.classification(), model)
    assert _steps_away(monkeypatch, model, objective, some_images(8)) == {AWAY}


ADAPTED = {
    "cdan": tk.confusion(tk.cdan(entropy=True)),
    "mmd": tk.align(tk.mmd, weight=tk.ramp(0, 1)),
    "coral": tk.align(tk.coral),
    "wasserstein": tk.align(tk.wasserstein, projections=3),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_so_does_a_step_of_adaptation(name, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # that device has none
    model = tk.with_discriminator(tiny_encoder(), conditional=True, hidden=8)
    if name != "cdan":
        tk.freeze(model, "head.discriminator")
    pair = tk.pair(some_texts(8), some_texts(8, 1))
    assert _steps_away(monkeypatch, model, ADAPTED[name], pair) == {AWAY}


class OnTheHost(tk.classification):
    """Cross-entropy with a constant that was left on the host."""

    def loss(self, outputs, batch):
        return super().loss(outputs * torch.ones(3), batch)


class Read(tk.classification):
    """Cross-entropy that looks at a value."""

    def loss(self, outputs, batch):
        return super().loss(outputs, batch) if outputs.sum() == outputs.sum() else None


@pytest.mark.parametrize(("objective", "said"), [(OnTheHost(), "device"), (Read(), "item|scalar")])
def test_that_device_refuses_both(objective, said, monkeypatch):
    with pytest.raises(Exception, match=said):
        _steps_away(monkeypatch, tiny_convnet(), objective, some_images(8))


def test_the_processor_draws_from_one_generator():
    assert devices.generators(torch.device("cpu")) == [torch.default_generator]


def test_of_several_cards_the_generator_is_that_of_the_one_computed_on(monkeypatch):
    own = [torch.Generator() for _ in range(3)]
    module = SimpleNamespace(init=lambda: None, current_device=lambda: 1, default_generators=own)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    with torch.random.fork_rng(devices=[]):
        for name, at in (("cuda:2", 2), ("cuda:0", 0), ("cuda", 1)):
            devices.seed_dropout(torch.device(name), 40 + at)
            assert devices.generators(torch.device(name)) == [torch.default_generator, own[at]]
            assert own[at].initial_seed() == torch.default_generator.initial_seed() == 40 + at


def test_what_lies_on_a_device_is_not_pinned():
    part = torch.zeros(2, 3, device="meta")
    batch = tk.data.Batch({"a": part}, part, torch.arange(2))
    assert batch.pin_memory().inputs["a"] is part


@pytest.mark.gpu
def test_dropout_on_a_card_draws_from_that_card_s_generator():
    for index in range(torch.cuda.device_count()):  # also where another card is the current one
        there, drawn = torch.device("cuda", index), []
        for _ in range(2):
            devices.seed_dropout(there, 5)
            drawn.append(torch.rand(8, device=there))
        assert torch.equal(*drawn)


@pytest.mark.gpu
def test_fit_leaves_the_generators_as_they_were():
    torch.cuda.manual_seed(7)
    before = torch.cuda.get_rng_state()
    tk.fit(tiny_encoder(), tk.classification(), some_texts(9), plan=PLAN, device="cuda")
    assert torch.equal(before, torch.cuda.get_rng_state())


def _fit(source, device, **settings):
    model = tiny_convnet()
    run = tk.fit(
        model, tk.classification(), source, plan=PLAN, batch_size=4, device=device, **settings
    )
    return state_of(model), run


def test_data_on_the_device_train_as_those_on_the_host(device):
    batch = some_images(12).fetch(range(12), None, 0)
    here = (batch.inputs.contiguous(), batch.labels)
    there = tuple(part.to(device) for part in here)
    left, _ = _fit(here, device)
    right, run = _fit(there, device)
    assert same(left, right)
    assert run.evaluate(there) == run.evaluate(here)


@pytest.mark.gpu
def test_batches_come_to_the_card_from_pinned_memory(monkeypatch):
    pinned, step = [], engine.Training.step

    def watched(self, micro):
        pinned.extend(part.is_pinned() for batch in micro for part in (batch.inputs, batch.labels))
        step(self, micro)

    monkeypatch.setattr(engine.Training, "step", watched)
    for workers in (0, 1):
        _fit(some_images(9), "cuda", workers=workers)
    assert len(pinned) == 2 * 3 * 2 and all(pinned)


@pytest.mark.gpu
def test_the_card_trains_what_the_processor_trains():
    exact = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
    model = {"here": None, "there": None}
    with exact:
        for name, device in (("here", "cpu"), ("there", "cuda")):
            made = tiny_convnet()
            made.dropout.p = 0.0  # its masks are others on another device
            # not AdamW, which makes large moves of gradients that are 0 but for rounding
            tk.fit(made, tk.classification(), some_images(12), batch_size=4, precision="fp32",
                   plan=tk.finetune(1, lr=0.05, optimizer="sgd"), device=device)  # fmt: skip
            model[name] = state_of(made)
    for name, value in model["here"].items():
        assert (value - model["there"][name]).abs().max() < 1e-4, name
