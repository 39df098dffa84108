"""Folders of tasks: the layouts that are read, and a clear line for each that is none."""

import gzip
import json

import pytest

from modernenc.suites.examples import CHOICES, CLASSES, REGRESSION, TAGS, Example
from modernenc.suites.tasks import find_tasks, read_task

SWAG = ",video-id,fold-ind,startphrase,sent1,sent2,gold-source,ending0,ending1,ending2,ending3,label\n"


def _write(folder, **files: str):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        stem, _, ending = name.partition("_")
        (folder / f"{stem}.{ending.replace('_', '.')}").write_text(text)
    return folder


def test_texts_pairs_and_numbers_are_read_from_tables(tmp_path):
    table = 'label\tsentence\n1\tan "odd quote\n0\tplain\n'
    task = read_task(_write(tmp_path / "CoLA", train_tsv=table, dev_tsv=table))
    assert (task.kind, task.labels, task.metrics) == (CLASSES, ("0", "1"), ("matthews",))
    assert task.train[0] == Example(('an "odd quote',), "1")
    pairs = 'idx,premise,hypothesis,label\n0,"a, b",c,no\n1,d,e,yes\n'
    task = read_task(_write(tmp_path / "own", train_csv=pairs, validation_csv=pairs))
    assert (task.train[0], task.metrics) == (Example(("a, b", "c"), "no"), ("accuracy",))
    scores = "score\tsentence1\tsentence2\n5.0\ta\tb\n2.5\tc\td\n"
    task = read_task(_write(tmp_path / "sts-b", train_tsv=scores, dev_tsv=scores))
    assert (task.kind, task.dev[1], task.metrics) == (REGRESSION, Example(("c", "d"), 2.5), ("pearson", "spearman"))
    folder = _write(tmp_path / "mnli")
    for name in ("train", "dev_matched"):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            file.write(
                '{"premise": "a", "hypothesis": "b", "label": true}\n{"premise": "a", "hypothesis": "b", "label": false}\n'
            )
    assert read_task(folder).labels == ("0", "1")


MULTIRC = {
    "idx": 7,
    "passage": {
        "text": "It rained.",
        "questions": [
            {"question": "Wet?", "answers": [{"text": "yes", "label": 1}, {"text": "no", "label": 0}], "idx": 3},
            {"question": "Dry?", "answers": [{"text": "no", "label": 1}], "idx": 4},
        ],
    },
}
WIC = dict(word="bank", sentence1="The bank is closed.", sentence2="A river bank.", start1=4, end1=8, start2=8, end2=12)
SPANS = dict(span1_index=0, span1_text="Mark", span2_index=4, span2_text="he")


def test_tasks_of_superglue_are_read_as_its_authors_and_as_the_hub_have_them(tmp_path):
    flat = [
        dict(paragraph="It rained.", question=question, answer=answer, idx=dict(paragraph=7, question=number), label=label)
        for question, answer, number, label in (("Wet?", "yes", 0, 1), ("Wet?", "no", 0, 0), ("Dry?", "no", 1, 1))
    ]
    answers = [
        Example(("It rained.", "Wet? yes"), "1", "7-0"),
        Example(("It rained.", "Wet? no"), "0", "7-0"),
        Example(("It rained.", "Dry? no"), "1", "7-1"),
    ]
    for name, rows in (("authors", [MULTIRC]), ("hub", flat)):
        task = read_task(_write(tmp_path / name / "MultiRC", dev_jsonl="\n".join(map(json.dumps, rows))))
        assert task.dev == answers and task.metrics == ("f1", "exact_match")
    task = read_task(_write(tmp_path / "WiC", dev_jsonl=json.dumps({**WIC, "label": False})))
    assert task.dev == [Example(("The *bank* is closed.", "A river *bank*."), "0")]
    text = {"text": "Mark told Pete that he, too, won.", "label": True}
    for name, row in (("authors", {**text, "target": SPANS}), ("hub", {**text, **SPANS})):
        task = read_task(_write(tmp_path / name / "WSC", dev_jsonl=json.dumps(row)))
        assert task.dev == [Example(("Mark told Pete that *he*, too, won.", "Mark"), "1")]


def test_labels_of_opinions_may_be_negative(tmp_path):
    table = "label\ttext\n-1\tbad\n0\tso\n1\tgood\n"
    assert read_task(_write(tmp_path / "own", train_tsv=table, dev_tsv=table)).labels == ("-1", "0", "1")


def test_choices_are_read_in_all_layouts(tmp_path):
    swag = SWAG + "0,v,1,s,He sits.,He,gold,stands,sings,runs,falls,2\n"
    hellaswag = {"ctx": "He sits. He", "endings": ["stands", "sings", "runs", "falls"], "label": 2}
    copa = {"premise": "It rained.", "choice1": "wet", "choice2": "dry", "question": "effect", "label": 0}
    plain = {"question": "Why?", "choices": ["a", "b", "c"], "label": 1}
    task = read_task(_write(tmp_path / "swag", val_csv=swag))
    assert task.kind == CHOICES and not task.train
    assert task.dev == [Example(("He sits.", "He stands", "He sings", "He runs", "He falls"), 2)]
    for name, row, texts in (
        ("hellaswag", hellaswag, ("He sits. He", "stands", "sings", "runs", "falls")),
        ("copa", copa, ("It rained. What happened as a result?", "wet", "dry")),
        ("plain", plain, ("Why?", "a", "b", "c")),
    ):
        task = read_task(_write(tmp_path / name, dev_jsonl=json.dumps(row)))
        assert task.dev == [Example(texts, row["label"])]


