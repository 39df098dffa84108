"""Start weights from what is counted in the text: how often each token occurs, and which tokens stand beside it."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn

from modernenc.config import Run
from modernenc.curriculum import reads_text
from modernenc.data.blocks import Corpus, Shards

COUNTED_TOKENS = 1 << 20
"""Tokens of each slice that are counted for frequencies, at least."""
COUNTED_FOR_NEIGHBOURS = 1 << 22
"""Tokens that are counted for neighbours, at most."""
OFFSETS = (-2, -1, 1, 2)
"""Places of the neighbours that are counted."""
NEIGHBOURS = 4_096
"""Frequent tokens that are counted as neighbours."""
RELIABLE = 5
"""Times that two tokens must stand beside each other for their count to be believed."""
SIGNAL = 0.96
"""Share of an embedding's variance that tells its neighbours; the rest stays random."""


@torch.no_grad()
def init_decoder_bias_from_unigrams(model: Any, run: Run, corpus: Corpus) -> None:
    """Let an untrained `MaskedLM` predict each token by its frequency: Meister et al. 2023, arXiv:2212.09686.

    Frequencies are counted in the first blocks of each slice in the first mix, plus one for each token. The bias is 0 for a
    token as rare as the average token that was read, because bf16 resolves logits near 0 best.
    """
    size = len(model.decoder.bias)
    frequencies, read = np.zeros(size), 0
    for name, share in _first_mix(run, corpus).items():
        counts = np.zeros(size, np.int64)
        for tokens in _first_blocks(corpus.open(name), COUNTED_TOKENS):
            counts += np.bincount(tokens, minlength=size)
        frequencies += share * counts / counts.sum()
        read += counts.sum()
    frequencies = (frequencies * read + 1) / (read + size)
    nats = np.log(frequencies)
    model.decoder.bias.copy_(torch.from_numpy(nats - frequencies @ nats))


@torch.no_grad()
def init_embeddings_from_neighbours(model: Any, run: Run, corpus: Corpus) -> None:
    """Let the embeddings of an untrained `MaskedLM` be alike for tokens that stand beside the same tokens.

    They are the principal components of the positive pointwise mutual information of tokens and their neighbours by place: Levy
    and Goldberg 2014, "Neural word embedding as implicit matrix factorization". What the model would learn first, and slowly,
    is so known after seconds. As many tokens are counted as the run trains on, `COUNTED_FOR_NEIGHBOURS` at most.
    """
    wanted = min(COUNTED_FOR_NEIGHBOURS, sum(phase.tokens for phase in run.phases.values() if reads_text(phase)))
    text = [
        tokens for name, share in _first_mix(run, corpus).items() for tokens in _first_blocks(corpus.open(name), share * wanted)
    ]
    embedding = model.backbone.token_embeddings().weight
    tokens, (vocab_size, size) = torch.from_numpy(np.concatenate(text).astype(np.int64)), embedding.shape
    vectors = neighbour_vectors(tokens, vocab_size, size, run.seed)
    known = vectors.any(1)
    for weight in dict.fromkeys((embedding, model.decoder.weight)):  # one, if they are tied
        weight[known] = (1 - SIGNAL) ** 0.5 * weight[known] + SIGNAL**0.5 * float(weight.std()) * vectors[known]


def neighbour_vectors(
    tokens: Int[Tensor, " tokens"], vocab_size: int, size: int, seed: int
) -> Float[Tensor, "vocab_size size"]:
    """Return a vector of a mean square of 1 for each token that has neighbours, and zeros for the others."""
    information = mutual_information(tokens, vocab_size)
    rank = min(size, *information.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        left, singular, _ = torch.svd_lowrank(information, q=rank, niter=2)
        turn = torch.linalg.qr(torch.randn(size, size))[0][:rank]  # spreads what the first components say over all dimensions
    return nn.functional.normalize((left * singular) @ turn) * size**0.5


def mutual_information(tokens: Int[Tensor, " tokens"], vocab_size: int) -> Tensor:
    """Return the positive pointwise mutual information of each token and each neighbour, by place: sparse, in nats.

    It is (vocab_size, places x neighbours). What was counted less than `RELIABLE` times is shrunk, by the square root.
    """
    kept = min(NEIGHBOURS, vocab_size)
    frequent = torch.bincount(tokens, minlength=vocab_size).argsort(descending=True, stable=True)[:kept]
    column = torch.full((vocab_size,), -1).index_copy(0, frequent, torch.arange(kept))
    pairs = []
    for place, offset in enumerate(OFFSETS):
        start, end = max(0, -offset), len(tokens) - max(0, offset)
        found = column[tokens[start + offset : end + offset]]
        pairs.append(torch.stack((tokens[start:end], found + place * kept))[:, found >= 0])
    places, shape = torch.cat(pairs, dim=1), (vocab_size, len(OFFSETS) * kept)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse")  # that it is in beta, and that its indices are not checked
        counts = torch.sparse_coo_tensor(places, torch.ones(places.shape[1]), shape).coalesce()
        (rows, columns), n = counts.indices(), counts.values()
        of_token, of_neighbour = (
            torch.ones(total).index_add(0, where, n) for total, where in zip(shape, (rows, columns), strict=True)
        )
        nats = (n * n.sum() / (of_token[rows] * of_neighbour[columns])).log().clamp(min=0)
        nats *= (n / RELIABLE).sqrt().clamp(max=1)
        return torch.sparse_coo_tensor(counts.indices(), nats, shape, is_coalesced=True).to_sparse_csr()


def _first_mix(run: Run, corpus: Corpus) -> dict[str, float]:
    """Return the slices of the first phase that reads text, with their shares."""
    return corpus.slices(next(phase for phase in run.phases.values() if reads_text(phase)).mix)


def _first_blocks(shards: Shards, wanted: float) -> Iterator[Integer[np.ndarray, " tokens"]]:
    """Yield the tokens of the first blocks of a slice, until there are as many as wanted."""
    for shard, index in ((shard, index) for shard, blocks in enumerate(shards.sizes) for index in range(blocks)):
        tokens = shards.read(shard, index).tokens
        yield tokens
        wanted -= len(tokens)
        if wanted <= 0:
            return
