"""Records, as a table for people or as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

Record = dict[str, Any]  # field name -> value; None where the field does not apply


def write(records: Iterable[Record], as_json: bool, notes: Sequence[str] = (), file: TextIO | None = None) -> None:
    """Write records.

    Args:
        records: What was measured; the fields of a table's columns are those of its first record.
        as_json: Whether to write a JSON list, which holds every field, instead of a table.
        notes: Lines below the table: how to read it.
        file: Where to; standard output by default.
    """
    records = list(records)
    if as_json:
        print(json.dumps(records, indent=1), file=file)
        return
    print(table(records), file=file)
    for note in notes:
        print(note, file=file)


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return records as text, a row each; fields that hold dicts become columns of their own."""
    if not records:
        return "nothing to show"
    rows = [dict(_flat(record)) for record in records]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([_text(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    numeric = [all(not isinstance(row.get(name), str) for row in rows) for name in columns]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    )


def _flat(record: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from value.items()
        else:
            yield name, value


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "-"
    return str(value)
