"""Parameter-efficient fine-tuning. The one idea: the backbone stays; a few tensors beside it learn.

Every method here wraps some layers of a `Staged` model, freezes all else but the head, and leaves a
plain model behind: layer groups, phases, caching and storing see nothing new. What is wrapped keeps
its weights under the name `base_layer`, so what was added can be told from what was there.

LoRA's and AdaLoRA's layers are those of the peft library. The other three are a few lines each and
our own: peft keeps the factors of IA3 in matrices, which weight decay would pull towards 0, has no
bottleneck adapters, and its prefixes need a model of transformers as a whole.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transferkit import checkpoint, layers
from transferkit.checks import require
from transferkit.layers import Staged

Targets = str | Sequence[str]
ADAPTER = "adapter.safetensors"
_NAME = "default"  # what peft calls the one adapter that there is
_MEMORY = 0.85  # of AdaLoRA's running means, both, as its authors set them
# Their forward methods read the weights of the layers inside, past anything wrapped around these.
_SEALED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclass
class Adaptation:
    """What `model.adaptation` says of an adapted model.

    Attributes:
        method: a key of `METHODS`.
        settings: its arguments, as JSON can hold them.
        base: the recipe of the model before, or None.
    """

    method: str
    settings: dict
    base: dict | None


# ---- the methods --------------------------------------------------------------------------------


def lora(
    model: Staged, r: int = 8, alpha: float = 16.0, targets: Targets = "attention",
    dropout: float = 0.0, seed: int = 0,
) -> Staged:  # fmt: skip
    r"""Learn a low-rank change of weight matrices: $Wx + \frac{\alpha}{r}\,BAx$ (Hu et al. 2022).

    $A$, `(r, inputs)`, starts random and $B$, `(outputs, r)`, at zero, so nothing changes at first.
    In a convolution $A$ has the kernel's size and $B$ is 1 by 1. `merge` adds the change to $W$.

    Args:
        model: changed in place: the backbone is frozen, the head and what is added are trained.
        r, alpha: the rank of the change, and what it is scaled by, over r.
        targets: "attention", the linear layers in it; "all", every linear layer and every
            convolution without groups and dilation of the backbone; or name patterns, as in
            `layers.matching`.
        dropout: probability of dropping a value on its way to $A$.
        seed: of the start of $A$.

    Returns:
        The same model, whose `adaptation` and `recipe` say what was done.

    Raises:
        TypeError: the model is not `Staged`.
        ValueError: it is adapted already, a setting is out of range, or no layer is a target.

    Example:
        >>> model = tk.Staged([("body", nn.Linear(4, 8)), ("head", nn.Linear(8, 2))])
        >>> tk.summary(tk.lora(model, r=2, targets="all"))
        group  parameters  trainable  mode
        body           64         24  train
        head           18         18  train
        total          82         42
    """
    from peft import LoraConfig

    settings = {"r": r, "alpha": alpha, "targets": targets, "dropout": dropout, "seed": seed}
    chosen = _low_rank_targets(model, settings)
    how = {"r": r, "lora_alpha": alpha, "lora_dropout": dropout}
    _inject(model, LoraConfig(target_modules=_exactly(chosen), **how), seed)
    return _adapted(model, Adaptation("lora", settings, model.recipe))


def adalora(
    model: Staged, r: int = 8, start: int = 12, alpha: float = 16.0,
    targets: Targets = "attention", dropout: float = 0.0, orthogonality: float = 0.1,
    warmup: float = 0.1, final: float = 0.3, seed: int = 0,
) -> Staged:  # fmt: skip
    r"""Learn a low-rank change and how to divide the rank between matrices (Zhang et al. 2023).

    The change is $\frac{\alpha}{\text{start}}\,P\Lambda Q$ with $\Lambda$, diagonal, zero at first.
    In `fit`, every update scores the triplets of a singular value and its two vectors, and sets the
    values of the lowest to zero; see `Allocation`. The scores are buffers of the layers, so they
    are stored with the run; `merge` adds the change to the weights. The budget is reached late in a
    phase, perhaps after its best epoch: `fit(..., restore="last")` keeps to it.

    Args:
        model: as in `lora`.
        r, start: triplets a matrix that are left on average, and that each begins with.
        alpha, dropout, seed: as in `lora`; the seed is of $P$ and $Q$.
        targets: as in `lora`, but linear layers alone.
        orthogonality: weight of the term that keeps $P$ and $Q$ orthogonal.
        warmup, final: shares of a phase's updates, before any triplet is dropped and after the last
            was; in between their number falls along a cubic curve.

    Returns, raises: as `lora`.

    Example:
        >>> model = tk.Staged([("body", nn.Linear(4, 8)), ("head", nn.Linear(8, 2))])
        >>> model = tk.adalora(model, r=1, start=2, targets="all")
        >>> model.adaptation.method, model.adaptation.settings["start"]
        ('adalora', 2)
    """
    from peft import AdaLoraConfig

    settings = {"r": r, "start": start, "alpha": alpha, "targets": targets, "dropout": dropout,
                "orthogonality": orthogonality, "warmup": warmup, "final": final,
                "seed": seed}  # fmt: skip
    require(
        SimpleNamespace(**settings),
        start=(isinstance(start, int) and start >= r, f"a whole number of at least r, {r}"),
        orthogonality=(0 <= orthogonality < math.inf, "a weight of at least 0"),
        warmup=(0 <= warmup < 1, "a share in [0, 1)"),
        final=(0 <= final < 1 - warmup, "a share in [0, 1 - warmup)"),
    )
    chosen = _low_rank_targets(model, settings, nn.Linear)
    # the library asks for a number of steps, for an allocation of its own that is not used here
    how = {"init_r": start, "target_r": r, "lora_alpha": alpha, "lora_dropout": dropout}
    _inject(model, AdaLoraConfig(target_modules=_exactly(chosen), total_step=1, **how), seed)
    for layer in _wrappers(model).values():
        layer.register_buffer("kept", torch.ones_like(layer.lora_E[_NAME]))
        for kind, parameter in _triplets(layer).items():
            layer.register_buffer(f"{kind}_importance", torch.zeros_like(parameter))
            layer.register_buffer(f"{kind}_uncertainty", torch.zeros_like(parameter))
    return _adapted(model, Allocation("adalora", settings, model.recipe))


def ia3(model: Staged, targets: Targets = "paper") -> Staged:
    """Learn one factor a channel of some activations, from 1 (IA3: Liu et al. 2022).

    In attention the outputs of a layer are multiplied, and so they are anywhere else but in the
    layer that ends a feed-forward block (a linear layer that narrows): there the inputs are, the
    block's inner activations. `merge` multiplies the weights instead.

    Args:
        model: as in `lora`.
        targets: "paper", the keys and values of attention and the end of each feed-forward block;
            "attention"; "all", every linear layer and convolution; or name patterns.

    Returns, raises: as `lora`.

    Example:
        >>> model = tk.Staged([("body", nn.Linear(4, 8)), ("head", nn.Linear(8, 2))])
        >>> model = tk.ia3(model, targets="all")
        >>> {name: part.numel() for name, part in model.body.named_parameters()}
        {'scale': 8, 'base_layer.weight': 32, 'base_layer.bias': 8}
    """
    settings = {"targets": targets}
    found = _candidates(model, (nn.Linear, nn.Conv2d))
    told = {"paper": [name for name in found if _is_key_or_value(name)] + _narrowing(found)}
    for name, layer in _chosen(model, targets, found, told).items():
        _replace(model, name, Rescaled(layer, inputs=name in _narrowing(found)))
    return _adapted(model, Adaptation("ia3", settings, model.recipe))


def adapters(
    model: Staged, bottleneck: int = 64, targets: Targets = "sublayers", seed: int = 0
) -> Staged:
    """Insert a small network with a skip connection after layers (Houlsby et al. 2019).

    An adapter is `y + up(gelu(down(y)))`, and `up` starts at zero, so nothing changes at first. Its
    place is that of the paper: after the projection that ends a sub-layer, before that is added to
    its input and normalised. Unlike there the layer norms stay frozen;
    `tk.unfreeze(model, "*.LayerNorm")` trains them too.

    Args:
        model: as in `lora`.
        bottleneck: the width in between, at least 1.
        targets: "sublayers", after each attention and each feed-forward block; "attention" or
            "all", after each linear layer (and convolution) there; or name patterns.
        seed: of the start of `down`.

    Returns, raises: as `lora`.

    Example:
        >>> model = tk.Staged([("body", nn.Linear(4, 8)), ("head", nn.Linear(8, 2))])
        >>> model = tk.adapters(model, bottleneck=2, targets="all")
        >>> sum(part.numel() for part in model.body.parameters() if part.requires_grad)
        42
    """
    settings = {"bottleneck": bottleneck, "targets": targets, "seed": seed}
    require(SimpleNamespace(**settings), bottleneck=(bottleneck >= 1, "at least 1, such as 64"))
    found = _candidates(model, (nn.Linear, nn.Conv2d))
    told = {"sublayers": _last_of_attention(found) + _narrowing(found)}
    chosen = _chosen(model, targets, found, told)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, layer in chosen.items():
            _replace(model, name, Bottleneck(layer, bottleneck))
    return _adapted(model, Adaptation("adapters", settings, model.recipe))


def prefix(
    model: Staged, length: int = 10, targets: Targets = "attention", seed: int = 0
) -> Staged:
    """Let attention look at trained keys and values in front of the text's (Li & Liang 2021).

    Each attention gets `length` of its own, without the network that the paper draws them from
    while it trains. There is no neutral start: some weight goes to the prefix at once, so the
    outputs change, the more the shorter the text. It cannot be merged into the weights.

    Args:
        model: as in `lora`; its attention must be of the kind BERT has in transformers.
        length: how many keys and values, at least 1.
        targets: "attention", all of them, or name patterns.
        seed: of their start, normal with deviation 0.02.

    Returns, raises: as `lora`.

    Example:
        >>> config = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1,
        ...           "intermediate_size": 16, "vocab_size": 50, "max_position_embeddings": 16}
        >>> stages = tk.models.text_stages(tk.models.bert(config, None), None, "tiny")
        >>> model = tk.prefix(tk.Staged([*stages, ("head", nn.Linear(8, 2))]), length=5)
        >>> [tuple(part.shape) for name, part in model.named_parameters() if name.endswith("keys")]
        [(2, 5, 4)]
    """
    settings = {"length": length, "targets": targets, "seed": seed}
    require(SimpleNamespace(**settings), length=(length >= 1, "at least 1, such as 10"))
    found = {n: m for n, m in _candidates(model, nn.Module).items() if _takes_a_prefix(m)}
    what = "attention of the kind BERT has in transformers"
    chosen = _chosen(model, targets, found, {"attention": list(found)}, what)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, attention in chosen.items():
            _replace(model, name, Prefixed(attention, length))
    return _adapted(model, Adaptation("prefix", settings, model.recipe))


def merge(model: Staged) -> Staged:
    """Put what LoRA, AdaLoRA or IA3 learned into the weights: the plain architecture again.

    The outputs stay as they are but for rounding. The model is changed in place; afterwards all its
    parameters can be trained, as those of a model that was just loaded.

    Raises:
        ValueError: the model is not adapted, or by a method that no weights are equivalent to.

    Example:
        >>> model = tk.Staged([("body", nn.Linear(4, 8)), ("head", nn.Linear(8, 2))])
        >>> model = tk.merge(tk.lora(model, targets="all"))
        >>> type(model.body).__name__, all(part.requires_grad for part in model.parameters())
        ('Linear', True)
    """
    adaptation = _adaptation(model)
    if adaptation.method not in ("lora", "adalora", "ia3"):
        what = f"what {adaptation.method} added computes something that no weights of the plain"
        raise ValueError(f"{what} architecture do: keep the model as it is, run.save stores it all")
    for name, wrapper in _wrappers(model).items():
        if isinstance(wrapper, Rescaled):
            wrapper.fold()
        else:
            wrapper.merge(safe_merge=True)
        _replace(model, name, wrapper.base_layer)
    del model.adaptation
    model.recipe = adaptation.base
    return model.requires_grad_(True)


# ---- the layers ---------------------------------------------------------------------------------


class Rescaled(nn.Module):
    """A layer whose outputs, or inputs, are multiplied by one trained factor a channel.

    The factors are a vector, `(channels,)`, so that weight decay leaves them alone.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, inputs: bool):
        super().__init__()
        self.base_layer, self.inputs = layer, inputs
        self.spread = (-1,) + (1,) * (layer.weight.dim() - 2)  # over the pixels of a feature map
        self.scale = nn.Parameter(layer.weight.new_ones(layer.weight.shape[1 if inputs else 0]))

    def forward(self, x: Tensor) -> Tensor:
        if self.inputs:
            return self.base_layer(self._scaled(x))
        return self._scaled(self.base_layer(x))

    def _scaled(self, x: Tensor) -> Tensor:
        return (x * self.scale.view(self.spread)).to(x.dtype)

    @torch.no_grad()
    def fold(self) -> None:
        """Multiply the layer's own weights by the factors."""
        layer = self.base_layer
        if self.inputs:  # of a linear layer
            layer.weight.mul_(self.scale)
        else:
            layer.weight.mul_(self.scale.view(-1, 1, *self.spread[1:]))
            if layer.bias is not None:
                layer.bias.mul_(self.scale)


