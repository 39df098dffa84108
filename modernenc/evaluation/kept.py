"""Fine-tuned models that are kept: those that other cells begin with, and those that the user wants."""

import re
import shutil
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TypeVar

from modernenc.evaluation import cells
from modernenc.evaluation.cells import Cell
from modernenc.evaluation.claims import wait_for

KEPT = "fine_tuned"
"""Folder of these models in that of the results."""


@dataclass(frozen=True)
class TrainingCell(Cell):
    """A cell that fine-tunes a model."""

    keep: bool = False
    """Whether the fine-tuned model is wanted as well."""

    @abstractmethod
    def train(self, out: Path, folder: Path) -> None:
        """Fine-tune the model, and write it to a folder."""

    def folder(self, out: Path) -> Path:
        """Return where the fine-tuned model is kept."""
        return out / KEPT / self.name

    def kept(self, out: Path) -> Path:
        """Return the folder with the fine-tuned model, which is trained again if it was not kept."""
        folder = self.folder(out)
        with wait_for(folder):
            if not folder.is_dir():
                self.train(out, folder)
        return folder


Kind = TypeVar("Kind", bound=TrainingCell)


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """Yield where to write a folder that gets its name when it is complete; one that is there already stays."""
    partial = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    if folder.is_dir():
        shutil.rmtree(partial)
    else:
        partial.rename(folder)


def best_of(done: Sequence[Kind], out: Path) -> Kind:
    """Return the cell with the highest score of those that are done."""
    results = [(cell, cells.read(cell, out)) for cell in done]
    scored = [(cell, mean(result.scores[metric] for metric in result.metrics)) for cell, result in results if result]
    return max(scored, key=lambda one: one[1])[0]


def save_best(done: Sequence[TrainingCell], out: Path, target: Path) -> list[Path]:
    """Copy the best fine-tuned model of each encoder and task to `target`, and return the folders."""
    folders = []
    for key in dict.fromkeys((cell.model.name, cell.task) for cell in done):
        best = best_of([cell for cell in done if (cell.model.name, cell.task) == key], out)
        folders.append(target.joinpath(*(re.sub(r"[^\w()-]+", "-", name).strip("-") for name in key)))
        partial = folders[-1].with_name(f"{folders[-1].name}.tmp")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(best.kept(out), partial)
        shutil.rmtree(folders[-1], ignore_errors=True)  # of an earlier evaluation
        partial.rename(folders[-1])
    return folders
