"""A headless Chromium, spoken to through a pipe: pages as a reader's browser shows them.

The protocol is that of Chromium's developer tools: JSON messages that end with a NUL byte, written
to the browser's file descriptor 3 and read from its descriptor 4. No driver and no port is needed.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from msif_lib.study.runner import ProjectError

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--headless",
    "--no-sandbox",  # the pages are the project's own; containers have no sandbox
    "--disable-dev-shm-usage",  # containers have little of it
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--allow-file-access-from-files",
    "--remote-debugging-pipe",
)


def find_chromium() -> str | None:
    """Return the path of a Chromium or Chrome, or None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One headless browser with one page, closed at the end of a ``with`` block.

    Parameters
    ----------
    timeout
        Seconds that it may take to answer.

    Raises
    ------
    ProjectError
        If there is no Chromium, or it does not answer.
    """

    def __init__(self, timeout: float = 300.0) -> None:
        program = find_chromium()
        if program is None:
            raise ProjectError(f"no Chromium found; looked for {', '.join(NAMES)} in PATH")
        self._program = program
        self._timeout = timeout
        self._count = 0
        self._session = ""
        self._received = b""
        self._loaded: set[str] = set()
        self._profile = tempfile.mkdtemp()
        reading, self._in = os.pipe()
        self._out, writing = os.pipe()
        # Above 4, so that neither is overwritten by the other's copy.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (reading, writing)]
        self._process = os.posix_spawn(
            program,
            [program, *_FLAGS, f"--user-data-dir={self._profile}"],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_DUP2, ends[0], 3),
                (os.POSIX_SPAWN_DUP2, ends[1], 4),
            ],
        )
        for end in (reading, writing, *ends):
            os.close(end)
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
            self._session = attached["sessionId"]
            self.call("Page.enable")
            self.call("Page.setLifecycleEventsEnabled", enabled=True)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        """Return the browser."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the browser and remove what it wrote."""
        os.close(self._in)
        os.close(self._out)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process, signal.SIGTERM)
        os.waitpid(self._process, 0)
        shutil.rmtree(self._profile, ignore_errors=True)

    def _message(self) -> dict[str, Any]:
        """Return the browser's next message."""
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._out], [], [], self._timeout)
            if not ready:
                raise ProjectError(f"{self._program} did not answer within {self._timeout:.0f} s")
            data = os.read(self._out, 1 << 20)
            if not data:
                raise ProjectError(f"{self._program} ended unexpectedly")
            self._received += data
        message, _, self._received = self._received.partition(b"\0")
        return dict(json.loads(message))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result.

        Parameters
        ----------
        method
            Such as ``Page.navigate``.
        **parameters
            Its parameters.

        Raises
        ------
        ProjectError
            If the browser refuses the call or does not answer.
        """
        self._count += 1
        request: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            request["sessionId"] = self._session
        data = json.dumps(request).encode() + b"\0"
        try:
            while data:
                data = data[os.write(self._in, data) :]
        except BrokenPipeError as error:
            raise ProjectError(f"{self._program} ended unexpectedly") from error
        while True:
            message = self._message()
            if message.get("id") == self._count:
                if "error" in message:
                    raise ProjectError(f"Chromium, {method}: {message['error']['message']}")
                return dict(message["result"])
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        """Remember which of the pages asked for has been loaded."""
        about = message.get("params", {})
        if message.get("method") == "Page.lifecycleEvent" and about["name"] == "load":
            self._loaded.add(about["loaderId"])

    def open(self, page: Path | str, theme: str = "light", width: int = 1400) -> None:
        """Show a page and wait until it is loaded, its formulas included.

        Parameters
        ----------
        page
            A file, or an address.
        theme
            ``light`` or ``dark``, as the reader's system prefers.
        width
            Of the window, in CSS pixels; below 600 it is a telephone's.
        """
        phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=phone,
        )
        preferred = {"prefers-color-scheme": theme, "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in preferred.items()]
        self.call("Emulation.setEmulatedMedia", features=features)
        url = page.resolve().as_uri() if isinstance(page, Path) else page
        answer = self.call("Page.navigate", url=url)
        if "errorText" in answer:
            raise ProjectError(f"{url}: {answer['errorText']}")
        deadline = time.monotonic() + self._timeout
        while answer["loaderId"] not in self._loaded:
            if time.monotonic() > deadline:
                raise ProjectError(f"{url} did not load within {self._timeout:.0f} s")
            self._note(self._message())
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
        answer = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise ProjectError(details.get("exception", {}).get("description", details["text"]))
        return answer["result"].get("value")

    def screenshot(self, path: Path, full: bool = True) -> None:
        """Save what the page shows as a PNG file.

        Parameters
        ----------
        path
            The file.
        full
            The whole page, or what fits the window.
        """
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=full)
        path.write_bytes(base64.b64decode(answer["data"]))

    def pdf(self, path: Path, **options: Any) -> None:
        """Print the page into a PDF file.

        Parameters
        ----------
        path
            The file.
        **options
            Those of the protocol's ``Page.printToPDF``.
        """
        path.write_bytes(base64.b64decode(self.call("Page.printToPDF", **options)["data"]))
