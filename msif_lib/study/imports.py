"""What Python code imports, read from its text: nothing is executed.

`imported_files` follows imports from one module of a project to the next, and `code_of` gives a
module's code without what no result depends on: comments, positions and docstrings. A module that
is imported by a name put together at run time is not seen, nor is a docstring that the code reads.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

_NEVER = ("TYPE_CHECKING", "typing.TYPE_CHECKING")


@lru_cache(maxsize=1024)
def imported_names(source: str, package: str = "") -> frozenset[str]:
    """Return the dotted names that a text imports, at the top and within functions.

    Parameters
    ----------
    source
        Python.
    package
        The dotted name of the package it stands in, from which its relative imports start.

    Returns
    -------
    frozenset of str
        For ``import a.b``, ``a.b``; for ``from a import b``, both ``a`` and ``a.b``, since ``b``
        may be a module; for ``from a import *``, ``a`` and ``a.*``. What stands under
        ``if TYPE_CHECKING:`` is never imported and left out.

    Raises
    ------
    SyntaxError
        If the text is not valid Python.
    """
    names: set[str] = set()
    for node in _executed(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - (node.level - 1)]
                base = ".".join([*above, *([base] if base else [])])
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return frozenset(names)


def _executed(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below one, but those that only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in _NEVER:
            for statement in child.orelse:
                yield statement
                yield from _executed(statement)
        else:
            yield child
            yield from _executed(child)


@lru_cache(maxsize=1024)
def code_of(source: str) -> str:
    """Return the syntax tree of a text as a string, without comments, positions and docstrings.

    Parameters
    ----------
    source
        Python.

    Raises
    ------
    SyntaxError
        If the text is not valid Python.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [one for one in body if not _is_text(one)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_text(statement: ast.stmt) -> bool:
    """Whether a statement is a docstring or another text that does nothing."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def package_of(root: Path, path: Path) -> str:
    """Return the dotted name of the package that a module stands in, or is."""
    return ".".join(path.relative_to(root).parent.parts)


def module_files(root: Path, name: str) -> list[Path]:
    """Return the files that an import executes: those of the packages above, and the module's.

    Parameters
    ----------
    root
        The folder that the project's modules are imported from.
    name
        As `imported_names` gives it. ``a.*`` stands for all modules of the package ``a``.

    Returns
    -------
    list of Path
        Empty for what is no module of the project.
    """
    files = []
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        at = root.joinpath(*parts[:end])
        if at.name == "*":
            files += sorted(at.parent.glob("*.py"))
        elif (at / "__init__.py").is_file():
            files.append(at / "__init__.py")
        elif at.with_name(f"{at.name}.py").is_file():
            files.append(at.with_name(f"{at.name}.py"))
    return files


def imported_files(root: Path, sources: Iterable[str]) -> list[Path]:
    """Return the project's modules that texts import, and those that these import, and so on.

    Parameters
    ----------
    root
        The folder that the project's modules are imported from.
    sources
        Python texts, such as the cells of a notebook.

    Returns
    -------
    list of Path
        Sorted.

    Raises
    ------
    SyntaxError
        If a text or a module is not valid Python.
    """
    found: set[Path] = set()
    waiting = [(source, "") for source in sources]
    while waiting:
        for name in imported_names(*waiting.pop()):
            for file in set(module_files(root, name)) - found:
                found.add(file)
                waiting.append((file.read_text(encoding="utf-8"), package_of(root, file)))
    return sorted(found)


def files_beside(module: Path) -> list[Path]:
    """Return the files of a module's name with other endings: the data that it comes with."""
    beside = module.parent.glob(f"{module.stem}.*")
    return sorted(path for path in beside if path.is_file() and path.suffix not in (".py", ".pyc"))
