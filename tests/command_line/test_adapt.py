"""`modernenc.adapt`: from a model and a folder of text to a model that knows the text, by one command."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForMaskedLM, AutoTokenizer

from modernenc import adapt
from modernenc.data.blocks import Corpus
from modernenc.data.store import Store
from modernenc.model.export import export
from modernenc.run_folder.checkpoints import read
from modernenc.run_folder.tables import ALL, FIXED_RATIO, Table
from support.commands import command
from support.corpora import WORDS
from support.results import FINAL
from support.runs import train

SMALLER = [
    "phases.domain.seq_len=64", "phases.decay.seq_len=64", "trainer.micro_batch_tokens=1024",
    "validation.tokens_per_source=2048", "data.workers=0", "optim.lr=3e-3",
]  # fmt: skip


@pytest.fixture
def model(small_run, tmp_path) -> Path:
    folder = train(small_run(f"run_dir={tmp_path / 'pretrained'}"))
    export([folder], tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def texts(tmp_path) -> tuple[Path, Path]:
    """A domain whose documents repeat a few words, and others that repeat them backwards."""
    domain, general = tmp_path / "domain", tmp_path / "general"
    for folder, words, name in ((domain, WORDS, "{}.txt"), (general, WORDS[::-1], "{}.jsonl")):
        folder.mkdir()
        for number in range(60):
            text = " ".join(words * 12) + f" {number}"
            (folder / name.format(number)).write_text(json.dumps({"text": text}) if "json" in name else text)
    return domain, general


def losses(folder: Path) -> list[dict[str, float]]:
    """Losses by source of the first and of the last validation."""
    rows = [row for row in Table(folder / "validation.csv").read() if float(row["mask_ratio"]) == FIXED_RATIO]
    steps = sorted({int(row["step"]) for row in rows})
    return [{row["source"]: float(row["loss"]) for row in rows if int(row["step"]) == step} for step in (steps[0], steps[-1])]


@pytest.mark.slow
def test_a_model_is_adapted_by_one_command_that_can_be_given_again(model, texts, tmp_path):
    out, (domain, general) = tmp_path / "out", texts
    arguments = [str(model), str(domain), "--out", str(out), "--general", str(general), "--passes", "2", "--replay", "0.4"]
    result = command("modernenc.adapt", *arguments, "--licence", "CC0-1.0", *SMALLER)
    assert result.returncode == 0, result.stderr
    before, after = losses(out / "run")
    assert set(before) == {"domain", "general", ALL} and after["domain"] < before["domain"] - 0.3
    assert f"{before['domain']:.3f}" in result.stdout and f"{after['domain']:.3f}" in result.stdout
    assert len(AutoModelForMaskedLM.from_pretrained(out / "model").model.layers) == 3
    card = (out / "model" / "README.md").read_text()
    assert "CC0-1.0" in card and "from the weights of model" in card
    trained = read(out / "run" / FINAL)
    served = [sum(phase["served"].values()) for phase in trained.state.data["token_counts"].values()]
    corpus = Corpus(Store(str(out / "corpus")))
    held = {name: sum(part["tokens"] for part in entry["slices"].values()) for name, entry in corpus.sources.items()}
    assert sum(served) == pytest.approx(2 * held["domain"] / 0.6, rel=0.1)
    of_general = sum(phase["served"]["general/slice-000"] for phase in trained.state.data["token_counts"].values())
    assert of_general / sum(served) == pytest.approx(0.4, abs=0.1)  # of few blocks
    for path in (out / "run" / "checkpoints").glob("end-of-decay.*"):
        path.unlink()  # as if it had been stopped during the decay
    again = command("modernenc.adapt", *arguments, "--licence", "CC0-1.0", *SMALLER)
    assert again.returncode == 0, again.stderr
    assert "corpus is up to date" in again.stdout and f"{after['domain']:.3f}" in again.stdout
    assert read(out / "run" / FINAL).state.tokens_seen == trained.state.tokens_seen


@pytest.mark.slow
def test_a_model_changes_to_a_tokenizer_of_the_domain(model, texts, tmp_path):
    out = tmp_path / "out"
    result = command("modernenc.adapt", str(model), str(texts[0]), "--out", str(out), "--new-tokenizer", "300", *SMALLER)
    assert result.returncode == 0, result.stderr
    before, after = losses(out / "run")
    assert after["domain"] < before["domain"] - 0.3
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert 256 < len(tokenizer) <= 300 < len(AutoTokenizer.from_pretrained(model))
    assert AutoModelForMaskedLM.from_pretrained(out / "model").config.vocab_size == 320
    wrong = command("modernenc.adapt", str(model), str(texts[0]), "--out", str(tmp_path / "other"), "--new-tokenizer", "9")
    assert (
        wrong.returncode == 2 and wrong.stderr.startswith("error: tokenizer.vocab_size=9: ") and wrong.stderr.count("\n") == 1
    )


def test_what_cannot_be_adapted_is_said_in_a_line(model, texts, tmp_path, monkeypatch, capfd):
    domain, general = texts
    empty, mixed, foreign, plain = (tmp_path / name for name in ("empty", "mixed", "foreign", "plain"))
    for folder in (empty, mixed, foreign, plain):
        folder.mkdir()
    (mixed / "a.txt").write_text("a")
    (mixed / "b.jsonl.gz").write_text("b")
    (foreign / "config.json").write_text('{"model_type": "t5"}')
    (plain / "config.json").write_text((model / "config.json").read_text())
    (foreign / "tokenizer.json").write_text((model / "tokenizer.json").read_text())
    out = ["--out", str(tmp_path / "out")]
    for arguments, said in (
        ([tmp_path / "nothing", domain], "nothing does not exist; give a run folder or one of its checkpoints"),
        ([plain, domain], "tokenizer.json does not exist; save the model's fast tokenizer there"),
        ([model, tmp_path / "nowhere"], "nowhere is no folder"),
        ([model, empty], "it holds none of them"),
        ([model, mixed], "it holds several kinds"),
        ([model, domain, "--general", general, "--replay", "1"], "--replay 1: expected a fraction between 0 and 1"),
        ([model, domain, "--passes", "0"], "--passes 0: expected more than 0"),
        ([foreign, domain], "is of model_type t5; expected"),
        ([model, domain, "phases.domain.len=3"], "phases.domain.len: unknown key"),
    ):
        monkeypatch.setattr("sys.argv", ["adapt", *map(str, arguments), *out])
        with pytest.raises(SystemExit) as ended:
            adapt.main()
        stderr = capfd.readouterr().err
        assert ended.value.code == 2 and said in stderr, (arguments, stderr)
        assert stderr.count("error: ") == 1 and "Traceback" not in stderr
