"""A run folder or a checkpoint may come from anybody: it holds values, and is never code."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from modernenc import config, saved_config
from modernenc.model.export import export
from modernenc.planning import eta
from modernenc.reporting.comparison import compare
from modernenc.reporting.page import write as write_page
from modernenc.run_folder import checkpoints
from modernenc.run_folder.checkpoints import read
from modernenc.run_folder.tables import Table
from support.commands import command, error
from support.damage import reseal
from support.results import FINAL, same
from support.runs import composed, resume, small, train


@pytest.fixture
def folder(small_run) -> Path:
    """The folder of a finished run."""
    return train(small_run())


def spoil_config(folder: Path, group: str, **values: object) -> None:
    path = folder / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    settings[group] = {**settings[group], **values} if isinstance(settings[group], dict) else values
    path.write_text(yaml.safe_dump(settings))


def spoil_checkpoint(path: Path, group: str, **values: object) -> None:
    content = read(path)
    content.run[group] = {**content.run[group], **values}
    checkpoints.write(content, path)


READERS = {
    "export": lambda folder, tmp_path: export([folder], tmp_path / "out", None),
    "compare": lambda folder, tmp_path: compare([folder], []),
    "resume": lambda folder, tmp_path: resume(folder, []),
    "eta": lambda folder, tmp_path: eta.show(folder, []),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("group", ["backbone", "optim"])
def test_code_that_a_folder_names_is_not_run(folder, tmp_path, reader, group):
    """As if somebody's `subprocess.Popen` stood where a backbone or an optimizer should."""
    made = tmp_path / "made"
    spoil_config(folder, group, _target_="subprocess.Popen", args=["touch", str(made)])
    for path in (folder / "checkpoints").glob("*.ckpt"):
        spoil_checkpoint(path, group, _target_="subprocess.Popen", args=["touch", str(made)])
    with pytest.raises(ValueError, match=rf"{group}\._target_=subprocess\.Popen.*--allow-code subprocess"):
        READERS[reader](folder, tmp_path)
    assert not made.exists()


@pytest.mark.parametrize(
    "target", ["modernenc.model.optim.get_method", "modernenc.backbones.modernbert.cast", "os.system", "system"]
)
def test_what_our_own_modules_import_is_no_code_of_ours(folder, target):
    spoil_config(folder, "optim", _target_=target)
    with pytest.raises(ValueError, match=r"config\.yaml: optim\._target_="):
        saved_config.load(folder)


def test_a_checkpoint_that_names_code_is_no_source_of_weights(folder, corpus_root, tmp_path):
    spoil_checkpoint(folder / FINAL, "backbone", _target_="subprocess.Popen")
    said = error("modernenc.train", *small(corpus_root, tmp_path / "other", f"init.source={folder / FINAL}"))
    assert "backbone._target_=subprocess.Popen" in said and "--allow-code subprocess" in said


