"""The project's declarations agree with each other, and its notebooks are committed clean."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from msif_lib.study.pages.editions import mixed_cells, solution_labels, strip_notebook
from msif_lib.study.runner import PROFILES, check_profile, find_notebooks, read_profile

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted([*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("book/chapters/*.ipynb")])
CONSTRAINTS = ("constraints.txt", "benchmarks/constraints.txt")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def declared() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"]
    lines = PROJECT["dependencies"] + [line for extra in extras.values() for line in extra]
    requirements = [Requirement(line) for line in lines]
    return [requirement for requirement in requirements if requirement.name != PROJECT["name"]]


def benched() -> list[Requirement]:
    """What .venv-bench holds: this library's needs and its peers."""
    lines = (ROOT / "benchmarks" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pins(constraints: str = "constraints.txt") -> dict[str, Version]:
    found = {}
    for line in (ROOT / constraints).read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            found[canonicalize_name(name)] = Version(version)
    return found


def sources() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / line for line in listed.stdout.splitlines()]
    return [path for path in paths if path.is_file()]


@pytest.mark.parametrize("constraints", CONSTRAINTS)
def test_constraints_are_plain_pins(constraints):
    for line in (ROOT / constraints).read_text(encoding="utf-8").splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[0-9A-Za-z.]+", line), line


@pytest.mark.parametrize("requirement", declared(), ids=str)
def test_every_dependency_is_pinned_within_its_range(requirement):
    pin = pins().get(canonicalize_name(requirement.name))
    assert pin is not None, f"{requirement.name} has no pin in constraints.txt"
    assert requirement.specifier.contains(pin), f"{requirement} excludes the pin {pin}"


@pytest.mark.parametrize("requirement", benched(), ids=str)
def test_every_peer_is_pinned_within_its_range(requirement):
    pin = pins("benchmarks/constraints.txt").get(canonicalize_name(requirement.name))
    assert pin is not None, f"{requirement.name} has no pin in benchmarks/constraints.txt"
    assert requirement.specifier.contains(pin), f"{requirement} excludes the pin {pin}"


def test_the_benchmarks_environment_holds_what_the_library_needs():
    wanted = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    assert wanted <= {canonicalize_name(requirement.name) for requirement in benched()}
    # One torch, so that the figures of the two environments compare.
    ours, theirs = (pins(constraints) for constraints in CONSTRAINTS)
    assert ours["torch"] == theirs["torch"]


def test_torch_and_torchvision_have_an_upper_bound():
    # Without one pip prefers the newest CUDA build, gigabytes of it.
    bounded = {
        requirement.name
        for requirement in declared()
        if any(specifier.operator == "<" for specifier in requirement.specifier)
    }
    assert {"torch", "torchvision"} <= bounded
    for requirement in benched():
        if requirement.name in ("torch", "torchvision"):
            assert "<" in {specifier.operator for specifier in requirement.specifier}


def test_the_extra_all_names_every_other_extra():
    extras = PROJECT["optional-dependencies"]
    (everything,) = (Requirement(line) for line in extras["all"])
    assert everything.extras == set(extras) - {"all"}


def test_environment_delegates_to_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["name"] == PROJECT["name"]
    python, pip, installed = environment["dependencies"]
    assert python == "python=3.11"
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains("3.11")
    assert pip == "pip"
    assert installed == {"pip": ["-c constraints.txt", "-e .[all]"]}


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_clean(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5), "older formats have no cell ids"
    nbformat.validate(notebook)
    identifiers = [cell.id for cell in notebook.cells]
    assert len(set(identifiers)) == len(identifiers)
    assert notebook.metadata.kernelspec.name == "python3"
    assert not {"papermill", "widgets"} & set(notebook.metadata)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs, f"cell {cell.id} has outputs; strip them with nbstripout"
            assert cell.execution_count is None, f"cell {cell.id} has an execution count"
        assert not {"papermill", "execution"} & set(cell.metadata)


@pytest.mark.parametrize("profile", sorted(path.stem for path in (ROOT / PROFILES).glob("*.yaml")))
def test_profile_fits_the_notebooks(profile):
    for name, parameters in read_profile(ROOT, profile).items():
        (notebook,) = find_notebooks(ROOT, [name])
        check_profile(notebook, parameters, profile)


