"""Run the labs whose inputs changed, two at a time, and keep only whole results.

``python -m tools.execute [--profile cpu] [--jobs 2] [--force] [lab …]``

Each lab runs in a program of its own (papermill) in a work folder. Its notebook and figures are
moved into ``_build/executed`` and ``_build/figures`` once it has run to its end, made what it
declares and printed nothing to stderr; so Ctrl-C at any moment leaves no half result behind.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from tools import keys, labs

BUDGET = 180  # seconds for one lab in the cpu profile; CI fails at three times as many
GUESS = 90  # seconds that a lab is expected to take before it has ever run
PACKAGES = ("torch", "transformers", "timm", "numpy", "scikit-learn", "transferkit")


class LabError(RuntimeError):
    """A lab failed; the message says where and shows the traceback."""


@dataclass
class Job:
    """One lab on its way: the program that runs it and where its result grows."""

    lab: labs.Lab
    profile: str
    key: str
    work: Path
    expected: float
    variables: dict[str, str] = field(default_factory=dict)  # of its environment, beside the usual
    process: subprocess.Popen | None = None
    begun: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        return time.monotonic() - self.begun


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("labs", nargs="*", help="names as in _toc.yml; without any: all")
    parser.add_argument("--profile", default="cpu", choices=["smoke", "cpu", "full"])
    parser.add_argument("--jobs", type=int, default=2, help="labs at a time (default 2)")
    parser.add_argument("--force", action="store_true", help="run even when nothing changed")
    parser.add_argument("--root", type=Path, default=labs.ROOT, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    book = labs.Book(options.root.resolve())
    try:
        chosen = [book.lab(name) for name in options.labs] or book.labs()
        if options.worker:
            return work(chosen[0], options.profile, options.worker)
        execute(book, chosen, options.profile, options.jobs, options.force)
    except KeyError as error:
        print(error.args[0], file=sys.stderr)
        return 2
    except LabError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the next call goes on from here", file=sys.stderr)
        return 130
    return 0


def execute(
    book: labs.Book,
    chosen: list[labs.Lab],
    profile: str = "cpu",
    jobs: int = 2,
    force: bool = False,
) -> list[labs.Lab]:
    """Run those of `chosen` whose input key changed and return them.

    Two calls in one checkout take turns, for they share the work folder.

    Raises:
        LabError: a lab raised, wrote to stderr, or did not make what it declares.
    """
    book.executed.mkdir(parents=True, exist_ok=True)
    lock = FileLock(book.executed / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print("another call runs labs in this checkout: waiting for it", flush=True)
        lock.acquire()
    try:
        return _execute(book, chosen, profile, jobs, force)
    finally:
        lock.release()


def _execute(
    book: labs.Book, chosen: list[labs.Lab], profile: str, jobs: int, force: bool
) -> list[labs.Lab]:
    shutil.rmtree(book.executed / ".work", ignore_errors=True)
    waiting = [job for job in (_job(book, lab, profile) for lab in chosen) if force or stale(job)]
    if not waiting:
        print(f"labs: {len(chosen)} up to date")
        return []
    waiting.sort(key=lambda job: -job.expected)
    total, done = len(waiting), []
    running: list[Job] = []
    line = Progress()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(waiting.pop(0)))
            time.sleep(0.2)
            for job in [j for j in running if _ended(j)]:
                running.remove(job)
                _keep(job)
                done.append(job.lab)
                line.say(f"lab {len(done)} of {total}: {job.lab.name} in {job.seconds():.0f} s")
            line.show(f"labs: {len(done)} of {total} done{_state(running, waiting, jobs)}")
    finally:
        line.clear()
        _stop(running)
    return done


def stale(job: Job) -> bool:
    """Say whether a lab must run: its key changed, or a figure of its last run is gone."""
    if job.profile == "full":
        return True
    gone = [n for n in job.lab.declared.get("figures", []) if not _figure(job.lab, n).exists()]
    return job.lab.run().get("key") != job.key or bool(gone)


def _figure(lab: labs.Lab, name: str) -> Path:
    return lab.book.figures / f"{name}.svg"


def _job(book: labs.Book, lab: labs.Lab, profile: str) -> Job:
    if not lab.source.exists():
        raise LabError(f"{book.relative(lab.source)} is in _toc.yml but does not exist")
    work = book.executed / ".work" / lab.short
    expected = lab.run().get("seconds", GUESS)
    if profile == "full":
        expected = lab.recording().get("seconds", math.inf)
    return Job(lab, profile, keys.key(lab, profile), work, expected)


def _start(job: Job) -> Job:
    (job.work / "figures").mkdir(parents=True)
    command = [sys.executable, "-m", "tools.execute", "--worker", job.work]
    command += ["--root", job.lab.book.root, "--profile", job.profile, job.lab.name]
    output = (job.work / "output.txt").open("wb")
    job.begun = time.monotonic()
    job.process = subprocess.Popen(
        [str(c) for c in command],
        cwd=labs.ROOT,
        env=environment(job),
        stdout=output,
        stderr=subprocess.STDOUT,
    )
    output.close()
    return job


def environment(job: Job) -> dict[str, str]:
    """Return the environment of a run: one thread, no network, figures into the work folder."""
    found = dict(os.environ)
    found |= {
        "TRANSFERKIT_PROFILE": job.profile,
        "TRANSFERKIT_FIGURES": str(job.work / "figures"),
        "TRANSFERKIT_OFFLINE": "1",
        "TRANSFERKIT_PROGRESS": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "IPYTHONDIR": str(job.work / "ipython"),
        "PYTHONHASHSEED": "0",
    }
    if job.profile == "full":
        # at full size a third of the time would go into giving memory back and asking for it again
        found |= {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "4000000000"}
    else:
        found |= {n: "1" for n in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return found | job.variables


def _ended(job: Job) -> bool:
    limit = 3 * BUDGET if os.environ.get("CI") and job.profile != "full" else math.inf
    if job.seconds() > limit:
        raise LabError(
            f"{job.lab.name} ran for more than {limit} s, three times the budget of {BUDGET} s: "
            "make its cpu profile smaller"
        )
    return job.process.poll() is not None


def _keep(job: Job) -> None:
    """Move a whole result into place, or say what is missing.

    Raises:
        LabError: the run failed or is not whole.
    """
    output = (job.work / "output.txt").read_text("utf-8", errors="replace")
    if job.process.returncode:
        raise LabError(f"\n{job.lab.name} failed in the {job.profile} profile\n{output}")
    path = job.work / "lab.ipynb"
    notebook = json.loads(path.read_text("utf-8"))
    lacks = labs.shortcomings(notebook, job.lab.declared, job.profile)
    drawn = job.work / "figures"
    lacks += [
        f"figure {name} was not saved"
        for name in job.lab.declared.get("figures", [])
        if not (drawn / f"{name}.svg").exists()
    ]
    if lacks:
        raise LabError("\n".join([f"\n{job.lab.name} ran but is not whole:", *lacks]))
    run = notebook["metadata"]["transferkit"]["run"]
    run["key"] = job.key
    if job.profile == "full":
        _record(job.lab, notebook, run, drawn)
        return
    job.lab.book.figures.mkdir(parents=True, exist_ok=True)
    for figure in drawn.glob("*.svg"):
        os.replace(figure, _figure(job.lab, figure.stem))
    path.write_text(json.dumps(notebook, ensure_ascii=False, indent=1) + "\n", "utf-8")
    job.lab.executed.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, job.lab.executed)


def _record(lab: labs.Lab, notebook: dict, run: dict, drawn: Path) -> None:
    """Write the claims of a full-size run, and the figures it alone draws, where git keeps them."""
    claims = [data for _, data in labs.displays(notebook, labs.CLAIM_MIME)]
    own = lab.declared.get("full-figures", [])
    figures = [data for _, data in labs.displays(notebook, labs.FIGURE_MIME) if data["name"] in own]
    record = {"lab": lab.name, **run, "claims": claims} | ({"figures": figures} if own else {})
    lab.record.parent.mkdir(parents=True, exist_ok=True)
    for name in own:
        shutil.copy(drawn / f"{name}.svg", lab.record.parent)
    lab.record.write_text(json.dumps(record, ensure_ascii=False, indent=2) + "\n", "utf-8")
    print(f"recorded {len(claims)} claims in {lab.book.relative(lab.record)}")


def rehearse(
    lab: labs.Lab, profile: str = "smoke", variables: dict[str, str] | None = None
) -> dict:
    """Run one lab, with some `variables` of its environment, and return its executed notebook.

    Nothing is kept.

    Raises:
        LabError: the lab failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = _start(Job(lab, profile, "", Path(folder) / "run", GUESS, variables or {}))
        try:
            job.process.wait()
        finally:
            _stop([job])
        if job.process.returncode:
            raise LabError(f"\n{lab.name} failed\n{(job.work / 'output.txt').read_text('utf-8')}")
        return json.loads((job.work / "lab.ipynb").read_text("utf-8"))


