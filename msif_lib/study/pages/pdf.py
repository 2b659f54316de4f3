"""One PDF of the whole rendered book, printed by Chromium page after page.

Run it as ``python -m msif_lib.study.pages.pdf --edition reader``, after the book was rendered.

Each page is printed as a reader's browser would print it, with the print rules of
``book/_static/custom.css``. The parts are joined in the order of the table of contents, with
bookmarks and page numbers; a link from one page to another leads to that page of the PDF.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import yaml
from pypdf import PdfReader, PdfWriter
from pypdf.generic import ArrayObject, DictionaryObject, NameObject

from msif_lib.study.book import HTML
from msif_lib.study.pages.browser import Browser
from msif_lib.study.pages.editions import left_out
from msif_lib.study.runner import ROOT, ProjectError

# With room for the page number.
_PAPER: dict[str, Any] = {
    "format": "A4",
    "margin": {"top": "0.7in", "bottom": "0.8in", "left": "0.65in", "right": "0.65in"},
    "print_background": True,
}
_NUMBER = (
    '<div style="width: 100%; text-align: center; font: 9px sans-serif; color: #444">'
    '<span class="pageNumber"></span></div>'
)


def table_of_contents(root: Path) -> list[tuple[str, str]]:
    """Return the book's pages in order, each with the part that it belongs to.

    Parameters
    ----------
    root
        The project's root.

    Returns
    -------
    list of (str, str)
        A part's caption, empty for the first page, and a page's name without its ending.
    """
    toc = yaml.safe_load((root / "book" / "_toc.yml").read_text(encoding="utf-8"))
    pages = [("", str(toc["root"]))]
    for part in toc.get("parts", [{"chapters": toc.get("chapters", [])}]):
        for chapter in part["chapters"]:
            for page in (chapter, *chapter.get("sections", [])):
                pages.append((str(part.get("caption", "")), str(page["file"])))
    return pages


def _number_pages(browser: Browser, count: int, folder: Path) -> PdfReader:
    """Return as many empty pages, with nothing but their numbers."""
    blank = folder / "numbers.html"
    page = '<div style="break-after: page">&nbsp;</div>'
    blank.write_text(f"<html><body>{page * (count - 1)}<div>&nbsp;</div></body></html>")
    browser.open(blank)
    browser.page.pdf(
        path=folder / "numbers.pdf",
        display_header_footer=True,
        header_template="<span></span>",
        footer_template=_NUMBER,
        **_PAPER,
    )
    return PdfReader(folder / "numbers.pdf")


def _mend_links(writer: PdfWriter, first: dict[Path, int]) -> None:
    """Lead links from one page of the book to another to that page of the PDF.

    Chromium writes them as files of this machine; those that lead to no page are taken out.
    """
    for page in writer.pages:
        kept = ArrayObject()
        for reference in page.get("/Annots") or []:
            annotation = reference.get_object()
            address = urlparse(str(annotation.get("/A", {}).get("/URI", "")))
            if address.scheme == "file":
                target = Path(unquote(address.path))
                if target not in first:
                    continue
                place = [writer.pages[first[target]].indirect_reference, NameObject("/Fit")]
                annotation[NameObject("/A")] = DictionaryObject(
                    {NameObject("/S"): NameObject("/GoTo"), NameObject("/D"): ArrayObject(place)}
                )
            kept.append(reference)
        if "/Annots" in page:
            page[NameObject("/Annots")] = kept


def make_pdf(root: Path = ROOT, edition: str = "reader") -> Path:
    """Print the rendered book and return the PDF.

    Parameters
    ----------
    root
        The project's root.
    edition
        ``reader``, ``student`` or ``instructor``.

    Raises
    ------
    ProjectError
        If that edition has not been rendered, or there is no Chromium.
    """
    left_out(edition)
    html = (root / HTML[edition]).resolve()
    if not (html / "index.html").exists():
        raise ProjectError(f"the book is not rendered; run make book EDITION={edition}")
    writer = PdfWriter()
    first: dict[Path, int] = {}
    headings = {}
    with Browser() as browser, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, page in table_of_contents(root):
            source = html / f"{page}.html"
            browser.open(source)
            title = str(browser.evaluate("document.querySelector('article h1').innerText"))
            # Boxes and folded cells that no print rule reaches.
            browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true); 0")
            printed = folder / "page.pdf"
            browser.page.pdf(path=printed, **_PAPER)
            reader = PdfReader(io.BytesIO(printed.read_bytes()))
            first[source] = len(writer.pages)
            writer.append(reader, import_outline=False)
            if part and part not in headings:
                headings[part] = writer.add_outline_item(title=part, page_number=first[source])
            writer.add_outline_item(
                title=title.replace("#", "").strip(),
                page_number=first[source],
                parent=headings.get(part),
            )
            print(f"  {page:<30} {len(reader.pages):4d} pages", flush=True)
        numbers = _number_pages(browser, len(writer.pages), folder)
        for number, stamp in zip(writer.pages, numbers.pages, strict=True):
            number.merge_page(stamp)
    _mend_links(writer, first)
    writer.compress_identical_objects()
    title = yaml.safe_load((root / "book" / "_config.yml").read_text(encoding="utf-8"))["title"]
    writer.add_metadata({"/Title": title})
    target = html.parent / f"{edition}.pdf"
    unfinished = target.with_suffix(".part")
    writer.write(unfinished)
    unfinished.replace(target)
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Parameters
    ----------
    arguments
        The command line without the program's name; by default this process's.
    """
    parser = argparse.ArgumentParser(
        prog="python -m msif_lib.study.pages.pdf", description="Print the rendered book."
    )
    parser.add_argument("--edition", default="reader", help=", ".join(HTML))
    parser.add_argument("--check", action="store_true", help="only whether there is a Chromium")
    options = parser.parse_args(arguments)
    try:
        if options.check:
            Browser().close()
            return 0
        path = make_pdf(edition=options.edition)
    except ProjectError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"The book is at {path.as_uri()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
