"""Render the book from its sources and the executed notebooks of a profile.

Run it as ``python -m msif_lib.study.book --profile default --edition reader``, after the runner.

The Sphinx source tree is put together in ``build/<profile>/<edition>/book``: the folder ``book``
with its chapters executed, the executed experiments under ``experiments``, and the page
``status.md``; without what the edition leaves out. A warning is an error. The rendered book is
moved to its place under ``book/_build`` only when all went well, so that a broken build leaves the
last good one there.
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

import nbformat
import yaml

from msif_lib.study.pages.checks import (
    refuse_dead_links,
    refuse_debris,
    refuse_structural_faults,
)
from msif_lib.study.pages.downloads import (
    Repository,
    folder_of,
    publish,
    read_repository,
    simplify_downloads,
    with_install_cell,
)
from msif_lib.study.pages.editions import (
    left_out,
    refuse_leaks,
    strip_markdown,
    strip_notebook,
)
from msif_lib.study.pages.plain import read_book
from msif_lib.study.pages.status import status_page
from msif_lib.study.runner import (
    PACKAGES,
    ROOT,
    Notebook,
    ProjectError,
    executed_path,
    find_notebooks,
    installed_version,
    is_current,
    lock,
    parameters_of,
    read_profile,
)

HTML = {
    "reader": Path("book/_build/html"),
    "student": Path("book/_build/student"),
    "instructor": Path("book/_build/instructor"),
}
RENDERING = ("sphinx", "jupyter-book", "sphinx-book-theme", "sphinx-proof", "sphinx-exercise")


def assemble(root: Path, profile: str, edition: str = "reader") -> Path:
    """Put the Sphinx source tree of an edition together and return it.

    Parameters
    ----------
    root
        The project's root.
    profile
        The profile whose executed notebooks the book shows.
    edition
        ``reader``, ``student`` or ``instructor``.

    Raises
    ------
    ProjectError
        If there is no such edition, or a notebook has not been executed since it changed, or shows
        an error, a warning or a progress bar.
    """
    left_out(edition)
    profiles = read_profile(root, profile)
    repository = read_repository(root)
    folder = root / "build" / profile / edition
    tree = folder / "book"
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(
        root / "book",
        tree,
        ignore=shutil.ignore_patterns("_build", "*.ipynb", ".ipynb_checkpoints"),
    )
    for page in sorted(tree.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        where = page.relative_to(tree).as_posix()
        page.write_text(strip_markdown(text, edition, where), encoding="utf-8")
    notebooks = _in_the_books_order(root, find_notebooks(root))
    for notebook in notebooks:
        if not is_current(root, profile, notebook, parameters_of(notebook, profiles, profile)):
            raise ProjectError(
                f"notebook {notebook.name} is not executed in its present state; run "
                f"python -m msif_lib.study.runner --profile {profile} {notebook.name}"
            )
        content = nbformat.read(executed_path(root, profile, notebook), as_version=4)
        refuse_debris(content, notebook.name)
        content = strip_notebook(content, edition, f"notebook {notebook.name}")
        _save_glued_figures(content, notebook.name, tree / "figures")
        content = with_install_cell(content, folder_of(notebook), repository)
        target = tree / notebook.section / notebook.path.name
        target.parent.mkdir(exist_ok=True)
        nbformat.write(content, target)
    (tree / "status.md").write_text(status_page(root, profile, notebooks), encoding="utf-8")
    _configure(tree, edition, notebooks, repository)
    return tree


def _in_the_books_order(root: Path, notebooks: list[Notebook]) -> list[Notebook]:
    """Return the notebooks in the order of the table of contents, the others after them."""
    contents = root / "book" / "_toc.yml"
    if not contents.exists():
        return notebooks
    pages = re.findall(r"file:\s*(\S+)", contents.read_text(encoding="utf-8"))
    place = {page: number for number, page in enumerate(pages)}
    return sorted(notebooks, key=lambda nb: place.get(f"{nb.section}/{nb.name}", len(place)))


def _configure(
    tree: Path, edition: str, notebooks: Sequence[Notebook], repository: Repository | None
) -> None:
    """Write into the tree's configuration what depends on the edition and the public address."""
    path = tree / "_config.yml"
    if not path.exists():
        return
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if edition != "reader":
        config["title"] = f"{config['title']}: {edition}'s edition"
    if repository is not None:
        config["sphinx"]["config"]["msif_launch"] = {
            f"{notebook.section}/{notebook.name}": repository.launch_links(
                f"{folder_of(notebook)}/{notebook.path.name}"
            )
            for notebook in notebooks
        }
    path.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _save_glued_figures(content: nbformat.NotebookNode, name: str, folder: Path) -> None:
    """Save the figures that a notebook glues as ``<notebook>-<name>.png``, for other pages.

    Sphinx copies the images that a page shows, but not one shown from another page by glue.
    """
    for cell in content.cells:
        for output in cell.get("outputs", []):
            glued = output.get("metadata", {}).get("scrapbook", {}).get("name")
            image = output.get("data", {}).get("application/papermill.record/image/png")
            if glued and image:
                folder.mkdir(exist_ok=True)
                path = folder / f"{name}-{glued}.png"
                path.write_bytes(base64.b64decode(image))


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


def build(root: Path = ROOT, profile: str = "default", edition: str = "reader") -> Path:
    """Render the book and return its first page.

    Parameters
    ----------
    root
        The project's root.
    profile
        The profile whose executed notebooks the book shows.
    edition
        ``reader``, ``student`` or ``instructor``; it chooses the folder, see ``HTML``.

    Raises
    ------
    ProjectError
        If there is no such edition, the sources are incomplete, Sphinx warns of anything, or a page
        has a dead link or cannot be followed by a screen reader.
    """
    left_out(edition)
    read_profile(root, profile)  # its name is that of a folder
    html = root / HTML[edition]
    stamp = html.with_suffix(".key")
    with lock(root / "build"), lock(root / "build" / profile):
        tree = assemble(root, profile, edition)
        key = _key(root, tree)
        if (html / "index.html").exists() and stamp.exists() and stamp.read_text() == key:
            print(f"Book, {edition}'s edition, unchanged", flush=True)
            return html / "index.html"
        print(f"Book, {edition}'s edition, rendering", flush=True)
        output = root / "build" / profile / edition / "rendered"
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
        refuse_dead_links(rendered)
        refuse_structural_faults(rendered)
        refuse_leaks(rendered, edition)
        plain = read_book(tree, rendered)
        simplify_downloads(rendered, plain)
        notebooks = find_notebooks(root)
        publish(tree.parent / "published", notebooks, edition, read_repository(root), plain)
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
    parser.add_argument("--edition", default="reader", help=", ".join(HTML))
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        page = build(options.root.resolve(), options.profile, options.edition)
    except ProjectError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"The book is at {page.as_uri()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
