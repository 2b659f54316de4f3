"""The runner refuses wrong parameters, executes only what changed, and keeps failures to open."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nbformat
import psutil
import pytest

from msif_lib.study import book, copies, runner
from msif_lib.study.imports import imported_names
from msif_lib.study.runner import ProjectError

PARAMETERS = """\
removals: int = 20  # how many
alpha = 0.01
dataset = "digits"
solver: str | None = None
classes = [
    0,
    1,
]
"""


def write_notebook(path: Path, *cells: str, parameters: str = PARAMETERS) -> None:
    notebook = nbformat.v4.new_notebook()
    notebook.metadata.kernelspec = {
        "name": "python3",
        "language": "python",
        "display_name": "Python 3",
    }
    for number, source in enumerate((parameters, *cells)):
        cell = nbformat.v4.new_code_cell(source)
        cell.id = f"cell-{number}"
        notebook.cells.append(cell)
    notebook.cells[0].metadata["tags"] = ["parameters"]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


def write_profile(root: Path, text: str, name: str = "default") -> None:
    path = root / "notebooks" / "profiles" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def project(tmp_path):
    """A project with one experiment, one chapter and a library of one line."""
    write_notebook(
        tmp_path / "notebooks" / "experiment.ipynb", "import msif_lib; print('removals:', removals)"
    )
    write_notebook(tmp_path / "book" / "chapters" / "chapter.ipynb", "print(alpha)")
    write_profile(tmp_path, "experiment:\n  removals: 5\n")
    (tmp_path / "msif_lib").mkdir()
    (tmp_path / "msif_lib" / "__init__.py").write_text("VALUE = 1\n")
    return tmp_path


def refusal(project: Path, profile: str) -> str:
    write_profile(project, profile)
    with pytest.raises(ProjectError) as caught:
        runner.run(project)
    assert not (project / "build").exists(), "nothing may run before all parameters are checked"
    return str(caught.value)


def test_unknown_parameter_is_refused_by_name(project):
    message = refusal(project, "experiment:\n  removal: 5\n")
    assert "notebook experiment" in message
    assert "unknown parameter removal" in message
    assert "known: removals, alpha, dataset, solver, classes" in message


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("removals", "2.5", "must be int, but is 2.5 (float)"),
        ("removals", "true", "must be int, but is True (bool)"),
        ("removals", "null", "must be int, but is None (NoneType)"),
        ("dataset", "3", "must be str, but is 3 (int)"),
        ("solver", "3", "must be str or None, but is 3 (int)"),
        ("classes", "3", "must be list, but is 3 (int)"),
        ("alpha", "small", "must be float, but is 'small' (str)"),
    ],
)
def test_wrong_type_is_refused(project, name, value, expected):
    message = refusal(project, f"experiment:\n  {name}: {value}\n")
    assert f"notebook experiment: parameter {name}" in message
    assert expected in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alpha", 1),
        ("alpha", 1e-4),
        ("alpha", "1e-4"),
        ("solver", None),
        ("solver", "cg"),
        ("classes", [2, 3]),
    ],
)
def test_right_type_is_accepted(project, name, value):
    (notebook,) = runner.find_notebooks(project, ["experiment"])
    runner.check_profile(notebook, {name: value}, "default")


def test_unknown_notebook_and_profile_are_refused(project):
    assert "no notebook is called nothing" in refusal(project, "nothing:\n  a: 1\n")
    with pytest.raises(ProjectError, match="no notebook is called nothing; known: experiment"):
        runner.run(project, names=["nothing"])
    with pytest.raises(ProjectError, match="no profile is called tiny; known: default"):
        runner.run(project, profile="tiny")


def test_two_notebooks_of_one_name_are_refused(project):
    write_notebook(project / "book" / "chapters" / "experiment.ipynb")
    with pytest.raises(ProjectError, match="two notebooks are called experiment"):
        runner.find_notebooks(project)


def test_only_what_changed_is_executed(project, capfd):
    (outcome,) = runner.run(project, names=["experiment"])
    assert outcome.state == "executed"
    assert outcome.path == project / "build" / "default" / "executed" / "experiment.ipynb"
    executed = nbformat.read(outcome.path, as_version=4)
    texts = [output.text for cell in executed.cells[1:] for output in cell.get("outputs", [])]
    assert texts == ["removals: 5\n"]
    assert executed.metadata.msif.parameters == {"removals": 5}
    assert "papermill" not in executed.metadata
    assert str(project) not in outcome.path.read_text(encoding="utf-8")
    assert sorted(path.name for path in outcome.path.parent.iterdir()) == ["experiment.ipynb"]

    (again,) = runner.run(project, names=["experiment"])
    assert again.state == "unchanged"
    printed = capfd.readouterr().out
    assert "experiment           executed" in printed
    assert "experiment           unchanged" in printed

    # What follows asks only whether it would be executed again: that takes no time.
    notebook = outcome.notebook
    assert runner.is_current(project, "default", notebook, {"removals": 5})
    assert not runner.is_current(project, "default", notebook, {"removals": 6})
    assert not runner.is_current(project, "smoke", notebook, {"removals": 5})

    library = project / "msif_lib" / "__init__.py"
    library.write_text("VALUE = 2\n")
    assert not runner.is_current(project, "default", notebook, {"removals": 5})
    library.write_text("VALUE = 1\n")
    assert runner.is_current(project, "default", notebook, {"removals": 5})
    (project / "msif_lib" / "runner.py").write_text("# how notebooks are run\n")
    (project / "msif_lib" / "pages").mkdir()
    (project / "msif_lib" / "pages" / "status.py").write_text("# how pages are made\n")
    assert runner.is_current(project, "default", notebook, {"removals": 5})

    write_notebook(notebook.path, "print('other')")
    assert not runner.is_current(project, "default", notebook, {"removals": 5})


def test_declared_input_files_and_versions_count(project, monkeypatch):
    (notebook,) = runner.find_notebooks(project, ["experiment"])
    before = runner.cache_key(project, notebook, {})
    content = nbformat.read(notebook.path, as_version=4)
    content.metadata["msif"] = {"inputs": ["results/*.json"]}
    nbformat.write(content, notebook.path)
    assert runner.cache_key(project, notebook, {}) == before
    (project / "results").mkdir()
    (project / "results" / "record.json").write_text("{}")
    after = runner.cache_key(project, notebook, {})
    assert after != before
    monkeypatch.setattr(runner, "installed_version", lambda package: "0")
    assert runner.cache_key(project, notebook, {}) != after


# A chapter imports figures, figures imports style within a function, which is a package's module.
TREE = {
    "msif_lib/__init__.py": '"""The library."""\nfrom msif_lib.core import VALUE\n',
    "msif_lib/core.py": "VALUE = 1\n",
    "msif_lib/unused.py": "OTHER = 1\n",
    "msif_lib/hinted.py": "class Hint: ...\n",
    "msif_lib/study/__init__.py": "",
    "msif_lib/study/figures.py": """\
