"""The contract with data_prep: a folder of block shards, read by random access.

`<root>/manifest.json`, `<root>/tokenizer.json`, `<root>/<source>/slice-NNN/` and `<root>/<source>/validation/`. One MDS sample
is a block: `tokens`, `ends` (of the documents in it, exclusive offsets), `continues` (1 when the last document goes on in
the next block written). Text tokens only; no special tokens.

Shards are read with streaming's own MDS reader, by index. StreamingDataset is not used: the order is ours, its shared
memory and lock files outlive a killed run, and it deletes raw shards whose index names compressed ones
(mosaicml/streaming#330, #400).
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import xxhash
from jaxtyping import Integer

from modernenc.config import Data
from modernenc.data.store import Store
from modernenc.hashing import hash_file

if TYPE_CHECKING:
    from streaming.base.format.mds import MDSReader

MANIFEST = "manifest.json"
SHARD_HASH = "xxh3_64"
VALIDATION = "validation"


class Block(NamedTuple):
    """One MDS sample: text tokens of consecutive documents."""

    tokens: Integer[np.ndarray, " tokens"]
    ends: Integer[np.ndarray, " docs"]
    continues: bool


def columns(dtype: str) -> dict[str, str]:
    """MDS columns of a block whose tokens are of `dtype`, uint16 or uint32."""
    return {"tokens": f"ndarray:{dtype}", "ends": "ndarray:uint32", "continues": "uint8"}


class Entry(NamedTuple):
    """What an index says of one shard."""

    name: str
    bytes: int
    digest: str
    samples: int


class Shards:
    """The blocks of one folder, by shard and index.

    Every local file that the index names must be there with its size: FileNotFoundError or ValueError otherwise; a remote one
    is fetched when it is first read. Then its hash is checked too; ValueError names one that does not match.
    """

    def __init__(self, store: Store, folder: str) -> None:
        self.store = store
        self.folder = folder
        content = store.file(f"{folder}/index.json").read_bytes()
        self.digest = xxhash.xxh3_64_hexdigest(content)
        """Hash of the index, which holds those of the shards."""
        self._index: dict[str, Any] = json.loads(content)
        self._entries = [self._entry(entry) for entry in self._index["shards"]]
        self.sizes = [entry.samples for entry in self._entries]
        """Blocks of each shard."""
        self._readers: dict[int, MDSReader] = {}
        self._first = [0, *accumulate(self.sizes)]

    def __len__(self) -> int:
        """Number of blocks."""
        return self._first[-1]

    def read(self, shard: int, index: int) -> Block:
        """The block at `index` of `shard`."""
        if shard not in self._readers:
            self.check(shard)
            self._readers[shard] = self._open(shard)
        sample: dict[str, Any] = self._readers[shard][index]
        return Block(sample["tokens"], sample["ends"], bool(sample["continues"]))

    def check(self, shard: int) -> None:
        """Compare the shard's hash with the index, fetching it where it is remote; ValueError when they differ."""
        entry = self._entries[shard]
        path = self.store.shard(*entry[:3])
        if (found := hash_file(path)) == entry.digest:
            return
        if self.store.cache is None:
            raise ValueError(
                f"{path} is corrupt: {SHARD_HASH} {found}, expected {entry.digest}; "
                "restore it from a copy or prepare the data again"
            )
        self.store.replace(*entry[:3])  # which compares the new copy itself

    def prefetch(self, shard: int) -> None:
        """Say that a shard will be read soon."""
        if shard not in self._readers:
            self.store.prefetch(*self._entries[shard][:3])

    def _entry(self, entry: dict[str, Any]) -> Entry:
        index = self.store.where(f"{self.folder}/index.json")
        if entry["zip_data"] is not None:
            raise ValueError(
                f"{index} names compressed shards ({entry['zip_data']['basename']}), but blocks are "
                "read raw; decompress them and set compression and zip_data to null in the index"
            )
        raw = entry["raw_data"]
        name = f"{self.folder}/{raw['basename']}"
        if SHARD_HASH not in raw["hashes"]:
            raise ValueError(f"{index} has no {SHARD_HASH} for {raw['basename']}; prepare the data again")
        if self.store.cache is None:
            path = self.store.path(name)
            if not path.is_file():
                raise FileNotFoundError(f"{path} is named by {index} but absent; restore it")
            if (size := path.stat().st_size) != raw["bytes"]:
                raise ValueError(f"{path} has {size} bytes, expected {raw['bytes']}; restore it from a copy")
        return Entry(name, raw["bytes"], raw["hashes"][SHARD_HASH], entry["samples"])

    def _open(self, shard: int) -> "MDSReader":
        from streaming.base.format import reader_from_json  # 4 s to import: `plan` and a config error do without

        folder = self.store.path(self.folder)
        reader = cast("MDSReader", reader_from_json(str(folder), "", self._index["shards"][shard]))
        reader.validate(allow_unsafe_types=False)
        return reader