def _stop(running: list[Job]) -> None:
    for job in running:
        if job.process.poll() is None:
            job.process.terminate()
    for job in running:
        try:
            job.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            job.process.kill()
            job.process.wait()


# In the worker -----------------------------------------------------------------------------


def work(lab: labs.Lab, profile: str, folder: Path) -> int:
    """Run one lab by papermill, stamp it, and print what failed; the exit status says whether."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    started = datetime.now(UTC).replace(microsecond=0)
    clock = time.monotonic()
    path = folder / "lab.ipynb"
    try:
        papermill.execute_notebook(
            lab.source,
            path,
            kernel_name="python3",
            cwd=lab.book.root,
            progress_bar=False,
            start_timeout=120,
        )
    except PapermillExecutionError as error:
        print(_failure(error))
        return 1
    notebook = json.loads(path.read_text("utf-8"))
    _forget_papermill(notebook)
    notebook["metadata"].setdefault("transferkit", {})["run"] = {
        "started": started.isoformat(),
        "seconds": round(time.monotonic() - clock, 1),
        "peak_memory_mib": peak_memory(),
        "profile": profile,
        "seed": labs.seed(notebook),
        "versions": versions(),
        "cpu": processor(),
        "device": device(notebook),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "commit": commit(lab.book.root),
    }
    path.write_text(json.dumps(notebook, ensure_ascii=False), "utf-8")
    return 0


def _failure(error) -> str:
    trace = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))
    return f"cell {error.cell_index}, which is\n\n{error.source}\n\n{trace}"


def _forget_papermill(notebook: dict) -> None:
    """Drop what papermill notes beside the result: paths of this machine, and durations."""
    for thing in [notebook, *notebook["cells"]]:
        thing["metadata"].pop("papermill", None)
        thing["metadata"].pop("execution", None)


def peak_memory() -> int:
    """Return the largest resident size of the kernel that has just ended, in MiB."""
    size = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return round(size / (2**20 if sys.platform == "darwin" else 2**10))


def device(notebook: dict) -> str:
    """Return the device that the card of the run names: "cpu", or the kind and name of a GPU."""
    for _, cell in labs.code_cells(notebook):
        for output in cell["outputs"]:
            text = "".join(output.get("data", {}).get("text/plain", ""))
            card = re.search(r"^device\s+(\w+), (.+)$", text, re.MULTILINE)
            if card and text.startswith("profile"):
                return "cpu" if card[1] == "cpu" else f"{card[2]} ({card[1]})"
    return "cpu"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """Return the name of the processor as people know it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    name = re.search(r"model name\s*:\s*(.+)", text)
    return name[1].strip() if name else platform.machine()


def commit(root: Path) -> str:
    """Return the short commit, "+" behind it when the working tree differs; "" outside git."""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


# The progress line -------------------------------------------------------------------------


class Progress:
    """One line that is rewritten in a terminal, and said every half minute in a log."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self.next = 0.0

    def show(self, text: str) -> None:
        if self.live:
            print(
                f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr
            )
        elif time.monotonic() >= self.next:
            print(text, file=sys.stderr)
            self.next = time.monotonic() + 30

    def say(self, text: str) -> None:
        self.clear()
        print(text, flush=True)

    def clear(self) -> None:
        if self.live:
            print("\r\x1b[K", end="", file=sys.stderr)


def _state(running: list[Job], waiting: list[Job], jobs: int) -> str:
    if not running:
        return ""
    names = ", ".join(f"{job.lab.short} {job.seconds():.0f} s" for job in running)
    times = [max(job.expected - job.seconds(), 5) for job in running]
    times += [job.expected for job in waiting]
    seconds = max(sum(times) / jobs, *times)
    left = f"about {_span(seconds)} left" if seconds < math.inf else "never timed before"
    return f" · {names} · {left}"


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


if __name__ == "__main__":
    sys.exit(main())
