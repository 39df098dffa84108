"""Write and print the table of a benchmark."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from modernenc.bench.interleave import Result


class Output:
    """The results of a part: `<part>.txt`, a table in 80 columns, and `<part>.json`, all measurements, case by case."""

    def __init__(self, folder: Path, part: str, title: str, *columns: str) -> None:
        self.path = folder / part
        self.cases: list[dict[str, Any]] = []
        self.table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        self.table.add_column("", no_wrap=True)
        for column in columns:
            self.table.add_column(column, justify="right", no_wrap=True)

    def add(self, **case: Any) -> None:
        """Add the measurements of a case, and write the files anew, so that they hold all cases so far."""
        self.cases.append(case)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.with_suffix(".json").write_text(json.dumps(self.cases, indent=1))
        with self.path.with_suffix(".txt").open("w") as file:
            Console(file=file, width=80).print(self.table)

    def add_speeds(self, heading: str, results: list[Result], *cells: Callable[[Result], str], **case: Any) -> None:
        """Add a case with a row for each result, ours first: tokens a second, ours as a multiple of it, and further cells.

        A result that has failed, or cannot be compared because ours has, has its reason in the caption, where there is room.
        """
        ours = results[0]
        self.table.add_row(heading)
        for result in results:
            if reason := result.failure or ours.failure:
                self.table.add_row(f"  {result.name}", "failed")
                self.table.caption = "\n".join(filter(None, (str(self.table.caption or ""), f"{result.name}: {reason}")))
            else:
                speed = f"{median(result.speeds):,.0f}"
                more = (cell(result) for cell in cells)
                self.table.add_row(f"  {result.name}", speed, *spread(ours.times_faster(result)), *more)
        self.add(**case, results=[asdict(result) for result in results])


SPEEDS = ("tokens/s", "ours / it", "from-to")
"""The columns that `Output.add_speeds` fills."""


def spread(ratios: list[float], digits: int = 2) -> tuple[str, str]:
    """Return the median of ratios, and their range."""
    return f"{median(ratios):.{digits}f}", f"{min(ratios):.{digits}f}-{max(ratios):.{digits}f}"
