"""Sizes that a recipe leaves to its corpus, by a 0: the vocabulary, and how many lanes hold how many rows.

They follow from the recipe and the corpus alone, are settled before all else, and stand in the run's `config.yaml`.
"""

from pathlib import Path
from typing import Any

from modernenc.config import Data, Phase, Run, load
from modernenc.curriculum import Curriculum, reads_text
from modernenc.data.blocks import Corpus

VOCAB = "backbone.vocab_size"
LANES = "data.lanes"
BUFFER = "data.buffer_rows"

MOST_LANES, ENOUGH_LANES = 64, 16
"""So many lanes, unless a slice has fewer blocks, or buffers would hold too much: then fewer, but not below the second."""
MOST_ROWS, FEWEST_ROWS = 512, 8
"""Rows of a packing buffer, likewise: 512 leave 0.5 % of the rows' room empty at 1,024 tokens; in fewer there is more."""
LEFT = 0.05
"""Share of a phase's tokens that may remain in buffers when it ends, where lanes and rows can be chosen so."""
MULTIPLE = 64
"""Of the vocabulary: matrix products work in tiles."""
UNKNOWN_VOCAB = 8_192
"""Assumed for a plan as long as there is no corpus; lanes and rows are then as for a large one."""


def settle_sizes(run: Run) -> None:
    """Fill in the sizes that are 0, and say in `data.from_corpus` which.

    A branch has those of the run that it leaves. Without a corpus, which a run refuses and a plan does not, they are assumed.
    ValueError where the corpus lacks what the phases' mixes name.
    """
    asked = [key for key in (VOCAB, LANES, BUFFER) if _get(run, key) == 0]
    if not asked or run.rehearse:  # which has sizes of its own
        return
    sizes = _of_parent(Path(run.branch_from)) if run.branch_from else {}
    if not sizes:
        corpus = corpus_of(run.data)
        sizes = {VOCAB: UNKNOWN_VOCAB, LANES: MOST_LANES, BUFFER: MOST_ROWS}
        if corpus:
            sizes[VOCAB] = -(-corpus.vocab_size // MULTIPLE) * MULTIPLE
            if asked != [VOCAB]:
                sizes[LANES], sizes[BUFFER] = _lanes_and_rows(run, corpus)
    for key in asked:
        group, _, name = key.partition(".")
        if group == "data":
            setattr(run.data, name, sizes[key])
        else:
            run.backbone[name] = sizes[key]
    run.data.from_corpus = asked


def corpus_of(data: Data) -> Corpus | None:
    """What data_prep made, if it has."""
    try:
        return Corpus.of(data)
    except FileNotFoundError:
        return None


def tokens_in_buffers(run: Run, phase: Phase, block_tokens: int) -> int:
    """Tokens, at most, that lanes have drawn and not yet served when a phase ends: a buffer and the rest of a block each."""
    if not reads_text(phase):
        return 0
    return _held(run.data.lanes, run.data.buffer_rows, phase.seq_len, block_tokens)


def _held(lanes: int, rows: int, seq_len: int, block_tokens: int) -> int:
    return lanes * (rows * seq_len + block_tokens)


def _lanes_and_rows(run: Run, corpus: Corpus) -> tuple[int, int]:
    """The largest powers of two within the limits above: so any usual number of ranks divides the lanes."""
    curriculum = Curriculum.of(run)
    texts = {name: phase for name, phase in run.phases.items() if reads_text(phase)}
    slices = {path for name, phase in texts.items() for path in corpus.slices(phase.mix, f"phases.{name}.mix")}
    blocks = min((corpus.counts(path)["blocks"] for path in slices), default=MOST_LANES)

    def fits(lanes: int, rows: int) -> bool:
        held = {name: _held(lanes, rows, phase.seq_len, corpus.block_tokens) for name, phase in texts.items()}
        return all(tokens <= LEFT * curriculum.text_of(name) for name, tokens in held.items())

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
    """The sizes of the run that a checkpoint lies in; none where it lies alone."""
    try:
        run = load(checkpoint.resolve().parent.parent)
    except FileNotFoundError:
        return {}
    return {key: _get(run, key) for key in (VOCAB, LANES, BUFFER)}


def _get(run: Run, key: str) -> Any:
    group, _, name = key.partition(".")
    holder = getattr(run, group)
    return holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