class Bottleneck(nn.Module):
    """A layer followed by an adapter: `y + up(gelu(down(y)))` of its outputs y."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, width: int):
        super().__init__()
        self.base_layer, channels = layer, layer.weight.shape[0]
        if isinstance(layer, nn.Conv2d):
            self.down, self.up = nn.Conv2d(channels, width, 1), nn.Conv2d(width, channels, 1)
        else:
            self.down, self.up = nn.Linear(channels, width), nn.Linear(width, channels)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.down.to(layer.weight)
        self.up.to(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        return y + self.up(F.gelu(self.down(y)))


class Prefixed(nn.Module):
    """Attention with trained keys and values, each `(heads, length, size of a head)`, in front."""

    def __init__(self, attention: nn.Module, length: int):
        super().__init__()
        self.base_layer = attention
        shape = (attention.num_attention_heads, length, attention.attention_head_size)
        start = (0.02 * torch.randn(shape).to(attention.key.weight) for _ in range(2))
        self.keys, self.values = map(nn.Parameter, start)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None, **others: Any) -> Any:
        if attention_mask is not None:  # True, or nothing to add: the prefix is always seen
            seen = True if attention_mask.dtype == torch.bool else 0.0
            attention_mask = F.pad(attention_mask, (self.keys.shape[1], 0), value=seen)
        return self.base_layer(hidden, attention_mask, **others | {"past_key_values": self})

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The prefix and then the text's: what an attention asks of its store of earlier keys."""
        pairs = ((self.keys, keys), (self.values, values))
        return tuple(
            torch.cat([own.to(given.dtype).expand(len(given), -1, -1, -1), given], dim=2)
            for own, given in pairs
        )


