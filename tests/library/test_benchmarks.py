"""The benchmarks: all systems follow one recipe, the counters count, a tiny run fills the page."""

import json
import re

import pytest
import torch
from torch import nn

from benchmarks import __main__ as program
from benchmarks import common, counters, options, systems, tasks, tax
from benchmarks.targets import targets
from tools import appendix, benchmarks, labs

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = (labs.ROOT / "book" / "appendix" / "benchmarks.md").read_text("utf-8")
TRAINS = {name: system for name, system in systems.known().items() if not system.missing()}
NEEDS_TEXTS = {"bare loop, length buckets"}
OWN_WAY = {"one pass over the backbone", "features once + scikit-learn"}  # no epochs of AdamW
NEEDS_BACKBONE = {"bare loop, features once", "transferkit, features on disk"}


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> labs.Book:
    """A book in which a tiny run of all parts is recorded."""
    root = tmp_path_factory.mktemp("book")
    program.main(["--tiny", "--output", str(root / "book" / "recorded")])
    return labs.Book(root)


@pytest.fixture
def result(book) -> dict:
    return benchmarks.recorded(book)


def tables(result: dict) -> dict:
    return {name: t for part in result["parts"].values() for name, t in part["tables"].items()}


def weights_after(system: systems.System, task: tasks.Task) -> torch.Tensor:
    model = task.build()
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    with common.silence():
        system.train(model, task)
    after = nn.utils.parameters_to_vector(model.parameters()).detach()
    assert (after - before).abs().max() > 0.01
    return after


@pytest.mark.parametrize("name", sorted(TRAINS.keys() - NEEDS_TEXTS - OWN_WAY - NEEDS_BACKBONE))
def test_all_systems_make_the_same_updates_of_a_linear_model(name):
    torch.manual_seed(0)
    rows = tasks.random_rows(24, 6)  # in one batch, so that the order cannot matter
    task = tasks.Task(rows, nn.Linear(6, 2), epochs=6, lr=0.05, batch_size=24, clip=0.1)
    found = weights_after(TRAINS[name], task)
    assert torch.allclose(found, weights_after(TRAINS["bare loop"], task), atol=1e-5)


def text_cases() -> list[tuple[str, bool]]:
    """Every system with what it can train: all of a text model, or its head alone."""
    names = sorted(TRAINS.keys() - OWN_WAY - {"bare loop"})
    whole = [(name, False) for name in names if name not in NEEDS_BACKBONE]
    return whole + [(name, True) for name in names if name not in NEEDS_TEXTS]


@pytest.mark.parametrize(("name", "head_only"), text_cases())
def test_all_systems_make_the_same_updates_of_a_text_model(name, head_only, monkeypatch, tmp_path):
    monkeypatch.setenv("TRANSFERKIT_CACHE", str(tmp_path))
    model = tasks.small_bert(layers=1, hidden=8, dropout=0.0)
    how = {"epochs": 4, "lr": 0.05, "batch_size": 16, "clip": 0.1, "head_only": head_only}
    task = tasks.Task(tasks.random_texts(16, 3, 9), model, **how)
    found = weights_after(TRAINS[name], task)
    assert torch.allclose(found, weights_after(TRAINS["bare loop, DataLoader"], task), atol=1e-4)


def test_scikit_learn_s_weights_in_the_head_give_its_own_answers():
    from sklearn.linear_model import LogisticRegression

    from benchmarks.systems.bare import features
    from benchmarks.systems.scikit_learn import PENALTY

    texts = tasks.random_texts(40, 3, 9)
    model = tasks.small_bert(layers=1, hidden=8, dropout=0.0)
    task = tasks.Task(texts, model, epochs=1, lr=0.1, head_only=True)
    trained = task.build()
    TRAINS["features once + scikit-learn"].train(trained, task)
    rows = features(model.eval(), task)
    own = LogisticRegression(C=PENALTY, max_iter=1000).fit(rows.inputs.numpy(), rows.labels.numpy())
    expected = torch.from_numpy(own.predict_proba(rows.inputs.numpy())).float()
    found = trained.eval()(texts.collate([*texts.dataset()])[0]).softmax(1)
    assert torch.allclose(found, expected, atol=1e-4)


def test_the_counters_count_calls_operators_and_reads():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)

    def nothing() -> None:
        pass

    def run(calls: int, reads: int, prints: int) -> counters.Counts:
        def steps() -> None:
            for at in range(6):
                for _ in range(calls):
                    nothing()
                loss = parameter.sum()
                for _ in range(reads):
                    loss.item()
                    loss.detach().cpu()
                if at == 3:
                    [loss.item() for _ in range(prints)]
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        return counters.count(steps)

    plain, more = run(0, 0, 0), run(7, 2, 5)
    assert more.calls - plain.calls == 7
    assert (plain.reads, plain.reads_mean, more.reads) == (0, 0, 4)
    assert more.reads_mean == pytest.approx(4 + 5 / 5)  # five intervals between six steps
    assert more.operators - plain.operators == 2 * 2  # item and detach


