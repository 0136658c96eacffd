"""What is said about bad input: what was wrong, and what to do. And input that only looks bad."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import resource
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

import transferkit as tk
from transferkit import cache, checkpoint, data, layers, profiles

pytestmark = pytest.mark.usefixtures("one_thread")

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(20, 4, generator=GENERATOR)
Y = (X[:, 0] > 0).long()


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    monkeypatch.setenv("TRANSFERKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRANSFERKIT_OFFLINE", "1")
    monkeypatch.delenv(profiles.VARIABLE, raising=False)


def _model(outputs: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, outputs))


def _fit(model=None, items=(X, Y), objective=None, plan=None, **settings) -> tk.Run:
    return tk.fit(
        _model() if model is None else model,
        tk.classification() if objective is None else objective,
        items,
        plan=[tk.finetune(1, lr=0.01)] if plan is None else plan,
        **settings,
    )


class Paired(nn.Module):
    """Reads a dictionary with two entries."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, left, right):
        return self.head(left + right)


class Changed(nn.Module):
    """A linear layer whose outputs are changed in some way."""

    def __init__(self, change, outputs: int = 2):
        super().__init__()
        self.head, self.change = nn.Linear(4, outputs), change

    def forward(self, inputs):
        return self.change(self.head(inputs))


class Words:
    pad_token_id = 0

    def __call__(self, texts, truncation, max_length):
        return {"input_ids": [[int(t) for t in text.split()][:max_length] for text in texts]}


class Pixels:
    kind, inputs, labels, name = "image", np.zeros((2, 4, 4), np.uint8), None, "cells/train"


@dataclass(frozen=True)
class Coupled(tk.classification):
    additive = False


@dataclass(frozen=True)
class Mixed(tk.classification):
    acts_below_head = True


def _token_model(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), *more, nn.Linear(12, 2))


def _images(array=None, size=8, std=(0.5,) * 3, augment=None, views=None) -> data.Images:
    array = np.zeros((6, 8, 8, 3), np.uint8) if array is None else array
    return data.images(array, None, size, [0.5] * 3, std, augment, views)


def _with(values: torch.Tensor, at: tuple, bad: float) -> torch.Tensor:
    values = values.clone()
    values[at] = bad
    return values


def _steep(_) -> tk.Run:
    phase = tk.finetune(1, lr=1e30, optimizer="sgd")
    return _fit(items=(X * 1e30, Y), plan=[phase], clip=None, batch_size=20)


def _frozen(_) -> tk.Run:
    model = _model()
    tk.freeze(model)
    return _fit(model)


def _stored(directory) -> None:
    _fit(directory=directory)


def _another_run(tmp) -> tk.Run:
    _stored(tmp)
    return _fit(directory=tmp, batch_size=16)


def _truncated(tmp) -> tk.Run:
    _stored(tmp)
    path = tmp / checkpoint.LAST
    path.write_bytes(path.read_bytes()[:300])
    return _fit(directory=tmp)


def _foreign(tmp) -> nn.Module:
    save_file({"weight": torch.zeros(2)}, tmp / "model.safetensors", metadata={"format": "pt"})
    return tk.load(tmp)


def _old_format(tmp) -> nn.Module:
    about = {"json": json.dumps({"format": 1})}
    save_file({"weight": torch.zeros(2)}, tmp / "model.safetensors", metadata=about)
    return tk.load(tmp)


def _text_file(tmp) -> nn.Module:
    (tmp / "model.safetensors").write_text("weights")
    return tk.load(tmp)


def _other_model(tmp) -> nn.Module:
    _fit().save(tmp)
    return tk.load(tmp, model=_model(3))


def _file_as_directory(tmp) -> tk.Run:
    (tmp / "notes").write_text("mine")
    return _fit(directory=tmp / "notes")


def _damaged_features(tmp) -> data.Batch:
    source, prefix = data.tensors(X, Y), nn.Sequential(nn.Linear(4, 8))
    made = [cache.cached(prefix, source, lambda part, batch: part(batch.inputs).detach())]
    made.clear()
    (path,) = tmp.glob("cache/features/*/state.bin")
    path.write_bytes(b"")
    return cache.cached(prefix, source, lambda part, batch: part(batch.inputs).detach())


