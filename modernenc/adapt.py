"""Continue a model on the text of one domain, by one command: `python -m modernenc.adapt MODEL TEXT --out DIR [KEY=VALUE ...]`.

MODEL is a Hugging Face folder, a run folder, a checkpoint, or one of the ModernBERT repository (*.pt); TEXT a folder of plain
text, JSON lines or Parquet. The text is prepared under the model's tokenizer in DIR/corpus, the recipe `adapt` trains in
DIR/run, and DIR/model is the result: a Hugging Face folder. A table shows the loss before and after. With --general the model
goes on reading other text too, and the table says how much of that it forgets. With --new-tokenizer the embeddings of a new
tokenizer's tokens begin as the mean of how the old one spells them. KEY=VALUE changes the recipe: optim.lr=1e-4,
phases.domain.seq_len=4_096.

The same command again goes on where it was stopped.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from modernenc.atomic import write_text
from modernenc.cli import one_line_errors, take_allowed_code

BUCKETS = 16
"""Parts in which the text is shuffled, one at a time in memory."""
TOKENIZER_MB = 256
"""How much of the text a new tokenizer is trained on."""
DECAY = 0.2
"""Fraction of the tokens that the decay has."""
WARMUP = 0.1
"""Fraction of the first phase's tokens in which the learning rate rises."""
STEPS = 1_000
"""About how many steps there are, as long as a batch has no fewer and no more rows than these."""
FEWEST_ROWS, MOST_ROWS = 4, 576
VALIDATIONS = 8
"""How many times the run validates."""


def main() -> None:
    """Adapt what the command line names."""
    take_allowed_code()
    parser = argparse.ArgumentParser(
        prog="python -m modernenc.adapt", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="Hugging Face folder, run folder, or checkpoint")
    parser.add_argument("text", type=Path, metavar="TEXT", help="folder of the domain's text")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the recipe to change")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--general", type=Path, metavar="TEXT", help="folder of other text, so that less is forgotten")
    parser.add_argument("--replay", type=float, default=0.25, help="fraction of the tokens that are --general's (%(default)s)")
    parser.add_argument("--passes", type=float, default=3, help="times that the domain's text is read (%(default)s)")
    parser.add_argument(
        "--new-tokenizer", type=int, metavar="SIZE", help="train one of so many tokens on the text, to change to"
    )
    parser.add_argument("--licence", default="unknown", help="licence of the domain's text, for the model card (%(default)s)")
    arguments = parser.parse_intermixed_args()
    with one_line_errors():
        _adapt(arguments)


def _adapt(arguments: argparse.Namespace) -> None:
    from modernenc.data.blocks import Corpus
    from modernenc.data.store import Store

    source, tokenizer = _source_of(arguments.model)
    corpus_dir, run_dir, model_dir = (arguments.out / name for name in ("corpus", "run", "model"))
    if not 0 < arguments.replay < 1:
        raise ValueError(f"--replay {arguments.replay:g}: expected a fraction between 0 and 1")
    if not arguments.passes > 0:
        raise ValueError(f"--passes {arguments.passes:g}: expected more than 0")
    texts = {"domain": (arguments.text, arguments.licence)}
    if arguments.general:
        texts["general"] = arguments.general, "unknown"
    sources = {
        name: {
            "reader": {"_target_": "data_prep.inputs.reader_by_files", "data_folder": str(folder.resolve())},
            "url": str(folder),
            "licence": licence,
        }
        for name, (folder, licence) in texts.items()
    }
    conf = arguments.out / "conf"
    (conf / "corpus").mkdir(parents=True, exist_ok=True)
    own = arguments.new_tokenizer
    settings = {
        "sources": sources,
        "tokenizer": {"vocab_size": own, "train_mb": TOKENIZER_MB} if own else {"file": str(tokenizer.resolve())},
        "buckets": BUCKETS,
    }
    write_text(conf / "corpus" / "adapt.yaml", f"# @package _global_\n{yaml.safe_dump(settings, sort_keys=False)}")
    _run("data_prep", "--config-dir", str(conf), "+corpus=adapt", f"out={corpus_dir}")
    if (run_dir / "config.yaml").is_file():
        _run("modernenc.resume", str(run_dir))
    else:
        corpus = Corpus(Store(str(corpus_dir)))
        held = {name: sum(part["tokens"] for part in entry["slices"].values()) for name, entry in corpus.sources.items()}
        replay = arguments.replay if arguments.general else 0.0
        overrides = [
            f"init.source={source}", f"data.root={corpus_dir}", *([f"init.tokenizer={tokenizer}"] if own else []),
            *_budgets(held["domain"], arguments.passes, replay), *arguments.overrides,
        ]  # fmt: skip
        _run("modernenc.plan", "+recipe=adapt", *overrides)
        _run("modernenc.train", "+recipe=adapt", f"run_dir={run_dir}", *overrides)
    if not model_dir.exists():
        _run("modernenc.export", str(run_dir), str(model_dir))
    _show(run_dir)
    print(f"{model_dir} is ready: AutoModelForMaskedLM.from_pretrained({str(model_dir)!r})")


