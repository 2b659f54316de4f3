"""Make a virtual environment and install into it, once for each state of its dependencies.

Called by the Makefile with any Python >= 3.11; needs the standard library alone. The environment is
made anew when the files that its packages are declared in change. A lock lets several `make`
commands start at once: one installs, the others wait for it.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

try:
    import fcntl
except ImportError:
    sys.exit(
        "error: make, the tests and the book are supported on Linux and macOS; on Windows use WSL\n"
        "(the library itself works there: pip install -e .)"
    )

ROOT = Path(__file__).resolve().parent.parent


class Environment:
    """A virtual environment in the project's root, and what belongs into it."""

    def __init__(self, name: str, constraints: str, requirements: str | None) -> None:
        self.name = name
        self.folder = ROOT / name
        self.stamp = self.folder / ".installed"
        # The project with all of its extras, unless a file lists what is wanted.
        self.declarations = (requirements or "pyproject.toml", constraints)
        wanted = ["-r", requirements] if requirements else ["-e", ".[all]"]
        self.arguments = ["-c", constraints, *wanted]

    def state(self) -> str:
        """Return the hash of everything that decides what is installed, and where."""
        digest = hashlib.sha256()
        for name in self.declarations:
            digest.update((ROOT / name).read_bytes())
        # A virtual environment holds absolute paths: one that was moved or copied is made anew.
        digest.update(str(self.folder).encode())
        return digest.hexdigest()

    def is_current(self, wanted: str) -> bool:
        """Return whether the environment is complete and belongs to the state `wanted`."""
        python = self.folder / "bin" / "python"
        return python.exists() and self.stamp.exists() and self.stamp.read_text() == wanted

    def install(self) -> int:
        """Make the environment from scratch and return pip's exit status."""
        version = sys.version.split()[0]
        print(f"Making {self.name} with Python {version} and installing the dependencies")
        print("(about three minutes; done again only when they change)", flush=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        status = subprocess.call([sys.executable, "-m", "venv", str(self.folder)])
        if status:
            print("error: python -m venv failed (Debian and Ubuntu: apt install python3-venv)")
            return status
        pip = [str(self.folder / "bin" / "python"), "-m", "pip", "install", "-qq", "--no-input"]
        return subprocess.call([*pip, "--disable-pip-version-check", *self.arguments], cwd=ROOT)

    def make(self) -> int:
        """Install if need be and return the exit status."""
        wanted = self.state()
        if self.is_current(wanted):
            return 0
        with (ROOT / f"{self.name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"Another make is installing into {self.name}; waiting for it", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            if self.is_current(wanted):  # made by the one we waited for
                return 0
            status = self.install()
            if status == 0:
                self.stamp.write_text(wanted)
            else:
                print("error: the dependencies could not be installed (pip's message is above)")
        return status


def main() -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default=".venv", help="folder, in the project's root")
    parser.add_argument("--constraints", default="constraints.txt")
    parser.add_argument("--requirements", help="install what it lists, not the project")
    options = parser.parse_args()
    return Environment(options.name, options.constraints, options.requirements).make()


if __name__ == "__main__":
    sys.exit(main())
