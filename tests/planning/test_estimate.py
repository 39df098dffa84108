"""What the plan says of FLOPs, memory and hours, against what happens."""

import json
from dataclasses import replace
from itertools import accumulate
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from modernenc.config import Estimate, Run
from modernenc.curriculum import Curriculum
from modernenc.data.blocks import Corpus
from modernenc.data.loader import Steps
from modernenc.data.state import DataState
from modernenc.model import optim
from modernenc.model.build import build_objectives, checkpoint_activations
from modernenc.objectives.linear_cross_entropy import CHUNK_ROWS, GPU_CHUNK_ROWS
from modernenc.planning import estimate
from modernenc.planning.devices import DEVICES
from modernenc.planning.measure import only_phase
from modernenc.planning.memory import memory
from modernenc.planning.notes import notes
from support.commands import command
from support.results import FINAL
from support.runs import SMALL, composed, train


@pytest.mark.parametrize("name", ["demo", "demo_mega"])
@pytest.mark.parametrize("length", [200, 700])
def test_flops_are_those_that_torch_counts(name, length):
    run = composed([f"+recipe={name}", "trainer.precision=32-true", "data.root=nowhere"])
    objective = build_objectives(run).masked_lm
    ends = torch.tensor([0, length, 2 * length], dtype=torch.int32)
    with FlopCounterMode(display=False) as counter:
        objective.backbone(torch.zeros(2 * length, dtype=torch.long), ends, length)
    counted, said = counter.get_total_flops(), 2 * length * objective.backbone.describe().forward_flops(length)
    assert said == pytest.approx(counted, rel=0.15)  # windows and chunks are computed in whole blocks


def test_a_gpu_keeps_what_attention_returned_where_a_layer_is_recomputed():
    settings = ["+recipe=base", "trainer.micro_batch_tokens=8192", "trainer.activation_checkpointing_every=2"]
    on_cpu, on_gpu = (composed([*settings, *more]) for more in ([], ["estimate.device=h100"]))
    phase = on_cpu.phases["stable"]
    chunk = (GPU_CHUNK_ROWS - CHUNK_ROWS) * on_cpu.backbone["vocab_size"] * 2  # not both are larger than the backward pass
    more = memory(on_gpu, phase, None).total - memory(on_cpu, phase, None).total
    kept = 8_192 * 11 * (768 * 2 + 12 * 4)
    assert 0 <= more - kept <= chunk


def test_what_is_legal_but_perhaps_not_meant_is_noted(corpus_root):
    run = composed([
        "+recipe=demo", *SMALL, f"data.root={corpus_root}", "trainer.devices=2", "trainer.accelerator=cpu",
        "phases.stable.batch_rows=9", "phases.extend.lr=3e-5", "phases.decay.tokens=90_000_000", "backbone.hidden_size=40",
        "estimate.device=rtx4090", "trainer.micro_batch_tokens=50_000_000", "phases.decay.batch_rows=1_000_000",
    ])  # fmt: skip
    said = "\n".join(notes(run, Curriculum(run.phases), Corpus.of(run.data)))
    for part in (
        "backbone.hidden_size=40 is no multiple of 64",
        "heads of 20 are padded",
        "phases.stable: 9 rows do not divide among 2 ranks",
        "phases.extend.lr: jumps from 0.003 at the end of stable to 3e-05",
        "docstrings/slice-000 is seen",
        "GB do not fit rtx4090's 24 GB; lower trainer.micro_batch_tokens",
    ):
        assert part in said, said


def test_hours_follow_from_flops_or_from_a_measured_speed():
    run = composed(["+recipe=base", "estimate.device=h100", "estimate.mfu=0.26"])
    curriculum = Curriculum(run.phases)
    assert sum(estimate.hours(run, curriculum, None, {}).values()) == pytest.approx(245.6, rel=0.1)  # as published
    run = replace(run, estimate=replace(run.estimate, tokens_per_s=100_000))
    expected = curriculum.total_tokens / 8 / 100_000 / 3600
    assert sum(estimate.hours(run, curriculum, None, {}).values()) == pytest.approx(expected)


