"""Sizes that a recipe leaves to its corpus."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from modernenc.config import RECIPES_DIR
from modernenc.curriculum import Curriculum
from modernenc.data.blocks import MANIFEST, Corpus
from modernenc.planning.checks import check_corpus
from modernenc.planning.sizes import ENOUGH_LANES, FEWEST_ROWS, LEFT, MOST_LANES, MOST_ROWS, buffered_tokens
from modernenc.saved_config import load
from support.commands import command, error
from support.results import FINAL
from support.runs import SMALL, composed, train

FREE = ["backbone.vocab_size=0", "data.lanes=0", "data.buffer_rows=0"]


@pytest.fixture
def corpus_of(corpus_root: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes the manifest of a corpus of another size; there is no text."""

    def make(blocks: int, block_tokens: int, vocab: int) -> Path:
        root = tmp_path / f"{blocks}-{block_tokens}-{vocab}"
        shutil.copytree(corpus_root, root, ignore=shutil.ignore_patterns("*.mds"))
        manifest = json.loads((root / MANIFEST).read_text())
        manifest["block_tokens"], manifest["tokenizer"]["vocab_size"] = block_tokens, vocab
        for source in manifest["sources"].values():
            for part in source["slices"].values():
                part["blocks"], part["tokens"] = blocks, blocks * block_tokens
        (root / MANIFEST).write_text(json.dumps(manifest))
        return root

    return make


def text_only(*settings: str) -> list[str]:
    return ["+recipe=demo", *SMALL, *FREE, *settings]


@pytest.mark.parametrize("blocks", [1, 20, 5_000])
@pytest.mark.parametrize("tokens", [20_000, 3_000_000, 5_000_000_000])
@pytest.mark.parametrize("seq_len", [64, 1_024])
def test_a_corpus_of_any_size_gives_lanes_and_rows_that_it_can_fill(corpus_of, blocks, tokens, seq_len):
    settings = [f"phases.{name}.{key}" for name in ("stable", "extend", "decay") for key in
                (f"tokens={tokens}", f"seq_len={seq_len}")]  # fmt: skip
    run = composed(text_only(*settings, f"data.root={corpus_of(blocks, 4_096, 501)}"))
    check_corpus(run, Corpus.of(run.data))
    data, curriculum = run.data, Curriculum.of(run)
    assert 1 <= data.lanes <= min(MOST_LANES, blocks) and FEWEST_ROWS <= data.buffer_rows <= MOST_ROWS
    assert data.lanes & (data.lanes - 1) == 0, "any usual number of ranks divides a power of two"
    assert run.backbone["vocab_size"] == 512
    left = max(buffered_tokens(run, phase, 4_096) / curriculum.text_tokens(name) for name, phase in run.phases.items())
    assert left <= LEFT or (data.lanes <= ENOUGH_LANES and data.buffer_rows == FEWEST_ROWS)
    if tokens == 5_000_000_000 and blocks >= 5_000:
        assert (data.lanes, data.buffer_rows) == (MOST_LANES, MOST_ROWS)
    again = composed(text_only(*settings, f"data.root={data.root}", "trainer.precision=32-true", "data.workers=1"))
    assert again.data.from_corpus == [setting.partition("=")[0] for setting in FREE]
    assert (again.data.lanes, again.data.buffer_rows) == (data.lanes, data.buffer_rows)


def test_what_is_given_stays_and_what_is_left_free_follows(corpus_of):
    root = f"data.root={corpus_of(5_000, 256, 700)}"
    run = composed(text_only(root, "data.lanes=3", "backbone.vocab_size=1000"))
    assert (run.data.lanes, run.backbone["vocab_size"], run.data.from_corpus) == (3, 1000, ["data.buffer_rows"])
    assert not composed(["+recipe=demo", *SMALL, root, "backbone.vocab_size=1000"]).data.from_corpus


FITTED = {"demo", "demo_mega", "own", "adapt", "bioclinical"}
"""Recipes whose sizes follow from the corpus."""


