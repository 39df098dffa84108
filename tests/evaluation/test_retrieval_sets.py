"""Sets for retrieval: what is read, how rankings of it are scored, and what BM25 finds."""

import gzip
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from modernenc import installed
from modernenc.suites import bm25
from modernenc.suites.rankings import merge, values_of
from modernenc.suites.retrieval_sets import RetrievalSet, find_sets, read_set
from support.commands import ROOT
from support.retrieval import WORDS, write_beir, write_lines, write_qrels

DATA = ROOT.parent / "shared" / "data" / "eval" / "retrieval"
"""Cranfield and others in BEIR's layout, whose figures under BM25 are known."""


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    return write_beir(tmp_path / "sets" / "small")


# What is read


def test_titles_precede_texts_and_splits_are_told_apart(beir: Path) -> None:
    items = read_set(beir)
    first = json.loads((beir / "corpus.jsonl").read_text().splitlines()[0])
    assert items.corpus["d0"] == f"{first['title']} {first['text']}"
    assert (min(items.train), min(items.test), len(items.test)) == ("q0", "q20", 20)


def test_compressed_files_are_read_and_dev_counts_where_there_is_no_test(beir: Path) -> None:
    before = read_set(beir)
    for path in (beir / "corpus.jsonl", beir / "queries.jsonl"):
        with gzip.open(f"{path}.gz", "wt") as file:
            file.write(path.read_text())
        path.unlink()
    (beir / "qrels/test.tsv").rename(beir / "qrels/dev.tsv")
    after = read_set(beir)
    assert (after.corpus, after.queries, after.test) == (before.corpus, before.queries, before.test)


def test_sets_are_found_two_folders_deep_and_by_name(beir: Path) -> None:
    root = beir.parents[1]
    (root / "sets/other").mkdir()
    assert find_sets(root) == find_sets(root, ["Small"]) == [beir]
    assert find_sets(beir) == [beir]
    with pytest.raises(FileNotFoundError, match=r"--tasks large: .* has small"):
        find_sets(root, ["large"])
    with pytest.raises(FileNotFoundError, match=r"no set; expected folders that hold corpus.jsonl"):
        find_sets(root / "sets/other")


HEADER = "query-id\tcorpus-id\tscore\n"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("qrels/test.tsv", "q20\td20\t1\n", "test.tsv, line 1: q20\td20\t1: expected the header query-id, corpus-id, score"),
        (
            "qrels/test.tsv",
            f"{HEADER}q99\td20\t1\n",
            "line 2: no query has the id q99; expected one of queries.jsonl",
        ),
        (
            "qrels/test.tsv",
            f"{HEADER}q20\td99\t1\n",
            "line 2: no document has the id d99; expected one of corpus.jsonl",
        ),
        ("qrels/test.tsv", f"{HEADER}q20\td20\n", "line 2: 2 fields; expected 3 between tabs"),
        ("qrels/test.tsv", f"{HEADER}q20\td20\tyes\n", "line 2: score yes: expected a whole number"),
        ("qrels/test.tsv", f"{HEADER}q20\td20\t1\nq20\td20\t2\n", "line 3: another score for query q20"),
        ("qrels/test.tsv", f"{HEADER}q20\td20\t0\n", "test.tsv: no query has a relevant document"),
        ("corpus.jsonl", "", "corpus.jsonl is empty: expected a line of JSON for each text"),
        ("corpus.jsonl", '{"_id": "a", "text": "b"}\n{"_id": "a", "text": "c"}\n', "line 2: _id=a comes twice"),
        ("corpus.jsonl", '{"_id": "a"}\n', "line 1: text is missing; there are _id"),
        ("queries.jsonl", "[1]\n", "queries.jsonl, line 1: expected a JSON object"),
        ("queries.jsonl", "{", "queries.jsonl, line 1: Expecting"),
        (
            "scores.jsonl",
            '{"query_id": "q1", "document_ids": ["d1"], "scores": [1, 2]}\n',
            "expected query_id, and as many",
        ),
        ("scores.jsonl", '{"query_id": "q1", "document_ids": ["d1", "d99"], "scores": [1, 2]}\n', "no document has the id d99"),
        ("scores.jsonl", '{"query_id": "q1", "document_ids": ["d1", "d2"], "scores": [1, "x"]}\n', "line 1: scores holds x"),
    ],
)
def test_what_is_no_set_is_named_by_file_and_line(beir: Path, file: str, content: str, message: str) -> None:
    (beir / file).write_text(content)
    with pytest.raises(ValueError) as error:
        read_set(beir)
    assert message in str(error.value)


