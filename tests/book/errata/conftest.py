"""What the errata tests share: a BERT of a few thousand weights, and the page's repaired code."""

import re
from pathlib import Path

import pytest
import torch
import transformers

PAGE = Path(__file__).resolve().parents[3] / "book" / "appendix" / "errata.md"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = [*SPECIAL, "a", "is", "the", "film", "good", "bad", "##s", "anna", "lives"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_config():
    return transformers.BertConfig(
        vocab_size=len(PIECES),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return transformers.BertTokenizer(vocab={piece: i for i, piece in enumerate(PIECES)})


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory, tiny_config, tiny_tokenizer):
    """A folder that `from_pretrained` accepts, as it would a name on a model hub."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    torch.manual_seed(0)
    transformers.BertModel(tiny_config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def repaired():
    """repaired(anchor) → the names that the repaired code under this anchor of the page defines."""
    page = PAGE.read_text(encoding="utf-8")

    def run(anchor):
        after = page.split(f"({anchor})=\n", 1)[1]
        code = re.search(r"```python\n(.*?)```", after, re.DOTALL).group(1)
        names = {}
        exec(compile(code, f"{PAGE.name}:{anchor}", "exec"), names)
        return names

    return run


@pytest.fixture(scope="session")
def english_pieces():
    """Cuts a text into pieces of BERT's English uncased vocabulary, which MiniLM shares."""
    from tokenizers import Tokenizer

    from transferkit import assets

    tokenizer = Tokenizer.from_file(str(assets.files("minilm-l6")["tokenizer"]))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return lambda text: tokenizer.encode(text, add_special_tokens=False).tokens
