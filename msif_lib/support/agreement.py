"""What processes that share the data must have been given alike, beside the stages themselves.

Each runs every formula by itself on sums over all. Another damping in one of them would mix two
problems into numbers on which all agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from msif_lib.support.fingerprint import fingerprint

# A stage is compared by itself; states of a path follow from its steps.
_LEFT_OUT = {"stage", "states"}


def require_agreement(links: Sequence[Any], names: Sequence[str], **asked: Any) -> None:
    """Refuse on all processes a call that was not given the same to all; of one process nothing.

    Parameters
    ----------
    links, names
        Of a chain, whose settings are compared.
    asked
        What else the call was given, by name.

    Raises
    ------
    ValueError
        It differs; the message names what.
    """

    def given() -> dict[str, str]:
        settings = dict(asked)
        for link, name in zip(links, names, strict=True):
            settings |= {f"{what} of {name}": value for what, value in _settings("link", link)}
        return {name: _digest(value) for name, value in settings.items()}

    for link in links:
        link.stage.reader.require_alike(given)


def _settings(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A dataclass's class and its settings, those of a solver or an optimiser one by one."""
    if not is_dataclass(value):
        yield name, value
        return
    yield name, type(value).__name__
    for field in fields(value):
        if field.name not in _LEFT_OUT:
            inner = field.name if name == "link" else f"{name}.{field.name}"
            yield from _settings(inner, getattr(value, field.name))


def _digest(value: Any) -> str:
    """Of plain values and tensors; of what has no digest, its class."""
    try:
        return fingerprint(value)
    except TypeError:
        return type(value).__name__
