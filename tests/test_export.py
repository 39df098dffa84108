"""An exported folder is a Hugging Face model."""

from pathlib import Path

import pytest
import torch

from modernenc.checks import check_run
from modernenc.export import TOLERANCE, export
from modernenc.fit import fit, start


def trained(run) -> Path:
    curriculum, corpus = check_run(run)
    start(run, curriculum)
    fit(run, curriculum, corpus, None, {"event": "start", "checkpoint": ""})
    return Path(run.run_dir)


@pytest.fixture
def run_dir(small_run) -> Path:
    return trained(small_run("phases.stable.tokens=3000", "phases.extend.tokens=1000", "phases.decay.tokens=1000"))


def test_every_phase_exports_to_a_model_that_fills_masks(run_dir, tmp_path):
    from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

    for phase, theta in (("stable", 10_000), ("extend", 160_000), ("decay", 160_000)):
        out = tmp_path / phase
        assert export([run_dir / "checkpoints" / f"end-of-{phase}.ckpt"], out) <= TOLERANCE
        model, tokenizer = AutoModelForMaskedLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
        assert model.config.global_rope_theta == theta
        assert model.config.pad_token_id == tokenizer.pad_token_id
        ids = tokenizer("def main(): return 0")["input_ids"]
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        fill = pipeline("fill-mask", model=model, tokenizer=tokenizer)
        answers = fill(f"import{tokenizer.mask_token} as np")
        assert len(answers) == 5
        assert all(0 <= answer["score"] <= 1 for answer in answers)
        batch = tokenizer(["a longer line of text here", "short"], padding=True, return_tensors="pt")
        with torch.no_grad():
            assert torch.isfinite(model(**batch).logits[batch["attention_mask"].bool()]).all()


def test_an_existing_folder_is_not_overwritten(run_dir, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out exists"):
        export([run_dir], tmp_path / "out")
