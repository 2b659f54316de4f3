"""The Sphinx extension that keeps large scripts off the pages that do not ask for them."""

from __future__ import annotations

from sphinx.application import Sphinx
from sphinx.config import Config


def _leave_out(app: Sphinx, config: Config) -> None:
    """Take from the scripts of every page those that ``charts.js`` loads where they are needed."""
    config.html_js_files = [
        one for one in config.html_js_files if not str(one).startswith("vendor/")
    ]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension.

    Parameters
    ----------
    app
        The application that renders the book.
    """
    app.connect("config-inited", _leave_out)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
