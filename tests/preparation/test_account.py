"""What is read is stored, or dropped with a reason that is counted; what cannot be read is named."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from dataclasses import fields
from pathlib import Path

import pyarrow
import pytest
import zstandard
from omegaconf import OmegaConf
from pyarrow import parquet
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from data_prep import account, encode
from data_prep import build as preparation
from data_prep.build import block_size, build
from data_prep.config import RolesConfig, SourceConfig, TokenizerConfig
from data_prep.environment import SHORTEST_DOCSTRING
from data_prep.inputs import create_reader, list_inputs
from modernenc.config import CONF_DIR, Task
from modernenc.data.state import TokenCounts
from modernenc.evaluation.standard_error import standard_error, tokens_for
from support import many_documents
from support.commands import ROOT, command
from support.corpora import corpus, jsonl, stored, texts, write_jsonl


def manifest(root: Path, source: str = "a") -> dict:
    return json.loads((root / "manifest.json").read_text())["sources"][source]


def source(target: str, folder: Path, **reader) -> SourceConfig:
    return SourceConfig(reader={"_target_": target, "data_folder": str(folder), **reader}, licence="CC0-1.0", url="here")


def documents(root: Path, name: str = "a") -> list[str]:
    return sorted(text for folder, found in stored(root).items() if folder.startswith(f"{name}/") for text in found)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3])
def test_every_odd_document_is_counted_when_preparation_is_killed_and_continued_with_other_workers(tmp_path, kills):
    written = many_documents.write(tmp_path / "in", 1500)
    many_documents.prepare(tmp_path, kills, seed=1)
    many_documents.compare(tmp_path / "out", written)


LINES = {
    "not UTF-8": b'{"text": "na\xefve"}',
    "not JSON": b'{"text": "cut',
    "not a JSON object": b'["text"]',
    "without text_key=text": b'{"content": "x"}',
    "null": b'{"text": null}',
    "empty": b'{"text": " "}',
    "of type list in place of a string": b'{"text": ["x"]}',
    "of type bool in place of a string": b'{"text": true}',
    "with lone surrogates": b'{"text": "\\udc00"}',
}


def test_every_reason_for_an_unusable_document_has_a_test():
    elsewhere = {account.UNPARSABLE, account.EMPTIED}
    known = {reason.format(KEY="text", TYPE=kind) for reason in account.FAULTS for kind in ("list", "bool")}
    assert {*LINES, *elsewhere} == known


@pytest.mark.parametrize("reader", ["data_prep.readers.JsonLines", "datatrove.pipeline.readers.JsonlReader"])
def test_an_unusable_line_is_counted_and_the_lines_after_it_are_read(tmp_path, reader):
    good = list(dict.fromkeys(texts(60, 1)))
    lines = [json.dumps({"text": text}).encode() for text in good]
    lines[10:10] = LINES.values()
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    build(corpus(tmp_path / "out", {"a": source(reader, tmp_path)}, max_dropped=0.5))
    assert documents(tmp_path / "out") == sorted(good)
    said = manifest(tmp_path / "out")
    assert said["dropped"] == {**dict.fromkeys(LINES, 1), "duplicate": 0}
    assert said["read"] == said["stored"] + len(LINES) == len(lines)
    assert said["files"]["not_kept_whole"] == {
        "a.jsonl": {"read": len(lines), "stored": len(good), "dropped": dict.fromkeys(LINES, 1)}
    }


@pytest.mark.parametrize("reason", LINES)
def test_more_faults_than_allowed_stop_the_preparation_and_the_first_is_named(tmp_path, reason):
    write_jsonl(tmp_path / "a" / "0.jsonl", texts(50, 1))
    (tmp_path / "a" / "1.jsonl").write_bytes(b'{"text": "fine"}\n' + LINES[reason] + b"\n")
    with pytest.raises(
        ValueError, match=r"sources.a: 1 of 52 documents cannot be used.*max_dropped=0.01: 1 .*\(first: 1.jsonl line 2"
    ):
        build(corpus(tmp_path / "out", {"a": jsonl(tmp_path / "a")}))
    build(corpus(tmp_path / "out", {"a": jsonl(tmp_path / "a")}, max_dropped=0.02))
    assert manifest(tmp_path / "out")["dropped"][reason] == 1


def test_json_lines_with_the_variations_of_other_tools_are_read(tmp_path):
    """A byte order mark, Windows' line ends, NaN, huge numbers, blank lines, no line end at the end of the file."""
    good = ["first", "second \u2028 line", "third\r\nwith a line end", "fourth", "fifth"]
    lines = [
        json.dumps({"text": text, "score": value}) for text, value in zip(good, [float("nan"), 1 << 90, 1, 2, 3], strict=True)
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines[:2], "", " \t", *lines[2:]]).encode())
    build(corpus(tmp_path / "out", {"a": jsonl(tmp_path)}))
    assert documents(tmp_path / "out") == sorted(good)
    assert manifest(tmp_path / "out")["read"] == 5


