"""Ask, on this processor, whether the claims of labs would hold on another one.

``python -m tools.elsewhere [lab …]``

Another processor adds in another order, and training turns a last digit into another result. Here
each lab runs once more with the instructions of an old processor; nothing of that run is kept. A
claim that fails is reported, and so are those that came near an end of their interval, here or
there. The switches act on x86 processors alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools import execute, labs

OLD = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OPENBLAS_CORETYPE": "Nehalem",
}
NEAR = 0.1  # of the width of the interval


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("labs", nargs="*", help="names as in _toc.yml; without any: all")
    parser.add_argument("--root", type=Path, default=labs.ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    book = labs.Book(options.root.resolve())
    failed = 0
    for lab in [book.lab(name) for name in options.labs] or book.labs():
        try:
            there = claims(execute.rehearse(lab, "cpu", OLD))
        except execute.LabError as error:
            print(error, flush=True)
            failed += 1
            continue
        print("\n".join(report(lab.name, lab.claims(), there)), flush=True)
    return min(failed, 1)


def claims(notebook: dict) -> dict[str, dict]:
    """Return the claims that an executed notebook made, by name."""
    return {claim["name"]: claim for _, claim in labs.displays(notebook, labs.CLAIM_MIME)}


def report(name: str, here: dict[str, dict], there: dict[str, dict]) -> list[str]:
    """Return a line on the lab, and one on each claim with little room, `here` or `there`."""
    lines = [f"{name}: {len(there)} claims hold"]
    for claim, run in there.items():
        values = [r[claim]["value"] for r in (here, there) if claim in r]
        width = run["high"] - run["low"]
        room = min(min(v - run["low"], run["high"] - v) for v in values)
        if width and room < NEAR * width and min(values) != max(values):
            printed = ", ".join(f"{value:.5g}" for value in values)
            lines.append(f"  near an end: {claim} {printed} in [{run['low']:g}, {run['high']:g}]")
    return lines


if __name__ == "__main__":
    sys.exit(main())
