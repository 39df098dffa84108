"""What a GPU does, most valuable first: `python -m modernenc.bench gpu`, for as long as the GPU is there.

Each cell is a process of its own with a limit to its time; a row of gpu.csv is written as it ends, with the reason where there
are no figures. What no longer fits into `gpu.seconds` is not begun. In order there are: products and copies of
the card alone; a step, compiled, beside transformers' model, compiled, on full rows and on documents padded; a whole run;
attention with a window; transformers' model on full rows with logits at the predicted tokens only; steps of other backbones;
optimizers alone; cross-entropy by rows of a chunk; a step that is not compiled. Without a GPU nothing is compiled.
"""

import csv
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
from statistics import median
from typing import Any, Protocol, cast

import hydra
from omegaconf import OmegaConf

from modernenc.bench.kernels import Copies, CrossEntropy, Update, Window
from modernenc.bench.loop import with_saves
from modernenc.bench.settings import Bench, the_run
from modernenc.bench.step import Ours, Theirs
from modernenc.bench.turns import MatrixProducts, Turn, limit_memory, peak_bytes
from modernenc.config import Run

CHUNKS = (1_024, 4_096, 8_192, 16_384)
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
    if len(bench.gpu.lengths) != 2:
        raise ValueError(f"gpu.lengths={bench.gpu.lengths}: expected two, that of most rows and that of long ones")
    if bench.gpu.run_steps < 25:
        raise ValueError(f"gpu.run_steps={bench.gpu.run_steps}: expected 25 at least, for five saves and steps far from them")
    folder.mkdir(parents=True, exist_ok=True)
    ends, products = time.monotonic() + bench.gpu.seconds, None
    with tempfile.TemporaryDirectory() as scratch:  # not in a cell, which may be killed
        for cell in asked(list(cells(bench, scratch)), bench.gpu.cells):
            started = time.monotonic()
            left = ends - started
            row: Figures = {"failure": f"not begun: {max(0, left):.0f} of {cell.limit_s:g} s are left"}
            if left >= cell.limit_s:
                row = in_a_process(cell)
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
        writer: csv.DictWriter[str] = csv.DictWriter(file, COLUMNS)
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
    for kind in ("rows", "padded"):
        yield Cell(f"{kind} {name}", 150, partial(timed, Theirs(kind, halved)))
    yield Cell(f"run {name}", 150, partial(with_saves, deepcopy(base), gpu.run_steps, scratch))
    for length in gpu.lengths:
        for path in ("varlen", "FA3", "flex", "tiled"):
            yield Cell(f"window {path} {length}", 40, partial(_window, path, base, length, gpu.repetitions))
    yield Cell(f"sparse {name}", 150, partial(timed, Theirs("rows", halved, sparse=True)))
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
