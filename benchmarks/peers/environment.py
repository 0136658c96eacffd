"""The peers' own environment: `.venv-peers`, so that the book's stays small.

`python -m benchmarks.peers.environment` makes it from `requirements.lock` of this folder, unless it
is already so. With `--lock` that file is written anew from `requirements.in`, held to the versions
of the book's own lock, so that both environments have the same torch. Standard library only.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

from tools import lock

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv-peers"
WANTED = Path(__file__).with_name("requirements.in")
LOCK = Path(__file__).with_name("requirements.lock")
HEADER = """\
# The exact versions of the peers' environment, made under Python {python} by
# `python -m benchmarks.peers.environment --lock`; what the book's own lock holds is the same here.
"""


def _install(folder: Path, *what: str) -> list[str]:
    # Make an environment, install into it, and return the command that runs its pip.
    base = getattr(sys, "_base_executable", sys.executable)
    subprocess.run([base, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip"]
    subprocess.run([*pip, "install", "--no-input", "--no-compile", *what], check=True)
    return pip


def make() -> None:
    """Bring `.venv-peers` to the lock, unless its stamp says that it is there already."""
    key, stamp = hashlib.sha256(LOCK.read_bytes()).hexdigest(), VENV / "ready"
    if stamp.is_file() and stamp.read_text() == key:
        return
    print("Installing the peers into .venv-peers: 3 GiB to download, 7 GiB on disk", flush=True)
    stamp.unlink(missing_ok=True)
    pip = _install(VENV, "-r", str(LOCK))
    subprocess.run([*pip, "check"], check=True)
    stamp.write_text(key)


def write_lock() -> None:
    """Write the lock anew, from a fresh environment."""
    (ROOT / "_build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "_build") as folder:
        held = ["-c", str(ROOT / "requirements.lock")]
        pip = _install(Path(folder), *held, "-r", str(WANTED))
        freeze = [*pip, "freeze", "--all"]
        frozen = subprocess.run(freeze, check=True, capture_output=True, text=True).stdout
    python = ".".join(map(str, sys.version_info[:3]))
    LOCK.write_text(lock.lock_text(frozen, python, HEADER))


if __name__ == "__main__":
    write_lock() if "--lock" in sys.argv[1:] else make()
