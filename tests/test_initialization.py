"""Weights to begin with: of a checkpoint, of a Hugging Face model, of a smaller one, under another tokenizer."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_training import FINAL, train
from tokenizers import Tokenizer

from modernenc.backbones.mega import Mega
from modernenc.backbones.modernbert import ModernBERT
from modernenc.checks import check_init, check_run
from modernenc.curriculum import Curriculum
from modernenc.data.blocks import Corpus
from modernenc.export import export
from modernenc.initialization import begin_at_unigrams, initialise, layer_map, made_of, tiled, transferred
from modernenc.metrics import Table
from modernenc.model import build_objectives, load_masked_lm, weights_of
from modernenc.validation import Validator

BASE_TO_LARGE = [0, 1, 2, 2, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12, 13, 13, 14, 15, 16, 16, 17, 18, 19, 20, 20, 21]
"""As ModernBERT's own code has it."""
KINDS = ["global", "local", "local"] * 10
WIDER = [
    "backbone.hidden_size=48", "backbone.intermediate_size=80", "backbone.num_attention_heads=3",
    "backbone.num_hidden_layers=5",
]  # fmt: skip


@pytest.fixture(params=["demo", "demo_mega"])
def trained(request, small_run, tmp_path) -> tuple[str, Path]:
    """The name of a recipe, and the folder of its small run."""
    run = small_run(f"run_dir={tmp_path / 'source'}", recipe=request.param)
    return request.param, train(run)


def filled(run) -> dict[str, torch.Tensor]:
    """The weights that a run begins with."""
    objective = build_objectives(run).masked_lm
    initialise(objective, run, Corpus.of(run.data).tokenizer_file)
    return {name: value.detach().clone() for name, value in weights_of(objective).items()}


def test_a_run_begins_with_the_weights_of_another_ones_checkpoint(trained, small_run):
    recipe, folder = trained
    objective = load_masked_lm(small_run(recipe=recipe), folder / FINAL)
    run = small_run(f"init.source={folder / FINAL}", recipe=recipe)
    assert all(torch.equal(value, weights_of(objective)[name]) for name, value in filled(run).items())
    last = float(Table(folder / "metrics.csv").read()[-1]["loss"])
    first = float(Table(train(run) / "metrics.csv").read()[0]["loss"])
    assert abs(first - last) < 0.5 < Corpus.of(run.data).vocab_size


@pytest.mark.parametrize("recipe", ["demo", "demo_mega"])
def test_a_run_may_begin_with_the_frequencies_of_tokens(small_run, recipe):
    run = small_run("init.unigram=true", "validation.tokens_per_source=4096", recipe=recipe)
    check_run(run)
    corpus, losses = Corpus.of(run.data), {}
    validator = Validator(run, Curriculum.of(run), corpus)
    model = build_objectives(run).masked_lm
    for when in ("random", "unigram"):
        losses[when] = {score.source: score.loss for score in validator.first_scores(model)}
        begin_at_unigrams(model, run, corpus)
    for source in corpus.sources:  # data_prep counted all of the text, each source by its size
        assert abs(losses["unigram"][source] - corpus.sources[source]["validation"]["unigram_nats"]) < 0.25
        assert losses["random"][source] > losses["unigram"][source] + 0.3
    first = float(Table(train(run) / "metrics.csv").read()[0]["loss"])
    assert first < losses["random"]["all"] - 0.3


def test_an_exported_model_comes_back_as_it_was(trained, small_run, tmp_path):
    recipe, folder = trained
    export([folder], tmp_path / "exported")
    run = small_run(f"init.source={tmp_path / 'exported'}", recipe=recipe)
    objective = load_masked_lm(run, folder / FINAL)
    assert all(torch.equal(value, weights_of(objective)[name]) for name, value in filled(run).items())
    kind = type(objective.backbone)
    assert isinstance(kind, type) and issubclass(kind, ModernBERT | Mega)
    settings = kind.settings_from_hugging_face(json.loads((tmp_path / "exported/config.json").read_text()))
    reached = {"global_rope_theta": 160_000.0} if recipe == "demo" else {}
    own = {**run.backbone, **reached}
    said = {key: value for key, value in settings.items() if key in own}
    assert said == {key: own[key] for key in said} and len(said) >= 10


