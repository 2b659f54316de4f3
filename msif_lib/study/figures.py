"""One visual style for the study, and its plots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import ArrayLike

from msif_lib.evaluation import Agreement, Estimate

# Okabe and Ito's colours, told apart with every common kind of colour vision.
PALETTE = {
    "blue": "#0072B2",
    "vermilion": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "black": "#000000",
}
_GREY = "#6B7280"


def use_style() -> None:
    """Set the style of all figures that follow.

    Letters stay legible when a figure is as wide as a telephone; the background is white, which
    the book's pages make their own, light or dark.
    """
    sns.set_theme(context="notebook", style="ticks", palette=list(PALETTE.values()))
    plt.rcParams.update(
        {
            "figure.figsize": (6.4, 4.6),
            "figure.dpi": 110,
            "savefig.dpi": 200,
            "savefig.bbox": "tight",
            "savefig.pad_inches": 0.15,
            "figure.constrained_layout.use": True,
            "font.size": 13,
            "axes.titlesize": 14,
            "axes.labelsize": 13,
            "xtick.labelsize": 12,
            "ytick.labelsize": 12,
            "legend.fontsize": 12,
            "legend.frameon": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.formatter.limits": (-3, 4),
            "axes.formatter.use_mathtext": True,
        }
    )
    try:
        from IPython import get_ipython
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ImportError:
        return
    if get_ipython() is not None:
        set_matplotlib_formats("retina")


def scatter_agreement(
    ax: Axes,
    predicted: ArrayLike,
    actual: ArrayLike,
    agreement: Agreement,
    title: str = "",
    color: str = PALETTE["blue"],
) -> None:
    """Plot true changes of the loss against predicted ones.

    A grey line marks equality, a coloured one the regression of true on predicted changes. Both
    axes keep their own scale, as a prediction may be right but for a factor.

    Parameters
    ----------
    ax : Axes
        Where to draw.
    predicted, actual : array
        Changes of the test loss, shape (R,).
    agreement : Agreement
        Of `predicted` and `actual`; r and its interval stand in the figure.
    title : str
        Of the axes.
    color : str
        Of the points.

    Raises
    ------
    ValueError
        If `predicted` and `actual` are not vectors of the same length.
    """
    x, y = np.asarray(predicted, dtype=float), np.asarray(actual, dtype=float)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(
            f"predicted and actual must be vectors of one length, got {x.shape} and {y.shape}"
        )
    ax.scatter(x, y, s=26, color=color, alpha=0.7, linewidths=0, zorder=3)
    ends = np.array([x.min(), x.max()])
    slope = agreement.slope.value
    # The identity line may leave the range of the data; it must not set the scale.
    ax.set_xlim(ax.get_xlim())
    ax.set_ylim(ax.get_ylim())
    ax.axline((0, 0), slope=1, color=_GREY, linestyle="--", linewidth=1.2, label="equality")
    ax.plot(ends, y.mean() + slope * (ends - x.mean()), color=color, linewidth=1.8, label="fit")
    # At the left, as the power of ten of the axis stands at the right.
    ax.set_xlabel("predicted change of the test loss", loc="left")
    ax.set_ylabel("true change")
    ax.locator_params(nbins=5)
    ax.set_title(title, loc="left")
    ax.text(
        0.03,
        0.97,
        f"r = {agreement.pearson}\nslope = {slope:.3g}",
        transform=ax.transAxes,
        va="top",
        fontsize=12,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 2},
        zorder=4,
    )
    ax.legend(loc="lower right")


def table(rows: Iterable[Mapping[str, Any]]) -> None:
    """Show rows as a table without an index, in the page's own colours.

    Parameters
    ----------
    rows : iterable of mapping
        Columns in the order of the first row.
    """
    frame = pd.DataFrame(list(rows))
    display(frame.style.hide(axis="index").set_table_attributes('class="dataframe"'))


def image_grid(
    pictures: ArrayLike, captions: Sequence[str] = (), columns: int = 8, title: str = ""
) -> Figure:
    """Show images in rows.

    Parameters
    ----------
    pictures : array
        Values in [0, 1], shape (B, height, width, channels) with 1 or 3 channels, as
        `ImageData.pictures` gives them.
    captions : sequence of str
        One for each image, or none.
    columns : int
        Images in a row.
    title : str
        Of the figure.

    Returns
    -------
    Figure
        The figure.

    Raises
    ------
    ValueError
        If the images are not of that shape, or captions are too many or too few.
    """
    array = np.asarray(pictures)
    if array.ndim != 4 or not len(array) or array.shape[-1] not in (1, 3):
        raise ValueError(f"pictures must have shape (B, height, width, 1 or 3), got {array.shape}")
    if captions and len(captions) != len(array):
        raise ValueError(f"{len(captions)} captions for {len(array)} pictures")
    columns = min(columns, len(array))
    rows = -(-len(array) // columns)
    height = 1.35 if captions else 1.05
    fig, axes = plt.subplots(
        rows, columns, figsize=(1.05 * columns, height * rows + 0.4 * bool(title)), squeeze=False
    )
    for ax in axes.flat:
        ax.set_axis_off()
    for index, (ax, picture) in enumerate(zip(axes.flat, array)):
        grey = picture.shape[-1] == 1
        ax.imshow(picture.squeeze(-1) if grey else picture, cmap="gray_r", vmin=0, vmax=1)
        if captions:
            ax.set_title(captions[index], fontsize=11)
    if title:
        fig.suptitle(title)
    return fig


def forest(
    ax: Axes,
    labels: Sequence[str],
    estimates: Sequence[Estimate],
    xlabel: str = "Pearson r, 95 % interval",
    colors: Sequence[str] | None = None,
    no_effect: float = 0.0,
) -> None:
    """Plot estimates with their intervals, one a row, the first on top.

    Parameters
    ----------
    ax : Axes
        Where to draw.
    labels : sequence of str
        One for each estimate.
    estimates : sequence of Estimate
        Values and intervals; they are also written out at the right.
    xlabel : str
        What is estimated.
    colors : sequence of str, optional
        One for each estimate.
    no_effect : float
        Where a vertical line stands.

    Raises
    ------
    ValueError
        If labels, estimates and colours are not equally many.
    """
    colors = [PALETTE["blue"]] * len(labels) if colors is None else colors
    if not len(labels) == len(estimates) == len(colors):
        raise ValueError(
            f"{len(labels)} labels, {len(estimates)} estimates and {len(colors)} colors "
            "must be equally many"
        )
    for row, (estimate, color) in enumerate(zip(estimates, colors)):
        ax.plot([estimate.low, estimate.high], [row, row], color=color, linewidth=2.5)
        ax.plot(estimate.value, row, "o", color=color, markersize=8)
        place: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "va": "center"}
        ax.text(1.02, row, str(estimate), fontsize=12, **place)
    ax.axvline(no_effect, color=_GREY, linewidth=1)
    _name_rows(ax, labels, xlabel)


def ratio_axis(ax: Axes) -> None:
    """Make the horizontal axis one of ratios: logarithmic, with few marks.

    Parameters
    ----------
    ax : Axes
        Already drawn on. What lies beyond 0.02 to 50 leaves it.
    """
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    low, high = max(low, 0.02), min(high, 50)
    ax.set_xlim(low, high)
    coarse, fine = (0.03, 0.1, 0.3, 1, 3, 10, 30), (0.5, 0.7, 1, 1.4, 2)
    several = sum(low <= mark <= high for mark in coarse) > 2
    marks = [mark for mark in (coarse if several else fine) if low <= mark <= high]
    ax.set_xticks(marks, [f"{mark:g}" for mark in marks])
    ax.xaxis.set_minor_locator(NullLocator())


def _name_rows(ax: Axes, labels: Sequence[str], xlabel: str) -> None:
    """Labels at the left, one a row, the first on top."""
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.set_xlabel(xlabel)


def bars(
    ax: Axes,
    labels: Sequence[str],
    values: Sequence[float],
    xlabel: str,
    ranges: Sequence[tuple[float, float]] | None = None,
    colors: Sequence[str] | None = None,
    unit: float | None = 1.0,
) -> None:
    """Plot positive quantities, one a row, the first on top, on a logarithmic axis.

    Parameters
    ----------
    ax : Axes
        Where to draw.
    labels : sequence of str
        One for each value.
    values : sequence of float
        Positive; they are also written out at the right.
    xlabel : str
        What they measure.
    ranges : sequence of pairs, optional
        The lowest and the highest of what each value is the median of.
    colors : sequence of str, optional
        One for each value.
    unit : float, optional
        Where a vertical line marks what the others are compared with.

    Raises
    ------
    ValueError
        If labels, values, ranges and colours are not equally many, or a value is not positive.
    """
    colors = [PALETTE["blue"]] * len(labels) if colors is None else colors
    ranges = [(value, value) for value in values] if ranges is None else ranges
    if not len(labels) == len(values) == len(ranges) == len(colors):
        raise ValueError(
            f"{len(labels)} labels, {len(values)} values, {len(ranges)} ranges and {len(colors)} "
            "colors must be equally many"
        )
    if not all(value > 0 for value in values):
        raise ValueError(f"a logarithmic axis has no place for {min(values)}")
    place: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "va": "center"}
    for row, (value, (low, high), color) in enumerate(zip(values, ranges, colors)):
        ax.plot(value, row, "o", color=color, markersize=9)
        ax.plot([low, high], [row, row], color=color, linewidth=2.5)
        digits = f"{float(f'{value:.2g}'):,.10f}".rstrip("0").rstrip(".")
        ax.text(1.02, row, digits, fontsize=12, **place)
    if unit is not None:
        ax.axvline(unit, color=_GREY, linewidth=1, zorder=0)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.grid(axis="x", color="#E5E7EB", linewidth=0.8)
    ax.set_axisbelow(True)
    _name_rows(ax, labels, xlabel)
