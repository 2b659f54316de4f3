"""Nothing is lost, and no number is wrong, whatever happens to a call that keeps its results.

``python -m tests.durability --kills 100`` kills the library at random instants, has two processes
work in one folder at once, fills the disk, takes the right to write away and spoils every file, and
says how often the numbers were the same to the last bit. It needs fork (Linux, macOS).
"""

from __future__ import annotations

import argparse
import functools
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from msif_lib import Chain, Stage, cross_entropy
from msif_lib.links import Frozen, Optimum, Unrolled
from msif_lib.retraining import retrain_without
from msif_lib.solvers import Dense
from msif_lib.support import storage
from msif_lib.training import SGD, AdamW, descend, train, train_kept

warnings.simplefilter("ignore")
F64 = torch.float64


# --- calls that keep their results ---------------------------------------------------------------


def stages(labels: int = 0) -> tuple[Stage, Stage, tuple[Tensor, Tensor]]:
    """Two stages on one embedding, and test data."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 3, dtype=F64, generator=g), torch.randint(2, (40,), generator=g)
    y[:labels] = 1 - y[:labels]

    def module(rows: int, columns: int) -> nn.Linear:
        made = nn.Linear(rows, columns, dtype=F64)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.copy_(torch.randn(parameter.shape, dtype=F64, generator=g))
        return made

    embedding = nn.Sequential(module(3, 3), nn.Tanh())
    settings = {"l2": 0.1, "batch_size": 10, "check": False}
    first = Stage(embedding, module(3, 2), cross_entropy, (x, y), **settings)
    second = Stage(embedding, module(3, 2), cross_entropy, (x.flip(0), y), **settings)
    return first, second, (x[:4] + 1, y[:4])


def solved(out: Path, labels: int = 0) -> list[Tensor]:
    """Scores of case 1 in a folder."""
    first, second, test = stages(labels)
    links = [Optimum(first, Dense()), Frozen(second, Dense())]
    chain = Chain(links, 1e9, progress=False)
    return [scores.values.clone() for scores in chain.scores(test, per_test=True, out=out)]


def in_a_file(out: Path, labels: int = 0) -> list[Tensor]:
    """The same with a file for the first stage."""
    return solved(out / "scores.npy" if out.is_dir() else out, labels)


def walked(out: Path, labels: int = 0) -> list[Tensor]:
    """Scores through recorded steps."""
    first, second, test = stages(labels)
    settings = {"epochs": 2, "batch_size": 5, "seed": 0, "progress": False}
    path1 = descend(first, SGD(lr=0.1, momentum=0.9), **settings)
    path2 = descend(second, AdamW(lr=0.01), **settings)
    chain = Chain([Unrolled(first, path1), Unrolled(second, path2)], progress=False)
    return [scores.values.clone() for scores in chain.scores(test, out=out)]


def trained(out: Path, labels: int = 0) -> list[Tensor]:
    """A training that is kept."""
    first = stages(labels)[0]
    train_kept(first, checkpoint=out, epochs=2)
    return [first.vector()]


@functools.cache
def optima(labels: int) -> tuple[Tensor, Tensor]:
    """Where the two trainings of case 1 end, found before any process is started."""
    first, second, _ = stages(labels)
    train(first, epochs=2)
    train(second, epochs=2, head_only=True)
    return first.vector(), second.vector()


def retrained(out: Path, labels: int = 0) -> list[Tensor]:
    """Retrainings of case 1."""
    first, second, test = stages(labels)
    for stage, vector in zip((first, second), optima(labels)):
        stage.load_vector(vector)
    chain = Chain([Optimum(first), Frozen(second)], progress=False)
    found = retrain_without(chain, [[i] for i in range(6)], test, checkpoint=out, progress=False)
    return [found.losses, found.losses_before, found.gradient_norms]


CALLS: dict[str, Callable[..., list[Tensor]]] = {
    "scores": solved, "a file": in_a_file, "walk": walked, "training": trained,
    "retraining": retrained,
}  # fmt: skip


def same(found: list[Tensor], whole: list[Tensor]) -> bool:
    """Whether two answers are the same to the last bit."""
    return all(torch.equal(one, other) for one, other in zip(found, whole, strict=True))


# --- processes -----------------------------------------------------------------------------------


def started(work: Callable[[], list[Tensor]], answer: Path) -> int:
    """Start a process that leaves its answer, or what it failed of, in a file."""
    child = os.fork()
    if child:
        return child
    try:
        result: object = work()
    except BaseException as error:
        traceback.print_exc(file=io.StringIO())
        result = f"{type(error).__name__}: {error}"
    torch.save(result, answer)
    os._exit(0)


def ended(child: int) -> bool:
    """Whether a process ended by itself, once it has ended."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def answered(answer: Path, whole: list[Tensor], what: str) -> None:
    """See that a process has the right answer."""
    found = torch.load(answer)
    answer.unlink()
    if isinstance(found, str) or not same(found, whole):
        raise AssertionError(f"{what}: {found if isinstance(found, str) else 'other numbers'}")


