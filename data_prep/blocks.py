"""Turn one bucket of documents into block shards, in one folder per source and split."""

import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, cast

import numpy as np

from data_prep import encode
from data_prep.account import save_part
from data_prep.config import CorpusConfig
from data_prep.read import FILE
from data_prep.split import held_out_draw, load_bucket, slice_of
from modernenc.data.blocks import VALIDATION
from modernenc.data.mds import Block, Writer
from modernenc.data.tokenizer import load_tokenizer


class BlockWriter:
    """Cut a stream of documents into blocks of `block_tokens` tokens, and write them as shards to a folder, emptied first.

    `counts` has the number of documents, tokens, blocks, and cuts (blocks whose last document continues in the next block).
    """

    def __init__(self, folder: Path, block_tokens: int, dtype: str, shard_mb: int) -> None:
        self.counts = Counter(documents=0, tokens=0, blocks=0, cuts=0)
        shutil.rmtree(folder, ignore_errors=True)  # of a task that was interrupted
        self._writer = Writer(folder, dtype, shard_mb << 20)
        self._tokens = np.empty(block_tokens, dtype)
        self._filled = 0
        self._ends: list[int] = []

    def add(self, tokens: np.ndarray) -> None:
        """Add one document; it may fill the rest of a block and continue in the next ones."""
        self.counts.update(documents=1, tokens=len(tokens))
        while len(tokens):
            part, tokens = np.split(tokens, [len(self._tokens) - self._filled])
            self._tokens[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            self._ends.append(self._filled)
            if self._filled == len(self._tokens):
                self._flush(continues=len(tokens) > 0)

    def close(self) -> None:
        """Write the rest as a shorter block, and the index."""
        if self._filled:
            self._flush(continues=False)
        self._writer.finish()

    def _flush(self, continues: bool) -> None:
        self._writer.write(Block(self._tokens[: self._filled], np.array(self._ends, np.uint32), continues))
        self.counts.update(blocks=1, cuts=continues)
        self._filled, self._ends = 0, []


def write_bucket(
    corpus: CorpusConfig,
    work: Path,
    thresholds: dict[str, float],
    vocab_size: int,
    data: object = None,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Turn bucket `rank` into the folders `<source>/<split>/bucket-<rank>/`.

    `thresholds` gives for each source the draw below which a document is held out. Two files go to the work folder:
    `counts/<rank>.json` has the counts of each folder, the size of each source's text, and by file the documents of which
    the tokenizer left no token; `counts/<rank>.npz` has the number of occurrences of each token in each folder.
    """
    writers: dict[str, BlockWriter] = {}
    unigrams: defaultdict[str, np.ndarray] = defaultdict(lambda: np.zeros(vocab_size, dtype=np.int64))
    texts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    emptied: defaultdict[str, Counter[str]] = defaultdict(Counter)
    tokenizer = load_tokenizer(work / "tokenizer.json")
    dtype = token_dtype(vocab_size)
    documents, _ = load_bucket(work / "buckets" / f"{rank:05d}", corpus.sources, corpus.seed)
    for document, ids in zip(documents, encode.token_ids(tokenizer, (one.text for one in documents)), strict=True):
        source = document.metadata["source"]
        if not ids:
            emptied[source][document.metadata[FILE]] += 1
            continue
        texts[source].update(encode.text_size(tokenizer, document.text))
        held_out = held_out_draw(document) < thresholds[source]
        folder = f"{source}/{VALIDATION if held_out else slice_of(document, corpus.slices, corpus.seed)}"
        if folder not in writers:
            path = Path(corpus.out) / folder / f"bucket-{rank:05d}"
            writers[folder] = BlockWriter(path, corpus.block_tokens, dtype, corpus.shard_mb)
        tokens = np.array(ids, dtype)
        writers[folder].add(tokens)
        unigrams[folder] += np.bincount(tokens, minlength=vocab_size)
    for writer in writers.values():
        writer.close()
    folders = {folder: writer.counts for folder, writer in writers.items()}
    save_part(work / "counts", rank, {"folders": folders, "texts": texts, "emptied": emptied})
    np.savez(work / "counts" / f"{rank:05d}.npz", **cast(Any, unigrams))


def token_dtype(vocab_size: int) -> str:
    """Return the smallest type that can hold every token id of a vocabulary."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"
