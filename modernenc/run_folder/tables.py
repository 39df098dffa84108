"""Metrics of a run as tables: `metrics.csv` (training) and `validation.csv`, appended to, and cut back on resume."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ALL = "all"
"""Name of the row of `validation.csv` that covers all sources together."""


class Table:
    """A CSV file that grows by rows with the same columns, the first of which is `step`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Add rows by a single write, so that a kill leaves all of them or none; numbers are written with all their digits."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=list(rows[0]))
        if not self.path.exists():
            writer.writeheader()
        writer.writerows(rows)
        with self.path.open("ab", buffering=0) as file:
            file.write(text.getvalue().encode())

    def read(self) -> list[dict[str, str]]:
        """Return all rows."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def cut_after(self, step: int) -> None:
        """Drop the rows of later steps, which a resumed run will write again, and a last row that a kill cut short."""
        rows = [row for row in self.read() if _is_whole(row) and int(row["step"]) <= step]
        if not rows:
            self.path.unlink(missing_ok=True)
            return
        rewritten = self.path.with_suffix(".csv.tmp")
        rewritten.unlink(missing_ok=True)
        Table(rewritten).append(*rows)
        rewritten.replace(self.path)


def _is_whole(row: dict[str, str]) -> bool:
    """Return whether a row has a value for each column, and no more."""
    return None not in row.values() and None not in row
