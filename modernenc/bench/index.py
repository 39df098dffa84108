"""Time to the first batch of a corpus of 2T tokens: `python -m modernenc.bench.index FOLDER`.

61 million blocks of 32,768 tokens in 60,000 shards, as the data of the `base` recipe would be. The shards are all one file
under many names; the order, the hashes, the buffers and the packing are real. Each of eight processes does what a rank of one
node does: read the index, look at every shard, fill its lanes' first buffers, make the first step; then again from a state in
the midst of the phase.
"""

import argparse
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from modernenc.bench.turns import peak_bytes
from modernenc.config import Data, Phase, Run, Trainer

BLOCKS_PER_SHARD, SHARDS, BLOCK_TOKENS, RANKS, LANES = 1_024, 60_000, 32_768, 8, 64


def main() -> None:
    """Write the corpus, then measure."""
    parser = argparse.ArgumentParser(prog="python -m modernenc.bench.index", description=__doc__)
    parser.add_argument("folder", type=Path, help="where to write 70 MB and 60,000 links")
    folder = parser.parse_args().folder
    if not (folder / "manifest.json").exists():
        write(folder)
    context = multiprocessing.get_context("spawn")
    for name, share in (("from the start", 0.0), ("from 50 % of the phase", 0.5), ("from 99 % of the phase", 0.99)):
        started = time.perf_counter()
        with context.Pool(RANKS) as pool:
            answers = pool.starmap(first_batch, [(folder, rank, share) for rank in range(RANKS)], chunksize=1)
        slowest, memory = max(seconds for seconds, _ in answers), sum(bytes for _, bytes in answers)
        with_imports = time.perf_counter() - started
        print(f"{name}: first batch after {slowest:.1f} s on the slowest of {RANKS} ranks, {with_imports:.1f} s with imports; "
              f"{memory / 2**30:.1f} GiB for all", flush=True)  # fmt: skip


def first_batch(folder: Path, rank: int, share: float) -> tuple[float, int]:
    """Seconds from opening to the first step's batch, and the process's peak memory in bytes."""
    import torch

    from modernenc.curriculum import Curriculum
    from modernenc.data.blocks import Corpus
    from modernenc.data.loader import Steps
    from modernenc.data.state import DataState

    torch.set_num_threads(1)
    run = the_run(folder)
    started = time.perf_counter()
    corpus = Corpus.of(run.data)
    curriculum = Curriculum.of(run)
    state = midway(run, curriculum, share) if share else DataState()
    steps = iter(Steps(run, curriculum, corpus, rank, RANKS, state))
    assert next(steps).targets
    return time.perf_counter() - started, peak_bytes()


def the_run(folder: Path) -> Run:
    """One long phase over the one source."""
    phase = Phase(
        tokens=1_719e9, seq_len=1_024, batch_rows=4_608, lr=1e-3, lr_curve="constant", weight_decay=0, mask_ratio=0.3,
        mix={"web": 1},
    )  # fmt: skip
    return Run(
        seed=17,
        phases={"stable": phase},
        data=Data(root=str(folder), lanes=LANES, buffer_rows=512, workers=0),
        trainer=Trainer(micro_batch_tokens=98_304),
    )


def midway(run: Run, curriculum: Any, share: float) -> Any:
    """A state as a checkpoint has it, without the checksums, at a step boundary: lanes draw about evenly."""
    from modernenc.data.state import DataState, TokenCounts

    step_tokens = curriculum.at(0).step_tokens
    tokens = int(curriculum.total_tokens * share) // step_tokens * step_tokens
    blocks = tokens // BLOCK_TOKENS // LANES
    lane = {"buffer": tokens // LANES // (512 * 1024), "row": 0, "blocks": {"web/slice-000": blocks},
            "tokens": {"web/slice-000": blocks * BLOCK_TOKENS}, "checksum": ""}  # fmt: skip
    return DataState(tokens, "stable", {number: dict(lane) for number in range(LANES)}, {"stable": TokenCounts()})


def write(folder: Path) -> None:
    """One shard, its many names, the index and the manifest."""
    from modernenc.data.mds import Block, Writer

    rng = np.random.default_rng(0)
    slice_folder = folder / "web" / "slice-000"
    writer = Writer(folder / "one", "uint16", 1 << 30)
    for _ in range(BLOCKS_PER_SHARD):
        lengths = rng.lognormal(6, 1, BLOCK_TOKENS // 300).astype(int) + 1
        ends = np.unique(np.append(np.cumsum(lengths)[np.cumsum(lengths) < BLOCK_TOKENS], BLOCK_TOKENS))
        tokens = rng.integers(5, 50_000, BLOCK_TOKENS).astype(np.uint16)
        writer.write(Block(tokens, ends.astype(np.uint32), continues=False))
    writer.finish()
    shard = next((folder / "one").glob("*.mds"))
    entry = json.loads((folder / "one" / "index.json").read_text())["shards"][0]
    slice_folder.mkdir(parents=True)
    entries = []
    for number in range(SHARDS):
        name = f"shard.{number:05d}.mds"
        os.symlink(shard.resolve(), slice_folder / name)
        entries.append({**entry, "raw_data": {**entry["raw_data"], "basename": name}})
    (slice_folder / "index.json").write_text(json.dumps({"version": 2, "shards": entries}))
    blocks = SHARDS * BLOCKS_PER_SHARD
    manifest = {
        "block_tokens": BLOCK_TOKENS,
        "tokenizer": {
            "vocab_size": 50_368, "sha256": "", "special_ids": [0, 1, 2, 3, 4],
            "roles": {"cls": 0, "sep": 1, "pad": 2, "mask": 3, "unk": 4},
        },
        "sources": {
            "web": {
                "slices": {"slice-000": {"blocks": blocks, "tokens": blocks * BLOCK_TOKENS}},
                "validation": {"blocks": 0, "tokens": 0, "unigram_nats": 0},
            }
        },
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))


if __name__ == "__main__":
    main()
