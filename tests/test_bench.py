"""The benchmarks measure what they say, in processes that do not disturb each other."""

import json
import os
from dataclasses import dataclass

import pytest
from conftest import command

from modernenc.bench.turns import Result, Turn, Work, take_turns


@dataclass
class Sleeper:
    """A contestant that says which process it is in, and may end it."""

    name: str
    dies_at: int = -1
    needs_gb: float = 0

    def start(self) -> Turn:
        import torch

        def turn(number: int) -> Work:
            if number == self.dies_at:
                os._exit(9)
            torch.zeros(int(self.needs_gb * 2**28))
            return Work(os.getpid(), float(number))

        return turn


def test_all_take_their_turns_each_in_its_process():
    one, other = take_turns([Sleeper("one"), Sleeper("other")], 3)
    assert [work.flops for work in one.work] == [1.0, 2.0, 3.0]
    assert len({work.tokens for work in one.work}) == 1
    assert one.work[0].tokens not in (other.work[0].tokens, os.getpid())
    assert one.peak_bytes > 0 and not one.failure


def test_one_that_needs_too_much_memory_or_dies_is_told_of_and_the_rest_go_on():
    fine, killed, large = take_turns([Sleeper("fine"), Sleeper("killed", dies_at=2), Sleeper("large", needs_gb=1e5)], 3)
    assert len(fine.work) == 3
    assert "killed" in killed.failure and len(killed.work) == 1
    assert "GB that are free" in large.failure


def test_ratios_are_taken_turn_by_turn():
    fast = Result("fast", [Work(10, 0.0), Work(10, 0.0), Work(10, 0.0)], [1.0, 2.0, 1.0])
    slow = Result("slow", [Work(5, 0.0), Work(5, 0.0), Work(5, 0.0)], [1.0, 8.0, 2.0])
    assert fast.times_faster(slow) == [2.0, 4.0, 8.0]
    assert fast.speed == 10.0


def test_the_data_path_is_measured_beside_others(corpus_root, tmp_path):
    result = command(
        "modernenc.bench", "parts=[data]", "lengths=[512]", "repetitions=1", f"root={corpus_root}", f"out={tmp_path / 'bench'}"
    )
    assert result.returncode == 0, result.stderr
    (case,) = json.loads((tmp_path / "bench" / "data.json").read_text())
    assert next(entry["name"] for entry in case["results"]) == "modernenc"
    assert all(work[0] >= 4_000_000 for entry in case["results"] for work in entry["work"])


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("parts=[speed]", "parts=speed: there is none; there are step, growth, inference, data, loop, time_to_loss"),
        ("backbones=[bert]", "backbones=bert: there is none; there are mega_small_16k"),
        ("root=nowhere", "nowhere: no manifest.json there"),
    ],
)
def test_mistakes_are_told(corpus_root, tmp_path, setting, expected):
    result = command("modernenc.bench", f"root={corpus_root}", f"out={tmp_path}", "lengths=[64]", setting)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and expected in result.stderr