def test_every_page_of_the_book_has_a_source():
    toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text(encoding="utf-8"))
    pages = [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    for page in [toc["root"], *pages]:
        section, _, name = page.rpartition("/")
        candidates = [ROOT / "book" / f"{page}.md", ROOT / "book" / f"{page}.ipynb"]
        if section == "experiments":
            candidates = [ROOT / "notebooks" / f"{name}.ipynb"]
        if page == "status":  # written when the book is put together
            continue
        assert any(path.is_file() for path in candidates), f"{page} has no source"
    shown = {page.rpartition("/")[2] for page in pages}
    assert {path.stem for path in NOTEBOOKS} <= shown, "a notebook is missing from book/_toc.yml"


def test_no_file_holds_a_path_of_somebodys_machine():
    private = re.compile(r"(?<![\w.}$)-])/(?:home|root|Users|work)/\w")
    for path in sources():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found = private.search(text)
        assert not found, f"{path.relative_to(ROOT)}: {found[0]}"


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    shown = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for target in targets:
        assert re.search(rf"^  {target} ", shown, re.MULTILINE), f"{target} has no description"


UNPICKLES = {
    "msif_lib/scale/sharding.py": 1,  # what it has pickled itself, to see that others can be told
    "msif_lib/study/data/datasets.py": 2,  # what has been compared with a published sum
    "msif_lib/support/jobs.py": 1,  # what a process of its own has sent
}


def unpickled(source: str) -> int:
    """The calls in a text by which what a file holds could be executed."""
    found = 0
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {one.arg: ast.unparse(one.value) for one in node.keywords}
        found += (
            called in ("joblib.load", "yaml.load", "yaml.unsafe_load")
            or re.fullmatch(r"(cloud)?pickle\.(loads?|Unpickler)", called) is not None
            or (called == "torch.load" and given.get("weights_only") != "True")
            or (called == "np.load" and "allow_pickle" in given)
        )
    return found


def test_nothing_is_unpickled_that_has_not_been_verified():
    for call in (
        "pickle.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f)",
        "yaml.load(f)",
    ):
        assert unpickled(call) == 1
    assert unpickled("torch.load(f, weights_only=True), np.load(f), ast.literal_eval(x)") == 0
    sources = {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for folder in ("msif_lib", "benchmarks", "tools", "exercises")
        for path in sorted((ROOT / folder).rglob("*.py"))
    }
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        codes = (cell.source for cell in cells if cell.cell_type == "code")
        sources[path.relative_to(ROOT).as_posix()] = "\n".join(codes)
    counts = {name: unpickled(source) for name, source in sources.items()}
    assert {name: count for name, count in counts.items() if count} == UNPICKLES


def dry_run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["make", "--no-print-directory", "--dry-run", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


INJECTIONS = [
    "x; {}", 'x"; {}; echo "', "x'; {}; echo '", "$({})", "`{}`", "x\n{}", "x | {}", "x & {}",
    "$(shell {})", "$$({})",
]  # fmt: skip
VARIABLES = {
    "PROFILE": ("experiments", "default"), "EDITION": ("book", "student"),
    "JOBS": ("experiments", "1"), "PYTHON": ("venv", "/a folder/python"),
    "PYTEST_ARGS": ("test", "-k 'a or b'"), "BENCH_ARGS": ("bench", "--help"),
}  # fmt: skip


@pytest.mark.parametrize("variable", VARIABLES)
def test_no_variable_of_make_is_executed(tmp_path, variable):
    """In a folder with programs that do nothing in place of Python's."""
    programs = tmp_path / "bin"
    for folder in (programs, tmp_path / ".venv" / "bin", tmp_path / ".venv-bench" / "bin"):
        folder.mkdir(parents=True)
        for name in ("python", "python3", "python3.11", "ruff", "mypy"):
            (folder / name).write_text("#!/bin/sh\n")
            (folder / name).chmod(0o755)
    for name in ("sh", "touch"):
        (programs / name).symlink_to(shutil.which(name))
    (tmp_path / "notebooks" / "profiles").mkdir(parents=True)
    (tmp_path / "notebooks" / "profiles" / "default.yaml").write_text("")
    target, harmless = VARIABLES[variable]
    command = [shutil.which("make"), "--file", ROOT / "Makefile", target]

    def run(*more: str, **given: str) -> int:
        environment = {"PATH": str(programs)} | given
        return subprocess.run(
            [*command, *more], cwd=tmp_path, env=environment, capture_output=True
        ).returncode

    mark = tmp_path / "executed"
    for injection in INJECTIONS:
        value = injection.format(f"touch {mark}")
        run(f"{variable}={value}")
        run(**{variable: value})
        assert not mark.exists(), value
    assert run(f"{variable}={harmless}") == run(**{variable: harmless}) == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("PROFILE=tiny", "no profile is called 'tiny'; known: default paper smoke"),
        ("PROFILE=../../x", "no profile is called '../../x'; known: default paper smoke"),
        ("PROFILE=", "no profile is called ''"),
        ("PROFILE=%", "no profile is called '%'"),
        ("PROFILE=smoke default", "no profile is called 'smoke default'"),
        ("EDITION=%", "no edition is called '%'; known: reader student instructor"),
        ("PYTEST_ARGS=-x; ls", "PYTEST_ARGS must not hold ';'"),
        ("PYTEST_ARGS=-k x\nls", "PYTEST_ARGS must not hold a line break"),
        ("BENCH_ARGS=`ls`", "BENCH_ARGS must not hold '`'"),
        ("JOBS=$(shell ls)", "JOBS must not hold a dollar sign"),
    ],
)
def test_make_says_what_it_does_not_take(given, message):
    run = dry_run("book", given)
    assert run.returncode == 2
    assert message in run.stderr
    assert not run.stdout


