"""A run on a corpus that is kept gives the figures that it gave: through years, versions of libraries, and changes of ours.

What is expected is in saved_corpus/golden.json. Where numbers are meant to change, and only there, it is written anew by
`PYTHONPATH=tests python tests/training/test_saved_corpus.py`, and the commit says why.
"""

import json
import sys
import tempfile
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch

from modernenc import __version__
from modernenc.planning.checks import check_run
from modernenc.run_folder.create import create
from modernenc.run_folder.lineage import Event
from modernenc.run_folder.tables import Table
from modernenc.training.fit import fit
from support.runs import composed

FOLDER = Path(__file__).parent / "saved_corpus"
GOLDEN = FOLDER / "golden.json"
TOLERANCE = 1e-3
"""Relative; processors and versions of torch round and add in other orders. A change in the data or the model is far above."""
MIXES = {"stable": {"stories": 3, "sums": 1}, "extend": {"stories": 1, "sums": 1}, "decay": {"stories": 3, "sums": 1}}
SETTINGS = [
    "+recipe=demo", f"data.root={FOLDER / 'corpus'}", "data.lanes=4", "data.buffer_rows=8", "data.workers=0",
    "trainer.precision=32-true", "trainer.micro_batch_tokens=512", "trainer.accelerator=cpu", "logger.every_steps=1",
    "backbone.hidden_size=32", "backbone.intermediate_size=48", "backbone.num_hidden_layers=3", "backbone.vocab_size=512",
    "backbone.num_attention_heads=2", "backbone.local_attention=32",
    "phases.stable.tokens=12000", "phases.stable.seq_len=64", "phases.stable.warmup_tokens=1000",
    "phases.stable.ramp.tokens=1500", "phases.extend.tokens=6000", "phases.extend.seq_len=128",
    "phases.decay.tokens=6000", "phases.decay.seq_len=128",
    *(f"phases.{phase}.mix={{code: 0, docstrings: 0, reference: 0, prose: 0}}" for phase in ("stable", "extend", "decay")),
    *(f"+phases.{phase}.mix.{source}={share}" for phase, mix in MIXES.items() for source, share in mix.items()),
    "optim=muon", "optim.lr=0.01", "optim.adamw_lr_ratio=0.3", "init.neighbours=false",
    "phases.stable.batch_rows=8", "phases.stable.ramp.start_rows=4", "phases.stable.ramp.step_rows=2",
    "phases.stable.mask_ratio=0.3", "phases.extend.mask_ratio=0.3",
    "checkpoint.every_tokens=0", "validation.every_tokens=0", "validation.tokens_per_source=1024",
]  # fmt: skip


class GivenWeights(L.Callback):
    """Matrices that are drawn here, so that a change of how a model draws its own is told from one of all else."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        generator = torch.Generator().manual_seed(1)
        for _, parameter in sorted(pl_module.named_parameters()):
            if parameter.dim() > 1:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def figures(run_dir: Path, given: bool) -> dict[str, float]:
    """Losses of a run: nats per predicted token."""
    run = composed([*SETTINGS, f"run_dir={run_dir}"])
    curriculum, corpus = check_run(run)
    create(run, "")
    fit(run, curriculum, corpus, "", None, Event("start"), [GivenWeights()] if given else [])
    losses = [float(row["loss"]) for row in Table(run_dir / "metrics.csv").read()]
    held_out = [float(row["loss"]) for row in Table(run_dir / "validation.csv").read() if row["source"] == "all"]
    places = {"first": 0, "middle": len(losses) // 2, "last": -1}
    return {**{name: losses[at] for name, at in places.items()}, "held out": held_out[-1], "steps": len(losses)}


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["given", "drawn"])
def test_a_run_on_the_saved_corpus_gives_the_figures_that_it_gave(tmp_path, weights):
    golden = json.loads(GOLDEN.read_text())
    assert figures(tmp_path / "run", weights == "given") == pytest.approx(golden[weights], rel=TOLERANCE)


def write() -> None:
    """Write golden.json anew."""
    with tempfile.TemporaryDirectory() as folder:
        found = {name: figures(Path(folder) / name, name == "given") for name in ("given", "drawn")}
    versions = {"modernenc": __version__, "torch": torch.__version__.partition("+")[0], "python": sys.version.split()[0]}
    GOLDEN.write_text(json.dumps({**versions, **found}, indent=1) + "\n")


if __name__ == "__main__":
    write()
