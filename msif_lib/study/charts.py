"""Charts that a reader moves with a slider, offline: everything shown is computed beforehand.

A chart is an Altair chart whose data hold a column ``place``, and :func:`slider` puts one or more
of them under one slider. The book's ``_static/charts.js`` draws them with the copies of Vega beside
it. A list of what the chart says at each place stands in the page for those who do not see it, and
where scripts do not run.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
from IPython.display import HTML

#: The colour of lines that only help to read; those of series are ``var(--chart-1)`` to 4.
QUIET = "var(--chart-quiet)"
_DIGITS = 5  # significant, of every number that is drawn
_PAGE = """\
<figure class="msif-chart">
<div class="live" hidden>
<div class="control"><label>{label}
<input type="range" min="0" max="{last}" step="1" value="{start}" aria-valuetext="{shown}">
</label><output>{shown}</output></div>
<p class="says" role="status">{says}</p>
<div class="panels">{panels}</div>
</div>
<p class="without">This figure moves with a slider on the book's page, where JavaScript runs. What
it shows at each place stands in the list.</p>
<details><summary>{label}: all places in words</summary>
<table><thead><tr><th scope="col">{label}</th>
<th scope="col">what the figure shows</th></tr></thead><tbody>{rows}</tbody></table>
</details>
<script type="application/json">{values}</script>
</figure>"""


def at_place(chart: alt.Chart) -> alt.Chart:
    """Keep of a chart's data the rows whose ``place`` is that of the slider.

    Parameters
    ----------
    chart
        With the column ``place``, 0 for the slider's first position. Its scales should have fixed
        domains, or the axes move with the data.
    """
    return chart.transform_filter("datum.place == place")


def stacked(places: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Put the data of all places into one frame.

    Parameters
    ----------
    places
        Columns of each place, in the slider's order: arrays of one length, tensors and numbers.

    Returns
    -------
    DataFrame
        With the column ``place`` beside them.
    """
    frames = [
        pd.DataFrame({name: _plain(column) for name, column in one.items()}).assign(place=place)
        for place, one in enumerate(places)
    ]
    return pd.concat(frames, ignore_index=True)


def scatter(
    data: pd.DataFrame,
    x_title: str,
    y_title: str,
    ends: Sequence[float] | None = None,
    series: str | None = None,
) -> alt.LayerChart:
    """Plot columns ``x`` and ``y`` of the slider's place on equal axes, with the line of equality.

    Parameters
    ----------
    data
        As :func:`stacked` gives it.
    x_title, y_title
        Of the axes.
    ends
        Of both axes. Points beyond stand at the edge. By default all points of all places fit.
    series
        Column by which the points differ in colour and shape.
    """
    if ends is None:
        low, high = data[["x", "y"]].min().min(), data[["x", "y"]].max().max()
        ends = [low - 0.03 * (high - low), high + 0.03 * (high - low)]
    scale = alt.Scale(domain=list(ends), clamp=True, nice=False)
    x, y = alt.X("x:Q", title=x_title).scale(scale), alt.Y("y:Q", title=y_title).scale(scale)
    equality = alt.Chart(pd.DataFrame({"x": ends, "y": ends})).encode(x, y)
    points = at_place(alt.Chart(data)).encode(x, y)
    if series is not None:
        order = list(data[series].unique())
        points = points.encode(
            alt.Color(f"{series}:N", sort=order),
            alt.Shape(f"{series}:N", sort=order, legend=None),
        )
    return equality.mark_line(color=QUIET, strokeDash=[5, 4]) + points.mark_point(
        size=45, strokeWidth=2, color="var(--chart-2)"
    )


def with_mark(line: alt.Chart) -> alt.LayerChart:
    """Draw a line through all places, with a mark at the slider's.

    Parameters
    ----------
    line
        With its encodings, one row a place and series.
    """
    return line.mark_line() + at_place(line.mark_circle(size=140, opacity=1))


def slider(
    panels: Mapping[str, alt.TopLevelMixin],
    label: str,
    positions: Sequence[str],
    sentences: Sequence[str],
    start: int = 0,
) -> HTML:
    """Put charts under one slider.

    Parameters
    ----------
    panels
        Charts, by the names that a screen reader gives them. Layers are charts; concatenations are
        not, as they have no width of their own.
    label
        Of the slider: which quantity it moves.
    positions
        The value at each place, as it is shown and read aloud.
    sentences
        What the charts show at each place, with its numbers.
    start
        Place at which the slider stands at first.

    Returns
    -------
    HTML
        A figure for the book's pages.

    Raises
    ------
    ValueError
        If there is no panel, positions and sentences are not equally many and two at least, or
        there is no place `start`.
    """
    if not panels:
        raise ValueError("a figure needs a panel, got none")
    if len(positions) != len(sentences) or len(positions) < 2:
        raise ValueError(
            f"positions and sentences must be equally many, and two at least, got "
            f"{len(positions)} and {len(sentences)}"
        )
    if not 0 <= start < len(positions):
        raise ValueError(f"start must lie in 0..{len(positions) - 1}, got {start}")
    values = {
        "specs": [_specification(chart, start) for chart in panels.values()],
        "positions": list(positions),
        "sentences": list(sentences),
    }
    escaped = [html.escape(name, quote=True) for name in panels]
    rows = zip(map(html.escape, positions), map(html.escape, sentences), strict=True)
    page = _PAGE.format(
        label=html.escape(label),
        last=len(positions) - 1,
        start=start,
        shown=html.escape(positions[start], quote=True),
        says=html.escape(sentences[start]),
        panels="".join(f'<div class="panel" role="img" aria-label="{n}"></div>' for n in escaped),
        rows="".join(f'<tr><th scope="row">{at}</th><td>{says}</td></tr>' for at, says in rows),
        # A closing tag within a string would end the script.
        values=json.dumps(values, separators=(",", ":"), allow_nan=False).replace("</", "<\\/"),
    )
    return HTML(page)


def _specification(chart: alt.TopLevelMixin, start: int) -> dict[str, Any]:
    """The chart for Vega-Lite, as wide as its frame, without the colours of another theme."""
    spec = chart.properties(width="container").to_dict()
    del spec["config"]
    spec["params"] = [*spec.get("params", []), {"name": "place", "value": start}]
    return dict(_short(spec))


def _plain(column: Any) -> Any:
    """An array for what is one, or a tensor; names and numbers as they are."""
    return column if isinstance(column, str) or np.ndim(column) == 0 else np.asarray(column)


def _short(value: Any) -> Any:
    """The same with all numbers cut to the digits that can be seen."""
    if isinstance(value, dict):
        return {key: _short(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_short(one) for one in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
