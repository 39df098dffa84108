"""Our shards are MosaicML streaming's, to the byte; what is damaged is said by name, and nobody else's shard is touched."""

import copy
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
import zstandard

from data_prep.blocks import BlockWriter
from modernenc.data.blocks import Corpus, Shards
from modernenc.data.mds import SHARD_HASH, Block, Shard, Writer, header
from modernenc.data.store import Store
from modernenc.hashing import hash_file
from support.corpora import corpus, stored

LIMIT = 20_000


def blocks(seed: int, dtype: str, number: int = 60) -> list[Block]:
    """Of one to thousands of tokens, so that shapes are written in one byte and in two."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(number):
        size = int(rng.choice([1, 2, 255, 256, 257, int(rng.integers(1, 4000))]))
        ends = np.unique(np.append(rng.integers(1, size + 1, int(rng.integers(0, 300))), size))
        tokens = rng.integers(0, np.iinfo(dtype).max, size, endpoint=True).astype(dtype)
        made.append(Block(tokens, ends.astype(np.uint32), bool(rng.integers(2))))
    return made


def write(folder: Path, written: list[Block], dtype: str) -> Path:
    writer = Writer(folder, dtype, LIMIT)
    for block in written:
        writer.write(block)
    writer.finish()
    return folder


def read(folder: Path) -> list[Block]:
    shards = Shards(Store(str(folder.parent)), folder.name)
    return [shards.read(shard, index) for shard, size in enumerate(shards.sizes) for index in range(size)]


def same(one: Block, other: Block) -> bool:
    return (
        one.tokens.dtype == other.tokens.dtype
        and np.array_equal(one.tokens, other.tokens)
        and np.array_equal(one.ends, other.ends)
        and one.continues == other.continues
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("seed", range(3))
def test_blocks_are_read_as_they_were_written(tmp_path, dtype, seed):
    written = blocks(seed, dtype)
    found = read(write(tmp_path / "x", written, dtype))
    assert len(list((tmp_path / "x").glob("*.mds"))) > 1
    assert all(path.stat().st_size <= LIMIT for path in (tmp_path / "x").glob("*.mds"))
    assert len(found) == len(written) and all(map(same, found, written))


def test_a_folder_without_blocks_can_be_read(tmp_path):
    assert read(write(tmp_path / "x", [], "uint16")) == []


def test_a_block_larger_than_a_shard_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a block of 40,\d+ bytes is larger than a shard, 20,000"):
        write(tmp_path / "x", [Block(np.zeros(20_000, np.uint16), np.array([20_000], np.uint32), False)], "uint16")
    with pytest.raises(ValueError, match="expected less than 4 GiB"):
        Writer(tmp_path / "y", "uint16", 1 << 32)


def by_streaming(folder: Path, written: list[Block], dtype: str, **options: Any) -> Path:
    streaming = pytest.importorskip("streaming", reason="holds our shards against MosaicML streaming's: the extra [streaming]")
    columns = {"tokens": f"ndarray:{dtype}", "ends": "ndarray:uint32", "continues": "uint8"}
    options = {"size_limit": LIMIT, "hashes": [SHARD_HASH]} | options
    with streaming.MDSWriter(out=str(folder), columns=columns, **options) as writer:
        for block in written:
            writer.write({"tokens": block.tokens, "ends": block.ends, "continues": int(block.continues)})
    return folder


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_both_writers_write_the_same_bytes(tmp_path, dtype):
    for seed in range(4):
        written = blocks(seed, dtype)
        theirs = contents(by_streaming(tmp_path / f"theirs{seed}", written, dtype))
        assert contents(write(tmp_path / f"ours{seed}", written, dtype)) == theirs


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_both_readers_read_the_same_blocks(tmp_path, dtype):
    folder = by_streaming(tmp_path / "x", blocks(0, dtype), dtype)
    from streaming.base.format import reader_from_json  # pyright: ignore[reportMissingImports]

    theirs = []
    for entry in json.loads((folder / "index.json").read_text())["shards"]:
        reader = reader_from_json(str(folder), "", entry)
        theirs += [Block(s["tokens"], s["ends"], bool(s["continues"])) for s in map(reader.__getitem__, range(len(reader)))]
    found = read(folder)
    assert len(found) == len(theirs) and all(map(same, found, theirs))


def test_streaming_reads_our_shards_without_changing_them(tmp_path):
    streaming = pytest.importorskip("streaming", reason="opens our shards with MosaicML streaming's: the extra [streaming]")
    from streaming.base.util import clean_stale_shared_memory  # pyright: ignore[reportMissingImports]

    written = blocks(1, "uint16")
    folder = write(tmp_path / "x", written, "uint16")
    before = contents(folder)
    clean_stale_shared_memory()
    dataset = streaming.StreamingDataset(local=str(folder), batch_size=1)
    samples = [dataset[index] for index in range(len(dataset))]
    found = [Block(sample["tokens"], sample["ends"], bool(sample["continues"])) for sample in samples]
    assert len(found) == len(written) and all(map(same, found, written))
    assert contents(folder) == before


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_shards_of_another_program_are_refused_with_the_reason_and_not_changed(tmp_path, compression):
    """streaming's own reader deletes the raw shards of a folder whose index names compressed ones."""
    streaming = pytest.importorskip(
        "streaming", reason="writes a foreign folder with MosaicML streaming: the extra [streaming]"
    )
    folder = tmp_path / "x"
    columns = {"id": "str", "input_ids": "ndarray:uint32"}
    with streaming.MDSWriter(out=str(folder), columns=columns, compression=compression, hashes=[SHARD_HASH]) as writer:
        writer.write({"id": "a", "input_ids": np.arange(10, dtype=np.uint32)})
    (folder / "shard.00000.mds").touch()
    before = contents(tmp_path)
    message = "names compressed shards" if compression else r"column_names is \['id', 'input_ids'\], expected \['continues'"
    with pytest.raises(ValueError, match=rf"x/index.json .*{message}"):
        Shards(Store(str(tmp_path)), "x")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kept", ["raw", "packed", "both"])