@dataclass(frozen=True)
class Roles:
    """Ids of the special tokens by what they are for."""

    cls: int
    sep: int
    pad: int
    mask: int
    unk: int


class Corpus:
    """A folder that data_prep wrote, opened for reading.

    Raises FileNotFoundError when there is no manifest: a folder without one is not whole. `hint` says what to do about it.
    """

    def __init__(self, store: Store, hint: str = "") -> None:
        self.store = store
        try:
            self._manifest = store.file(MANIFEST).read_bytes()
        except FileNotFoundError:
            raise FileNotFoundError(f"data.root={store}: no {MANIFEST} there; {hint}") from None
        self.manifest: dict[str, Any] = json.loads(self._manifest)
        self.block_tokens: int = self.manifest["block_tokens"]
        self.vocab_size: int = self.manifest["tokenizer"]["vocab_size"]
        self.roles = Roles(**self.manifest["tokenizer"]["roles"])
        self._opened: dict[str, Shards] = {}

    @classmethod
    def of(cls, data: Data) -> "Corpus":
        """The corpus of a run."""
        return cls(Store(data.root, data.cache, data.timeout_s), data.hint)

    @property
    def sources(self) -> dict[str, dict[str, Any]]:
        """What the manifest says of each source."""
        return self.manifest["sources"]

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer that made the ids."""
        return self.store.file("tokenizer.json")

    @cached_property
    def ordinary_ids(self) -> Integer[np.ndarray, " ids"]:
        """Ids that stand for text: all but the special ones."""
        return np.setdiff1d(np.arange(self.vocab_size), self.manifest["tokenizer"]["special_ids"])

    def fingerprint(self, mixes: Iterable[dict[str, float]]) -> str:
        """Hash of the manifest and of the index of every slice in the mixes: it changes with any token of theirs."""
        digest = xxhash.xxh3_64(self._manifest)
        for folder in sorted({path for mix in mixes for path in self.slices(mix)}):
            digest.update(self.open(folder).digest.encode())
        return digest.hexdigest()

    def slices(self, mix: dict[str, float], key: str = "mix") -> dict[str, float]:
        """Share of each slice, summing to 1: a source's share goes to its slices in proportion to their tokens.

        Raises ValueError for a source or slice that the corpus lacks; `key` names the place of the mix.
        """
        shares: dict[str, float] = {}
        total = sum(mix.values())
        for name, share in mix.items():
            if share == 0:
                continue
            source, _, wanted = name.partition("/")
            known = self.sources.get(source, {"slices": {}})["slices"]
            chosen = {n: entry["tokens"] for n, entry in known.items() if wanted in ("", n)}
            if not chosen:
                have = ", ".join(self.sources) if not known else ", ".join(f"{source}/{n}" for n in known)
                raise ValueError(f"{key}.{name}: {self.store} has no such source; it has {have}")
            for slice_name, tokens in chosen.items():
                path = f"{source}/{slice_name}"
                shares[path] = shares.get(path, 0.0) + share / total * tokens / sum(chosen.values())
        return shares

    def counts(self, path: str) -> dict[str, int]:
        """What the manifest says of `source/slice-NNN`."""
        source, _, name = path.partition("/")
        return self.sources[source]["slices"][name]

    def open(self, folder: str) -> Shards:
        """The blocks of `source/slice-NNN` or `source/validation`."""
        if folder not in self._opened:
            self._opened[folder] = Shards(self.store, folder)
        return self._opened[folder]
