"""Law 3 for the kinds of models that are really used: text encoders, CNNs, ViTs, a Sequential."""

from __future__ import annotations

import copy
import functools
import multiprocessing
import re
from pathlib import Path

import pytest
import timm
import torch
from small_models import noisy_flip, some_images, state_of
from torch import nn
from torchvision.models import resnet, vision_transformer

import transferkit as tk
from transferkit import cache

TEXTS = [
    "a small gem of a film",
    "dull",
    "falls short, and then falls further",
    "so so",
    "这家酒店",
]
LABELS = ["a", "b", "c"]


def _resnet() -> nn.Module:
    return tk.staged(resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=3))


def _torchvision_vit() -> nn.Module:
    vit = vision_transformer.VisionTransformer(
        32, 8, 2, 2, 16, 32, num_classes=3, dropout=0.1, attention_dropout=0.1
    )
    nn.init.normal_(vit.heads.head.weight)  # it begins as zeros, which would hide a wrong feature
    return tk.staged(vit)


def _timm_vit() -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return tk.staged(timm.create_model("vit_tiny_patch16_224", num_classes=3, drop_rate=0.1,
                                       proj_drop_rate=0.1, **sizes))  # fmt: skip


def _timm_cnn() -> nn.Module:
    return tk.models.load("efficientnet-lite0", LABELS, pretrained=False, layers=2, dropout=0.1)


def _minilm() -> nn.Module:
    return tk.models.load("minilm-l6", LABELS, pretrained=False, layers=1, dropout=0.1)


def _e5() -> nn.Module:
    return tk.models.load("e5-small", LABELS, pretrained=False, layers=1, vocabulary=TEXTS)


def _sequential() -> nn.Module:
    hidden = (nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2))
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 12), nn.ReLU(), *hidden,
                         nn.Linear(8, 3))  # fmt: skip


# the trained layer groups that a phase may have, so that the cut is at every boundary
MODELS = {
    _resnet: 5, _torchvision_vit: 4, _timm_vit: 4, _timm_cnn: 3, _sequential: 3, _minilm: 2, _e5: 2,
}  # fmt: skip
CUTS = [
    pytest.param(make, last, id=f"{make.__name__[1:]}-{last}")
    for make, most in MODELS.items()
    for last in range(1, most + 1)
]


@functools.cache
def _made(make) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


@pytest.fixture
def model_of(shared_assets, monkeypatch, tmp_path):
    """A fresh copy of a model whose files are in the shared cache; features go to one's own."""

    def of(make) -> nn.Module:
        model = copy.deepcopy(_made(make))
        monkeypatch.setenv("TRANSFERKIT_CACHE", str(tmp_path / "features"))
        return model

    return of


def _images(count: int, seed: int = 0, **options) -> tk.data.Images:
    small = some_images(count, seed=seed)
    array = small.pixels.permute(0, 2, 3, 1).numpy()
    return tk.data.images(array, small.labels, 32, [0.5] * 3, [0.25] * 3, **options)


def _data(make, model: nn.Module, count: int, seed: int = 0, **options):
    if make not in (_minilm, _e5):
        return _images(count, seed, **options)
    texts = [TEXTS[(seed + i) % len(TEXTS)] for i in range(count)]
    labels = [(seed + i) % 3 for i in range(count)]
    return tk.data.texts(texts, labels, model.prepare.tokenizer, 16)


def _compute(part: nn.Module, batch: tk.data.Batch):
    with torch.no_grad():
        return part(batch.inputs)


@pytest.mark.parametrize(("make", "last"), CUTS)
def test_the_trained_part_gives_the_same_logits_on_cached_features(make, last, model_of):
    model = model_of(make)
    source = _data(make, model, 7)
    names = [group.name for group in tk.layers.groups(model) if group.parameters]
    assert len(names) == MODELS[make] + 1
    prefix, suffix = tk.layers.split(model, names[-last])
    features = cache.cached(prefix, source, _compute, batch_size=3)
    with torch.no_grad():
        for items in ([0, 1, 2], [6, 2], list(range(7))):
            cached, live = features.fetch(items, None, 0), source.fetch(items, None, 0)
            assert (suffix(cached.inputs) - model(live.inputs)).abs().max() < 1e-5
            assert torch.equal(cached.labels, live.labels)


def _train(make, model: nn.Module, last: int, cached: bool):
    # of images two augmented views: in both the view is the epoch modulo 2
    train = _data(make, model, 7, augment=noisy_flip, views=2)
    held_out = _data(make, model, 4, 1)
    phase = tk.finetune(3, lr=0.01, last=last, cache=cached, optimizer="sgd", momentum=0.0)
    return tk.fit(
        model, tk.classification(), train, held_out, plan=[phase], batch_size=4, precision="fp32",
    )  # fmt: skip


@pytest.mark.parametrize(("make", "last"), CUTS)
def test_cached_features_train_what_live_layers_train(make, last, model_of):
    live, fast = model_of(make), model_of(make)
    before = state_of(live)
    slow, quick = _train(make, live, last, False), _train(make, fast, last, True)
    left, right = state_of(live), state_of(fast)
    assert max((left[name].float() - right[name].float()).abs().max() for name in left) < 1e-5
    assert any(not torch.equal(left[name], before[name]) for name in left)
    for a, b in zip(slow.history, quick.history, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], abs=1e-5)
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)


def _train_in_a_process(make, folder, barrier, results):
    import os

    os.environ["TRANSFERKIT_CACHE"] = folder
    torch.set_num_threads(1)
    model = copy.deepcopy(_made(make))
    barrier.wait()
    tk.fit(model, tk.classification(), _images(9), plan=[tk.linear_probe(2, lr=0.01)])
    results.put([float(p.detach().double().sum()) for p in model.parameters()])


@pytest.mark.parametrize("make", [_resnet, _timm_vit])
def test_two_processes_train_on_the_same_features_at_once(make, tmp_path):
    _made(make)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    arguments = (make, str(tmp_path), barrier, results)
    both = [context.Process(target=_train_in_a_process, args=arguments) for _ in range(2)]
    for process in both:
        process.start()
    sums = [results.get(timeout=60) for _ in both]
    for process in both:
        process.join(60)
    assert sums[0] == sums[1] and all(process.exitcode == 0 for process in both)
    assert len(list((tmp_path / "features").iterdir())) == 1


MAPS = Path("/proc/self/smaps")


@pytest.mark.skipif(not MAPS.exists(), reason="only Linux says which files are mapped")
def test_features_are_mapped_and_read_only_where_they_are_asked_for():
    prefix = nn.Sequential(nn.Flatten(), nn.Linear(12, 4096))
    source = tk.data.tensors(torch.randn(512, 3, 4), torch.zeros(512).long())
    written = cache.cached(prefix, source, _compute)
    del written
    features = cache.cached(prefix, source, _compute)  # found, not computed again

    def resident() -> int:
        found = re.search(r"state\.bin\n(?:.*\n)*?Rss: +(\d+) kB", MAPS.read_text())
        return int(found[1])

    whole = 512 * 4096 * 4 // 1024
    assert resident() == 0
    row = features.fetch([300], None, 0).inputs
    live = _compute(prefix, source.fetch([300], None, 0))
    assert (row - live).abs().max() < 1e-5
    assert 0 < resident() < whole / 4
    features.fetch(range(512), None, 0)
    assert resident() == whole
