"""Draw every curve that a phase can have, from the code that trains: `python -m modernenc.reporting.curves FILE.png`."""

import argparse
from dataclasses import replace
from pathlib import Path

from matplotlib import pyplot

from modernenc.config import Phase, Ramp
from modernenc.curriculum import Curriculum
from modernenc.schedules import LR_CURVES

_TOKENS, _LENGTH, _ROWS, _POINTS = 1_000_000, 100, 40, 400


def main() -> None:
    """Write the picture that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m modernenc.reporting.curves", description=__doc__)
    parser.add_argument("png", type=Path, help="file to write")
    draw(parser.parse_args().png)


def draw(png: Path) -> None:
    """Plot learning rates of one phase after a warmup, of several phases, and batch ramps, over the tokens seen."""
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 2.9), constrained_layout=True)
    for name in LR_CURVES:
        curriculum = Curriculum({"only": _phase(name, warmup_tokens=100_000, final_lr_factor=0.1)})
        axes[0].plot(*_over_tokens(curriculum, "lr"), label=name)
    axes[0].set_title("lr_curve, to final_lr_factor=0.1", fontsize=9)
    decays = _phase("cosine", warmup_tokens=50_000, final_lr_factor=0.2)
    again = _phase("cosine", warmup_tokens=50_000, final_lr_factor=0.2, first_lr_factor=0.2)
    axes[1].plot(*_over_tokens(Curriculum({"a": decays, "b": again, "c": again}), "lr"), label="first_lr_factor=0.2")
    stable = {"a": _phase("constant", warmup_tokens=100_000), "b": _phase("constant"), "c": _phase("one_minus_sqrt")}
    axes[1].plot(*_over_tokens(Curriculum(stable), "lr"), label="warmup, stable, decay")
    axes[1].set_title("phases in a row", fontsize=9)
    for equal in ("steps", "tokens"):
        curriculum = Curriculum({"only": _phase("constant", ramp=Ramp(800_000, 5, 5, equal))})
        axes[2].plot(*_over_tokens(curriculum, "batch_rows"), label=f"ramp.equal={equal}")
    axes[2].set_title("rows of a step, 5 to 40", fontsize=9)
    for axis in axes:
        axis.legend(frameon=False, fontsize=8)
        axis.set_xlabel("million tokens seen")
        axis.set_ylim(bottom=0)
        axis.margins(x=0)
    figure.savefig(png, dpi=110)


def _phase(lr_curve: str, ramp: Ramp | None = None, **settings: float) -> Phase:
    phase = Phase(_TOKENS, _LENGTH, _ROWS, ramp or Ramp(), 1.0, lr_curve, weight_decay=0, mask_ratio=0.3, mix={"any": 1})
    return replace(phase, **settings)


def _over_tokens(curriculum: Curriculum, name: str) -> tuple[list[float], list[float]]:
    tokens = [curriculum.total_tokens * point // _POINTS for point in range(_POINTS)]
    return [position / 1e6 for position in tokens], [getattr(curriculum.at(position), name) for position in tokens]


if __name__ == "__main__":
    main()
