"""A recipe cut down to minutes on a laptop, to see all of it happen before it is paid for: `rehearse=CORPUS`.

Phases, their order, curves, ramps, mask ratios and what they set of the backbone stay. Rows, lengths, budgets and the backbone
shrink in proportion; the corpus's sources stand in for the recipe's, in turn.
"""

import logging
from copy import deepcopy
from pathlib import Path
from typing import Any

from modernenc.config import Init, Phase, Run
from modernenc.data.blocks import Corpus

log = logging.getLogger(__name__)

LENGTH, WIDTH, DEPTH = 32, 12, 4
"""What lengths, widths and depths are divided by."""
ROWS = 12
"""Rows of the largest batch."""
STEPS, STEPS_AT_LEAST = 60, 6
"""Optimizer steps of the whole, shared by tokens, and how many each phase has besides."""
_HEAD = 32
_WIDTHS = ("hidden_size", "intermediate_size", "nffn_hidden_size", "shared_representation_size")
_LENGTHS = ("max_position", "chunk_size", "local_attention")


def cut_down(run: Run) -> Run:
    """The rehearsal of a run on the corpus `run.rehearse`; FileNotFoundError or ValueError when there is none."""
    run = deepcopy(run)
    run.data.root, run.data.cache, run.data.hint = run.rehearse, "", "prepare it with: python -m data_prep +corpus=demo"
    run.data.lanes, run.data.window_rows, run.data.workers = 4, 4, 0
    corpus = Corpus.of(run.data)
    sources = list(corpus.sources)
    standing_in = {source: sources[number % len(sources)] for number, source in enumerate(_sources(run))}
    rows, tokens = (max(phase.batch_rows for phase in run.phases.values()), sum(phase.tokens for phase in run.phases.values()))
    for phase in run.phases.values():
        _shrink(phase, rows, tokens)
        mix: dict[str, float] = {}
        for source, share in phase.mix.items():
            name = standing_in[source.partition("/")[0]]
            mix[name] = mix.get(name, 0) + share
        phase.mix = mix
    _shrink_backbone(run.backbone)
    run.backbone["vocab_size"] = corpus.vocab_size
    trainer = run.trainer
    trainer.accelerator, trainer.devices, trainer.num_nodes, trainer.strategy = "auto", 1, 1, "auto"
    trainer.micro_batch_tokens = 4_096
    run.checkpoint.every_tokens = run.checkpoint.every_minutes = 0
    run.validation.every_tokens, run.validation.tokens_per_source = 0, 4_096
    run.logger.every_steps = 1
    run.run_dir = _rehearsed(run.run_dir)
    if run.init.source:
        run.init.source = _rehearsed(run.init.source)
        if not Path(run.init.source).is_file():  # a Hugging Face model has the full size
            log.warning("%s is not there: the rehearsal begins with random weights", run.init.source)
            run.init = Init()
    return run


def _rehearsed(path: str) -> str:
    """Rehearsals have a folder of their own beside the runs."""
    return path.replace("runs/", "runs/rehearsals/", 1) if path.startswith("runs/") else path


def _sources(run: Run) -> list[str]:
    return list(dict.fromkeys(source.partition("/")[0] for phase in run.phases.values() for source in phase.mix))


def _shrink(phase: Phase, most_rows: int, all_tokens: float) -> None:
    """One phase; every level of a ramp keeps a step at least."""

    def rows(number: int) -> int:
        return max(1, round(number * ROWS / most_rows))

    warmup, ramp = phase.warmup_tokens / phase.tokens, phase.ramp.tokens / phase.tokens
    steps = STEPS_AT_LEAST + round(STEPS * phase.tokens / all_tokens)
    phase.seq_len = max(32, phase.seq_len // LENGTH)
    if phase.ramp.tokens:
        levels = -(-(phase.batch_rows - phase.ramp.start_rows) // phase.ramp.step_rows)
        phase.ramp.start_rows, phase.ramp.step_rows = rows(phase.ramp.start_rows), rows(phase.ramp.step_rows)
        phase.batch_rows = phase.ramp.start_rows + levels * phase.ramp.step_rows
    else:
        phase.batch_rows = max(2, rows(phase.batch_rows))
    phase.tokens = steps * phase.batch_rows * phase.seq_len
    if phase.warmup_tokens:
        phase.warmup_tokens = max(round(phase.tokens * warmup), 2 * phase.batch_rows * phase.seq_len)
    if phase.ramp.tokens:
        step_of_each = sum(range(phase.ramp.start_rows, phase.batch_rows, phase.ramp.step_rows)) * phase.seq_len
        phase.ramp.tokens = max(round(phase.tokens * ramp), step_of_each)
        phase.tokens = max(phase.tokens, 2 * phase.ramp.tokens)


def _shrink_backbone(backbone: dict[str, Any]) -> None:
    for key in _WIDTHS:
        if key in backbone:
            backbone[key] = max(_HEAD, round(backbone[key] / WIDTH / _HEAD) * _HEAD)
    for key in _LENGTHS:
        if key in backbone:
            backbone[key] = max(8, backbone[key] // LENGTH)
    backbone["num_hidden_layers"] = max(3, round(backbone["num_hidden_layers"] / DEPTH))
    if "num_attention_heads" in backbone:
        backbone["num_attention_heads"] = backbone["hidden_size"] // _HEAD
