"""Figures that the labs show and the pages reuse. The one idea: a figure is drawn once, by the lab
that computed it, and carries the text that stands in for it where it cannot be seen.

The saved SVG is the same, byte for byte, for the same data and version of matplotlib: its text is
drawn as paths, its identifiers are salted with a constant, and it holds no date. matplotlib is
loaded on first use.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from transferkit.claims import FIGURE_MIME, check_name, show

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colour-blind-safe palette in the order of use, without its yellow, which is lost
# on white. Source: Okabe & Ito (2008), "Color universal design".
COLOURS = {
    "blue": "#0072B2",
    "vermilion": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "black": "#000000",
}
WIDEST = 7.5  # inches: wider figures cannot be read on a phone
SHORTEST_ALT = 20  # characters
_SVG = {"svg.fonttype": "path", "svg.hashsalt": "transferkit"}


def use_style() -> None:
    """Set the one style of the book's figures as matplotlib's defaults; `tk.profile` does it.

    Text of 12 points or more can be read even where a phone shrinks a figure to two thirds, and the
    white card carries it in dark mode.
    """
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            **_SVG,
            "axes.prop_cycle": plt.cycler(color=list(COLOURS.values())),
            "axes.axisbelow": True,
            "axes.edgecolor": "#444444",
            "axes.facecolor": "white",
            "axes.grid": True,
            "axes.grid.axis": "y",
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 13,
            "figure.constrained_layout.use": True,
            "figure.dpi": 100,
            "figure.facecolor": "white",
            "figure.figsize": (6.5, 4.2),
            "font.size": 12.5,
            "grid.color": "#dddddd",
            "image.cmap": "cividis",
            "legend.fontsize": 12,
            "legend.frameon": False,
            "lines.linewidth": 2,
            "lines.markersize": 7,
            "savefig.facecolor": "white",
            "xtick.labelsize": 12,
            "ytick.labelsize": 12,
        }
    )


def figure(name: str, fig: Figure, *, alt: str) -> None:
    """Show a figure with its alternative text, record it, and save it where the pages look for it.

    The lab shows it as an image with `alt`. Where the environment variable TRANSFERKIT_FIGURES
    names a folder, `<folder>/<name>.svg` is written. The figure is closed, lest it be shown twice.

    Args:
        name: `lab.figure` in lower-case letters, digits and hyphens: `image-model.confusion`.
        fig: a matplotlib figure, at most 7.5 inches wide.
        alt: what the figure shows, for readers who cannot see it; at least 20 characters.

    Raises:
        ValueError: the name is malformed, the alternative text too short, or the figure too wide.
        TypeError: `fig` is not a figure.

    Example:
        >>> from matplotlib.figure import Figure
        >>> drawn = Figure(figsize=(4, 3))
        >>> lines = drawn.subplots().plot([1, 2, 3], [0.5, 0.7, 0.8])
        >>> tk.figure("image-model.curve", drawn, alt="Accuracy rises from 0.5 to 0.8.")
        figure image-model.curve: Accuracy rises from 0.5 to 0.8.
    """
    check_name(name)
    from matplotlib import pyplot as plt
    from matplotlib.figure import Figure

    if not isinstance(fig, Figure):
        raise TypeError(
            f"the figure {name} is a {type(fig).__name__}, but a matplotlib Figure is expected: "
            "pass the first value of plt.subplots(), or axes.figure"
        )
    alt = " ".join(alt.split())
    if len(alt) < SHORTEST_ALT:
        raise ValueError(
            f"the figure {name} has the alternative text {alt!r}, but at least {SHORTEST_ALT} "
            "characters are expected: say what is drawn and what it shows"
        )
    if fig.get_figwidth() > WIDEST:
        raise ValueError(
            f"the figure {name} is {fig.get_figwidth():g} inches wide, but at most {WIDEST:g} are "
            "expected, to be read on a phone: put the panels below each other"
        )
    svg = _svg(fig)
    plt.close(fig)
    folder = os.environ.get("TRANSFERKIT_FIGURES")
    if folder:
        _write(Path(folder) / f"{name}.svg", svg)
    source = base64.b64encode(svg).decode("ascii")
    show(
        {
            FIGURE_MIME: {"name": name, "alt": alt, "sha256": hashlib.sha256(svg).hexdigest()},
            "text/html": f'<img alt="{html.escape(alt)}" style="max-width:100%;height:auto" '
            f'src="data:image/svg+xml;base64,{source}">',
            "text/plain": f"figure {name}: {alt}",
        }
    )


def _svg(fig: Figure) -> bytes:
    import matplotlib

    target = io.BytesIO()
    with matplotlib.rc_context(_SVG):
        metadata = {"Date": None, "Creator": None}
        fig.savefig(target, format="svg", facecolor="white", metadata=metadata)
    return target.getvalue()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)  # a build that is stopped here leaves the old figure whole
