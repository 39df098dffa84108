"""A run of EuroBERT, from its first step to a model of transformers and back."""

import pytest
import torch

from modernenc.backbones.eurobert import EuroBERT
from modernenc.hugging_face.parity import TOLERANCE
from modernenc.hugging_face.read_folder import read_folder
from modernenc.model.export import export
from modernenc.model.load import load_masked_lm
from support.results import FINAL
from support.runs import SMALL, composed, train

transformers = pytest.importorskip("transformers", "5", reason="transformers 4 has no EuroBERT")
CHANGES = [
    "backbone=eurobert_tiny", "init.unigram=false", "~phases.extend.backbone.global_rope_theta",
    "+phases.extend.backbone.rope_theta=40000", "phases.stable.causal_share=0.3", "backbone.num_key_value_heads=1",
]  # fmt: skip


@pytest.mark.parametrize("tied", ["true", "false"])
def test_a_run_is_a_model_of_transformers_and_may_be_started_from(corpus_root, tmp_path, tied):
    small = [setting for setting in SMALL if "local_attention" not in setting]
    folder = train(composed([
        "+recipe=demo", *small, *CHANGES, f"backbone.tie_word_embeddings={tied}", f"data.root={corpus_root}",
        f"run_dir={tmp_path / 'run'}",
    ]))  # fmt: skip
    out = tmp_path / "exported"
    assert export([folder / FINAL], out) <= TOLERANCE
    model = transformers.AutoModelForMaskedLM.from_pretrained(out)
    assert model.config.rope_parameters["rope_theta"] == 40_000
    assert type(model).__module__.startswith("transformers.")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is (tied == "true")
    _, arguments, weights = read_folder(out, EuroBERT)
    assert arguments["tie_word_embeddings"] is (tied == "true") and arguments["rope_theta"] == 40_000
    ours = load_masked_lm(folder / FINAL).state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in weights.items())
