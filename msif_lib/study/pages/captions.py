"""Numbered captions: an italic paragraph right after a cell's figure or table becomes its caption.

In a notebook a caption is plain Markdown, ``*What the figure shows.*``, in the cell after the
figure's, or shown by that cell as Markdown. What follows the italic words stays a paragraph.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from docutils import nodes
from sphinx.application import Sphinx


class CaptionedTable(nodes.figure):
    """A table that a cell shows, with its caption; numbered among the tables."""


def _outputs(block: nodes.Node | None) -> nodes.container | None:
    """Return what a code cell shows, or None for all else."""
    for part in block if isinstance(block, nodes.container) else ():
        if isinstance(part, nodes.container) and part.get("nb_element") == "cell_code_output":
            return part
    return None


def _captionable(outputs: nodes.container) -> type[nodes.figure] | None:
    """Return the kind of figure that outputs are, or None if they are text."""
    if next(outputs.findall(nodes.image), None) is not None:
        return nodes.figure
    pages = outputs.findall(nodes.raw)
    tables = any(re.search(r"<table\b", page.astext()) for page in pages)
    tables = tables or next(outputs.findall(nodes.table), None) is not None
    return CaptionedTable if tables else None


def _caption(block: nodes.Node | None) -> nodes.paragraph | None:
    """Return the paragraph that begins with a caption, at the start of a block."""
    outputs = _outputs(block)
    if outputs is not None and _captionable(outputs) is None:
        block = next(iter(outputs.findall(nodes.paragraph)), None)
    if isinstance(block, nodes.paragraph) and block.children:
        return block if isinstance(block[0], nodes.emphasis) else None
    return None


def _uncaptioned(page: nodes.document) -> Iterator[tuple[nodes.container, nodes.paragraph]]:
    """Yield what code cells show together with the paragraphs that are their captions."""
    for outputs in list(page.findall(nodes.container)):
        if outputs.get("nb_element") != "cell_code_output":
            continue
        caption = _caption(outputs.parent.next_node(descend=False, siblings=True))
        if caption is not None:
            yield outputs, caption


def number_captions(app: Sphinx, page: nodes.document) -> None:
    """Make figures of the outputs that have a caption.

    Parameters
    ----------
    app
        The application that renders the book.
    page
        One page, as read; numbers are given when all have been.
    """
    for number, (outputs, paragraph) in enumerate(_uncaptioned(page), start=1):
        kind = _captionable(outputs)
        if kind is None:
            continue
        said = paragraph[0]
        figure = kind("", *outputs.children, ids=[f"shown-{number}"])
        figure += nodes.caption(said.rawsource, "", *said.children)
        outputs.clear()
        outputs += figure
        paragraph.remove(said)
        if not paragraph.astext().strip():
            paragraph.parent.remove(paragraph)