class Allocation(Adaptation):
    """AdaLoRA's part in training: `fit` calls both methods of a model's `adaptation`."""

    def penalty(self, model: nn.Module) -> Tensor | float:
        r"""How far vectors are from orthogonal, `()`; 0 where the layers are frozen.

        It is $\gamma\,(\lVert P^\top P - I\rVert_F^2 + \lVert QQ^\top - I\rVert_F^2)$, summed
        over the layers.
        """
        pairs = [(layer.lora_B[_NAME].mT, layer.lora_A[_NAME]) for layer in _allocated(model)]
        grams = [rows @ rows.mT for pair in pairs for rows in pair]
        units = [torch.eye(len(g), dtype=g.dtype, device=g.device) for g in grams]
        terms = [(g - unit).square().sum() for g, unit in zip(grams, units, strict=True)]
        return self.settings["orthogonality"] * sum(terms)

    @torch.no_grad()
    def updated(self, model: nn.Module, update: int, updates: int) -> None:
        """Score the triplets and zero the values of the lowest; after the optimizer's step.

        A parameter is as important as the running mean of |parameter * gradient| times that of its
        deviation; a triplet as its value plus the mean entry of either vector. Nothing is read back
        to the host: how many are left is a function of the update alone.
        """
        found = [layer for layer in _allocated(model)
                 if all(part.grad is not None for part in _triplets(layer).values())]  # fmt: skip
        if not found:
            return
        last = self._last(updates)
        if update <= last:
            scores = torch.cat([_scores(layer) for layer in found])
            best = scores.topk(self.budget(len(found), update, updates)).indices
            kept = torch.zeros_like(scores).scatter_(0, best, 1.0)
            for layer, part in zip(found, kept.split(self.settings["start"]), strict=True):
                layer.kept.copy_(part.unsqueeze(1))
        for layer in found:
            layer.lora_E[_NAME].mul_(layer.kept)

    def budget(self, matrices: int, update: int, updates: int) -> int:
        """How many triplets are left after an update of a phase."""
        start, end = (self.settings[name] * matrices for name in ("start", "r"))
        first, last = math.ceil(self.settings["warmup"] * updates), self._last(updates)
        if update < first:
            return start
        left = 1.0 - (update - first + 1) / max(1, last - first + 1)
        return end + int((start - end) * max(0.0, left) ** 3)

    def _last(self, updates: int) -> int:
        # the update after which the division stands
        return max(0, updates - 1 - math.ceil(self.settings["final"] * updates))


