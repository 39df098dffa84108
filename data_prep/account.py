"""The account of a source: what became of each document, and every reason for which one is left out.

For each file, documents read = kept + dropped, and each drop has a reason. A fault is a drop that nobody asked for, such as a
broken line; the drop of a filter is intended. Each task writes its counts to a file of its own, and `add_up` sums the files.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NOT_UTF8 = "not UTF-8"
NOT_JSON = "not JSON"
NOT_AN_OBJECT = "not a JSON object"
WITHOUT_KEY = "without text_key={KEY}"
NULL = "null"
NOT_A_STRING = "of type {TYPE} in place of a string"
EMPTY = "empty"
LONE_SURROGATES = "with lone surrogates"
UNPARSABLE = "unparsable"
EMPTIED = "emptied by the tokenizer"
FAULTS = (NOT_UTF8, NOT_JSON, NOT_AN_OBJECT, WITHOUT_KEY, NULL, NOT_A_STRING, EMPTY, LONE_SURROGATES, UNPARSABLE, EMPTIED)
"""Reasons why a document is unusable. A reader that is not part of this package may give others."""
DUPLICATE = "duplicate"
BELOW, HIDDEN, OTHER_KIND, BEYOND_LIMIT = "in folders below", "hidden", "of other kinds", "beyond limit_mb={LIMIT}"
PASSED_OVER = (BELOW, HIDDEN, OTHER_KIND, BEYOND_LIMIT)
"""Reasons why a whole file is not read."""


def fault_of(text: Any) -> str:
    """Return the reason why a value is not a text to train on; the reason is empty when it is one."""
    if text is None:
        return NULL
    if not isinstance(text, str):
        return NOT_A_STRING.format(TYPE=type(text).__name__)
    if not text.strip():
        return EMPTY
    try:
        text.encode()
    except UnicodeEncodeError:
        return LONE_SURROGATES
    return ""


def add(total: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add nested counts to a total in place; a list is appended to the list in the total."""
    for key, value in more.items():
        if isinstance(value, Mapping):
            add(total.setdefault(key, Counter()), value)
        elif key in total:
            total[key] += value
        else:
            total[key] = value


def add_up(reports: Iterable[Mapping[str, Any]]) -> Any:
    """Return the sum of nested counts; every dictionary of the result is a Counter."""
    total: Counter[str] = Counter()
    for report in reports:
        add(total, report)
    return total


def save_part(folder: Path, rank: int, report: Any) -> None:
    """Write the counts of task `rank` to a file in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{rank:05d}.json").write_text(json.dumps(report))


def load_parts(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the counts that the tasks wrote to `folder`, in the order of the tasks."""
    return (json.loads(path.read_text()) for path in sorted(folder.glob("*.json")))


def describe(counts: Mapping[str, int]) -> str:
    """List counts with their names for a message."""
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


@dataclass
class Account:
    """Counts of documents by file; the names of files are relative to the folder of the reader."""

    read: Counter[str] = field(default_factory=Counter)
    """Documents read from each file."""
    faults: dict[str, Counter[str]] = field(default_factory=dict)
    """Unusable documents of each file, by reason."""
    filtered: dict[str, Counter[str]] = field(default_factory=dict)
    """Documents of each file that filters dropped, by reason."""
    first: dict[str, list[str]] = field(default_factory=dict)
    """Places (file, and line or row) of the first fault of each reason, one for each part of the reading."""
    beyond_limit: int = 0
    """Files that were not read because `limit_mb` was reached."""

    def add_fault(self, file: str, reason: str, place: str = "") -> None:
        """Count an unusable document; `place` is its line or row."""
        add(self.faults, {file: {reason: 1}})
        self.first.setdefault(reason, [f"{file} {place}".rstrip()])

    def add_filtered(self, file: str, reason: str, count: int = 1) -> None:
        """Count documents that a filter dropped."""
        add(self.filtered, {file: {reason: count}})

    def dropped(self) -> Counter[str]:
        """Return the number of dropped documents by reason, over all files."""
        return add_up([*self.faults.values(), *self.filtered.values()])

    def kept(self) -> Counter[str]:
        """Return the number of documents of each file that were not dropped."""
        kept = Counter(self.read)
        for drops in (self.faults, self.filtered):
            kept.subtract({file: sum(reasons.values()) for file, reasons in drops.items()})
        return kept

    def describe_faults(self) -> str:
        """List the faults for a message: number, reason, and the place of the first."""
        faults = add_up(self.faults.values()).most_common()
        return ", ".join(f"{count:,} {reason} (first: {self.first[reason][0]})" for reason, count in faults)

    def check(self, source: str, max_dropped: float) -> None:
        """Raise ValueError when more than the fraction `max_dropped` of the documents is unusable, or none is left."""
        read, faults = self.read.total(), add_up(self.faults.values()).total()
        if faults > max_dropped * read:
            raise ValueError(
                f"sources.{source}: {faults:,} of {read:,} documents cannot be used, {faults / read:.2%}, which is more than "
                f"max_dropped={max_dropped:g}: {self.describe_faults()}; repair the files, or raise max_dropped"
            )
        if not self.kept().total():
            dropped = describe(self.dropped())
            raise ValueError(
                f"sources.{source}: no document is left of {read:,} that were read{': ' if dropped else ''}{dropped}; "
                "check its reader and filters"
            )
