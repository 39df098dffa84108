"""Compare inference with transformers', as in ModernBERT's table of efficiency (Warner et al. 2024, table 2).

Documents of 512 or 8,192 tokens, or of lengths normally distributed around half of that: how many fit into memory at once,
and the tokens per second to their hidden states. Ours gets them packed, transformers' (sdpa) padded. The number that fits is
extrapolated from the peak memory of two batches.
"""

from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch

from modernenc.bench.interleave import Result, available_bytes, run_interleaved
from modernenc.bench.ours import our_encoder
from modernenc.bench.output import SPEEDS, Output
from modernenc.bench.peers import check_peer, peer_encoder
from modernenc.bench.settings import Bench, make_run
from modernenc.config import Run

LENGTHS = (512, 8_192)
KINDS = ("fixed", "variable")
RUNS = 10
ENCODERS = {"modernenc": our_encoder, "HF padded": peer_encoder}


def measure(bench: Bench, folder: Path) -> Output:
    """Measure every backbone on documents of every length and kind."""
    output = Output(folder, "inference", f"hidden states, medians of {RUNS} runs", *SPEEDS, "fit")
    for backbone, length, kind in product(bench.backbones, LENGTHS, KINDS):
        run = make_run(bench, backbone, length)
        check_peer(backbone, run)
        documents = max(4, bench.inference_tokens // length)
        lengths = lengths_of(kind, length, documents)
        results = run_interleaved({name: partial(encoder, run, lengths) for name, encoder in ENCODERS.items()}, RUNS)
        fit = {result.name: estimate_fit(result, run, lengths) for result in results}
        heading = f"{backbone}, {documents:,} x {length:,} {kind}"
        case = {"backbone": backbone, "length": length, "kind": kind, "documents": documents, "fit": list(fit.values())}
        output.add_speeds(heading, results, lambda result, fit=fit: f"{fit[result.name]:,}", **case)
    return output


def lengths_of(kind: str, length: int, documents: int) -> list[int]:
    """Return the tokens of each document."""
    if kind == "fixed":
        return [length] * documents
    drawn = np.random.default_rng(0).normal(length / 2, length / 8, documents)
    return drawn.round().clip(1, length).astype(int).tolist()


def estimate_fit(result: Result, run: Run, lengths: list[int]) -> int:
    """Return how many documents fit into memory at once, assuming that the peak grows linearly with their number."""
    few = lengths[: len(lengths) // 4]
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else available_bytes()
    (fewer,) = run_interleaved({result.name: partial(ENCODERS[result.name], run, few)}, 1)
    if result.failure or fewer.failure:
        return 0
    each = (result.peak_bytes - fewer.peak_bytes) / (len(lengths) - len(few))
    return int((free - fewer.peak_bytes) / max(each, 1)) + len(few)
