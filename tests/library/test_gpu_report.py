"""The report on the card, without one: every figure in small, time limits, what is kept, status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import transferkit as tk
from benchmarks import common, tasks
from benchmarks.gpu import __main__ as program
from benchmarks.gpu import card, laws, report, speed, steps
from tools import benchmarks

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def measured(function) -> list[dict]:
    """The rows of a part in its small form, as its program would keep them."""
    rows: list[dict] = []
    with common.silence():
        function(CPU, True, lambda row: rows.append(json.loads(json.dumps(row, default=float))))
    return rows


def without_a_card(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


# ---- the program ---------------------------------------------------------------------------------


def test_without_a_card_it_says_so_in_one_line_and_ends_with_status_3(tmp_path):
    done = without_a_card("--output", str(tmp_path))
    assert done.returncode == program.NO_CARD == 3
    assert done.stderr.splitlines() == [program.WITHOUT] and not done.stdout
    assert not list(tmp_path.iterdir())


def test_a_part_that_does_not_exist_is_named(capsys):
    with pytest.raises(SystemExit):
        program.main(["lawz"])
    assert "no part is called 'lawz': they are laws, " in capsys.readouterr().err


def test_all_parts_together_take_less_than_ten_minutes():
    assert sum(part.limit for part in program.PARTS.values()) <= 570  # and the rest of the program


def test_the_parts_are_there_and_their_columns_too():
    modules = {"laws": laws, "steps": steps, "speed": speed}
    for part in program.PARTS.values():
        module, _, function = part.where.partition(":")
        assert callable(getattr(modules[module], function))
        columns = getattr(modules[module], part.columns)
        assert [len(column) for column in columns] == [3] * len(columns)


def test_a_small_run_keeps_the_parts_of_before_and_writes_a_report(tmp_path):
    rows = [{"system": "old", "rate": 1.0}]
    old = program._recorded("tokens", common.about(1, True, time.time()), "", rows)
    report.save(tmp_path, {"tokens": old})
    done = without_a_card("waits", "--tiny", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    parts = json.loads((tmp_path / "gpu.json").read_text("utf-8"))["parts"]
    assert list(parts) == ["waits", "tokens"]
    assert parts["tokens"] == json.loads(json.dumps(old))
    (row,) = parts["waits"]["tables"]["waits"]["rows"]
    assert row["good"] and row["found"] == "nothing" and row["steps"] == 3
    text = (tmp_path / "gpu.txt").read_text("utf-8")
    assert text.strip() == done.stdout.strip()
    assert "2 of 2 parts are well" in text and "these numbers mean nothing" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.txt"]


CHILD = """
import json, os, subprocess, sys, time
rows = open(sys.argv[sys.argv.index("--rows") + 1], "a")
print(json.dumps({"about": {"commit": "abc"}}), file=rows, flush=True)
for count in range(3):
    print(json.dumps({"system": "a", "passed": count}), file=rows, flush=True)
