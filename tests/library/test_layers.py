"""Layer groups, freezing by name, cutting, and what is said about bad requests."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import transferkit as tk
from transferkit import layers


def _staged() -> tk.Staged:
    stages = [("stem", nn.Linear(4, 5)), ("block.0", nn.ReLU()), ("block.1", nn.Linear(5, 5))]
    return tk.Staged([*stages, ("head", nn.Linear(5, 2))], labels=["no", "yes"])


def _sequential() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.Linear(5, 2))


class Encoder(nn.Module):
    """Shaped as the encoders of transformers are: layers in a ModuleList, deep inside."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(3))
        self.body = nn.Module()
        self.body.embeddings = nn.Embedding(7, 3)
        self.body.encoder = nn.Module()
        self.body.encoder.layer = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.body.pooler = nn.Linear(3, 3)
        self.classifier = nn.Linear(3, 2)


def test_parameters_are_called_by_their_stage():
    names = [name for name, _ in _staged().named_parameters()]
    assert names == ["stem.weight", "stem.bias", "block.1.weight", "block.1.bias", "head.weight",
                     "head.bias"]  # fmt: skip


def test_a_stage_that_is_replaced_is_used():
    model = _staged()
    model.head = nn.Linear(5, 3)
    assert model(torch.zeros(2, 4)).shape == (2, 3)
    assert layers.groups(model)[-1].modules == (model.head,)


def test_a_copy_of_a_staged_model_is_independent():
    model = _staged()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.head.weight.add_(1.0)
    inputs = torch.randn(3, 4)
    assert not torch.equal(model(inputs), twin(inputs)) and twin.labels == model.labels


def test_the_layers_of_an_encoder_are_groups_of_their_own():
    found = layers.groups(Encoder())
    assert [group.name for group in found] == [
        "(own)",
        "body.embeddings",
        "body.encoder.layer.0",
        "body.encoder.layer.1",
        "body.pooler",
        "classifier",
    ]
    inside = [name for group in found for name in group.parameters]
    assert sorted(inside) == sorted(name for name, _ in Encoder().named_parameters())


def test_freezing_a_layer_does_not_freeze_another_whose_name_begins_alike():
    model = nn.Module()
    model.layer = nn.ModuleList([nn.Linear(1, 1) for _ in range(12)])
    tk.freeze(model, "layer.1")
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["layer.1.weight", "layer.1.bias"]


def test_freezing_takes_patterns_and_unfreezing_undoes_it():
    model = _staged()
    tk.freeze(model, "*.bias", "block.[01]")
    assert [p.requires_grad for p in model.parameters()] == [True, False, False, False, True, False]
    tk.unfreeze(model)
    assert all(p.requires_grad for p in model.parameters())


def test_an_unknown_pattern_lists_the_nearest_names():
    with pytest.raises(ValueError, match=r"'blocks\.1'.*nearest names are .*block\.1"):
        tk.freeze(_staged(), "blocks.1")


def test_summary_counts_what_is_trained_in_each_group():
    model = _staged()
    tk.freeze(model, "stem")
    table = tk.summary(model)
    assert table[0] == {"group": "stem", "parameters": 25, "trainable": 0, "mode": "eval"}
    assert table[-1] == {"group": "total", "parameters": 67, "trainable": 42, "mode": ""}
    assert "block.1" in str(table)


@pytest.mark.parametrize("boundary", [1, 2, 3, "block.1", "head"])
@pytest.mark.parametrize("make", [_staged, _sequential])
def test_both_sides_of_a_cut_give_the_whole(make, boundary):
    model = make()
    if isinstance(model, nn.Sequential) and isinstance(boundary, str):
        boundary = {"block.1": "2", "head": "3"}[boundary]
    prefix, suffix = layers.split(model, boundary)
    inputs = torch.randn(6, 4)
    assert torch.equal(suffix(prefix(inputs)), model(inputs))


def test_the_lower_side_of_a_cut_prepares_the_same_inputs():
    model = _staged()
    model.prepare = lambda split: tk.data.tensors(torch.tensor(split.inputs), split.labels)
    split = SimpleNamespace(kind="features", inputs=[[1.0, 2.0, 3.0, 4.0]] * 3, labels=None)
    lower, upper = layers.split(model, "head")
    expected = tk.predict(model, split).logits
    features = torch.from_numpy(tk.predict(lower, split).logits)
    assert torch.equal(torch.from_numpy(tk.predict(upper, features).logits), torch.tensor(expected))
    assert upper.prepare is None  # what it takes are features, not items


@pytest.mark.parametrize("boundary", [0, 4, -1, "tail"])
def test_a_boundary_outside_the_model_is_refused(boundary):
    with pytest.raises(ValueError, match=r"the boundary is .*give a number from 1 to 3"):
        layers.split(_staged(), boundary)


def test_a_model_without_an_order_of_calls_cannot_be_cut():
    with pytest.raises(TypeError, match=r"a Encoder cannot be cut.*tk\.Staged"):
        layers.split(Encoder(), 2)


@pytest.mark.parametrize("stages", [[], [("a", nn.ReLU()), ("a", nn.ReLU())]])
def test_stages_must_be_there_and_distinct(stages):
    with pytest.raises(ValueError, match="give one or more, all distinct"):
        tk.Staged(stages)
