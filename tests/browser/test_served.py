"""The page of a saved model in a real browser: type a text, press the button, read the label."""

import classifiers
import pytest
import visit

from transferkit import apply


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A served model that calls a text with 好 good and one with 差 bad."""
    model = classifiers.saved(
        tmp_path_factory.mktemp("served"), "很好差的书房间",
        ["很好的书", "房间很好", "差的书", "房间很差"] * 8, [1, 1, 0, 0] * 8,
        labels=["negative", "positive"], length=16, epochs=30,
    )  # fmt: skip
    with classifiers.served(model) as server:
        yield f"http://127.0.0.1:{server.server_port}/"


class Served(visit.Visit):
    """A visit to the served page, which alone may be asked for something."""

    def __enter__(self):
        self.context = self.browser.new_context(
            viewport={"width": self.size[0], "height": self.size[1]},
            color_scheme="dark" if self.dark else "light",
        )
        self.page = self.context.new_page()
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.faults.append(f"JavaScript error: {error}"))
        self.page.on("request", self._asked)
        self.page.goto(self.path)
        return self

    def _asked(self, request):
        if not request.url.startswith(self.path):
            super()._asked(request)

    def ask(self, text):
        self.page.get_by_label("A text").fill(text)
        self.page.get_by_role("button", name="Classify").click()
        self.page.wait_for_load_state()


@pytest.mark.parametrize(("text", "label"), [("很好的书", "positive"), ("房间很差", "negative")])
def test_a_reader_types_a_review_presses_the_button_and_reads_the_label(
    browser, address, text, label
):
    with Served(browser, address) as reader:
        reader.ask(text)
        assert reader.page.locator("output").inner_text() == label
        assert text in reader.page.locator("blockquote").inner_text()
        assert "%" in reader.page.get_by_role("table").inner_text()
        assert reader.faults == []


def test_the_keyboard_alone_is_enough(browser, address):
    with Served(browser, address) as reader:
        reader.page.keyboard.type("很好")  # the field has the focus
        reader.page.keyboard.press("Tab")
        reader.page.keyboard.press("Enter")
        reader.page.wait_for_selector("output")
        assert reader.page.locator("output").inner_text() == "positive"


def test_nothing_typed_gets_a_message(browser, address):
    with Served(browser, address) as reader:
        reader.ask("   ")
        assert reader.page.get_by_role("alert").inner_text() == "Type a text first."
        assert reader.page.locator("output").count() == 0
        assert reader.faults == []


def test_of_a_long_text_the_page_says_that_its_end_was_not_read(browser, address):
    with Served(browser, address, visit.PHONE) as reader:
        reader.ask("很好" * 1000)
        assert reader.page.locator("output").inner_text() == "positive"
        assert "its end was not read" in reader.page.locator("section").inner_text()
        reader.look()
        assert reader.faults == []


def test_a_text_beyond_the_limit_gets_a_message_and_the_next_one_an_answer(browser, address):
    with Served(browser, address) as reader:
        reader.ask("好" * apply.LIMIT)
        assert "too long" in reader.page.get_by_role("alert").inner_text()
        reader.ask("很好")
        assert reader.page.locator("output").inner_text() == "positive"


@pytest.mark.parametrize(
    ("size", "dark"), [(visit.DESKTOP, False), (visit.DESKTOP, True), (visit.PHONE, False)]
)
def test_the_page_is_accessible_and_fits(browser, address, size, dark):
    with Served(browser, address, size, dark) as reader:
        reader.ask("房间很好" * 40 + " <b>&")
        reader.look()
        reader.audit()
        assert reader.faults == []
