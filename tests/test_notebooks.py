"""Every notebook runs with the smallest parameters, whichever are given."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from msif_lib.study.book import _save_glued_figures
from msif_lib.study.pages.checks import refuse_debris
from msif_lib.study.runner import ROOT, executed_path, find_notebooks, run

# The notebooks run once, in one worker.
pytestmark = pytest.mark.xdist_group("notebooks")

NAMES = [notebook.name for notebook in find_notebooks(ROOT)]
PAGES = sorted([*ROOT.glob("book/**/*.ipynb"), *ROOT.glob("notebooks/*.ipynb")])
PAGES = [page for page in PAGES if "_build" not in page.parts]


@pytest.fixture(scope="module")
def executed() -> dict[str, Path]:
    """All notebooks of the smoke profile, executed where they are not already."""
    outcomes = run(ROOT, "smoke", jobs=2)
    failed = {outcome.notebook.name: outcome.error for outcome in outcomes if outcome.error}
    assert not failed, failed
    return {nb.name: executed_path(ROOT, "smoke", nb) for nb in find_notebooks(ROOT)}


def test_every_notebook_runs_without_error_or_warning(executed: dict[str, Path]) -> None:
    assert set(executed) == set(NAMES)
    for name, path in executed.items():
        refuse_debris(nbformat.read(path, as_version=4), name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_line_of_prose_is_lost_to_a_comment(page: Path) -> None:
    """MyST drops a line that begins with a percent sign; none of these pages has a comment."""
    for cell in nbformat.read(page, as_version=4).cells:
        if cell.cell_type == "markdown":
            lost = [line for line in cell.source.splitlines() if line.lstrip().startswith("%")]
            assert not lost, (cell.id, lost)


def test_no_cell_of_an_experiment_is_too_long_to_be_read() -> None:
    found = {
        path.stem: [
            cell.id
            for cell in nbformat.read(path, as_version=4).cells
            if cell.cell_type == "code" and len(cell.source.splitlines()) > 40
        ]
        for path in (ROOT / "notebooks").glob("*.ipynb")
    }
    assert {name: cells for name, cells in found.items() if cells} == {}


def test_every_figure_says_what_it_shows(executed: dict[str, Path]) -> None:
    for name, path in executed.items():
        for cell in nbformat.read(path, as_version=4).cells:
            shown = [
                output
                for output in cell.get("outputs", [])
                if "image/png" in output.get("data", {}) and "scrapbook" not in output.metadata
            ]
            if shown:
                alternative = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
                assert len(alternative) > 20, (name, cell.id)


def test_the_headline_figure_is_saved_for_the_landing_page(
    executed: dict[str, Path], tmp_path: Path
) -> None:
    content = nbformat.read(executed["correlation"], as_version=4)
    _save_glued_figures(content, "correlation", tmp_path)
    assert (tmp_path / "correlation-headline.png").read_bytes().startswith(b"\x89PNG")
