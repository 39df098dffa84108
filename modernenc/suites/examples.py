"""Examples for fine-tuning, read from one file of a task: TSV, CSV, JSON lines or CoNLL's columns.

- One text or a pair of texts, and a `label`: TSV with a header and without quoting, as GLUE has it, CSV, or JSON lines. Labels
  are words, or numbers with a decimal point, which are regressed.
- SuperGLUE's (Wang et al. 2019, arXiv:1905.00537), as its authors and as the hub have them. The words that WiC and WSC ask
  about stand between asterisks; MultiRC's answers are labelled one by one.
- Multiple choice: CSV with SWAG's columns, JSON lines with HellaSwag's keys (`ctx`, `endings`, `label`), with COPA's
  (`premise`, `choice1`, `choice2`, `question`, `label`), or with `question`, `choices` and `label`.
- Words with a tag each: CoNLL's columns, a word and its tag first and last on a line, and an empty line between sentences.
"""

import csv
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLASSES, REGRESSION, CHOICES, TAGS = "classes", "regression", "choices", "tags"
"""Kinds of tasks."""
ENDINGS = (".tsv", ".csv", ".jsonl", ".jsonl.gz", ".conll", ".txt")
"""How the names of the files end that are read."""
LABEL_COLUMNS = ("label", "gold_label", "score", "is_duplicate")
TEXT_COLUMNS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"),
    ("question", "passage"), ("sentence",), ("text",),
)  # fmt: skip
ID_COLUMNS = ("", "id", "idx", "index", "guid", "pairID", "genre")
COPA_QUESTIONS = {"cause": "What was the cause?", "effect": "What happened as a result?"}
UNLABELLED = "-1"
"""What stands in place of each label in a split that has none."""


@dataclass(frozen=True)
class Example:
    """Something to be labelled."""

    texts: tuple[str, ...]
    """One text or two; for a choice, the context and its endings; for tags, the words."""
    label: Any
    """The label as the file has it; for a choice the number of the right ending, for tags a tuple of them."""
    group: str = ""
    """What the example is one of several parts of, such as the question that an answer is to."""


def read_examples(path: Path) -> Iterator[tuple[str, Example]]:
    """Yield the kind and the content of each example of a file.

    Raises ValueError, naming the file and the line, for what is no example.
    """
    count, labelled = 0, False
    try:
        read = _read_conll if path.name.endswith((".conll", ".txt")) else _read_rows
        for kind, item in read(path):
            yield kind, item
            count, labelled = count + 1, labelled or item.label != UNLABELLED
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}, after item {count}: {error}") from error
    if not count:
        raise ValueError(f"{path} has no items")
    if not labelled:
        raise ValueError(f"{path}: label=-1 on each line: expected labels; a split without them cannot be scored")


def _read_rows(path: Path) -> Iterator[tuple[str, Example]]:
    for place, row in _rows(path):
        where = f"{path}, line {place}"
        if "ending0" in row:
            if "sent1" not in row:
                raise ValueError(f"{where}: no column sent1 beside ending0; expected SWAG's columns")
            endings = [value for key, value in sorted(row.items()) if key.startswith("ending")]
            second = row.get("sent2", "")
            yield CHOICES, _choice(where, row["sent1"], [f"{second} {ending}".strip() for ending in endings], row.get("label"))
        elif "endings" in row:
            yield CHOICES, _choice(where, row.get("ctx", row.get("question", "")), row["endings"], row.get("label"))
        elif "choices" in row:
            question = f"{row.get('question', '')} {COPA_QUESTIONS.get(row.get('kind', ''), '')}".strip()
            yield CHOICES, _choice(where, question, row["choices"], row.get("label"))
        elif "choice1" in row:
            context = f"{row.get('premise', '')} {COPA_QUESTIONS.get(row.get('question', ''), '')}".strip()
            yield CHOICES, _choice(where, context, [row["choice1"], row.get("choice2", "")], row.get("label"))
        elif "qas" in row or "entities" in row:
            raise ValueError(f"{where}: ReCoRD's layout is not read; leave the task out with --tasks")
        elif "passage" in row and isinstance(row["passage"], dict):
            yield from ((CLASSES, answer) for answer in _answers(where, row))
        else:
            yield CLASSES, _classified(where, *_flat(where, row))


def _choice(where: str, context: str, endings: list[str], label: Any) -> Example:
    if not isinstance(endings, list) or not all(isinstance(ending, str) for ending in endings) or len(endings) < 2:
        raise ValueError(f"{where}: the answers are {endings}; expected a list of two texts or more")
    if str(label) not in [str(number) for number in range(len(endings))]:
        raise ValueError(f"{where}: label={label}; expected 0 to {len(endings) - 1}, the number of the right ending")
    return Example((context, *endings), int(label))