def _allocated(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in _wrappers(model).values() if layer.lora_E[_NAME].requires_grad]


def _triplets(layer: nn.Module) -> dict[str, Tensor]:
    # Q (start, inputs), the values (start, 1) and P (outputs, start), as the peft library has them.
    return {kind: getattr(layer, f"lora_{kind}")[_NAME] for kind in "AEB"}


def _scores(layer: nn.Module) -> Tensor:
    parts = []
    for kind, parameter in _triplets(layer).items():
        mean, deviation = (layer.get_buffer(f"{kind}_{n}") for n in ("importance", "uncertainty"))
        now = (parameter * parameter.grad).abs()
        mean.lerp_(now, 1 - _MEMORY)
        deviation.lerp_((now - mean).abs(), 1 - _MEMORY)
        parts.append((mean * deviation).mean(0 if kind == "B" else 1))
    return sum(parts)


# ---- which layers -------------------------------------------------------------------------------


def _candidates(model: Staged, kinds: type | tuple[type, ...]) -> dict[str, nn.Module]:
    # Modules of some kinds in the backbone, by name.
    if not isinstance(model, Staged):
        raise TypeError(
            f"the model is a {type(model).__name__}, but a staged one, whose head is known, is "
            "expected: wrap it as tk.Staged([(name, stage), ...]) with the head last"
        )
    if getattr(model, "adaptation", None) is not None:
        remedy = "tk.merge(model), or start from the plain model"
        raise ValueError(f"the model has {model.adaptation.method} already: {remedy}")
    kept_out = [model.stage_names[-1]]
    kept_out += [name for name, module in model.named_modules() if isinstance(module, _SEALED)]
    start = tuple(f"{name}." for name in kept_out)
    return {n: m for n, m in model.named_modules()
            if isinstance(m, kinds) and not f"{n}.".startswith(start)}  # fmt: skip


