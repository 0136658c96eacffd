"""Known image networks as ordered stages. The one idea: take apart, never build again.

A network of torchvision or timm keeps its own modules and weights; only the order in which its
forward method calls them is written down here, so that layer groups, freezing and the feature cache
know it. What comes out is what the network itself computes, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transferkit.layers import Staged

Stages = list[tuple[str, nn.Module]]

# what a subclass may override, so that the order of the calls would be another
_ORDER = ("forward", "_forward_impl", "forward_features", "forward_head")


class Parts(NamedTuple):
    """A network from input to output.

    `stem`, `layers` (the repeated ones) and `neck` (which fits the last of the layers only), then
    `after`, which ends in features `(batch, width)`, and the head for these.
    """

    stem: Stages
    layers: Stages
    neck: Stages
    after: Stages
    head: nn.Module


def staged(
    model: nn.Module, labels: Sequence[str] | None = None,
    prepare: Callable[[Any], Any] | None = None, name: str = "",
) -> Staged:  # fmt: skip
    """A network of torchvision or timm as a `Staged` that shares its modules.

    Of torchvision: ResNet, EfficientNet, MobileNetV2 and V3, ConvNeXt, VisionTransformer; of timm:
    ResNet, EfficientNet, ConvNeXt, VisionTransformer. The last stage is "head": for labels of one's
    own, `model.head = nn.Linear(width, classes)`.

    Args:
        labels: names of the classes, one for each output.
        prepare, name: as in `Staged`; `transferkit.models.image_inputs` makes a `prepare`.

    Returns:
        A model of float images `(batch, 3, height, width)` with the outputs of `model`.

    Raises:
        TypeError: the order of the network's layers is not known.

    Example:
        >>> from torchvision.models import resnet18
        >>> model = tk.staged(resnet18())
        >>> [group.name for group in tk.layers.groups(model)]
        ['stem', 'layer1', 'layer2', 'layer3', 'layer4', 'pool', 'head']
    """
    parts = divide(model)
    stages = [*parts.stem, *parts.layers, *parts.neck, *parts.after, ("head", parts.head)]
    found, before = Staged(stages, labels, prepare, name), set(model.modules())
    for module in found.modules():  # those that only hold others begin in the network's mode
        if module not in before:
            module.training = model.training
    return found


def divide(model: nn.Module) -> Parts:
    """The parts of a known network; see `staged`.

    Raises:
        TypeError: the order of the network's layers is not known.
    """
    for kind in type(model).__mro__:
        known = _KNOWN.get(f"{kind.__module__}.{kind.__qualname__}")
        if known is not None and all(_same(model, kind, method) for method in _ORDER):
            return known(model)
    kinds = ", ".join(name.partition(".")[0] + "'s " + name.rpartition(".")[2] for name in _KNOWN)
    raise TypeError(
        f"the order of the layers of a {type(model).__name__} is not known, but one of {kinds} is "
        "expected: for another network list the stages yourself, tk.Staged([(name, stage), ...])"
    )


def _same(model: nn.Module, kind: type, method: str) -> bool:
    of_kind = getattr(kind, method, None)
    return getattr(type(model), method, None) is of_kind and method not in vars(model)


def _flat(pool: nn.Module) -> nn.Module:
    return nn.Sequential(pool, nn.Flatten())


def _numbered(name: str, modules: Iterable[nn.Module]) -> Stages:
    return [(f"{name}.{at}", module) for at, module in enumerate(modules)]


def _with_dropout(rate: float, head: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Dropout(rate), head) if rate else head


def _divided(classifier: nn.Module) -> tuple[Stages, nn.Module]:
    # the hidden layers of a classifier as a stage, if it has some; its last one with its dropout
    if type(classifier).forward is not nn.Sequential.forward:
        return [], classifier
    layers = list(classifier)
    at = len(layers) - 1
    at -= at > 0 and isinstance(layers[at - 1], nn.Dropout)
    hidden = [("hidden", nn.Sequential(*layers[:at]))] if at else []
    return hidden, nn.Sequential(*layers[at:]) if at < len(layers) - 1 else layers[at]


# ---- torchvision --------------------------------------------------------------------------------


def _resnet(model: nn.Module) -> Parts:
    stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
    layers = [(f"layer{i}", getattr(model, f"layer{i}")) for i in range(1, 5)]
    return Parts([("stem", stem)], layers, [], [("pool", _flat(model.avgpool))], model.fc)


def _convolutional(model: nn.Module) -> Parts:
    stem, *blocks, neck = model.features  # the last convolution widens what the blocks give
    hidden, head = _divided(model.classifier)
    pool = getattr(model, "avgpool", None) or nn.AdaptiveAvgPool2d(1)  # MobileNetV2 has none
    after = [("pool", _flat(pool)), *hidden]
    return Parts([("stem", stem)], _numbered("blocks", blocks), [("neck", neck)], after, head)


def _convnext(model: nn.Module) -> Parts:
    stem, *blocks = model.features
    norm, head = _divided(model.classifier)
    neck = [("pool", model.avgpool), *norm]
    return Parts([("stem", stem)], _numbered("blocks", blocks), neck, [], head)


class PatchEmbedding(nn.Module):
    """Images to the tokens of torchvision's VisionTransformer, the class token first."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.patches = _only(model, "conv_proj")
        self.position = nn.ParameterDict({"embedding": model.encoder.pos_embedding})
        self.dropout = model.encoder.dropout

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches._process_input(images)
        first = self.patches.class_token.expand(len(images), -1, -1)
        tokens = torch.cat([first, patches], dim=1)
        return self.dropout(tokens + self.position["embedding"])


