"""Write and print the tables of the benchmarks."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from modernenc.bench.interleave import Result


def new_table(title: str, columns: Iterable[str]) -> Table:
    """Return an empty, narrow table whose first column holds names and the others numbers."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    return table


def spread(ratios: list[float]) -> tuple[str, str]:
    """Return the middle one of ratios in ascending order, and their range."""
    return f"{ratios[len(ratios) // 2]:.2f}", f"{ratios[0]:.2f}-{ratios[-1]:.2f}"


def failed(table: Table, name: str, *results: Result) -> bool:
    """Add a row without numbers if one of the results has failed, and its reason to the caption, where there is room."""
    reason = next((result.failure for result in results if result.failure), "")
    if reason:
        table.add_row(f"  {name}", "failed")
        table.caption = "\n".join(filter(None, (str(table.caption or ""), f"{name}: {reason}")))
    return bool(reason)


def write(folder: Path, part: str, table: Table, content: Any) -> None:
    """Write `part`.txt, the table in 80 columns, and `part`.json, all measurements; create the folder if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{part}.json").write_text(json.dumps(content, indent=1))
    with (folder / f"{part}.txt").open("w") as file:
        Console(file=file, width=80).print(table)
