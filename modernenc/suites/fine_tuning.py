"""Suites of fine-tuning: the cells that the tasks of a folder make, and the fine-tuned models that they leave."""

from dataclasses import asdict, dataclass
from pathlib import Path

from modernenc.evaluation.cells import Findings, Request
from modernenc.evaluation.kept import TrainingCell, best_of
from modernenc.evaluation.models import Model
from modernenc.evaluation.settings import FineTuning, Setting, read_fine_tuning, same_task
from modernenc.suites.tasks import LabelledTask, find_tasks, read_task

SCHEMA = FineTuning


@dataclass(frozen=True)
class FineTuningCell(TrainingCell):
    """A model fine-tuned on a task; by a score on its held-out items."""

    items: LabelledTask | None = None

    def work(self, out: Path) -> Findings:
        """Fine-tune the encoder, or the best model of those that it begins with."""
        return self._fine_tune(out, self.folder(out) if self.keep else None)

    def train(self, out: Path, folder: Path) -> None:
        """Do the same work for the sake of the model."""
        self._fine_tune(out, folder)

    def _fine_tune(self, out: Path, keep: Path | None) -> Findings:
        from modernenc.suites.trainer import fine_tune  # transformers takes seconds to import

        assert self.items
        sources = [cell for cell in self.after if isinstance(cell, FineTuningCell)]
        encoder = best_of(sources, out).kept(out) if sources else self.model.folder
        return fine_tune(encoder, self.items, Setting(**self.setting), self.seed, keep)


def make_cells(request: Request) -> tuple[list[FineTuningCell], list[str]]:
    """Return a cell for each model, task, setting and seed, and what to say of tasks that have none.

    Raises FileNotFoundError or ValueError for what is no task or no setting.
    """
    settings = read_fine_tuning(request.settings, request.changes)
    tasks = {folder.name: read_task(folder) for folder in find_tasks(request.data, request.tasks)}
    for change in request.changes:
        group, _, task = change.partition("=")[0].partition(".")
        if group in ("tasks", "start_from") and not any(same_task(name, task.partition(".")[0]) for name in tasks):
            raise ValueError(f"{change}: there is no such task; there are {', '.join(tasks)}")
    sources = {name: next((other for other in tasks if is_source(settings, name, other)), "") for name in tasks}
    sources = {name: source if source and (tasks[source].train or sources[source]) else "" for name, source in sources.items()}
    notes = []
    for name, task in tasks.items():
        if not task.train and not sources[name]:
            notes.append(
                f"{name} has no train* file: left out; start_from.{name}=TASK scores it with the model of another task"
            )
        elif settings.source_of(name) and not sources[name]:
            notes.append(f"{name} begins with the encoder itself: {settings.source_of(name)} is not among the tasks")
    _check_sources(tasks, sources)
    made: dict[tuple[str, str, int], tuple[FineTuningCell, ...]] = {}

    def of_task(model: Model, name: str, seed: int) -> tuple[FineTuningCell, ...]:
        if (model.name, name, seed) not in made:
            task, source = tasks[name], sources[name]
            after = of_task(model, source, seed) if source else ()
            points = settings.of_task(name)[: None if task.train else 1] if task.train or source else []
            is_kept = request.keep or name in sources.values()
            made[model.name, name, seed] = tuple(
                FineTuningCell(
                    request.suite,
                    model,
                    name,
                    task.fingerprint,
                    task.metrics,
                    asdict(point),
                    seed,
                    after,
                    items=task,
                    keep=is_kept,
                )
                for point in points
            )
        return made[model.name, name, seed]

    return [
        cell
        for seed in range(request.seeds)
        for name in tasks
        for model in request.models
        for cell in of_task(model, name, seed)
    ], notes


def _check_sources(tasks: dict[str, LabelledTask], sources: dict[str, str]) -> None:
    """Raise ValueError for tasks that begin with each other, and for one without training whose source has other labels."""
    for name, source in sources.items():
        chain = [name]
        while source and source not in chain:
            chain.append(source)
            source = sources[source]
        if source:
            raise ValueError(f"start_from.{name}={chain[1]}: it leads back to {source}; let one of them begin with the encoder")
    for name, task in tasks.items():
        other = tasks.get(sources[name])
        if task.train or other is None:
            continue
        labels = (
            {label for item in task.dev for label in ([item.label] if isinstance(item.label, str) else item.label)}
            if other.labels
            else set()
        )
        if other.kind != task.kind or labels - set(other.labels):
            raise ValueError(
                f"start_from.{name}={sources[name]}: the tasks have different labels, so its model cannot score {name}"
            )


def is_source(settings: FineTuning, name: str, other: str) -> bool:
    """Return whether a task is the one whose fine-tuned model another begins with."""
    return name != other and bool(settings.source_of(name)) and same_task(settings.source_of(name), other)
