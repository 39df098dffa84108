"""Runs small enough to train in a second, composed as a user's command line is."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict

from modernenc.cli import quote_arguments, to_schema
from modernenc.config import CONF_DIR, Run, register
from modernenc.planning.resolve import resolve
from modernenc.run_folder.overrides import check_overrides
from modernenc.train import main
from modernenc.training import resume as working

_ANY_BACKBONE = [
    "data.lanes=4", "data.buffer_rows=8", "data.workers=0", "trainer.micro_batch_tokens=256",
    "backbone.hidden_size=32", "backbone.intermediate_size=48", "backbone.num_hidden_layers=3", "backbone.vocab_size=512",
    "phases.stable.tokens=6000", "phases.stable.seq_len=64", "phases.stable.warmup_tokens=1000",
    "phases.stable.ramp.tokens=1500", "phases.extend.tokens=3000", "phases.extend.seq_len=128",
    "phases.decay.tokens=3000", "phases.decay.seq_len=128",
    "optim=muon", "init.neighbours=false", "phases.stable.mask_ratio=0.3", "phases.extend.mask_ratio=0.3",
    "phases.stable.batch_rows=8", "phases.stable.ramp.start_rows=4", "phases.stable.ramp.step_rows=2",
    "checkpoint.every_tokens=1500", "validation.every_tokens=0", "validation.tokens_per_source=512",
    "phases.stable.mix={code: 3, docstrings: 2, reference: 1, prose: 0}",
    "phases.extend.mix={code: 1, docstrings: 1, reference: 0, prose: 0}",
    "phases.decay.mix={code: 1, docstrings: 3, reference: 0, prose: 0}", "logger.every_steps=1",
]  # fmt: skip
SMALL = [*_ANY_BACKBONE, "backbone.num_attention_heads=2", "backbone.local_attention=32"]
"""The demo recipe cut down to a second, under Muon: three phases, a ramp, a change of length, three sources."""
SMALL_MEGA = [
    *_ANY_BACKBONE, "backbone.nffn_hidden_size=48", "backbone.shared_representation_size=16",
    "backbone.ema_projection_size=4", "backbone.chunk_size=48",
]  # fmt: skip
"""The demo_mega recipe cut down in the same way, with rows longer than a chunk."""
DROPOUT = {
    "demo": ["backbone.attention_out_dropout=0.1"],
    "demo_mega": ["backbone.dropout_prob=0.1", "backbone.attention_probs_dropout_prob=0.1"],
}
"""Settings that turn dropout on, by recipe."""


def composed(overrides: list[str], config_name: str = "train") -> Run:
    """Return the run that `python -m modernenc.train` makes of its arguments, before `main` checks and trains it.

    Raises ValueError for an unknown key or a missing value, as the command line does.
    """
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose(config_name, quote_arguments(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        run = to_schema(cfg, Run, ("recipe",))
    return run if run.smoke_test else resolve(run)


def small(corpus_root: Path, run_dir: Path, *more: str) -> list[str]:
    """Return the arguments of a small run of the demo recipe."""
    return ["+recipe=demo", *SMALL, f"data.root={corpus_root}", f"run_dir={run_dir}", *more]


def task(items: Path) -> list[str]:
    """Return the arguments that add a multiple-choice task `next` on these items."""
    return [
        "+task@tasks.next=multiple_choice", f"tasks.next.train={items / 'train.csv'}",
        f"tasks.next.validation={items / 'validation.csv'}", "tasks.next.validation_items=20", "tasks.next.seq_len=32",
        "tasks.next.batch_items=5", "tasks.next.lr_factor=0.5",
    ]  # fmt: skip


def train(run: Run) -> Path:
    """Check and train a run as `python -m modernenc.train` does, and return its folder."""
    main(run)
    return Path(run.run_dir)


def resume(path: Path, overrides: list[str]) -> None:
    """Resume a run as `python -m modernenc.resume` does."""
    check_overrides(path, overrides, rollback=False)
    working.resume(path, overrides)


def rollback(path: Path, overrides: list[str], skip_tokens: int) -> None:
    """Roll a run back as `python -m modernenc.resume --rollback` does."""
    check_overrides(path, overrides, rollback=True)
    working.rollback(path, overrides, skip_tokens)
