"""What several tests need: a small corpus, a small run, the checks of shapes."""

import csv
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, and where a kernel is defined

from support.shapes import check_shapes

check_shapes()  # ahead of the first import of modernenc

from modernenc import saved_config  # noqa: E402
from modernenc.config import Run  # noqa: E402
from modernenc.data.choices import COLUMNS  # noqa: E402
from support.runs import SMALL, SMALL_MEGA, composed  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The slow ones first, so that no process is left with them alone at the end.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # its keywords have the names of its folders too
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def no_trusted_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test lets saved configurations name is not trusted by the next test of the process."""
    monkeypatch.setattr(saved_config, "_trusted", set())


@pytest.fixture(scope="session")
def corpus_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Block shards of real text, in blocks of 256 tokens."""
    from data_prep.build import build
    from data_prep.config import CorpusConfig, SourceConfig, TokenizerConfig

    def python(part: str) -> SourceConfig:
        reader = {"_target_": "data_prep.environment.PythonFiles", "packages": ["networkx", "yaml"], "part": part}
        return SourceConfig(reader=reader, limit_mb=0.5, licence="BSD-3-Clause", url="https://networkx.org")

    reference = {"_target_": "data_prep.environment.ServiceReference"}
    out = tmp_path_factory.mktemp("corpus") / "small"
    build(
        CorpusConfig(
            name="small",
            out=str(out),
            sources={
                "code": python("code"),
                "docstrings": python("docstrings"),
                "reference": SourceConfig(
                    reader=reference, limit_mb=0.3, licence="Apache-2.0", url="https://github.com/boto/botocore"
                ),
            },
            tokenizer=TokenizerConfig(vocab_size=512, train_mb=0.3),
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
