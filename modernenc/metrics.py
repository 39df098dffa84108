"""Figures of a run as tables: `metrics.csv` (training) and `validation.csv`, appended to, cut back on resume.

Also how sure a validation loss is, given the number of held-out tokens.
"""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ALL = "all"
"""Stands for all sources together in `validation.csv`."""


LOSS_DEVIATION = 6.5
"""Standard deviation, in nats, of the loss of one predicted token, 3.1 to 3.7, times 1.2 to 1.8, since tokens of a document are
alike: as measured on small models of six sources, the latter from sums over documents; the largest are taken."""
FIXED_RATIO = 0.15
"""Mask ratio at which every model and phase is validated, so that losses compare."""


def standard_error(tokens: int) -> float:
    """Standard error, in nats, of the mean loss over the predicted share of so many held-out tokens."""
    return LOSS_DEVIATION / (FIXED_RATIO * max(1, tokens)) ** 0.5


def tokens_for(error: float) -> float:
    """Held-out tokens for a standard error of so many nats: the inverse of `standard_error`."""
    return (LOSS_DEVIATION / error) ** 2 / FIXED_RATIO


class Table:
    """A CSV file that grows by rows of the same columns, the first of which is `step`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; numbers are written in full."""
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)

    def read(self) -> list[dict[str, str]]:
        """All rows."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def cut_after(self, step: int) -> None:
        """Drop the rows of later steps: a resumed run makes them again."""
        rows = [row for row in self.read() if _whole(row) and int(row["step"]) <= step]
        unfinished = self.path.with_suffix(".csv.tmp")
        self.path.unlink(missing_ok=True) if not rows else None
        for row in rows:
            Table(unfinished).append(row)
        if rows:
            unfinished.replace(self.path)


def _whole(row: dict[str, str]) -> bool:
    """Whether a row was written to its end; a kill may cut the last one short."""
    return None not in row.values() and None not in row