def test_tags_are_read_from_columns(tmp_path):
    text = "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\n\nPeter NNP B-NP B-PER\n"
    task = read_task(_write(tmp_path / "ner", train_conll=text, valid_txt=text))
    assert task.kind == TAGS
    assert task.dev == [Example(("EU", "rejects"), ("B-ORG", "O")), Example(("Peter",), ("B-PER",))]
    assert (task.labels, task.metrics) == (("B-ORG", "B-PER", "O"), ("entity_f1",))


def test_a_file_of_a_spreadsheet_begins_with_a_mark_that_is_no_text(tmp_path):
    table = "\ufefflabel,text\nyes,a\nno,b\n"
    assert read_task(_write(tmp_path / "own", train_csv=table, dev_csv=table)).labels == ("no", "yes")


GOOD = "label\tsentence\n1\ta\n0\tb\n"


@pytest.mark.parametrize(
    "files, message",
    [
        (dict(train_tsv="label\tsentence\n1\n", dev_tsv=GOOD), "train.tsv, line 2: 1 fields; expected 2: label, sentence"),
        (dict(train_tsv="sentence\na\n", dev_tsv=GOOD), "train.tsv, line 2: no column label; there are sentence"),
        (dict(train_tsv="label\tsentence\n", dev_tsv=GOOD), "train.tsv has no items"),
        (dict(train_tsv=GOOD, dev_tsv=""), "dev.tsv has no items"),
        (dict(train_tsv=GOOD, dev_tsv="label\tsentence\n-1\ta\n"), "dev.tsv: label=-1 on each line: expected labels"),
        (dict(train_tsv=GOOD, dev_tsv="label\tsentence\n2\ta\n"), "dev.tsv: label 2 is none of those in .*train.tsv: 0, 1"),
        (dict(train_tsv="label\tsentence\n1\ta\n", dev_tsv="label\tsentence\n1\ta\n"), "have the label 1; expected two"),
        (dict(train_tsv=GOOD, dev_jsonl='{"question": "a", "choices": ["b", "c"], "label": 0}'), "choices and classes"),
        (dict(train_tsv=GOOD, dev_tsv=GOOD, dev_csv=GOOD), "dev.csv, dev.tsv: expected one file of the dev split"),
        (dict(train_tsv=GOOD, dev_jsonl="[1]"), "dev.jsonl, line 1: expected a JSON object"),
        (dict(train_tsv=GOOD, dev_jsonl="{"), "dev.jsonl, after item 0: "),
        (dict(train_tsv="label\ta\tb\tc\n1\tx\ty\tz\n", dev_tsv=GOOD), r"3 columns of text \(a, b, c\); expected one or two"),
        (dict(dev_jsonl='{"question": "a", "choices": ["b", "c"], "label": 2}'), "line 1: label=2; expected 0 to 1"),
        (dict(dev_jsonl='{"question": "a", "choices": null, "label": 2}'), "line 1: the answers are None; expected a list"),
        (dict(dev_csv="label,ending0,ending1\n0,a,b\n"), "line 2: no column sent1 beside ending0"),
        (dict(dev_jsonl='{"text": null, "label": "a"}'), "line 1: text=None: expected text"),
        (dict(dev_jsonl='{"text": "a", "label": null}'), "line 1: label=None: expected a label"),
        (dict(dev_jsonl='{"passage": {"text": "a", "entities": []}, "qas": []}'), "ReCoRD's layout is not read; leave"),
        (dict(dev_jsonl='{"idx": 0, "passage": {"text": "a", "questions": [{}]}}'), "line 1: KeyError.*expected MultiRC's"),
        (dict(dev_jsonl=json.dumps({"text": "I won.", "label": 1, **SPANS})), "word 4 of the text is not span2_text=he"),
        (dict(train_conll="EU NNP\n", dev_conll="EU B-ORG\n"), "train.conll, line 1: EU NNP: expected a word first and a tag"),
    ],
)  # fmt: skip
def test_what_is_no_task_is_one_clear_line(tmp_path, files, message):
    with pytest.raises(ValueError, match=message) as raised:
        read_task(_write(tmp_path / "task", **files))
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


def test_tasks_are_found_by_any_spelling_of_their_name(tmp_path):
    for name in ("SST-2", "CoLA"):
        _write(tmp_path / name, train_tsv=GOOD, dev_tsv=GOOD)
    (tmp_path / "notes").mkdir()
    assert [path.name for path in find_tasks(tmp_path)] == ["CoLA", "SST-2"]
    assert [path.name for path in find_tasks(tmp_path, ["sst2"])] == ["SST-2"]
    assert [path.name for path in find_tasks(tmp_path / "CoLA")] == ["CoLA"]
    with pytest.raises(FileNotFoundError, match=r"--tasks QNLI: .* has CoLA, SST-2"):
        find_tasks(tmp_path, ["QNLI"])
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_tasks(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="no task; expected folders that hold train"):
        find_tasks(tmp_path / "notes")
