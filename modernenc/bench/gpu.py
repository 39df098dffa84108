"""Measure a GPU cell by cell, most valuable first: `python -m modernenc.bench gpu`, made for a GPU that is there for minutes.

Each cell has a process and a time limit of its own. When it ends it adds a row to gpu.csv, with the reason if it failed. A cell
that no longer fits into `gpu.seconds` is not started. In order: products and copies of the card alone; a compiled step beside
transformers' compiled model, on full rows and padded; a whole run; attention with a window; transformers' model on full rows
with logits at the predicted tokens only; steps of other backbones; optimizers; cross-entropy by chunk size; an eager step.
Without a GPU nothing is compiled.
"""

import csv
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import hydra
from omegaconf import OmegaConf

from modernenc.bench.cells import Metrics, measured, timed
from modernenc.bench.interleave import Failure, OwnProcess
from modernenc.bench.kernels import copies, cross_entropy, matrix_products, optimizer_update, timed_window
from modernenc.bench.loop import saving_run
from modernenc.bench.ours import our_step
from modernenc.bench.peers import peer_step
from modernenc.bench.settings import Bench, make_run
from modernenc.config import Run

CHUNKS = (1_024, 4_096, 8_192, 16_384)
COLUMNS = (
    "cell", "ms", "ms_from", "ms_to", "tokens_per_s", "tflops", "of_products", "gb_per_s", "forward_ms", "first_s", "peak_gb",
    "save_s", "between_ms", "took_s", "device", "torch", "failure",
)  # fmt: skip


@dataclass
class Cell:
    """A measurement to take in a process of its own."""

    name: str
    limit_s: float
    measure: Callable[[], Metrics]


def measure(bench: Bench, folder: Path) -> None:
    """Measure cell by cell while there is time, and append the rows to gpu.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    ends, products = time.monotonic() + bench.gpu.seconds, None
    with tempfile.TemporaryDirectory() as scratch:  # made here, since a cell's process may be killed
        for cell in chosen(list(cells(bench, scratch)), bench.gpu.cells):
            started = time.monotonic()
            left = ends - started
            row: Metrics = {"failure": f"not started: {max(0, left):.0f} of {cell.limit_s:g} s are left"}
            if left >= cell.limit_s:
                row = run_in_process(cell)
            products = row.get("tflops") if cell.name == "products" else products
            if products and "tflops" in row:
                row["of_products"] = row["tflops"] / products
            _append(folder / "gpu.csv", {"cell": cell.name, **row, "took_s": time.monotonic() - started})


def run_in_process(cell: Cell) -> Metrics:
    """Return a cell's metrics, or the reason for its failure."""
    with OwnProcess() as process:
        try:
            return process.call(measured, cell.measure, limit_s=cell.limit_s)
        except Failure as failure:
            return {"failure": str(failure)}


def chosen(cells: list[Cell], prefixes: list[str]) -> list[Cell]:
    """Return the cells whose names start with one of the prefixes, or all without any; ValueError for an unused prefix."""
    for prefix in prefixes:
        if not any(cell.name.startswith(prefix) for cell in cells):
            raise ValueError(f"gpu.cells={prefix} is unknown; available: {', '.join(cell.name for cell in cells)}")
    return [cell for cell in cells if not prefixes or cell.name.startswith(tuple(prefixes))]


def _append(path: Path, row: Metrics) -> None:
    row = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer: csv.DictWriter[str] = csv.DictWriter(file, COLUMNS)
        if is_new:
            writer.writeheader()
        writer.writerow(row)
    print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)


def cells(bench: Bench, scratch: str) -> Iterator[Cell]:
    """Yield every cell in order; the limits leave time for compilation."""
    gpu, short, long = bench.gpu, *bench.gpu.lengths
    bench = replace(bench, step_tokens=gpu.step_tokens, micro_batch_tokens=gpu.micro_batch_tokens, repetitions=gpu.repetitions)
    time_of = partial(partial, timed, repetitions=gpu.repetitions)
    base = _compiled(make_run(bench, gpu.backbone, short))
    name = f"{gpu.backbone} {short}"
    matrix_bytes = 4 * gpu.matrix_size**2  # fp32
    yield Cell("products", 40, time_of(partial(matrix_products, bench.precision, gpu.matrix_size), calls=64))
    yield Cell("copies", 40, time_of(partial(copies, gpu.matrix_size), calls=256, bytes_moved=2 * matrix_bytes))
    yield Cell(f"step {name}", 120, time_of(partial(our_step, base)))
    halved = deepcopy(base)  # transformers computes all logits
    halved.trainer.micro_batch_tokens = max(short, gpu.micro_batch_tokens // 2)
    for batching in ("rows", "padded"):
        yield Cell(f"{batching} {name}", 150, time_of(partial(peer_step, batching, halved)))
    yield Cell(f"run {name}", 150, partial(saving_run, deepcopy(base), gpu.run_steps, scratch))
    for length in gpu.lengths:
        for backend in ("varlen", "FA3", "flex", "tiled"):
            yield Cell(f"window {backend} {length}", 40, partial(timed_window, backend, base, length, gpu.repetitions))
    yield Cell(f"sparse {name}", 150, time_of(partial(peer_step, "rows", halved, sparse=True)))
    small = deepcopy(base)
    settings = cast(dict, OmegaConf.to_container(hydra.compose("train", ["+recipe=ettin", "ettin=17m"]).backbone))
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    small.backbone |= {key: settings[key] for key in sizes}
    small.backbone["num_hidden_layers"] = bench.num_hidden_layers or small.backbone["num_hidden_layers"]
    yield Cell(f"other ettin_17m {short}", 120, time_of(partial(our_step, small)))
    for backbone, length in {gpu.backbone: long, **gpu.others}.items():
        run = _compiled(make_run(bench, backbone, length))
        yield Cell(f"other {backbone} {length}", 120, time_of(partial(our_step, run)))
    for optimizer in ("adamw", "stable_adamw", "muon"):
        run = make_run(bench, gpu.backbone, short, optimizer)
        yield Cell(f"optimizer {optimizer}", 40, time_of(partial(optimizer_update, run)))
    for rows in CHUNKS:
        yield Cell(f"chunk {rows}", 40, time_of(partial(cross_entropy, base, rows)))
    eager = deepcopy(base)
    eager.trainer.compile = False
    yield Cell(f"eager {name}", 60, time_of(partial(our_step, eager)))


def _compiled(run: Run) -> Run:
    run.trainer.compile = True
    return run
