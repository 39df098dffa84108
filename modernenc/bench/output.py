"""Where a benchmark's figures go."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def write(folder: Path, part: str, table: Table, content: Any) -> None:
    """`part`.txt, the table as wide as a terminal, and `part`.json, all there is; a folder that lacks is made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{part}.json").write_text(json.dumps(content, indent=1))
    with (folder / f"{part}.txt").open("w") as file:
        Console(file=file, width=80).print(table)
