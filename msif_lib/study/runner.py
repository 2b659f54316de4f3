"""Execute the project's notebooks with a profile of parameters, and only those that changed.

Run it as ``python -m msif_lib.study.runner --profile default --jobs 2 [NAME ...]``.

The notebooks are ``notebooks/*.ipynb`` (experiments) and ``book/chapters/*.ipynb`` (theory with
runnable checks). A profile, ``notebooks/profiles/<name>.yaml``, maps the name of a notebook to the
parameters that replace the defaults in its cell tagged ``parameters``::

    correlation:
      removals: 20
      seeds: [0, 1]

Two parameters are given by the runner itself where the profile does not: to a notebook that
declares ``record`` the file for its numbers, ``build/<profile>/records/<name>.json``; to one that
declares ``records`` the folder of these files, and it runs after all the others.

An executed copy is kept as ``build/<profile>/executed/<name>.ipynb`` with a key in its metadata, a
hash of all that its outputs depend on: the notebook, the parameters, the versions of the packages,
the code (without comments and docstrings) of the project's modules that it imports and that these
import, with the data that lie beside a module under its name, and the files that the notebook's
metadata list under ``msif.inputs`` (glob patterns from the project's root). While the key holds,
the copy is not executed again. A module imported by a name that is put together at run time is not
seen; list it there. A notebook that fails is left as ``<name>.failed.ipynb`` beside it.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import nbformat
import yaml

from msif_lib.study.imports import code_of, files_beside, imported_files

ROOT = Path(__file__).resolve().parents[2]
PROFILES = Path("notebooks/profiles")
FOLDERS = {"experiments": Path("notebooks"), "chapters": Path("book/chapters")}
PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "scikit-learn",
    "pandas",
    "matplotlib",
    "seaborn",
    "papermill",
    "ipykernel",
    "myst-nb",
)
HEARTBEAT = 60.0  # seconds between two lines on a notebook that is still running


class ProjectError(Exception):
    """A mistake in a notebook or a profile, with a message for the person who made it."""


@dataclass(frozen=True)
class Notebook:
    """A notebook of the project.

    Parameters
    ----------
    path
        The source.
    section
        Where it stands in the book: ``experiments`` or ``chapters``.
    """

    path: Path
    section: str

    @property
    def name(self) -> str:
        """The name of the file without its ending."""
        return self.path.stem

    def read(self) -> nbformat.NotebookNode:
        """Return the notebook's content."""
        return nbformat.read(self.path, as_version=4)