def test_text_below_nested_keys_is_found(tmp_path):
    lines = [json.dumps({"doc": {"text": text}}) for text in dict.fromkeys(texts(30, 1))]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    build(corpus(tmp_path / "out", {"a": source("data_prep.readers.JsonLines", tmp_path, text_key="doc.text")}))
    assert manifest(tmp_path / "out")["stored"] == len(lines)


def cut(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


def whole_parquet(rows: list[str]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"text": rows}), sink)
    return sink.getvalue().to_pybytes()


LONG = [f"{number} {text}" for number, text in enumerate(texts(3000, 1))]
JSON = "".join(json.dumps({"text": text}) + "\n" for text in LONG).encode()
BROKEN = {
    "cut.jsonl.gz": cut(gzip.compress(JSON)),
    "cut.jsonl.zst": cut(zstandard.compress(JSON)),
    "flipped.jsonl.gz": gzip.compress(JSON)[:2000] + b"\0" * 50 + gzip.compress(JSON)[2050:],
    "plain.jsonl.gz": JSON,
    "plain.jsonl.xz": JSON,
    "cut.parquet": cut(whole_parquet(LONG)),
    "empty.parquet": b"",
    "text.parquet": b"this is no Parquet file at all",
    "cut.txt.gz": cut(gzip.compress(JSON)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_read_to_its_end_is_named_by_any_process(tmp_path, name):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / name).write_bytes(BROKEN[name])
    kind = {"parquet": "ParquetRows", "txt": "TextReader"}.get(name.split(".")[1], "JsonLines")
    for number, whole in enumerate((b'{"text": "whole"}', b'{"text": "whole too"}')):
        if kind == "JsonLines":
            (folder / f"{number}.jsonl").write_bytes(whole)
        elif kind == "TextReader":
            (folder / f"{number}.txt").write_bytes(whole)
        else:
            (folder / f"{number}.parquet").write_bytes(whole_parquet(["whole", str(number)]))
    with pytest.raises(
        ValueError, match=rf"sources.a: .*{name} cannot be read on after \d[\d,]* documents: .+; restore the file"
    ):
        build(corpus(tmp_path / "out", {"a": source(f"data_prep.readers.{kind}", folder)}, workers=2))


def test_compressed_files_of_several_members_are_read_whole(tmp_path):
    for name, compress in (("a.jsonl.gz", gzip.compress), ("b.jsonl.zst", zstandard.compress)):
        halves = [json.dumps({"text": f"{name} {half}"}).encode() + b"\n" for half in range(20)]
        (tmp_path / name).write_bytes(b"".join(compress(half) for half in halves))
    build(corpus(tmp_path / "out", {"a": jsonl(tmp_path)}))
    assert manifest(tmp_path / "out")["stored"] == 40


@pytest.mark.parametrize("reader", ["data_prep.readers.ParquetRows", "datatrove.pipeline.readers.ParquetReader"])
def test_unusable_rows_of_parquet_are_counted(tmp_path, reader):
    good = list(dict.fromkeys(texts(40, 2)))
    values = [*(text.encode() for text in good), None, b"", b"na\xefve"]
    table = pyarrow.table(
        {"text": pyarrow.array(values, pyarrow.binary()).view(pyarrow.string()), "media": [[1]] * len(values)}
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    build(corpus(tmp_path / "out", {"a": source(reader, tmp_path)}, max_dropped=0.5))
    assert documents(tmp_path / "out") == sorted(good)
    assert manifest(tmp_path / "out")["dropped"] == {"null": 1, "empty": 1, "not UTF-8": 1, "duplicate": 0}


def test_documents_of_another_reader_of_datatrove_are_counted(tmp_path):
    good = list(dict.fromkeys(texts(40, 2)))
    (tmp_path / "a.csv").write_text("id,text\n" + "".join(f"{n},{text}\n" for n, text in enumerate([*good, "", " "])))
    build(corpus(tmp_path / "out", {"a": source("datatrove.pipeline.readers.CSVReader", tmp_path)}, max_dropped=0.5))
    assert documents(tmp_path / "out") == sorted(good)
    assert manifest(tmp_path / "out")["dropped"] == {"empty": 2, "duplicate": 0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"content": "x", "url": "y"}\n' * 9, r".*9 without text_key=text \(first: a.jsonl line 1, which has content, url\)"),
        (json.dumps([{"text": "x"}] * 5, indent=1).encode(), r".*has text: \d+ not JSON .*each line is an object"),
        (b'{"text": " "}\n' * 9, r"none of the first 9 documents has text: 9 empty"),
        (b"", r"none of the first 0 documents has text: the files are empty"),
        ("{'text': 'x'}\n".encode("utf-16") * 4, r"none of the first \d+ documents has text: \d+ not UTF-8"),
    ],
)  # fmt: skip
def test_a_source_without_text_is_refused_before_anything_is_written(tmp_path, content, message):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"sources.a: {message}"):
        build(corpus(tmp_path / "out", {"a": jsonl(tmp_path / "a")}))
    assert not (tmp_path / "out").exists()


