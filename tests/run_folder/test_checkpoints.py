"""Checkpoints are whole or refused."""

import json
import logging
import math
import os
import resource
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modernenc.atomic import partial_path, write_json
from modernenc.run_folder.checkpoints import (
    UNSHARDED,
    Checkpoint,
    CheckpointWriter,
    RankShard,
    TrainState,
    check,
    files_of,
    manifest_of,
    newest,
    prune,
    read,
    remove,
    remove_partial,
    sort_key,
    tokens_seen,
    write,
)
from support.damage import flip, reseal, truncate


def checkpoint(tokens: int, weights: dict[str, torch.Tensor], optimizers: list[dict] | None = None) -> Checkpoint:
    state = TrainState(
        tokens_seen=tokens, step=tokens // 10, phase="stable", boundary=False, seconds=0.0, skipped_steps=0,
        skipped_since=0, norms={}, unlogged={}, data={}, corpus="", tasks={}, ranks=1, threads=1, versions={},
    )  # fmt: skip
    return Checkpoint(weights, optimizers or [], state, {"rollbacks": 0})


def save(run_dir: Path, name: str, tokens: int) -> Path:
    path = run_dir / "checkpoints" / f"{name}.ckpt"
    write(checkpoint(tokens, {"all": torch.full((1000,), float(tokens))}), path)
    return path


def save_shards(run_dir: Path, name: str, tokens: int, ranks: int = 3, save: int = 1) -> Path:
    """Each of some ranks holds some rows of a matrix, rank 2 none; only rank 0 has what is not split."""
    path = run_dir / "checkpoints" / f"{name}.ckpt"
    for rank in range(ranks):
        rows = torch.arange(8.0).reshape(4, 2)[2 * rank : 2 * rank + 2] + tokens
        weights, optimizer = {"split": rows}, {"state": {"split": {"exp_avg": -rows}}}
        content = {"weights": weights, "optimizers": [optimizer]}
        if rank == 0:
            content = checkpoint(tokens, {**weights, "not split": torch.ones(3)}, [{**optimizer, "groups": [{"step": 7}]}])
        write(content, path, RankShard(rank, ranks, save))
    return path


def test_what_was_saved_is_loaded(tmp_path):
    path = save(tmp_path, "step-1", 10)
    assert read(path).weights["all"][0] == 10
    assert json.loads(manifest_of(path).read_text())["tokens_seen"] == 10


@pytest.mark.parametrize("damage", [truncate, flip, lambda path: manifest_of(path).unlink()])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, damage):
    path = save(tmp_path, "step-1", 10)
    damage(path)
    with pytest.raises(ValueError, match=r"step-1.ckpt is (not whole|corrupt)"):
        read(path)


@pytest.mark.parametrize(
    "change", ["", "{", '{"bytes": 1}', "[]", '"ranks": 1 -> "ranks": 0', '"tokens_seen": 30 -> "tokens_seen": 38']
)
def test_a_damaged_manifest_is_passed_over_by_name(tmp_path, change, caplog):
    for tokens in (10, 30):
        path = save(tmp_path, f"step-{tokens}", tokens)
    old, _, new = change.partition(" -> ")
    manifest_of(path).write_text(manifest_of(path).read_text().replace(old, new) if new else change)
    with pytest.raises(ValueError, match=r"step-30.ckpt is not whole: step-30.json beside it is damaged"):
        read(path)
    assert newest(tmp_path) == tmp_path / "checkpoints" / "step-10.ckpt"
    assert "step-30.json" in caplog.text


@pytest.mark.parametrize("damage", [truncate, flip, lambda path: manifest_of(path).unlink()])
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


def test_a_kill_while_the_first_checkpoint_is_written_leaves_a_run_without_one(tmp_path):
    manifest_of(save(tmp_path, "step-1", 10)).unlink()
    assert newest(tmp_path) is None
    manifest_of(save(tmp_path, "step-2", 20)).unlink()
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        newest(tmp_path)


def test_a_kill_while_writing_leaves_the_checkpoint_before(tmp_path):
    path = save(tmp_path, "step-1", 10)
    # What is on disk at each moment of a later save: an unfinished file beside the target, then a target without manifest.
    path.with_suffix(".ckpt.tmp").write_bytes(b"half")
    assert newest(tmp_path) == path
    (tmp_path / "checkpoints" / "step-2.ckpt").write_bytes(path.read_bytes())
    assert newest(tmp_path) == path


def test_pruning_keeps_the_last_from_before_the_trouble(tmp_path):
    for tokens in (10, 20, 30, 40):
        save(tmp_path, f"step-{tokens}", tokens)
    prune(tmp_path, keep_last=1, unstable_since=25)
    assert sorted(path.stem for path in (tmp_path / "checkpoints").glob("*.ckpt")) == ["step-20", "step-40"]
    prune(tmp_path, keep_last=1)
    assert [path.stem for path in (tmp_path / "checkpoints").glob("*.ckpt")] == ["step-40"]


