"""Wrong parameters are refused in a notebook's first cell, with name, value and mend, before work.

Only the cells up to that check are executed, in this process, as IPython would: with the history
of cells that papermill's cell of given values is read from.
"""

from __future__ import annotations

import ast
import errno
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import nbformat
import pytest
import yaml
from papermill import inspect_notebook
from papermill.cli import _resolve_type
from papermill.translators import PythonTranslator

from msif_lib.study import parameters, runner
from msif_lib.study.parameters import (
    EVERYWHERE,
    Parameter,
    Parameters,
    check_parameters,
    declared,
    type_fault,
    unknown_fault,
)
from msif_lib.study.records import read_record
from msif_lib.study.runner import (
    ROOT,
    Notebook,
    ProjectError,
    declared_parameters,
    find_notebooks,
    read_profile,
)

NOTEBOOKS = {
    notebook.name: notebook for notebook in find_notebooks(ROOT) if declared_parameters(notebook)
}


def code_of(notebook: Notebook) -> list[str]:
    """The cells of code; one of imports alone, after the parameters, with the one that follows."""
    first, second, *rest = (
        cell.source for cell in notebook.read().cells if cell.cell_type == "code"
    )
    if all(isinstance(one, ast.Import | ast.ImportFrom) for one in ast.parse(second).body):
        second, *rest = f"{second}\n{rest[0]}", *rest[1:]
    return [first, second, *rest]


