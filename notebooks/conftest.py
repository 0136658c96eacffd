"""``python -m pytest --nbval-lax notebooks`` runs every lab from top to bottom in small.

nbval passes a checked cell in silence when the notebook stores no output for it, so a notebook with
such a cell is refused here before anything runs.
"""

import os

import pytest

from tools import labs
from tools.checks.notebooks import unguarded

for name, value in {
    "TRANSFERKIT_PROFILE": "smoke",
    "TRANSFERKIT_OFFLINE": "1",
    "TRANSFERKIT_PROGRESS": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}.items():
    os.environ.setdefault(name, value)


def pytest_collect_file(file_path):
    """Refuse a notebook whose checked cells have nothing to be compared with."""
    if file_path.suffix == ".ipynb":
        found = list(unguarded(labs.read(file_path)))
        if found:
            raise pytest.UsageError(f"{file_path.name}: " + "; ".join(found))