def test_a_filter_that_drops_every_document_is_named(tmp_path):
    write_jsonl(tmp_path / "a" / "0.jsonl", texts(30, 1))
    everything = {"_target_": "datatrove.pipeline.filters.RegexFilter", "regex_exp": "."}
    with pytest.raises(
        ValueError, match=r"sources.a: no document is left of 30 that were read: 30 regex; check its reader and filters"
    ):
        build(corpus(tmp_path / "out", {"a": jsonl(tmp_path / "a", filters=[everything])}))


def test_hidden_files_and_files_of_other_kinds_are_skipped_and_linked_folders_are_read_once(tmp_path):
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    good = list(dict.fromkeys(texts(60, 4)))
    write_jsonl(folder / "a.jsonl", good[:20])
    write_jsonl(folder / "below" / "b.jsonl.gz", good[20:40])
    write_jsonl(elsewhere / "c.jsonl", good[40:])
    (folder / "more").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    (folder / "again").symlink_to(elsewhere)
    for name in (".cache/huggingface/x.jsonl", ".DS_Store", "._a.jsonl", "README.md", "b.jsonl.incomplete", "below/_SUCCESS"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\x80 no text")
    os.mkfifo(folder / "pipe.jsonl")
    build(corpus(tmp_path / "out", {"a": jsonl(folder)}))
    assert documents(tmp_path / "out") == sorted(good)
    assert manifest(tmp_path / "out")["files"]["passed_over"] == {"hidden": 3, "of other kinds": 4}
    assert manifest(tmp_path / "out")["dropped"] == {"duplicate": 0}


def test_a_pattern_chooses_files_and_an_error_without_any_lists_what_was_found(tmp_path):
    write_jsonl(tmp_path / "in" / "x" / "train.data", ["one", "two", "three"])
    write_jsonl(tmp_path / "in" / "x" / "test.data", ["four"])
    with pytest.raises(
        FileNotFoundError, match=r"no files to read in .*passed over: 2 of other kinds.*it reads .jsonl,.*glob_pattern"
    ):
        build(corpus(tmp_path / "out", {"a": jsonl(tmp_path / "in")}))
    chosen = source("data_prep.readers.JsonLines", tmp_path / "in", glob_pattern="**/train.*")
    build(corpus(tmp_path / "out", {"a": chosen}))
    assert documents(tmp_path / "out") == ["one", "three", "two"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"licence": ""}, r"sources.a.licence=: expected the licence of the texts"),
        ({"data_folder": ""}, r"data_folder: no value; name the folder to read: input=DIR"),
        ({"data_folder": "none/there"}, r"none/there does not exist"),
        ({"data_folder": __file__}, r"is a file; name its folder"),
        ({"limit": 5}, r"reader.limit: not supported"),
        ({"_target_": "data_prep.readers.Nothing"}, r"sources.a.reader: .*Nothing"),
    ],
)
def test_a_wrong_setting_of_a_source_is_refused_with_its_key(tmp_path, change, message):
    write_jsonl(tmp_path / "a" / "0.jsonl", texts(30, 1))
    described = jsonl(tmp_path / "a")
    if "licence" in change:
        described.licence = change["licence"]
    else:
        described.reader |= change
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build(corpus(tmp_path / "out", {"a": described}))


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "a*", "all", "a b", "ä", ""])
def test_a_source_whose_name_cannot_be_a_folder_is_refused(tmp_path, name):
    write_jsonl(tmp_path / "a" / "0.jsonl", texts(30, 1))
    with pytest.raises(ValueError, match=r"sources=.*: expected names of letters"):
        build(corpus(tmp_path / "out", {name: jsonl(tmp_path / "a")}))