def test_words_in_quotes_reach_pytest():
    shown = dry_run("test", "PYTEST_ARGS=-k \"a or (b and not c[1])\" -m 'slow'").stdout
    assert shown.rstrip().endswith("-k \"a or (b and not c[1])\" -m 'slow'")


# What a Windows Python does not have.
BLOCKED = "import sys; sys.modules['fcntl'] = None; sys.path.insert(0, '.'); import runpy; "


def without_fcntl(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BLOCKED + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "module",
    ["msif_lib", "msif_lib.retraining", "msif_lib.scale.sharding", "msif_lib.study.runner"],
)
def test_modules_need_no_fcntl(module):
    run = without_fcntl(f"import {module}")
    assert run.returncode == 0, run.stderr


def test_the_set_up_says_what_is_supported_where_there_is_no_fcntl():
    run = without_fcntl("runpy.run_path('tools/make_venv.py', run_name='__main__')")
    assert run.returncode == 1
    assert "supported on Linux and macOS; on Windows use WSL" in run.stderr
    assert "Traceback" not in run.stderr


def test_the_set_up_needs_no_package():
    run = subprocess.run(
        [sys.executable, "-I", "-S", ROOT / "tools" / "make_venv.py", "--help"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("fails", ["", "test", "numeric", "book"])
def test_continuous_integration_fails_with_each_of_its_steps(tmp_path, fails):
    """With a `make` that only says what it was called with."""
    make = tmp_path / "make"
    make.write_text(f'#!/bin/sh\necho "called $1"\n[ "$1" != "{fails}" ]\n')
    make.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    run = subprocess.run(
        [ROOT / ".ci" / "run"], env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert re.findall(r"^called (.*)$", run.stdout, re.MULTILINE) == ["test", "numeric", "book"]
    ends = dict(re.findall(r"^== make (\w+): (\w+) \(\d+ s\)$", run.stdout, re.MULTILINE))
    assert ends == {
        name: "FAILED" if name == fails else "passed" for name in ("test", "numeric", "book")
    }
    assert run.returncode == (1 if fails else 0)


def test_the_repeat_takes_other_kernels_and_checks_the_style_once():
    shown = subprocess.run(
        ["make", "--dry-run", "numeric", "PYTEST_ARGS=--last"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (command,) = (line for line in shown.splitlines() if "pytest" in line)
    assert command.startswith("ATEN_CPU_CAPABILITY=default ")
    assert command.endswith('-m "numeric and not slow" --last')
    assert "ruff" not in shown and "mypy" not in shown


@pytest.mark.parametrize(
    ("chosen", "ran", "code"),
    [
        ([], ["numeric", "plain"], 0),
        (["-m", "slow"], ["both", "slow"], 0),
        (["-m", "numeric and not slow"], ["numeric"], 0),
        (["-k", "nothing"], [], 5),
    ],
)
def test_slow_tests_wait_to_be_asked_for_and_none_is_a_failure(tmp_path, chosen, ran, code):
    marks = {"plain": (), "slow": ("slow",), "numeric": ("numeric",), "both": ("numeric", "slow")}
    (tmp_path / "test_sample.py").write_text(
        "import pytest\n"
        + "".join(
            "".join(f"@pytest.mark.{mark}\n" for mark in marks[name]) + f"def test_{name}(): pass\n"
            for name in marks
        )
    )
    options = ["-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, "-n", "2"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", *options, *chosen, tmp_path],
        capture_output=True,
        text=True,
    )
    named = set(re.findall(r"::test_(\w+) PASSED|PASSED \S+::test_(\w+)", run.stdout))
    assert sorted("".join(pair) for pair in named) == ran, run.stdout
    assert run.returncode == code


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_solution_is_marked_and_nothing_refers_to_it(path):
    """The student's edition can then leave it out whole."""
    notebook = nbformat.read(path, as_version=4)
    assert mixed_cells(notebook, path.stem) == []
    labels = set().union(*(solution_labels(cell.source, path.stem) for cell in notebook.cells))
    shown = nbformat.writes(strip_notebook(notebook, "student"))
    assert not [label for label in labels if label in shown]
