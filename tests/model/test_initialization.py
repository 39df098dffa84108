"""The first weights of a run: from a checkpoint, a Hugging Face model, a smaller backbone, under another tokenizer."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from modernenc.backbones.mega import Mega
from modernenc.backbones.modernbert import ModernBERT
from modernenc.config import Init, Run
from modernenc.data.blocks import Corpus
from modernenc.data.loader import Steps
from modernenc.data.state import DataState
from modernenc.hugging_face import converter_of
from modernenc.hugging_face.read_folder import read_config
from modernenc.model.build import build_objectives, masked_lm_with, weights_of
from modernenc.model.export import export
from modernenc.model.init_source import read_source
from modernenc.model.initialization import fill, map_layers, spell_with, tile_weight, transfer_embeddings
from modernenc.model.load import load_masked_lm
from modernenc.planning.checks import check_run
from modernenc.planning.model_checks import check_init
from modernenc.run_folder.tables import Table
from support.results import FINAL, losses
from support.runs import train

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


def first_weights(run) -> dict[str, torch.Tensor]:
    """Return the weights that a run starts from."""
    objective = build_objectives(run).masked_lm
    fill(objective, read_source(Path(run.init.source), run), run, Corpus.of(run.data).tokenizer_file)
    return {name: value.detach().clone() for name, value in weights_of(objective).items()}


@torch.no_grad()
def loss_of_the_first_step(run: Run, begins: bool) -> float:
    """Return the loss of a run's first step in fp32, under the weights that it starts from or under random ones."""
    objective = build_objectives(run).masked_lm
    curriculum, corpus = check_run(run)
    if begins:
        fill(objective, read_source(Path(run.init.source), run), run, corpus.tokenizer_file)
    step = next(iter(Steps(run, curriculum, corpus, 0, 1, DataState())))
    return sum(float(objective(batch)[0]) for batch in step.micro_batches) / step.targets


def test_a_run_starts_from_the_weights_of_a_checkpoint(trained, small_run):
    recipe, folder = trained
    objective = load_masked_lm(folder / FINAL)
    shorter = [
        "phases.stable.tokens=1500",
        "phases.stable.ramp.tokens=0",
        "phases.extend.tokens=500",
        "phases.decay.tokens=500",
    ]
    run = small_run(f"init.source={folder / FINAL}", "trainer.precision=32-true", *shorter, recipe=recipe)
    assert all(torch.equal(value, weights_of(objective)[name]) for name, value in first_weights(run).items())
    (expected, random), first = (loss_of_the_first_step(run, begins) for begins in (True, False)), losses(train(run))[1]
    assert first == pytest.approx(expected, rel=1e-5) and first != pytest.approx(random, rel=1e-4)


def test_an_exported_model_comes_back_as_it_was(trained, small_run, tmp_path):
    recipe, folder = trained
    export([folder], tmp_path / "exported")
    run = small_run(f"init.source={tmp_path / 'exported'}", recipe=recipe)
    objective = load_masked_lm(folder / FINAL)
    assert all(torch.equal(value, weights_of(objective)[name]) for name, value in first_weights(run).items())
    kind = type(objective.backbone)
    assert isinstance(kind, type) and issubclass(kind, ModernBERT | Mega)
    settings = converter_of(kind).backbone_arguments(json.loads((tmp_path / "exported/config.json").read_text()))
    reached = {"global_rope_theta": 160_000.0} if recipe == "demo" else {}
    own = {**run.backbone, **reached}
    said = {key: value for key, value in settings.items() if key in own}
    assert said == {key: own[key] for key in said} and len(said) >= 10


def test_config_files_of_transformers_4_and_5_give_the_same_arguments():
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
    settings = converter_of(ModernBERT).backbone_arguments(four)
    assert settings == converter_of(ModernBERT).backbone_arguments(five)
    assert settings["global_rope_theta"] == 160000 and settings["global_attn_every_n_layers"] == 3
    with pytest.raises(ValueError, match="layer_types="):
        converter_of(ModernBERT).backbone_arguments({**five, "layer_types": kinds[1:] + kinds[:1]})


