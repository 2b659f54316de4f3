"""Notebooks in plain Markdown: what Jupyter and Colab can show without Sphinx.

The texts are MyST: roles such as ``{glue:text}`` and ``{eq}``, and fenced directives. In a copy to
take away each role becomes what the rendered page shows in its place, each directive a quoted or
folded block. The numbers of theorems, exercises and equations are read from the rendered pages, the
computed values from the executed notebooks.
"""

from __future__ import annotations

import copy
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import yaml
from bs4 import BeautifulSoup, Tag
from docutils.nodes import make_id
from myst_nb.core.variables import format_plain_text
from pybtex.database import parse_file

from msif_lib.study.pages.checks import pages_of
from msif_lib.study.pages.editions import Fence, fence_at
from msif_lib.study.runner import ProjectError

_ROLE = re.compile(r"\{(?P<name>[a-z]+(?::[a-z]+)?)\}`(?P<content>[^`]+)`")
_NUMBERED_MATH = re.compile(r"\$\$(?P<body>(?:(?!\$\$).)+)\$\$ *\((?P<label>[\w:.-]+)\)", re.S)
_TITLED = re.compile(r"^(?P<text>.*?)\s*<(?P<target>[^<>]+)>$", re.S)
_TARGET_OR_COMMENT = re.compile(r"^(?:\([\w:.-]+\)=|%.*)$\n?", re.M)
_CODE = ("code", "code-block", "code-cell")


@dataclass(frozen=True)
class Book:
    """What a page shows in place of labels and keys.

    Parameters
    ----------
    numbers
        By HTML id, which has letters, digits and hyphens: ``Theorem 3.1``, ``Exercise 2.4``,
        ``(5.2)`` or the text of a heading.
    values
        By notebook, as ``chapters/case1``, and by name: what it glues, by the kind of data.
    citations
        By key: authors and year.
    macros
        By name: what a macro of the book's formulas stands for.
    """

    numbers: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Mapping[str, dict[str, str]]] = field(default_factory=dict)
    citations: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    macros: Mapping[str, str] = field(default_factory=dict)


def _words(tag: Tag) -> str:
    """Return a tag's text in one line, without the sign that links to it."""
    return " ".join(tag.get_text().replace("#", " ").split())


def _numbers(html: Path) -> dict[str, str]:
    """Return what the pages call their numbered things and headings, by id."""
    found = {}
    for page in pages_of(html):
        soup = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")
        for box in soup.select("div.admonition[id]"):
            number = box.select_one(".admonition-title .caption-number")
            if number is not None:
                found[str(box["id"])] = _words(number)
        for equation in soup.select("div.math[id]"):
            number = equation.select_one(".eqno")
            if number is not None:
                found[str(equation["id"])] = _words(number)
        for caption in soup.select("figure[id] .caption-number"):
            figure = caption.find_parent("figure")
            assert isinstance(figure, Tag)
            found[str(figure["id"])] = _words(caption)
        for section in soup.select("section[id]"):
            heading = section.find(re.compile("^h[1-6]$"))
            assert isinstance(heading, Tag)
            for place in (section, *section.find_all("span", id=True, recursive=False)):
                found[str(place["id"])] = _words(heading)
    return found


def _values(content: nbformat.NotebookNode) -> dict[str, dict[str, str]]:
    """Return what an executed notebook glues: for each name its data, by kind."""
    return {
        output.metadata["scrapbook"]["name"]: {
            kind.removeprefix("application/papermill.record/"): data
            for kind, data in output.data.items()
        }
        for cell in content.cells
        for output in cell.get("outputs", [])
        if "scrapbook" in output.get("metadata", {})
    }


def _citation(entry: Any) -> tuple[str, str]:
    """Return the authors and the year of a reference."""
    people = entry.persons.get("author") or entry.persons.get("editor") or []
    names = [" ".join([*person.prelast_names, *person.last_names]) for person in people]
    if len(names) > 2:
        names = [f"{names[0]} et al."]
    plain = re.sub(r"[{}]", "", " and ".join(names))
    return plain or entry.fields.get("title", entry.key), entry.fields.get("year", "")


def read_book(tree: Path, html: Path) -> Book:
    """Return what is needed to write the notebooks of a rendered book in plain Markdown.

    Parameters
    ----------
    tree
        The Sphinx source tree, with the executed notebooks.
    html
        The folder of the rendered book.
    """
    config = yaml.safe_load((tree / "_config.yml").read_text(encoding="utf-8"))
    mathjax = config["sphinx"]["config"].get("mathjax3_config", {})
    notebooks = {
        path.relative_to(tree).with_suffix("").as_posix(): nbformat.read(path, as_version=4)
        for path in sorted(tree.rglob("*.ipynb"))
    }
    entries = parse_file(str(tree / "references.bib")).entries
    return Book(
        numbers=_numbers(html),
        values={name: _values(content) for name, content in notebooks.items()},
        citations={key: _citation(entry) for key, entry in entries.items()},
        macros=mathjax.get("tex", {}).get("macros", {}),
    )


