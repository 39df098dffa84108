"""Read a source: each document of its files goes to a bucket, or is counted as dropped in the account."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import xxhash
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.readers import JsonlReader, ParquetReader
from datatrove.pipeline.readers.base import BaseDiskReader
from datatrove.pipeline.writers import JsonlWriter
from hydra.utils import instantiate

from data_prep.account import Account
from data_prep.config import SourceConfig
from data_prep.inputs import reader_of
from data_prep.readers import FAULT

FILE = "file"
"""Key of the file in the metadata of a document."""
_SHOWN_KEYS = 12
"""Number of keys of a row that a message lists."""
_PEEKED_FILES, _PEEKED_DOCUMENTS = 20, 1000


class Read(PipelineStep):
    """A datatrove step whose task r reads part r of a source, filters the documents, and assigns them to buckets by hash.

    Of n tasks, task r reads the files r, r + n, r + 2n and so on. A finished task has written its account to
    `<work>/accounts/<number>/<r>.json`; `number` is the position of the source in the configuration.
    """

    type = "📖 - READER"
    name = "Read"

    def __init__(self, name: str, source: SourceConfig, files: list[str], work: Path, number: int, buckets: int) -> None:
        super().__init__()
        self.source = name
        self.settings = source
        self.files = files
        self.work = work
        self.number = number
        self.buckets = buckets

    def run(self, data: Iterable[Document] | None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Read one part."""
        account = Account()
        documents = self._limited(account, rank, world_size)
        for entry in self.settings.filters:
            documents = _through(instantiate(entry), documents, account, self.source, rank, world_size)
        with JsonlWriter(str(self.work / "buckets"), f"${{bucket}}/{self.number:03d}-${{rank}}.jsonl.zst", "zstd") as writer:
            for document in documents:
                writer.write(self._assign_bucket(document), rank)
        folder = self.work / "accounts" / f"{self.number:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        account.save(folder / f"{rank:05d}.json")
        yield from data or ()  # datatrove runs a step by exhausting its generator

    def peek(self) -> list[str]:
        """Return some of the first texts; raises ValueError, with what was found instead, when there is none."""
        account = Account()
        found = list(islice(self._documents(self.files[:_PEEKED_FILES], account), _PEEKED_DOCUMENTS))
        if found:
            return [document.text for document in found]
        not_json = any("JSON" in reason for reason in account.fault_reasons())
        hint = "; in JSON lines each line is an object" if not_json else ""
        raise ValueError(
            f"sources.{self.source}: none of the first {account.read.total():,} documents has text: "
            f"{account.describe_faults() or 'the files are empty'}{hint}; check the reader and its text_key"
        )

    def _limited(self, account: Account, rank: int, world_size: int) -> Iterator[Document]:
        """Yield the documents of one part of a source, up to its equal share of `limit_mb` million characters."""
        files = self.files[rank::world_size]
        # Every part has the same limit, so that the result does not depend on which part is read first.
        left = self.settings.limit_mb * 1e6 / world_size if self.settings.limit_mb else float("inf")
        for place, file in enumerate(files):
            if left <= 0:
                account.beyond_limit = len(files) - place
                return
            for document in self._documents([file], account):
                left -= len(document.text)
                yield document
                if left <= 0:
                    break

    def _documents(self, files: list[str], account: Account) -> Iterator[Document]:
        """Yield the documents of some files.

        Raises ValueError for a file that cannot be read to its end; the message says how far the reading came.
        """
        reader = reader_of(self.source, self.settings)
        if hasattr(reader, "adapter"):
            reader.adapter = _Adapter(reader, account)
        for file in files:
            try:
                if isinstance(reader, BaseDiskReader):  # its adapter counts
                    rows = reader.read_file(file)
                elif hasattr(reader, "documents"):  # as those of data_prep.environment
                    rows = _counted(reader.documents(Path(file)), file, account)
                else:  # a reader of datatrove without files, such as one of a hub's data sets
                    rows = reader.run()
                for document in rows:
                    document.metadata.setdefault(FILE, file)
                    yield document
            except Exception as error:  # any library's error about the contents of a user's file
                where = reader.data_folder.resolve_paths(file) if isinstance(reader, BaseDiskReader) else file
                how = " ".join(str(error).split()) or type(error).__name__
                raise ValueError(
                    f"sources.{self.source}: {where} cannot be read on after {account.read[file]:,} documents: {how}; "
                    "restore the file or move it away"
                ) from error

    def _assign_bucket(self, document: Document) -> Document:
        """Return a document that has the metadata by which the writer and the later steps find its bucket and order."""
        # 128 bits: even among 10 billion documents, two texts have the same hash with a probability of 1e-19 only.
        number = xxhash.xxh3_128_intdigest(document.text.encode())
        metadata = {
            "hash": f"{number:032x}",
            "bucket": f"{number % self.buckets:05d}",
            "source": self.source,
            FILE: document.metadata[FILE],
        }
        return Document(text=document.text, id=document.id, metadata=metadata)


