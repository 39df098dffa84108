"""The account of one source: what became of each document that was read.

For every file: read = kept + dropped, where each drop has a reason. A fault is a drop that nobody asked for, such as a broken
line; a filter's drop is wanted. Each part of the reading saves its own account, and the accounts of all parts add up.
"""

import json
import os
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Account:
    """Counts by file, relative to the folder that is read."""

    read: Counter[str] = field(default_factory=Counter)
    """Documents of each file."""
    faults: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """Documents of each file that could not be used, by reason."""
    filtered: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """Documents of each file that filters dropped, by reason."""
    first: dict[str, str] = field(default_factory=dict)
    """Where the first fault of each reason is: file, and line or row."""
    beyond_limit: int = 0
    """Files that were not read because `limit_mb` was reached."""

    def fault(self, file: str, reason: str, place: str = "") -> None:
        """Count a document that cannot be used; `place` is its line or row."""
        self.faults[file][reason] += 1
        self.first.setdefault(reason, f"{file} {place}".rstrip())

    def add(self, other: "Account") -> None:
        """Count what another part counted."""
        self.read.update(other.read)
        for mine, theirs in ((self.faults, other.faults), (self.filtered, other.filtered)):
            for file, reasons in theirs.items():
                mine[file].update(reasons)
        self.first = {**other.first, **self.first}
        self.beyond_limit += other.beyond_limit

    def dropped(self) -> Counter[str]:
        """Documents by the reason for which they were dropped, over all files."""
        total: Counter[str] = Counter()
        for by_file in (self.faults, self.filtered):
            for reasons in by_file.values():
                total.update(reasons)
        return total

    def kept(self) -> Counter[str]:
        """Documents of each file that were not dropped."""
        dropped = {file: self.faults[file].total() + self.filtered[file].total() for file in list(self.read)}
        return Counter({file: count - dropped[file] for file, count in self.read.items()})

    def check_faults(self, source: str, max_dropped: float) -> None:
        """Raise ValueError when more than the share `max_dropped` of the documents could not be used, or none is left."""
        reasons: Counter[str] = Counter()
        for counts in self.faults.values():
            reasons.update(counts)
        read, faults = self.read.total(), reasons.total()
        said = ", ".join(f"{count:,} {reason} (first: {self.first[reason]})" for reason, count in reasons.most_common())
        if faults > max_dropped * read:
            raise ValueError(
                f"sources.{source}: {faults:,} of {read:,} documents cannot be used, a share of {faults / read:.2%}, more than "
                f"max_dropped={max_dropped:g}: {said}; mend the files, or raise max_dropped"
            )
        if not self.kept().total():
            by_filters = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped().most_common())
            raise ValueError(
                f"sources.{source}: no document is left of {read:,} that were read{': ' * bool(by_filters)}{by_filters}; "
                "check its reader and filters"
            )

    def save(self, path: Path) -> None:
        """Write the account, whole or not at all."""
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(vars(self)))
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: Path) -> "Account":
        """The inverse of `save`."""
        saved = json.loads(path.read_text())
        account = cls(Counter(saved["read"]), first=saved["first"], beyond_limit=saved["beyond_limit"])
        for mine, theirs in ((account.faults, saved["faults"]), (account.filtered, saved["filtered"])):
            for file, reasons in theirs.items():
                mine[file].update(reasons)
        return account
