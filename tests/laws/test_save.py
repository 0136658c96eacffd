"""Law 8: what is saved is the whole model, and a fresh process reads the same from it."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from small_models import same, some_images, state_of, tiny_convnet
from torch import nn

import transferkit as tk
from transferkit import checkpoint

FRESH = """
import sys, numpy as np, torch, transferkit as tk
torch.set_num_threads(1)
model = tk.load(sys.argv[1])
assert not model.training
images = torch.from_numpy(np.load(sys.argv[2]))
np.save(sys.argv[3], tk.predict(model, images, precision="fp32").logits)
print(model.labels)
"""


def _trained():
    model = tiny_convnet()
    run = tk.fit(
        model,
        tk.classification(),
        some_images(16),
        some_images(8, seed=1),
        plan=[tk.finetune(2, lr=0.01)],
        metrics=[tk.accuracy],
    )
    return model, run


def test_a_saved_model_gives_the_same_logits_and_labels_in_a_fresh_process(tmp_path):
    # The named architecture needs no download: its weights come from the folder.
    labels = ["functional", "defective"]
    model = tk.models.load("efficientnet-lite0", labels, pretrained=False, layers=2, size=32)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 3, 32, 32, generator=generator)
    data = (images, torch.tensor([0, 1] * 3))
    run = tk.fit(model, tk.classification(), data, plan=[tk.finetune(1)], precision="fp32")
    run.save(tmp_path / "model")
    np.save(tmp_path / "images.npy", images.numpy())
    arguments = [tmp_path / "model", tmp_path / "images.npy", tmp_path / "logits.npy"]
    command = [sys.executable, "-c", FRESH, *map(str, arguments)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert answer.stdout.strip() == str(labels)
    expected = run.predict(images).logits
    assert np.abs(np.load(tmp_path / "logits.npy") - expected).max() < 1e-6


def test_every_tensor_of_the_model_is_in_the_file(tmp_path):
    model, run = _trained()
    run.save(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
    other = tiny_convnet(seed=9)
    other.labels = None
    filled = tk.load(tmp_path, model=other)
    assert same(state_of(filled), state_of(model)) and filled.labels == ["a", "b", "c"]


def test_the_folder_says_what_the_model_is(tmp_path):
    _, run = _trained()
    run.save(tmp_path)
    about = json.loads((tmp_path / "model.json").read_text())
    assert about["labels"] == ["a", "b", "c"]
    assert about["result"]["best epoch"]["epoch"] == run.best["epoch"]
    card = (tmp_path / "README.md").read_text()
    assert "Labels: a, b, c" in card and "tk.load(" in card


def _sections(folder) -> dict[str, str]:
    parts = (folder / "README.md").read_text("utf-8").split("\n## ")
    return {name: text.strip() for name, _, text in (part.partition("\n") for part in parts)}


def test_the_card_says_what_the_run_knows_and_no_more(tmp_path):
    model = tiny_convnet()
    model.name, model.weights_hash = "tiny", "0123456789abcdef"
    train, held_out = some_images(16), some_images(8, seed=1)
    plan = tk.probe_then_finetune(1, 2, lr=0.01, rates={"head": 0.1})
    run = tk.fit(
        model, tk.classification(label_smoothing=0.1), train, held_out, plan=plan, seed=5,
        metrics=[tk.accuracy], directory=tmp_path / "run", batch_size=4,
    )  # fmt: skip
    said = _sections(run.save(tmp_path / "model"))
    assert said["# tiny"] == "663 parameters, from the pre-trained weights `0123456789abcdef`."
    assert said["Intended use"] == said["Limitations"] == "Not stated."
    assert "Classification(label_smoothing=0.1" in said["Task"]
    assert "Labels: a, b, c" in said["Task"]
    for part, source in (("training", train), ("validation", held_out)):
        labels, inputs = tk.data.content_hash(source.labels)[:16], source.fingerprint()[:16]
        facts = f"{len(source)} items, labels sha256 `{labels}`, inputs sha256 `{inputs}`"
        assert f"- {part}: {facts}" in said["Data"]
    first, second = (line for line in said["Training"].splitlines() if "Phase" in line)
    assert "`linear_probe`: epochs 1, lr 0.001, last 1, cache True" in first
    assert "`finetune`: epochs 2, lr 0.01" in second and "('head', 0.1)" in second
    assert "- seed: 5" in said["Training"] and "- batch_size: 4" in said["Training"]
    best = run.best
    assert f"Epoch {best['epoch']}, in the phase `{best['phase']}`" in said["Results"]
    for name in ("train_loss", "loss", "accuracy"):
        assert f"- {name}: {best[name]:.4g}" in said["Results"]
    assert "seconds" not in said["Results"]
    for name, version in (("torch", torch.__version__), ("transferkit", tk.__version__)):
        assert f"- {name} {version}" in said["Versions"]
    assert "tk.load(directory, model=...)" in said["How to load"]


def test_a_card_knows_the_name_of_a_split_and_what_a_person_adds(tmp_path):
    model = tiny_convnet()
    model.prepare = lambda split: some_images(len(split.inputs))
    split = SimpleNamespace(kind="image", inputs=[0] * 6, name="pixels/train")
    run = tk.fit(model, tk.classification(), split, plan=tk.finetune(1))
    notes = {"Intended use": "A test.", "Data": "Random.", "Licence": "MIT"}
    said = _sections(run.save(tmp_path, notes))
    assert said["Intended use"] == "A test." and said["Licence"] == "MIT"
    assert said["Data"].startswith("Random.\n\n- training: pixels/train, 6 items, labels sha256")
    assert "inputs sha256" not in said["Data"] and "validation" not in said["Data"]
    assert "on the training data:\n\n- train_loss" in said["Results"]
    assert json.loads((tmp_path / "model.json").read_text())["notes"] == notes


def test_a_card_of_a_model_that_was_not_trained_states_nothing_of_training(tmp_path):
    said = _sections(checkpoint.save_model(tmp_path, tiny_convnet(), {}))
    for heading in ("Intended use", "Limitations", "Data", "Training", "Results"):
        assert said[heading] == "Not stated."


def test_shared_tensors_are_stored_once_and_stay_shared(tmp_path):
    def tied():
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        return model

    model = tied()
    data = (torch.randn(8, 3), torch.randint(0, 3, (8,)))
    tk.fit(model, tk.classification(), data, plan=[tk.finetune(1, lr=0.1)]).save(tmp_path)
    again = tk.load(tmp_path, model=tied())
    assert same(state_of(again), state_of(model)) and again[1].weight is again[0].weight


def test_another_architecture_is_refused(tmp_path):
    _, run = _trained()
    run.save(tmp_path)
    with pytest.raises(ValueError, match=r"does not fit the model: \d+ tensors differ"):
        tk.load(tmp_path, model=nn.Linear(3, 3))


def test_a_model_that_does_not_say_how_to_build_it_needs_one_to_fill(tmp_path):
    _, run = _trained()
    run.save(tmp_path)
    with pytest.raises(ValueError, match=r"tk\.load\(directory, model=\.\.\.\)"):
        tk.load(tmp_path)


def test_a_file_cannot_choose_what_code_runs(tmp_path):
    model, run = _trained()
    for loader in ("os.system", "transferkit.checkpoint.save_file"):
        model.recipe = {"loader": loader, "arguments": {}}
        run.save(tmp_path)
        with pytest.raises(ValueError, match="does not say how to build"):
            tk.load(tmp_path)


def test_a_missing_or_damaged_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        tk.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        tk.load(tmp_path)