def _phase(**settings):
    return lambda tmp: tk.finetune(**{"epochs": 1, **settings})


def _fits(**settings):
    return lambda tmp: _fit(**settings)


def _items(inputs, labels=None):
    return lambda tmp: _fit(items=inputs if labels is None else (inputs, labels))


V, T = ValueError, TypeError
TWO = "two classes are two outputs, so pass labels=\\[...\\] with both names"
SHAPE = "give items of the shape and type that the model was made for"
NAMES = "name the entries of an item as the model's forward method does"
TABLE = (
    "of one length are expected: number the classes of labels, make texts a source "
    r"with tk\.data\.texts, dictionaries one with tk\.data\.examples"
)
FLOAT = r"its weights are torch\.float32, so convert the inputs with \.to\(torch\.float32\)"
STATES = (
    r"make room there or choose another directory; states that were stored before are whole, and "
    "fit goes on from them"
)

# (id, what is done, the error, what it says up to its last word)
CASES = [
    # labels
    ("label out of range", _items(X, Y + 1), V,
     r"labels hold 2 but the head has 2 outputs: pass labels=\[\.\.\.\] with 3 names"),
    ("negative label", _items(X, Y - 1), V,
     "labels hold -1 but class numbers start at 0: drop the unlabelled items first"),
    ("float labels", _items(X, Y.float()), T,
     r"torch\.float32, but whole class numbers are expected: convert them, or use regression\(\) "
     "for measured values"),
    ("labels that are words", _items(X, ["no"] * 20), T, TABLE),
    ("one-hot labels", _items(X, nn.functional.one_hot(Y)), V,
     r"have shape \(20, 2\), but one class number an item, \(n,\), is expected: for one-hot rows "
     r"pass labels\.argmax\(1\)"),
    ("labels known only when fetched", _items([(x, 0.5) for x in X]), T,
     r"torch\.float64, but whole class numbers .*: convert them, or use regression\(\) for "
     "measured values"),
    ("label out of range when fetched", _items([(x, i % 3) for i, x in enumerate(X)]), V,
     r"does not fit the 2 outputs of the head \(Target 2 is out of bounds\.\): number the classes "
     "from 0 and give the head one output for each"),
    ("NaN among measured values",
     lambda tmp: _fit(_model(1), (X, _with(X[:, 0], (3,), math.nan)), tk.regression()), V,
     "hold 1 values that are NaN or infinite, but finite values are expected: drop those items or "
     "fill them in"),
    ("more measured values than outputs",
     lambda tmp: _fit(_model(1), (X, X[:, :2]), tk.regression()), V,
     r"labels have shape \(20, 2\) but the head has 1 outputs: give the head one output for each "
     "value of a label"),
    ("head that does not fit the names",
     lambda tmp: _fit(tk.Staged([("head", nn.Linear(4, 2))], labels=["a", "b", "c"])), V,
     "3 labels but 2 outputs: give its head one for each"),
    ("one output for two classes", lambda tmp: _fit(_model(1)), V, TWO),
    ("logits (n,)", lambda tmp: _fit(Changed(lambda z: z[:, 0])), V, TWO),
    ("logits without the items", lambda tmp: _fit(Changed(lambda z: z.squeeze(), 1)), V,
     r"let it keep the first dimension, with squeeze\(-1\) and not squeeze\(\)"),
    ("logits of tokens", lambda tmp: _fit(Changed(lambda z: z[:, None].expand(-1, 3, 2))), V,
     r"\(20, 3, 2\), but logits \(n, C\) are expected: pool or flatten them, so that an item has "
     "one row"),
    ("class weights wrong in number",
     _fits(objective=tk.classification(class_weights=(1.0, 2.0, 3.0))), V,
     "hold 3 weights but the head has 2 outputs: pass one weight a class"),
    ("no labels", _items(X), V, r"pass \(inputs, labels\)"),
    # inputs
    ("empty data", _items(X[:0], Y[:0]), V, "at least one item is expected: check the split"),
    ("fewer labels than items", _items(X, Y[:5]), V,
     "there are 20 items but 5 labels: pass one for each"),
    ("one number", _items(torch.tensor(1.0), torch.tensor(1)), V,
     "one entry an item is expected: pass a list"),
    ("rows of different lengths", _items([[1.0], [1.0, 2.0]], [0, 1]), T, TABLE),
    ("dictionary of tensors", _items({"left": X, "right": X}, Y), T, TABLE),
    ("something else", _items(7), T, r"a torch data set is expected: see transferkit\.data"),
    ("item of three parts", _items([(X[0], 1, 2)] * 4), T,
     r"make it \(input, label\), a dictionary with 'labels', or a tensor"),
    ("NaN in the inputs", _items(_with(X, (17, 2), math.nan), Y), FloatingPointError,
     r"NaN or infinite at update 1 \(phase 'finetune', epoch 1\): the inputs of items \[17\] are "
     "not finite, so clean them"),
    ("infinity in the inputs", _items(_with(X, (3, 0), math.inf), Y), FloatingPointError,
     r"at update 1 .*: the inputs of items \[3\] are not finite, so clean them"),
    ("NaN that the model makes", _steep, FloatingPointError,
     r"at update 1 .*: the inputs are finite, so lower lr \(now 1e\+30\) or set clip=1\.0"),
    ("inputs of float64", _items(X.double(), Y), V, rf"of float64 \(1, 4\) .*: {FLOAT}"),
    ("whole numbers", _items(X.long(), Y), V, rf"of int64 \(1, 4\) .*: {FLOAT}"),
    ("raw pixels", lambda tmp: _fit(nn.Conv2d(3, 2, 8), (_images().pixels, Y[:6])), V,
     rf"of uint8 \(1, 3, 8, 8\) .*: {FLOAT}; images are scaled and normalised by "
     r"tk\.data\.images"),
    ("numbers for tokens", lambda tmp: _fit(_token_model()), V,
     r"of float32 .*: the model reads whole numbers: convert the inputs with \.long\(\)"),
    ("token outside the vocabulary",
     lambda tmp: _fit(_token_model(), (torch.full((20, 4), 5), Y)), V,
     "is outside the model's vocabulary: use the tokenizer made for it"),
    ("items of another width", _items(torch.zeros(20, 5), Y), V,
     rf"Sequential cannot take inputs of float32 \(1, 5\) \(.*1x5 and 4x8\)\): {SHAPE}"),
    ("prediction on another width", lambda tmp: tk.predict(_model(), torch.zeros(3, 5)), V, SHAPE),
    ("missing entry", lambda tmp: _fit(Paired(), [{"left": x, "labels": 1} for x in X]), V,
     rf"inputs of \{{'left': float32 \(1, 4\)\}} \(.*'right'\): {NAMES}"),
    ("missing entry of stages",
     lambda tmp: _fit(tk.Staged([("head", nn.Linear(4, 2))]), [{"x": x, "labels": 1} for x in X]),
     V, NAMES),
    ("model that returns a tuple", lambda tmp: _fit(Changed(lambda z: (z, 1))), T,
     "wrap the model so that it returns its logits"),
    ("BatchNorm on one item",
     lambda tmp: _fit(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)),
                      batch_size=1),
     V, "BatchNorm cannot train on one item: raise batch_size, or freeze its layer group"),
    ("text without tokens", lambda tmp: data.texts(["1", ""], None, Words(), 4), V,
     "text 1 has no tokens: drop empty texts, or let the tokenizer add its special tokens"),
    ("missing text", lambda tmp: data.texts(["1", None, math.nan], None, Words(), 4), T,
     "text 1 is None, but a string is expected: drop the items without a text, 2 in all"),
    ("one string as texts", lambda tmp: data.texts("12", None, Words(), 4), T,
     r"but a list of them is expected: pass \[text\]"),
    ("texts cut to nothing", lambda tmp: data.texts(["1"], None, Words(), 0), V,
     "max_length is 0: give at least 1, such as 128"),
    ("images of floats", lambda tmp: _images(np.zeros((2, 8, 8))), V,
     r"float64 of shape \(2, 8, 8\), but uint8 \(n, height, width\) or \(n, height, width, 3\) is "
     "expected: convert them"),
    ("images with channels first", lambda tmp: _images(np.zeros((2, 3, 8, 8), np.uint8)), V,
     r"uint8 of shape \(2, 3, 8, 8\), but .* is expected: convert them"),
    ("images without size", lambda tmp: _images(size=0), V, "at least 1, such as size=224"),
    ("images divided by 0", lambda tmp: _images(std=(0.5, 0.5, 0.0)), V,
     "std above 0: take those the model was pre-trained with"),
    ("no view", lambda tmp: _images(augment=lambda images, _: images, views=0), V,
     "views 0: give at least 1, such as size=224"),
    ("augmentation that crops",
     lambda tmp: _images(augment=lambda images, _: images[..., :4]).fetch([0], 0, 0), V,
     r"made \(1, 3, 8, 4\) .*: let it return the shape that it is given"),
    ("split without prepare", _items(Pixels()), T,
     r"Sequential cannot prepare a split: use a model of tk\.models\.load, or make a source with "
     r"tk\.data\.texts, images or tensors"),
    ("split of another kind",
     lambda tmp: tk.models.text_inputs(Words(), 8)(Pixels()), V,
     r"cells/train holds image and this model reads text: choose another model "
     r"\(tk\.models\.available\(\)\) or another data set \(tk\.datasets\.available\(\)\)"),
    # what is trained
    ("unknown layer", lambda tmp: tk.freeze(_model(), "encoder.layer"), V,
     r"nearest names are .*; tk\.summary\(model\) lists the layer groups"),
    ("nothing to train", _frozen, V,
     r"all it would train is frozen; call tk\.unfreeze\(model, \.\.\.\), or give the model a "
     "head"),
    ("empty plan", _fits(plan=[]), V,
     r"the plan is \[\]: give phases, such as \[tk\.finetune\(epochs=3\)\]"),
    ("plan of words", _fits(plan=["finetune"]), V, r"such as \[tk\.finetune\(epochs=3\)\]"),
    ("plan that is a function", _fits(plan=tk.finetune), V,
     r"such as \[tk\.finetune\(epochs=3\)\]"),
    ("more layer groups than there are", _fits(plan=[tk.finetune(1, last=3)]), V,
     "but the model has 2 with parameters: lower `last`, or leave it out to train all"),
    ("half a layer group", _phase(last=1.5), V, r"last is 1\.5: give None \(all\) or at least 1"),
    ("no rate", _phase(lr=0.0), V, r"lr is 0\.0: give a number above 0, such as 2e-5"),
    ("negative rate", _phase(lr=-1e-3), V, "give a number above 0, such as 2e-5"),
    ("infinite rate", _phase(lr=math.inf), V, "lr is inf: give a number above 0, such as 2e-5"),
    ("rate as text", _phase(lr="1e-3"), V, "lr is '1e-3': give one number"),
    ("no epoch", _phase(epochs=0), V, "epochs is 0: give a whole number of at least 1"),
    ("half an epoch", _phase(epochs=1.5), V, "give a whole number of at least 1"),
    ("endless epochs", _phase(epochs=math.inf), V, "give a whole number of at least 1"),
    ("warm-up without end", _phase(warmup=1), V, r"give a share in \[0, 1\), such as 0\.06"),
    ("no rate below", _phase(layer_decay=0), V, r"give a number in \(0, 1\], such as 0\.9"),
    ("rates that grow downwards", _phase(layer_decay=1.1), V, r"in \(0, 1\], such as 0\.9"),
    ("unknown schedule", _phase(schedule="sine"), V, "give one of .*constant"),
    ("unknown optimizer", _phase(optimizer="adam"), V, "give one of .*sgd"),
    # settings of a run
    ("no batch", _fits(batch_size=0), V, "batch_size is 0: give at least 1, such as 32"),
    ("half an item", _fits(batch_size=2.5), V, r"batch_size is 2\.5: give at least 1, such as 32"),
    ("batch size as text", _fits(batch_size="32"), V, "'32': give at least 1, such as 32"),
    ("prediction without a batch", lambda tmp: tk.predict(_model(), X, 0), V,
     "batch_size is 0, but at least 1 is expected: try 64"),
    ("no accumulation", _fits(accumulate=0), V, "accumulate is 0: give at least 1; 1 switches it "
     "off"),
    ("accumulation of a coupled objective", _fits(accumulate=2, objective=Coupled()), V,
     "would give another gradient; use accumulate=1 with a larger batch_size"),
    ("gradient clipped to 0", _fits(clip=0), V, "clip is 0: give a norm above 0, or None"),
    ("seed as text", _fits(seed="a"), V, r"give a whole number in \[0, 2\*\*63\)"),
    ("negative seed", _fits(seed=-1), V, r"seed is -1: give a whole number in \[0, 2\*\*63\)"),
    ("negative workers", _fits(workers=-1), V, "a number of processes; 0 fetches in this one"),
    ("unknown precision", _fits(precision="fp8"), V, "give 'auto', 'fp32', 'bf16' or 'fp16'"),
    ("unknown device", _fits(device="abacus"), V, "'abacus': give 'auto', 'cpu' or 'cuda'"),
    ("device that is not there", _fits(device="cuda:99"), V,
     "give 'auto' or 'cpu', or install the build of torch for that device"),
    ("unknown restore", _fits(restore="first"), V, "'first': give 'best' or 'last'"),
    ("unknown monitor", _fits(metrics=[tk.accuracy], monitor="recall", validation=(X, Y)), V,
     r"give one of \['accuracy', 'loss'\], or add the metric to metrics=\[\.\.\.\]"),
    ("patience without validation", _fits(patience=2), V,
     "patience needs validation data to watch: pass some, or leave it out"),
    ("metric as text", _fits(metrics=["accuracy"], validation=(X, Y)), T,
     r"pass functions, such as metrics=\[tk\.accuracy\]"),
    ("loss of torch", _fits(objective=nn.CrossEntropyLoss()), T,
     r"CrossEntropyLoss, but .*: pass tk\.classification\(\) or tk\.regression\(\)"),
    ("objective that was not called", _fits(objective=tk.classification), T,
     r"the class Classification, .*: pass tk\.classification\(\) or tk\.regression\(\)"),
    ("evaluation with a loss of torch",
     lambda tmp: tk.evaluate(_model(), nn.CrossEntropyLoss(), (X, Y)), T,
     r"pass tk\.classification\(\) or tk\.regression\(\)"),
    ("model that was not built", _fits(model=nn.Linear), T, "build it, or wrap it in one"),
    # stages and the cache
    ("boundary out of range", lambda tmp: layers.split(_model(), 3), V,
     r"the boundary is 3: give a number from 1 to 2 or one of \['1', '2'\]"),
    ("model that cannot be cut", lambda tmp: layers.split(Paired(), 1), T,
     r"hides the order of its layers: make it tk\.staged\(model\), if it is of torchvision or "
     r"timm, or wrap it as tk\.Staged\(\[\(name, stage\), \.\.\.\]\)"),
    ("two stages of one name",
     lambda tmp: tk.Staged([("a", nn.ReLU()), ("a", nn.ReLU())]), V,
     r"the stages are \['a', 'a'\]: give one or more, all distinct"),
    ("stage inside another", lambda tmp: tk.Staged([("a", nn.ReLU()), ("a.b", nn.ReLU())]), V,
     r"'a' is the beginning of 'a\.b': choose another, such as 'blocks\.0'"),
    ("stage called as a method", lambda tmp: tk.Staged([("run", nn.ReLU())]), V,
     r"'run' is taken or empty: choose another, such as 'blocks\.0'"),
    ("stages without names", lambda tmp: tk.Staged([nn.ReLU()]), T,
     r'give stages such as \("head", nn\.Linear\(8, 2\)\)'),
    ("cache below the objective", _fits(objective=Mixed(), plan=[tk.linear_probe(1)]), V,
     "Mixed changes what the frozen layers see, .*: use another one, or train live with "
     "cache=False"),
    ("cache of nothing", lambda tmp: _fit(nn.Linear(4, 2), plan=[tk.linear_probe(1)]), V,
     "so there are no features to cache: freeze the input side, or train live with cache=False"),
    ("damaged features", _damaged_features, V,
     "delete this folder, and they are computed again"),
    # files
    ("missing file", lambda tmp: tk.load(tmp / "nothing"), FileNotFoundError,
     "check the folder's name"),
    ("checkpoint of another model", _other_model, V,
     r"the first 2\.\w+, 2\.\w+; build it as it was then"),
    ("checkpoint of another run", _another_run, V,
     r"another run \(batch_size: 32 → 16\): go on with the model, data and settings of then, or "
     "choose another directory, or delete it to start again"),
    ("truncated checkpoint", _truncated, V,
     r"last\.safetensors cannot be read .*: it is damaged or of another kind; copy it again, or "
     "delete it"),
    ("file of another kind", _text_file, V, "of another kind; copy it again, or delete it"),
    ("file of another program", _foreign, V,
     r"transferkit did not write: copy its tensors into a model with load_state_dict, or give its "
     r"folder to tk\.models\.load"),
    ("file of another format", _old_format, V,
     r"has format 1, not \d+: read it with the version of transferkit that wrote it, or delete "
     "it"),
    ("model that cannot be built", lambda tmp: tk.load(_fit().save(tmp)), V,
     r"pass the same architecture as tk\.load\(directory, model=\.\.\.\)"),
    ("file in place of a directory", _file_as_directory, FileExistsError, STATES),
    # names, sizes and numbers elsewhere
    ("unknown data set", lambda tmp: tk.datasets.load("zh-review"), V,
     "did you mean 'zh-reviews'\\? known names: zh-reviews, .*"),
    ("unknown model", lambda tmp: tk.models.load("minilm-l7"), tk.assets.AssetError,
     r"did you mean 'minilm-l6'\? .*; or put the model's files \(config\.json, "
     r"model\.safetensors, tokenizer\.json\) into a folder and pass the folder's path"),
    ("more layers than there are",
     lambda tmp: tk.models.load("efficientnet-lite0", ["a", "b"], pretrained=False, layers=99), V,
     "has 7 layers and layers=99 were asked for: give 1 to 7"),
    ("labels as one word", lambda tmp: tk.models.load("minilm-l6", "ab"), T,
     r"give a list of names, such as \['no', 'yes'\]"),
    ("no label", lambda tmp: tk.models.load("minilm-l6", []), V,
     "give at least one name, all distinct"),
    ("unknown profile", lambda tmp: tk.profile("gpu"), V,
     "one of smoke, cpu, full is expected: cpu gives the results of the book"),
    ("seed out of range", lambda tmp: tk.profile("smoke", seed=2**32), V,
     r"a whole number in \[0, 2\*\*32\) is expected: pass 0"),
    ("seed that is no number", lambda tmp: tk.profile("smoke", seed=0.5), V, "pass 0"),
    ("claim outside its interval", lambda tmp: tk.claim("lab.value", 2.0, low=0, high=1),
     tk.claims.ClaimError,
     "find out what changed the result; only if the new value is right, correct the interval and "
     "every sentence that rests on it"),
    ("claim without a lab", lambda tmp: tk.claim("value", 0.5, low=0, high=1), V,
     r"such as image-model\.frozen-accuracy"),
    ("metric of classes", lambda tmp: tk.accuracy(np.zeros(5), np.zeros(5, int)), V,
     r"logits have shape \(5,\) and labels \(5,\), but .*: pass the scores of all classes, not the "
     "predicted ones"),
    ("metric of labels (n, 1)",
     lambda tmp: tk.accuracy(np.zeros((5, 2)), np.zeros((5, 1), int)), V,
     r"labels \(5, 1\), but \(n, C\) and \(n,\) .*: pass the scores .*, not the predicted ones"),
    ("metric of measured values", lambda tmp: tk.macro_f1(np.zeros((5, 2)), np.zeros(5)), V,
     r"convert with \.astype\(int\); measured values need another metric"),
    ("metric of another head",
     lambda tmp: tk.accuracy(np.zeros((5, 2)), np.full(5, 2)), V, r"must lie in \[0, 1\]"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "error", "says"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_bad_input_is_named_with_the_remedy(bad, error, says, tmp_path):
    with pytest.raises(error) as raised:
        bad(tmp_path)
    assert type(raised.value) is error
    assert re.search(f"(?:{says})$", str(raised.value), re.DOTALL), str(raised.value)


def test_the_cases_are_many_and_distinct():
    names = [case[0] for case in CASES]
    assert len(names) == len(set(names)) >= 45


# ---- disks that are full or cannot be written to ------------------------------------------------


class PowerCut(Exception):
    pass


def _run(directory, **settings) -> tuple[nn.Module, tk.Run]:
    model, plan = _model(), [tk.finetune(4, lr=0.05)]
    return model, _fit(model, plan=plan, directory=directory, save_every=0.0, **settings)


def _states(directory) -> list[int]:
    return [checkpoint.read(path)[1]["state"]["total"] for path in directory.glob("last*")]


def _full(kind: str):
    # what writing does on a full disk, by the two ways in which it may fail
    def save(tensors, path, metadata):
        path.write_bytes(b"half of it")
        if kind == "system":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    return save


@pytest.mark.parametrize("kind", ["system", "safetensors"])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_full_disk_leaves_the_state_of_before_and_says_what_to_do(
    kind, after, tmp_path, monkeypatch
):
    whole, _ = _run(None)
    saved, save = 0, checkpoint.save_file

    def fails_later(*arguments, **named):
        nonlocal saved
        saved += 1
        (_full(kind) if saved > after else save)(*arguments, **named)

    monkeypatch.setattr(checkpoint, "save_file", fails_later)
    with pytest.raises(OSError) as raised:
        _run(tmp_path)
    says = rf"cannot write .*last\.safetensors \(.*No space left on device.*\): {STATES}$"
    assert re.search(says, str(raised.value))
    assert (raised.value.errno == errno.ENOSPC) == (kind == "system")
    assert len(_states(tmp_path)) == (after > 0)
    assert not list(tmp_path.glob(".*.part"))  # what was half written takes no room
    monkeypatch.undo()
    again, _ = _run(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True)
    )


