"""The files that say what the project needs agree with each other and with the commands."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools import lock

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
LOCKED = [
    Requirement(line)
    for line in (ROOT / "requirements.lock").read_text("utf-8").splitlines()
    if not line.startswith("#")
]


def wanted() -> list[Requirement]:
    """What `.[all]` asks for by name."""
    extras = PROJECT["optional-dependencies"]
    parts = Requirement(extras["all"][0]).extras
    named = PROJECT["dependencies"] + [r for part in parts for r in extras[part]]
    return [Requirement(r) for r in named]


def make(*arguments: str) -> str:
    """What make prints with these arguments."""
    done = subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_all_holds_every_other_extra():
    extras = dict(PROJECT["optional-dependencies"])
    (whole,) = extras.pop("all")
    assert Requirement(whole).name == PROJECT["name"]
    assert Requirement(whole).extras == set(extras)


def test_the_lock_satisfies_the_project():
    versions = {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in LOCKED}
    for requirement in wanted():
        version = versions.get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} is not in requirements.lock: run make lock"
        assert requirement.specifier.contains(version), f"{requirement} but {version} is locked"


def test_what_the_library_imports_is_declared():
    modules = set()
    for path in (ROOT / "transferkit").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(node.module.partition(".")[0])
    owners = importlib.metadata.packages_distributions()
    needed = {canonicalize_name(owners[m][0]) for m in modules - sys.stdlib_module_names}
    declared = {canonicalize_name(requirement.name) for requirement in wanted()}
    assert needed - {"transferkit"} <= declared


def test_the_lock_names_exact_versions_once():
    assert all(re.fullmatch(r"==[^*]+", str(r.specifier)) for r in LOCKED)
    names = [canonicalize_name(r.name) for r in LOCKED]
    assert len(names) == len(set(names))


def test_the_lock_leaves_linux_packages_to_linux():
    for requirement in LOCKED:
        linux = requirement.name.startswith(("nvidia-", "cuda-")) or requirement.name == "triton"
        on_mac = requirement.marker is None or requirement.marker.evaluate(
            {"sys_platform": "darwin"}
        )
        on_linux = requirement.marker is None or requirement.marker.evaluate(
            {"sys_platform": "linux"}
        )
        assert on_linux and on_mac == (not linux), str(requirement)


def test_a_new_lock_marks_linux_packages_and_leaves_out_pip_and_the_project():
    frozen = (
        "zeta==1\npip==25.0\nnvidia-nccl-cu13==2.30.7\ntransferkit @ file:///somewhere\nAlpha==2\n"
    )
    text = lock.lock_text(frozen, "3.11.7")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert lines == ["Alpha==2", "nvidia-nccl-cu13==2.30.7 ; sys_platform == 'linux'", "zeta==1"]


def test_a_lock_with_a_package_from_a_folder_is_refused():
    with pytest.raises(SystemExit, match="by version"):
        lock.lock_text("beta @ file:///home/someone/beta\n", "3.11.7")


def test_environment_yml_installs_the_project_with_all_extras():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    plain = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert environment["name"] == PROJECT["name"]
    assert sorted(plain) == ["pip", f"python{PROJECT['requires-python']}"]
    assert pip == ["-e .[all]"]


def test_the_installed_project_offers_the_extras_of_pyproject():
    metadata = importlib.metadata.metadata("transferkit")
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    assert metadata["Requires-Python"] == PROJECT["requires-python"]


def test_every_file_of_the_library_is_installed_with_it():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    folder = ROOT / "transferkit"
    assert tools["packages"] == [folder.name]
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    plain = {f for f in files if "__pycache__" not in f and not re.fullmatch(r"\w+\.py", f)}
    assert plain == set(tools["package-data"][folder.name])


def test_make_help_names_every_target():
    text = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.search(r"^\.PHONY: (.+)$", text, re.MULTILINE)[1].split())
    assert targets == set(re.findall(r"^(\w+):", text, re.MULTILINE))
    assert targets == set(re.findall(r"^  make (\w+) +", make("help"), re.MULTILINE))


def test_make_alone_is_help():
    assert make() == make("help")


def test_the_python_of_the_set_up_can_be_chosen():
    assert "/opt/python3.12 tools/bootstrap.py" in make("-n", "setup", "PYTHON=/opt/python3.12")


def test_the_book_is_shared_only_when_asked(monkeypatch):
    monkeypatch.setenv("HOST", "0.0.0.0")  # some shells export the machine's name as HOST
    assert "--host" not in make("-n", "serve")
    assert "--host 0.0.0.0" in make("-n", "serve", "SHARE=1")
    assert "--host 192.0.2.7" in make("-n", "serve", "HOST=192.0.2.7")


def test_full_asks_for_the_name_of_a_lab():
    done = subprocess.run(
        ["make", "full", "PYTHON=true", "LAB="], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode and "LAB=part/name" in done.stdout


@pytest.mark.parametrize("command", re.findall(r"`(make [^`]+)`", (ROOT / "README.md").read_text()))
def test_commands_of_the_readme_exist(command):
    assert "No rule" not in make("-n", *command.split()[1:])


def test_citation_names_the_version_and_licence_of_the_project():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == importlib.metadata.version("transferkit")
    assert citation["license"] == [PROJECT["license"], "CC-BY-4.0"]
    assert citation["cff-version"] == "1.2.0" and citation["authors"] and citation["message"]