class _Page:
    """One notebook's texts, rewritten.

    Parameters
    ----------
    name
        The notebook, as ``chapters/case1``.
    book
        What stands in place of labels and keys.
    """

    def __init__(self, name: str, book: Book) -> None:
        self.name, self.book = name, book
        self.images: dict[str, str] = {}  # those that the present cell shows

    def _known(self, table: Mapping[str, Any], key: str, what: str) -> Any:
        """Return an entry of the book, which the rendered page must have shown."""
        if key not in table:
            raise ProjectError(f"{self.name}: no {what} is called {key!r}")
        return table[key]

    def _glued(self, content: str, kind: str) -> tuple[str, str]:
        """Return what ``[notebook::]key[:format]`` names, where a key may hold a colon, and how."""
        place, _, key = content.rpartition("::")
        path = posixpath.join("/", posixpath.dirname(self.name), place)
        notebook = posixpath.normpath(path).strip("/").removesuffix(".ipynb")
        values = self._known(self.book.values, notebook if place else self.name, "notebook")
        format_spec = ""
        if key not in values:
            key, _, format_spec = key.rpartition(":")
        return self._known(self._known(values, key, "computed value"), kind, kind), format_spec

    def _cite(self, keys: str, in_text: bool) -> str:
        """Return authors and year, for each of the keys."""
        cited = [
            self._known(self.book.citations, key.strip(), "reference") for key in keys.split(",")
        ]
        if in_text:
            return ", ".join(f"{authors} ({year})" for authors, year in cited)
        return "[" + "; ".join(f"{authors}, {year}" for authors, year in cited) + "]"

    def _role(self, match: re.Match[str]) -> str:
        """Return what a reader of the page sees in place of a role."""
        name, content = match["name"], match["content"].strip()
        if name.startswith("glue"):
            return format_plain_text(*self._glued(content, "text/plain"))
        if name.startswith("cite"):
            return self._cite(content, in_text=name == "cite:t")
        if name == "math":
            return f"${content}$"
        titled = _TITLED.match(content)
        if titled and "%s" not in titled["text"]:
            return titled["text"]
        target = titled["target"] if titled else content
        if name == "eq":
            return str(self._known(self.book.numbers, make_id(f"equation-{target}"), "equation"))
        if name in ("ref", "numref", "prf:ref"):
            return str(self._known(self.book.numbers, make_id(target), "label"))
        return f"`{target.removeprefix('~').rpartition('/')[2]}`"

    def _text(self, text: str) -> str:
        """Rewrite lines that are neither code nor a directive."""

        def numbered(match: re.Match[str]) -> str:
            identity = make_id(f"equation-{match['label']}")
            number = self._known(self.book.numbers, identity, "equation")
            return f"$${match['body'].rstrip()}\n\\tag{{{number.strip('()')}}}\n$$"

        text = _TARGET_OR_COMMENT.sub("", text)
        text = _ROLE.sub(self._role, _NUMBERED_MATH.sub(numbered, text))
        for macro, meaning in self.book.macros.items():
            text = re.sub(rf"\\{macro}(?![A-Za-z])", meaning.replace("\\", r"\\"), text)
        return text

    def _directive(self, fence: Fence, body: list[str]) -> list[str]:
        """Return a directive as a quoted, or a folded, block."""
        kind, argument = fence.name.rpartition(":")[2], self._text(fence.argument)
        label = fence.options.get("label", "")
        if kind in _CODE:
            return [f"```{fence.argument}", *body, "```"]
        if kind == "math":
            return ["$$", *body, "$$"]
        if fence.name == "glue:md":
            return self.rewrite(self._glued(fence.argument, "text/markdown")[0].split("\n"))
        inside = self.rewrite("\n".join(body).strip("\n").split("\n"))
        if kind in ("figure", "image"):
            source = fence.argument
            if fence.name == "glue:figure":
                image = make_id(fence.argument) + ".png"
                self.images[image] = self._glued(fence.argument, "image/png")[0]
                source = f"attachment:{image}"
            number = self.book.numbers.get(make_id(fence.options.get("name", "")))
            caption = ["", f"**{number}**", *inside] if number else ["", *inside]
            return [f"![{fence.options.get('alt', '')}]({source})", *caption]
        if kind == "solution":
            title = (
                f"Solution of {self._known(self.book.numbers, make_id(fence.argument), 'exercise')}"
            )
        elif kind in ("admonition", "dropdown"):
            title = argument
        else:
            title = self.book.numbers.get(make_id(label), kind.capitalize())
            title += f" ({argument})" if argument else ""
        if kind == "dropdown" or "dropdown" in fence.options.get("class", ""):
            return ["<details>", f"<summary>{title}</summary>", "", *inside, "", "</details>", ""]
        return [f"> {line}".rstrip() for line in (f"**{title}.**", "", *inside)] + [""]

    def rewrite(self, lines: list[str]) -> list[str]:
        """Return lines of MyST as plain Markdown.

        Parameters
        ----------
        lines
            Without their line breaks.
        """
        result: list[str] = []
        plain: list[str] = []
        number = 0
        while number < len(lines):
            fence = fence_at(lines, number, len(lines), self.name)
            if fence is None:
                plain.append(lines[number])
                number += 1
                continue
            result += self._text("\n".join(plain)).split("\n") if plain else []
            plain = []
            body = lines[fence.first : fence.end - 1]
            result += self._directive(fence, body) if fence.name else lines[number : fence.end]
            number = fence.end
        return result + (self._text("\n".join(plain)).split("\n") if plain else [])


def in_plain_markdown(
    content: nbformat.NotebookNode, name: str, book: Book
) -> nbformat.NotebookNode:
    """Return a copy of a notebook whose texts need no Sphinx.

    Parameters
    ----------
    content
        The notebook.
    name
        Its place in the book, as ``chapters/case1``.
    book
        Of the rendered book.

    Raises
    ------
    ProjectError
        If a text refers to what the rendered book does not have.
    """
    page, result = _Page(name, book), copy.deepcopy(content)
    for cell in result.cells:
        if cell.cell_type == "markdown":
            cell.source = "\n".join(page.rewrite(cell.source.split("\n"))).strip("\n")
            if page.images:
                cell.attachments = {
                    name: {"image/png": image} for name, image in page.images.items()
                }
                page.images.clear()
    return result
