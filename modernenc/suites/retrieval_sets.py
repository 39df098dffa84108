"""Sets for retrieval, read from a folder each: texts to find, queries, and which text is relevant to which query.

- BEIR's layout (Thakur et al. 2021, arXiv:2104.08663), which CoIR's sets have too: `corpus.jsonl` with `_id`, `title` and
  `text`, `queries.jsonl` with `_id` and `text`, and `qrels/test.tsv`, or else `qrels/dev.tsv`, with a header. `qrels/train.tsv`
  is for fine-tuning, and so is `scores.jsonl`, a teacher's scores: `query_id`, `document_ids`, `scores`.
- MLDR's layout (Chen et al. 2024, arXiv:2402.03216): `corpus.jsonl` with `docid` and `text`, and `test.jsonl`, or else
  `dev.jsonl`, with `query_id`, `query`, `positive_passages` and `negative_passages`; `train.jsonl` is for fine-tuning.
- CoSQA's layout (Huang et al. 2021, arXiv:2105.13239): `test.jsonl`, or else `dev.jsonl`, with `query`, `code` and `label`.
  Each query looks for its code among all code of the file; `train.jsonl` is for fine-tuning.

Every file may end in `.gz` as well.
"""

import gzip
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

from modernenc.evaluation.settings import same_task
from modernenc.hashing import hash_file

Texts = dict[str, str]
"""Texts by their ids."""
Judgements = dict[str, dict[str, int]]
"""For a query, the texts that are relevant to it, and how much; there is one at least."""
HELD_OUT = ("test", "dev")
"""The splits that are scored; the first that is there counts."""
TEXT_TO_CODE, CODE_TO_TEXT = "text-to-code", "code-to-text"


@dataclass(frozen=True)
class Ranked:
    """What a teacher gives for one query: scores of texts."""

    query: str
    documents: list[str]
    scores: list[float]


@dataclass(frozen=True, eq=False)
class RetrievalSet:
    """Queries and texts. It is held by what is computed from it once, so that it compares by identity."""

    name: str
    queries: Texts
    corpus: Texts
    """What is ranked."""
    test: Judgements
    train: Judgements
    fingerprint: str
    """Hash of its files."""
    negatives: dict[str, list[str]] = field(default_factory=dict)
    """Texts that the set itself gives as hard negatives of queries."""
    unranked: Texts = field(default_factory=dict)
    """Texts that are only trained on."""
    teacher: list[Ranked] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    def text(self, document: str) -> str:
        """Return the text of a document that is ranked or trained on."""
        return self.corpus[document] if document in self.corpus else self.unranked[document]

    def is_itself(self, query: str, document: str) -> bool:
        """Return whether a query is a document of the corpus, as in ArguAna and Quora, which must not be found."""
        return query == document and self.corpus[document].endswith(self.queries[query])


def find_sets(root: Path, names: Iterable[str] = ()) -> list[Path]:
    """Return the folders of the sets of the given names, or of all, in the order of their paths.

    `root` may be the folder of a single set, or hold them two folders deep. Raises FileNotFoundError for a name without a
    folder, or when there is no set.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"--data {root}: no such folder; expected a folder for each set in it")
    inside = sorted(path for pattern in ("*", "*/*") for path in root.glob(pattern) if path.is_dir())
    folders = [path for path in [root] if _layout(path)] or [path for path in inside if _layout(path)]
    if not folders:
        raise FileNotFoundError(
            f"--data {root}: no set; expected folders that hold corpus.jsonl, queries.jsonl and qrels/test.tsv, or files as"
            " MLDR or CoSQA has them"
        )
    called = [path.name for path in folders]
    if twice := sorted({name for name in called if called.count(name) > 1}):
        raise ValueError(f"--data {root}: there are two sets called {twice[0]}; rename the folder of one")
    found = list(dict.fromkeys(path for name in names for path in folders if same_task(path.name, name)))
    for name in names:
        if not any(same_task(path.name, name) for path in found):
            raise FileNotFoundError(f"--tasks {name}: {root} has {', '.join(path.name for path in folders)}")
    return found or folders


def read_set(folder: Path) -> RetrievalSet:
    """Read a set from its folder.

    Raises FileNotFoundError or ValueError, naming the file and the line, for what is no set: no texts, no judgements, an id
    that comes twice or that no text has.
    """
    read = {"beir": _read_beir, "mldr": _read_mldr, "cosqa": _read_cosqa}.get(_layout(folder))
    if read is None:
        raise FileNotFoundError(f"{folder}: no corpus.jsonl, and no test.jsonl or dev.jsonl with query and code")
    return read(folder)


def reverse(items: RetrievalSet) -> RetrievalSet:
    """Return the set in which texts look for their queries: the other direction, such as code to text."""
    return replace(
        items,
        queries={**items.corpus, **items.unranked},
        corpus=items.queries,
        test=_reversed(items.test),
        train=_reversed(items.train),
        negatives={},
        unranked={},
        teacher=[],
        fingerprint=f"{items.fingerprint} reversed",
    )


def _reversed(judgements: Judgements) -> Judgements:
    others: Judgements = {}
    for query, documents in judgements.items():
        for document, grade in documents.items():
            others.setdefault(document, {})[query] = grade
    return others


def _layout(folder: Path) -> str:
    """Return the name of a folder's layout, which is empty for what holds no set."""
    if _file(folder, "queries") and _file(folder, "corpus"):
        return "beir"
    held_out = next((path for split in HELD_OUT if (path := _file(folder, split))), None)
    if _file(folder, "corpus"):
        return "mldr" if held_out else "beir"
    row = next((row for _, row in _rows(held_out)), {}) if held_out else {}
    return "cosqa" if {"query", "code", "label"} <= set(row) else ""


