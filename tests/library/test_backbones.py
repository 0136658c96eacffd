"""Networks of torchvision and timm as stages: the same modules, the same outputs bit for bit."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import timm
import torch
from torch import nn
from torchvision.models import (
    convnext,
    efficientnet_b0,
    mobilenet_v2,
    mobilenet_v3_small,
    resnet,
    shufflenet_v2_x0_5,
    vision_transformer,
)

import transferkit as tk
from transferkit import backbones, layers, models

SMALL_CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def _timm(name: str, **options) -> nn.Module:
    return timm.create_model(name, pretrained=False, num_classes=3, **options)


def _timm_vit(**options) -> nn.Module:
    return _timm("vit_tiny_patch16_224", **SMALL_VIT, **options)


def _torchvision_vit(**options) -> nn.Module:
    return vision_transformer.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3, **options)


def _torchvision_convnext() -> nn.Module:
    blocks = [convnext.CNBlockConfig(8, 16, 1), convnext.CNBlockConfig(16, None, 1)]
    return convnext.ConvNeXt(blocks, num_classes=3)


RESNET = ["stem", "layer1", "layer2", "layer3", "layer4", "pool", "head"]
VIT = ["embedding", "blocks.0", "blocks.1", "norm", "pool", "head"]
NETWORKS = {
    "torchvision resnet": (
        lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=3),
        RESNET,
    ),
    "torchvision efficientnet": (
        lambda: efficientnet_b0(num_classes=3),
        ["stem", *(f"blocks.{i}" for i in range(7)), "neck", "pool", "head"],
    ),
    "torchvision mobilenet v2": (
        lambda: mobilenet_v2(num_classes=3, width_mult=0.25),
        ["stem", *(f"blocks.{i}" for i in range(17)), "neck", "pool", "head"],
    ),
    "torchvision mobilenet v3": (
        lambda: mobilenet_v3_small(num_classes=3, width_mult=0.5),
        ["stem", *(f"blocks.{i}" for i in range(11)), "neck", "pool", "hidden", "head"],
    ),
    "torchvision convnext": (
        _torchvision_convnext,
        ["stem", "blocks.0", "blocks.1", "blocks.2", "pool", "hidden", "head"],
    ),
    "torchvision vit": (partial(_torchvision_vit, dropout=0.1), VIT),
    "torchvision vit with a hidden layer": (
        partial(_torchvision_vit, representation_size=8),
        [*VIT[:-1], "hidden", "head"],
    ),
    "timm resnet": (lambda: _timm("resnet10t", drop_rate=0.2), RESNET),
    "timm efficientnet": (
        lambda: _timm("tf_efficientnet_lite0", drop_rate=0.2),
        ["stem", *(f"blocks.{i}" for i in range(7)), "neck", "pool", "head"],
    ),
    "timm convnext": (
        lambda: _timm("convnext_atto", **SMALL_CONVNEXT, drop_rate=0.2),
        ["stem", *(f"blocks.{i}" for i in range(4)), "neck", "head"],
    ),
    "timm convnext that normalises first": (
        lambda: _timm("convnext_tiny_hnf", **SMALL_CONVNEXT),
        ["stem", *(f"blocks.{i}" for i in range(4)), "neck", "head"],
    ),
    "timm vit": (partial(_timm_vit, drop_rate=0.1), VIT),
    "timm vit with registers and mean": (
        partial(_timm_vit, reg_tokens=2, global_pool="avg", no_embed_class=True, pre_norm=True),
        VIT,
    ),
    "timm vit with attention pooling": (partial(_timm_vit, global_pool="map"), VIT),
}


@pytest.fixture(params=list(NETWORKS))
def network(request):
    make, names = NETWORKS[request.param]
    torch.manual_seed(0)
    return make(), names


def test_stages_compute_what_the_network_computes_in_both_modes(network):
    model, names = network
    inputs = torch.randn(2, 3, 32, 32)
    for training in (False, True):
        # of a copy, for BatchNorm changes as it trains; a stage must have the network's own mode
        whole = copy.deepcopy(model).train(training)
        stages = tk.staged(copy.deepcopy(model).train(training), labels=["a", "b", "c"])
        assert stages.stage_names == names and stages.labels == ["a", "b", "c"]
        with torch.no_grad():
            torch.manual_seed(1)
            expected = whole(inputs)
            torch.manual_seed(1)
            assert torch.equal(stages(inputs), expected)


def test_stages_share_the_networks_parameters_and_the_last_is_its_head(network):
    model, _ = network
    stages = tk.staged(model)
    for kind in ("parameters", "buffers"):
        own, shared = list(getattr(model, kind)()), list(getattr(stages, kind)())
        assert len(own) == len(shared) and set(map(id, own)) == set(map(id, shared))
    head = layers.groups(stages)[-1]
    assert sorted(p.shape for p in head.parameters.values())[0] == (3,)  # a bias for three classes
    assert len(head.parameters) == 2


class Doubled(resnet.ResNet):
    def _forward_impl(self, x):
        return 2 * super()._forward_impl(x)


def _patched() -> nn.Module:
    model = _timm_vit()
    model.forward_head = lambda x, pre_logits=False: x[:, 0]
    return model


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: shufflenet_v2_x0_5(num_classes=2), "ShuffleNetV2"),
        (lambda: Doubled(resnet.BasicBlock, [1, 1, 1, 1]), "Doubled"),
        (_patched, "VisionTransformer"),
    ],
    ids=["another network", "a subclass with an order of its own", "a replaced method"],
)
def test_a_network_whose_order_is_not_known_is_refused(make, name):
    with pytest.raises(TypeError, match=rf"a {name} is not known.*timm's Vision.*tk\.Staged\("):
        backbones.staged(make())


def test_a_head_of_ones_own_is_kept_whole():
    model = mobilenet_v2(width_mult=0.25)
    model.classifier = nn.Linear(1280, 3)
    assert tk.staged(model).head is model.classifier


def test_stages_are_saved_and_loaded_into_a_network_of_the_same_kind(tmp_path):
    data = (torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))
    phase = tk.linear_probe(1, cache=True)
    run = tk.fit(tk.staged(_torchvision_vit()), tk.classification(), data, plan=[phase])
    again = tk.load(run.save(tmp_path), model=tk.staged(_torchvision_vit()))
    with torch.no_grad():
        assert torch.equal(again(data[0]), run.model(data[0]))


@pytest.mark.parametrize(
    ("name", "kept", "stages"),
    [
        ("resnet10t", 2, ["stem", "layer1", "layer2", "pool", "head"]),
        ("convnext_atto", 1, ["stem", "blocks.0", "pool", "head"]),
        ("vit_tiny_patch16_224", 1, ["embedding", "blocks.0", "norm", "pool", "head"]),
        ("regnetx_002", None, ["features", "head"]),
    ],
)
def test_networks_of_timm_load_by_name_with_a_head_for_the_labels(name, kept, stages):
    model = models.load(name, labels=["a", "b"], pretrained=False, layers=kept)
    assert model.stage_names == stages
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 2)
