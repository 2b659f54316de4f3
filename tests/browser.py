"""A headless Chromium driven through its pipe, with true keys and pointer moves.

Chromium reads and writes the messages of its DevTools protocol, JSON ended by a zero byte, on the
file descriptors 3 and 4: no library and no socket is needed.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
PATIENCE = 60.0  # seconds for an answer
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--remote-debugging-pipe",
)  # fmt: skip
_KEYS = {"Tab": 9, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39,
         "ArrowDown": 40, " ": 32}  # fmt: skip
# Puts the pipe's ends where Chromium looks for them.
_LAUNCH = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Page:
    """One tab."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = write, read
        self._number, self._buffer = 0, b""
        self._session: str | None = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Give a command and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while True:
            *answers, self._buffer = self._buffer.split(b"\0")
            for position, answer in enumerate(map(json.loads, answers)):
                if answer.get("id") == self._number:
                    rest = answers[position + 1 :]
                    self._buffer = b"\0".join([*rest, self._buffer])
                    assert "error" not in answer, answer
                    return answer["result"]
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._read], [], [], left)[0]:
                raise TimeoutError(f"Chromium did not answer {method}")
            chunk = os.read(self._read, 2**20)
            if not chunk:
                raise ConnectionError("Chromium ended")
            self._buffer += chunk

    def open(self, path: Path, width: int = 1200, dark: bool = False) -> None:
        """Load a file and wait for it."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=1600, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        self.send("Page.navigate", url=path.as_uri())
        deadline = time.monotonic() + PATIENCE
        there = f"location.href === {json.dumps(path.as_uri())}"
        while not self.run(f"{there} && document.readyState === 'complete'"):
            assert time.monotonic() < deadline, "the page did not load"
            time.sleep(0.05)

    def run(self, expression: str) -> Any:
        """The value of an expression in JavaScript."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, *keys: str) -> None:
        """Press keys as a hand does."""
        for key in keys:
            about = {"key": key, "code": "Space" if key == " " else key,
                     "windowsVirtualKeyCode": _KEYS[key]}  # fmt: skip
            text = {"text": key} if key == " " else {}
            self.send("Input.dispatchKeyEvent", type="keyDown", **about, **text)
            self.send("Input.dispatchKeyEvent", type="keyUp", **about)

    def move(self, x: float, y: float) -> None:
        """Move the pointer."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A page of a fresh Chromium, which ends with the context.

    Parameters
    ----------
    folder
        An empty folder for its profile.
    """
    assert CHROMIUM is not None
    ours = [os.pipe(), os.pipe()]
    # Away from 3 and 4, which are about to be taken.
    theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (ours[0][0], ours[1][1])]
    process = subprocess.Popen(
        [sys.executable, "-c", _LAUNCH, *map(str, theirs), CHROMIUM, *_FLAGS,
         f"--user-data-dir={folder}"],
        pass_fds=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    for end in (*theirs, ours[0][0], ours[1][1]):
        os.close(end)
    try:
        page = Page(ours[0][1], ours[1][0])
        yield page
        page._session = None
        page.send("Browser.close")
    finally:
        os.close(ours[0][1])
        os.close(ours[1][0])
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
