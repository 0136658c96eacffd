"""Measure and record: `python -m benchmarks [tax encoder frozen options] [--tiny] [--output F]`.

Without names all parts run. Each part is written as soon as it is done, and takes the place of its
older self in `book/recorded/benchmarks.json`. `--tiny` uses random data and models of no meaning,
once, to prove in seconds that everything runs; it writes to `_build/benchmarks`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time
from pathlib import Path

PARTS = ("tax", "encoder", "frozen", "options")
MINUTES = {"tax": 3, "encoder": 20, "frozen": 30, "options": 5}  # about, on two cores


def main(arguments: list[str] | None = None) -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    parser.add_argument("--tiny", action="store_true", help="prove in seconds that all runs")
    parser.add_argument("--output", type=Path, help="folder for the results")
    given = parser.parse_args(arguments)
    names = given.parts or list(PARTS)
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        parser.error(f"no part is called {unknown[0]!r}: they are {', '.join(PARTS)}")
    os.environ["TRANSFERKIT_PROGRESS"] = "0"
    from benchmarks import common
    from benchmarks.targets import targets
    from tools import benchmarks as show

    default = ("_build", "benchmarks") if given.tiny else ("book", "recorded")
    folder = given.output or common.ROOT.joinpath(*default)
    if not given.tiny:
        common.say(f"{', '.join(names)}: about {sum(MINUTES[name] for name in names)} minutes")
    load = common.load()  # once: later it is the measurement's own
    if load >= 0.5 and not given.tiny:
        common.say(f"load {load}: if other programs use this machine, the seconds are wrong")
    file, parts = folder / "benchmarks.json", {}
    if file.exists():
        parts = json.loads(file.read_text("utf-8"))["parts"]
    for name in names:
        start = time.monotonic()
        parts[name] = importlib.import_module(f"benchmarks.{name}").measure(given.tiny)
        parts[name]["about"]["load"] = load
        parts = {part: parts[part] for part in PARTS if part in parts}
        common.save(folder, parts, targets(parts))
        common.say(f"{name}: done in {time.monotonic() - start:.0f} s")
    print(show.report(json.loads(file.read_text("utf-8"))))


if __name__ == "__main__":
    main()
