"""A claim holds, is recorded, and fails when the result leaves its interval."""

import json
import subprocess
import sys

import nbclient
import nbformat
import numpy as np
import pytest
import torch

from transferkit import claims
from transferkit.claims import CLAIM_MIME, ClaimError, claim, note_test_opened


@pytest.fixture(autouse=True)
def fresh_run():
    claims.note_profile("cpu")
    yield
    claims.note_profile(None)


@pytest.fixture
def shown(monkeypatch):
    """The bundles that were displayed."""
    bundles = []
    monkeypatch.setattr(claims, "show", bundles.append)
    return bundles


@pytest.mark.parametrize("value", [0.8, 0.85, 0.9, np.float32(0.85), torch.tensor(0.85)])
def test_a_value_inside_its_interval_or_on_its_ends_holds(value, shown):
    claim("lab.accuracy", value, low=0.8, high=0.9, seeds=5)
    assert shown[0][CLAIM_MIME]["value"] == pytest.approx(float(value))


@pytest.mark.parametrize("value", [0.7999, 0.9001, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("profile", ["cpu", "full", None])
def test_a_value_outside_its_interval_raises_and_leaves_no_record(value, profile, shown):
    claims.note_profile(profile)
    with pytest.raises(ClaimError, match=r"\[0.8, 0.9\] is expected .* correct the interval"):
        claim("lab.accuracy", value, low=0.8, high=0.9)
    assert shown == []


@pytest.mark.parametrize("value", [0.85, 0.2, float("nan")])
def test_smoke_records_that_nothing_was_evaluated_and_never_raises(value, shown):
    claims.note_profile("smoke")
    claim("lab.accuracy", value, low=0.8, high=0.9)
    record = shown[0][CLAIM_MIME]
    assert (record["evaluated"], record["profile"]) == (False, "smoke")
    assert "not evaluated" in shown[0]["text/plain"]
    json.dumps(record, allow_nan=False)


def test_the_record_holds_what_the_build_needs(shown):
    note_test_opened("film-reviews")
    note_test_opened("film-reviews")
    claim("why-transfer.labels", np.int64(512), low=256, high=1024, seeds=3)
    record = json.loads(json.dumps(shown[0][CLAIM_MIME]))
    assert record == {
        "name": "why-transfer.labels",
        "value": 512,
        "low": 256,
        "high": 1024,
        "seeds": 3,
        "profile": "cpu",
        "evaluated": True,
        "test_opened": ["film-reviews"],
    }
    assert isinstance(record["value"], int)


def test_the_record_keeps_the_tests_opened_before_the_claim_only(shown):
    claim("lab.before", 1.0, low=0, high=2)
    note_test_opened("solar-cells")
    claim("lab.after", 1.0, low=0, high=2)
    claims.note_profile("cpu")
    claim("lab.next-run", 1.0, low=0, high=2)
    assert [bundle[CLAIM_MIME]["test_opened"] for bundle in shown] == [[], ["solar-cells"], []]
    assert "test opened: solar-cells" in shown[1]["text/plain"]


@pytest.mark.parametrize("profile", ["cpu", "smoke"])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"name": "accuracy"}, ValueError, "lab.result"),
        ({"name": "Lab.accuracy"}, ValueError, "lab.result"),
        ({"name": "lab.accuracy\n"}, ValueError, "lab.result"),
        ({"name": "a.b.c"}, ValueError, "lab.result"),
        ({"low": 0.9, "high": 0.8}, ValueError, "low <= high"),
        ({"low": float("-inf")}, ValueError, "finite"),
        ({"high": float("nan")}, ValueError, "finite"),
        ({"seeds": 0}, ValueError, "seeds=0"),
        ({"seeds": 2.5}, ValueError, "seeds=2.5"),
        ({"value": [0.8, 0.9]}, TypeError, "one number"),
        ({"value": None}, TypeError, "one number"),
        ({"value": "high"}, TypeError, "one number"),
    ],
)
def test_a_malformed_claim_raises_in_every_profile(profile, changes, error, message):
    claims.note_profile(profile)
    call = {"name": "lab.accuracy", "value": 0.85, "low": 0.8, "high": 0.9} | changes
    with pytest.raises(error, match=message):
        claim(call.pop("name"), call.pop("value"), **call)


def test_a_receipt_is_one_line_and_printed_outside_notebooks():
    program = (
        "from transferkit.claims import claim\n"
        "claim('lab.accuracy', 0.8612, low=0.8, high=0.9, seeds=5)\n"
        "claim('lab.accuracy', 0.95, low=0.8, high=0.9)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == (
        "claim lab.accuracy: 0.8612 in [0.8, 0.9] (5 seeds, profile not set)\n"
    )
    assert result.returncode == 1
    assert "ClaimError: the claim lab.accuracy has the value 0.95" in result.stderr


def test_a_notebook_shows_the_receipt_once_beside_the_record():
    cell = nbformat.v4.new_code_cell(
        "from transferkit.claims import claim\nclaim('lab.accuracy', 0.85, low=0.8, high=0.9)"
    )
    notebook = nbclient.execute(nbformat.v4.new_notebook(cells=[cell]), kernel_name="python3")
    (output,) = notebook.cells[0].outputs
    assert output.output_type == "display_data"
    assert set(output.data) == {CLAIM_MIME, "text/plain"}
    assert output.data[CLAIM_MIME]["value"] == 0.85
    assert output.data["text/plain"].startswith("claim lab.accuracy: 0.85 in [0.8, 0.9]")


def test_the_claims_module_needs_the_standard_library_alone():
    program = (
        "import sys, transferkit.claims as c; "
        "c.claim('a.b', 1, low=0, high=2); "
        "heavy = {'torch', 'numpy', 'IPython', 'matplotlib'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
