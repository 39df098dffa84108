"""Multiple choice in the layout of SWAG: Zellers et al. 2018, arXiv:1808.05326. Files -> items -> micro-batches.

1. Item n of a run is that at place n mod N of a seeded permutation for pass n div N: pure, so there is no state to save.
2. A choice is a document of its own, [cls] context [sep] ending [sep]; an item is four in a row.
3. Rank r of W takes the items n with n mod W = r.
"""

import csv
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xxhash

from modernenc.config import Task
from modernenc.curriculum import CHOICES
from modernenc.data.batch import MicroBatch
from modernenc.data.blocks import Corpus
from modernenc.data.lanes import seed_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

COLUMNS = ("sent1", "sent2", *(f"ending{number}" for number in range(CHOICES)), "label")
"""What is read of a file; sent2 is how each ending begins."""
SPECIALS = 3
"""Tokens added to a choice."""


class Item(NamedTuple):
    """One question."""

    context: str
    endings: tuple[str, ...]
    label: int


class Choice(NamedTuple):
    """A context with one of the endings, as tokens."""

    context: list[int]
    ending: list[int]
    cut: bool
    """Whether it was longer than a row."""


def read(path: Path, key: str) -> list[Item]:
    """The items of a file; FileNotFoundError or ValueError names the line that is not one. `key` is the setting of `path`."""
    if not path.is_file():
        raise FileNotFoundError(f"{key}={path} does not exist; expected a CSV file with the columns {', '.join(COLUMNS)}")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        try:
            rows = [(reader.line_num, row) for row in reader]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{key}={path} is no CSV file in UTF-8: {error}") from error
    lacking = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if lacking:
        raise ValueError(f"{key}={path}: no column {lacking[0]}; expected {', '.join(COLUMNS)}, as SWAG has them")
    items = [_item(row, f"{key}={path}, line {line}") for line, row in rows]
    if not items:
        raise ValueError(f"{key}={path} has no items")
    return items


def fingerprint(path: Path) -> str:
    """Hash of a file."""
    return xxhash.xxh3_64_hexdigest(path.read_bytes())


class Choices:
    """The items of a task's file, in the order of training or of the file."""

    def __init__(self, name: str, task: Task, corpus: Corpus, seed: int, validation: bool = False) -> None:
        self.name = name
        self.seq_len = task.seq_len
        self.roles = corpus.roles
        path, key = (task.validation, "validation") if validation else (task.train, "train")
        self.items = read(Path(path), f"tasks.{name}.{key}")
        if validation:
            self.items = self.items[: task.validation_items]
        self._tokenizer_file = corpus.tokenizer_file
        self._seed = (seed, seed_of(name))
        self._order: tuple[int, list[int]] = (-1, [])
        """The last pass asked for, and its order: items are drawn one after another."""

    def __getstate__(self) -> dict[str, Any]:
        """Without the tokenizer, which would forget on its way that what is written like a special token is text."""
        return {name: value for name, value in vars(self).items() if name != "_tokenizer"}

    @cached_property
    def _tokenizer(self) -> "Tokenizer":
        from data_prep.encode import load

        return load(self._tokenizer_file)

    def drawn(self, number: int) -> Item:
        """Item `number` of a run."""
        turn, place = divmod(number, len(self.items))
        if self._order[0] != turn:
            self._order = (turn, np.random.default_rng([*self._seed, turn]).permutation(len(self.items)).tolist())
        return self.items[self._order[1][place]]

    def encoded(self, item: Item) -> list[Choice]:
        """Each ending after its context, of which the beginning is cut where both are too long for a row."""
        # One by one: a batch is encoded by threads, which a loader process does not have after the fork.
        texts = (item.context, *item.endings)
        context, *endings = (self._tokenizer.encode(text, add_special_tokens=False).ids for text in texts)
        longest = self.seq_len - SPECIALS
        choices = []
        for ending in endings:
            kept = ending[: max(longest - len(context), longest // 2)]
            room = longest - len(kept)
            shown = context[-room:] if room else []
            choices.append(Choice(shown, kept, len(context) + len(ending) > longest))
        return choices

    def collate(self, items: list[list[Choice]], labels: list[int], first: int) -> MicroBatch:
        """Lay the choices of items end to end; the target is each item's label, read from the first tokens of its choices."""
        cls, sep = self.roles.cls, self.roles.sep
        choices = [choice for item in items for choice in item]
        documents = [[cls, *choice.context, sep, *choice.ending, sep] for choice in choices] or [[cls, sep]]
        ends = np.cumsum([0, *(len(document) for document in documents)])
        return MicroBatch.of(
            np.array([token for document in documents for token in document]),
            ends,
            ends[: len(choices)],
            np.array(labels, np.int64),
            first_row=first * CHOICES,
            objective=self.name,
        )


def _item(row: dict[str, str | None], place: str) -> Item:
    missing = [name for name in COLUMNS if row[name] is None]
    if missing:
        raise ValueError(f"{place}: nothing for {missing[0]}; expected as many fields as there are columns")
    if row["label"] not in [str(number) for number in range(CHOICES)]:
        raise ValueError(f"{place}: label={row['label']}; expected 0 to {CHOICES - 1}")
    endings = [f"{row['sent2']} {row[f'ending{number}']}".strip() for number in range(CHOICES)]
    return Item(str(row["sent1"]), tuple(endings), int(row["label"]))