def test_a_write_that_the_system_really_refuses_leaves_the_state_of_before(tmp_path, monkeypatch):
    # A limit on the size of files, which is the one refusal a test can ask the system for.
    def interrupted(self, *_):
        raise PowerCut

    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(tk.engine.Training, "_leave", interrupted)
        _run(tmp_path)
    before = _states(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(OSError, match=f"File too large.*{STATES}"):
            _run(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert before == _states(tmp_path) == [4]


def test_a_directory_that_cannot_be_written_to_is_refused_before_training(tmp_path, monkeypatch):
    def refused(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))

    monkeypatch.setattr(checkpoint.tempfile, "TemporaryFile", refused)
    model = _model()
    before = model[0].weight.clone()
    with pytest.raises(OSError, match=f"cannot write .*Read-only file system.*{STATES}"):
        _fit(model, directory=tmp_path / "run")
    assert torch.equal(before, model[0].weight)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_directory_of_somebody_else_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=STATES):
        _fit(directory=tmp_path / "run")


def test_features_that_cannot_be_kept_name_the_variable(tmp_path, monkeypatch):
    (tmp_path / "notes").write_text("mine")
    monkeypatch.setenv("TRANSFERKIT_CACHE", str(tmp_path / "notes"))
    remedy = "point TRANSFERKIT_CACHE to a folder of yours, or train with cache=False$"
    with pytest.raises(OSError, match=f"cannot keep features in .*: {remedy}"):
        _fit(plan=[tk.linear_probe(1)])


