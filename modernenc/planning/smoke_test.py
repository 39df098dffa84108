"""Scale a recipe down to minutes on a laptop, to see all of it happen before it is paid for: `smoke_test=CORPUS`.

The phases keep their order, curves, ramps, mask ratios and attributes of the backbone. Rows, lengths, budgets and the backbone
shrink in proportion; the corpus's sources replace the recipe's, in turn, and its sentences replace the items of tasks.
"""

import csv
import logging
import shlex
from copy import deepcopy
from pathlib import Path
from typing import Any

from modernenc.config import Init, Phase, Run, Task
from modernenc.curriculum import CHOICES, cycle_tokens, objective_cycle, reads_text
from modernenc.data.blocks import VALIDATION, Corpus
from modernenc.data.choices import COLUMNS
from modernenc.data.tokenizer import load_tokenizer
from modernenc.kernels.buckets import SHORTEST

log = logging.getLogger(__name__)

LENGTH, WIDTH, DEPTH = 32, 12, 4
"""Divisors of lengths, widths and depths."""
ROWS = 12
"""Rows of the largest batch."""
STEPS, STEPS_AT_LEAST = 60, 6
"""Optimizer steps that the phases divide in proportion to their tokens, and the steps that each phase has in addition."""
SAVES, WATCHES = 16, 4
"""Checkpoints between boundaries, and number of `watch.window_tokens` in the whole run."""
ITEMS, _STRETCH = 32, 12
"""Items of a task, and tokens of each of their parts."""
_HEAD = 32
_WIDTHS = ("hidden_size", "intermediate_size", "nffn_hidden_size", "shared_representation_size")
_LENGTHS = {"max_position": 8, "chunk_size": SHORTEST, "local_attention": 8}
"""Settings of a backbone that are lengths, with the smallest value of each."""


def scale_down(run: Run) -> Run:
    """Return the run scaled down, on the corpus `run.smoke_test`; FileNotFoundError or ValueError if there is none."""
    run = deepcopy(run)
    run.data.root, run.data.cache = run.smoke_test, ""
    run.data.hint = f"prepare it with: python -m data_prep +corpus=demo out={shlex.quote(run.smoke_test)}"
    run.data.lanes, run.data.buffer_rows, run.data.workers = 4, 4, 0
    corpus = Corpus.of(run.data)
    sources = list(corpus.sources)
    standing_in = {source: sources[number % len(sources)] for number, source in enumerate(_sources(run))}
    rows, tokens = (max(phase.batch_rows for phase in run.phases.values()), sum(phase.tokens for phase in run.phases.values()))
    for task in run.tasks.values():
        task.seq_len, task.batch_items, task.validation_items = max(32, task.seq_len // LENGTH), ROWS // 2, ITEMS
        task.train, task.validation = (str(path) for path in _items(corpus, Path(_beside_runs(run.run_dir)).parent))
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
    run.checkpoint.every_tokens, run.checkpoint.every_minutes = small // SAVES, 0
    run.watch.window_tokens = small // WATCHES
    run.validation.every_tokens, run.validation.tokens_per_source = 0, 4_096
    run.logger.every_steps = 1
    run.run_dir = _beside_runs(run.run_dir)
    if run.init.source:
        run.init.source = _beside_runs(run.init.source)
        if not Path(run.init.source).is_file():  # a Hugging Face model is not scaled down
            log.warning("%s is not there: the smoke test starts from random weights", run.init.source)
            run.init = Init()
    return run


def _beside_runs(path: str) -> str:
    """Return the path in the folder of smoke tests, which lies within the folder of runs."""
    return path.replace("runs/", "runs/smoke_tests/", 1) if path.startswith("runs/") else path


def _sources(run: Run) -> list[str]:
    return list(dict.fromkeys(source.partition("/")[0] for phase in run.phases.values() for source in phase.mix))


def _items(corpus: Corpus, folder: Path) -> list[Path]:
    """Write two files of multiple choice: a piece of a document with its continuation, and continuations of other pieces."""
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
    """Scale a phase down; each stage of a ramp keeps at least one step."""

    def rows(number: int) -> int:
        return max(1, round(number * ROWS / most_rows))

    warmup, ramp = phase.warmup_tokens / phase.tokens, phase.ramp.tokens / phase.tokens
    steps = STEPS_AT_LEAST + round(STEPS * phase.tokens / all_tokens)
    phase.seq_len = max(32, phase.seq_len // LENGTH)
    if phase.ramp.tokens:
        stages = -(-(phase.batch_rows - phase.ramp.start_rows) // phase.ramp.step_rows)
        phase.ramp.start_rows, phase.ramp.step_rows = rows(phase.ramp.start_rows), rows(phase.ramp.step_rows)
        phase.batch_rows = phase.ramp.start_rows + stages * phase.ramp.step_rows
    elif reads_text(phase):
        phase.batch_rows = max(2, rows(phase.batch_rows))
    capacity = cycle_tokens(phase, tasks)
    steps = max(steps, len(objective_cycle(phase)))
    phase.tokens = steps * sum(capacity.values()) // len(objective_cycle(phase))
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
    for key, smallest in _LENGTHS.items():
        if key in backbone:
            backbone[key] = max(smallest, backbone[key] // LENGTH)
    backbone["num_hidden_layers"] = max(3, round(backbone["num_hidden_layers"] / DEPTH))
    if "num_attention_heads" in backbone:
        backbone["num_attention_heads"] = backbone["hidden_size"] // _HEAD
