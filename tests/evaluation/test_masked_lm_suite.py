"""The tables of masked-LM losses: two ways to each number."""

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch

from modernenc.evaluation.cells import Request
from modernenc.evaluation.models import find_models
from modernenc.evaluation.settings import read_settings
from modernenc.model.load import load_masked_lm
from modernenc.suites import masked_lm
from modernenc.suites.held_out import read_documents
from modernenc.suites.masked_lm import Losses, Settings, measure
from modernenc.suites.predictor import Predictor
from support.corpora import WORDS, write_jsonl
from support.encoders import write_encoder
from support.runs import train


@pytest.fixture(scope="module")
def predictor(tmp_path_factory) -> Predictor:
    return Predictor(write_encoder(tmp_path_factory.mktemp("encoder")), 512, "fp32")


def _documents() -> dict[str, list[str]]:
    rng = np.random.default_rng(0)
    return {
        name: [" ".join(rng.choice(WORDS, size)) for size in sizes] for name, sizes in (("a", (5, 40, 200)), ("b", (62, 130)))
    }


def _settings(*changes: str) -> Settings:
    return read_settings(Settings, "masked_lm", ["shortest_context=16", "pseudo_targets=50", "pseudo_context=32", *changes])


def test_losses_are_those_of_transformers_one_sequence_at_a_time(predictor):
    masked = [predictor.mask(np.arange(5, 5 + n) % 20 + 5, 0.3, seed=n, document=0) for n in (4, 30, 62, 9)]
    losses, right = predictor.losses(masked)
    expected, best = [], []
    hooks = predictor.model.get_output_embeddings()._forward_pre_hooks
    hook = hooks.popitem()
    for one in masked:
        with torch.no_grad():
            logits = predictor.model(input_ids=torch.from_numpy(one.ids)[None]).logits[0, one.positions]
        targets = torch.from_numpy(one.targets)
        expected += torch.nn.functional.cross_entropy(logits, targets, reduction="none").tolist()
        best += (logits.argmax(-1) == targets).tolist()
    hooks[hook[0]] = hook[1]
    assert losses == pytest.approx(expected, abs=1e-5)
    assert right.tolist() == best


def test_tables_divide_the_same_targets(predictor):
    texts = _documents()
    found = measure(predictor, texts, _settings())
    loss, targets = sum(found.predictions["loss"]), sum(found.predictions["targets"])
    by_source = dict(zip(found.curves["loss by source"].x, found.curves["loss by source"].y, strict=True))
    assert by_source["all"] == pytest.approx(loss / targets)
    tokens = {
        name: sum(map(len, predictor.tokenizer(own, add_special_tokens=False)["input_ids"])) for name, own in texts.items()
    }
    held = {name: sum(len(text.encode()) for text in own) for name, own in texts.items()}
    bits = {name: by_source[name] * tokens[name] / math.log(2) for name in texts}
    per_byte = found.curves["bits per byte by source"]
    assert per_byte.x == ["all", "a", "b"] and all(error > 0 for error in per_byte.error)
    expected = [sum(bits.values()) / sum(held.values()), *(bits[name] / held[name] for name in texts)]
    assert per_byte.y == pytest.approx(expected)
    of_a = [sum(found.predictions[key][:3]) for key in ("loss", "targets")]
    assert by_source["a"] == pytest.approx(of_a[0] / of_a[1])
    assert found.curves["loss by mask ratio"].x == ["15%", "30%", "50%"]
    assert found.curves["loss by mask ratio"].y[0] == by_source["all"]
    assert found.curves["loss by length of the document"].x == ["32 to 63", "128 to 255"]  # the shortest has no target
    assert found.curves["loss added by a shorter context than 64"].x == ["16", "32"]
    positions = next(curve for title, curve in found.curves.items() if title.startswith("loss by position"))
    assert len(positions.x) == 8 and positions.x[-1] == "56 to 63"


def test_the_same_tokens_are_predicted_in_every_context(predictor):
    whole = predictor.mask(np.arange(62) % 20 + 5, 0.3, seed=1, document=0)
    pieces = list(masked_lm._pieces(whole, 16))
    assert np.concatenate([piece.targets for piece in pieces]).tolist() == whole.targets.tolist()
    assert all(len(piece.ids) <= 16 and piece.ids[0] == whole.ids[0] and piece.ids[-1] == whole.ids[-1] for piece in pieces)
    assert np.concatenate([piece.ids[1:-1] for piece in pieces]).tolist() == whole.ids[1:-1].tolist()
    places = np.concatenate([piece.ids[piece.positions] for piece in pieces])
    assert places.tolist() == whole.ids[whole.positions].tolist()


