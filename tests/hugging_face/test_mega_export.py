"""An exported MEGA in transformers 4, which has one of its own, and in transformers 5, which has none any more."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from modernenc.hugging_face.modeling_mega import MegaEncoderConfig, MegaForMaskedLM, MegaModel
from modernenc.hugging_face.parity import TOLERANCE
from modernenc.hugging_face.remote_code import make_imports_relative
from modernenc.model.export import export
from modernenc.model.load import load_masked_lm
from support.commands import ROOT
from support.results import FINAL
from support.runs import train
from support.tensors import apart, ids, of_transformers_4

CHUNK = 48
LENGTHS = [1, CHUNK - 1, CHUNK + 1, 3 * CHUNK + 7]
USE = """
import sys, torch, transformers
from transformers import (AutoModel, AutoModelForMaskedLM, AutoModelForMultipleChoice, AutoModelForPreTraining,
    AutoModelForQuestionAnswering, AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer,
    BartConfig, BartForCausalLM, EncoderDecoderModel, pipeline)
out, work, how = sys.argv[1:]
if how == "import":
    import modernenc.hugging_face.modeling_mega
trust = {"trust_remote_code": True} if how == "trust" else {}

def apart(model):
    with torch.no_grad():
        pairs = [(model(input_ids=ids[None]).logits[0], logits) for ids, logits in torch.load(work + "/expected.pt")]
    return max(float((a - b).abs().max()) for a, b in pairs) / max(1.0, *(float(b.abs().max()) for _, b in pairs))

def generate(model, source):
    return model.generate(source, max_new_tokens=5, decoder_start_token_id=0, num_beams=1)

if how == "import":  # what an earlier process has saved
    source, expected = torch.load(work + "/generated.pt")
    both = EncoderDecoderModel.from_pretrained(work + "/both").eval()
    assert torch.equal(generate(both, source), expected)
    print(type(both.encoder).__module__)

model = AutoModelForMaskedLM.from_pretrained(out, **trust).eval()
tokenizer = AutoTokenizer.from_pretrained(out)
print(transformers.__version__, type(model).__module__)
assert model.mlm_head.weight is model.mega.embedding_layer.word_embeddings.weight
assert apart(model) <= 1e-4, apart(model)
answers = pipeline("fill-mask", model=model, tokenizer=tokenizer)("import" + tokenizer.mask_token + " as np")
assert len(answers) == 5
model.save_pretrained(work + "/again")
tokenizer.save_pretrained(work + "/again")
assert apart(AutoModelForMaskedLM.from_pretrained(work + "/again", **trust).eval()) <= 1e-4
assert apart(AutoModelForPreTraining.from_pretrained(work + "/again", **trust).eval()) <= 1e-4

batch = tokenizer(["a longer line of text here", "short"], padding=True, return_tensors="pt")
inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
for auto, labels in (
    (AutoModelForSequenceClassification, {"labels": torch.tensor([0, 1])}),
    (AutoModelForTokenClassification, {"labels": torch.zeros_like(batch["input_ids"])}),
    (AutoModelForMultipleChoice, {"labels": torch.tensor([1])}),
    (AutoModelForQuestionAnswering, {"start_positions": torch.tensor([1, 0]), "end_positions": torch.tensor([2, 99])}),
):
    head = auto.from_pretrained(out, **trust, num_labels=2).train()
    if auto is AutoModelForMultipleChoice:
        given = {key: value[None] for key, value in inputs.items()}
    else:
        given = inputs
    optimizer = torch.optim.SGD(head.parameters(), 0.1)
    losses = []
    for step in range(4):
        torch.manual_seed(0)
        loss = head(**given, **labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0], (auto, losses)
    head.eval().save_pretrained(work + "/head")
    again = auto.from_pretrained(work + "/head", **trust).eval()
    assert type(again).__name__ == type(head).__name__
    assert torch.allclose(again(**given)[0], head(**given)[0], atol=1e-6), auto
if transformers.__version__ < "5":  # which dropped this pipeline
    assert pipeline("question-answering", model=again, tokenizer=tokenizer)(question="a", context="b c d")["answer"]

BartForCausalLM(BartConfig(vocab_size=512, d_model=32, encoder_layers=2, decoder_layers=2, decoder_attention_heads=2,
    decoder_ffn_dim=48, is_decoder=True, add_cross_attention=True, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    forced_eos_token_id=None)).save_pretrained(work + "/decoder")
trust_encoder = {"encoder_trust_remote_code": True} if trust else {}
both = EncoderDecoderModel.from_encoder_decoder_pretrained(out, work + "/decoder", **trust_encoder)
both.config.decoder_start_token_id, both.config.pad_token_id = 0, 1
lengths = (96, 48) if how == "native" else (1, 47, 49, 48, 151)
for length in lengths:
    source = torch.randint(3, 512, (2, length))
    both.train()
    loss = both(input_ids=source, labels=torch.randint(3, 512, (2, 9))).loss
    loss.backward()
    assert both.encoder.embedding_layer.word_embeddings.weight.grad.abs().sum() > 0
    both.eval()
    assert both.generate(source, max_new_tokens=5, decoder_start_token_id=0, num_beams=3).shape[0] == 2
both.save_pretrained(work + "/both")
again = EncoderDecoderModel.from_pretrained(work + "/both").eval()
assert torch.equal(generate(again, source), generate(both, source))
torch.save((source, generate(both, source)), work + "/generated.pt")
print("all is well")
"""
OWN_TYPE = """
import sys, torch
from transformers import AutoModelForMaskedLM, BartConfig, BartForCausalLM, EncoderDecoderModel
*folders, work = sys.argv[1:]
for folder in folders:
    try:
        AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error)
    else:
        raise AssertionError(folder + " was loaded without its code")
