"""Warn about settings that are valid but probably unintended."""

from collections.abc import Iterator
from typing import Any

from modernenc.config import Run
from modernenc.curriculum import WATCHED_ROWS, Curriculum, reads_text
from modernenc.data.blocks import Corpus
from modernenc.planning.devices import DEVICES
from modernenc.planning.memory import memory
from modernenc.planning.sizes import MULTIPLE, buffered_tokens

MOST_LEFT = 0.25
"""Fraction of a phase's text above which a note says how much lies in packing buffers when the phase ends."""


def notes(run: Run, curriculum: Curriculum, corpus: Corpus | None) -> Iterator[str]:
    """Yield a note on each setting that is valid but probably unintended."""
    yield from _shapes(run.backbone)
    ranks = run.trainer.devices * run.trainer.num_nodes
    before: tuple[str, float] | None = None
    for name, phase in run.phases.items():
        stages = curriculum.stages_of(name)
        if uneven := [stage.batch_rows for stage in stages if stage.batch_rows % ranks]:
            yield f"phases.{name}: {uneven[0]} rows do not divide among {ranks} ranks: some wait for others"
        first = curriculum.at(curriculum.start_of(name)).lr
        if before and before[1] and first and not 0.2 <= first / before[1] <= 5:
            yield f"phases.{name}.lr: jumps from {before[1]:.3g} at the end of {before[0]} to {first:.3g}"
        before = name, curriculum.at(stages[-1].end_tokens - stages[-1].last_step_tokens).lr
        left, tokens = buffered_tokens(run, phase, corpus.block_tokens if corpus else 0), curriculum.text_tokens(name)
        if left > MOST_LEFT * tokens:
            yield (
                f"phases.{name}: when its {tokens:,} tokens of text are over, up to {left:,} more remain in packing buffers, "
                f"drawn but not trained on: each of {run.data.lanes} lanes holds up to {run.data.buffer_rows} rows and a "
                "block. Fewer remain with lower data.buffer_rows or data.lanes (0 chooses what suits the corpus), or with "
                "smaller blocks"
            )
        row_tokens = (curriculum.end_of(name) - curriculum.start_of(name)) / sum(stage.steps for stage in stages)
        row_tokens *= run.logger.every_steps
        if run.watch.action != "off" and run.watch.window_tokens < WATCHED_ROWS * row_tokens:
            yield (
                f"phases.{name}: watch.window_tokens={run.watch.window_tokens:g} holds fewer than {WATCHED_ROWS} rows of "
                f"metrics, of {row_tokens:,.0f} tokens each, so the watch sees nothing finer than a loss half as high again: "
                "raise it, or lower logger.every_steps"
            )
        if given := run.estimate.device:
            needed, there = memory(run, phase, corpus).total, DEVICES[given].memory
            if needed > there:
                yield (
                    f"phases.{name}: about {needed / 1e9:.0f} GB do not fit {given}'s {there / 1e9:.0f} GB; lower "
                    "trainer.micro_batch_tokens, or set trainer.activation_checkpointing_every=1 or trainer.strategy=fsdp"
                )
    if corpus and run.backbone["vocab_size"] > 1.05 * corpus.vocab_size + MULTIPLE:
        yield (
            f"backbone.vocab_size={run.backbone['vocab_size']} is more than the {corpus.vocab_size} entries of the tokenizer: "
            "the rest is never trained on; 0 takes the corpus's size"
        )
    if corpus:
        yield from _passes(run, curriculum, corpus)


def _passes(run: Run, curriculum: Curriculum, corpus: Corpus) -> Iterator[str]:
    """Yield a note on data that is seen more than four times, from where on repetition stops helping: arXiv:2305.16264."""
    seen: dict[str, float] = {}
    for name, phase in run.phases.items():
        tokens = curriculum.text_tokens(name)
        if not reads_text(phase):
            continue
        for path, fraction in corpus.slices(phase.mix).items():
            seen[path] = seen.get(path, 0) + fraction * tokens / corpus.counts(path)["tokens"]
    for path, passes in seen.items():
        if passes > 4:
            yield f"{path} is seen {passes:.1f} times in all: lower its proportion, or add data"


def _shapes(backbone: dict[str, Any]) -> Iterator[str]:
    for key in ("hidden_size", "intermediate_size", "nffn_hidden_size", "vocab_size"):
        if backbone.get(key, 0) % 64:
            yield f"backbone.{key}={backbone[key]} is no multiple of 64: matrix products waste part of each tile"
    heads = backbone.get("num_attention_heads")
    if heads and backbone["hidden_size"] // heads not in (32, 64, 96, 128, 192, 256):
        width = backbone["hidden_size"] // heads
        yield f"backbone.num_attention_heads={heads}: heads of {width} are padded by FlashAttention; 64 or 128 are not"
