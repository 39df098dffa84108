"""Retrieval with a vector for each text: what models find, in one direction or two, by length, and after training."""

import json
from pathlib import Path

import numpy as np
import pytest

from modernenc.evaluation import cells
from modernenc.evaluation.cells import Measurement, Request
from modernenc.evaluation.models import Model, find_models
from modernenc.suites import retrieval
from modernenc.suites.retrieval_sets import read_set, reverse
from support.encoders import write_encoder
from support.retrieval import WORDS, write_beir, write_lines, write_topics


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "tiny", words=WORDS)


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    return write_beir(tmp_path / "sets" / "small")


def evaluate(suite: str, model: Path, data: Path, out: Path, *changes: str, keep: bool = False) -> dict[str, Measurement]:
    """Return the results of a suite by model and task."""
    models = find_models([f"tiny={model}"], out)
    request = Request(suite, models, data, (), "single_vector", ("precision=fp32", *changes), 1, keep)
    made, _ = retrieval.make_cells(request)
    (out / cells.CELLS).mkdir(parents=True, exist_ok=True)
    cells.run(made, out, lambda result, left: None)
    return {f"{one.model.name} {one.task}": result for one in made if (result := cells.read(one, out))}


def test_scores_equal_those_of_sentence_transformers_evaluator(encoder: Path, beir: Path, tmp_path: Path) -> None:
    import sentence_transformers.sentence_transformer.evaluation as st
    from sentence_transformers import SentenceTransformer

    items = read_set(beir)
    found = evaluate("retrieval", encoder, beir, tmp_path / "out", "epochs=0")["tiny small"]
    theirs = st.InformationRetrievalEvaluator(
        items.queries, items.corpus, {query: set(of) for query, of in items.test.items()}, ndcg_at_k=[10],
        precision_recall_at_k=[100],
    )(SentenceTransformer(str(encoder)))  # fmt: skip
    assert found.scores["ndcg_at_10"] == pytest.approx(theirs["cosine_ndcg@10"], abs=1e-6)
    assert found.also["recall_at_100"] == pytest.approx(theirs["cosine_recall@100"], abs=1e-6)


def test_a_model_learns_from_pairs_and_is_kept_as_it_was_scored(encoder: Path, tmp_path: Path) -> None:
    folder = write_topics(tmp_path / "topics")
    changes = ("lr=3e-3", "epochs=5", "batch_size=8", "mini_batch_size=4", "negatives=0")
    found = evaluate("retrieval", encoder, folder, tmp_path / "out", *changes, keep=True)
    before = evaluate("retrieval", encoder, folder, tmp_path / "out", "epochs=0")["tiny topics"]
    assert found["BM25 topics"].scores["ndcg_at_10"] == 0 and before.scores["ndcg_at_10"] < 0.5
    assert found["tiny topics"].scores["ndcg_at_10"] > 0.9
    (kept,) = (tmp_path / "out/fine_tuned").glob("topics-*/modules.json")
    again = evaluate("retrieval", kept.parent, folder, tmp_path / "again", "epochs=0")["tiny topics"]
    assert again.scores == pytest.approx(found["tiny topics"].scores, abs=1e-6)


def test_code_is_searched_in_both_directions(encoder: Path, beir: Path, tmp_path: Path) -> None:
    found = evaluate("code", encoder, beir, tmp_path / "out", "epochs=0")
    assert list(found) == [f"{model} small/{way}" for way in ("text-to-code", "code-to-text") for model in ("BM25", "tiny")]
    items = read_set(beir)
    there, back = items, reverse(items)
    assert back.test == {document: {query: 1} for query, of in there.test.items() for document in of}
    assert (back.corpus, back.queries) == (there.queries, there.corpus)
    assert reverse(back).test == there.test


def test_long_texts_are_scored_by_length_and_by_cut(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "sets/long", texts=8, words=4)
    rows = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):  # what a query asks for stands at the end of half of the texts
        row["text"] = f"{'word0 ' * (600 if number % 2 else 100)}{row['text']}"
    write_lines(folder / "corpus.jsonl", rows)
    model = write_encoder(tmp_path / "tiny", max_position=1024, words=WORDS)
    found = evaluate("long_retrieval", model, folder, tmp_path / "out", "epochs=0", "max_length=1024")["tiny long"].found
    by_cut, at_512, at_full = found.curves.values()
    assert by_cut.x == ["512", "1024"] and at_512.x == at_full.x == ["65 to 128", "513 to 1024"]
    assert by_cut.y[1] == np.mean(found.predictions["ndcg_at_10"]) == pytest.approx(np.mean(at_full.y))
    assert at_512.y[0] == at_full.y[0]  # of short texts nothing is cut
    assert found.notes[-1].startswith("1024 tokens of a text instead of 512: ")
    assert retrieval.cuts(longest=3_000, limit=8_192) == [512, 1024, 2048] and retrieval.cuts(longest=3_000, limit=512) == []


def test_texts_that_are_longer_than_the_model_are_counted(encoder: Path, beir: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (beir / "corpus.jsonl").read_text().splitlines()]
    rows[0]["text"] = "word1 " * 100
    write_lines(beir / "corpus.jsonl", rows)
    assert evaluate("retrieval", encoder, beir, tmp_path / "out", "epochs=0")["tiny small"].found.notes == (
        "2.5% of the texts are cut at 64 tokens",
    )


def test_a_set_without_a_split_for_training_is_scored_once(encoder: Path, beir: Path) -> None:
    (beir / "qrels/train.tsv").unlink()
    model = Model("tiny", encoder, "hash")
    made, notes = retrieval.make_cells(Request("retrieval", [model], beir, (), "single_vector", (), seeds=3))
    assert [(cell.model.name, cell.seed) for cell in made] == [("BM25", 0), ("tiny", 0)]
    assert notes == ["small has no split for training: models are scored as they are"]


def test_every_learning_rate_and_seed_is_a_cell(encoder: Path, beir: Path) -> None:
    model = Model("tiny", encoder, "hash")
    made, _ = retrieval.make_cells(Request("retrieval", [model], beir, (), "single_vector", ("lr=[1e-5,1e-4]",), seeds=2))
    assert [(cell.seed, cell.setting["lr"]) for cell in made[1:]] == [(0, [1e-5]), (0, [1e-4]), (1, [1e-5]), (1, [1e-4])]
    assert len({cell.name for cell in made}) == 5


@pytest.mark.parametrize("settings", ["single_vector", "single_vector_modernbert_base", "single_vector_long"])
def test_shipped_settings_are_complete(settings: str, beir: Path) -> None:
    assert retrieval.make_cells(Request("retrieval", [], beir, (), settings))[0]


def test_scores_in_bfloat16_are_close(encoder: Path, beir: Path, tmp_path: Path) -> None:
    exact, close = (
        evaluate("retrieval", encoder, beir, tmp_path / "out", *changes)["tiny small"].scores["ndcg_at_10"]
        for changes in (("lr=1e-9", "epochs=1"), ("lr=1e-9", "epochs=1", "precision=bf16"))
    )
    assert close == pytest.approx(exact, abs=0.1)
