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


class Shards:
    """The blocks of one folder, by shard and index.

    Every file that the index names must be there with its size: FileNotFoundError or ValueError otherwise. A shard's hash is
    checked when it is first read; ValueError names one that does not match.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "index.json"
        if not index.is_file():
            raise FileNotFoundError(f"{index} is missing; prepare the data again or restore it")
        self._readers: list[MDSReader] = []
        for entry in json.loads(index.read_text())["shards"]:
            self._readers.append(self._open(entry))
        self.sizes = [reader.samples for reader in self._readers]
        """Blocks of each shard."""
        self._checked = [False] * len(self._readers)
        self._first = [0, *accumulate(self.sizes)]

    def __len__(self) -> int:
        """Number of blocks."""
        return self._first[-1]

    def read(self, shard: int, index: int) -> Block:
        """The block at `index` of `shard`."""
        if not self._checked[shard]:
            self.check(shard)
        sample: dict[str, Any] = self._readers[shard][index]
        return Block(sample["tokens"], sample["ends"], bool(sample["continues"]))

    def check(self, shard: int) -> None:
        """Compare the shard's hash with the index; ValueError when they differ or when the index has none."""
        reader = self._readers[shard]
        path = self.folder / reader.raw_data.basename
        expected = reader.raw_data.hashes.get(SHARD_HASH)
        if expected is None:
            raise ValueError(f"{self.folder / 'index.json'} has no {SHARD_HASH} for {path.name}; prepare the data again")
        if (found := hash_file(path)) != expected:
            raise ValueError(
                f"{path} is corrupt: {SHARD_HASH} {found}, expected {expected}; "
                "restore it from a copy or prepare the data again"
            )
        self._checked[shard] = True

    def _open(self, entry: dict[str, Any]) -> "MDSReader":
        from streaming.base.format import reader_from_json  # 4 s to import: `plan` and a config error do without

        if entry["zip_data"] is not None:
            raise ValueError(
                f"{self.folder / 'index.json'} names compressed shards ({entry['zip_data']['basename']}), but blocks are "
                "read raw; decompress them and set compression and zip_data to null in the index"
            )
        path = self.folder / entry["raw_data"]["basename"]
        if not path.is_file():
            raise FileNotFoundError(f"{path} is named by {self.folder / 'index.json'} but absent; restore it")
        size = path.stat().st_size
        if size != entry["raw_data"]["bytes"]:
            raise ValueError(f"{path} has {size} bytes, expected {entry['raw_data']['bytes']}; restore it from a copy")
        reader = cast("MDSReader", reader_from_json(str(self.folder), "", entry))
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

    def __init__(self, root: Path, hint: str) -> None:
        self.root = root
        path = root / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"data.root={root}: no {MANIFEST} there; {hint}")
        self.manifest: dict[str, Any] = json.loads(path.read_text())
        self.block_tokens: int = self.manifest["block_tokens"]
        self.vocab_size: int = self.manifest["tokenizer"]["vocab_size"]
        self.roles = Roles(**self.manifest["tokenizer"]["roles"])
        self._opened: dict[str, Shards] = {}

    @property
    def sources(self) -> dict[str, dict[str, Any]]:
        """What the manifest says of each source."""
        return self.manifest["sources"]

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer that made the ids."""
        return self.root / "tokenizer.json"

    @cached_property
    def ordinary_ids(self) -> Integer[np.ndarray, " ids"]:
        """Ids that stand for text: all but the special ones."""
        return np.setdiff1d(np.arange(self.vocab_size), self.manifest["tokenizer"]["special_ids"])

    def fingerprint(self, mixes: Iterable[dict[str, float]]) -> str:
        """Hash of the manifest and of the index of every slice in the mixes: it changes with any token of theirs."""
        digest = xxhash.xxh3_64((self.root / MANIFEST).read_bytes())
        for folder in sorted({path for mix in mixes for path in self.slices(mix)}):
            digest.update((self.root / folder / "index.json").read_bytes())
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
                raise ValueError(f"{key}.{name}: {self.root} has no such source; it has {have}")
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
            self._opened[folder] = Shards(self.root / folder)
        return self._opened[folder]