def _file(folder: Path, name: str, ending: str = ".jsonl") -> Path | None:
    return next((path for end in (ending, f"{ending}.gz") if (path := folder / f"{name}{end}").is_file()), None)


def _needed(folder: Path, name: str) -> Path:
    path = _file(folder, name)
    if path is None:
        raise FileNotFoundError(f"{folder}: no {name}.jsonl")
    return path


def _split(folder: Path, split: str, ending: str) -> Path | None:
    """Return the file of the training split, or of the held-out one, which must be there."""
    if split == "train":
        return _file(folder, split, ending)
    path = next((path for one in HELD_OUT if (path := _file(folder, one, ending))), None)
    if path is None:
        raise FileNotFoundError(f"{folder}: neither test{ending} nor dev{ending}, so nothing to score")
    return path


def _read_beir(folder: Path) -> RetrievalSet:
    corpus = _texts(_needed(folder, "corpus"), "_id", ("title", "text"))
    queries = _texts(_needed(folder, "queries"), "_id", ("text",))
    test_file, train_file = (_split(folder / "qrels", split, ".tsv") for split in ("test", "train"))
    scores_file = _file(folder, "scores")
    test, notes = _judgements(test_file, queries, corpus)
    train, _ = _judgements(train_file, queries, corpus)
    files = [_needed(folder, "corpus"), _needed(folder, "queries"), test_file, train_file, scores_file]
    teacher = _teacher(scores_file, queries, corpus) if scores_file else []
    return RetrievalSet(folder.name, queries, corpus, test, train, _hash(files), teacher=teacher, notes=notes)


def _judgements(path: Path | None, queries: Texts, corpus: Texts) -> tuple[Judgements, tuple[str, ...]]:
    """Read a file of qrels, and say how many queries it has to which nothing is relevant."""
    judged: Judgements = {}
    for where, (query, document, score) in _qrels(path) if path else ():
        for kind, one, of, file in (("query", query, queries, "queries"), ("document", document, corpus, "corpus")):
            if one not in of:
                raise ValueError(f"{where}: no {kind} has the id {one}; expected one of {file}.jsonl")
        if not score.lstrip("-").isdigit():
            raise ValueError(f"{where}: score {score}: expected a whole number, such as 1")
        if judged.setdefault(query, {}).setdefault(document, int(score)) != int(score):
            raise ValueError(f"{where}: another score for query {query} and document {document} than on an earlier line")
    relevant = {query: {one: grade for one, grade in of.items() if grade > 0} for query, of in judged.items()}
    relevant = {query: of for query, of in relevant.items() if of}
    if path and not relevant:
        raise ValueError(f"{path}: no query has a relevant document; expected lines of query-id, corpus-id and score 1 or more")
    without = len(judged) - len(relevant)
    return relevant, (f"{path}: {without} queries without a relevant document are left out",) if without else ()


