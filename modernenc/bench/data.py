"""The data path on one core: tokens a second from shards to masked batches, beside what others do.

Ours streams blocks, cuts, packs and masks. A greedy packer, as ModernBERT's repository trains with, fills a batch of rows from
a buffer of documents, each into the row where it leaves the least room, and masks the batch. A memory map of all tokens, as
nanoGPT reads, gives rows from random places, masked, without regard to documents. MosaicML streaming's loader, where it is
installed, gives blocks as they are.
"""

import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from modernenc.bench import output
from modernenc.bench.settings import Bench, the_run
from modernenc.bench.turns import Result, Turn, Work, take_turns
from modernenc.config import Run

if TYPE_CHECKING:
    from modernenc.data.blocks import Corpus

TURN_TOKENS = 4_000_000
BUFFER_ROWS = 512
OURS = "modernenc"
STREAMING = "streaming's loader"


def measure(bench: Bench, folder: Path) -> None:
    """Measure at every length, and write a table and JSON."""
    table = output.new_table("tokens a second on one core, in millions, medians", ("", "M tokens/s", "ours / it", "from", "to"))
    written = []
    paths = [name for name in PATHS if name != STREAMING or find_spec("streaming")]
    if STREAMING not in paths:
        Console().print(f"{STREAMING} is left out: pip install 'modernenc[streaming]'")
    for length in bench.lengths:
        run = the_run(bench, bench.backbones[0], length)
        run.data.buffer_rows = BUFFER_ROWS
        phase = run.phases["decay"]
        phase.batch_rows = max(1, 16_384 // length)
        phase.tokens = 2 * (bench.repetitions + 1) * TURN_TOKENS
        results = take_turns([Reader(name, run) for name in paths], bench.repetitions)
        written.append({"length": length, "results": [asdict(result) for result in results]})
        for result in results:
            _add_row(table, length, result, results[0])
        table.add_section()
    output.write(folder, "data", table, written)
    Console().print(table)


def _add_row(table: Table, length: int, result: Result, ours: Result) -> None:
    ratios = ours.times_faster(result)
    spread = [f"{ratio:.2f}" for ratio in (ratios[len(ratios) // 2], ratios[0], ratios[-1])]
    table.add_row(f"{length:,} {result.name}", f"{result.speed / 1e6:.1f}", *spread)


@dataclass
class Reader:
    """One way to get batches."""

    name: str
    run: Run

    def start(self) -> Turn:
        """Open the corpus."""
        import torch

        torch.set_num_threads(1)
        tokens = PATHS[self.name](self.run)

        def turn(number: int) -> Work:
            seen = 0
            while seen < TURN_TOKENS:
                seen += next(tokens)
            return Work(seen, 0.0)

        return turn


def _ours(run: Run) -> Iterator[int]:
    from modernenc.curriculum import Curriculum
    from modernenc.data.blocks import Corpus
    from modernenc.data.loader import Steps
    from modernenc.data.state import DataState

    for step in Steps(run, Curriculum.of(run), Corpus.of(run.data), 0, 1, DataState()):
        yield step.tokens


def _greedy(run: Run) -> Iterator[int]:
    from modernenc.data.blocks import Corpus

    phase, corpus = run.phases["decay"], Corpus.of(run.data)
    rng, documents = np.random.default_rng(0), _documents(run, corpus)
    buffer: deque[np.ndarray] = deque()
    while True:
        rows: list[list[np.ndarray]] = [[] for _ in range(phase.batch_rows)]
        room = np.full(phase.batch_rows, phase.seq_len)
        left: list[np.ndarray] = []
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
                left.append(document)
        buffer.extendleft(reversed(left))
        ids = np.zeros((phase.batch_rows, phase.seq_len), np.int64)
        for row, parts in zip(ids, rows, strict=True):
            row[: sum(map(len, parts))] = np.concatenate([*parts, row[:0]])
        np.cumsum([len(part) for parts in rows for part in parts])  # where documents end
        _masked(ids, corpus, phase.mask_ratio, rng)
        yield int(phase.batch_rows * phase.seq_len - room.sum())


def _memory_map(run: Run) -> Iterator[int]:
    from modernenc.data.blocks import Corpus

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
    from streaming import Stream, StreamingDataset  # pyright: ignore[reportMissingImports]
    from streaming.base.util import clean_stale_shared_memory  # pyright: ignore[reportMissingImports]

    from modernenc.data.blocks import Corpus

    corpus = Corpus.of(run.data)
    clean_stale_shared_memory()
    with tempfile.TemporaryDirectory() as folder:  # a copy: it deletes what it takes for left-overs
        streams = []
        for path, share in corpus.slices(run.phases["decay"].mix).items():
            shutil.copytree(Path(run.data.root) / path, Path(folder) / path)
            streams.append(Stream(local=f"{folder}/{path}", proportion=share))
        dataset: Any = StreamingDataset(streams=streams, shuffle=True, batch_size=16, num_canonical_nodes=1)
        while True:
            for sample in dataset:
                yield len(sample["tokens"])


PATHS = {OURS: _ours, "greedy packer": _greedy, "memory map": _memory_map, STREAMING: _streaming}


def _masked(ids: np.ndarray, corpus: "Corpus", ratio: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels, a batch at a time: of the chosen 80 % masked, 10 % random, as everywhere."""
    chosen = rng.random(ids.shape) < ratio
    labels = np.where(chosen, ids, -100)
    kind = rng.random(ids.shape)
    masked = np.where(chosen & (kind < 0.8), corpus.roles.mask, ids)
    random = chosen & (kind >= 0.8) & (kind < 0.9)
    masked[random] = corpus.ordinary_ids[rng.integers(len(corpus.ordinary_ids), size=int(random.sum()))]
    return masked, labels


def _blocks(run: Run, corpus: "Corpus") -> Iterator[Any]:
    for path in corpus.slices(run.phases["decay"].mix):
        shards = corpus.open(path)
        for shard, size in enumerate(shards.sizes):
            for index in range(size):
                yield shards.read(shard, index)


def _documents(run: Run, corpus: "Corpus") -> Iterator[np.ndarray]:
    """Documents with cls and sep, over and over."""
    while True:
        for block in _blocks(run, corpus):
            for start, end in zip([0, *block.ends[:-1].tolist()], block.ends.tolist(), strict=True):
                yield np.concatenate(([corpus.roles.cls], block.tokens[start:end], [corpus.roles.sep]))
