"""Measure the data path on one core: tokens per second from shards to masked batches.

Ours streams blocks, cuts documents, packs and masks. Where MosaicML streaming is installed, its loader, which gives blocks as
they are, takes turns with it.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from modernenc.bench.interleave import StepWork, Turn, run_interleaved
from modernenc.bench.ours import load_steps
from modernenc.bench.output import SPEEDS, Output
from modernenc.bench.settings import Bench, make_run
from modernenc.config import Run
from modernenc.data.blocks import Corpus

TURN_TOKENS, STEP_TOKENS, BUFFER_ROWS = 4_000_000, 16_384, 512


def measure(bench: Bench, folder: Path) -> Output:
    """Measure at every length."""
    output = Output(folder, "data", "tokens a second on one core", *SPEEDS)
    readers = {"modernenc": _read_steps, "streaming's loader": _read_blocks}
    if not find_spec("streaming"):
        del readers["streaming's loader"]
        print("streaming's loader is left out: pip install 'modernenc[streaming]'")
    for length in bench.lengths:
        tokens, rows = 2 * (bench.repetitions + 1) * TURN_TOKENS, max(1, STEP_TOKENS // length)
        sizes = {"phases.decay.tokens": tokens, "phases.decay.batch_rows": rows, "data.buffer_rows": BUFFER_ROWS}
        run = make_run(bench, bench.backbones[0], length, changes=sizes)
        results = run_interleaved({name: partial(read, reader, run) for name, reader in readers.items()}, bench.repetitions)
        output.add_speeds(f"{length:,}", results, length=length)
    return output


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


def _read_steps(run: Run) -> Iterator[int]:
    return (step.tokens for step in load_steps(run))


def _read_blocks(run: Run) -> Iterator[int]:
    # An optional extra, which takes seconds to import; the other readers go without it.
    from streaming import Stream, StreamingDataset  # pyright: ignore[reportMissingImports]
    from streaming.base.util import clean_stale_shared_memory  # pyright: ignore[reportMissingImports]

    clean_stale_shared_memory()
    with tempfile.TemporaryDirectory() as folder:  # a copy: it deletes files that it does not expect
        streams = []
        for path, proportion in Corpus.of(run.data).slices(run.phases["decay"].mix).items():
            shutil.copytree(Path(run.data.root) / path, Path(folder) / path)
            streams.append(Stream(local=f"{folder}/{path}", proportion=proportion))
        dataset: Any = StreamingDataset(streams=streams, shuffle=True, batch_size=16, num_canonical_nodes=1)
        while True:
            for sample in dataset:
                yield len(sample["tokens"])