def test_each_round_begins_with_another_system():
    order = []

    def candidate(name: str):
        return lambda turn: order.append(name) or float(turn)

    seconds = common.turns("order", {name: candidate(name) for name in "abc"}, 3)
    assert "".join(order) == "abcbcacab"
    assert seconds == {name: [0.0, 1.0, 2.0] for name in "abc"}


def test_a_system_that_is_not_installed_is_listed_and_not_run():
    absent = systems.System("absent", lambda *_: pytest.fail("it ran"), ("no_such_module",))
    task = tasks.Task(tasks.random_rows(256, 4), nn.Linear(4, 2), epochs=1, lr=0.1)
    entries = {"bare loop": (TRAINS["bare loop"], task), "absent": (absent, task)}
    found = benchmarks.table(common.table("title", tax.COLUMNS, tax.steps("test", entries, 1)))
    assert "| absent | not installed: no_such_module |" in found
    assert len({line.count("|") for line in found.splitlines()[2:]}) == 1


def test_the_tiny_run_measures_every_installed_system(result):
    installed = set(TRAINS)
    for table in tables(result).values():
        for row in table["rows"]:
            if row["system"] in systems.known():
                assert ("missing" in row) == (row["system"] not in installed)
            if "missing" not in row:
                numbers = [row[key] for key, _, form in table["columns"] if form]
                assert all(n is None or n == n for n in numbers) and any(numbers)
    assert {row["system"] for row in tables(result)["linear"]["rows"]} >= {"transferkit", "skorch"}


def test_a_step_of_the_library_keeps_to_its_counters(result):
    rows = {row["system"]: row for row in tables(result)["linear"]["rows"]}
    own, bare = rows["transferkit"], rows["bare loop"]
    assert own["reads"] == 0
    assert own["operators"] <= bare["operators"] + 4
    assert own["calls"] <= 1.25 * bare["calls"]


def test_the_page_shows_all_that_was_recorded(book):
    used = re.findall(r"^```\{(benchmarks-[a-z]+)\}$", PAGE, re.MULTILINE)
    assert sorted(used) == sorted(benchmarks.directives())
    for name in used:
        text = appendix.TABLES[name](book)
        assert text and "nan" not in text.lower().split()
    for chart in re.findall(r"/book/recorded/(\S+\.svg)", PAGE):
        drawn = (book.root / "book" / "recorded" / chart).read_text("utf-8")
        assert drawn.count("<path") > 20
    assert "mean nothing" in appendix.TABLES["benchmarks-machine"](book)


def test_without_a_record_the_page_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="make bench"):
        appendix.TABLES["benchmarks-linear"](labs.Book(tmp_path))


def test_a_missed_target_is_reported_with_its_ceiling(result):
    slow = json.loads(json.dumps(result))
    rows = {row["system"]: row for row in tables(slow)["frozen"]["rows"]}
    rows["HF Trainer"].pop("missing", None)
    rows["HF Trainer"] |= {"seconds": 40.0, "accuracy": 0.8}
    rows["transferkit"] |= {"seconds": 8.0, "accuracy": 0.8}
    rows["one pass over the backbone"]["seconds"] = 5.0
    (found,) = [row for row in targets(slow["parts"]) if "frozen" in row["target"]]
    assert found["reached"] is False and "5.00 times" in found["value"]
    assert found["why"].endswith("8.00 times")
    rows["transferkit"] |= {"seconds": 4.0, "accuracy": 0.8}
    (found,) = [row for row in targets(slow["parts"]) if "frozen" in row["target"]]
    assert found["reached"] is True
    rows["transferkit"]["accuracy"] = 0.7  # fast and worse is not reached
    (found,) = [row for row in targets(slow["parts"]) if "frozen" in row["target"]]
    assert found["reached"] is False


def test_a_part_takes_the_place_of_its_older_self(result, tmp_path, monkeypatch):
    (tmp_path / "benchmarks.json").write_text(json.dumps(result), "utf-8")
    fresh = result["parts"]["options"] | {"tables": {}}
    monkeypatch.setattr(options, "measure", lambda tiny: fresh)
    program.main(["options", "--tiny", "--output", str(tmp_path)])
    after = json.loads((tmp_path / "benchmarks.json").read_text("utf-8"))
    assert list(after["parts"]) == list(result["parts"])
    assert after["parts"]["tax"] == result["parts"]["tax"]
    assert after["parts"]["options"]["tables"] == {}
