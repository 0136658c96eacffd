"""Named backbones as ordered stages, ready for a new head.

``load`` gives a :class:`transferkit.layers.Staged` model: stages from input to output, the last one
the head for the labels at hand. Weights come from the asset cache (or, for any other name, from a
model hub or a local folder) and are read as safetensors or with ``weights_only=True``. The model
knows how to turn a data split into its inputs: ``model.prepare(split)``.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from transferkit import assets, backbones, data, e5, pictures
from transferkit.layers import Staged

State = dict[str, Tensor]


def available() -> dict[str, str]:
    """Names that need no model hub, each with size, licence and one line."""
    lines = {}
    for name in assets.names("model"):
        entry = assets.describe(name)
        sources = {file["archive"] for file in entry["files"].values()}
        size = sum(assets.manifest()["archives"][source]["size"] for source in sources)
        lines[name] = f"{entry['title']}; {size:.0f} MiB; {entry['licence']}"
    return lines


def load(
    name: str,
    labels: Sequence[str] | None = None,
    *,
    pretrained: bool = True,
    layers: int | None = None,
    max_length: int = 128,
    size: int = 224,
    dropout: float = 0.0,
    vocabulary: Iterable[str] | Iterable[int] | None = None,
    seed: int = 0,
):
    """Load a backbone by name and put a fresh head for ``labels`` on it.

    Args:
        name: one of :func:`available`, a name of a model hub (through transformers or timm), or
            the path of a folder in the transformers format.
        labels: label names, one output each; None leaves the features as they are.
        pretrained: False gives the same architecture freshly initialised from ``seed``.
        layers: keep the first so many encoder layers (text) or block stages (images) only.
        max_length: tokens a text is cut to.
        size: pixels a side that images are resized to.
        dropout: probability of the dropout before the head.
        vocabulary: for "e5-small", the texts (or token ids) whose tokens the embedding keeps; the
            outputs for these texts stay exactly the same.
        seed: initialises the head, and everything where ``pretrained`` is False.

    Returns:
        A :class:`transferkit.layers.Staged` in eval mode. Text models take a dict of ``input_ids``
        and ``attention_mask``, int64 (batch, length); image models float (batch, 3, size, size).
        Outputs are float (batch, labels).

    Raises:
        ValueError: an argument the model does not have, too many layers, or no or equal labels.
        TypeError: the labels are not a list of names.
        transferkit.assets.AssetError: the weights could not be had; the message says what to do.
    """
    if vocabulary is not None and name != "e5-small":
        raise ValueError(f"vocabulary= is for 'e5-small' and not for {name!r}: leave it out")
    _check_names(labels)
    options = {"pretrained": pretrained, "layers": layers, "seed": seed}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "minilm-l6":
            parts = _minilm(options, max_length)
        elif name == "e5-small":
            parts = _e5(options, max_length, vocabulary)
        elif name == "efficientnet-lite0":
            parts = _lite0(options, size)
        else:
            parts = _from_hub(name, options, max_length, size)
        head = _head(parts.width, labels, dropout)
    arguments = {"name": name, "labels": None if labels is None else list(labels),
                 "pretrained": False, "layers": layers, "max_length": max_length, "size": size,
                 "dropout": dropout, "seed": seed} | parts.arguments  # fmt: skip
    model = Staged([*parts.stages, ("head", head)], labels=labels, prepare=parts.prepare,
                   name=name, weights_hash=parts.weights if pretrained else "")  # fmt: skip
    model.recipe = {"loader": "transferkit.models.load", "arguments": arguments}
    return model.eval()


def _check_names(labels: Sequence[str] | None) -> None:
    if labels is None:
        return
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        raise TypeError(f"labels are {labels!r}: give a list of names, such as ['no', 'yes']")
    if not len(labels) or len(set(labels)) < len(labels):
        raise ValueError(f"labels are {list(labels)}: give at least one name, all distinct")


class Parts:
    """What a backbone brings: its stages, the width of its features, and how to make its inputs.

    ``weights`` is the SHA-256 of the pretrained file; ``arguments`` are extra arguments that
    :func:`load` needs to build the same model again.
    """

    def __init__(
        self,
        stages: list[tuple[str, nn.Module]],
        width: int,
        prepare: Callable,
        weights: str = "",
        arguments: dict | None = None,
    ):
        self.stages, self.width, self.prepare = stages, width, prepare
        self.weights, self.arguments = weights, arguments or {}


def _head(width: int, labels: Sequence[str] | None, dropout: float) -> nn.Module:
    if labels is None:
        return nn.Identity()
    linear = nn.Linear(width, len(labels))
    nn.init.normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.Dropout(dropout), linear) if dropout else linear


def _first(stages: list, count: int | None, name: str) -> list:
    if count is None:
        return stages
    if not 1 <= count <= len(stages):
        raise ValueError(f"{name} has {len(stages)} layers and layers={count} were asked for: "
                         f"give 1 to {len(stages)}")  # fmt: skip
    return stages[:count]


# ---- text ---------------------------------------------------------------------------------------


class Embeddings(nn.Module):
    """Token ids to vectors: {"input_ids", "attention_mask"} → {"hidden", "mask"}.

    ``hidden`` is float (batch, length, width) and ``mask`` bool (batch, length), True for a token.
    """

    def __init__(self, embeddings: nn.Module):
        super().__init__()
        self.table = embeddings

    def forward(self, inputs: State) -> State:
        hidden = self.table(input_ids=inputs["input_ids"])
        return {"hidden": hidden, "mask": inputs["attention_mask"].bool()}


class EncoderLayer(nn.Module):
    """One transformer layer; padding is masked by a view of the state's mask, with no host sync."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.block = layer

    def forward(self, state: State) -> State:
        mask = state["mask"]
        hidden = self.block(state["hidden"], attention_mask=mask[:, None, None, :])
        return {"hidden": hidden if isinstance(hidden, Tensor) else hidden[0], "mask": mask}