def _chosen(
    model: Staged, targets: Targets, found: dict[str, nn.Module], told: dict[str, list[str]],
    what: str = "linear layer or convolution",
) -> dict[str, nn.Module]:  # fmt: skip
    # Those of the candidates that are meant. Freezes the model, now that nothing can go wrong.
    told = {"attention": [name for name in found if _attention_of(name)], "all": list(found)} | told
    if isinstance(targets, str) and targets in told:
        meant = [told[targets]]
    else:
        patterns = [targets] if isinstance(targets, str) else targets
        meant = [_matched(model, pattern, found) for pattern in patterns]
    if not meant or not all(meant):
        few = ", ".join(list(found)[:4]) + ", ..." * (len(found) > 4)
        known = f"it has {len(found)}: {few}" if found else "it has none"
        raise ValueError(
            f"targets is {targets!r}, but there the backbone has no {what} that could be wrapped "
            f"({known}): give {', '.join(map(repr, told))} or patterns such as 'layer.[0-2]'"
        )
    model.requires_grad_(False)
    return {name: layer for name, layer in found.items() if any(name in names for names in meant)}


def _matched(model: Staged, pattern: str, found: dict[str, nn.Module]) -> list[str]:
    reached = layers.matching(model, [pattern])
    return [name for name, module in found.items()
            if any(f"{name}.{own}" in reached for own, _ in module.named_parameters())]  # fmt: skip


