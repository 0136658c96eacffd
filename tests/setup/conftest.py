"""A tiny project that tools/bootstrap.py can set up in seconds, without a network."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PYPROJECT = """\
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "transferkit"
version = "0"
"""

# A build backend of its own, so that the editable install needs no setuptools.
BACKEND = """\
import pathlib, zipfile

def build_editable(folder, config_settings=None, metadata_directory=None):
    name, info = "transferkit-0-py3-none-any.whl", "transferkit-0.dist-info"
    with zipfile.ZipFile(pathlib.Path(folder, name), "w") as wheel:
        wheel.writestr("transferkit.pth", str(pathlib.Path(__file__).parent))
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: transferkit\\nVersion: 0")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nTag: py3-none-any")
        wheel.writestr(f"{info}/RECORD", "")
    return name
"""

# Stands for the fetch of the assets: writes one, counts its calls, fails where a file says so.
ASSETS = """\
import os, pathlib, sys
with open("fetches", "a") as calls:
    calls.write("x")
if pathlib.Path("refuse").exists():
    sys.exit("asset demo: hash mismatch")
asset = pathlib.Path(os.environ["TRANSFERKIT_CACHE"], "files", "demo")
asset.parent.mkdir(parents=True, exist_ok=True)
asset.write_text("whole")
"""

DRIVER = """\
import sys
sys.path.insert(0, "tools")
{before}
import bootstrap
bootstrap.ENVIRONMENT = bootstrap.DOWNLOADS = bootstrap.ASSETS = 0.001
{after}
sys.exit(bootstrap.main())
"""


class Tree:
    """The tiny project, its package index, and the set-up as one callable."""

    def __init__(self, root: Path):
        self.root, self.wheels = root / "project", root / "wheels"
        self.venv, self.cache = self.root / ".venv", root / "cache"
        for folder in (self.root / "tools", self.root / "transferkit", self.wheels):
            folder.mkdir(parents=True)
        shutil.copy(ROOT / "tools" / "bootstrap.py", self.root / "tools")
        files = {
            "pyproject.toml": PYPROJECT,
            "backend.py": BACKEND,
            "requirements.lock": "alpha==1.0\nbeta==1.0\n",
            "transferkit/__init__.py": "",
            "transferkit/assets.py": ASSETS,
            "transferkit/assets.toml": "",
        }
        for name, text in files.items():
            (self.root / name).write_text(text)
        for name in ("alpha", "beta"):
            self.add_wheel(name)

    def add_wheel(self, name: str, version: str = "1.0") -> Path:
        """Put a wheel into the index whose one module holds its version."""
        path = self.wheels / f"{name}-{version}-py3-none-any.whl"
        info = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(f"{name}.py", f"version = {version!r}\n")
            wheel.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"
            )
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")
            wheel.writestr(f"{info}/RECORD", "")
        return path

    def environment(self, **more: str) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        own |= {
            "HOME": str(self.root.parent),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.wheels),
            "PIP_RETRIES": "1",
            "TRANSFERKIT_CACHE": str(self.cache),
        }
        return {name: value for name, value in (own | more).items() if value}

    def start(self, before: str = "", after: str = "", **more: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER.format(before=before, after=after)],
            cwd=self.root,
            env=self.environment(**more),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def set_up(self, before: str = "", after: str = "", **more: str) -> tuple[int, str]:
        """Run the set-up; its exit status and all that it said."""
        process = self.start(before, after, **more)
        output, _ = process.communicate(timeout=120)
        return process.returncode, output

    def version_of(self, name: str) -> str:
        """The version of a package as the environment itself imports it."""
        command = [self.venv / "bin" / "python", "-c", f"import {name}; print({name}.version)"]
        return subprocess.run(command, text=True, capture_output=True, cwd="/").stdout.strip()

    def fetches(self) -> int:
        calls = self.root / "fetches"
        return len(calls.read_text()) if calls.exists() else 0


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """A tree whose set-up was done once; tests that share it leave it finished."""
    tree = Tree(tmp_path_factory.mktemp("finished"))
    status, output = tree.set_up(PYTHONDONTWRITEBYTECODE="1")
    assert status == 0, output
    compiled = tree.venv.glob("lib/python*/site-packages/__pycache__/alpha.*.pyc")
    assert list(compiled), "the packages are not compiled, so every program compiles them anew"
    return tree
