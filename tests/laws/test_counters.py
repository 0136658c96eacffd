"""Law 10 and the speed counters: the inner loop never waits for the device, and adds little."""

from __future__ import annotations

import collections
from contextlib import nullcontext

import pytest
import torch
from small_models import some_images, some_texts, tiny_convnet, tiny_encoder
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import transferkit as tk
from benchmarks.gpu.card import waits_refused
from transferkit.engine import Training

HOST_READS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::equal"}


class Counter(TorchDispatchMode):
    """Counts the operators that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.seen = collections.Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.seen[operator._schema.name] += 1
        return operator(*args, **(kwargs or {}))


def _counted_steps(model, data, monkeypatch, objective=None, **settings):
    counts = []
    step = Training.step

    def counted(self, micro):
        # on a card its driver is asked, too, as soon as everything is made that is made once
        on_a_card = self.settings.device.type == "cuda" and len(counts) > 1
        refused = waits_refused(self.settings.device) if on_a_card else nullcontext()
        with Counter() as counter, refused:
            step(self, micro)
        counts.append(counter.seen)

    monkeypatch.setattr(Training, "step", counted)
    given = {"plan": [tk.finetune(2, lr=0.01)], "batch_size": 4, "precision": "fp32"}
    tk.fit(model, objective or tk.classification(), data, **(given | settings))
    assert len(counts) > 2
    return counts


def _host_reads(counts):
    return {name: sum(count[name] for count in counts) for name in HOST_READS}


NONE = dict.fromkeys(HOST_READS, 0)
OBJECTIVE = tk.classification(label_smoothing=0.1, class_weights=(1.0, 2.0, 0.5))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("make", [tiny_convnet, tiny_encoder])
def test_a_step_reads_nothing_back_to_the_host(make, accumulate, monkeypatch):
    data = some_images(24) if make is tiny_convnet else some_texts(24)
    counts = _counted_steps(make(), data, monkeypatch, OBJECTIVE, accumulate=accumulate)
    assert _host_reads(counts) == NONE


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_step_in_half_precision_reads_nothing_back(precision, monkeypatch):
    counts = _counted_steps(tiny_encoder(), some_texts(24), monkeypatch, precision=precision)
    assert _host_reads(counts) == NONE


@pytest.mark.usefixtures("device")
def test_a_step_of_sgd_on_cached_features_reads_nothing_back(monkeypatch):
    plan = [tk.linear_probe(2, lr=0.1, optimizer="sgd")]
    counts = _counted_steps(tiny_convnet(), some_images(24), monkeypatch, plan=plan)
    assert _host_reads(counts) == NONE


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("measure", [tk.mmd, tk.coral])
def test_a_step_of_adaptation_reads_nothing_back(measure, monkeypatch):
    model = tk.with_discriminator(tiny_encoder(), conditional=True, hidden=8)
    objective = tk.confusion(tk.align(measure, tk.cdan(entropy=True), weight=tk.ramp(0, 1)))
    pair = tk.pair(some_texts(24), some_texts(20, 1))
    assert _host_reads(_counted_steps(model, pair, monkeypatch, objective)) == NONE


@pytest.mark.parametrize("name", ["minilm-l6", "e5-small", "efficientnet-lite0"])
def test_a_step_of_each_shipped_model_reads_nothing_back(name, monkeypatch, shared_assets):
    size = {"size": 32} if "efficientnet" in name else {"max_length": 12}
    model = tk.models.load(name, labels=["a", "b", "c"], pretrained=False, layers=1, **size)
    data = some_images(12) if "efficientnet" in name else some_texts(12)
    counts = _counted_steps(model, data, monkeypatch)
    assert _host_reads(counts) == NONE


def _bare_operators(model, data, clip):
    # What a careful user would write by hand.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    model.train()
    for at in range(2):
        batch = data.fetch(range(at * 4, at * 4 + 4), 0, 0)
        with Counter() as counter:
            loss = nn.functional.cross_entropy(model(batch.inputs), batch.labels)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip, foreach=True)
            optimizer.step()
            optimizer.zero_grad()
    return counter.seen


@pytest.mark.parametrize("make", [tiny_convnet, tiny_encoder])
def test_a_step_adds_at_most_four_operators_to_a_bare_loop(make, monkeypatch):
    data = some_images(24) if make is tiny_convnet else some_texts(24)
    bare = _bare_operators(make(), data, 1.0)
    plan = [tk.finetune(2, lr=0.01, weight_decay=0.0)]  # one group, as in the bare loop
    ours = _counted_steps(make(), data, monkeypatch, plan=plan)[1]
    added = {name: ours[name] - bare[name] for name in ours | bare if ours[name] != bare[name]}
    assert sum(ours.values()) <= sum(bare.values()) + 4, added


def test_the_step_runs_on_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Enough(Exception):
        pass

    def fake(self, micro):
        with FakeTensorMode(allow_non_fake_inputs=True):
            step(self, micro)
        raise Enough

    step = Training.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "step", fake)
        with pytest.raises(Enough):
            tk.fit(tiny_convnet(), tk.classification(), some_images(8), plan=[tk.finetune(1)])


def test_batches_of_similar_length_are_padded_by_a_tenth_at_most():
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(4000, generator=generator) * 0.7 + 3).exp().long().clamp(3, 128).numpy()
    batches = tk.data.order(4000, 32, seed=0, epoch=0, lengths=lengths)
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert padded / lengths.sum() <= 1.10
