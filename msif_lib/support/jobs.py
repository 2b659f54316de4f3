"""Jobs on other processes or machines through joblib; what they share is sent once."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from threading import Lock
from typing import Any
from uuid import uuid4

import cloudpickle
import numpy as np
import torch
from joblib import Parallel, delayed
from joblib.parallel import get_active_backend
from torch import Tensor

from msif_lib.support.lifeline import end_with

Job = Callable[[Any], Any]

# Jobs in threads of one process take turns: a model's parameters are put into its modules while
# it is evaluated, and the number of threads belongs to the process.
_turn = Lock()


def as_finished(
    work: Job, arguments: Sequence[Any], jobs: int | None = None, threads: int = 1
) -> Generator[tuple[int, Any], None, None]:
    """Evaluate ``work(argument)`` for each argument, several at once.

    The backend is joblib's: processes of this machine, which end with this one, or what
    `joblib.parallel_config` names.
    `work` is pickled once, lambdas and local classes included. Processes of this machine read it
    from a memory-mapped file; a Dask cluster holds it as the result of a task, which it computes
    again where a lost worker had it. Without other processes nothing is pickled.

    Parameters
    ----------
    work
        What all jobs share, with its data.
    arguments
        One a job; small.
    jobs
        Jobs at once, joblib's ``n_jobs``; None: as `parallel_config` says, else 1.
    threads
        Threads of each job, the same wherever it runs.

    Yields
    ------
    tuple
        The number of the argument and the result, in the order in which they finish.
    """
    if not arguments:
        return
    backend = get_active_backend()[0]
    generator = getattr(backend, "supports_return_generator", False)
    parallel = Parallel(
        n_jobs=jobs, batch_size=1, return_as="generator_unordered" if generator else "list"
    )
    with ExitStack() as stack:
        shared: Any = _Shared(work)
        if hasattr(backend, "client"):
            shared = _task_of_dask(backend.client, shared)
            stack.enter_context(_deaths_reported(backend))
        caller = os.getpid()
        tasks = (
            delayed(_one_job)(shared, number, argument, threads, caller)
            for number, argument in enumerate(arguments)
        )
        yield from parallel(tasks)


def _one_job(
    shared: _Shared, number: int, argument: Any, threads: int, caller: int
) -> tuple[int, Any]:
    _tie(caller)
    with _turn, _torch_threads(threads):
        return number, shared.get()(argument)


@cache
def _tie(caller: int) -> None:
    """End this process with the one that asks, where that started it.

    joblib's own processes else finish their job and then wait for minutes.
    """
    if os.getppid() == caller:
        end_with(caller)


@contextmanager
def _torch_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Shared:
    """An object that is pickled at most once, and unpickled at its first use elsewhere."""

    def __init__(self, thing: Any) -> None:
        self._thing, self._pickled = thing, np.empty(0, np.uint8)

    def get(self) -> Any:
        if self._thing is None:
            self._thing = pickle.loads(self._pickled.data)
        return self._thing

    def __getstate__(self) -> tuple[np.ndarray]:
        # An array, since joblib memory-maps these, and always the same one, since it does so once.
        if not len(self._pickled):
            buffer = io.BytesIO()
            _Pickler(buffer).dump(self._thing)
            self._pickled = np.frombuffer(buffer.getbuffer(), np.uint8)
        return (self._pickled,)

    def __setstate__(self, state: tuple[np.ndarray]) -> None:
        self._thing, self._pickled = None, state[0]


class _Pickler(cloudpickle.Pickler):
    """Pickles of a tensor that is a view of a larger one its own part alone."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is Tensor and obj.untyped_storage().nbytes() > obj.nbytes:
            return obj.clone().__reduce_ex__(pickle.DEFAULT_PROTOCOL)
        return super().reducer_override(obj)


def _task_of_dask(client: Any, thing: Any) -> Any:
    """A Dask future of `thing`, the result of a task that the cluster can run again.

    joblib would send it with each job; a scattered object would be lost with its worker.
    """
    import dask

    # Dask warns of large tasks, which this one is meant to be.
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 TB"}):
        return client.submit(_itself, thing, key=f"retraining-{uuid4().hex}")


def _itself(thing: Any) -> Any:
    return thing


@contextmanager
def _deaths_reported(backend: Any) -> Iterator[None]:
    """Let joblib hear of tasks that Dask gave up, their workers having died again and again.

    Its Dask backend calls back for tasks that end by themselves alone (joblib 1.6), and would
    wait for the others forever.
    """
    submit = backend.submit

    def submit_and_tell(task: Any, callback: Callable[[Any], Any]) -> Any:
        def tell(future: Any) -> None:
            if future.exception() is not None:
                callback(future.exception())

        future = submit(task, callback)
        future.add_done_callback(tell)
        return future

    backend.submit = submit_and_tell
    try:
        yield
    finally:
        del backend.submit
