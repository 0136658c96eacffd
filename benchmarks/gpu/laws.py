"""The laws of training, asked of a card: the tests with the marker `gpu`, and how they ended."""

from __future__ import annotations

import os
from collections import Counter
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks import common
from benchmarks.gpu.steps import Note

FOLDER = "tests/laws"
COLUMNS = (
    ("system", "laws", ""),
    ("passed", "passed", ",.0f"),
    ("failed", "failed", ",.0f"),
    ("skipped", "skipped", ",.0f"),
    ("seconds", "s", ",.0f"),
    ("which", "which failed", ""),
)


class Tally:
    """A plugin of pytest that notes, after each test, how those of its file ended so far.

    A file of which nothing passed, for all was skipped, is not well.
    """

    def __init__(self, note: Note):
        self.note, self.counts = note, {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test was set up, called or cleared away."""
        file, _, test = report.nodeid.partition("::")
        row = self._of(file)
        row["seconds"] += report.duration
        if report.failed:
            self._failed(file, test)
        elif report.when == "call" or report.skipped:
            row[report.outcome] += 1
        if report.when == "teardown":
            self._tell(file)

    def pytest_collectreport(self, report: Any) -> None:
        """A file was read; one that cannot be, for want of a package, say, counts as failed."""
        if report.failed:
            self._failed(report.nodeid, "it cannot be imported")

    def _of(self, file: str) -> Counter:
        return self.counts.setdefault(file, Counter(passed=0, failed=0, skipped=0, seconds=0.0))

    def _failed(self, file: str, test: str) -> None:
        row = self._of(file)
        row["failed"] += 1
        row["which"] = f"{row['which']}; {test}" if row["which"] else test
        self._tell(file)

    def _tell(self, file: str) -> None:
        row = self.counts[file]
        good = not row["failed"] and row["passed"] > 0
        row = {"system": os.path.basename(file), **row, "which": row["which"] or "", "good": good}
        self.note(row)


def laws(device: torch.device, tiny: bool, note: Note) -> None:
    """Run them; without a card all are skipped, which is no proof.

    Raises:
        RuntimeError: no test was run, or pytest itself failed.
    """
    import pytest

    where = os.path.join(FOLDER, "test_frozen.py") if tiny else FOLDER
    several = find_spec("xdist") is not None and not tiny
    many = ["-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadfile"] if several else []
    tally = Tally(note)
    how = ["-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--tb=short"]
    how += [*many, where]
    status = pytest.main(["--rootdir", str(common.ROOT), *how], plugins=[tally])
    if status > 1 or not tally.counts:  # 1 is "some tests failed", which the rows say
        raise RuntimeError(f"pytest ended with status {int(status)} and {len(tally.counts)} files")