class FirstToken(nn.Module):
    """The vector of the class token: (batch, tokens, width) → (batch, width)."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]


def _vit(model: nn.Module) -> Parts:
    blocks = _numbered("blocks", model.encoder.layers)
    hidden, head = _divided(model.heads)
    after = [("norm", model.encoder.ln), ("pool", FirstToken()), *hidden]
    return Parts([("embedding", PatchEmbedding(model))], blocks, [], after, head)


# ---- timm ---------------------------------------------------------------------------------------


def _timm_resnet(model: nn.Module) -> Parts:
    stem = nn.Sequential(model.conv1, model.bn1, model.act1, model.maxpool)
    layers = [(f"layer{i}", getattr(model, f"layer{i}")) for i in range(1, 5)]
    head = _with_dropout(float(model.drop_rate), model.fc)
    return Parts([("stem", stem)], layers, [], [("pool", model.global_pool)], head)


def _timm_efficientnet(model: nn.Module) -> Parts:
    stem = [("stem", nn.Sequential(model.conv_stem, model.bn1))]
    neck = [("neck", nn.Sequential(model.conv_head, model.bn2))]
    head = _with_dropout(model.drop_rate, model.classifier)
    blocks = _numbered("blocks", model.blocks)
    return Parts(stem, blocks, neck, [("pool", model.global_pool)], head)


def _timm_convnext(model: nn.Module) -> Parts:
    last = model.head
    known = ("global_pool", "norm", "flatten", "pre_logits")  # one of its two heads lacks some
    inside = [getattr(last, name) for name in known if hasattr(last, name)]
    neck = [("neck", nn.Sequential(model.norm_pre, *inside))]
    head = _with_dropout(last.drop.p, last.fc)
    return Parts([("stem", model.stem)], _numbered("blocks", model.stages), neck, [], head)


class TimmEmbedding(nn.Module):
    """Images to the tokens of timm's VisionTransformer, by its own code for its many variants."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = _only(model, "patch_embed", "pos_drop", "patch_drop", "norm_pre")

    def forward(self, images: Tensor) -> Tensor:
        part = self.model
        return part.norm_pre(part.patch_drop(part._pos_embed(part.patch_embed(images))))


class TimmPool(nn.Module):
    """Tokens (batch, tokens, width) to (batch, width), as timm's VisionTransformer does it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = _only(model, "attn_pool", "fc_norm", parameters=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.fc_norm(self.model.pool(tokens))


def _timm_vit(model: nn.Module) -> Parts:
    after = [("norm", model.norm), ("pool", TimmPool(model))]
    head = _with_dropout(model.head_drop.p, model.head)
    return Parts([("embedding", TimmEmbedding(model))], _numbered("blocks", model.blocks), [],
                 after, head)  # fmt: skip


def _only(model: nn.Module, *children: str, parameters: bool = True) -> nn.Module:
    # The same model with some of its children: its methods work, and nothing is registered twice.
    part = copy.copy(model)
    part._modules = {name: model._modules[name] for name in children if name in model._modules}
    part._parameters = dict(model._parameters) if parameters else {}
    return part


_KNOWN: dict[str, Callable[[nn.Module], Parts]] = {
    "torchvision.models.resnet.ResNet": _resnet,
    "torchvision.models.efficientnet.EfficientNet": _convolutional,
    "torchvision.models.mobilenetv2.MobileNetV2": _convolutional,
    "torchvision.models.mobilenetv3.MobileNetV3": _convolutional,
    "torchvision.models.convnext.ConvNeXt": _convnext,
    "torchvision.models.vision_transformer.VisionTransformer": _vit,
    "timm.models.resnet.ResNet": _timm_resnet,
    "timm.models.efficientnet.EfficientNet": _timm_efficientnet,
    "timm.models.convnext.ConvNeXt": _timm_convnext,
    "timm.models.vision_transformer.VisionTransformer": _timm_vit,
}
