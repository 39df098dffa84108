"""corpus -> block shards: nothing lost, nothing half-written, nothing mistaken."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zstandard
from tokenizers import Tokenizer

from data_prep import encode
from data_prep.build import build
from data_prep.config import SourceConfig, TokenizerConfig
from data_prep.verify import verify
from modernenc.data.blocks import Corpus as Opened
from modernenc.data.blocks import Shards
from modernenc.data.store import Store
from support.corpora import corpus, jsonl, stored, texts, write_jsonl
from support.damage import flip


def test_every_document_is_stored_once_whole_and_shuffled(tmp_path):
    first, second = texts(150, 1), texts(100, 2)
    duplicates = first[:7]
    write_jsonl(tmp_path / "a" / "0.jsonl", first)
    write_jsonl(tmp_path / "b" / "0.jsonl.gz", second[:50])
    write_jsonl(tmp_path / "b" / "1.jsonl.zst", [*second[50:], *duplicates, " ", second[3]])
    build(corpus(tmp_path / "out", {"a": jsonl(tmp_path / "a"), "b": jsonl(tmp_path / "b")}, slices=2))
    found = stored(tmp_path / "out")
    distinct_first, distinct_second = list(dict.fromkeys(first)), [t for t in dict.fromkeys(second) if t not in set(first)]
    ours = [text for folder, documents in found.items() if folder.startswith("a/") for text in documents]
    assert sorted(ours) == sorted(distinct_first)
    assert ours != distinct_first
    theirs = [text for folder, documents in found.items() if folder.startswith("b/") for text in documents]
    assert sorted(theirs) == sorted(distinct_second)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    dropped = manifest["sources"]["b"]["dropped"]
    assert dropped == {"empty": 1, "duplicate": len(second) + 8 - len(distinct_second)}
    assert {"slice-000", "slice-001"} == set(manifest["sources"]["a"]["slices"])
    assert manifest["sources"]["a"]["licence"] == "CC0-1.0"
    assert not set(found["a/validation"]) & set(found["a/slice-000"] + found["a/slice-001"])


def test_the_result_does_not_depend_on_the_number_of_workers(tmp_path):
    for part in range(4):
        write_jsonl(tmp_path / "a" / f"{part}.jsonl", texts(60, part))
    build(corpus(tmp_path / "one", {"a": jsonl(tmp_path / "a")}, workers=1))
    build(corpus(tmp_path / "many", {"a": jsonl(tmp_path / "a")}, workers=2))
    assert stored(tmp_path / "one") == stored(tmp_path / "many")


def test_which_documents_are_held_out_does_not_depend_on_the_rest_of_the_corpus(tmp_path):
    write_jsonl(tmp_path / "a" / "0.jsonl", texts(200, 1))
    write_jsonl(tmp_path / "more" / "0.jsonl", texts(200, 1) + texts(300, 5))
    build(corpus(tmp_path / "small", {"a": jsonl(tmp_path / "a")}))
    build(corpus(tmp_path / "large", {"a": jsonl(tmp_path / "more")}, seed=5, buckets=1))
    assert set(stored(tmp_path / "small")["a/validation"]) <= set(stored(tmp_path / "large")["a/validation"])


@pytest.mark.parametrize("kind", ["parquet", "text"])
def test_parquet_and_plain_text_are_stored_whole(tmp_path, kind):
    documents = list(dict.fromkeys(texts(80, 3)))
    folder = tmp_path / "in"
    folder.mkdir()
    if kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": documents}), folder / "0.parquet")
        target = "datatrove.pipeline.readers.ParquetReader"
    else:
        for number, text in enumerate(documents):
            (folder / f"{number}.txt").write_text(text)
        target = "data_prep.readers.TextReader"
    source = SourceConfig(reader={"_target_": target, "data_folder": str(folder)}, licence="CC0-1.0", url="here")
    build(corpus(tmp_path / "out", {"a": source}))
    found = stored(tmp_path / "out")
    assert sorted(found["a/slice-000"] + found["a/validation"]) == sorted(documents)


def test_documents_dropped_by_filters_are_counted_by_reason(tmp_path):
    write_jsonl(tmp_path / "a" / "0.jsonl", [*texts(100, 1), *(f"{text} FORBIDDEN" for text in texts(20, 2))])
    forbidden = {"_target_": "datatrove.pipeline.filters.RegexFilter", "regex_exp": "FORBIDDEN"}
    build(corpus(tmp_path / "out", {"a": jsonl(tmp_path / "a", filters=[forbidden])}))
    assert not any("FORBIDDEN" in text for documents in stored(tmp_path / "out").values() for text in documents)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["sources"]["a"]["dropped"] == {"regex": 20, "duplicate": 0}


def test_preparing_again_does_nothing_and_other_inputs_are_refused(tmp_path, capsys):
    write_jsonl(tmp_path / "a" / "0.jsonl", texts(100, 1))
    settings = corpus(tmp_path / "out", {"a": jsonl(tmp_path / "a")})
    build(settings)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    build(settings)
    assert "up to date" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    write_jsonl(tmp_path / "a" / "1.jsonl", texts(10, 9))
    with pytest.raises(ValueError, match=r"out=.* holds a corpus made from other inputs"):
        build(settings)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_an_interrupted_preparation_is_no_corpus_and_can_be_continued(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a" / "0.jsonl", texts(100, 1))
    settings = corpus(tmp_path / "out", {"a": jsonl(tmp_path / "a")})
    build(corpus(tmp_path / "whole", {"a": jsonl(tmp_path / "a")}))

    def die(*arguments, **settings):
        raise KeyboardInterrupt

    # before the tokenizer, after it, after the blocks
    for step in ("encode.train", "build.role_ids", "manifest.special_token_ids"):
        with monkeypatch.context() as patch:
            patch.setattr(f"data_prep.{step}", die)
            with pytest.raises(KeyboardInterrupt):
                build(settings)
        with pytest.raises(FileNotFoundError, match=r"no manifest\.json there; .*; else do this"):
            Opened(Store(str(tmp_path / "out")), hint="do this")
    build(settings)
    assert stored(tmp_path / "out") == stored(tmp_path / "whole")


def test_a_given_tokenizer_is_used_with_its_own_roles(tmp_path):
    write_jsonl(tmp_path / "a" / "0.jsonl", [*texts(100, 1), "a literal <s> and <mask> are text"])
    tokenizer = encode.train(iter(texts(100, 1)), vocab_size=320)
    other = json.loads(tokenizer.to_str().replace("[CLS]", "<s>").replace("[SEP]", "</s>").replace("[MASK]", "<mask>"))
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(other))
    build(corpus(tmp_path / "out", {"a": jsonl(tmp_path / "a")}, tokenizer=TokenizerConfig(file=str(path))))
    opened = Opened(Store(str(tmp_path / "out")))
    given = Tokenizer.from_file(str(path))
    assert (opened.roles.cls, opened.roles.mask) == (given.token_to_id("<s>"), given.token_to_id("<mask>"))
    assert not set(opened.ordinary_ids.tolist()) & {opened.roles.cls, opened.roles.mask, opened.roles.pad}
    path.write_text(json.dumps(other).replace("<mask>", "<blank>"))
    with pytest.raises(ValueError, match=r"tokenizer.roles.mask: the tokenizer has none of"):
        build(corpus(tmp_path / "other", {"a": jsonl(tmp_path / "a")}, tokenizer=TokenizerConfig(file=str(path))))


@pytest.fixture
def damaged(corpus_root, tmp_path) -> Path:
    shutil.copytree(corpus_root, tmp_path / "copy")
    return tmp_path / "copy"


def one_shard(root: Path) -> Path:
    return sorted(root.glob("code/slice-000/bucket-*/*.mds"))[0]


def test_a_whole_corpus_passes_verify(corpus_root):
    verify(corpus_root)


def test_a_flipped_bit_is_found_by_verify_and_at_first_opening(damaged):
    path = one_shard(damaged)
    flip(path)
    for find in (verify, lambda root: Shards(Store(str(root)), "code/slice-000").read(0, 0)):
        with pytest.raises(ValueError, match=rf"{path.name} is corrupt"):
            find(damaged)


def test_a_truncated_or_absent_shard_is_named_before_anything_is_read(damaged):
    path = one_shard(damaged)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=rf"{path.name} has .* bytes, expected"):
        Shards(Store(str(damaged)), "code/slice-000")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{path.name} is named by .* but absent"):
        Shards(Store(str(damaged)), "code/slice-000")


def test_a_tokenizer_that_is_not_the_one_that_made_the_ids_is_found(damaged):
    path = damaged / "tokenizer.json"
    path.write_text(path.read_text().replace("[CLS]", "[CLZ]"))
    with pytest.raises(ValueError, match=r"tokenizer.json is not the tokenizer that made the token ids: sha256 .*; restore it"):
        verify(damaged)


def test_wrong_counts_in_a_manifest_are_found(damaged):
    path = damaged / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["sources"]["code"]["slices"]["slice-000"]["tokens"] += 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"tokens, but the manifest says"):
        verify(damaged)


def test_opening_a_foreign_folder_deletes_no_shard(tmp_path):
    """The stock reader deletes the raw shards of such a folder when it opens it."""
    streaming = pytest.importorskip(
        "streaming", reason="writes a foreign folder with MosaicML streaming: the extra [streaming]"
    )
    columns = {"tokens": "ndarray:uint16"}
    with streaming.MDSWriter(out=str(tmp_path / "x"), columns=columns, compression="zstd", hashes=["xxh3_64"]) as out:
        out.write({"tokens": np.arange(10, dtype=np.uint16)})
    compressed = next((tmp_path / "x").glob("*.zstd"))
    raw = compressed.with_suffix("")
    raw.write_bytes(zstandard.ZstdDecompressor().decompressobj().decompress(compressed.read_bytes()))
    compressed.unlink()
    with pytest.raises(ValueError, match=r"names compressed shards"):
        Shards(Store(str(tmp_path)), "x")
    assert raw.exists()