def test_pruning_keeps_boundaries_and_the_last(tmp_path):
    save(tmp_path, "end-of-stable", 25)
    for tokens in (10, 20, 30, 40):
        save(tmp_path, f"step-{tokens}", tokens)
    prune(tmp_path, keep_last=2)
    assert sorted(path.stem for path in (tmp_path / "checkpoints").glob("*.ckpt")) == ["end-of-stable", "step-30", "step-40"]


def test_shares_of_ranks_are_read_as_one(tmp_path):
    content = read(save_shards(tmp_path, "step-1", 10))
    assert torch.equal(content.weights["split"], torch.arange(8.0).reshape(4, 2) + 10)
    moments = content.optimizers[0]["state"]
    assert torch.equal(moments["split"]["exp_avg"], -content.weights["split"])
    assert content.optimizers[0]["groups"] == [{"step": 7}] and content.weights["not split"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink, lambda path: manifest_of(path).unlink()])
def test_a_checkpoint_with_a_damaged_share_is_passed_over_by_name(tmp_path, damage, caplog):
    before = save_shards(tmp_path, "step-1", 10)
    path = save_shards(tmp_path, "step-2", 20)
    damage(path.with_suffix(".1.part"))
    with pytest.raises(ValueError, match=r"step-2.1.part is (not whole|corrupt|missing)"):
        read(path)
    assert newest(tmp_path) == before
    assert "step-2.1.part" in caplog.text


def test_shares_of_two_saves_are_not_one_checkpoint(tmp_path):
    path = save_shards(tmp_path, "step-1", 10, ranks=2, save=1)
    older = path.with_suffix(".1.part").read_bytes(), path.with_suffix(".1.json").read_bytes()
    save_shards(tmp_path, "step-1", 10, ranks=2, save=2)
    for file, content in zip((path.with_suffix(".1.part"), path.with_suffix(".1.json")), older, strict=True):
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"step-1.1.part is of another save"):
        read(path)


def test_a_save_that_not_all_ranks_finished_prunes_nothing_and_is_swept(tmp_path):
    first = save_shards(tmp_path, "step-1", 10)
    second = save_shards(tmp_path, "step-2", 20)
    manifest_of(second.with_suffix(".2.part")).unlink()
    prune(tmp_path, keep_last=1)
    assert newest(tmp_path) == first
    third = save_shards(tmp_path, "step-3", 30)
    for path in (third, manifest_of(third)):  # ranks 1 and 2 were faster
        path.unlink()
    remove_partial(tmp_path)
    assert {path.name.partition(".")[0] for path in first.parent.iterdir()} == {"step-1", "step-2"}  # a share may be elsewhere
    save_shards(tmp_path, "step-4", 40)
    prune(tmp_path, keep_last=1)
    assert {path.name.partition(".")[0] for path in first.parent.iterdir()} == {"step-4"}


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    path = tmp_path / "checkpoints" / "step-1.ckpt"
    write(content_at(1), path)
    torch.save({"evil": Evil()}, path)
    reseal(path)
    check(path)
    with pytest.raises(ValueError, match=r"step-1\.ckpt is no checkpoint: [Ww]eights.only"):
        read(path)


def content_at(tokens: int, rollbacks: int = 0) -> Checkpoint:
    """A checkpoint with one tensor, at a position."""
    return replace(checkpoint(tokens, {"all": torch.full((1000,), float(tokens))}), run={"rollbacks": rollbacks})


