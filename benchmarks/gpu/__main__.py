"""Check and measure on a CUDA card: `python -m benchmarks.gpu [part ...] [--tiny] [--output F]`.

Without names all parts run, each in a program of its own and for a limited time, so that the whole
takes less than ten minutes. Every row is kept as soon as it is measured, in `gpu.json` and, to be
read, `gpu.txt`; a part takes the place of its older self. `--tiny` proves in a minute, on any
machine, that everything runs, and writes to `_build/gpu`; without a card it leaves out the laws.

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
    "images": Part("speed:images", "IMAGES", "Training an image network, images of 224 pixels, "
                   "random weights", 60),
    "tokens": Part("speed:tokens", "TOKENS", "Training MiniLM's shape, texts of 128 tokens, random "
                   "weights", 45),
    "memory": Part("steps:memory", "MEMORY", "Memory in training MiniLM's shape, 128 texts of 128 "
                   "tokens a batch", 50),
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
    # without a card the laws are skipped, so they are left out, unless they are asked for
    names = given.parts or [name for name in PARTS if device == "cuda" or name != "laws"]
    return _all(names, device, given.tiny, given.output)


def _device(tiny: bool) -> str | None:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu" if tiny else None


def measure(name: str, device: str, tiny: bool, rows: Path) -> None:
    """One part, here: what it runs on, and each of its rows, go into a file as lines of JSON."""
    import torch

    from benchmarks import common
    from benchmarks.gpu import card, speed

    module, _, function = PARTS[name].where.partition(":")
    turns = speed.TURNS if PARTS[name].beside and not tiny else 1
    about = common.about(turns, tiny, time.time(), device) | card.about(torch.device(device))
    with rows.open("a", encoding="utf-8") as file:

        def note(row: dict[str, Any]) -> None:
            file.write(json.dumps(row, ensure_ascii=False, default=float) + "\n")
            file.flush()

        note({"about": about})
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
        end, about, rows = run(_program(name, tiny), PARTS[name].limit)
        about = common.about(1, tiny, began) | about  # it may have ended before it could say
        about["seconds"] = time.time() - began
        parts[name] = _recorded(name, about, end, rows)
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


def run(program: Sequence[str], limit: float) -> tuple[str, dict, list[dict[str, Any]]]:
    """Run a part's program until it ends, the limit is reached or Ctrl-C comes.

    Args:
        program: the command; it is given `--rows` and a file, and adds a line of JSON for each row.
        limit: seconds.

    Returns:
        How it ended, "" if well, what it said of the machine, and its rows; of rows that have one
        name and one precision, such as a count that goes on, the last.
    """
    from benchmarks import common

    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows"
        rows.touch()
        process = subprocess.Popen(
            [*program, "--rows", str(rows)], cwd=common.ROOT, stdout=sys.stderr, env=_one_card(),
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
    about = found.pop(0)["about"] if found and "about" in found[0] else {}
    last = {(row["system"], row.get("precision")): row for row in found}
    return end, about, list(last.values())


def _one_card() -> dict[str, str]:
    # of several the first: some libraries would take all
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    return os.environ | {"CUDA_VISIBLE_DEVICES": visible.partition(",")[0]}


def _end(process: subprocess.Popen) -> None:
    # with all that it started; when it ended by itself, there may still be some
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _recorded(name: str, about: dict[str, Any], end: str, rows: list[dict[str, Any]]) -> dict:
    from benchmarks import common, systems

    part = PARTS[name]
    module = importlib.import_module(f"benchmarks.gpu.{part.where.partition(':')[0]}")
    known = systems.known()
    notes = common.notes([known[row["system"]] for row in rows if row["system"] in known])
    table = common.table(part.title, getattr(module, part.columns), rows)
    return {"about": about, "tables": {name: table}, "notes": notes, "end": end}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was measured is kept then, too
    sys.exit(main())
