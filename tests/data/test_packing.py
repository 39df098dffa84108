"""Documents -> chunks -> rows."""

import json

import numpy as np
import pytest

from modernenc.data.blocks import Block
from modernenc.data.packing import SPECIALS, cut, pack
from support.commands import ROOT

SHARED = ROOT.parent / "shared" / "data"


def block(lengths: list[int]) -> Block:
    ends = np.cumsum(lengths).astype(np.uint32)
    return Block(np.arange(ends[-1], dtype=np.uint32), ends, continues=False)


def test_cutting_keeps_every_token_in_order():
    documents = [1, 5, 62, 63, 124, 125, 300]
    chunks = cut(block(documents), seq_len=64)
    assert max(map(len, chunks)) == 62
    assert np.array_equal(np.concatenate(chunks), np.arange(sum(documents)))
    assert len(chunks) == sum(-(-length // 62) for length in documents)


def test_a_chunk_never_spans_two_documents():
    chunks = cut(block([10, 20, 30]), seq_len=64)
    assert [len(chunk) for chunk in chunks] == [10, 20, 30]


@pytest.mark.parametrize("seed", range(20))
def test_packing_places_each_item_once_and_overfills_no_row(seed):
    rng = np.random.default_rng(seed)
    seq_len = int(rng.integers(8, 2000))
    lengths = rng.integers(3, seq_len + 1, size=int(rng.integers(1, 400))).tolist()
    rows = pack(lengths, seq_len)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert max(sum(lengths[item] for item in row) for row in rows) <= seq_len


def best_fit_decreasing(lengths: list[int], seq_len: int) -> list[list[int]]:
    """The definition: the longest item first, each into the row that it leaves the least room in; of equals, the first."""
    rows: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        left = [seq_len - sum(lengths[other] for other in row) - lengths[item] for row in rows]
        fitting = [row for row in range(len(rows)) if left[row] >= 0]
        if fitting:
            rows[min(fitting, key=lambda row: left[row])].append(item)
        else:
            rows.append([item])
    return rows


@pytest.mark.parametrize("seed", range(10))
def test_each_item_goes_where_it_leaves_the_least_room(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, int(rng.integers(8, 130)), size=150).tolist()
    assert pack(lengths, 128) == best_fit_decreasing(lengths, 128)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="the shared text is not here")
@pytest.mark.parametrize(("seq_len", "least"), [(1024, 0.995), (8192, 0.998)])
def test_buffers_of_512_rows_of_real_text_leave_few_gaps(seq_len, least):
    """Whole documents in random order, windows as lanes draw them; also the book-length ones."""
    zstandard = pytest.importorskip("zstandard")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(SHARED / "tokenizers" / "modernbert" / "tokenizer.json"))
    texts = []
    for path in sorted((SHARED / "pretrain").rglob("train*.jsonl.zst")):
        with zstandard.open(path, "rt") as file:
            texts += [json.loads(line)["text"] for line in file]
    lengths = [len(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    order = np.random.default_rng(0).permutation(len(lengths))
    documents = np.concatenate([np.asarray(lengths)[order]] * 2)  # twice the corpus, so that 8192 fills a window too
    filled = served = 0
    window: list[int] = []
    for length in documents.tolist():
        longest = seq_len - SPECIALS
        window += [min(longest, length - at) + SPECIALS for at in range(0, length, longest)]
        if sum(window) >= 512 * seq_len:
            filled += sum(window)
            served += len(pack(window, seq_len)) * seq_len
            window = []
    assert served
    print(f"fill at {seq_len}: {filled / served:.4f}")
    assert filled / served >= least