print(json.dumps({"system": "b", "precision": "bf16"}), file=rows, flush=True)
print('{"system": "cut', end="", file=rows, flush=True)
"""
SLEEPS = (
    CHILD
    + """
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(sys.argv[1], "w").write(str(child.pid))
time.sleep(60)
"""
)
ABOUT = {"commit": "abc"}
KEPT = [{"system": "a", "passed": 2}, {"system": "b", "precision": "bf16"}]


def gone(pid: int) -> bool:
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":  # killed, and not yet waited for by the process that adopted it
            return True
        time.sleep(0.05)
    return False


def test_a_part_that_ends_gives_the_last_row_of_each_name():
    assert program.run([sys.executable, "-c", CHILD], 60) == ("", ABOUT, KEPT)


def test_a_part_that_fails_keeps_its_rows():
    end, _, rows = program.run([sys.executable, "-c", CHILD + "sys.exit(7)"], 60)
    assert end == "failed with status 7" and rows == KEPT


def test_a_part_beyond_its_limit_is_stopped_with_all_it_started(tmp_path):
    note = tmp_path / "pid"
    began = time.monotonic()
    end, _, rows = program.run([sys.executable, "-c", SLEEPS, str(note)], 3)
    assert end == "stopped at its limit of 3 s" and rows == KEPT
    assert time.monotonic() - began < 20
    assert gone(int(note.read_text()))


def test_ctrl_c_keeps_what_was_measured(tmp_path, monkeypatch):
    note, starts = tmp_path / "pid", []
    monkeypatch.setattr(program, "_program", lambda name, tiny: [sys.executable, "-c", SLEEPS,
                                                                 str(note)])  # fmt: skip
    wait = subprocess.Popen.wait

    def interrupted(self, timeout=None):
        if timeout is None or starts:
            return wait(self, timeout)
        starts.append(self)
        while not note.exists() or not note.read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
        return wait(self, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    assert program._all(["tokens", "peers"], "cpu", True, tmp_path / "out") == 130
    parts = json.loads((tmp_path / "out" / "gpu.json").read_text("utf-8"))["parts"]
    assert list(parts) == ["tokens"] and parts["tokens"]["end"] == "interrupted"
    assert parts["tokens"]["tables"]["tokens"]["rows"] == KEPT
    assert "interrupted; what it had measured stands above" in (
        tmp_path / "out" / "gpu.txt"
    ).read_text("utf-8")
    assert gone(int(note.read_text()))


@pytest.mark.parametrize(
    ("end", "rows", "expected"),
    [
        ("", [{"system": "a", "good": True}], []),
        ("", [{"system": "a", "good": False, "precision": "bf16"}], ["a, bf16"]),
        ("", [{"system": "a", "error": "out of memory"}], ["a"]),
        ("", [{"system": "a", "missing": ["accelerate"]}], []),
        ("", [], ["nothing was measured"]),
        ("stopped at its limit of 3 s", [], ["stopped at its limit of 3 s"]),
    ],
)
def test_what_is_not_well_is_named(end, rows, expected):
    assert report.wrong({"end": end, "tables": {"x": {"rows": rows}}}) == expected


def test_rows_that_failed_or_miss_a_library_say_so_in_the_table():
    rows = [{"system": "a", "precision": "bf16", "rate": 12.0, "mfu": 0.123, "milliseconds": 1.5},
            {"system": "b", "precision": "fp32", "error": "out of memory"},
            {"system": "HF Trainer", "missing": ["accelerate"]}]  # fmt: skip
    lines = benchmarks.table(common.table("title", speed.TOKENS, rows)).splitlines()[2:]
    assert "12.3%" in lines[2] and "| b | out of memory |" in lines[3]
    assert "| HF Trainer | not installed: accelerate |" in lines[4]
    assert len({line.count("|") for line in lines}) == 1


# ---- the tests that need a card ------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card, and they run")
def test_tests_of_the_card_are_counted_as_skipped_where_there_is_none():
    rows = measured(laws.laws)
    (row,) = rows[-1:]
    assert (row["system"], row["passed"], row["failed"]) == ("test_frozen.py", 0, 0)
    assert row["skipped"] > 3 and not row["good"]


class Ended:
    """How a test ended, as pytest reports it."""

    def __init__(self, when, outcome, test="tests/laws/test_a.py::test_b"):
        self.when, self.outcome, self.nodeid, self.duration = when, outcome, test, 0.5
        self.failed, self.skipped = outcome == "failed", outcome == "skipped"


def tally(reports) -> dict:
    rows: list[dict] = []
    plugin = laws.Tally(rows.append)
    for one in reports:
        plugin.pytest_runtest_logreport(one)
    return rows[-1]


def test_passed_failed_and_skipped_laws_are_counted():
    passed = [Ended(when, "passed") for when in ("setup", "call", "teardown")]
    skipped = [Ended("setup", "skipped"), Ended("teardown", "passed")]
    failed = [Ended("setup", "passed"), Ended("call", "failed"), Ended("teardown", "passed")]
    row = tally(passed + skipped + passed)
    assert (row["passed"], row["failed"], row["skipped"]) == (2, 0, 1) and row["good"]
    assert row["system"] == "test_a.py" and row["seconds"] == 4.0
    row = tally(passed + failed)
    assert (row["passed"], row["failed"], row["which"]) == (1, 1, "test_b") and not row["good"]
    unread = laws.Tally(lambda row: None)
    unread.pytest_collectreport(Ended("collect", "failed", "tests/laws/test_a.py"))
    assert unread.counts["tests/laws/test_a.py"]["failed"] == 1
    broken = [Ended("setup", "passed"), Ended("call", "passed"), Ended("teardown", "failed")]
    assert not tally(broken)["good"]


def test_laws_that_were_all_skipped_are_no_proof():
    row = tally([Ended("setup", "skipped"), Ended("teardown", "passed")])
    assert row["skipped"] == 1 and not row["good"]


# ---- what is measured ----------------------------------------------------------------------------


def test_the_operations_of_a_perceptron_are_those_of_its_products():
    model = nn.Sequential(nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 3, bias=False))
    found = card.operations_of(model, torch.randn(4, 5), torch.tensor([0, 1, 2, 0]))
    # forward and the gradient of the weights for both, that of the inputs for the second only
    assert found == 2 * (2 * 5 * 7 + 3 * 7 * 3)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_operations_of_an_encoder_are_those_of_its_products():
    layers, width, length, size = 2, 16, 6, 3
    model = tasks.small_bert(layers=layers, hidden=width)
    texts = tasks.random_texts(size, length, length)
    inputs, labels = texts.collate([*texts.dataset()])
    found = card.operations_of(model, inputs, labels)
    products = 4 * width**2 + 2 * width * 4 * width + 2 * length * width  # and the scores of tokens
    expected = 3 * 2 * (layers * length * products + 2 * width)
    assert found == pytest.approx(expected, rel=1e-9)


def test_utilisation_is_operations_times_rate_over_the_peak():
    found = card.utilisation(1e9, 1000.0, "NVIDIA A100-SXM4-80GB", "bf16")
    assert found == pytest.approx(1e12 / 312e12)
    assert card.utilisation(1e9, 1000.0, "NVIDIA A100-SXM4-80GB", "fp32") is None
    assert card.utilisation(1e9, 1000.0, "Some card", "bf16") is None


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA H200", "bf16", 989.5),
        ("NVIDIA H200 NVL", "bf16", 835.5),
        ("NVIDIA H100 80GB HBM3", "fp16", 989.5),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "fp16", None),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA L40", "bf16", None),
        ("NVIDIA L4", "bf16", 121.0),
        ("NVIDIA A10G", "bf16", None),
        ("Tesla T4", "fp16", 65.0),
        ("Tesla T4", "bf16", None),
        ("", "bf16", None),
    ],
)
def test_a_card_is_known_by_its_whole_name(name, precision, expected):
    found = card.peak(name, precision)
    assert (found and found[0]) == (expected and expected * 1e12)


def test_every_peak_has_a_source():
    assert all(source.endswith("data sheet") for *_, source in card.PEAKS)


def test_a_value_that_the_host_reads_in_a_step_is_found():
    class Looks(tk.classification):
        def loss(self, outputs, batch):
            if outputs.requires_grad:
                outputs.sum().item()
            return super().loss(outputs, batch)

    (plain,) = steps._cases(True, 32 * 5)
    assert steps.steady(plain, CPU) == (2, "")
    looking = steps.Case("looks", plain.model, plain.source, {}, lambda model: Looks())
    watched, found = steps.steady(looking, CPU)
    assert watched == 0 and "_local_scalar_dense" in found


def test_another_error_of_a_step_is_no_wait():
    class Breaks(tk.classification):
        def loss(self, outputs, batch):
            if outputs.requires_grad:
                raise RuntimeError("planned")
            return super().loss(outputs, batch)

    (plain,) = steps._cases(True, 32 * 5)
    broken = steps.Case("breaks", plain.model, plain.source, {}, lambda model: Breaks())
    with pytest.raises(RuntimeError, match="planned"):
        steps.steady(broken, CPU)


def test_gradients_in_half_precision_are_compared_with_the_true_ones():
    rows = measured(steps.precision)
    assert [row["precision"] for row in rows] == ["fp32", "bf16"]
    assert all(row["good"] for row in rows)
    exact, half = (row["apart"] for row in rows)
    assert exact < 1e-5 < half


def test_the_gradient_is_that_of_the_loss_and_in_fp16_it_is_unscaled():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    rows = tasks.random_rows(8, 4)
    cross_entropy(model(rows.inputs), rows.labels).backward()
    named = dict(model.named_parameters())
    expected = torch.cat([p.grad.double().flatten() for p in named.values()])
    for parameter in named.values():
        parameter.grad = None
    case = steps.Case("rows", lambda: model, rows.source)
    for precision, limit in (("fp32", 1e-6), ("fp16", 1e-2)):
        found, _ = steps.gradient(case, CPU, precision, 8, 24)
        assert sorted(found.tolist()) == pytest.approx(sorted(expected.tolist()), abs=limit)


def test_what_is_compiled_is_counted_by_phase_and_length():
    plain, compiled = measured(steps.compiled)
    assert plain["versions"] == 0 and plain["phases"] == 2
    assert compiled["versions"] == compiled["most"] == 4
    assert compiled["good"] and compiled["loss"] == pytest.approx(plain["loss"], rel=1e-3)


def test_memory_is_estimated_and_on_a_processor_not_measured():
    rows = measured(steps.memory)
    assert [row["measured"] for row in rows] == [None] * 5
    estimates = [row["estimate"] for row in rows]
    assert estimates[0] > estimates[1] and estimates[0] > estimates[2] > estimates[3]


@pytest.mark.parametrize(("function", "units"), [(speed.images, 4), (speed.tokens, 4 * 16)])
def test_speed_is_measured_for_each_precision_and_system(function, units):
    rows = measured(function)
    assert [(row["system"], row["precision"]) for row in rows] == [
        (system, precision)
        for precision in ("fp32", "bf16")
        for system in ("bare loop", "transferkit")
    ]
    for row in rows:
        assert row["milliseconds"] > 0 and row["mfu"] is None and row["memory"] is None
        assert row["rate"] == pytest.approx(units / (row["milliseconds"] / 1e3))
        operations = row["teraflops"] * 1e12 / row["rate"]
        assert operations == pytest.approx(rows[0]["teraflops"] * 1e12 / rows[0]["rate"])


def test_a_card_without_enough_memory_leaves_a_row_that_says_so():
    def run():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    assert speed.safely(run) == {"error": "CUDA out of memory."}


def test_other_libraries_stand_beside_or_are_named_as_missing(monkeypatch):
    systems = speed.chosen(speed.PEERS)
    absent = type(systems[0])("HF Trainer", lambda *_: pytest.fail("it ran"), ("no_such_module",))
    short = [systems[0], systems[2], absent]
    monkeypatch.setattr(speed, "chosen", lambda names: short)
    rows = measured(speed.peers)
    found = {row["system"]: row for row in rows}
    assert found.keys() == {system.name for system in short}
    assert found.pop("HF Trainer") == {"system": "HF Trainer", "missing": ["no_such_module"]}
    assert all(row["rate"] > 0 for row in found.values())


def test_a_resident_batch_is_every_batch():
    inputs, labels = torch.randn(4, 3), torch.arange(4) % 2
    data = speed.Resident(inputs, labels, 5)
    assert len(data) == len(data.labels) == 20
    assert torch.equal(data.fetch(range(12, 16), 0, 0).inputs, inputs)
    assert torch.equal(data.fetch([7], 0, 0).labels, labels[:1])
    assert len(list(data.each(0))) == 5 and len(data.first(8)) == 8


def test_moments_are_seconds_after_the_first_mark():
    clock = common.Clock("cpu")
    for _ in range(3):
        clock.mark()
        time.sleep(0.01)
    first, second, third = clock.moments()
    assert first == 0.0 and 0.01 <= second <= third - 0.01