\"\"\"Figures.\"\"\"
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from msif_lib.hinted import Hint
WIDTH = 3  # inches
def draw():
    \"\"\"Draw.\"\"\"
    from msif_lib.study import style
    return style.colour()
""",
    "msif_lib/study/figures.css": "a { color: red }",
    "msif_lib/study/unused.css": "b { color: red }",
    "msif_lib/study/style/__init__.py": "from .colours import colour\n",
    "msif_lib/study/style/colours.py": "from ..names import NAME\ndef colour():\n    return NAME\n",
    "msif_lib/study/names.py": "NAME = 'blue'\n",
    "benchmarks/__init__.py": "",
    "benchmarks/tables.py": "import benchmarks.units\n",
    "benchmarks/units.py": "SECOND = 1\n",
    "benchmarks/measure.py": "import benchmarks.tables\n",
}
CELLS = ("import torch, msif_lib.study.figures", "def rows():\n    from benchmarks import tables")


@pytest.fixture
def tree(project):
    """The project with a library of several modules, and its chapter's key."""
    for name, text in TREE.items():
        path = project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    write_notebook(project / "book" / "chapters" / "chapter.ipynb", *CELLS)
    (notebook,) = runner.find_notebooks(project, ["chapter"])
    return project, lambda: runner.cache_key(project, notebook, {})