def test_sources_whose_names_begin_alike_are_counted_apart(tmp_path):
    for number, name in enumerate(("wiki", "wiki-en", "wiki-en-2")):
        write_jsonl(tmp_path / name / "0.jsonl", [f"{text} {number}" for text in texts(30, number)])
    build(corpus(tmp_path / "out", {name: jsonl(tmp_path / name) for name in ("wiki-en", "wiki", "wiki-en-2")}))
    assert all(manifest(tmp_path / "out", name)["dropped"] == {"duplicate": 0} for name in ("wiki", "wiki-en", "wiki-en-2"))


def test_the_american_spelling_of_licence_is_accepted(tmp_path):
    write_jsonl(tmp_path / "a" / "0.jsonl", texts(30, 1))
    described = jsonl(tmp_path / "a")
    described.licence, described.license = "", "MIT"
    build(corpus(tmp_path / "out", {"a": described}))
    assert manifest(tmp_path / "out")["licence"] == "MIT"


def test_a_source_under_a_licence_that_is_not_allowed_is_refused_before_it_is_read(tmp_path):
    write_jsonl(tmp_path / "a" / "0.jsonl", texts(30, 1))
    sources = {"a": jsonl(tmp_path / "a"), "b": jsonl(tmp_path / "nowhere")}
    sources["b"].licence = "CC BY-NC 4.0"
    expected = r"^sources\.b\.licence=CC BY-NC 4\.0: expected one of licences=\[MIT, CC0-1\.0\]; leave the source out"
    with pytest.raises(ValueError, match=expected):
        build(corpus(tmp_path / "out", sources, licences=["MIT", "CC0-1.0"]))
    build(corpus(tmp_path / "out", {"a": sources["a"]}, licences=["MIT", "CC0-1.0"]))
    build(corpus(tmp_path / "out", {"a": sources["a"]}))  # the list changes nothing of what is prepared: up to date


def test_limit_mb_reads_the_same_text_with_any_number_of_workers(tmp_path):
    for number in range(7):
        write_jsonl(tmp_path / "a" / f"{number}.jsonl", texts(60, number))
    for workers in (1, 3):
        build(corpus(tmp_path / str(workers), {"a": jsonl(tmp_path / "a", limit_mb=0.03)}, workers=workers))
    assert stored(tmp_path / "1") == stored(tmp_path / "3")