# ---- input that is good, or good enough for a warning -------------------------------------------


def test_one_class_in_training_is_warned_about_and_trained_on():
    says = "all 20 labels are 0, one class of 2: .*; unless it is meant, see how the data were"
    with pytest.warns(UserWarning, match=says):
        run = _fit(items=(X, torch.zeros(20).long()))
    assert len(run.history) == 1


@pytest.mark.filterwarnings("ignore:all 20 labels", "ignore:auroc is NaN")
def test_an_area_without_a_class_is_nan_with_the_reason_and_never_chooses_the_best_epoch():
    with pytest.warns(UserWarning, match="no item of class 1: score on data that hold every class"):
        assert math.isnan(tk.auroc(np.zeros((3, 2)), np.zeros(3, int)))
    with pytest.warns(UserWarning, match="NaN, and such an epoch is never the best: see that"):
        run = _fit(validation=(X, torch.zeros(20).long()), metrics=[tk.auroc])
    assert math.isnan(run.history[0]["auroc"])


def test_a_batch_larger_than_the_data_is_all_of_it():
    def weights(size):
        run = _fit(batch_size=size)
        return torch.cat([p.detach().flatten() for p in run.model.parameters()])

    assert torch.equal(weights(10_000), weights(20))


@pytest.mark.parametrize(
    "change",
    [
        lambda array: np.asfortranarray(array),
        lambda array: array[::-1].copy()[::-1],  # negative strides
        lambda array: np.repeat(array, 2, axis=1)[:, ::2],
        lambda array: array.astype(array.dtype.newbyteorder(">")),
        lambda array: array.tolist(),
        lambda array: torch.from_numpy(np.ascontiguousarray(array.T)).T,
    ],
    ids=["columns first", "reversed", "every other", "foreign bytes", "lists", "transposed"],
)
def test_the_layout_of_the_inputs_in_memory_does_not_matter(change):
    inputs = change(X.numpy())
    expected = tk.predict(_model(), (X, Y)).logits
    assert np.array_equal(tk.predict(_model(), (inputs, Y)).logits, expected)
    labels = np.asarray(Y.numpy(), np.uint16)[::-1].copy()[::-1]
    run, plain = (_fit(items=items) for items in ((inputs, labels), (X, Y)))
    assert run.history[0]["train_loss"] == plain.history[0]["train_loss"]


