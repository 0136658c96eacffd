"""The folder of the formulas' tests refuses a test that binds none."""

from pathlib import Path

import pytest

pytest_plugins = "pytester"

RULES = Path(__file__).resolve().parents[1] / "equations" / "conftest.py"
MARKED = '@pytest.mark.equation("eq-sum")\n'


@pytest.fixture
def run(pytester):
    """Run the source of a test in a folder of equations; gives the result."""

    def run_in_folder(source):
        pytester.makeini("[pytest]\nmarkers =\n    equation(label): a formula\n")
        folder = pytester.mkdir("equations")
        (folder / "conftest.py").write_bytes(RULES.read_bytes())
        (folder / "test_sum.py").write_text(f"import pytest, torch\n{source}")
        return pytester.runpytest_inprocess("-p", "no:cacheprovider")

    return run_in_folder


def test_a_marked_test_runs_in_double_precision(run):
    body = "def test_sum():\n    assert torch.ones(1).dtype == torch.float64\n"
    run(MARKED + body).assert_outcomes(passed=1)


@pytest.mark.parametrize(
    "mark", ["", '@pytest.mark.equation("sum")\n', "@pytest.mark.equation()\n"]
)
def test_a_test_that_names_no_formula_is_refused(run, mark):
    result = run(f"{mark}def test_sum():\n    pass\n")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*test_sum.py::test_sum is marked with*"])