def test_a_notebook_depends_on_what_it_imports_however_far(tree):
    project, _ = tree
    (notebook,) = runner.find_notebooks(project, ["chapter"])
    found = {path.relative_to(project).as_posix() for path in runner.modules_of(project, notebook)}
    left_out = {
        "msif_lib/unused.py", "msif_lib/hinted.py", "benchmarks/measure.py",
        "msif_lib/study/figures.css", "msif_lib/study/unused.css",
    }  # fmt: skip
    assert found == set(TREE) - left_out


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("msif_lib/study/figures.py", "WIDTH = 3", "WIDTH = 4"),
        ("msif_lib/core.py", "VALUE = 1", "VALUE = 2"),  # by the package's __init__
        ("msif_lib/study/__init__.py", "", "import warnings\n"),
        ("msif_lib/study/style/__init__.py", "colour\n", "colour\nMORE = 1\n"),
        ("msif_lib/study/style/colours.py", "return NAME", "return NAME + ''"),
        ("msif_lib/study/names.py", "blue", "red"),  # a text that is no docstring
        ("msif_lib/study/figures.css", "red", "blue"),
        ("benchmarks/units.py", "SECOND = 1", "SECOND = 2"),
    ],
)
def test_changed_code_of_what_is_imported_counts(tree, name, old, new):
    project, key = tree
    before = key()
    text = (project / name).read_text()
    (project / name).write_text(text.replace(old, new, 1))
    assert key() != before
    (project / name).write_text(text)
    assert key() == before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("msif_lib/__init__.py", "The library.", "The library, reworded.\n\nAt length.\n"),
        (
            "msif_lib/study/figures.py",
            '"""Draw."""',
            '"""Draw a figure,\n\n    in colour.\n    """',
        ),
        ("msif_lib/study/figures.py", '    """Draw."""\n', ""),
        ("msif_lib/study/figures.py", "# inches", "# in inches"),
        ("msif_lib/study/figures.py", "WIDTH = 3", "\n\nWIDTH   =   3"),
        ("msif_lib/study/names.py", "'blue'\n", "'blue'\n'A colour.'\n"),
        ("msif_lib/hinted.py", "class Hint: ...", "class Hint:\n    x: int"),  # for mypy alone
        ("msif_lib/unused.py", "OTHER = 1", "OTHER = 2"),
        ("msif_lib/study/unused.css", "red", "blue"),
        ("benchmarks/measure.py", "tables", "units"),
    ],
)
def test_wording_and_what_is_not_imported_do_not_count(tree, name, old, new):
    project, key = tree
    before = key()
    text = (project / name).read_text()
    assert old in text
    (project / name).write_text(text.replace(old, new, 1))
    assert key() == before


def test_a_module_that_comes_or_goes_counts(tree):
    project, key = tree
    before = key()
    (project / "msif_lib" / "more.py").write_text("")
    assert key() == before
    (project / "msif_lib" / "core.py").rename(project / "msif_lib" / "kernel.py")
    assert key() != before


