"""Choose the sizes that a recipe leaves open with a 0: the vocabulary, the number of lanes, and their packing buffers.

They follow from the recipe and the corpus alone, are chosen before anything else, and are written to the run's `config.yaml`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from modernenc.config import Phase, Run
from modernenc.curriculum import Curriculum, reads_text
from modernenc.data.blocks import Corpus, corpus_of
from modernenc.saved_config import load

VOCAB = "backbone.vocab_size"
LANES = "data.lanes"
BUFFER = "data.buffer_rows"

MOST_LANES, ENOUGH_LANES = 64, 16
"""Number of lanes, unless a slice has fewer blocks or the buffers would hold too much: then fewer, but in the latter case not
fewer than the second number."""
MOST_ROWS, FEWEST_ROWS = 512, 8
"""Rows of a packing buffer, and the least: 512 leave 0.5 % of the rows' capacity empty at 1,024 tokens, fewer leave more."""
LEFT = 0.05
"""Fraction of a phase's tokens that may lie in the buffers when it ends, if lanes and rows can be chosen so."""
MULTIPLE = 64
"""The vocabulary is rounded up to a multiple of this, because matrix products work in tiles."""
UNKNOWN_VOCAB = 8_192
"""Vocabulary assumed in a plan without a corpus; lanes and rows are then those of a large one."""


def choose_sizes(run: Run) -> Run:
    """Return the run with a size for each that is 0, listed in `data.from_corpus`.

    A branch takes over the sizes of its parent. Without a corpus, with which a plan can do but a run cannot, they are assumed.
    Raises ValueError if the corpus lacks what the phases' mixes name.
    """
    open_keys = [key for key in (VOCAB, LANES, BUFFER) if _get(run, key) == 0]
    if not open_keys:
        return run
    sizes = _of_parent(Path(run.branch_from)) if run.branch_from else {}
    if not sizes:
        corpus = corpus_of(run.data)
        sizes = {VOCAB: UNKNOWN_VOCAB, LANES: MOST_LANES, BUFFER: MOST_ROWS}
        if corpus:
            sizes[VOCAB] = -(-corpus.vocab_size // MULTIPLE) * MULTIPLE
            if open_keys != [VOCAB]:
                sizes[LANES], sizes[BUFFER] = _lanes_and_rows(run, corpus)
    chosen = {key: sizes[key] if key in open_keys else _get(run, key) for key in (LANES, BUFFER)}
    data = replace(run.data, lanes=chosen[LANES], buffer_rows=chosen[BUFFER], from_corpus=open_keys)
    vocabulary = {"vocab_size": sizes[VOCAB]} if VOCAB in open_keys else {}
    return replace(run, data=data, backbone={**run.backbone, **vocabulary})


def buffered_tokens(run: Run, phase: Phase, block_tokens: int) -> int:
    """Return the most tokens that all lanes can hold, drawn and not trained on, when a phase ends.

    Each lane holds up to a packing buffer and the rest of a block of `block_tokens`.
    """
    if not reads_text(phase):
        return 0
    return _buffered(run.data.lanes, run.data.buffer_rows, phase.seq_len, block_tokens)


def _buffered(lanes: int, rows: int, seq_len: int, block_tokens: int) -> int:
    return lanes * (rows * seq_len + block_tokens)


def _lanes_and_rows(run: Run, corpus: Corpus) -> tuple[int, int]:
    """Return the largest powers of two within the limits above, so that any usual number of ranks divides the lanes."""
    curriculum = Curriculum.of(run)
    texts = {name: phase for name, phase in run.phases.items() if reads_text(phase)}
    slices = {path for name, phase in texts.items() for path in corpus.slices(phase.mix, f"phases.{name}.mix")}
    blocks = min((corpus.counts(path)["blocks"] for path in slices), default=MOST_LANES)

    def fits(lanes: int, rows: int) -> bool:
        held = {name: _buffered(lanes, rows, phase.seq_len, corpus.block_tokens) for name, phase in texts.items()}
        return all(tokens <= LEFT * curriculum.text_tokens(name) for name, tokens in held.items())

    lanes, rows = MOST_LANES, MOST_ROWS
    while lanes > 1 and lanes > blocks:
        lanes //= 2
    while lanes > ENOUGH_LANES and not fits(lanes, run.data.buffer_rows or FEWEST_ROWS):
        lanes //= 2
    lanes = run.data.lanes or lanes
    while rows > FEWEST_ROWS and not fits(lanes, rows):
        rows //= 2
    return lanes, rows


def _of_parent(checkpoint: Path) -> dict[str, int]:
    """Return the sizes of the run that a checkpoint belongs to, or nothing if it lies outside a run folder."""
    try:
        run = load(checkpoint.resolve().parent.parent)
    except FileNotFoundError:
        return {}
    return {key: _get(run, key) for key in (VOCAB, LANES, BUFFER)}


def _get(run: Run, key: str) -> Any:
    group, _, name = key.partition(".")
    holder = getattr(run, group)
    return holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
