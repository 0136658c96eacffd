"""What a reader meets at set-up: each trouble gives one message with the remedy, breaks nothing."""

import ast
import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from tools import bootstrap

ROOT = Path(__file__).resolve().parents[2]


def assert_one_message(output: str, *parts: str) -> None:
    """The output ends in the one message, which holds these parts, and shows no traceback."""
    assert output.count("Set-up stopped") == 1 and "Traceback" not in output, output
    message = output.partition("Set-up stopped")[2]
    for part in (*parts, "What to do"):
        assert part in message, output


@contextlib.contextmanager
def locked(tree, line: str):
    """Have the lock name another package beside alpha for a while."""
    lock = tree.root / "requirements.lock"
    before = lock.read_text()
    lock.write_text(f"alpha==1.0\n{line}\n")
    yield
    lock.write_text(before)


def assert_heals(tree) -> None:
    """The same command, once the trouble is gone, ends in a whole environment."""
    status, output = tree.set_up()
    assert status == 0, output
    assert (tree.version_of("alpha"), tree.version_of("beta")) == ("1.0", "1.0")


def test_bootstrap_can_be_read_by_old_pythons():
    ast.parse((ROOT / "tools" / "bootstrap.py").read_text(), feature_version=(3, 6))


@pytest.mark.parametrize("newer", [None, "python3.12"])
def test_an_old_python_is_told_what_to_do(tree, newer):
    status, output = tree.set_up(
        before="sys.version_info = (3, 9, 2)",
        after=f"bootstrap.shutil.which = lambda name: name == {newer!r} or None",
    )
    assert status == 1
    remedy = f"make book PYTHON={newer}" if newer else "sudo apt install python3"
    assert_one_message(output, "3.11 or newer", "this is 3.9.2", remedy)
    assert not tree.venv.exists()


def test_too_little_disk_says_how_much_is_needed(tree):
    status, output = tree.set_up(after="bootstrap.ENVIRONMENT = 900_000")
    assert status == 1
    assert_one_message(output, "GiB free are needed", "900000.0 the environment", "PIP_CACHE_DIR")
    assert not tree.venv.exists()


def test_what_is_there_already_counts_as_disk_that_is_not_needed(finished):
    """With its stamp gone, a whole environment is completed on a disk that is full."""
    (finished.venv / "ready").unlink()
    full = "import shutil; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1, 1, 0)"
    status, output = finished.set_up(
        after=f"bootstrap.DOWNLOADS = bootstrap.ASSETS = 0; {full}",
    )
    assert status == 0, output
    assert "Completing" in output


def test_a_python_without_venv_is_told_what_to_install(tree):
    status, output = tree.set_up(after="sys._base_executable = 'false'")
    assert status == 1
    assert_one_message(output, "false cannot make a virtual environment", "python3-venv")


def test_no_network_at_the_first_set_up(tree):
    nowhere = {"PIP_NO_INDEX": "", "PIP_FIND_LINKS": "", "PIP_INDEX_URL": "http://127.0.0.1:9/"}
    status, output = tree.set_up(**nowhere)
    assert status == 1
    assert_one_message(output, "index cannot be reached", "mirror or proxy", "setup.log")
    assert_heals(tree)


def test_an_index_without_the_package_is_named_as_the_cause(finished):
    with locked(finished, "beta==7.0"):
        status, output = finished.set_up()
        assert status == 1
        assert_one_message(output, "no beta==7.0 for Python", "up to date")
    assert_heals(finished)


