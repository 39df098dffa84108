"""Compare data paths on one core: tokens per second from shards to masked batches.

Ours streams blocks, cuts documents, packs and masks. A greedy packer, as in ModernBERT's repository, fills a batch of rows
from a buffer of documents, each into the row where it leaves the least room, and masks the batch. A memory map of all tokens,
as in nanoGPT, gives masked rows from random positions without regard to documents. MosaicML streaming's loader, where it is
installed, gives blocks as they are.
"""

import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from modernenc.bench import output
from modernenc.bench.batches import load_steps
from modernenc.bench.interleave import StepWork, Turn, run_interleaved
from modernenc.bench.settings import Bench, make_run
from modernenc.config import Run
from modernenc.data.blocks import Block, Corpus

TURN_TOKENS = 4_000_000
BUFFER_ROWS = 512


def measure(bench: Bench, folder: Path) -> None:
    """Measure at every length, and write a table and JSON."""
    table = output.new_table("tokens a second on one core, in millions, medians", ("", "M tokens/s", "ours / it", "from", "to"))
    readers = {"modernenc": _ours, "greedy packer": _greedy, "memory map": _memory_map, "streaming's loader": _streaming}
    if not find_spec("streaming"):
        del readers["streaming's loader"]
        Console().print("streaming's loader is left out: pip install 'modernenc[streaming]'")
    written = []
    for length in bench.lengths:
        run = make_run(bench, bench.backbones[0], length)
        run.data.buffer_rows = BUFFER_ROWS
        phase = run.phases["decay"]
        phase.batch_rows = max(1, 16_384 // length)
        phase.tokens = 2 * (bench.repetitions + 1) * TURN_TOKENS
        results = run_interleaved({name: partial(read, reader, run) for name, reader in readers.items()}, bench.repetitions)
        written.append({"length": length, "results": [asdict(result) for result in results]})
        for result in results:
            ratios = results[0].times_faster(result)
            spread = [f"{ratio:.2f}" for ratio in (ratios[len(ratios) // 2], ratios[0], ratios[-1])]
            table.add_row(f"{length:,} {result.name}", f"{result.speed / 1e6:.1f}", *spread)
        table.add_section()
    output.write(folder, "data", table, written)
    Console().print(table)


def read(reader: Callable[[Run], Iterator[int]], run: Run) -> Turn:
    """Prepare a turn that takes batches of `TURN_TOKENS` tokens from a reader, which yields the tokens of each batch."""
    torch.set_num_threads(1)
    tokens = reader(run)

    def turn(number: int) -> StepWork:
        seen = 0
        while seen < TURN_TOKENS:
            seen += next(tokens)
        return StepWork(seen, 0.0)

    return turn


def _ours(run: Run) -> Iterator[int]:
    return (step.tokens for step in load_steps(run))


def _greedy(run: Run) -> Iterator[int]:
    phase, corpus = run.phases["decay"], Corpus.of(run.data)
    rng, documents = np.random.default_rng(0), _documents(run, corpus)
    buffer: deque[np.ndarray] = deque()
    while True:
        rows: list[list[np.ndarray]] = [[] for _ in range(phase.batch_rows)]
        room = np.full(phase.batch_rows, phase.seq_len)
        unplaced: list[np.ndarray] = []
        while len(buffer) < 5 * phase.batch_rows:
            buffer.append(next(documents))
        while buffer and room.max() > 2:
            document = buffer.popleft()[: phase.seq_len]
            fits = np.where(room >= len(document), room, phase.seq_len + 1)
            best = int(fits.argmin())
            if room[best] >= len(document):
                rows[best].append(document)
                room[best] -= len(document)
            else:
                unplaced.append(document)
        buffer.extendleft(reversed(unplaced))
        ids = np.zeros((phase.batch_rows, phase.seq_len), np.int64)
        for row, documents_of_row in zip(ids, rows, strict=True):
            row[: sum(map(len, documents_of_row))] = np.concatenate([*documents_of_row, row[:0]])
        np.cumsum([len(document) for documents_of_row in rows for document in documents_of_row])  # where documents end
        _masked(ids, corpus, phase.mask_ratio, rng)
        yield int(phase.batch_rows * phase.seq_len - room.sum())


def _memory_map(run: Run) -> Iterator[int]:
    phase, corpus, rng = run.phases["decay"], Corpus.of(run.data), np.random.default_rng(0)
    with tempfile.NamedTemporaryFile() as file:
        for block in _blocks(run, corpus):
            file.write(block.tokens.astype(np.uint32).tobytes())
        file.flush()
        tokens = np.memmap(file.name, np.uint32, "r")
        while True:
            starts = rng.integers(len(tokens) - phase.seq_len, size=phase.batch_rows)
            ids = np.stack([tokens[start : start + phase.seq_len] for start in starts]).astype(np.int64)
            _masked(ids, corpus, phase.mask_ratio, rng)
            yield ids.size


def _streaming(run: Run) -> Iterator[int]:
    # An optional extra, which takes seconds to import; the other readers go without it.
    from streaming import Stream, StreamingDataset  # pyright: ignore[reportMissingImports]
    from streaming.base.util import clean_stale_shared_memory  # pyright: ignore[reportMissingImports]

    corpus = Corpus.of(run.data)
    clean_stale_shared_memory()
    with tempfile.TemporaryDirectory() as folder:  # a copy: it deletes files that it does not expect
        streams = []
        for path, proportion in corpus.slices(run.phases["decay"].mix).items():
            shutil.copytree(Path(run.data.root) / path, Path(folder) / path)
            streams.append(Stream(local=f"{folder}/{path}", proportion=proportion))
        dataset: Any = StreamingDataset(streams=streams, shuffle=True, batch_size=16, num_canonical_nodes=1)
        while True:
            for sample in dataset:
                yield len(sample["tokens"])


def _masked(ids: np.ndarray, corpus: Corpus, ratio: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs and labels of a batch, with BERT's proportions: 80 % masked, 10 % random, 10 % unchanged."""
    chosen = rng.random(ids.shape) < ratio
    labels = np.where(chosen, ids, -100)
    kind = rng.random(ids.shape)
    masked = np.where(chosen & (kind < 0.8), corpus.roles.mask, ids)
    random = chosen & (kind >= 0.8) & (kind < 0.9)
    masked[random] = corpus.ordinary_ids[rng.integers(len(corpus.ordinary_ids), size=int(random.sum()))]
    return masked, labels


def _blocks(run: Run, corpus: Corpus) -> Iterator[Block]:
    for path in corpus.slices(run.phases["decay"].mix):
        shards = corpus.open(path)
        for shard, size in enumerate(shards.sizes):
            for index in range(size):
                yield shards.read(shard, index)


def _documents(run: Run, corpus: Corpus) -> Iterator[np.ndarray]:
    """Yield documents with cls and sep, over and over."""
    while True:
        for block in _blocks(run, corpus):
            for start, end in zip([0, *block.ends[:-1].tolist()], block.ends.tolist(), strict=True):
                yield np.concatenate(([corpus.roles.cls], block.tokens[start:end], [corpus.roles.sep]))
