"""Law 2: frozen means frozen, parameters and buffers, and means inference mode."""

from __future__ import annotations

import pytest
import torch
from small_models import same, some_images, some_texts, state_of, tiny_convnet, tiny_encoder
from torch import nn

import transferkit as tk


def _frozen_part(model):
    names = {name for name, p in model.named_parameters() if not name.startswith("head")}
    names |= {name for name, _ in model.named_buffers()}
    return {name: tensor for name, tensor in state_of(model).items() if name in names}


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("cache", [True, False], ids=["cached", "live"])
@pytest.mark.parametrize("make", [tiny_convnet, tiny_encoder])
def test_a_frozen_backbone_is_bit_identical_after_training(make, cache):
    model = make()
    before, head = _frozen_part(model), state_of(model)["head.weight"]
    data = some_images(20) if make is tiny_convnet else some_texts(20)
    probe = tk.linear_probe(2, lr=0.1, cache=cache, weight_decay=0.5)
    tk.fit(model, tk.classification(), data, plan=[probe], batch_size=4)
    assert same(before, _frozen_part(model))
    assert not torch.equal(head, state_of(model)["head.weight"])


@pytest.mark.usefixtures("device")
def test_frozen_batchnorm_buffers_do_not_move_when_later_layers_train():
    model = tiny_convnet()
    before = state_of(model)
    phase = tk.finetune(2, lr=0.1, last=2)
    tk.fit(model, tk.classification(), some_images(20), plan=[phase], batch_size=4)
    after = state_of(model)
    stem = [name for name in before if name.startswith("stem")]
    assert same({n: before[n] for n in stem}, {n: after[n] for n in stem})
    assert not torch.equal(before["blocks.0.1.running_mean"], after["blocks.0.1.running_mean"])


@pytest.mark.usefixtures("device")
def test_what_the_user_froze_stays_frozen_in_every_phase():
    model = tiny_convnet()
    tk.freeze(model, "*.1", "stem.0.bias")  # all BatchNorm layers and one bias
    before = state_of(model)
    tk.fit(model, tk.classification(), some_images(20), plan=[tk.finetune(2, lr=0.1)])
    after = state_of(model)
    for name, tensor in before.items():
        stays = ".1." in name or name == "stem.0.bias"
        assert torch.equal(tensor, after[name]) == stays, name
    assert not model.stem[0].bias.requires_grad and model.stem[0].weight.requires_grad


def test_dropout_is_off_in_frozen_groups_and_on_in_trained_ones():
    model = tiny_encoder(dropout=0.5)
    tk.freeze(model, "embeddings", "layer.0")
    tk.layers.apply_modes(model)
    modes = [model.get_submodule(name).dropout.training for name in ("layer.0", "layer.1")]
    assert modes == [False, True]


def test_a_dropout_stage_goes_with_the_head_that_follows_it():
    model = tiny_convnet()
    tk.layers.apply_modes(model)
    assert model.dropout.training
    tk.freeze(model)
    tk.layers.apply_modes(model)
    assert not model.dropout.training


def test_a_group_with_trainable_biases_trains_while_its_frozen_batchnorm_does_not():
    model = tiny_convnet()
    tk.freeze(model)
    tk.unfreeze(model, "stem.0.bias")
    tk.layers.apply_modes(model)
    assert model.stem[0].training and not model.stem[1].training
    assert not model.get_submodule("blocks.0").training


def test_a_frozen_model_gives_an_item_the_same_output_whoever_shares_its_batch():
    model = tiny_convnet()
    tk.freeze(model)
    tk.unfreeze(model, "head")
    tk.layers.apply_modes(model)
    model.dropout.eval()
    images = some_images(9).fetch(range(9), None, 0).inputs
    together = model(images)
    alone = torch.cat([model(image.unsqueeze(0)) for image in images])
    assert (together - alone).abs().max() < 1e-5


def test_a_frozen_module_that_holds_layers_in_a_list_is_in_inference_mode_too():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    model = nn.Module()
    model.encoder, model.head = Encoder(), nn.Linear(3, 2)
    tk.freeze(model, "encoder")
    tk.layers.apply_modes(model)
    assert not model.encoder.training and model.head.training and model.training


class Noise(nn.Module):
    """A stage without parameters that only training switches on."""

    def forward(self, inputs):
        return inputs + torch.randn_like(inputs) if self.training else inputs


@pytest.mark.parametrize("stage", [Noise(), nn.RReLU(), nn.AlphaDropout(0.5)])
def test_a_stage_without_parameters_that_looks_at_its_mode_goes_with_the_next(stage):
    model = nn.Sequential(nn.Linear(3, 3), stage, nn.Flatten(), nn.Linear(3, 2))
    tk.freeze(model, "0")
    tk.layers.apply_modes(model)
    assert stage.training and tk.layers.frozen_prefix(model) == 1
    tk.freeze(model)
    tk.layers.apply_modes(model)
    assert not stage.training and tk.layers.frozen_prefix(model) == 4


def test_batchnorm_without_weights_of_its_own_follows_its_group():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, affine=False), nn.Linear(3, 2))
    tk.freeze(model, "0")
    tk.layers.apply_modes(model)
    assert [module.training for module in model] == [False, True, True]
    tk.freeze(model)
    tk.layers.apply_modes(model)
    assert not any(module.training for module in model)