@pytest.mark.parametrize("name", ["survey_bucket", "role_ids"], ids=["before the survey", "after the tokenizer"])
def test_unfinished_work_on_other_settings_is_replaced_but_shards_are_never_deleted(tmp_path, monkeypatch, name):
    def die(*arguments, **settings):
        raise KeyboardInterrupt

    write_jsonl(tmp_path / "a" / "0.jsonl", texts(100, 1))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preparation, name, die)
        build(corpus(tmp_path / "out", {"a": jsonl(tmp_path / "a")}, buckets=4))
    settings = dict(buckets=1, tokenizer=TokenizerConfig(vocab_size=280, train_mb=1))
    shard = tmp_path / "out" / "a" / "slice-000" / "bucket-00000" / "shard.00000.mds"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"somebody's")
    with pytest.raises(ValueError, match=r"holds blocks of unfinished work on other inputs or settings \(a\); choose a new"):
        build(corpus(tmp_path / "out", {"a": jsonl(tmp_path / "a")}, **settings))
    assert shard.read_bytes() == b"somebody's"
    shutil.rmtree(tmp_path / "out" / "a")
    build(corpus(tmp_path / "out", {"a": jsonl(tmp_path / "a")}, **settings))
    build(corpus(tmp_path / "new", {"a": jsonl(tmp_path / "a")}, **settings))
    files = [sorted(path.relative_to(root) for path in root.rglob("*")) for root in (tmp_path / "out", tmp_path / "new")]
    assert files[0] == files[1]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "new" / "tokenizer.json").read_bytes()


