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

A run writes into a folder of its own, ``build/<profile>/runs/<name>-<random>``. Only when it ended
well are its record and its executed copy put in place. A run ends with the runner, however that one
ends, so that none comes late.

An executed copy is kept as ``build/<profile>/executed/<name>.ipynb`` with a key in its metadata, a
hash of all that its outputs depend on: the notebook, the parameters, the versions of the packages,
the code (without comments and docstrings) of the project's modules that it imports and that these
import, with the data that lie beside a module under its name, and the files that the notebook's
metadata list under ``msif.inputs`` (glob patterns from the project's root). Beside the key stand
the sums of the copy itself and of its record. While all of them hold, the notebook is not executed
again. A module imported by a name that is put together at run time is not seen; list it there. A
notebook that fails is left as ``<name>.failed.ipynb`` beside it.
"""

from __future__ import annotations

import argparse
import datetime
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import nbformat
import yaml
from filelock import FileLock, Timeout

from msif_lib.study.copies import put, read_known, sealed, sum_of
from msif_lib.study.imports import code_of, files_beside, imported_files
from msif_lib.study.own import OWN, is_own
from msif_lib.study.parameters import PLACES, Parameter, declared, type_fault, unknown_fault
from msif_lib.support.atomic import clear
from msif_lib.support.lifeline import Children, command

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
_ROOM = 1_000_000  # bytes that a copy may take
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
    # A name that leads to another folder is not among them.
    known = {path.stem: path for path in sorted((root / PROFILES).glob("*.yaml"))}
    if profile not in known:
        raise ProjectError(f"no profile is called {profile}; known: {', '.join(known) or 'none'}")
    try:
        content = yaml.safe_load(known[profile].read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
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
    """
    known: dict[str, Parameter] = {}
    for cell in notebook.read().cells:
        if cell.cell_type != "code" or "parameters" not in cell.metadata.get("tags", []):
            continue
        try:
            known |= declared(cell.source)
        except SyntaxError as error:
            raise ProjectError(
                f"notebook {notebook.name}: its parameters cell is not valid Python: {error}"
            ) from error
    return known


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
    known = declared_parameters(notebook)
    # From the notebook's folder, in which it runs.
    up = "../" * (len(FOLDERS[notebook.section].parts))
    folder = f"{up}build/{profile}/records"
    given = {"record": f"{folder}/{notebook.name}.json", "records": folder}
    own = {name: value for name, value in given.items() if name in known}
    return own | profiles.get(notebook.name, {})


def _record_of(notebook: Notebook, parameters: dict[str, Any]) -> Path | None:
    """Return the file that a notebook writes its numbers to, if any."""
    record = parameters.get("record")
    return _place(notebook, record) if record else None


def _place(notebook: Notebook, place: str) -> Path:
    """Return the path that is meant by one relative to the notebook's folder."""
    return Path(os.path.normpath(notebook.path.parent / place))


def check_profile(notebook: Notebook, parameters: dict[str, Any], profile: str) -> None:
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
    known = declared_parameters(notebook)
    for name, value in parameters.items():
        fault = type_fault(known[name], value) if name in known else unknown_fault(known, name)
        if fault:
            raise ProjectError(f"profile {profile}, notebook {notebook.name}: {fault}")


def check_places(root: Path, notebook: Notebook, parameters: dict[str, Any], profile: str) -> None:
    """Check that a run writes within the project.

    Parameters
    ----------
    root
        The project's root.
    notebook
        The notebook.
    parameters
        What it is run with.
    profile
        The profile's name, for the message.

    Raises
    ------
    ProjectError
        If a place lies outside of the project, or a record is no JSON file. Whoever wants a record
        elsewhere runs papermill by hand.
    """
    where = f"profile {profile}, notebook {notebook.name}"
    bases = [base.resolve() for base in (root, root / "build")]
    for name in PLACES:
        if not parameters.get(name):
            continue
        path = _place(notebook, parameters[name])
        # Links are followed; the build folder may be one.
        inside = any(path.resolve().is_relative_to(base) for base in bases)
        if not (path.is_relative_to(root) and inside):
            raise ProjectError(
                f"{where}: {name} must lie within the project, but is {parameters[name]}; to "
                "write elsewhere run papermill by hand"
            )
        if name == "record" and path.suffix != ".json":
            raise ProjectError(f"{where}: record must end with .json, but is {parameters[name]}")


def _refuse_unwritable(folders: set[Path]) -> None:
    """Refuse folders that nothing can be written into, or on whose disk there is no room."""
    for folder in sorted(folders):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
                file.write(bytes(_ROOM))
        except OSError as error:
            raise ProjectError(_unwritable(folder, error)) from error


def _unwritable(path: Path, error: OSError) -> str:
    """Say that something can't be written, and what to do about it."""
    mend = "make room there" if error.errno in _FULL else "make it a folder that you may write into"
    path = error.filename2 or error.filename or path
    return f"{path} cannot be written ({error.strerror}); {mend}"


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
        if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            raise ProjectError(
                f"notebook {notebook.name}: msif.inputs names {pattern}, which is not within the "
                "project"
            )
        files += root.glob(pattern)
    if "records" in parameters:
        files += _place(notebook, parameters["records"]).glob("*.json")
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
    """Return whether copy and record are whole and nothing that they depend on has changed.

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
    known = read_known(executed_path(root, profile, notebook))
    # What the user's own functions depend on is not seen, so that they are called every time.
    if known is None or any(is_own(parameters.get(name)) for name in OWN):
        return False
    record = _record_of(notebook, parameters)
    if record is not None and known.get("record") != sum_of(record):
        return False
    return bool(known.get("key") == cache_key(root, notebook, parameters))


def _environment(root: Path, build: Path) -> dict[str, str]:
    """Return the environment of a kernel: this Python, this library, one thread."""
    # A kernel called python3 that someone registered for another Python must not be taken.
    arguments = command("ipykernel_launcher", "-f", "{connection_file}")
    content = json.dumps({"argv": arguments, "display_name": "Python 3", "language": "python"})
    put(build / "jupyter" / "kernels" / "python3" / "kernel.json", content)
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


def _keep(run: Run, notebook: Notebook, key: str, parameters: dict[str, Any], took: float) -> None:
    """Put record and executed copy of a run in place, without this machine's paths and times."""
    # The copy can be downloaded from the book. A warning's text holds the path of its module.
    text = run.shown(run.copy.read_text(encoding="utf-8"))
    executed = nbformat.reads(text, as_version=4)
    executed.metadata.pop("papermill", None)
    for cell in executed.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
    known = dict(executed.metadata.get("msif", {}))
    known.update(key=key, profile=run.profile, parameters=parameters, seconds=round(took, 1))
    known["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    # A record without its copy is seen to be of another run.
    if run.record is not None:
        put(run.record, run.shown(run.own_record.read_text(encoding="utf-8")))
        known["record"] = sum_of(run.record)
    executed.metadata["msif"] = known
    put(executed_path(run.root, run.profile, notebook), sealed(executed))


@dataclass(frozen=True)
class Run:
    """The files of one run, in a folder that nothing else writes into.

    Parameters
    ----------
    root
        The project's root.
    profile
        The profile's name.
    folder
        The run's folder.
    record
        Where its record will be; None where it writes none.
    """

    root: Path
    profile: str
    folder: Path
    record: Path | None

    @property
    def copy(self) -> Path:
        """The executed copy, while it comes to be."""
        return self.folder / "executed.ipynb"

    @property
    def own_record(self) -> Path:
        """Where the run writes its record."""
        return self.folder / ("record.json" if self.record is None else self.record.name)

    def parameters(self, notebook: Notebook, parameters: dict[str, Any]) -> Path:
        """Write the parameters, with the run's own record, and return the file."""
        if self.record is not None:
            own = os.path.relpath(self.own_record, notebook.path.parent)
            parameters = {**parameters, "record": Path(own).as_posix()}
        path = self.folder / "parameters.yaml"
        # YAML and not JSON: papermill reads JSON's 1e-05 as text.
        path.write_text(yaml.safe_dump(parameters, sort_keys=False), encoding="utf-8")
        return path

    def shown(self, text: str) -> str:
        """Return a text of the run with places as a reader knows them, from the project's root."""
        if self.record is not None:
            own = self.own_record.relative_to(self.root).as_posix()
            text = text.replace(own, self.record.relative_to(self.root).as_posix())
        return text.replace(f"{json.dumps(str(self.root))[1:-1]}/", "")


def _foreign_records(
    root: Path, profile: str, notebook: Notebook, parameters: dict[str, Any]
) -> list[str]:
    """Return the records that a notebook would read and that their notebooks did not leave so."""
    folder = root / "build" / profile / "records"
    if "records" not in parameters or _place(notebook, parameters["records"]) != folder:
        return []
    found = []
    for path in sorted(folder.glob("*.json")):
        known = read_known(folder.with_name("executed") / f"{path.stem}.ipynb")
        if known is None or known.get("record") != sum_of(path):
            found.append(path.name)
    return found


def execute(
    root: Path, profile: str, notebook: Notebook, parameters: dict[str, Any], children: Children
) -> Outcome:
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
    children
        Ends the run when this process ends.

    Returns
    -------
    Outcome
        Copy and record are in place only if no cell failed.
    """
    target = executed_path(root, profile, notebook)
    if is_current(root, profile, notebook, parameters):
        _report(notebook.name, "unchanged")
        return Outcome(notebook, "unchanged", target)
    failed = target.with_suffix(".failed.ipynb")
    started = time.monotonic()
    try:
        failed.unlink(missing_ok=True)
        error = _run(root, profile, notebook, parameters, children, failed)
    except OSError as fault:
        error = _unwritable(target, fault)
    took = time.monotonic() - started
    if children.ended:
        return Outcome(notebook, "interrupted", failed, took, "interrupted")
    if error:
        _report(notebook.name, "FAILED", took)
        return Outcome(notebook, "failed", failed, took, error)
    _report(notebook.name, "executed", took)
    return Outcome(notebook, "executed", target, took)


def _run(
    root: Path,
    profile: str,
    notebook: Notebook,
    parameters: dict[str, Any],
    children: Children,
    failed: Path,
) -> str:
    """Execute a notebook in a folder of its own; return what went wrong, or nothing."""
    foreign = _foreign_records(root, profile, notebook, parameters)
    if foreign:
        return (
            f"in build/{profile}/records, {', '.join(foreign)} is not what a notebook left there; "
            "execute all notebooks again, or remove what belongs to none"
        )
    key = cache_key(root, notebook, parameters)  # of what is about to run, not of later edits
    runs = root / "build" / profile / "runs"
    folder = Path(tempfile.mkdtemp(prefix=f"{notebook.name}-", dir=runs))
    run = Run(root, profile, folder, _record_of(notebook, parameters))
    arguments = [str(notebook.path), str(run.copy)]
    arguments += ["--parameters_file", str(run.parameters(notebook, parameters))]
    arguments += ["--kernel", "python3", "--language", "python", "--cwd", str(notebook.path.parent)]
    arguments += ["--no-progress-bar", "--log-level", "ERROR"]
    _report(notebook.name, "running")
    started = time.monotonic()
    process = children.start(
        "papermill",
        arguments,
        _environment(root, root / "build" / profile),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    while True:
        try:
            _, stderr = process.communicate(timeout=HEARTBEAT)
            break
        except subprocess.TimeoutExpired:
            _report(notebook.name, "running", time.monotonic() - started, _progress(run.copy))
    error = ""
    if process.returncode:
        if run.copy.exists() and not children.ended:
            run.copy.replace(failed)
        error = _failure(failed, stderr) or f"its process ended with status {process.returncode}"
    elif run.record is not None and not run.own_record.exists():
        error = "it wrote no record, though it has the parameter record"
    else:
        _keep(run, notebook, key, parameters, time.monotonic() - started)
    shutil.rmtree(folder, ignore_errors=True)
    return error


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep a second process out of a folder until this one is done with it.

    Parameters
    ----------
    folder
        The folder; made if it does not exist.

    Raises
    ------
    ProjectError
        If the folder can't be written into.
    """
    held = FileLock(folder / "lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire(timeout=0)
        except Timeout:
            print(f"another run is at work in {folder}; waiting for it", flush=True)
            held.acquire()
    except OSError as error:
        raise ProjectError(_unwritable(folder, error)) from error
    try:
        yield
    finally:
        held.release()


def _ended(pending: Sequence[Future[Outcome]]) -> Iterator[Future[Outcome]]:
    """Yield what has ended, as it ends. Waking each second, no interrupt is overslept."""
    left = set(pending)
    while left:
        done, left = wait(left, timeout=1, return_when=FIRST_COMPLETED)
        yield from done


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
        If a name, the profile or a parameter is wrong, or a folder can't be written into; then
        nothing was executed.
    """
    if sys.platform == "win32":
        raise ProjectError(
            "notebooks are executed on Linux and macOS; on Windows use WSL (the library itself "
            "works there)"
        )
    if jobs < 1:
        raise ProjectError(f"jobs must be 1 or more, but is {jobs}")
    profiles = read_profile(root, profile)
    work = []
    for notebook in find_notebooks(root, names):
        parameters = parameters_of(notebook, profiles, profile)
        check_profile(notebook, parameters, profile)
        check_places(root, notebook, parameters, profile)
        work.append((notebook, parameters))
    # Those that read the others' records come last.
    turns = [[one for one in work if ("records" in one[1]) == last] for last in (False, True)]
    outcomes: list[Outcome] = []
    build = root / "build" / profile
    with (
        lock(build),
        ThreadPoolExecutor(max_workers=jobs) as pool,
        Children() as children,
    ):
        # Left by a runner that was killed; while the lock is held nobody else is at work.
        shutil.rmtree(build / "runs", ignore_errors=True)
        records = {record.parent for one in work if (record := _record_of(*one))}
        _refuse_unwritable({build / "runs", build / "executed", *records})
        for folder in (build / "executed", *records):
            clear(folder)
        for turn in turns:
            pending = [pool.submit(execute, root, profile, *one, children) for one in turn]
            try:
                outcomes += [future.result() for future in _ended(pending)]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return outcomes


def _number(text: str) -> int:
    """Return a number of processes, as the command line gives it."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"must be a number, 1 or more, but is {text!r}")
    return int(text)


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
    parser.add_argument("--jobs", type=_number, default=2, help="how many notebooks run at once")
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
