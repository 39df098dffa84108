"""What is refused before a run folder exists."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from modernenc.planning.checks import check_settings
from modernenc.train import main
from support.runs import composed

Usage = namedtuple("Usage", ["total", "used", "free"])


def test_a_disk_that_cannot_hold_the_checkpoints_is_said_before_the_start(small_run, monkeypatch):
    run = small_run()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1_000))
    with pytest.raises(ValueError, match=r"the checkpoints take up to .* GB, and its disk has 0.0 GB free; .*keep_last"):
        main(run)
    assert not Path(run.run_dir).exists()


def test_a_password_in_a_url_is_refused_and_not_repeated():
    run = composed(["+recipe=demo", "data.root=sftp://me:hunter2@host/data", "data.cache=cache"])
    with pytest.raises(ValueError, match="holds a password for host") as refused:
        check_settings(run)
    assert "hunter2" not in str(refused.value)


def test_a_loader_that_would_give_up_before_the_reads_of_a_remote_do_is_refused():
    run = composed(
        ["+recipe=demo", "data.root=s3://bucket/data", "data.cache=cache", "data.loader_timeout_s=60", "data.workers=1"]
    )
    with pytest.raises(ValueError, match=r"data.loader_timeout_s=60: a read of s3://bucket/data may take 190 seconds"):
        check_settings(run)
