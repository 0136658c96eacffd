"""The derivations of a lab, read from its notebook: syntax trees, and what they define."""

import ast
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import transferkit as tk

LABS = Path(__file__).parents[2] / "notebooks"


def definitions(lab: str) -> dict[str, ast.FunctionDef | ast.ClassDef]:
    """The functions and classes of a lab, such as "loss-math/losses", by name."""
    cells = json.loads((LABS / f"{lab}.ipynb").read_text(encoding="utf-8"))["cells"]
    trees = [ast.parse("".join(c["source"])) for c in cells if c["cell_type"] == "code"]
    nodes = (node for tree in trees for node in tree.body)
    return {n.name: n for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}


def names_of(nodes: Iterable[ast.stmt], **more: Any) -> Callable[[str], Any]:
    """What definitions of a lab make, by name; `more` is what it imports beside the usual."""
    names = {"__name__": "lab", "np": np, "torch": torch, "nn": nn, "tk": tk} | more
    module = ast.fix_missing_locations(ast.Module(list(nodes), type_ignores=[]))
    exec(compile(module, "lab", "exec"), names)
    return names.__getitem__


def slopes(function: Callable[[np.ndarray], float], at: np.ndarray, step=1e-5) -> np.ndarray:
    """Central differences of a function of an array, in the array's shape."""
    found = np.zeros_like(at)
    for place in np.ndindex(at.shape):
        ahead, behind = at.copy(), at.copy()
        ahead[place] += step
        behind[place] -= step
        found[place] = (function(ahead) - function(behind)) / (2 * step)
    return found
