"""Tasks for fine-tuning, read from a folder each: `train*` and `dev*`, `val*` or `validation*`, in any layout of `examples`."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from modernenc.evaluation.settings import same_task
from modernenc.suites.examples import CHOICES, CLASSES, ENDINGS, REGRESSION, TAGS, Example, read_examples

METRICS = {
    "CoLA": ("matthews",), "MRPC": ("accuracy", "f1"), "QQP": ("accuracy", "f1"), "STS-B": ("pearson", "spearman"),
    "CB": ("accuracy", "macro_f1"), "MultiRC": ("f1", "exact_match"),
}  # fmt: skip
"""The official metrics of a task, of which its score is the mean: Wang et al. 2019, arXiv:1804.07461 and 1905.00537. Other
tasks have those of their kind."""
METRICS_OF_KIND = {
    CLASSES: ("accuracy",), REGRESSION: ("pearson", "spearman"), CHOICES: ("accuracy",), TAGS: ("entity_f1",),
}  # fmt: skip
SPLITS = {"train": ("train",), "dev": ("dev_matched", "dev", "val", "test")}
"""How the name of a split's file begins; the first that is there counts."""


@dataclass(frozen=True)
class LabelledTask:
    """Items for training, and held-out items for scores."""

    name: str
    kind: str
    train: list[Example]
    """Empty if the task is only scored, with the model of another task."""
    dev: list[Example]
    labels: tuple[str, ...]
    """Labels or tags in order; empty for regression and choices."""
    metrics: tuple[str, ...]
    fingerprint: str
    """Hash of all items."""


def find_tasks(root: Path, names: Iterable[str] = ()) -> list[Path]:
    """Return the folders of the tasks of the given names, or of all, in the order of their names.

    `root` may be the folder of a single task. Raises FileNotFoundError for a name without a folder, or when there is no task.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"--data {root}: no such folder; expected a folder for each task in it")
    folders = (
        [root] if _file_of(root, "dev") else sorted(path for path in root.iterdir() if path.is_dir() and _file_of(path, "dev"))
    )
    if not folders:
        raise FileNotFoundError(
            f"--data {root}: no task; expected folders that hold train.tsv and dev.tsv (or .csv, .jsonl, .conll)"
        )
    if not names:
        return folders
    found = []
    for name in names:
        mine = [path for path in folders if same_task(path.name, name)]
        if not mine:
            raise FileNotFoundError(f"--tasks {name}: {root} has {', '.join(path.name for path in folders)}")
        found += [path for path in mine if path not in found]
    return found


def read_task(folder: Path) -> LabelledTask:
    """Read a task from its folder.

    Raises ValueError, naming the file and the line, for what is no task: no items, a field missing, labels of two kinds, or a
    label that training never shows.
    """
    splits = {split: list(_read_split(folder, split)) for split in SPLITS}
    kinds = {kind for items in splits.values() for kind, _ in items}
    if len(kinds) > 1:
        raise ValueError(f"{folder}: {' and '.join(sorted(kinds))} in one task; expected the same layout in all of its files")
    train, dev = ([item for _, item in items] for items in splits.values())
    kind = kinds.pop()
    if kind == CLASSES and all(_is_fraction(item.label) for item in [*train, *dev]):
        kind, train, dev = REGRESSION, *([Example(one.texts, float(one.label)) for one in items] for items in (train, dev))
    labels: list[str] = []
    if kind in (CLASSES, TAGS) and train:
        labels = sorted(set(_labels(train)), key=_in_order)
        if unseen := sorted(set(_labels(dev)) - set(labels)):
            raise ValueError(
                f"{_file_of(folder, 'dev')}: label {unseen[0]} is none of those in {_file_of(folder, 'train')}: "
                f"{', '.join(labels[:20])}"
            )
        if len(labels) < 2:
            raise ValueError(f"{_file_of(folder, 'train')}: all items have the label {labels[0]}; expected two labels or more")
    if len({len(item.texts) for item in [*train, *dev]}) > 1 and kind == CHOICES:
        raise ValueError(f"{folder}: questions with different numbers of answers; expected as many for each")
    metrics = next(
        (metrics for name, metrics in METRICS.items() if same_task(name, folder.resolve().name)), METRICS_OF_KIND[kind]
    )
    if "f1" in metrics and labels and labels != ["0", "1"]:
        raise ValueError(
            f"{folder}: its official score has the F1 of label 1; expected the labels 0 and 1, not {', '.join(labels)}"
        )
    parts = [[item.texts, item.label, *([item.group] if item.group else [])] for item in [*train, *dev]]
    content = xxhash.xxh3_64(json.dumps(parts).encode()).hexdigest()
    return LabelledTask(folder.resolve().name, kind, train, dev, tuple(labels), metrics, content)


def _labels(items: list[Example]) -> Iterator[str]:
    for item in items:
        yield from [item.label] if isinstance(item.label, str) else item.label


def _in_order(label: str) -> tuple[float, str]:
    """Order labels as numbers where they are numbers, else by name."""
    return (float(label) if label.lstrip("-").isdigit() else 0.0, label)


def _is_fraction(label: str) -> bool:
    try:
        return "." in label and float(label) == float(label)
    except ValueError:
        return False


def _file_of(folder: Path, split: str) -> Path | None:
    """Return the file of a split, or None if there is none; ValueError if there are several."""
    for start in SPLITS[split]:
        files = sorted(path for path in folder.glob(f"{start}*") if path.name.endswith(ENDINGS))
        if len(files) > 1:
            raise ValueError(f"{folder}: {', '.join(path.name for path in files)}: expected one file of the {split} split")
        if files:
            return files[0]
    return None


def _read_split(folder: Path, split: str) -> Iterator[tuple[str, Example]]:
    """Yield the kind and the item of each entry of a split."""
    path = _file_of(folder, split)
    if path is None:
        if split == "train":
            return
        raise FileNotFoundError(
            f"{folder}: no file dev*, val* or test*, so nothing to score; expected one of {', '.join(ENDINGS)}"
        )
    yield from read_examples(path)
