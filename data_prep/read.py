"""Read a source: each document of its files goes to a bucket, or is counted as dropped in the account."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import xxhash
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.readers.base import BaseDiskReader
from datatrove.pipeline.writers import JsonlWriter
from hydra.utils import instantiate

from data_prep.account import WITHOUT_KEY, Account, fault_of, save_part
from data_prep.config import SourceConfig
from data_prep.inputs import create_reader
from data_prep.readers import FAULT

FILE = "file"
"""Key of the file in the metadata of a document."""
_SHOWN_KEYS = 12
"""Number of keys of a row that a message lists."""
_PEEKED_FILES, _PEEKED_DOCUMENTS = 20, 1000


@dataclass
class Read:
    """A step of datatrove whose task r reads part r of a source, filters the documents, and assigns them to buckets by hash.

    Of n tasks, task r reads the files r, r + n, r + 2n and so on. A finished task has written its account to
    `<work>/accounts/<number>/<r>.json`.
    """

    source: str
    """Name of the source."""
    settings: SourceConfig
    files: list[str]
    work: Path
    number: int
    """Position of the source in the configuration."""
    buckets: int

    def __call__(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:
        """Read part `rank` of `world_size` parts, up to its equal share of `limit_mb` million characters."""
        account = Account()
        # Every part has the same limit, so that the result does not depend on which part is read first.
        limit = self.settings.limit_mb * 1e6 / world_size if self.settings.limit_mb else float("inf")
        documents = self._documents(self.files[rank::world_size], account, limit)
        for entry in self.settings.filters:
            documents = _filter(instantiate(entry), documents, account, self.source, rank, world_size)
        with JsonlWriter(str(self.work / "buckets"), f"${{bucket}}/{self.number:03d}-${{rank}}.jsonl.zst", "zstd") as writer:
            for document in documents:
                # 128 bits: even among 10 billion documents, two texts have the same hash with a probability of 1e-19 only.
                number = xxhash.xxh3_128_intdigest(document.text.encode())
                metadata = {
                    "hash": f"{number:032x}",
                    "bucket": f"{number % self.buckets:05d}",
                    "source": self.source,
                    FILE: document.metadata[FILE],
                }
                writer.write(Document(text=document.text, id=document.id, metadata=metadata), rank)
        save_part(self.work / "accounts" / f"{self.number:03d}", rank, vars(account))

    def peek(self) -> list[str]:
        """Return some of the first texts; raises ValueError, with what was found instead, when there is none."""
        account = Account()
        found = list(islice(self._documents(self.files[:_PEEKED_FILES], account), _PEEKED_DOCUMENTS))
        if found:
            return [document.text for document in found]
        hint = "; in JSON lines each line is an object" if any("JSON" in reason for reason in account.first) else ""
        raise ValueError(
            f"sources.{self.source}: none of the first {account.read.total():,} documents has text: "
            f"{account.describe_faults() or 'the files are empty'}{hint}; check the reader and its text_key"
        )

    def _documents(self, files: list[str], account: Account, limit: float = float("inf")) -> Iterator[Document]:
        """Yield the documents of some files, up to a number of characters.

        Raises ValueError for a file that cannot be read to its end; the message says how far the reading came.
        """
        reader = create_reader(self.source, self.settings)
        on_disk = isinstance(reader, BaseDiskReader)
        if hasattr(reader, "adapter"):
            reader.adapter = _CountingAdapter(reader, account)
        for place, file in enumerate(files):
            if limit <= 0:
                account.beyond_limit = len(files) - place
                return
            try:
                if on_disk:  # its adapter counts
                    rows = reader.read_file(file)
                elif hasattr(reader, "documents"):  # as those of data_prep.environment
                    rows = _count(reader.documents(Path(file)), file, account)
                else:  # a reader of datatrove without files, such as one of a hub's data sets
                    rows = reader.run()
                for document in rows:
                    document.metadata.setdefault(FILE, file)
                    limit -= len(document.text)
                    yield document
                    if limit <= 0:
                        break
            except Exception as error:  # any library's error about the contents of a user's file
                where = reader.data_folder.resolve_paths(file) if on_disk else file
                how = " ".join(str(error).split()) or type(error).__name__
                raise ValueError(
                    f"sources.{self.source}: {where} cannot be read on after {account.read[file]:,} documents: {how}; "
                    "restore the file or move it away"
                ) from error


class _CountingAdapter:
    """A reader's adapter, which turns a row into a document, wrapped so that it counts each row and each unusable one."""

    def __init__(self, reader: Any, account: Account) -> None:
        self.given = reader.adapter
        self.text_key = reader.text_key
        self.account = account
        # Rows of Parquet and lines of JSON have a number in their file; of other readers the documents are counted.
        self.noun = getattr(reader, "noun", "")
        # A user's own adapter may find the text elsewhere than under `text_key`.
        self.by_key = getattr(self.given, "__name__", "") == "_default_adapter"

    def __call__(self, row: dict[str, Any], path: str, number: int | str) -> dict[str, Any]:
        """Return what the given adapter makes of the row, or an empty text, which the reader skips."""
        self.account.read[path] += 1
        place = f"{self.noun} {number}" if self.noun else f"document {self.account.read[path]}"
        fault, parsed = row.get(FAULT, ""), {}
        if not fault and self.by_key and not self._find_text(row):
            fault = WITHOUT_KEY.format(KEY=self.text_key)
            place += f", which has {', '.join(sorted(map(str, row))[:_SHOWN_KEYS]) or 'no keys'}"
        if not fault:
            parsed = self.given(row, path, number)
            fault = fault_of(parsed["text"])
        if fault:
            self.account.add_fault(path, fault, place)
            return {"text": ""}
        # A column called media need not have the structure that datatrove expects, and is no text anyway.
        return {**parsed, "media": [], "metadata": {**parsed["metadata"], FILE: path}}

    def _find_text(self, row: dict[str, Any]) -> bool:
        """Return whether the row has a text. One below nested keys, `doc.text`, is copied to where the reader looks."""
        value: Any = row
        for key in [self.text_key] if self.text_key in row else self.text_key.split("."):
            if not isinstance(value, dict) or key not in value:
                return False
            value = value[key]
        row[self.text_key] = value
        return True