def emptied(folder: Path) -> Path:
    """A folder without anything in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def killed(name: str, kills: int, folder: Path, seed: int = 0) -> Counter[str]:
    """Kill a call at random instants, go on, and compare what it comes to."""
    call, chance, counts = CALLS[name], random.Random(f"{name} {seed}"), Counter[str]()
    whole = call(emptied(folder / "whole"))
    began = time.perf_counter()
    call(emptied(folder / "whole"))
    usual, answer = time.perf_counter() - began, folder / "answer.pt"
    out = emptied(folder / "out")
    while counts["killed"] < kills:
        child = started(lambda: call(out), answer)
        time.sleep(chance.uniform(0, 1.2 * usual))
        os.kill(child, signal.SIGKILL)
        if ended(child):
            answered(answer, whole, f"{name}, after a kill")
            counts["finished"] += 1
            emptied(out)
        else:
            counts["killed"] += 1
            answer.unlink(missing_ok=True)
    ended(started(lambda: call(out), answer))
    answered(answer, whole, f"{name}, after the last kill")
    counts["finished"] += 1
    return counts


def together(name: str, folder: Path) -> None:
    """Two processes in one folder at once."""
    call, out = CALLS[name], emptied(folder / "out")
    whole = call(emptied(folder / "whole"))
    answers = [folder / f"answer-{number}.pt" for number in range(2)]
    children = [started(lambda: call(out), answer) for answer in answers]
    if not all(list(map(ended, children))):
        raise AssertionError(f"{name}: one of two processes crashed")
    for answer in answers:
        answered(answer, whole, f"{name}, one of two processes")


def full(name: str, folder: Path) -> list[str]:
    """The disk is full after so many bytes of a file, and has room again in the next call."""
    call, out, said = CALLS[name], emptied(folder / "out"), []
    whole, answer = call(emptied(folder / "whole")), folder / "answer.pt"

    def within(size: int) -> list[Tensor]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        try:
            return call(out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

    for size in (0, 300, 2500, 4500, 8000):
        ended(started(lambda size=size: within(size), answer))
        found = torch.load(answer)
        said.append(found if isinstance(found, str) else "finished")
        if isinstance(found, str) and not all(word in found for word in (str(out), "written")):
            raise AssertionError(f"{name}, {size} bytes: {found}")
    ended(started(lambda: call(out), answer))
    answered(answer, whole, f"{name}, after a full disk")
    if said[0] == "finished":
        raise AssertionError(f"{name}: nothing was written")
    return said


def read_only(name: str, folder: Path) -> list[Tensor] | None:
    """Where nothing can be written, before anything is computed: refused, or given back if whole.

    What is given back, where that is promised.
    """
    call, out, answer = CALLS[name], emptied(folder / "out"), folder / "answer.pt"
    folder.chmod(0o777)

    def by_nobody() -> list[Tensor]:
        if os.geteuid() == 0:
            os.setuid(65534)
        Optimum.pull_back = Unrolled.pull_back = None  # type: ignore[method-assign, assignment]
        return call(out)

    def read() -> object:
        folders = [out, *(file for file in out.rglob("*") if file.is_dir())]
        for one in folders:
            one.chmod(0o555)
        ended(started(by_nobody, answer))
        for one in folders:
            one.chmod(0o777)
        return torch.load(answer)

    def refused() -> None:
        said = read()
        if not (isinstance(said, str) and said.startswith("ValueError") and "give another" in said):
            raise AssertionError(f"{name}, read-only: {said}")

    refused()
    if name not in {"scores", "a file", "walk"}:
        return None
    whole = call(out)
    found = read()
    if not (isinstance(found, list) and same(found, whole)):
        raise AssertionError(f"{name}, read-only and whole: {found}")
    for file in sorted(out.rglob("stage-1.npy*")):
        emptied(folder / "out")
        call(out)
        file.unlink()
        refused()
    return found


# --- spoiled files -------------------------------------------------------------------------------


def _array(file: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    values = np.load(file)
    with file.open("wb") as opened:
        np.save(opened, change(values))


def _bytes(file: Path, change: Callable[[bytearray], bytes | bytearray]) -> None:
    file.write_bytes(change(bytearray(file.read_bytes())))


def _one_bit(content: bytearray) -> bytearray:
    content[len(content) * 3 // 4] ^= 4
    return content


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


#: What can happen to a file; None where it does not concern its kind.
def _exchanged(content: bytes) -> bytes:
    half = len(content) // 2
    return content[half:] + content[:half]


WAYS: dict[str, Callable[[Path, Path], None]] = {
    "flipped bit": lambda file, _: _bytes(file, _one_bit),
    "zeros": lambda file, _: _bytes(file, lambda content: bytes(len(content))),
    "truncated": lambda file, _: _bytes(file, lambda content: content[: len(content) * 2 // 3]),
    "empty": lambda file, _: file.write_bytes(b"") and None,
    "longer": lambda file, _: _bytes(file, lambda content: content + b"more"),
    "halves exchanged": lambda file, _: _bytes(file, _exchanged),
    "text": lambda file, _: file.write_text("what is this?") and None,
    "another problem's": lambda file, other: shutil.copy(other, file) and None,
    "missing": lambda file, _: file.unlink(),
    "a folder": lambda file, _: _folder(file),
}
ARRAYS: dict[str, Callable[[Path, Path], None]] = {
    "another dtype": lambda file, _: _array(file, lambda values: values.astype(np.float32)),
    "another shape": lambda file, _: _array(file, lambda values: values[:-1]),
    "another order": lambda file, _: _array(file, np.asfortranarray),
    "NaN inside": lambda file, _: _array(file, lambda values: values * np.nan),
}


def spoilable(name: str, folder: Path) -> Iterator[tuple[str, str]]:
    """The files that a call writes, each with the ways to spoil it."""
    CALLS[name](emptied(folder / "whole"))
    CALLS[name](emptied(folder / "other"), labels=1)
    for file in sorted((folder / "whole").rglob("*")):
        if file.is_file() and file.name != ".lock":
            ways = [*WAYS, *ARRAYS] if file.suffix == ".npy" else WAYS
            yield from ((file.relative_to(folder / "whole").as_posix(), way) for way in ways)


def spoiled(name: str, file: str, way: str, folder: Path, whole: list[Tensor]) -> str:
    """Spoil a file and call again: the same numbers, or a ValueError that names it and the mend."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(folder / "whole", out)
    others = sorted(one for one in (folder / "other").rglob(f"*{Path(file).suffix}"))
    alike = [one for one in others if one.name == Path(file).name]
    (WAYS | ARRAYS)[way](out / file, (alike or others)[-1])
    try:
        found = CALLS[name](out)
    except ValueError as error:
        told = str(out) in str(error) and ("remove" in str(error) or "give another" in str(error))
        if not told:
            raise AssertionError(f"{name}, {file}, {way}: {error}") from error
        return "refused"
    if not same(found, whole):
        raise AssertionError(f"{name}, {file}, {way}: other numbers")
    return "the same numbers"


# --- all of it -----------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Try everything, and say what held."""
    storage._BATCHES_A_STEP = 1  # many writings
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--together", type=int, default=24, help="pairs of processes")
    parser.add_argument("--spoil", nargs="*", choices=CALLS, default=list(CALLS), metavar="CALL")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder, names = Path(place), list(CALLS)
        for number, name in enumerate(names):
            share = given.kills // len(names) + (number < given.kills % len(names))
            print(f"{name}: {dict(killed(name, share, folder))}", flush=True)
        for number in range(given.together):
            together(names[number % len(names)], folder)
        print(f"two processes at once: {given.together} times right", flush=True)
        for name in names:
            said = full(name, folder)
            read_only(name, folder)
            print(f"{name}: full disk {sum(one != 'finished' for one in said)} times told, "
                  "read-only folder refused", flush=True)  # fmt: skip
        for name in given.spoil:
            counts = Counter[str]()
            whole = CALLS[name](emptied(folder / "whole"))
            for file, way in list(spoilable(name, folder)):
                counts[spoiled(name, file, way, folder, whole)] += 1
            print(f"{name}: spoiled files {dict(counts)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
