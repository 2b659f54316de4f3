"""Each edition holds what it is for and nothing else; what no page may show is refused."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from sample_book import NOTES, SOLUTIONS, cells_of_a_chapter, put, sample_book

from msif_lib.study import book
from msif_lib.study.pages import checks, downloads, plain
from msif_lib.study.pages.editions import (
    EDITIONS,
    mixed_cells,
    refuse_leaks,
    strip_markdown,
    strip_notebook,
)
from msif_lib.study.runner import ROOT, ProjectError


def words_in(folder: Path) -> set[str]:
    everything = b"\n".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    return {word for word in SOLUTIONS + NOTES if word.encode() in everything.lower()}


@pytest.fixture(autouse=True)
def _no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """The project has no public address, whatever the environment says."""
    monkeypatch.delenv("MSIF_REPOSITORY", raising=False)
    monkeypatch.delenv("MSIF_BRANCH", raising=False)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return sample_book(tmp_path)


@pytest.mark.parametrize("edition", EDITIONS)
def test_every_edition_is_put_together_from_the_same_copies(project: Path, edition: str) -> None:
    tree = book.assemble(project, "default", edition)
    expected = {
        "reader": set(SOLUTIONS),
        "student": set(),
        "instructor": set(SOLUTIONS + NOTES),
    }
    assert words_in(tree) == expected[edition]
    text = (tree / "index.md").read_text()
    assert "Think." in text and "The end" in text
    assert "Before." in (tree / "chapters" / "chapter.ipynb").read_text()


def test_no_file_of_the_students_book_holds_a_solution(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages, sources, downloads, search index; and the buttons lead to that edition's notebooks."""
    monkeypatch.setenv("MSIF_REPOSITORY", "https://github.com/owner/name/")
    page = book.build(project, "default", "student")
    assert page == project / "book" / "_build" / "student" / "index.html"
    html = page.parent
    assert words_in(html) == set()
    assert words_in(project / "build" / "default" / "student" / "published") == set()
    chapter = (html / "chapters" / "chapter.html").read_text()
    assert "Count to three." in chapter and "student&#39;s edition" in page.read_text()
    path = "owner/name/blob/published/book/chapters/chapter.ipynb"
    assert f"https://colab.research.google.com/github/{path}" in chapter
    assert "https://mybinder.org/v2/gh/owner/name/published?urlpath=lab/tree/book" in chapter
    # The page offers the notebook; its first cell is in the file and not in the page.
    assert 'href="../_sources/chapters/chapter.ipynb"' in chapter
    assert "git clone" not in chapter
    download = nbformat.read(html / "_sources" / "chapters" / "chapter.ipynb", as_version=4)
    assert "https://github.com/owner/name msif" in download.cells[0].source
    assert not any("solution" in cell.metadata.get("tags", []) for cell in download.cells)
    status = BeautifulSoup((html / "status.html").read_text(), "html.parser").get_text()
    assert "A chapter" in status and "limit = 4" in status and "2 s" in status
    # Nothing changed, and nothing is rendered again; another address is a change.
    stamp = html.with_suffix(".key").read_text()
    assert book._key(project, book.assemble(project, "default", "student")) == stamp
    monkeypatch.delenv("MSIF_REPOSITORY")
    assert book._key(project, book.assemble(project, "default", "student")) != stamp


def test_the_instructors_book_has_solutions_and_notes(project: Path) -> None:
    page = book.build(project, "default", "instructor")
    words = words_in(page.parent)
    assert words == set(SOLUTIONS + NOTES)
    # The branch that Colab and Binder open is made from sources, which have no outputs.
    published = project / "build" / "default" / "instructor" / "published"
    assert words_in(published) == words - {"qoutput3", "qpage4", "qpage5", "qnote8"}
    assert "launch-buttons" not in (page.parent / "chapters" / "chapter.html").read_text()
    with pytest.raises(ProjectError, match=r"chapters/chapter\.html holds a solution"):
        refuse_leaks(page.parent, "student")
    with pytest.raises(ProjectError, match=r"index\.html holds a teaching"):
        refuse_leaks(page.parent, "reader")


def test_a_warning_is_an_error(project: Path) -> None:
    """One page with everything that must not go unnoticed, one message that names it all."""
    (project / "book" / "index.md").write_text(
        "# Wrong\n\n{cite}`nobody2020nothing`, [gone](gone.md), {ref}`no-such-label`, "
        "{eq}`eq:none`, {glue:text}`chapters/chapter.ipynb::missing:.2f`.\n\n"
        "```{figure} gone.png\n:alt: gone\n```\n"
    )
    with pytest.raises(ProjectError, match="did not render") as caught:
        book.build(project, "default")
    for name in ("nobody2020nothing", "gone.md", "no-such-label", "eq:none", "missing", "gone.png"):
        assert name in str(caught.value)
    assert not (project / "book" / "_build").exists()


