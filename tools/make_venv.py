"""Make `.venv` and install the project into it, once for each state of its dependencies.

Called by the Makefile with any Python >= 3.11; needs the standard library alone. The environment is
made anew when pyproject.toml or constraints.txt change. A lock lets several `make` commands start
at once: one installs, the others wait for it.
"""

import fcntl
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / ".installed"


def state() -> str:
    """Return the hash of everything that decides what is installed, and where."""
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    # A virtual environment holds absolute paths: one that was moved or copied is made anew.
    digest.update(str(VENV).encode())
    return digest.hexdigest()


def is_current(wanted: str) -> bool:
    """Return whether the environment is complete and belongs to the state `wanted`."""
    python = VENV / "bin" / "python"
    return python.exists() and STAMP.exists() and STAMP.read_text() == wanted


def install() -> int:
    """Make the environment from scratch and return pip's exit status."""
    print(f"Making .venv with Python {sys.version.split()[0]} and installing the dependencies")
    print("(about three minutes; done again only when they change)", flush=True)
    shutil.rmtree(VENV, ignore_errors=True)
    status = subprocess.call([sys.executable, "-m", "venv", str(VENV)])
    if status:
        print("error: python -m venv failed (Debian and Ubuntu: apt install python3-venv)")
        return status
    pip = [str(VENV / "bin" / "python"), "-m", "pip", "install", "-qq", "--no-input"]
    pip += ["--disable-pip-version-check", "-c", "constraints.txt", "-e", ".[all]"]
    return subprocess.call(pip, cwd=ROOT)


def main() -> int:
    """Install if need be and return the exit status."""
    wanted = state()
    if is_current(wanted):
        return 0
    with (ROOT / ".venv.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another make is installing into .venv; waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if is_current(wanted):  # made by the one we waited for
            return 0
        status = install()
        if status == 0:
            STAMP.write_text(wanted)
        else:
            print("error: the dependencies could not be installed (pip's message is above)")
    return status


if __name__ == "__main__":
    sys.exit(main())
