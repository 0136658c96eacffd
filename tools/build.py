"""Build the book: run what changed, check everything, print where to open it.

``python -m tools.build [--strict]``

Nothing is built when no input changed since the last build that passed. Otherwise Sphinx builds
with every warning an error: from what it read before if that build passed, from nothing if it did
not, in CI, or with ``--strict``, because an incremental build hides the warnings of earlier ones.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tools import checks, execute, labs

INPUTS = ("_config.yml", "_toc.yml", "*.md", "book/**/*", "notebooks/**/*.ipynb")
OURS = ("tools/**/*.py", "transferkit/*", "requirements.lock")
MATHJAX = "from transferkit import assets; print(assets.files('mathjax')['script'])"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strict", action="store_true", help="build from nothing, as CI does")
    parser.add_argument("--jobs", type=int, default=2, help="labs at a time (default 2)")
    parser.add_argument("--root", type=Path, default=labs.ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    book = labs.Book(options.root.resolve())
    clock = time.monotonic()
    try:
        execute.execute(book, book.labs(), jobs=options.jobs)
        findings = build(book, options.strict)
    except execute.LabError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the next call goes on from here", file=sys.stderr)
        return 130
    if findings:
        print(f"\nthe book was not accepted, {len(findings)} findings:", file=sys.stderr)
        print("\n".join(f"  {finding}" for finding in findings), file=sys.stderr)
        return 1
    print(f"book: ready in {time.monotonic() - clock:.0f} s, open {place(book)}")
    return 0


def build(book: labs.Book, strict: bool = False) -> list:
    """Check and build what was executed; return the findings of all gates.

    A passed build notes the key of its inputs, so that the next call with the same inputs is done
    at once; a failed one notes nothing, so that the next one starts from nothing.
    """
    state = book.build / "state.json"
    wanted = key(book)
    last = json.loads(state.read_text("utf-8")) if state.exists() else {}
    if last.get("key") == wanted and not strict and (book.html / "index.html").exists():
        print("book: nothing changed since the last build that passed")
        return []
    state.unlink(missing_ok=True)
    print("checks: pages, labs, claims, equations, words", flush=True)
    findings = checks.static(book)
    provide_scripts(book)
    print("pages: building", flush=True)
    if strict or not last or os.environ.get("CI"):
        shutil.rmtree(book.build / ".doctrees", ignore_errors=True)
        shutil.rmtree(book.html, ignore_errors=True)
    findings += pages(book)
    print("checks: links, images, nothing from elsewhere", flush=True)
    findings += checks.built(book)
    if not findings:
        state.write_text(json.dumps({"key": wanted}) + "\n", "utf-8")
    return findings


def key(book: labs.Book) -> str:
    """Return the SHA-256 over every file that the pages and their checks read."""
    files = {path for pattern in INPUTS for path in book.root.glob(pattern)}
    files |= {path for pattern in OURS for path in labs.ROOT.glob(pattern)}
    files |= set((book.root / "tests" / "equations").glob("**/*.py"))
    files |= {lab.executed for lab in book.labs()} | set(book.figures.glob("*.svg"))
    digest = hashlib.sha256()
    for path in sorted(files):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def provide_scripts(book: labs.Book) -> None:
    """Put MathJax, from the verified assets, where Sphinx takes static files from."""
    target = book.build / "static" / "vendor" / "mathjax" / "tex-svg-full.js"
    if target.exists():
        return
    command = [sys.executable, "-c", MATHJAX]
    found = subprocess.run(command, cwd=labs.ROOT, stdout=subprocess.PIPE, text=True, check=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(found.stdout.strip().splitlines()[-1], target)


def pages(book: labs.Book) -> list[labs.Finding]:
    """Run Sphinx through Jupyter Book; each of its warnings is a finding."""
    program = "from jupyter_book.cli.main import main; main()"
    command = [sys.executable, "-c", program, "build", ".", "-W", "-n", "--keep-going", "-q"]
    paths = [str(labs.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}
    answer = subprocess.run(
        command,
        cwd=book.root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if answer.returncode == 0:
        return []
    output = re.sub(r"\x1b\[[0-9;]*m", "", answer.stdout).replace(f"{book.root}/", "")
    warnings = [line for line in output.splitlines() if "WARNING" in line or "ERROR" in line]
    said = warnings or [output[-3000:]]
    return [labs.Finding("sphinx", 0, line) for line in said]


def place(book: labs.Book) -> str:
    return (book.html / "index.html").as_uri()


if __name__ == "__main__":
    sys.exit(main())
