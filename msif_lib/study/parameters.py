"""The parameters of a notebook: declared in a cell, checked before any work, kept in the record.

A notebook's cell tagged ``parameters`` gives every parameter a default and, where the default does
not say it all, a type. Values come from a profile of the runner, from papermill's ``-p`` and
``-y``, or from someone who edits the cell; all are held to the same rules.

papermill itself does not mind a name that nobody declared, nor a type: ``-p removal 50`` changes
nothing, ``-p renormalise false`` gives the text "false", which Python takes as true, and
``-y 'tol: 1e-6'`` a text too. Here such a text becomes the value that was meant, or is refused.
"""

from __future__ import annotations

import ast
import difflib
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from msif_lib.study.own import OWN, is_own, own_function
from msif_lib.study.records import write_record

#: Parameters that say where a notebook writes, or reads what others wrote.
PLACES = ("record", "records", "results", "checkpoint")

_INJECTED = "# Parameters"  # the first line of the cell that papermill puts in
_LARGEST_SEED = 2**32 - 1  # of NumPy's legacy generators, which scikit-learn uses

#: What holds in every notebook that has a parameter of this name.
EVERYWHERE = {
    "architecture": "architecture in ('cnn', 'mlp')",
    "head": "head in ('linear', 'mlp')",
    "dtype": "dtype in ('float64', 'float32')",
    "cases": "set(cases) <= {'fixed', 'updated'} and 0 < len(set(cases)) == len(cases)",
    "widths": "min(widths) > 0",
    "channels": "min(channels) > 0",
    "hidden": "hidden >= 1",
    "train_size": "train_size >= 1",
    "test_size": "test_size >= 1",
    "removals": "removals >= 3",  # a correlation needs three points
    "epochs": "epochs >= 1",
    "l2": "l2 > 0",  # else there may be no minimum
    "l2_pretrain": "l2_pretrain > 0",
    "l2_finetune": "l2_finetune > 0",
    "alpha": "alpha > 0",
    "learning_rate": "learning_rate > 0",
    "momentum": "momentum < 1",
    "gradient_tol": "gradient_tol > 0",
    "fraction": "0 < fraction <= 1",
}


@dataclass(frozen=True)
class Parameter:
    """A parameter of a notebook, as its ``parameters`` cell declares it.

    Parameters
    ----------
    name
        Its name.
    kinds
        The types that it may have, such as ``("list[int]", "None")``: its annotation's, or that of
        its default.
    default
        Its default; None where that is not a literal.
    """

    name: str
    kinds: tuple[str, ...]
    default: Any = None


def declared(source: str) -> dict[str, Parameter]:
    """Return what a cell declares.

    Parameters
    ----------
    source
        The cell, Python.

    Raises
    ------
    SyntaxError
        If it is not.

    Notes
    -----
    The cell is parsed with `ast`, not with `papermill.inspect_notebook`: that one matches regular
    expressions, overlooks an annotation such as ``int | None`` and infers no type without one.
    """
    found: dict[str, Parameter] = {}
    for statement in ast.parse(source).body:
        if not isinstance(statement, ast.Assign | ast.AnnAssign):
            continue
        target: ast.expr
        if isinstance(statement, ast.AnnAssign):
            target, annotation = statement.target, statement.annotation
        else:
            target, annotation = statement.targets[0], None
        if isinstance(target, ast.Name):
            default = _literal(statement.value)
            kinds = _kinds(annotation) if annotation else (_kind_of(default),)
            if isinstance(statement.value, ast.Constant) and default is None and annotation:
                kinds = tuple(dict.fromkeys((*kinds, "None")))
            if isinstance(default, list):  # tells what the entries of "list" are
                kinds = tuple(_kind_of(default) if kind == "list" else kind for kind in kinds)
            found[target.id] = Parameter(target.id, kinds, default)
    return found


def _literal(value: ast.expr | None) -> Any:
    """Return what an expression of literals stands for; None for any other."""
    try:
        return None if value is None else ast.literal_eval(value)
    except (ValueError, TypeError):
        return None


def _kinds(annotation: ast.expr) -> tuple[str, ...]:
    """Return the types in an annotation: ``list[int] | None`` is ``list[int]`` and ``None``.

    As text it may be ``"int or None"``: papermill reads no ``|``, and warns of the parameter.
    """
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return (*_kinds(annotation.left), *_kinds(annotation.right))
    if isinstance(annotation, ast.BoolOp) and isinstance(annotation.op, ast.Or):
        return tuple(kind for part in annotation.values for kind in _kinds(part))
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return _kinds(ast.parse(annotation.value, mode="eval").body)
    text = ast.unparse(annotation)
    optional = re.fullmatch(r"(?:typing\.)?Optional\[(.*)\]", text)
    return (*_kinds(ast.parse(optional[1], mode="eval").body), "None") if optional else (text,)


