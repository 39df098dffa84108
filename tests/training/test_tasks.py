"""Phases that train multiple choice, alone or in turn with masked LM."""

import math
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from modernenc.config import Phase, Run, Task
from modernenc.curriculum import MASKED_LM, Curriculum, objective_cycle
from modernenc.data.blocks import Corpus
from modernenc.data.choices import COLUMNS, Choices
from modernenc.data.choices import read as read_items
from modernenc.data.loader import Steps
from modernenc.data.state import DataState, merge_rank_states
from modernenc.model.build import build_objectives, weights_of
from modernenc.model.export import export
from modernenc.planning.measure import tokens_per_second
from modernenc.planning.summary import summarize
from modernenc.planning.tables import plan_text
from modernenc.reporting.comparison import compare
from modernenc.run_folder.checkpoints import read, tokens_seen
from modernenc.run_folder.tables import Table
from support.commands import command
from support.results import FINAL, losses, metrics, same
from support.runs import SMALL, composed, resume, task, train

MIXED = [
    "phases.extend.batch_rows=0", "phases.extend.mix={code: 0, docstrings: 0, reference: 0, prose: 0}",
    "+phases.extend.objectives={next: 1}", "+phases.decay.objectives={masked_lm: 2, next: 1}",
]  # fmt: skip
"""Masked LM, multiple choice, both in turn."""


@pytest.fixture
def mixed_run(small_run, items):
    def make(*overrides: str) -> Run:
        return small_run(*task(items), *MIXED, *overrides)

    return make


def table() -> Curriculum:
    def phase(tokens: float, rows: int, **objectives: int) -> Phase:
        mix = {"a": 1.0} if rows else {}
        return Phase(
            tokens, 64, rows, lr=1.0, lr_curve="linear", weight_decay=0, mask_ratio=0.3, mix=mix, objectives=objectives
        )

    phases = {
        "text": phase(10_000, 7),
        "choose": phase(5_000, 0, next=1),
        "both": phase(30_000, 5, masked_lm=5, next=2, other=1),
        "last": phase(3_000, 3, masked_lm=1, other=1),
    }
    return Curriculum(
        phases, {"next": Task("", "", seq_len=32, batch_items=3), "other": Task("", "", seq_len=16, batch_items=2)}
    )


def test_the_closed_form_is_what_a_walk_over_all_steps_counts():
    curriculum = table()
    seen = step = 0
    done = {MASKED_LM: 0, "next": 0, "other": 0}
    sizes = {"next": 3 * 4 * 32, "other": 2 * 4 * 16}
    items = {"next": 3, "other": 2}
    rows, start, phase = 0, 0, ""
    for spec in curriculum.steps():
        if spec.phase != phase:
            rows, start, phase = 0, seen, spec.phase
        wanted = curriculum.phases[phase].objectives or {MASKED_LM: 1}
        assert (spec.tokens_seen, spec.step, spec.first_row) == (seen, step, rows)
        assert spec.first_item == done[spec.objective] * items.get(spec.objective, 0)
        batch_rows = curriculum.phases[phase].batch_rows
        assert spec.step_tokens == sizes.get(spec.objective, batch_rows * 64)
        progress = min(1, (seen - start) / curriculum.phases[phase].tokens)
        assert spec.lr == pytest.approx(1 - progress)
        done[spec.objective] += 1
        step, seen = step + 1, seen + spec.step_tokens
        rows += batch_rows if spec.objective == MASKED_LM else 0
        for objective, share in wanted.items():
            got = curriculum.steps_by_objective(phase)[objective]
            assert abs(got - share / sum(wanted.values()) * sum(curriculum.steps_by_objective(phase).values())) <= 1
    assert (seen, step) == (curriculum.total_tokens, curriculum.total_steps)
    specs = list(curriculum.steps())
    for stage in curriculum.stages:
        last = specs[stage.first_step + stage.steps - 1]
        assert (last.step_tokens, last.tokens_seen + last.step_tokens) == (stage.last_step_tokens, stage.end_tokens)
    for name, settings in curriculum.phases.items():
        stage = curriculum.stages_of(name)[-1]
        assert stage.end_tokens - curriculum.start_of(name) - stage.last_step_tokens < settings.tokens
        assert stage.end_tokens - curriculum.start_of(name) >= settings.tokens