def test_an_unknown_edition_is_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ProjectError, match="no edition is called teacher; known: reader, student"):
        book.build(project, "default", "teacher")
    assert book.main(["--root", str(project), "--edition", "teacher"]) == 1
    assert "no edition is called teacher" in capsys.readouterr().err
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^EDITIONS := (.*)$", makefile, re.M)[1].split() == list(EDITIONS)
    assert set(book.HTML) == set(EDITIONS)


def test_directives_are_found_in_every_fence() -> None:
    for fence in ("```", "````", ":::", "::::::", "~~~"):
        text = f"a\n\n{fence}{{solution}} x\nsecret\n{fence}\n\nb\n"
        assert strip_markdown(text, "student") == "a\n\n\nb\n"
        assert strip_markdown(text, "reader") == text
    nested = "::::{tip}\n:::{exercise}\n:label: x\n:::\n:::{solution} x\nsecret\n:::\n::::\nb\n"
    assert strip_markdown(nested, "student") == (
        "::::{tip}\n:::{exercise}\n:label: x\n:::\n::::\nb\n"
    )
    shown = "````markdown\n```{solution} x\n```\n````\n"  # how to write one, in a block of code
    assert strip_markdown(shown, "student") == shown
    with pytest.raises(ProjectError, match=r"page: the fence .* is not closed"):
        strip_markdown("```{solution} x\nsecret\n", "student", "page")
    with pytest.raises(ProjectError, match="write the solution as one"):
        strip_markdown("```{solution-start} x\n```\n", "student")


def test_a_solution_that_is_not_marked_is_named() -> None:
    content = nbformat.v4.new_notebook(cells=cells_of_a_chapter())
    assert mixed_cells(content, "chapter") == [
        "chapter, cell cell-7: tag it solution",
        "chapter, cell cell-7: a solution needs a cell of its own",
    ]
    assert len(strip_notebook(content, "student").cells) == 5
    assert len(content.cells) == 8


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (("stream", {"name": "stderr", "text": "careful"}), "writes to standard error: careful"),
        (("stream", {"name": "stdout", "text": "\x1b[31mred"}), "terminal colours"),
        (("stream", {"name": "stdout", "text": " 10%|#   | 1/10"}), "a progress bar"),
        (("stream", {"name": "stdout", "text": "1 of 2\r2 of 2"}), "overwrites itself"),
        (
            ("stream", {"name": "stdout", "text": "Traceback (most recent call last):"}),
            "a traceback",
        ),
        (
            ("display_data", {"data": {"text/plain": "x.py:3: UserWarning: odd"}}),
            "a warning",
        ),
        (("error", {"ename": "KeyError", "evalue": "k", "traceback": []}), "shows KeyError: k"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_debris_in_an_executed_notebook_is_refused(
    project: Path, output: tuple[str, dict], expected: str
) -> None:
    cells = cells_of_a_chapter()
    kind, content = output
    cells[3].outputs = [nbformat.v4.new_output(kind, **content)]
    put(project, cells)
    with pytest.raises(ProjectError, match="notebook chapter, cell cell-3") as caught:
        book.assemble(project, "default")
    assert expected in str(caught.value)


def test_a_page_with_a_dead_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a page.html").write_text('<p id="x"></p>')
    (tmp_path / "index.html").write_text(
        '<a href="a%20page.html#x"></a><a href="#"></a><a href="https://example.org"></a>'
    )
    checks.refuse_dead_links(tmp_path)
    (tmp_path / "other.html").write_text('<img src="_images/gone.png"><a href="a%20page.html#y">')
    with pytest.raises(ProjectError, match=r"other\.html -> _images/gone\.png") as caught:
        checks.refuse_dead_links(tmp_path)
    assert "other.html -> a%20page.html#y" in str(caught.value)


def test_a_page_that_cannot_be_followed_is_refused(tmp_path: Path) -> None:
    good = (
        '<html lang="en"><head><title>t</title></head><body><article><h1>One</h1><h2>Two</h2>'
        '<a href="x">x</a><img src="a.png" alt="a curve"></article></body></html>'
    )
    assert checks.structural_faults(good) == []
    for before, after, fault in [
        (' lang="en"', "", "the language is not set"),
        ("<title>t</title>", "", "the title is empty"),
        (' alt="a curve"', "", "no alternative text"),
        ("h2>", "h3>", "a heading of level 3 follows one of level 1"),
        ("<h1>One</h1>", "", "0 headings of the first level"),
        (">x</a>", "></a>", "no name"),
        ("<a ", '<span class="problematic">q</span><a ', "an error in the text: q"),
    ]:
        (found,) = checks.structural_faults(good.replace(before, after))
        assert found.startswith(fault)
    (tmp_path / "index.html").write_text("<html></html>")
    with pytest.raises(ProjectError, match=r"index\.html: the language is not set"):
        checks.refuse_structural_faults(tmp_path)


def test_downloads_are_plain_markdown_with_the_numbers_in_place() -> None:
    known = plain.Book(
        numbers={"equation-eq-x": "(2.1)", "thm-x": "Theorem 2.1", "ex-x": "Exercise 2.3"},
        values={
            "chapters/other": {"r": {"text/plain": "0.98765"}},
            "chapters/here": {
                "here:n": {"text/plain": "7"},
                "here:answer": {"text/markdown": "It is {glue:text}`here:n:d`."},
                "here:figure": {"image/png": "aGk="},
            },
        },
        citations={"a2020": ("Chen et al.", "2020")},
        macros={"T": r"^{\mathsf{T}}"},
    )
    for before, after in {
        "{glue:text}`here:n:d` and {glue:text}`other.ipynb::r:.2f`": "7 and 0.99",
        "{cite:t}`a2020`, {cite}`a2020`": "Chen et al. (2020), [Chen et al., 2020]",
        "{eq}`eq:x`, {prf:ref}`thm:x`, {ref}`this <thm:x>`": "(2.1), Theorem 2.1, this",
        "$$\nx\\T\n$$ (eq:x)": "$$\nx^{\\mathsf{T}}\n\\tag{2.1}\n$$",
        "(place)=\n# A heading\n% a comment": "# A heading",
        "```{prf:theorem} Name\n:label: thm:x\n\nTrue.\n```": (
            "> **Theorem 2.1 (Name).**\n>\n> True."
        ),
        ":::{solution} ex-x\n:class: dropdown\nYes, {eq}`eq:x`.\n:::": (
            "<details>\n<summary>Solution of Exercise 2.3</summary>\n\nYes, (2.1).\n\n</details>"
        ),
        "```{glue:md} here:answer\n:format: myst\n```": "It is 7.",
        "```python\n{eq}`no role`\n```": "```python\n{eq}`no role`\n```",
    }.items():
        content = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(before)])
        (cell,) = plain.in_plain_markdown(content, "chapters/here", known).cells
        assert cell.source == after
    figure = "```{glue:figure} here:figure\n:alt: Points.\nTheir caption.\n```"
    content = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(figure)])
    (cell,) = plain.in_plain_markdown(content, "chapters/here", known).cells
    assert cell.source == "![Points.](attachment:here-figure.png)\n\nTheir caption."
    assert cell.attachments == {"here-figure.png": {"image/png": "aGk="}}
    content.cells[0].source = "{eq}`eq:none`"
    with pytest.raises(ProjectError, match="chapters/here: no equation is called"):
        plain.in_plain_markdown(content, "chapters/here", known)