def names_of(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_a_writer_saves_in_the_background_and_keeps_the_last(tmp_path):
    writer = CheckpointWriter(tmp_path, keep_last=2)
    writer.check()
    for tokens in (10, 20, 30):
        writer.save(content_at(tokens), f"step-{tokens}", UNSHARDED)
    writer.close()
    assert names_of(tmp_path) == ["step-20.ckpt", "step-20.json", "step-30.ckpt", "step-30.json"]
    assert read(tmp_path / "checkpoints" / "step-30.ckpt").weights["all"][0] == 30


def test_only_the_first_rank_prunes(tmp_path):
    for tokens in (10, 20):
        save(tmp_path, f"step-{tokens}", tokens)
    writer = CheckpointWriter(tmp_path, keep_last=1)
    writer.save({"weights": {}}, "step-30", RankShard(rank=1, ranks=2, save=1))
    writer.close()
    before = ["step-10.ckpt", "step-10.json", "step-20.ckpt", "step-20.json"]
    assert names_of(tmp_path) == [*before, "step-30.1.json", "step-30.1.part"]


@pytest.mark.parametrize(
    "ask",
    [
        CheckpointWriter.check,
        CheckpointWriter.wait,
        CheckpointWriter.close,
        lambda writer: writer.save({}, "step-2", UNSHARDED),
    ],
)
def test_what_goes_wrong_while_writing_is_raised_by_whatever_comes_next(tmp_path, ask):
    (tmp_path / "checkpoints" / "step-1.ckpt").mkdir(parents=True)  # where a file should be
    writer = CheckpointWriter(tmp_path, keep_last=2)
    writer.save(content_at(10), "step-1", UNSHARDED)
    deadline = time.monotonic() + 60
    raised = None
    while raised is None and time.monotonic() < deadline:
        try:
            ask(writer)
        except OSError as error:
            raised = error
    assert "step-1.ckpt could not be written: " in str(raised)
    assert f"python -m modernenc.resume {tmp_path}" in str(raised)


@pytest.mark.parametrize("values", [1_000, 1_000_000], ids=["as the file is closed", "midway"])
def test_a_file_that_grows_too_large_is_named_and_leaves_nothing(tmp_path, values):
    save(tmp_path, "step-1", 10)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"step-2.ckpt could not be written: File too large; the checkpoints before it are"):
            write(checkpoint(20, {"all": torch.zeros(values)}), tmp_path / "checkpoints" / "step-2.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names_of(tmp_path) == ["step-1.ckpt", "step-1.json"]
    assert newest(tmp_path) == tmp_path / "checkpoints" / "step-1.ckpt"


def test_the_furthest_is_the_one_after_more_rollbacks_and_then_the_one_with_more_tokens(tmp_path):
    folder = tmp_path / "checkpoints"
    for name, tokens, rollbacks in (("step-9", 90, 0), ("step-4", 40, 1), ("step-3", 30, 1)):
        write(content_at(tokens, rollbacks), folder / f"{name}.ckpt")
    assert newest(tmp_path) == folder / "step-4.ckpt"
    assert [sort_key(folder / f"step-{step}.ckpt") for step in (9, 4, 3)] == [(0, 90), (1, 40), (1, 30)]
    prune(tmp_path, keep_last=1)
    assert names_of(tmp_path) == ["step-4.ckpt", "step-4.json"]
    manifest_of(folder / "step-4.ckpt").unlink()
    assert tokens_seen(folder / "step-4.ckpt") == math.inf  # so that it is named in a warning


def test_a_folder_without_checkpoints_has_no_newest_one(tmp_path):
    assert newest(tmp_path) is None


def test_a_checkpoint_whose_parts_say_otherwise_is_refused_for_what_is_wrong(tmp_path):
    path = save(tmp_path, "step-1", 10)
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=rf"step-1.ckpt is not whole: {size + 1} bytes, expected {size}; take another"):
        read(path)
    path.unlink()
    with pytest.raises(ValueError, match=r"step-1.ckpt is not whole: step-1.ckpt is missing beside it"):
        read(path)
    manifest_of(path).unlink()
    with pytest.raises(ValueError, match=r"step-1.ckpt is not whole: step-1.json is missing beside it"):
        read(path)


def test_a_checkpoint_is_its_files_and_removed_with_them(tmp_path):
    path = save_shards(tmp_path, "step-1", 10)
    other = save_shards(tmp_path, "step-10", 100)
    assert [file.suffix for file in files_of(path)][:3] == [".json"] * 3  # without its manifest it is no checkpoint
    assert {file.name for file in files_of(path)} == {
        "step-1.ckpt", "step-1.json", "step-1.1.part", "step-1.1.json", "step-1.2.part", "step-1.2.json",
    }  # fmt: skip
    remove(path)
    assert not files_of(path) and len(files_of(other)) == 6
    check(other)


def test_what_a_killed_run_left_half_written_is_swept_and_nothing_else(tmp_path):
    path = save(tmp_path, "step-1", 10)
    (tmp_path / "below").mkdir()
    theirs = [tmp_path / "notes.tmp", partial_path(tmp_path / "below" / "lineage.json")]
    for left in (partial_path(path), partial_path(tmp_path / "lineage.json"), *theirs):
        left.write_text("half")
    remove_partial(tmp_path)
    kept = [path, path.with_suffix(".json"), *theirs]
    assert sorted(file for file in tmp_path.rglob("*") if file.is_file()) == sorted(kept)


def test_a_small_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": [1]})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": [1]}


def test_a_file_is_on_disk_before_it_has_its_name_and_a_manifest_after_what_it_describes(tmp_path, monkeypatch):
    done: list[str] = []

    def synced(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append(f"sync {path.name.partition(f'.{os.getpid()}')[0]}")

    def replaced(source: Path, target: Path) -> None:
        done.append(f"name {target.name}")
        rename(source, target)

    rename = os.replace
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    save(tmp_path, "step-1", 10)
    assert done == ["sync step-1.ckpt", "name step-1.ckpt", "sync step-1.json", "name step-1.json", "sync checkpoints"]
