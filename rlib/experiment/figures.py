"""Figures that look alike, built without pyplot: no display, no global state."""

import io
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from cycler import cycler

# Before matplotlib loads: it would complain about a read-only home, in which it works as well.
logging.getLogger("matplotlib").setLevel(logging.ERROR)

import matplotlib as mpl  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

#: Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_STYLE: Any = {
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.5,
    "image.cmap": "gray",
}

#: Decorator of functions that draw: in them figures get the house's style.
styled = mpl.rc_context(_STYLE)


def panels(
    rows: int = 1, columns: int = 1, *, size: tuple[float, float] = (3.4, 2.6), **kwargs: Any
) -> tuple[Figure, np.ndarray]:
    """A figure and its array of axes, (rows, columns).

    Args:
        size: inches of one panel.
        kwargs: as `Figure.subplots`.

    >>> figure, axes = panels(2, 3)
    >>> axes.shape, figure.get_size_inches().round(1).tolist()
    ((2, 3), [10.2, 5.2])
    """
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def legend(figure: Figure, axes: Axes, columns: int = 6) -> None:
    """One legend below all panels, of the lines of one.

    >>> figure, axes = panels()
    >>> lines = axes[0, 0].plot([0, 1], label="winner")
    >>> legend(figure, axes[0, 0])
    >>> [text.get_text() for text in figure.legends[0].get_texts()]
    ['winner']
    """
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def picture(axes: Axes, image: np.ndarray, title: str = "", **kwargs: Any) -> Any:
    """Show (H, W), (H, W, 1) or (H, W, 3) without ticks.

    >>> figure, axes = panels()
    >>> picture(axes[0, 0], np.zeros((4, 5, 1)), "black").get_array().shape
    (4, 5)
    """
    axes.set_axis_off()
    axes.set_title(title)
    return axes.imshow(image.squeeze(), interpolation="nearest", **kwargs)


def draw_split(axes: Axes, parts: Sequence[np.ndarray], labels: np.ndarray, title: str = "") -> Any:
    """Who holds what: a disc for each client and label, its area by the number of examples.

    >>> figure, axes = panels()
    >>> dots = draw_split(axes[0, 0], [np.array([0, 1]), np.array([2])], np.array([0, 1, 1]))
    >>> len(dots.get_offsets())
    3
    """
    names = np.unique(labels)
    counts = np.array([[np.sum(labels[part] == name) for name in names] for part in parts])
    client, label = np.nonzero(counts)
    largest = min(160, 4000 / len(parts))  # so that many clients do not cover each other
    area = largest * counts[client, label] / max(counts.max(), 1)
    axes.set(title=title, xlabel="client", ylabel="label", xlim=(-1, len(parts)))
    axes.set_yticks(range(len(names)), [str(name) for name in names])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return axes.scatter(client, label, s=area, color=COLOURS[0], alpha=0.8, linewidths=0)


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
