"""Notebooks to take away: the first cell that installs what is missing, and where they open.

The project does not know its own public address. It is read from the environment variable
``MSIF_REPOSITORY`` (``https://github.com/owner/name``), or else from ``[project.urls]`` in
``pyproject.toml`` under the name ``Repository``. Without one there are no launch buttons.

Colab and Binder open a file of a branch, ``MSIF_BRANCH`` (``published`` unless set). `publish`
writes what that branch holds in place of the sources: the notebooks of one edition, each with the
first cell. These, and the executed ones that the pages offer, are in plain Markdown.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path

import nbformat

from msif_lib.study.pages.editions import strip_notebook
from msif_lib.study.pages.plain import Book, in_plain_markdown
from msif_lib.study.runner import FOLDERS, Notebook, ProjectError

INSTALL_ID = "install-msif"
_INSTALL = """\
# Added to this copy. Where the library is missing, as on Colab, get it and go to its folder.
import importlib.util
import os
import sys

if importlib.util.find_spec("msif_lib") is None:
    !git clone --quiet --depth 1 --branch {branch} {url} msif
    %pip install --quiet --editable "./msif[study]"
    sys.path.insert(0, os.path.abspath("msif"))  # this kernel started before the installation
    %cd -q msif/{folder}"""
_EXPLAIN = """\
# Added to this copy.
import importlib.util

if importlib.util.find_spec("msif_lib") is None:
    raise ModuleNotFoundError(
        "this notebook needs msif_lib: in the project's folder, `pip install -e '.[study]'`; "
        "then open the notebook in {folder}/"
    )"""


@dataclass(frozen=True)
class Repository:
    """Where the project is published.

    Parameters
    ----------
    url
        ``https://github.com/owner/name``.
    branch
        The branch with the notebooks to open.
    """

    url: str
    branch: str

    def launch_links(self, path: str) -> dict[str, str]:
        """Return the addresses at which a notebook opens, by service.

        Parameters
        ----------
        path
            The notebook, from the repository's root.
        """
        project = self.url.removeprefix("https://github.com/")
        return {
            "Colab": f"https://colab.research.google.com/github/{project}/blob/{self.branch}/{path}",
            "Binder": f"https://mybinder.org/v2/gh/{project}/{self.branch}?urlpath=lab/tree/{path}",
        }


def read_repository(root: Path) -> Repository | None:
    """Return where the project is published, or None where nobody said.

    Parameters
    ----------
    root
        The project's root.

    Raises
    ------
    ProjectError
        If the address is not that of a repository on GitHub: Colab opens no other.
    """
    url = os.environ.get("MSIF_REPOSITORY", "")
    declared = root / "pyproject.toml"
    if not url and declared.exists():
        project = tomllib.loads(declared.read_text(encoding="utf-8")).get("project", {})
        url = project.get("urls", {}).get("Repository", "")
    if not url:
        return None
    url = url.removesuffix("/").removesuffix(".git")
    branch = os.environ.get("MSIF_BRANCH") or "published"
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", url):
        raise ProjectError(f"MSIF_REPOSITORY must be https://github.com/owner/name, but is {url!r}")
    if not re.fullmatch(r"[\w][\w./-]*", branch):
        raise ProjectError(f"MSIF_BRANCH must be the name of a branch, but is {branch!r}")
    return Repository(url, branch)


def with_install_cell(
    content: nbformat.NotebookNode, folder: str, repository: Repository | None
) -> nbformat.NotebookNode:
    """Return a copy of a notebook that begins by installing the library where it is missing.

    Parameters
    ----------
    content
        The notebook.
    folder
        The folder that it runs in, from the project's root.
    repository
        Where the library is; without one the cell says what to do.
    """
    result = copy.deepcopy(content)
    if repository is None:
        source = _EXPLAIN.format(folder=folder)
    else:
        source = _INSTALL.format(url=repository.url, branch=repository.branch, folder=folder)
    # The page itself does not show it, and the book is not executed.
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["remove-cell"]})
    cell.id = INSTALL_ID
    result.cells.insert(0, cell)
    return result


def folder_of(notebook: Notebook) -> str:
    """Return the folder that a notebook runs in, from the project's root."""
    return FOLDERS[notebook.section].as_posix()


def publish(
    folder: Path,
    notebooks: list[Notebook],
    edition: str,
    repository: Repository | None,
    book: Book,
) -> None:
    """Write the notebooks of an edition as a repository's branch is to hold them.

    Parameters
    ----------
    folder
        Is emptied; the notebooks stand in it where their sources stand in the project.
    notebooks
        The sources.
    edition
        ``reader``, ``student`` or ``instructor``.
    repository
        Where the branch is.
    book
        Of the rendered book, for plain Markdown.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for notebook in notebooks:
        stripped = strip_notebook(notebook.read(), edition, f"notebook {notebook.name}")
        plain = in_plain_markdown(stripped, f"{notebook.section}/{notebook.name}", book)
        target = folder / folder_of(notebook) / notebook.path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(with_install_cell(plain, folder_of(notebook), repository), target)


def simplify_downloads(html: Path, book: Book) -> None:
    """Rewrite the notebooks that the pages offer in plain Markdown.

    Parameters
    ----------
    html
        The folder of the rendered book.
    book
        Of that rendered book.
    """
    folder = html / "_sources"
    for path in sorted(folder.rglob("*.ipynb")):
        name = path.relative_to(folder).with_suffix("").as_posix()
        content = nbformat.read(path, as_version=4)
        nbformat.write(in_plain_markdown(content, name, book), path)