@dataclass(frozen=True)
class Parameter:
    """A parameter of a notebook, as its ``parameters`` cell declares it.

    Parameters
    ----------
    name
        Its name.
    kinds
        The types that it may have: its annotation's, or that of its default.
    """

    name: str
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of one notebook.

    Parameters
    ----------
    notebook
        Which one.
    state
        ``unchanged``, ``executed`` or ``failed``.
    path
        The executed copy, or the failed one.
    seconds
        How long the execution took; 0 where there was none.
    error
        What went wrong; empty where nothing did.
    """

    notebook: Notebook
    state: str
    path: Path
    seconds: float = 0.0
    error: str = ""


def find_notebooks(root: Path, names: Sequence[str] = ()) -> list[Notebook]:
    """Return the project's notebooks, all of them or those with the given names.

    Parameters
    ----------
    root
        The project's root.
    names
        Names without ``.ipynb``; none means all.

    Raises
    ------
    ProjectError
        If a name is unknown or belongs to two notebooks, or if there are no notebooks.
    """
    found: dict[str, Notebook] = {}
    for section, folder in FOLDERS.items():
        for path in sorted((root / folder).glob("*.ipynb")):
            if path.stem.endswith(".failed"):
                continue
            if path.stem in found:
                raise ProjectError(f"two notebooks are called {path.stem}; rename one of them")
            found[path.stem] = Notebook(path, section)
    if not found:
        folders = " or ".join(f"{folder}/" for folder in FOLDERS.values())
        raise ProjectError(f"no notebooks in {folders} of {root}")
    for name in names:
        if name not in found:
            raise ProjectError(f"no notebook is called {name}; known: {', '.join(found)}")
    return [found[name] for name in names] if names else list(found.values())


def read_profile(root: Path, profile: str) -> dict[str, dict[str, Any]]:
    """Return a profile's parameters by notebook.

    Parameters
    ----------
    root
        The project's root.
    profile
        The profile's name, without ``.yaml``.

    Raises
    ------
    ProjectError
        If the profile does not exist, is malformed, or names a notebook that does not exist.
    """
    path = root / PROFILES / f"{profile}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml"))) or "none"
        raise ProjectError(f"no profile is called {profile}; known: {known}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ProjectError(f"profile {profile} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ProjectError(f"profile {profile} must map names of notebooks to parameters")
    names = [notebook.name for notebook in find_notebooks(root)]
    for name, parameters in content.items():
        if name not in names:
            raise ProjectError(
                f"profile {profile}: no notebook is called {name}; known: {', '.join(names)}"
            )
        if parameters is not None and not isinstance(parameters, dict):
            raise ProjectError(f"profile {profile}: {name} must map parameters to values")
    return {name: dict(parameters or {}) for name, parameters in content.items()}


def declared_parameters(notebook: Notebook) -> dict[str, Parameter]:
    """Return what the notebook's cell tagged ``parameters`` declares.

    Parameters
    ----------
    notebook
        The notebook; without such a cell it has no parameters.

    Raises
    ------
    ProjectError
        If the cell is not valid Python.

    Notes
    -----
    The cell is parsed with `ast`, not with `papermill.inspect_notebook`: that one matches regular
    expressions, overlooks an annotation such as ``int | None`` and infers no type without one.
    """
    declared: dict[str, Parameter] = {}
    for cell in notebook.read().cells:
        if cell.cell_type != "code" or "parameters" not in cell.metadata.get("tags", []):
            continue
        try:
            statements = ast.parse(cell.source).body
        except SyntaxError as error:
            raise ProjectError(
                f"notebook {notebook.name}: its parameters cell is not valid Python: {error}"
            ) from error
        for statement in statements:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                name, kinds = statement.target.id, _annotated_kinds(statement.annotation)
            elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                name, kinds = statement.targets[0].id, _default_kinds(statement.value)
            else:
                continue
            declared[name] = Parameter(name, kinds)
    return declared


def _annotated_kinds(annotation: ast.expr) -> tuple[str, ...]:
    """Return the names of the types in an annotation: ``list[int] | None`` is list, None."""
    text = ast.unparse(annotation).strip("'\"")
    optional = re.fullmatch(r"(?:typing\.)?Optional\[(.*)\]", text)
    if optional:
        text = f"{optional[1]} | None"
    return tuple(part.split("[")[0].strip() for part in text.split("|"))


def _default_kinds(value: ast.expr) -> tuple[str, ...]:
    """Return the type of a default, or ``Any`` where it can't be read off or is None."""
    try:
        default = ast.literal_eval(value)
    except ValueError:
        return ("Any",)
    return ("Any",) if default is None else (type(default).__name__,)


def _accepts(kind: str, value: Any) -> bool:
    """Return whether a value from YAML may be given to a parameter of a type."""
    if kind == "Any":
        return True
    if kind == "None":
        return value is None
    if isinstance(value, bool):  # an int in Python, but never meant as one
        return kind == "bool"
    accepted = {
        "bool": (bool,),
        "int": (int,),
        "float": (float, int),
        "str": (str,),
        "list": (list,),
        "tuple": (list,),  # YAML has no tuples
        "Sequence": (list,),
        "dict": (dict,),
    }
    return isinstance(value, accepted.get(kind, (object,)))


def parameters_of(
    notebook: Notebook, profiles: dict[str, dict[str, Any]], profile: str
) -> dict[str, Any]:
    """Return what a notebook is run with: the profile's parameters, and where records are.

    Parameters
    ----------
    notebook
        The notebook.
    profiles
        The profile's parameters by notebook.
    profile
        The profile's name.
    """
    declared = declared_parameters(notebook)
    # From the notebook's folder, in which it runs.
    up = "../" * (len(FOLDERS[notebook.section].parts))
    folder = f"{up}build/{profile}/records"
    given = {"record": f"{folder}/{notebook.name}.json", "records": folder}
    own = {name: value for name, value in given.items() if name in declared}
    return own | profiles.get(notebook.name, {})