def test_a_plan_is_printed_for_programs_drawn_and_compared(tmp_path):
    result = command("modernenc.plan", "+recipe=demo", "data.root=nowhere", "--json", "--png", str(tmp_path / "curves.png"))
    planned = json.loads(result.stdout)
    assert planned["parameters"] == 5_516_800 and planned["steps"] == 1_407 and planned["hours"] is None
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    compared = command("modernenc.plan", "+recipe=base", "--against", "large").stdout
    assert "149,655,232" in compared and "395,881,664" in compared and "phases.stable.ramp.start_rows" in compared
    (names,) = (get_args(constraint) for constraint in get_args(get_type_hints(Estimate, include_extras=True)["device"])[1:])
    assert {*names} == {*DEVICES, ""}
    device = command("modernenc.plan", "+recipe=base", "estimate.device=b300")
    assert device.returncode == 2 and "estimate.device=b300: expected one of a100, h100" in device.stderr
    unknown = command("modernenc.plan", "+recipe=base", "--against", "huge")
    assert unknown.returncode == 2 and "recipe huge: there is none; there are adapt, base" in unknown.stderr


def peak(run: Run, corpus: Corpus) -> int:
    """Bytes that torch holds at the most in an optimizer step, the second one."""
    objective = build_objectives(run)
    checkpoint_activations(objective.backbone, run.trainer.activation_checkpointing_every)
    optimizers = optim.build(objective, run.optim)
    steps = iter(Steps(run, Curriculum(run.phases), corpus, 0, 1, DataState()))

    def train() -> None:
        step = next(steps)
        for micro_batch in step.micro_batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=run.trainer.precision == "bf16-mixed"):
                loss, _ = objective(micro_batch)
            (loss / step.targets).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    train()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        train()
    profiler: Any = profiled.profiler
    events = profiler.kineto_results.events()
    changes = accumulate(event.nbytes() for event in events if event.name() == "[memory]")
    states = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    lasting = [*objective.parameters(), *(state for state in states if isinstance(state, torch.Tensor))]
    return max(changes) + sum(tensor.numel() * tensor.element_size() for tensor in lasting)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("demo", ["trainer.activation_checkpointing_every=0"]),
        ("demo", ["trainer.activation_checkpointing_every=1"]),
        ("demo", ["trainer.activation_checkpointing_every=2"]),
        ("demo", ["trainer.precision=32-true"]),
        ("demo", ["phases.stable.seq_len=1_024", "phases.stable.batch_rows=8"]),
        ("demo_mega", ["trainer.activation_checkpointing_every=0"]),
        ("demo_mega", ["trainer.activation_checkpointing_every=1"]),
    ],
)
def test_memory_is_as_planned(corpus_root, recipe, settings):
    """At the demo's own widths; what libraries keep for themselves is not counted."""
    overrides = [
        f"+recipe={recipe}", f"data.root={corpus_root}", "data.workers=0", "data.buffer_rows=16", "phases.stable.batch_rows=32",
            "backbone.vocab_size=8_192",
        "phases.stable.mix={code: 3, docstrings: 2, reference: 1, prose: 0}", "trainer.micro_batch_tokens=8_192", *settings,
    ]  # fmt: skip
    run = composed(overrides)
    run = only_phase(run, "stable", steps=4)
    corpus = Corpus.of(run.data)
    planned, found = memory(run, run.phases["stable"], corpus), peak(run, corpus)
    print(f"{recipe} {settings}: planned {planned.total / 1e6:.0f} MB, found {found / 1e6:.0f}")
    assert planned.total == pytest.approx(found, rel=0.15)


def test_checkpoints_are_as_large_as_planned(small_run):
    run = small_run()
    folder = train(run)
    parameters, states = estimate.parameters(composed(["+recipe=demo", "optim=muon", "data.root=nowhere"]))
    assert 4 * (parameters + states) == 52_832_256
    parameters, states = estimate.parameters(run)
    size = (folder / FINAL).stat().st_size
    assert 0 < size - 4 * (parameters + states) < 120_000  # names, positions, settings


def test_what_is_left_of_a_run_is_told_under_its_own_and_under_changed_settings(small_run):
    run = small_run("checkpoint.keep_last=20")
    folder = train(run)
    curriculum = Curriculum(run.phases)
    boundary = folder / "checkpoints" / "end-of-stable.ckpt"
    left = command("modernenc.eta", str(boundary)).stdout
    steps = curriculum.total_steps - sum(stage.steps for stage in curriculum.stages_of("stable"))
    assert f"{curriculum.total_tokens - curriculum.end_of('stable'):,}" in left and f" {steps} " in left
    longer = command("modernenc.eta", str(boundary), "phases.decay.tokens=6000")
    grown = Curriculum({**run.phases, "decay": replace(run.phases["decay"], tokens=6000)})
    assert f"{grown.total_tokens - grown.end_of('stable'):,}" in longer.stdout, longer.stderr
    assert "│ all    │      0 │     0 │" in command("modernenc.eta", str(folder)).stdout
