"""Backbones: the weights are the published ones, the stages compute what the whole model does."""

from __future__ import annotations

import functools
import json
import socket
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from transferkit import assets, checkpoint, datasets, e5, models

REFERENCE = json.loads(
    (Path(__file__).parent / "data" / "reference_outputs.json").read_text(encoding="utf-8")
)
TEXTS = [
    "A small gem of a film.",
    "Falls short, and then falls further: two hours of my life that nobody will give back to me.",
    "Dull.",
    "这家酒店的早餐很好，房间也很干净。",
]


@functools.cache
def load(name: str, **options):
    return models.load(name, **options)


def batch_of(model, texts: list[str], max_length: int = 128) -> dict[str, torch.Tensor]:
    from transferkit import data

    source = data.texts(texts, None, model.prepare.tokenizer, max_length)
    return source.fetch(range(len(texts)), None, 0).inputs


@torch.no_grad()
def outputs(model, inputs):
    return model.eval()(inputs)


# ---- minilm-l6 ----------------------------------------------------------------------------------


def test_minilm_stages_equal_the_whole_model_with_mean_pooling():
    from transformers import AutoModel, AutoTokenizer

    model = load("minilm-l6")
    folder = str(assets.files("minilm-l6")["config"].parent)
    whole = AutoModel.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    inputs = batch_of(model, TEXTS)
    for key in ("input_ids", "attention_mask"):
        assert torch.equal(inputs[key], tokens[key])
    with torch.no_grad():
        hidden = whole(**{key: tokens[key] for key in inputs}).last_hidden_state
    real = tokens["attention_mask"].unsqueeze(-1)
    wanted = (hidden * real).sum(1) / real.sum(1)
    assert torch.allclose(outputs(model, inputs), wanted, atol=1e-5)


def test_minilm_loads_every_tensor_of_the_file_except_the_unused_pooler():
    from safetensors import safe_open

    with safe_open(assets.files("minilm-l6")["weights"], framework="pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    own = load("minilm-l6").state_dict()
    sums = sorted(float(value.double().sum()) for value in own.values())
    left_out = ("pooler.", "embeddings.position_ids")
    wanted = [float(v.double().sum()) for k, v in stored.items() if not k.startswith(left_out)]
    assert sums == sorted(wanted)


@pytest.mark.parametrize("name", ["minilm-l6", "e5-small"])
def test_a_text_is_read_the_same_alone_and_beside_longer_ones(name):
    model = load(name)
    together = outputs(model, batch_of(model, TEXTS))
    for i, text in enumerate(TEXTS):
        alone = outputs(model, batch_of(model, [text]))
        assert torch.allclose(alone[0], together[i], atol=1e-5), text


class Scalars(TorchDispatchMode):
    """Counts the operations that make the processor wait for the device."""

    waiting = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "item")

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        if name in self.waiting:
            self.found.append(name)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("name", ["minilm-l6", "e5-small", "efficientnet-lite0"])
def test_a_training_step_reads_no_scalar_from_the_device(name):
    model = models.load(name, labels=["no", "yes"], layers=1).train()
    image = name == "efficientnet-lite0"
    inputs = torch.zeros(2, 3, 64, 64) if image else batch_of(model, TEXTS)
    with Scalars() as counter:
        model(inputs).sum().backward()
    assert counter.found == []


def test_the_counter_of_scalars_counts():
    with Scalars() as counter:
        torch.ones(1).item()
    assert counter.found


# ---- e5-small -----------------------------------------------------------------------------------


def test_e5_sentence_vectors_are_the_stored_ones():
    model = load("e5-small")
    vectors = outputs(model, batch_of(model, REFERENCE["e5-small"]["texts"]))
    wanted = torch.tensor(REFERENCE["e5-small"]["vectors"])
    assert torch.allclose(vectors[:, : wanted.shape[1]], wanted, atol=1e-4)


def test_e5_finds_the_translation_of_every_sentence():
    english = [
        "The weather is lovely today.",
        "How do I reset my password?",
        "Shares fell sharply.",
    ]
    chinese = ["今天天气很好。", "如何重置我的密码？", "股市大幅下跌。"]
    model = load("e5-small")
    vectors = F.normalize(outputs(model, batch_of(model, english + chinese)), dim=1)
    likeness = vectors[:3] @ vectors[3:].T
    assert torch.equal(likeness.argmax(0), torch.arange(3))
    assert torch.equal(likeness.argmax(1), torch.arange(3))


