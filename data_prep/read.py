"""Reading a source: each document of its files goes to a bucket, or into the account of drops."""

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
from data_prep.config import Source
from data_prep.inputs import reader_of
from data_prep.readers import FAULT

FILE = "file"
"""Key of a document's metadata: the file that it is from."""
_SHOWN_KEYS = 12
_PEEKED_FILES, _PEEKED_DOCUMENTS = 20, 1000


class Read(PipelineStep):
    """Task r reads every `parts`-th file, from the r-th, filters its documents, and deals them to buckets by their hash.

    The account goes to `<work>/accounts/<number>/<r>.json` when the part is done. `number` stands for the source in names.
    """

    type = "📖 - READER"
    name = "Read"

    def __init__(self, name: str, source: Source, files: list[str], work: Path, number: int, buckets: int) -> None:
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
        documents = self._capped(account, rank, world_size)
        for entry in self.settings.filters:
            documents = _through(instantiate(entry), documents, account, self.source, rank, world_size)
        with JsonlWriter(str(self.work / "buckets"), f"${{bucket}}/{self.number:03d}-${{rank}}.jsonl.zst", "zstd") as writer:
            for document in documents:
                writer.write(self._dealt(document), rank)
        folder = self.work / "accounts" / f"{self.number:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        account.save(folder / f"{rank:05d}.json")
        yield from data or ()

    def peek(self) -> list[str]:
        """Some of the first texts; ValueError, saying what is there instead, when the first documents have none."""
        account = Account()
        found = list(islice(self._documents(self.files[:_PEEKED_FILES], account), _PEEKED_DOCUMENTS))
        if found:
            return [document.text for document in found]
        reasons = Counter[str]()
        for counts in account.faults.values():
            reasons.update(counts)
        said = ", ".join(f"{count:,} {reason} (first: {account.first[reason]})" for reason, count in reasons.most_common())
        hint = "; JSON lines have an object each" * any("JSON" in reason for reason in reasons)
        raise ValueError(
            f"sources.{self.source}: none of the first {account.read.total():,} documents has text: "
            f"{said or 'the files are empty'}{hint}; check the reader and its text_key"
        )

    def _capped(self, account: Account, rank: int, world_size: int) -> Iterator[Document]:
        """The documents of a part, up to its share of `limit_mb` million characters."""
        files = self.files[rank::world_size]
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
        """The documents of some files; ValueError names the file that cannot be read to its end, and how far it went."""
        reader = reader_of(self.source, self.settings)
        if hasattr(reader, "adapter"):
            reader.adapter = _Adapter(reader, account)
        for file in files:
            try:
                if isinstance(reader, BaseDiskReader):
                    rows = reader.read_file(file)
                elif hasattr(reader, "documents"):
                    rows = _counted(reader.documents(Path(file)), file, account)
                else:
                    rows = reader.run()
                for document in rows:
                    document.metadata.setdefault(FILE, file)
                    yield document
            except Exception as error:  # of any library, about what a user's file holds
                where = reader.data_folder.resolve_paths(file) if isinstance(reader, BaseDiskReader) else file
                how = " ".join(str(error).split()) or type(error).__name__
                raise ValueError(
                    f"sources.{self.source}: {where} cannot be read on after {account.read[file]:,} documents: {how}; "
                    "restore the file or move it away"
                ) from error

    def _dealt(self, document: Document) -> Document:
        number = xxhash.xxh3_128_intdigest(document.text.encode())
        metadata = {
            "hash": f"{number:032x}",
            "bucket": f"{number % self.buckets:05d}",
            "source": self.source,
            FILE: document.metadata[FILE],
        }
        return Document(text=document.text, id=document.id, metadata=metadata)


class _Adapter:
    """Count each row that a reader gives to its adapter, and why those are of no use that are not."""

    def __init__(self, reader: Any, account: Account) -> None:
        self.given = reader.adapter
        self.text_key = reader.text_key
        self.noun = "row" if isinstance(reader, ParquetReader) else "line" if isinstance(reader, JsonlReader) else "document"
        self.account = account
        self.by_key = getattr(self.given, "__name__", "") == "_default_adapter"

    def __call__(self, row: dict[str, Any], path: str, number: int | str) -> dict[str, Any]:
        """What the reader's own adapter makes of the row, or an empty text, which the reader leaves out."""
        self.account.read[path] += 1
        place = f"{self.noun} {self.account.read[path] if self.noun == 'document' else number}"
        fault: str = row.get(FAULT, "")
        parsed: dict[str, Any] = {"text": ""}
        if not fault and self.by_key:
            fault = "" if self._found(row) else f"without text_key={self.text_key}"
            place += f", which has {', '.join(sorted(map(str, row))[:_SHOWN_KEYS]) or 'no keys'}" if fault else ""
        if not fault:
            parsed = self.given(row, path, number) | {"media": []}
            fault = _fault_of(parsed["text"])
        if not fault:
            return {**parsed, "metadata": {**parsed["metadata"], FILE: path}}
        self.account.fault(path, fault, place)
        return {"text": ""}

    def _found(self, row: dict[str, Any]) -> bool:
        """Whether the row has a text; one at a path of keys, `doc.text`, is put where the reader looks for it."""
        value: Any = row
        for key in (self.text_key,) if self.text_key in row else self.text_key.split("."):
            if not isinstance(value, dict) or key not in value:
                return False
            value = value[key]
        row[self.text_key] = value
        return True


def _fault_of(text: Any) -> str:
    """Why something is no text to train on; empty when it is."""
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
    """Count documents of readers that have no adapter; a string says why one is of no use."""
    for document in documents:
        account.read[file] += 1
        fault = document if isinstance(document, str) else _fault_of(document.text)
        if fault:
            account.fault(file, fault)
        elif isinstance(document, Document):
            yield document


class _Excluded:
    """Takes what a filter drops, as its writer of exclusions, and counts it."""

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
        """Count a document under the reason that the filter gave, or its name."""
        self.account.filtered[document.metadata[FILE]][document.metadata.get("filter_reason") or self.name] += 1
        if self.given:
            self.given.write(document, rank)


def _through(
    step: PipelineStep, documents: Iterator[Document], account: Account, source: str, rank: int, world_size: int
) -> Iterator[Document]:
    """What a filter, or any other step of datatrove, lets pass; what it drops is counted by file."""
    name = step.name.split()[-1].lower()
    if isinstance(step, BaseFilter):
        step.exclusion_writer = _Excluded(account, name, step.exclusion_writer)  # pyright: ignore[reportAttributeAccessIssue]
        yield from step.run(documents, rank, world_size)
        return
    missing: Counter[str] = Counter()

    def going_in() -> Iterator[Document]:
        for document in documents:
            missing[document.metadata[FILE]] += 1
            yield document

    for document in step.run(going_in(), rank, world_size):
        missing[document.metadata[FILE]] -= 1
        yield document
    for file, count in missing.items():
        if count < 0:
            raise ValueError(
                f"sources.{source}.filters: {name} makes documents of its own; a step may keep, change or drop them"
            )
        if count:
            account.filtered[file][name] += count
