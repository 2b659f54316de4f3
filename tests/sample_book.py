"""A small book with the frame of the real one, for tests of how pages are made."""

from __future__ import annotations

import shutil
from pathlib import Path

import nbformat
import yaml
from test_runner import write_profile

from msif_lib.study import copies, runner
from msif_lib.study.runner import ROOT

# Words that stand nowhere else, one in each place where a solution or a note can hide.
SOLUTIONS = ["qmarkdown1", "qcode2", "qoutput3", "qpage4", "qpage5", "quntagged6"]
NOTES = ["qnote7", "qnote8"]


def cells_of_a_chapter() -> list[nbformat.NotebookNode]:
    markdown, code = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    cells = [
        markdown("(chapter)=\n# A chapter\n\nSee {ref}`the exercise <ch-exercise-one>`."),
        code("limit = 3  # how far to count", metadata={"tags": ["parameters"]}),
        markdown("```{exercise} By code: count\n:label: ch-exercise-one\n\nCount to three.\n```"),
        code("def count():\n    ...", metadata={"tags": ["exercise"]}),
        markdown(
            "```{solution} ch-exercise-one\n:class: dropdown\n\nqmarkdown1\n```",
            metadata={"tags": ["solution"]},
        ),
        code("print('qcode2')", metadata={"tags": ["solution", "hide-cell"]}),
        markdown(
            "```{admonition} Teaching note\n:class: teaching-note dropdown\nqnote7\n```",
            metadata={"tags": ["teaching"]},
        ),
        markdown("Before.\n\n::::{solution} ch-exercise-one\n:class: dropdown\nquntagged6\n::::\n"),
    ]
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"
    cells[5].outputs = [nbformat.v4.new_output("stream", name="stdout", text="qoutput3\n")]
    return cells


PAGE = """\
# The first page

:::{exercise} By hand: think
:label: index-exercise
Think.
:::

:::::{solution} index-exercise
:class: dropdown
```python
qpage4 = 1
```
::::{tip}
qpage5
::::
:::::

~~~{admonition} Teaching note: time
:class: teaching-note dropdown
qnote8
~~~

The end, and a page with the [chapter](chapters/chapter.ipynb).
"""


def put(root: Path, cells: list[nbformat.NotebookNode]) -> None:
    """Write the chapter's source and, with its outputs, the executed copy."""
    content = nbformat.v4.new_notebook(cells=cells)
    content.metadata.kernelspec = {
        "name": "python3",
        "language": "python",
        "display_name": "Python 3",
    }
    source = root / "book" / "chapters" / "chapter.ipynb"
    outputs = {cell.id: cell.pop("outputs", None) for cell in cells}
    for cell in cells:
        if cell.cell_type == "code":
            cell.outputs = []
    nbformat.write(content, source)
    write_profile(root, "chapter:\n  limit: 4\n")
    (notebook,) = runner.find_notebooks(root)
    key = runner.cache_key(root, notebook, {"limit": 4})
    content.metadata["msif"] = {"key": key, "parameters": {"limit": 4}, "seconds": 1.5}
    for cell in content.cells:
        if outputs[cell.id]:
            cell.outputs = outputs[cell.id]
    copies.put(runner.executed_path(root, "default", notebook), copies.sealed(content))


def sample_book(root: Path, page: str = PAGE) -> Path:
    """Write the book's own frame around one page and one chapter, as executed; return the root."""
    folder = root / "book"
    (folder / "chapters").mkdir(parents=True)
    for name in ("_config.yml", "_static", "_templates"):
        source = ROOT / "book" / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, folder / name)
    (folder / "references.bib").write_text("")
    (folder / "index.md").write_text(page)
    contents = {
        "format": "jb-book",
        "root": "index",
        "chapters": [{"file": "chapters/chapter"}, {"file": "status"}],
    }
    (folder / "_toc.yml").write_text(yaml.safe_dump(contents))
    put(root, cells_of_a_chapter())
    return root