def wordpiece(path: Path, words: list[str]) -> TokenizerConfig:
    """A tokenizer that does not know every character, and lower-cases."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece({word: n for n, word in enumerate([*specials, *words])}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(specials)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(path))
    return TokenizerConfig(file=str(path))


def test_the_manifest_counts_special_tokens_and_changed_characters_of_a_given_tokenizer(tmp_path, caplog):
    good = list(dict.fromkeys(texts(60, 1)))
    write_jsonl(tmp_path / "a" / "0.jsonl", [*good, "the \U0001f600 [MASK] fox", "The QUICK Brown Fox"])
    settings = wordpiece(tmp_path / "tokenizer.json", [*sorted(set(" ".join(good).split())), "[", "]", "mask"])
    build(corpus(tmp_path / "out", {"a": jsonl(tmp_path / "a")}, tokenizer=settings))
    said = manifest(tmp_path / "out")
    assert said["special_tokens"] == {"[UNK]": 1}
    assert said["text"]["changed_characters"] == len("[MASK]") + len("TheQUICKBrownFox")
    saved = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert saved.truncation is None and saved.padding is None


def test_a_document_without_a_token_is_counted(tmp_path):
    good = list(dict.fromkeys(texts(60, 1)))
    write_jsonl(tmp_path / "a" / "0.jsonl", [*good, "\u0301\u0302"])
    settings = wordpiece(tmp_path / "tokenizer.json", sorted(set(" ".join(good).split())))
    tokenizer = Tokenizer.from_file(settings.file)
    tokenizer.normalizer = normalizers.StripAccents()
    tokenizer.save(settings.file)
    build(corpus(tmp_path / "out", {"a": jsonl(tmp_path / "a")}, tokenizer=settings))
    said = manifest(tmp_path / "out")
    assert said["dropped"] == {"emptied by the tokenizer": 1, "duplicate": 0}
    assert said["read"] == said["stored"] + 1


@pytest.mark.parametrize(
    ("content", "roles", "message"),
    [
        (b"\x0a\x0b<unk>", RolesConfig(), r"tokenizer.file=.* is not a tokenizer.json"),
        (b'{"a": 1}', RolesConfig(), r"is not a tokenizer.json \(it has no model\)"),
        (None, RolesConfig(cls="[PAD]"), r"tokenizer.roles.pad and tokenizer.roles.cls are one token, \[PAD\]"),
        (
            None,
            RolesConfig(mask="<blank>"),
            r"tokenizer.roles.mask: the tokenizer has none of <blank>; .* its special tokens are \[CLS\]",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused_before_anything_is_read(tmp_path, content, roles, message):
    write_jsonl(tmp_path / "a" / "0.jsonl", texts(30, 1))
    settings = wordpiece(tmp_path / "tokenizer.json", ["the"])
    settings.roles = roles
    if content is not None:
        Path(settings.file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        build(corpus(tmp_path / "out", {"a": jsonl(tmp_path / "a")}, tokenizer=settings))
    assert not (tmp_path / "out").exists()


def test_as_much_text_is_held_out_as_the_standard_error_needs(tmp_path):
    write_jsonl(tmp_path / "a" / "0.jsonl", texts(2000, 1))
    error = standard_error(3000)
    assert tokens_for(error) == pytest.approx(3000)
    for name, share, wanted in (("enough", 0.5, error), ("short", 0.005, error), ("all", 0.99, 1e-6)):
        settings = {"validation_share": share, "validation_error": wanted}
        build(corpus(tmp_path / name, {"a": jsonl(tmp_path / "a")}, **settings))
        held_out = manifest(tmp_path / name)["validation"]
        assert held_out["standard_error_nats"] == pytest.approx(standard_error(held_out["tokens"]), abs=1e-4)
    assert 3000 <= manifest(tmp_path / "enough")["validation"]["tokens"] < 3400
    assert manifest(tmp_path / "short")["validation"]["documents"] == pytest.approx(0.005 * 2000, abs=9)
    assert manifest(tmp_path / "short")["validation"]["standard_error_nats"] > error
    held_out = [set(stored(tmp_path / name)["a/validation"]) for name in ("short", "enough", "all")]
    assert held_out[0] < held_out[1] < held_out[2]


def test_the_smallest_source_has_a_document_held_out_and_one_to_train_on(tmp_path):
    write_jsonl(tmp_path / "a" / "0.jsonl", ["one document", "and another"])
    write_jsonl(tmp_path / "b" / "0.jsonl", texts(50, 1))
    build(corpus(tmp_path / "out", {"a": jsonl(tmp_path / "a"), "b": jsonl(tmp_path / "b")}))
    assert [len(found) for folder, found in stored(tmp_path / "out").items() if folder.startswith("a/")] == [1, 1]
    write_jsonl(tmp_path / "a" / "0.jsonl", ["one document", "one document"])
    with pytest.raises(ValueError, match=r"sources.a has 1 document, and one is held out .*document=line"):
        build(corpus(tmp_path / "one", {"a": jsonl(tmp_path / "a"), "b": jsonl(tmp_path / "b")}))
    write_jsonl(tmp_path / "a" / "0.jsonl", ["one", "two", "three", "four"])
    with pytest.raises(
        ValueError, match=r"sources.a: no document fell into slice-\d+; it has 4 documents, too few for slices=30"
    ):
        build(corpus(tmp_path / "sliced", {"a": jsonl(tmp_path / "a"), "b": jsonl(tmp_path / "b")}, slices=30))


@pytest.mark.parametrize(("document", "expected"), [("line", 4), ("paragraph", 2), ("file", 1)])
def test_one_file_can_be_many_documents(tmp_path, document, expected):
    (tmp_path / "a.txt").write_bytes(b"first\r\nsecond\r\n \r\nthird\r\nfourth")
    reader = create_reader("a", source("data_prep.readers.TextReader", tmp_path, document=document))
    assert [file.path for file in list_inputs("a", reader).files] == ["a.txt"]
    assert len(list(reader.read_file("a.txt"))) == expected


SCRIPTS = {
    "devanagari": "हिन्दी में लिखी हुई किताबें पढ़ना अच्छा लगता है क्योंकि भाषा सुन्दर है",
    "tamil": "தமிழ் மொழியில் எழுதப்பட்ட புத்தகங்களைப் படிப்பது மகிழ்ச்சி தருகிறது",
    "bengali": "বাংলা ভাষায় লেখা বই পড়তে ভালো লাগে কারণ ভাষাটি সুন্দর",
    "thai": "ภาษาไทย เป็นภาษา ที่มี วรรณยุกต์ และ สระ อยู่ ด้านบน",
    "burmese": "မြန်မာ ဘာသာ စကားကို ပြောသော သူများ",
    "khmer": "ភាសា ខ្មែរ ជា ភាសា ផ្លូវការ របស់ កម្ពុជា",
    "hebrew": "שָׁלוֹם עֲלֵיכֶם הַיּוֹם יוֹם יָפֶה",
    "arabic": "السَّلَامُ عَلَيْكُمْ وَرَحْمَةُ اللَّهِ",
    "persian": "می\u200cخواهم کتاب\u200cهای خوب بخوانم",
    "vietnamese": unicodedata.normalize("NFD", "Tiếng Việt là ngôn ngữ của người Việt Nam"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_marks_stay_in_words_and_a_word_has_one_spelling(script):
    text = SCRIPTS[script]
    tokenizer = encode.train([text] * 50, vocab_size=2000)
    assert len(tokenizer.encode(text, add_special_tokens=False).ids) == len(text.split())
    for form in ("NFC", "NFD"):
        ids = tokenizer.encode(unicodedata.normalize(form, text), add_special_tokens=False).ids
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_preparation_works_with_every_start_method_of_processes(tmp_path, method):
    for number in range(4):
        write_jsonl(tmp_path / "in" / f"{number}.jsonl", texts(60, number))
    code = (
        "import multiprocessing, multiprocess, runpy, sys\n"
        "if __name__ == '__main__':\n"
        f"    multiprocessing.set_start_method('{method}')\n"
        f"    multiprocess.set_start_method('{method}')\n"
        "    runpy.run_module('data_prep', run_name='__main__', alter_sys=True)\n"
    )
    (tmp_path / "start.py").write_text(code)
    settings = [f"input={tmp_path / 'in'}", f"out={tmp_path / 'out'}", "sources.text.licence=x", "tokenizer.vocab_size=400",
                "workers=2", "buckets=2"]  # fmt: skip
    result = subprocess.run(
        [sys.executable, str(tmp_path / "start.py"), "+corpus=jsonl", *settings], cwd=ROOT, capture_output=True, text=True,
        check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert command("data_prep.verify", str(tmp_path / "out")).returncode == 0


@pytest.mark.parametrize(("tokens", "size"), [(10_000, 4096), (3_000_000, 4096), (8_400_000, 16_384), (2e12, 32_768)])
def test_the_block_size_depends_on_the_smallest_source(tokens, size):
    assert block_size(tokens) == size


@pytest.mark.parametrize("tokens", [10**exponent * first for exponent in range(3, 13) for first in (1, 2, 5)])
def test_a_block_is_the_largest_power_of_two_of_which_a_source_has_512(tokens):
    size = block_size(tokens)
    assert size in (4_096, 8_192, 16_384, 32_768)
    assert size == 4_096 or tokens / size >= 512
    assert size == 32_768 or tokens / (2 * size) < 512


SECTION = (ROOT / "docs" / "prepare.md").read_text().partition("## What is left out, cut or changed")[2].partition("\n## ")[0]
LINES_OF_TABLES = [line for line in SECTION.splitlines() if line.startswith("| ") and "key that changes it" not in line]
ROWS = [line.strip("| ").split(" | ") for line in LINES_OF_TABLES]
KEYS = re.findall(r"^- `([\w.]+)`", (ROOT / "docs" / "configuration.md").read_text(), re.M)


def test_the_manual_lists_every_name_of_the_accounts():
    placeholders = {name: name for name in ("KEY", "TYPE", "LIMIT")}
    reasons = {reason.format(**placeholders) for reason in (*account.FAULTS, account.DUPLICATE, *account.PASSED_OVER)}
    named = {row[0].strip("`") for row in ROWS if row[0].startswith("`")}
    counted = {field.name for field in fields(TokenCounts)}
    assert named - {"limit_mb"} == reasons | counted


def test_the_manual_says_where_something_is_left_out_and_by_which_key():
    for row in ROWS:
        paths = re.findall(r"`([\w/]+\.py)`", " ".join(row))
        assert paths and all((ROOT / path).is_file() for path in paths), row
        for key in re.findall(r"`([a-z][\w.]+)`", row[-1]):
            assert key == "modernenc.resume" or any(key == known or key.startswith(f"{known}.") for known in KEYS), key


def test_the_manual_gives_the_defaults_of_the_code():
    share, items = OmegaConf.load(CONF_DIR / "prepare.yaml").validation_share, Task.validation_items
    for default in (f"less than {SHORTEST_DOCSTRING} characters", f"{items:,} are used", f"at most {100 * share:g} %"):
        assert default in SECTION
