"""The cells of an evaluation: one model, one task, one setting, one seed. Each is a file, written whole or not at all.

Cells are done once, by whichever process claims them first, in an order that all processes share. So an evaluation that was
killed goes on where it was, and processes on one folder divide the work.
"""

import json
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from modernenc.atomic import write_json
from modernenc.evaluation.claims import claim
from modernenc.evaluation.metrics import Predictions, Scores, scores_of
from modernenc.evaluation.models import Model
from modernenc.run_folder.lineage import versions

CELLS = "cells"
FORMAT = 2
"""Number of the format and of the meaning of a cell; a cell of another one is done anew."""
_POLL_S = 0.5


@dataclass(frozen=True)
class Request:
    """What is to be evaluated: from this a suite makes its cells."""

    suite: str
    models: Sequence[Model]
    data: Path
    """Folder of the tasks, or of a single one."""
    tasks: Sequence[str] = ()
    """Names of the tasks to take; all if there are none."""
    settings: str = ""
    """Name of shipped settings, or a YAML file."""
    changes: Sequence[str] = ()
    """KEY=VALUE, which change the settings."""
    seeds: int = 1
    keep: bool = False
    """Whether the fine-tuned models are wanted as well."""


@dataclass(frozen=True)
class Curve:
    """A number along something: loss by position, or score by epoch."""

    x: list[str]
    y: list[float]
    error: list[float]
    """Half of the 95 % interval of each value, over items; 0 where it is not known."""


@dataclass(frozen=True)
class Findings:
    """What a cell finds."""

    predictions: Predictions
    notes: tuple[str, ...] = ()
    """What the user should know, such as how many texts were cut."""
    curves: dict[str, Curve] = field(default_factory=dict)
    """By title."""


@dataclass(frozen=True)
class Measurement:
    """What a cell found, and what it was."""

    model: str
    task: str
    setting: dict[str, Any]
    seed: int
    metrics: tuple[str, ...]
    scores: Scores
    found: Findings
    seconds: float
    also: Scores = field(default_factory=dict)
    """What is no part of the score."""


@dataclass(frozen=True)
class Cell(ABC):
    """One measurement. Whatever may change what it finds is part of its name."""

    suite: str
    model: Model
    task: str
    data: str
    """Hash of the task's data."""
    metrics: tuple[str, ...]
    setting: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    after: tuple["Cell", ...] = ()
    """Cells that must be done first, of which this one uses the results."""
    also: tuple[str, ...] = ()
    """Metrics that are shown beside the score and are no part of it."""

    @property
    def name(self) -> str:
        """The name of its file, without the ending."""
        identity = [FORMAT, self.suite, self.model.fingerprint, self.task, self.data, self.setting, self.seed]
        identity += [cell.name for cell in self.after]
        digest = xxhash.xxh3_64(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return f"{self.task.replace('/', '-')}-seed{self.seed}-{digest}"

    @abstractmethod
    def work(self, out: Path) -> Findings:
        """Make the measurement; `out` is the folder of the results."""


def read(cell: Cell, out: Path) -> Measurement | None:
    """Return what a cell has found, or None if it is not done. The model has the name that it has now."""
    path = out / CELLS / f"{cell.name}.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; delete it, and it is done again") from error
    curves = {title: Curve(**curve) for title, curve in content["curves"].items()}
    found = Findings(content["predictions"], tuple(content["notes"]), curves)
    return Measurement(
        cell.model.name, cell.task, cell.setting, cell.seed, cell.metrics, content["scores"], found, content["seconds"],
        scores_of(cell.also, found.predictions),
    )  # fmt: skip


def is_done(cell: Cell, out: Path) -> bool:
    """Return whether a cell is done."""
    return (out / CELLS / f"{cell.name}.json").is_file()


def run(
    cells: Sequence[Cell], out: Path, report: Callable[[Measurement, int], None], go_on: Callable[[], bool] = lambda: True
) -> None:
    """Do all cells that no process has done yet, together with other processes that work in the same folder.

    `report` is called with each result that this process found, and the number of cells that are left. Between cells the work
    ends early when `go_on` says so.
    """
    left = [cell for cell in cells if not is_done(cell, out)]
    while left and go_on():
        before = len(left)
        for cell in list(left):
            if _try(cell, out, lambda result: report(result, sum(not is_done(other, out) for other in cells))):
                left.remove(cell)
            if not go_on():
                return
        if len(left) == before:
            time.sleep(_POLL_S)  # other processes do what is left, or what must be done first


def _try(cell: Cell, out: Path, report: Callable[[Measurement], None]) -> bool:
    """Do a cell if it can be done now, and return whether it is done, by whomever."""
    path = out / CELLS / f"{cell.name}.json"
    if is_done(cell, out):
        return True
    if not all(is_done(other, out) for other in cell.after):
        return False
    with claim(path) as mine:
        if not mine:
            return False
        if is_done(cell, out):  # done between the two looks
            return True
        start = time.monotonic()
        found = cell.work(out)
        about = {"suite": cell.suite, "model": cell.model.name, "fingerprint": cell.model.fingerprint, "task": cell.task}
        scores = scores_of(cell.metrics, found.predictions)
        made = {"setting": cell.setting, "seed": cell.seed, "scores": scores, "seconds": time.monotonic() - start}
        where = {"machine": platform.node(), "versions": {**versions(), "transformers": version("transformers")}}
        content = {**about, **made, **asdict(found), **where}
        write_json(path, content)
        if result := read(cell, out):
            report(result)
        return True
