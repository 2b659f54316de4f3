"""An explorer of influence scores for the reader's own hands: one HTML fragment, no server.

:func:`collect` puts scores, retrainings and images together as plain values, and :func:`fragment`
wraps them into HTML that carries its style and script with it. The charts are Vega-Lite's, which
the book loads; where it is not there, or scripts do not run, a table stands in their place.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from msif_lib.study.data.datasets import TwoStageData
from msif_lib.study.experiments.experiment import LABELS, Case, Trained

_DIGITS = 4  # significant, of every number
_STATIC_TESTS = 5  # test images in the table for readers without scripts
_STATIC_IMAGES = 3  # pretraining images at either end, there


def collect(
    data: TwoStageData,
    trained: Trained,
    scores: Mapping[Case, Tensor],
    changes: Mapping[Case, Mapping[float, Tensor]],
) -> dict[str, Any]:
    """What the explorer shows, as values for JSON.

    Parameters
    ----------
    data
        Images and classes.
    trained
        The stages in both cases.
    scores
        By case, I_i of every pretraining image on the loss of every test image, ``(m, T)``.
    changes
        By case and weight below 1, the change of every test loss when a pretraining image has this
        weight and both stages are trained again, ``(m, T)``. The same weights in both cases, 0
        among them.

    Returns
    -------
    dict
        ``cases``; ``pretrain`` and ``test`` with their images as addresses (``data:``) and their
        digits; ``weights``, falling to 0; by case, ``scores``, ``changes`` for each of the weights,
        and ``agreement``, Pearson's r of −I/m and the change at weight 0. Each has a row a test
        image; before these stands q summed over the test images.

    Raises
    ------
    ValueError
        Scores or changes of another shape than ``(m, T)``, or of other cases and weights.
    """
    shape = len(data.pretrain_original), len(data.test_original)
    if set(scores) != set(LABELS) or set(changes) != set(LABELS):
        raise ValueError(f"scores and changes are needed of {' and '.join(LABELS)}, no more")
    weights = sorted(changes["fixed"], reverse=True)
    for case in LABELS:
        if sorted(changes[case], reverse=True) != weights or not weights or weights[-1] != 0:
            raise ValueError("changes are needed at the same weights in both cases, 0 among them")
        given = {f"changes at {weight}": change for weight, change in changes[case].items()}
        for name, values in {"scores": scores[case], **given}.items():
            if tuple(values.shape) != shape:
                raise ValueError(
                    f"{case}, {name}: shape {tuple(values.shape)}, not (m, T) = {shape}"
                )
    agreement = {
        case: [
            _pearson(-score, change)
            for score, change in zip(_with_sum(scores[case]), _with_sum(changes[case][0.0]))
        ]
        for case in LABELS
    }
    return {
        "cases": [{"key": case, "label": label} for case, label in LABELS.items()],
        "weights": weights,
        "pretrain": {
            "images": pictures(data, data.images.train_pixels[data.pretrain_indices]),
            "digits": data.pretrain_original.tolist(),
        },
        "test": {
            "images": pictures(data, data.images.test_pixels[data.test_indices]),
            "digits": data.test_original.tolist(),
            "taken": {
                case: [data.finetune_classes[k] for k in _answers(trained, case).tolist()]
                for case in LABELS
            },
        },
        "scores": {case: rounded(_with_sum(scores[case]), _DIGITS) for case in LABELS},
        "changes": {
            case: [rounded(_with_sum(changes[case][weight]), _DIGITS) for weight in weights]
            for case in LABELS
        },
        "agreement": agreement,
    }


def fragment(values: Mapping[str, Any]) -> str:
    """The explorer as HTML.

    Parameters
    ----------
    values
        As :func:`collect` gives them.

    Returns
    -------
    str
        Style, a table for readers without scripts, the values as JSON, and the script.
    """
    return assemble("explorer", ("explorer.js",), _table(values), values)


def assemble(name: str, scripts: Iterable[str], table: str, values: Mapping[str, Any]) -> str:
    """One of the explorers as HTML that carries its style, values and scripts.

    Parameters
    ----------
    name
        That of its HTML file.
    scripts
        Its files of JavaScript, after those that all of them share.
    table
        HTML for readers without scripts.
    values
        For JSON.

    Returns
    -------
    str
        The fragment.
    """

    def read(file: str) -> str:
        return Path(__file__).with_name(file).read_text(encoding="utf-8")

    # A closing tag within a string would end the script.
    text = json.dumps(values, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    page = read("frame.html")
    for mark, part in (
        ("{{body}}", read(f"{name}.html")),
        ("{{name}}", name),
        ("{{style}}", read("explorer.css")),
        ("{{table}}", table),
        ("{{script}}", "".join(map(read, ("common.js", *scripts)))),
        ("{{values}}", text),  # last: nothing in it is a mark
    ):
        page = page.replace(mark, part)
    return page


def rounded(rows: Tensor, digits: int) -> list[list[float]]:
    """Rows of numbers with so many significant digits."""
    return [[float(f"{value:.{digits}g}") for value in row] for row in rows.tolist()]


def pictures(data: TwoStageData, pixels: Tensor) -> list[str]:
    """Images as PNG files in ``data:`` addresses; single-channel ones dark on white."""
    addresses = []
    for picture in data.images.pictures(pixels).cpu():
        grey = picture.shape[-1] == 1
        scaled = 255 * (1 - picture[..., 0] if grey else picture)
        file = io.BytesIO()
        Image.fromarray(scaled.round().to(torch.uint8).numpy()).save(file, "PNG", optimize=True)
        addresses.append(f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}")
    return addresses


def static_image(address: str, text: str) -> str:
    """An image in a table for readers without scripts."""
    return f'<img src="{address}" alt="{html.escape(text, quote=True)}" width="32" height="32">'


def static_table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of HTML, whose first column names the rows, for readers without scripts."""
    lines = [
        f'<tr><th scope="row">{first}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
        for first, *cells in rows
    ]
    top = "".join(f'<th scope="col">{head}</th>' for head in heads)
    return (
        f"<table><caption>{caption}</caption><thead><tr>{top}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


def _with_sum(values: Tensor) -> Tensor:
    """One row a test image ``(T + 1, m)``, the first their sum."""
    return torch.cat([values.sum(1, keepdim=True), values], 1).T.double().cpu()


def _pearson(x: Tensor, y: Tensor) -> float | None:
    """Pearson's r, None where one of the two is constant."""
    r = torch.corrcoef(torch.stack([x, y]))[0, 1]
    return float(f"{r:.{_DIGITS}g}") if r.isfinite() else None


def _answers(trained: Trained, case: Case) -> Tensor:
    """The class ``(T,)`` that the finetuned model of a case gives each test image."""
    stage = trained.finetuned[case]
    with torch.no_grad():
        outputs = stage.outputs(stage.embedding_vector(), stage.head_vector(), trained.test[0])
    return outputs.argmax(1)


def _table(values: Mapping[str, Any]) -> str:
    """The ends of case 1 for the first test images."""
    pretrain, test = values["pretrain"], values["test"]
    digits, count = pretrain["digits"], len(test["digits"])
    rows = []
    for row in range(min(count, _STATIC_TESTS) + 1):
        scores = values["scores"]["fixed"][row]
        order = sorted(range(len(scores)), key=scores.__getitem__)
        asked = f"all {count} test images"
        if row:
            address, digit = test["images"][row - 1], test["digits"][row - 1]
            asked = f"{static_image(address, f'test image {row - 1}')} a {digit}"
        ends = order[:_STATIC_IMAGES], order[::-1][:_STATIC_IMAGES]
        shown = [
            [
                f"{static_image(pretrain['images'][i], f'a {digits[i]}')} {scores[i]:.2g}"
                for i in some
            ]
            for some in ends
        ]
        rows.append([asked, *map(", ".join, shown)])
    caption = f"Influence scores I, {html.escape(LABELS['fixed'])}. The explorer needs JavaScript."
    return static_table(caption, ("test image", "helped most", "hurt most"), rows)
