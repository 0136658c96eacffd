"""Check and measure on a CUDA card: `python -m benchmarks.gpu [part ...] [--tiny] [--output F]`.

Without names all parts run, each in a program of its own and for a limited time, so that the whole
takes less than ten minutes. Every row is kept as soon as it is measured, in `gpu.json` and, to be
read, `gpu.txt`; a part takes the place of its older self. `--tiny` proves in a minute, on any
machine, that everything runs, and writes to `_build/gpu`.

Status: 0 if all is well; 1 if a law does not hold, or a part failed or was stopped; 3 if there is
no card; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import report

NO_CARD = 3
WITHOUT = "no CUDA card that torch can use was found: nothing was checked or measured (status 3)"


@dataclass(frozen=True)
class Part:
    """A part of the report.

    Attributes:
        where: the module and the function that measures it.
        columns: of its table, a name in that module.
        title: of its table.
        limit: seconds after which it is stopped, with the start of its program.
        beside: whether other libraries take part, so that it runs in their environment if there
            is one.
    """

    where: str
    columns: str
    title: str
    limit: float
    beside: bool = False


PARTS = {
    "laws": Part("laws:laws", "COLUMNS", "The laws of training on the card", 190),
    "waits": Part("steps:waits", "WAITS", "What the host waits for in a steady step", 45),
    "precision": Part("steps:precision", "PRECISION",
                      "Gradients against those in float64 on the processor", 30),
    "images": Part("speed:images", "IMAGES", "Training an image network, 128 images of 224 pixels "
                   "a batch, random weights", 60),
    "tokens": Part("speed:tokens", "TOKENS", "Training MiniLM's shape, 128 texts of 128 tokens a "
                   "batch, random weights", 45),
    "memory": Part("steps:memory", "MEMORY", "Memory in training MiniLM's shape, 128 texts of 128 "
                   "tokens a batch", 40),
    "peers": Part("speed:peers", "BESIDE", "MiniLM's shape on texts of 8 to 128 tokens, 64 a "
                  "batch, beside other libraries", 60, beside=True),
    "compile": Part("steps:compiled", "COMPILED", "torch.compile, two phases on texts of two "
                    "lengths", 90),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    parser.add_argument("--tiny", action="store_true", help="prove on any machine that all runs")
    parser.add_argument("--output", type=Path, help="folder for the results")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # a part's own program
    given = parser.parse_args(arguments)
    unknown = [name for name in given.parts if name not in PARTS]
    if unknown:
        parser.error(f"no part is called {unknown[0]!r}: they are {', '.join(PARTS)}")
    os.environ["TRANSFERKIT_PROGRESS"] = "0"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    device = _device(given.tiny)
    if device is None:
        print(WITHOUT, file=sys.stderr)
        return NO_CARD
    if given.rows is not None:
        measure(given.parts[0], device, given.tiny, given.rows)
        return 0
    return _all(given.parts or list(PARTS), device, given.tiny, given.output)


def _device(tiny: bool) -> str | None:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu" if tiny else None


def measure(name: str, device: str, tiny: bool, rows: Path) -> None:
    """One part, here: each of its rows is added to a file as a line of JSON."""
    import torch

    module, _, function = PARTS[name].where.partition(":")
    with rows.open("a", encoding="utf-8") as file:

        def note(row: dict[str, Any]) -> None:
            file.write(json.dumps(row, ensure_ascii=False, default=float) + "\n")
            file.flush()

        found = importlib.import_module(f"benchmarks.gpu.{module}")
        getattr(found, function)(torch.device(device), tiny, note)


def _all(names: Sequence[str], device: str, tiny: bool, output: Path | None) -> int:
    from benchmarks import common

    default = ("_build", "gpu") if tiny else ("book", "recorded")
    folder = output or common.ROOT.joinpath(*default)
    file, parts = folder / "gpu.json", {}
    if file.exists():
        parts = json.loads(file.read_text("utf-8"))["parts"]
    limit = sum(PARTS[name].limit for name in names)
    common.say(f"{', '.join(names)}: at most {limit / 60:.1f} minutes")
    status = 0
    for name in names:
        began = time.time()
        end, rows = run(_program(name, tiny), PARTS[name].limit)
        parts[name] = _recorded(name, device, tiny, began, end, rows)
        parts = {part: parts[part] for part in PARTS if part in parts}
        report.save(folder, parts)
        common.say(f"{name}: {end or 'done'} after {time.time() - began:.0f} s")
        status = max(status, int(bool(report.wrong(parts[name]))))
        if end == report.INTERRUPTED:
            status = 130
            break
    print(report.text({"parts": parts}))
    return status


def _program(name: str, tiny: bool) -> list[str]:
    from benchmarks.peers.environment import VENV

    python, own = sys.executable, VENV / "bin" / "python"
    if PARTS[name].beside and os.access(own, os.X_OK):
        python = str(own)
    return [python, "-m", "benchmarks.gpu", name, *["--tiny"] * tiny]


def run(program: Sequence[str], limit: float) -> tuple[str, list[dict[str, Any]]]:
    """Run a part's program until it ends, the limit is reached or Ctrl-C comes.

    Args:
        program: the command; it is given `--rows` and a file, and adds a line of JSON for each row.
        limit: seconds.

    Returns:
        How it ended, "" if well, and its rows; of rows that have one name and one precision, such
        as a count that goes on, the last.
    """
    from benchmarks import common

    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows"
        rows.touch()
        process = subprocess.Popen(
            [*program, "--rows", str(rows)], cwd=common.ROOT, stdout=sys.stderr,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(limit)
            end = f"{report.FAILED} with status {status}" if status else ""
        except subprocess.TimeoutExpired:
            end = f"{report.STOPPED} at its limit of {limit:.0f} s"
        except KeyboardInterrupt:
            end = report.INTERRUPTED
        finally:
            _end(process)
        lines = rows.read_text("utf-8").splitlines(keepends=True)
    found = [json.loads(line) for line in lines if line.endswith("\n")]  # a last one may be cut
    return end, list({(row["system"], row.get("precision")): row for row in found}.values())


def _end(process: subprocess.Popen) -> None:
    # with all that it started; when it ended by itself, there may still be some
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _recorded(name: str, device: str, tiny: bool, began: float, end: str, rows: list) -> dict:
    import torch

    from benchmarks import common, systems
    from benchmarks.gpu import card, speed

    part, there = PARTS[name], torch.device(device)
    module = importlib.import_module(f"benchmarks.gpu.{part.where.partition(':')[0]}")
    turns = speed.TURNS if part.beside and not tiny else 1
    about = common.about(turns, tiny, began, device) | card.about(there) | {"warning": ""}
    known = systems.known()
    named = [known[row["system"]] for row in rows if row["system"] in known]
    table = common.table(part.title, getattr(module, part.columns), rows)
    return {"about": about, "tables": {name: table}, "notes": common.notes(named), "end": end}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was measured is kept then, too
    sys.exit(main())