def _kind_of(default: Any) -> str:
    """Return the type of a default, a list's with that of its entries; ``Any`` for None."""
    if not isinstance(default, list):
        return "Any" if default is None else type(default).__name__
    entries: set[str] = {type(entry).__name__ for entry in default}
    if entries == {"int", "float"}:
        return "list[float]"
    return f"list[{entries.pop()}]" if len(entries) == 1 else "list"


def _accepts(kind: str, value: Any) -> bool:
    """Return whether a value may be given to a parameter of a type."""
    outer, _, inner = kind.removesuffix("]").partition("[")
    if outer == "Any":
        return True
    if outer == "None":
        return value is None
    if isinstance(value, bool):  # an int in Python, but never meant as one
        return outer == "bool"
    accepted: dict[str, tuple[type, ...]] = {
        "bool": (bool,),
        "int": (int,),
        "float": (float, int),
        "str": (str,),
        "list": (list, tuple),
        "tuple": (list, tuple),  # YAML has no tuples
        "Sequence": (list, tuple),
        "dict": (dict,),
    }
    if not isinstance(value, accepted.get(outer, (object,))):
        return False
    if inner and isinstance(value, list | tuple):
        kinds = _kinds(ast.parse(inner, mode="eval").body)
        return all(any(_accepts(kind, entry) for kind in kinds) for entry in value)
    return True


def _numbers(value: Any) -> list[float]:
    """Return the numbers in a value, which may be a list of lists."""
    if isinstance(value, list | tuple):
        return [number for entry in value for number in _numbers(entry)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def meant(parameter: Parameter, value: Any) -> Any:
    """Return what a text stands for where a parameter takes no text.

    Parameters
    ----------
    parameter
        The parameter.
    value
        What it is given. ``"false"`` may be False, ``"null"`` None, ``"[1, 2]"`` a list and
        ``"1e-6"``, a text for YAML, a number; in a list as well.

    Returns
    -------
    Any
        The value itself where it is of a type declared, or where no reading of it is.
    """
    if any(_accepts(kind, value) for kind in parameter.kinds):
        return value
    for read in (yaml.safe_load, ast.literal_eval):
        try:
            found = _read(value, read)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, yaml.YAMLError):
            continue
        if any(_accepts(kind, found) for kind in parameter.kinds):
            return found
    return value


def _read(value: Any, read: Callable[[str], Any]) -> Any:
    """Return a value with the texts in it read as Python or YAML."""
    if isinstance(value, list | tuple):
        return [_read(entry, read) for entry in value]
    return read(value) if isinstance(value, str) else value


def _mend(parameter: Parameter, value: Any) -> str:
    """Return how to write a value of the right type, where that can be guessed."""
    outer = {kind.split("[")[0] for kind in parameter.kinds}
    name = parameter.name
    if "bool" in outer:
        return f"; write -p {name} True or -p {name} False, in YAML true or false"
    if outer & {"list", "Sequence"} and not isinstance(value, list | tuple):
        return f"; write a list, such as -y '{name}: [...]'"
    if "int" in outer and isinstance(value, float) and value.is_integer():
        return f"; write {value:.0f}"
    return ""


