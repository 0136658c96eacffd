"""A whole book in a temporary folder: one page, one lab of a second, the real configuration."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import yaml

from tools import keys, labs

PAGE = """(chap-small)=
# Small transfer

:::{admonition} Before you start
**What you will learn**: how a tiny book is made. **What you need**: nothing.
**Time and hardware**: one minute.
:::

Two numbers give 0.75<!--claim:small.share-->, or 75 %<!--claim:small.share-->, of
42<!--claim:small.count--> items. The letter $\\theta$ is a parameter, and {eq}`eq-square` is used.

% kind: checked
```{math}
:label: eq-square
f(\\theta) = \\theta^2
```

```{figure} /_build/figures/small.curve.svg
:name: fig-small-curve
:alt: A straight line that rises from zero to one.

The curve of the lab.
```

## What can go wrong

Nothing here.

## Summary

It is small.

## Key terms

{term}`transfer`

## Exercises

```{exercise} warm-up: one
:label: ex-small-1

Add one and one.
```

```{solution} ex-small-1
:label: sol-small-1
:class: dropdown

Two.
```

```{exercise} core: two
:label: ex-small-2

Add two and two.
```

````{solution} ex-small-2
:label: sol-small-2
:class: dropdown

```python
assert 2 + 2 == 4
```
````

```{exercise} core: three
:label: ex-small-3

Add three and three.
```

```{solution} ex-small-3
:label: sol-small-3
:class: dropdown

Six.
```

```{exercise} challenge: four
:label: ex-small-4

Add four and four.
```

```{solution} ex-small-4
:label: sol-small-4
:class: dropdown

Eight.
```

## Further reading

{cite:t}`small2020`.

## In the source documents

See [the source map](/book/appendix/source-map.md).
"""

OTHERS = {
    "book/index.md": "# A tiny book\n\nWelcome to [the chapter](/book/concepts/small.md).\n",
    "book/appendix/source-map.md": "# Source map\n\nNothing was used.\n",
    "book/appendix/glossary.md": (
        "# Glossary\n\n```{glossary}\ntransfer\n  To use again what was learnt.\n```\n"
    ),
    "book/appendix/claims.md": "# Claims\n\n```{claims-table}\n```\n\n```{recorded-table}\n```\n",
    "book/appendix/equations.md": "# Equations\n\n```{equations-table}\n```\n",
    "book/appendix/bibliography.md": "# Bibliography\n\n```{bibliography}\n```\n",
    "book/references.bib": (
        "@book{small2020,\n author = {Small, Ann}, title = {Small things}, year = {2020},\n"
        " publisher = {Nobody}\n}\n"
    ),
    "tests/equations/test_small.py": (
        "import pytest\n\n\n@pytest.mark.equation('eq-square')\ndef test_square_is_a_product():\n"
        "    assert 3**2 == 3 * 3\n"
    ),
}

TITLE = "(lab-small)=\n# Lab: small"

CODE = {
    "parameters": 'PROFILE = "cpu"\nSEED = 0',
    "profile": "import transferkit as tk\n\nprofile = tk.profile(PROFILE, SEED)",
    "nbval-check-output": "items = list(range(42))\nprint(len(items))",
    "claims": (
        'tk.claim("small.share", 0.75, low=0.7, high=0.8)\n'
        'tk.claim("small.count", len(items), low=42, high=42)'
    ),
    "figure": (
        "import matplotlib.pyplot as plt\n\n"
        "figure, axes = plt.subplots()\naxes.plot([0, 1])\n"
        'tk.figure("small.curve", figure, alt="A straight line that rises from zero to one.")'
    ),
}


def make(root: Path) -> labs.Book:
    """Write a tiny book that passes every gate and return it."""
    for name, text in {**OTHERS, "book/concepts/small.md": PAGE}.items():
        write(root / name, text)
    write_config(root)
    table = {
        "format": "jb-book",
        "root": "book/index",
        "parts": [
            {
                "caption": "Concepts",
                "numbered": True,
                "chapters": [
                    {
                        "file": "book/concepts/small",
                        "sections": [{"file": "notebooks/concepts/small"}],
                    }
                ],
            },
            {
                "caption": "Appendix",
                "chapters": [
                    {"file": name[:-3]} for name in OTHERS if name.startswith("book/appendix")
                ],
            },
        ],
    }
    write(root / "_toc.yml", yaml.safe_dump(table))
    write_lab(root / "notebooks" / "concepts" / "small.ipynb")
    return labs.Book(root)


def write_config(root: Path, url: str = "") -> None:
    """Take the project's own configuration, with the address of this book."""
    config = yaml.safe_load((labs.ROOT / "_config.yml").read_text("utf-8"))
    config["repository"]["url"] = url
    config["sphinx"]["local_extensions"] = {"executed_labs": str(labs.ROOT / "book" / "_ext")}
    write(root / "_config.yml", yaml.safe_dump(config))
    shutil.copytree(labs.ROOT / "book" / "_static", root / "book" / "_static", dirs_exist_ok=True)


