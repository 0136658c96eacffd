"""Planted errors: copies of a syntax tree in which one sign is turned round.

A test of a formula is worth something if it fails on each of these copies of the lab's derivation.
"""

import ast
import copy
import itertools
from collections.abc import Iterator


def signs(tree: ast.AST) -> Iterator[ast.BinOp | ast.UnaryOp]:
    """The additions, subtractions and minus signs of a syntax tree, always in one order."""
    for node in ast.walk(tree):
        binary = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub)
        if binary or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)):
            yield node


def with_one_sign_turned(tree: ast.AST) -> Iterator[ast.AST]:
    """Every copy of a syntax tree in which one sign is the other one, in the order of `signs`."""
    for at, _ in enumerate(signs(tree)):
        wrong = copy.deepcopy(tree)
        node = next(itertools.islice(signs(wrong), at, None))
        turned = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.USub: ast.UAdd}
        node.op = turned[type(node.op)]()
        yield wrong
