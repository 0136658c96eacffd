"""The loader of assets: verified, atomic, resumable, and clear when something is wrong.

No test needs a network: pip is pointed to a folder that holds small archives made here.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from transferkit import assets

ONE, TWO = b"first member\n" * 500, b"second member\n" * 500
MANIFEST = """
[archives.tiny-wheel]
version = "1.0"
kind = "wheel"
size = 0.1
licence = "MIT"
[archives.tiny-source]
version = "2.0"
kind = "sdist"
size = 0.1
licence = "MIT"

[assets.pair]
type = "data set"
title = "Two members of a wheel"
licence = "MIT"
origin = "made here"
citation = "none"
[assets.pair.files.one]
archive = "tiny-wheel"
member = "tiny_wheel/one.txt"
sha256 = "{one}"
[assets.pair.files.two]
archive = "tiny-wheel"
member = "tiny_wheel/two.txt"
sha256 = "{two}"

[assets.many]
type = "data set"
title = "Members listed by the wheel's own RECORD"
licence = "MIT"
origin = "made here"
citation = "none"
[assets.many.files.record]
archive = "tiny-wheel"
member = "tiny_wheel-1.0.dist-info/RECORD"
sha256 = "{record}"
[assets.many.files.images]
archive = "tiny-wheel"
member = "tiny_wheel/images/*.bin"
record = "tiny_wheel-1.0.dist-info/RECORD"

