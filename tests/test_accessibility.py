"""Pages as a reader's browser shows them: what axe-core finds, and what is wider than its frame.

A small book with one of everything is rendered for it. With MSIF_CHECK_BOOK set in the environment,
all pages of the book that `make book` rendered are looked at as well: some minutes.
"""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

import pytest
from pypdf import PdfReader
from sample_book import sample_book

from msif_lib.study import book
from msif_lib.study.pages.browser import Browser, find_chromium
from msif_lib.study.pages.checks import pages_of
from msif_lib.study.pages.pdf import make_pdf
from msif_lib.study.runner import ROOT

pytestmark = [
    pytest.mark.skipif(find_chromium() is None, reason="there is no Chromium in PATH"),
    pytest.mark.xdist_group("pages"),  # the book is rendered once
]

# MathJax writes what a screen reader reads beside each formula; its glyphs are only for the eye.
NOT_LOOKED_AT = [["mjx-container"]]

EVERYTHING = """\
# One of everything

Text with a [link](chapters/chapter.ipynb), `code`, $x^2$, a note[^note] and {eq}`eq:square`.

[^note]: The note.

$$
y = x^2
$$ (eq:square)

```{figure} _static/headline.png
:alt: A figure that stands for any other.

Its caption.
```

::::{grid} 1 1 2 2
:::{grid-item-card} A card
:link: chapters/chapter
:link-type: doc
Its text.
:::
::::

::::{tab-set}
:::{tab-item} One
First.
:::
:::{tab-item} Two
Second.
:::
::::

## Boxes

{{boxes}}

```{prf:theorem} A theorem
:label: index-theorem
It holds, see {prf:ref}`index-theorem`.
```

```{prf:proof}
Clear.
```

:::{exercise} By hand: think
:label: index-exercise
Think.
:::

:::{solution} index-exercise
:class: dropdown
Thought.
:::

### A table and code

| a | b |
| --- | --- |
| 1 | 2 |

{{wide}}

```python
# A comment
def double(x: float) -> float:
    \"\"\"Return twice the number.\"\"\"
    return 2 * x if x else "nothing"
```
"""
BOXES = "\n\n".join(
    f"```{{{kind}}}\nA box of the kind {kind}, with a [link](https://example.org) and `code`.\n```"
    for kind in ("note", "tip", "warning", "important", "seealso", "margin", "dropdown", "caution")
)
COLUMNS = [f"Column number {number}" for number in range(12)]
WIDE = "\n".join(
    f"| {' | '.join(cells)} |"
    for cells in (COLUMNS, ["---"] * 12, [f"{number}.25 [0.11, 0.99]" for number in range(12)])
)
# What reaches beyond the page's column without a frame of its own that scrolls; a table never may.
TOO_WIDE = """(() => {
  const article = document.querySelector('.bd-article');
  const shown = (part) => part.getClientRects().length > 0;
  const scrolls = (part) => /auto|scroll/.test(getComputedStyle(part).overflowX);
  const found = [];
  if (document.documentElement.scrollWidth > window.innerWidth + 1) found.push('the page');
  for (const table of article.querySelectorAll('table')) {
    if (shown(table) && table.offsetWidth > table.parentElement.clientWidth + 1)
      found.push('table: ' + table.innerText.slice(0, 60));
  }
  const edge = article.getBoundingClientRect().right;
  for (const part of article.querySelectorAll('img, svg, figure, pre, mjx-container, iframe')) {
    if (!shown(part) || part.closest('.msif-explorer')) continue;
    let frame = part;
    while (frame !== article && !scrolls(frame)) frame = frame.parentElement;
    if (frame === article && part.getBoundingClientRect().right > edge + 1)
      found.push(part.tagName + ': ' + (part.alt || part.innerText || '').slice(0, 60));
  }
  return found;
})()"""


def too_wide(browser: Browser, page: Path, width: int) -> list[str]:
    """What is wider than its frame, with everything unfolded."""
    browser.open(page, "light", width)
    unfold(browser)
    # Tables are fitted to their frames when these have been laid out.
    browser.evaluate("new Promise(done => setTimeout(done, 200))")
    found = browser.evaluate(TOO_WIDE)
    return [f"{page.name}, {width} pixels wide, too wide: {part}" for part in found]


def unfold(browser: Browser) -> None:
    """Open what is folded away, which would not be looked at."""
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")