def _attention_of(name: str) -> str | None:
    # The path of the attention that a layer is in, told by its name.
    parts = name.split(".")
    for end, part in enumerate(parts[:-1], 1):
        if "attention" in part.lower() or "attn" in part.lower():
            return ".".join(parts[:end])
    return None


def _is_key_or_value(name: str) -> bool:
    last = name.rpartition(".")[2].removesuffix("_proj").removesuffix("_lin")
    return last in ("key", "value", "k", "v") and _attention_of(name) is not None


def _narrowing(found: Mapping[str, nn.Module]) -> list[str]:
    # The linear layers that end a feed-forward block.
    return [n for n, m in found.items() if isinstance(m, nn.Linear)
            and m.in_features > m.out_features and _attention_of(n) is None]  # fmt: skip


def _last_of_attention(found: Mapping[str, nn.Module]) -> list[str]:
    # An attention's own output layer comes last in it, in BERT and elsewhere.
    last = {_attention_of(name): name for name in found}
    return [name for attention, name in last.items() if attention is not None]


def _takes_a_prefix(module: nn.Module) -> bool:
    parts = ("query", "key", "value", "num_attention_heads", "attention_head_size")
    whole = all(hasattr(module, part) for part in parts)
    return whole and "past_key_values" in inspect.signature(module.forward).parameters


def _low_rank_targets(
    model: Staged, settings: dict, kinds: Any = (nn.Linear, nn.Conv2d)
) -> dict[str, nn.Module]:
    given = SimpleNamespace(**settings)
    require(
        given,
        r=(isinstance(given.r, int) and given.r >= 1, "a whole number of at least 1, such as 8"),
        alpha=(0 < given.alpha < math.inf, "a number above 0, such as 2 * r"),
        dropout=(0 <= given.dropout < 1, "a probability in [0, 1)"),
    )
    found = _candidates(model, kinds)
    found = {n: m for n, m in found.items() if isinstance(m, nn.Linear) or _is_simple(m)}
    simple = " (or convolution without groups, dilation and special padding)"
    what = "linear layer" + simple * (kinds is not nn.Linear)
    return _chosen(model, given.targets, found, {}, what)


def _is_simple(layer: nn.Conv2d) -> bool:
    # peft gives the low-rank path none of these, so it would not be a change of the same weights
    return layer.groups == 1 and max(layer.dilation) == 1 and layer.padding_mode == "zeros"


# ---- in and out of a model ----------------------------------------------------------------------


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    holder = model.get_submodule(parent)
    mode = holder.get_submodule(last).training
    holder._modules[last] = new.train(mode)


def _exactly(names: Mapping[str, nn.Module]) -> str:
    return "|".join(map(re.escape, names))  # peft would take a list for the ends of names


def _inject(model: Staged, config: Any, seed: int) -> None:
    from peft import inject_adapter_in_model

    modes = {name: module.training for name, module in model.named_modules()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, _NAME)
    del model.peft_config  # `model.adaptation` says it
    for name, wrapper in _wrappers(model).items():
        wrapper.train(modes[name])


def _adapted(model: Staged, adaptation: Adaptation) -> Staged:
    settings = {name: value if isinstance(value, (str, int, float)) else list(value)
                for name, value in adaptation.settings.items()}  # fmt: skip
    adaptation.settings, model.adaptation = settings, adaptation
    model.get_submodule(model.stage_names[-1]).requires_grad_(True)
    if adaptation.base is not None:
        model.recipe = {"loader": "transferkit.peft.rebuild", "arguments": asdict(adaptation)}
    return model


