"""The listing of *Your own texts* runs as it is printed, and what it saves can be asked."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "book" / "fine-tuning" / "six-steps.md"
GOOD = ["the room was clean", "a fine book", "a sharp screen", "very friendly", "I am pleased"]
BAD = ["the room was dirty", "a dull book", "a broken screen", "very rude", "I am angry"]
WHOSE = ["I think:", "this time", "in short,", "a friend said:", "honestly,", "as always,", "well,"]


def test_the_listing_for_your_own_texts_trains_saves_and_answers(tmp_path, monkeypatch, capsys):
    kinds = (("good", GOOD), ("bad", BAD))
    rows = [
        f'"{start} {text}",{label}' for label, texts in kinds for text in texts for start in WHOSE
    ]
    (tmp_path / "mine.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    section = PAGE.read_text("utf-8").split("(six-steps-own)=\n", 1)[1]
    listing = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
    assert len(listing.splitlines()) <= 16
    listing = listing.replace("e5-small", "minilm-l6")  # half the layers, a tenth of the file
    names = {}
    exec(compile(listing, str(PAGE), "exec"), names)
    assert "accuracy" in capsys.readouterr().out
    command = [sys.executable, "-m", "transferkit.apply", "predict", "my-model", "a clean room"]
    here = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.run(command, env=here, capture_output=True, text=True, check=True).stdout
    assert json.loads(said)["label"] == "good"
