"""An export as ONNX computes what torch does, for rows of any length with padding."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from modernenc import installed
from modernenc.hugging_face import onnx_model
from modernenc.model.export import export
from support.commands import command
from support.runs import train

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: the extra [onnx]")


@pytest.fixture(scope="module")
def _quiet():
    onnxruntime.set_default_logger_severity(3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [
    ("demo", "backbone.max_position=2048"),
    ("demo_mega", "backbone.max_position=2048", "backbone.attention_activation=laplace",
     "backbone.relative_positional_bias=rotary", "backbone.normalization_type=rmsnorm", "backbone.two_hop_residual=true"),
])  # fmt: skip
def test_an_onnx_model_has_the_logits_of_torch(small_run, tmp_path, _quiet, settings):
    folder, out = train(small_run(*settings[1:], recipe=settings[0])), tmp_path / "out"
    result = command("modernenc.export", str(folder), str(out), "--onnx")
    assert result.returncode == 0, result.stderr
    model = AutoModelForMaskedLM.from_pretrained(out, trust_remote_code=settings[0] == "demo_mega").eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    full, small = (
        onnxruntime.InferenceSession(str(out / "onnx" / name), providers=["CPUExecutionProvider"])
        for name in ("model.onnx", "model_quantized.onnx")
    )
    assert {one.name for one in full.get_inputs()} == {"input_ids", "attention_mask"}
    generator = torch.Generator().manual_seed(1)
    for rows, length in ((1, 1), (3, 2), (2, 33), (4, 127), (1, 700), (2, 2_048)):
        ids = torch.randint(tokenizer.vocab_size, (rows, length), generator=generator)
        kept = (torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=generator)).long()
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=kept).logits[kept.bool()]
        given = {"input_ids": ids.numpy(), "attention_mask": kept.numpy()}
        found = torch.from_numpy(full.run(None, given)[0])[kept.bool()]
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max().clamp(min=1), (rows, length)
        rounded = torch.from_numpy(small.run(None, given)[0])[kept.bool()]
        assert np.corrcoef(rounded.flatten(), expected.flatten())[0, 1] > 0.99
    assert (out / "onnx" / "model_quantized.onnx").stat().st_size < (out / "onnx" / "model.onnx").stat().st_size


def test_what_onnx_cannot_have_is_said(small_run, tmp_path, monkeypatch):
    folder = train(small_run())
    with pytest.raises(ValueError, match="--onnx: Linear has no form for ONNX here"):
        onnx_model.check_supported(torch.nn.Linear(1, 1))
    monkeypatch.setattr(installed, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"onnx is not installed: pip install 'modernenc\[onnx\]'"):
        export([folder], tmp_path / "out", onnx=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("pooling", "normalize"), [("mean", False), ("cls", True)])
def test_a_folder_with_pooling_is_one_of_sentence_transformers_and_keeps_its_head(small_run, tmp_path, pooling, normalize):
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="the extra [retrieval]")
    folder, out = train(small_run()), tmp_path / "out"
    export([folder], out, pooling=pooling, normalize=normalize)
    names = [module["type"].rpartition(".")[2] for module in json.loads((out / "modules.json").read_text())]
    assert names == ["Transformer", "Pooling", *["Normalize"] * normalize]
    texts = ["import os", "a longer text about import and os, with more words in it"]
    vectors = torch.from_numpy(sentence_transformers.SentenceTransformer(str(out)).encode(texts))
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    for text, vector in zip(texts, vectors, strict=True):
        with torch.no_grad():
            hidden = model.model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected = hidden.mean(0) if pooling == "mean" else hidden[0]
        expected = expected / expected.norm() if normalize else expected
        assert torch.allclose(vector, expected, atol=1e-5)
    with pytest.raises(ValueError, match="--task swag: --onnx and --pooling are for the model without the head of a task"):
        export([folder], tmp_path / "other", task="swag", pooling=pooling)
