"""Start the decoder's bias at the frequencies of tokens."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Integer

from modernenc.config import Run
from modernenc.curriculum import reads_text
from modernenc.data.blocks import Corpus, Shards

COUNTED_TOKENS = 1 << 20
"""Tokens of each slice that are counted for frequencies, at least."""


@torch.no_grad()
def init_decoder_bias_from_unigrams(model: Any, run: Run, corpus: Corpus) -> None:
    """Let an untrained `MaskedLM` predict each token by its frequency: Meister et al. 2023, arXiv:2212.09686.

    Frequencies are counted in the first blocks of each slice in the first mix, plus one for each token. The bias is 0 for a
    token as rare as the average token that was read, because bf16 resolves logits near 0 best.
    """
    size = len(model.decoder.bias)
    phase = next(phase for phase in run.phases.values() if reads_text(phase))
    frequencies, read = np.zeros(size), 0
    for name, share in corpus.slices(phase.mix).items():
        counts = _count_tokens(corpus.open(name), size)
        frequencies += share * counts / counts.sum()
        read += counts.sum()
    frequencies = (frequencies * read + 1) / (read + size)
    nats = np.log(frequencies)
    model.decoder.bias.copy_(torch.from_numpy(nats - frequencies @ nats))


def _count_tokens(shards: Shards, size: int) -> Integer[np.ndarray, " vocab"]:
    """Return how often each token occurs in the first blocks."""
    counts = np.zeros(size, np.int64)
    for shard, index in ((shard, index) for shard, blocks in enumerate(shards.sizes) for index in range(blocks)):
        counts += np.bincount(shards.read(shard, index).tokens, minlength=size)
        if counts.sum() >= COUNTED_TOKENS:
            break
    return counts