def test_a_pruned_vocabulary_gives_exactly_the_same_outputs():
    whole = load("e5-small")
    pruned = models.load("e5-small", vocabulary=TEXTS)
    assert torch.equal(
        outputs(pruned, batch_of(pruned, TEXTS)), outputs(whole, batch_of(whole, TEXTS))
    )
    word = "word_embeddings.weight"
    rows = next(v for k, v in pruned.state_dict().items() if k.endswith(word))
    assert len(rows) < 100 < 250037


def test_a_token_outside_the_pruned_vocabulary_becomes_unknown():
    tokenizer = e5.Tokenizer(
        models.tokenizer_from(assets.files("e5-small")["tokenizer"], "<pad>", "<unk>", 512)
    )
    rows = e5.token_ids(["a b"], tokenizer)
    before = tokenizer(["a b"])["input_ids"][0]
    tokenizer.keep(rows)
    assert rows[tokenizer(["a b"])["input_ids"][0]].tolist() == before
    unknown = 3
    assert rows[unknown] == unknown and unknown not in tokenizer(["a b"])["input_ids"][0]
    assert unknown in tokenizer(["电脑 a"])["input_ids"][0]


def test_a_pruned_model_is_saved_and_loaded_with_its_vocabulary(tmp_path):
    model = models.load("e5-small", labels=["no", "yes"], vocabulary=TEXTS, layers=1)
    checkpoint.save_model(tmp_path, model, {})
    again = checkpoint.load(tmp_path)
    assert torch.equal(
        outputs(again, batch_of(again, TEXTS)), outputs(model, batch_of(model, TEXTS))
    )


def test_four_bit_blocks_unpack_to_nibble_minus_eight_times_scale():
    scale = np.array([0.5], "<f2").tobytes()
    low, high = list(range(16)), list(range(15, -1, -1))
    packed = scale + bytes(a | b << 4 for a, b in zip(low, high, strict=True))
    wanted = [(n - 8) * 0.5 for n in low + high]
    assert e5._unpack(packed * 2, 32).tolist() == wanted * 2


def test_a_file_that_is_not_the_four_bit_model_is_refused():
    with pytest.raises(ValueError, match=r"b'E5S1' is expected: run .*fetch e5-small"):
        e5.convert(b"PK\x03\x04" + bytes(100))
    sizes = struct.pack("<I7ifi", 1, 768, 12, 12, 3072, 250037, 512, 2, 1e-12, 32)
    with pytest.raises(ValueError, match="are not e5-small's"):
        e5.convert(b"E5S1" + sizes + bytes(100))