def write_lab(path: Path, **changes: str) -> None:
    """Write the tiny lab; `changes` replace the code of cells by their tag."""
    cells = [{"cell_type": "markdown", "id": "title", "metadata": {}, "source": TITLE}]
    for tag, code in CODE.items():
        tags = [tag] if tag in ("parameters", "nbval-check-output") else []
        cell = {"cell_type": "code", "id": tag, "metadata": {"tags": tags} if tags else {}}
        cell |= {"execution_count": None, "outputs": [], "source": changes.get(tag, code)}
        if tag == "nbval-check-output":
            cell["execution_count"] = 3
            cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": "42\n"}]
        cells.append(cell)
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "transferkit": {
            "lab": "concepts/small",
            "claims": ["small.share", "small.count"],
            "figures": ["small.curve"],
        },
    }
    notebook = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    write(path, json.dumps(notebook, indent=1))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def replace(path: Path, old: str, new: str) -> None:
    """Plant a defect: replace a text that must be there."""
    text = path.read_text("utf-8")
    assert old in text, f"{old!r} is not in {path.name}"
    path.write_text(text.replace(old, new, 1), "utf-8")


def pretend(book: labs.Book) -> labs.Book:
    """Write what running the tiny lab would give, without the seconds that running takes."""
    lab = book.lab("small")
    notebook = json.loads(lab.source.read_text("utf-8"))
    share, count = claim("small.share", 0.75, 0.7, 0.8), claim("small.count", 42, 42, 42)
    alt = "A straight line that rises from zero to one."
    outputs = {
        "nbval-check-output": [{"output_type": "stream", "name": "stdout", "text": "42\n"}],
        "claims": [display(labs.CLAIM_MIME, share), display(labs.CLAIM_MIME, count)],
        "figure": [display(labs.FIGURE_MIME, {"name": "small.curve", "alt": alt})],
    }
    for number, (_, cell) in enumerate(labs.code_cells(notebook), 1):
        cell["execution_count"] = number
        cell["outputs"] = outputs.get(cell["id"], [])
    notebook["metadata"]["transferkit"]["run"] = {
        "started": "2026-11-22T09:00:00+00:00",
        "seconds": 1.0,
        "peak_memory_mib": 100,
        "profile": "cpu",
        "seed": 0,
        "versions": {"python": "3.11.2", "torch": "2.14.1"},
        "cpu": "A processor",
        "threads": 1,
        "commit": "abc1234",
        "key": keys.key(lab, "cpu"),
    }
    write(lab.executed, json.dumps(notebook))
    curve = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><path d="M0 9L9 0"/></svg>'
    )
    write(book.figures / "small.curve.svg", curve)
    return book


def display(mime: str, data: dict) -> dict:
    return {
        "output_type": "display_data",
        "metadata": {},
        "data": {mime: data, "text/plain": data["name"]},
    }


def claim(name: str, value: float, low: float, high: float) -> dict:
    interval = {"low": low, "high": high}
    rest = {"seeds": 1, "profile": "cpu", "evaluated": True, "test_opened": []}
    return {"name": name, "value": value, **interval, **rest}
