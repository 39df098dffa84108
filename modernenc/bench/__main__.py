"""Training speed beside transformers', in one process: `python -m modernenc.bench +recipe=NAME`.

Both take the same documents, weights, masks, optimizer and precision, step by step in turn: ours packed without padding,
with logits at the predicted tokens; `AutoModelForMaskedLM` (sdpa) padded to the longest document of the micro-batch.
"""

import time
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from modernenc.cli import run as run_cli
from modernenc.config import Run, register

if TYPE_CHECKING:
    from modernenc.data.masking import MicroBatch

WARMUP, ROUNDS = 1, 7


def main(config: Run) -> None:
    """Measure on the last phase of a recipe, whose rows are the longest."""
    from modernenc.checks import check_run
    from modernenc.data.loader import DataState, Steps
    from modernenc.fit import keep_freed_memory

    keep_freed_memory()
    curriculum, corpus = check_run(config)
    last = list(config.phases)[-1]
    config.phases = {last: config.phases[last]}
    steps = Steps(config, type(curriculum)(config.phases), corpus, 0, 1, DataState())
    batches = [batch for step in islice(steps, WARMUP + ROUNDS) for batch in step.micro_batches][: WARMUP + ROUNDS]
    seconds = measure(config, batches, pad=corpus.roles.pad)
    tokens = [len(batch.input_ids) for batch in batches[WARMUP:]]
    padded = [batch.max_seqlen * (len(batch.cu_seqlens) - 1) for batch in batches[WARMUP:]]
    table = Table(
        title=f"training step, recipe {config.recipe}, rows of {config.phases[last].seq_len}, {config.trainer.precision}"
    )
    for column in ("", "real tokens/s: median", "lowest", "highest", "share of real tokens"):
        table.add_column(column, justify="right" if column else "left")
    for name, share in (("modernenc", 1.0), ("transformers", sum(tokens) / sum(padded))):
        speeds = sorted(count / second for count, second in zip(tokens, seconds[name], strict=True))
        table.add_row(name, *(f"{speed:,.0f}" for speed in (speeds[len(speeds) // 2], speeds[0], speeds[-1])), f"{share:.0%}")
    ratios = sorted(theirs / ours for ours, theirs in zip(seconds["modernenc"], seconds["transformers"], strict=True))
    console = Console()
    console.print(table)
    console.print(f"ratio per micro-batch: median {ratios[len(ratios) // 2]:.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f}")


def measure(config: Run, batches: list["MicroBatch"], pad: int) -> dict[str, list[float]]:
    """Seconds of each optimizer step after the warmup, by implementation, taken in turn."""
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM

    from modernenc.export import hugging_face_names
    from modernenc.model import build_objectives

    device = torch.device("cuda" if torch.cuda.is_available() and config.trainer.accelerator != "cpu" else "cpu")
    ours = build_objectives(config).masked_lm.to(device)
    config_of_ours = ours.backbone.hugging_face_model().config
    settings = AutoConfig.for_model(**config_of_ours.to_dict())  # transformers' own class of that type
    theirs = AutoModelForMaskedLM.from_config(settings)
    theirs.load_state_dict(hugging_face_names(ours.state_dict(), ours.backbone.HUGGING_FACE_NAMES))
    theirs.to(device).train()
    steps: dict[str, Callable[[MicroBatch], Any]] = {
        "modernenc": lambda batch: ours(batch)[0] / len(batch.targets),
        "transformers": lambda batch: theirs(**padded(batch, pad)).loss,
    }
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
        for name, model in (("modernenc", ours), ("transformers", theirs))
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for batch in batches:
        batch = batch.to(device)
        for name, loss in steps.items():
            started = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=config.trainer.precision == "bf16-mixed"):
                value = loss(batch)
            value.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            value.item()  # waits for the device
            seconds[name].append(time.perf_counter() - started)
    return {name: values[WARMUP:] for name, values in seconds.items()}


def padded(batch: "MicroBatch", pad: int) -> dict[str, Any]:
    """The documents of a micro-batch as transformers takes them: padded to the longest, with labels at the predicted tokens."""
    import torch

    lengths = batch.cu_seqlens.diff().tolist()
    labels = torch.full_like(batch.input_ids, -100)
    labels[batch.target_positions] = batch.targets

    def rows(flat: Any, fill: int) -> Any:
        return torch.nn.utils.rnn.pad_sequence(flat.split(lengths), batch_first=True, padding_value=fill)

    return {
        "input_ids": rows(batch.input_ids, pad),
        "attention_mask": rows(torch.ones_like(batch.input_ids), 0),
        "labels": rows(labels, -100),
    }


if __name__ == "__main__":
    register()
    run_cli(Run, ("recipe",), "train", main)
