"""Scale a recipe down to a minute on a laptop, to see all of it happen before it is paid for: `smoke_test=CORPUS`.

The phases keep their order, curves, ramps, mask ratios and attributes of the backbone. Rows, lengths, budgets and the backbone
shrink in proportion; the corpus's sources replace the recipe's, in turn, and its sentences replace the items of tasks.
"""

import csv
import logging
import shlex
from dataclasses import replace
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
_WIDTHS = {"hidden_size", "intermediate_size", "nffn_hidden_size", "shared_representation_size"}
_LENGTHS = {"max_position": 8, "chunk_size": SHORTEST, "local_attention": 8}
"""Settings of a backbone that are lengths, with the smallest value of each."""


def scale_down(run: Run) -> Run:
    """Return the run scaled down, on the corpus `run.smoke_test`; FileNotFoundError or ValueError if there is none."""
    data = replace(
        run.data,
        root=run.smoke_test,
        cache="",
        hint=f"prepare it with: python -m data_prep +corpus=demo out={shlex.quote(run.smoke_test)}",
        lanes=4,
        buffer_rows=4,
        workers=0,
    )
    corpus = Corpus.of(data)
    run_dir = _move_to_smoke_tests(run.run_dir)
    tasks = {}
    for name, task in run.tasks.items():
        train, validation = (str(path) for path in _items(corpus, Path(run_dir).parent))
        seq_len = max(32, task.seq_len // LENGTH)
        tasks[name] = Task(train, validation, ITEMS, seq_len, batch_items=ROWS // 2, lr_factor=task.lr_factor)
    phases = _shrink_phases(run.phases, tasks, list(corpus.sources))
    tokens = int(sum(phase.tokens for phase in phases.values()))
    return replace(
        run,
        run_dir=run_dir,
        backbone={**_shrink_backbone(run.backbone), "vocab_size": corpus.vocab_size},
        init=_init_of_smoke_test(run.init),
        tasks=tasks,
        phases=phases,
        data=data,
        trainer=replace(run.trainer, accelerator="auto", devices=1, num_nodes=1, strategy="auto", micro_batch_tokens=4_096),
        checkpoint=replace(run.checkpoint, every_tokens=tokens // SAVES, every_minutes=0),
        watch=replace(run.watch, window_tokens=tokens // WATCHES),
        validation=replace(run.validation, every_tokens=0, tokens_per_source=4_096),
        logger=replace(run.logger, every_steps=1),
    )


def _init_of_smoke_test(init: Init) -> Init:
    """Return the first weights of a smoke test: those of its source's smoke test, or random ones if there was none."""
    source = _move_to_smoke_tests(init.source)
    is_ours = source.endswith(".ckpt") and Path(source).is_file()
    if init.source and not is_ours:  # other models are not scaled down
        log.warning("%s is not there: the smoke test starts from random weights", source)
        return Init()
    return replace(init, source=source)


def _move_to_smoke_tests(path: str) -> str:
    """Return a path in `runs/` as the same path in `runs/smoke_tests/`, and any other path as it is."""
    return path.replace("runs/", "runs/smoke_tests/", 1) if path.startswith("runs/") else path


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


def _shrink_phases(phases: dict[str, Phase], tasks: dict[str, Task], sources: list[str]) -> dict[str, Phase]:
    """Return the phases scaled down in proportion to each other, on the sources of another corpus."""
    most_rows = max(phase.batch_rows for phase in phases.values())
    tokens = sum(phase.tokens for phase in phases.values())
    mixed = dict.fromkeys(source.partition("/")[0] for phase in phases.values() for source in phase.mix)
    standing_in = {source: sources[number % len(sources)] for number, source in enumerate(mixed)}
    small = {}
    for name, phase in phases.items():
        mix: dict[str, float] = {}
        for source, share in phase.mix.items():
            stand_in = standing_in[source.partition("/")[0]]
            mix[stand_in] = mix.get(stand_in, 0) + share
        steps = STEPS_AT_LEAST + round(STEPS * phase.tokens / tokens)
        small[name] = replace(_shrink(phase, tasks, most_rows, steps), mix=mix)
    return small


def _shrink(phase: Phase, tasks: dict[str, Task], most_rows: int, steps: int) -> Phase:
    """Scale a phase down to about `steps` optimizer steps; each stage of a ramp keeps at least one."""

    def rows(number: int) -> int:
        return max(1, round(number * ROWS / most_rows))

    ramp, batch_rows, seq_len = phase.ramp, phase.batch_rows, max(32, phase.seq_len // LENGTH)
    if ramp.tokens:
        stages = -(-(batch_rows - ramp.start_rows) // ramp.step_rows)
        ramp = replace(ramp, start_rows=rows(ramp.start_rows), step_rows=rows(ramp.step_rows))
        batch_rows = ramp.start_rows + stages * ramp.step_rows
    elif reads_text(phase):
        batch_rows = max(2, rows(batch_rows))
    small = replace(phase, batch_rows=batch_rows, seq_len=seq_len)
    cycle = len(objective_cycle(small))
    tokens = max(steps, cycle) * sum(cycle_tokens(small, tasks).values()) // cycle
    warmup_tokens = 0
    if phase.warmup_tokens:
        warmup_tokens = max(round(tokens * (phase.warmup_tokens / phase.tokens)), 2 * batch_rows * seq_len)
    if ramp.tokens:
        step_of_each = sum(range(ramp.start_rows, batch_rows, ramp.step_rows)) * seq_len
        ramp = replace(ramp, tokens=max(round(tokens * (phase.ramp.tokens / phase.tokens)), step_of_each))
        tokens = max(tokens, 2 * ramp.tokens)
    return replace(small, tokens=tokens, warmup_tokens=warmup_tokens, ramp=ramp)


def _shrink_backbone(backbone: dict[str, Any]) -> dict[str, Any]:
    small = dict(backbone)
    for key in _WIDTHS & backbone.keys():
        small[key] = max(_HEAD, round(backbone[key] / WIDTH / _HEAD) * _HEAD)
    for key in _LENGTHS.keys() & backbone.keys():
        small[key] = max(_LENGTHS[key], backbone[key] // LENGTH)
    small["num_hidden_layers"] = max(3, round(backbone["num_hidden_layers"] / DEPTH))
    if "num_attention_heads" in backbone:
        small["num_attention_heads"] = small["hidden_size"] // _HEAD
    if "num_key_value_heads" in backbone:  # which must divide those of queries
        small["num_key_value_heads"] = 1
    return small