def opened(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Execute a notebook's parameters, what papermill puts in, and its first cell of code."""
    first, check, *_ = code_of(NOTEBOOKS[name])
    injected = [PythonTranslator.codify(given, "Parameters")] if given else []
    cells = [first, *injected, check]
    namespace: dict[str, Any] = {"__name__": "__main__", "In": [""]}
    with warnings.catch_warnings(), matplotlib.rc_context():
        for cell in cells:
            namespace["In"].append(cell)
            exec(cell, namespace)
    return namespace


def refusal(name: str, given: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as caught:
        opened(name, given)
    return str(caught.value)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records and checkpoints of the cells are written here, if anywhere."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", NOTEBOOKS)
@pytest.mark.parametrize("profile", ["default", "smoke"])
def test_defaults_and_profiles_are_let_in(name: str, profile: str) -> None:
    namespace = opened(name, read_profile(ROOT, profile).get(name, {}))
    assert all(parameter in namespace for parameter in declared_parameters(NOTEBOOKS[name]))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_papermill_knows_the_same_parameters(name: str) -> None:
    """Of any other it says that it was passed an unknown one."""
    notebook = NOTEBOOKS[name]
    assert list(inspect_notebook(notebook.path)) == list(declared_parameters(notebook))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_check_comes_before_any_other_work(name: str) -> None:
    """In the first cell, after imports and definitions alone."""
    for statement in ast.parse(code_of(NOTEBOOKS[name])[1]).body:
        text = ast.unparse(statement)
        if text.removeprefix("given = ").startswith("check_parameters(globals()"):
            return
        assert isinstance(statement, ast.Import | ast.ImportFrom | ast.FunctionDef) or (
            text == "figures.use_style()"
        )
    raise AssertionError("no check")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_parameters_cell_is_found_again_among_all_cells(name: str) -> None:
    """A reader executes the check again when all other cells are in the history already."""
    cells = code_of(NOTEBOOKS[name])
    own = ["removals = 3", "# Parameters\nnothing = 1\n", *cells, "x = 1\ny = 2\nz = 3"]
    call, *_ = (
        node.value
        for node in ast.parse(cells[1]).body
        if ast.unparse(node).removeprefix("given = ").startswith("check_parameters(")
    )
    used = {name for one in call.args[1:] for name in parameters._names(one.value)}
    known, injected = parameters._cells(["", *own], used)
    assert known == declared_parameters(NOTEBOOKS[name])
    assert list(injected) == ["nothing"]


def p(value: str) -> Any:
    """What papermill makes of a value after ``-p NAME``."""
    return _resolve_type(value)


def y(value: str) -> Any:
    """What papermill makes of a value in ``-y 'NAME: value'``."""
    return yaml.safe_load(value)


PLENTY = "asks for 5000 examples of the classes"
WRONG = [
    # Names that nobody declared.
    ("correlation", {"removal": p("50")}, "unknown parameter removal; did you mean removals?"),
    ("explorer", {"sede": 1}, "unknown parameter sede; did you mean seed?"),
    ("scale", {"dossier": "x"}, "unknown parameter dossier; known: folder"),
    ("leverage", {"seeds": [1]}, "unknown parameter seeds; did you mean seed?"),
    # Types, as papermill and YAML make them.
    (
        "correlation",
        {"renormalise": p("never")},
        "parameter renormalise must be bool, but is 'never' (str); "
        "write -p renormalise True or -p renormalise False, in YAML true or false",
    ),
    ("correlation", {"renormalise": p("0")}, "parameter renormalise must be bool, but is 0 (int)"),
    ("nlp", {"smooth": p("0.0")}, "parameter smooth must be bool, but is 0.0 (float)"),
    (
        "correlation",
        {"solver_tol": p("tiny")},
        "parameter solver_tol must be float, but is 'tiny' (str)",
    ),
    (
        "correlation",
        {"solver_tol": y("1e-6x")},
        "parameter solver_tol must be float, but is '1e-6x' (str)",
    ),
    (
        "nlp",
        {"dampings": y("[0.1, low]")},
        "parameter dampings must be list[float], but is [0.1, 'low']",
    ),
    (
        "cleansing",
        {"seeds": p("5")},
        "parameter seeds must be list, but is 5 (int); write a list, such as -y 'seeds: [...]'",
    ),
    ("similarity", {"tasks": p("[[0, 1]")}, "write a list, such as -y 'tasks: [...]'"),
    ("similarity", {"tasks": y("[2, 3]")}, "parameter tasks must be list[list[int]]"),
    ("explorer", {"widths": y("[2, 4.5]")}, "parameter widths must be list[int]"),
    ("misclassified", {"ends": p("5.0")}, "must be int, but is 5.0 (float); write 5"),
    (
        "misclassified",
        {"neighbours": "ten"},
        "parameter neighbours must be int, but is 'ten' (str)",
    ),
    ("misclassified", {"neighbours": "-1"}, "neighbours must not be negative, but is -1"),
    ("misclassified", {"pretrain_size": "None or 5"}, "must be int or None, but is 'None or 5'"),
    ("misclassified", {"pretrain_size": p("all")}, "must be int or None, but is 'all' (str)"),
    ("misclassified", {"record": p("None")}, "parameter record must be str, but is None"),
    ("finetune_size", {"factor": True}, "parameter factor must be int, but is True (bool)"),
    ("steps", {"hidden": y("eight")}, "parameter hidden must be int, but is 'eight' (str)"),
    ("nlp", {"size": p("3")}, "parameter size must be dict or str, but is 3 (int)"),
    # Numbers.
    ("correlation", {"alpha": p("nan")}, "parameter alpha must be finite, but is nan"),
    ("chain", {"alphas": y("[.inf, 1.0, 0.1]")}, "parameter alphas must be finite"),
    ("correlation", {"damping": -0.1}, "parameter damping must not be negative, but is -0.1"),
    ("damping", {"dampings": [0.1, -1.0]}, "parameter dampings must not be negative"),
    ("step_size", {"fraction": p("1.5")}, "fraction = 1.5, but 0 < fraction <= 1 must hold"),
    ("explorer", {"fraction": 0.0}, "fraction = 0.0, but 0 < fraction <= 1 must hold"),
    ("frontier", {"fraction": 1.0}, "fraction = 1.0, but fraction < 1 must hold"),
    ("chain", {"fraction": 2}, "fraction = 2, but 0 < fraction <= 1 must hold"),
    ("correlation", {"gradient_tol": 0}, "gradient_tol = 0, but gradient_tol > 0 must hold"),
    ("trainings", {"momentum": 1.0}, "momentum = 1.0, but momentum < 1 must hold"),
    ("similarity", {"l2_pretrain": 0.0}, "l2_pretrain = 0.0, but l2_pretrain > 0 must hold"),
    ("cleansing", {"noise": 0.6}, "noise = 0.6, but 0 < noise <= 0.5 must hold"),
    ("uses", {"noise": 0.5}, "noise = 0.5, but 0 < noise < 0.5 must hold"),
    ("uses", {"poisoned": 100}, "poisoned = 100, but 1 <= poisoned < 100 must hold"),
    ("nlp", {"repetitions": 0}, "repetitions = 0, but repetitions >= 1 must hold"),
    ("errata", {"mu": 0.0}, "mu = 0.0, but mu > 0 must hold"),
    ("leverage", {"size": 19}, "size = 19, but 20 <= size <= 400 must hold"),
    ("counterfactuals", {"size": 121}, "size = 121, but 24 <= size <= 400 and size % 12 == 0"),
    ("counterfactuals", {"pretrain_size": 900}, "but 4 <= pretrain_size <= 570 must hold"),
    # Choices.
    (
        "correlation",
        {"solver": p("minre")},
        "parameter solver must be one of ['minres', 'cg', 'dense'], but is 'minre'; "
        "did you mean minres?",
    ),
    ("cleansing", {"dataset": p("cifar")}, "but is 'cifar'; did you mean cifar10?"),
    ("nlp", {"dataset": p("digits")}, "must be one of ['pydoc', 'news', 'gop']"),
    ("nlp", {"decay_to": "begin"}, "decay_to must be one of ['zero', 'start']"),
    ("nlp", {"size": "huge"}, "size in ('tiny', 'small', 'middle', 'elmo') must hold"),
    ("similarity", {"architecture": "resnet"}, "must be one of ['cnn', 'mlp'], but is 'resnet'"),
    ("finetune_size", {"head": "none"}, "head must be one of ['linear', 'mlp']"),
    ("correlation", {"dtype": "bfloat16"}, "dtype must be one of ['float64', 'float32']"),
    (
        "misclassified",
        {"cases": ["fix"]},
        "cases = ['fix'], but set(cases) <= {'fixed', ",
    ),
    ("correlation", {"selection": []}, "selection = [], but set(selection) <= {'top', 'random'}"),
    ("damping", {"stopped_at": 30}, "stopped_at = 30, lengths = [10, 20, 40, 100], but"),
    ("cleansing", {"reported_share": 0.15}, "but reported_share in shares must hold"),
    ("steps", {"epochs": 20}, "epochs = 20, lengths = [1, 3, 10, 30, 100], but epochs in"),
    # Seeds.
    ("correlation", {"seeds": [10, 10]}, "parameter seeds names 10 twice"),
    ("case1", {"other_seeds": [3, 3]}, "parameter other_seeds names 3 twice"),
    ("case1", {"other_seeds": [0]}, "seed = 0, other_seeds = [0], but seed not in other_seeds"),
    ("nlp", {"seeds": []}, "parameter seeds must name at least one seed"),
    ("similarity", {"seeds": [30]}, "seeds = [30], but len(seeds) >= 2 must hold"),
    ("case2", {"seed": 2**32}, "parameter seed must be at most 4294967295"),
    # Several that do not go together.
    ("correlation", {"removals": 501}, "pretrain_size = 500, removals = 501, but pretrain_size is"),
    ("trainings", {"plain_removals": 2}, "but plain_removals == 0 or plain_removals >= 3"),
    ("trainings", {"early_removals": 501}, "but pretrain_size is None or max(plain_removals, "),
    ("trainings", {"early_epochs": [5, 0]}, "early_epochs = [5, 0], but min(early_epochs) >= 1"),
    ("trainings", {"plain_lengths": []}, "plain_lengths = [], but min(plain_lengths) > 0"),
    (
        "step_size",
        {"other_settings": [[[2]]]},
        "other_settings = [[[2]]], but all(len(pair)",
    ),
    ("misclassified", {"pretrain_size": 19}, "but pretrain_size is None or 2 * ends + neighbours"),
    ("cleansing", {"shares": [0.1, 0.1]}, "but 0 < len(set(shares)) == len(shares) must hold"),
    ("finetune_size", {"base_size": 50}, "but {base_size, factor * base_size} <= set(grid_sizes)"),
    ("similarity", {"curve_classes": 1}, "but curve_classes == 0 or 2 <= curve_classes must"),
    ("similarity", {"tasks": [[0, 1], [2, 2]]}, "tasks = [[0, 1], [2, 2]], but all("),
    ("nlp", {"groups": 2}, "groups = 2, but groups >= 3 must hold"),
    ("nlp", {"share": 0.001}, "but 1 <= round(share * pretrain_size) < pretrain_size must hold"),
    ("nlp", {"shown": 31}, "shown = 31, scored = 30, test_size = 60, but 1 <= shown <= scored"),
    ("nlp", {"size": {"cells": 3}}, "missing 4 required positional arguments"),
    ("groups", {"sizes": [2, 100]}, "but 1 <= sizes[0] <= sizes[-1] <= size // 3 must hold"),
    ("groups", {"two_stage": [240, 180]}, "two_stage = [240, 180], but len(two_stage) == 3"),
    ("solvers", {"above": 0.4}, "but 0 < below < 1 < above < far must hold"),
    ("solvers", {"limits": []}, "limits = [], but limits[0] >= 1"),
    ("single_stage", {"index": 80}, "index = 80, ridge_size = 80, but 0 <= index < ridge_size"),
    ("single_stage", {"test_rank": 157}, "but 0 <= test_rank < 357 - digits_size must hold"),
    ("evaluation", {"top": 200}, "top = 200, train_size = 200, but 3 < top < train_size"),
    ("frontier", {"looked_at": [10, 5000]}, "but 1 <= looked_at[0] <= looked_at[-1] <= longest"),
    ("centre", {"sources": 20}, "sources = 20, but 2 <= sources <= 12 must hold"),
    ("benchmark", {"removals": 101}, "removals = 101, but 3 <= removals <= 100 must hold"),
    ("own_model", {"width": 3}, "width = 3, but width >= 2 and width % 2 == 0 must hold"),
    ("own_model", {"test_size": 150}, "but finetune_size + test_size <= 181 must hold"),
    # What does not fit the data, in the words of those who draw it.
    ("correlation", {"pretrain_size": 5000}, f"pretrain_size {PLENTY} (0, 1, 2, 3)"),
    ("cleansing", {"test_size": 3}, "test_size is 3, fewer than its 6 classes"),
    ("cleansing", {"validation_size": 5000}, "make the stages smaller, or the size (now 5000)"),
    ("misclassified", {"finetune_classes": [4, 4]}, "finetune_classes must be at least two diff"),
    ("explorer", {"finetune_size": 5000}, f"finetune_size {PLENTY} (4, 5, 6, 7, 8, 9)"),
    ("correlation", {"widths": [2, 2, 2, 2]}, "widths [2, 2, 2, 2]: image_shape (1, 8, 8) is too"),
    ("step_size", {"other_settings": [[[2] * 4, 0.1]]}, "widths [2, 2, 2, 2]: image_shape"),
    ("nlp", {"finetune_size": 81}, "finetune_size must be a multiple of the 2 classes, not 81"),
    ("nlp", {"longest": 4}, "longest must be at least 5 tokens, not 4"),
    ("groups", {"two_stage": [5000, 180, 120]}, f"pretrain_size {PLENTY}"),
    # Places.
    ("cleansing", {"device": "gpu"}, "parameter device = 'gpu' names no device that works here"),
    ("similarity", {"record": "numbers.txt"}, "record must name a file that ends in .json"),
    ("nlp", {"checkpoint": "/proc/none"}, "checkpoint: nothing can be written to /proc/none"),
    ("side_by_side", {"results": "../nowhere"}, "but folder(results).is_dir() must hold"),
    ("budget", {"folder": "results/no"}, "folder = 'results/no', but (ROOT / folder).is_dir()"),
    ("scale", {"folder": "results/none"}, "folder = 'results/none', but (ROOT / folder).is_dir()"),
]


@pytest.mark.parametrize(("name", "given", "message"), WRONG)
def test_what_is_wrong_is_refused_by_name_and_mend(
    name: str, given: dict[str, Any], message: str
) -> None:
    assert message in refusal(name, given)


def test_every_notebook_is_among_them() -> None:
    assert {name for name, _, _ in WRONG} == set(NOTEBOOKS)


OF_TYPES = ("unknown parameter", " must be int", " must be float", " must be bool", " must be list")
TYPES = [one for one in WRONG if any(text in one[2] for text in OF_TYPES)]


@pytest.mark.parametrize(("name", "given", "message"), TYPES)
def test_a_profile_is_held_to_the_same_types(
    name: str, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ProjectError) as caught:
        runner.check_profile(NOTEBOOKS[name], given, "mine")
    assert f"profile mine, notebook {name}: {message}" in str(caught.value)


def test_all_that_is_wrong_is_told_at_once_and_nothing_is_made(tmp_path: Path) -> None:
    given = {"removal": 5, "alpha": -1, "fraction": 2, "record": "new/a.json", "checkpoint": "kept"}
    message = refusal("step_size", given).splitlines()
    assert [line.split()[:3] for line in message] == [
        ["unknown", "parameter", "removal;"],
        ["parameter", "alpha", "must"],
        ["fraction", "=", "2,"],
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_wrong_once_is_not_told_again() -> None:
    assert len(refusal("correlation", {"removals": "many"}).splitlines()) == 1


def looked_at(parameters_cell: str, *conditions: str, **more: Any) -> Parameters:
    namespace: dict[str, Any] = {"In": ["", parameters_cell, "check"]}
    exec(parameters_cell, namespace)
    namespace |= more
    given = check_parameters(namespace, *conditions)
    assert all(namespace[name] is value for name, value in given.items())
    return given


@pytest.mark.parametrize(
    ("declaration", "value", "meant"),
    [
        ("x: bool = False", p("false"), False),
        ("x: bool = True", p("no"), False),
        ("x: bool = True", p("on"), True),
        ("x: 'int or None' = 5", p("null"), None),
        ("x: 'int or None' = 5", "None", None),
        ("x: int = 5", "10", 10),
        ("x: float = 1.0", y("1e-6"), 1e-6),
        ("x: float = 1.0", y("1e6"), 1e6),
        ("x: list = [1.0]", y("[0.1, 2.5e3]"), [0.1, 2500.0]),
        ("x: list = [[1, 2]]", p("[[0, 1]]"), [[0, 1]]),
        ("x: list = ['a']", p("[fixed]"), ["fixed"]),
        ("x: str = ''", p("false"), "false"),
        ("x: 'str or None' = None", p("null"), "null"),
        ("x: int = None", None, None),
        ("x: dict = {}", "{a: 1}", {"a": 1}),
    ],
)
def test_a_text_becomes_what_was_meant(declaration: str, value: Any, meant: Any) -> None:
    given = looked_at(declaration, x=value)
    assert given["x"] == meant and type(given["x"]) is type(meant)


def test_what_holds_everywhere_does_not_hold_for_none() -> None:
    assert looked_at("hidden: int = None\ntrain_size: 'int or None' = 5", train_size=None)


def test_all_parameters_but_places_stand_in_the_record(tmp_path: Path) -> None:
    cell = "dataset = 'digits'\nm: 'int or None' = None\nseeds = [3, 4]\ndtype = 'float32'"
    cell += "\nrecord = ''\ncheckpoint = ''"
    seconds = looked_at(cell).write_record("4.1", {"r": 0.5})
    assert seconds > 0 and list(tmp_path.iterdir()) == []
    looked_at(cell, record="a/b.json", m="7").write_record("4.1", {"r": 0.5})
    record = read_record(tmp_path / "a" / "b.json")
    given = {"dataset": "digits", "m": 7, "seeds": [3, 4], "dtype": "float32"}
    assert record["parameters"] == given
    assert (record["dataset"], record["seeds"], record["section"]) == ("digits", [3, 4], "4.1")
    assert record["values"] == {"r": 0.5} and record["provenance"]["dtype"] == "float32"
    looked_at("record = ''\nseed = 1", record="c.json").write_record("2", {}, dataset="made up")
    record = read_record(tmp_path / "c.json")
    assert (record["dataset"], record["seeds"]) == ("made up", [1])


def test_a_record_can_be_written_before_anything_is_computed(tmp_path: Path) -> None:
    cell = 'record: str = ""'
    looked_at(cell)
    looked_at(cell, record="new/folder/a.json")
    assert (tmp_path / "new" / "folder").is_dir() and not list((tmp_path / "new/folder").iterdir())
    (tmp_path / "old.json").write_text('{"provenance": {}}')
    (tmp_path / "spoiled.json").write_text('{"section')
    for name in ("old.json", "spoiled.json"):
        looked_at(cell, record=name)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "package.json").write_text('{"name": "mine"}')
    (tmp_path / "file").write_text("")
    for record, message in [
        ("a.txt", "record must name a file that ends in .json, but is 'a.txt'"),
        ("new", "record must name a file that ends in .json, but is 'new'"),
        ("folder.json", "record = 'folder.json' is a folder; name a file in it"),
        ("package.json", "record = 'package.json' is a file of another kind; name another one"),
        ("file/a.json", "record: nothing can be written to file (File exists)"),
        ("file/b/a.json", "record: nothing can be written to file/b (Not a directory)"),
        (f"{'a' * 300}/a.json", "(File name too long); name another place"),
        (f"{'a' * 249}.json", "nothing can be written to . (File name too long)"),
    ]:
        with pytest.raises(ValueError) as caught:
            looked_at(cell, record=record)
        assert message in str(caught.value)
    assert (tmp_path / "package.json").read_text() == '{"name": "mine"}'


@pytest.mark.parametrize("name", ["record", "checkpoint"])
@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_to_is_noticed(
    name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(parameters.tempfile, "NamedTemporaryFile", refuse)
    with pytest.raises(ValueError, match=rf"parameter {name}: nothing can be written to \S+ \(.*"):
        looked_at(f'{name}: str = ""', **{name: "folder/a.json"})


def test_a_checkpoint_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="checkpoint: nothing can be written to file"):
        looked_at('checkpoint: str = ""', checkpoint="file")
    looked_at('checkpoint: str = ""', checkpoint="a/b")
    assert (tmp_path / "a" / "b").is_dir()


def test_parameters_that_were_not_executed_are_asked_for() -> None:
    with pytest.raises(ValueError, match="'share' is not defined: run the cells above first"):
        check_parameters({"In": ["", "check"]}, "0 < share < 1")


def test_a_script_is_held_to_the_conditions() -> None:
    check_parameters({"share": 0.5}, "0 < share < 1")
    with pytest.raises(ValueError, match="0 < share < 1 must hold"):
        check_parameters({"share": 1.5}, "0 < share < 1")


def test_an_edited_value_counts_and_not_the_default() -> None:
    """A reader changes the cell, or sets a value in a cell of their own."""
    cells = {"In": ["", "m: int = 5\nshare: float = 0.1", "share = 'a'", "check"]}
    with pytest.raises(ValueError, match="share must be float, but is 'a'"):
        check_parameters({**cells, "m": 5, "share": "a"}, "m > 0")
    check_parameters({**cells, "m": 5, "share": 0.2}, "m > 0")


def test_a_cell_with_an_expression_declares_as_well() -> None:
    cells = ["", "m: int = 2 * 5\nseeds = list(range(3))", "# Parameters\nm = 4\nseed = 1", "check"]
    with pytest.raises(ValueError, match="unknown parameter seed; did you mean seeds"):
        check_parameters({"In": cells, "m": 4, "seed": 1, "seeds": [0, 1, 2]}, "m > 0")


def test_without_the_parameters_cell_no_name_is_unknown() -> None:
    check_parameters({"In": ["", "# Parameters\nm = 4", "check"], "m": 4}, "m > 0")


@pytest.mark.parametrize(
    ("cell", "kinds"),
    [
        ("x = 1", ["int"]),
        ("x = 1.0", ["float"]),
        ("x = None", ["Any"]),
        ("x: int = None", ["int", "None"]),
        ("x: int = f(1)", ["int"]),
        ("x = f(1)", ["Any"]),
        ("x = [1, 2.5]", ["list[float]"]),
        ("x = [[1], [2]]", ["list[list]"]),
        ("x = []", ["list"]),
        ("x: list = [1, 2]", ["list[int]"]),
        ("x: 'list | None' = ['a']", ["list[str]", "None"]),
        ("x: list[int | float] | None = None", ["list[int | float]", "None"]),
        ("x: Optional[int] = 3", ["int", "None"]),
        ("x: 'int or list[int] or None' = 3", ["int", "list[int]", "None"]),
        ("x: dict[str, int] = {}", ["dict[str, int]"]),
    ],
)
def test_types_are_read_from_annotation_and_default(cell: str, kinds: list[str]) -> None:
    assert list(declared(cell)["x"].kinds) == kinds


@pytest.mark.parametrize(
    ("kind", "value", "right"),
    [
        ("int", 1, True),
        ("int", True, False),
        ("int", 10**400, True),
        ("int", 1.0, False),
        ("float", 1, True),
        ("float", False, False),
        ("bool", 0, False),
        ("list[int]", [], True),
        ("list[int]", (1, 2), True),
        ("list[int]", [1, None], False),
        ("list[int | None]", [1, None], True),
        ("list[list[int]]", [[1], [2, 3]], True),
        ("list[list[int]]", [[1], 2], False),
        ("list[bool]", [1], False),
        ("dict", [], False),
        ("Path", "anything", True),  # not known, so let in
    ],
)
def test_types_are_told_apart(kind: str, value: Any, right: bool) -> None:
    assert (type_fault(Parameter("x", (kind,)), value) == "") == right


def test_a_default_below_zero_allows_others() -> None:
    assert type_fault(declared("x = -1.0")["x"], -2.0) == ""
    assert "must not be negative" in type_fault(declared("x = [1, 0]")["x"], [1, -2])


def test_names_are_known_or_nearest_is_told() -> None:
    known = declared("removals = 1\nseeds = [1]")
    assert unknown_fault(known, "seeds") == ""
    assert unknown_fault(known, "sedes").startswith("unknown parameter sedes; did you mean seeds?")
    assert unknown_fault(known, "zzz") == "unknown parameter zzz; known: removals, seeds"


def test_what_holds_everywhere_names_its_parameter_alone() -> None:
    for name, condition in EVERYWHERE.items():
        assert set(parameters._names(condition)) - {"set", "len", "min"} == {name}


def test_papermill_itself_comes_to_the_refusal(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "papermill", "-k", "python3", "--no-progress-bar"]
    command += [str(NOTEBOOKS["correlation"].path), "out.ipynb", "--cwd", str(tmp_path)]
    wrong = ["-p", "renormalise", "maybe", "-p", "removal", "50", "-y", "solver_tol: 1e-6x"]
    run = subprocess.run(
        [*command, *wrong],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    for fault in (
        "unknown parameter removal; did you mean removals?",
        "parameter renormalise must be bool, but is 'maybe' (str)",
        "parameter solver_tol must be float, but is '1e-6x' (str)",
    ):
        assert fault in run.stderr
    executed = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    counts = [cell.execution_count for cell in executed.cells if cell.cell_type == "code"]
    assert sum(count is not None for count in counts) == 3  # defaults, what was given, the check