def test_layers_are_spread_as_published_or_by_what_they_attend_to():
    assert map_layers(KINDS[:22], KINDS[:28], "by_depth") == BASE_TO_LARGE
    by_type = map_layers(KINDS[:22], KINDS[:28], "by_type")
    assert [KINDS[layer] for layer in by_type] == KINDS[:28]
    assert max(abs(layer - index * 22 / 28) for index, layer in enumerate(by_type)) <= 2
    assert map_layers(["mega"] * 4, ["mega"] * 4, "by_type") == [0, 1, 2, 3]


def test_a_tensor_is_repeated_around_its_centre():
    assert tile_weight(torch.arange(3), (7,)).tolist() == [1, 2, 0, 1, 2, 0, 1]
    wide = tile_weight(torch.arange(6).view(2, 3), (4, 5))
    assert wide[1:3, 1:4].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert torch.equal(wide[0], wide[2]) and torch.equal(wide[:, 0], wide[:, 3])


def test_a_wider_and_deeper_backbone_holds_the_smaller_one(small_run, tmp_path):
    folder = train(small_run(f"run_dir={tmp_path / 'source'}"))
    source = load_masked_lm(folder / FINAL)
    run = small_run(*WIDER, f"init.source={folder / FINAL}", "init.layer_mapping=by_type")
    large, small = first_weights(run), weights_of(source)
    assert torch.equal(
        large["backbone.embeddings.tok_embeddings.weight"][:, 8:40], small["backbone.embeddings.tok_embeddings.weight"]
    )
    for layer, origin in enumerate(map_layers(KINDS[:3], KINDS[:5], "by_type")):
        there, here = f"backbone.layers.{origin}.", f"backbone.layers.{layer}."
        ours = large[here + "attn.Wqkv.weight"].view(3, 48, 48)[:, 8:40, 8:40]
        assert torch.equal(ours, small[there + "attn.Wqkv.weight"].view(3, 32, 32))
        assert torch.equal(
            large[here + "mlp.Wi.weight"].view(2, 80, 48)[:, 16:64, 8:40], small[there + "mlp.Wi.weight"].view(2, 48, 32)
        )
    assert len(Table(train(run) / "metrics.csv").read()) > 10


def test_under_another_tokenizer_a_token_is_the_mean_of_the_tokens_that_spell_it(corpus_root, small_run, tmp_path):
    from data_prep.encode import train as train_tokenizer

    new = train_tokenizer(["the quick brown fox jumps over the lazy dog; import os, import sys, return None"] * 9, 400)
    old = Tokenizer.from_file(str(corpus_root / "tokenizer.json"))
    rows = torch.randn(512, 8)
    parts = spell_with(old, new)
    carried = transfer_embeddings(rows, parts, 450)
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
    source = load_masked_lm(folder / FINAL)
    same = first_weights(run)  # from a tokenizer to itself nothing changes
    assert all(torch.allclose(value, weights_of(source)[name]) for name, value in same.items())


def test_a_source_that_a_run_cannot_start_from_is_refused_by_name(small_run, tmp_path):
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
        ([source, "backbone.hidden_size=16"], "a backbone can only start from one that is not wider"),
        ([source, "backbone.vocab_size=600"], "set backbone.vocab_size=512, or, for another tokenizer, init.tokenizer=FILE"),
        ([source, "init.tokenizer=nowhere.json"], "init.tokenizer=nowhere.json does not exist"),
    ):
        run = small_run(*settings)
        _, corpus = check_run(run)
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            check_init(run, corpus)
    with pytest.raises(ValueError, match=r"init\.layer_mapping=random: expected one of by_depth, by_type"):
        check_run(small_run(source, "init.layer_mapping=random"))


KEYS = {
    "hidden_activation": "silu", "classifier_activation": "silu", "norm_eps": 1e-2, "local_attention": 32,
    "layer_types": ["full_attention", "sliding_attention"] * 2, "global_attn_every_n_layers": 2,
    "classifier_pooling": "mean", "classifier_dropout": 0.5, "embedding_dropout": 0.5, "mlp_dropout": 0.5,
    "attention_dropout": 0.5, "initializer_range": 0.5, "initializer_cutoff_factor": 1.0, "sparse_pred_ignore_index": -7,
    "return_dict": True, "dtype": "bfloat16", "id2label": {"0": "a"}, "label2id": {"a": 0}, "problem_type": "regression",
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 160_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}  # fmt: skip
"""Values of keys that need another kind of value than a flag turned, a number doubled or a name that nobody knows."""
FOUR = {"global_attn_every_n_layers": 3, "global_rope_theta": 160_000.0, "local_rope_theta": 10_000.0}


