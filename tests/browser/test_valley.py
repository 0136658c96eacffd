"""The picture of the chapter on optimisation that one can move: it draws what the lab computes."""

import ast
import json

import numpy as np
import pytest
import torch

from tools import labs

BOOK = labs.Book()
SCRIPT = BOOK.root / "book" / "_static" / "js" / "valley.js"
PAGE = BOOK.html / "book" / "loss-math" / "optimisation.html"
START, CURVATURES = [-4.0, -1.2], np.array([1.0, 10.0])
RULES = {"gradient descent": 0.0, "with momentum 0.9": 0.9}


@pytest.fixture
def page(browser):
    """A page with nothing but the box and the script."""
    opened = browser.new_page()
    opened.set_content('<div class="tk-valley" hidden></div>')
    opened.add_script_tag(path=SCRIPT)
    yield opened
    opened.close()


def of_the_lab(name):
    path = BOOK.root / "notebooks" / "loss-math" / "optimisation.ipynb"
    cells = json.loads(path.read_text("utf-8"))["cells"]
    trees = [ast.parse("".join(c["source"])) for c in cells if c["cell_type"] == "code"]
    (node,) = [n for tree in trees for n in tree.body if getattr(n, "name", "") == name]
    names = {"np": np}
    exec(compile(ast.Module([node], type_ignores=[]), name, "exec"), names)
    return names[name]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("lr", [0.01, 0.1, 0.21])
def test_the_paths_of_the_script_are_those_of_the_lab(page, rule, lr):
    drawn = page.evaluate("given => valley.path(...given)", [rule, START, lr])
    expected = of_the_lab("descend")(CURVATURES, START, lr, 50, momentum=RULES[rule])
    assert np.array(drawn) == pytest.approx(expected, rel=1e-9)


def test_the_path_of_adam_is_torchs(page):
    drawn = page.evaluate("given => valley.path(...given)", ["Adam", START, 0.1])
    weight = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([weight], lr=0.1)
    for point in drawn:
        assert weight.tolist() == pytest.approx(point, rel=1e-9, abs=1e-12)
        optimiser.zero_grad()
        (torch.from_numpy(CURVATURES) * weight**2 / 2).sum().backward()
        optimiser.step()


def test_the_keyboard_moves_the_rate_and_the_picture_follows(page):
    assert page.locator(".tk-valley").is_visible()
    before = page.locator("polyline").last.get_attribute("points")
    told = page.locator("[role=status]").text_content()
    page.get_by_label("Learning rate").focus()
    page.keyboard.press("ArrowRight")
    after = page.locator("polyline").last.get_attribute("points")
    assert after != before
    assert page.locator("[role=status]").text_content() != told
    page.get_by_label("Rule").select_option("Adam")
    assert page.locator("polyline").last.get_attribute("points") != after


def test_the_rate_is_spoken_by_the_slider_alone(page):
    slider = page.get_by_role("slider", name="Learning rate", exact=True)
    slider.focus()
    page.keyboard.press("Home")
    assert slider.get_attribute("aria-valuetext") == "0.0010"
    assert page.locator("output").get_attribute("aria-hidden") == "true"
    assert page.get_by_role("status").count() == 1


@pytest.mark.skipif(not PAGE.exists(), reason="the page is not built: run `make book` first")
def test_without_javascript_the_static_figure_is_there_and_the_box_is_not(browser):
    context = browser.new_context(java_script_enabled=False)
    opened = context.new_page()
    opened.goto(PAGE.as_uri())
    assert opened.locator("#fig-optimisation-valley img").is_visible()
    assert not opened.locator(".tk-valley").is_visible()
    context.close()
