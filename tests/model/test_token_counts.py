"""The first weights of a run that are counted in its text: frequencies of tokens, and which tokens stand beside which."""

import math
from collections import Counter
from itertools import product

import pytest
import torch

from modernenc.data.blocks import Corpus
from modernenc.evaluation.validation import Validator
from modernenc.model.build import build_objectives
from modernenc.model.token_counts import (
    OFFSETS,
    RELIABLE,
    SIGNAL,
    init_decoder_bias_from_unigrams,
    mutual_information,
    neighbour_vectors,
)
from modernenc.planning.checks import check_run
from modernenc.run_folder.tables import Table
from modernenc.training.module import Pretraining
from support.runs import train


@pytest.mark.parametrize("recipe", ["demo", "demo_mega"])
def test_a_run_may_start_from_the_frequencies_of_tokens(small_run, recipe):
    run = small_run("init.unigram=true", "validation.tokens_per_source=4096", recipe=recipe)
    check_run(run)
    corpus, losses = Corpus.of(run.data), {}
    validator = Validator(run, corpus)
    model = build_objectives(run).masked_lm
    for when in ("random", "unigram"):
        losses[when] = {score.source: score.loss for score in validator.scores_at_reference(model)}
        init_decoder_bias_from_unigrams(model, run, corpus)
    for source in corpus.sources:  # data_prep counted all of the text, each source by its size
        assert abs(losses["unigram"][source] - corpus.sources[source]["validation"]["unigram_nats"]) < 0.25
        assert losses["random"][source] > losses["unigram"][source] + 0.3
    first = float(Table(train(run) / "metrics.csv").read()[0]["loss"])
    assert first < losses["random"]["all"] - 0.3


def test_mutual_information_is_that_of_its_definition():
    tokens, vocab = torch.randint(7, (400,), generator=torch.Generator().manual_seed(0)), 9
    found = mutual_information(tokens, vocab).to_dense()
    pairs = Counter(
        (tokens[at].item(), place, tokens[at + offset].item())
        for place, offset in enumerate(OFFSETS)
        for at in range(len(tokens))
        if 0 <= at + offset < len(tokens)
    )
    total, of_token, of_neighbour = sum(pairs.values()), Counter(), Counter()
    for (token, place, neighbour), n in pairs.items():
        of_token[token] += n
        of_neighbour[place, neighbour] += n
    frequent = torch.bincount(tokens, minlength=vocab).argsort(descending=True, stable=True).tolist()
    for token, (place, (column, neighbour)) in product(range(vocab), product(range(len(OFFSETS)), enumerate(frequent))):
        n = pairs[token, place, neighbour]
        nats = math.log(n * total / ((of_token[token] + 1) * (of_neighbour[place, neighbour] + 1))) if n else 0.0
        expected = max(0.0, nats) * min(1.0, (n / RELIABLE) ** 0.5)
        assert found[token, place * vocab + column].item() == pytest.approx(expected, abs=1e-5)


def test_tokens_of_the_same_neighbours_begin_alike():
    """Sentences of an article, one of four nouns, and one of four verbs; the tenth token is never there."""
    draw = torch.Generator().manual_seed(0)
    nouns, verbs = (torch.randint(4, (20_000,), generator=draw) + first for first in (1, 5))
    tokens = torch.stack((torch.zeros(20_000, dtype=torch.long), nouns, verbs), dim=1).flatten()
    vectors = neighbour_vectors(tokens, 10, 6, seed=0)
    alike = vectors @ vectors.T / 6
    assert vectors[9].eq(0).all() and torch.allclose(alike.diagonal()[:9], torch.ones(9), atol=1e-4)
    assert alike[1:5, 1:5].min() > 0.9 and alike[5:9, 5:9].min() > 0.9 and alike[1:5, 5:9].max() < 0.5
    assert torch.equal(vectors, neighbour_vectors(tokens, 10, 6, seed=0))


@pytest.mark.parametrize("recipe", ["demo", "demo_mega"])
def test_a_run_may_start_from_the_neighbours_of_tokens(small_run, recipe):
    run = small_run("init.neighbours=true", recipe=recipe)
    curriculum, corpus = check_run(run)
    torch.manual_seed(0)
    before = build_objectives(run).masked_lm.decoder.weight.detach().clone()
    torch.manual_seed(0)
    after = Pretraining(run, curriculum, corpus).objectives.backbone.token_embeddings().weight.detach()
    assert float(after.std()) == pytest.approx(float(before.std()), rel=0.05)
    told = (before != after).any(1)  # the others were not in the text that was counted
    assert told.float().mean() > 0.5
    alike = torch.nn.functional.cosine_similarity(before[told].flatten(), after[told].flatten(), dim=0)
    assert float(alike) == pytest.approx((1 - SIGNAL) ** 0.5, abs=0.1)