def _count(documents: Iterable[Document | str], file: str, account: Account) -> Iterator[Document]:
    """Count the documents of a reader without adapter; a string is the reason why a document is unusable."""
    for document in documents:
        account.read[file] += 1
        fault = document if isinstance(document, str) else fault_of(document.text)
        if fault:
            account.add_fault(file, fault)
        elif isinstance(document, Document):
            yield document


def _filter(
    step: PipelineStep, documents: Iterator[Document], account: Account, source: str, rank: int, world_size: int
) -> Iterator[Document]:
    """Pass documents through a filter, or another step of datatrove, and count by file those that it drops."""
    name = step.name.split()[-1].lower()
    if isinstance(step, BaseFilter):
        given: Any = step.exclusion_writer

        def write(document: Document, rank: int) -> None:
            account.add_filtered(document.metadata[FILE], document.metadata.get("filter_reason") or name)
            if given:
                given.write(document, rank)

        step.exclusion_writer = cast(Any, nullcontext(SimpleNamespace(write=write)))
        with given or nullcontext():
            yield from step.run(documents, rank, world_size)
        return
    # Another step does not say what it drops: compare the documents of each file that go in and come out.
    missing: Counter[str] = Counter()

    def count_incoming() -> Iterator[Document]:
        for document in documents:
            missing[document.metadata[FILE]] += 1
            yield document

    for document in step.run(count_incoming(), rank, world_size):
        missing[document.metadata[FILE]] -= 1
        yield document
    for file, count in missing.items():
        if count < 0:
            raise ValueError(f"sources.{source}.filters: {name} creates documents; a step may keep, change or drop them")
        if count:
            account.add_filtered(file, name, count)
