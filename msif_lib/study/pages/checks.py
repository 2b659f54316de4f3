"""What no page of the book may show, looked for before and after rendering.

Sphinx with warnings as errors refuses a missing citation, a missing glued number and a broken
reference. It does not warn of a traceback in an executed notebook, of a link to a file or a place
that is not there, or of a page that a screen reader cannot follow; that is what is looked for here.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import nbformat
from bs4 import BeautifulSoup, Tag

from msif_lib.study.runner import ProjectError

_DEBRIS = {
    "a traceback": re.compile(r"Traceback \(most recent call last\)"),
    "terminal colours": re.compile(r"\x1b\["),
    "a line that overwrites itself": re.compile(r"\r(?!\n)"),
    "a progress bar": re.compile(r"\d+%\|.*\||\d(?:it/s|s/it)\b"),
    "a warning": re.compile(r"^\S*:\d+: \w*Warning: ", re.M),
}


def _texts(output: nbformat.NotebookNode) -> Iterator[str]:
    """Yield what an output shows as text."""
    if output.output_type == "stream":
        yield output.text
    for kind, value in output.get("data", {}).items():
        if kind.startswith("text/"):
            yield "".join(value)


def refuse_debris(content: nbformat.NotebookNode, where: str) -> None:
    """Raise if an executed notebook shows an error, a warning or what is left of a progress bar.

    Parameters
    ----------
    content
        The executed notebook.
    where
        Its name, for the message.

    Raises
    ------
    ProjectError
        Naming the notebook, the cell and what it shows.
    """
    for cell in content.cells:
        place = f"notebook {where}, cell {cell.get('id', '?')}"
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                raise ProjectError(f"{place} shows {output.ename}: {output.evalue}")
            if output.get("name") == "stderr" and output.text.strip():
                raise ProjectError(f"{place} writes to standard error: {output.text.strip()[:200]}")
            for text in _texts(output):
                for what, pattern in _DEBRIS.items():
                    found = pattern.search(text)
                    if found:
                        line = text[max(0, found.start() - 40) : found.end() + 40]
                        raise ProjectError(f"{place} shows {what}: {line.strip()!r}")


def pages_of(html: Path) -> list[Path]:
    """Return the pages of a rendered book, without the theme's templates.

    Parameters
    ----------
    html
        The folder of the rendered book.
    """
    folders = {"_static", "_sources"}
    return [
        page
        for page in sorted(html.rglob("*.html"))
        if not folders & set(page.relative_to(html).parts)
    ]


def refuse_dead_links(html: Path) -> None:
    """Raise if a page refers to a file, or to a place in a page, that is not there.

    Parameters
    ----------
    html
        The folder of the rendered book.

    Raises
    ------
    ProjectError
        With every dead link and the page that it is on.
    """
    dead = set()
    texts = {page.resolve(): page.read_text(encoding="utf-8") for page in pages_of(html)}
    places = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in texts.items()}
    for page, text in texts.items():
        for target in re.findall(r'\b(?:src|href)="([^"]*)"', text):
            if re.match(r"[a-z]+:|//", target):
                continue
            name, _, fragment = target.partition("#")
            name = unquote(name.partition("?")[0])
            there = (page.parent / name).resolve() if name else page
            fragment = unquote(fragment)
            known = places.get(there)
            if not there.exists() or (fragment and known is not None and fragment not in known):
                dead.add(f"{page.relative_to(html.resolve())} -> {target}")
    if dead:
        raise ProjectError("the rendered book has dead links:\n" + "\n".join(sorted(dead)))


def _name(tag: Tag) -> str:
    """Return what a screen reader calls a link or a button."""
    named = [tag.get_text(), str(tag.get("aria-label", "")), str(tag.get("title", ""))]
    named += [str(image.get("alt", "")) for image in tag.find_all("img")]
    return "".join(named).strip()


def structural_faults(page: str) -> list[str]:
    """Return what in a page a screen reader cannot follow.

    Parameters
    ----------
    page
        The page's HTML.

    Returns
    -------
    list of str
        One sentence for each fault: no language or title, an image without alternative text, a
        heading that skips a level, more or less than one heading of the first level, a link or a
        button without a name, an error that Sphinx left in the text.
    """
    soup = BeautifulSoup(page, "html.parser")
    faults = []
    if not soup.html or not soup.html.get("lang"):
        faults.append("the language is not set")
    if not soup.title or not soup.title.get_text().strip():
        faults.append("the title is empty")
    body = soup.find("article") or soup
    assert isinstance(body, Tag)
    for image in soup.find_all("img"):
        if not str(image.get("alt", "")).strip() and image.get("role") != "presentation":
            faults.append(f"no alternative text: {str(image)[:120]}")
    for tag in [*soup.find_all("a", href=True), *soup.find_all("button")]:
        if not _name(tag) and tag.get("aria-hidden") != "true":
            faults.append(f"no name: {str(tag)[:120]}")
    levels = [int(tag.name[1]) for tag in body.find_all(re.compile(r"^h[1-6]$"))]
    if levels.count(1) != 1:
        faults.append(f"{levels.count(1)} headings of the first level")
    for before, after in itertools.pairwise(levels):
        if after > before + 1:
            faults.append(f"a heading of level {after} follows one of level {before}")
    for tag in body.select(".problematic, .system-message"):
        faults.append(f"an error in the text: {tag.get_text()[:120]}")
    return faults


def refuse_structural_faults(html: Path) -> None:
    """Raise if a screen reader cannot follow a page.

    Parameters
    ----------
    html
        The folder of the rendered book.

    Raises
    ------
    ProjectError
        With every fault of every page.
    """
    faults = [
        f"{page.relative_to(html)}: {fault}"
        for page in pages_of(html)
        for fault in structural_faults(page.read_text(encoding="utf-8"))
    ]
    if faults:
        raise ProjectError("pages that cannot be followed:\n" + "\n".join(faults))