def test_outputs_of_one_value_go_with_labels_of_either_shape_and_never_by_broadcasting():
    value = X[:, 0]
    pairs = [
        (_model(1), value),
        (_model(1), value[:, None]),
        (Changed(lambda z: z[:, 0], 1), value),
    ]
    for model, labels in pairs:
        outputs = torch.from_numpy(tk.predict(model, X).logits).reshape(-1)
        wanted = nn.functional.mse_loss(outputs, value).item()
        found = tk.evaluate(model, tk.regression(), (X, labels))["loss"]
        assert found == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(ValueError, match=r"\(20,\) but the labels \(20, 1\): give the head one"):
        tk.evaluate(Changed(lambda z: z[:, 0], 1), tk.regression(), (X, value[:, None]))


def test_numbers_of_numpy_are_numbers(tmp_path):
    phase = tk.finetune(np.int64(1), lr=np.float32(0.01), last=np.int8(1))
    run = _fit(plan=[phase], batch_size=np.int64(8), seed=np.int32(3), directory=tmp_path)
    again = _fit(plan=[phase], batch_size=8, seed=3, directory=tmp_path)
    assert again.history == run.history


def test_an_array_of_any_precision_is_data():
    found, wanted = tk.predict(_model(), X.double().numpy()), tk.predict(_model(), X)
    assert np.array_equal(found.logits, wanted.logits)


def test_one_metric_needs_no_list():
    assert "accuracy" in _fit(validation=(X, Y), metrics=tk.accuracy).history[0]


def test_good_input_brings_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _fit(validation=(X, Y), metrics=[tk.accuracy, tk.auroc])


def test_an_error_that_is_not_of_the_inputs_comes_as_it_is():
    def exhausted(_):
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError, match=r"^no memory$"):
        _fit(Changed(exhausted))
