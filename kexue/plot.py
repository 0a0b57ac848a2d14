"""The book's one style: colours safe for the colour-blind, PNG at one width, theory in thin black."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, ordered so that the first four also differ in grey."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH = 7.0
"""Width of a figure in inches: the text column."""

STYLE: dict[str, Any] = {
    "axes.prop_cycle": cycler(color=COLOURS) + cycler(marker=MARKERS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "figure.dpi": 110,
    "savefig.dpi": 110,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "image.cmap": "gray",
}
THEORY: dict[str, Any] = {"color": "black", "linewidth": 0.9, "marker": "", "zorder": 3}
"""Keyword arguments of a line that draws theory."""


def use_style() -> None:
    """Apply the book's style to this session and draw inline figures as PNG only."""
    plt.style.use(STYLE)
    try:
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ImportError:
        return
    set_matplotlib_formats("png")


def figure(rows: int = 1, columns: int = 1, height: float = 3.0, **options: Any) -> tuple[Figure, Any]:
    """A figure of the text column's width; `height` in inches per row, other options as `plt.subplots`."""
    return plt.subplots(rows, columns, figsize=(WIDTH, height * rows), **options)


def image_grid(images: Any, columns: int, *, ax: Axes, low: float = 0.0, high: float = 1.0, gap: int = 1) -> None:
    """Draw (n, h, w) images in a grid with `columns` columns on one axes, grey levels from `low` to `high`."""
    pictures = np.asarray(images)
    n, h, w = pictures.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap), high, dtype=float)
    for i, picture in enumerate(pictures):
        top, left = (i // columns) * (h + gap), (i % columns) * (w + gap)
        sheet[top : top + h, left : left + w] = picture
    _ = ax.imshow(sheet, vmin=low, vmax=high, interpolation="nearest")
    ax.set_axis_off()
