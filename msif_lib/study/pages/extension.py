"""The Sphinx extension of the book: launch buttons, captions, and pages for a screen reader."""

from __future__ import annotations

import re
from typing import Any

from docutils.nodes import document
from sphinx.application import Sphinx
from sphinx.ext.napoleon.docstring import GoogleDocstring
from sphinx.writers.html5 import HTML5Translator

from msif_lib.study.pages.captions import CaptionedTable, number_captions

_ICONS = {
    "Colab": "_static/images/logo_colab.png",
    "Binder": "_static/images/logo_binder.svg",
}


def _add_launch_buttons(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: document | None
) -> None:
    """Put a group of launch buttons before the theme's own buttons.

    The theme would make the links from the page's place in the book, which is not that of its
    notebook in the repository.
    """
    links = app.config.msif_launch.get(page)
    if not links:
        return
    buttons = [
        {
            "type": "link",
            "text": service,
            "tooltip": f"Open on {service}",
            "icon": _ICONS[service],
            "url": url,
        }
        for service, url in links.items()
    ]
    group = {
        "type": "group",
        "tooltip": "Open this notebook elsewhere",
        "icon": "fas fa-rocket",
        "buttons": buttons,
        "label": "launch-buttons",
    }
    context["header_buttons"].insert(0, group)


_MARGIN = '<aside class="margin sidebar" role="note">'
_FOOTNOTES = '<aside class="footnote-list brackets" role="note">'
# What a screen reader stumbles over in the pages' HTML, and what stands there instead.
_MENDED = (
    # pandas: a heading without a text names nothing.
    (r"<th((?:\s+[\w-]+=\"[^\"]*\")*)>(?:\s|&nbsp;)*</th>", r"<td\1></td>"),
    # Every exercise, solution and proof of a page has a content of this name.
    (r' id="(?:exercise|solution|proof)-content"', ""),
    # Nor may all proofs of a page have one name.
    (r'(<div class="proof admonition") id="proof"', r"\1"),
    # A place whose name has a colon is none that a script can select.
    (r'( id="|href="[^"#:]*#)([\w-]+):([\w:-]+")', r"\1\2-\3"),
    # A role that has been given up: what stands in a list is an item of it.
    (r'(<div class="citation"[^>]*) role="doc-biblioentry"', r'\1 role="listitem"'),
    # Notes in the margin and at the foot are not parts of the page to jump to.
    (r'<aside class="margin sidebar">\s*<p class="sidebar-title"></p>', _MARGIN),
    (r'<aside class="footnote-list brackets">', _FOOTNOTES),
)


def _mend(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: document | None
) -> None:
    """Replace in a page's text what a screen reader stumbles over."""
    for pattern, replacement in _MENDED:
        if "body" in context:
            context["body"] = re.sub(pattern, replacement, context["body"])


def _whole_docstring(parser: GoogleDocstring) -> tuple[str, list[str]]:
    """Return a property's docstring as a sentence: what stands before a colon is no type."""
    lines = parser._dedent(parser._consume_to_end())
    return "", parser.__class__(lines, parser._config).lines()


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension.

    Parameters
    ----------
    app
        The application that renders the book.
    """
    app.add_config_value("msif_launch", {}, "html")
    # After the theme, whose list of buttons is then complete.
    app.connect("html-page-context", _add_launch_buttons, priority=600)
    app.connect("html-page-context", _mend)
    app.add_enumerable_node(
        CaptionedTable,
        "table",
        html=(HTML5Translator.visit_figure, HTML5Translator.depart_figure),
    )
    app.connect("doctree-read", number_captions)
    # napoleon has no setting for it.
    GoogleDocstring._consume_inline_attribute = _whole_docstring  # type: ignore[method-assign, assignment]
    return {"parallel_read_safe": True, "parallel_write_safe": True}
