"""The laws that other libraries are asked: transferkit keeps them, and the record is whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from benchmarks.peers import environment, laws
from benchmarks.peers.adapters.base import Adapter
from benchmarks.peers.adapters.own import Transferkit
from benchmarks.peers.tasks import Items
from tools import labs, peers

RECORD = json.loads(laws.RECORD.read_text("utf-8"))
OUTCOMES = {"holds", "differs", "not offered"}


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.key)
def test_transferkit_keeps_the_law(law):
    found = law.measure(Transferkit())
    assert found.figure <= law.tolerance, found.shown


class Careless(Adapter):
    """A loop with the faults that are easily made."""

    key = "careless"

    def train(self, task):
        if task.frozen:
            task.model.backbone.requires_grad_(False)
        optimizer = task.torch_optimizer()
        loader = DataLoader(Items(task.train), batch_size=task.batch_size, shuffle=True)
        for epoch in range(task.epochs):
            task.model.train()
            if epoch == task.unfreeze_at:
                task.model.backbone.requires_grad_(True)  # the optimizer never hears of it
            for at, (inputs, labels) in enumerate(loader, 1):
                loss = task.loss(task.model(inputs), labels)
                loss.backward()
                loss.item()
                if at % task.accumulate == 0 or at == len(loader):
                    optimizer.step()
                    optimizer.zero_grad()
                for part in optimizer.param_groups if task.schedule == "linear" else []:
                    part["lr"] = 0.1 / at  # one rate for all groups
            if task.score is not None:
                task.score()

    def evaluate(self, task, batch_size):
        task.model.eval()
        loader = DataLoader(Items(task.held_out), batch_size=batch_size, drop_last=batch_size < 10)
        with torch.no_grad():
            losses = [task.loss(task.model(x), y) for x, y in loader]
        return float(torch.stack(losses).mean())


# It keeps nothing, so a run that was cut off starts again, and ends like one that was not.
KEPT_BY_CARELESS = {"frozen.decay", "frozen.norm", "resume.weights", "resume.dropout"}


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.key)
def test_each_law_sees_a_careless_loop(law):
    found = law.measure(Careless())
    assert (found.figure <= law.tolerance) == (law.key in KEPT_BY_CARELESS), found.shown


def test_the_gradient_of_summed_means_is_seen_as_four_times_too_large():
    accumulate = next(law for law in laws.LAWS if law.key == "accumulate.equal")
    assert accumulate.measure(Careless()).shown == "300 % (× 4.000)"


def test_the_record_answers_every_law_for_every_system():
    assert list(RECORD["systems"]) == list(laws.ADAPTERS)
    assert list(RECORD["results"]) == list(RECORD["laws"])
    for law in RECORD["laws"]:
        assert list(RECORD["results"][law]) == list(laws.ADAPTERS)
        for answers in RECORD["results"][law].values():
            assert answers[0]["setting"] == "" and all(row["setting"] for row in answers[1:])
            for row in answers:
                assert row["outcome"] in OUTCOMES and row["shown"]
                assert (row["figure"] is None) == (row["outcome"] == "not offered")


def test_the_record_is_of_the_laws_as_they_stand():
    asked = {law.key: law.about() for law in laws.LAWS}
    assert RECORD["laws"] == asked, "the laws have changed: run make peers"


def test_an_outcome_follows_from_the_figure_and_the_tolerance():
    for key, law in RECORD["laws"].items():
        for answers in RECORD["results"][key].values():
            for row in answers:
                if row["figure"] is not None:
                    holds = row["figure"] <= law["tolerance"]
                    assert row["outcome"] == ("holds" if holds else "differs")


def test_the_record_tells_how_transferkit_is_set_up_now():
    about = RECORD["systems"]["transferkit"]
    assert (about["setup"], about["notes"]) == (Transferkit.setup, Transferkit.notes)


def test_transferkit_keeps_every_law_in_the_record():
    for key, answers in RECORD["results"].items():
        assert [row["outcome"] for row in answers["transferkit"]] == ["holds"], key


def _locked(path: Path) -> dict[str, str]:
    lines = path.read_text("utf-8").splitlines()
    pairs = [line.split()[0].split("==") for line in lines if "==" in line and line[0] != "#"]
    return {name.lower(): version for name, version in pairs}


def test_the_record_is_of_the_locked_versions_and_they_agree_with_the_book():
    peers_lock, own = _locked(environment.LOCK), _locked(labs.ROOT / "requirements.lock")
    for name, version in RECORD["versions"].items():
        if name not in ("python", "transferkit"):
            assert peers_lock[name] == version, "run make peers"
    both = peers_lock.keys() & own.keys()
    assert "torch" in both
    assert {n: peers_lock[n] for n in both} == {n: own[n] for n in both}


def test_the_page_shows_all_of_it():
    book = labs.Book()
    table = peers.laws_table(book)
    titles = [system["title"] for system in RECORD["systems"].values()]
    assert f"torch {RECORD['versions']['torch']}" in table.split("\n\n")[0]
    for law in laws.LAWS:
        (row,) = [line for line in table.splitlines() if line.startswith(f"| {law.asks} |")]
        assert row.count("|") == 2 + len(titles)
    assert table.count(f"| law | {' | '.join(titles)} |") == len({law.number for law in laws.LAWS})
    rows = [line for line in peers.settings_table(book).splitlines() if line.startswith("|")]
    assert len(rows) > 20 and all(row.count("|") == 4 for row in rows)
    for system in RECORD["systems"].values():
        assert system["setup"] in peers.setups(book)


def test_without_a_record_the_page_says_how_to_make_one(tmp_path):
    book = labs.Book(tmp_path)
    for table in (peers.laws_table, peers.settings_table, peers.setups):
        assert "make peers" in table(book)