@pytest.mark.parametrize("damage", ["truncated", "wrong hash"])
def test_a_damaged_download_is_refused_and_replaced(finished, damage):
    version = "3.0" if damage == "truncated" else "4.0"
    wheel = finished.add_wheel("beta", version)
    whole, settings = wheel.read_bytes(), {}
    if damage == "truncated":
        wheel.write_bytes(whole[: len(whole) // 2])
    else:  # an index that promises another file
        index = finished.root.parent / "index"
        (index / "beta").mkdir(parents=True)
        other = hashlib.sha256(b"another file").hexdigest()
        link = f'<a href="{wheel.as_uri()}#sha256={other}">{wheel.name}</a>'
        (index / "beta" / "index.html").write_text(link)
        settings = {"PIP_NO_INDEX": "", "PIP_FIND_LINKS": "", "PIP_INDEX_URL": index.as_uri()}
    with locked(finished, f"beta=={version}"):
        status, output = finished.set_up(**settings)
        assert status == 1
        assert_one_message(output, "arrived damaged", "cache purge")
        assert finished.version_of("beta") == "1.0"
        wheel.write_bytes(whole)
        assert finished.set_up()[0] == 0
        assert finished.version_of("beta") == version
    assert_heals(finished)


def test_ctrl_c_stops_and_the_second_call_goes_on(tree):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # an index that never answers
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        process = tree.start(PIP_NO_INDEX="", PIP_FIND_LINKS="", PIP_INDEX_URL=address)
        silent.settimeout(60)
        with silent.accept()[0]:
            os.killpg(process.pid, signal.SIGINT)
            output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in output
    assert "the same command goes on from here" in output
    assert tree.venv.exists() and not (tree.venv / "ready").exists()
    status, output = tree.set_up()
    assert status == 0 and "Completing" in output and "Replacing" not in output
    assert tree.version_of("beta") == "1.0"


def test_a_package_that_pip_left_half_installed_is_installed_again(finished):
    (finished.venv / "ready").unlink()
    site = next(finished.venv.glob("lib/python*/site-packages"))
    (site / "beta.py").unlink()
    (site / "beta-1.0.dist-info" / "INSTALLER").unlink()
    (site / "~lpha").mkdir()
    assert_heals(finished)
    assert not (site / "~lpha").exists()


def test_an_environment_that_lost_its_python_is_replaced(tree):
    python = tree.venv / "bin" / "python"
    python.parent.mkdir(parents=True)
    (tree.venv / "bin" / "pip").write_text(f"#!{python}\n")
    python.symlink_to("/nowhere/python3.11")
    status, output = tree.set_up()
    assert status == 0 and "Replacing" in output
    assert tree.version_of("alpha") == "1.0"


def test_an_environment_whose_folder_was_moved_is_not_used(finished, tmp_path):
    assert bootstrap.is_usable(finished.venv)
    moved = tmp_path / ".venv"
    shutil.copytree(finished.venv, moved, symlinks=True)
    assert not bootstrap.is_usable(moved)


def test_a_changed_lock_is_installed(finished):
    finished.add_wheel("beta", "2.0")
    with locked(finished, "beta==2.0"):
        assert finished.set_up()[0] == 0
        assert finished.version_of("beta") == "2.0"
    assert_heals(finished)


def test_the_project_itself_is_installed_so_that_edits_count(finished):
    (finished.root / "transferkit" / "__init__.py").write_text("version = 'edited'\n")
    assert finished.version_of("transferkit") == "edited"


def test_a_second_call_says_nothing_and_takes_less_than_a_second(finished):
    fetches = finished.fetches()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        assert finished.set_up() == (0, "")
        times.append(time.perf_counter() - start)
    assert min(times) < 1
    assert finished.fetches() == fetches


def test_an_old_python_may_use_a_finished_environment(finished):
    assert finished.set_up(before="sys.version_info = (3, 9, 2)") == (0, "")


def test_a_second_set_up_waits_for_the_first(finished):
    with open(finished.root / "_build" / "setup.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = finished.start()
        assert "waiting" in process.stdout.readline()
        assert process.poll() is None
    assert process.wait(timeout=30) == 0
    process.stdout.close()


def test_assets_that_cannot_be_fetched_stop_the_set_up_and_only_they_are_tried_again(finished):
    (finished.root / "transferkit" / "assets.toml").write_text("# another manifest\n")
    (finished.root / "refuse").touch()
    status, output = finished.set_up()
    assert status == 1 and "asset demo: hash mismatch" in output
    assert_one_message(output, "assets are not complete")
    (finished.root / "refuse").unlink()
    status, output = finished.set_up()
    assert status == 0 and "fetching" in output and "Installing" not in output


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_an_asset_that_was_damaged_in_the_cache_is_fetched_again(finished, damage):
    asset = finished.cache / "files" / "demo"
    asset.unlink() if damage == "gone" else asset.write_text("wh")
    status, output = finished.set_up()
    assert status == 0 and "fetching what is missing" in output
    assert asset.read_text() == "whole"


def test_progress_is_read_from_the_log_and_the_environment(tmp_path):
    log = tmp_path / "setup.log"
    log.write_text(
        "Collecting alpha==1.0\n  Downloading alpha-1.0.whl (812.0 MB)\nCollecting beta\n"
    )
    assert bootstrap.progress(tmp_path, log, 3, 75) == (
        "  found 2 of 3 packages (alpha, 812.0 MB), 1 min 15 s"
    )
    log.write_text(log.read_text() + "Installing collected packages: alpha, beta\n")
    (tmp_path / "lib/python3.11/site-packages/alpha-1.0.dist-info").mkdir(parents=True)
    assert bootstrap.progress(tmp_path, log, 3, 9) == "  unpacked 1 of 3 packages, 9 s"
