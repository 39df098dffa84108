"""Check a folder of block shards against its manifest: `python -m data_prep.verify ROOT`.

It checks every file, size and hash, the token ids, document ends and length of every block, and every count. The message names
the first fault that is found.
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from modernenc.cli import one_line_errors
from modernenc.data.blocks import VALIDATION, Block, Corpus
from modernenc.data.store import Store
from modernenc.data.tokenizer import load_tokenizer


def verify(root: Path) -> None:
    """Raise FileNotFoundError or ValueError, naming the file, for the first fault of the corpus."""
    corpus = Corpus(Store(str(root)), hint="prepare it with: python -m data_prep +corpus=NAME")
    load_tokenizer(corpus.tokenizer_file)
    folders = [f"{source}/{split}" for source, entry in corpus.sources.items() for split in [*entry["slices"], VALIDATION]]
    console = Console(stderr=True)
    for folder in track(folders, "verify", console=console, transient=True, disable=not console.is_terminal):
        for name, value in _count(corpus, folder).items():
            if value != corpus.counts(folder)[name]:
                raise ValueError(f"{root / folder}: {value} {name}, but the manifest says {corpus.counts(folder)[name]}")


def _count(corpus: Corpus, folder: str) -> Counter[str]:
    """Check every block of a folder, and return the number of blocks, tokens and cuts."""
    shards = corpus.open(folder)
    counts = Counter(blocks=0, tokens=0, cuts=0)
    for shard, size in enumerate(shards.sizes):
        shards.check(shard)
        for index in range(size):
            block = shards.read(shard, index)
            if fault := _fault(block, corpus):
                raise ValueError(f"{shards.where} shard {shard} block {index}: {fault}; prepare the data again")
            counts.update(blocks=1, tokens=len(block.tokens), cuts=block.continues)
    return counts


def _fault(block: Block, corpus: Corpus) -> str:
    """Describe what is wrong with a block; empty when nothing is."""
    if not 0 < len(block.tokens) <= corpus.block_tokens:
        return f"{len(block.tokens)} tokens, expected 1 to {corpus.block_tokens}"
    if block.tokens.max() >= corpus.vocab_size:
        return f"id {block.tokens.max()} is not in the vocabulary of {corpus.vocab_size}"
    if (np.diff(block.ends.astype(np.int64), prepend=0) <= 0).any() or block.ends[-1] != len(block.tokens):
        return "document ends do not increase up to the number of tokens"
    return ""


def main() -> None:
    """Verify the folder named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.verify", description=__doc__)
    parser.add_argument("root", type=Path, help="folder that data_prep wrote")
    root = parser.parse_args().root
    with one_line_errors():
        verify(root)
    print(f"{root}: whole")


if __name__ == "__main__":
    main()
