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
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import IO, Any, cast

import orjson
import pyarrow
from datatrove.data import Document
from datatrove.pipeline.readers import JsonlReader, ParquetReader
from datatrove.pipeline.readers.base import BaseDiskReader
from pyarrow import parquet

from data_prep.account import NOT_AN_OBJECT, NOT_JSON, NOT_UTF8

FAULT = "\0fault"
"""Key of an unusable row; its value is the reason. No column of a user's file can have this name by accident."""
Row = dict[str, Any]
_BOM = b"\xef\xbb\xbf"
_BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")
_OPENERS: dict[str, Callable[[Any], Any]] = {
    "": lambda raw: raw,
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    # The stream of the package zstandard ends without an error where a file was cut off, and after the first frame.
    ".zst": lambda raw: io.BufferedReader(cast(Any, pyarrow.CompressedInputStream(raw, "zstd"))),
}
COMPRESSED = tuple(_OPENERS)[1:]
"""Suffixes of the compressed files that can be read. Reading one that was cut off raises an error."""


class _RowReader(BaseDiskReader):
    """A reader that reads a file, decompressed according to its suffix, as numbered rows, each of which is a document."""

    def read_file(self, filepath: str) -> Generator[Document, None, None]:
        """Yield the documents of one file."""
        ending = next((ending for ending in COMPRESSED if filepath.endswith(ending)), "")
        with _OPENERS[ending](self.data_folder.open(filepath, "rb")) as file:
            documents = (self.get_document_from_dict(row, filepath, number) for number, row in self._rows(file))
            yield from filter(None, documents)

    @abstractmethod
    def _rows(self, file: IO[bytes]) -> Iterable[tuple[int, Row]]:
        """Yield the rows of an open file, each with its number."""


class JsonLines(_RowReader, JsonlReader):
    """Read one document per line, a JSON object with the key `text_key`. Lines count from 1; blank ones are skipped."""

    noun = "line"

    def _rows(self, file: IO[bytes]) -> Iterator[tuple[int, Row]]:
        for number, line in enumerate(file, 1):
            line = (line.removeprefix(_BOM) if number == 1 else line).strip()
            if line:
                yield number, _parse_object(line)


class ParquetRows(_RowReader, ParquetReader):
    """Read one document per row; the text is in the column `text_key`. Rows count from 1."""

    noun = "row"

    def _rows(self, file: IO[bytes]) -> Iterator[tuple[int, Row]]:
        with parquet.ParquetFile(file) as opened:
            batches = opened.iter_batches(batch_size=self.batch_size)
            yield from enumerate((row for batch in batches for row in _rows_of(batch)), 1)


class TextReader(_RowReader):
    """Read plain text in UTF-8: one document per file, per line, or per paragraph, which blank lines separate.

    Raises ValueError when `document` is not file, line or paragraph.
    """

    name = "📄 Text"

    def __init__(self, data_folder: str, document: str = "file", **settings: Any) -> None:
        super().__init__(data_folder, **settings)
        if document not in ("file", "line", "paragraph"):
            raise ValueError(f"document={document}: expected file, line or paragraph")
        self.document = document

    def _rows(self, file: IO[bytes]) -> Iterable[tuple[int, Row]]:
        if self.document == "line":
            lines = (line.rstrip(b"\r\n") for line in file)
            return enumerate((self._decode(line) for line in lines if line.strip()), 1)
        row = self._decode(file.read())
        if self.document == "file" or FAULT in row:
            return [(1, row)]
        paragraphs = _BLANK_LINES.split(row[self.text_key].replace("\r\n", "\n"))
        return enumerate(({self.text_key: text.strip("\n")} for text in paragraphs if text.strip()), 1)

    def _decode(self, content: bytes) -> Row:
        try:
            return {self.text_key: content.removeprefix(_BOM).decode()}
        except UnicodeDecodeError:
            return {FAULT: NOT_UTF8}


def _parse_object(line: bytes) -> Row:
    """Return the JSON object of a line, or its fault."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            row = json.loads(line.decode())  # accepts NaN, huge integers and lone surrogates, unlike orjson
        except UnicodeDecodeError:
            return {FAULT: NOT_UTF8}
        except (ValueError, RecursionError):
            return {FAULT: NOT_JSON}
    return row if isinstance(row, dict) else {FAULT: NOT_AN_OBJECT}


def _rows_of(batch: pyarrow.RecordBatch) -> Iterator[Row]:
    """Yield the rows of a batch; where the bytes of one are not UTF-8, the others are still read."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for number in range(len(batch)):
            try:
                yield from batch.slice(number, 1).to_pylist()
            except UnicodeDecodeError:
                yield {FAULT: NOT_UTF8}
