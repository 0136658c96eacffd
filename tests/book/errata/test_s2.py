"""The third article (BERT with Keras calls): its errors happen, and their repairs work."""

import numpy as np
import pytest
import torch
import transformers

import transferkit as tk

SENTENCE = "这是一篇关于自然语言处理的文章。"  # the article's own test sentence


@pytest.fixture
def classifier(tiny_bert):
    return transformers.BertForSequenceClassification.from_pretrained(tiny_bert)


def test_transformers_has_no_tensorflow_models_any_more():
    assert not [name for name in dir(transformers) if name.startswith("TFBert")]
    with pytest.raises(ImportError):
        from transformers import TFBertForSequenceClassification  # noqa: F401


def test_the_tokenizer_refuses_tensorflow_tensors(tiny_tokenizer):
    with pytest.raises(ValueError, match="tf"):
        tiny_tokenizer(["a good film"], return_tensors="tf")


def test_the_pytorch_class_has_no_fit(classifier):
    assert isinstance(classifier, torch.nn.Module)
    with pytest.raises(AttributeError, match="fit"):
        classifier.fit({}, [], epochs=3)


def test_the_model_cannot_read_text(classifier):
    with pytest.raises(AttributeError):
        classifier(["a good film"])


def test_three_dots_are_a_value_and_hold_no_texts():
    names = {}
    exec("dataset = ...", names)  # the line of the article; no error
    with pytest.raises(TypeError, match="ellipsis"):
        exec("dataset['text']", names)


def test_a_tokenizer_made_inside_a_function_is_unknown_outside():
    program = "def train_model():\n    tokenizer = object()\ntrain_model()\ntokenizer"
    with pytest.raises(NameError, match="tokenizer"):
        exec(program, {})


def test_saving_the_model_alone_loses_the_vocabulary(classifier, tiny_tokenizer, tmp_path):
    classifier.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    try:
        lost = transformers.BertTokenizer.from_pretrained(tmp_path)
    except (OSError, TypeError, ValueError):
        return  # refused: better than what follows
    assert lost.tokenize("good film") == ["[UNK]", "[UNK]"]
    assert tiny_tokenizer.tokenize("good film") == ["good", "film"]


def test_the_printed_prediction_is_an_object_and_not_a_label(classifier, tiny_tokenizer):
    output = classifier(**tiny_tokenizer(["a good film"], return_tensors="pt"))
    assert not isinstance(output, torch.Tensor)
    assert output.logits.shape == (1, 2)


def test_the_english_vocabulary_does_not_know_most_of_the_chinese_sentence(english_pieces):
    pieces = english_pieces(SENTENCE)
    assert (pieces.count("[UNK]"), len(pieces)) == (11, 16)


def test_two_different_chinese_sentences_can_look_alike_to_an_english_vocabulary(english_pieces):
    assert english_pieces("好书") == english_pieces("坏书") == ["[UNK]", "[UNK]"]


def test_a_classifier_that_is_not_told_has_two_classes(classifier, tiny_tokenizer):
    assert classifier.config.num_labels == 2
    batch = tiny_tokenizer(["a good film"], return_tensors="pt")
    with pytest.raises(IndexError):
        classifier(**batch, labels=torch.tensor([2]))


def test_one_objective_is_reached_by_different_features():
    inputs = torch.randn(50, 6, dtype=torch.float64)
    directions = torch.linalg.svd(inputs, full_matrices=False).Vh[:2].T  # of PCA
    turn = torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64)).Q
    losses, features = [], []
    for encode in (directions, directions @ turn):
        features.append(inputs @ encode)
        items = tk.data.Batch(inputs, None, torch.arange(50))
        losses.append(tk.reconstruction().loss(features[-1] @ encode.T, items).mean())
    torch.testing.assert_close(losses[0], losses[1])
    assert not torch.allclose(features[0], features[1], atol=0.1)


def test_the_repaired_listing_trains_saves_loads_and_names_a_label(repaired, tiny_bert, tmp_path):
    names = repaired("repaired-s2")
    texts, labels = ["a good film", "a bad film"], ["pleased", "angry"]
    names["fine_tune"](str(tiny_bert), texts, labels, tmp_path / "mine", epochs=40, lr=1e-2)
    assert names["predict"](tmp_path / "mine", texts) == labels


def test_the_effect_of_one_kind_of_source_is_positive_and_of_another_negative(repaired):
    transfer_effect = repaired("err-s2-effect")["transfer_effect"]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2310, 20))
    y = (x[:, :5].sum(axis=1) > 0).astype(int)
    source, target, test = (x[:300], y[:300]), (x[300:310], y[300:310]), (x[310:], y[310:])
    assert transfer_effect(source, target, test) > 0.1
    assert transfer_effect((source[0], 1 - source[1]), target, test) < -0.1
