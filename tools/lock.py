"""Write `requirements.lock` anew from `pyproject.toml`: `make lock`.

A fresh environment gets the project with all its extras, held to the versions of the present lock
(delete a line, or the file, to let versions move), and what is then installed becomes the lock.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
HEADER = """\
# The exact versions of the book, made by `make lock` (tools/lock.py) under Python {python}:
# `pip freeze --all` without pip, in a fresh environment that holds `.[all]`.
"""
LINUX_ONLY = re.compile(r"(nvidia|cuda)-|triton==")
LEFT_OUT = re.compile(r"(pip|transferkit)( @|==)|#|-e ")


def lock_text(frozen: str, python: str, header: str = HEADER) -> str:
    """The lock for what `pip freeze --all` printed, sorted, Linux's own packages marked as such."""
    lines = [line for line in frozen.splitlines() if line and not LEFT_OUT.match(line)]
    foreign = [line for line in lines if not re.fullmatch(r"[\w.-]+==\S+", line)]
    if foreign:
        raise SystemExit(f"these do not come from a package index by version: {foreign}")
    marker = "; sys_platform == 'linux'"
    marked = [f"{line} {marker}" if LINUX_ONLY.match(line) else line for line in lines]
    return header.format(python=python) + "".join(
        f"{line}\n" for line in sorted(marked, key=str.lower)
    )


def main() -> int:
    (ROOT / "_build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "_build") as folder:
        base = getattr(sys, "_base_executable", sys.executable)
        subprocess.run([base, "-m", "venv", folder], check=True)
        pip = [f"{folder}/bin/python", "-m", "pip"]
        held = ["-c", str(LOCK)] if LOCK.exists() else []
        subprocess.run([*pip, "install", *held, f"{ROOT}[all]", "setuptools", "wheel"], check=True)
        frozen = subprocess.run(
            [*pip, "freeze", "--all"], check=True, capture_output=True, text=True
        )
    LOCK.write_text(lock_text(frozen.stdout, ".".join(map(str, sys.version_info[:3]))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
