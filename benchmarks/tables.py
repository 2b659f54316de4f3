"""The records of :mod:`benchmarks` as rows of tables, for the terminal and for the book."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

OURS = "msif MinRes"


#: A task, the number of test functionals and, where it iterates, of iterations allowed.
Key = tuple[str, int, int | None]


def key(row: Mapping[str, Any]) -> Key:
    """What a measurement was of."""
    return row["task"], row["columns"], row.get("limit")


def grouped(record: Mapping[str, Any]) -> dict[Key, list[dict[str, Any]]]:
    """The measurements of a record by what they are of, in the order of the run."""
    groups: dict[Key, list[dict[str, Any]]] = {}
    for row in record["values"]["rows"]:
        groups.setdefault(key(row), []).append(row)
    return groups


def number(value: float | None, digits: int = 2) -> str:
    """A positive number with so many significant digits, without a power of ten where it can."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e5:
        return f"{value:.{digits - 1}e}"
    text = f"{float(f'{value:.{digits}g}'):,f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def shown(row: Mapping[str, Any]) -> dict[str, str]:
    """One measurement as a row of a table."""
    if row["status"] != "ok":
        return {"method": row["method"], "seconds": row["status"]}
    lowest, median = row.get("pearson_lowest"), row.get("pearson_median")
    r = "" if lowest is None else f"{lowest:.3f}"
    if lowest is not None and f"{median:.3f}" != r:
        r = f"{median:.3f} ({lowest:.3f})"
    return {
        "method": row["method"],
        "seconds": number(row["median_seconds"], 3),
        "ratio": number(row.get("ratio")),
        "residual": f"{row['residual']:.0e}" if "residual" in row else "",
        "r": r,
        "peak MB": f"{row['peak']:,.0f}",
        "of it imports and data": f"{row['baseline']:,.0f}",
    }


def markdown(rows: Iterable[Mapping[str, str]]) -> str:
    """Rows as a Markdown table, aligned so that it reads in a terminal as well."""
    rows = list(rows)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines: list[Sequence[str]] = [columns]
    lines += [[row.get(column, "") for column in columns] for row in rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]

    def text(line: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([text(lines[0]), rule, *map(text, lines[1:])])


def report(record: Mapping[str, Any]) -> str:
    """All tables of a record, as Markdown."""
    titles = {
        "solve": "A x = b",
        "score": "all scores, x given",
        "approximate": "approximations: fit and all scores",
    }
    parts = [f"## {record['dataset']}: {record['values']['about']}"]
    for (task, columns, limit), group in grouped(record).items():
        allowed = f", at most {limit} iterations" if limit else ""
        table = markdown(shown(row) for row in group)
        parts.append(f"### {titles[task]}, T = {columns}{allowed}\n\n{table}")
    rows = record["values"]["rows"]
    for title, found in (
        ("what failed", [(row, row["error"]) for row in rows if "error" in row]),
        ("what the libraries said", [(row, word) for row in rows for word in row.get("words", [])]),
    ):
        lines = [f"- {row['method']}, {row['task']}, T = {row['columns']}: {w}" for row, w in found]
        if lines:
            parts.append(f"### {title}\n\n" + "\n".join(lines))
    if record["values"]["units"]:
        rows = [
            {"work": name, "forward passes": number(value, 3)}
            for name, value in record["values"]["units"]["forward_passes"].items()
        ]
        parts.append(f"### units\n\n{markdown(rows)}")
    return "\n\n".join(parts) + "\n"
