"""The files of a source: those that its reader can read, in a local or remote folder, or those of a Python package.

The files are divided into parts, which depend on their number and sizes alone. So reading can be interrupted and continued
with any number of workers: a finished part has saved its account, and an unfinished one starts over.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from datatrove.pipeline.readers import CSVReader, IpcReader, JsonlReader, ParquetReader, WarcReader
from datatrove.pipeline.readers.base import BaseDiskReader
from fsspec.utils import glob_translate
from hydra.errors import HydraException
from hydra.utils import instantiate

from data_prep.account import BELOW, HIDDEN, OTHER_KIND, describe
from data_prep.config import SourceConfig
from data_prep.foreign import MdsReader
from data_prep.readers import COMPRESSED, JsonLines, ParquetRows, TextReader

_LEAST_PARTS, _PART_BYTES = 16, 1 << 30
_UNSUPPORTED = ("paths_file", "limit", "skip", "shuffle_files")
"""Arguments of datatrove's readers whose effect depends on how the reading is divided among workers."""
_REPLACED = {JsonlReader: JsonLines, ParquetReader: ParquetRows}
"""Readers of datatrove, each with the one that reads the same documents and counts what cannot be read."""
_ENDINGS: dict[type, tuple[str, ...]] = {
    JsonlReader: (".jsonl", ".json", ".ndjson"),
    ParquetReader: (".parquet", ".parq", ".pq"),
    TextReader: (".txt", ".text", ".md", ".rst", ".tex"),
    CSVReader: (".csv", ".tsv"),
    IpcReader: (".arrow", ".feather", ".ipc"),
    WarcReader: (".warc",),
    MdsReader: ("index.json",),
}
"""Suffixes of the files that each reader reads, to which a suffix of compression may be added; other files are skipped."""


class File(NamedTuple):
    """A file of a source: its path, its size, and what shows that it has changed."""

    path: str
    size: int
    changed: str
    """Time of the last change, or another mark of the version, as the file system gives it; empty if it gives none."""


