"""A figure carries its alternative text, is the same every time, and is shown once."""

import base64
import hashlib
import subprocess
import sys

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest

from transferkit import figures
from transferkit.claims import FIGURE_MIME
from transferkit.figures import figure, use_style

ALT = 'A line that rises from 1 to 3 & is called "accuracy".'


@pytest.fixture(autouse=True)
def style():
    with matplotlib.rc_context():
        use_style()
        yield
    plt.close("all")


@pytest.fixture
def shown(monkeypatch):
    """The bundles that were displayed."""
    bundles = []
    monkeypatch.setattr(figures, "show", bundles.append)
    return bundles


def drawn(**settings):
    fig, axes = plt.subplots(**settings)
    axes.plot([1, 2, 3], label="accuracy")
    axes.set_xlabel("epoch")
    axes.legend()
    return fig


def test_the_notebook_gets_an_image_with_its_alternative_text(shown):
    figure("lab.curve", drawn(), alt=ALT)
    page = shown[0]["text/html"]
    assert 'alt="A line that rises from 1 to 3 &amp; is called &quot;accuracy&quot;."' in page
    assert "max-width:100%" in page
    assert shown[0]["text/plain"] == f"figure lab.curve: {ALT}"


def test_the_image_shown_is_the_file_saved_and_the_hash_recorded(shown, tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSFERKIT_FIGURES", str(tmp_path / "new" / "folder"))
    figure("lab.curve", drawn(), alt=ALT)
    (path,) = (tmp_path / "new" / "folder").iterdir()
    svg = path.read_bytes()
    assert path.name == "lab.curve.svg"
    assert base64.b64encode(svg).decode() in shown[0]["text/html"]
    assert shown[0][FIGURE_MIME] == {
        "name": "lab.curve",
        "alt": ALT,
        "sha256": hashlib.sha256(svg).hexdigest(),
    }


def test_nothing_is_written_unless_a_folder_is_named(shown, tmp_path, monkeypatch):
    monkeypatch.delenv("TRANSFERKIT_FIGURES", raising=False)
    monkeypatch.chdir(tmp_path)
    figure("lab.curve", drawn(), alt=ALT)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_draw_the_same_bytes():
    program = (
        "import matplotlib; matplotlib.use('Agg')\n"
        "import hashlib, matplotlib.pyplot as plt\n"
        "from transferkit import figures\n"
        "fig, axes = plt.subplots(); axes.plot([1, 2]); axes.imshow([[0, 1]])\n"
        "print(hashlib.sha256(figures._svg(fig)).hexdigest())\n"
    )
    hashes = {subprocess.check_output([sys.executable, "-c", program]) for _ in range(2)}
    assert len(hashes) == 1


def test_text_is_drawn_as_paths_on_a_white_card(shown):
    with matplotlib.rc_context({"svg.fonttype": "none", "savefig.facecolor": "none"}):
        figure("lab.curve", drawn(), alt=ALT)
    svg = base64.b64decode(shown[0]["text/html"].partition("base64,")[2].partition('"')[0])
    assert b"<text" not in svg
    card = svg.partition(b'<g id="patch_1">')[2].partition(b"</g>")[0]
    assert b"fill: #ffffff" in card


def test_a_figure_is_closed_so_that_it_is_not_shown_twice(shown):
    fig = drawn()
    figure("lab.curve", fig, alt=ALT)
    assert not plt.fignum_exists(fig.number)


@pytest.mark.parametrize(
    ("name", "width", "alt", "message"),
    [
        ("curve", 7, ALT, "lab.result"),
        ("lab.curve", 7, "A curve.", "at least 20 characters"),
        ("lab.curve", 7, "A" + " " * 30 + "curve.", "at least 20 characters"),
        ("lab.curve", 12, ALT, "12 inches wide"),
    ],
)
def test_a_figure_that_some_reader_could_not_read_is_refused(name, width, alt, message, shown):
    with pytest.raises(ValueError, match=message):
        figure(name, drawn(figsize=(width, 4)), alt=alt)
    assert shown == []


def test_something_that_is_not_a_figure_is_named():
    with pytest.raises(TypeError, match="is a list"):
        figure("lab.curve", drawn().axes, alt=ALT)


def test_the_style_keeps_text_readable_and_colours_apart():
    fig = drawn()
    fig.draw_without_rendering()
    sizes = [text.get_fontsize() for text in fig.findobj(matplotlib.text.Text) if text.get_text()]
    phone = 328 / (72 * fig.get_figwidth())  # pixels of the page for each point of the figure
    assert min(sizes) * phone >= 8
    cycle = [entry["color"] for entry in plt.rcParams["axes.prop_cycle"]]
    assert len(set(cycle)) == 7
    assert all(contrast_with_white(colour) > 2 for colour in cycle)


def contrast_with_white(colour):
    channels = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in matplotlib.colors.to_rgb(colour)
    ]
    luminance = 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2]
    return 1.05 / (luminance + 0.05)
