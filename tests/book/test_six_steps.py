"""The listing of *Your own texts* runs as it is printed, and what it saves can be asked."""

import json
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "book" / "fine-tuning" / "six-steps.md"
GOOD = [
    "房间很干净",
    "书很好看",
    "屏幕清晰",
    "服务周到",
    "物有所值",
    "非常满意",
    "早餐丰富",
    "速度很快",
]
BAD = [
    "房间太脏",
    "书很无聊",
    "屏幕有坏点",
    "服务很差",
    "不值这个价",
    "非常失望",
    "早餐难吃",
    "速度太慢",
]
WHOSE = ["我觉得", "这次", "总的来说", "朋友说", "老实说", "今年"]


def test_the_listing_for_your_own_texts_trains_saves_and_answers(tmp_path, monkeypatch, capsys):
    rows = [
        f"{start}{text},{label}"
        for label, texts in (("good", GOOD), ("bad", BAD))
        for text in texts
        for start in WHOSE
    ]
    (tmp_path / "mine.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    section = PAGE.read_text("utf-8").split("(six-steps-own)=\n", 1)[1]
    listing = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
    assert len(listing.splitlines()) <= 16
    # few epochs, and a vocabulary of these texts alone: the same calls in a third of the time
    listing = listing.replace("max_length=64", "max_length=16, vocabulary=mine.train['text']")
    listing = listing.replace("finetune(8,", "finetune(1,").replace("probe(60,", "probe(20,")
    names = {}
    exec(compile(listing, str(PAGE), "exec"), names)
    assert "accuracy" in capsys.readouterr().out
    command = [sys.executable, "-m", "transferkit.apply", "predict", "my-model", "这次早餐丰富"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(said)["label"] in names["mine"].labels
