"""Processes end with the one that started them, however that one ends."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from msif_lib.support import lifeline

ROOT = Path(__file__).resolve().parents[1]

FOREVER = """
import os, sys, time
from pathlib import Path
from msif_lib.support.jobs import as_finished
def work(number):
    (Path(sys.argv[1]) / f"there-{number}").write_text("")
    while True:
        time.sleep(0.01)
list(as_finished(work, [1, 2], jobs=2))
"""


def wait_for(files: int, folder: Path) -> None:
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < files:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_jobs_end_with_the_process_that_asked(tmp_path, how):
    command = [sys.executable, "-c", FOREVER, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_for(2, tmp_path)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.send_signal(how)
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive


def test_children_end_with_their_block(tmp_path):
    (tmp_path / "work.py").write_text(
        "import pathlib, sys, time\n"
        "(pathlib.Path(sys.argv[1]) / 'there').write_text(' '.join(sys.path))\n"
        "time.sleep(600)\n"
    )
    (tmp_path / "seen").mkdir()
    with lifeline.Children() as children:
        child = children.start(
            "work", [str(tmp_path / "seen")], {"PYTHONPATH": str(tmp_path)}, cwd=tmp_path
        )
        wait_for(1, tmp_path / "seen")
        assert child.poll() is None
    assert child.wait(20) == -signal.SIGKILL
    assert children.ended
    # Names of this library's own modules hide no others there.
    assert str(ROOT / "msif_lib") not in (tmp_path / "seen" / "there").read_text()
    with pytest.raises(RuntimeError, match="no process is started any more"):
        children.start("work", [], {})


def test_a_child_whose_parent_has_gone_already_ends_at_once(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", ""])
    other.wait()
    (tmp_path / "time_to_sleep.py").write_text("import time; time.sleep(600)")
    command = lifeline.command("time_to_sleep")
    environment = {"PYTHONPATH": str(tmp_path), lifeline.PARENT: str(other.pid)}
    assert subprocess.run(command, env=environment, timeout=60).returncode == 1
