"""Compare a training step with transformers': forward, backward and AdamW, on the same documents.

Ours packs documents without padding and computes logits at the predicted tokens. `AutoModelForMaskedLM` (sdpa) gets the
documents as its users batch them: padded to the longest of a batch, or as full rows, which ignore where documents end. Each
candidate has a process of its own, as a training script would.
"""

from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path

from modernenc.bench.interleave import Candidate, run_interleaved
from modernenc.bench.kernels import matrix_products
from modernenc.bench.ours import our_step
from modernenc.bench.output import SPEEDS, Output
from modernenc.bench.peers import check_peer, peer_step
from modernenc.bench.settings import PEERS, Bench, make_run


def measure(bench: Bench, folder: Path) -> Output:
    """Measure every backbone at every length with each peer."""
    output = Output(folder, "step", "real tokens a second", *SPEEDS, "of peak", "GB")
    for backbone, length in product(bench.backbones, bench.lengths):
        run = make_run(bench, backbone, length)
        if bench.peers:
            check_peer(backbone, run)
        for peer in bench.peers or [""]:  # one at a time: two may need more memory than there is
            candidates: dict[str, Candidate] = {
                "matrix products": partial(matrix_products, size=4_096, products=4),
                "modernenc": partial(our_step, run),
            }
            if peer:
                candidates[PEERS[peer]] = partial(peer_step, peer, run)
            peak, *results = run_interleaved(candidates, bench.repetitions)
            output.add_speeds(
                f"{backbone} {length:,}", results,
                lambda result, peak=peak: f"{result.flops / peak.flops:.0%}", lambda result: f"{result.peak_bytes / 1e9:.1f}",
                backbone=backbone, length=length, peak=asdict(peak),
            )  # fmt: skip
    return output