def _short(value: Any) -> str:
    """Return a value as it is written, cut off where that is long."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def type_fault(parameter: Parameter, value: Any) -> str:
    """Return what is wrong with the type of a parameter's value, and how to mend it.

    Parameters
    ----------
    parameter
        The parameter.
    value
        What it is given.

    Returns
    -------
    str
        Empty where nothing is wrong: the value, or what a text stands for, is of a type declared,
        its numbers are finite, and none is negative if the default has none that is.
    """
    value = meant(parameter, value)
    is_list = isinstance(value, list | tuple)
    if not any(_accepts(kind, value) for kind in parameter.kinds):
        # Of a list it is an entry that is wrong, so the entries' type is told as well.
        kinds = [kind if is_list else kind.split("[")[0] for kind in parameter.kinds]
        fault = (
            f"must be {' or '.join(kinds)}, but is {_short(value)} ({type(value).__name__})"
            f"{_mend(parameter, value)}"
        )
    elif not all(math.isfinite(one) for one in _numbers(value) if isinstance(one, float)):
        fault = f"must be finite, but is {_short(value)}"
    elif min(_numbers(value), default=0) < 0 <= min(_numbers(parameter.default), default=0):
        fault = f"must not be negative, but is {_short(value)}"
    else:
        return ""
    return f"parameter {parameter.name} {fault}"


def unknown_fault(known: Mapping[str, Parameter], name: str) -> str:
    """Return what is wrong with a name that no parameter has, and which one may be meant.

    Parameters
    ----------
    known
        The parameters by name.
    name
        The name; one of theirs gives an empty text.
    """
    if name in known:
        return ""
    near = difflib.get_close_matches(name, known, n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    return f"unknown parameter {name}; {meant}known: {', '.join(known) or 'none'}"


def _is_declaration(source: str) -> bool:
    """Return whether a cell gives names their values and does nothing else."""
    try:
        statements = ast.parse(source).body
    except SyntaxError:
        return False
    return bool(statements) and all(
        isinstance(statement, ast.Assign | ast.AnnAssign) for statement in statements
    )


def _cells(
    history: Sequence[str], used: set[str]
) -> tuple[dict[str, Parameter], dict[str, Parameter]]:
    """Return what the parameters cell declares and what papermill put in, from the cells executed.

    Of the cells that only give values, that with most of the names used is the parameters cell, the
    last one of several: a reader may have executed it again, or tried a value in a cell of their
    own.
    """
    cells = [source for source in history if _is_declaration(source)]
    injected = [declared(source) for source in cells if source.startswith(_INJECTED)]
    given = [declared(source) for source in cells if not source.startswith(_INJECTED)]
    given.sort(key=lambda names: (len(names.keys() & used), len(names)))
    return given[-1] if given else {}, injected[-1] if injected else {}


def _seed_fault(name: str, value: Any) -> str:
    """Return what is wrong with a seed or a list of seeds."""
    seeds = value if isinstance(value, list | tuple) else [value]
    twice = [seed for seed in seeds if seeds.count(seed) > 1]
    if twice:
        return f"parameter {name} names {twice[0]} twice: every seed counts once"
    if not seeds and name == "seeds":
        return "parameter seeds must name at least one seed, but is []"
    if max(seeds, default=0) > _LARGEST_SEED:
        return f"parameter {name} must be at most {_LARGEST_SEED}, but is {_short(value)}"
    return ""


def _device_fault(name: str, device: str) -> str:
    """Return why torch cannot compute on a device."""
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        return f"parameter {name} = {device!r} names no device that works here ({reason}); try cpu"
    return ""


def _folder_fault(name: str, folder: Path, file: str = "") -> str:
    """Return why a file cannot be written to a folder, which is made if it can be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=f".{file}-", dir=folder):
            return ""
    except OSError as error:
        return (
            f"parameter {name}: nothing can be written to {folder} ({error.strerror or error}); "
            "name another place"
        )


def _checkpoint_fault(name: str, folder: str) -> str:
    """Return why a folder cannot keep trainings; none is named by an empty text."""
    return _folder_fault(name, Path(folder)) if folder else ""


def _record_fault(name: str, record: str) -> str:
    """Return why a record cannot be written; none is named by an empty text."""
    if not record:
        return ""
    path = Path(record)
    if path.suffix != ".json":
        return f"parameter {name} must name a file that ends in .json, but is {record!r}"
    if os.path.isdir(path):
        return f"parameter {name} = {record!r} is a folder; name a file in it"
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):  # none is there, or a spoiled one, which will be replaced
        found = None
    if found is not None and not (isinstance(found, dict) and "provenance" in found):
        return f"parameter {name} = {record!r} is a file of another kind; name another one"
    return _folder_fault(name, path.parent, path.name)


# By name, what else is looked at in every notebook.
_FAULTS = {
    "seed": _seed_fault,
    "seeds": _seed_fault,
    "other_seeds": _seed_fault,
    "device": _device_fault,
    "checkpoint": _checkpoint_fault,
    "record": _record_fault,
}


def _own_fault(name: str, place: str) -> str:
    """Return why the user's own function cannot be called."""
    try:
        own_function(name, place)
    except ValueError as error:
        return f"parameter {error}"
    return ""


def _names(condition: str) -> list[str]:
    """Return the names in a condition, in their order."""
    nodes = [node for node in ast.walk(ast.parse(condition)) if isinstance(node, ast.Name)]
    nodes.sort(key=lambda node: (node.lineno, node.col_offset))
    return list(dict.fromkeys(node.id for node in nodes))


