"""The book's editions: one text, with or without its solutions and teaching notes.

========== ========================== ==============
edition    solutions                  teaching notes
========== ========================== ==============
reader     collapsed                  none
student    none                       none
instructor collapsed                  shown
========== ========================== ==============

In a notebook a whole cell tagged ``solution`` or ``teaching`` is left out, with its outputs. In
Markdown, in a cell or a page, it is the directives ``{solution}`` and
``{admonition} Teaching note``. All this happens to copies: the sources and the executed notebooks
are the same for every edition.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path

import nbformat

from msif_lib.study.runner import ProjectError

# What each edition leaves out: tags of cells, and kinds of directives.
EDITIONS: dict[str, frozenset[str]] = {
    "reader": frozenset({"teaching"}),
    "student": frozenset({"solution", "teaching"}),
    "instructor": frozenset(),
}
_OPENING = re.compile(r"^\s*(?P<fence>:{3,}|`{3,}|~{3,})\s*(?:\{(?P<name>[^}]+)\})?(?P<rest>.*)$")
_OPTION = re.compile(r"^\s*:(?P<name>[\w-]+):(?:\s+(?P<value>.*?))?\s*$")


@dataclass(frozen=True)
class _Directive:
    """A fenced directive: its kind, its first line, the line after its last one, its label."""

    kind: str
    start: int
    end: int
    label: str


def left_out(edition: str) -> frozenset[str]:
    """Return the kinds of material that an edition leaves out.

    Parameters
    ----------
    edition
        ``reader``, ``student`` or ``instructor``.

    Returns
    -------
    frozenset of str
        Some of ``solution`` and ``teaching``.

    Raises
    ------
    ProjectError
        If there is no such edition.
    """
    if edition not in EDITIONS:
        raise ProjectError(f"no edition is called {edition}; known: {', '.join(EDITIONS)}")
    return EDITIONS[edition]


def _directives(text: str, where: str) -> list[_Directive]:
    """Return the solutions and teaching notes in a Markdown text."""
    lines = text.splitlines()
    found: list[_Directive] = []
    _find(lines, 0, len(lines), where, found)
    return found


@dataclass(frozen=True)
class Fence:
    """A fenced block of MyST Markdown.

    Parameters
    ----------
    name
        Of the directive, as ``prf:theorem``; empty for plain code.
    argument
        What follows the name.
    options
        The lines ``:name: value`` below it.
    first, end
        The number of the first line of its body, and of the line after its closing fence.
    """

    name: str
    argument: str
    options: dict[str, str]
    first: int
    end: int


def fence_at(lines: list[str], number: int, last: int, where: str) -> Fence | None:
    """Return the fenced block that opens with a line, or None.

    Parameters
    ----------
    lines
        Of MyST Markdown, without their line breaks.
    number
        That line.
    last
        Where the block must have ended.
    where
        The page or cell, for messages.

    Raises
    ------
    ProjectError
        If the fence is not closed.
    """
    opening = _OPENING.match(lines[number])
    if not opening or ("`" in opening["rest"] and opening["fence"].startswith("`")):
        return None  # plain text, or code within a line
    fence = opening["fence"]
    closing = re.compile(rf"^\s*{re.escape(fence[0])}{{{len(fence)},}}\s*$")
    end = next((i for i in range(number + 1, last) if closing.match(lines[i])), None)
    if end is None:
        raise ProjectError(f"{where}: the fence {lines[number].strip()!r} is not closed")
    options = {}
    first = number + 1
    while opening["name"] and first < end and (found := _OPTION.match(lines[first])):
        options[found["name"]] = found["value"] or ""
        first += 1
    return Fence(opening["name"] or "", opening["rest"].strip(), options, first, end + 1)


def _kind(fence: Fence) -> str:
    """Return ``solution``, ``teaching`` or nothing."""
    if fence.name == "solution":
        return "solution"
    note = fence.argument.lower().startswith("teaching note")
    if fence.name == "admonition" and (note or "teaching-note" in fence.options.get("class", "")):
        return "teaching"
    return ""


def _find(lines: list[str], number: int, last: int, where: str, found: list[_Directive]) -> None:
    """Append the solutions and teaching notes between two lines."""
    while number < last:
        fence = fence_at(lines, number, last, where)
        if fence is None:
            number += 1
            continue
        if fence.name in ("solution-start", "solution-end"):
            raise ProjectError(
                f"{where} has a {{{fence.name}}}; write the solution as one {{solution}} directive"
            )
        kind = _kind(fence)
        if kind:
            found.append(_Directive(kind, number, fence.end, fence.options.get("label", "")))
        elif fence.name and fence.name not in ("code", "code-block", "code-cell", "math"):
            _find(lines, fence.first, fence.end - 1, where, found)  # it may hold others
        number = fence.end


def strip_markdown(text: str, edition: str, where: str = "this text") -> str:
    """Return a Markdown text as an edition has it.

    Parameters
    ----------
    text
        MyST Markdown.
    edition
        ``reader``, ``student`` or ``instructor``.
    where
        The page or cell, for messages.

    Raises
    ------
    ProjectError
        If a solution's or a note's fence is not closed, or a solution is written with
        ``{solution-start}``.
    """
    out = left_out(edition)
    lines = text.splitlines(keepends=True)
    for directive in reversed(_directives(text, where)):
        if directive.kind in out:
            del lines[directive.start : directive.end]
    return "".join(lines)


def strip_notebook(
    content: nbformat.NotebookNode, edition: str, where: str = "this notebook"
) -> nbformat.NotebookNode:
    """Return a copy of a notebook as an edition has it.

    Parameters
    ----------
    content
        The notebook, executed or not.
    edition
        ``reader``, ``student`` or ``instructor``.
    where
        The notebook's name, for messages.

    Raises
    ------
    ProjectError
        As `strip_markdown`.
    """
    out = left_out(edition)
    stripped = copy.deepcopy(content)
    cells = []
    for cell in stripped.cells:
        if out & set(cell.metadata.get("tags", [])):
            continue
        if cell.cell_type == "markdown":
            source = strip_markdown(cell.source, edition, f"{where}, cell {cell.get('id', '?')}")
            if cell.source.strip() and not source.strip():
                continue
            cell.source = source
        cells.append(cell)
    stripped.cells = cells
    return stripped


def mixed_cells(content: nbformat.NotebookNode, where: str = "this notebook") -> list[str]:
    """Return what is wrong with the way in which a notebook marks solutions and notes.

    Parameters
    ----------
    content
        The notebook.
    where
        Its name, for messages.

    Returns
    -------
    list of str
        One sentence for each cell that holds a solution or a note without the tag, with other text
        beside it, or without ``:class: dropdown``.
    """
    wrong = []
    for cell in content.cells:
        if cell.cell_type != "markdown":
            continue
        place = f"{where}, cell {cell.get('id', '?')}"
        lines = cell.source.splitlines()
        directives = _directives(cell.source, place)
        kinds = {directive.kind for directive in directives}
        if kinds - set(cell.metadata.get("tags", [])):
            wrong.append(f"{place}: tag it {' and '.join(sorted(kinds))}")
        for directive in reversed(directives):
            if not re.search(r"^\s*:class:.*\bdropdown\b", "\n".join(lines), re.M):
                wrong.append(f"{place}: the {directive.kind} lacks :class: dropdown")
            del lines[directive.start : directive.end]
        if kinds and any(line.strip() for line in lines):
            wrong.append(f"{place}: a {' and '.join(sorted(kinds))} needs a cell of its own")
    return wrong


def solution_labels(text: str, where: str = "this text") -> set[str]:
    """Return the labels of the solutions in a Markdown text.

    Parameters
    ----------
    text
        MyST Markdown.
    where
        The page or cell, for messages.
    """
    return {directive.label for directive in _directives(text, where) if directive.label}


def refuse_leaks(html: Path, edition: str) -> None:
    """Raise if a rendered book holds what its edition leaves out.

    Parameters
    ----------
    html
        The folder of the rendered book.
    edition
        ``reader``, ``student`` or ``instructor``.

    Raises
    ------
    ProjectError
        With every file that holds a solution or a teaching note, as a box, a directive or a cell.
    """
    traces = {
        "solution": r'class="solution\b|[:`~]{3}\s*\{solution\}|"solution"[,\s\]]',
        "teaching": r'class="[^"]*teaching-note|[:`~]{3}\s*\{admonition\} Teaching|"teaching"[,\s]',
    }
    leaks = []
    for path in sorted(html.rglob("*")):
        if path.suffix not in (".html", ".ipynb", ".md", ".txt"):
            continue
        text = path.read_text(encoding="utf-8")
        leaks += [
            f"{path.relative_to(html)} holds a {kind}"
            for kind in sorted(left_out(edition))
            if re.search(traces[kind], text)
        ]
    if leaks:
        raise ProjectError(f"not for the {edition}'s edition:\n" + "\n".join(leaks))