def _qrels(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the place and the fields of each judgement."""
    for number, line in _lines(path):
        where, fields = f"{path}, line {number}", line.rstrip("\n").split("\t")
        if len(fields) != 3:
            raise ValueError(f"{where}: {len(fields)} fields; expected 3 between tabs: query-id, corpus-id, score")
        if number > 1:
            yield where, [one.strip() for one in fields]
        elif [one.strip().replace("_", "-") for one in fields] != ["query-id", "corpus-id", "score"]:
            raise ValueError(f"{where}: {line.strip()}: expected the header query-id, corpus-id, score, between tabs")


def _teacher(path: Path, queries: Texts, corpus: Texts) -> list[Ranked]:
    teacher = []
    for number, row in _rows(path):
        where = f"{path}, line {number}"
        query, documents, scores = (row.get(key) for key in ("query_id", "document_ids", "scores"))
        if not (isinstance(documents, list) and isinstance(scores, list) and len(documents) == len(scores) >= 2):
            raise ValueError(f"{where}: expected query_id, and as many document_ids as scores, two or more")
        unknown = [one for one in map(str, documents) if one not in corpus]
        if str(query) not in queries or unknown:
            kind, one = ("document", unknown[0]) if str(query) in queries else ("query", query)
            raise ValueError(f"{where}: no {kind} has the id {one}")
        if wrong := [score for score in scores if isinstance(score, bool) or not isinstance(score, int | float)]:
            raise ValueError(f"{where}: scores holds {wrong[0]}: expected numbers")
        teacher.append(Ranked(str(query), [str(one) for one in documents], [float(score) for score in scores]))
    if not teacher:
        raise ValueError(f"{path} has no scores")
    return teacher


def _read_mldr(folder: Path) -> RetrievalSet:
    corpus_file = _needed(folder, "corpus")
    corpus = _texts(corpus_file, "docid", ("text",))
    queries: Texts = {}
    unranked: Texts = {}
    negatives: dict[str, list[str]] = {}
    judged: dict[str, Judgements] = {"test": {}, "train": {}}
    files = {split: _split(folder, split, ".jsonl") for split in judged}
    for split, path in files.items():
        for number, row in _rows(path) if path else ():
            where, query = f"{path}, line {number}", str(row.get("query_id"))
            if query in queries:
                raise ValueError(f"{where}: query_id {query} comes twice")
            queries[query] = _text(where, row, "query")
            passages = {key: row.get(f"{key}_passages") or [] for key in ("positive", "negative")}
            ids = {key: [_text(where, one, "docid") for one in mine] for key, mine in passages.items()}
            if split == "test" and (unknown := [one for one in ids["positive"] if one not in corpus]):
                raise ValueError(f"{where}: no document has the id {unknown[0]}; expected one of {corpus_file.name}")
            if split == "train":  # some of what is trained on may not be in the corpus
                found = [one for mine in passages.values() for one in mine]
                unranked |= {str(one["docid"]): _text(where, one, "text") for one in found if str(one["docid"]) not in corpus}
                negatives[query] = ids["negative"]
            if ids["positive"]:
                judged[split][query] = dict.fromkeys(ids["positive"], 1)
    if not judged["test"]:
        raise ValueError(f"{files['test']}: no query has positive_passages")
    content = _hash([corpus_file, *files.values()])
    return RetrievalSet(folder.name, queries, corpus, judged["test"], judged["train"], content, negatives, unranked)


def _read_cosqa(folder: Path) -> RetrievalSet:
    texts: dict[str, tuple[Texts, Texts]] = {}
    judged: dict[str, Judgements] = {}
    files = {split: _split(folder, split, ".jsonl") for split in ("test", "train")}
    for split, path in files.items():
        queries: Texts = {}
        codes: Texts = {}
        judged[split] = {}
        for number, row in _rows(path) if path else ():
            where = f"{path}, line {number}"
            ids = [
                known.setdefault(_text(where, row, key), f"{split}-{key}-{number}")
                for key, known in (("query", queries), ("code", codes))
            ]  # by their texts: the same one on several lines is one
            if str(row.get("label")) not in ("0", "1"):
                raise ValueError(f"{where}: label={row.get('label')}: expected 0, or 1 where the code answers the query")
            if str(row["label"]) == "1":
                judged[split].setdefault(ids[0], {})[ids[1]] = 1
        texts[split] = ({one: text for text, one in queries.items()}, {one: text for text, one in codes.items()})
    if not judged["test"]:
        raise ValueError(f"{files['test']}: no pair has the label 1")
    return RetrievalSet(
        folder.name,
        {**texts["test"][0], **texts["train"][0]},
        texts["test"][1],
        judged["test"],
        judged["train"],
        _hash(files.values()),
        unranked=texts["train"][1],
    )


def _texts(path: Path, key: str, parts: Collection[str]) -> Texts:
    """Read texts by their ids; a title and a text are joined by a space."""
    texts: Texts = {}
    for number, row in _rows(path):
        where = f"{path}, line {number}"
        one = _text(where, row, key)
        if one in texts:
            raise ValueError(f"{where}: {key}={one} comes twice; expected an id of its own for each line")
        texts[one] = " ".join(_text(where, row, part) if part == "text" else str(row.get(part) or "") for part in parts).strip()
    if not texts:
        raise ValueError(f"{path} is empty: expected a line of JSON for each text, with {key} and {' and '.join(parts)}")
    return texts


def _text(where: str, row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"{where}: {key} is {'missing' if key not in row else 'no text'}; there are {', '.join(row)}")
    return str(value)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the content of each line of JSON."""
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object")
        yield number, row


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    open_text = gzip.open if path.name.endswith(".gz") else open
    try:
        with open_text(path, "rt", encoding="utf-8") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: {error}") from error


def _hash(files: Iterable[Path | None]) -> str:
    return xxhash.xxh3_64(" ".join(hash_file(path) if path else "-" for path in files).encode()).hexdigest()
