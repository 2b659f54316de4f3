"""An explorer of influence scores for the reader's own hands: one HTML fragment, no server.

:func:`collect` puts scores, retrainings and images together as plain values, and :func:`fragment`
wraps them into HTML that carries its style and script with it. It works in the rendered book, from
a file and in Jupyter; where scripts do not run, a table stands in its place.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from msif_lib.study.data.datasets import TwoStageData
from msif_lib.study.experiments.experiment import LABELS, Case, Trained

#: What the reader can switch between: the name, and the case whose retrainings are its truth.
METHODS: dict[str, tuple[str, Case]] = {
    "fixed": (LABELS["fixed"], "fixed"),
    "updated": (LABELS["updated"], "updated"),
    "identity": ("identity baseline, embedding fixed", "fixed"),
}
_DIGITS = 4  # significant, of every number
_STATIC_TESTS = 5  # test images in the table for readers without scripts
_STATIC_IMAGES = 3  # pretraining images at either end, there


def collect(
    data: TwoStageData,
    trained: Trained,
    scores: Mapping[str, Tensor],
    changes: Mapping[Case, Tensor],
) -> dict[str, Any]:
    """What the explorer shows, as values for JSON.

    Parameters
    ----------
    data
        Images and classes.
    trained
        The stages in both cases.
    scores
        By method of :data:`METHODS`, I_i of every pretraining image on the loss of every test
        image, ``(m, T)``.
    changes
        By case, the change of every test loss when a pretraining image is left out and both stages
        are trained again, ``(m, T)``.

    Returns
    -------
    dict
        ``methods``; ``pretrain`` and ``test`` with their images as addresses (``data:``) and their
        digits; ``scores`` by method and ``changes`` by case, one row a test image; ``agreement`` by
        method, Pearson's r of −I/m and the change, a row each. The first row everywhere is q summed
        over the test images.

    Raises
    ------
    ValueError
        Scores or changes of another shape than ``(m, T)``, or of other methods and cases.
    """
    shape = len(data.pretrain_original), len(data.test_original)
    given: dict[str, Tensor] = {
        **{f"scores of {name}": values for name, values in scores.items()},
        **{f"changes of {case}": values for case, values in changes.items()},
    }
    wanted = [f"scores of {name}" for name in METHODS] + [f"changes of {name}" for name in LABELS]
    if sorted(given) != sorted(wanted):
        raise ValueError(f"{', '.join(wanted)} are needed, not {', '.join(given)}")
    for name, values in given.items():
        if tuple(values.shape) != shape:
            raise ValueError(f"{name} have shape {tuple(values.shape)}, not (m, T) = {shape}")
    agreement: dict[str, list[float | None]] = {}
    for name, (_, case) in METHODS.items():
        effects = _with_sum(-scores[name] / shape[0])
        pairs = zip(effects, _with_sum(changes[case]), strict=True)
        agreement[name] = [_pearson(*pair) for pair in pairs]
    taken = {case: _answers(trained, case) for case in LABELS}
    return {
        "methods": [
            {"key": name, "label": label, "truth": case} for name, (label, case) in METHODS.items()
        ],
        "pretrain": {
            "images": _pictures(data, data.images.train_pixels[data.pretrain_indices]),
            "digits": data.pretrain_original.tolist(),
        },
        "test": {
            "images": _pictures(data, data.images.test_pixels[data.test_indices]),
            "digits": data.test_original.tolist(),
            "taken": {
                case: [data.finetune_classes[answer] for answer in answers.tolist()]
                for case, answers in taken.items()
            },
        },
        "scores": {name: _rows(values) for name, values in scores.items()},
        "changes": {case: _rows(values) for case, values in changes.items()},
        "agreement": agreement,
    }


def fragment(values: Mapping[str, Any]) -> str:
    """The explorer as HTML that needs nothing beside itself.

    Parameters
    ----------
    values
        As :func:`collect` gives them.

    Returns
    -------
    str
        Style, a table for readers without scripts, the values as JSON, and the script.
    """
    parts = {
        ending: Path(__file__).with_name(f"explorer.{ending}").read_text(encoding="utf-8")
        for ending in ("html", "css", "js")
    }
    # A closing tag within a string would end the script.
    text = json.dumps(values, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    page = parts["html"]
    for mark, part in (
        ("{{style}}", parts["css"]),
        ("{{table}}", _table(values)),
        ("{{values}}", text),
        ("{{script}}", parts["js"]),
    ):
        page = page.replace(mark, part)
    return page


def _with_sum(values: Tensor) -> Tensor:
    """One row a test image ``(T + 1, m)``, the first their sum."""
    return torch.cat([values.sum(1, keepdim=True), values], 1).T.double().cpu()


def _rows(values: Tensor) -> list[list[float]]:
    return [[float(f"{value:.{_DIGITS}g}") for value in row] for row in _with_sum(values).tolist()]


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


def _pictures(data: TwoStageData, pixels: Tensor) -> list[str]:
    """Images as PNG files in ``data:`` addresses; single-channel ones dark on white."""
    pictures = []
    for picture in data.images.pictures(pixels).cpu():
        grey = picture.shape[-1] == 1
        scaled = 255 * (1 - picture[..., 0] if grey else picture)
        file = io.BytesIO()
        Image.fromarray(scaled.round().to(torch.uint8).numpy()).save(file, "PNG", optimize=True)
        pictures.append(f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}")
    return pictures


def _table(values: Mapping[str, Any]) -> str:
    """The ends of case 1 for the first test images, without any script."""
    name = values["methods"][0]["label"]
    pretrain, test = values["pretrain"], values["test"]
    count = len(test["digits"])

    def image(kind: Mapping[str, Any], index: int, text: str) -> str:
        alt = html.escape(text, quote=True)
        return f'<img src="{kind["images"][index]}" alt="{alt}" width="32" height="32">'

    lines = []
    for row in range(min(count, _STATIC_TESTS) + 1):
        scores = values["scores"]["fixed"][row]
        order = sorted(range(len(scores)), key=scores.__getitem__)
        if row:
            digit = test["digits"][row - 1]
            asked = image(test, row - 1, f"test image {row - 1}") + f" a {digit}"
        else:
            asked = f"all {count} test images"
        cells = [
            ", ".join(
                image(pretrain, i, f"a {pretrain['digits'][i]}") + f" {scores[i]:.2g}" for i in ends
            )
            for ends in (order[:_STATIC_IMAGES], order[::-1][:_STATIC_IMAGES])
        ]
        lines.append(
            f'<tr><th scope="row">{asked}</th>' + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"
        )
    return (
        f"<table><caption>Influence scores I, {html.escape(name)}. The explorer itself needs "
        "JavaScript.</caption>"
        '<thead><tr><th scope="col">test image</th><th scope="col">helped most</th>'
        '<th scope="col">hurt most</th></tr></thead><tbody>' + "".join(lines) + "</tbody></table>"
    )
