"""A headless Chromium, driven by Playwright: pages as a reader's browser shows them.

The browser is the machine's own; Playwright's, which it would download, is not used.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any, Literal, Self

from playwright.sync_api import Error, sync_playwright

from msif_lib.study.runner import ProjectError

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_chromium() -> str | None:
    """Return the path of a Chromium or Chrome, or None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One headless browser that shows one page, Playwright's `page`, until its ``with`` block ends.

    Parameters
    ----------
    timeout
        Seconds that it may take to answer.

    Raises
    ------
    ProjectError
        If there is no Chromium, or it does not start.
    """

    def __init__(self, timeout: float = 300.0) -> None:
        program = find_chromium()
        if program is None:
            raise ProjectError(f"no Chromium found; looked for {', '.join(NAMES)} in PATH")
        self._opened = contextlib.ExitStack()
        try:
            playwright = self._opened.enter_context(sync_playwright())
            self._browser = playwright.chromium.launch(
                executable_path=program,
                # The pages are the project's own, and containers have neither.
                args=["--no-sandbox", "--disable-dev-shm-usage"],
                timeout=1000 * timeout,
            )
            self._opened.callback(self._browser.close)
        except Error as error:
            self._opened.close()
            raise ProjectError(f"{program} does not start: {error.message}") from error
        self._timeout = 1000 * timeout
        self._new_page()

    def _new_page(self, width: int = 1400, **wishes: Any) -> None:
        """Put an empty page in place of the one before."""
        for context in self._browser.contexts:
            context.close()
        phone = width < 600
        self.page = self._browser.new_page(
            viewport={"width": width, "height": 900}, is_mobile=phone, has_touch=phone, **wishes
        )
        self.page.set_default_timeout(self._timeout)
        self._session = self.page.context.new_cdp_session(self.page)

    def __enter__(self) -> Self:
        """Return the browser."""
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the browser."""
        self._opened.close()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of Chromium's own protocol and return its result.

        Parameters
        ----------
        method
            Such as ``Accessibility.getFullAXTree``.
        **parameters
            Its parameters.
        """
        return self._session.send(method, parameters)

    def open(
        self, page: Path | str, theme: Literal["light", "dark"] = "light", width: int = 1400
    ) -> None:
        """Show a page and wait until it is loaded, its formulas included.

        Parameters
        ----------
        page
            A file, or an address.
        theme
            As the reader's system prefers.
        width
            Of the window, in CSS pixels; below 600 it is a telephone's.
        """
        self._new_page(width, color_scheme=theme, reduced_motion="reduce")
        self.page.goto(page.resolve().as_uri() if isinstance(page, Path) else page)
        self.evaluate(
            "(async () => { await document.fonts.ready;"
            " if (window.MathJax && MathJax.startup) await MathJax.startup.promise; })()"
        )

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression; a promise is waited for.

        Parameters
        ----------
        expression
            Its value must be what JSON can say.

        Raises
        ------
        ProjectError
            If it throws.
        """
        try:
            return self.page.evaluate(expression)
        except Error as error:
            raise ProjectError(error.message) from error
