"""Multiple choice in the file layout of SWAG (Zellers et al. 2018, arXiv:1808.05326): files -> items -> micro-batches.

1. A file has N items. Item n of a run is item n mod N of a seeded permutation for pass n div N: a pure function, so there is
   no state to save.
2. Each choice is a document of its own, [cls] context [sep] ending [sep]; an item is four consecutive documents.
3. Rank r of W takes the items n with n mod W = r.
"""

import csv
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from modernenc.config import Task
from modernenc.curriculum import CHOICES
from modernenc.data.batch import MicroBatch
from modernenc.data.blocks import Corpus
from modernenc.data.lanes import seed_of
from modernenc.data.tokenizer import load_tokenizer

COLUMNS = ("sent1", "sent2", *(f"ending{number}" for number in range(CHOICES)), "label")
"""The columns that are read: the context, the beginning that all endings share, the endings, and the right one's number."""
SPECIALS = 3
"""Special tokens added to each choice: cls and two sep."""
# In each process: a pickled tokenizer loses the setting that special tokens in text are text.
_load_tokenizer = lru_cache(1)(load_tokenizer)


class Item(NamedTuple):
    """One question with its possible endings."""

    context: str
    endings: tuple[str, ...]
    label: int


class Choice(NamedTuple):
    """The tokens of a context and of one of its endings."""

    context: list[int]
    ending: list[int]
    cut: bool
    """Whether the choice was longer than a row and had to be truncated."""


def read(path: Path, key: str) -> list[Item]:
    """Return the multiple-choice questions of a CSV file.

    Raises FileNotFoundError or ValueError; the message begins with `key`, the setting that gave the path, and names the line
    that is not an item.
    """
    where = f"{key}={path}"
    if not path.is_file():
        raise FileNotFoundError(f"{where} does not exist; expected a CSV file with the columns {', '.join(COLUMNS)}")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        try:
            rows = [(reader.line_num, row) for row in reader]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{where} is not a CSV file in UTF-8: {error}") from error
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(f"{where}: no column {missing[0]}; expected {', '.join(COLUMNS)}, as SWAG has them")
    if not rows:
        raise ValueError(f"{where} has no items")
    return [_item(row, f"{where}, line {line}") for line, row in rows]


class Choices:
    """The items of a task's training or validation file.

    Training draws them in a seeded order; `items` has the order of the file, of which validation uses the first ones.
    """

    def __init__(self, name: str, task: Task, corpus: Corpus, seed: int, validation: bool = False) -> None:
        self.name = name
        self.seq_len = task.seq_len
        self.roles = corpus.roles
        path, key = (task.validation, "validation") if validation else (task.train, "train")
        self.items = read(Path(path), f"tasks.{name}.{key}")[: task.validation_items if validation else None]
        self._tokenizer_file = corpus.tokenizer_file
        self._seed = (seed, seed_of(name))
        self._order: tuple[int, list[int]] = (-1, [])
        """The pass of the last item drawn, and its permutation: consecutive items need the same one."""

    def draw(self, number: int) -> Item:
        """Return item `number` of a run; numbers continue from pass to pass."""
        epoch, place = divmod(number, len(self.items))
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([*self._seed, epoch]).permutation(len(self.items)).tolist())
        return self.items[self._order[1][place]]

    def encode(self, item: Item) -> list[Choice]:
        """Tokenize an item into its choices.

        Where context and ending are too long for a row, the beginning of the context is dropped; an ending is truncated only
        beyond half a row.
        """
        # Texts are encoded one by one: `encode_batch` uses threads, which do not exist in a loader process after a fork.
        tokenizer = _load_tokenizer(self._tokenizer_file)
        context, *endings = (tokenizer.encode(text, add_special_tokens=False).ids for text in (item.context, *item.endings))
        longest = self.seq_len - SPECIALS
        choices = []
        for ending in endings:
            kept = ending[: max(longest - len(context), longest // 2)]
            room = longest - len(kept)
            choices.append(Choice(context[-room:] if room else [], kept, len(context) + len(ending) > longest))
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
    """Return the item of a row of a CSV file; raises ValueError when it is none."""
    missing = [name for name in COLUMNS if row[name] is None]
    if missing:
        raise ValueError(f"{place}: no value for {missing[0]}; expected as many fields as columns")
    if row["label"] not in [str(number) for number in range(CHOICES)]:
        raise ValueError(f"{place}: label={row['label']}; expected 0 to {CHOICES - 1}")
    endings = [f"{row['sent2']} {row[f'ending{number}']}".strip() for number in range(CHOICES)]
    return Item(str(row["sent1"]), tuple(endings), int(row["label"]))