def _record_of(notebook: Notebook, parameters: dict[str, Any]) -> Path | None:
    """Return the file that a notebook writes its numbers to, if any."""
    record = parameters.get("record")
    return (notebook.path.parent / record).resolve() if record else None


def check_parameters(notebook: Notebook, parameters: dict[str, Any], profile: str) -> None:
    """Check names and types of a profile's parameters against the notebook's own.

    papermill itself only warns of an unknown name, and enforces no types.

    Parameters
    ----------
    notebook
        The notebook.
    parameters
        What the profile gives it.
    profile
        The profile's name, for the message.

    Raises
    ------
    ProjectError
        If the notebook has no such parameter or its type is another.
    """
    declared = declared_parameters(notebook)
    for name, value in parameters.items():
        where = f"profile {profile}, notebook {notebook.name}"
        if name not in declared:
            known = ", ".join(declared) or "none"
            raise ProjectError(f"{where}: unknown parameter {name}; known: {known}")
        kinds = declared[name].kinds
        if any(_accepts(kind, value) for kind in kinds):
            continue
        message = (
            f"{where}: parameter {name} must be {' or '.join(kinds)}, "
            f"but is {value!r} ({type(value).__name__})"
        )
        if isinstance(value, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", value):
            message += f"; YAML reads {value} as text, write {re.sub('[eE]', '.0e', value)}"
        raise ProjectError(message)


def installed_version(package: str) -> str:
    """Return a package's version, or ``absent``.

    Parameters
    ----------
    package
        Its name on the package index.
    """
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def modules_of(root: Path, notebook: Notebook) -> list[Path]:
    """Return the project's modules that a notebook imports, and those that these import.

    Parameters
    ----------
    root
        The project's root, from which they are imported.
    notebook
        The notebook.

    Returns
    -------
    list of Path
        All of the project's packages where a cell or a module is not plain Python, since a magic
        may import anything.
    """
    cells = [cell.source for cell in notebook.read().cells if cell.cell_type == "code"]
    try:
        return imported_files(root, cells)
    except SyntaxError:
        packages = [path.parent for path in root.glob("*/__init__.py")]
        return sorted(path for package in packages for path in package.rglob("*.py"))


def _code(module: Path) -> str:
    """Return what of a module a result depends on; all of it where it is not valid Python."""
    text = module.read_text(encoding="utf-8")
    try:
        return code_of(text)
    except SyntaxError:
        return text


def cache_key(root: Path, notebook: Notebook, parameters: dict[str, Any]) -> str:
    """Return the hash of all that a notebook's outputs depend on.

    Parameters
    ----------
    root
        The project's root.
    notebook
        The notebook.
    parameters
        What the profile gives it.

    Notes
    -----
    ``MSIF_DATA`` is not part of it: it says where the real data sets lie, and their files are
    checked against published sums when they are read.
    """
    source = notebook.read()
    modules = modules_of(root, notebook)
    files = [path for module in modules for path in files_beside(module)]
    for pattern in source.metadata.get("msif", {}).get("inputs", []):
        files += root.glob(pattern)
    if "records" in parameters:
        folder = (notebook.path.parent / parameters["records"]).resolve()
        files += folder.glob("*.json")
    # What a run writes is no input of it.
    own = _record_of(notebook, parameters)
    files = [path for path in files if path != own]
    cells = [
        (cell.cell_type, cell.source, sorted(cell.metadata.get("tags", [])))
        for cell in source.cells
    ]
    parts = [
        json.dumps([cells, parameters], sort_keys=True),
        sys.version,
        *(f"{package}=={installed_version(package)}" for package in PACKAGES),
    ]
    digest = hashlib.sha256("\0".join(parts).encode())
    contents = {path: path.read_bytes() for path in files}
    codes = {module: _code(module).encode() for module in modules}
    for path, content in sorted([*contents.items(), *codes.items()]):
        digest.update(f"\0{path.relative_to(root).as_posix()}\0".encode())
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def executed_path(root: Path, profile: str, notebook: Notebook) -> Path:
    """Return where the executed copy of a notebook is kept."""
    return root / "build" / profile / "executed" / f"{notebook.name}.ipynb"


def is_current(root: Path, profile: str, notebook: Notebook, parameters: dict[str, Any]) -> bool:
    """Return whether copy and record exist and nothing that they depend on has changed.

    Parameters
    ----------
    root
        The project's root.
    profile
        The profile's name.
    notebook
        The notebook.
    parameters
        What the profile gives it.
    """
    path = executed_path(root, profile, notebook)
    try:
        executed = json.loads(path.read_text(encoding="utf-8"))
        kept = executed["metadata"]["msif"]["key"]
    except (FileNotFoundError, ValueError, KeyError):
        return False
    record = _record_of(notebook, parameters)
    written = record is None or record.exists()
    return written and bool(kept == cache_key(root, notebook, parameters))


def _environment(root: Path, build: Path) -> dict[str, str]:
    """Return the environment of a kernel: this Python, this library, one thread."""
    # A kernel called python3 that someone registered for another Python must not be taken.
    kernel = build / "jupyter" / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    content = json.dumps({"argv": command, "display_name": "Python 3", "language": "python"})
    if not kernel.exists() or kernel.read_text(encoding="utf-8") != content:
        kernel.write_text(content, encoding="utf-8")
    environment = dict(os.environ)
    # The key covers the library under root, so that is the one to import.
    before = [environment["PYTHONPATH"]] if environment.get("PYTHONPATH") else []
    environment.update(
        JUPYTER_PATH=str(build / "jupyter"),
        PYTHONPATH=os.pathsep.join([str(root), *before]),
        OMP_NUM_THREADS="1",
        OPENBLAS_NUM_THREADS="1",
        MKL_NUM_THREADS="1",
        OMP_WAIT_POLICY="PASSIVE",
        # Frozen standard modules draw a warning from the debugger that ipykernel starts.
        PYDEVD_DISABLE_FILE_VALIDATION="1",
    )
    return environment


def _progress(path: Path) -> str:
    """Return how far a running notebook is, from the copy that papermill saves at each cell."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError):  # not there yet, or being written
        return ""
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    done = sum(cell["metadata"].get("papermill", {}).get("status") == "completed" for cell in code)
    return f"cell {min(done + 1, len(code))} of {len(code)}"


def _failure(path: Path, stderr: str) -> str:
    """Return the error of the failing cell, or papermill's last lines where no cell failed."""
    try:
        cells = nbformat.read(path, as_version=4).cells
    except (OSError, ValueError):
        cells = []
    codes = [cell for cell in cells if cell.cell_type == "code"]
    for number, cell in enumerate(codes, start=1):
        for output in cell.outputs:
            if output.output_type == "error":
                # papermill puts a banner cell of its own before the failing one.
                text = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(output.traceback))
                tail = "\n".join(text.strip().splitlines()[-12:])
                return f"code cell {number} raised {output.ename}: {output.evalue}\n{tail}"
    return "\n".join(stderr.strip().splitlines()[-8:])


