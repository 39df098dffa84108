"""MosaicML streaming's shards of blocks, byte for byte as its own writer and reader have them.

1. A shard is a uint32 number of samples, the uint32 offset of each sample and of the end, the writer's settings as JSON, and
   the samples.
2. A sample is the uint32 sizes of `ends` and `tokens`, then `continues` (uint8), `ends` (uint32) and `tokens` (uint16 or
   uint32).
3. An array is one byte, four times its number of axes plus log2 of the bytes of an entry of its shape, then shape and values.
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
COLUMNS = ("continues", "ends", "tokens")
TOKEN_DTYPES = ("uint16", "uint32")

_PAIR = struct.Struct("=II")
_SHAPE_DTYPES = ("uint8", "uint16", "uint32", "uint64")
_AXES = 1


class Block(NamedTuple):
    """Text tokens of consecutive documents."""

    tokens: Integer[np.ndarray, " tokens"]
    ends: Integer[np.ndarray, " docs"]
    """Where each document ends, exclusive."""
    continues: bool
    """Whether the last one goes on in the next block."""


def settings(dtype: str, size_limit: int) -> dict[str, Any]:
    """What a shard and its index say of how it was written, for tokens of `dtype` in shards of at most `size_limit` bytes."""
    return {
        "version": 2,
        "format": "mds",
        "compression": None,
        "hashes": [SHARD_HASH],
        "size_limit": size_limit,
        "column_names": list(COLUMNS),
        "column_encodings": ["uint8", "ndarray:uint32", f"ndarray:{dtype}"],
        "column_sizes": [1, None, None],
    }


class Writer:
    """Blocks into the shards of a new folder; the index comes last.

    Raises FileExistsError when the folder is there already, and ValueError for shards of 4 GiB and more, whose offsets would
    not be uint32, and for a block that no shard has room for.
    """

    def __init__(self, folder: Path, dtype: str, size_limit: int) -> None:
        if size_limit >= 1 << 32:
            raise ValueError(f"{folder}: shards of {size_limit:,} bytes; expected less than 4 GiB, 4,096 MB")
        folder.mkdir(parents=True)
        self.folder = folder
        self.dtype = dtype
        self.size_limit = size_limit
        self._settings = settings(dtype, self.size_limit)
        self._header = json.dumps(self._settings, sort_keys=True).encode()
        self._shards: list[dict[str, Any]] = []
        self._start()

    def write(self, block: Block) -> None:
        """Add a block, which has one document and one token at least."""
        ends, tokens = _encoded(block.ends, "uint32"), _encoded(block.tokens, self.dtype)
        sample = b"".join((np.array([len(ends), len(tokens)], np.uint32).tobytes(), bytes([block.continues]), ends, tokens))
        if self._bytes + 4 + len(sample) > self.size_limit:
            self._flush()
            if self._bytes + 4 + len(sample) > self.size_limit:
                raise ValueError(f"{self.folder}: a block of {len(sample):,} bytes is larger than a shard, {self.size_limit:,}")
        self._samples.append(sample)
        self._bytes += 4 + len(sample)

    def finish(self) -> None:
        """Write what is left, and the index."""
        self._flush()
        (self.folder / INDEX).write_text(json.dumps({"version": 2, "shards": self._shards}, sort_keys=True))

    def _start(self) -> None:
        self._samples: list[bytes] = []
        self._bytes = 4 + 4 + len(self._header)

    def _flush(self) -> None:
        if not self._samples:
            return
        sizes = [4 * (2 + len(self._samples)) + len(self._header), *map(len, self._samples)]
        table = np.array([len(self._samples), *np.cumsum(sizes)], np.uint32)
        name = f"shard.{len(self._shards):05}.mds"
        digest = xxhash.xxh3_64()
        with (self.folder / name).open("wb") as file:
            for part in (table.tobytes(), self._header, *self._samples):
                file.write(part)
                digest.update(part)
        raw = {"basename": name, "bytes": sum(sizes), "hashes": {SHARD_HASH: digest.hexdigest()}}
        self._shards.append({"samples": len(self._samples), "raw_data": raw, "zip_data": None, **self._settings})
        self._start()


class Shard:
    """The blocks of one shard, by index.

    `samples` and `written` are what the index says of it. ValueError, naming the file, when it holds something else. The file
    is opened for each block, since a run comes to hold more shards than a process may have files.
    """

    def __init__(self, path: Path, samples: int, written: dict[str, Any]) -> None:
        self.path = path
        self.samples = samples
        self.dtype = np.dtype(written["column_encodings"][2].removeprefix("ndarray:"))
        header = json.dumps(written, sort_keys=True).encode()
        first = 4 * (2 + samples) + len(header)
        size = path.stat().st_size
        if first > size:
            raise self._damaged(f"it is too short for a table of {samples} samples")
        with path.open("rb") as file:
            table = file.read(4 * (2 + samples))
            found = file.read(len(header))
        offsets = np.frombuffer(table, np.uint32).astype(np.int64)
        if offsets[0] != samples:
            raise self._damaged(f"it has {offsets[0]} samples, and {samples} by the index")
        if found != header:
            raise self._damaged("its settings are not those of the index")
        if offsets[1] != first or offsets[-1] != size or (np.diff(offsets[1:]) <= 0).any():
            raise self._damaged("its offsets do not rise from the first sample to the end of the file")

    def __getitem__(self, index: int) -> Block:
        """The block at `index`; ValueError when its bytes are none."""
        if not 0 <= index < self.samples:
            raise IndexError(f"{self.path} has {self.samples} samples, none at {index}")
        file = os.open(self.path, os.O_RDONLY)
        try:
            begin, end = _PAIR.unpack(os.pread(file, _PAIR.size, 4 + 4 * index).ljust(_PAIR.size, b"\0"))
            size = min(end, os.fstat(file).st_size) - begin  # nothing is believed to be longer than the file
            sample = os.pread(file, max(0, size), begin)
        finally:
            os.close(file)
        if len(sample) < 9 or len(sample) != end - begin:
            raise self._damaged(f"sample {index} is not inside it")
        ends, tokens = _PAIR.unpack_from(sample)
        if 9 + ends + tokens != len(sample) or sample[8] > 1:
            raise self._damaged(f"the columns of sample {index} do not fill it")
        return Block(
            self._decoded(sample[9 + ends :], self.dtype, index),
            self._decoded(sample[9 : 9 + ends], np.dtype(np.uint32), index),
            bool(sample[8]),
        )

    def _decoded(self, data: bytes, dtype: np.dtype, index: int) -> np.ndarray:
        axes, width = (data[0] >> 2, 1 << data[0] % 4) if data else (0, 0)
        first = 1 + width
        length = int.from_bytes(data[1:first], "little")
        if axes != _AXES or len(data) != first + length * dtype.itemsize:
            raise self._damaged(f"sample {index} holds an array whose length is not what it says")
        return np.frombuffer(data[first:], dtype)  # a copy, so that it is aligned

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is damaged: {what}; restore it from a copy or prepare the data again")


def _encoded(array: np.ndarray, dtype: str) -> bytes:
    assert array.dtype == dtype and array.shape[0] > 0
    width = int(np.searchsorted([1 << 8, 1 << 16, 1 << 32], len(array), side="right"))
    return bytes([_AXES << 2 | width]) + np.array(array.shape, _SHAPE_DTYPES[width]).tobytes() + array.tobytes()
