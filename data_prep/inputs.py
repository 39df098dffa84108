"""Which files a source has: those of its reader's kind, in a folder of this machine or a remote one, or those of a package.

They are cut into parts by their number and sizes alone, so that reading can be stopped, and gone on with by any number of
workers: a part that is done has saved its account, and one that is not starts over.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from datatrove.pipeline.readers import CSVReader, IpcReader, JsonlReader, ParquetReader, WarcReader
from datatrove.pipeline.readers.base import BaseDiskReader
from fsspec.utils import glob_translate
from hydra.errors import HydraException
from hydra.utils import instantiate

from data_prep.config import Source
from data_prep.foreign import MdsReader
from data_prep.readers import COMPRESSED, JsonLines, ParquetRows, TextReader

_LEAST_PARTS, _PART_BYTES = 16, 1 << 30
_UNSUPPORTED = ("paths_file", "limit", "skip", "shuffle_files")
"""Arguments of datatrove's readers that depend on how the reading is shared out."""
_ENDINGS: dict[type, tuple[str, ...]] = {
    JsonlReader: (".jsonl", ".json", ".ndjson"),
    ParquetReader: (".parquet", ".parq", ".pq"),
    TextReader: (".txt", ".text", ".md", ".rst", ".tex"),
    CSVReader: (".csv", ".tsv"),
    IpcReader: (".arrow", ".feather", ".ipc"),
    WarcReader: (".warc",),
    MdsReader: ("index.json",),
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
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_refuse):
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


def _refuse(error: OSError) -> None:
    """Raise what a folder that cannot be listed says: without this it would be left out."""
    raise error


def _listed(folder: Any) -> Iterator[tuple[str, File | None]]:
    """Every file below a remote folder."""
    for path, info in folder.find("", detail=True).items():
        changed = next((str(info[key]) for key in ("mtime", "LastModified", "updated", "ETag") if info.get(key)), "")
        yield path, File(path, info["size"], changed) if info["type"] == "file" else None


def _local(name: str, path: Path) -> File:
    stat = path.stat()  # FileNotFoundError names a link that leads nowhere
    return File(name, stat.st_size, str(stat.st_mtime_ns))
