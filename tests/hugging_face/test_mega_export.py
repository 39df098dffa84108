"""An exported MEGA in transformers 4, which has one of its own, and in transformers 5, which has none any more."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM

from modernenc.hugging_face.modeling_mega import MegaConfig, MegaForMaskedLM, MegaModel
from modernenc.hugging_face.parity import TOLERANCE
from modernenc.hugging_face.remote_code import relative
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
from transformers import *
out, work, trust = sys.argv[1], sys.argv[2], sys.argv[3] == "trust"
expected = torch.load(work + "/expected.pt")
model = AutoModelForMaskedLM.from_pretrained(out, trust_remote_code=trust or None).eval()
tokenizer = AutoTokenizer.from_pretrained(out)
print(transformers.__version__, type(model).__module__)
assert model.mlm_head.weight is model.mega.embedding_layer.word_embeddings.weight

def apart(model):
    with torch.no_grad():
        pairs = [(model(input_ids=ids[None]).logits[0], logits) for ids, logits in expected]
    return max(float((a - b).abs().max()) for a, b in pairs) / max(1.0, *(float(b.abs().max()) for _, b in pairs))

assert apart(model) <= 1e-4, apart(model)
answers = pipeline("fill-mask", model=model, tokenizer=tokenizer)("import" + tokenizer.mask_token + " as np")
assert len(answers) == 5
model.save_pretrained(work + "/again")
tokenizer.save_pretrained(work + "/again")
assert apart(AutoModelForMaskedLM.from_pretrained(work + "/again", trust_remote_code=trust or None).eval()) <= 1e-4

batch = tokenizer(["a longer line of text here", "short"], padding=True, return_tensors="pt")
for auto, labels in (
    (AutoModelForSequenceClassification, torch.tensor([0, 1])),
    (AutoModelForTokenClassification, torch.zeros_like(batch["input_ids"])),
    (AutoModelForMultipleChoice, torch.tensor([1])),
):
    head = auto.from_pretrained(out, trust_remote_code=trust or None, num_labels=2).train()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    if auto is AutoModelForMultipleChoice:
        inputs = {key: value[None] for key, value in inputs.items()}
    optimizer = torch.optim.SGD(head.parameters(), 0.1)
    losses = []
    for step in range(4):
        torch.manual_seed(0)
        loss = head(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0], (auto, losses)

encoder = AutoModel.from_pretrained(out, trust_remote_code=trust or None)
decoder = BartForCausalLM(BartConfig(vocab_size=512, d_model=32, encoder_layers=2, decoder_layers=2, decoder_attention_heads=2,
    decoder_ffn_dim=48, is_decoder=True, add_cross_attention=True, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    forced_eos_token_id=None))
both = EncoderDecoderModel(encoder=encoder, decoder=decoder)
both.config.decoder_start_token_id, both.config.pad_token_id = 0, 1
lengths = (1, 47, 49, 151, 48) if trust else (96, 48)  # the last one also for what is loaded again, by 4 as its own
for length in lengths:
    source = torch.randint(3, 512, (2, length))
    both.train()
    loss = both(input_ids=source, labels=torch.randint(3, 512, (2, 9))).loss
    loss.backward()
    assert encoder.embedding_layer.word_embeddings.weight.grad.abs().sum() > 0
    both.eval()
    greedy = both.generate(source, max_new_tokens=5, decoder_start_token_id=0, num_beams=1)
    assert both.generate(source, max_new_tokens=5, decoder_start_token_id=0, num_beams=3).shape[0] == 2
both.save_pretrained(work + "/both")
again = EncoderDecoderModel.from_pretrained(work + "/both").eval()
assert torch.equal(again.generate(source, max_new_tokens=5, decoder_start_token_id=0, num_beams=1), greedy)
print("all is well")
"""


@pytest.fixture
def exported(small_run, tmp_path) -> Path:
    """A small trained MEGA as a folder for transformers, and beside it the logits that it should give."""
    run = small_run(recipe="demo_mega")
    folder = train(run)
    out = tmp_path / "exported"
    assert export([folder], out) <= TOLERANCE
    objective = load_masked_lm(run, folder / FINAL)
    expected = []
    for document in ids(LENGTHS):
        ends = torch.tensor([0, len(document)], dtype=torch.int32)
        with torch.no_grad():
            expected.append((document, objective.logits(document, ends, len(document), torch.arange(len(document)))))
    torch.save(expected, tmp_path / "expected.pt")
    return out


def use(exported: Path, trust: str) -> str:
    """What a user who has only transformers and the folder does."""
    line = [sys.executable, "-W", "ignore", "-c", USE, str(exported), str(exported.parent), trust]
    home = exported.parent / "home"
    environment = {**os.environ, "PYTHONPATH": "", "HF_MODULES_CACHE": str(home), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(line, cwd=exported.parent, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all is well" in result.stdout
    return result.stdout


def test_transformers_trusts_the_code_beside_the_weights_at_every_length(exported):
    assert "transformers_modules" in use(exported, "trust")


@of_transformers_4
def test_transformers_4_loads_it_as_its_own_where_lengths_are_whole_chunks(exported):
    expected = [(document, logits) for document, logits in torch.load(exported.parent / "expected.pt") if len(document) < CHUNK]
    torch.save(expected, exported.parent / "expected.pt")
    assert "transformers.models.deprecated.mega" in use(exported, "native")


@pytest.mark.parametrize("setting", ["normalization_type=rmsnorm", "normalize_attention=true", "two_hop_residual=true"])
def test_what_transformers_4_would_misread_loads_with_the_code_only(small_run, tmp_path, caplog, monkeypatch, setting):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # else caplog would hear nothing of it
    run = small_run(f"backbone.{setting}", recipe="demo_mega")
    assert export([train(run)], tmp_path / "out") <= TOLERANCE  # which loads it, with its code
    assert "instantiate a model of type" not in caplog.text
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForMaskedLM.from_pretrained(tmp_path / "out", trust_remote_code=False)


@pytest.fixture
def model() -> MegaForMaskedLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 200,
        "hidden_size": 32,
        "intermediate_size": 48,
        "nffn_hidden_size": 48,
        "num_hidden_layers": 2,
    }
    return MegaForMaskedLM(MegaConfig(**sizes, shared_representation_size=16, ema_projection_size=4, chunk_size=16)).eval()


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
        assert code.startswith(relative(found[0].read_text())) and len(found) == 1 and "from modernenc" not in code
