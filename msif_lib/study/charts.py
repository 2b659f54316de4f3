"""Charts that a reader moves with a slider, offline: everything shown is computed beforehand.

A chart is an Altair chart whose data hold a column ``place``, and :func:`slider` puts one or more
of them under one slider. The book's ``_static/charts.js`` draws them with the copies of Vega beside
it. A list of what the chart says at each place stands in the page for those who do not see it, and
where scripts do not run.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
from IPython.display import HTML

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
    with_place = chart.add_params(alt.param(name="place", value=start))
    spec = with_place.properties(width="container").to_dict()
    del spec["config"]
    return dict(spec)
