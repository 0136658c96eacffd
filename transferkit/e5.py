"""multilingual-e5-small from its 4-bit file: read once, kept as float safetensors, prunable.

The archive stores each matrix as rows of blocks of 32 weights: one float16 scale and 16 bytes whose
low nibbles hold weights 0 to 15 and whose high nibbles hold weights 16 to 31, value
``(nibble − 8) × scale``. The first call unpacks them into a safetensors file in the cache under the
names of ``transformers.BertModel``; every name must be matched. The embedding of 250,037 tokens is
96 of the 118 million parameters: ``vocabulary=texts`` keeps the rows those texts use, and the
outputs for them stay exactly the same.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from transferkit import assets

PREFIX = "query: "  # every input of the published model begins with it
_UNKNOWN = 3
_SPECIAL = (0, 1, 2, _UNKNOWN)  # <s>, <pad>, </s>, <unk>: always kept, so with the same numbers
_LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
_EMBEDDING = {
    "emb.word": "word_embeddings.weight",
    "emb.pos": "position_embeddings.weight",
    "emb.type": "token_type_embeddings.weight",
    "emb.ln.w": "LayerNorm.weight",
    "emb.ln.b": "LayerNorm.bias",
}


def config() -> dict:
    """Fields of ``transformers.BertConfig`` for this model."""
    return {
        "vocab_size": 250037,
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 1,
    }


class Tokenizer:
    """The model's tokenizer with its prefix, and with token ids renumbered for a pruned embedding.

    Called like a transformers tokenizer: ``tokenizer(texts, truncation=True, max_length=128)``.

    Args:
        inner: the transformers tokenizer that does the work.
    """

    pad_token_id = 1
    unk_token_id = _UNKNOWN

    def __init__(self, inner: Callable):
        self._inner = inner
        self._numbers: np.ndarray | None = None

    def keep(self, rows: Tensor) -> None:
        """Renumber tokens to their place in ``rows``; all others become ``<unk>``."""
        self._numbers = np.full(config()["vocab_size"], _UNKNOWN)
        self._numbers[rows.numpy()] = np.arange(len(rows))

    def __call__(self, texts: Iterable[str], **options) -> dict[str, list[list[int]]]:
        found = self._inner([PREFIX + text for text in texts], **options)["input_ids"]
        if self._numbers is not None:
            found = [self._numbers[row].tolist() for row in found]
        return {"input_ids": found}


def token_ids(vocabulary: Iterable, tokenizer: Tokenizer) -> Tensor:
    """Sorted ids of the tokens to keep: those of the texts, or the ids given, and special ones."""
    wanted = list(vocabulary)
    if wanted and all(isinstance(entry, str) for entry in wanted):
        ids = {number for row in tokenizer(wanted, verbose=False)["input_ids"] for number in row}
    else:
        ids = {int(entry) for entry in wanted}
    return torch.tensor(sorted(ids.union(_SPECIAL)), dtype=torch.int64)


def weights_file() -> Path:
    """The converted weights in the cache, made on the first call (470 MB, a few seconds).

    Raises:
        transferkit.assets.AssetError: the file cannot be had or the cache cannot be written.
    """
    from filelock import FileLock

    source = assets.files("e5-small")["weights"]
    sha256 = assets.describe("e5-small")["files"]["weights"]["sha256"]
    kept = assets.cache_directory() / "converted" / f"e5-small-{sha256[:16]}.safetensors"
    if not kept.is_file():
        with assets.explained("e5-small", need=480 << 20):
            kept.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(kept.with_suffix(".lock")):
                if not kept.is_file():
                    tensors = convert(source.read_bytes())
                    assets.keep(kept, lambda path: _save(tensors, path))
    return kept


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:  # a full or read-only disk among other things
        raise OSError(str(error)) from error


def convert(raw: bytes) -> dict[str, Tensor]:
    """All tensors of the 4-bit file as float32, under the names of ``transformers.BertModel``.

    Raises:
        ValueError: the bytes are not such a file, or hold other sizes than this model's.
    """
    table, block = _table(raw)
    tensors = {}
    for name, (kind, elements, offset, size) in table.items():
        part = raw[offset : offset + size]
        values = _unpack(part, block) if kind == 1 else np.frombuffer(part, "<f4").copy()
        if len(values) != elements:
            raise ValueError(f"{name} holds {len(values)} values and {elements} are declared")
        target = _target(name)
        tensors[target] = torch.from_numpy(values)
        if not name.endswith((".b", "ln.w")):
            tensors[target] = tensors[target].view(-1, _columns(name))
    return tensors


def _columns(name: str) -> int:
    return config()["intermediate_size" if name.endswith(".fo.w") else "hidden_size"]


def _target(name: str) -> str:
    if name in _EMBEDDING:
        return f"embeddings.{_EMBEDDING[name]}"
    layer, part, kind = name.split(".")
    suffix = {"w": "weight", "b": "bias"}[kind]
    return f"encoder.layer.{layer.removeprefix('l')}.{_LAYER[part]}.{suffix}"


def _unpack(part: bytes, block: int) -> np.ndarray:
    """Blocks of one float16 scale and ``block / 2`` bytes to float32 weights, flat."""
    rows = np.frombuffer(part, np.uint8).reshape(-1, 2 + block // 2)
    scale = rows[:, :2].copy().view("<f2").astype(np.float32)
    values = np.concatenate([rows[:, 2:] & 15, rows[:, 2:] >> 4], axis=1).astype(np.float32)
    values -= 8  # in place: the embedding alone takes 384 MB
    values *= scale
    return values.reshape(-1)


def _table(raw: bytes) -> tuple[dict[str, tuple[int, int, int, int]], int]:
    """The file's list of tensors, (kind, elements, offset, bytes) by name, and its block size."""
    if raw[:4] != b"E5S1":
        raise ValueError(
            f"the file begins with {raw[:4]!r} and b'E5S1' is expected: run "
            "`python -m transferkit.assets fetch e5-small`"
        )
    _, hidden, layers, heads, feed, words, places, types, epsilon, block = struct.unpack_from(
        "<I7ifi", raw, 4
    )
    own = config()
    found = (hidden, layers, heads, feed, words, places, types)
    wanted = tuple(own[key] for key in (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
        "vocab_size", "max_position_embeddings", "type_vocab_size"))  # fmt: skip
    if found != wanted or not np.isclose(epsilon, own["layer_norm_eps"], rtol=1e-3):
        raise ValueError(f"the file's sizes {found}, {epsilon} are not e5-small's {wanted}")
    at = 4 + struct.calcsize("<I7ifi")
    pieces, *_, blob = struct.unpack_from("<5iQ", raw, at)
    at += struct.calcsize("<5iQ") + 4 * (pieces + 1) + 4 * pieces + blob
    _, skipped = struct.unpack_from("<iI", raw, at)
    at += struct.calcsize("<iI") + skipped
    (count,) = struct.unpack_from("<i", raw, at)
    at += 4
    table = {}
    for _ in range(count):
        (length,) = struct.unpack_from("<H", raw, at)
        name = raw[at + 2 : at + 2 + length].decode("ascii")
        at += 2 + length
        table[name] = struct.unpack_from("<BIQQ", raw, at)
        at += struct.calcsize("<BIQQ")
    return table, block