class Inputs(NamedTuple):
    """The files that a source reads."""

    files: list[File]
    passed_over: dict[str, int]
    """Number of files that are skipped, by reason."""

    @property
    def parts(self) -> int:
        """Number of parts into which the reading is divided; a function of the files alone."""
        size = sum(file.size for file in self.files)
        return max(1, min(len(self.files), max(_LEAST_PARTS, -(-size // _PART_BYTES))))


def reader_by_files(data_folder: str) -> BaseDiskReader:
    """Create the reader of a local folder by how the names of its files end: JSON lines, Parquet or plain text.

    Raises FileNotFoundError if there is no such folder, and ValueError if it holds none of these, or several.
    """
    if not Path(data_folder).is_dir():
        raise FileNotFoundError(f"{data_folder} is no folder; name one that holds text")
    kinds = {JsonLines: _ENDINGS[JsonlReader], ParquetRows: _ENDINGS[ParquetReader], TextReader: _ENDINGS[TextReader]}
    endings = {ending + packed: kind for kind, own in kinds.items() for ending in own for packed in ("", *COMPRESSED)}
    names = [path.name.lower() for path in Path(data_folder).rglob("*") if path.is_file()]
    found = {kind for ending, kind in endings.items() if any(name.endswith(ending) for name in names)}
    if len(found) != 1:
        known = ", ".join(ending for own in kinds.values() for ending in own)
        held = "several kinds" if found else "none of them"
        raise ValueError(f"{data_folder}: expected files of one kind, {known}; it holds {held}")
    return found.pop()(data_folder)


def create_reader(name: str, source: SourceConfig) -> Any:
    """Create the reader of a source; raises ValueError, naming the key, when that fails."""
    key = f"sources.{name}.reader"
    for argument in _UNSUPPORTED:
        if argument in source.reader:
            raise ValueError(f"{key}.{argument}: not supported; choose files by glob_pattern, and how much by limit_mb")
    if not source.reader.get("data_folder", "given by the reader"):
        raise ValueError(f"{key}.data_folder: no value; name the folder to read: input=DIR, where the corpus says ${{input}}")
    try:
        reader = instantiate(source.reader)
        if ours := _REPLACED.get(type(reader)):
            reader = instantiate({**source.reader, "_target_": f"{ours.__module__}.{ours.__name__}"})
    except (HydraException, ImportError, ValueError, OSError) as error:
        raise ValueError(f"{key}: {error.__cause__ or error}") from error
    return reader


def list_inputs(name: str, reader: Any) -> Inputs:
    """List the files that a reader reads; raises FileNotFoundError when there are none."""
    key = f"sources.{name}.reader"
    endings: tuple[str, ...] = ()
    if isinstance(reader, BaseDiskReader):
        plain = next((endings for kind, endings in _ENDINGS.items() if isinstance(reader, kind)), ())
        endings = (*plain, *(ending + compressed for ending in plain for compressed in COMPRESSED))
        found = _list_folder(key, reader, endings)
        where = str(reader.data_folder.path)
    elif hasattr(reader, "files"):
        try:
            found = Inputs([_stat(str(path), path) for path in reader.files()], {})
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
        where = "the packages named"
    else:
        return Inputs([File("", 0, "")], {})  # a reader without files, such as one of a hub's data sets, is one part
    if not found.files:
        skipped = f" (passed over: {describe(found.passed_over)})" if found.passed_over else ""
        kinds = f"; it reads {', '.join(endings)}" if endings else ""
        raise FileNotFoundError(
            f"sources.{name}.reader: no files to read in {where}{skipped}{kinds}; check the path, or set glob_pattern"
        )
    return found


def _list_folder(key: str, reader: BaseDiskReader, endings: tuple[str, ...]) -> Inputs:
    """List the files of a folder by their suffixes, or by the reader's `glob_pattern`; hidden files are skipped."""
    folder = reader.data_folder
    local = Path(folder.path) if folder.is_local() else None
    if local is not None and local.is_file():
        raise ValueError(f"{key}: {local} is a file; name its folder, and the file by glob_pattern")
    if not (local.is_dir() if local else folder.exists("")):
        raise FileNotFoundError(f"{key}: {folder.path} does not exist; check the path")
    pattern = reader.glob_pattern or ""
    # As in datatrove, a pattern without wildcards is the end of a name.
    matches = re.compile(glob_translate(pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}")).match
    files, passed_over = [], Counter[str]()
    for path, entry in _walk(local) if local else _list_remote(folder):
        if not reader.recursive and "/" in path:
            passed_over[BELOW] += 1
        elif any(part.startswith(".") for part in path.split("/")) and not pattern.startswith("."):
            passed_over[HIDDEN] += 1
        elif entry is None or not (matches(path) if pattern else path.lower().endswith(endings or "")):
            passed_over[OTHER_KIND] += 1
        else:
            files.append(_stat(path, entry) if isinstance(entry, Path) else entry)
    return Inputs(sorted(files), dict(passed_over))


def _walk(root: Path) -> Iterator[tuple[str, Path | None]]:
    """Yield every file below a folder, with None for what is not a regular file.

    Links are followed, but each folder is entered once only, so links in a circle do no harm.
    """
    entered: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_raise):
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in entered:
            folders.clear()
            continue
        entered.add((stat.st_dev, stat.st_ino))
        folders.sort()
        for path in sorted(Path(folder, name) for name in names):
            yield path.relative_to(root).as_posix(), path if path.is_file() or not path.exists() else None


def _raise(error: OSError) -> None:
    """Raise the error of a folder that cannot be listed; without this, `os.walk` would skip it."""
    raise error


def _list_remote(folder: Any) -> Iterator[tuple[str, File | None]]:
    """Yield every file below a remote folder."""
    for path, info in folder.find("", detail=True).items():
        changed = next((str(info[key]) for key in ("mtime", "LastModified", "updated", "ETag") if info.get(key)), "")
        yield path, File(path, info["size"], changed) if info["type"] == "file" else None


def _stat(name: str, path: Path) -> File:
    stat = path.stat()  # for a broken link, FileNotFoundError names it
    return File(name, stat.st_size, str(stat.st_mtime_ns))