def test_a_cycle_spreads_its_objectives():
    phase = Phase(1, 64, 1, lr=1.0, mix={"a": 1}, objectives={"masked_lm": 6, "next": 3, "other": 0})
    cycle = objective_cycle(phase)
    assert cycle.count("masked_lm") == 6 and cycle.count("next") == 3
    places = [place for place, objective in enumerate(cycle + cycle) if objective == "next"]
    assert {after - before for before, after in pairwise(places)} == {3}


def test_each_item_comes_once_a_pass_on_any_number_of_ranks_and_micro_batches(mixed_run):
    run = mixed_run("phases.extend.tokens=16000")
    corpus, curriculum = Corpus.of(run.data), Curriculum.of(run)
    start = curriculum.start_of("extend")
    steps_there = curriculum.steps_by_objective("extend")["next"]

    def questions(world: int, micro_batch_tokens: int) -> list[list[str]]:
        changed = replace(run, trainer=replace(run.trainer, micro_batch_tokens=micro_batch_tokens))
        by_step: list[list[str]] = [[] for _ in range(steps_there)]
        for rank in range(world):
            state = DataState(tokens_seen=start)
            steps = iter(Steps(changed, curriculum, corpus, rank, world, state))
            for number in range(steps_there):
                step = next(steps)
                assert {batch.objective for batch in step.micro_batches} == {"next"}
                for batch in step.micro_batches:
                    ends = batch.cu_seqlens.tolist()
                    for first in range(0, 4 * len(batch.targets), 4):
                        item = batch.input_ids[ends[first] : ends[first + 4]]
                        by_step[number].append(str(item.tolist()) + str(int(batch.targets[first // 4])))
        return [sorted(step) for step in by_step]

    alone = questions(1, 4096)
    assert alone == questions(2, 4096) == questions(3, 128) == questions(1, 128)
    drawn = [question for step in alone for question in step]
    assert all(len(step) == 5 for step in alone)
    assert len(set(drawn[:35])) == 35  # of 37 items
    assert len(set(drawn)) == 37


def test_a_choice_is_a_document_and_its_beginning_is_cut(mixed_run, items):
    run = mixed_run()
    corpus = Corpus.of(run.data)
    source = Choices("next", run.tasks["next"], corpus, run.seed, validation=True)
    assert len(source.items) == 20
    item = source.items[0]
    choices = source.encode(item)
    batch = source.collate([choices], [item.label], 0).unpadded()
    starts = batch.cu_seqlens[:-1].tolist()
    assert batch.target_positions.tolist() == starts and len(starts) == 4
    assert (batch.input_ids[starts] == corpus.roles.cls).all()
    assert (batch.input_ids[batch.cu_seqlens[1:].long() - 1] == corpus.roles.sep).all()
    long = source.encode(item._replace(context=" ".join(["graph"] * 90) + " end", endings=("a", "b b b", "c " * 200, "d")))
    assert all(choice.cut and len(choice.context) + len(choice.ending) == 29 for choice in long)
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_file))
    whole = tokenizer.encode(" ".join(["graph"] * 90) + " end", add_special_tokens=False).ids
    assert whole[-len(long[0].context) :] == long[0].context


def test_every_objective_learns_and_is_validated(mixed_run, items):
    run = mixed_run(
        f"tasks.next.train={items / 'many.csv'}",
        "phases.extend.tokens=180_000",
        "phases.extend.lr=3e-3",
        "phases.extend.warmup_tokens=6000",
    )
    folder = train(run)
    rows = Table(folder / "metrics.csv").read()
    assert {(row["phase"], row["objective"]) for row in rows} == {
        ("stable", MASKED_LM), ("extend", "next"), ("decay", MASKED_LM), ("decay", "next"),
    }  # fmt: skip
    half = [float(row["lr"]) for row in rows if row["phase"] == "extend"]
    assert max(half) == pytest.approx(run.phases["extend"].lr / 2, rel=0.05)
    scores = Table(folder / "validation.csv").read()
    accuracy = {row["phase"]: float(row["accuracy"]) for row in scores if row["source"] == "next"}
    assert list(accuracy) == ["extend", "decay"]
    assert accuracy["extend"] > 0.5
    assert {row["phase"] for row in scores if row["source"] == "all"} == {"stable", "extend", "decay"}
    report = (folder / "report.html").read_text()
    assert "next: which of 4 endings" in report and f"{accuracy['decay']:.1%}" in report
    account = read(folder / FINAL).state.data["token_counts"]
    assert set(account["extend"]["served"]) == {"next"}
    assert set(account["decay"]["served"]) == {"code/slice-000", "docstrings/slice-000", "next"}


def test_the_tasks_head_stays_as_it_is_while_masked_lm_is_trained_and_the_other_way_round(mixed_run):
    folder = train(mixed_run())
    stable, extend = (read(folder / "checkpoints" / f"end-of-{phase}.ckpt").weights for phase in ("stable", "extend"))
    fresh = weights_of(build_objectives(mixed_run()))
    heads = [name for name in stable if name.startswith("tasks.next.")]
    assert heads and all(torch.equal(stable[name], fresh[name]) for name in heads)
    assert any(not torch.equal(stable[name], extend[name]) for name in heads)
    masked_lm = [name for name in stable if name.startswith("masked_lm.")]
    assert masked_lm and all(torch.equal(stable[name], extend[name]) for name in masked_lm)
    assert not torch.equal(*(weights["backbone.layers.0.attn.Wqkv.weight"] for weights in (stable, extend)))


def test_a_run_without_tasks_begins_with_the_same_weights_as_one_with_them(mixed_run, small_run):
    alone, with_head = weights_of(build_objectives(small_run())), weights_of(build_objectives(mixed_run()))
    assert all(torch.equal(value, with_head[name]) for name, value in alone.items())


@pytest.mark.slow
def test_every_checkpoint_leads_to_the_same_weights_through_all_objectives(mixed_run, tmp_path):
    settings = ("checkpoint.keep_last=99", "checkpoint.every_tokens=700", "backbone.attention_out_dropout=0.1")
    whole = train(mixed_run(*settings, "logger.every_steps=3"))
    checkpoints = sorted((whole / "checkpoints").glob("*.ckpt"), key=tokens_seen)
    assert len(checkpoints) > 12
    for number, checkpoint in enumerate(checkpoints[1:-1:3]):
        folder = Path(shutil.copytree(whole, tmp_path / f"copy{number}"))
        resume(folder / "checkpoints" / checkpoint.name, [f"data.workers={number % 2}"])
        assert same(folder / FINAL, whole / FINAL), checkpoint
        assert read(folder / FINAL).state.data == read(whole / FINAL).state.data
        assert metrics(folder) == metrics(whole)


def test_the_state_of_two_ranks_goes_on_on_one(mixed_run):
    run = mixed_run()
    corpus, curriculum = Corpus.of(run.data), Curriculum.of(run)
    ranks = [iter(Steps(run, curriculum, corpus, rank, 2, DataState())) for rank in range(2)]
    alone = iter(Steps(run, curriculum, corpus, 0, 1, DataState()))
    for _ in range(curriculum.total_steps - 4):
        for each in (alone, *ranks):
            next(each)
    states = [DataState.from_dict(next(rank).state) for rank in ranks]
    state = next(alone).state
    merged = merge_rank_states(states).to_dict()
    assert merged["token_counts"] == state["token_counts"]
    assert {n: lane["row"] for n, lane in merged["lanes"].items()} == {n: lane["row"] for n, lane in state["lanes"].items()}


def test_a_branch_may_bring_a_task_or_leave_it_out(mixed_run, small_run, tmp_path):
    plain = train(small_run())
    branch = mixed_run(f"run_dir={tmp_path / 'branch'}")
    brought = train(replace(branch, branch_from=str(plain / "checkpoints" / "end-of-stable.ckpt")))
    assert {row["objective"] for row in Table(brought / "metrics.csv").read()} == {MASKED_LM, "next"}
    back = replace(small_run(f"run_dir={tmp_path / 'back'}"), branch_from=str(brought / "checkpoints" / "branch.ckpt"))
    assert same(train(back) / FINAL, plain / FINAL)


def test_each_phase_is_planned_and_measured(mixed_run, items):
    run = mixed_run()
    corpus, curriculum = Corpus.of(run.data), Curriculum.of(run)
    planned = summarize(run, curriculum, corpus, tokens_per_second(run))
    assert list(planned["phases"]) == list(run.phases)
    assert all(
        phase["hours"] > 0 and phase["flops"] > 0 and phase["memory"]["total"] > 0 for phase in planned["phases"].values()
    )
    assert sum(phase["steps"] for phase in planned["phases"].values()) == curriculum.total_steps
    steps = curriculum.steps_by_objective("extend")["next"]
    assert planned["phases"]["extend"]["tokens"] == steps * 5 * 4 * 32
    assert f"{5 * steps} items ({5 * steps / 37:.2f} passes)" in " ".join(plan_text(run, curriculum).split())


def test_export_and_compare_take_masked_lm_alone(mixed_run, tmp_path):
    folder = train(mixed_run())
    assert export([folder], tmp_path / "exported") < 1e-5
    compared = compare([folder, folder / "checkpoints" / "end-of-stable.ckpt"], ["uniform"])
    assert list(compared) == ["run", "end-of-stable", "average: uniform"]


def test_moved_files_are_taken_when_they_hold_the_same(mixed_run, items, tmp_path):
    folder = train(mixed_run("checkpoint.keep_last=9"))
    checkpoint = sorted((folder / "checkpoints").glob("step-*.ckpt"))[-1]
    moved, other = tmp_path / "moved.csv", tmp_path / "other.csv"
    moved.write_bytes((items / "train.csv").read_bytes())
    other.write_bytes((items / "validation.csv").read_bytes())
    resume(checkpoint, [f"tasks.next.train={moved}"])
    with pytest.raises(ValueError, match=r"tasks.next.train=.*other.csv: not the items that"):
        resume(checkpoint, [f"tasks.next.train={other}"])


NO_TEXT = [
    f"{change.format(phase)}"
    for phase in ("stable", "decay")
    for change in (
        "phases.{}.batch_rows=0", "phases.{}.mix={{code: 0, docstrings: 0, reference: 0, prose: 0}}",
        "++phases.{}.objectives={{masked_lm: 0, next: 1}}",
    )
] + ["phases.stable.ramp.tokens=0"]  # fmt: skip
"""With what a mixed run has, no phase reads text."""
WRONG = {
    "frequencies of no text": ([*NO_TEXT, "init.unigram=true"], "init.unigram=True: expected false where no phase reads"),
    "neighbours in no text": (
        [*NO_TEXT, "init.unigram=false", "init.neighbours=true"], "init.neighbours=True: expected false where no phase reads",
    ),
    "an objective that is no task": (["+phases.stable.objectives={masked_lm: 1, nli: 1}"], "nli: there is no such task"),
    "a task that no phase trains": (
        ["phases.decay.objectives.next=0", "phases.extend.objectives.next=0",
         "phases.extend.batch_rows=2", "phases.extend.mix={code: 1}"],
        "tasks.next is in the objectives of no phase",
    ),
    "rows without masked LM": (["phases.extend.batch_rows=4"], "phases.extend.batch_rows=4: expected 0, because no step"),
    "text without masked LM": (["phases.extend.mix.code=1"], "phases.extend.mix=.*expected {}, because no step trains"),
    "fewer items than ranks": (["trainer.devices=2", "tasks.next.batch_items=1"], "tasks.next.batch_items=1: 2 ranks"),
    "a learning rate of 0": (["tasks.next.lr_factor=0"], "tasks.next.lr_factor=0.0: expected more than 0"),
    "longer choices than the backbone": (["tasks.next.seq_len=90000"], "tasks.next.seq_len=90000 exceeds backbone"),
    "an absent file": (["tasks.next.train=nowhere.csv"], "tasks.next.train=nowhere.csv does not exist; expected a CSV"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_one_line(mistake, mixed_run):
    from modernenc.planning.checks import check_run

    overrides, said = WRONG[mistake]
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        check_run(mixed_run(*overrides))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, said",
    [
        ("sent1,sent2,ending0,ending1,ending2,label\na,b,c,d,e,0\n", "no column ending3"),
        (",".join(COLUMNS) + "\na,b,c,d,e,f,4\n", "line 2: label=4; expected 0 to 3"),
        (",".join(COLUMNS) + "\na,b,c,d,e,f,1\na,b,c\n", "line 3: no value for ending1"),
        (",".join(COLUMNS) + "\n", "has no items"),
        (",".join(COLUMNS) + "\na,b,\xe9,d,e,f,1\n", "not a CSV file in UTF-8"),
    ],
)
def test_a_file_that_is_not_in_the_layout_is_refused(text, said, tmp_path):
    path = tmp_path / "items.csv"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=said):
        read_items(path, "tasks.next.train")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_train_several_heads_as_one_does(strategy, mixed_run, small_run, items, tmp_path):
    settings = [
        "optim=adamw", "trainer.precision=32-true", "optim.lr=1e-3", "checkpoint.every_tokens=0", "logger.every_steps=4",
    ]  # fmt: skip
    alone = train(mixed_run(*settings))
    result = command(
        "modernenc.train", "+recipe=demo", *SMALL, *MIXED, f"data.root={small_run().data.root}", f"run_dir={tmp_path / 'two'}",
        *task(items),
        *settings, "trainer.devices=2", f"trainer.strategy={strategy}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    one, two = (read(folder / FINAL).weights for folder in (alone, tmp_path / "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert (value - two[name]).abs().max() <= 1e-4 * max(1.0, float(value.abs().max())), name
    assert losses(alone) and all(map(math.isfinite, losses(alone).values()))
    assert losses(tmp_path / "two") == pytest.approx(losses(alone), rel=1e-4)


def test_a_rehearsal_makes_items_of_the_corpus(corpus_root, tmp_path):
    from modernenc.planning.smoke_test import scale_down

    run = scale_down(composed(["+recipe=mega_small_16k", f"smoke_test={corpus_root}", f"run_dir={tmp_path / 'run'}"]))
    for key in ("train", "validation"):
        found = read_items(Path(getattr(run.tasks["swag"], key)), "")
        assert len(found) > 8 and {item.label for item in found} == {0, 1, 2, 3}
        assert all(len(set(item.endings)) == 4 for item in found)


@pytest.mark.parametrize("recipe", ["demo", "demo_mega"])
def test_a_task_is_exported_as_a_multiple_choice_model(small_run, items, tmp_path, recipe):
    from transformers import AutoModelForMultipleChoice, AutoTokenizer

    run = small_run(*task(items), *MIXED, "trainer.precision=32-true", recipe=recipe)
    run_dir = train(run)
    out = tmp_path / "choice"
    assert export([run_dir], out, task="next") < 1e-4
    held_out = read_items(Path(run.tasks["next"].validation), "validation")[: run.tasks["next"].validation_items]
    model = AutoModelForMultipleChoice.from_pretrained(out, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    right = 0
    for item in held_out:
        pairs = tokenizer([item.context] * 4, list(item.endings), padding=True, return_tensors="pt")
        with torch.no_grad():
            right += int(model(**{key: value[None] for key, value in pairs.items()}).logits.argmax()) == item.label
    scores = [row for row in Table(run_dir / "validation.csv").read() if row["source"] == "next"]
    assert right / len(held_out) == pytest.approx(float(scores[-1]["accuracy"]), abs=1e-4)
    with pytest.raises(ValueError, match=r"--task other: .* has next"):
        export([run_dir], tmp_path / "other", task="other")
