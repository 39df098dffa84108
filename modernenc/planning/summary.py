"""The plan of a run as numbers."""

from dataclasses import asdict
from typing import Any

from modernenc.config import Run
from modernenc.curriculum import Curriculum
from modernenc.data.blocks import Corpus
from modernenc.planning import estimate
from modernenc.planning.memory import memory
from modernenc.planning.notes import notes


def summarize(
    run: Run, curriculum: Curriculum, corpus: Corpus | None, measured: dict[str, float] | None = None
) -> dict[str, Any]:
    """Return the plan as plain values: FLOPs, bytes, tokens, steps, hours, and cost in `estimate.price_per_hour`'s currency."""
    hours = estimate.hours(run, curriculum, corpus, measured or {})
    phases = {}
    for name, phase in run.phases.items():
        tokens = curriculum.end_of(name) - curriculum.start_of(name)
        needed = memory(run, phase, corpus)
        phases[name] = {
            "tokens": tokens,
            "steps": sum(stage.steps for stage in curriculum.stages_of(name)),
            "flops": tokens * estimate.flops(run, phase, corpus),
            "memory": {**asdict(needed), "total": needed.total},
            "hours": hours.get(name),
        }
    parameters, states = estimate.parameters(run)
    ranks = run.trainer.devices * run.trainer.num_nodes
    return {
        "recipe": run.recipe,
        "parameters": parameters,
        "tokens": curriculum.total_tokens,
        "steps": curriculum.total_steps,
        "flops": sum(phase["flops"] for phase in phases.values()),
        "checkpoint_bytes": 4 * (parameters + states),
        "hours": sum(hours.values()) if hours else None,
        "device_hours": sum(hours.values()) * ranks if hours else None,
        "cost": sum(hours.values()) * ranks * run.estimate.price_per_hour if hours and run.estimate.price_per_hour else None,
        "phases": phases,
        "warnings": list(notes(run, curriculum, corpus)),
    }
