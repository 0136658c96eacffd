"""Recomputing layer groups in the backward pass saves memory and changes nothing."""

from __future__ import annotations

import collections

import pytest
import torch
from small_models import (
    same,
    some_images,
    some_texts,
    state_of,
    tiny_bag,
    tiny_convnet,
    tiny_encoder,
)
from torch import nn

import transferkit as tk


def _trained(make, recompute, **given):
    # The state of the model, and how often each stage was called with gradients.
    model, calls = make(), collections.Counter()
    for name, stage in model.named_children() if make is _sequential else model._pairs():
        stage.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    source = some_texts(12) if make in (tiny_bag, tiny_encoder) else some_images(12)
    if make is _sequential:
        source = (
            torch.randn(12, 4, generator=torch.Generator().manual_seed(0)),
            torch.arange(12) % 3,
        )
    given = {"plan": [tk.finetune(2, lr=0.05)], "batch_size": 4, "precision": "fp32"} | given
    run = tk.fit(model, tk.classification(), source, recompute=recompute, **given)
    return state_of(model), run, calls


def _sequential():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("make", [tiny_encoder, tiny_convnet, _sequential])
def test_weights_and_buffers_are_the_same_bit_for_bit_with_dropout(make, precision):
    plain, _, once = _trained(make, False, precision=precision)
    again, _, twice = _trained(make, True, precision=precision)
    assert same(plain, again)
    assert sum(twice.values()) > sum(once.values())


def test_frozen_groups_batch_norm_and_the_head_are_computed_once():
    plan = [tk.finetune(1, lr=0.05, last=2)]  # layer.1 and the head
    _, _, calls = _trained(tiny_encoder, True, plan=plan)
    checked = 1  # the call by which fit checks the outputs
    expected = {"embeddings": 3, "layer.0": 3, "layer.1": 6, "pool": 6, "head": 3}
    assert calls == {name: count + checked for name, count in expected.items()}
    _, _, calls = _trained(tiny_convnet, True, plan=[tk.finetune(1, lr=0.05)])
    # nothing of a mean is needed to go backward, so it is not computed again either
    expected = {"stem": 3, "blocks.0": 3, "pool": 3, "dropout": 6, "head": 3}
    assert calls == {name: count + checked for name, count in expected.items()}


@pytest.mark.usefixtures("device")
def test_cached_features_and_accumulation_change_nothing():
    plan = [tk.finetune(2, lr=0.05, last=2, cache=True)]
    plain, _, _ = _trained(tiny_encoder, False, plan=plan, accumulate=2)
    again, _, _ = _trained(tiny_encoder, True, plan=plan, accumulate=2)
    assert same(plain, again)


def test_less_is_kept_for_the_backward_pass():
    model = tiny_encoder().train()
    inputs = some_texts(12).fetch(range(12), None, 0).inputs

    def kept(part):
        sizes = []
        hooks = (lambda tensor: (sizes.append(tensor.numel()), tensor)[1], lambda tensor: tensor)
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            part(inputs)
        return sum(sizes)

    assert kept(tk.layers.recomputing(model)) < 0.25 * kept(model)


def test_it_works_with_compile():
    plain, _, _ = _trained(tiny_bag, False)
    again, _, _ = _trained(tiny_bag, True, compile="eager")
    for name, value in plain.items():
        assert (value - again[name]).abs().max() < 1e-5


def test_a_model_that_hides_its_order_is_refused():
    class Opaque(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, inputs):
            return self.head(inputs)

    data = (torch.randn(4, 4), torch.arange(4) % 3)
    with pytest.raises(TypeError, match=r"a Opaque cannot be cut.*tk\.Staged"):
        tk.fit(Opaque(), tk.classification(), data, plan=[tk.finetune(1)], recompute=True)