def modernbert_source(folder: Path, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """Save a small ModernBERT of transformers with weights that make every setting matter; return it and its config.json."""
    from transformers import AutoModelForMaskedLM, ModernBertConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
    ids = {"pad_token_id": 2, "cls_token_id": 0, "sep_token_id": 1, "bos_token_id": 0, "eos_token_id": 1}
    config = ModernBertConfig(**sizes, **ids, max_position_embeddings=512, **settings)
    model = AutoModelForMaskedLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 if weight.ndim > 1 else 1 + 0.1 * torch.randn_like(weight))
    model.save_pretrained(folder)
    return model, json.loads((folder / "config.json").read_text())


def start_from(folder: Path, config: dict[str, Any]) -> Any:
    """Return masked LM with the weights of a folder, over the backbone that the config describes."""
    (folder / "config.json").write_text(json.dumps(config))
    settings = read_config(config, ModernBERT)
    model = masked_lm_with({"_target_": "modernenc.backbones.modernbert.ModernBERT", **settings}).eval()
    backbone = {"_target_": "modernenc.backbones.modernbert.ModernBERT", **settings}
    run: Any = SimpleNamespace(backbone=backbone, init=Init(source=str(folder)))
    fill(model, read_source(Path(run.init.source), run), run, Path("none"))
    return model


