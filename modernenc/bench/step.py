"""Compare a training step with transformers': forward, backward and AdamW, on the same documents.

Ours packs documents without padding and computes logits at the predicted tokens. `AutoModelForMaskedLM` (sdpa) gets the
documents as its users batch them: padded to the longest of a batch, or as full rows, which ignore where documents end. Each
candidate has a process of its own, as a training script would.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from modernenc.bench import output
from modernenc.bench.interleave import Candidate, Result, run_interleaved
from modernenc.bench.kernels import matrix_products
from modernenc.bench.ours import our_step
from modernenc.bench.peers import check_peer, peer_step
from modernenc.bench.settings import PEERS, Bench, make_run


def measure(bench: Bench, folder: Path) -> None:
    """Measure every backbone at every length with each peer, and write a table and JSON."""
    table = output.new_table("real tokens a second", ("", "tokens/s", "ours / it", "from-to", "of peak", "GB"))
    written = []
    for backbone in bench.backbones:
        for length in bench.lengths:
            run = make_run(bench, backbone, length)
            if bench.peers:
                check_peer(backbone, run)
            for peer in bench.peers or [None]:  # one at a time: two may need more memory than there is
                candidates: dict[str, Candidate] = {
                    "matrix products": partial(matrix_products, bench.precision, size=4_096, products=4),
                    "modernenc": partial(our_step, run),
                }
                if peer:
                    candidates[peer] = partial(peer_step, peer, run)
                peak, ours, *theirs = run_interleaved(candidates, bench.repetitions)
                table.add_row(f"{backbone} {length:,}")
                for result in (ours, *theirs):
                    _add_row(table, result, ours, peak)
                case = {"peak": asdict(peak), "ours": asdict(ours), "peer": asdict(theirs[0]) if peer else None}
                written.append({"backbone": backbone, "length": length, **case})
                output.write(folder, "step", table, written)
    Console().print(table)


def _add_row(table: Table, result: Result, ours: Result, peak: Result) -> None:
    name = PEERS.get(result.name, result.name)
    if not output.failed(table, name, result, ours):
        of_peak, gb = f"{result.flops / peak.flops:.0%}", f"{result.peak_bytes / 1e9:.1f}"
        table.add_row(f"  {name}", f"{result.speed:,.0f}", *output.spread(ours.times_faster(result)), of_peak, gb)
