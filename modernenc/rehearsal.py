"""A recipe cut down to minutes on a laptop, to see all of it happen before it is paid for: `rehearse=CORPUS`.

Phases, their order, curves, ramps, mask ratios and what they set of the backbone stay. Rows, lengths, budgets and the backbone
shrink in proportion; the corpus's sources stand in for the recipe's, in turn, and its own sentences for the items of tasks.
"""

import csv
import logging
import shlex
from copy import deepcopy
from pathlib import Path
from typing import Any

from modernenc.config import Init, Phase, Run, Task
from modernenc.curriculum import CHOICES, cycle_of, reads_text, tokens_of_cycle
from modernenc.data.blocks import VALIDATION, Corpus
from modernenc.data.choices import COLUMNS

log = logging.getLogger(__name__)

LENGTH, WIDTH, DEPTH = 32, 12, 4
"""What lengths, widths and depths are divided by."""
ROWS = 12
"""Rows of the largest batch."""
STEPS, STEPS_AT_LEAST = 60, 6
"""Optimizer steps of the whole, shared by tokens, and how many each phase has besides."""
BETWEEN, WINDOWS = 16, 4
"""Checkpoints between boundaries, and windows in which the watch looks for a plateau."""
ITEMS, _STRETCH = 32, 12
"""Items of a task, and tokens of each part of them."""
_HEAD = 32
_WIDTHS = ("hidden_size", "intermediate_size", "nffn_hidden_size", "shared_representation_size")
_LENGTHS = ("max_position", "chunk_size", "local_attention")


def cut_down(run: Run) -> Run:
    """The rehearsal of a run on the corpus `run.rehearse`; FileNotFoundError or ValueError when there is none."""
    run = deepcopy(run)
    run.data.root, run.data.cache = run.rehearse, ""
    run.data.hint = f"prepare it with: python -m data_prep +corpus=demo out={shlex.quote(run.rehearse)}"
    run.data.lanes, run.data.buffer_rows, run.data.workers = 4, 4, 0
    corpus = Corpus.of(run.data)
    sources = list(corpus.sources)
    standing_in = {source: sources[number % len(sources)] for number, source in enumerate(_sources(run))}
    rows, tokens = (max(phase.batch_rows for phase in run.phases.values()), sum(phase.tokens for phase in run.phases.values()))
    for task in run.tasks.values():
        task.seq_len, task.batch_items, task.validation_items = max(32, task.seq_len // LENGTH), ROWS // 2, ITEMS
        task.train, task.validation = (str(path) for path in _items(corpus, Path(_rehearsed(run.run_dir)).parent))
    for phase in run.phases.values():
        _shrink(phase, run.tasks, rows, tokens)
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
    small = sum(phase.tokens for phase in run.phases.values())
    run.checkpoint.every_tokens, run.checkpoint.every_minutes = small // BETWEEN, 0
    run.watch.window_tokens = small // WINDOWS
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


def _items(corpus: Corpus, folder: Path) -> list[Path]:
    """Two files of multiple choice, written to `folder`: a stretch of a document, how it goes on, and how others do."""
    from modernenc.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(corpus.tokenizer_file)
    paths = []
    for name, inside in (("train", "slice-000"), ("validation", VALIDATION)):
        shards = corpus.open(f"{next(iter(corpus.sources))}/{inside}")
        block = shards.read(0, 0).tokens[: 2 * ITEMS * _STRETCH]
        texts = tokenizer.decode_batch(block[: len(block) // _STRETCH * _STRETCH].reshape(-1, _STRETCH).tolist())
        pairs = list(zip(texts[::2], texts[1::2], strict=False))
        paths.append(folder / f"items-{name}.csv")
        folder.mkdir(parents=True, exist_ok=True)
        with paths[-1].open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for number, (context, _) in enumerate(pairs):
                label = number % CHOICES
                endings = [pairs[(number + ending - label) % len(pairs)][1] for ending in range(CHOICES)]
                writer.writerow([context, "", *endings, label])
    return paths


def _shrink(phase: Phase, tasks: dict[str, Task], most_rows: int, all_tokens: float) -> None:
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
    elif reads_text(phase):
        phase.batch_rows = max(2, rows(phase.batch_rows))
    capacity = tokens_of_cycle(phase, tasks)
    steps = max(steps, len(cycle_of(phase)))
    phase.tokens = steps * sum(capacity.values()) // len(cycle_of(phase))
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
