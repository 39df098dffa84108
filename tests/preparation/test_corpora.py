"""Every YAML that is shipped is one, composes, and every corpus can be prepared from what its comment asks for."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from data_prep import encode
from modernenc.config import CONF_DIR, RECIPES_DIR
from support.commands import command
from support.corpora import texts, write_jsonl
from support.runs import composed

FILES = sorted([*CONF_DIR.rglob("*.yaml"), *RECIPES_DIR.glob("*.yaml")])
GROUPS = {
    "backbone": "backbone={}",
    "optim": "optim={}",
    "phase": "+phase@phases.more={} phases.more.tokens=1 phases.more.seq_len=64 phases.more.batch_rows=1 phases.more.mix={{}}",
    "cluster": "+cluster={}",
    "ettin": "ettin={}",
    "task": "+task@tasks.more={} tasks.more.train=x tasks.more.validation=x tasks.more.seq_len=64 tasks.more.batch_items=4",
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_shipped_file_is_yaml_and_has_a_comment_on_its_purpose(path):
    assert OmegaConf.load(path)
    if path.parent == RECIPES_DIR:
        assert path.read_text().startswith("# ")
    if path.parent not in (CONF_DIR, RECIPES_DIR):
        assert path.parent.name in {*GROUPS, "corpus", "evaluate"}


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name in GROUPS], ids=lambda path: path.stem)
def test_every_part_composes(path):
    group = path.parent.name
    if path.stem == "of_source":
        with pytest.raises(ValueError, match=r"init\.source, which is not set"):
            composed(["+recipe=demo", "backbone=of_source"])
        return
    recipe = "ettin" if group == "ettin" else "demo_mega" if path.stem.startswith("mega") else "demo"
    composed([f"+recipe={recipe}", *GROUPS[group].format(path.stem).split()])


def inputs(kind: str, folder: Path) -> list[str]:
    """Documents for a corpus, and the settings that its comment asks for."""
    small = ["validation_share=0.2", "block_tokens=128", "buckets=2", "workers=1"]
    rows = list(dict.fromkeys(texts(40, 1)))
    if kind in ("base", "bioclinical", "mmbert"):
        sources = list(OmegaConf.load(CONF_DIR / "corpus" / f"{kind}.yaml").sources)
        for number, name in enumerate(sources):
            write_jsonl(folder / name / "0.jsonl", [f"{text} {number}" for text in rows])
        encode.save(encode.train(rows, 400), folder / "tokenizer.json")
        licences = [f"sources.{name}.licence=CC0-1.0" for name in sources] if kind == "bioclinical" else []
        return [f"input={folder}", f"tokenizer.file={folder / 'tokenizer.json'}", *licences, *small]
    if kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        folder.mkdir()
        parquet.write_table(pyarrow.table({"text": rows}), folder / "0.parquet")
    elif kind == "text":
        folder.mkdir()
        for number, text in enumerate(rows):
            (folder / f"{number}.txt").write_text(text)
    elif kind == "jsonl":
        write_jsonl(folder / "0.jsonl", rows)
    else:
        return [*small, "tokenizer.train_mb=0.2", "tokenizer.vocab_size=400",
                *(f"sources.{name}.limit_mb=0.1" for name in ("docstrings", "reference", "code"))]  # fmt: skip
    return [f"input={folder}", "sources.text.licence=CC0-1.0", *small]


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(path.stem for path in (CONF_DIR / "corpus").glob("*.yaml")))
def test_every_corpus_is_prepared_by_the_command_in_its_comment(kind, tmp_path):
    result = command("data_prep", f"+corpus={kind}", f"out={tmp_path / 'out'}", *inputs(kind, tmp_path / "in"))
    assert result.returncode == 0, result.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    for source in manifest["sources"].values():
        assert source["stored"] >= 8
        assert source["read"] == source["stored"] + sum(source["dropped"].values())


def test_a_corpus_without_a_tokenizer_asks_for_one(tmp_path):
    result = command("data_prep", "+corpus=base", f"input={tmp_path}", f"out={tmp_path / 'out'}")
    assert result.returncode == 2
    assert result.stderr.endswith("expected more than 261 (bytes and special tokens), or tokenizer.file=PATH\n")