@pytest.mark.parametrize("recipe", sorted({path.stem for path in RECIPES_DIR.glob("*.yaml")} - FITTED))
def test_published_recipes_state_their_sizes(recipe):
    run = composed([f"+recipe={recipe}"])
    assert not run.data.from_corpus
    assert (run.data.lanes, run.data.buffer_rows) == (64, 256 if recipe == "mega_small_16k" else 512)
    assert run.backbone["vocab_size"] == {"mmbert": 256_000, "mega_small_16k": 50_265}.get(recipe, 50_368)


def test_a_run_writes_down_its_sizes_and_what_is_resumed_or_branched_keeps_them(corpus_root, tmp_path):
    settings = text_only(f"data.root={corpus_root}")
    run = composed([*settings, f"run_dir={tmp_path / 'run'}"])
    assert run.data.lanes == 16 and run.data.buffer_rows == 8 and run.backbone["vocab_size"] == 512
    folder = train(run)
    written = load(folder)
    assert written.data == run.data and written.backbone == run.backbone
    planned = " ".join((folder / "plan.txt").read_text().split())
    assert "16 lanes that pack 8 rows at a time, a vocabulary of 512" in planned
    assert "(backbone.vocab_size, data.lanes, data.buffer_rows: from the corpus)" in planned
    longer = [*settings, *(f"phases.{name}.tokens=900_000_000" for name in run.phases)]
    assert composed(longer).data.buffer_rows > 8
    branch = composed([*longer, f"branch_from={folder / 'checkpoints/end-of-extend.ckpt'}"])
    assert branch.data.buffer_rows == 8, "as the run that it leaves"
    assert (folder / FINAL).exists()


def test_a_plan_without_a_corpus_says_what_it_assumes(tmp_path):
    result = command("modernenc.plan", *text_only(f"data.root={tmp_path / 'nowhere'}"))
    assert result.returncode == 0, result.stderr
    said = " ".join(result.stdout.split())
    assert "64 lanes that pack 512 rows at a time, a vocabulary of 8,192" in said and "assumed, until" in said
    assert "there is no corpus yet; prepare it with: python -m data_prep +corpus=demo out=" in said
    assert "no manifest.json there" in error("modernenc.train", *text_only(f"data.root={tmp_path / 'nowhere'}"))


def test_a_plan_tells_what_is_left_in_windows_and_what_to_change(corpus_root):
    settings = ["+recipe=demo", *SMALL, f"data.root={corpus_root}"]
    wasteful = command("modernenc.plan", *settings, "data.buffer_rows=512", "--json")
    notes = "\n".join(json.loads(wasteful.stdout)["warnings"])
    assert "tokens of text are over, up to 132,096 more remain in packing buffers, drawn but not trained on" in notes
    assert "lower data.buffer_rows or data.lanes (0 chooses what suits the corpus)" in notes
    plain = command("modernenc.plan", *settings).stdout
    assert "drawn, not trained on" in plain and "%" not in plain.split("drawn, not trained on")[1].splitlines()[0]


def test_a_vocabulary_larger_than_the_tokenizers_is_noted(corpus_root):
    planned = command(
        "modernenc.plan", "+recipe=demo", *SMALL, f"data.root={corpus_root}", "backbone.vocab_size=4096", "--json"
    )
    notes = json.loads(planned.stdout)["warnings"]
    assert any("backbone.vocab_size=4096 is more than the 512 entries of the tokenizer" in note for note in notes)


@pytest.mark.slow
def test_a_plan_opens_what_the_run_would_open(corpus_root, tmp_path):
    settings = ["+recipe=demo", *SMALL, f"data.root={corpus_root}", f"run_dir={tmp_path / 'run'}"]
    for wrong in (
        [f"init.source={tmp_path}"],
        ["+from=/nonexistent.ckpt"],
        ["+phases.decay.mix.poetry=1"],
    ):
        assert error("modernenc.plan", *settings, *wrong) == error("modernenc.train", *settings, *wrong)
    shard = sorted(corpus_root.glob("code/slice-000/**/*.mds"))[0]
    copy = tmp_path / "copy"
    shutil.copytree(corpus_root, copy)
    (copy / shard.relative_to(corpus_root)).unlink()
    lacking = [*settings, f"data.root={copy}"]
    assert shard.name in error("modernenc.plan", *lacking)
    assert Corpus.of(composed(settings).data).vocab_size == 512
