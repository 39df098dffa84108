"""The model card of an exported folder: what it is, how it was trained, on what text under which licences, how well it does."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from modernenc import __version__
from modernenc.config import Run
from modernenc.curriculum import Curriculum, reads_text
from modernenc.data.blocks import Corpus
from modernenc.objectives.masked_lm import MaskedLM
from modernenc.run_folder.checkpoints import Checkpoint
from modernenc.run_folder.tables import FIXED_RATIO, Table
from modernenc.saved_config import from_plain

CARD = "README.md"
"""Name of the file, which the Hugging Face hub shows as the page of the model."""


def card(
    name: str, masked_lm: MaskedLM, checkpoint: Checkpoint, run_dir: Path, corpus: Corpus, runs_code: bool, **more: str
) -> str:
    """Return the model card of a checkpoint, in Markdown with the header that the Hugging Face hub reads.

    `runs_code` says that the folder has code of its own. `more` are `revision`, the branch of the hub that it is for, `task`,
    whose head the model has, and, for an average, its kind `averaged` and `checkpoints`; they may be empty.
    """
    backbone: Any = masked_lm.backbone
    run, state = from_plain(checkpoint.run), checkpoint.state
    reached = list(run.phases)[: list(run.phases).index(state.phase) + 1]
    values = {
        "name": name,
        "loading": "".join(
            [f', revision="{more["revision"]}"' if more["revision"] else "", ", trust_remote_code=True" if runs_code else ""]
        ),
        "parameters": f"{sum(parameter.numel() for parameter in masked_lm.parameters()):,}",
        "architecture": (sys.modules[type(backbone).__module__].__doc__ or "").partition("\n")[0],
        "kind": type(backbone).__name__,
        "recipe": run.recipe,
        "version": __version__,
        "phase": state.phase,
        "tokens_seen": f"{state.tokens_seen:,}",
        "source": Path(run.init.source).name,
        "max_position": f"{backbone.max_position:,}",
        "longest": f"{max(run.phases[phase].seq_len for phase in reached):,}",
        "phases": list(_phases(run, reached)),
        "sources": list(_sources(checkpoint, corpus)),
        "scores": [] if more.get("averaged") else list(_scores(run_dir, state.step)),
        "evaluations": [] if more.get("averaged") else list(_evaluations(run_dir, state.step)),
        **more,
    }
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template("card.md").render(values)


def _phases(run: Run, reached: list[str]) -> Iterator[list[str]]:
    curriculum = Curriculum.of(run)
    for name in reached:
        phase = run.phases[name]
        tokens = curriculum.end_of(name) - curriculum.start_of(name)
        text = (f"{phase.seq_len:,}", f"{phase.batch_rows:,}", f"{phase.mask_ratio:.0%}") if reads_text(phase) else ("-",) * 3
        yield [name, f"{tokens:,}", *text, f"{phase.lr:g}"]


def _sources(checkpoint: Checkpoint, corpus: Corpus) -> Iterator[list[str]]:
    """Yield each source that was trained on, with its tokens in all phases, its licence, and where it is from."""
    served: dict[str, int] = {}
    for counts in checkpoint.state.data["token_counts"].values():
        for part, tokens in counts["served"].items():
            source = part.partition("/")[0]
            served[source] = served.get(source, 0) + tokens
    for source, tokens in served.items():
        entry = corpus.sources.get(source, {})
        yield [source, f"{tokens:,}", str(entry.get("licence", "")), str(entry.get("url", ""))]


def _scores(run_dir: Path, step: int) -> Iterator[list[str]]:
    """Yield the validation of a step by source, where it was validated."""
    for row in Table(run_dir / "validation.csv").read():
        if int(row["step"]) == step and float(row["mask_ratio"]) == FIXED_RATIO:
            yield [row["source"], row["seq_len"], f"{float(row['loss']):.3f}", f"{float(row['accuracy']):.1%}"]


def _evaluations(run_dir: Path, step: int) -> Iterator[list[str]]:
    """Yield the scores that `modernenc.evaluate --watch` has found for the checkpoint of a step."""
    for row in Table(run_dir / "evaluations.csv").read():
        if int(row["step"]) == step:
            yield [row["suite"], row["task"], f"{float(row['score']):.3f} ±{float(row['error']):.3f}"]
