"""Make the project ready to work: `make setup`, the first step of `make book` and `make test`.

Standard library only, run by whatever `python3` the machine has. It makes `.venv` from
`requirements.lock`, installs the project into it, and has the assets fetched. The one idea is a
stamp, written last: without it the environment is half-made, and a second call completes it.
The syntax stays old, so that an old Python reads this far and can say what is wrong.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 11)
GIB = 1024**3
# Measured: the environment, the archives that pip downloads for it, the assets with their archives.
LINUX = sys.platform.startswith("linux")
ENVIRONMENT, DOWNLOADS, ASSETS = (7.0, 3.1, 0.8) if LINUX else (2.2, 0.5, 0.8)

# What pip's log says when it fails: pattern, what happened, what to do. The first match counts.
FAILURES = (
    (
        r"No space left on device|Errno 28\b",
        "the disk is full",
        "free some space, then run the same command again: it goes on where it stopped",
    ),
    (
        r"DO NOT MATCH THE HASHES|BadZipFile|Wheel .* is invalid|has an invalid wheel|"
        r"IncompleteRead|File is not a zip file",
        "a download arrived damaged",
        "run the same command again; if it fails again, empty pip's cache first:\n"
        "    {python} -m pip cache purge",
    ),
    (
        r"Failed to establish a new connection|NewConnectionError|ConnectTimeoutError|"
        r"ReadTimeoutError|Temporary failure in name resolution|Name or service not known|"
        r"Max retries exceeded|ProxyError|SSLError|Read timed out|Connection refused",
        "the package index cannot be reached",
        "connect to the network, or give pip your mirror or proxy (`pip config set "
        "global.index-url URL`,\n  HTTPS_PROXY=URL), then run the same command again. "
        "Only this set-up needs the network.",
    ),
    (
        r"No matching distribution found for (\S+)|Could not find a version.*requirement (\S+)",
        "the package index offers no {match} for Python {version}",
        "see that the index can be reached and is up to date (`pip config list` names it), or\n"
        "  take another Python: rm -r .venv, then make book PYTHON=python3.11",
    ),
)


class Problem(Exception):
    """What stopped the set-up, and what to do about it: all that the reader gets to see."""

    def __init__(self, what, remedy):
        super().__init__(f"{what}\n  What to do: {remedy}")


def say(text):
    print(text, flush=True)


def minutes(seconds):
    return (
        f"{seconds // 60:.0f} min {seconds % 60:02.0f} s" if seconds >= 60 else f"{seconds:.0f} s"
    )


def check_python(version=sys.version_info, path=sys.executable):
    """Raise a Problem, naming a newer Python if the machine has one, when this one is too old."""
    if tuple(version[:2]) >= OLDEST:
        return
    names = [f"python3.{minor}" for minor in range(14, OLDEST[1] - 1, -1)]
    found = next(filter(shutil.which, names), None)
    have = ".".join(map(str, version[:3]))
    raise Problem(
        f"Python 3.11 or newer is needed, this is {have} ({path})",
        f"make book PYTHON={found}"
        if found
        else "install one (Debian, Ubuntu: sudo apt install python3 python3-venv; macOS: brew "
        "install python),\n  and if it is not the `python3` of the shell, name it: "
        "make book PYTHON=/path/to/python3",
    )


def check_disk(needs):
    """Raise a Problem unless every disk has room; `needs` holds (folder, bytes, what for)."""
    disks = {}
    for folder, size, purpose in needs:
        while not folder.exists():
            folder = folder.parent
        disks.setdefault(os.stat(str(folder)).st_dev, []).append((folder, size, purpose))
    for parts in disks.values():
        folder, needed = parts[0][0], sum(size for _, size, _ in parts)
        free = shutil.disk_usage(str(folder)).free
        if free < needed:
            detail = ", ".join(f"{size / GIB:.1f} {purpose}" for _, size, purpose in parts)
            raise Problem(
                f"{needed / GIB:.1f} GiB free are needed on the disk of {folder} ({detail}), "
                f"{free / GIB:.1f} GiB are",
                f"free {(needed - free) / GIB:.1f} GiB there, or move parts to another disk: the "
                "checkout holds the\n  environment, PIP_CACHE_DIR the downloads, "
                "TRANSFERKIT_CACHE the assets",
            )


def size_of(folder):
    """Bytes of the files below a folder (0 when there is none)."""
    files = (os.path.join(top, name) for top, _, names in os.walk(str(folder)) for name in names)
    return sum(os.lstat(path).st_size for path in files)


def asset_cache():
    return Path(os.environ.get("TRANSFERKIT_CACHE") or "~/.cache/transferkit").expanduser()


def needs(venv):
    """What the set-up will write where; what an unfinished call has left is counted off."""
    cache = Path(os.environ.get("PIP_CACHE_DIR") or "~/.cache").expanduser()
    left = max(ENVIRONMENT * GIB - size_of(venv), 0)
    return (
        (venv, left, "the environment"),
        (venv, DOWNLOADS * GIB, "its archives"),
        (cache, DOWNLOADS * GIB, "pip's cache"),
        (asset_cache(), max(ASSETS * GIB - size_of(asset_cache()), 0), "the assets"),
    )


def key_of(root):
    """The hash of all that decides what is in the environment, its place included."""
    parts = [(root / name).read_bytes() for name in ("requirements.lock", "pyproject.toml")]
    return hashlib.sha256(b"\0".join([*parts, str(root).encode()])).hexdigest()


def is_ready(venv, key):
    stamp, python = venv / "ready", venv / "bin" / "python"
    return python.exists() and stamp.is_file() and stamp.read_text() == key


def is_usable(venv):
    """Whether this `.venv` has a working Python and pip and stands where it was made."""
    pip = venv / "bin" / "pip"
    if not pip.is_file() or str(venv) not in pip.read_text(errors="replace"):
        return False
    test = "import sys, pip; sys.exit(sys.version_info[:2] < (3, 11))"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with contextlib.suppress(OSError):
        return subprocess.call([str(venv / "bin" / "python"), "-c", test], **quiet) == 0
    return False


def make_venv(venv):
    """Make an empty environment, or keep a half-made one that still works."""
    if venv.exists():
        if is_usable(venv):
            say("Completing the environment in .venv")
            return
        say("Replacing the environment in .venv: it is broken, or the folder was moved")
        shutil.rmtree(str(venv))
    say(f"Making the environment in .venv: about 5 minutes, {DOWNLOADS:.0f} GiB to download")
    python = getattr(sys, "_base_executable", None) or sys.executable
    made = subprocess.run(
        [python, "-m", "venv", str(venv)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if made.returncode:
        raise Problem(
            f"{python} cannot make a virtual environment:\n{made.stdout.decode().strip()}\n",
            "Debian, Ubuntu: sudo apt install python3-venv, then run the same command again",
        )


def sweep(venv):
    """Remove what an interrupted pip leaves, so that pip installs those packages again.

    pip writes INSTALLER after a package's files, and renames to `~ame` what it replaces.
    """
    for info in venv.glob("lib/python*/site-packages/*.dist-info"):
        if not (info / "INSTALLER").is_file():
            shutil.rmtree(str(info))
    for left in venv.glob("lib/python*/site-packages/~*"):
        shutil.rmtree(str(left)) if left.is_dir() else left.unlink()


def diagnose(venv, log):
    """The Problem that pip's log tells of."""
    text = log.read_text(errors="replace")
    values = {"python": venv / "bin" / "python", "version": sys.version.split()[0], "match": ""}
    for pattern, what, remedy in FAILURES:
        match = re.search(pattern, text)
        if match:
            values["match"] = next(filter(None, match.groups()), "")
            return Problem(what.format(**values), remedy.format(**values) + f"\n  pip's log: {log}")
    last = "\n    ".join(text.strip().splitlines()[-12:])
    return Problem(f"pip failed:\n    {last}", f"mend that, then run again; pip's log: {log}")


