"""One bucket of documents -> block shards, one folder per source and split."""

import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from data_prep import encode
from data_prep.buckets import Bucket, split_of
from modernenc.data.mds import Block, Writer


class BlockWriter:
    """Cut a stream of documents into blocks of `block_tokens`, and write them as shards.

    The folder appears whole or not at all. `counts` holds documents, tokens, blocks and cuts (documents that go on in the next
    block).
    """

    def __init__(self, folder: Path, block_tokens: int, dtype: str, shard_mb: int) -> None:
        self.folder = folder
        self.block_tokens = block_tokens
        self.dtype = dtype
        self.counts: Counter[str] = Counter(documents=0, tokens=0, blocks=0, cuts=0)
        self._unfinished = folder.with_name(folder.name + ".tmp")
        for leftover in (folder, self._unfinished):
            shutil.rmtree(leftover, ignore_errors=True)
        self._writer = Writer(self._unfinished, dtype, shard_mb << 20)
        self._tokens = np.empty(block_tokens, dtype=dtype)
        self._filled = 0
        self._ends: list[int] = []

    def add(self, tokens: np.ndarray) -> None:
        """Write one document."""
        self.counts["documents"] += 1
        self.counts["tokens"] += len(tokens)
        while len(tokens):
            taken = min(len(tokens), self.block_tokens - self._filled)
            self._tokens[self._filled : self._filled + taken] = tokens[:taken]
            self._filled += taken
            self._ends.append(self._filled)
            tokens = tokens[taken:]
            if self._filled == self.block_tokens:
                self._flush(continues=len(tokens) > 0)

    def close(self) -> None:
        """Write what is left as a shorter block, and give the folder its name."""
        if self._filled:
            self._flush(continues=False)
        self._writer.finish()
        os.replace(self._unfinished, self.folder)

    def _flush(self, continues: bool) -> None:
        ends = np.array(self._ends, dtype=np.uint32)
        self._writer.write(Block(self._tokens[: self._filled], ends, continues))
        self.counts["blocks"] += 1
        self.counts["cuts"] += continues
        self._filled = 0
        self._ends = []


class WriteBlocks(PipelineStep):
    """Task r turns bucket r into `<source>/<split>/bucket-<r>/`, and leaves counts and unigrams in the work folder."""

    type = "💽 - WRITER"
    name = "Write blocks"

    def __init__(
        self,
        root: Path,
        work: Path,
        sources: list[str],
        block_tokens: int,
        vocab_size: int,
        dtype: str,
        shard_mb: int,
        slices: int,
        validation_share: float,
        seed: int,
    ) -> None:
        super().__init__()
        self.root = root
        self.work = work
        self.sources = sources
        self.block_tokens = block_tokens
        self.vocab_size = vocab_size
        self.dtype = dtype
        self.shard_mb = shard_mb
        self.slices = slices
        self.validation_share = validation_share
        self.seed = seed

    def run(self, data: Iterable[Document] | None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Write one bucket."""
        bucket = Bucket(self.work / "buckets" / f"{rank:05d}", self.sources, self.seed)
        writers: dict[str, BlockWriter] = {}
        unigrams: defaultdict[str, np.ndarray] = defaultdict(lambda: np.zeros(self.vocab_size, dtype=np.int64))
        for document, tokens in self._encoded(bucket):
            split = split_of(document, self.validation_share, self.slices, self.seed)
            folder = f"{document.metadata['source']}/{split}"
            if folder not in writers:
                writers[folder] = BlockWriter(
                    self.root / folder / f"bucket-{rank:05d}", self.block_tokens, self.dtype, self.shard_mb
                )
            writers[folder].add(tokens)
            unigrams[folder] += np.bincount(tokens, minlength=self.vocab_size)
        for writer in writers.values():
            writer.close()
        counts = {folder: writer.counts for folder, writer in writers.items()}
        (self.work / "counts").mkdir(exist_ok=True)
        np.savez(self.work / "counts" / f"{rank:05d}.npz", **unigrams)
        report = json.dumps({"folders": counts, "duplicates": bucket.duplicates})
        (self.work / "counts" / f"{rank:05d}.json").write_text(report)
        yield from data or ()

    def _encoded(self, bucket: Bucket) -> Iterator[tuple[Document, np.ndarray]]:
        tokenizer = encode.load(self.root / "tokenizer.json")
        documents: list[Document] = list(bucket)
        done = 0
        for texts in encode.batches(document.text for document in documents):
            for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                yield documents[done], np.array(encoding.ids, dtype=self.dtype)
                done += 1
