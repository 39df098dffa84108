"""What an exported encoder is taken for in transformers: it learns to find answers, and to feed a decoder.

Labels of texts, of words and of choices are in tests/evaluation, and vectors of texts too.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    BartConfig,
    BartForCausalLM,
    EncoderDecoderModel,
)

from modernenc.model.export import export
from support.runs import train

MARK, FIRST, LENGTH = 7, 20, 24
"""A token that stands before the answer, the first of the other tokens, and the tokens of an example."""


@pytest.fixture(params=["demo", "demo_mega"])
def exported(request, small_run, tmp_path) -> tuple[Path, dict[str, Any]]:
    """The folder of an exported model, and how it is loaded."""
    export([train(small_run(recipe=request.param))], tmp_path / "out")
    trust = {"trust_remote_code": True} if request.param == "demo_mega" else {}
    return tmp_path / "out", trust


def examples(number: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of tokens, each with one mark, and the places of the marks."""
    ids = torch.randint(FIRST, 120, (number, LENGTH), generator=generator)
    places = torch.randint(1, LENGTH - 3, (number,), generator=generator)
    ids[torch.arange(number), places] = MARK
    return ids, places


def learn(model: Any, steps: int, lr: float, batch: Any) -> list[float]:
    """Train a model for some steps on what `batch` gives, and return the losses."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    losses = []
    for _ in range(steps):
        loss = model.train()(**batch()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.slow
def test_an_answer_is_found_behind_its_mark(exported):
    folder, trust = exported
    torch.manual_seed(0)
    model = AutoModelForQuestionAnswering.from_pretrained(folder, **trust)
    generator = torch.Generator().manual_seed(0)

    def batch() -> dict[str, torch.Tensor]:
        ids, places = examples(64, generator)
        return {"input_ids": ids, "start_positions": places + 1, "end_positions": places + 2}

    losses = learn(model, 150, 3e-3, batch)
    assert losses[0] > 2.5 and sum(losses[-5:]) / 5 < 0.1, losses[::15]
    held_out = batch()
    with torch.no_grad():
        out = model.eval()(held_out["input_ids"])
    assert (out.start_logits.argmax(-1) == held_out["start_positions"]).float().mean() > 0.95
    assert (out.end_logits.argmax(-1) == held_out["end_positions"]).float().mean() > 0.95


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces:FutureWarning")
def test_a_decoder_names_what_the_encoder_has_read(exported):
    folder, trust = exported
    torch.manual_seed(0)
    shape: Any = BartConfig(
        vocab_size=512, d_model=32, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=64, max_position_embeddings=32
    )  # fmt: skip
    shape.is_decoder = shape.add_cross_attention = True
    model: Any = EncoderDecoderModel(encoder=AutoModel.from_pretrained(folder, **trust), decoder=BartForCausalLM(shape))
    model.config.decoder_start_token_id, model.config.pad_token_id = 0, 2
    generator = torch.Generator().manual_seed(0)

    def batch() -> dict[str, torch.Tensor]:
        kind = torch.randint(10, (64, 1), generator=generator)  # all tokens of a row are of one kind
        ids = FIRST + 5 * kind + torch.randint(5, (64, LENGTH), generator=generator)
        return {"input_ids": ids, "labels": torch.cat((100 + kind, 200 + kind), 1)}

    losses = learn(model, 150, 3e-3, batch)
    assert losses[0] > 4 and sum(losses[-5:]) / 5 < 0.1, losses[::15]
    held_out = batch()
    made = model.eval().generate(held_out["input_ids"], max_new_tokens=3, decoder_start_token_id=0, num_beams=1)
    assert (made[:, 1:3] == held_out["labels"]).float().mean() > 0.95


COMPILED = """
import sys, torch
from transformers import AutoModelForMaskedLM
model = AutoModelForMaskedLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
ids = torch.randint(20, 120, (2, 24), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    expected, found = model(ids).logits, torch.compile(model, backend="aot_eager")(ids).logits
assert (found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)
"""


def test_the_compiler_changes_no_logit(exported):
    """In a process of its own: the compiler cannot look through the tests' checks of types."""
    result = subprocess.run([sys.executable, "-c", COMPILED, str(exported[0])], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_padding_on_either_side_changes_no_logit(exported):
    folder, trust = exported
    model = AutoModelForMaskedLM.from_pretrained(folder, **trust).eval()
    ids = torch.randint(FIRST, 120, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits
        for side in ((9, 0), (0, 9)):
            padded = torch.nn.functional.pad(ids, side, value=model.config.pad_token_id)
            mask = torch.nn.functional.pad(torch.ones_like(ids), side)
            found = model(padded, attention_mask=mask).logits[:, side[0] : side[0] + LENGTH]
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1), side


def test_activations_made_again_give_the_same_gradients(exported):
    folder, trust = exported
    ids = torch.randint(FIRST, 120, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    gradients = []
    for again in (False, True):
        model: Any = AutoModelForMaskedLM.from_pretrained(folder, **trust).train()
        if again:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        torch.manual_seed(0)  # of dropout
        model(ids, labels=ids).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
