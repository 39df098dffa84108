"""Random damage to every kind of file that is read: `cd tests && python -m support.fuzz
[COUNT [FIRST_SEED]]`, 3,000 from 0 on.

Bytes are flipped, cut out, doubled or put in; keys of JSON are dropped or get a value of another type. Each must end
in one clear line that names it, or in what a plain independent reader gets from the same bytes. Anything else, such as another
kind of error, a document that is not accounted for, or no end, is a failure.
"""

import bz2
import gzip
import io
import json
import lzma
import multiprocessing
import random
import shutil
import signal
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import zstandard
from pyarrow import parquet
from tokenizers import Tokenizer

from support.commands import TESTS

SAVED = TESTS / "training" / "saved_corpus" / "corpus"
PATIENCE_S = 60
NAMED, SAME = "named", "the same"
OTHER_VALUES = (None, True, -1, 0, 5, 1 << 70, 1.5, float("inf"), "", "x", "../x", [], {}, [1], {"a": "b"})


class Odd(Exception):
    """A damage that ends in neither of the two ways."""


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The bytes with one stretch flipped, cut out, doubled, zeroed or put in, or all that comes after it cut off."""
    start = rng.randrange(len(content) + 1)
    end = min(len(content), start + int(2 ** rng.uniform(0, 12)))
    stretch = content[start:end]
    kind = rng.choice(("flip", "flip", "flip", "cut", "double", "zero", "insert", "end"))
    if kind == "flip" and stretch:
        changed = bytearray(content)
        for _ in range(rng.choice((1, 1, 3))):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    new = {"double": stretch + stretch, "zero": bytes(len(stretch)), "insert": rng.randbytes(len(stretch)) + stretch}.get(
        kind, b""
    )
    return content[:start] + new + (b"" if kind == "end" else content[end:])


def damaged_json(content: bytes, rng: random.Random) -> bytes:
    """JSON with one value dropped, doubled or of another type; or damaged as bytes."""
    if rng.random() < 0.4:
        return damaged(content, rng)
    value = json.loads(content)
    node = value
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return damaged(content, rng)
        key = rng.choice(keys)
        inner = node[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.8:
            node = inner
            continue
        kind = rng.choice(("drop", "retype", "retype", "double"))
        if kind == "drop":
            del node[key]
        elif kind == "double" and isinstance(node, list):
            node.append(inner)
        else:
            node[key] = rng.choice(OTHER_VALUES)
        return json.dumps(value).encode()


def outcome(ours: Callable[[], Any], plain: Callable[[], Any], names: tuple[str, ...]) -> str:
    """How a damage ended; Odd when it ended otherwise than it may."""
    try:
        found = ours()
    except (ValueError, OSError) as error:
        said = str(error)
        if not any(name in said for name in names) or "\n" in said.strip():
            raise Odd(f"{type(error).__name__}, which does not name {names[0]} in a line: {said}") from error
        return NAMED
    try:
        expected = plain()
    except Exception as error:
        raise Odd(f"read as {str(found)[:200]}, but a plain reader says {error!r}") from error
    if found != expected:
        raise Odd(f"read as {str(found)[:300]}, but a plain reader gets {str(expected)[:300]}")
    return SAME


def tokens_of(corpus: Any, folder: str) -> list[Any]:
    """All that a folder of shards holds."""
    shards = corpus.open(folder)
    return [
        [part.tolist() if isinstance(part, np.ndarray) else part for part in shards.read(shard, index)]
        for shard, size in enumerate(shards.sizes)
        for index in range(size)
    ]


FOLDERS = [f"{source}/{split}" for source in ("stories", "sums") for split in ("slice-000", "validation")]


def copy_of(folder: Path) -> Path:
    root = folder / "corpus"
    shutil.rmtree(root, ignore_errors=True)
    return Path(shutil.copytree(SAVED, root))


def manifest(rng: random.Random, folder: Path) -> str:
    """The manifest: opened, verified, and read by what follows from it."""
    from data_prep.verify import verify
    from modernenc.data.blocks import Corpus
    from modernenc.data.store import Store

    root = copy_of(folder)
    path = root / "manifest.json"
    path.write_bytes(damaged_json(path.read_bytes(), rng))
    whole = Corpus(Store(str(SAVED)))

    def ours() -> Any:
        verify(root)
        corpus = Corpus(Store(str(root)))
        corpus.fingerprint([{source: 1 for source in corpus.sources}])
        return len(corpus.ordinary_ids) > 0, {
            name: tokens_of(corpus, name) for name in FOLDERS if name.split("/")[0] in corpus.sources
        }

    def plain() -> Any:
        said = json.loads(path.read_bytes())["sources"]
        return True, {name: tokens_of(whole, name) for name in FOLDERS if name.split("/")[0] in said}

    return outcome(ours, plain, ("manifest.json", str(root)))


def index(rng: random.Random, folder: Path) -> str:
    """The index of a folder of shards."""
    from modernenc.data.blocks import Corpus
    from modernenc.data.store import Store

    root = copy_of(folder)
    name = rng.choice(FOLDERS)
    path = root / name / "index.json"
    path.write_bytes(damaged_json(path.read_bytes(), rng))
    whole = tokens_of(Corpus(Store(str(SAVED))), name)

    def plain() -> Any:
        entries = json.loads(path.read_bytes())["shards"]
        return whole * (len(entries) // max(1, len(json.loads((SAVED / name / "index.json").read_bytes())["shards"])))

    return outcome(lambda: tokens_of(Corpus(Store(str(root))), name), plain, ("index.json", ".mds"))


def shard(rng: random.Random, folder: Path) -> str:
    """A shard, as a run opens it, whose hash finds all damage; and below that hash."""
    from modernenc.data.blocks import Corpus
    from modernenc.data.mds import Shard, header
    from modernenc.data.store import Store

    root = copy_of(folder)
    name = rng.choice(FOLDERS)
    path = next((root / name).rglob("*.mds"))
    content = damaged(path.read_bytes(), rng)
    if content == path.read_bytes():
        return SAME
    path.write_bytes(content)
    if rng.random() < 0.5:
        ended = outcome(lambda: tokens_of(Corpus(Store(str(root))), name), lambda: None, (path.name,))
        assert ended == NAMED
        return ended
    entry = json.loads((path.parent / "index.json").read_text())["shards"][0]
    written = {key: value for key, value in entry.items() if key not in ("samples", "raw_data", "zip_data")}

    def ours() -> Any:
        opened = Shard(path, entry["samples"], header(written))
        return [
            [block.tokens.tolist(), block.ends.tolist(), block.continues]
            for block in map(opened.__getitem__, range(entry["samples"]))
        ]

    return outcome(ours, lambda: plain_shard(content, "I" if "uint32" in written["column_encodings"][2] else "H"), (path.name,))


def plain_shard(content: bytes, code: str) -> Any:
    """The blocks of a shard by its format alone."""
    count = struct.unpack_from("=I", content)[0]
    offsets = struct.unpack_from(f"={count + 1}I", content, 4)
    blocks = []
    for begin, end in pairwise(offsets):
        ends, _ = struct.unpack_from("=II", content, begin)
        first = begin + 9
        arrays = [plain_array(content[first : first + ends], "I"), plain_array(content[first + ends : end], code)]
        blocks.append([list(arrays[1]), list(arrays[0]), bool(content[begin + 8])])
    return blocks


def plain_array(data: bytes, code: str) -> Any:
    width = 1 << data[0] % 4
    length = int.from_bytes(data[1 : 1 + width], "little")
    return struct.unpack_from(f"={length}{code}", data, 1 + width)


def tokenizer(rng: random.Random, folder: Path) -> str:
    """A tokenizer that is given, and that of a corpus."""
    from data_prep import encode
    from modernenc.data.tokenizer import role_ids

    path = folder / "tokenizer.json"
    path.write_bytes(damaged_json((SAVED / "tokenizer.json").read_bytes(), rng))
    text = "the fox said 3 + 4 = 7. \U0001f600"

    def ours() -> Any:
        made = encode.load_given(path)
        role_ids(made, {})
        return made.encode(text, add_special_tokens=False).ids

    def plain() -> Any:
        made = Tokenizer.from_file(str(path))
        made.encode_special_tokens = True
        made.no_truncation()
        made.no_padding()
        return made.encode(text, add_special_tokens=False).ids

    return outcome(ours, plain, (path.name, "tokenizer.roles."))


def reading(folder: Path, kind: str) -> Any:
    """What our reading keeps of a folder, and how many documents it accounts for."""
    from data_prep.account import Account, add_up, load_parts
    from data_prep.config import SourceConfig
    from data_prep.inputs import create_reader, list_inputs
    from data_prep.read import Read
    from data_prep.split import load_bucket

    source = SourceConfig(
        reader={"_target_": f"data_prep.readers.{kind}", "data_folder": str(folder / "in")}, licence="x", url="x"
    )
    files = [file.path for file in list_inputs("a", create_reader("a", source)).files]
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    Read("a", source, files, work, number=0, buckets=1)()
    account = Account(**add_up(load_parts(work / "accounts" / "000")))
    documents = load_bucket(work / "buckets" / "00000", ["a"], 0)[0] if account.kept().total() else []
    kept = sorted(document.text for document in documents)
    assert account.read.total() == account.kept().total() + account.dropped().total()
    return kept, account.read.total()


DOCUMENTS = [f"document {number}: " + "wörter und मात्रा \U0001f600 " * (number % 7) for number in range(60)]
ENDINGS: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
    "": (lambda content: content, lambda content: content),
    ".gz": (gzip.compress, gzip.decompress),
    ".bz2": (bz2.compress, bz2.decompress),
    ".xz": (lzma.compress, lzma.decompress),
    ".zst": (zstandard.compress, lambda content: unpacked(content)),
}


def unpacked(content: bytes) -> bytes:
    """All frames of a file of zstandard; ValueError when the last one is not whole."""
    out = b""
    while content:
        frame = zstandard.ZstdDecompressor().decompressobj()
        out += frame.decompress(content)
        if not frame.eof:
            raise ValueError("cut")
        content = frame.unused_data
    return out


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder / "in", ignore_errors=True)
    (folder / "in").mkdir()
    return folder / "in"


def jsonl(rng: random.Random, folder: Path) -> str:
    """JSON lines, compressed or not."""
    ending = rng.choice(["", "", "", *ENDINGS])
    compress, decompress = ENDINGS[ending]
    lines = "\n".join(json.dumps({"text": text, "n": n}, ensure_ascii=False) for n, text in enumerate(DOCUMENTS)).encode()
    path = fresh(folder) / f"a.jsonl{ending}"
    content = damaged(compress(lines), rng)
    path.write_bytes(content)

    def plain() -> Any:
        texts, read = [], 0
        for number, line in enumerate(decompress(content).split(b"\n")):
            line = (line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line).strip()
            if not line:
                continue
            read += 1
            try:
                row = json.loads(line.decode())
                if row["text"].strip() and row["text"].encode():
                    texts.append(row["text"])
            except (ValueError, KeyError, TypeError, AttributeError):
                pass
        return sorted(set(texts)), read

    return outcome(lambda: reading(folder, "JsonLines"), plain, (path.name,))


def text(rng: random.Random, folder: Path) -> str:
    """A file of plain text."""
    ending = rng.choice(["", *ENDINGS])
    compress, decompress = ENDINGS[ending]
    path = fresh(folder) / f"a.txt{ending}"
    content = damaged(compress("\r\n".join(DOCUMENTS).encode()), rng)
    path.write_bytes(content)

    def plain() -> Any:
        try:
            whole = decompress(content).removeprefix(b"\xef\xbb\xbf").decode()
        except UnicodeDecodeError:
            return [], 1
        return [whole] if whole.strip() else [], 1

    return outcome(lambda: reading(folder, "TextReader"), plain, (path.name,))


def rows(rng: random.Random, folder: Path) -> str:
    """A file of Parquet."""
    sink = io.BytesIO()
    column = pyarrow.array([*DOCUMENTS, None, ""])
    compression = rng.choice(["snappy", "zstd", "gzip", "none"])
    parquet.write_table(
        pyarrow.table({"text": column, "n": list(range(len(column)))}), sink, compression=compression, row_group_size=20
    )
    path = fresh(folder) / "a.parquet"
    content = damaged(sink.getvalue(), rng)
    path.write_bytes(content)

    def plain() -> Any:
        table = parquet.ParquetFile(io.BytesIO(content)).read()
        if "text" not in table.column_names:
            return [], len(table)
        values = []
        for value in table.column("text"):
            try:
                values.append(value.as_py())
            except UnicodeDecodeError:
                values.append(None)
        return sorted({value for value in values if isinstance(value, str) and value.strip()}), len(values)

    return outcome(lambda: reading(folder, "ParquetRows"), plain, (path.name,))


TARGETS = {function.__name__: function for function in (manifest, index, shard, tokenizer, jsonl, text, rows)}


Target = Callable[[random.Random, Path], str]


def attempt(target: Target, first: int, count: int) -> tuple[Counter[str], list[str]]:
    """Damage files of one kind, seeds from `first` on: how each ended, and what was odd."""
    kind = target.__name__
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("no end")))
    ends: Counter[str] = Counter()
    odd = []
    with tempfile.TemporaryDirectory() as name:
        for seed in range(first, first + count):
            signal.alarm(PATIENCE_S)
            try:
                ends[target(random.Random(f"{kind} {seed}"), Path(name))] += 1
            except BaseException as error:  # whatever it is, it is what is looked for
                odd.append(f"{kind} {seed}: {type(error).__name__}: {error}")
            signal.alarm(0)
    return ends, odd


def fuzz(targets: dict[str, Target], count: int, workers: int = 1, first: int = 0) -> tuple[dict[str, Counter[str]], list[str]]:
    """Damage `count` files of all kinds, in processes of their own: how they ended by kind, and what was odd."""
    each = -(-count // len(targets))
    found: dict[str, Counter[str]] = {}
    odd: list[str] = []
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        ended = {name: pool.submit(attempt, target, first, each) for name, target in targets.items()}
        for name, future in ended.items():
            found[name], more = future.result()
            odd += more
    return found, odd


def main(targets: dict[str, Target], count: int) -> None:
    """Damage as many files as the command line says, or `count`, and print how they ended."""
    count, first = (*map(int, sys.argv[1:3]), *(count, 0)[len(sys.argv) - 1 :])
    found, odd = fuzz(targets, count, workers=2, first=first)
    for target, ends in found.items():
        print(
            f"{target:13} {sum(ends.values()):6,} damaged: {ends[NAMED]:6,} named, {ends[SAME]:6,} read as a plain reader does"
        )
    print("\n".join(odd) or "nothing odd")
    sys.exit(bool(odd))


if __name__ == "__main__":
    main(TARGETS, 3_000)