def test_both_dialects_of_modernbert_say_the_same():
    sizes = {
        "model_type": "modernbert", "vocab_size": 50368, "hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 22,
        "num_attention_heads": 12, "max_position_embeddings": 8192, "local_attention": 128, "norm_eps": 1e-5,
    }  # fmt: skip
    four = {**sizes, "global_rope_theta": 160000.0, "local_rope_theta": 10000.0, "global_attn_every_n_layers": 3}
    kinds = ["sliding_attention" if index % 3 else "full_attention" for index in range(22)]
    rope = {
        "full_attention": {"rope_type": "default", "rope_theta": 160000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    five = {**sizes, "layer_types": kinds, "rope_parameters": rope}
    settings = ModernBERT.settings_from_hugging_face(four)
    assert settings == ModernBERT.settings_from_hugging_face(five)
    assert settings["global_rope_theta"] == 160000 and settings["global_attn_every_n_layers"] == 3
    with pytest.raises(ValueError, match="layer_types="):
        ModernBERT.settings_from_hugging_face({**five, "layer_types": kinds[1:] + kinds[:1]})


def test_layers_are_spread_as_published_or_by_what_they_attend_to():
    assert layer_map(KINDS[:22], KINDS[:28], "spread") == BASE_TO_LARGE
    by_kind = layer_map(KINDS[:22], KINDS[:28], "by_kind")
    assert [KINDS[layer] for layer in by_kind] == KINDS[:28]
    assert max(abs(layer - index * 22 / 28) for index, layer in enumerate(by_kind)) <= 2
    assert layer_map(["mega"] * 4, ["mega"] * 4, "by_kind") == [0, 1, 2, 3]


def test_a_tensor_is_repeated_around_its_centre():
    assert tiled(torch.arange(3), (7,)).tolist() == [1, 2, 0, 1, 2, 0, 1]
    wide = tiled(torch.arange(6).view(2, 3), (4, 5))
    assert wide[1:3, 1:4].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert torch.equal(wide[0], wide[2]) and torch.equal(wide[:, 0], wide[:, 3])


def test_a_wider_and_deeper_backbone_holds_the_smaller_one(small_run, tmp_path):
    folder = train(small_run(f"run_dir={tmp_path / 'source'}"))
    source = load_masked_lm(small_run(), folder / FINAL)
    run = small_run(*WIDER, f"init.source={folder / FINAL}", "init.layers=by_kind")
    large, small = filled(run), weights_of(source)
    assert torch.equal(
        large["backbone.embeddings.tok_embeddings.weight"][:, 8:40], small["backbone.embeddings.tok_embeddings.weight"]
    )
    for layer, origin in enumerate(layer_map(KINDS[:3], KINDS[:5], "by_kind")):
        there, here = f"backbone.layers.{origin}.", f"backbone.layers.{layer}."
        ours = large[here + "attn.Wqkv.weight"].view(3, 48, 48)[:, 8:40, 8:40]
        assert torch.equal(ours, small[there + "attn.Wqkv.weight"].view(3, 32, 32))
        assert torch.equal(
            large[here + "mlp.Wi.weight"].view(2, 80, 48)[:, 16:64, 8:40], small[there + "mlp.Wi.weight"].view(2, 48, 32)
        )
    assert len(Table(train(run) / "metrics.csv").read()) > 10


def test_under_another_tokenizer_a_token_is_what_it_is_written_with(corpus_root, small_run, tmp_path):
    from data_prep.encode import train as train_tokenizer

    new = train_tokenizer(["the quick brown fox jumps over the lazy dog; import os, import sys, return None"] * 9, 400)
    old = Tokenizer.from_file(str(corpus_root / "tokenizer.json"))
    rows = torch.randn(512, 8)
    parts = made_of(old, new)
    carried = transferred(rows, parts, 450)
    shared = set(old.get_vocab()) & set(new.get_vocab())
    assert len(shared) > 250  # bytes and special tokens at least
    for token in shared:
        assert torch.equal(carried[new.token_to_id(token)], rows[old.token_to_id(token)])
    others = set(new.get_vocab()) - shared
    assert others
    for token in others:
        number = new.get_vocab()[token]
        assert old.decode(parts[number]) == new.decode([number])
        assert torch.allclose(carried[number], rows[parts[number]].mean(0))
    assert torch.allclose(carried[new.get_vocab_size() :], rows.mean(0).expand(450 - new.get_vocab_size(), 8))

    folder = train(small_run(f"run_dir={tmp_path / 'source'}"))
    tokenizer = corpus_root / "tokenizer.json"
    run = small_run(f"init.source={folder / FINAL}", f"init.tokenizer={tokenizer}")
    source = load_masked_lm(run, folder / FINAL)
    same = filled(run)  # from a tokenizer to itself nothing changes
    assert all(torch.allclose(value, weights_of(source)[name]) for name, value in same.items())


def test_what_cannot_be_begun_with_is_named(small_run, tmp_path):
    folder = train(small_run(f"run_dir={tmp_path / 'source'}"))
    export([folder], tmp_path / "exported")
    shutil.copytree(tmp_path / "exported", tmp_path / "bert")
    config = json.loads((tmp_path / "bert/config.json").read_text())
    (tmp_path / "bert/config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    shutil.copytree(tmp_path / "exported", tmp_path / "short")
    (tmp_path / "short/config.json").write_text('{"model_type": "modernbert"}')
    source = f"init.source={folder / FINAL}"
    for settings, said in (
        ([f"init.source={tmp_path / 'nothing'}"], "no config.json; name a checkpoint"),
        ([f"init.source={tmp_path / 'nothing.ckpt'}"], "nothing.ckpt is not whole"),
        (
            [f"init.source={tmp_path / 'bert'}"],
            "is of model_type bert, which ModernBERT cannot begin with; expected modernbert",
        ),
        ([f"init.source={tmp_path / 'short'}"], "config.json has no 'vocab_size'"),
        ([source, "backbone.hidden_size=16"], "a backbone begins with the weights of one that is not wider"),
        ([source, "backbone.vocab_size=600"], "set backbone.vocab_size=512, or, for another tokenizer, init.tokenizer=FILE"),
        ([source, "init.tokenizer=nowhere.json"], "init.tokenizer=nowhere.json does not exist"),
    ):
        run = small_run(*settings)
        _, corpus = check_run(run)
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            check_init(run, corpus)
    with pytest.raises(ValueError, match=r"init\.layers=random: expected one of spread, by_kind"):
        check_run(small_run(source, "init.layers=random"))