import modernenc.hugging_face.modeling_mega
decoder = BartForCausalLM(BartConfig(vocab_size=512, d_model=32, encoder_layers=2, decoder_layers=2, decoder_attention_heads=2,
    decoder_ffn_dim=48, is_decoder=True, add_cross_attention=True))
source = torch.randint(3, 512, (2, 151))
for folder in folders:
    encoder = AutoModelForMaskedLM.from_pretrained(folder).mega
    EncoderDecoderModel(encoder=encoder, decoder=decoder).save_pretrained(work)
    again = EncoderDecoderModel.from_pretrained(work).encoder
    assert torch.equal(again.eval()(source)[0], encoder.eval()(source)[0])
print("all is well")
"""


@pytest.fixture
def exported(small_run, tmp_path) -> Path:
    """A small trained MEGA as a folder for transformers, and beside it the logits that it should give."""
    run = small_run(recipe="demo_mega")
    folder = train(run)
    out = tmp_path / "exported"
    assert export([folder], out) <= TOLERANCE
    objective = load_masked_lm(folder / FINAL)
    expected = []
    for document in ids(LENGTHS):
        ends = torch.tensor([0, len(document)], dtype=torch.int32)
        with torch.no_grad():
            expected.append((document, objective.logits(document, ends, len(document), torch.arange(len(document)))))
    torch.save(expected, tmp_path / "expected.pt")
    return out


def run(code: str, folder: Path, *arguments: object, path: str = "") -> str:
    """Run code in a process of its own, which imports this package only if `path` is its folder; return what it printed."""
    line = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": path, "HF_MODULES_CACHE": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all is well" in result.stdout
    return result.stdout


def test_the_calls_of_tutorials_work_at_every_length_by_the_exported_code_and_by_this_package(exported):
    assert "transformers_modules" in run(USE, exported.parent, exported, exported.parent, "trust")
    printed = run(USE, exported.parent, exported, exported.parent, "import", path=str(ROOT))
    assert printed.count("modernenc.hugging_face.modeling_mega") == 2


@of_transformers_4
def test_transformers_4_loads_it_as_its_own_where_lengths_are_whole_chunks(exported):
    expected = [(document, logits) for document, logits in torch.load(exported.parent / "expected.pt") if len(document) < CHUNK]
    torch.save(expected, exported.parent / "expected.pt")
    assert "transformers.models.deprecated.mega" in run(USE, exported.parent, exported, exported.parent, "native")


def test_what_transformers_4_would_misread_loads_with_the_code_only(small_run, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # else caplog would hear nothing of it
    folders = []
    for setting in ("normalization_type=rmsnorm", "normalize_attention=true", "two_hop_residual=true"):
        key = setting.partition("=")[0]
        trained = train(small_run(f"backbone.{setting}", f"run_dir={tmp_path / key}", recipe="demo_mega"))
        folders.append(tmp_path / f"exported_{key}")
        assert export([trained], folders[-1]) <= TOLERANCE  # which loads it, with its code
    assert "instantiate a model of type" not in caplog.text
    run(OWN_TYPE, tmp_path, *folders, tmp_path / "both", path=str(ROOT))


@pytest.fixture
def model() -> MegaForMaskedLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 200, "hidden_size": 32, "intermediate_size": 48, "nffn_hidden_size": 48, "num_hidden_layers": 2,
        "shared_representation_size": 16, "ema_projection_size": 4, "chunk_size": 16,
    }  # fmt: skip
    return MegaForMaskedLM(MegaEncoderConfig(**sizes)).eval()


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_on_either_side_in_any_kind_of_mask_changes_nothing(model, dtype, side):
    for document in ids([1, 15, 17, 55]):
        padding = (9, 0) if side == "left" else (0, 9)
        row, mask = (torch.nn.functional.pad(x, padding, value=v) for x, v in ((document, 1), (torch.ones_like(document), 0)))
        padded = model(row[None], attention_mask=mask[None].to(dtype)).logits[0][mask.bool()]
        assert apart([padded], [model(document[None]).logits[0]]) <= 1e-5


@torch.no_grad()
def test_embeddings_may_be_given_and_hidden_states_and_tuples_asked_for(model):
    (row,) = ids([40])
    embeds = model.get_input_embeddings()(row[None])
    out = model(inputs_embeds=embeds, output_hidden_states=True)
    assert torch.equal(out.logits, model(row[None]).logits)
    assert len(out.hidden_states) == 3 and torch.equal(out.hidden_states[0], embeds)
    assert torch.equal(model(row[None], return_dict=False)[0], out.logits)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()


def test_gradient_checkpointing_gives_the_same_gradients(model):
    (row,) = ids([40])
    gradients = []
    for enable in (False, True):
        if enable:  # transformers 5 has another name for it
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        torch.manual_seed(3)
        model.train().zero_grad()
        model(row[None], labels=row[None]).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert gradients[0] and all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_pooled_model_has_a_vector_per_sequence(model):
    assert MegaModel(model.config)(ids([20])[0][None]).pooler_output.shape == (1, 32)


def test_the_exported_code_is_the_code_that_trains(exported):
    names = {path.stem for path in exported.glob("*.py")}
    assert {"modeling_mega", "mega", "gated_attention", "ema", "buckets", "dropout"} <= names
    for name in names:
        found = [path for path in (ROOT / "modernenc").glob(f"**/{name}.py") if path != ROOT / "modernenc/hugging_face/mega.py"]
        code = (exported / f"{name}.py").read_text()
        assert code.startswith(make_imports_relative(found[0].read_text())) and len(found) == 1 and "from modernenc" not in code
