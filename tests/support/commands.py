"""Commands and pieces of code in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""
TESTS = ROOT / "tests"


def command(module: str, *arguments: str, cwd: Path = ROOT, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Run `python -m module arguments`."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False
    )


def error(module: str, *arguments: str, cwd: Path = ROOT) -> str:
    """Run a command that must fail, and return its error, which must be the only line on stderr."""
    result = command(module, *arguments, cwd=cwd)
    assert result.returncode != 0
    lines = [line for line in result.stderr.strip().splitlines() if line]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def importing(**variables: str) -> dict[str, str]:
    """Return an environment in which any Python process can import the checkout and `support`."""
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}", **variables}
