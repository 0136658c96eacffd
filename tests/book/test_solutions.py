"""The code in the solutions of every chapter runs: one namespace for each solution."""

import textwrap

import pytest
import tiny
import torch

from tools import labs, prose


def solutions(book):
    """Return (place, code) for each solution that shows Python."""
    found = []
    for path in book.chapters():
        blocks = prose.blocks(path.read_text("utf-8"))
        for solution in (block for block in blocks if block.name == "solution"):
            inside = [b for b in blocks if solution.line < b.line and b.end < solution.end]
            shown = [b for b in inside if b.argument == "python" and not b.name]
            if shown:
                place = f"{book.relative(path)}:{shown[0].line}"
                found.append((place, "\n".join(textwrap.dedent(b.text) for b in shown)))
    return found


def run(place, code):
    exec(compile(code, place, "exec"), {"__name__": "solution"})


FOUND = solutions(labs.Book())


@pytest.mark.parametrize(("place", "code"), FOUND, ids=[place for place, _ in FOUND])
def test_the_code_of_a_solution_runs(place, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRANSFERKIT_PROFILE", "smoke")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    dtype = torch.get_default_dtype()
    try:
        run(place, code)
    finally:
        torch.set_default_dtype(dtype)  # a solution may compute in float64; what follows may not


def test_a_solution_that_fails_is_seen(book):
    chapter = book.root / "book/concepts/small.md"
    assert [place for place, _ in solutions(book)] == ["book/concepts/small.md:62"]
    tiny.replace(chapter, "assert 2 + 2 == 4", "assert 2 + 2 == 5")
    with pytest.raises(AssertionError):
        run(*solutions(book)[0])


def test_the_blocks_of_one_solution_share_their_names_and_no_others(book):
    chapter = book.root / "book/concepts/small.md"
    tiny.replace(
        chapter, "assert 2 + 2 == 4\n```", "x = 4\n```\n\nso\n\n```python\nassert x == 4\n```"
    )
    run(*solutions(book)[0])
    with pytest.raises(NameError):
        run("elsewhere", "x")
