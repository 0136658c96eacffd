"""Law 3: training on cached features is training on the live frozen layers."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass

import pytest
import torch
from small_models import (
    noisy_flip,
    some_images,
    some_texts,
    state_of,
    tiny_convnet,
    tiny_encoder,
)
from torch import nn

import transferkit as tk
from transferkit import cache

CUTS = [(tiny_convnet, 1), (tiny_convnet, 2), *((tiny_encoder, last) for last in (1, 2, 3))]


def _train(make, last, cached, train, held_out, precision="fp32", epochs=3):
    model = make()
    phase = tk.finetune(epochs, lr=0.05, last=last, cache=cached, optimizer="sgd")
    objective = tk.classification()
    run = tk.fit(
        model, objective, train, held_out, plan=[phase], batch_size=4, precision=precision,
    )  # fmt: skip
    return model, run


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(("make", "last"), CUTS)
def test_cached_features_train_the_model_that_live_layers_train(make, last):
    some = some_images if make is tiny_convnet else some_texts
    train, held_out = some(18), some(9, seed=1)
    live, live_run = _train(make, last, False, train, held_out)
    fast, fast_run = _train(make, last, True, train, held_out)
    left, right = state_of(live), state_of(fast)
    assert max((left[n].float() - right[n].float()).abs().max() for n in left) < 1e-5
    for slow, quick in zip(live_run.history, fast_run.history, strict=True):
        assert quick["train_loss"] == pytest.approx(slow["train_loss"], abs=1e-5)
        assert quick["loss"] == pytest.approx(slow["loss"], abs=1e-5)


@pytest.mark.parametrize(("make", "last"), CUTS)
def test_the_head_gives_the_same_logits_on_cached_features(make, last):
    model = make().eval()
    source = some_images(13) if make is tiny_convnet else some_texts(13)
    names = [g.name for g in tk.layers.groups(model) if g.parameters]
    prefix, suffix = tk.layers.split(model, names[-last])
    features = cache.cached(
        prefix, source, lambda part, batch: part(batch.inputs).detach()
        if make is tiny_convnet
        else {n: t.detach() for n, t in part(batch.inputs).items()}
        if last > 1
        else part(batch.inputs).detach(), batch_size=5,
    )  # fmt: skip
    with torch.no_grad():
        for items in ([0, 1, 2], [12, 3], list(range(13))):
            cached, live = features.fetch(items, None, 0), source.fetch(items, None, 0)
            assert (suffix(cached.inputs) - model(live.inputs)).abs().max() < 1e-5
            assert torch.equal(cached.labels, live.labels)


@pytest.mark.usefixtures("device")
def test_with_augmentation_the_view_is_the_epoch_modulo_k_in_both():
    train = some_images(12, noisy_flip, views=2)
    live, slow = _train(tiny_convnet, 1, False, train, None, epochs=5)
    fast, quick = _train(tiny_convnet, 1, True, train, None, epochs=5)
    for left, right in zip(slow.history, quick.history, strict=True):
        assert right["train_loss"] == pytest.approx(left["train_loss"], abs=1e-5)
    assert (live.head.weight - fast.head.weight).abs().max() < 1e-5


def test_features_in_bf16_are_stored_as_they_are():
    live, _ = _train(tiny_convnet, 1, False, some_images(12), None, precision="bf16")
    fast, _ = _train(tiny_convnet, 1, True, some_images(12), None, precision="bf16")
    assert (live.head.weight - fast.head.weight).abs().max() < 1e-5


def _folders():
    return sorted(path.name for path in (cache.directory() / "features").iterdir())


def test_a_second_run_finds_the_features_and_a_changed_weight_does_not():
    train = some_images(12)
    _train(tiny_convnet, 1, True, train, None)
    first = _folders()
    _train(tiny_convnet, 1, True, train, None)
    assert _folders() == first and len(first) == 1

    def other():
        model = tiny_convnet()
        with torch.no_grad():
            model.stem[1].running_mean[0] += 1e-3
        return model

    _train(other, 1, True, train, None)
    assert len(_folders()) == 2
    _train(tiny_convnet, 1, True, some_images(12, seed=5), None)
    assert len(_folders()) == 3


class Scaled(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, inputs):
        return inputs.flatten(1) * self.scale


def test_features_depend_on_attributes_and_code_not_on_weights_alone():
    # Two models whose weights, names and printed forms agree.
    def make(scale):
        torch.manual_seed(0)
        layer = nn.Linear(192, 4)
        body = nn.Sequential(Scaled(scale), layer)
        return tk.Staged([("body", body), ("head", nn.Linear(4, 3))])

    for scale in (1.0, 100.0):
        _, slow = _train(lambda s=scale: make(s), 1, False, some_images(12), None)
        _, quick = _train(lambda s=scale: make(s), 1, True, some_images(12), None)
        assert quick.history[0]["train_loss"] == pytest.approx(slow.history[0]["train_loss"])


def test_labels_that_are_known_only_when_fetched_come_with_the_features():
    class Late(tk.data.Tensors):
        def __init__(self, inputs, labels):
            super().__init__(inputs)
            self.late = labels

        def fetch(self, indices, epoch, seed):
            batch = super().fetch(indices, epoch, seed)
            batch.labels = self.late[batch.index]
            return batch

    source = some_images(11)
    late = Late(source.fetch(range(11), None, 0).inputs, source.labels)
    _, run = _train(tiny_convnet, 1, True, late, None)
    _, expected = _train(tiny_convnet, 1, True, source, None)
    losses = [[row["train_loss"] for row in each.history] for each in (run, expected)]
    assert losses[0] == pytest.approx(losses[1])


def test_features_of_unknown_data_are_kept_for_one_run_only():
    dataset = [(torch.randn(3, 8, 8), i % 3) for i in range(8)]
    _train(tiny_convnet, 1, True, tk.data.examples(dataset, views=1), None)
    assert _folders() == []


def test_an_interrupted_computation_leaves_no_features_behind():
    prefix, _ = tk.layers.split(tiny_convnet(), "pool")

    def fails(part, batch):
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        cache.cached(prefix, some_images(8), fails)
    assert _folders() == []


def _compute_in_a_process(folder, barrier, results):
    import os

    os.environ["TRANSFERKIT_CACHE"] = folder
    torch.set_num_threads(1)
    prefix, _ = tk.layers.split(tiny_convnet().eval(), "pool")
    barrier.wait()
    features = cache.cached(prefix, some_images(30), lambda part, b: part(b.inputs).detach())
    results.put(float(features.fetch(range(30), None, 0).inputs.sum()))


def test_two_processes_may_compute_the_same_features_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    arguments = (str(tmp_path / "shared"), barrier, results)
    both = [context.Process(target=_compute_in_a_process, args=arguments) for _ in range(2)]
    for process in both:
        process.start()
    sums = [results.get(timeout=60) for _ in both]
    for process in both:
        process.join(60)
    assert sums[0] == sums[1] and all(process.exitcode == 0 for process in both)
    assert len(list((tmp_path / "shared" / "features").iterdir())) == 1


@dataclass(frozen=True)
class MixedInputs(tk.classification):
    """An objective that changes what the frozen layers see."""

    acts_below_head = True


def test_the_cache_refuses_an_objective_that_acts_below_the_cut():
    probe = [tk.linear_probe(1)]
    with pytest.raises(ValueError, match=r"MixedInputs.*cache=False"):
        tk.fit(tiny_convnet(), MixedInputs(), some_images(8), plan=probe)


def test_the_cache_refuses_a_model_that_cannot_be_cut():
    class Opaque(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.body(x))

    data = (torch.randn(8, 4), torch.randint(0, 2, (8,)))
    with pytest.raises(TypeError, match=r"Opaque cannot be cut.*cache=False"):
        tk.fit(Opaque(), tk.classification(), data, plan=[tk.linear_probe(1)])
    tk.fit(Opaque(), tk.classification(), data, plan=[tk.linear_probe(1, cache=False)])


def test_a_sequential_with_a_forward_of_its_own_is_not_cut():
    class Tripled(nn.Sequential):
        def forward(self, inputs):
            return super().forward(inputs * 3)

    model = Tripled(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(TypeError, match="a Tripled cannot be cut"):
        tk.layers.split(model, 1)


def test_a_sequential_with_a_constructor_of_its_own_is_cut():
    class Sized(nn.Sequential):
        def __init__(self, width):
            super().__init__(nn.Linear(4, width), nn.Linear(width, 2))

    model = Sized(5)
    prefix, suffix = tk.layers.split(model, 1)
    inputs = torch.randn(3, 4)
    assert torch.equal(suffix(prefix(inputs)), model(inputs))


def test_the_cache_refuses_endless_augmentation():
    train = some_images(8, noisy_flip, views=None)
    with pytest.raises(ValueError, match="views=k"):
        tk.fit(tiny_convnet(), tk.classification(), train, plan=[tk.linear_probe(1)])


def test_the_cache_refuses_when_nothing_is_frozen():
    phase = tk.finetune(1, cache=True)
    with pytest.raises(ValueError, match="nothing before the first trained"):
        tk.fit(tiny_convnet(), tk.classification(), some_images(8), plan=[phase])


def test_the_cache_refuses_a_state_whose_token_axis_it_cannot_find():
    class Crossed(nn.Module):
        def forward(self, state):
            mask = state["mask"][:, None, None, :]
            return {"hidden": state["hidden"], "mask": mask}

    model = tiny_encoder()
    stages = [("embeddings", model.embeddings), ("mask", Crossed())]
    source = some_texts(8)
    with pytest.raises(ValueError, match=r"pooling stage.*cache=False"):
        cache.cached(tk.Staged(stages), source, lambda part, b: part(b.inputs))
