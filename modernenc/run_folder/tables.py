"""Metrics of a run as tables: `metrics.csv` (training) and `validation.csv`, appended to, and cut back on resume."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ALL = "all"
"""Name of the row of `validation.csv` that covers all sources together."""


class Table:
    """A CSV file that grows by rows with the same columns, the first of which is `step`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; numbers are written with all their digits."""
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)

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
        for row in rows:
            Table(rewritten).append(row)
        rewritten.replace(self.path)


def _is_whole(row: dict[str, str]) -> bool:
    """Return whether a row has a value for each column, and no more."""
    return None not in row.values() and None not in row
