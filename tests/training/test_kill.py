"""kill -9 of the whole process group, at any moment, any number of times: the weights end as they would have."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modernenc.data.loader import Steps
from modernenc.data.state import DataState
from modernenc.planning.checks import check_run
from modernenc.run_folder.tables import Table
from support.commands import ROOT, importing
from support.results import FINAL, same_state
from support.runs import SMALL, task

KILLS = int(os.environ.get("MODERNENC_KILLS", "12"))
"""How many times on one rank, and ten times as many as on several; from 60 on with more numbers of ranks."""
SEED = int(os.environ.get("MODERNENC_KILLS_SEED", "20"))
LONGER = [
    "phases.stable.tokens=60000", "phases.extend.tokens=40000", "phases.decay.tokens=40000", "data.buffer_rows=16",
    "checkpoint.every_tokens=4000", "validation.every_tokens=6000", "logger.every_steps=3",
    "backbone.attention_out_dropout=0.1", "phases.stable.causal_share=0.4", "phases.extend.causal_share=0.2",
]  # fmt: skip
PLACES = ("step", "write", "validation", "refill", "manifest", "download", "step")
LONGEST_DELAY_S = {
    "step": 0.03,
    "phase": 0.03,
    "write": 0.01,
    "manifest": 0.005,
    "validation": 0.04,
    "refill": 0.01,
    "download": 0.05,
}


ZYGOTE = "from support.shapes import check_shapes; check_shapes(); from support.zygote import serve; serve()"


class Zygote:
    """Runs, at once and in processes of their own; see support/zygote.py."""

    def __init__(self, log: Path) -> None:
        self.log = log
        with log.open("wb") as errors:  # a pipe would fill, and all would wait for it to be read
            self.process = subprocess.Popen(
                [sys.executable, "-c", ZYGOTE],
                cwd=ROOT,
                env=importing(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def run(
        self, *argv: str, ranks: int = 1, rank: int = 0, place: str = "", step: int = 0, delay_s: float = 0
    ) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        argv = (*argv, f"trainer.devices={ranks}")
        order = {"argv": argv, "ranks": ranks, "rank": rank, "place": place, "step": step, "delay_s": delay_s}
        print(json.dumps(order), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, self.log.read_text()
        return json.loads(answer)

    def close(self) -> None:
        self.process.communicate()
        print(self.log.read_text()[-10_000:])


@pytest.fixture
def zygote(tmp_path: Path) -> Iterator[Zygote]:
    started = Zygote(tmp_path / "log.txt")
    yield started
    started.close()


def shared_memory() -> set[Path]:
    return set(Path("/dev/shm").glob("*"))


def left_behind(*folders: Path) -> Counter[str]:
    """What a killed run could leave in its folder: locks, unfinished files."""
    found: Counter[str] = Counter()
    for folder in folders:
        for path in folder.rglob("*"):
            found["lock"] += "lock" in path.name
            found["unfinished"] += path.suffix == ".tmp" or ".part" in path.name
    return found


@pytest.mark.slow
def test_killed_anywhere_ends_with_the_same_weights(zygote, small_run, corpus_root, items, tmp_path):
    longer = [*LONGER, *task(items), "+phases.decay.objectives={masked_lm: 4, next: 1}"]
    run = small_run(*longer)
    curriculum, corpus = check_run(run)
    windows: dict[tuple[str, int], set[int]] = {}
    for step in Steps(run, curriculum, corpus, 0, 1, DataState()):
        for lane, state in step.state["lanes"].items():
            windows.setdefault((step.state["phase"], lane), set()).add(state["buffer"])
    assert len(run.phases) == 3 and len(windows) == 3 * run.data.lanes
    assert min(len(numbers) for numbers in windows.values()) >= 3

    rng = np.random.default_rng(SEED)
    boundaries = [curriculum.stages_of(phase)[0].first_step for phase in ("extend", "decay")]
    moments = [(int(step), PLACES[number % len(PLACES)]) for number, step in
               enumerate(sorted(rng.integers(3, curriculum.total_steps - 12, KILLS - 2)))]  # fmt: skip
    moments = sorted([*moments, *((step, "phase") for step in boundaries)])
    cache = tmp_path / "cache"
    settings = ["+recipe=demo", *SMALL, *longer, f"data.root={corpus_root}"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert zygote.run("train", *settings, f"run_dir={whole}")["code"] == 0
    before, shared_before = left_behind(tmp_path), shared_memory()
    kills: Counter[str] = Counter()
    missed = 0
    argv = ["train", *settings, f"data.cache={cache}", f"run_dir={killed}"]
    for step, place in moments:
        shards = sorted(cache.rglob("*.mds"))
        for number in rng.permutation(len(shards))[: len(shards) // (1 if place == "download" else 2)]:
            shards[number].unlink()  # so that there is something to fetch, soonest when windows are read again
        # Calls in a loader worker are told of without the step: with none, all is in one process.
        worker = 0 if place in ("refill", "download") else int(rng.integers(2))
        delay_s = float(rng.uniform(0, LONGEST_DELAY_S[place]))
        answer = zygote.run(
            *argv, f"data.workers={worker}", place=place, step=0 if place == "download" else step, delay_s=delay_s
        )
        if answer["killed"]:
            kills[answer["place"]] += 1
        else:
            assert answer["code"] == 0, answer
            missed += 1
        if (killed / "config.yaml").exists():
            argv = ["resume", str(killed)]
    assert zygote.run(*argv)["code"] == 0
    after = left_behind(tmp_path)
    deadline = time.monotonic() + 60
    while shared_memory() - shared_before and time.monotonic() < deadline:
        time.sleep(1)  # tests that run beside have some for a while; what a killed run left would stay
    shared = len(shared_memory() - shared_before)
    print(f"{sum(kills.values())} kills: {dict(kills)}; {missed} runs ended first")
    print(f"left before {before}, after {after}, shared memory {shared}")
    # With more kills than steps, the run has gone past some of the moments when their turn comes.
    assert sum(kills.values()) >= (KILLS - 2 if curriculum.total_steps > KILLS else 0.9 * KILLS)
    assert {*kills, "phase"} == {*PLACES, "phase"} and ("phase" in kills or curriculum.total_steps <= KILLS)
    assert same_state(whole / FINAL, killed / FINAL)
    for table in ("metrics.csv", "validation.csv"):
        rows = [Table(folder / table).read() for folder in (whole, killed)]
        assert [(row["step"], row["loss"]) for row in rows[0]] == [(row["step"], row["loss"]) for row in rows[1]]
    assert after == before and not shared


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4] if KILLS >= 60 else [2])
def test_ranks_killed_anywhere_end_with_the_same_weights(zygote, corpus_root, tmp_path, ranks):
    settings = [
        *("+recipe=demo", *SMALL, *LONGER, f"data.root={corpus_root}"),
        *("phases.extend.batch_rows=4", "phases.decay.batch_rows=4", "data.lanes=12"),
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert zygote.run("train", *settings, f"run_dir={whole}", ranks=ranks)["code"] == 0
    last_step = Table(whole / "metrics.csv").read()[-1]["step"]
    rng = np.random.default_rng(SEED + ranks)
    argv = ["train", *settings, f"run_dir={killed}"]
    kills: Counter[str] = Counter()
    for step in sorted(rng.integers(3, int(last_step or 0) - 12, max(KILLS // 10, 2))):
        place = ("step", "write", "validation", "manifest")[rng.integers(4)]
        rank = 0 if place in ("write", "manifest") else int(rng.integers(ranks))
        delay_s = float(rng.uniform(0, LONGEST_DELAY_S[place]))
        answer = zygote.run(*argv, ranks=ranks, rank=rank, place=place, step=int(step), delay_s=delay_s)
        assert answer["killed"], answer
        kills[answer["place"]] += 1
        if (killed / "config.yaml").exists():
            argv = ["resume", str(killed)]
    assert zygote.run(*argv, ranks=ranks)["code"] == 0
    print(f"{ranks} ranks, {sum(kills.values())} kills: {dict(kills)}")
    assert same_state(whole / FINAL, killed / FINAL)
