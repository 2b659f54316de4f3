"""Kills, two processes, full disks, spoiled files; ``tests/durability.py`` tries more of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import durability
import pytest
import torch

from msif_lib.study import copies
from msif_lib.support import storage
from msif_lib.support.atomic import replacing
from msif_lib.support.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parents[1]
KEPT = {f"stage-{k}.npy.{what}.pt" for k in (0, 1) for what in ("solution", "progress")}
FILES = {
    "a file": {"scores.npy"}
    | {f"scores.npy.kept/{name}" for name in (*KEPT, "problem.pt", "stage-1.npy")},
}


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_BATCHES_A_STEP", 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are started by fork")
def test_kills_company_full_disks_and_read_only_folders():
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.durability", "--kills", "10", "--together", "2"]
    done = subprocess.run(
        [*command, "--spoil"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("'killed': 2") == len(durability.CALLS), done.stdout
    assert "two processes at once: 2 times right" in done.stdout
    assert done.stdout.count("read-only folder refused") == len(durability.CALLS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spoiled")


@pytest.mark.parametrize("name", ["a file", "training"])
def test_spoiled_files_give_the_same_numbers_or_are_refused_by_name(folder, name):
    whole = durability.CALLS[name](durability.emptied(folder / "whole"))
    tried = list(durability.spoilable(name, folder))
    # Of many files every third way; as three divides no file's number of ways, that goes round.
    step = 3 if len(tried) > 40 else 1
    some = [one for k, one in enumerate(tried) if k % step == 0 or one[1] == "a folder"]
    found = {one: durability.spoiled(name, *one, folder, whole) for one in some}
    assert {file for file, _ in tried} == FILES.get(name, {file for file, _ in tried})
    assert len(found) >= 18
    refused = {(file[-4:], way) for (file, way), said in found.items() if said == "refused"}
    assert {way for ending, way in refused if ending == ".npy"} <= {"a folder"}, "scored anew"
    assert {
        said for (file, way), said in found.items() if way == "a folder" and "pt" in file[-2:]
    } == {"refused"}


def test_what_is_spoiled_and_computed_again_is_said(folder):
    out = durability.emptied(folder / "out")
    whole = durability.solved(out)
    file = out / "stage-1.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=r"stage-1\.npy was damaged .* scored anew"):
        assert durability.same(durability.solved(out), whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert durability.same(durability.solved(out), whole)


def test_a_disk_without_room_is_refused_before_any_work(folder, monkeypatch):
    monkeypatch.setattr(durability.Dense, "solve", lambda *given, **named: pytest.fail("solved"))
    usage = shutil.disk_usage(folder)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"results need 2.56e-06 GB.*1e-07 GB left; give a folder"):
        durability.solved(durability.emptied(folder / "out"))


def test_a_file_where_the_folder_should_be_is_refused(folder):
    place = durability.emptied(folder / "out") / "file"
    place.touch()
    for call in (durability.trained, durability.retrained):
        with pytest.raises(ValueError, match=r"checkpoint: .*file is no folder; give another"):
            call(place)
    with pytest.raises(ValueError, match="out must be a folder"):
        durability.solved(place)


def test_the_lock_is_waited_for_and_said(tmp_path):
    """By another thread, as another process would."""
    store, entered, order = Checkpoint(tmp_path), threading.Event(), []

    def work() -> None:
        with Checkpoint(tmp_path).held():
            entered.set()
            time.sleep(0.3)
            order.append("first")

    other = threading.Thread(target=work)
    other.start()
    entered.wait()
    with pytest.warns(UserWarning, match="another process is at work in .*waits"), store.held():
        order.append("second")
        store.put("name", {})  # within the lock it is entered again
    other.join()
    assert order == ["first", "second"]


def test_records_are_known_by_their_names(tmp_path):
    store = Checkpoint(tmp_path)
    store.put("one", {"x": torch.ones(2, dtype=torch.bfloat16), "words": "w", "numbers": (1, 2.0)})
    found = store.get("one")
    assert found["words"] == "w" and found["numbers"] == (1, 2.0)
    assert torch.equal(found["x"], torch.ones(2, dtype=torch.bfloat16))
    shutil.copy(tmp_path / "one.pt", tmp_path / "two.pt")
    assert store.get("two") is None and store.exists("two")


def test_the_file_of_the_first_stage_is_written_where_what_is_left_is_removed(tmp_path):
    file, store = tmp_path / "s.npy", Checkpoint(tmp_path / "s.npy.kept")
    with store.held(), store.replacing(file) as written:
        written.write(b"whole")
        assert [one.name for one in tmp_path.iterdir()] == ["s.npy.kept"]
        (left,) = store.folder.glob("*.part")
        shutil.copy(left, killed := left.with_name(f"s.npy.{'0a' * 8}.part"))
    assert file.read_bytes() == b"whole" and not left.exists()
    with store.held():
        assert not killed.exists()


@pytest.mark.parametrize("write", [copies.put, lambda path, text: replaced(path, text.encode())])
def test_a_file_that_could_not_be_written_stays_as_it_was(tmp_path, write, monkeypatch):
    path = tmp_path / "record"
    write(path, "before")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space"):
            write(path, "after")
    assert path.read_text() == "before" and [*tmp_path.iterdir()] == [path]
    write(path, "after")
    assert path.read_text() == "after"


def full_disk(handle: int) -> None:
    raise OSError(28, "No space left on device")


def replaced(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    mine = [tmp_path / "movie.part", tmp_path / "x.pt.0123.part", tmp_path / "notes.txt"]
    left = tmp_path / f"x.pt.{'0a' * 8}.part"
    for file in (*mine, left):
        file.touch()
    with Checkpoint(tmp_path).held():
        assert not left.exists() and all(file.exists() for file in mine)