class MeanPool(nn.Module):
    """Mean of the real tokens' vectors: {"hidden", "mask"} → (batch, width)."""

    def forward(self, state: State) -> Tensor:
        weight = state["mask"].unsqueeze(-1).to(state["hidden"].dtype)
        return (state["hidden"] * weight).sum(1) / weight.sum(1).clamp(min=1.0)


class WholeEncoder(nn.Module):
    """A text model whose layers cannot be told apart, as one stage."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: State) -> State:
        hidden = self.model(**inputs).last_hidden_state
        return {"hidden": hidden, "mask": inputs["attention_mask"].bool()}


def text_stages(model: nn.Module, layers: int | None, name: str) -> list[tuple[str, nn.Module]]:
    """Stages of a transformers encoder: "embeddings", "layer.0", …, "pool"."""
    encoder = getattr(model, "encoder", None)
    if not (hasattr(model, "embeddings") and hasattr(encoder, "layer")):
        if layers is not None:
            raise ValueError(f"the layers of {name!r} cannot be told apart: leave layers= out")
        return [("encoder", WholeEncoder(model)), ("pool", MeanPool())]
    kept = _first(list(encoder.layer), layers, name)
    return [
        ("embeddings", Embeddings(model.embeddings)),
        *((f"layer.{i}", EncoderLayer(layer)) for i, layer in enumerate(kept)),
        ("pool", MeanPool()),
    ]


def bert(config: dict, weights: Path | None, vocabulary: Tensor | None = None) -> nn.Module:
    """A ``BertModel`` without pooler; every tensor of the weights file must find its place.

    Args:
        config: fields of ``transformers.BertConfig``.
        weights: safetensors file, or None to keep the fresh initialisation.
        vocabulary: int64 token ids whose embedding rows are kept, in this order.
    """
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel
    from transformers.initialization import no_init_weights

    if vocabulary is not None:
        config = config | {"vocab_size": len(vocabulary)}
    settings = BertConfig(**config, attn_implementation="sdpa")
    # drawing 118 million numbers that the file replaces would take longer than reading it
    with no_init_weights() if weights else contextlib.nullcontext():
        model = BertModel(settings, add_pooling_layer=False)
    if weights is not None:
        tensors = {
            key: value
            for key, value in load_file(weights).items()
            if not key.startswith("pooler.") and not key.endswith("position_ids")
        }
        if vocabulary is not None:
            rows = "embeddings.word_embeddings.weight"
            tensors[rows] = tensors[rows][vocabulary]
        model.load_state_dict(tensors, strict=True)
    return model


def _minilm(options: dict, max_length: int) -> Parts:
    paths = assets.files("minilm-l6")
    config = json.loads(paths["config"].read_text(encoding="utf-8"))
    wanted = ("hidden_size", "intermediate_size", "layer_norm_eps", "max_position_embeddings",
              "num_attention_heads", "num_hidden_layers", "pad_token_id", "type_vocab_size",
              "vocab_size", "hidden_act", "hidden_dropout_prob", "initializer_range",
              "attention_probs_dropout_prob")  # fmt: skip
    weights = paths["weights"] if options["pretrained"] else None
    model = bert({key: config[key] for key in wanted}, weights)
    stages = text_stages(model, options["layers"], "minilm-l6")
    longest = config["max_position_embeddings"]
    tokenizer = tokenizer_from(paths["tokenizer"], "[PAD]", "[UNK]", longest)
    sha256 = assets.describe("minilm-l6")["files"]["weights"]["sha256"]
    return Parts(stages, config["hidden_size"], text_inputs(tokenizer, max_length), sha256)


def _e5(options: dict, max_length: int, vocabulary: Iterable | None) -> Parts:
    weights = e5.weights_file() if options["pretrained"] else None
    longest = e5.config()["max_position_embeddings"]
    tokenizer = e5.Tokenizer(
        tokenizer_from(assets.files("e5-small")["tokenizer"], "<pad>", "<unk>", longest)
    )
    rows = None
    if vocabulary is not None:
        rows = e5.token_ids(vocabulary, tokenizer)
        tokenizer.keep(rows)
    stages = text_stages(bert(e5.config(), weights, rows), options["layers"], "e5-small")
    arguments = {} if rows is None else {"vocabulary": rows.tolist()}
    sha256 = assets.describe("e5-small")["files"]["weights"]["sha256"]
    inputs = text_inputs(tokenizer, max_length)
    return Parts(stages, e5.config()["hidden_size"], inputs, sha256, arguments)


@functools.lru_cache(maxsize=2)
def tokenizer_from(path: Path, pad: str, unknown: str, longest: int):
    """A transformers tokenizer from one ``tokenizer.json``, read once: e5-small's has 17 MB."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(path), pad_token=pad, unk_token=unknown, model_max_length=longest,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def text_inputs(tokenizer, max_length: int) -> Callable:
    """The function that turns a split of texts into the engine's source."""

    def prepare(split):
        _check_kind(split, "text")
        return data.texts(split.inputs, split.labels, tokenizer, max_length)

    prepare.tokenizer = tokenizer
    return prepare


