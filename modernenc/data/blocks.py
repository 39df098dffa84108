"""The contract with data_prep: a corpus is a folder of block shards, which is read by random access.

It contains `manifest.json`, `tokenizer.json`, and for each source the folders `<source>/slice-NNN/` and `<source>/validation/`.
One sample of a shard is a block (`mds.Block`): text tokens of consecutive documents, without special tokens.

The shards have the format of MosaicML streaming, but StreamingDataset is not used: the order of blocks is defined here, its
shared memory and lock files outlive a killed run, and it deletes raw shards whose index names compressed ones
(mosaicml/streaming#330, #400).
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from jaxtyping import Integer

from modernenc.config import Data
from modernenc.data.mds import INDEX, SHARD_HASH, TOKEN_DTYPES, Block, Shard, header, settings
from modernenc.data.store import Store
from modernenc.expected import NUMBER, parse
from modernenc.hashing import hash_file

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
VALIDATION = "validation"
REMEDY = "restore it from a copy or prepare the data again"

_INDEX = {"shards": [{"samples": NUMBER, "raw_data": {"basename": str, "bytes": range(1 << 32), "hashes": {str: str}}}]}
_COUNTS = {"blocks": NUMBER, "tokens": NUMBER}


class ShardEntry(NamedTuple):
    """One shard as the index of its folder describes it."""

    name: str
    size: int
    digest: str
    samples: int
    header: bytes
    """Settings with which it was written; see `mds.header`."""


class Shards:
    """The blocks of one folder, read by shard and index.

    Raises FileNotFoundError or ValueError when a local file that the index names is missing or has another size. A remote
    shard is fetched when it is first read. At its first read the hash of a shard is checked too; ValueError names the shard
    when it does not match.
    """

    def __init__(self, store: Store, folder: str, vocab_size: int = 1 << 32) -> None:
        self.store = store
        self.folder = folder
        self.vocab_size = vocab_size
        self.where = store.where(folder)
        """Address of the folder for messages."""
        content = store.file(f"{folder}/{INDEX}").read_bytes()
        self.digest = xxhash.xxh3_64_hexdigest(content)
        """Hash of the index, which in turn contains the hashes of the shards."""
        self._headers: dict[bytes, bytes] = {}
        index = parse(content, _INDEX, f"{self.where}/{INDEX}", REMEDY)
        self._entries = [self._check_entry(entry) for entry in index["shards"]]
        self.sizes = [entry.samples for entry in self._entries]
        """Number of blocks in each shard."""
        self._opened: dict[int, Shard] = {}

    def __len__(self) -> int:
        """Return the number of blocks in the folder."""
        return sum(self.sizes)

    def read(self, shard: int, index: int) -> Block:
        """Return the block at position `index` of shard number `shard`; ValueError names both if its content is no text."""
        if shard not in self._opened:
            self.check(shard)
            entry = self._entries[shard]
            self._opened[shard] = Shard(self.store.path(entry.name), entry.samples, entry.header)
        block = self._opened[shard][index]
        whole = len(block.ends) and len(block.tokens) and block.ends[-1] == len(block.tokens)
        if not whole or (np.diff(block.ends.astype(np.int64), prepend=0) <= 0).any() or block.tokens.max() >= self.vocab_size:
            raise ValueError(
                f"{self.store.path(self._entries[shard].name)}: block {index} holds documents without tokens, or tokens beyond "
                f"the vocabulary of {self.vocab_size}; {REMEDY}"
            )
        return block

    def documents(self) -> Iterator[Integer[np.ndarray, " tokens"]]:
        """Yield the tokens of each document, in the order of the blocks, over the boundaries of which they may go on."""
        parts: list[np.ndarray] = []
        for shard, size in enumerate(self.sizes):
            for index in range(size):
                block = self.read(shard, index)
                *whole, last = np.split(block.tokens, block.ends[:-1])
                for tokens in whole:
                    yield np.concatenate([*parts, tokens])
                    parts = []
                parts.append(last)
                if not block.continues:
                    yield np.concatenate(parts)
                    parts = []

    def check(self, shard: int) -> None:
        """Compare a shard's hash with the index, after fetching a remote one; raises ValueError when they differ."""
        entry = self._entries[shard]
        path = self.store.shard(*entry[:3])
        found = hash_file(path)
        if found == entry.digest:
            return
        if self.store.cache is None:
            raise ValueError(f"{path} is corrupt: {SHARD_HASH} {found}, expected {entry.digest}; {REMEDY}")
        self.store.replace(*entry[:3])  # a damaged copy in the cache; the new one is checked there

    def prefetch(self, shard: int) -> None:
        """Announce that a shard will be read soon, so that a remote one is downloaded in the background."""
        if shard not in self._opened:
            self.store.prefetch(*self._entries[shard][:3])

    def _check_entry(self, entry: dict[str, Any]) -> ShardEntry:
        """Check one entry of the index and, where the corpus is local, the size of its file."""
        index, raw, samples = f"{self.where}/{INDEX}", entry["raw_data"], entry["samples"]
        basename, size = raw["basename"], raw["bytes"]
        if entry.get("zip_data") is not None or entry.get("compression"):
            raise ValueError(
                f"{index} names compressed shards ({entry.get('compression')}), but blocks are read raw; decompress them and "
                "set compression and zip_data to null in the index"
            )
        written = {key: value for key, value in entry.items() if key not in ("samples", "raw_data", "zip_data")}
        head = header(written)
        if head not in self._headers:
            _check_kind(written, index)
        # All shards of a folder normally share one header: an index may have 10,000 entries.
        head = self._headers.setdefault(head, head)
        if SHARD_HASH not in raw["hashes"]:
            raise ValueError(f"{index} has no {SHARD_HASH} for {basename}; prepare the data again")
        if {"", ".."} & set(basename.split("/")):
            raise ValueError(f"{index} names {basename}, which is not in its folder; {REMEDY}")
        name = f"{self.folder}/{basename}"
        if self.store.cache is None:
            path = self.store.path(name)
            if not path.is_file():
                raise FileNotFoundError(f"{path} is named by {index} but absent; restore it")
            if (found := path.stat().st_size) != size:
                raise ValueError(f"{path} has {found} bytes, expected {size}; restore it from a copy")
        if 4 * samples > size:  # a sample takes more than the four bytes of its offset
            raise ValueError(f"{index}: {samples} samples in the {size} bytes of {basename}; {REMEDY}")
        return ShardEntry(name, size, raw["hashes"][SHARD_HASH], samples, head)