def progress(venv, log, total, seconds):
    """One line on how far pip is, read from its log and from the environment."""
    text = log.read_text(errors="replace")
    seen = len(re.findall(r"^(?:Collecting|Processing|Requirement) ", text, re.MULTILINE))
    done = len(list(venv.glob("lib/python*/site-packages/*.dist-info")))
    size = re.findall(r"Downloading (\S+) \(([^)]+)\)", text)
    name = f" ({size[-1][0].split('/')[-1].split('-')[0]}, {size[-1][1]})" if size else ""
    if "Installing collected packages" in text:
        return f"  unpacked {min(done, total)} of {total} packages, {minutes(seconds)}"
    return f"  found {min(seen, total)} of {total} packages{name}, {minutes(seconds)}"


def pip(venv, log, total, *arguments):
    """Run the environment's pip, with the user's own settings, and show how far it is."""
    scratch = venv / "tmp"  # the archives: /tmp is often a small disk in memory
    scratch.mkdir(exist_ok=True)
    environment = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1")
    environment.setdefault("TMPDIR", str(scratch))
    command = [str(venv / "bin" / "python"), "-m", "pip", *arguments]
    terminal, start, shown, width = sys.stdout.isatty(), time.time(), time.time(), 0
    with open(str(log), "ab") as out:
        running = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment
        )
        try:
            while running.poll() is None:
                time.sleep(0.2)
                if total and time.time() - shown > (1 if terminal else 30):
                    shown, line = time.time(), progress(venv, log, total, time.time() - start)
                    print(line.ljust(width), end="\r" if terminal else "\n", flush=True)
                    width = len(line) if terminal else 0
        finally:
            running.kill()
            running.wait()
    if width:
        print(" " * width, end="\r", flush=True)
    shutil.rmtree(str(scratch), ignore_errors=True)
    if running.returncode:
        raise diagnose(venv, log)


