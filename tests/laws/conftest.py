"""Every law runs on one thread and with a feature cache of its own."""

from __future__ import annotations

import os

import pytest
import torch

_GIVEN = os.environ.get("TRANSFERKIT_CACHE")


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Also while a module's own fixtures are made: dropout draws by the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def an_own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRANSFERKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def shared_assets(an_own_cache, monkeypatch):
    """For tests of shipped models: the cache that holds the downloaded assets."""
    if _GIVEN is None:
        monkeypatch.delenv("TRANSFERKIT_CACHE")
    else:
        monkeypatch.setenv("TRANSFERKIT_CACHE", _GIVEN)
