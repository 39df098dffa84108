"""Read and write shards of blocks in MosaicML streaming's format (MDS), byte for byte as its own reader and writer do.

1. A shard consists of the number of samples (uint32), the offset of each sample and of the end (uint32), the settings of the
   writer as JSON, and the samples.
2. A sample consists of the sizes in bytes of `ends` and `tokens` (uint32), then `continues` (uint8), `ends` (uint32) and
   `tokens` (uint16 or uint32).
3. An array consists of one byte, its shape and its values. The byte is four times the number of axes, plus log2 of the width
   in bytes of the integers that give the shape.
4. `index.json` lists the shards of a folder with their sizes, hashes and settings.
"""

import json
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from jaxtyping import Integer

INDEX = "index.json"
SHARD_HASH = "xxh3_64"
TOKEN_DTYPES = ("uint16", "uint32")

_PAIR = struct.Struct("=II")
_SHAPE_DTYPES = ("uint8", "uint16", "uint32", "uint64")
_AXES = 1


class Block(NamedTuple):
    """One sample of a shard: the text tokens of consecutive documents."""

    tokens: Integer[np.ndarray, " tokens"]
    ends: Integer[np.ndarray, " docs"]
    """Exclusive end of each document, as an offset into `tokens`."""
    continues: bool
    """Whether the last document continues in the next block of the folder."""


def settings(dtype: str, size_limit: int) -> dict[str, Any]:
    """Return the settings that a shard and its index record, for tokens of `dtype` and at most `size_limit` bytes a shard."""
    return {
        "version": 2,
        "format": "mds",
        "compression": None,
        "hashes": [SHARD_HASH],
        "size_limit": size_limit,
        "column_names": ["continues", "ends", "tokens"],
        "column_encodings": ["uint8", "ndarray:uint32", f"ndarray:{dtype}"],
        "column_sizes": [1, None, None],
    }


def header(written: dict[str, Any]) -> bytes:
    """Return the settings of a shard as they stand in its file."""
    return json.dumps(written, sort_keys=True).encode()


class Writer:
    """Write blocks into the shards of a new folder; the index is written last.

    Raises FileExistsError when the folder exists, and ValueError for a size limit of 4 GiB or more, where offsets would
    exceed uint32, and for a block that is larger than a shard.
    """

    def __init__(self, folder: Path, dtype: str, size_limit: int) -> None:
        if size_limit >= 1 << 32:
            raise ValueError(f"{folder}: shards of {size_limit:,} bytes; expected less than 4 GiB, 4,096 MB")
        folder.mkdir(parents=True)
        self.folder = folder
        self.dtype = dtype
        self.size_limit = size_limit
        self._settings = settings(dtype, size_limit)
        self._header = header(self._settings)
        self._shards: list[dict[str, Any]] = []
        self._samples: list[bytes] = []
        self._size = self._empty_size = 4 + 4 + len(self._header)

    def write(self, block: Block) -> None:
        """Add a block, which must have at least one document and one token."""
        ends, tokens = _encode(block.ends, "uint32"), _encode(block.tokens, self.dtype)
        sample = b"".join((_PAIR.pack(len(ends), len(tokens)), bytes([block.continues]), ends, tokens))
        # Each sample also needs four bytes for its offset in the table at the head of the shard.
        if self._size + 4 + len(sample) > self.size_limit:
            self._flush()
            if self._size + 4 + len(sample) > self.size_limit:
                raise ValueError(f"{self.folder}: a block of {len(sample):,} bytes is larger than a shard, {self.size_limit:,}")
        self._samples.append(sample)
        self._size += 4 + len(sample)

    def finish(self) -> None:
        """Write the last shard and the index."""
        self._flush()
        (self.folder / INDEX).write_text(json.dumps({"version": 2, "shards": self._shards}, sort_keys=True))

    def _flush(self) -> None:
        if not self._samples:
            return
        # The running sum of the head's and the samples' sizes gives each sample's offset, and the end of the file.
        offsets = np.cumsum([4 * (2 + len(self._samples)) + len(self._header), *map(len, self._samples)])
        table = np.array([len(self._samples), *offsets], np.uint32)
        name = f"shard.{len(self._shards):05}.mds"
        content = b"".join((table.tobytes(), self._header, *self._samples))
        (self.folder / name).write_bytes(content)
        raw = {"basename": name, "bytes": len(content), "hashes": {SHARD_HASH: xxhash.xxh3_64_hexdigest(content)}}
        self._shards.append({"samples": len(self._samples), "raw_data": raw, "zip_data": None, **self._settings})
        self._samples, self._size = [], self._empty_size


