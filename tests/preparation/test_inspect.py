"""What `data_prep.inspect` counts in a corpus is what another encoding of its text has."""

import re
from collections import Counter
from itertools import chain

import numpy as np
from tokenizers import Tokenizer

from data_prep.build import build
from data_prep.inspect import inspect
from modernenc.data.blocks import Shards
from support.commands import command
from support.corpora import corpus, jsonl, texts, write_jsonl


def test_documents_lengths_and_tokens_are_those_of_another_encoding(tmp_path):
    written = texts(60, 1)
    write_jsonl(tmp_path / "a" / "0.jsonl", written)
    build(corpus(tmp_path / "out", {"a": jsonl(tmp_path / "a")}, block_tokens=64))  # many documents go over blocks
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    encoded = [tokenizer.encode(text, add_special_tokens=False).ids for text in set(written)]
    (found,) = inspect(tmp_path / "out", 1e9).values()
    assert sorted(found.lengths.tolist()) == sorted(map(len, encoded)) and max(map(len, encoded)) > 64
    assert Counter({n: int(count) for n, count in enumerate(found.counts) if count}) == Counter(chain.from_iterable(encoded))
    assert (found.duplicates, found.whole) == (0, True)
    (part,) = inspect(tmp_path / "out", 100).values()
    assert not part.whole and 100 <= part.lengths.sum() < 100 + max(map(len, encoded))


def test_tables_show_shares_and_duplicates(tmp_path, monkeypatch, corpus_root):
    result = command("data_prep.inspect", str(corpus_root))
    assert result.returncode == 0 and result.stderr == ""
    for source in ("code", "docstrings", "reference"):
        shares = (
            result.stdout.split(f"{source}: lengths in tokens")[1].partition(": lengths in")[0].partition("most frequent")[0]
        )
        of_documents, of_tokens = np.array(re.findall(r"([\d.]+)%.*?([\d.]+)%", shares), float).T
        assert abs(of_documents.sum() - 100) < 1 and abs(of_tokens.sum() - 100) < 1
    assert max(map(len, result.stdout.splitlines())) <= 100
    documents = [np.array([1, 2]), np.array([3]), np.array([1, 2])]
    monkeypatch.setattr(Shards, "documents", lambda shards: iter(documents))
    assert [one.duplicates for one in inspect(corpus_root, 5).values()] == [1, 1, 1]
    wrong = command("data_prep.inspect", str(tmp_path))
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1
