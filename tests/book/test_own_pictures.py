"""The listing of *Your own pictures* runs as it is printed, and what it saves can be asked."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import transferkit as tk

ROOT = Path(__file__).resolve().parents[2]
SECTION = (ROOT / "book" / "fine-tuning" / "image-model.md").read_text("utf-8")
SECTION = SECTION.split("(image-model-own)=\n", 1)[1]
LISTING, GROUPS = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)[:2]


def photograph(folder: Path) -> None:
    """Twelve light and twelve dark objects, two noisy photographs of each."""
    random = np.random.default_rng(0)
    for number in range(24):
        name = ("dark", "light")[number % 2]
        (folder / name).mkdir(parents=True, exist_ok=True)
        for shot in (1, 2):
            pixels = random.integers(0, 90, (40, 30, 3)) + 160 * (number % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"f{number}-{shot}.jpg")


def test_the_listing_for_your_own_pictures_trains_saves_and_answers(tmp_path, monkeypatch, capsys):
    photograph(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    assert len(LISTING.splitlines()) <= 16
    exec(compile(LISTING.replace("size=112", "size=48"), "image-model.md", "exec"), {})
    assert "accuracy" in capsys.readouterr().out
    asked = str(Path("photos", "light", "f1-1.jpg"))
    command = [sys.executable, "-m", "transferkit.apply", "predict", "my-model", asked]
    here = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.run(command, env=here, capture_output=True, text=True, check=True).stdout
    assert json.loads(said)["label"] == "light"


def test_the_two_printed_groups_keep_pictures_of_an_object_together(tmp_path, monkeypatch):
    photograph(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    by_name, by_folder = GROUPS.strip().splitlines()
    names = {"tk": tk}
    exec(by_name, names)
    assert len(set(names["mine"].train.keys)) * 2 == len(names["mine"].train)
    for path in list(Path("photos").rglob("*.jpg")):
        inside = path.parent / path.stem.split("-")[0]
        inside.mkdir(exist_ok=True)
        path.rename(inside / path.name)
    exec(by_folder, names)
    assert len(set(names["mine"].train.keys)) * 2 == len(names["mine"].train)
