"""The gates on labs as git holds them, each with the defect that it must catch."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import tiny

from tools import labs, notebooks
from tools.checks import notebooks as gates

ALONE = {"profile": "import transferkit as tk", "claims": "1", "figure": "2"}


@pytest.fixture
def book(tmp_path):
    return tiny.pretend(tiny.make(tmp_path))


def messages(gate, book):
    return [finding.message for finding in gate(book)]


def edit(book, change):
    path = book.lab("small").source
    notebook = json.loads(path.read_text("utf-8"))
    change(notebook)
    tiny.write(path, json.dumps(notebook))
    return messages(gates.lint, labs.Book(book.root))


def cell(notebook, name):
    return next(c for c in notebook["cells"] if c["id"] == name)


def test_the_sound_lab_passes(book):
    assert messages(gates.lint, book) == [] and messages(gates.agreement, book) == []


def test_a_checked_cell_without_stored_output_is_found(book):
    (message,) = edit(book, lambda nb: cell(nb, "nbval-check-output").update(outputs=[]))
    assert "stores no output to compare with" in message


def test_a_checked_cell_without_execution_count_is_found(book):
    change = {"execution_count": None}
    (message,) = edit(book, lambda nb: cell(nb, "nbval-check-output").update(change))
    assert "stores no output to compare with" in message


def test_an_output_that_nothing_checks_is_found(book):
    output = {"output_type": "stream", "name": "stdout", "text": "1"}
    (message,) = edit(book, lambda nb: cell(nb, "claims").update(outputs=[output]))
    assert "stores outputs that nothing checks" in message


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("parameters", 'PROFILE = "full"\nSEED = 0', "the parameters cell is not"),
        ("profile", "import transferkit as tk", "no cell calls tk.profile(PROFILE, SEED)"),
        ("claims", "x = 1  # " + "long " * 30, "characters, more than 100"),
        ("claims", "%pip install torch", "no magics"),
        ("claims", "!ls", "no magics"),
        ("claims", "from tools import labs", "imports tools"),
        ("claims", "", "is empty"),
        ("claims", "x = (", "does not parse"),
        ("figure", "tk.figure(1)\ntk.figure(2)", "more than once"),
        ("title", "Lab", "the first cell is not Markdown"),
    ],
)
def test_a_lab_out_of_form_is_found(book, name, source, message):
    found = edit(book, lambda nb: cell(nb, name).update(source=source))
    assert any(message in text for text in found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lab": "concepts/other"}, "is 'concepts/other', not 'concepts/small'"),
        ({"claims": ["other.share"]}, "other.share in metadata.transferkit.claims is not small."),
        ({"figures": []}, "metadata.transferkit.figures declares nothing"),
    ],
)
def test_a_wrong_declaration_is_found(book, change, message):
    found = edit(book, lambda nb: nb["metadata"]["transferkit"].update(change))
    assert any(message in text for text in found)


def test_a_lab_without_a_checked_cell_is_found(book):
    found = edit(book, lambda nb: nb["cells"].remove(cell(nb, "nbval-check-output")))
    assert any("no cell is tagged" in text for text in found)


def test_a_stored_output_that_the_executed_lab_contradicts_is_found(book):
    tiny.replace(book.lab("small").source, r"42\n", r"41\n")
    assert "another output than the executed lab printed" in messages(gates.agreement, book)[0]


def test_an_install_cell_that_does_not_fit_the_address_is_found(book):
    tiny.write_config(book.root, "https://github.com/example/book")
    assert "does not fit repository.url" in messages(gates.lint, book)[0]
    notebooks.sync(book.lab("small"))
    assert messages(gates.lint, labs.Book(book.root)) == []


def test_strip_keeps_checked_outputs_alone(book):
    lab = book.lab("small")
    shutil.copy(lab.executed, lab.source)
    notebooks.strip(lab)
    found = labs.Book(book.root)
    assert messages(gates.lint, found) == []
    assert "run" not in found.lab("small").declared


def test_store_runs_the_lab_and_keeps_what_checked_cells_print(tmp_path):
    book = tiny.make(tmp_path)
    tiny.write_lab(book.lab("small").source, **ALONE, **{"nbval-check-output": "print(6 * 7)"})
    notebooks.store(book.lab("small"))
    stored = cell(json.loads(book.lab("small").source.read_text()), "nbval-check-output")
    assert stored["outputs"][0]["text"] == ["42\n"] and stored["execution_count"] == 3


def nbval(book, *arguments):
    shutil.copy(labs.ROOT / "notebooks" / "conftest.py", book.root / "notebooks")
    command = [sys.executable, "-m", "pytest", "-c", labs.ROOT / "pyproject.toml"]
    command += ["--rootdir", book.root, "-p", "no:cacheprovider", "--nbval-lax"]
    command += [book.root / "notebooks"]
    environment = {k: v for k, v in os.environ.items() if k != "TRANSFERKIT_PROFILE"}
    return subprocess.run(command, cwd=labs.ROOT, env=environment, capture_output=True, text=True)


def test_nbval_passes_a_lab_and_sees_the_smoke_profile(tmp_path):
    book = tiny.make(tmp_path)
    look = "import os\n\nassert os.environ['TRANSFERKIT_PROFILE'] == 'smoke'"
    tiny.write_lab(book.lab("small").source, **ALONE | {"claims": look})
    answer = nbval(book)
    assert answer.returncode == 0, answer.stdout


def test_nbval_fails_a_lab_that_prints_something_else(tmp_path):
    book = tiny.make(tmp_path)
    changed = {"nbval-check-output": "print(43)"}
    tiny.write_lab(book.lab("small").source, **ALONE, **changed)
    answer = nbval(book)
    assert answer.returncode == 1 and "43" in answer.stdout


def test_nbval_is_refused_where_it_would_pass_in_silence(tmp_path):
    book = tiny.make(tmp_path)
    edit(book, lambda nb: cell(nb, "nbval-check-output").update(outputs=[]))
    answer = nbval(book)
    assert answer.returncode != 0
    assert "stores no output to compare with" in answer.stdout + answer.stderr
