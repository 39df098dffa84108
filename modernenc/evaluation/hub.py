"""Data sets of the Hugging Face hub, each downloaded once into files of the layouts that are read from local folders."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modernenc.atomic import write_json
from modernenc.evaluation.claims import wait_for
from modernenc.evaluation.kept import writing
from modernenc.evaluation.settings import same_task

PREFIX = "hub:"
FOLDER = "data"
"""Folder of these files in that of the results."""
_SPLITS = {
    "train": "train", "validation": "dev", "dev": "dev", "validation_matched": "dev_matched", "test": "test",
}  # fmt: skip
"""Splits of the hub, and what their files are called here."""


def local_folder(data: str, tasks: Sequence[str], out: Path) -> Path:
    """Return the folder of the data: the one named, or that to which hub:OWNER/NAME is downloaded.

    Of a set with several configurations, such as nyu-mll/glue, each is a task, and only those in `tasks` are taken if there are
    any. One with a corpus and queries, such as mteb/scifact, gets BEIR's layout. Raises FileNotFoundError or ValueError if the
    hub has no such set, cannot be reached, or has the set in a layout that is not read.
    """
    if not data.startswith(PREFIX):
        return Path(data)
    name = data.removeprefix(PREFIX)
    from datasets import disable_progress_bars
    from datasets.exceptions import DatasetsError

    disable_progress_bars()
    try:
        return _downloaded(name, tasks, out / FOLDER / name)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise FileNotFoundError(
            f"--data {data}: {reason}; expected hub:OWNER/NAME of a data set that the hub has as files, or a folder here"
        ) from error


def _downloaded(name: str, tasks: Sequence[str], root: Path) -> Path:
    configs = _configurations(name, root.with_name(f"{root.name}.json"))
    if {"corpus", "queries"} <= set(configs):
        with wait_for(root):
            if not root.is_dir():
                with writing(root) as partial:
                    _write_beir(name, "qrels" if "qrels" in configs else "default", partial)
        return root
    chosen = [config for config in configs if len(configs) == 1 or not tasks or any(same_task(config, one) for one in tasks)]
    for config in chosen:
        folder = root / config if len(configs) > 1 else root
        with wait_for(folder):
            if not folder.is_dir():
                with writing(folder) as partial:
                    _write_task(name, config, partial)
    if not chosen:
        raise ValueError(f"--tasks {','.join(tasks)}: it has {', '.join(configs)}")
    return root


def _configurations(name: str, known: Path) -> list[str]:
    """Return the names of a set's configurations, which are kept in a file so that the next time needs no network."""
    from datasets import get_dataset_config_names

    with wait_for(known):
        if not known.is_file():
            write_json(known, get_dataset_config_names(name))
    return json.loads(known.read_text())


def _write_task(name: str, config: str, folder: Path) -> None:
    splits = _load(name, config)
    folder.mkdir(parents=True)
    for split, stem in _SPLITS.items():
        rows = splits.get(split)
        if rows is None or (stem == "test" and (any(folder.glob("dev*")) or _is_secret(rows))):
            continue
        column = next((one for one in rows.column_names if re.fullmatch(r"(ner_)?tags", one)), None)
        if column and "tokens" in rows.column_names:
            feature = rows.features[column].feature
            names = getattr(feature, "names", None)
            with (folder / f"{stem}.conll").open("w", encoding="utf-8") as file:
                for row in rows:
                    for word, tag in zip(row["tokens"], row[column], strict=True):
                        file.write(f"{word} {names[tag] if names else tag}\n")
                    file.write("\n")
        else:
            rows.to_json(folder / f"{stem}.jsonl", force_ascii=False)


def _is_secret(rows: Any) -> bool:
    """Return whether a split has no labels, as the diagnostic set of GLUE: its folder then is no task."""
    return "label" in rows.column_names and rows.unique("label") == [-1]


def _write_beir(name: str, judged: str, folder: Path) -> None:
    (folder / "qrels").mkdir(parents=True)
    for config in ("corpus", "queries"):
        splits = _load(name, config)
        rows = splits[config] if config in splits else splits[next(iter(splits))]
        if "_id" not in rows.column_names and "id" in rows.column_names:
            rows = rows.rename_column("id", "_id")
        rows.to_json(folder / f"{config}.jsonl", force_ascii=False)
    for split, rows in _load(name, judged).items():
        if split in _SPLITS:
            with (folder / "qrels" / f"{_SPLITS[split]}.tsv").open("w", encoding="utf-8") as file:
                file.write("query-id\tcorpus-id\tscore\n")
                file.writelines(f"{row['query-id']}\t{row['corpus-id']}\t{int(row['score'])}\n" for row in rows)


def _load(name: str, config: str) -> dict[str, Any]:
    from datasets import load_dataset

    return dict(load_dataset(name, config))  # pyright: ignore[reportArgumentType, reportReturnType]
