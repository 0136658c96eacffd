"""A lab runs again when, and only when, something that its result depends on changed."""

import ast
import json

import pytest
import tiny

from tools import execute, keys, labs


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Give a package of four modules in the place of the real one."""
    sources = {
        "__init__": '_NAMES = {"fit": "engine", "claim": "claims"}\n',
        "engine": "from .plan import Phase\n",
        "plan": "Phase = 1\n",
        "claims": "def claim():\n    pass\n",
        "assets": "import transferkit.plan\n",
    }
    for name, text in sources.items():
        tiny.write(tmp_path / "package" / f"{name}.py", text)
    monkeypatch.setattr(keys, "PACKAGE", tmp_path / "package")
    return tmp_path / "package"


def reached(code):
    cell = {"cell_type": "code", "metadata": {}, "source": code}
    return {path.stem for path in keys.modules({"cells": [cell]})}


@pytest.mark.parametrize(
    ("code", "modules"),
    [
        ("import transferkit as tk\ntk.claim('a.b', 1)", {"__init__", "claims"}),
        ("import transferkit as tk\ntk.fit", {"__init__", "engine", "plan"}),
        ("from transferkit import claim", {"__init__", "claims"}),
        ("from transferkit.assets import x", {"__init__", "assets", "plan"}),
        ("import transferkit.plan", {"__init__", "plan"}),
        ("import torch", {"__init__"}),
        ("%matplotlib inline\nfrom transferkit import fit", {"__init__", "engine", "plan"}),
        ("subprocess.run(['python', '-m', 'transferkit.assets'])", {"__init__", "assets", "plan"}),
    ],
)
def test_modules_are_found_through_lazy_names_and_other_modules(package, code, modules):
    assert reached(code) == modules


@pytest.mark.parametrize(
    "code",
    [
        "import transferkit as tk\ngetattr(tk, 'fit')",
        "from transferkit import *",
        "import importlib\nimportlib.import_module('transferkit.plan')",
    ],
)
def test_when_reading_cannot_tell_every_module_counts(package, code):
    assert reached(code) == {"__init__", "engine", "plan", "claims", "assets"}


def test_the_real_package_is_readable_and_claims_need_no_engine():
    names = keys.table()
    assert {"fit", "claim", "profile", "datasets"} <= set(names)
    assert keys.used(ast.parse("import transferkit as tk\ntk.claim"), names) == {"claims"}


def test_a_changed_module_changes_the_key_of_the_labs_that_reach_it(package, book):
    lab = book.lab("small")
    before = keys.key(lab, "cpu")
    tiny.write(package / "engine.py", "Phase = 2\n")
    assert keys.key(lab, "cpu") == before
    tiny.write(package / "claims.py", "def claim():\n    raise ValueError\n")
    assert keys.key(lab, "cpu") != before


@pytest.mark.parametrize(
    ("old", "new"),
    [("range(42)", "range(43)"), ("small.count", "small.n")],
)
def test_a_changed_cell_or_declaration_changes_the_key(book, old, new):
    before = keys.key(book.lab("small"), "cpu")
    tiny.replace(book.lab("small").source, old, new)
    assert keys.key(book.lab("small"), "cpu") != before


def test_changed_words_change_no_key_and_are_shown_beside_the_old_outputs(book):
    lab = book.lab("small")
    before = keys.key(lab, "cpu")
    tiny.replace(lab.source, "# Lab: small", "# Lab: little")
    assert keys.key(lab, "cpu") == before
    cells = lab.result()["cells"]
    assert "# Lab: little" in labs.source(cells[0])
    assert lab.claims()["small.share"]["value"] == 0.75


def test_changed_code_is_never_shown_beside_outputs_that_it_did_not_make(book):
    lab = book.lab("small")
    tiny.replace(lab.source, "range(42)", "range(43)")
    code = [labs.source(cell) for _, cell in labs.code_cells(lab.result())]
    assert any("range(42)" in text for text in code)


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("claims", "def claim():\n", '# why\ndef claim():\n    """Say it."""\n'),
        ("__init__", '"fit"', '"elsewhere": "plan", "fit"'),
    ],
)
def test_comments_docstrings_and_other_public_names_change_no_key(package, book, module, old, new):
    before = keys.key(book.lab("small"), "cpu")
    tiny.replace(package / f"{module}.py", old, new)
    assert keys.key(book.lab("small"), "cpu") == before


def test_only_the_module_that_rebuilds_a_labs_own_model_may_import_by_name(package):
    import_by_name = "import importlib\nimportlib.import_module(name)\n"
    tiny.write(package / f"{keys.REBUILDS}.py", import_by_name)
    assert reached(f"import transferkit.{keys.REBUILDS}") == {"__init__", keys.REBUILDS}
    tiny.write(package / "plan.py", import_by_name)
    assert "assets" in reached("import transferkit.plan")


def test_the_profile_is_in_the_key_and_stored_outputs_are_not(book):
    lab = book.lab("small")
    before = keys.key(lab, "cpu")
    assert keys.key(lab, "smoke") != before
    tiny.replace(lab.source, json.dumps("42\n"), json.dumps("41\n"))
    assert keys.key(labs.Lab(book, lab.name), "cpu") == before


def test_a_lab_whose_key_and_figures_are_there_does_not_run_again(book, capsys):
    assert execute.execute(book, book.labs()) == []
    assert "up to date" in capsys.readouterr().out


def test_a_lab_whose_figure_is_gone_runs_again(book):
    (book.figures / "small.curve.svg").unlink()
    assert execute.stale(execute._job(book, book.lab("small"), "cpu"))