def test_text_in_shards_of_another_program_is_prepared_without_changing_the_shards(tmp_path, kept):
    """Whichever files its index names, and whichever are there."""
    streaming = pytest.importorskip("streaming", reason="reads what MosaicML streaming writes: the extra [streaming]")
    from data_prep.build import build
    from data_prep.config import SourceConfig

    columns = {"text": "str", "n": "int"}
    written = [f"document {number} of another program" for number in range(40)]
    folder = tmp_path / "in" / "below"
    settings = dict(out=str(folder), columns=columns, size_limit="1kb", compression="zstd", keep_local=True)
    with streaming.MDSWriter(**settings) as writer:
        for number, text in enumerate(written):
            writer.write({"text": text, "n": number})
    for packed in folder.glob("*.zstd"):
        if kept != "packed":
            packed.with_suffix("").write_bytes(zstandard.ZstdDecompressor().decompressobj().decompress(packed.read_bytes()))
        if kept == "raw":
            packed.unlink()
    before = contents(tmp_path / "in")
    reader = {"_target_": "data_prep.foreign.MdsReader", "data_folder": str(tmp_path / "in")}
    build(corpus(tmp_path / "out", {"a": SourceConfig(reader=reader, licence="CC0-1.0", url="here")}))
    found = stored(tmp_path / "out")
    assert sorted(text for documents in found.values() for text in documents) == sorted(written)
    assert contents(tmp_path / "in") == before


def test_shards_with_our_columns_from_another_writer_are_read(tmp_path):
    """With further hashes, in shards of another size."""
    written = blocks(2, "uint32")
    found = read(by_streaming(tmp_path / "x", written, "uint32", size_limit="1mb", hashes=["sha1", SHARD_HASH]))
    assert len(found) == len(written) and all(map(same, found, written))


def test_the_writer_refuses_a_folder_that_exists(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "shard.00000.mds").write_bytes(b"another's")
    with pytest.raises(FileExistsError):
        Writer(tmp_path / "x", "uint16", LIMIT)
    assert (tmp_path / "x" / "shard.00000.mds").read_bytes() == b"another's"


def test_a_block_writer_fills_every_block_but_the_last(tmp_path):
    writer = BlockWriter(tmp_path / "x", 100, "uint16", 1)
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 1000, int(size)).astype(np.uint16) for size in rng.integers(1, 400, 50)]
    for document in documents:
        writer.add(document)
    writer.close()
    found = read(tmp_path / "x")
    assert np.array_equal(np.concatenate([block.tokens for block in found]), np.concatenate(documents))
    assert all(len(block.tokens) == 100 for block in found[:-1])
    assert sum(block.continues for block in found) == writer.counts["cuts"]