def _condition_fault(condition: str, namespace: dict[str, Any], names: Sequence[str]) -> str:
    """Return why a condition does not hold: with the values of parameters, and with choices."""
    values = ", ".join(f"{name} = {_short(namespace[name])}" for name in names)
    fault = f"{values}, but {condition} must hold"
    try:
        if eval(condition, namespace):
            return ""
    except ValueError as error:
        told = any(name in str(error) for name in names)
        return str(error) if told else f"{fault} ({error})"
    except NameError as error:
        return f"{error}: run the cells above first, that of the parameters among them"
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        return f"{fault} ({error})"
    body = ast.parse(condition, mode="eval").body
    if isinstance(body, ast.Compare) and isinstance(body.ops[0], ast.In) and len(names) == 1:
        if names[0] in OWN and is_own(namespace[names[0]]):
            return _own_fault(names[0], namespace[names[0]])
        choices = list(eval(ast.unparse(body.comparators[0]), namespace))
        value = namespace[names[0]]
        near = difflib.get_close_matches(str(value), map(str, choices), n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        return f"parameter {names[0]} must be one of {choices}, but is {_short(value)}{meant}"
    return fault


class Parameters(Mapping[str, Any]):
    """All parameters of a notebook, with the values that it runs with.

    Parameters
    ----------
    values
        Every parameter declared, by name.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)
        self._started = time.perf_counter()

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def write_record(
        self, section: str, values: Mapping[str, Any], dataset: str | None = None
    ) -> float:
        """Write what came out, with all parameters but `PLACES`, to the file named ``record``.

        Parameters
        ----------
        section, values
            As for :func:`msif_lib.study.records.write_record`.
        dataset
            The data set; by default the parameter of that name.

        Returns
        -------
        float
            Seconds since the parameters were checked. Nothing is written where ``record`` is empty
            or no parameter.

        Raises
        ------
        ValueError, TypeError
            As for :func:`msif_lib.study.records.write_record`.
        """
        seconds = time.perf_counter() - self._started
        if self.get("record"):
            write_record(
                self["record"],
                section,
                self["dataset"] if dataset is None else dataset,
                values,
                {name: value for name, value in self.items() if name not in PLACES},
                self["seeds"] if "seeds" in self else [self["seed"]] if "seed" in self else [],
                seconds,
                device=self.get("device", "cpu"),
                dtype=getattr(torch, self.get("dtype", "float64")),
            )
        return seconds


def check_parameters(namespace: dict[str, Any], *conditions: str) -> Parameters:
    """Refuse a notebook's parameters before any work is done with them.

    Call it in the first cell after the parameters. What the parameters cell declares and what
    papermill has put in beside it is read from IPython's ``In``.

    Parameters
    ----------
    namespace
        The notebook's names: ``globals()``. A text that stands for a number, a truth value, None
        or a list, where the parameter is of such a type, is replaced by it.
    conditions
        What must hold in this notebook, as Python: ``"0 < share < 1"``. A condition of the form
        ``"solver in ('cg', 'dense')"`` is told as a choice, beside which those named in
        `msif_lib.study.own.OWN` may be a function of the user's. One that calls what raises a
        ValueError is told in the error's words. A condition is left out where a type of what it
        names is wrong already.

    Returns
    -------
    given : Parameters
        All of them with their values, to be handed to the record as a whole.

    Raises
    ------
    ValueError
        With all that is wrong: a name that is no parameter's, a type, a number that is not finite
        or negative, a condition of these or of `EVERYWHERE`, a seed that is named twice, a device
        that torch does not have, a folder or a record that cannot be written.

    Notes
    -----
    Without IPython, as in a notebook turned into a script, only the conditions are looked at, and
    a record holds no parameters.
    """
    used = {name for condition in conditions for name in _names(condition)}
    known, injected = _cells(namespace.get("In", ()), used)
    faults = [fault for name in injected if known and (fault := unknown_fault(known, name))]
    wrong = set()
    for name, parameter in known.items():
        if name not in namespace:
            continue
        if fault := type_fault(parameter, namespace[name]):
            faults.append(fault)
            wrong.add(name)
        namespace[name] = meant(parameter, namespace[name])
    everywhere = [
        EVERYWHERE[name] for name in known if namespace.get(name) is not None and name in EVERYWHERE
    ]
    for condition in [*everywhere, *conditions]:
        names = [name for name in _names(condition) if name in known]
        if wrong.isdisjoint(names) and (fault := _condition_fault(condition, namespace, names)):
            faults.append(fault)
            wrong.update(names)
    # The last of them writes.
    for name, look in _FAULTS.items():
        if name in known and name in namespace and name not in wrong and not faults:
            faults += [fault] if (fault := look(name, namespace[name])) else []
    if faults:
        raise ValueError("\n".join(dict.fromkeys(faults)))
    return Parameters({name: namespace[name] for name in known if name in namespace})
