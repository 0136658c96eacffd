"""Law 11: fp16 unscales once, clips, steps; a skipped update moves the data on and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import Words, some_images, some_texts, state_of, tiny_bag, tiny_convnet
from test_resume import PowerCut, _agrees, _stopped_after
from torch import nn
from torch._dynamo.testing import CompileCounter

import transferkit as tk
from transferkit import data, devices, optim
from transferkit.engine import Training

CPU = torch.device("cpu")
COUNT, SIZE, ACCUMULATE, EPOCHS = 22, 4, 2, 3
EACH = 3  # updates an epoch: of 6 batches two at a time


class Overflows(tk.classification):
    """Cross-entropy whose gradient is infinite in batches that hold a chosen item."""

    chosen = -1

    def loss(self, outputs, batch):
        if outputs.requires_grad and self.chosen in batch.index:
            outputs.register_hook(lambda gradient: gradient * float("inf"))
        return super().loss(outputs, batch)


def _items(seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(COUNT, 4, generator=generator)
    inputs[3] *= 400.0  # its gradient overflows in fp16 until the factor is small enough
    return inputs, torch.randint(0, 3, (COUNT,), generator=generator)


def _net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def _phase(optimizer):
    return tk.finetune(EPOCHS, lr=0.05, weight_decay=0.1, warmup=0.3, optimizer=optimizer)


def _chosen(seed):
    return int(data.order(COUNT, SIZE, seed, 0)[0][0])  # the very first update is skipped


def _by_hand(seed, optimizer, clip, device):
    # With torch's own scaler, and a scheduler that is only moved by updates that are made.
    model, (inputs, labels), objective = _net(seed).to(device), _items(seed), Overflows()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    if optimizer == "adamw":
        made_by = torch.optim.AdamW(groups, lr=0.05)
    else:
        made_by = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    rates = torch.optim.lr_scheduler.LambdaLR(
        made_by, lambda made: optim.factor("cosine", made, EPOCHS * EACH, 0.3)
    )
    scaler, skipped = torch.amp.GradScaler(device), []
    for update in range(EPOCHS * EACH):
        epoch, at = divmod(update, EACH)
        parts = data.order(COUNT, SIZE, seed, epoch)[at * ACCUMULATE : (at + 1) * ACCUMULATE]
        for items in parts:
            batch = data.Batch(inputs[items], labels[items], torch.as_tensor(items))
            batch = batch.to(torch.device(device))
            with torch.autocast(device, torch.float16):
                outputs = model(batch.inputs)
            loss = objective.loss(outputs, batch).totals[0] / sum(map(len, parts))
            scaler.scale(loss).backward()
        scaler.unscale_(made_by)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        before = scaler.get_scale()
        scaler.step(made_by)
        scaler.update()
        made_by.zero_grad()
        if scaler.get_scale() < before:
            skipped.append(update)
        else:
            rates.step()
    return model, skipped, scaler.get_scale()


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_fp16_trains_like_a_loop_with_the_scaler_of_torch(optimizer, seed, device, monkeypatch):
    seen, step = [], Training.step

    def watched(self, micro):
        seen.append(self)
        step(self, micro)

    monkeypatch.setattr(Training, "step", watched)
    monkeypatch.setattr(Overflows, "chosen", _chosen(seed))
    model = _net(seed)
    run = tk.fit(
        model, Overflows(), _items(seed), plan=[_phase(optimizer)], batch_size=SIZE, clip=0.3,
        accumulate=ACCUMULATE, precision="fp16", seed=seed,
    )  # fmt: skip
    expected, skipped, scale = _by_hand(seed, optimizer, 0.3, device)
    assert seen[0].state.skipped == skipped and skipped[0] == 0
    assert len(skipped) < len(seen) == EPOCHS * EACH
    assert seen[0].scaler.scale.item() == scale
    assert sum(row["skipped"] for row in run.history) == len(skipped)
    for own, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert (own - other).abs().max() < 1e-5


@pytest.mark.usefixtures("device")
def test_a_skipped_update_leaves_weights_moments_and_schedule_but_the_data_move_on(monkeypatch):
    states, items, rates = [], [], []
    step = Training.step

    def watched(self, micro):
        step(self, micro)
        moments = [t.clone() for s in self.optimizer.state.values() for t in s.values()]
        states.append((state_of(self.model), moments))
        rates.append(float(self.optimizer.param_groups[0]["lr"]))
        items.append(torch.cat([batch.index for batch in micro]))

    monkeypatch.setattr(Training, "step", watched)
    monkeypatch.setattr(Overflows, "chosen", int(data.order(COUNT, SIZE, 0, 0)[2][0]))
    items_given, plan = _items(0), [tk.finetune(1, lr=0.05, schedule="linear", warmup=0.0)]
    items_given[0][3] /= 400.0
    tk.fit(_net(0), Overflows(), items_given, plan=plan, batch_size=SIZE, precision="fp16")
    assert all(map(torch.equal, states[1][0].values(), states[2][0].values()))
    assert all(map(torch.equal, states[1][1], states[2][1]))
    assert not all(map(torch.equal, states[2][0].values(), states[3][0].values()))
    assert torch.equal(torch.cat(items), torch.as_tensor(_whole_order()))
    expected = [0.05 * (1 - made / 6) for made in (0, 1, 2, 2, 3, 4)]
    assert rates == pytest.approx(expected, rel=1e-6)


def _whole_order():
    return [int(item) for part in data.order(COUNT, SIZE, 0, 0) for item in part]


def test_the_factor_grows_as_that_of_torch_after_2000_updates_in_a_row():
    scaler, parameter = devices.Scaler(CPU, 4.0, clean=1998), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    scaler.begin(optimizer, [1.0], 0)
    found = []
    for _ in range(3):
        parameter.grad = torch.ones(3)
        scaler.unscale([parameter.grad])
        scaler.step(optimizer)
        found.append(scaler.scale.item())
    assert found == [4.0, 8.0, 8.0]
    assert scaler.state() == {"scale": 8.0, "clean": 1}


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_resume_in_fp16_equals_no_interruption(optimizer, tmp_path, monkeypatch):
    monkeypatch.setattr(Overflows, "chosen", 5)

    def fit(directory=None):
        model, plan = tiny_convnet(), [tk.linear_probe(1, cache=False), _phase(optimizer)]
        run = tk.fit(
            model, Overflows(), some_images(22), some_images(6, seed=1), plan=plan, batch_size=4,
            directory=directory, save_every=0.0, precision="fp16",
        )  # fmt: skip
        return model, run

    for updates in (2, 8, 4):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Training, "step", _stopped_after(updates))
            with pytest.raises(PowerCut):
                fit(tmp_path)
    resumed = fit(tmp_path)
    _agrees(resumed, fit())
    assert all(row["skipped"] >= 1 for row in resumed[1].history)


@pytest.mark.usefixtures("device")
def test_a_gradient_that_stays_infinite_ends_the_run_with_a_message(monkeypatch):
    monkeypatch.setattr(Overflows, "chosen", 0)
    data, plan = (torch.randn(1, 4), torch.tensor([1])), [tk.finetune(60)]
    with pytest.raises(FloatingPointError, match=r"infinite for some time at.*train in 'fp32'"):
        tk.fit(_net(0), Overflows(), data, plan=plan, precision="fp16")


def test_weights_that_are_already_half_are_refused():
    model, plan = _net(0).half(), [_phase("sgd")]
    with pytest.raises(ValueError, match=r"0\.weight is float16.*call model\.float\(\)"):
        tk.fit(model, tk.classification(), _items(0), plan=plan, precision="fp16")


def _compiled(make, source, **given):
    # How often the model was compiled, and the shapes of the batches it saw.
    counter, shapes, step = CompileCounter(), [], Training.step

    def watched(self, micro):
        for batch in micro:
            inputs = batch.inputs["input_ids"] if isinstance(batch.inputs, dict) else batch.inputs
            shapes.append((self.phase.name, *inputs.shape))
        step(self, micro)

    model = make()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "step", watched)
        run = tk.fit(
            model, tk.classification(), source, batch_size=5, precision="fp32",
            **{"plan": [tk.finetune(3, lr=0.01)], "compile": counter} | given,
        )  # fmt: skip
    return model, run, counter.frame_count, shapes


def _long_texts(count):
    # of 1 to 80 tokens, so that batches have many lengths
    generator = torch.Generator().manual_seed(0)
    rows = [" ".join(["7"] * int(n)) for n in torch.randint(1, 81, (count,), generator=generator)]
    return tk.data.texts(rows, torch.arange(count) % 3, Words(), 100)


@pytest.mark.usefixtures("device")
def test_compile_makes_one_version_for_each_length_of_batches_and_phase():
    source = _long_texts(83)
    longest = {source.lengths[batch].max() for batch in data.order(83, 5, 0, 0, source.lengths)}
    assert len(longest) > 8  # as they come, each of these would be compiled
    plan = [tk.finetune(2, lr=0.01, last=2, name="one"), tk.finetune(2, lr=0.01, name="two")]
    _, run, compiled, shapes = _compiled(
        tiny_bag, source, plan=plan, validation=some_texts(9), accumulate=2
    )
    lengths = {(phase, length) for phase, _, length in shapes}
    assert len({items for _, items, _ in shapes}) > 1  # the last batch of an epoch is smaller
    assert max(sum(phase == name for phase, _ in lengths) for name in ("one", "two")) <= 8
    assert compiled == len(lengths) > 8
    assert run.replay(3).batches[1].inputs["input_ids"].shape == shapes[5][1:]


@pytest.mark.usefixtures("device")
def test_compile_makes_one_version_for_images_and_trains_the_same():
    images = some_images(13)
    model, _, compiled, _ = _compiled(tiny_convnet, images)
    assert compiled == 1
    plain, _, _, _ = _compiled(tiny_convnet, images, compile=False)
    for name, value in state_of(plain).items():
        assert (value - state_of(model)[name]).abs().max() < 1e-6
    assert not any("_orig_mod" in name for name in model.state_dict())


def test_compile_needs_few_lengths():
    source = some_texts(9)
    wrapped = type("Wrapped", (), {"__len__": lambda _: 9, "lengths": source.lengths,
                                   "labels": source.labels, "fetch": source.fetch})()  # fmt: skip
    with pytest.raises(TypeError, match=r"a Wrapped makes them of all: give it a method rounded"):
        tk.fit(tiny_bag(), tk.classification(), wrapped, plan=[tk.finetune(1)], compile="eager")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=60))
def test_few_lengths_are_eight_at_most_and_pad_no_text_beyond_the_longest(lengths):
    lengths = np.array(lengths)
    sizes = data.few_lengths(lengths)
    assert 1 <= len(sizes) <= 8 and (np.diff(sizes) > 0).all()
    assert sizes[-1] == lengths.max() and all(size % 8 == 0 for size in sizes[:-1])
