"""`.ci/run` runs both commands with the network cut and fails when either does."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Stands for make: notes the target and whether the network is cut; fails, or stops CI, if told to.
MAKE = """\
#!/bin/sh
echo "$1 ${{http_proxy:-plugged}}" >> {log}
[ "{failing}" = stopped ] && kill -TERM $PPID
[ "$1" = test ] && echo "412 passed, 3 skipped in 61.20s"
[ "$1" != "{failing}" ]
"""


def run_ci(folder: Path, failing: str = "") -> tuple[int, list[str], list[str]]:
    """Run `.ci/run` on a stand-in; its status, what it said, and the calls of make."""
    shutil.copytree(ROOT / ".ci", folder / ".ci")
    (folder / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "unplugged.py", folder / "tools")
    programs = folder / "bin"
    programs.mkdir()
    stand_ins = {"make": MAKE.format(log=folder / "calls", failing=failing)}
    stand_ins |= {"chromium": "#!/bin/sh\n", "fc-list": "#!/bin/sh\necho font\n"}
    for name, text in stand_ins.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    plain = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    done = subprocess.run(
        [folder / ".ci" / "run"],
        env={**plain, "PATH": f"{programs}:{os.environ['PATH']}", "UNPLUGGED": "sockets"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    calls = (folder / "calls").read_text().splitlines()
    return done.returncode, done.stdout.splitlines(), calls


@pytest.fixture(scope="module")
def passing(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[str], list[str]]:
    return run_ci(tmp_path_factory.mktemp("passing"))


def test_both_commands_run_unplugged_after_the_set_up(passing):
    status, _, calls = passing
    assert status == 0
    assert calls == [
        "setup plugged",
        "book http://127.0.0.1:9",
        "test http://127.0.0.1:9",
    ]


def test_the_summary_of_the_tests_stands_at_the_end(passing):
    _, said, _ = passing
    assert said[-2] == "412 passed, 3 skipped in 61.20s"
    assert said[-1].startswith("ci: passed after")


@pytest.mark.parametrize("failing", ["setup", "book", "test"])
def test_any_failure_fails_it(tmp_path, failing):
    status, said, calls = run_ci(tmp_path, failing)
    assert status == 1
    assert calls[-1].startswith(failing)
    assert said[-1].startswith("ci: failed")


def test_a_run_that_is_stopped_has_not_passed(tmp_path):
    status, said, calls = run_ci(tmp_path, "stopped")
    assert (status, len(calls)) == (143, 1)
    assert said[-1].startswith("ci: failed (status 143)")
