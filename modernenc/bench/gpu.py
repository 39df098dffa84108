"""What a GPU does, most valuable first: `python -m modernenc.bench gpu`, for as long as the GPU is there.

Each cell is a process of its own with a limit to its time; a row of gpu.csv is written as it ends, with the reason where there
are no figures. What no longer fits into `gpu.seconds` is not begun. In order there are: products and copies of
the card alone; a step, compiled, beside transformers' model, compiled, on full rows, on documents padded, and on full rows with
logits at the predicted tokens only; a whole run; attention with a window; steps of other backbones; optimizers alone;
cross-entropy by rows of a chunk; a step that is not compiled. Without a GPU nothing is compiled.
"""

import contextlib
import csv
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from signal import SIGKILL
from statistics import mean, median
from typing import Any, Protocol, cast

import hydra
from omegaconf import OmegaConf

from modernenc.bench.kernels import Copies, CrossEntropy, Update, Window
from modernenc.bench.loop import cost_of_saves, only, whole
from modernenc.bench.settings import Bench, the_run
from modernenc.bench.step import Ours, Theirs
from modernenc.bench.turns import MatrixProducts, Turn, limit_memory, peak_bytes
from modernenc.config import Run

CHUNKS = (1_024, 4_096, 8_192, 16_384)
SAVES = 5
"""Of a whole run."""
COLUMNS = (
    "cell", "ms", "ms_from", "ms_to", "tokens_per_s", "tflops", "of_products", "gb_per_s", "forward_ms", "first_s", "peak_gb",
    "save_s", "between_ms", "took_s", "device", "torch", "failure",
)  # fmt: skip
Figures = dict[str, Any]
"""By names in `COLUMNS`."""


@dataclass
class Cell:
    """Something to measure in a process of its own."""

    name: str
    limit_s: float
    figures: Callable[[], Figures]


class Measured(Protocol):
    """What takes turns."""

    def start(self) -> Turn:
        """Make ready."""
        ...


