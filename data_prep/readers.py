"""Readers of JSON lines, Parquet and plain text that skip nothing silently.

datatrove's own readers skip broken lines, and the rest of a file after a byte that is not UTF-8, and only log it. These pass
every line or row to the adapter of the reader, where `data_prep.read` counts it; in place of an unreadable one they pass
`{FAULT: reason}`. A file that cannot be read to its end raises an error.
"""

import bz2
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable, Generator, Iterator
from typing import IO, Any, cast

import orjson
import pyarrow
from datatrove.data import Document
from datatrove.io import DataFolder
from datatrove.pipeline.readers import JsonlReader, ParquetReader
from datatrove.pipeline.readers.base import BaseDiskReader
from pyarrow import parquet

FAULT = "\0fault"
"""Key of an unusable row; its value is the reason. No column of a user's file can have this name by accident."""
NOT_UTF8 = "not UTF-8"
_BOM = b"\xef\xbb\xbf"
_BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")
_OPENERS: dict[str, Callable[[Any], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    # The stream of the package zstandard ends without an error where a file was cut off, and after the first frame.
    ".zst": lambda raw: io.BufferedReader(cast(Any, pyarrow.CompressedInputStream(raw, "zstd"))),
}
COMPRESSED = tuple(_OPENERS)
"""Suffixes of the compressed files that can be read."""


def open_bytes(folder: DataFolder, path: str) -> IO[bytes]:
    """Open a file as bytes, decompressed according to its suffix; reading a file that was cut off raises an error."""
    raw = folder.open(path, "rb")
    ending = next((ending for ending in COMPRESSED if path.endswith(ending)), "")
    return _OPENERS[ending](raw) if ending else raw


class JsonLines(JsonlReader):
    """Read one document per line; a line is a JSON object with the key `text_key`, and blank lines are skipped."""

    def read_file(self, filepath: str) -> Generator[Document, None, None]:
        """Yield the documents of one file; lines are numbered from 1."""
        with open_bytes(self.data_folder, filepath) as file:
            for number, line in enumerate(file, 1):
                line = (line.removeprefix(_BOM) if number == 1 else line).strip()
                if not line:
                    continue
                document = self.get_document_from_dict(_json_object(line), filepath, number)
                if document:
                    yield document


class ParquetRows(ParquetReader):
    """Read one document per row; the text is in the column `text_key`."""

    def read_file(self, filepath: str) -> Generator[Document, None, None]:
        """Yield the documents of one file; rows are numbered from 1."""
        number = 0
        with self.data_folder.open(filepath, "rb") as file, parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(batch_size=self.batch_size):
                for row in _rows(batch):
                    number += 1
                    document = self.get_document_from_dict(row, filepath, number)
                    if document:
                        yield document


class TextReader(BaseDiskReader):
    """Read plain text in UTF-8: one document per file, per line, or per paragraph, which blank lines separate.

    Raises ValueError when `document` is not file, line or paragraph.
    """

    name = "📄 Text"

    def __init__(self, data_folder: str, document: str = "file", **settings: Any) -> None:
        super().__init__(data_folder, **settings)
        if document not in ("file", "line", "paragraph"):
            raise ValueError(f"document={document}: expected file, line or paragraph")
        self.document = document

    def read_file(self, filepath: str) -> Iterator[Document]:
        """Yield the documents of one file, numbered from 1."""
        with open_bytes(self.data_folder, filepath) as file:
            for number, row in enumerate(self._rows(file), 1):
                document = self.get_document_from_dict(row, filepath, number)
                if document:
                    yield document

    def _rows(self, file: IO[bytes]) -> Iterator[dict[str, Any]]:
        if self.document == "line":
            for line in file:
                line = line.rstrip(b"\r\n")
                if line.strip():
                    yield self._row(line.removeprefix(_BOM))
            return
        row = self._row(file.read().removeprefix(_BOM))
        if self.document == "file" or FAULT in row:
            yield row
            return
        paragraphs = _BLANK_LINES.split(row[self.text_key].replace("\r\n", "\n"))
        for paragraph in paragraphs:
            if paragraph.strip():
                yield {self.text_key: paragraph.strip("\n")}

    def _row(self, content: bytes) -> dict[str, Any]:
        try:
            return {self.text_key: content.decode()}
        except UnicodeDecodeError:
            return {FAULT: NOT_UTF8}


def _json_object(line: bytes) -> dict[str, Any]:
    """Return the JSON object of a line, or its fault."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            row = json.loads(line.decode())  # accepts NaN, huge integers and lone surrogates, unlike orjson
        except UnicodeDecodeError:
            return {FAULT: NOT_UTF8}
        except (ValueError, RecursionError):
            return {FAULT: "not JSON"}
    return row if isinstance(row, dict) else {FAULT: "not a JSON object"}


def _rows(batch: pyarrow.RecordBatch) -> Iterator[dict[str, Any]]:
    """Yield the rows of a batch; where the bytes of one are not UTF-8, the others are still read."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for number in range(len(batch)):
            try:
                yield from batch.slice(number, 1).to_pylist()
            except UnicodeDecodeError:
                yield {FAULT: NOT_UTF8}