def test_the_environment_is_not_read_for_a_folder(folder, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    spoil_config(folder, "logger", project="${oc.env:SECRET}")
    with pytest.raises(ValueError, match=r"logger\.project=\$\{oc\.env:SECRET\}.*holds values only"):
        saved_config.load(folder)


def test_a_folder_may_name_what_the_options_choose():
    values = saved_config.plain(composed(["+recipe=demo", "data.root=nowhere"]))
    for group, count in (("backbone", 3), ("optim", 3)):
        texts = [path.read_text() for path in (config.CONF_DIR / group).glob("*.yaml")]
        targets = {
            line.partition(": ")[2] for text in texts for line in text.splitlines() if line.startswith("_target_: modern")
        }
        assert len(targets) == count
        for target in targets:
            saved_config.from_plain({**values, group: {"_target_": target}})
    with pytest.raises(ValueError, match="--allow-code elsewhere"):
        saved_config.from_plain({**values, "backbone": {"_target_": "elsewhere.Backbone"}})


@pytest.mark.parametrize("damage", ["missing", "torn", "no mapping", "no YAML"])
def test_a_run_without_its_configuration_goes_on_by_its_checkpoint(folder, tmp_path, damage, caplog):
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    for path in (other / "checkpoints").glob("end-of-*.ckpt"):
        if path.stem != "end-of-stable":
            checkpoints.remove(path)
    for path in (other / "checkpoints").glob("step-*.ckpt"):
        checkpoints.remove(path)
    config_file = other / "config.yaml"
    whole = config_file.read_text()
    if damage == "missing":
        config_file.unlink()
    else:
        config_file.write_text({"torn": whole[: len(whole) // 2] + "\n  - [", "no mapping": "7\n", "no YAML": "\x00{"}[damage])
    resume(other, [])
    assert "its settings are taken from" in caplog.text
    assert same(other / FINAL, folder / FINAL)
    assert {**yaml.safe_load(config_file.read_text()), "run_dir": ""} == {**yaml.safe_load(whole), "run_dir": ""}


def test_lost_rows_of_metrics_are_said(folder, caplog):
    Table(folder / "metrics.csv").cut_after(5)
    resume(folder / "checkpoints" / "end-of-stable.ckpt", [])
    assert "has lost the rows of steps 6 to" in caplog.text


def test_a_damaged_history_names_its_file(folder):
    (folder / "lineage.json").write_text("[{")
    result = command("modernenc.eta", str(folder))
    assert result.returncode == 2 and f"{folder / 'lineage.json'} is not a JSON file" in result.stderr


@pytest.mark.parametrize("outside", ["../../x", "/etc", "https://example.org/x", "abandoned/../../x"])
def test_a_history_leads_no_reader_out_of_the_folder(folder, tmp_path, outside):
    """What a rollback abandoned lies in the folder; of a branch the name is shown, and nothing read."""
    path = folder / "lineage.json"
    (start,) = json.loads(path.read_text())
    path.write_text(json.dumps([start, {**start, "event": "rollback", "abandoned": outside}]))
    with pytest.raises(ValueError, match=r"lineage\.json: \[1\]\.abandoned is .*, expected abandoned/NUMBER"):
        write_page(replace(saved_config.load(folder), run_dir=str(folder)))
    other = tmp_path / "other"
    other.mkdir()
    os.mkfifo(other / "metrics.csv")  # a read of it would not end
    for into in (outside, str(other), "../other"):
        path.write_text(json.dumps([start, {**start, "event": "branched", "into": into}]))
        assert into in write_page(replace(saved_config.load(folder), run_dir=str(folder))).read_text()


def test_a_link_in_the_folder_is_replaced_and_not_written_through(folder, tmp_path):
    for name in ("report.html", "curriculum.png"):
        (folder / name).unlink()
        (tmp_path / name).write_text("mine")
        (folder / name).symlink_to(tmp_path / name)
    write_page(replace(saved_config.load(folder), run_dir=str(folder)))
    assert all((tmp_path / name).read_text() == "mine" for name in ("report.html", "curriculum.png"))


def test_a_folder_names_no_cache_to_write_to(folder, tmp_path):
    cache = tmp_path / "cache"
    root = yaml.safe_load((folder / "config.yaml").read_text())["data"]["root"]
    spoil_config(folder, "data", cache=str(cache))
    compare([folder], [])
    assert command("modernenc.report", str(folder)).returncode == 0 and not cache.exists()
    compare([folder], [], overrides=[f"data.root={root}", f"data.cache={cache}"])
    assert cache.exists()


@pytest.mark.parametrize("reader", ["compare", "resume"])
@pytest.mark.parametrize("root", ["https://example.org/x", "s3://bucket/x"])
def test_a_folder_names_no_server(folder, tmp_path, reader, root):
    spoil_config(folder, "data", root=root, cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="a run folder may name a remote corpus only if you do too"):
        READERS[reader](folder, tmp_path)
    assert not (tmp_path / "cache").exists()


def test_a_phase_that_is_a_path_is_no_phase(folder):
    values = yaml.safe_load((folder / "config.yaml").read_text())
    values["phases"]["../../x"] = values["phases"].pop("decay")
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    for reader in (eta.show, resume):
        with pytest.raises(ValueError, match=r"phases\.\.\./\.\./x: expected a name|of another run"):
            reader(folder, [])


def test_a_manifest_in_the_folder_leads_no_reader_out_of_it(folder, tmp_path):
    path = folder / "corpus" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["sources"]["../../x"] = manifest["sources"].pop("code")
    path.write_text(json.dumps(manifest))
    for reader in ("export", "compare"):
        with pytest.raises(ValueError, match=r"corpus/manifest\.json names \.\./\.\./x"):
            READERS[reader](folder, tmp_path)
    assert not (tmp_path / "out").exists()


def test_the_model_of_a_checkpoint_is_that_of_its_own_settings(folder, tmp_path):
    """They are verified by its hash; config.yaml is text that anybody may edit."""
    export([folder], tmp_path / "one")
    spoil_config(folder, "backbone", norm_eps=0.1, local_attention=2)
    export([folder], tmp_path / "other")
    assert (tmp_path / "one" / "config.json").read_text() == (tmp_path / "other" / "config.json").read_text()


def test_a_configuration_that_has_lost_a_key_is_not_filled_up_with_a_default(folder):
    path = folder / "config.yaml"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith("clip_grad_norm")))
    with pytest.raises(ValueError, match=r"config\.yaml: clip_grad_norm is missing"):
        saved_config.load(folder)


def test_a_key_that_occurs_twice_is_refused(folder):
    path = folder / "config.yaml"
    path.write_text(f"{path.read_text()}clip_grad_norm: 1.0\n")
    with pytest.raises(ValueError, match=r"config\.yaml: clip_grad_norm occurs twice"):
        saved_config.load(folder)


def test_a_forged_checkpoint_is_named(folder):
    path = folder / FINAL
    content = read(path)
    for forged, named in (
        (replace(content, state=replace(content.state, ranks="x")), "state.ranks=x: expected a whole number"),
        (replace(content, run={**content.run, "rollbacks": "../../x"}), "rollbacks"),
        (
            replace(content, weights={**content.weights, "masked_lm.decoder.weight": torch.zeros(2)}),
            "masked_lm.decoder.weight|decoder.weight",
        ),
    ):
        checkpoints.write(forged, path)
        with pytest.raises(ValueError, match=rf"end-of-decay\.ckpt.*({named})"):
            export([path], path.parent / "out")
    path.write_bytes(b"no checkpoint")
    reseal(path)
    with pytest.raises(ValueError, match=r"end-of-decay\.ckpt is no checkpoint: .*take another"):
        read(path)


def test_tables_are_read_whole_but_for_a_last_row_that_is_being_written(folder):
    path = folder / "metrics.csv"
    whole, rows = path.read_text(), Table(path).read()
    path.write_text(whole[:-20])
    assert Table(path).read() == rows[:-1]
    first = whole.splitlines()[1]
    for line, said in (
        (first.rpartition(",")[0], "expected 14 values"),
        (first.replace(",masked_lm,", ",masked_lm,x"), "loss|float"),
    ):
        path.write_text(whole.replace(first, line))
        with pytest.raises(ValueError, match=rf"metrics\.csv, line 2: .*({said}).*; restore the file"):
            Table(path).read()
    path.write_text(whole.replace("loss", "los"))
    with pytest.raises(ValueError, match=r"metrics\.csv, line 1: its columns are"):
        Table(path).read()
    path.write_text(whole)
    scores = folder / "validation.csv"
    scores.write_text(scores.read_text().replace(",code,", ",cude,"))
    with pytest.raises(ValueError, match=r"validation\.csv has scores of cude, which .*manifest\.json lacks"):
        write_page(replace(saved_config.load(folder), run_dir=str(folder)))


def test_a_damaged_run_in_the_folder_of_a_new_one_is_left_alone(folder, small_run):
    shutil.rmtree(folder / "checkpoints")
    for content in ("- 1\n", "\x00{", ""):
        (folder / "config.yaml").write_text(content)
        with pytest.raises(ValueError, match=r"run_dir=.* holds a run;"):
            train(small_run())