def measure(bench: Bench, folder: Path) -> None:
    """Measure cell by cell while there is time, and add the rows to gpu.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    ends, products = time.monotonic() + bench.gpu.seconds, None
    with tempfile.TemporaryDirectory() as scratch:  # not in a cell, which may be killed
        for cell in asked(list(cells(bench, scratch)), bench.gpu.cells):
            started = time.monotonic()
            left = ends - started
            fits = left >= cell.limit_s
            row = in_a_process(cell) if fits else {"failure": f"not begun: {max(0, left):.0f} of {cell.limit_s:g} s are left"}
            products = row.get("tflops") if cell.name == "products" else products
            if products and "tflops" in row:
                row["of_products"] = row["tflops"] / products
            _add(folder / "gpu.csv", {"cell": cell.name, **row, "took_s": time.monotonic() - started})


def asked(cells: list[Cell], beginnings: list[str]) -> list[Cell]:
    """Those whose names begin so, or all; ValueError for what none begins with."""
    for beginning in beginnings:
        if not any(cell.name.startswith(beginning) for cell in cells):
            raise ValueError(f"gpu.cells={beginning}: there is none; there are {', '.join(cell.name for cell in cells)}")
    return [cell for cell in cells if not beginnings or cell.name.startswith(tuple(beginnings))]


def _add(path: Path, row: Figures) -> None:
    row = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if is_new:
            writer.writeheader()
        writer.writerow(row)
    print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)


def in_a_process(cell: Cell) -> Figures:
    """A cell's figures, or its failure."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        process = pool.submit(os.getpid).result()
        future = pool.submit(_figures, cell.figures)
        try:
            error = future.exception(cell.limit_s)
        except TimeoutError:
            os.kill(process, SIGKILL)
            return {"failure": f"took more than {cell.limit_s:g} s"}
    if isinstance(error, BrokenProcessPool):
        return {"failure": "its process was killed, as for want of memory"}
    return {"failure": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"} if error else future.result()


def _figures(figures: Callable[[], Figures]) -> Figures:
    import torch

    limit_memory()
    found = figures()
    has_gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if has_gpu else peak_bytes()
    name = torch.cuda.get_device_name() if has_gpu else "cpu"
    return {**found, "peak_gb": peak / 1e9, "device": name, "torch": torch.__version__}


def cells(bench: Bench, scratch: str) -> Iterator[Cell]:
    """Every cell; its limit has room for what is compiled."""
    gpu, short, long = bench.gpu, *bench.gpu.lengths
    bench = replace(bench, step_tokens=gpu.step_tokens, micro_batch_tokens=gpu.micro_batch_tokens, repetitions=gpu.repetitions)
    timed = partial(_timed, repetitions=gpu.repetitions)
    base = _compiled(the_run(bench, gpu.backbone, short))
    name = f"{gpu.backbone} {short}"
    products = MatrixProducts(precision=bench.precision, size=gpu.matrix_size, at_once=64)
    yield Cell("products", 40, partial(timed, products, calls=products.at_once))
    yield Cell("copies", 40, partial(_copies, Copies(gpu.matrix_size, at_once=256), gpu.repetitions))
    yield Cell(f"step {name}", 120, partial(timed, Ours(base)))
    halved = deepcopy(base)  # it makes all logits
    halved.trainer.micro_batch_tokens = max(short, gpu.micro_batch_tokens // 2)
    for kind in ("rows", "padded", "sparse"):
        peer = Theirs("padded" if kind == "padded" else "rows", halved, sparse=kind == "sparse")
        yield Cell(f"{kind} {name}", 150, partial(timed, peer))
    yield Cell(f"run {name}", 150, partial(_run, deepcopy(base), gpu.run_steps, scratch))
    for length in gpu.lengths:
        for path in ("varlen", "FA3", "flex", "blocks"):
            yield Cell(f"window {path} {length}", 40, partial(_window, path, base, length, gpu.repetitions))
    small = deepcopy(base)
    settings = cast(Figures, OmegaConf.to_container(hydra.compose("train", ["+recipe=ettin", "ettin=17m"]).backbone))
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    small.backbone |= {key: settings[key] for key in sizes}
    small.backbone["num_hidden_layers"] = bench.num_hidden_layers or small.backbone["num_hidden_layers"]
    yield Cell(f"other ettin_17m {short}", 120, partial(timed, Ours(small)))
    for backbone, length in {gpu.backbone: long, **gpu.others}.items():
        yield Cell(f"other {backbone} {length}", 120, partial(timed, Ours(_compiled(the_run(bench, backbone, length)))))
    for optimizer in ("adamw", "stable_adamw", "muon"):
        yield Cell(f"optimizer {optimizer}", 40, partial(timed, Update(the_run(bench, gpu.backbone, short, optimizer))))
    for rows in CHUNKS:
        yield Cell(f"chunk {rows}", 40, partial(timed, CrossEntropy(base, rows)))
    eager = deepcopy(base)
    eager.trainer.compile = False
    yield Cell(f"eager {name}", 60, partial(timed, Ours(eager)))


def _compiled(run: Run) -> Run:
    run.trainer.compile = True
    return run


def _timed(contestant: Measured, repetitions: int, calls: int = 1) -> Figures:
    """Turns after one to warm up, each of so many calls, of which one's milliseconds are told."""
    import torch

    seconds, turn = [], contestant.start()
    work = []
    for number in range(repetitions + 1):
        started = time.perf_counter()
        work.append(turn(number))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    first, *rest = seconds
    found = {name: 1e3 * of(rest) / calls for name, of in (("ms", median), ("ms_from", min), ("ms_to", max))}
    found["first_s"] = first
    pairs = list(zip(work[1:], rest, strict=True))
    if work[0].tokens:
        found["tokens_per_s"] = median(one.tokens / took for one, took in pairs)
    if work[0].flops:
        found["tflops"] = median(one.flops / took for one, took in pairs) / 1e12
    return found


def _copies(copies: Copies, repetitions: int) -> Figures:
    found = _timed(copies, repetitions, copies.at_once)
    return {**found, "gb_per_s": 2 * 4 * copies.size**2 / (found["ms"] * 1e6)}  # read and written, in fp32


def _window(path: str, run: Run, length: int, repetitions: int) -> Figures:
    forward, both = (Window(path, run, length, backward, at_once=10) for backward in (False, True))
    forward_ms = _timed(forward, repetitions, forward.at_once)["ms"]
    return {**_timed(both, repetitions, both.at_once), "forward_ms": forward_ms}


def _run(run: Run, steps: int, scratch: str) -> Figures:
    """A run that saves some times: steps far from a save, what a save costs, what lies between two steps: the loader's wait."""
    import lightning.pytorch as L

    every, between, tokens = steps // SAVES, [], []

    class Waits(L.Callback):
        """Notes the time between the end of a step and the next."""

        ended = time.perf_counter()

        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
            between.append(time.perf_counter() - self.ended)
            tokens.append(batch.tokens)

        def on_train_batch_end(
            self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            self.ended = time.perf_counter()

    (phase,) = run.phases.values()
    only(run, "decay", steps)
    run.data.workers = 1
    run.validation.tokens_per_source = phase.seq_len
    run.checkpoint.every_minutes, run.checkpoint.every_tokens = 0, every * phase.batch_rows * phase.seq_len
    run.run_dir = f"{scratch}/run"
    with contextlib.redirect_stdout(io.StringIO()):
        times = whole(run, Waits())
    usual = [number for number in range(every, len(times)) if (number + 1) % every > 2]  # far from a save
    seconds = [times[number] for number in usual]
    return {
        "ms": 1e3 * mean(seconds), "ms_from": 1e3 * min(seconds), "ms_to": 1e3 * max(seconds), "first_s": times[0],
        "tokens_per_s": sum(tokens[number] for number in usual) / sum(seconds),
        "save_s": mean(cost_of_saves(times, every)) * mean(seconds),
        "between_ms": 1e3 * mean(between[number + 1] for number in usual),
    }  # fmt: skip