def test_a_cell_with_a_magic_may_import_anything(tree):
    project, key = tree
    write_notebook(project / "book" / "chapters" / "chapter.ipynb", "%run something")
    before = key()
    for name in ("msif_lib/unused.py", "benchmarks/measure.py"):
        (project / name).write_text("CHANGED = 1\n")
        assert key() != before
        before = key()
    (project / "msif_lib" / "unused.py").write_text("CHANGED = 1  # a comment\n")
    assert key() == before
    # Nor does a module keep the runner from its work; executing the notebook shows the mistake.
    (project / "msif_lib" / "unused.py").write_text("CHANGED = \n")
    assert key() != before


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import a.b as c, d", {"a.b", "d"}),
        ("from a import b, c", {"a", "a.b", "a.c"}),
        ("from a import *", {"a", "a.*"}),
        ("from . import b", {"top.inner", "top.inner.b"}),
        ("from ..b import c", {"top.b", "top.b.c"}),
        ("try:\n    import a\nexcept ImportError:\n    import b", {"a", "b"}),
        ("class A:\n    def f(self):\n        import a", {"a"}),
        ("if TYPE_CHECKING:\n    import a\nelse:\n    import b", {"b"}),
        ("import typing\nif typing.TYPE_CHECKING:\n    import a", {"typing"}),
        ("if not TYPE_CHECKING:\n    import a", {"a"}),
        ("'import a'  # import b", set()),
    ],
)
def test_imports_are_read_from_the_text(source, names):
    assert imported_names(source, "top.inner") == names


def test_a_star_stands_for_every_module_of_the_package(tree):
    project, key = tree
    write_notebook(project / "book" / "chapters" / "chapter.ipynb", "from benchmarks import *")
    before = key()
    (project / "benchmarks" / "measure.py").write_text("CHANGED = 1\n")
    assert key() != before


def test_failing_notebook_is_left_to_open(project):
    target = project / "build" / "default" / "executed" / "experiment.ipynb"
    target.parent.mkdir(parents=True)
    target.write_text("the last good copy", encoding="utf-8")
    write_notebook(
        project / "notebooks" / "experiment.ipynb", "x = 1", "raise ValueError('no such digit')"
    )
    command = [sys.executable, "-m", "msif_lib.study.runner", "--root", str(project), "experiment"]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1]
    )
    assert result.returncode == 1
    assert "FAILED" in result.stdout
    failed = target.with_name("experiment.failed.ipynb")
    assert str(failed) in result.stderr
    assert "raised ValueError: no such digit" in result.stderr
    outputs = [
        output.output_type
        for cell in nbformat.read(failed, as_version=4).cells
        for output in cell.get("outputs", [])
    ]
    assert "error" in outputs
    assert target.read_text(encoding="utf-8") == "the last good copy"


def as_executed(root: Path, name: str, parameters: dict, outputs: list | None = None) -> None:
    """Put an executed copy in place without executing anything."""
    (notebook,) = runner.find_notebooks(root, [name])
    content = notebook.read()
    content.metadata["msif"] = {"key": runner.cache_key(root, notebook, parameters)}
    content.cells[-1].outputs = outputs or []
    copies.put(runner.executed_path(root, "default", notebook), copies.sealed(content))


def test_book_is_assembled_from_current_copies_only(project):
    with pytest.raises(ProjectError, match="notebook experiment is not executed in its present"):
        book.assemble(project, "default")
    as_executed(project, "experiment", {"removals": 5})
    as_executed(project, "chapter", {})
    tree = book.assemble(project, "default")
    for page in ("experiments/experiment.ipynb", "chapters/chapter.ipynb"):
        shown = json.loads((tree / page).read_text(encoding="utf-8"))
        assert "key" in shown["metadata"]["msif"]


def test_book_refuses_a_notebook_that_shows_an_error(project):
    as_executed(project, "experiment", {"removals": 5})
    error = nbformat.v4.new_output("error", ename="ValueError", evalue="bad", traceback=[])
    as_executed(project, "chapter", {}, [error])
    with pytest.raises(ProjectError, match="notebook chapter, cell cell-1 shows ValueError: bad"):
        book.assemble(project, "default")