def _answers(where: str, row: dict[str, Any]) -> Iterator[Example]:
    """Yield each answer of a passage of MultiRC, as its authors have them."""
    passage = row["passage"]
    try:
        for number, question in enumerate(passage["questions"]):
            for answer in question["answers"]:
                flat = {"paragraph": passage["text"], "question": question["question"], "answer": answer["text"]}
                group = {"paragraph": row["idx"], "question": number}
                yield _classified(where, *_flat(where, {**flat, "idx": group, "label": answer.get("label")}))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where}: {error!r}: expected MultiRC's passage with text, questions and their answers") from error


def _flat(where: str, row: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return a row of MultiRC, WiC or WSC as two texts with a label, another as it is; and its group if it has one."""
    group, target = "", row.get("target", row)
    if {"paragraph", "question", "answer"} <= set(row) and isinstance(row.get("idx"), dict):
        group = f"{row['idx'].get('paragraph')}-{row['idx'].get('question')}"
        texts = row["paragraph"], f"{row['question']} {row['answer']}"
    elif {"word", "sentence1", "sentence2", "start1", "end1", "start2", "end2"} <= set(row):
        texts = tuple(_marked(row[f"sentence{side}"], int(row[f"start{side}"]), int(row[f"end{side}"])) for side in "12")
    elif isinstance(target, dict) and "text" in row and {"span1_text", "span2_text", "span2_index"} <= set(target):
        words, pronoun = row["text"].split(" "), target["span2_text"]
        start = len("".join(f"{word} " for word in words[: int(target["span2_index"])]))
        if not row["text"].startswith(pronoun, start):
            raise ValueError(f"{where}: word {target['span2_index']} of the text is not span2_text={pronoun}")
        texts = _marked(row["text"], start, start + len(pronoun)), target["span1_text"]
    else:
        return row, group
    return {"sentence1": texts[0], "sentence2": texts[1], "label": row.get("label")}, group


def _marked(text: str, start: int, end: int) -> str:
    return f"{text[:start]}*{text[start:end]}*{text[end:]}"


def _classified(where: str, row: dict[str, Any], group: str) -> Example:
    key = next((name for name in LABEL_COLUMNS if name in row), None)
    if key is None:
        raise ValueError(f"{where}: no column label; there are {', '.join(row)}")
    label = str(row[key]).strip() if not isinstance(row[key], bool) else str(int(row[key]))
    if label in ("", "None"):
        raise ValueError(f"{where}: {key}={label or 'nothing'}: expected a label; a split without labels cannot be scored")
    others = [name for name in row if name != key and name not in ID_COLUMNS]
    names = next((names for names in TEXT_COLUMNS if all(name in row for name in names)), tuple(others))
    if not 1 <= len(names) <= 2:
        raise ValueError(f"{where}: {len(names)} columns of text ({', '.join(names)}); expected one or two beside {key}")
    for name in names:
        if not isinstance(row[name], str):
            raise ValueError(f"{where}: {name}={row[name]}: expected text")
    return Example(tuple(row[name] for name in names), label, group)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number of the line and the fields of each row of a table or of JSON lines."""
    open_text = gzip.open if path.name.endswith(".gz") else open
    with open_text(path, "rt", encoding="utf-8-sig", newline="") as file:
        if ".jsonl" in path.name:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"{path}, line {number}: expected a JSON object")
                    yield number, row
            return
        style: Any = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
        csv.field_size_limit(1 << 30)
        reader = csv.reader(file, **style)
        header = next(reader, [])
        for fields in reader:
            if len(fields) != len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(fields)} fields; expected {len(header)}: {', '.join(header)}"
                )
            yield reader.line_num, dict(zip(header, fields, strict=True))


def _read_conll(path: Path) -> Iterator[tuple[str, Example]]:
    words: list[str] = []
    tags: list[str] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate([*file, ""], 1):
            columns = line.split()
            if not columns or columns[0] == "-DOCSTART-":
                if words:
                    yield TAGS, Example(tuple(words), tuple(tags))
                words, tags = [], []
            elif len(columns) < 2 or not (columns[-1] == "O" or columns[-1][1:2] == "-"):
                raise ValueError(
                    f"{path}, line {number}: {line.strip()}: expected a word first and a tag such as B-PER or O last"
                )
            else:
                words.append(columns[0])
                tags.append(columns[-1])
