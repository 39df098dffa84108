"""What several tests need: a small corpus, a small run, the checks of shapes."""

import csv
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from beartype import BeartypeConf, beartype
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from jaxtyping import install_import_hook
from omegaconf import OmegaConf, open_dict

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, and where a kernel is defined

# Shapes and dtypes in signatures are checked here, and cost nothing in use. An int is a float, as PEP 484 has it.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
_SHAPED = [
    "modernenc.backbones", "modernenc.kernels", "modernenc.objectives", "modernenc.data.batch", "modernenc.data.packing",
    "modernenc.data.masking",
]  # fmt: skip
_hook = install_import_hook(_SHAPED, "conftest.checked")
_hook.__enter__()

from modernenc.config import CONF_DIR, Run, register  # noqa: E402
from modernenc.data.choices import COLUMNS  # noqa: E402
from modernenc.sizes import settle_sizes  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"

_ANY_BACKBONE = [
    "data.lanes=4", "data.window_rows=8", "data.workers=0", "trainer.micro_batch_tokens=256",
    "backbone.hidden_size=32", "backbone.intermediate_size=48", "backbone.num_hidden_layers=3", "backbone.vocab_size=512",
    "phases.stable.tokens=6000", "phases.stable.seq_len=64", "phases.stable.warmup_tokens=1000",
    "phases.stable.ramp.tokens=1500", "phases.extend.tokens=3000", "phases.extend.seq_len=128",
    "phases.decay.tokens=3000", "phases.decay.seq_len=128",
    "checkpoint.every_tokens=1500", "validation.every_tokens=0", "validation.tokens_per_source=512",
    "phases.stable.mix={code: 3, docstrings: 2, reference: 1, prose: 0}",
    "phases.extend.mix={code: 1, docstrings: 1, reference: 0, prose: 0}",
    "phases.decay.mix={code: 1, docstrings: 3, reference: 0, prose: 0}", "logger.every_steps=1",
]  # fmt: skip
SMALL = [*_ANY_BACKBONE, "backbone.num_attention_heads=2", "backbone.local_attention=32"]
"""The demo recipe cut down to a second: three phases, a ramp, a change of length, three sources."""
SMALL_MEGA = [
    *_ANY_BACKBONE, "backbone.nffn_hidden_size=48", "backbone.shared_representation_size=16",
    "backbone.ema_projection_size=4", "backbone.chunk_size=48",
]  # fmt: skip
"""The same for its form in MEGA, with rows longer than a chunk."""
DROPOUT = {
    "demo": ["backbone.attention_out_dropout=0.1"],
    "demo_mega": ["backbone.dropout_prob=0.1", "backbone.attention_probs_dropout_prob=0.1"],
}
"""By recipe."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The slow ones first, so that no process is left with them alone at the end.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # its keywords have the names of its folders too
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def composed(overrides: list[str], config_name: str = "train") -> Run:
    """The typed run that a command line stands for."""
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose(config_name, overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    OmegaConf.resolve(cfg)
    run = cast(Run, OmegaConf.to_object(cfg))
    if config_name == "train":
        settle_sizes(run)
    return run


@pytest.fixture(scope="session")
def corpus_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Block shards of real text, in blocks of 256 tokens."""
    from data_prep.build import build
    from data_prep.config import Corpus, Source, Tokenizer

    def python(part: str) -> Source:
        reader = {"_target_": "data_prep.environment.PythonFiles", "packages": ["networkx", "yaml"], "part": part}
        return Source(reader=reader, limit_mb=0.5, licence="BSD-3-Clause", url="https://networkx.org")

    reference = {"_target_": "data_prep.environment.ServiceReference"}
    out = tmp_path_factory.mktemp("corpus") / "small"
    build(
        Corpus(
            name="small",
            out=str(out),
            sources={
                "code": python("code"),
                "docstrings": python("docstrings"),
                "reference": Source(
                    reader=reference, limit_mb=0.3, licence="Apache-2.0", url="https://github.com/boto/botocore"
                ),
            },
            tokenizer=Tokenizer(vocab_size=512, train_mb=0.3),
            block_tokens=256,
            validation_error=0.02,
            validation_share=0.1,
            max_dropped=0.01,
            buckets=2,
            workers=1,
        )
    )
    return out


@pytest.fixture(scope="session")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions that can be learnt: the right ending repeats the context's last word."""
    folder = tmp_path_factory.mktemp("items")
    words = ["import", "return", "class", "list", "tuple", "string", "value", "name", "graph", "node", "edge", "weight"]
    rng = np.random.default_rng(3)
    for name, number in (("train", 37), ("many", 400), ("validation", 24)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["", *COLUMNS])
            for row in range(number):
                four = rng.choice(words, 4, replace=False).tolist()
                label = int(rng.integers(4))
                writer.writerow([row, f"the {four[label]}", "is, again,", *four, label])
    return folder


@pytest.fixture
def small_run(corpus_root: Path, tmp_path: Path) -> Callable[..., Run]:
    """The small run with some settings changed."""

    def make(*overrides: str, recipe: str = "demo") -> Run:
        small = {"demo": SMALL, "demo_mega": SMALL_MEGA}[recipe]
        return composed([f"+recipe={recipe}", *small, f"data.root={corpus_root}", f"run_dir={tmp_path / 'run'}", *overrides])

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a disk of some MiB."""
    mounted = []

    def make(mib: int) -> Path:
        disk = tmp_path / f"disk{len(mounted)}"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(disk)]
        if os.name != "posix" or os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("a small disk cannot be mounted here")
        mounted.append(disk)
        return disk

    yield make
    for disk in mounted:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def task(items: Path) -> list[str]:
    """Settings of a task `next` on these items."""
    return [
        "+task@tasks.next=multiple_choice", f"tasks.next.train={items / 'train.csv'}",
        f"tasks.next.validation={items / 'validation.csv'}", "tasks.next.validation_items=20", "tasks.next.seq_len=32",
        "tasks.next.batch_items=5", "tasks.next.lr_factor=0.5",
    ]  # fmt: skip


def command(module: str, *arguments: str, cwd: Path = ROOT, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Run `python -m module arguments`."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False
    )
