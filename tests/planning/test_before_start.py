"""What is refused before a run folder exists."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from modernenc.planning.checks import check_settings
from modernenc.planning.model_checks import check_backbone
from modernenc.planning.resolve import resolve
from modernenc.train import main
from support.commands import error
from support.runs import SMALL, composed

Usage = namedtuple("Usage", ["total", "used", "free"])


def test_a_disk_that_cannot_hold_the_checkpoints_is_said_before_the_start(small_run, monkeypatch):
    run = small_run()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1_000))
    with pytest.raises(ValueError, match=r"the checkpoints take up to .* GB, and its disk has 0.0 GB free; .*keep_last"):
        main(run)
    assert not Path(run.run_dir).exists()


def test_a_password_in_a_url_is_refused_and_not_repeated():
    """Before anything else, since every later message may name the root."""
    said = error("modernenc.plan", "+recipe=demo", "data.root=sftp://me:hunter2@host/data", "data.cache=cache")
    assert "holds a password for host" in said and "hunter2" not in said


def test_a_loader_that_would_give_up_before_the_reads_of_a_remote_do_is_refused():
    remote = ["data.root=s3://bucket/data", "data.cache=cache"]
    run = composed(["+recipe=demo", *SMALL, *remote, "data.workers=1", "data.loader_timeout_s=60"])
    with pytest.raises(ValueError, match=r"data.loader_timeout_s=60: a read of s3://bucket/data may take 183 seconds"):
        check_settings(run)


EUROBERT = ["backbone=eurobert_tiny", *(one for one in SMALL if "local_attention" not in one)]


@pytest.mark.parametrize(
    "change, message",
    [
        ("init.unigram=true", "init.unigram=true: the decoder of EuroBERT has no bias; set init.unigram=false"),
        ("backbone.num_key_value_heads=3", "num_attention_heads=2 must be a multiple of num_key_value_heads=3"),
    ],
)
def test_what_eurobert_cannot_have_is_said(corpus_root, change, message):
    run = composed(["+recipe=demo", *EUROBERT, f"data.root={corpus_root}", "backbone.num_key_value_heads=1", change])
    with pytest.raises(ValueError, match=message):
        check_backbone(run)


def test_a_smoke_test_keeps_shared_heads_in_proportion(corpus_root, tmp_path):
    changes = ["init.unigram=false", "~phases.extend.backbone.global_rope_theta", f"smoke_test={corpus_root}"]
    for name in ("eurobert_tiny", "eurobert_210m"):
        run = composed(["+recipe=demo", f"backbone={name}", *changes, f"run_dir={tmp_path / name}"])
        check_backbone(resolve(run))
