"""A checkpoint of the ModernBERT repository, as its trainer writes it, is the model that it holds."""

import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from modernenc.model.init_source import backbone_of
from modernenc.model.load import load_folder, load_masked_lm
from modernenc.objectives.masked_lm import MaskedLM
from support.results import FINAL, losses
from support.runs import SMALL, composed, train

SETTINGS: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "attention_layer": "rope", "attn_out_bias": False, "attn_qkv_bias": False, "bert_layer": "prenorm", "embed_norm": True,
    "final_norm": True, "skip_first_prenorm": True, "embedding_layer": "sans_pos", "mlp_in_bias": False, "mlp_layer": "glu",
    "mlp_out_bias": False, "normalization": "layernorm", "norm_kwargs": {"eps": 1e-5, "bias": False}, "hidden_act": "gelu",
    "head_pred_act": "gelu", "rotary_emb_base": 160_000.0, "local_attn_rotary_emb_base": 10_000.0, "sliding_window": 32,
    "global_attn_every_n_layers": 3, "max_position_embeddings": 512, "attn_out_dropout_prob": 0.1, "padding": "unpadded",
}  # fmt: skip
"""As `FlexBertConfig.to_dict()` gives them, with the sizes of the small run."""


def flex_names(model: MaskedLM) -> dict[str, torch.Tensor]:
    """Return weights under the names that FlexBertForMaskedLM has, in Composer's model; the decoder is there twice."""
    weights = {}
    for name, value in model.state_dict().items():
        name = name.replace("backbone.layers.", "backbone.encoder.layers.").replace("backbone.", "bert.")
        weights[f"model.{name}"] = value
    weights["model.decoder.weight"] = model.backbone.token_embeddings().weight.detach()
    return weights


def write(path: Path, model: MaskedLM, settings: dict[str, Any], **more: object) -> Path:
    """Write a checkpoint as Composer nests it."""
    config = {"content": settings, "class": "transformers.FlexBertConfig"}
    state = {"model": flex_names(model), "integrations": {"huggingface": {"model": {"config": config}}}, **more}
    torch.save({"state": state, "rng": [{"torch": torch.get_rng_state()}]}, path)
    return path


@pytest.fixture
def trained(small_run, tmp_path) -> Path:
    return train(small_run(f"run_dir={tmp_path / 'source'}"))


def test_a_checkpoint_of_the_repository_is_the_model_that_it_holds(trained, small_run, tmp_path):
    ours = load_masked_lm(trained / FINAL)
    path = write(tmp_path / "ep0-ba4000-rank0.pt", ours, SETTINGS)
    theirs = load_folder(path)
    ids, ends = torch.randint(512, (150,)), torch.tensor([0, 90, 150]).int()
    with torch.no_grad():
        assert torch.equal(*(model.logits(ids, ends, 90, torch.arange(150)) for model in (ours, theirs)))
    assert theirs.backbone.max_position == 8_192
    rest = [setting for setting in SMALL if not setting.startswith("backbone.")]
    run = composed([
        "+recipe=demo", *rest, "backbone=of_source", f"init.source={path}", f"data.root={small_run().data.root}",
        f"run_dir={tmp_path / 'run'}", "init.unigram=false",
    ])  # fmt: skip
    assert run.backbone["global_rope_theta"] == 160_000 and run.backbone["local_attention"] == 32
    assert losses(train(run))[1] < 6.2, "where a model that knows nothing has 6.24"


def test_layers_without_a_base_of_their_own_have_the_global_one(trained, tmp_path):
    """The repository's own conversion wrote -1 for these, and all logits were NaN."""
    ours = load_masked_lm(trained / FINAL)
    first = {**SETTINGS, "rotary_emb_base": 10_000.0, "local_attn_rotary_emb_base": -1}
    found = backbone_of(write(tmp_path / "a.pt", ours, first))
    assert found["global_rope_theta"] == found["local_rope_theta"] == 10_000
    everywhere = {**first, "sliding_window": -1, "global_attn_every_n_layers": -1}
    assert backbone_of(write(tmp_path / "b.pt", ours, everywhere))["global_attn_every_n_layers"] == 1


def test_weights_that_were_copied_out_are_read_too(trained, tmp_path):
    torch.save({"model": flex_names(load_masked_lm(trained / FINAL)), "config": SETTINGS}, tmp_path / "weights.pt")
    assert backbone_of(tmp_path / "weights.pt")["hidden_size"] == 32


def test_what_is_no_such_checkpoint_is_said_and_its_code_is_not_run(trained, tmp_path):
    ours = load_masked_lm(trained / FINAL)
    with pytest.raises(ValueError, match=r"cannot be read without running code in it .*weights_only=False.*'weights\.pt'"):
        backbone_of(write(tmp_path / "code.pt", ours, SETTINGS, timestamp=datetime.timedelta(1)))
    for changed, said in (
        ({"mlp_layer": "mlp"}, r"mlp_layer=mlp; ModernBERT has glu, so logits would be others"),
        ({"norm_kwargs": {"eps": 1e-5, "bias": True}}, r"norm_kwargs\.bias=True"),
        ({"global_attn_every_n_layers": -1}, r"global_attn_every_n_layers=-1 with a sliding_window"),
    ):
        with pytest.raises(ValueError, match=said):
            backbone_of(write(tmp_path / "a.pt", ours, {**SETTINGS, **changed}))
    torch.save({"state": {"model": {"a": torch.ones(1)}}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: expected a checkpoint of the ModernBERT repository"):
        backbone_of(tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt does not exist"):
        backbone_of(tmp_path / "nowhere.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(ValueError, match=r"text\.pt cannot be read"):
        backbone_of(tmp_path / "text.pt")
