"""What a run leaves in its folder, read and compared."""

from pathlib import Path

import torch

from modernenc.run_folder.checkpoints import read
from modernenc.run_folder.tables import Table

FINAL = Path("checkpoints") / "end-of-decay.ckpt"
"""The last checkpoint of a small run, within its folder."""


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint."""
    return read(checkpoint).weights


def same(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same weights, bit by bit."""
    first, second = weights(one), weights(other)
    assert first
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def same_state(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same weights, optimizer states and data state, bit by bit."""

    def plain(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value.tolist()
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list) else value

    first, second = read(one), read(other)
    return all(plain(getattr(first, key)) == plain(getattr(second, key)) for key in ("weights", "optimizers")) and (
        first.state.data == second.state.data
    )


def distance(one: Path, other: Path) -> float:
    """Return the largest distance between a weight of two checkpoints, relative to the norm of the other's."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return max(float((value - second[name]).norm() / second[name].norm().clamp(min=1e-6)) for name, value in first.items())


def losses(folder: Path) -> dict[int, float]:
    """Return the training loss of each recorded step, in nats per predicted token."""
    return {int(row["step"]): float(row["loss"]) for row in Table(folder / "metrics.csv").read()}


def metrics(folder: Path) -> list[dict[str, str | None]]:
    """Return the rows of `metrics.csv` without times and speeds, which no two runs share."""
    rows = Table(folder / "metrics.csv").read()
    return [{key: value for key, value in row.items() if "second" not in key and "per_s" not in key} for row in rows]
