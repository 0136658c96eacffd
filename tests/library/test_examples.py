"""Every public name has an example in its docstring, and what the example shows is what happens."""

from __future__ import annotations

import doctest
import importlib
import inspect
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from test_size import CORE
from torch import nn

import transferkit as tk
from tools import api
from transferkit import claims, figures, profiles

CHECKED = (*CORE, "checks")  # the modules all of whose public names have one
HOW = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def explained() -> dict[str, object]:
    """What must have an example, by the name under which it is called."""
    found = {name: getattr(tk, name) for name in tk._NAMES}
    for module in CHECKED:
        for name, value in api.public(importlib.import_module(f"transferkit.{module}")):
            if value not in found.values():
                found[f"{module}.{name}"] = value
    return found


EXPLAINED = explained()


def example(value: object) -> str:
    """The example in a docstring, or nothing."""
    text = inspect.cleandoc(value.__doc__ or "")
    _, _, found = text.partition("\nExample:\n")
    return found.split("\n\n")[0] if found else ""


@pytest.fixture(autouse=True)
def _a_place_of_its_own(monkeypatch, tmp_path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRANSFERKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TRANSFERKIT_PROFILE", raising=False)
    monkeypatch.delenv("TRANSFERKIT_FIGURES", raising=False)
    monkeypatch.setattr(claims, "_profile", None)
    monkeypatch.setattr(profiles, "_current", None)
    monkeypatch.setattr(figures, "use_style", lambda: None)
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_rng_state(random)
    torch.set_num_threads(threads)
    if torch.distributed.is_initialized():  # of an example that failed half-way
        torch.distributed.destroy_process_group()


def run(text: str, name: str) -> list[str]:
    """What the examples in a text show that is not what happens."""
    names = {"np": np, "torch": torch, "nn": nn, "tk": tk}
    test = doctest.DocTestParser().get_doctest(text, names, name, None, 0)
    said: list[str] = []
    doctest.DocTestRunner(verbose=False, optionflags=HOW).run(test, out=said.append)
    return said


@pytest.mark.parametrize("name", EXPLAINED)
def test_the_example_of_every_public_name_shows_what_happens(name):
    text = example(EXPLAINED[name])
    assert ">>> " in text, f"{name} has no example: add one to its docstring, under Example:"
    assert "".join(run(text, name)) == ""


@pytest.mark.parametrize("module", ["apply", "datasets"])  # where a reader's own data come in
def test_other_examples_show_what_happens(module):
    shown = api.public(importlib.import_module(f"transferkit.{module}"))
    texts = {name: text for name, value in shown if (text := example(value))}
    assert texts
    assert "".join(line for name, text in texts.items() for line in run(text, name)) == ""


def test_an_example_that_shows_what_does_not_happen_is_found():
    assert "Got:\n    2" in "".join(run(">>> 1 + 1\n3\n", "wrong"))
    assert run(">>> 1 + 1\n2\n", "right") == []