def _check_kind(written: dict[str, Any], index: str) -> None:
    """Raise ValueError when the settings of a shard are those of some other kind of sample than a block."""
    kinds = [settings(dtype, size_limit=0) for dtype in TOKEN_DTYPES]
    for key in ("format", "version", "column_names", "column_encodings", "column_sizes"):
        if all(written.get(key) != kind[key] for kind in kinds):
            raise ValueError(
                f"{index} describes shards of another program: {key} is {written.get(key)!s:.200}, expected {kinds[0][key]}; "
                "read their text with data_prep.foreign.MdsReader (pip install 'modernenc[streaming]') and prepare it anew"
            )


@dataclass(frozen=True)
class Roles:
    """Token ids of the special tokens, by their role."""

    cls: int
    sep: int
    pad: int
    mask: int
    unk: int


_MANIFEST = {
    "block_tokens": range(1, 1 << 32),
    "tokenizer": {
        "vocab_size": range(1, 1 << 32),
        "roles": {role.name: NUMBER for role in fields(Roles)},
        "special_ids": [NUMBER],
    },
    "sources": {str: {"slices": {str: _COUNTS}, VALIDATION: {**_COUNTS, "unigram_nats": float}}},
}


class Corpus:
    """A corpus that data_prep wrote, opened for reading.

    Raises FileNotFoundError when there is no manifest, since it is written last: a folder without one is unfinished. `hint`
    ends that message; it tells the user what to do.
    """

    def __init__(self, store: Store, hint: str = "") -> None:
        self.store = store
        try:
            self._manifest = store.file(MANIFEST).read_bytes()
        except FileNotFoundError:
            raise FileNotFoundError(
                f"data.root={store}: no {MANIFEST} there; if the corpus was moved, add data.root=ITS_FOLDER; else {hint}"
            ) from None
        self.manifest: dict[str, Any] = parse(self._manifest, _MANIFEST, store.where(MANIFEST), REMEDY)
        self.sources: dict[str, dict[str, Any]] = self.manifest["sources"]
        """The entry of each source in the manifest."""
        for name in [*self.sources, *(one for source in self.sources.values() for one in source["slices"])]:
            if "/" in name or name in ("", ".", ".."):
                raise ValueError(f"{store.where(MANIFEST)} names {name}, which is no folder of it; {REMEDY}")
        self.block_tokens: int = self.manifest["block_tokens"]
        self._tokenizer = self.manifest["tokenizer"]
        self.vocab_size: int = self._tokenizer["vocab_size"]
        self.roles = Roles(**{role.name: self._tokenizer["roles"][role.name] for role in fields(Roles)})
        for role, token in vars(self.roles).items():
            if token >= self.vocab_size:
                raise ValueError(f"{store.where(MANIFEST)}: {role} is token {token} of {self.vocab_size}; {REMEDY}")
        self._opened: dict[str, Shards] = {}

    @classmethod
    def of(cls, data: Data) -> "Corpus":
        """Open the corpus of a run."""
        return cls(Store(data.root, data.cache, data.timeout_s), data.hint)

    @property
    def tokenizer_file(self) -> Path:
        """Path of the tokenizer that made the token ids; raises ValueError when the file there is another one."""
        path = self.store.file(TOKENIZER)
        expected = self._tokenizer.get("sha256")
        if expected and (found := hashlib.sha256(path.read_bytes()).hexdigest()) != expected:
            raise ValueError(
                f"{self.store.where(path.name)} is not the tokenizer that made the token ids: sha256 {found}, "
                f"expected {expected}; {REMEDY}"
            )
        return path

    def small_files(self) -> list[Path]:
        """Return the paths of the manifest and the tokenizer: all of the corpus that a trained model needs."""
        return [self.store.file(MANIFEST), self.tokenizer_file]

    @cached_property
    def ordinary_ids(self) -> Integer[np.ndarray, " ids"]:
        """All token ids except those of special tokens."""
        return np.setdiff1d(np.arange(self.vocab_size), self._tokenizer["special_ids"])

    def fingerprint(self, mixes: Iterable[dict[str, float]]) -> str:
        """Return a hash of the manifest and of the index of every slice in the mixes; it changes with any of their tokens."""
        digest = xxhash.xxh3_64(self._manifest)
        for folder in sorted({path for mix in mixes for path in self.slices(mix)}):
            digest.update(self.open(folder).digest.encode())
        return digest.hexdigest()

    def slices(self, mix: dict[str, float], key: str = "mix") -> dict[str, float]:
        """Return the proportion of each slice in a mix; the proportions sum to 1.

        A mix names slices (`source/slice-NNN`) or whole sources; the weight of a source is divided among its slices by their
        numbers of tokens. Raises ValueError for a source or slice that the corpus lacks; `key` is the setting of the mix.
        """
        proportions: dict[str, float] = {}
        total = sum(mix.values())
        for name, weight in mix.items():
            if weight == 0:
                continue
            source, _, wanted = name.partition("/")
            known = self.sources.get(source, {"slices": {}})["slices"]
            chosen = {f"{source}/{n}": entry["tokens"] for n, entry in known.items() if wanted in ("", n)}
            if not chosen:
                have = ", ".join(self.sources) if not known else ", ".join(f"{source}/{n}" for n in known)
                raise ValueError(f"{key}.{name}: {self.store} has no such source; it has {have}")
            for path, tokens in chosen.items():
                proportions[path] = proportions.get(path, 0.0) + weight / total * tokens / sum(chosen.values())
        return proportions

    def counts(self, folder: str) -> dict[str, int]:
        """Return the counts of the folder `source/slice-NNN` or `source/validation` in the manifest."""
        source, _, name = folder.partition("/")
        entry = self.sources[source]
        return entry[VALIDATION] if name == VALIDATION else entry["slices"][name]

    def open(self, folder: str) -> Shards:
        """Open the folder `source/slice-NNN` or `source/validation`.

        Raises the errors of `Shards`, and ValueError when the number of blocks is not the one in the manifest.
        """
        if folder not in self._opened:
            shards, expected = Shards(self.store, folder, self.vocab_size), self.counts(folder)["blocks"]
            if len(shards) != expected:
                raise ValueError(f"{shards.where}/{INDEX} has {len(shards)} blocks, but {MANIFEST} says {expected}; {REMEDY}")
            self._opened[folder] = shards
        return self._opened[folder]


def corpus_of(data: Data) -> Corpus | None:
    """Return the corpus, or None if it is not prepared."""
    try:
        return Corpus.of(data)
    except FileNotFoundError:
        return None
