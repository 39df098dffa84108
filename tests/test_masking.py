"""Masks are a function of (seed, row), and never fall on special tokens."""

import numpy as np
import pytest

from modernenc.data.blocks import Roles
from modernenc.data.lanes import Chunk
from modernenc.data.masking import Masker, collate

ROLES = Roles(cls=1, sep=2, pad=3, mask=4, unk=0)
ORDINARY = np.arange(5, 1000)


def row(*lengths: int) -> list[Chunk]:
    rng = np.random.default_rng(7)
    return [Chunk(rng.choice(ORDINARY, size=length).astype(np.uint16), "a") for length in lengths]


@pytest.mark.parametrize("ratio", [0.05, 0.15, 0.3, 0.5])
def test_the_ratio_of_text_tokens_is_predicted_and_replaced_80_10_10(ratio):
    masker = Masker(ROLES, ORDINARY, ratio)
    documents = row(*[500] * 200)
    masked = masker.mask(documents, (1, 2))
    text = np.concatenate([chunk.tokens for chunk in documents])
    share = len(masked.targets) / len(text)
    assert share == pytest.approx(ratio, abs=0.01)
    seen = masked.input_ids[masked.target_positions]
    assert np.mean(seen == ROLES.mask) == pytest.approx(0.8, abs=0.02)
    assert np.mean(seen == masked.targets) == pytest.approx(0.1, abs=0.02)


def test_special_tokens_are_never_predicted_and_never_drawn():
    masker = Masker(ROLES, ORDINARY, 0.9)
    documents = row(1, 2, 3, 100, 1)
    for seed in range(50):
        masked = masker.mask(documents, (seed,))
        specials = np.flatnonzero(np.isin(masked.input_ids, [ROLES.cls, ROLES.sep]))
        ends = np.cumsum(masked.lengths)
        assert sorted([*(ends - 1), 0, *ends[:-1]]) == specials.tolist()
        assert not np.isin(masked.target_positions, specials).any()
        assert np.isin(masked.targets, ORDINARY).all()


def test_masks_depend_on_seed_and_row_alone():
    documents = row(50, 60)
    first = Masker(ROLES, ORDINARY, 0.3).mask(documents, (1, 0, 5))
    np.random.default_rng(0).random(100)
    again = Masker(ROLES, ORDINARY, 0.3).mask(documents, (1, 0, 5))
    other = Masker(ROLES, ORDINARY, 0.3).mask(documents, (1, 0, 6))
    assert np.array_equal(first.input_ids, again.input_ids)
    assert not np.array_equal(first.target_positions, other.target_positions)


def test_a_higher_ratio_predicts_the_same_tokens_and_more():
    documents = row(300)
    low = set(Masker(ROLES, ORDINARY, 0.15).mask(documents, (3,)).target_positions.tolist())
    high = set(Masker(ROLES, ORDINARY, 0.4).mask(documents, (3,)).target_positions.tolist())
    assert low < high


def test_a_micro_batch_lays_documents_end_to_end_and_targets_point_at_their_tokens():
    masker = Masker(ROLES, ORDINARY, 0.3)
    documents = [row(5, 9), row(30)]
    masked = [masker.mask(documents[n], (n,)) for n in range(2)]
    batch = collate(masked, first_row=4)
    assert batch.cu_seqlens.tolist() == [0, 7, 18, 50]
    assert batch.max_seqlen == 32
    assert batch.first_row == 4
    original = np.concatenate([np.concatenate([[1], chunk.tokens, [2]]) for r in documents for chunk in r])
    assert np.array_equal(batch.targets.numpy(), original[batch.target_positions.numpy()])


def test_a_row_without_a_predicted_token_is_no_error():
    masker = Masker(ROLES, ORDINARY, 0.001)
    batch = collate([masker.mask(row(1), (0,))], first_row=0)
    assert len(batch.targets) == 0
