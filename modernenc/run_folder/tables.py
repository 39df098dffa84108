"""Metrics of a run as tables: `metrics.csv` (training), `validation.csv` and `evaluations.csv`, appended to, and cut back on
resume."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ALL = "all"
"""Name of the row of `validation.csv` that covers all sources together."""
FIXED_RATIO = 0.15
"""Mask ratio at which every model and phase is validated, so that losses compare."""
_COLUMNS: dict[str, dict[str, type]] = {
    "metrics.csv": {
        "step": int, "tokens_seen": int, "phase": str, "objective": str, "loss": float, "grad_norm": float, "lr": float,
        "weight_decay": float, "batch_rows": int, "seq_len": int, "mask_ratio": float, "tokens_per_s": float,
        "seconds": float, "skipped": int,
    },
    "validation.csv": {
        "step": int, "tokens_seen": int, "phase": str, "source": str, "seq_len": int, "mask_ratio": float, "loss": float,
        "accuracy": float, "targets": int,
    },
    "evaluations.csv": {
        "step": int, "tokens_seen": int, "checkpoint": str, "suite": str, "task": str, "score": float, "error": float,
    },
}  # fmt: skip
"""Columns of the tables, in order, with the types of their values: all that a row may and must have."""
_REWRITTEN = ".tmp"
"""Suffix of a table that is being written anew."""


class Table:
    """A CSV file that grows by rows with the same columns, the first of which is `step`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Add rows by a single write, so that a kill leaves all of them or none; numbers are written with all their digits."""
        text = io.StringIO(newline="")
        columns = _COLUMNS[self.path.name.removesuffix(_REWRITTEN)]
        if any(list(row) != list(columns) for row in rows):
            raise KeyError(f"{self.path.name}: a row has {', '.join(rows[0])}, but _COLUMNS says {', '.join(columns)}")
        writer = csv.DictWriter(text, fieldnames=list(columns))
        if not self.path.exists():
            writer.writeheader()
        writer.writerows(rows)
        try:
            with self.path.open("ab", buffering=0) as file:
                file.write(text.getvalue().encode())
        except OSError as error:
            error.filename = str(self.path)  # which the system does not name when a write fails
            raise

    def read(self) -> list[dict[str, str]]:
        """Return all rows, but for a last one that is still being written, or that a kill cut short.

        Raises ValueError, naming file and line, for a row that is damaged otherwise.
        """
        if not self.path.exists():
            return []
        line = 1
        try:
            text = self.path.read_bytes().decode()
            reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""), strict=True)
            columns, rows = _COLUMNS[self.path.name], []
            if reader.fieldnames is not None and list(reader.fieldnames) != list(columns):
                raise ValueError(f"its columns are {', '.join(reader.fieldnames)!r}, expected {', '.join(columns)!r}")
            for row in reader:
                line = reader.line_num
                _check(row, columns)
                rows.append(row)
        except (ValueError, csv.Error) as error:
            raise ValueError(
                f"{self.path}, line {line}: {error}; restore the file from a copy, or delete what is damaged"
            ) from error
        return rows

    def cut_after(self, step: int) -> None:
        """Drop the rows of later steps, which a resumed run will write again, and a last row that a kill cut short."""
        rows = [row for row in self.read() if int(row["step"]) <= step]
        if not rows:
            self.path.unlink(missing_ok=True)
            return
        rewritten = self.path.with_name(self.path.name + _REWRITTEN)
        rewritten.unlink(missing_ok=True)
        Table(rewritten).append(*rows)
        rewritten.replace(self.path)


def _check(row: dict[str, Any], columns: Mapping[str, type]) -> None:
    """Raise ValueError unless a row has a value of its type for each column, and no more."""
    if None in row or None in row.values():
        raise ValueError(f"expected {len(columns)} values")
    for name, kind in columns.items():
        if not row[name].isprintable():
            raise ValueError(f"{name} is {row[name]!r}")
        if kind is int and not 0 <= int(row[name]) < 1 << 53:
            raise ValueError(f"{name} is {row[name]}, expected a count")
        kind(row[name])