def settle(folder: Path) -> None:
    """Have the index agree with the damaged shards, so that only their content can tell."""
    index = json.loads((folder / "index.json").read_text())
    for entry in index["shards"]:
        path = folder / entry["raw_data"]["basename"]
        entry["raw_data"] |= {"bytes": path.stat().st_size, "hashes": {SHARD_HASH: hash_file(path)}}
    (folder / "index.json").write_text(json.dumps(index))


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """Bytes changed, cut out, doubled or put in, mostly where the tables and sizes are."""
    place = int(rng.integers(0, len(content) if rng.random() < 0.3 else 400))
    length = int(rng.integers(1, 9))
    kind = rng.integers(4)
    if kind == 0:
        return content[:place] + rng.bytes(length) + content[place + length :]
    if kind == 1:
        return content[:place] + content[place + length :]
    if kind == 2:
        return content[: place + length] + content[place:]
    return content[: int(rng.integers(0, len(content)))]


def test_a_damaged_shard_is_named_or_read_as_its_bytes_say(tmp_path):
    """Though hash and size agree. What is read of them is read by a few plain lines too."""
    whole = write(tmp_path / "whole", blocks(5, "uint16", 12), "uint16")
    rng = np.random.default_rng(7)
    refused = 0
    for number in range(300):
        folder = Path(shutil.copytree(whole, tmp_path / f"{number}"))
        path = folder / "shard.00000.mds"
        path.write_bytes(damage(path.read_bytes(), rng))
        settle(folder)
        try:
            found = read(folder)
        except ValueError as error:
            refused += 1
            assert str(folder) in str(error), error
            continue
        samples = json.loads((folder / "index.json").read_text())["shards"][0]["samples"]
        expected = plainly(path.read_bytes())
        assert len(expected) == samples and all(map(same, found[:samples], expected))
    assert refused > 100


def plainly(content: bytes) -> list[Block]:
    number = int.from_bytes(content[:4], "little")
    offsets = [int.from_bytes(content[at : at + 4], "little") for at in range(4, 8 + 4 * number, 4)]
    found = []
    for begin, end in pairwise(offsets):
        sample = content[begin:end]
        ends = int.from_bytes(sample[:4], "little")
        arrays = [sample[9 : 9 + ends], sample[9 + ends :]]
        values = [array[1 + (1 << array[0] % 4) :] for array in arrays]
        found.append(Block(np.frombuffer(values[1], np.uint16), np.frombuffer(values[0], np.uint32), bool(sample[8])))
    return found


def shard_of(tmp_path: Path, change: Any) -> Shard:
    """One shard of one block of five tokens, with its sample changed."""
    folder = write(tmp_path / "one", [Block(np.arange(5, dtype=np.uint16), np.array([2, 5], np.uint32), False)], "uint16")
    entry = json.loads((folder / "index.json").read_text())["shards"][0]
    path = folder / "shard.00000.mds"
    content = bytearray(path.read_bytes())
    first = int.from_bytes(content[4:8], "little")
    sample = content[first:]
    change(sample)
    content = content[:first] + sample
    content[8:12] = len(content).to_bytes(4, "little")
    path.write_bytes(content)
    written = {key: value for key, value in entry.items() if key not in ("samples", "raw_data", "zip_data")}
    return Shard(path, 1, header(written))


@pytest.mark.parametrize(
    "change",
    [
        lambda sample: sample.__setitem__(9, 2 << 2),  # two axes
        lambda sample: sample.__setitem__(9, 0),  # none
        lambda sample: sample.__setitem__(9, 1 << 2 | 3),  # a longer shape than there is
        lambda sample: sample.__setitem__(10, 200),  # more values than there are
        lambda sample: sample.__setitem__(slice(0, 4), b"\xff" * 4),
        lambda sample: sample.__setitem__(slice(4, 8), b"\0" * 4),
        lambda sample: sample.__setitem__(8, 7),  # neither 0 nor 1
        lambda sample: sample.extend(b"x"),
        lambda sample: sample.__delitem__(slice(5, None)),
    ],
)
def test_an_inconsistent_sample_is_named(tmp_path, change):
    with pytest.raises(ValueError, match=r"one/shard.00000.mds is damaged: .*sample 0.*; restore it"):
        shard_of(tmp_path, change)[0]