def test_pseudo_perplexity_masks_one_token_at_a_time(predictor):
    text = [" ".join(WORDS)]
    found = measure(predictor, {"a": text}, _settings("pseudo_targets=100"))
    ids = predictor.tokenizer(text[0], add_special_tokens=False)["input_ids"]
    sequences = [predictor.mask_one(np.array(ids), at, 0) for at in range(len(ids))]
    assert all((one.ids == predictor.roles.mask).sum() == 1 for one in sequences)
    losses, _ = predictor.losses(sequences)
    assert found.curves["pseudo-perplexity"].y[0] == pytest.approx(np.exp(losses.mean()), rel=1e-5)


def test_an_interval_over_documents_covers_the_truth():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        documents = np.repeat(np.arange(40), rng.integers(5, 15, 40))
        values = rng.normal(size=40)[documents] + rng.normal(size=len(documents))  # tokens of a document are alike
        losses = Losses(values, values, documents, documents)
        curve = losses.curve([("", losses.all())])
        inside += abs(curve.y[0]) < curve.error[0]
    assert 0.91 < inside / 400 < 0.98


def test_an_interval_over_one_document_is_that_of_its_tokens():
    values, document = np.random.default_rng(0).normal(size=50), np.zeros(50, int)
    losses = Losses(values, values, document, document)
    assert losses.curve([("", losses.all())]).error[0] == pytest.approx(1.96 * values.std(ddof=1) / 50**0.5, rel=1e-3)


def test_a_checkpoint_has_the_loss_of_its_own_model(small_run, corpus_root, tmp_path):
    checkpoint = train(small_run()) / "checkpoints" / "end-of-decay.ckpt"
    (model,) = find_models([str(checkpoint)], tmp_path)
    assert find_models([str(checkpoint)], tmp_path) == [model]
    predictor, ours = Predictor(model.folder, 4_096, "fp32"), load_masked_lm(checkpoint)
    documents = read_documents(corpus_root, 4_000)
    assert list(documents) == ["code", "docstrings", "reference", "prose"] or set(documents) <= {
        "code",
        "docstrings",
        "reference",
        "prose",
    }
    ids = predictor.tokenizer([text for texts in documents.values() for text in texts], add_special_tokens=False)["input_ids"]
    masked = [predictor.mask(np.array(one[:126]), 0.15, seed, seed) for seed, one in enumerate(ids) if one]
    losses, _ = predictor.losses(masked)
    expected: list[float] = []
    for one in masked:
        tokens = torch.from_numpy(one.ids)
        with torch.no_grad():
            logits = ours.logits(
                tokens, torch.tensor([0, len(tokens)], dtype=torch.int32), len(tokens), torch.from_numpy(one.positions)
            )
        expected += torch.nn.functional.cross_entropy(logits, torch.from_numpy(one.targets), reduction="none").tolist()
    assert losses == pytest.approx(expected, abs=1e-4)


def test_documents_of_a_corpus_are_whole_and_those_of_files_have_their_source(corpus_root, tmp_path):
    documents = read_documents(corpus_root, 10**9)
    assert all(documents.values()) and sum(len(text) for texts in documents.values() for text in texts) > 10_000
    few = read_documents(corpus_root, 1_000)
    assert all(own == documents[source][: len(own)] and len(own) > 0 for source, own in few.items())
    write_jsonl(tmp_path / "wiki" / "train.jsonl", ["for training"])
    write_jsonl(tmp_path / "wiki" / "val.jsonl.zst", ["held out", ""])
    write_jsonl(tmp_path / "web" / "val.jsonl.gz", ["held out too"])
    assert read_documents(tmp_path, 100) == {"web": ["held out too"], "wiki": ["held out"]}
    (tmp_path / "notes.txt").write_text("a note")
    assert read_documents(tmp_path / "notes.txt", 100) == {"notes": ["a note"]}


@pytest.mark.parametrize(
    "content, message",
    [("{", "line 1: "), ('{"body": "a"}', 'line 1: expected an object with a "text"'), ("", "no text in it")],
)
def test_what_is_no_text_is_one_clear_line(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path, 100)


def test_damaged_compressed_text_is_one_clear_line(tmp_path):
    write_jsonl(tmp_path / "a.jsonl.zst", ["the quick brown fox"] * 999)
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28" + (tmp_path / "a.jsonl.zst").read_bytes()[5:])
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst, line 0: "):
        read_documents(tmp_path, 100)


def test_models_that_predict_no_tokens_are_left_out(tmp_path):
    from transformers import AutoModel

    folder = write_encoder(tmp_path / "encoder")
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    write_jsonl(tmp_path / "a.jsonl", ["the quick brown fox"])
    request = Request("mlm", find_models([f"bare={folder}"], tmp_path), tmp_path / "a.jsonl", (), "masked_lm")
    assert masked_lm.make_cells(request) == ([], ["bare is left out: ModernBertModel does not predict tokens"])
    config: dict[str, Any] = asdict(_settings())
    assert json.loads(json.dumps(config)) == config  # a setting is part of a cell's name
