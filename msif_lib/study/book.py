"""Render the book from its sources and the executed notebooks of a profile.

Run it as ``python -m msif_lib.study.book --profile default``, after the runner.

The Sphinx source tree is put together in ``build/<profile>/book``: the folder ``book`` with its
chapters executed, and the executed experiments under ``experiments``. A warning is an error. The
rendered book is moved to ``book/_build/html`` only when all went well, so that a broken build
leaves the last good one in place.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

import nbformat

from msif_lib.study.runner import (
    PACKAGES,
    ROOT,
    ProjectError,
    executed_path,
    find_notebooks,
    installed_version,
    is_current,
    lock,
    parameters_of,
    read_profile,
)

HTML = Path("book/_build/html")
RENDERING = ("sphinx", "jupyter-book", "sphinx-book-theme", "sphinx-proof", "sphinx-exercise")


def assemble(root: Path, profile: str) -> Path:
    """Put the Sphinx source tree together and return it.

    Parameters
    ----------
    root
        The project's root.
    profile
        The profile whose executed notebooks the book shows.

    Raises
    ------
    ProjectError
        If a notebook has not been executed since it changed, or holds an error.
    """
    profiles = read_profile(root, profile)
    tree = root / "build" / profile / "book"
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(
        root / "book",
        tree,
        ignore=shutil.ignore_patterns("_build", ".ipynb_checkpoints", "*.failed.ipynb"),
    )
    for notebook in find_notebooks(root):
        if not is_current(root, profile, notebook, parameters_of(notebook, profiles, profile)):
            raise ProjectError(
                f"notebook {notebook.name} is not executed in its present state; run "
                f"python -m msif_lib.study.runner --profile {profile} {notebook.name}"
            )
        executed = executed_path(root, profile, notebook)
        _refuse_errors(executed)
        target = tree / notebook.section / executed.name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(executed, target)
        _save_glued_figures(executed, tree / "figures")
    return tree


def _save_glued_figures(executed: Path, folder: Path) -> None:
    """Save the figures that a notebook glues as ``<notebook>-<name>.png``, for other pages.

    Sphinx copies the images that a page shows, but not one shown from another page by glue.
    """
    for cell in nbformat.read(executed, as_version=4).cells:
        for output in cell.get("outputs", []):
            name = output.get("metadata", {}).get("scrapbook", {}).get("name")
            image = output.get("data", {}).get("application/papermill.record/image/png")
            if name and image:
                folder.mkdir(exist_ok=True)
                path = folder / f"{executed.stem}-{name}.png"
                path.write_bytes(base64.b64decode(image))


def _refuse_errors(path: Path) -> None:
    """Raise if an executed notebook shows an error: it would render without a warning."""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type != "code" or "raises-exception" in cell.metadata.get("tags", []):
            continue
        for output in cell.outputs:
            if output.output_type == "error":
                raise ProjectError(f"{path} shows {output.ename}: {output.evalue}")


def _refuse_dead_links(html: Path) -> None:
    """Raise if a page refers to a file that is not there: Sphinx does not warn of every one."""
    dead = set()
    for page in html.rglob("*.html"):
        if "_static" in page.parts:  # the theme's templates
            continue
        for target in re.findall(r'(?:src|href)="([^"#?]+)', page.read_text(encoding="utf-8")):
            external = re.match(r"[a-z]+:|//", target)
            if not external and not (page.parent / unquote(target)).exists():
                dead.add(f"{page.relative_to(html)} -> {target}")
    if dead:
        raise ProjectError("the rendered book has dead links:\n" + "\n".join(sorted(dead)))


def _key(root: Path, tree: Path) -> str:
    """Return the hash of all that the rendered book depends on."""
    digest = hashlib.sha256()
    for package in (*PACKAGES, *RENDERING):
        digest.update(f"{package}=={installed_version(package)}\0".encode())
    # The API reference shows the library's docstrings.
    for base in (tree, root / "msif_lib"):
        for path in sorted(base.rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def build(root: Path = ROOT, profile: str = "default") -> Path:
    """Render the book and return its first page.

    Parameters
    ----------
    root
        The project's root.
    profile
        The profile whose executed notebooks the book shows.

    Raises
    ------
    ProjectError
        If the sources are incomplete or Sphinx warns of anything.
    """
    html = root / HTML
    stamp = html.parent / "key"
    with lock(root / "build"), lock(root / "build" / profile):
        tree = assemble(root, profile)
        key = _key(root, tree)
        if (html / "index.html").exists() and stamp.exists() and stamp.read_text() == key:
            print("Book, unchanged", flush=True)
            return html / "index.html"
        print("Book, rendering", flush=True)
        output = root / "build" / profile / "rendered"
        shutil.rmtree(output, ignore_errors=True)
        command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
        command += ["build", str(tree)]
        command += ["--path-output", str(output), "--all", "--quiet"]
        command += ["--warningiserror", "--nitpick", "--keep-going"]
        # The API reference must describe the library under root.
        before = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *before])}
        result = subprocess.run(
            command,
            env=environment,
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        rendered = output / "_build" / "html"
        if result.returncode or not (rendered / "index.html").exists():
            output_text = re.sub(r"\x1b\[[0-9;]*m", "", result.stdout).strip()
            raise ProjectError(f"the book did not render:\n{output_text}")
        _refuse_dead_links(rendered)
        stamp.unlink(missing_ok=True)
        shutil.rmtree(html, ignore_errors=True)
        html.parent.mkdir(parents=True, exist_ok=True)
        rendered.replace(html)
        stamp.write_text(key)
    return html / "index.html"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Parameters
    ----------
    arguments
        The command line without the program's name; by default this process's.
    """
    parser = argparse.ArgumentParser(
        prog="python -m msif_lib.study.book",
        description="Render the book from the executed notebooks.",
    )
    parser.add_argument("--profile", default="default", help="a file of notebooks/profiles")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        page = build(options.root.resolve(), options.profile)
    except ProjectError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"The book is at {page.as_uri()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
