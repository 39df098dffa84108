"""Data sets of the hub become local folders. The library reads those below as it reads the hub's, from files and a card."""

import json
from pathlib import Path

import pytest

from modernenc.evaluation import hub
from modernenc.suites.examples import CHOICES, Example
from modernenc.suites.retrieval_sets import read_set
from modernenc.suites.tasks import find_tasks, read_task

TAGGED = """dataset_info:
  features:
  - {name: tokens, list: string}
  - {name: ner_tags, list: {class_label: {names: {'0': O, '1': B-PER}}}}
"""


def _write_card(folder: Path, files: dict[str, dict[str, list[dict]]], more: str = "") -> None:
    """Write a data set: for each configuration and split its rows."""
    folder.mkdir(parents=True)
    configs = []
    for config, splits in files.items():
        entries = []
        for split, rows in splits.items():
            (folder / f"{config}-{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
            entries.append({"split": split, "path": f"{config}-{split}.jsonl"})
        configs.append({"config_name": config, "data_files": entries})
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n{more}---\n")


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it reads the environment when it is imported
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def test_configurations_are_tasks_of_which_only_those_named_are_taken(tmp_path):
    rows = [dict(sentence1="a é", sentence2="b", label=label, idx=label) for label in (0, 1)]
    secret = [dict(sentence1="a", sentence2="b", label=-1, idx=0)]
    pairs = [dict(premise="a", hypothesis="b", label=label) for label in (0, 1, 2)]
    _write_card(
        tmp_path / "owner/tasks",
        {
            "mrpc": {"train": rows, "validation": rows, "test": secret},
            "mnli": {"train": pairs, "validation_matched": pairs, "validation_mismatched": pairs, "test_matched": pairs},
            "cola": {"train": rows},
            "ax": {"test": secret},
        },
    )
    root = hub.local_folder("hub:owner/tasks", ("MRPC", "mnli"), Path("out"))
    assert [path.name for path in find_tasks(root)] == ["mnli", "mrpc"]
    hub.local_folder("hub:owner/tasks", ("ax",), Path("out"))
    assert [path.name for path in find_tasks(root)] == ["mnli", "mrpc"]  # whose labels are secret is no task
    task = read_task(root / "mrpc")
    assert (task.dev, task.metrics) == ([Example(("a é", "b"), "0"), Example(("a é", "b"), "1")], ("accuracy", "f1"))
    assert len(read_task(root / "mnli").dev) == 3
    (tmp_path / "owner/tasks/README.md").unlink()  # what was downloaded is not asked for again
    assert hub.local_folder("hub:owner/tasks", ("mrpc",), Path("out")) == root
    with pytest.raises(FileNotFoundError, match=r"--data hub:owner/tasks: --tasks rte: it has .*; expected hub:OWNER/NAME"):
        hub.local_folder("hub:owner/tasks", ("rte",), Path("out"))


def test_a_set_without_configurations_is_one_task(tmp_path):
    swag = {"sent1": "He sits.", "sent2": "He", **{f"ending{number}": f"{number}" for number in range(4)}, "label": 2}
    _write_card(tmp_path / "owner/swag", {"default": {"train": [swag], "validation": [swag]}})
    task = read_task(hub.local_folder("hub:owner/swag", (), Path("out")))
    assert (task.name, task.kind, task.dev) == ("swag", CHOICES, [Example(("He sits.", "He 0", "He 1", "He 2", "He 3"), 2)])


def test_numbers_of_tags_become_their_names(tmp_path):
    sentence = dict(tokens=["Ann", "ran"], ner_tags=[1, 0])
    _write_card(tmp_path / "owner/ner", {"default": {"train": [sentence], "test": [sentence, sentence]}}, TAGGED)
    task = read_task(hub.local_folder("hub:owner/ner", (), Path("out")))
    assert task.dev == [Example(("Ann", "ran"), ("B-PER", "O"))] * 2


@pytest.mark.parametrize("judged", ["default", "qrels"])
def test_a_corpus_with_queries_is_a_set_for_retrieval(tmp_path, judged):
    texts = [dict(_id="1", title="T", text="a"), dict(_id="2", title="", text="b")]
    queries = [dict(_id=f"q{number}", text=text) for number, text in enumerate("ab")]
    grades = [{"query-id": f"q{number}", "corpus-id": f"{number + 1}", "score": 1.0} for number in range(2)]
    _write_card(
        tmp_path / "mteb/tiny",
        {
            "corpus": {"corpus": texts},
            "queries": {"queries": queries},
            judged: {"train": grades[:1], "test": grades[1:]},
        },
    )
    items = read_set(hub.local_folder("hub:mteb/tiny", (), Path("out")))
    assert items.corpus == {"1": "T a", "2": "b"}
    assert (items.train, items.test) == ({"q0": {"1": 1}}, {"q1": {"2": 1}})


def test_a_set_that_the_hub_does_not_give_is_one_clear_line(tmp_path):
    _write_card(tmp_path / "owner/mixed", {"default": {"train": [{"a": 1}], "test": [{"b": 1}]}})
    for name in ("absent", "mixed"):
        with pytest.raises(
            FileNotFoundError, match=rf"--data hub:owner/{name}: .*; expected hub:OWNER/NAME of a data set"
        ) as raised:
            hub.local_folder(f"hub:owner/{name}", (), Path("out"))
        assert "\n" not in str(raised.value)
