"""A profile changes sizes, seeds everything, and says honestly what it runs on."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from transferkit import claims, profiles
from transferkit.profiles import current, profile


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv("TRANSFERKIT_PROFILE", raising=False)
    monkeypatch.setattr(profiles, "_current", None)
    yield
    claims.note_profile(None)


@pytest.mark.parametrize("name", ["smoke", "cpu", "full"])
def test_a_profile_picks_its_own_value(name):
    assert profile(name).pick(smoke="smoke", cpu="cpu", full="full") == name


def test_the_environment_takes_the_place_of_the_parameters_cell(monkeypatch, capsys):
    monkeypatch.setenv("TRANSFERKIT_PROFILE", "smoke")
    assert profile("cpu").name == "smoke"
    assert "smoke (set by TRANSFERKIT_PROFILE)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["gpu", "", "CPU"])
def test_an_unknown_profile_is_named_with_the_three_there_are(name):
    with pytest.raises(ValueError, match=f"'{name}', but one of smoke, cpu, full"):
        profile(name)


def test_an_unknown_profile_of_the_environment_is_blamed_on_it(monkeypatch):
    monkeypatch.setenv("TRANSFERKIT_PROFILE", "quick")
    with pytest.raises(ValueError, match=r"'quick' \(set by TRANSFERKIT_PROFILE\)"):
        profile("cpu")


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_named(seed):
    with pytest.raises(ValueError, match=str(seed)):
        profile("smoke", seed)


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(1).item()])
def test_the_same_seed_gives_the_same_numbers_everywhere(draw):
    numbers = []
    for seed in (7, 7, 8):
        profile("smoke", seed)
        numbers.append(draw())
    assert numbers[0] == numbers[1] != numbers[2]


def test_the_card_says_the_threads_that_torch_uses():
    program = "import torch; torch.set_num_threads(1); import transferkit as tk; tk.profile('cpu')"
    card = subprocess.check_output([sys.executable, "-c", program], text=True)
    cores = profiles._usable_cores()
    assert f"threads   1 of {cores} usable cores" in card


def test_the_card_names_everything_the_results_depend_on(capsys):
    card = profile("cpu", 3)
    text = capsys.readouterr().out
    assert text.strip() == str(card)
    for part in ("cpu", "3", "fp32", torch.__version__, np.__version__, card.machine):
        assert part in text
        assert part in card._repr_html_()


def test_the_card_shows_the_precision_that_auto_stands_for():
    from transferkit.devices import resolve_device, resolve_precision

    assert profile("smoke", precision="auto").precision == resolve_precision(
        "auto", resolve_device()
    )


def test_claims_know_the_profile_and_start_with_no_test_opened(monkeypatch):
    bundles = []
    monkeypatch.setattr(claims, "show", bundles.append)
    claims.note_test_opened("digits")
    profile("smoke")
    claims.claim("lab.accuracy", 0.1, low=0.8, high=0.9)
    record = bundles[-1][claims.CLAIM_MIME]
    assert (record["profile"], record["evaluated"], record["test_opened"]) == ("smoke", False, [])


def test_figures_get_their_style():
    import matplotlib

    with matplotlib.rc_context({"figure.figsize": (1.0, 1.0)}):
        profile("smoke")
        assert matplotlib.rcParams["figure.figsize"] == [6.5, 4.2]


def test_the_current_profile_is_the_last_one_begun():
    with pytest.raises(RuntimeError, match=r"tk.profile\(PROFILE, SEED\)"):
        current()
    profile("smoke")
    last = profile("full")
    assert current() is last
