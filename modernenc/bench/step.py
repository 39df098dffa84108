"""Time and memory of a training step on one row, against transformers: `python -m modernenc.bench.step +recipe=NAME`.

Forward and backward of a row as long as the recipe's last phase has them, with its mask ratio, all of it one document; ours
with and without making activations again. Memory is measured in a process each, time in one process in turn. A model that
needs more memory than is free is reported as such. Shorter or fewer: phases.NAME.seq_len=4096 backbone.num_hidden_layers=1.
"""

import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modernenc.cli import run as run_cli
from modernenc.config import Run, register

if TYPE_CHECKING:
    from torch import Tensor, nn

OURS, AGAIN, THEIRS = "modernenc", "modernenc, recomputing", "transformers"
REPETITIONS = 5


def main(config: Run) -> None:
    """Measure, and print a table."""
    from rich.console import Console
    from rich.table import Table

    length = list(config.phases.values())[-1].seq_len
    console = Console()
    context = multiprocessing.get_context("spawn")
    held: dict[str, tuple[float, float] | None] = {}
    for name in (OURS, AGAIN, THEIRS):
        with context.Pool(1) as pool:
            held[name] = pool.apply(memory, (config, name))
    seconds = timed(config, [name for name in held if held[name]])
    layers = config.backbone["num_hidden_layers"]
    title = f"a step on one row of {length:,} tokens, {layers} layers, {config.trainer.precision}"
    table = Table(title=title, title_justify="left")
    for column in ("", "tokens/s", "time / ours", "from", "to", "peak GB", "kept kB"):
        table.add_column(column, justify="right" if column else "left")
    for name, figures in held.items():
        if figures is None:
            table.add_row(name, f"needs more than the {_free() / 1e9:.0f} GB that are free")
            continue
        ratios = sorted(one / own for one, own in zip(seconds[name], seconds[OURS], strict=True))
        speed = length / sorted(seconds[name])[REPETITIONS // 2]
        peak, kept = figures
        row = [f"{ratio:.2f}" for ratio in (ratios[REPETITIONS // 2], ratios[0], ratios[-1])]
        table.add_row(name, f"{speed:,.0f}", *row, f"{peak / 1e9:.2f}", f"{kept / 1e3 / length / layers:.0f}")
    console.print(table)
    console.print("peak: beside weights and libraries; kept: for the backward pass, per token and layer")


def memory(config: Run, name: str) -> tuple[float, float] | None:
    """Bytes at the peak of a step, weights and libraries left out, and those kept for the backward pass; None when too many."""
    from modernenc.estimate import kept_bytes

    loss = _losses(config, [name])[name]
    resource.setrlimit(resource.RLIMIT_DATA, (_rss() + _free(), resource.RLIM_INFINITY))
    before = _rss()
    try:
        with kept_bytes({id(weight) for weight in loss.weights}) as kept:
            value = loss()
        value.backward()
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0 - before, float(sum(kept.values()))


def timed(config: Run, names: list[str]) -> dict[str, list[float]]:
    """Seconds of each repetition after the first, by model, taken in turn."""
    from modernenc.fit import keep_freed_memory

    keep_freed_memory()
    losses = _losses(config, names)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(REPETITIONS + 1):
        for name, loss in losses.items():
            started = time.perf_counter()
            loss().backward()
            if repetition:
                seconds[name].append(time.perf_counter() - started)
            for weight in loss.weights:
                weight.grad = None
    return seconds


class Loss:
    """The mean loss of a model on the same row each time."""

    def __init__(self, model: "nn.Module", precision: str, forward: Callable[[], "Tensor"]) -> None:
        self.weights = list(model.parameters())
        self.precision = precision
        self.forward = forward

    def __call__(self) -> "Tensor":
        import torch

        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16-mixed"):
            return self.forward()


def _losses(config: Run, names: list[str]) -> dict[str, Loss]:
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM

    from modernenc.data.masking import MicroBatch
    from modernenc.export import hugging_face_names
    from modernenc.model import build_objectives, recompute

    phase = list(config.phases.values())[-1]
    config.backbone["max_position"] = max(config.backbone["max_position"], phase.seq_len)
    row = torch.randint(config.backbone["vocab_size"], (phase.seq_len,))
    places = torch.randperm(phase.seq_len)[: int(phase.seq_len * phase.mask_ratio)].sort().values
    batch = MicroBatch(row, torch.tensor([0, len(row)], dtype=torch.int32), len(row), places, row[places], 0)
    labels = torch.full_like(row, -100).index_copy(0, places, row[places])
    losses: dict[str, Loss] = {}
    for name in names:
        ours: Any = build_objectives(config).masked_lm
        if name != THEIRS:
            recompute(ours.backbone, 1 if name == AGAIN else 0)
            losses[name] = Loss(ours, config.trainer.precision, lambda ours=ours: ours(batch)[0] / len(places))
            continue
        settings = AutoConfig.for_model(**ours.backbone.hugging_face_model().config.to_dict())
        theirs = AutoModelForMaskedLM.from_config(settings).train()
        theirs.load_state_dict(hugging_face_names(ours.state_dict(), ours.backbone.HUGGING_FACE_NAMES))
        losses[name] = Loss(
            theirs,
            config.trainer.precision,
            lambda theirs=theirs: theirs(input_ids=row[None], labels=labels[None]).loss,
        )
    return losses


def _rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _free() -> int:
    """Bytes of memory that a process may still take."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


if __name__ == "__main__":
    register()
    run_cli(Run, ("recipe",), "train", main)
