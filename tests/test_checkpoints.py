"""Checkpoints are whole or refused."""

import json
import logging
from pathlib import Path

import pytest
import torch

from modernenc.checkpoints import check, manifest_of, newest, prune, read, write


def save(run_dir: Path, name: str, tokens: int) -> Path:
    path = run_dir / "checkpoints" / f"{name}.ckpt"
    state = {"tokens_seen": tokens, "step": tokens // 10, "phase": "stable", "boundary": False}
    write({"weights": torch.full((1000,), float(tokens)), "state": state}, path)
    return path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_what_was_saved_is_loaded(tmp_path):
    path = save(tmp_path, "step-1", 10)
    assert read(path)["weights"][0] == 10
    assert json.loads(manifest_of(path).read_text())["tokens_seen"] == 10


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lambda path: manifest_of(path).unlink()])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, damage):
    path = save(tmp_path, "step-1", 10)
    damage(path)
    with pytest.raises(ValueError, match=r"step-1.ckpt is (not whole|corrupt)"):
        read(path)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lambda path: manifest_of(path).unlink()])
def test_the_newest_whole_checkpoint_is_taken_with_a_warning(tmp_path, damage, caplog):
    for tokens in (10, 30, 20):
        save(tmp_path, f"step-{tokens}", tokens)
    assert newest(tmp_path) == tmp_path / "checkpoints" / "step-30.ckpt"
    damage(tmp_path / "checkpoints" / "step-30.ckpt")
    with caplog.at_level(logging.WARNING):
        assert newest(tmp_path) == tmp_path / "checkpoints" / "step-20.ckpt"
    assert "step-30.ckpt" in caplog.text


def test_no_whole_checkpoint_is_an_error(tmp_path):
    truncate(save(tmp_path, "step-1", 10))
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        newest(tmp_path)


def test_a_kill_while_writing_leaves_the_checkpoint_before(tmp_path):
    path = save(tmp_path, "step-1", 10)
    # What is on disk at each moment of a later save: an unfinished file beside the target, then a target without manifest.
    path.with_suffix(".ckpt.tmp").write_bytes(b"half")
    assert newest(tmp_path) == path
    (tmp_path / "checkpoints" / "step-2.ckpt").write_bytes(path.read_bytes())
    assert newest(tmp_path) == path


def test_pruning_keeps_boundaries_and_the_last(tmp_path):
    save(tmp_path, "end-of-stable", 25)
    for tokens in (10, 20, 30, 40):
        save(tmp_path, f"step-{tokens}", tokens)
    prune(tmp_path, keep_last=2)
    assert sorted(path.stem for path in (tmp_path / "checkpoints").glob("*.ckpt")) == ["end-of-stable", "step-30", "step-40"]


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    path = tmp_path / "checkpoints" / "step-1.ckpt"
    state = {"tokens_seen": 1, "step": 1, "phase": "a", "boundary": False}
    write({"evil": Evil(), "state": state}, path)
    check(path)
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        read(path)
