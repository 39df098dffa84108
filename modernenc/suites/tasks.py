"""Tasks for fine-tuning, read from a folder each: `train*` and `dev*`, `val*` or `validation*`, as TSV, CSV, JSONL or CoNLL.

- One text or a pair of texts, and a `label`: TSV with a header and without quoting, as GLUE has it, CSV, or JSON lines. Labels
  are words, or numbers with a decimal point, which are regressed.
- Multiple choice: CSV with SWAG's columns, JSON lines with HellaSwag's keys (`ctx`, `endings`, `label`), with COPA's
  (`premise`, `choice1`, `choice2`, `question`, `label`), or with `question`, `choices` and `label`.
- Words with a tag each: CoNLL's columns, a word and its tag first and last on a line, and an empty line between sentences.
"""

import csv
import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from modernenc.evaluation.settings import same_task

CLASSES, REGRESSION, CHOICES, TAGS = "classes", "regression", "choices", "tags"
"""Kinds of tasks."""
METRICS = {
    "CoLA": ("matthews",), "MRPC": ("accuracy", "f1"), "QQP": ("accuracy", "f1"), "STS-B": ("pearson", "spearman"),
    "CB": ("accuracy", "macro_f1"),
}  # fmt: skip
"""The official metrics of a task, of which its score is the mean: Wang et al. 2019, arXiv:1804.07461 and 1905.00537. Other
tasks have those of their kind."""
METRICS_OF_KIND = {
    CLASSES: ("accuracy",), REGRESSION: ("pearson", "spearman"), CHOICES: ("accuracy",), TAGS: ("entity_f1",),
}  # fmt: skip
SPLITS = {"train": ("train",), "dev": ("dev_matched", "dev", "val", "test")}
"""How the name of a split's file begins; the first that is there counts."""
ENDINGS = (".tsv", ".csv", ".jsonl", ".jsonl.gz", ".conll", ".txt")
LABEL_COLUMNS = ("label", "gold_label", "score", "is_duplicate")
TEXT_COLUMNS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"),
    ("question", "passage"), ("sentence",), ("text",),
)  # fmt: skip
ID_COLUMNS = ("", "id", "idx", "index", "guid", "pairID", "genre")
COPA_QUESTIONS = {"cause": "What was the cause?", "effect": "What happened as a result?"}


@dataclass(frozen=True)
class Example:
    """Something to be labelled."""

    texts: tuple[str, ...]
    """One text or two; for a choice, the context and its endings; for tags, the words."""
    label: Any
    """The label as the file has it; for a choice the number of the right ending, for tags a tuple of them."""


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
    content = xxhash.xxh3_64(json.dumps([[item.texts, item.label] for item in [*train, *dev]]).encode()).hexdigest()
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
    count = 0
    try:
        read = _read_conll if path.name.endswith((".conll", ".txt")) else _read_rows
        for kind, item in read(path):
            yield kind, item
            count += 1
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}, after item {count}: {error}") from error
    if not count:
        raise ValueError(f"{path} has no items")


def _read_rows(path: Path) -> Iterator[tuple[str, Example]]:
    for place, row in _rows(path):
        where = f"{path}, line {place}"
        if "ending0" in row and "sent1" not in row:
            raise ValueError(f"{where}: no column sent1 beside ending0; expected SWAG's columns")
        if "ending0" in row:
            endings = [value for key, value in sorted(row.items()) if key.startswith("ending")]
            second = row.get("sent2", "")
            yield CHOICES, _choice(where, row["sent1"], [f"{second} {ending}".strip() for ending in endings], row.get("label"))
        elif "endings" in row:
            yield CHOICES, _choice(where, row.get("ctx", row.get("question", "")), row["endings"], row.get("label"))
        elif "choices" in row:
            question = row.get("question", "")
            yield (
                CHOICES,
                _choice(
                    where, f"{question} {COPA_QUESTIONS.get(row.get('kind', ''), '')}".strip(), row["choices"], row.get("label")
                ),
            )
        elif "choice1" in row:
            context = f"{row.get('premise', '')} {COPA_QUESTIONS.get(row.get('question', ''), '')}".strip()
            yield CHOICES, _choice(where, context, [row["choice1"], row.get("choice2", "")], row.get("label"))
        else:
            yield CLASSES, _classified(where, row)


def _choice(where: str, context: str, endings: list[str], label: Any) -> Example:
    if not isinstance(endings, list) or not all(isinstance(ending, str) for ending in endings) or len(endings) < 2:
        raise ValueError(f"{where}: the answers are {endings}; expected a list of two texts or more")
    if str(label) not in [str(number) for number in range(len(endings))]:
        raise ValueError(f"{where}: label={label}; expected 0 to {len(endings) - 1}, the number of the right ending")
    return Example((context, *endings), int(label))


def _classified(where: str, row: dict[str, Any]) -> Example:
    key = next((name for name in LABEL_COLUMNS if name in row), None)
    if key is None:
        raise ValueError(f"{where}: no column label; there are {', '.join(row)}")
    label = str(row[key]).strip() if not isinstance(row[key], bool) else str(int(row[key]))
    if label in ("", "-1", "None"):
        raise ValueError(f"{where}: {key}={label or 'nothing'}: expected a label; a split without labels cannot be scored")
    others = [name for name in row if name != key and name not in ID_COLUMNS]
    names = next((names for names in TEXT_COLUMNS if all(name in row for name in names)), tuple(others))
    if not 1 <= len(names) <= 2:
        raise ValueError(f"{where}: {len(names)} columns of text ({', '.join(names)}); expected one or two beside {key}")
    for name in names:
        if not isinstance(row[name], str):
            raise ValueError(f"{where}: {name}={row[name]}: expected text")
    return Example(tuple(row[name] for name in names), label)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number of the line and the fields of each row of a table or of JSON lines."""
    open_text = gzip.open if path.name.endswith(".gz") else open
    with open_text(path, "rt", encoding="utf-8-sig", newline="") as file:
        if ".jsonl" in path.name:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"{path}, line {number}: expected a JSON object")
                    yield number, row
            return
        style: Any = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
        csv.field_size_limit(1 << 30)
        reader = csv.reader(file, **style)
        header = next(reader, [])
        for fields in reader:
            if len(fields) != len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(fields)} fields; expected {len(header)}: {', '.join(header)}"
                )
            yield reader.line_num, dict(zip(header, fields, strict=True))


def _read_conll(path: Path) -> Iterator[tuple[str, Example]]:
    words: list[str] = []
    tags: list[str] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate([*file, ""], 1):
            columns = line.split()
            if not columns or columns[0] == "-DOCSTART-":
                if words:
                    yield TAGS, Example(tuple(words), tuple(tags))
                words, tags = [], []
            elif len(columns) < 2 or not (columns[-1] == "O" or columns[-1][1:2] == "-"):
                raise ValueError(
                    f"{path}, line {number}: {line.strip()}: expected a word first and a tag such as B-PER or O last"
                )
            else:
                words.append(columns[0])
                tags.append(columns[-1])
