"""A run folder or a checkpoint may come from anybody: it holds values, and is never code."""

import shutil
from pathlib import Path

import pytest
import yaml

from modernenc import config, saved_config
from modernenc.model.export import export
from modernenc.planning import eta
from modernenc.reporting.comparison import compare
from modernenc.run_folder import checkpoints
from modernenc.run_folder.checkpoints import read
from support.commands import command, error
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


def test_shipped_names_are_those_that_the_options_choose():
    chosen = {
        yaml.safe_load(path.read_text())["_target_"]
        for group in ("backbone", "optim")
        for path in (config.CONF_DIR / group).glob("*.yaml")
    }
    values = saved_config.plain(composed(["+recipe=demo", "data.root=nowhere"]))
    for target in chosen:
        saved_config.from_plain({**values, "optim" if "optim" in target else "backbone": {"_target_": target}})
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
    from modernenc.run_folder.tables import Table

    Table(folder / "metrics.csv").cut_after(5)
    resume(folder / "checkpoints" / "end-of-stable.ckpt", [])
    assert "has lost the rows of steps 6 to" in caplog.text


def test_a_damaged_history_names_its_file(folder):
    (folder / "lineage.json").write_text("[{")
    result = command("modernenc.eta", str(folder))
    assert result.returncode == 2 and f"{folder / 'lineage.json'} is damaged" in result.stderr
