"""Compare a training step with transformers': forward, backward and AdamW, on the same documents.

Ours packs documents without padding and computes logits at the predicted tokens. `AutoModelForMaskedLM` (sdpa) gets the
documents as its users batch them: padded to the longest of a batch, or as full rows, which ignore where documents end. Each
candidate has a process of its own, as a training script would.
"""

from dataclasses import asdict, dataclass
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


@dataclass
class Case:
    """A backbone at one row length, with one peer or alone."""

    backbone: str
    length: int
    peak: Result
    """Matrix products interleaved with the steps, as the hardware's peak."""
    ours: Result
    peer: Result | None = None


def measure(bench: Bench, folder: Path) -> None:
    """Measure every case, and write a table and JSON."""
    cases = []
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
                cases.append(Case(backbone, length, *run_interleaved(candidates, bench.repetitions)))
            output.write(folder, "step", table_of(cases), [asdict(case) for case in cases])
    Console().print(table_of(cases))


def table_of(cases: list[Case]) -> Table:
    """Return a table with a row for each candidate of each case."""
    table = output.new_table("real tokens a second", ("", "tokens/s", "ours / it", "from-to", "of peak", "GB"))
    for case in cases:
        table.add_row(f"{case.backbone} {case.length:,}")
        for result in filter(None, (case.ours, case.peer)):
            name = PEERS.get(result.name, result.name)
            if not output.failed(table, name, result, case.ours):
                of_peak, gb = f"{result.flops / case.peak.flops:.0%}", f"{result.peak_bytes / 1e9:.1f}"
                ratios = output.spread(case.ours.times_faster(result))
                table.add_row(f"  {name}", f"{result.speed:,.0f}", *ratios, of_peak, gb)
    return table
