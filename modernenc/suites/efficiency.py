"""Tokens a second to the hidden states of any encoder on this machine, on documents of one length and of many.

Documents of a length L are all of L tokens, or have lengths normally distributed around L/2 (Warner et al. 2024, table 2).
Padding is computed and not counted. Lengths beyond what a model reads are left out.
"""

import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Gt, MinLen
from omegaconf import MISSING

from modernenc.evaluation.cells import Cell, Findings, Request
from modernenc.evaluation.models import know_mega, max_positions
from modernenc.evaluation.settings import read_settings
from modernenc.frozen import frozen

KINDS = ("fixed", "variable")
SPEED = "tokens_per_s"


@frozen
class EfficiencySettings:
    """What is timed."""

    lengths: Annotated[list[Annotated[int, Ge(8)]], MinLen(1)] = MISSING
    """Lengths of documents in tokens."""
    tokens: Annotated[int, Gt(0)] = MISSING
    """Tokens of all documents of a turn, about."""
    batch_tokens: Annotated[int, Gt(0)] = MISSING
    """Tokens, with padding, that are computed at once."""
    turns: Annotated[int, Ge(2)] = MISSING
    """How many times each is timed, after one turn to warm up."""
    precision: Annotated[str, Literal["bf16", "fp32"]] = MISSING


SCHEMA = EfficiencySettings


@dataclass(frozen=True)
class EfficiencyCell(Cell):
    """The speed of one model on documents of one kind."""

    length: int = 0
    kind: str = KINDS[0]

    def work(self, out: Path) -> Findings:
        """Time the turns."""
        return Findings({SPEED: time_turns(self.model.folder, self.length, self.kind, EfficiencySettings(**self.setting))})


def make_cells(request: Request) -> tuple[list[EfficiencyCell], list[str]]:
    """Return a cell for each model, length and kind that the model can read."""
    from transformers import AutoConfig  # takes seconds to import

    settings = read_settings(EfficiencySettings, request.settings, request.changes)
    cells, notes = [], []
    for model in request.models:
        know_mega(model.folder)
        longest = max_positions(AutoConfig.from_pretrained(model.folder, trust_remote_code=False))
        for length in settings.lengths:
            if length > longest:
                notes.append(f"{model.name} reads {longest:,} tokens: {length:,} are left out")
                continue
            for kind in KINDS:
                task = f"{length:,} {kind}"
                cells.append(
                    EfficiencyCell(request.suite, model, task, _machine(), (SPEED,), asdict(settings), length=length, kind=kind)
                )
    return cells, notes


def time_turns(folder: Path, length: int, kind: str, settings: EfficiencySettings) -> list[float]:
    """Return tokens a second of each turn, without padding."""
    import torch
    from transformers import AutoModel, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    know_mega(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval().to(device)
    batches = [
        {key: value.to(device) for key, value in batch.items()}
        for batch in _batches(lengths_of(length, kind, settings.tokens), settings.batch_tokens, model.config.vocab_size)
    ]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    speeds = []
    for _ in range(1 + settings.turns):
        start = time.perf_counter()
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=settings.precision == "bf16"):
            for batch in batches:
                model(**batch)
        if device == "cuda":
            torch.cuda.synchronize()
        speeds.append(tokens / (time.perf_counter() - start))
    return speeds[1:]


def lengths_of(length: int, kind: str, tokens: int) -> list[int]:
    """Return the lengths of documents that have about so many tokens together; at least two documents."""
    if kind == "fixed":
        return [length] * max(2, tokens // length)
    drawn = np.random.default_rng(0).normal(length / 2, length / 8, max(2, 2 * tokens // length))
    return drawn.round().clip(1, length).astype(int).tolist()


def _batches(lengths: list[int], batch_tokens: int, vocab_size: int) -> Iterator[dict[str, Any]]:
    """Yield batches of random tokens, in the order given and not sorted by length, as documents come to a user."""
    import torch

    size = max(1, batch_tokens // max(lengths))
    for at in range(0, len(lengths), size):
        mine = torch.tensor(lengths[at : at + size])
        kept = (torch.arange(int(mine.max()))[None] < mine[:, None]).long()
        yield {
            "input_ids": torch.randint(vocab_size, kept.shape, generator=torch.Generator().manual_seed(at)),
            "attention_mask": kept,
        }


def _machine() -> str:
    """Return what the speed depends on besides the model: another machine's cells are others."""
    import torch

    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.processor()}, {torch.get_num_threads()} threads"
    )
    return f"{platform.node()}, {device}"
