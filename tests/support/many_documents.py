"""Documents of every oddity in every format, and what must become of each.

`cd tests && python -m support.many_documents [COUNT]` prepares COUNT documents (100,000 unless given) while killing the
preparation again and again and changing the number of workers, then compares the corpus with what was written: each document
that was read is stored, dropped or a duplicate, and each stored text is, byte for byte, the text that was written, in the
normal form NFC.
"""

import bz2
import gzip
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import zstandard
from pyarrow import parquet

from support.commands import ROOT
from support.corpora import stored

FORMATS = ("jsonl", "parquet", "text", "lines")
WORDS = [
    "the", "of", "and", "wizard", "quartz", "jump", "fox", "3.14", "über", "naïve", "straße", "ключ", "слово", "ελληνικά",
    "你好", "한국어", "नमस्ते", "हिन्दी", "தமிழ்", "ไทย", "ខ្មែរ", "မြန်မာ", "שָׁלוֹם", "السَّلَام",
    "१२३", "e\u0301te\u0301", "A\u030angstro\u0308m", "\ufb01", "\U0001f600", "\U0001f468\u200d\U0001f469",
    "[MASK]", "[UNK]", "<s>", "</s>", "x\u00a0y", "a\u2028b", "c\x85d", "e\x1ff", "\0", "\\", '"', "'",
]  # fmt: skip

ODD_LINES = [
    (b'{"text": "cut', "not JSON"),
    (b"[" * 9999, "not JSON"),
    (b'{"text": "na\xefve"}', "not UTF-8"),
    (b"\xff\xfe", "not UTF-8"),
    (b"[1, 2]", "not a JSON object"),
    (b'"text"', "not a JSON object"),
    (b'{"content": "x"}', "without text_key=text"),
    (b'{"text": null}', "null"),
    (b'{"text": " \\n"}', "empty"),
    (b'{"text": ["a"]}', "of type list in place of a string"),
    (b'{"text": 5}', "of type int in place of a string"),
    (b'{"text": {"a": "b"}}', "of type dict in place of a string"),
    (b'{"text": "\\ud800 alone"}', "with lone surrogates"),
]
"""Lines of a JSON-lines file that are of no use, and why."""


@dataclass
class Written:
    """What was written, and what must become of it."""

    read: Counter[str] = field(default_factory=Counter)
    """Documents of each source."""
    dropped: dict[str, Counter[str]] = field(default_factory=dict)
    """Of each source, by reason."""
    texts: dict[str, list[str]] = field(default_factory=dict)
    """Texts of each source that are to be stored once."""

    def expected(self) -> dict[str, dict[str, Any]]:
        """Of each source, in the order of FORMATS: read, dropped with duplicates, stored texts in NFC, sorted."""
        seen: set[str] = set()
        result = {}
        for source in FORMATS:
            stored = []
            for text in self.texts[source]:
                if text not in seen:
                    stored.append(unicodedata.normalize("NFC", text))
                seen.add(text)
            duplicates = len(self.texts[source]) - len(stored)
            dropped = {**self.dropped[source], "duplicate": duplicates}
            result[source] = {"read": self.read[source], "dropped": dropped, "texts": sorted(stored)}
        return result


def text_tokens(rng: random.Random, lines: bool = False) -> str:
    """A text; of one line where lines are documents."""
    words = [rng.choice(WORDS) for _ in range(rng.choice([1, 3, 20, 60]) if rng.random() < 0.999 else 5000)]
    text = "".join(
        word + rng.choice([" ", " ", " ", "  ", "\t"] + ([] if lines else ["\n", "\r\n", "\n\n", "\r"])) for word in words
    )
    return text.rstrip("\r\n") if lines else text


def write(folder: Path, count: int, seed: int = 1, files: int = 6) -> Written:
    """Write about `count` documents below `folder`, in a folder for each format."""
    rng = random.Random(seed)
    written = Written(dropped={name: Counter() for name in FORMATS}, texts={name: [] for name in FORMATS})
    pool: list[str] = []  # from which duplicates are drawn, across files and formats

    def texts(source: str, number: int) -> list[str]:
        made = []
        for _ in range(number):
            lines = source == "lines"
            again = rng.random() < 0.05 and pool
            text = rng.choice(pool) if again else text_tokens(rng, lines)
            if lines and ("\n" in text or "\r" in text):
                text = text_tokens(rng, lines)
            if text.strip():
                made.append(text)
                pool.append(text)
        return made

    def add(source: str, text: str) -> str:
        written.read[source] += 1
        written.texts[source].append(text)
        return text

    def drop(source: str, reason: str) -> None:
        written.read[source] += 1
        written.dropped[source][reason] += 1

    each = count // (len(FORMATS) - 1) // files  # text has a file for each document, so fewer
    for number in range(files):
        _write_lines(folder / "jsonl", number, _json_lines(rng, texts("jsonl", each), add, drop))
        _write_parquet(folder / "parquet", number, texts("parquet", each), rng, add, drop)
        content = b"\n".join(add("lines", text).encode() + rng.choice([b"", b"\r", b"\n  "]) for text in texts("lines", each))
        bad = b"\nna\xefve\n"
        drop("lines", "not UTF-8")
        _write_lines(folder / "lines", number, content + bad, suffix=".txt")
    for number, text in enumerate(texts("text", min(each * files, 3000))):
        path = folder / "text" / f"{number % 7}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = rng.random()
        if kind < 0.01:
            path.write_bytes("naïve".encode("latin-1"))
            drop("text", "not UTF-8")
        elif kind < 0.02:
            path.write_bytes(rng.choice([b"", b" \n\t"]))
            drop("text", "empty")
        else:
            path.write_bytes(rng.choice([b"", b"\xef\xbb\xbf"]) + add("text", text).encode())
    return written


