"""The README's commands work as they are written, one after the other; only the budgets are cut."""

import re
import shlex
import subprocess
import sys

import pytest

from support.commands import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(
    r"^(?:\.venv/bin/)?(python -m .*?)(?:\s+#.*)?$", "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S)), re.M
)
SHORT = {
    "modernenc.bench": ["repetitions=1", "step_tokens=2048", "micro_batch_tokens=2048"],
    "data_prep": ["sources.docstrings.limit_mb=2", "sources.reference.limit_mb=1", "sources.code.limit_mb=2"],
    "modernenc.train": [
        "phases.stable.tokens=60_000", "phases.stable.ramp.tokens=10_000", "phases.stable.warmup_tokens=10_000",
        "phases.extend.tokens=20_000", "phases.decay.tokens=20_000",
        "validation.tokens_per_source=2048", "checkpoint.every_tokens=0",
    ],
}  # fmt: skip


@pytest.mark.slow
def test_the_commands_run_in_order(tmp_path):
    ran = []
    for line in COMMANDS:
        words = shlex.split(line)
        if any(mark in line for mark in ("NAME", "DIR", "CKPT")):
            continue
        shorter = [] if "smoke_test=" in line else SHORT.get(words[2], [])
        result = subprocess.run(
            [sys.executable, *words[1:], *shorter], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{line}\n{result.stderr}"
        ran.append(words[2])
    assert {
        "data_prep",
        "data_prep.verify",
        "modernenc.plan",
        "modernenc.train",
        "modernenc.resume",
        "modernenc.export",
        "modernenc.compare",
    } <= set(ran)


def test_every_recipe_is_in_the_table():
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert f"`{path.stem}`" in README


def test_every_file_that_it_names_exists():
    named = re.findall(r"\]\(([\w./]+)\)", README)
    assert len(named) > 5
    for name in named:
        assert (ROOT / name).exists(), name