def test_records_are_written_and_then_read_by_the_notebook_that_adds_up(project):
    """Their notebook runs last, whatever its name, and again when a record has changed."""
    folder = project / "notebooks"
    write_notebook(
        folder / "experiment.ipynb",
        "import pathlib; path = pathlib.Path(record); path.parent.mkdir(exist_ok=True)",
        "path.write_text(str(removals))",
        parameters='record = ""\nremovals: int = 20',
    )
    write_notebook(
        folder / "adding_up.ipynb",
        "import pathlib; print([path.read_text() for path in pathlib.Path(records).glob('*')])",
        parameters='records = ""',
    )
    (project / "book" / "chapters" / "chapter.ipynb").unlink()
    record = project / "build" / "default" / "records" / "experiment.json"

    def states() -> dict[str, str]:
        return {one.notebook.name: one.state for one in runner.run(project)}

    assert states() == {"experiment": "executed", "adding_up": "executed"}
    assert record.read_text() == "5"
    executed = nbformat.read(project / "build/default/executed/adding_up.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0].text == "['5']\n"
    assert states() == {"experiment": "unchanged", "adding_up": "unchanged"}
    record.unlink()
    assert states() == {"experiment": "executed", "adding_up": "unchanged"}
    write_profile(project, "experiment:\n  removals: 6\n")
    assert states() == {"experiment": "executed", "adding_up": "executed"}
    # A record that the profile puts elsewhere, among the notebook's own inputs.
    write_profile(project, "experiment:\n  record: ../results.json\n")
    assert states() == {"experiment": "executed", "adding_up": "unchanged"}
    assert (project / "results.json").read_text() == "20"
    assert states() == {"experiment": "unchanged", "adding_up": "unchanged"}


# --- places ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["../../other", "../profiles/default", "", ".", "/etc/passwd"])
def test_a_profile_is_one_of_the_projects(project, profile):
    (project.parent / "other.yaml").write_text("{}")
    for work in (runner.run, book.build):
        with pytest.raises(ProjectError, match=f"no profile is called {profile}; known: default"):
            work(project, profile)
    assert not (project / "build").exists()


@pytest.mark.parametrize("name", ["record", "records", "checkpoint"])
@pytest.mark.parametrize("place", ["../../outside.json", "/outside.json", "../link/outside.json"])
def test_a_run_writes_within_the_project(project, name, place):
    (project / "link").symlink_to(project.parent)
    write_notebook(project / "notebooks" / "experiment.ipynb", parameters=f'{name} = ""')
    message = refusal(project, f"experiment:\n  {name}: {place}\n")
    assert f"notebook experiment: {name} must lie within the project, but is {place}" in message


def test_a_record_writes_over_no_source(project):
    write_notebook(project / "notebooks" / "experiment.ipynb", parameters='record = ""')
    message = refusal(project, "experiment:\n  record: experiment.ipynb\n")
    assert "record must end with .json, but is experiment.ipynb" in message


@pytest.mark.parametrize("pattern", ["../*.json", "results/../../*", "/etc/*"])
def test_inputs_lie_within_the_project(project, pattern):
    (notebook,) = runner.find_notebooks(project, ["experiment"])
    content = notebook.read()
    content.metadata["msif"] = {"inputs": [pattern]}
    nbformat.write(content, notebook.path)
    with pytest.raises(ProjectError, match=r"notebook experiment: msif\.inputs names"):
        runner.cache_key(project, notebook, {})


@pytest.mark.parametrize("spoiled", ["build", "build/default", "build/default/records"])
def test_a_folder_that_cannot_be_written_into_is_named_before_the_work(project, spoiled, capfd):
    recording(project)
    (project / spoiled).parent.mkdir(parents=True, exist_ok=True)
    (project / spoiled).write_text("")
    with pytest.raises(
        ProjectError, match=rf"{spoiled}\S* cannot be written \(.*a folder that you"
    ):
        runner.run(project)
    assert "running" not in capfd.readouterr().out


def test_at_least_one_notebook_runs_at_once(project):
    with pytest.raises(ProjectError, match="jobs must be 1 or more, but is 0"):
        runner.run(project, jobs=0)
    assert not (project / "build").exists()


@pytest.mark.parametrize("jobs", ["0", "-1", "abc", "", "1.5", "²"])
def test_jobs_on_the_command_line_are_a_number(jobs, capsys):
    with pytest.raises(SystemExit):
        runner.main([f"--jobs={jobs}"])
    assert f"--jobs: must be a number, 1 or more, but is {jobs!r}" in capsys.readouterr().err


def test_windows_is_told_what_is_supported(project, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(ProjectError, match="on Windows use WSL"):
        runner.run(project)


# --- what is kept ---------------------------------------------------------------------------------

RECORDING = "_ = open(record, 'w').write(str(removals)); print(record)"


def recording(project: Path) -> Path:
    """The project with an experiment that leaves a record, and where that is."""
    write_notebook(
        project / "notebooks" / "experiment.ipynb",
        RECORDING,
        parameters='record = ""\nremovals: int = 20',
    )
    return project / "build" / "default" / "records" / "experiment.json"


SPOILED = {
    "missing": None,
    "empty": lambda text: b"",
    "half": lambda text: text[: len(text) // 2],
    "last byte": lambda text: text[:-2],
    "zeros": lambda text: bytes(len(text)),
    "zeros at the end": lambda text: text[: len(text) // 2] + bytes(len(text) - len(text) // 2),
    "first bit": lambda text: bytes([text[0] ^ 1]) + text[1:],
    "middle bit": lambda text: text.replace(b"5", b"4", 1),
    "more": lambda text: text + b"{}",
    "no text": lambda text: b"\xff\xfe" + text,
    "another": lambda text: b"[1]",
}


def test_spoiled_copies_and_records_are_made_anew(project):
    record = recording(project)
    (outcome,) = runner.run(project, names=["experiment"])
    assert outcome.state == "executed", outcome.error
    assert record.read_text() == "5"
    # The book shows the record's place, not where the run put it.
    copy = json.loads(outcome.path.read_text(encoding="utf-8"))
    assert copy["cells"][-1]["outputs"][0]["text"] == ["../build/default/records/experiment.json\n"]
    assert "/runs/" not in outcome.path.read_text(encoding="utf-8")

    notebook = outcome.notebook
    parameters = runner.parameters_of(notebook, {"experiment": {"removals": 5}}, "default")
    for path in (outcome.path, record):
        good = path.read_bytes()
        for name, spoil in SPOILED.items():
            path.unlink(missing_ok=True)
            if spoil is not None:
                path.write_bytes(spoil(good))
            assert not runner.is_current(project, "default", notebook, parameters), (path, name)
        path.write_bytes(good)
        assert runner.is_current(project, "default", notebook, parameters)

    record.write_text("6")
    outcome.path.write_bytes(outcome.path.read_bytes()[:100])
    (again,) = runner.run(project, names=["experiment"])
    assert (again.state, record.read_text()) == ("executed", "5")


def test_records_of_nobody_are_not_read(project):
    recording(project)
    write_notebook(
        project / "notebooks" / "adding_up.ipynb", "print(records)", parameters='records = ""'
    )
    runner.run(project, names=["experiment"])
    record = project / "build" / "default" / "records" / "experiment.json"
    record.write_text("6")
    (outcome,) = runner.run(project, names=["adding_up"])
    assert outcome.state == "failed"
    assert "experiment.json is not what a notebook left there" in outcome.error
    states = {one.notebook.name: one.state for one in runner.run(project)}
    assert states["adding_up"] == states["experiment"] == "executed"


def test_a_notebook_that_leaves_no_record_fails(project):
    write_notebook(project / "notebooks" / "experiment.ipynb", "1", parameters='record = ""')
    write_profile(project, "")
    (outcome,) = runner.run(project, names=["experiment"])
    assert (outcome.state, outcome.error[:18]) == ("failed", "it wrote no record")


def test_a_full_disk_is_said(project):
    """Here by the limit that a process may set on the size of files, which ends in the same way."""
    write_notebook(
        project / "notebooks" / "experiment.ipynb",
        "print('x' * 5_000_000)",
        RECORDING,
        parameters='record = ""\nremovals: int = 20',
    )
    result = subprocess.run(
        ["sh", "-c", 'ulimit -f 4000; exec "$@"', "sh", *command_of(project), "experiment"],
        cwd=runner.ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "notebook experiment failed: " in result.stderr
    assert "File too large" in result.stderr
    assert not (project / "build" / "default" / "records" / "experiment.json").exists()
    assert not (project / "build" / "default" / "executed" / "experiment.ipynb").exists()


def test_two_runners_at_once_do_the_work_once(project):
    record = recording(project)
    both = [start(project, 5, "experiment") for _ in range(2)]
    printed = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert sorted("unchanged" in text for text in printed) == [False, True]
    assert record.read_text() == "5"


# --- runs that are killed -------------------------------------------------------------------------

# Says that it is there, has a worker of its own, and writes its record when it may.
SLOW = (
    "import os, pathlib, time, joblib\n"
    "import msif_lib\n"
    "def tell(number):\n"
    "    (pathlib.Path('..') / f'there-{number}').write_text(str(os.getpid()))\n"
    "    while number and not pathlib.Path('../go').exists():\n"
    "        time.sleep(0.01)\n"
    "tell(0)",
    "_ = joblib.Parallel(n_jobs=2)(joblib.delayed(tell)(number) for number in (1, 2))",
    "_ = pathlib.Path(record).write_text(f'{removals} ' * 1000)",
)


@pytest.fixture
def slow(tmp_path):
    """A project whose one notebook works until it may end, and leaves a record."""
    write_notebook(
        tmp_path / "notebooks" / "slow.ipynb", *SLOW, parameters='record = ""\nremovals: int = 1'
    )
    (tmp_path / "msif_lib").mkdir()
    (tmp_path / "msif_lib" / "__init__.py").write_text("")
    (tmp_path / "go").write_text("")
    return tmp_path


def command_of(project: Path) -> list[str]:
    return [sys.executable, "-m", "msif_lib.study.runner", "--root", str(project)]


def start(project: Path, removals: int, name: str = "slow") -> subprocess.Popen:
    write_profile(project, f"{name}:\n  removals: {removals}\n")
    return subprocess.Popen(
        [*command_of(project), name],
        cwd=runner.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A suite that was put into the background ignores interrupts, and so would its children.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def alive(project: Path) -> list[int]:
    """The processes that work for a project: runner, papermill, kernels and their workers."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), *process.environ().values()]
        except psutil.Error:
            continue
        if any(str(project) in word for word in words):
            found.append(process.pid)
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def check_whole(project: Path, removals: int) -> None:
    """What lies there is of one run, and counts as current only if it is of the last one."""
    (notebook,) = runner.find_notebooks(project)
    parameters = runner.parameters_of(notebook, runner.read_profile(project, "default"), "default")
    record = project / "build" / "default" / "records" / "slow.json"
    if record.exists():
        (one,) = set(record.read_text().split())
        assert record.read_text() == f"{one} " * 1000
    if runner.is_current(project, "default", notebook, parameters):
        assert record.read_text() == f"{removals} " * 1000


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_ends_with_its_runner(slow, how):
    (slow / "go").unlink()
    first = start(slow, removals=1)
    wait_for(lambda: all((slow / f"there-{number}").exists() for number in (0, 1, 2)))
    assert len(alive(slow)) >= 5  # the runner, papermill, the kernel, its two workers
    first.send_signal(how)
    first.wait(60)
    assert "FAILED" not in first.stdout.read()
    wait_for(lambda: not alive(slow))
    check_whole(slow, removals=1)
    assert not list((slow / "build" / "default" / "records").iterdir())


@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_kills_at_any_instant_lose_nothing(slow, kills):
    draw = random.Random(0)
    for number in range(1, kills + 1):
        process = start(slow, number)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(draw.uniform(2, 8))
            raise subprocess.TimeoutExpired("it had ended already", 0)
        process.kill()
        process.wait()
        wait_for(lambda: not alive(slow))
        check_whole(slow, number)
    process = start(slow, kills)
    assert process.wait() == 0, process.stderr.read()
    record = slow / "build" / "default" / "records" / "slow.json"
    assert record.read_text() == f"{kills} " * 1000
    assert not list((slow / "build" / "default" / "runs").iterdir())
