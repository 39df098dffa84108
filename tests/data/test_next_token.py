"""Causal LM: each text token is predicted from those before it in its document, and from nothing else."""

import numpy as np
import pytest
import torch

from modernenc.backbones.modernbert import ModernBERT
from modernenc.curriculum import CAUSAL_LM, Curriculum
from modernenc.data.blocks import Roles
from modernenc.data.lanes import Chunk
from modernenc.data.loader import Steps
from modernenc.data.next_token import next_token_batch
from modernenc.data.state import DataState
from modernenc.objectives.masked_lm import MaskedLM
from modernenc.planning.checks import check_run

ROLES = Roles(cls=1, sep=2, pad=3, mask=4, unk=0)


def test_each_text_token_is_predicted_from_the_one_before_it():
    first, second, third = (Chunk(np.array(ids, np.uint16), "a") for ids in ([10, 11, 12], [20], [30, 31]))
    rows = [[first, second], [third]]
    batch = next_token_batch(rows, ROLES, first_row=4).unpadded()
    assert batch.input_ids.tolist() == [1, 10, 11, 12, 2, 1, 20, 2, 1, 30, 31, 2]
    assert batch.target_positions.tolist() == [0, 1, 2, 5, 8, 9]
    assert batch.targets.tolist() == [10, 11, 12, 20, 30, 31]
    assert (batch.objective, batch.first_row) == (CAUSAL_LM, 4)
    assert next_token_batch([], ROLES, 0).unpadded().input_ids.tolist() == [ROLES.cls, ROLES.sep]


def test_the_loss_is_the_likelihood_of_each_token_given_its_prefix():
    torch.manual_seed(0)
    model = MaskedLM(ModernBERT(64, 32, 48, 4, 2, 128, 10_000.0, 10_000.0, init_std=0.3)).double()
    text = np.random.default_rng(0).integers(5, 64, 70).astype(np.uint16)
    batch = next_token_batch([[Chunk(text[:50], "a"), Chunk(text[50:], "a")]], ROLES, 0)
    with torch.no_grad():
        loss, _ = model(batch)
    expected = 0.0
    for part in (text[:50], text[50:]):
        ids = torch.tensor([ROLES.cls, *part.tolist()])
        for end in range(1, len(ids)):  # one prefix at a time, which nothing after it can reach
            hidden = model.backbone(ids[:end], torch.tensor([0, end], dtype=torch.int32), end, causal=True)
            expected -= model.decoder(model.head(hidden[-1:])).log_softmax(-1)[0, ids[end]].item()
    assert float(loss) == pytest.approx(expected, rel=1e-9)


def test_a_phase_begins_causally_on_the_same_rows(small_run):
    """Rows, their order and the steps are those of masked LM alone: only what is predicted changes."""
    plain, causal = small_run(), small_run("phases.stable.causal_share=0.5", "phases.decay.causal_share=1")
    steps = {}
    for name, run in (("plain", plain), ("causal", causal)):
        _, corpus = check_run(run)
        steps[name] = list(Steps(run, Curriculum.of(run), corpus, 0, 1, DataState()))
    curriculum = Curriculum.of(causal)
    for before, after, spec in zip(steps["plain"], steps["causal"], curriculum.steps(), strict=True):
        start, end = curriculum.start_of(spec.phase), curriculum.end_of(spec.phase)
        half = start + causal.phases["stable"].tokens / 2
        expected = spec.tokens_seen < half if spec.phase == "stable" else spec.phase == "decay"
        assert (spec.objective == CAUSAL_LM) is expected and spec.tokens_seen < end
        assert before.state == after.state
        for one, other in zip(before.micro_batches, after.micro_batches, strict=True):
            assert torch.equal(one.cu_seqlens, other.cu_seqlens)
            if expected:
                documents = len(other.unpadded().cu_seqlens) - 1
                assert (other.objective, len(other.targets)) == (CAUSAL_LM, other.num_tokens - 2 * documents)
            else:
                assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.targets, other.targets)