def _check_kind(split, kind: str) -> None:
    if split.kind != kind:
        raise ValueError(
            f"{split.name} holds {split.kind} and this model reads {kind}: choose another model "
            "(tk.models.available()) or another data set (tk.datasets.available())"
        )


# ---- images -------------------------------------------------------------------------------------


def _lite0(options: dict, size: int) -> Parts:
    import timm

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    entry = assets.describe("efficientnet-lite0")["files"]["weights"]
    if options["pretrained"]:
        path = assets.files("efficientnet-lite0")["weights"]
        _copy_in_order(model, torch.load(path, map_location="cpu", weights_only=True))
    stages, width = _image_stages(model, options["layers"], "efficientnet-lite0")
    normal = model.default_cfg
    return Parts(stages, width, image_inputs(size, normal["mean"], normal["std"]), entry["sha256"])


def _copy_in_order(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy a state dict of other names but the same order; counters of batches are left out.

    Raises:
        ValueError: another number of tensors, or a shape that does not fit.
    """
    own = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    given = {k: v for k, v in tensors.items() if not k.endswith("num_batches_tracked")}
    if len(own) != len(given):
        raise ValueError(f"the file holds {len(given)} tensors and the model needs {len(own)}")
    for (name, target), (other, source) in zip(own.items(), given.items(), strict=True):
        if target.shape != source.shape:
            raise ValueError(f"{other} {tuple(source.shape)} does not fit {name} "
                             f"{tuple(target.shape)}")  # fmt: skip
        target.copy_(source)


def _image_stages(model: nn.Module, layers: int | None, name: str) -> tuple[list, int]:
    """Stages of a timm network without its head, and the width of its pooled features.

    They are those of :func:`transferkit.backbones.divide`. With ``layers`` the neck, which fits the
    last block only, is left out. A network that is not known there is one stage, "features".
    """
    try:
        parts = backbones.divide(model)
    except TypeError:
        if layers is not None:
            raise ValueError(
                f"the layers of {name!r} cannot be told apart: leave layers= out"
            ) from None
        model.reset_classifier(0)
        stages = [("features", model)]
    else:
        kept = _first(parts.layers, layers, name)
        neck = parts.neck if layers is None else []
        stages = [*parts.stem, *kept, *neck, *parts.after]
    side = getattr(getattr(model, "patch_embed", None), "img_size", None) or (64, 64)
    with torch.no_grad():
        x = torch.zeros(1, 3, *side)
        for _, stage in stages:
            x = stage.eval()(x)
    if x.dim() == 4:  # the neck that was left out held the pooling, too
        stages.append(("pool", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())))
    return stages, x.shape[1]


def image_inputs(size: int, mean: Sequence[float], std: Sequence[float]) -> Callable:
    """The function that turns a split of images into the engine's source."""

    def prepare(split, augment=None):
        _check_kind(split, "image")
        images = split.inputs  # an array, or a list of pictures of any size
        images = pictures.resized(images, size) if isinstance(images, list) else images
        return data.images(images, split.labels, size, mean, std, augment=augment)

    prepare.kind = "image"
    return prepare


# ---- any other name: the hub, or a folder -------------------------------------------------------


def _from_hub(name: str, options: dict, max_length: int, size: int) -> Parts:
    """A model of a hub or of a local folder, through timm where timm has the name."""
    import timm

    folder = Path(name).expanduser()
    if not folder.is_dir() and timm.is_model(name):
        with _hub_errors(name):
            if options["pretrained"] and not _hub_answers():
                raise OSError("there is no connection to it")
            model = timm.create_model(name, pretrained=options["pretrained"])
        stages, width = _image_stages(model, options["layers"], name)
        normal = model.default_cfg
        return Parts(stages, width, image_inputs(size, normal["mean"], normal["std"]))
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    where = {"local_files_only": folder.is_dir() or not _hub_answers()}
    with _hub_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
        if options["pretrained"]:
            model = AutoModel.from_pretrained(name, use_safetensors=True, **where)
        else:
            model = AutoModel.from_config(AutoConfig.from_pretrained(name, **where))
    stages = text_stages(model, options["layers"], name)
    return Parts(stages, model.config.hidden_size, text_inputs(tokenizer, max_length))


def _hub_answers() -> bool:
    """Whether to ask the hub at all: without a network its client would retry for a minute."""
    if "1" in (os.environ.get("TRANSFERKIT_OFFLINE"), os.environ.get("HF_HUB_OFFLINE")):
        return False
    if urllib.request.getproxies():
        return True
    address = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    with contextlib.suppress(OSError):
        socket.create_connection((address.hostname, address.port or 443), timeout=5).close()
        return True
    return False


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Without a hub, say what there is instead."""
    try:
        yield
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise assets.AssetError(
            f"{name!r} is not shipped and no model hub provided it ({first}): "
            f"{assets.nearest(name, available())}; or put the model's files (config.json, "
            "model.safetensors, tokenizer.json) into a folder and pass the folder's path"
        ) from error