@torch.no_grad()
def test_each_key_of_a_config_json_gives_equal_logits_or_is_refused_by_name(tmp_path):
    """Each key that transformers' configuration has, changed, and some that it has not."""
    from transformers import AutoModelForMaskedLM, ModernBertConfig

    tokens = torch.randint(3, 200, (150,))
    theirs, plain = modernbert_source(tmp_path / "source")
    ends = torch.tensor([0, 150]).int()
    ours = start_from(tmp_path / "source", plain).logits(tokens, ends, 150, torch.arange(150))
    assert torch.allclose(ours, theirs(input_ids=tokens[None]).logits[0], atol=1e-4)
    sizes = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
    defaults = {**ModernBertConfig().to_dict(), **FOUR, **plain}
    keys = {*defaults, "is_decoder", "quantization_config", "rope_scaling", "logit_scale"}
    outcomes = Counter()
    for key in sorted(keys - sizes - {"model_type", "max_position_embeddings"}):
        value = defaults.get(key)
        changed = KEYS.get(key, not value if isinstance(value, bool) else value * 2 if isinstance(value, int | float) else "x")
        config = {**plain, key: changed}
        if key in FOUR and "layer_types" in plain:  # in transformers 4's dialect
            config = {**{k: v for k, v in plain.items() if k not in ("layer_types", "rope_parameters")}, **FOUR, key: changed}
        try:
            ours = start_from(tmp_path / "source", config)
        except ValueError as refused:
            outcomes["refused"] += 1
            assert key in str(refused)
            continue
        outcomes["equal"] += 1
        read = ModernBertConfig.from_dict(config)
        model = AutoModelForMaskedLM.from_config(read, attn_implementation="sdpa").float().eval()
        assert not model.load_state_dict(theirs.state_dict(), strict=False).missing_keys
        expected = model(input_ids=tokens[None], return_dict=True).logits[0]
        assert torch.allclose(ours.logits(tokens, ends, 150, torch.arange(150)), expected, atol=1e-4), key
    assert outcomes["refused"] > 8 and outcomes["equal"] > 15, outcomes


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_parameters.rope_type=default"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 1e4}}}, "expected rope_type default"),
        ({"global_rope_theta": 1e4, "rope_parameters": {"full_attention": {"rope_theta": 2e4}}}, "delete the wrong one"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types="),
        ({"global_attn_every_n_layers": 2, "layer_types": ["full_attention", *["sliding_attention"] * 3]}, "layer_types="),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"classifier_bias": True}, "classifier_bias=True"),
        ({"a_new_setting": 3}, "a_new_setting=3 in config.json: ModernBERT has no such setting"),
    ],
)
def test_a_config_json_that_contradicts_the_backbone_is_refused_by_name(config, said):
    sizes = {
        "model_type": "modernbert", "vocab_size": 200, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    assert read_config({**sizes, "a_new_setting": None}, ModernBERT)["local_rope_theta"] == 10_000
    assert read_config({**sizes, "local_rope_theta": None}, ModernBERT)["local_rope_theta"] == 160_000
    with pytest.raises(ValueError, match=re.escape(said)):
        read_config({**sizes, **config}, ModernBERT)


def test_a_config_json_of_mega_is_followed_in_full_or_refused():
    from modernenc.hugging_face.modeling_mega import MegaEncoderConfig

    config = MegaEncoderConfig().to_dict()
    assert read_config(config, Mega)["chunk_size"] == 1_024
    for key, value in (("norm_affine", False), ("activation", "gelu"), ("a_new_setting", 1), ("normalize_attention", True)):
        with pytest.raises(ValueError, match=f"{key}={value} in config.json"):
            read_config({**config, key: value}, Mega)
    for key, value in (("attention_activation", "relu2"), ("chunk_size", 0), ("hidden_size", "wide"), ("dropout_prob", 1.0)):
        with pytest.raises(ValueError, match=f"config.json: {key}={value}: expected"):
            read_config({**config, key: value}, Mega)
    with pytest.raises(ValueError, match=r"config\.json has no 'relative_positional_bias'"):  # its default there is not ours
        read_config({key: value for key, value in config.items() if key != "relative_positional_bias"}, Mega)


def test_a_source_that_computes_something_else_is_noted_or_refused(small_run, tmp_path, caplog):
    """A rotary base, which a phase could change, is said; any other setting is refused. Of checkpoints and exports alike."""
    folder = train(small_run(f"run_dir={tmp_path / 'source'}"))  # which ends with a global theta of 160,000
    export([folder], tmp_path / "exported")
    for path in (folder / FINAL, tmp_path / "exported"):
        source = f"init.source={path}"
        run = small_run(source)
        _, corpus = check_run(run)
        note, _ = check_init(run, corpus)
        assert f"{source} has global_rope_theta=160000" in note and "set backbone.global_rope_theta=160000" in note
        assert len(check_init(small_run(source, "backbone.global_rope_theta=160_000"), corpus)) == 1
        assert len(check_init(small_run(source, "+phases.stable.backbone.global_rope_theta=160_000"), corpus)) == 1
        for change, said in (
            ("backbone.local_attention=64", "has local_attention=32, the run 64"),
            ("backbone.norm_eps=1e-6", "has norm_eps=1e-05, the run 1e-06"),
            ("backbone.global_attn_every_n_layers=2", "has global_attn_every_n_layers=3, the run 2"),
            ("backbone.num_attention_heads=1", "has heads of 16, backbone.num_attention_heads=1 makes heads of 32"),
        ):
            with pytest.raises(ValueError, match=re.escape(said)):
                check_init(small_run(source, change), corpus)
    caplog.clear()
    train(small_run(f"init.source={folder / FINAL}"))
    assert "has global_rope_theta=160000" in caplog.text
    with pytest.raises(ValueError, match="is a ModernBERT, which backbone"):
        check_init(small_run(f"init.source={folder / FINAL}", recipe="demo_mega"), corpus)


def test_a_padded_tokenizer_of_the_source_pads_no_token(small_run, corpus_root, tmp_path):
    folder = train(small_run(f"run_dir={tmp_path / 'source'}"))
    tokenizer = Tokenizer.from_file(str(corpus_root / "tokenizer.json"))
    tokenizer.enable_padding(length=16)
    tokenizer.enable_truncation(16)
    tokenizer.save(str(tmp_path / "padded.json"))
    run = small_run(f"init.source={folder / FINAL}", f"init.tokenizer={tmp_path / 'padded.json'}")
    plain = small_run(f"init.source={folder / FINAL}", f"init.tokenizer={corpus_root / 'tokenizer.json'}")
    one, other = first_weights(run), first_weights(plain)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
