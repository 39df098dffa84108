"""Results that others have published, to be read beside one's own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from modernenc.evaluation.settings import same_task

FILE = Path(__file__).with_name("published.yaml")


@dataclass(frozen=True)
class Published:
    """A published row."""

    model: str
    scores: dict[str, float]
    """By task, on the scale of 0 to 1."""
    source: str
    note: str


def published_rows(suite: str, tasks: list[str]) -> list[Published]:
    """Return the rows that have been published for tasks of a suite, each with those of the tasks that it has."""
    content: Any = OmegaConf.to_container(OmegaConf.load(FILE))
    rows = []
    for table in content.get(suite, ()):
        for model, values in table["models"].items():
            found = dict(zip(table["columns"], values, strict=True))
            scores = {task: value / 100 for task in tasks for column, value in found.items() if same_task(column, task)}
            if scores:
                rows.append(Published(model, scores, table["source"], table["note"]))
    return rows
