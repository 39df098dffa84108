"""The account of one source: what became of each document that was read.

For every file, documents read = kept + dropped, and each drop has a reason. A fault is a drop that nobody asked for, such as a
broken line; a filter's drop is intended. Each part of the reading saves its own account, and the accounts of all parts add up.
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

_Reasons = Mapping[str, Mapping[str, int]]


def _by_file() -> defaultdict[str, Counter[str]]:
    return defaultdict(Counter)


@dataclass
class Account:
    """Counts of documents by file; file names are relative to the folder of the reader."""

    read: Counter[str] = field(default_factory=Counter)
    """Documents read from each file."""
    faults: defaultdict[str, Counter[str]] = field(default_factory=_by_file)
    """Unusable documents of each file, by reason."""
    filtered: defaultdict[str, Counter[str]] = field(default_factory=_by_file)
    """Documents of each file that filters dropped, by reason."""
    first: dict[str, str] = field(default_factory=dict)
    """Place of the first fault of each reason: file, and line or row."""
    beyond_limit: int = 0
    """Files that were not read because `limit_mb` was reached."""

    def fault(self, file: str, reason: str, place: str = "") -> None:
        """Count an unusable document; `place` is its line or row."""
        self.faults[file][reason] += 1
        self.first.setdefault(reason, f"{file} {place}".rstrip())

    def add(self, other: "Account") -> None:
        """Add the counts of another part of the same source."""
        self.read.update(other.read)
        self._add_reasons(other.faults, other.filtered)
        self.first = {**other.first, **self.first}
        self.beyond_limit += other.beyond_limit

    def _add_reasons(self, faults: _Reasons, filtered: _Reasons) -> None:
        for mine, theirs in ((self.faults, faults), (self.filtered, filtered)):
            for file, reasons in theirs.items():
                mine[file].update(reasons)

    def fault_reasons(self) -> Counter[str]:
        """Return the number of unusable documents by reason, over all files."""
        return _total(self.faults)

    def dropped(self) -> Counter[str]:
        """Return the number of dropped documents by reason, over all files."""
        return _total(self.faults) + _total(self.filtered)

    def kept(self) -> Counter[str]:
        """Return the number of documents of each file that were not dropped."""
        dropped = {file: self.faults[file].total() + self.filtered[file].total() for file in list(self.read)}
        return Counter({file: count - dropped[file] for file, count in self.read.items()})

    def describe_faults(self) -> str:
        """List the faults for a message: number, reason, and the place of the first."""
        reasons = self.fault_reasons().most_common()
        return ", ".join(f"{count:,} {reason} (first: {self.first[reason]})" for reason, count in reasons)

    def check_faults(self, source: str, max_dropped: float) -> None:
        """Raise ValueError when more than the fraction `max_dropped` of the documents is unusable, or none is left."""
        read, faults = self.read.total(), self.fault_reasons().total()
        if faults > max_dropped * read:
            raise ValueError(
                f"sources.{source}: {faults:,} of {read:,} documents cannot be used, {faults / read:.2%}, which is more than "
                f"max_dropped={max_dropped:g}: {self.describe_faults()}; repair the files, or raise max_dropped"
            )
        if not self.kept().total():
            dropped = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped().most_common())
            raise ValueError(
                f"sources.{source}: no document is left of {read:,} that were read{': ' if dropped else ''}{dropped}; "
                "check its reader and filters"
            )

    def save(self, path: Path) -> None:
        """Write the account to a file, which appears only when it is complete."""
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(vars(self)))
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: Path) -> "Account":
        """Read an account that `save` wrote."""
        saved = json.loads(path.read_text())
        account = cls(Counter(saved["read"]), first=saved["first"], beyond_limit=saved["beyond_limit"])
        account._add_reasons(saved["faults"], saved["filtered"])
        return account


def _total(by_file: _Reasons) -> Counter[str]:
    total: Counter[str] = Counter()
    for reasons in by_file.values():
        total.update(reasons)
    return total
