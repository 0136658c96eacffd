"""A small classifier of Chinese texts, trained and saved in a second, and a server that answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

import transferkit as tk
from transferkit import apply


def saved(
    folder: Path, characters: str, texts: Sequence[str], classes: Sequence[int], *,
    labels: Sequence[str], length: int, epochs: int, notes: dict[str, str] | None = None,
) -> Path:  # fmt: skip
    """Train a BERT of one layer, which knows a few characters, and save it; the folder of it."""
    import transformers

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
    config = transformers.BertConfig(
        vocab_size=len(pieces), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder / "bert")
    vocabulary = {piece: at for at, piece in enumerate(pieces)}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(folder / "bert")
    model = tk.models.load(str(folder / "bert"), labels=labels, max_length=length)
    rows = tk.data.texts(texts, classes, model.prepare.tokenizer, length)
    plan = tk.finetune(epochs, lr=1e-2)
    run = tk.fit(model, tk.classification(), rows, plan=plan, precision="fp32", device="cpu")
    return run.save(folder / "model", notes=notes or {})


@contextmanager
def served(folder: Path) -> Iterator[apply.Server]:
    """A server for a saved model, which answers while the block runs."""
    with apply.Server(folder, port=0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
