"""Print what a folder of block shards holds: `python -m data_prep.inspect ROOT [--tokens N]`.

For each source: documents, their lengths, duplicates, and the most frequent tokens. Of a long source the first N tokens are
read. Bars show which share of the documents, and of the tokens, has a length.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from jaxtyping import Integer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from modernenc.cli import one_line_errors
from modernenc.data.blocks import VALIDATION, Corpus
from modernenc.data.store import Store

_FREQUENT = 12
"""How many of the most frequent tokens are shown."""
_BAR = 24
"""Characters of a bar that stands for all documents or tokens."""


@dataclass
class Found:
    """What was read of one source."""

    lengths: Integer[np.ndarray, " documents"]
    """Tokens of each document."""
    counts: Integer[np.ndarray, " vocab"]
    """How often each token occurs."""
    duplicates: int
    """Documents with the tokens of an earlier one."""
    whole: bool
    """Whether all of it was read."""


def inspect(root: Path, tokens: float) -> dict[str, Found]:
    """Read up to a number of tokens of each source, its held-out documents included.

    Raises FileNotFoundError or ValueError, naming the file, for what is no corpus or damaged.
    """
    corpus = Corpus(Store(str(root)), hint="prepare it with: python -m data_prep +corpus=NAME")
    return {source: _read(corpus, source, tokens) for source in corpus.sources}


def _read(corpus: Corpus, source: str, tokens: float) -> Found:
    counts, lengths = np.zeros(corpus.vocab_size, np.int64), []
    seen: set[bytes] = set()
    taken, whole = 0, True
    for document in _documents(corpus, source):
        if taken >= tokens:
            whole = False
            break
        counts += np.bincount(document, minlength=len(counts))
        lengths.append(len(document))
        seen.add(xxhash.xxh3_64_digest(document.tobytes()))
        taken += len(document)
    return Found(np.array(lengths), counts, len(lengths) - len(seen), whole)


def _documents(corpus: Corpus, source: str) -> Iterator[Integer[np.ndarray, " tokens"]]:
    for part in [*corpus.sources[source]["slices"], VALIDATION]:
        yield from corpus.open(f"{source}/{part}").documents()


def show(root: Path, found: dict[str, Found]) -> None:
    """Print the tables."""
    tokenizer = Tokenizer.from_file(str(Corpus(Store(str(root))).tokenizer_file))
    console = Console(width=100, highlight=False)
    table = _table(f"{root}: documents", "source", "documents", "tokens", "mean", "median", "95 %", "longest", "duplicates")
    for source, one in found.items():
        numbers = (one.lengths.mean(), np.median(one.lengths), np.quantile(one.lengths, 0.95), one.lengths.max())
        count = f"{len(one.lengths):,}{'' if one.whole else '+'}"
        table.add_row(source, count, f"{one.lengths.sum():,}", *(f"{x:,.0f}" for x in numbers), f"{one.duplicates:,}")
    console.print(table)
    if not all(one.whole for one in found.values()):
        console.print("+ only the first tokens were read; --tokens N reads more\n")
    for source, one in found.items():
        console.print(_lengths(source, one))
    table = _table("most frequent tokens", "source", "share of all tokens", "never used")
    for source, one in found.items():
        best = np.argsort(-one.counts, kind="stable")[:_FREQUENT]
        shares = one.counts[best] / one.counts.sum()
        shown = "  ".join(f"{tokenizer.decode([int(n)])!r} {share:.1%}" for n, share in zip(best, shares, strict=True))
        table.add_row(source, shown, f"{(one.counts == 0).mean():.0%}")
    console.print(table)


def _lengths(source: str, one: Found) -> Table:
    """Return the shares of documents and of tokens by length, a row for each power of two."""
    table = _table(f"{source}: lengths in tokens", "", "of the documents", "of the tokens")
    powers = np.log2(one.lengths).astype(int)
    for power in range(int(powers.min()), int(powers.max()) + 1):
        here = powers == power
        shares = here.mean(), one.lengths[here].sum() / one.lengths.sum()
        bars = (f"{'█' * round(_BAR * share):<{_BAR}} {share:5.1%}" for share in shares)
        table.add_row(f"{2**power:,} to {2 ** (power + 1) - 1:,}", *bars)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number and "share" not in column and "of the" not in column else "left")
    return table


def main() -> None:
    """Inspect the folder named on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, help="folder that data_prep wrote")
    parser.add_argument("--tokens", type=float, default=1e8, metavar="N", help="tokens of a source to read (%(default)g)")
    arguments = parser.parse_args()
    with one_line_errors():
        show(arguments.root, inspect(arguments.root, arguments.tokens))


if __name__ == "__main__":
    main()
