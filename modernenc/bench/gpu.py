"""Measure a GPU cell by cell, most valuable first: `python -m modernenc.bench gpu`, made for a GPU that is there for minutes.

Each cell has a process and a time limit of its own. When it ends it adds a row to gpu.csv, with the reason if it failed; those
of one call are in gpu.json and, in short, in gpu.txt. A cell that no longer fits into `gpu.seconds` is not started. In order:
products and copies of the card alone; a compiled step, also with the window kernel and a residual stream in bf16, beside
transformers' compiled model, on full rows and padded; a whole run; attention with a window; transformers' model on full rows
with logits at the predicted tokens only; steps of other backbones; optimizers; cross-entropy by chunk size; eager steps; the
tests that need a GPU. Each step is profiled once after it was timed, and its largest kernels are in a file of their own.
Without a GPU nothing is compiled or profiled.
"""

import csv
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import torch

from modernenc.bench.interleave import Candidate, Failure, Metrics, OwnProcess, peak_bytes, time_candidate
from modernenc.bench.kernels import copies, cross_entropy, matrix_products, optimizer_update, time_window
from modernenc.bench.loop import run_settings, time_run
from modernenc.bench.output import Output
from modernenc.bench.peers import peer_step
from modernenc.bench.profile import NOT_RUN, time_step
from modernenc.bench.settings import Bench, make_run

TESTS_S = 220
"""Seconds for the tests; then they are ended."""
CHUNKS = (1_024, 4_096, 8_192, 16_384)
COLUMNS = (
    "cell", "ms", "ms_from", "ms_to", "tokens_per_s", "tflops", "of_products", "gb_per_s", "forward_ms", "first_s", "peak_gb",
    "save_s", "between_ms", "kernels", "busy", "graphs", "recompiled", "plan_gb", "passed", "took_s", "device", "torch",
    "failure",
)  # fmt: skip
SHOWN = {"ms": "ms", "tokens_per_s": "tokens/s", "of_products": "of peak", "peak_gb": "GB", "busy": "busy"}
"""Columns of the table that is printed, by their names in gpu.csv."""


class GpuCell(NamedTuple):
    """A measurement to take in a process of its own."""

    name: str
    limit_s: float
    measure: Callable[[], Metrics]


def measure(bench: Bench, folder: Path) -> Output:
    """Measure cell by cell while there is time, append the rows to gpu.csv, and return those of this call as a table."""
    folder.mkdir(parents=True, exist_ok=True)
    output = Output(folder, "gpu", "a GPU, cell by cell", *SHOWN.values())
    ends, products = time.monotonic() + bench.gpu.seconds, None
    with tempfile.TemporaryDirectory() as scratch:  # of this process, since a cell's may be killed
        for cell in choose(list(cells(bench, folder, scratch)), bench.gpu.cells):
            started = time.monotonic()
            left = ends - started
            row: Metrics = {"failure": f"not started: {max(0, left):.0f} of {cell.limit_s:g} s are left"}
            if left >= cell.limit_s:
                row = run_in_process(cell)
            products = row.get("tflops") if cell.name == "products" else products
            if products and "tflops" in row:
                row["of_products"] = row["tflops"] / products
            row = {"cell": cell.name, **row, "took_s": time.monotonic() - started}
            _append(folder / "gpu.csv", row)
            output.table.add_row(cell.name, *(_short(row, name) for name in SHOWN))
            output.add(**row)
    return output


def run_in_process(cell: GpuCell) -> Metrics:
    """Return a cell's metrics with the peak memory, the device and torch's version, or the reason for its failure."""
    with OwnProcess() as process:
        try:
            metrics = process.call(cell.measure, limit_s=cell.limit_s)
            name = process.call(torch.cuda.get_device_name) if torch.cuda.is_available() else "cpu"
            return {**metrics, "peak_gb": process.call(peak_bytes) / 1e9, "device": name, "torch": torch.__version__}
        except Failure as failure:
            return {"failure": str(failure)}


def choose(cells: list[GpuCell], prefixes: list[str]) -> list[GpuCell]:
    """Return the cells whose names start with one of the prefixes, or all without any; ValueError for an unused prefix."""
    for prefix in prefixes:
        if not any(cell.name.startswith(prefix) for cell in cells):
            raise ValueError(f"gpu.cells={prefix} is unknown; available: {', '.join(cell.name for cell in cells)}")
    return [cell for cell in cells if not prefixes or cell.name.startswith(tuple(prefixes))]


def _append(path: Path, row: Metrics) -> None:
    row = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
    with path.open("a", newline="") as file:
        writer: csv.DictWriter[str] = csv.DictWriter(file, COLUMNS)
        if not file.tell():
            writer.writeheader()
        writer.writerow(row)
    print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)


def _short(row: Metrics, name: str) -> str:
    """Return a figure of a row with three digits, or why there is none."""
    why = "not started" if "not started" in row.get("failure", "") else "failed"
    value = row.get(name, why if name == "ms" and "failure" in row else "")
    if not isinstance(value, float):
        return value
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def run_tests() -> Metrics:
    """Run the tests that need a GPU, where there are one and the repository's tests; return how many passed."""
    tests = Path(__file__).parents[2] / "tests"
    if not torch.cuda.is_available() or not tests.is_dir():
        return {"passed": NOT_RUN}
    return run_pytest(["-m", "gpu", str(tests)], tests.parent, TESTS_S)


