"""Masks are a function of (seed, row), and never fall on special tokens."""

import numpy as np
import pytest
import torch
import xxhash

from modernenc.data.batch import MicroBatch
from modernenc.data.blocks import Roles
from modernenc.data.lanes import Chunk
from modernenc.data.masking import Masker

ROLES = Roles(cls=1, sep=2, pad=3, mask=4, unk=0)
ORDINARY = np.arange(5, 1000)


def row(*lengths: int) -> list[Chunk]:
    rng = np.random.default_rng(7)
    return [Chunk(rng.choice(ORDINARY, size=length).astype(np.uint16), "a") for length in lengths]


def masked(documents: list[Chunk], *seed: int, ratio: float = 0.3) -> MicroBatch:
    return Masker(ROLES, ORDINARY, ratio).batch([documents], [seed], first_row=0).unpadded()


@pytest.mark.parametrize("ratio", [0.05, 0.15, 0.3, 0.5])
def test_the_ratio_of_text_tokens_is_predicted_and_replaced_80_10_10(ratio):
    documents = row(*[500] * 200)
    batch = masked(documents, 1, 2, ratio=ratio)
    text = np.concatenate([chunk.tokens for chunk in documents])
    assert len(batch.targets) / len(text) == pytest.approx(ratio, abs=0.01)
    seen = batch.input_ids[batch.target_positions]
    assert np.mean(seen.numpy() == ROLES.mask) == pytest.approx(0.8, abs=0.02)
    assert np.mean((seen == batch.targets).numpy()) == pytest.approx(0.1, abs=0.02)


def test_special_tokens_are_never_predicted_and_never_drawn():
    documents = row(1, 2, 3, 100, 1)
    for seed in range(50):
        batch = masked(documents, seed, ratio=0.9)
        specials = np.flatnonzero(np.isin(batch.input_ids, [ROLES.cls, ROLES.sep]))
        ends = batch.cu_seqlens.numpy()
        assert sorted([*(ends[1:] - 1), *ends[:-1]]) == specials.tolist()
        assert not np.isin(batch.target_positions, specials).any()
        assert np.isin(batch.targets, ORDINARY).all()


def test_masks_depend_on_seed_and_row_alone():
    documents, masker = row(50, 60), Masker(ROLES, ORDINARY, 0.3)
    first, other, again = (masker.batch([documents], [(1, 0, number)], first_row=0).unpadded() for number in (5, 6, 5))
    anew = masked(documents, 1, 0, 5)
    for same in (again, anew):
        assert torch.equal(first.input_ids, same.input_ids) and torch.equal(first.target_positions, same.target_positions)
    assert not torch.equal(first.target_positions, other.target_positions)


def test_masks_of_a_row_do_not_depend_on_the_other_rows():
    documents, seeds = [row(5, 9), row(30), row(1, 200, 2)], [(4,), (1, 2), (7,)]
    together = Masker(ROLES, ORDINARY, 0.3).batch(documents, seeds, first_row=0).unpadded()
    alone = [masked(one, *seed) for one, seed in zip(documents, seeds, strict=True)]
    assert torch.equal(together.input_ids, torch.cat([one.input_ids for one in alone]))
    assert torch.equal(together.targets, torch.cat([one.targets for one in alone]))


def test_a_higher_ratio_predicts_the_same_tokens_and_more():
    low, high = (set(masked(row(300), 3, ratio=ratio).target_positions.tolist()) for ratio in (0.15, 0.4))
    assert low < high


def test_a_micro_batch_lays_documents_end_to_end_and_targets_point_at_their_tokens():
    documents = [row(5, 9), row(30)]
    batch = Masker(ROLES, ORDINARY, 0.3).batch(documents, [(0,), (1,)], first_row=4).unpadded()
    assert batch.cu_seqlens.tolist() == [0, 7, 18, 50]
    assert batch.max_seqlen == 32
    assert batch.first_row == 4
    original = np.concatenate([np.concatenate([[1], chunk.tokens, [2]]) for r in documents for chunk in r])
    assert np.array_equal(batch.targets.numpy(), original[batch.target_positions.numpy()])


def test_a_row_without_a_predicted_token_is_no_error():
    assert len(masked(row(1), 0, ratio=0.001).targets) == 0
    assert Masker(ROLES, ORDINARY, 0.9).batch([], [], first_row=0).unpadded().input_ids.tolist() == [ROLES.cls, ROLES.sep]


def test_masks_do_not_change_between_versions():
    """What was trained with one version goes on with the next: a hash of what `(seed, row)` gives."""
    batch = Masker(ROLES, ORDINARY, 0.3).batch([row(300), row(20, 500)], [(17, 0, 3), (17, 1, 4)], first_row=0).unpadded()
    digest = xxhash.xxh3_64()
    for tensor in (batch.input_ids, batch.cu_seqlens, batch.target_positions, batch.targets):
        digest.update(tensor.to(torch.int64).numpy().tobytes())
    assert digest.hexdigest() == "71363d8f5c0f338d"


def test_random_tokens_are_drawn_from_all_ordinary_ones_alike():
    ordinary = np.arange(5, 15)
    documents = [Chunk(np.full(500, 5, np.uint16), "a") for _ in range(400)]
    batch = Masker(ROLES, ordinary, 0.5).batch([documents], [(3,)], first_row=0).unpadded()
    drawn = batch.input_ids[batch.target_positions].numpy()
    counts = np.bincount(drawn[(drawn != ROLES.mask) & (drawn != 5)], minlength=15)
    assert set(np.flatnonzero(counts)) == set(range(6, 15))
    assert counts[6:].max() / counts[6:].min() < 1.25


def test_everything_but_cu_seqlens_moves_to_a_device():
    batch = masked(row(30, 9), 1)
    moved = batch.to(torch.device("meta"))
    on_meta = {name for name, value in vars(moved).items() if isinstance(value, torch.Tensor) and value.is_meta}
    assert on_meta == {"input_ids", "target_positions", "targets"}
    assert moved.cu_seqlens is batch.cu_seqlens
    assert (moved.max_seqlen, moved.first_row, moved.objective) == (batch.max_seqlen, batch.first_row, batch.objective)