def test_files_that_are_missing_are_named(beir: Path) -> None:
    (beir / "qrels/test.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"qrels: neither test.tsv nor dev.tsv, so nothing to score"):
        read_set(beir)
    (beir / "queries.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"small: no queries.jsonl"):
        read_set(beir)


def test_queries_without_a_relevant_text_are_left_out_and_said(beir: Path) -> None:
    write_qrels(beir / "qrels/test.tsv", [("q1", "d1", 1), ("q2", "d2", 0), ("q1", "d3", -1)])
    items = read_set(beir)
    assert items.test == {"q1": {"d1": 1}}
    assert items.notes == (f"{beir}/qrels/test.tsv: 1 queries without a relevant document are left out",)


def write_mldr(folder: Path) -> Path:
    texts = {number: " ".join(WORDS[5 * number : 5 * number + 5]) for number in range(8)}
    write_lines(folder / "corpus.jsonl", ({"docid": f"d{number}", "text": texts[number]} for number in range(6)))

    def passages(*numbers: int) -> list[dict[str, str]]:
        return [{"docid": f"d{number}", "text": texts[number]} for number in numbers]

    def query(number: int, positive: int, *negatives: int) -> dict[str, object]:
        return {
            "query_id": f"q{number}", "query": texts[positive].split()[0], "positive_passages": passages(positive),
            "negative_passages": passages(*negatives),
        }  # fmt: skip

    write_lines(folder / "test.jsonl", [query(0, 0, 1), query(1, 2, 3)])
    write_lines(folder / "train.jsonl", [query(2, 6, 7), query(3, 4, 5)])
    return folder


def test_passages_of_mldr_are_judgements_and_hard_negatives(tmp_path: Path) -> None:
    items = read_set(write_mldr(tmp_path / "mldr"))
    assert (items.test, items.train) == ({"q0": {"d0": 1}, "q1": {"d2": 1}}, {"q2": {"d6": 1}, "q3": {"d4": 1}})
    assert set(items.corpus) == {f"d{number}" for number in range(6)}
    assert bm25.hard_negatives(items, 1) == {"q2": ["d7"], "q3": ["d5"]}
    assert [row["positive"] for row in bm25.pairs(items, 1)] == [items.unranked["d6"], items.corpus["d4"]]


def test_a_passage_of_mldr_that_no_text_has_is_named(tmp_path: Path) -> None:
    folder = write_mldr(tmp_path / "mldr")
    write_lines(folder / "test.jsonl", [{"query_id": "q", "query": "a", "positive_passages": [{"docid": "d9", "text": "b"}]}])
    with pytest.raises(ValueError, match=r"test.jsonl, line 1: no document has the id d9"):
        read_set(folder)


def test_each_query_of_cosqa_looks_for_its_code_among_all(tmp_path: Path) -> None:
    rows = [("sort a list", "sorted(x)", 1), ("sort a list", "x.sort()", 1), ("sum", "sorted(x)", 0), ("sum", "sum(x)", 1)]
    write_lines(tmp_path / "dev.jsonl", ({"query": query, "code": code, "label": label} for query, code, label in rows))
    items = read_set(tmp_path)
    assert sorted(items.corpus.values()) == ["sorted(x)", "sum(x)", "x.sort()"]
    assert [[items.corpus[one] for one in of] for of in items.test.values()] == [["sorted(x)", "x.sort()"], ["sum(x)"]]
    write_lines(tmp_path / "dev.jsonl", [{"query": "a", "code": "b", "label": 2}])
    with pytest.raises(ValueError, match=r"dev.jsonl, line 1: label=2: expected 0, or 1 where the code answers the query"):
        read_set(tmp_path)


# How it is scored


def random_run(items: RetrievalSet) -> dict[str, list[tuple[float, str]]]:
    scores = torch.rand(len(items.test), len(items.corpus), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return dict(zip(items.test, merge([[] for _ in items.test], scores, list(items.corpus)), strict=True))


def graded(items: RetrievalSet) -> RetrievalSet:
    chance = random.Random(1)
    return replace(
        items, test={query: {one: chance.randint(1, 3) for one in chance.sample(list(items.corpus), 5)} for query in items.test}
    )


def test_values_equal_those_of_pytrec_eval_and_of_the_formula(tmp_path: Path) -> None:
    import pytrec_eval

    items = graded(read_set(write_beir(tmp_path / "large", texts=300)))
    run = random_run(items)
    values = values_of(items, run)
    as_scores = {query: {text: score for score, text in hits[:100]} for query, hits in run.items()}
    theirs = pytrec_eval.RelevanceEvaluator(items.test, {"ndcg_cut.10", "recall.100"}).evaluate(as_scores)
    assert values["ndcg_at_10"] == [theirs[query]["ndcg_cut_10"] for query in items.test]
    assert values["recall_at_100"] == [theirs[query]["recall_100"] for query in items.test]

    def gain(grades: list[int]) -> float:
        return sum(grade / math.log2(place + 2) for place, grade in enumerate(grades[:10]))

    for query, value in zip(items.test, values["ndcg_at_10"], strict=True):
        of = items.test[query]
        ideal = gain(sorted(of.values(), reverse=True))
        assert value == pytest.approx(gain([of.get(text, 0) for _, text in run[query]]) / ideal, abs=1e-6)


def test_a_corpus_in_parts_is_ranked_as_a_whole_and_equal_scores_by_id() -> None:
    texts = [f"{number:04}" for number in range(400)]
    scores = torch.randint(0, 5, (3, 400), generator=torch.Generator().manual_seed(0)).float()  # so that many are equal
    whole = merge([[]] * 3, scores, texts)
    parts = merge(merge([[]] * 3, scores[:, 150:], texts[150:]), scores[:, :150], texts[:150])
    expected = [sorted(zip(row.tolist(), texts, strict=True), key=lambda hit: (-hit[0], hit[1]))[:101] for row in scores]
    assert whole == parts == expected


def test_a_query_that_is_a_text_itself_does_not_find_itself() -> None:
    texts = {"a": "title one two", "b": "three", "q": "one two"}
    same = {"a": "one two", "b": "another"}
    items = RetrievalSet("s", same, texts, {"a": {"q": 1}, "b": {"b": 1}}, {}, "")
    hits = {"a": [(3.0, "a"), (2.0, "q")], "b": [(2.0, "b"), (1.0, "a")]}
    assert values_of(items, hits)["ndcg_at_10"] == [1.0, 1.0]  # b is another text than the query of its id


def test_a_query_that_finds_nothing_counts_as_nothing(beir: Path) -> None:
    items = read_set(beir)
    values = values_of(items, {query: [] for query in items.test})
    assert values == {"ndcg_at_10": [0.0] * 20, "recall_at_100": [0.0] * 20}


@pytest.mark.skipif(not DATA.is_dir(), reason="these sets are not ours to distribute")
@pytest.mark.parametrize(
    ("name", "ndcg", "recall"),
    [
        ("cranfield", 0.338, 0.673),
        ("pubmedqa", 0.970, 0.992),
        ("scitldr", 0.928, 0.994),
        ("codesearch_py", 0.428, 0.799),
        ("qmsum_long", 0.911, 1.000),
    ],
)
def test_bm25_has_the_figures_of_the_sets(name: str, ndcg: float, recall: float) -> None:
    items = read_set(DATA / name)
    values = values_of(items, bm25.search(items, items.test))
    assert np.mean(values["ndcg_at_10"]) == pytest.approx(ndcg, abs=0.005)
    assert np.mean(values["recall_at_100"]) == pytest.approx(recall, abs=0.005)


def test_hard_negatives_share_words_and_are_not_relevant(beir: Path) -> None:
    items = read_set(beir)
    for query, negatives in bm25.hard_negatives(items, 2).items():
        assert len(set(negatives)) == 2 and not set(negatives) & set(items.train[query])
        words = set(items.queries[query].split())
        others = [one for one in items.corpus if one not in items.train[query] and words & set(items.corpus[one].split())]
        assert set(negatives) <= set(others) if len(others) >= 2 else set(others) <= set(negatives)
    with pytest.raises(ValueError, match=r"negatives=39: small has 40 texts, up to 1 of them relevant to a query; lower it"):
        bm25.hard_negatives(items, 39)


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(installed.PACKAGES, "retrieval", ("numpy", "no_such_package"))
    with pytest.raises(ValueError, match=r"no-such-package is not installed: pip install 'modernenc\[retrieval\]'"):
        installed.check_installed("retrieval")
    monkeypatch.setitem(installed.PACKAGES, "retrieval", ("numpy/no_such_folder",))
    with pytest.raises(
        ValueError,
        match=r"numpy is too old, as PyLate holds it back; in another environment: pip",
    ):
        installed.check_installed("retrieval")


def test_two_sets_of_one_name_are_one_clear_line_and_a_set_named_twice_counts_once(beir: Path, tmp_path: Path) -> None:
    assert find_sets(beir.parents[1], ["small", "small"]) == find_sets(beir.parents[1], ["small"])
    write_beir(tmp_path / "more" / "small")
    with pytest.raises(ValueError, match="there are two sets called small; rename the folder of one"):
        find_sets(tmp_path)


def test_a_copy_of_a_relevant_text_is_no_negative(beir: Path) -> None:
    items = read_set(beir)
    copies = {f"copy-{number}": text for number, text in items.corpus.items()}
    doubled = replace(items, corpus={**items.corpus, **copies})
    rows = list(bm25.pairs(doubled, 2))
    assert rows and all(row["positive"] not in (row["negative_1"], row["negative_2"]) for row in rows)
