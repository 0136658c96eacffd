"""Running labs: a lab that fails, or does not make what it declares, is never kept."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny

from tools import elsewhere, execute, labs

LIGHT = {"profile": "import transferkit as tk"}  # without the seconds that importing torch takes


@pytest.fixture
def bare(tmp_path):
    """Give a tiny book that was not executed, with a lab that needs no torch."""
    book = tiny.make(tmp_path)
    tiny.write_lab(book.lab("small").source, **LIGHT)
    return book


def run(book, **cells):
    tiny.write_lab(book.lab("small").source, **LIGHT | cells)
    return execute.execute(book, book.labs())


def kept(book):
    return book.lab("small").executed.exists() or any(book.figures.glob("*"))


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"nbval-check-output": "items = [1]\nitems.sing()"}, "no attribute 'sing'"),
        (
            {"claims": 'tk.claim("small.share", 0.9, low=0.7, high=0.8)'},
            r"\[0.7, 0.8\] is expected",
        ),
        ({"figure": "import sys\nsys.stderr.write('loud')"}, "(?s)not whole.*stderr: loud.*curve"),
    ],
)
def test_a_lab_that_fails_or_lacks_something_is_reported_and_not_kept(bare, cells, message):
    with pytest.raises(execute.LabError, match=message):
        run(bare, **cells)
    assert not kept(bare)


def test_a_failure_shows_the_cell_and_its_traceback(bare):
    with pytest.raises(execute.LabError) as caught:
        run(bare, claims="total = 1\nraise ValueError('the reason')")
    text = str(caught.value)
    assert "concepts/small failed in the cpu profile" in text
    assert "total = 1" in text and "ValueError: the reason" in text and "\x1b[" not in text


def test_a_whole_run_is_stamped_and_its_figure_saved(built):
    lab = built.lab("small")
    run = lab.run()
    assert run["profile"] == "cpu" and run["seed"] == 0 and run["threads"] == 1
    assert run["seconds"] > 0 and 20 < run["peak_memory_mib"] < 8000
    assert run["versions"]["torch"] and run["cpu"] and run["key"]
    assert lab.claims()["small.share"]["value"] == 0.75
    assert (built.figures / "small.curve.svg").read_text().lstrip().startswith("<?xml")
    assert str(built.root) not in lab.executed.read_text("utf-8")


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"output_type": "error", "ename": "E", "evalue": "why"}, "raised E: why"),
        ({"output_type": "display_data", "data": {"image/png": ""}}, "without alt text"),
    ],
)
def test_errors_and_images_without_description_are_shortcomings(book, output, message):
    notebook = json.loads(book.lab("small").executed.read_text("utf-8"))
    notebook["cells"][1]["outputs"] = [output]
    assert message in labs.shortcomings(notebook, book.lab("small").declared)[0]


def test_a_cell_that_was_not_executed_is_a_shortcoming(book):
    notebook = json.loads(book.lab("small").executed.read_text("utf-8"))
    notebook["cells"][2]["execution_count"] = None
    assert labs.shortcomings(notebook, book.lab("small").declared) == ["cell 2 was not executed"]


def test_a_figure_that_was_not_made_is_a_shortcoming(book):
    notebook = json.loads(book.lab("small").executed.read_text("utf-8"))
    notebook["cells"][5]["outputs"] = []
    found = labs.shortcomings(notebook, book.lab("small").declared)
    assert found == ["figure small.curve is declared but was not made"]


def test_claims_of_a_run_at_full_size_are_asked_for_there_alone(book):
    notebook = json.loads(book.lab("small").executed.read_text("utf-8"))
    declared = book.lab("small").declared | {"full-claims": ["small.large"]}
    assert labs.shortcomings(notebook, declared) == []
    found = labs.shortcomings(notebook, declared, "full")
    assert found == ["claim small.large is declared but was not made"]


def test_a_claim_made_twice_or_undeclared_is_a_shortcoming(book):
    notebook = json.loads(book.lab("small").executed.read_text("utf-8"))
    found = labs.shortcomings(notebook, {"claims": ["small.share"], "figures": ["small.curve"]})
    assert "small.count was made but is not declared" in found[0]
    notebook["cells"][4]["outputs"] *= 2
    found = labs.shortcomings(notebook, book.lab("small").declared)
    assert "claim small.share was made 2 times, not once" in found


def test_ctrl_c_leaves_no_half_result_and_no_kernel(bare):
    mark = bare.root / "alive"
    code = f"import pathlib, time\npathlib.Path({str(mark)!r}).touch()\ntime.sleep(300)"
    tiny.write_lab(bare.lab("small").source, **LIGHT | {"claims": code})
    command = [sys.executable, "-m", "tools.execute", "--root", str(bare.root)]
    process = subprocess.Popen(command, cwd=labs.ROOT, start_new_session=True)
    deadline = time.monotonic() + 60
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert mark.exists() and not kept(bare)


def test_ci_fails_a_lab_at_three_times_the_budget(bare, monkeypatch):
    monkeypatch.setenv("CI", "true")
    monkeypatch.setattr(execute, "BUDGET", 0.1)
    with pytest.raises(execute.LabError, match="three times the budget"):
        run(bare)
    assert not kept(bare)


def test_a_full_run_is_recorded_with_its_machine_and_versions(bare):
    execute.execute(bare, bare.labs(), profile="full")
    lab = bare.lab("small")
    record = json.loads(lab.record.read_text("utf-8"))
    assert record["profile"] == "full" and record["cpu"] and record["versions"]["python"]
    assert [claim["name"] for claim in record["claims"]] == ["small.share", "small.count"]
    assert bare.recorded()["small.share"]["value"] == 0.75 and not lab.executed.exists()


def test_a_figure_of_a_full_run_alone_is_recorded_with_its_text(bare):
    lab = bare.lab("small")
    drawn = tiny.CODE["figure"].replace("small.curve", "small.large")
    tiny.write_lab(lab.source, **LIGHT | {"figure": drawn})
    notebook = json.loads(lab.source.read_text("utf-8"))
    notebook["metadata"]["transferkit"] |= {"figures": [], "full-figures": ["small.large"]}
    lab.source.write_text(json.dumps(notebook), "utf-8")
    lab = labs.Book(bare.root).lab("small")  # read anew
    execute.execute(bare, [lab], profile="full")
    (figure,) = lab.recording()["figures"]
    assert figure["name"] == "small.large" and figure["alt"].startswith("A straight line")
    assert lab.record.with_name("small.large.svg").read_text("utf-8").startswith("<?xml")
    assert not any(bare.figures.glob("*"))


def test_an_unknown_lab_is_named_with_those_that_exist(bare, capsys):
    assert execute.main(["--root", str(bare.root), "smal"]) == 2
    assert "'smal'; those of _toc.yml are: concepts/small" in capsys.readouterr().err


MOVES = (
    "import os\n"
    "moved = 'ATEN_CPU_CAPABILITY' in os.environ\n"
    'tk.claim("small.share", 0.795 if moved else 0.75, low=0.7, high={high})\n'
    'tk.claim("small.count", 41, low=41, high=41)'
)


def test_claims_are_asked_with_the_arithmetic_of_another_processor(bare, capsys):
    run(bare, claims=MOVES.format(high=0.8))
    assert elsewhere.main(["--root", str(bare.root)]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "concepts/small: 2 claims hold",
        "  near an end: small.share 0.75, 0.795 in [0.7, 0.8]",
    ]


def test_a_claim_that_fails_on_another_processor_is_reported(bare, capsys):
    run(bare, claims=MOVES.format(high=0.78))
    assert elsewhere.main(["--root", str(bare.root)]) == 1
    assert "has the value 0.795, but [0.7, 0.78] is expected" in capsys.readouterr().out