def _json_lines(rng: random.Random, texts: list[str], add: Any, drop: Any) -> bytes:
    lines = []
    for text in texts:
        row: dict[str, Any] = {"id": len(lines), "text": add("jsonl", text), "score": rng.choice([1.5, float("nan"), 1 << 70])}
        lines.append(json.dumps(row, ensure_ascii=rng.random() < 0.5).encode("utf-8"))
        odd = dict(enumerate(ODD_LINES)).get(rng.randrange(400))
        if odd:
            lines.append(odd[0])
            drop("jsonl", odd[1])
        if rng.random() < 0.003:
            lines.append(rng.choice([b"", b"  \t"]))
    return rng.choice([b"", b"\xef\xbb\xbf"]) + rng.choice([b"\n", b"\r\n"]).join(lines)


def _write_lines(folder: Path, number: int, content: bytes, suffix: str = ".jsonl") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    half = content.find(b"\n", len(content) // 2) + 1
    ending, compressed = [
        ("", content),
        (".gz", gzip.compress(content[:half]) + gzip.compress(content[half:])),
        (".zst", zstandard.compress(content[:half]) + zstandard.compress(content[half:])),
        (".bz2", bz2.compress(content)),
        (".xz", lzma.compress(content)),
    ][number % 5]
    (folder / f"{number}{suffix}{ending}").write_bytes(compressed)


def _write_parquet(folder: Path, number: int, texts: list[str], rng: random.Random, add: Any, drop: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    values: list[bytes | None] = []
    for text in texts:
        values.append(add("parquet", text).encode())
        kind = rng.randrange(200)
        if kind < 3:
            values.append([None, b"", b"na\xefve"][kind])
            drop("parquet", ["null", "empty", "not UTF-8"][kind])
    column = pyarrow.array(values, pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"id": list(range(len(values))), "text": column, "media": ["odd"] * len(values)})
    parquet.write_table(
        table, folder / f"{number}.parquet", compression=rng.choice(["snappy", "zstd", "gzip"]), row_group_size=97
    )


def corpus_yaml(folder: Path) -> None:
    """A corpus with a source of each format, in `<folder>/corpus/odd.yaml`."""
    readers = {"jsonl": "JsonLines", "parquet": "ParquetRows", "text": "TextReader", "lines": "TextReader, document: line"}
    lines = ["# @package _global_", "sources:"]
    for source in FORMATS:
        reader = f'{{_target_: data_prep.readers.{readers[source]}, data_folder: "${{input}}/{source}"}}'
        lines += [f"  {source}:", f"    reader: {reader}", "    licence: CC0-1.0", "    url: here"]
    lines += ["tokenizer: {vocab_size: 600, train_mb: 2}", "block_tokens: 512", "buckets: 5", "max_dropped: 0.2"]
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    (folder / "corpus" / "odd.yaml").write_text("\n".join(lines) + "\n")


def prepare(folder: Path, kills: int, seed: int, longest_s: float = 4.0) -> int:
    """Prepare `<folder>/in` as `<folder>/out`, killed so often, each time with other workers; how often it was killed."""
    rng = random.Random(seed)
    killed = 0
    corpus_yaml(folder / "conf")
    while True:
        arguments = [f"input={folder / 'in'}", f"out={folder / 'out'}", f"workers={rng.choice([1, 2, 3])}"]
        process = subprocess.Popen(
            [sys.executable, "-m", "data_prep", "--config-dir", str(folder / "conf"), "+corpus=odd", *arguments],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            said, _ = process.communicate(timeout=2 + rng.random() * longest_s if killed < kills else None)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            killed += 1
            continue
        assert process.returncode == 0, said
        return killed


def compare(root: Path, written: Written) -> None:
    """Hold a corpus against what was written; AssertionError names the source."""
    manifest = json.loads((root / "manifest.json").read_text())["sources"]
    found = stored(root)
    for source, expected in written.expected().items():
        said = manifest[source]
        texts = [text for folder, documents in found.items() if folder.partition("/")[0] == source for text in documents]
        assert said["read"] == expected["read"], source
        assert said["dropped"] == expected["dropped"], source
        assert said["stored"] == len(texts) == said["read"] - sum(said["dropped"].values()), source
        assert sorted(texts) == expected["texts"], source


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written = write(folder / "in", count, files=10)
        started = time.monotonic()
        killed = prepare(folder, kills=12, seed=1, longest_s=3)
        compare(folder / "out", written)
        read = sum(written.read.values())
        print(f"{read:,} documents, {killed} kills, {time.monotonic() - started:.0f} s: all accounted for")
        for source, entry in written.expected().items():
            print(f"{source}: read {entry['read']:,}, stored {len(entry['texts']):,}, {entry['dropped']}")


if __name__ == "__main__":
    main()