def _adaptation(model: nn.Module) -> Adaptation:
    if getattr(model, "adaptation", None) is None:
        raise ValueError(
            f"the model holds none of {', '.join(METHODS)}: add one, as tk.lora(model)"
        )
    return model.adaptation


def _wrappers(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if "base_layer" in m._modules}


def rebuild(base: dict, method: str, settings: dict) -> Staged:
    """The architecture of an adapted model, from what `run.save` stored of it.

    Raises:
        ValueError: there is no such method, or the base model is not one a file may name.
    """
    return _method(method)(checkpoint.build(base, "the file of the adapted model"), **settings)


def _method(name: str) -> Callable[..., Staged]:
    if name not in METHODS:
        raise ValueError(f"the method is {name!r}: give one of {', '.join(METHODS)}")
    return METHODS[name]


METHODS = {"lora": lora, "adalora": adalora, "ia3": ia3, "adapters": adapters, "prefix": prefix}


# ---- one backbone, many tasks -------------------------------------------------------------------


def _parts(model: Staged) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    # The tensors that belong to the task (what was added, and the head), and those of the backbone,
    # under the names they have in the plain model.
    head, wrapped = f"{model.stage_names[-1]}.", tuple(f"{name}." for name in _wrappers(model))
    own, backbone = {}, {}
    for name, tensor in checkpoint.tensors_of(model).items():
        is_added = name.startswith(wrapped) and ".base_layer." not in name
        if is_added or name.startswith(head):
            own[name] = tensor
        else:
            backbone[name.replace(".base_layer.", ".")] = tensor
    return own, backbone


def save_adapter(model: Staged, directory: str | Path) -> Path:
    """Store what was added and the head, without the backbone: the file `adapter.safetensors`.

    It holds a hash of the backbone's tensors, so that it fits no other. For a model that stands
    on its own use `run.save`.

    Raises:
        ValueError: the model is not adapted.
    """
    adaptation, (own, backbone) = _adaptation(model), _parts(model)
    about = {"method": adaptation.method, "settings": adaptation.settings, "labels": model.labels}
    about["backbone"] = checkpoint.weights_hash(backbone)
    checkpoint.write(Path(directory) / ADAPTER, own, about)
    return Path(directory)


def load_adapter(model: Staged, directory: str | Path) -> Staged:
    """Give a model the adapter and the head that `save_adapter` stored; in place, in eval mode.

    Args:
        model: the plain model, or one adapted by the same method and settings, whose tensors are
            replaced: so one backbone serves several tasks in turn.

    Raises:
        FileNotFoundError: the directory holds no adapter.
        ValueError: the file is damaged, or made for another backbone, head or adaptation.
    """
    path = Path(directory) / ADAPTER
    tensors, about = checkpoint.read(path)
    if checkpoint.weights_hash(_parts(model)[1]) != about["backbone"]:
        remedy = "load the pre-trained model that it was trained on"
        raise ValueError(f"{path} was made for a backbone with other weights: {remedy}")
    has, needs = getattr(model, "adaptation", None), (about["method"], about["settings"])
    heads = {n: t for n, t in tensors.items() if n.startswith(f"{model.stage_names[-1]}.")}
    checkpoint.check(_head(model), heads, f"{path}, trained for the labels {about['labels']},")
    if has is None:
        _method(about["method"])(model, **about["settings"])
    elif (has.method, has.settings) != needs:
        stored = f"{needs[0]} with {needs[1]}"
        raise ValueError(f"{path} holds {stored}, but the model has {has.method}: load it afresh")
    own = _parts(model)[0]
    checkpoint.check(own, tensors, path)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    model.labels = about["labels"]
    return model.eval()


def _head(model: Staged) -> dict[str, Tensor]:
    start = f"{model.stage_names[-1]}."
    return {n: t for n, t in checkpoint.tensors_of(model).items() if n.startswith(start)}