def _source_of(model: Path) -> tuple[Path, Path]:
    """Return what `init.source` is for a model, and its tokenizer; FileNotFoundError or ValueError if it has none."""
    from modernenc.data.blocks import TOKENIZER
    from modernenc.hugging_face.composer import SUFFIX
    from modernenc.model.init_source import backbone_of
    from modernenc.run_folder.create import CORPUS
    from modernenc.run_folder.load import locate

    if model.suffix == SUFFIX or (model / "config.json").is_file():
        backbone_of(model)  # which names what it cannot follow
        source, tokenizer = model, (model if model.is_dir() else model.parent) / TOKENIZER
    else:
        run, checkpoint = locate(model)
        if checkpoint is None:
            raise FileNotFoundError(f"{model} holds no checkpoint yet")
        source, tokenizer = checkpoint, Path(run.run_dir) / CORPUS / TOKENIZER
    if not tokenizer.is_file():
        raise FileNotFoundError(f"{tokenizer} does not exist; save the model's fast tokenizer there with save_pretrained")
    return source, tokenizer


def _budgets(domain_tokens: int, passes: float, replay: float) -> Iterator[str]:
    """Yield the phases' settings that depend on how much text there is, for a fraction `replay` of other text."""
    tokens = passes * domain_tokens / (1 - replay)
    rows = min(MOST_ROWS, max(FEWEST_ROWS, round(tokens / STEPS / 1_024)))
    for phase, share in (("domain", 1 - DECAY), ("decay", DECAY)):
        yield f"phases.{phase}.tokens={round(share * tokens)}"
        yield f"phases.{phase}.batch_rows={rows}"
        if replay:
            yield f"phases.{phase}.mix={{domain: {1 - replay}, general: {replay}}}"
    yield f"phases.domain.warmup_tokens={round(WARMUP * (1 - DECAY) * tokens)}"
    yield f"validation.every_tokens={round(tokens / VALIDATIONS)}"


def _run(module: str, *arguments: str) -> None:
    """Run another command, whose messages say what goes wrong; end as it does, if it fails."""
    ended = subprocess.run([sys.executable, "-m", module, *arguments], check=False)
    if ended.returncode:
        raise SystemExit(ended.returncode)


def _show(run_dir: Path) -> None:
    """Print the losses on each source before the first step and after the last one."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as Shown

    from modernenc.run_folder.tables import FIXED_RATIO, Table

    rows = [row for row in Table(run_dir / "validation.csv").read() if float(row["mask_ratio"]) == FIXED_RATIO]
    first, last = ({row["source"]: float(row["loss"]) for row in rows if row["step"] == rows[at]["step"]} for at in (0, -1))
    shown = Shown(title="held-out text, 15 % predicted: nats per token", title_justify="left", box=SIMPLE_HEAD)
    for name in ("", "before", "after", "change"):
        shown.add_column(name, justify="right" if name else "left")
    for source, before in first.items():
        shown.add_row(source, f"{before:.3f}", f"{last[source]:.3f}", f"{last[source] - before:+.3f}")
    Console(width=100).print(shown)


if __name__ == "__main__":
    main()
