"""Write THIRD_PARTY.md from the assets manifest: what the book uses that it did not write.

python -m tools.notices            write the file
python -m tools.notices --check    fail if it does not say what the manifest says
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MANIFEST = ROOT / "transferkit" / "assets.toml"
NOTICE = ROOT / "THIRD_PARTY.md"

_HEADINGS = {"model": "Models", "data set": "Data sets", "page script": "Page scripts"}
_PREAMBLE = """\
# Third-party material

This file is generated from `transferkit/assets.toml` by `python -m tools.notices`.

None of the material below is part of this repository. The set-up takes it from a package registry,
pinned by version and verified by SHA-256, and keeps it in a cache on the reader's machine. A built
book contains two kinds of it: the page script, and figures and outputs that show pieces of a data
set, which carry that data set's licence. A package's licence is not always its content's, so both
are given.
"""


def notice(manifest: dict) -> str:
    """The whole file as text, one section for each type of asset."""
    sections = [_PREAMBLE]
    for kind, heading in _HEADINGS.items():
        chosen = {n: a for n, a in manifest["assets"].items() if a["type"] == kind}
        sections.append(f"## {heading}\n")
        sections += [_entry(name, asset, manifest["archives"]) for name, asset in chosen.items()]
    return "\n".join(sections)


def _entry(name: str, asset: dict, archives: dict) -> str:
    lines = [
        f"### {name}",
        "",
        f"{asset['title']}.",
        "",
        f"- Licence: {asset['licence']}",
        f"- Origin: {asset['origin']}",
        f"- Citation: {asset['citation']}",
    ]
    for archive in dict.fromkeys(file["archive"] for file in asset["files"].values()):
        package = archives[archive]
        members = [f["member"] for f in asset["files"].values() if f["archive"] == archive]
        lines.append(
            f"- Package: `{archive}` {package['version']} ({package['kind']}), "
            f"declared licence {package['licence']}; taken from it:"
        )
        lines += [f"  - `{member}`" for member in members]
    return "\n".join([*lines, ""])


def main(arguments: list[str] | None = None) -> int:
    """Write or check THIRD_PARTY.md; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.notices", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="only compare, and fail if it differs")
    check = parser.parse_args(arguments).check
    text = notice(tomllib.loads(MANIFEST.read_text(encoding="utf-8")))
    if not check:
        NOTICE.write_text(text, encoding="utf-8")
    elif not NOTICE.is_file() or NOTICE.read_text(encoding="utf-8") != text:
        print(f"{NOTICE.name} differs from the manifest: run `python -m tools.notices`")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
