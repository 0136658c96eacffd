"""Keep the labs in git as they should be: ``python -m tools.notebooks strip|store|sync [lab …]``

``strip`` drops every output that no check compares. ``store`` runs labs in the smoke profile and
keeps the outputs of the cells tagged ``nbval-check-output``. ``sync`` writes, renews or removes
the install cell, which exists only while ``repository.url`` in ``_config.yml`` is set.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from tools import execute, labs

# What a lab says of itself in its metadata.
DECLARED = ("lab", "claims", "full-claims", "figures", "full-figures")
INSTALL = """\
# Only where the book's library is not installed yet, as on Colab or Binder.
import importlib.util

if importlib.util.find_spec("transferkit") is None:
    %pip install -q "transferkit[all] @ git+{url}@{revision}"
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["strip", "store", "sync"])
    parser.add_argument("labs", nargs="*", help="names as in _toc.yml; without any: all")
    parser.add_argument("--root", type=Path, default=labs.ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    book = labs.Book(options.root.resolve())
    chosen = [book.lab(name) for name in options.labs] or book.labs()
    actions = {"strip": strip, "store": store, "sync": sync}
    try:
        for lab in chosen:
            actions[options.action](lab)
            print(f"{options.action}: {lab.name}")
    except execute.LabError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def strip(lab: labs.Lab) -> None:
    """Drop outputs and counts but those of checked cells, and metadata that programs leave."""
    notebook = lab.notebook()
    for cell in notebook["cells"]:
        kept = {"tags": labs.tags(cell)} if labs.tags(cell) else {}
        cell["metadata"] = kept
        if cell["cell_type"] == "code" and labs.CHECKED not in labs.tags(cell):
            cell["outputs"], cell["execution_count"] = [], None
    notebook["metadata"] = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "transferkit": {key: value for key, value in lab.declared.items() if key in DECLARED},
    }
    write(lab.source, notebook)


def store(lab: labs.Lab) -> None:
    """Run a lab in the smoke profile and store what its checked cells print.

    Raises:
        LabError: the lab failed.
    """
    result = execute.rehearse(lab)
    notebook = lab.notebook()
    for (_, cell), (_, ran) in zip(labs.code_cells(notebook), labs.code_cells(result), strict=True):
        if labs.CHECKED in labs.tags(cell):
            cell["outputs"], cell["execution_count"] = ran["outputs"], ran["execution_count"]
            if not cell["outputs"]:
                raise execute.LabError(f"{lab.name}: a checked cell prints nothing")
            for output in cell["outputs"]:
                output.get("data", {}).pop("text/html", None)
    write(lab.source, notebook)
    strip(lab)


def sync(lab: labs.Lab) -> None:
    """Make the install cell of a lab fit `repository.url`."""
    notebook = lab.notebook()
    notebook["cells"] = [c for c in notebook["cells"] if "install" not in labs.tags(c)]
    code = install_cell(lab.book)
    if code:
        cell = {"cell_type": "code", "execution_count": None, "id": "install", "outputs": []}
        cell |= {"metadata": {"tags": ["install", "remove-cell"]}, "source": lines(code)}
        notebook["cells"].insert(1, cell)
    write(lab.source, notebook)


def install_cell(book: labs.Book) -> str:
    """Return the install cell's code, pinned to this version; "" while there is no address."""
    url = book.repository()
    if not url:
        return ""
    branch = (book.config().get("repository") or {}).get("branch")
    text = (labs.ROOT / "transferkit" / "__init__.py").read_text("utf-8")
    version = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]
    return INSTALL.format(url=url, revision=branch or f"v{version}").rstrip("\n")


def lines(text: str) -> list[str]:
    """Return text as the file format keeps it: a list of lines."""
    return text.splitlines(keepends=True)


def write(path: Path, notebook: dict) -> None:
    """Write a notebook the way Jupyter does, so that differences stay small."""
    for cell in notebook["cells"]:
        cell["source"] = lines(labs.source(cell))
        for output in cell.get("outputs", []):
            if isinstance(output.get("text"), str):
                output["text"] = lines(output["text"])
    text = json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True)
    path.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