def test_a_conversion_that_cannot_be_written_names_the_remedy(tmp_path, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    source = assets.files("e5-small")
    monkeypatch.setattr(assets, "files", lambda _: source)
    monkeypatch.setattr(e5, "convert", lambda raw: {"a": torch.zeros(2)})
    monkeypatch.setattr("safetensors.torch.save_file", full)
    monkeypatch.setenv("TRANSFERKIT_CACHE", str(tmp_path))
    with pytest.raises(assets.AssetError, match=r"cannot write to the cache .*No space left"):
        e5.weights_file()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_every_tensor_of_the_four_bit_file_has_its_place():
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        wanted = BertModel(BertConfig(**e5.config()), add_pooling_layer=False).state_dict()
    from safetensors import safe_open

    with safe_open(e5.weights_file(), framework="pt") as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert found == {key: tuple(value.shape) for key, value in wanted.items()}


# ---- efficientnet-lite0 -------------------------------------------------------------------------


def pattern(size: int) -> torch.Tensor:
    """A fixed synthetic image, float (1, 3, size, size) in [−1, 1]."""
    c, i, j = torch.meshgrid(torch.arange(3), torch.arange(size), torch.arange(size), indexing="ij")
    return (((i * i + 7 * j + 29 * c) % 64) / 32 - 1).unsqueeze(0).float()


def plain_lite0(tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """EfficientNet-Lite0 written out by hand on the file's own names: features (batch, 1280)."""

    def conv(x, name, stride=1, groups=1):
        weight = tensors[f"{name}.weight"]
        side, size = weight.shape[-1], x.shape[-1]
        pad = max((-(-size // stride) - 1) * stride + side - size, 0)
        x = F.pad(x, (pad // 2, pad - pad // 2, pad // 2, pad - pad // 2))
        return F.conv2d(x, weight, stride=stride, groups=groups)

    def norm(x, name):
        mean, var, weight, bias = (
            tensors[f"{name}.{part}"].view(1, -1, 1, 1)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(var + 1e-3) * weight + bias

    x = F.relu6(norm(conv(x, "_conv_stem", 2), "_bn0"))
    for block in range(16):
        stride, name, before = (2 if block in (1, 3, 5, 11) else 1), f"_blocks.{block}", x
        if f"{name}._expand_conv.weight" in tensors:
            x = F.relu6(norm(conv(x, f"{name}._expand_conv"), f"{name}._bn0"))
        x = conv(x, f"{name}._depthwise_conv", stride, groups=x.shape[1])
        x = F.relu6(norm(x, f"{name}._bn1"))
        x = norm(conv(x, f"{name}._project_conv"), f"{name}._bn2")
        x = x + before if x.shape == before.shape else x
    return F.relu6(norm(conv(x, "_conv_head"), "_bn1")).mean((2, 3))


@pytest.mark.parametrize("size", [64, 97])
def test_lite0_computes_what_the_file_says_under_its_own_names(size):
    path = assets.files("efficientnet-lite0")["weights"]
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    found = outputs(load("efficientnet-lite0"), pattern(size))
    assert torch.allclose(found, plain_lite0(tensors, pattern(size)), atol=1e-4)


def test_lite0_features_are_the_stored_ones():
    found = outputs(load("efficientnet-lite0"), pattern(64))[0]
    wanted = torch.tensor(REFERENCE["efficientnet-lite0"]["features"])
    assert torch.allclose(found[: len(wanted)], wanted, atol=1e-4)


def test_weights_in_another_number_or_shape_are_refused():
    layer = torch.nn.Linear(2, 3)
    with pytest.raises(ValueError, match="holds 1 tensors and the model needs 2"):
        models._copy_in_order(layer, {"w": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match=r"b \(2,\) does not fit bias \(3,\)"):
        models._copy_in_order(layer, {"w": torch.zeros(3, 2), "b": torch.zeros(2)})


def test_grey_cells_become_three_equal_normalised_channels_of_the_asked_size():
    split = datasets.load("solar-cells").train.select([0, 1])
    batch = (
        models.load("efficientnet-lite0", labels=["a", "b"], size=96)
        .prepare(split)
        .fetch([1], None, 0)
    )
    image = batch.inputs
    assert image.shape == (1, 3, 96, 96)
    assert torch.equal(image[:, 0], image[:, 1]) and torch.equal(image[:, 0], image[:, 2])
    small = F.interpolate(
        torch.from_numpy(split["image"][1:]).float()[:, None],
        (96, 96),
        mode="bilinear",
        antialias=True,
    )
    assert torch.allclose(image[:, :1], small / 127.5 - 1, atol=0.6 / 127.5)
    assert batch.labels.tolist() == split.labels[1:].tolist()


# ---- what all of them share ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, stages",
    [
        ("minilm-l6", ["embeddings", *(f"layer.{i}" for i in range(6)), "pool", "head"]),
        ("e5-small", ["embeddings", *(f"layer.{i}" for i in range(12)), "pool", "head"]),
        (
            "efficientnet-lite0",
            ["stem", *(f"blocks.{i}" for i in range(7)), "neck", "pool", "head"],
        ),
    ],
)
def test_stages_are_named_from_input_to_output(name, stages):
    assert load(name).stage_names == stages


@pytest.mark.parametrize("name, stages", [("minilm-l6", 5), ("efficientnet-lite0", 5)])
def test_layers_keeps_the_first_ones(name, stages):
    model = models.load(name, labels=["a", "b", "c"], layers=2)
    assert len(model.stage_names) == stages
    inputs = pattern(64) if name == "efficientnet-lite0" else batch_of(model, TEXTS[:1])
    assert outputs(model, inputs).shape == (1, 3)
    with pytest.raises(ValueError, match="layers and layers=99 were asked for"):
        models.load(name, layers=99)


@pytest.mark.parametrize("name", ["minilm-l6", "efficientnet-lite0"])
def test_a_fresh_model_is_a_function_of_its_seed_and_leaves_the_generator_alone(name):
    before = torch.get_rng_state()
    first, again, other = (
        models.load(name, labels=["a", "b"], pretrained=False, layers=1, seed=seed).state_dict()
        for seed in (1, 1, 2)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    weights = [key for key, value in first.items() if value.ndim > 1]
    assert not any(torch.equal(first[key], other[key]) for key in weights)


def test_a_fresh_model_shares_no_weight_with_the_pretrained_one():
    fresh = models.load("minilm-l6", pretrained=False, layers=1).state_dict()
    trained = load("minilm-l6").state_dict()
    assert not any(torch.equal(v, trained[k]) for k, v in fresh.items() if v.ndim > 1)


def test_only_the_head_depends_on_the_seed_of_a_pretrained_model():
    first, other = (
        models.load("minilm-l6", labels=["a", "b"], seed=s).state_dict() for s in (0, 1)
    )
    differ = [key for key in first if not torch.equal(first[key], other[key])]
    assert len(differ) == 1 and "head" in differ[0]


def test_dropout_before_the_head_acts_in_training_only():
    model = models.load("efficientnet-lite0", labels=["a"], layers=1, dropout=0.5)
    features = torch.ones(64, 16)
    head = model.get_submodule("head")
    assert torch.equal(head.eval()(features), head(features))
    assert not torch.equal(head.train()(features), head(features))


def test_a_split_of_the_wrong_kind_is_refused():
    cells = datasets.load("solar-cells").train.select([0])
    with pytest.raises(ValueError, match="holds image and this model reads text"):
        load("minilm-l6").prepare(cells)


def test_a_vocabulary_is_refused_where_it_means_nothing():
    with pytest.raises(ValueError, match="vocabulary= is for 'e5-small'"):
        models.load("minilm-l6", vocabulary=["a"])


def test_available_models_are_those_that_need_no_hub():
    assert list(models.available()) == ["minilm-l6", "e5-small", "efficientnet-lite0"]
    assert all("MiB" in line for line in models.available().values())


# ---- other names --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["minilm-l7", "resnet18"])
def test_without_a_hub_the_error_says_what_there_is(name, monkeypatch):
    monkeypatch.setenv("TRANSFERKIT_OFFLINE", "1")
    with pytest.raises(
        assets.AssetError, match=r"known names: minilm-l6.*pass the folder's path"
    ) as e:
        models.load(name)
    assert ("did you mean 'minilm-l6'?" in str(e.value)) == (name == "minilm-l7")


def test_without_a_network_the_hub_is_not_asked(monkeypatch):
    for name in ("TRANSFERKIT_OFFLINE", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("urllib.request.getproxies", dict)

    def refuse(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    assert not models._hub_answers()


def test_a_timm_name_without_weights_needs_no_hub(monkeypatch):
    monkeypatch.setenv("TRANSFERKIT_OFFLINE", "1")
    model = models.load("resnet18", labels=["a", "b"], pretrained=False)
    wanted = ["stem", "layer1", "layer2", "layer3", "layer4", "pool", "head"]
    assert model.stage_names == wanted
    assert outputs(model, pattern(64)).shape == (1, 2)


def test_a_local_folder_is_loaded_without_a_hub(tmp_path, monkeypatch):
    from transformers import BertConfig, BertModel

    monkeypatch.setenv("TRANSFERKIT_OFFLINE", "1")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    whole = BertModel(BertConfig(vocab_size=30522, num_hidden_layers=2, **sizes)).eval()
    whole.save_pretrained(tmp_path)
    load("minilm-l6").prepare.tokenizer.save_pretrained(tmp_path)
    model = models.load(str(tmp_path), labels=None)
    assert model.stage_names == ["embeddings", "layer.0", "layer.1", "pool", "head"]
    inputs = batch_of(model, TEXTS[:1])
    with torch.no_grad():
        wanted = whole(**inputs).last_hidden_state.mean(1)
    assert torch.allclose(outputs(model, inputs), wanted, atol=1e-5)