[assets.source]
type = "model"
title = "A member of a source distribution"
licence = "MIT"
origin = "made here"
citation = "none"
[assets.source.files.one]
archive = "tiny-source"
member = "tiny-source-2.0/tiny/one.txt"
sha256 = "{one}"
"""


def sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def wheel_members() -> dict[str, bytes]:
    members = {"tiny_wheel/one.txt": ONE, "tiny_wheel/two.txt": TWO, "tiny_wheel/other.txt": b"-"}
    members |= {f"tiny_wheel/images/{i}.bin": bytes([i]) * 99 for i in range(5)}
    info = "tiny_wheel-1.0.dist-info"
    members[f"{info}/METADATA"] = b"Metadata-Version: 2.1\nName: tiny-wheel\nVersion: 1.0\n"
    members[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    lines = []
    for name, raw in members.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(raw).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(raw)}")
    members[f"{info}/RECORD"] = "\n".join([*lines, f"{info}/RECORD,,"]).encode()
    return members


def write_wheel(folder: Path, members: dict[str, bytes]) -> Path:
    path = folder / "tiny_wheel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, raw in members.items():
            archive.writestr(name, raw)
    return path


def write_sdist(folder: Path, marker: Path) -> Path:
    """A source distribution whose setup.py leaves a mark if anyone runs it."""
    members = {
        "PKG-INFO": b"Metadata-Version: 2.1\nName: tiny-source\nVersion: 2.0\n",
        "setup.py": f"open({str(marker)!r}, 'w').close()\n".encode(),
        "tiny/one.txt": ONE,
    }
    path = folder / "tiny-source-2.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, raw in members.items():
            entry = tarfile.TarInfo(f"tiny-source-2.0/{name}")
            entry.size = len(raw)
            archive.addfile(entry, io.BytesIO(raw))
    return path


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A manifest, an index folder and an empty cache of this test's own."""
    index, cache = tmp_path / "index", tmp_path / "cache"
    index.mkdir()
    members = wheel_members()
    manifest = tmp_path / "assets.toml"
    record = sha256(members["tiny_wheel-1.0.dist-info/RECORD"])
    manifest.write_text(MANIFEST.format(one=sha256(ONE), two=sha256(TWO), record=record))
    monkeypatch.setattr(assets, "MANIFEST", manifest)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("TRANSFERKIT_OFFLINE", raising=False)
    settings = {
        "TRANSFERKIT_CACHE": str(cache),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(index),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    marker = tmp_path / "setup.py was run"
    return SimpleNamespace(
        cache=cache,
        index=index,
        manifest=manifest,
        members=members,
        wheel=write_wheel(index, members),
        sdist=write_sdist(index, marker),
        marker=marker,
    )


def leftovers(cache: Path) -> list[Path]:
    """Files in the cache that are neither a finished member nor a lock."""
    files = [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return [path for path in files if "staging" in path.parts or path.name.startswith("tmp")]


def test_listed_members_are_extracted_and_verified_and_nothing_else_is_kept(world):
    paths = assets.files("pair")
    assert paths["one"].read_bytes() == ONE
    assert paths["two"].read_bytes() == TWO
    assert not list(world.cache.rglob("other.txt")), "a member that is not listed was extracted"
    assert not list(world.cache.rglob("*.whl")), "the archive was kept"
    assert not leftovers(world.cache)


def test_members_listed_by_the_record_are_verified_by_its_hashes(world):
    folder = assets.files("many")["images"]
    assert sorted(path.name for path in folder.iterdir()) == [f"{i}.bin" for i in range(5)]
    assert assets.verify(["many"]) == []
    (folder / "3.bin").write_bytes(b"damaged")
    assert any("3.bin differs" in line for line in assets.verify(["many"]))
    assets.files("many")
    assert (folder / "3.bin").read_bytes() == bytes([3]) * 99


def test_a_source_distribution_is_read_and_its_code_is_not_run(world):
    assert assets.files("source")["one"].read_bytes() == ONE
    assert not world.marker.exists(), "setup.py of the archive was run"


def test_a_second_call_does_not_ask_pip(world, monkeypatch):
    assets.files("pair")
    monkeypatch.setattr(assets, "_pip_download", forbidden)
    assert assets.files("pair")["one"].read_bytes() == ONE


def forbidden(*_):
    raise AssertionError("pip was asked")


def test_members_already_verified_are_kept_when_fetching_goes_on(world):
    paths = assets.files("pair")
    before = paths["one"].stat().st_mtime_ns
    paths["two"].unlink()
    assets.files("pair")
    assert paths["two"].read_bytes() == TWO
    assert paths["one"].stat().st_mtime_ns == before


def test_what_a_killed_process_left_is_cleared_away(world):
    folder = world.cache / "files" / "tiny-wheel-1.0" / "tiny_wheel"
    staging = world.cache / "staging" / "tiny-wheel"
    folder.mkdir(parents=True)
    (staging / "archive").mkdir(parents=True)
    (folder / "tmpabc123").write_bytes(b"half a member")
    (staging / "archive" / "half.whl").write_bytes(b"half an archive")
    assert assets.files("pair")["one"].read_bytes() == ONE
    assert not leftovers(world.cache)


def test_a_hash_mismatch_is_refused_and_names_the_member(world):
    write_wheel(world.index, world.members | {"tiny_wheel/two.txt": b"not what was promised"})
    with pytest.raises(assets.AssetError, match=r"two\.txt does not have the SHA-256.*pip config"):
        assets.files("pair")
    assert not list(world.cache.rglob("two.txt")), "an unverified member reached the cache"
    assert not leftovers(world.cache)


def test_a_damaged_file_in_the_cache_is_fetched_again(world):
    path = assets.files("pair")["two"]
    path.write_bytes(TWO[:-1])
    assert assets.files("pair")["two"].read_bytes() == TWO


@pytest.mark.parametrize("name", ["wheel", "sdist"])
def test_a_truncated_archive_is_named_as_such(world, name):
    path = getattr(world, name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(assets.AssetError, match=r"truncated or damaged.*fetch again"):
        assets.files("pair" if name == "wheel" else "source")
    assert not leftovers(world.cache)


def test_a_member_that_the_archive_lacks_is_named(world):
    del world.members["tiny_wheel/two.txt"]
    write_wheel(world.index, world.members)
    with pytest.raises(assets.AssetError, match=r"holds no member tiny_wheel/two\.txt"):
        assets.files("pair")


def test_an_archive_the_index_does_not_carry_is_named(world):
    world.wheel.unlink()
    with pytest.raises(assets.AssetError, match=r"could not provide tiny-wheel==1\.0"):
        assets.files("pair")


def test_without_a_network_the_error_says_so(world, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(assets.AssetError, match=r"no network.*what was fetched is kept"):
        assets.files("pair")


def test_offline_nothing_is_asked_and_the_error_names_the_set_up(world, monkeypatch):
    monkeypatch.setenv("TRANSFERKIT_OFFLINE", "1")
    monkeypatch.setattr(assets, "_pip_download", forbidden)
    with pytest.raises(assets.AssetError, match=r"TRANSFERKIT_OFFLINE=1.*make book"):
        assets.files("pair")


@pytest.mark.parametrize("wrong, nearest", [("pear", "pair"), ("Source", "source")])
def test_an_unknown_name_suggests_the_nearest(world, wrong, nearest):
    with pytest.raises(assets.AssetError, match=f"did you mean '{nearest}'"):
        assets.files(wrong)


@contextlib.contextmanager
def written_nowhere(cache: Path, monkeypatch):
    """Every attempt to make a folder or a file under ``cache`` fails as on a read-only disk.

    File permissions do not stop root, and tests may well be run by root.
    """
    make, opened = os.mkdir, os.open

    def refuse(path):
        if Path(path).is_relative_to(cache):
            raise OSError(errno.EROFS, "Read-only file system", str(path))

    def mkdir(path, *arguments, **options):
        refuse(path)
        return make(path, *arguments, **options)

    def open_(path, flags, *arguments, **options):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            refuse(path)
        return opened(path, flags, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", mkdir)
        patch.setattr(os, "open", open_)
        yield


def test_a_read_only_cache_is_named_with_the_remedy(world, monkeypatch):
    with (
        written_nowhere(world.cache, monkeypatch),
        pytest.raises(assets.AssetError, match=r"cannot write to the cache .*TRANSFERKIT_CACHE"),
    ):
        assets.files("pair")


def test_a_read_only_cache_that_holds_everything_serves(world, monkeypatch):
    assets.files("pair")
    with written_nowhere(world.cache, monkeypatch):
        assert assets.files("pair")["two"].read_bytes() == TWO


def test_a_cache_path_that_is_a_file_is_named_with_the_remedy(world):
    world.cache.write_text("in the way")
    with pytest.raises(assets.AssetError, match=r"cannot write to the cache .*TRANSFERKIT_CACHE"):
        assets.files("pair")


def test_too_little_disk_is_refused_before_anything_is_fetched(world, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(assets, "_pip_download", forbidden)
    with pytest.raises(assets.AssetError, match=r"MiB of disk space are needed.*0 MiB are free"):
        assets.files("pair")


def test_a_disk_that_fills_up_while_writing_leaves_nothing_half_made(world, monkeypatch):
    def full(source, target, length):
        target.write(source.read(100))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(assets.AssetError, match="MiB of disk space are needed"):
        assets.files("pair")
    assert not list(world.cache.rglob("one.txt"))
    assert not leftovers(world.cache)


_FETCHER = """
import sys, time
from pathlib import Path
from transferkit import assets
assets.MANIFEST = Path(sys.argv[1])
gate = Path(sys.argv[2])
gate.with_name(f"{gate.name}-{sys.argv[3]}").touch()
while not gate.exists():
    time.sleep(0.01)
assets.files("pair")
"""


def test_two_processes_at_once_fetch_an_archive_once(world, tmp_path):
    gate = tmp_path / "go"
    command = [sys.executable, "-c", _FETCHER, str(world.manifest), str(gate)]
    telling = os.environ | {"TRANSFERKIT_PROGRESS": "1"}
    pipe = subprocess.PIPE
    running = [
        subprocess.Popen([*command, str(number)], stdout=pipe, stderr=pipe, text=True, env=telling)
        for number in range(2)
    ]
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("go-*"))) < 2:
        assert time.monotonic() < deadline, "the processes did not start"
        time.sleep(0.02)
    gate.touch()
    ended = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], ended
    assert sum(errors.count("fetching tiny-wheel") for _, errors in ended) == 1, ended
    assert assets.verify(["pair", "many"]) == []
    assert not leftovers(world.cache)


def test_keep_replaces_a_file_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "value.txt"
    assets.keep(path, lambda aside: aside.write_text("first"))

    def fail(aside):
        aside.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError):
        assets.keep(path, fail)
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_the_command_line_lists_fetches_and_verifies(world, capsys):
    assert assets.main(["verify", "pair"]) == 1
    assert "is missing" in capsys.readouterr().out
    assert assets.main(["fetch", "pair"]) == 0
    assert "1 assets verified" in capsys.readouterr().out
    assert assets.main(["verify", "pair"]) == 0
    assert assets.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("pair") and "cached" in line for line in lines)
    assert any(line.startswith("source") and "missing" in line for line in lines)
    assert assets.main(["fetch", "paar"]) == 1
    assert "did you mean 'pair'" in capsys.readouterr().err


def test_the_manifest_pins_every_archive_and_hashes_every_member():
    manifest = assets.manifest()
    used = set()
    for name, asset in manifest["assets"].items():
        for file in asset["files"].values():
            used.add(file["archive"])
            assert file["archive"] in manifest["archives"], name
            assert ("sha256" in file) != ("record" in file), name
            assert len(file.get("sha256", "0" * 64)) == 64, name
            if "record" in file:
                others = [f["member"] for f in asset["files"].values() if "sha256" in f]
                assert file["record"] in others, f"{name}: the RECORD itself is not hashed"
    assert used == set(manifest["archives"])


def test_every_asset_of_the_book_is_in_the_cache_and_verified():
    assert assets.verify() == []
