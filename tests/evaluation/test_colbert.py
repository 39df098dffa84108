"""Retrieval with a vector for each token, which PyLate trains."""

import shutil
from pathlib import Path

import pytest
import torch

from modernenc import installed
from modernenc.evaluation import cells
from modernenc.evaluation.cells import Measurement, Request
from modernenc.evaluation.models import Model, find_models
from modernenc.evaluation.settings import read_settings
from modernenc.suites import colbert
from support.encoders import write_encoder
from support.retrieval import WORDS, write_lines, write_topics

needs_pylate = pytest.mark.skipif(not installed.is_there("pylate"), reason="PyLate is not installed")
CHANGES = (
    "precision=fp32", "query_length=8", "train_length=16", "max_length=16", "mini_batch_size=4", "batch_size=8", "lr=3e-3",
    "epochs=3", "negatives=0", "ways=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "tiny", words=WORDS)


@pytest.fixture
def topics(tmp_path: Path) -> Path:
    return write_topics(tmp_path / "topics")


def write_teacher(folder: Path, texts: int = 4) -> None:
    """Write scores that tell a text of the same topic from others."""
    rows = [
        {"query_id": f"q{topic}-{one}", "document_ids": [f"d{(topic + step) % 8}-{one}" for step in range(texts)],
         "scores": [20.0 * (step == 0) for step in range(texts)]}
        for topic in range(8) for one in range(4)
    ]  # fmt: skip
    write_lines(folder / "scores.jsonl", rows)


def evaluate(model: Path, data: Path, out: Path, *changes: str, keep: bool = False) -> Measurement:
    """Return the result of a model."""
    models = find_models([f"tiny={model}"], out)
    made, _ = colbert.make_cells(Request("colbert", models, data, (), "multi_vector", (*CHANGES, *changes), 1, keep))
    (out / cells.CELLS).mkdir(parents=True, exist_ok=True)
    cells.run(made, out, lambda result, left: None)
    result = cells.read(made[-1], out)
    assert result
    return result


@needs_pylate
@pytest.mark.parametrize("teacher", [False, True])
def test_a_model_learns_from_pairs_or_from_a_teacher(teacher: bool, encoder: Path, topics: Path, tmp_path: Path) -> None:
    if teacher:
        write_teacher(topics)
        (topics / "qrels/train.tsv").unlink()
    trained = evaluate(encoder, topics, tmp_path / "out", keep=True)
    before = evaluate(encoder, topics, tmp_path / "out", "epochs=0")
    assert trained.scores["ndcg_at_10"] > before.scores["ndcg_at_10"] + 0.2
    (kept,) = (tmp_path / "out/fine_tuned").glob("topics-*/modules.json")
    again = evaluate(kept.parent, topics, tmp_path / "again", "epochs=0")
    assert again.scores == pytest.approx(trained.scores, abs=1e-6)


@needs_pylate
def test_scores_of_texts_of_many_lengths_equal_those_of_pylate_of_each_alone() -> None:
    from pylate.scores import colbert_scores  # pyright: ignore[reportMissingImports]

    from modernenc.suites.multi_vector import max_sim

    torch.manual_seed(0)
    queries = torch.randn(5, 8, 16)
    texts = [torch.randn(length, 16) for length in (3, 9, 1, *range(2, 40))]
    alone = torch.cat([colbert_scores(queries, text[None]) for text in texts], dim=1)  # padding would be a similarity of 0
    torch.testing.assert_close(max_sim(queries, texts), alone)


@needs_pylate
def test_more_ways_than_the_teacher_has_are_refused(encoder: Path, topics: Path) -> None:
    write_teacher(topics, texts=3)
    with pytest.raises(ValueError, match=r"ways=4: a line of topics/scores.jsonl has 3 scores; lower ways"):
        colbert.make_cells(Request("colbert", [Model("tiny", encoder, "")], topics, (), "multi_vector", CHANGES))


def test_an_installation_without_pylate_is_told_the_extra(monkeypatch: pytest.MonkeyPatch, topics: Path) -> None:
    monkeypatch.setitem(installed.PACKAGES, "colbert", ("no_pylate",))
    with pytest.raises(ValueError, match=r"no-pylate is not installed: pip install 'modernenc\[colbert\]'"):
        colbert.make_cells(Request("colbert", [], topics, (), "multi_vector"))


def test_models_that_differ_in_their_projection_alone_are_two(encoder: Path, tmp_path: Path) -> None:
    folders = [shutil.copytree(encoder, tmp_path / name) for name in ("one", "other")]
    for number, folder in enumerate(folders):
        (folder / "1_Dense").mkdir()
        (folder / "1_Dense/model.safetensors").write_text(str(number))
    assert len(find_models([str(folder) for folder in folders], tmp_path / "out")) == 2


def test_shipped_settings_are_complete() -> None:
    assert read_settings(colbert.MultiVectorSettings, "multi_vector", ()).lr