def run_pytest(arguments: list[str], folder: Path, limit_s: float) -> Metrics:
    """Return pytest's last line, and the tests that failed by then if it is ended before its own end."""
    command = [sys.executable, "-m", "pytest", "-v", "--tb=line", "-p", "no:cacheprovider", *arguments]
    with tempfile.TemporaryFile("w+") as output:
        try:
            subprocess.run(command, cwd=folder, stdout=output, check=False, timeout=limit_s)
            late = ""
        except subprocess.TimeoutExpired:
            late = f"ended after {limit_s:g} s, in "
        output.seek(0)
        lines = output.read().strip().splitlines() or [""]
    failed = [line for line in lines if " FAILED " in line or line.startswith("ERROR")]
    return {"passed": late + lines[-1], **({"failure": "; ".join(failed)} if failed else {})}


def cells(bench: Bench, folder: Path, scratch: str) -> Iterator[GpuCell]:
    """Yield every cell in order; the limits leave time for compilation."""
    gpu, short, long = bench.gpu, *bench.gpu.lengths
    bench = replace(bench, step_tokens=gpu.step_tokens, micro_batch_tokens=gpu.micro_batch_tokens, repetitions=gpu.repetitions)
    make = partial(make_run, bench)

    def cell(name: str, limit_s: float, candidate: Candidate, calls: int = 1, bytes_moved: int = 0) -> GpuCell:
        return GpuCell(name, limit_s, partial(time_candidate, candidate, gpu.repetitions, calls, bytes_moved))

    def step(name: str, backbone: str, length: int, changes: dict[str, Any] | None = None, limit_s: float = 120) -> GpuCell:
        report = folder / f"kernels {name}.txt".replace(" ", "_")
        return GpuCell(name, limit_s, partial(time_step, make(backbone, length, changes=changes), gpu.repetitions, report))

    base, name = make(gpu.backbone, short), f"{gpu.backbone} {short}"
    yield cell("products", 40, partial(matrix_products, gpu.matrix_size), calls=64)
    yield cell("copies", 40, partial(copies, gpu.matrix_size), calls=256, bytes_moved=8 * gpu.matrix_size**2)  # fp32, twice
    yield step(f"step {name}", gpu.backbone, short)
    window, residual = {"trainer.window_kernel": True}, {"backbone.residual_in_fp32": False}
    yield step(f"step {name} +window", gpu.backbone, short, window)
    yield step(f"step {name} +window +bf16", gpu.backbone, short, {**window, **residual})
    micro_batch = max(short, gpu.micro_batch_tokens // 2)  # transformers computes all logits
    halved = make(gpu.backbone, short, changes={"trainer.micro_batch_tokens": micro_batch})
    for batching in ("rows", "padded"):
        yield cell(f"{batching} {name}", 150, partial(peer_step, batching, halved))
    settings = run_settings(gpu.run_steps * base.phases["decay"].batch_rows * short, short, scratch)
    whole = make(gpu.backbone, short, changes=settings)
    yield GpuCell(f"run {name}", 150, partial(time_run, whole, gpu.run_steps))
    for length in gpu.lengths:
        for backend in ("varlen", "window", "FA3", "flex", "tiled"):
            yield GpuCell(f"window {backend} {length}", 40, partial(time_window, backend, base, length, gpu.repetitions))
    yield cell(f"sparse {name}", 150, partial(peer_step, "rows", halved, sparse=True))
    ettin = hydra.compose("train", ["+recipe=ettin", "ettin=17m"]).backbone
    sizes = {f"backbone.{key}": ettin[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")}
    sizes["backbone.num_hidden_layers"] = bench.num_hidden_layers or ettin["num_hidden_layers"]
    yield step(f"other ettin_17m {short}", gpu.backbone, short, sizes)
    for backbone, length in {gpu.backbone: long, **gpu.others}.items():
        yield step(f"other {backbone} {length}", backbone, length)
    for optimizer in ("adamw", "stable_adamw", "muon"):
        yield cell(f"optimizer {optimizer}", 40, partial(optimizer_update, make(gpu.backbone, short, optimizer)))
    for rows in CHUNKS:
        yield cell(f"chunk {rows}", 40, partial(cross_entropy, base, rows))
    for peer in ("liger", "cce"):
        yield cell(f"cross-entropy {peer}", 40, partial(cross_entropy, base, peer=peer))
    for backbone, length in {gpu.backbone: short, **gpu.others}.items():
        yield step(f"eager {backbone} {length}", backbone, length, {"trainer.compile": False}, limit_s=60)
    yield cell(
        f"eager rows {name}", 60, partial(peer_step, "rows", replace(halved, trainer=replace(halved.trainer, compile=False)))
    )
    yield GpuCell("tests", TESTS_S + 20, run_tests)