def test_the_public_address_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MSIF_REPOSITORY", raising=False)
    assert downloads.read_repository(tmp_path) is None
    (tmp_path / "pyproject.toml").write_text(
        '[project.urls]\nRepository = "https://github.com/a/b.git"\n'
    )
    assert downloads.read_repository(tmp_path).url == "https://github.com/a/b"
    monkeypatch.setenv("MSIF_REPOSITORY", "https://github.com/c/d")
    monkeypatch.setenv("MSIF_BRANCH", "autumn")
    assert downloads.read_repository(tmp_path) == downloads.Repository(
        "https://github.com/c/d", "autumn"
    )
    monkeypatch.setenv("MSIF_REPOSITORY", "c/d")
    with pytest.raises(ProjectError, match="owner/name, but is 'c/d'"):
        downloads.read_repository(tmp_path)
    monkeypatch.setenv("MSIF_REPOSITORY", "https://github.com/c/d")
    monkeypatch.setenv("MSIF_BRANCH", "a b")
    with pytest.raises(ProjectError, match="must be the name of a branch"):
        downloads.read_repository(tmp_path)


def test_the_first_cell_does_nothing_where_the_library_is_there(
    capsys: pytest.CaptureFixture[str],
) -> None:
    empty = nbformat.v4.new_notebook()
    explained = downloads.with_install_cell(empty, "notebooks", None).cells[0].source
    exec(compile(explained, "cell", "exec"), {})
    with pytest.raises(ModuleNotFoundError, match="pip install -e"):
        exec(explained.replace('msif_lib")', 'no_such_library")'), {})
    from IPython.core.inputtransformer2 import TransformerManager

    repository = downloads.Repository("https://github.com/owner/name", "published")
    installs = downloads.with_install_cell(empty, "book/chapters", repository).cells[0].source
    exec(compile(TransformerManager().transform_cell(installs), "cell", "exec"), {})
    assert "%cd -q msif/book/chapters" in installs
    assert capsys.readouterr().out == ""
