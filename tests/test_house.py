"""Imports run one way and in no circle, the method needs little, classes and functions are short.

All of it is read from the text of the modules; none of them is imported for it.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from scipy.sparse.csgraph import connected_components

from msif_lib.study.imports import imported_names, package_of

ROOT = Path(__file__).resolve().parents[1]
# Files and folders of msif_lib from the bottom up. Each may import its own row and those above it
# in this list, nothing below.
LAYERS = [
    ["support"],
    ["stage"],
    ["optimisers"],
    ["preconditioner", "minres", "spectrum", "steps"],
    ["curvature", "ekfac", "solvers", "lanczos", "training", "descent"],
    ["links", "scores"],
    ["handover", "kept"],
    ["influence"],
    ["retraining", "repetition", "evaluation"],
    ["__init__"],  # the public names
    ["scale"],
    ["study"],
]
HEIGHT = {name: height for height, row in enumerate(LAYERS) for name in row}
# Asked for by the user, then imported within a function.
OPTIONAL = {"dask"}
LONGEST_CLASS = 350  # lines
LONGEST_FUNCTION = 90  # lines without the docstring

LIBRARY = sorted((ROOT / "msif_lib").rglob("*.py"))
METHOD = [path for path in LIBRARY if "study" not in path.parts]


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_file(root: Path, name: str) -> Path | None:
    """The file of exactly this module; None for what is none of the project's."""
    at = root.joinpath(*name.split("."))
    files = (at / "__init__.py", at.with_name(f"{at.name}.py"))
    return next((file for file in files if file.is_file()), None)


def imported_modules(root: Path, path: Path) -> set[Path]:
    """The project's modules that one names, not the packages through which it reaches them."""
    names = imported_names(path.read_text(encoding="utf-8"), package_of(root, path))
    found = set()
    for name in names:
        below = [one for one in names if one.rpartition(".")[0] == name]
        if not below or not all(module_file(root, one) for one in below):
            found.add(module_file(root, name))
    return found - {None, path}


def circles(root: Path, *folders: str) -> list[list[str]]:
    """Groups of modules that import each other, at the top or within functions."""
    paths = sorted(path for folder in folders for path in (root / folder).rglob("*.py"))
    edges = np.zeros((len(paths), len(paths)), dtype=bool)
    for row, path in enumerate(paths):
        edges[row, [paths.index(one) for one in imported_modules(root, path) if one in paths]] = 1
    count, group = connected_components(edges, connection="strong")
    members = [[path for path, at in zip(paths, group) if at == k] for k in range(count)]
    return [
        [path.relative_to(root).as_posix() for path in some] for some in members if len(some) > 1
    ]


def part(path: Path) -> str:
    """The file or folder of msif_lib that a module is, or is in."""
    return path.relative_to(ROOT / "msif_lib").parts[0].removesuffix(".py")


def too_long(source: str) -> list[str]:
    """Classes and functions beyond the sizes that can be read in one go."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines, longest = node.end_lineno - node.lineno + 1, LONGEST_CLASS
        if not isinstance(node, ast.ClassDef):
            longest = LONGEST_FUNCTION
            if ast.get_docstring(node) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
        if lines > longest:
            found.append(f"{node.name}: {lines} lines, at most {longest}")
    return found


@pytest.mark.parametrize("path", LIBRARY, ids=label)
def test_imports_run_one_way(path):
    assert part(path) in HEIGHT, "a new file or folder of msif_lib needs a place in LAYERS"
    library = [one for one in imported_modules(ROOT, path) if one in LIBRARY]
    upwards = [label(one) for one in library if HEIGHT.get(part(one), 0) > HEIGHT[part(path)]]
    assert not upwards, f"{label(path)} imports what stands above it: {', '.join(sorted(upwards))}"


@pytest.mark.parametrize("path", LIBRARY, ids=label)
def test_nothing_of_the_library_imports_what_is_made_with_it(path):
    outside = imported_modules(ROOT, path) - set(LIBRARY)
    assert not outside, f"{label(path)} imports {', '.join(sorted(map(label, outside)))}"


def test_no_module_imports_itself_by_way_of_others():
    assert circles(ROOT, "msif_lib", "benchmarks") == []


@pytest.mark.parametrize("path", METHOD, ids=label)
def test_the_method_needs_torch_scipy_and_small_helpers_alone(path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {Requirement(line).name for line in project["dependencies"]}
    assert needed >= {"torch", "numpy", "scipy"}
    known = needed | {"msif_lib"} | set(sys.stdlib_module_names)
    text = path.read_text(encoding="utf-8")
    packages = {name.split(".")[0] for name in imported_names(text, package_of(ROOT, path))}
    assert packages <= known | OPTIONAL
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [ast.Pass()]
    at_the_top = {name.split(".")[0] for name in imported_names(ast.unparse(tree))}
    assert not at_the_top & OPTIONAL, "what is optional is imported within a function"


@pytest.mark.parametrize("path", METHOD, ids=label)
def test_classes_and_functions_are_short(path):
    assert too_long(path.read_text(encoding="utf-8")) == []


def test_circles_are_found_wherever_the_import_stands(tmp_path):
    texts = {
        "a/__init__.py": "from a.first import x",
        "a/first.py": "from a import second",
        "a/second.py": "def f():\n    from a.third import y",
        "a/third.py": "import a.first",
        "a/fourth.py": "from a import x\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from a import fifth",
        "a/fifth.py": "from a.fourth import z",
    }
    (tmp_path / "a").mkdir()
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    # The package's own file imports one of them, but none of them anything from it.
    assert circles(tmp_path, "a") == [["a/first.py", "a/second.py", "a/third.py"]]
    (tmp_path / "a/third.py").write_text("from a import x")
    circle = ["a/__init__.py", "a/first.py", "a/second.py", "a/third.py"]
    assert circles(tmp_path, "a") == [circle]
    (tmp_path / "a/third.py").write_text("")
    assert circles(tmp_path, "a") == []


def test_lengths_are_counted_without_a_functions_docstring():
    body, docstring = "    x = 1\n", '    """One.\n\n    Two.\n    """\n'
    assert too_long(f"def f():\n{docstring}{body * (LONGEST_FUNCTION - 1)}") == []
    assert too_long(f"def f():\n{docstring}{body * LONGEST_FUNCTION}") == [
        f"f: {LONGEST_FUNCTION + 1} lines, at most {LONGEST_FUNCTION}"
    ]
    assert too_long(f"class A:\n{body * (LONGEST_CLASS - 1)}") == []
    assert too_long(f"class A:\n{docstring}{body * (LONGEST_CLASS - 1)}") != []