def faults(browser: Browser, page: Path, theme: str, width: int = 1400) -> list[str]:
    """What axe finds in a page, one sentence for each rule that it breaks."""
    browser.open(page, theme, width)
    browser.evaluate(files("axe_core_python").joinpath("axe.min.js").read_text() + "; 0")
    # A colour on its way from one to another is no colour of the page.
    browser.evaluate(
        "document.head.append(Object.assign(document.createElement('style'),"
        " {textContent: '* {transition: none !important}'})); 0"
    )
    unfold(browser)
    found = browser.evaluate(
        f"axe.run({{exclude: {NOT_LOOKED_AT}}}, {{resultTypes: ['violations']}})"
        ".then(result => result.violations.map(rule => rule.id + ': ' + rule.nodes.slice(0, 3)"
        ".map(node => node.html.slice(0, 150)).join('  ')))"
    )
    return [f"{page.name}, {theme}, {width} pixels wide, {fault}" for fault in found]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    page = EVERYTHING.replace("{{boxes}}", BOXES).replace("{{wide}}", WIDE)
    root = sample_book(tmp_path_factory.mktemp("book"), page)
    return book.build(root, "default", "instructor")


def test_axe_finds_a_fault_where_there_is_one(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        '<html lang="en"><head><title>t</title></head><body><main><h1>One</h1><img src="a.png">'
        '<p style="color: #ccc; background: #fff">faint</p></main></body></html>'
    )
    with Browser() as browser:
        rules = {fault.split(", ")[-1].split(":")[0] for fault in faults(browser, page, "light")}
    assert {"image-alt", "color-contrast"} <= rules


def test_no_fault_in_a_page_with_one_of_everything(everything: Path) -> None:
    found = []
    with Browser() as browser:
        for page in (everything, everything.parent / "chapters" / "chapter.html"):
            for theme, width in (("light", 1400), ("dark", 1400), ("light", 390)):
                found += faults(browser, page, theme, width)
    assert not found, "\n".join(found)


def test_a_table_too_wide_for_its_frame_becomes_a_list(everything: Path) -> None:
    """By row, each value after its column's name; a screen reader still has a table."""
    with Browser() as browser:
        for width in (1400, 390):
            assert too_wide(browser, everything, width) == []
        table = browser.page.locator("table", has_text=COLUMNS[0])
        assert "stacked" in table.get_attribute("class")
        cell = table.locator("td").nth(3)
        before = "cell => getComputedStyle(cell, '::before').content"
        assert cell.evaluate(before) == f'"{COLUMNS[3]}"'
        assert cell.get_attribute("role") == "cell"
        narrow = browser.page.locator("table", has_text="a").first
        assert "stacked" not in narrow.get_attribute("class")
        # Without the scripts its frame scrolls.
        browser.evaluate("document.querySelector('table.stacked').classList.remove('stacked')")
        assert browser.evaluate(TOO_WIDE) == [f"table: {table.inner_text()[:60]}"]


def test_the_contents_beside_the_page_show_where_the_reader_is(everything: Path) -> None:
    with Browser() as browser:
        browser.open(everything)
        heading = browser.page.get_by_role("heading", name="A table and code")
        heading.scroll_into_view_if_needed()
        browser.page.mouse.wheel(0, 10_000)
        active = browser.page.locator(".bd-toc-nav .nav-link.active")
        active.first.wait_for()
        assert "Boxes" in active.all_inner_texts()


def test_no_fault_in_any_page_of_the_rendered_book() -> None:
    if "MSIF_CHECK_BOOK" not in os.environ:
        pytest.skip("MSIF_CHECK_BOOK is not set: looks at all pages that make book has rendered")
    folder = ROOT / book.HTML["reader"]
    assert (folder / "index.html").exists(), "make book first"
    found = []
    with Browser() as browser:
        for page in pages_of(folder):
            for theme in ("light", "dark"):
                found += faults(browser, page, theme)
            for width in (1400, 390):
                found += too_wide(browser, page, width)
    assert not found, "\n".join(found) + "\n(is the book older than its sources? make book)"


def test_the_book_is_printed_into_one_pdf(everything: Path) -> None:
    """All its pages in order, with bookmarks; no link leads to a file of this machine."""
    root = everything.parents[3]
    path = make_pdf(root, "instructor")
    assert path == root / "book" / "_build" / "instructor.pdf"
    printed = PdfReader(path)
    text = "\n".join(page.extract_text() for page in printed.pages)
    # What collapses on the screen is open on paper.
    for word in ("One of everything", "Thought.", "Second.", "kind dropdown", "qcode2", "qnote7"):
        assert word in text
    assert printed.outline[0].title == "One of everything"
    assert printed.pages[-1].extract_text().rstrip().endswith(str(len(printed.pages)))
    addresses = [
        str(note.get_object().get("/A", {}).get("/URI", ""))
        for page in printed.pages
        for note in page.get("/Annots", [])
    ]
    assert "https://example.org/" in addresses
    assert not [address for address in addresses if address.startswith("file:")]
