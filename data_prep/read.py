"""Reading a source: which files it has, and each document of them to a bucket or to the account of drops.

Files are cut into parts by their number and size alone, so that reading can be stopped and gone on with by any number of
workers: a part that is done has saved its account, and one that is not starts over.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.readers import CSVReader, IpcReader, JsonlReader, ParquetReader, WarcReader
from datatrove.pipeline.readers.base import BaseDiskReader
from datatrove.pipeline.writers import JsonlWriter
from fsspec.utils import glob_translate
from hydra.errors import HydraException
from hydra.utils import instantiate

from data_prep.account import Account
from data_prep.config import Source
from data_prep.readers import COMPRESSED, FAULT, JsonLines, ParquetRows, TextReader

FILE = "file"
"""Key of a document's metadata: the file that it is from."""
_LEAST_PARTS, _PART_BYTES = 16, 1 << 30
_SHOWN_KEYS = 12
_UNSUPPORTED = ("paths_file", "limit", "skip", "shuffle_files")
"""Arguments of datatrove's readers that depend on how the reading is shared out."""
_PEEKED_FILES, _PEEKED_DOCUMENTS = 20, 1000
_ENDINGS: dict[type, tuple[str, ...]] = {
    JsonlReader: (".jsonl", ".json", ".ndjson"),
    ParquetReader: (".parquet", ".parq", ".pq"),
    TextReader: (".txt", ".text", ".md", ".rst", ".tex"),
    CSVReader: (".csv", ".tsv"),
    IpcReader: (".arrow", ".feather", ".ipc"),
    WarcReader: (".warc",),
}
"""What the files of each reader are called, before the ending of a compression; others are passed over."""


class File(NamedTuple):
    """One file of a source."""

    path: str
    size: int
    changed: str
    """When it was last changed, as far as its file system knows."""


class Inputs(NamedTuple):
    """What a source reads."""

    files: list[File]
    passed_over: dict[str, int]
    """Files that are left alone, by reason."""

    @property
    def parts(self) -> int:
        """Into how many parts the reading is cut: a function of the files alone."""
        size = sum(file.size for file in self.files)
        return max(1, min(len(self.files), max(_LEAST_PARTS, -(-size // _PART_BYTES))))


def reader_of(name: str, source: Source) -> Any:
    """The reader of a source; ValueError, naming the key, when it cannot be made.

    datatrove's readers of JSON lines and Parquet are taken for ours, which read the same and count what cannot be read.
    """
    key = f"sources.{name}.reader"
    for argument in _UNSUPPORTED:
        if argument in source.reader:
            raise ValueError(f"{key}.{argument}: not supported; choose files by glob_pattern, and how much by limit_mb")
    if not source.reader.get("data_folder", "given by the reader"):
        raise ValueError(f"{key}.data_folder: no value; name the folder to read: input=DIR, where the corpus says ${{input}}")
    try:
        reader = instantiate(source.reader)
        ours = {JsonlReader: JsonLines, ParquetReader: ParquetRows}.get(type(reader))
        if ours:
            reader = instantiate({**source.reader, "_target_": f"{ours.__module__}.{ours.__name__}"})
    except (HydraException, ImportError, ValueError, OSError) as error:
        raise ValueError(f"{key}: {error}") from error
    return reader


def inputs_of(name: str, reader: Any) -> Inputs:
    """The files that a reader reads; FileNotFoundError when there are none."""
    if isinstance(reader, BaseDiskReader):
        found = _in_folder(name, reader)
        where = str(reader.data_folder.path)
    elif hasattr(reader, "files"):
        try:
            found = Inputs([_local(str(path), path) for path in reader.files()], {})
        except ValueError as error:
            raise ValueError(f"sources.{name}.reader: {error}") from error
        where = "the packages named"
    else:
        return Inputs([File("", 0, "")], {})  # such as a data set of a hub, which shares itself out
    if not found.files:
        others = ", ".join(f"{count} {reason}" for reason, count in found.passed_over.items())
        kinds = f"; it reads {', '.join(_endings(reader))}" if _endings(reader) else ""
        raise FileNotFoundError(
            f"sources.{name}.reader: no files to read in {where}{f' (passed over: {others})' * bool(others)}{kinds}; "
            "check the path, or set glob_pattern"
        )
    return found


def _in_folder(name: str, reader: BaseDiskReader) -> Inputs:
    """Files by their endings, or by `glob_pattern` where the reader has one; what is hidden is left alone."""
    folder = reader.data_folder
    local = Path(folder.path) if folder.is_local() else None
    if local is not None and local.is_file():
        raise ValueError(f"sources.{name}.reader: {local} is a file; name its folder, and the file by glob_pattern")
    if not (local.is_dir() if local else folder.exists("")):
        raise FileNotFoundError(f"sources.{name}.reader: {folder.path} does not exist; check the path")
    pattern = reader.glob_pattern
    matches = _matcher(pattern) if pattern else None
    files, passed_over = [], Counter[str]()
    for path, entry in _walk(local) if local else _listed(folder):
        if not reader.recursive and "/" in path:
            passed_over["in folders below"] += 1
        elif any(part.startswith(".") for part in path.split("/")) and not (pattern or "").startswith("."):
            passed_over["hidden"] += 1
        elif entry is None or not (matches(path) if matches else path.lower().endswith(_endings(reader) or "")):
            passed_over["of other kinds"] += 1
        else:
            files.append(_local(path, entry) if isinstance(entry, Path) else entry)
    return Inputs(sorted(files), dict(passed_over))


def _endings(reader: Any) -> tuple[str, ...]:
    plain = next((endings for kind, endings in _ENDINGS.items() if isinstance(reader, kind)), ())
    return (*plain, *(ending + compressed for ending in plain for compressed in COMPRESSED))


def _matcher(pattern: str) -> Callable[[str], Any]:
    """What tells whether a path matches a glob pattern, as fsspec understands it."""
    if not any(sign in pattern for sign in "*?["):
        pattern = f"*{pattern}"
    return re.compile(glob_translate(pattern)).match


def _walk(root: Path) -> Iterator[tuple[str, Path | None]]:
    """Every file below a folder, None for what is no regular file; a folder is entered once, whatever links lead to it."""
    entered: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        inside = Path(folder)
        stat = inside.stat()
        if (stat.st_dev, stat.st_ino) in entered:
            folders.clear()
            continue
        entered.add((stat.st_dev, stat.st_ino))
        folders.sort()
        for name in sorted(names):
            path = inside / name
            relative = path.relative_to(root).as_posix()
            yield relative, path if path.is_file() or not path.exists() else None


def _listed(folder: Any) -> Iterator[tuple[str, File | None]]:
    """Every file below a remote folder."""
    for path, info in folder.find("", detail=True).items():
        changed = next((str(info[key]) for key in ("mtime", "LastModified", "updated", "ETag") if info.get(key)), "")
        yield path, File(path, info["size"], changed) if info["type"] == "file" else None


def _local(name: str, path: Path) -> File:
    stat = path.stat()  # FileNotFoundError names a link that leads nowhere
    return File(name, stat.st_size, str(stat.st_mtime_ns))


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

    def _documents(self, files: list[str], account: Account, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
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
                    rows = reader.run(None, rank, world_size)
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