class _Adapter:
    """The adapter of a reader, wrapped so that it counts each row and the faults of unusable ones."""

    def __init__(self, reader: Any, account: Account) -> None:
        self.given = reader.adapter
        self.text_key = reader.text_key
        self.account = account
        # Rows of Parquet and lines of JSON have a number in their file; of other readers the documents are counted.
        self.noun = "document"
        if isinstance(reader, ParquetReader):
            self.noun = "row"
        elif isinstance(reader, JsonlReader):
            self.noun = "line"
        # A user's own adapter may find the text elsewhere than under `text_key`.
        self.by_key = getattr(self.given, "__name__", "") == "_default_adapter"

    def __call__(self, row: dict[str, Any], path: str, number: int | str) -> dict[str, Any]:
        """Return what the reader's own adapter makes of the row, or an empty text, which the reader skips."""
        self.account.read[path] += 1
        place = f"{self.noun} {self.account.read[path] if self.noun == 'document' else number}"
        fault: str = row.get(FAULT, "")
        parsed: dict[str, Any] = {"text": ""}
        if not fault and self.by_key and not self._find_text(row):
            fault = f"without text_key={self.text_key}"
            place += f", which has {', '.join(sorted(map(str, row))[:_SHOWN_KEYS]) or 'no keys'}"
        if not fault:
            # A column called media need not have the structure that datatrove expects, and is no text anyway.
            parsed = self.given(row, path, number) | {"media": []}
            fault = _fault_of(parsed["text"])
        if not fault:
            return {**parsed, "metadata": {**parsed["metadata"], FILE: path}}
        self.account.fault(path, fault, place)
        return {"text": ""}

    def _find_text(self, row: dict[str, Any]) -> bool:
        """Return whether the row has a text. One below nested keys, `doc.text`, is copied to where the reader looks."""
        value: Any = row
        keys = [self.text_key] if self.text_key in row else self.text_key.split(".")
        for key in keys:
            if not isinstance(value, dict) or key not in value:
                return False
            value = value[key]
        row[self.text_key] = value
        return True


def _fault_of(text: Any) -> str:
    """Return the reason why a value is not a text to train on; empty when it is one."""
    if text is None:
        return "null"
    if not isinstance(text, str):
        return f"of type {type(text).__name__} in place of a string"
    if not text.strip():
        return "empty"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "with lone surrogates"
    return ""


def _counted(documents: Iterable[Document | str], file: str, account: Account) -> Iterator[Document]:
    """Count the documents of a reader without adapter; a string is the reason why a document is unusable."""
    for document in documents:
        account.read[file] += 1
        fault = document if isinstance(document, str) else _fault_of(document.text)
        if fault:
            account.fault(file, fault)
        elif isinstance(document, Document):
            yield document


class _Excluded:
    """Count the documents that a filter drops; it takes the place of the filter's `exclusion_writer`, and calls that one."""

    def __init__(self, account: Account, name: str, given: Any) -> None:
        self.account = account
        self.name = name
        self.given = given

    def __enter__(self) -> "_Excluded":
        if self.given:
            self.given.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.given:
            self.given.__exit__(*error)

    def write(self, document: Document, rank: int) -> None:
        """Count a document under the reason that the filter gave, or under the filter's name."""
        self.account.filtered[document.metadata[FILE]][document.metadata.get("filter_reason") or self.name] += 1
        if self.given:
            self.given.write(document, rank)


def _through(
    step: PipelineStep, documents: Iterator[Document], account: Account, source: str, rank: int, world_size: int
) -> Iterator[Document]:
    """Pass documents through a filter, or another step of datatrove, and count by file those that it drops."""
    name = step.name.split()[-1].lower()
    if isinstance(step, BaseFilter):
        step.exclusion_writer = _Excluded(account, name, step.exclusion_writer)  # pyright: ignore[reportAttributeAccessIssue]
        yield from step.run(documents, rank, world_size)
        return
    # Another step does not say what it drops: compare the documents of each file that go in and come out.
    missing: Counter[str] = Counter()

    def counted_documents() -> Iterator[Document]:
        for document in documents:
            missing[document.metadata[FILE]] += 1
            yield document

    for document in step.run(counted_documents(), rank, world_size):
        missing[document.metadata[FILE]] -= 1
        yield document
    for file, count in missing.items():
        if count < 0:
            raise ValueError(f"sources.{source}.filters: {name} creates documents; a step may keep, change or drop them")
        if count:
            account.filtered[file][name] += count