def test_an_index_of_huge_numbers_allocates_nothing(tmp_path):
    folder = write(tmp_path / "x", blocks(0, "uint16"), "uint16")
    whole = json.loads((folder / "index.json").read_text())
    for key, value in (("samples", 1 << 40), ("samples", 1 << 60), ("samples", 3000)):
        index = copy.deepcopy(whole)
        index["shards"][0][key] = value
        (folder / "index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"x/(index.json|shard.00000.mds)"):
            read(folder)


INDEXES = {
    "no JSON": lambda index: b"{",
    "not UTF-8": lambda index: b"\xff\xfe{}",
    "a list": lambda index: [],
    "nothing": lambda index: None,
    "no shards": lambda index: {"version": 2},
    "shards by name": lambda index: index | {"shards": {"a": 1}},
    "a shard that is a number": lambda index: index | {"shards": [3]},
    "no samples": lambda index: edited(index, "samples", None),
    "samples as text": lambda index: edited(index, "samples", "4"),
    "less than no samples": lambda index: edited(index, "samples", -1),
    "samples that are true": lambda index: edited(index, "samples", True),
    "no file": lambda index: edited(index, "raw_data", None),
    "another place": lambda index: edited(index, "raw_data", {"basename": "../../y", "bytes": 9, "hashes": {SHARD_HASH: ""}}),
    "an absolute place": lambda index: edited(
        index, "raw_data", {"basename": "/etc/x", "bytes": 9, "hashes": {SHARD_HASH: ""}}
    ),
    "other columns": lambda index: edited(index, "column_names", ["text"]),
    "another format": lambda index: edited(index, "format", "jsonl"),
    "another version": lambda index: edited(index, "version", 3),
    "nested": lambda index: b"[" * 100_000,
}


def edited(index: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    index["shards"][0][key] = value
    return index


@pytest.mark.parametrize("kind", INDEXES)
def test_an_index_of_another_shape_is_named(tmp_path, kind):
    folder = write(tmp_path / "x", blocks(0, "uint16"), "uint16")
    changed = INDEXES[kind](json.loads((folder / "index.json").read_text()))
    (folder / "index.json").write_bytes(changed if isinstance(changed, bytes) else json.dumps(changed).encode())
    with pytest.raises(ValueError, match=r"x/index\.json.*; |x/shard\.00000\.mds"):
        read(folder)


MANIFESTS = {
    "no JSON": lambda manifest: b"",
    "a list": lambda manifest: [manifest],
    "empty": lambda manifest: {},
    "no blocks": lambda manifest: manifest | {"block_tokens": 0},
    "blocks as text": lambda manifest: manifest | {"block_tokens": "256"},
    "no tokenizer": lambda manifest: manifest | {"tokenizer": None},
    "a role less": lambda manifest: manifest | {"tokenizer": manifest["tokenizer"] | {"roles": {"cls": 0}}},
    "a role beyond": lambda manifest: (
        manifest | {"tokenizer": manifest["tokenizer"] | {"roles": manifest["tokenizer"]["roles"] | {"mask": 9999}}}
    ),
    "sources in a list": lambda manifest: manifest | {"sources": [*manifest["sources"]]},
    "a source without slices": lambda manifest: manifest | {"sources": {"code": {}}},
    "counts that are none": lambda manifest: (
        manifest | {"sources": {"code": manifest["sources"]["code"] | {"slices": {"slice-000": {"blocks": 1.5, "tokens": 1}}}}}
    ),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_manifest_of_another_shape_is_named(corpus_root, tmp_path, kind):
    changed = MANIFESTS[kind](json.loads((corpus_root / "manifest.json").read_text()))
    (tmp_path / "manifest.json").write_bytes(changed if isinstance(changed, bytes) else json.dumps(changed).encode())
    with pytest.raises(ValueError, match=r"/manifest\.json(:| is not a JSON file).*; restore it"):
        Corpus(Store(str(tmp_path)))


def test_the_hash_of_an_index_is_of_its_bytes(tmp_path):
    folder = write(tmp_path / "x", blocks(0, "uint16"), "uint16")
    assert Shards(Store(str(tmp_path)), "x").digest == xxhash.xxh3_64_hexdigest((folder / "index.json").read_bytes())
