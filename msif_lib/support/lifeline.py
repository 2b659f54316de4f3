"""Processes that end when their parent does, however that one ends.

A process that was killed can't end its children. So each of them looks itself: a thread asks who
the parent is, and ends the process once it is another. This works wherever a child whose parent has
gone is given to another one, as on Linux and macOS.

As a script, ``python lifeline.py MODULE ARGUMENT ...`` runs a module in such a process. Its parent
is named by the environment variable ``JPY_PARENT_PID``, which Jupyter sets for a kernel.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

PARENT = "JPY_PARENT_PID"
_PERIOD = 0.1  # seconds between two looks


def end_with(parent: int) -> None:
    """End this process, and its group where it leads one, once its parent is another than this.

    Parameters
    ----------
    parent
        The number of the process that is the parent now. Where it has gone already, this process
        ends at once.
    """
    threading.Thread(target=_watch, args=(parent,), name="lifeline", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PERIOD)
    if os.getpgrp() == os.getpid():
        # Processes that clean up after others ignore this signal, and end after them.
        os.killpg(0, signal.SIGTERM)
    os._exit(1)


def command(module: str, *arguments: str) -> list[str]:
    """Return the command line that runs a module in a process that ends with its parent."""
    return [sys.executable, __file__, module, *arguments]


class Children:
    """Processes that end with the block in which they were started, and with this process."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        self._turn = threading.Lock()
        self.ended = False

    def start(
        self, module: str, arguments: Sequence[str], env: Mapping[str, str], **options: Any
    ) -> subprocess.Popen[str]:
        """Start a module in a group of processes of its own.

        Parameters
        ----------
        module
            Its name.
        arguments
            Its command line.
        env
            Its environment.
        **options
            Of `subprocess.Popen`.

        Raises
        ------
        RuntimeError
            The block has ended.
        """
        with self._turn:
            if self.ended:
                raise RuntimeError("no process is started any more")
            process = subprocess.Popen(
                command(module, *arguments),
                env={**env, PARENT: str(os.getpid())},
                text=True,
                start_new_session=True,
                **options,
            )
            self._processes.append(process)
            return process

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *reason: object) -> None:
        with self._turn:
            self.ended = True
            for process in self._processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    end_with(int(os.environ[PARENT]))
    del sys.argv[0]
    if sys.path[0] == os.path.dirname(__file__):  # or else names there would hide others
        del sys.path[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
