"""Adapters: what they compute, what merging makes of them, and what is said about bad requests."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import transferkit as tk
from transferkit import checkpoint
from transferkit import peft as tkpeft


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x):
        weights = (self.query(x) @ self.key(x).mT).softmax(-1)
        return self.out(weights @ self.value(x))


class Block(nn.Module):
    """A transformer layer by hand: widen to `inner`, narrow again."""

    def __init__(self, width, inner):
        super().__init__()
        self.attention, self.norm = Attention(width), nn.LayerNorm(width)
        self.widen, self.narrow = nn.Linear(width, inner), nn.Linear(inner, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        x = self.norm(x + self.attention(x))
        return x + self.dropout(self.narrow(F.gelu(self.widen(x))))


def _encoder(width=6, inner=10, seed=0, labels=("a", "b")) -> tk.Staged:
    torch.manual_seed(seed)
    stages = [("embed", nn.Linear(4, width))]
    stages += [(f"layer.{at}", Block(width, inner)) for at in range(2)]
    head = nn.Sequential(nn.Flatten(), nn.Linear(3 * width, len(labels)))
    return tk.Staged([*stages, ("head", head)], labels).eval()


def _convnet(seed=0) -> tk.Staged:
    torch.manual_seed(seed)
    stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU())
    block = nn.Sequential(
        nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 8, 1, bias=False),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    stages = [("stem", stem), ("block", block), ("head", nn.Linear(8, 2))]
    return tk.Staged(stages, ["a", "b"]).eval()


TEXT, IMAGE = torch.randn(5, 3, 4), torch.randn(5, 3, 9, 9)
LORA = {"targets": "all", "r": 3}
CASES = [
    (_encoder, TEXT, tk.lora, LORA),
    (_encoder, TEXT, tk.adalora, {"r": 2, "start": 4}),
    (_encoder, TEXT, tk.ia3, {}),
    (_encoder, TEXT, tk.adapters, {"bottleneck": 4}),
    (_convnet, IMAGE, tk.lora, LORA),
    (_convnet, IMAGE, tk.ia3, {"targets": ["stem", "block"]}),
    (_convnet, IMAGE, tk.adapters, {"bottleneck": 4, "targets": "all"}),
]


def _moved(model: nn.Module, seed: int = 1) -> nn.Module:
    # as if it had been trained: everything trainable is somewhere else
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def _trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("make", "inputs", "method", "how"), CASES)
def test_nothing_changes_until_something_is_trained(make, inputs, method, how):
    plain, model = make(), make()
    random = torch.get_rng_state()
    assert method(model, **how) is model
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model(inputs), plain(inputs))
    assert not torch.equal(_moved(model)(inputs), plain(inputs))


@pytest.mark.parametrize(("make", "inputs", "method", "how"), CASES)
def test_the_head_and_what_was_added_are_trained_and_the_backbone_is_not(make, inputs, method, how):
    before = dict(make().named_parameters())
    model = method(make(), **how)
    for name, parameter in model.named_parameters():
        plain = name.replace(".base_layer.", ".")
        added = plain not in before and ".ranknum" not in name  # a constant of peft's
        assert parameter.requires_grad == (added or plain.startswith("head"))
    assert {n.replace(".base_layer.", ".") for n, _ in model.named_parameters()} > before.keys()
    assert not any(module.training for module in model.modules())
    assert all(module.training for module in method(make().train(), **how).modules())


@settings(max_examples=12)
@given(
    r=st.integers(1, 9),
    alpha=st.floats(0.5, 64),
    targets=st.sampled_from(["attention", "all", "layer.1", ["*.query", "*.value"], "embed"]),
)
def test_lora_adds_a_low_rank_product_to_the_weights_that_were_asked_for(r, alpha, targets):
    plain, model = _encoder().double(), _moved(tk.lora(_encoder().double(), r, alpha, targets))
    tensors = dict(model.named_parameters())
    wrapped = {name.split(".lora_A")[0] for name in tensors if ".lora_A" in name}
    linear = {n for n, m in plain.named_modules() if isinstance(m, nn.Linear) and n[:4] != "head"}
    expected = {
        "attention": {name for name in linear if "attention" in name}, "all": linear,
        "layer.1": {name for name in linear if name.startswith("layer.1.")}, "embed": {"embed"},
    }.get(targets if isinstance(targets, str) else "",
          {n for n in linear if n.endswith(("query", "value"))})  # fmt: skip
    assert wrapped == expected
    with torch.no_grad():
        for name in wrapped:
            first = tensors[f"{name}.lora_A.default.weight"]
            second = tensors[f"{name}.lora_B.default.weight"]
            assert first.shape[0] == second.shape[1] == r
            plain.get_submodule(name).weight += alpha / r * second @ first
        plain.head.load_state_dict(model.head.state_dict())
    assert torch.allclose(model(TEXT.double()), plain(TEXT.double()), atol=1e-9)
    sizes = [m.in_features + m.out_features for n, m in plain.named_modules() if n in expected]
    added = sum(p.numel() for n, p in tensors.items() if ".lora_" in n)
    assert added == r * sum(sizes)


def test_a_name_means_the_layer_of_that_name_alone():
    names = ["a.b", "axb", "deep.a.b"]
    stages = [(name, nn.Linear(4, 4)) for name in names]
    model = tk.lora(tk.Staged([*stages, ("head", nn.Linear(4, 2))]), targets="a.b")
    assert {n.split(".lora_")[0] for n in _trained_names(model) if ".lora_" in n} == {"a.b"}


def test_lora_of_a_convolution_is_a_convolution_of_a_convolution():
    model = _moved(tk.lora(_convnet(), r=2, alpha=5.0, targets="stem"))
    layer, inputs = model.stem[0], IMAGE
    first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    base = F.conv2d(inputs, layer.base_layer.weight, layer.base_layer.bias, 2, 1)
    change = F.conv2d(F.conv2d(inputs, first, None, 2, 1), second)
    assert torch.allclose(layer(inputs), base + 5.0 / 2 * change, atol=1e-5)


def test_dropout_acts_on_the_low_rank_path_alone():
    model = _moved(tk.lora(_encoder(), r=2, alpha=2.0, targets="embed", dropout=0.25))
    layer = model.embed.train()
    torch.manual_seed(7)
    change = layer(TEXT) - layer.base_layer(TEXT)
    torch.manual_seed(7)
    kept = F.dropout(TEXT, 0.25)
    first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert torch.allclose(change, kept @ first.T @ second.T, atol=1e-5)
    assert (kept == 0).any()


def test_adalora_adds_vectors_weighted_by_singular_values():
    plain, model = _encoder(), _moved(tk.adalora(_encoder(), r=2, start=4, alpha=6.0))
    tensors = dict(model.named_parameters())
    names = [name.removesuffix(".lora_E.default") for name in tensors if ".lora_E" in name]
    assert len(names) == 8
    with torch.no_grad():
        for name in names:
            right, values, left = (tensors[f"{name}.lora_{kind}.default"] for kind in "AEB")
            change = left @ torch.diag(values.squeeze(1)) @ right
            plain.get_submodule(name).weight += 6.0 / 4 * change
        plain.head.load_state_dict(model.head.state_dict())
    assert torch.allclose(model(TEXT), plain(TEXT), atol=1e-4)


def test_adalora_keeps_the_triplets_that_the_peft_library_would_keep():
    from peft import AdaLoraConfig
    from peft.tuners.adalora.layer import RankAllocator

    model = _moved(tk.adalora(_encoder(), r=2, start=4, warmup=0.2, final=0.2))
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, beta1=0.85, beta2=0.85)
    theirs = RankAllocator(model, config, "default")
    budgets = []
    for update in range(10):
        torch.manual_seed(update)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)
        twin = copy.deepcopy(model)
        for name, parameter in twin.named_parameters():
            parameter.grad = model.get_parameter(name).grad
        theirs.update_ipt(twin)
        budgets.append(model.adaptation.budget(8, update, 10))
        if update <= 7:  # afterwards nothing is scored any more
            pattern = None
            if budgets[-1] < 32:
                pattern = theirs.mask_to_budget(twin, budgets[-1])
        model.adaptation.updated(model, update, 10)
        for name in pattern or {}:
            layer = model.get_submodule(name.removesuffix(".lora_E.default"))
            assert (layer.kept.view(-1) == 1).tolist() == pattern[name]
            assert torch.equal(layer.lora_E["default"], layer.lora_E["default"] * layer.kept)
            assert bool((layer.lora_E["default"] != 0).any()) == bool(layer.kept.any())
    # 16 + 16 (1 - (t - 1) / 6)^3, rounded down, from t = 1, the last update of the warm-up
    assert budgets == [32, 32, 25, 20, 18, 16, 16, 16, 16, 16]


@settings(max_examples=30)
@given(
    updates=st.integers(1, 200),
    warmup=st.floats(0, 0.6),
    final=st.floats(0, 0.39),
    extra=st.integers(0, 9),
)
def test_the_budget_of_adalora_falls_from_its_start_to_its_end(updates, warmup, final, extra):
    settings = {"r": 3, "start": 3 + extra, "warmup": warmup, "final": final}
    budgets = [tkpeft.Allocation("adalora", settings, None).budget(5, update, updates)
               for update in range(updates)]  # fmt: skip
    assert all(15 <= budget <= 5 * (3 + extra) for budget in budgets)
    assert budgets == sorted(budgets, reverse=True)
    if warmup + final <= 0.9 and updates >= 20:
        assert budgets[-1] == 15
        assert budgets[updates - 1 - math.ceil(final * updates)] == 15


def test_the_penalty_of_adalora_is_how_far_its_vectors_are_from_orthogonal():
    model = _moved(tk.adalora(_encoder(), r=1, start=2, targets="embed", orthogonality=0.5))
    left, right = model.embed.lora_B["default"], model.embed.lora_A["default"]
    expected = 0.5 * sum(
        torch.linalg.matrix_norm(gram - torch.eye(2)) ** 2
        for gram in (left.T @ left, right @ right.T)
    )
    assert torch.allclose(model.adaptation.penalty(model), expected)
    tk.freeze(model, "embed")
    assert model.adaptation.penalty(model) == 0


def test_ia3_scales_keys_values_and_the_inner_activations():
    model = _moved(tk.ia3(_encoder()))
    added = {n.rpartition(".")[0]: p for n, p in model.named_parameters() if n.endswith(".scale")}
    names = ("attention.key", "attention.value", "narrow")
    assert added.keys() == {f"layer.{at}.{name}" for at in range(2) for name in names}
    assert sum(scale.numel() for scale in added.values()) == 2 * (6 + 6 + 10)
    plain, x = _encoder().get_submodule("layer.0"), torch.randn(2, 3, 6)
    keys, values, narrow = (added[f"layer.0.{name}"] for name in names)
    inner = plain.attention
    weights = (inner.query(x) @ (inner.key(x) * keys).mT).softmax(-1)
    y = plain.norm(x + inner.out(weights @ (inner.value(x) * values)))
    y = y + plain.narrow(F.gelu(plain.widen(y)) * narrow)
    assert torch.allclose(model.get_submodule("layer.0")(x), y, atol=1e-5)


def test_ia3_agrees_with_the_peft_library():
    from peft import IA3Config, inject_adapter_in_model

    targets = r"layer\.\d\.(attention\.(key|value)|narrow)"
    config = IA3Config(target_modules=targets, feedforward_modules=r"layer\.\d\.narrow")
    theirs, ours = inject_adapter_in_model(config, _encoder()), tk.ia3(_encoder())
    with torch.no_grad():
        for name, scale in ours.named_parameters():
            if name.endswith(".scale"):
                scale.add_(torch.randn_like(scale))
                theirs.get_parameter(name.replace("scale", "ia3_l.default")).view(-1).copy_(scale)
    assert torch.allclose(ours(TEXT), theirs(TEXT), atol=1e-6)


def test_weight_decay_leaves_the_factors_of_ia3_alone():
    parts = tk.optim.parameter_groups(tk.layers.groups(tk.ia3(_encoder())), lr=1, weight_decay=1)
    decay = {name: part["weight_decay"] for part in parts for name in part["names"]}
    factors = [name for name in decay if name.endswith(".scale")]
    assert len(factors) == 6 and not any(decay[name] for name in factors)


def test_adapters_follow_each_sublayer_before_its_skip_connection():
    model = _moved(tk.adapters(_encoder(), bottleneck=4))
    wrapped = {n.split(".down")[0] for n, _ in model.named_parameters() if ".down." in n}
    assert wrapped == {f"layer.{at}.{n}" for at in range(2) for n in ("attention.out", "narrow")}
    block, x = model.get_submodule("layer.0"), torch.randn(2, 3, 6)
    layer = block.narrow
    y = F.linear(torch.ones(1, 10), layer.base_layer.weight, layer.base_layer.bias)
    inner = F.gelu(y @ layer.down.weight.T + layer.down.bias)
    expected = y + inner @ layer.up.weight.T + layer.up.bias
    assert torch.allclose(layer(torch.ones(1, 10)), expected, atol=1e-6)
    y = block.norm(x + block.attention(x))
    assert torch.allclose(block(x), y + layer(F.gelu(block.widen(y))), atol=1e-6)
    added = sum(p.numel() for n, p in model.named_parameters() if ".down." in n or ".up." in n)
    assert added == 4 * (2 * 6 * 4 + 6 + 4)  # Houlsby et al.: 2md + d + m an adapter


@pytest.mark.parametrize(("make", "inputs", "method", "how"), CASES)
def test_a_merged_model_is_the_plain_architecture_with_the_same_outputs(make, inputs, method, how):
    plain, model = make(), _moved(method(make(), **how))
    if method is tk.adapters:
        with pytest.raises(ValueError, match="adapters added computes something that no weights"):
            tk.merge(model)
        return
    outputs = model(inputs)
    assert tk.merge(model) is model
    # float32: a normalisation over a few numbers may magnify the last digit
    assert (model(inputs) - outputs).abs().max() < 1e-4
    assert str(model) == str(plain) and list(model.state_dict()) == list(plain.state_dict())
    assert _trained_names(model) == {name for name, _ in plain.named_parameters()}
    with pytest.raises(ValueError, match="the model holds none of lora"):
        tk.merge(model)


def test_merging_gives_the_recipe_of_the_plain_model_back():
    model = _encoder()
    model.recipe = base = {"loader": "transferkit.models.load", "arguments": {"name": "x"}}
    tk.lora(model, targets=("*.key",))
    assert model.recipe["loader"] == "transferkit.peft.rebuild"
    assert model.recipe["arguments"]["base"] == base
    assert model.recipe["arguments"]["settings"]["targets"] == ["*.key"]
    assert tk.merge(model).recipe == base


def test_the_start_depends_on_the_seed_alone():
    first, again, other = (tk.lora(_encoder(), seed=seed) for seed in (3, 3, 4))
    name = "layer.0.attention.query.lora_A.default.weight"
    assert torch.equal(first.get_parameter(name), again.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))


@pytest.mark.parametrize(
    ("method", "how", "message"),
    [
        (tk.lora, {"r": 0}, "r is 0: give a whole number"),
        (tk.lora, {"r": 2.5}, r"r is 2\.5: give a whole number"),
        (tk.lora, {"alpha": 0}, "alpha is 0: give a number above 0"),
        (tk.lora, {"alpha": math.nan}, "alpha is nan"),
        (tk.lora, {"dropout": 1.0}, r"dropout is 1\.0: give a probability"),
        (tk.lora, {"targets": "layer.7"}, r"called 'layer\.7': the nearest names are.*layer\.0"),
        (tk.lora, {"targets": "head"}, r"targets is 'head'.*it has 13: embed,.*'attention', 'all'"),
        (tk.lora, {"targets": []}, r"targets is \[\]"),
        (tk.lora, {"targets": ["embed", "*.norm"]}, r"no linear layer .*that could be wrapped"),
        (tk.adalora, {"start": 4}, "start is 4: give a whole number of at least r, 8"),
        (tk.adalora, {"warmup": 0.5, "final": 0.5}, r"final is 0\.5: give a share in \[0, 1 - "),
        (tk.ia3, {"targets": "head"}, "give 'attention', 'all', 'paper' or patterns"),
        (tk.adapters, {"bottleneck": 0}, "bottleneck is 0: give at least 1"),
        (tk.prefix, {"length": 0}, "length is 0: give at least 1"),
        (tk.prefix, {}, r"no attention of the kind BERT has .*\(it has none\)"),
    ],
)
def test_a_bad_request_is_named_and_changes_nothing(method, how, message):
    model = _encoder()
    with pytest.raises(ValueError, match=message):
        method(model, **how)
    assert _trained_names(model) == {name for name, _ in _encoder().named_parameters()}
    assert getattr(model, "adaptation", None) is None


def test_lora_passes_over_convolutions_it_cannot_be_merged_into():
    model = tk.lora(_convnet(), r=2, targets="all")
    names = {name.split(".lora_A")[0] for name in _trained_names(model) if ".lora_A" in name}
    assert names == {"stem.0", "block.1"}
    with pytest.raises(ValueError, match="convolution without groups, dilation"):
        tk.lora(_convnet(), targets="block.0")


@pytest.mark.parametrize("sealed", [nn.MultiheadAttention, nn.TransformerEncoderLayer])
def test_layers_whose_weights_are_read_past_their_wrapper_are_no_targets(sealed):
    stages = [("attention", sealed(4, 2)), ("body", nn.Linear(4, 4)), ("head", nn.Linear(4, 2))]
    with pytest.raises(ValueError, match="it has 1: body"):
        tk.lora(tk.Staged(stages), targets="attention")


def test_a_second_method_is_refused():
    with pytest.raises(ValueError, match=r"the model has ia3 already: tk\.merge\(model\)"):
        tk.lora(tk.ia3(_encoder()))


def test_a_model_whose_head_is_unknown_is_refused():
    with pytest.raises(TypeError, match=r"the model is a Linear.*tk\.Staged"):
        tk.lora(nn.Linear(2, 2))


# ---- one backbone, many tasks -------------------------------------------------------------------


def test_an_adapter_file_holds_what_was_added_and_the_head_alone(tmp_path):
    model = _moved(tk.lora(_encoder(), r=2))
    tkpeft.save_adapter(model, tmp_path)
    tensors, _ = checkpoint.read(tmp_path / tkpeft.ADAPTER)
    assert tensors.keys() == _trained_names(model)
    again = tkpeft.load_adapter(_encoder(), tmp_path)
    assert torch.equal(again(TEXT), model(TEXT)) and _trained_names(again) == _trained_names(model)


def test_one_backbone_serves_several_tasks_in_turn(tmp_path):
    tasks = {}
    for seed in (1, 2):
        model = _moved(tk.adapters(_encoder(), bottleneck=2), seed)
        model.labels = [f"{seed}a", f"{seed}b"]
        tkpeft.save_adapter(model, tmp_path / str(seed))
        tasks[seed] = model
    backbone = _encoder()
    for seed in (1, 2, 1):
        tkpeft.load_adapter(backbone, tmp_path / str(seed))
        assert torch.equal(backbone(TEXT), tasks[seed](TEXT))
        assert backbone.labels == tasks[seed].labels


def test_an_adapter_refuses_what_it_was_not_made_for(tmp_path):
    tkpeft.save_adapter(tk.lora(_encoder(), r=2), tmp_path)
    with pytest.raises(ValueError, match="made for a backbone with other weights"):
        tkpeft.load_adapter(_encoder(seed=5), tmp_path)
    wider = _encoder(labels=("a", "b", "c"))
    with pytest.raises(ValueError, match=r"labels \['a', 'b'\],.*does not fit.*head\.1\.weight"):
        tkpeft.load_adapter(wider, tmp_path)
    assert getattr(wider, "adaptation", None) is None
    with pytest.raises(ValueError, match=r"holds lora with .*but the model has lora"):
        tkpeft.load_adapter(tk.lora(_encoder(), r=3), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"adapter\.safetensors"):
        tkpeft.load_adapter(_encoder(), tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="the model holds none of lora"):
        tkpeft.save_adapter(_encoder(), tmp_path)


def test_a_file_cannot_name_a_method_that_is_none():
    with pytest.raises(ValueError, match="the method is 'os': give one of lora"):
        tkpeft.rebuild({}, "os", {})
    with pytest.raises(ValueError, match="does not say how to build its model"):
        tkpeft.rebuild({"loader": "os.system", "arguments": {}}, "lora", {})


def test_a_copy_of_an_adapted_model_stands_alone():
    model = tk.lora(_encoder())
    twin = copy.deepcopy(model)
    tk.merge(twin)
    assert model.adaptation.method == "lora" and "lora_A" in str(model)