def precompile(venv):
    """Compile the packages on all cores, for which pip would take one.

    Where Python may not write bytecode, every program of a build would compile torch anew, for half
    a minute. Files that do not compile are meant for other versions, and nobody imports them.
    """
    command = [str(venv / "bin" / "python"), "-m", "compileall", "-qq", "-j", "0"]
    subprocess.call([*command, str(venv / "lib")], stdin=subprocess.DEVNULL)


def make_environment(root, venv, key):
    """Bring `.venv` to the lock and to the project, then stamp it."""
    check_python()
    check_disk(needs(venv))
    start = time.time()
    make_venv(venv)
    sweep(venv)
    (venv / "ready").unlink(missing_ok=True)
    log = venv / "setup.log"
    log.write_text("")
    lock = root / "requirements.lock"
    total = len(re.findall(r"^[\w.-]+==", lock.read_text(), re.MULTILINE))
    say(f"Installing the {total} packages of requirements.lock")
    pip(venv, log, total, "install", "--no-input", "--no-compile", "-r", str(lock))
    pip(venv, log, 0, "install", "--no-input", "--no-deps", "--no-build-isolation", "-e", str(root))
    pip(venv, log, 0, "check")
    precompile(venv)
    written = venv / "ready.new"
    written.write_text(key)
    written.replace(venv / "ready")
    say(f"The environment is ready after {minutes(time.time() - start)}")


def files_of(cache):
    """Every fetched file with its size and time, one a line."""
    found = set()
    for top, _, names in os.walk(str(cache / "files")):
        for name in names:
            state = os.lstat(os.path.join(top, name))
            found.add(f"{os.path.join(top, name)} {state.st_size} {state.st_mtime_ns}")
    return found


def fetch_assets(root, venv):
    """Have the library fetch and verify its assets, unless nothing changed since it last did."""
    manifest = (root / "transferkit" / "assets.toml").read_bytes()
    cache = asset_cache()
    stamp = cache / f"fetched-{hashlib.sha256(manifest).hexdigest()[:12]}"
    if stamp.is_file() and files_of(cache).issuperset(stamp.read_text().splitlines()):
        return
    say(f"Data sets and models in {cache}: fetching what is missing, at most 0.3 GiB, 2 minutes")
    command = [str(venv / "bin" / "python"), "-m", "transferkit.assets", "fetch"]
    if subprocess.call(command, cwd=str(root), stdin=subprocess.DEVNULL):
        raise Problem(
            "the assets are not complete (the reason stands above)",
            "mend that, then run the same command again: it goes on where it stopped",
        )
    with contextlib.suppress(OSError):  # a cache that cannot be written to is verified every time
        cache.mkdir(parents=True, exist_ok=True)
        stamp.write_text("\n".join(sorted(files_of(cache))))


@contextlib.contextmanager
def alone(root):
    """Let one set-up at a time work on this checkout."""
    (root / "_build").mkdir(exist_ok=True)
    with open(str(root / "_build" / "setup.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("Another set-up of this folder is at work: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main(root=ROOT):
    venv = root / ".venv"
    try:
        with alone(root):
            key = key_of(root)
            if not is_ready(venv, key):
                make_environment(root, venv, key)
            fetch_assets(root, venv)
    except Problem as problem:
        print(f"\nSet-up stopped: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nSet-up stopped; the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
