"""Small models and data for the laws, made in milliseconds."""

from __future__ import annotations

import torch
from torch import nn

import transferkit as tk


class Embed(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.table = nn.Embedding(50, width)

    def forward(self, inputs):
        mask = inputs["attention_mask"].bool()
        return {"hidden": self.table(inputs["input_ids"]), "mask": mask}


class Block(nn.Module):
    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.mix = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, state):
        hidden, mask = state["hidden"], state["mask"]
        mixed, _ = self.mix(hidden, hidden, hidden, key_padding_mask=~mask, need_weights=False)
        return {"hidden": self.norm(hidden + self.dropout(mixed)), "mask": mask}


class Pool(nn.Module):
    def forward(self, state):
        weight = state["mask"].unsqueeze(-1).to(state["hidden"].dtype)
        return (state["hidden"] * weight).sum(1) / weight.sum(1)


def tiny_encoder(seed: int = 0, width: int = 8, dropout: float = 0.2) -> tk.Staged:
    """A transformer encoder of two layers over 50 tokens, with three labels."""
    torch.manual_seed(seed)
    return tk.Staged(
        [
            ("embeddings", Embed(width)),
            ("layer.0", Block(width, dropout)),
            ("layer.1", Block(width, dropout)),
            ("pool", Pool()),
            ("head", nn.Linear(width, 3)),
        ],
        labels=["a", "b", "c"],
    )


def tiny_bert(seed: int = 0, dropout: float = 0.2) -> tk.Staged:
    """A BERT of transformers, staged as the shipped models are: two layers over 50 tokens."""
    config = {
        "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 50,
        "num_attention_heads": 2, "max_position_embeddings": 16, "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(seed)
    stages = tk.models.text_stages(tk.models.bert(config, None), None, "tiny")
    return tk.Staged([*stages, ("head", nn.Linear(8, 3))], labels=["a", "b", "c"]).eval()


def tiny_convnet(seed: int = 0) -> tk.Staged:
    """Two convolutions with BatchNorm, a dropout stage and a head of three outputs."""
    torch.manual_seed(seed)

    def block(inputs: int, outputs: int) -> nn.Module:
        convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

    return tk.Staged(
        [
            ("stem", block(3, 6)),
            ("blocks.0", block(6, 8)),
            ("pool", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())),
            ("dropout", nn.Dropout(0.3)),
            ("head", nn.Linear(8, 3)),
        ],
        labels=["a", "b", "c"],
    )


def tiny_bag(seed: int = 0) -> tk.Staged:
    """The mean of embeddings, a layer with dropout and a head of three outputs."""
    torch.manual_seed(seed)
    hidden = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.2))
    stages = [("embeddings", Embed(8)), ("pool", Pool()), ("hidden", hidden)]
    return tk.Staged([*stages, ("head", nn.Linear(8, 3))], labels=["a", "b", "c"])


def tiny_tagger(seed: int = 0) -> tk.Staged:
    """The encoder of `tiny_encoder` with a head that says one of three labels of every token."""
    encoder = tiny_encoder(seed)

    class Tokens(nn.Linear):
        def forward(self, state):
            return super().forward(state["hidden"])

    stages = [(name, encoder.get_submodule(name)) for name in encoder.stage_names[:3]]
    return tk.Staged([*stages, ("head", Tokens(8, 3))], labels=["a", "b", "c"])


class Words:
    """A tokenizer of numbers: `"3 1 4"` has the tokens 3, 1 and 4."""

    pad_token_id = 0

    def __call__(self, texts, truncation, max_length):
        return {"input_ids": [[int(t) for t in text.split()][:max_length] for text in texts]}


def some_texts(count: int, seed: int = 0) -> tk.data.Texts:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(1, 12, (), generator=generator))
        tokens = torch.randint(1, 50, (length,), generator=generator)
        rows.append(" ".join(map(str, tokens.tolist())))
    labels = torch.randint(0, 3, (count,), generator=generator)
    return tk.data.texts(rows, labels, Words(), 16)


class Tagged(tk.data.Texts):
    """Texts whose labels are one a token: the token modulo 3, and -100 where there is none."""

    def fetch(self, indices, epoch, seed):
        batch = super().fetch(indices, epoch, seed)
        ids, real = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
        batch.labels = torch.where(real, ids % 3, -100)
        return batch


def some_tagged(count: int, seed: int = 0) -> Tagged:
    """The texts of `some_texts`, with a label for each token."""
    texts = some_texts(count, seed)
    tagged = Tagged.__new__(Tagged)
    vars(tagged).update(vars(texts) | {"labels": None})
    return tagged


def some_images(count: int, augment=None, views=None, seed: int = 0) -> tk.data.Images:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 10, 10, 3), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 3, (count,), generator=generator)
    mean, std = [0.5] * 3, [0.25] * 3
    return tk.data.images(pixels.numpy(), labels, 8, mean, std, augment, views)


def noisy_flip(images, generator):
    """An augmentation: a flip for half of the images, and a little noise."""
    if torch.rand((), generator=generator) < 0.5:
        images = images.flip(-1)
    return images + 0.05 * torch.randn(images.shape, generator=generator)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all parameters and buffers, on the host."""
    state = model.state_dict()
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}


def same(left: dict, right: dict) -> bool:
    """Whether two states agree bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)
