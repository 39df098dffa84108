"""An exported folder is a Hugging Face model."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer

from modernenc.backbones.modernbert import ModernBERT
from modernenc.data.blocks import Corpus
from modernenc.data.store import Store
from modernenc.hugging_face import converter_of, model_of
from modernenc.hugging_face.parity import TOLERANCE, logit_difference
from modernenc.hugging_face.tokenizer import pretrained_tokenizer
from modernenc.model.export import export
from modernenc.model.load import load_folder
from modernenc.objectives.masked_lm import MaskedLM
from modernenc.run_folder.tables import Table
from support.runs import train


@pytest.fixture
def run_dir(small_run) -> Path:
    return train(small_run("phases.stable.tokens=3000", "phases.extend.tokens=1000", "phases.decay.tokens=1000"))


def test_every_phase_exports_to_a_model_that_fills_masks(run_dir, tmp_path):
    from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

    for phase, theta in (("stable", 10_000), ("extend", 160_000), ("decay", 160_000)):
        out = tmp_path / phase
        assert export([run_dir / "checkpoints" / f"end-of-{phase}.ckpt"], out) <= TOLERANCE
        model, tokenizer = AutoModelForMaskedLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
        config = json.loads((out / "config.json").read_text())  # as transformers 4 spells it, and as 5 does
        assert config["global_rope_theta"] == config["rope_parameters"]["full_attention"]["rope_theta"] == theta
        assert model.config.pad_token_id == tokenizer.pad_token_id
        ids = tokenizer("def main(): return 0")["input_ids"]
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        fill = pipeline("fill-mask", model=model, tokenizer=tokenizer)
        answers = fill(f"import{tokenizer.mask_token} as np")
        row = tokenizer(f"import{tokenizer.mask_token} as np", return_tensors="pt")
        with torch.no_grad():
            logits = model(**row).logits[row["input_ids"] == tokenizer.mask_token_id]
        best = logits[0].softmax(-1).topk(5)
        assert [answer["token"] for answer in answers] == best.indices.tolist()
        assert [answer["score"] for answer in answers] == pytest.approx(best.values.tolist(), rel=1e-4)
        batch = tokenizer(["a longer line of text here", "short"], padding=True, return_tensors="pt")
        with torch.no_grad():
            assert torch.isfinite(model(**batch).logits[batch["attention_mask"].bool()]).all()


@pytest.mark.parametrize(
    "other", [["layer_types", "rope_parameters"], ["global_attn_every_n_layers", "global_rope_theta", "local_rope_theta"]]
)
def test_a_config_is_whole_in_the_words_of_transformers_4_and_of_5(tmp_path, other):
    from transformers import AutoModelForMaskedLM

    torch.manual_seed(0)
    thetas: dict[str, Any] = {"global_rope_theta": 4_000.0, "local_rope_theta": 300.0}
    ours = MaskedLM(ModernBERT(300, 32, 48, 5, 2, 256, **thetas, global_attn_every_n_layers=2, local_attention=16)).eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    model_of(ours).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    own = {key: value for key, value in config.items() if key not in other}
    assert len(own) == len(config) - len(other)
    settings = converter_of(ModernBERT).backbone_arguments(own)
    assert {key: settings[key] for key in thetas} == thetas and settings["global_attn_every_n_layers"] == 2
    version_4 = "layer_types" in other
    if version_4 == (int(transformers.__version__.split(".")[0]) == 4):  # the other would fall back to defaults
        (tmp_path / "config.json").write_text(json.dumps(own))
        assert logit_difference(ours, AutoModelForMaskedLM.from_pretrained(tmp_path), 300) <= TOLERANCE


def test_an_export_describes_itself_and_may_be_read_by_all(run_dir, tmp_path):
    out, evaluations = tmp_path / "mine", Table(run_dir / "evaluations.csv")
    last = int(Table(run_dir / "metrics.csv").read()[-1]["step"])
    for step, score in ((last - 1, 0.1), (last, 0.625)):
        found = {"checkpoint": "any", "suite": "glue", "task": "CoLA", "score": score, "error": 0.04}
        evaluations.append({"step": step, "tokens_seen": step, **found})
    export([run_dir], out)
    _, header, card = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "transformers", "pipeline_tag": "fill-mask", "tags": ["modernbert", "masked-lm", "modernenc"],
    }  # fmt: skip
    assert "# mine" in card and "ModernBERT: Warner et al. 2024, arXiv:2412.13663." in card
    assert "recipe `demo`" in card and "up to phase `decay`" in card and "trust_remote_code" not in card
    manifest = json.loads((run_dir / "corpus" / "manifest.json").read_text())
    for source in ("code", "docstrings", "reference"):
        entry = manifest["sources"][source]
        row = next(line for line in card.splitlines() if line.startswith(f"| {source} |") and entry["url"] in line)
        assert entry["licence"] in row and int(row.split("|")[2].replace(",", "")) > 0
    scores = [
        row for row in Table(run_dir / "validation.csv").read() if row["phase"] == "decay" and row["mask_ratio"] == "0.15"
    ]
    for row in scores:
        assert f"| {row['source']} | {row['seq_len']} | {float(row['loss']):.3f} | {float(row['accuracy']):.1%} |" in card
    assert [line for line in card.splitlines() if "CoLA" in line] == ["| glue | CoLA | 0.625 ±0.040 |"]
    python = card.split("```python\n")[1].split("```")[0].replace('"mine"', repr(str(out)))
    exec(compile(python, "card", "exec"), {})  # what it says works
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1


@pytest.mark.parametrize("recipe", ["demo", "demo_mega"])
def test_weights_may_be_rounded_once_they_were_compared(small_run, tmp_path, recipe):
    folder = train(small_run("phases.stable.tokens=3000", recipe=recipe))
    for name in ("exact", "rounded"):
        export([folder], tmp_path / name, bf16=name == "rounded")
    exact, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("exact", "rounded"))
    assert exact.keys() == rounded.keys() and all(weight.dtype == torch.bfloat16 for weight in rounded.values())
    assert all(torch.equal(weight.bfloat16(), rounded[name]) for name, weight in exact.items())
    assert {path.name for path in (tmp_path / "exact").iterdir()} == {path.name for path in (tmp_path / "rounded").iterdir()}
    whole, again = (load_folder(tmp_path / name).state_dict() for name in ("exact", "rounded"))
    assert all(torch.equal(weight.bfloat16().float(), again[name]) for name, weight in whole.items())


def test_an_existing_folder_is_not_overwritten(run_dir, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out exists"):
        export([run_dir], tmp_path / "out")


def test_a_tokenizer_that_cuts_and_pads_is_exported_without(small_run, corpus_root, tmp_path):
    """A file as sentence-transformers ships it: other libraries heed what it says, where transformers does not."""
    root = tmp_path / "corpus"
    shutil.copytree(corpus_root, root)
    cutting = Tokenizer.from_file(str(root / "tokenizer.json"))
    cutting.enable_truncation(16)
    cutting.enable_padding(length=16)
    cutting.save(str(root / "tokenizer.json"))
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["tokenizer"]["sha256"] = hashlib.sha256((root / "tokenizer.json").read_bytes()).hexdigest()
    (root / "manifest.json").write_text(json.dumps(manifest))
    run = small_run(f"data.root={root}", "phases.stable.tokens=3000", "phases.extend.tokens=1000", "phases.decay.tokens=1000")
    export([train(run)], tmp_path / "out")
    exported = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert exported.truncation is None and exported.padding is None
    assert len(exported.encode("import os, sys; " * 40).ids) > 64 and len(exported.encode("a").ids) == 3


def test_a_logit_that_is_no_number_is_a_difference():
    ours = MaskedLM(ModernBERT(300, 32, 48, 2, 2, 256, 10_000.0, 10_000.0)).eval()
    torch.nn.init.constant_(ours.decoder.bias, torch.nan)
    theirs = model_of(ours)
    assert not logit_difference(ours, theirs, 300) <= TOLERANCE


def test_words_with_their_spaces_are_the_tokens_of_their_text(corpus_root):
    """As docs/export.md says; without the spaces they are others."""
    tokenizer = pretrained_tokenizer(Corpus(Store(str(corpus_root))), 64)
    words = ["the", "list", "of", "names", "is", "empty"]
    spaced = tokenizer([words[0], *(f" {word}" for word in words[1:])], is_split_into_words=True)
    assert (
        spaced["input_ids"]
        == tokenizer(" ".join(words))["input_ids"]
        != tokenizer(words, is_split_into_words=True)["input_ids"]
    )
    assert spaced.word_ids()[0] is None and set(spaced.word_ids()) == {None, *range(len(words))}