class Shard:
    """Read the blocks of one shard by index.

    `samples` and `head` are the number of samples and the settings (see `header`) that the folder's index gives for the shard.
    Raises ValueError, naming the file, when the shard contains something else.
    """

    def __init__(self, path: Path, samples: int, head: bytes) -> None:
        self.path = path
        self.samples = samples
        self.dtype = np.dtype(json.loads(head)["column_encodings"][2].removeprefix("ndarray:"))
        # Each field before the samples follows from the index, so damage there is found before any sample is read.
        table = 4 * (2 + samples)
        size = path.stat().st_size
        if table + len(head) > size:
            raise self._damage(f"it is too short for a table of {samples} samples")
        with path.open("rb") as file:
            offsets = np.frombuffer(file.read(table), np.uint32).astype(np.int64)
            found = file.read(len(head))
        if offsets[0] != samples:
            raise self._damage(f"it has {offsets[0]} samples, but the index says {samples}")
        if found != head:
            raise self._damage("its settings are not those of the index")
        if offsets[1] != table + len(head) or offsets[-1] != size or (np.diff(offsets[1:]) <= 0).any():
            raise self._damage("its offsets do not rise from the first sample to the end of the file")

    def __getitem__(self, index: int) -> Block:
        """Return the block at `index`; raises ValueError when its bytes are not a block."""
        if not 0 <= index < self.samples:
            raise IndexError(f"{self.path} has {self.samples} samples, none at {index}")
        # The file is opened for each block: a run uses more shards than a process may have open files.
        with self.path.open("rb", buffering=0) as file:
            begin, end = _PAIR.unpack(os.pread(file.fileno(), _PAIR.size, 4 + 4 * index).ljust(_PAIR.size, b"\0"))
            sample = os.pread(file.fileno(), max(0, end - begin), begin)
        if len(sample) < 9 or len(sample) != end - begin:
            raise self._damage(f"sample {index} is not inside it")
        ends, tokens = _PAIR.unpack_from(sample)
        if 9 + ends + tokens != len(sample) or sample[8] > 1:
            raise self._damage(f"the columns of sample {index} do not fill it")
        return Block(
            self._decode(sample[9 + ends :], self.dtype, index),
            self._decode(sample[9 : 9 + ends], np.dtype(np.uint32), index),
            bool(sample[8]),
        )

    def _decode(self, data: bytes, dtype: np.dtype, index: int) -> np.ndarray:
        # The low two bits of the first byte give the width of the shape's entries, the others the number of axes.
        axes, width = (data[0] >> 2, 1 << data[0] % 4) if data else (0, 0)
        first = 1 + width
        length = int.from_bytes(data[1:first], "little")
        if axes != _AXES or len(data) != first + length * dtype.itemsize:
            raise self._damage(f"sample {index} holds an array that is longer or shorter than its shape says")
        return np.frombuffer(data[first:], dtype)  # a slice is a copy, which is aligned

    def _damage(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is damaged: {what}; restore it from a copy or prepare the data again")


def _encode(array: np.ndarray, dtype: str) -> bytes:
    assert array.dtype == dtype and array.shape[0] > 0
    # log2 of the bytes of the smallest integer type that can hold the length
    width = int(np.searchsorted([1 << 8, 1 << 16, 1 << 32], len(array), side="right"))
    return bytes([_AXES << 2 | width]) + np.array(array.shape, _SHAPE_DTYPES[width]).tobytes() + array.tobytes()
