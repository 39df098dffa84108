"""Where a benchmark's figures go."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def new_table(title: str, columns: Iterable[str]) -> Table:
    """A table as narrow as can be; the first column is of names, the others of numbers."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    return table


def add_failure(table: Table, name: str, reason: str) -> None:
    """A row without figures; why is told below the table, where there is room."""
    table.add_row(f"  {name}", "failed")
    table.caption = "\n".join(filter(None, (str(table.caption or ""), f"{name}: {reason}")))


def write(folder: Path, part: str, table: Table, content: Any) -> None:
    """`part`.txt, the table as wide as a terminal, and `part`.json, all there is; a folder that lacks is made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{part}.json").write_text(json.dumps(content, indent=1))
    with (folder / f"{part}.txt").open("w") as file:
        Console(file=file, width=80).print(table)
