"""A backbone, a phase and an objective of one's own, with no change to the package but what docs/extend.md says.

The backbone also passes the contract of backbones: tests/model/test_backbones.py.
"""

import re
from pathlib import Path
from textwrap import indent

import pytest

from modernenc.run_folder.tables import Table
from modernenc.train import main
from own_parts.ranking import Ranking
from support.commands import ROOT, command
from support.runs import task

PARTS = ROOT / "tests" / "own_parts"
PAGE = ROOT / "docs" / "extend.md"


@pytest.mark.slow
def test_a_run_trains_ones_own_backbone_in_ones_own_phase(corpus_root, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{PARTS.parent}")
    smaller = [
        "phases.stable.tokens=6000", "phases.stable.seq_len=64", "phases.stable.warmup_tokens=1000",
        "phases.anneal.tokens=3000", "phases.anneal.seq_len=128",
        *(f"phases.{phase}.mix.text=0" for phase in ("stable", "anneal")), "+phases.stable.mix.code=1",
        "+phases.anneal.mix.docstrings=1", "backbone.hidden_size=32", "backbone.num_hidden_layers=2", "data.lanes=4",
        "data.buffer_rows=8", "data.workers=0", "logger.every_steps=1", "validation.tokens_per_source=512",
    ]  # fmt: skip
    folder = tmp_path / "run"
    result = command(
        "modernenc.train", "--config-dir", str(PARTS / "conf"), "+recipe=bert", f"data.root={corpus_root}",
        f"run_dir={folder}", *smaller,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = Table(folder / "metrics.csv").read()
    assert {row["phase"] for row in rows} == {"stable", "anneal"}
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert {float(row["mask_ratio"]) for row in rows if row["phase"] == "anneal"} == {0.15}
    assert float(rows[-1]["lr"]) < 0.1 * max(float(row["lr"]) for row in rows)
    assert (folder / "checkpoints" / "end-of-anneal.ckpt").is_file()
    causal = command(
        "modernenc.plan", "--config-dir", str(PARTS / "conf"), "+recipe=bert", f"data.root={corpus_root}", *smaller,
        "phases.stable.causal_share=0.5",
    )  # fmt: skip
    assert causal.returncode == 2 and "phases.stable.causal_share=0.5: Bert cannot be causal" in causal.stderr
    refused = command("modernenc.resume", str(folder))
    assert refused.returncode == 2 and "--allow-code own_parts.bert" in refused.stderr
    allowed = command("modernenc.resume", str(folder), "--allow-code", "own_parts.bert")
    assert allowed.returncode == 0 and "is finished" in allowed.stdout


@pytest.mark.slow
def test_a_run_trains_ones_own_objective(small_run, items, monkeypatch):
    """In the place where docs/extend.md says that objectives are chosen."""
    monkeypatch.setattr("modernenc.objectives.MultipleChoice", Ranking)
    run = small_run(
        *task(items), f"tasks.next.train={items / 'many.csv'}", "+phases.decay.objectives={masked_lm: 1, next: 2}",
        "phases.decay.tokens=20_000",
    )  # fmt: skip
    main(run)
    folder = Path(run.run_dir)
    losses = [float(row["loss"]) for row in Table(folder / "metrics.csv").read() if row["objective"] == "next"]
    assert len(losses) > 10 and sum(losses[-5:]) < sum(losses[:5])
    assert any(row["source"] == "next" for row in Table(folder / "validation.csv").read())


def test_the_page_shows_what_is_tested():
    """Indentation and empty lines may differ."""
    files = "\n".join(path.read_text() for path in PARTS.rglob("*") if path.suffix in (".py", ".yaml"))
    blocks = re.findall(r"^```(?:py|yaml)\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert len(blocks) > 4
    for block in blocks:
        assert any(without_empty_lines(indent(block, " " * spaces)) in without_empty_lines(files) for spaces in (0, 4, 8)), (
            block
        )


def without_empty_lines(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if line.strip())
