"""Draw `plots/curves.png`, every curve that a phase can have, with the code that trains: `python docs/curves.py`."""

from pathlib import Path
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes

from modernenc.config import Phase, Ramp
from modernenc.curriculum import Curriculum
from modernenc.schedules import LR_CURVES

TOKENS, POINTS = 1_000_000, 400
"""Tokens of a phase, and points of a curve."""


def main() -> None:
    """Plot learning rates of one phase after a warmup, of several phases, and batch ramps, over the tokens seen."""
    figure, (one, several, ramps) = pyplot.subplots(1, 3, figsize=(11, 2.9), constrained_layout=True)
    for name in LR_CURVES:
        _plot(one, "lr", name, _phase(name, warmup_tokens=100_000, final_lr_factor=0.1))
    one.set_title("lr_curve, to final_lr_factor=0.1", fontsize=9)
    cosine = {"lr_curve": "cosine", "warmup_tokens": 50_000, "final_lr_factor": 0.2}
    restart = _phase(**cosine, first_lr_factor=0.2)
    _plot(several, "lr", "first_lr_factor=0.2", _phase(**cosine), restart, restart)
    stable, decay = (_phase("constant", warmup_tokens=100_000), _phase("constant")), _phase("one_minus_sqrt")
    _plot(several, "lr", "warmup, stable, decay", *stable, decay)
    several.set_title("phases in a row", fontsize=9)
    for equal in ("steps", "tokens"):
        _plot(ramps, "batch_rows", f"ramp.equal={equal}", _phase("constant", ramp=Ramp(800_000, 5, 5, equal)))
    ramps.set_title("rows of a step, 5 to 40", fontsize=9)
    for axis in (one, several, ramps):
        axis.legend(frameon=False, fontsize=8)
        axis.set_xlabel("million tokens seen")
        axis.set_ylim(bottom=0)
        axis.margins(x=0)
    figure.savefig(Path(__file__).with_name("plots") / "curves.png", dpi=110)


def _phase(lr_curve: str, **settings: Any) -> Phase:
    settings = {"ramp": Ramp(), **settings}
    return Phase(TOKENS, 100, 40, lr=1.0, lr_curve=lr_curve, weight_decay=0, mask_ratio=0.3, mix={"any": 1}, **settings)


def _plot(axis: Axes, value: str, label: str, *phases: Phase) -> None:
    """Plot a value of each step's settings over phases in a row."""
    curriculum = Curriculum({str(number): phase for number, phase in enumerate(phases)})
    tokens = [curriculum.total_tokens * point // POINTS for point in range(POINTS)]
    axis.plot([seen / 1e6 for seen in tokens], [getattr(curriculum.at(seen), value) for seen in tokens], label=label)


if __name__ == "__main__":
    main()