def _report(name: str, state: str, seconds: float | None = None, note: str = "") -> None:
    """Print one line on one notebook."""
    took = "" if seconds is None else f"{seconds:6.1f} s"
    print(f"  {name:<20} {state:<10} {took:>9}  {note}".rstrip(), flush=True)


def _finish(
    root: Path,
    path: Path,
    notebook: Notebook,
    key: str,
    profile: str,
    parameters: dict[str, Any],
    took: float,
) -> None:
    """Give an executed copy its key, and take this machine's paths and papermill's times out."""
    # The copy can be downloaded from the book. A warning's text holds the path of its module.
    text = path.read_text(encoding="utf-8")
    text = text.replace(f"{json.dumps(str(root))[1:-1]}/", "")
    executed = nbformat.reads(text, as_version=4)
    executed.metadata.pop("papermill", None)
    for cell in executed.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
    known = dict(executed.metadata.get("msif", {}))
    known.update(key=key, profile=profile, parameters=parameters, seconds=round(took, 1))
    known["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    executed.metadata["msif"] = known
    nbformat.write(executed, path)


def execute(root: Path, profile: str, notebook: Notebook, parameters: dict[str, Any]) -> Outcome:
    """Execute one notebook, if what it depends on has changed.

    Parameters
    ----------
    root
        The project's root.
    profile
        The profile's name; it chooses the folder of the executed copy.
    notebook
        The notebook. It runs in its own folder, as it does in Jupyter.
    parameters
        What the profile gives it.

    Returns
    -------
    Outcome
        The executed copy is in place only if no cell failed.
    """
    target = executed_path(root, profile, notebook)
    if is_current(root, profile, notebook, parameters):
        _report(notebook.name, "unchanged")
        return Outcome(notebook, "unchanged", target)
    key = cache_key(root, notebook, parameters)  # of what is about to run, not of later edits
    target.parent.mkdir(parents=True, exist_ok=True)
    failed = target.with_suffix(".failed.ipynb")
    failed.unlink(missing_ok=True)
    running = target.with_suffix(".running.ipynb")
    running.unlink(missing_ok=True)
    settings = target.with_suffix(".parameters.yaml")
    # YAML and not JSON: papermill reads JSON's 1e-05 as text.
    settings.write_text(yaml.safe_dump(parameters, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "papermill", str(notebook.path), str(running)]
    command += ["--parameters_file", str(settings), "--kernel", "python3", "--language", "python"]
    command += ["--cwd", str(notebook.path.parent), "--no-progress-bar", "--log-level", "ERROR"]
    _report(notebook.name, "running")
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        env=_environment(root, root / "build" / profile),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while True:
            try:
                _, stderr = process.communicate(timeout=HEARTBEAT)
                break
            except subprocess.TimeoutExpired:
                _report(notebook.name, "running", time.monotonic() - started, _progress(running))
    finally:
        if process.poll() is None:
            process.terminate()
        settings.unlink(missing_ok=True)
    took = time.monotonic() - started
    if process.returncode:
        if running.exists():
            running.replace(failed)
        _report(notebook.name, "FAILED", took)
        return Outcome(notebook, "failed", failed, took, _failure(failed, stderr))
    _finish(root, running, notebook, key, profile, parameters, took)
    running.replace(target)
    _report(notebook.name, "executed", took)
    return Outcome(notebook, "executed", target, took)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep a second process out of a folder until this one is done with it.

    Parameters
    ----------
    folder
        The folder; made if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another run is at work in {folder}; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(
    root: Path = ROOT, profile: str = "default", names: Sequence[str] = (), jobs: int = 2
) -> list[Outcome]:
    """Execute the notebooks that changed.

    Parameters
    ----------
    root
        The project's root.
    profile
        The profile's name.
    names
        Names of notebooks; none means all.
    jobs
        How many run at once, each with one thread.

    Returns
    -------
    list of Outcome
        One for each notebook, in the order in which they ended.

    Raises
    ------
    ProjectError
        If a name, the profile or a parameter is wrong; then nothing was executed.
    """
    profiles = read_profile(root, profile)
    work = []
    for notebook in find_notebooks(root, names):
        parameters = parameters_of(notebook, profiles, profile)
        check_parameters(notebook, parameters, profile)
        work.append((notebook, parameters))
    # Those that read the others' records come last.
    turns = [[one for one in work if ("records" in one[1]) == last] for last in (False, True)]
    outcomes: list[Outcome] = []
    with lock(root / "build" / profile), ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
        for turn in turns:
            pending = [pool.submit(execute, root, profile, *one) for one in turn]
            try:
                outcomes += [future.result() for future in as_completed(pending)]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Parameters
    ----------
    arguments
        The command line without the program's name; by default this process's.
    """
    parser = argparse.ArgumentParser(
        prog="python -m msif_lib.study.runner",
        description="Execute the notebooks that changed, with a profile of parameters.",
    )
    parser.add_argument("names", nargs="*", help="names of notebooks; none means all")
    parser.add_argument("--profile", default="default", help="a file of notebooks/profiles")
    parser.add_argument("--jobs", type=int, default=2, help="how many notebooks run at once")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    print(f"Notebooks, profile {options.profile}", flush=True)
    try:
        outcomes = run(options.root.resolve(), options.profile, options.names, options.jobs)
    except ProjectError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    failures = [outcome for outcome in outcomes if outcome.state == "failed"]
    for outcome in failures:
        print(f"\nnotebook {outcome.notebook.name} failed: {outcome.error}", file=sys.stderr)
        if outcome.path.exists():
            print(f"open it to see where: {outcome.path}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
