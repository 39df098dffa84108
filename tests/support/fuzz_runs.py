"""Random damage to the files of run folders, and random settings: `cd tests && python -m support.fuzz_runs
[COUNT [FIRST_SEED]]`, 5,000 from 0 on.

A damaged run folder is read by everything that reads one. Each reader must end in one clear line that names the file or the
setting, or in what it gives for the undamaged folder, or for what an independent reader gets from the damaged file. A setting
must be refused in one line that names its key, or be the value that was given, with which model and curriculum can be built.
"""

import csv
import hashlib
import io
import json
import logging
import math
import os
import pickle
import random
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml

from support.damage import reseal, seal
from support.fuzz import NAMED, OTHER_VALUES, SAME, SAVED, Odd, damaged, damaged_json, main

HEAVY = 0.12
"""Fraction of damages that a slow reader reads, too."""
SETTINGS = [
    "+recipe=demo", f"data.root={SAVED}", "data.lanes=4", "data.buffer_rows=8", "data.workers=0",
    "trainer.micro_batch_tokens=256", "backbone.hidden_size=32", "backbone.intermediate_size=48",
    "backbone.num_hidden_layers=2", "backbone.vocab_size=448", "backbone.num_attention_heads=2",
    "backbone.local_attention=32", "phases.stable.tokens=3000", "phases.stable.seq_len=64",
    "phases.stable.warmup_tokens=500", "phases.stable.ramp.tokens=700", "phases.extend.tokens=1500",
    "phases.extend.seq_len=128", "phases.decay.tokens=1500", "phases.decay.seq_len=128",
    "checkpoint.every_tokens=1000", "checkpoint.keep_last=2", "validation.every_tokens=0",
    "validation.tokens_per_source=512", "logger.every_steps=1",
    *(f"~phases.{phase}.mix.{old}" for phase in ("stable", "extend", "decay")
      for old in ("prose", "docstrings", "reference", "code")),
    *(f"+phases.{phase}.mix.{new}=1" for phase in ("stable", "extend", "decay") for new in ("stories", "sums")),
]  # fmt: skip
RUN_GROUPS = ("recipe", "seed", "backbone", "optim", "phases", "data", "trainer", "checkpoint", "validation", "init", "tasks")


@lru_cache
def finished() -> Path:
    """Return the folder of a tiny finished run that was rolled back once."""
    from support.runs import composed, rollback, train

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("modernenc").setLevel(logging.WARNING)
    logging.getLogger("modernenc").addHandler(logging.NullHandler())
    folder = Path(tempfile.mkdtemp(prefix="run-")) / "run"
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        train(composed([*SETTINGS, f"run_dir={folder}"]))
        rollback(folder / "checkpoints" / "end-of-extend.ckpt", ["phases.decay.lr=5e-4"], 0)
    return folder


class Kept(logging.Handler):
    """Keeps the messages of warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def digest(value: Any) -> Any:
    """Return a value with its tensors replaced by hashes."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {key: digest(item) for key, item in value.items()}
    return [digest(item) for item in value] if isinstance(value, list | tuple) else value


def locate(run_dir: Path) -> Any:
    from modernenc.run_folder.load import locate
    from modernenc.saved_config import plain

    run, checkpoint = locate(run_dir)
    return plain(run), checkpoint and checkpoint.name


def newest(run_dir: Path) -> Any:
    from modernenc.run_folder import checkpoints

    found = checkpoints.newest(run_dir)
    return found and digest(checkpoints.read(found).plain())


def history(run_dir: Path) -> Any:
    from modernenc.run_folder import lineage

    return lineage.read(run_dir)


def metrics(run_dir: Path) -> Any:
    from modernenc.run_folder.tables import Table

    return Table(run_dir / "metrics.csv").read()


def scores(run_dir: Path) -> Any:
    from modernenc.run_folder.tables import Table

    return Table(run_dir / "validation.csv").read()


def eta(run_dir: Path) -> Any:
    from modernenc.planning import eta

    with redirect_stdout(io.StringIO()) as out:
        eta.show(run_dir, [])
    return out.getvalue()


def export(run_dir: Path) -> Any:
    from modernenc.model.export import export

    out = run_dir.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    export([run_dir], out)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}


def page(run_dir: Path) -> Any:
    from modernenc.reporting.page import write
    from modernenc.saved_config import load

    text = write(replace(load(run_dir), run_dir=str(run_dir))).read_text()
    return re.sub(r"base64,[\w+/=]*", "", text)


def comparison(run_dir: Path) -> Any:
    from modernenc.reporting.comparison import compare

    return compare([run_dir], [])


def go_on(run_dir: Path) -> Any:
    from modernenc.training.resume import resume

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        resume(run_dir, [])
    return digest(torch.load(run_dir / "checkpoints" / "end-of-decay.ckpt", weights_only=True)["weights"])


LIGHT = (locate, newest, history, metrics, scores, eta)
SLOW = (export, page, comparison, go_on)


@lru_cache
def undamaged(reader: Callable[[Path], Any], folder: Path) -> Any:
    run_dir = copy_of(folder)
    return reader(run_dir)


def copy_of(folder: Path) -> Path:
    run_dir = folder / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    return Path(shutil.copytree(finished(), run_dir))


def read_all(
    rng: random.Random,
    folder: Path,
    damage: Callable[[Path], None],
    names: tuple[str, ...],
    explains: Callable[[str, Any], bool],
) -> str:
    """Let the readers read a damaged folder; `explains` says whether a result other than the usual one follows from it."""
    readers = [*LIGHT, *([rng.choice(SLOW)] if rng.random() < HEAVY else [])]
    expected = {reader: undamaged(reader, folder) for reader in readers}
    ends = set()
    for reader in readers:
        run_dir = copy_of(folder) if reader in (readers[0], go_on) else folder / "run"
        if reader in (readers[0], go_on):
            damage(run_dir)
        kept = Kept()
        logging.getLogger("modernenc").addHandler(kept)
        try:
            found = reader(run_dir)
        except (ValueError, OSError) as error:
            said = str(error)
            if not any(name in said for name in names) or "\n" in said.strip():
                raise Odd(
                    f"{reader.__name__}: {type(error).__name__}, which does not name {names[0]} in a line: {said}"
                ) from error
            ends.add(NAMED)
            continue
        except Exception as error:
            raise Odd(f"{reader.__name__}: {type(error).__name__}: {error}") from error
        finally:
            logging.getLogger("modernenc").removeHandler(kept)
        if any(name in message for name in names for message in kept.messages):
            ends.add(NAMED)
        elif not equal(found, expected[reader]) and not explains(reader.__name__, found):
            raise Odd(f"{reader.__name__}: {difference(expected[reader], found)}")
    return NAMED if NAMED in ends else SAME


def equal(one: Any, other: Any) -> bool:
    """Compare values; not-a-number equals itself."""
    return pickle.dumps(one) == pickle.dumps(other) or one == other or repr(one) == repr(other)


def difference(expected: Any, found: Any) -> str:
    one, other = str(expected), str(found)
    at = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return f"undamaged ...{one[max(0, at - 60) : at + 80]!r}, damaged ...{other[max(0, at - 60) : at + 80]!r}"


def like(found: Any, said: Any) -> bool:
    """Return whether a setting is the value that a file gives for it, as OmegaConf converts it."""
    if isinstance(said, dict) and isinstance(found, dict):
        return said.keys() == found.keys() and all(like(found[key], said[key]) for key in said)
    if isinstance(said, list) and isinstance(found, list):
        return len(said) == len(found) and all(map(like, found, said))
    if isinstance(found, bool):
        if isinstance(said, int):  # OmegaConf takes any number but 0 as true
            return bool(said) is found
        return str(said).lower() in (("yes", "y", "on", "true", "1") if found else ("no", "n", "off", "false", "0"))
    if isinstance(found, int | float):
        try:
            number = float(str(said))
            return number == float(found) or math.isnan(number)
        except (TypeError, ValueError, OverflowError):
            return False
    return str(found) == str(said)


def configuration(rng: random.Random, folder: Path) -> str:
    """config.yaml, with one value of another type or its bytes damaged."""
    whole = (finished() / "config.yaml").read_bytes()
    content = damaged(whole, rng) if rng.random() < 0.5 else yaml_damaged(whole, rng)

    def explains(reader: str, found: Any) -> bool:
        if reader == "newest" or reader in ("history", "metrics", "scores", "export", "go_on"):
            return False
        said = yaml.safe_load(content)
        if reader != "locate":
            return said != yaml.safe_load(whole)  # `locate` has compared the settings themselves
        return like({**found[0], "run_dir": ""}, {**said, "run_dir": ""})

    names = ("config.yaml", *(f"{one}{end}" for one in RUN_GROUPS for end in (".", "=", ":", " is ")), "logger.")
    return read_all(rng, folder, lambda run_dir: write(run_dir / "config.yaml", content), names, explains)


def yaml_damaged(content: bytes, rng: random.Random) -> bytes:
    value = json.loads(damaged_value(json.dumps(yaml.safe_load(content)).encode(), rng))
    return yaml.safe_dump(value, sort_keys=False).encode()


def damaged_value(content: bytes, rng: random.Random) -> bytes:
    """JSON with one value dropped, doubled or of another type, and never damaged as bytes."""
    while True:
        new = damaged_json(content, rng)
        with suppress(ValueError):
            json.loads(new)
            return new


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def position(rng: random.Random, folder: Path) -> str:
    """The manifest of a checkpoint; half of the time with a hash of its own that is right."""
    path = rng.choice(sorted((finished() / "checkpoints").glob("*.json")))
    content = damaged_json(path.read_bytes(), rng)
    resealed = rng.random() < 0.5

    def damage(run_dir: Path) -> None:
        target = run_dir / "checkpoints" / path.name
        target.write_bytes(content)
        with suppress(ValueError, AttributeError):  # it is no JSON, or no dictionary
            if resealed:
                seal(target, json.loads(content))

    return read_all(rng, folder, damage, (path.name, f"{path.stem}.", "checkpoints"), lambda reader, found: resealed)


def checkpoint(rng: random.Random, folder: Path) -> str:
    """A checkpoint; half of the time below its hash, as bytes or value by value."""
    path = rng.choice(sorted((finished() / "checkpoints").glob("*.ckpt")))
    how = rng.choice(("above", "above", "bytes", "value"))
    whole = path.read_bytes()
    if how == "value":
        saved = torch.load(path, weights_only=True)
        buffer = io.BytesIO()
        torch.save(retyped(saved, rng), buffer)
        content = buffer.getvalue()
    else:
        content = damaged(whole, rng)

    def damage(run_dir: Path) -> None:
        target = run_dir / "checkpoints" / path.name
        target.write_bytes(content)
        if how != "above":
            reseal(target)

    def explains(reader: str, found: Any) -> bool:
        if how == "above":
            return False
        plain = digest(torch.load(io.BytesIO(content), weights_only=True))
        if reader != "newest":
            return True
        return like(found["run"], plain["run"]) and equal({**found, "run": {}}, {**plain, "run": {}})

    return read_all(rng, folder, damage, (path.name, path.stem, "checkpoints"), explains)


def retyped(value: Any, rng: random.Random) -> Any:
    """Return nested values with one dropped, doubled or of another type."""
    if not isinstance(value, dict | list) or not value:
        return rng.choice(OTHER_VALUES)
    changed: Any = dict(value) if isinstance(value, dict) else list(value)
    key = rng.choice(list(changed)) if isinstance(changed, dict) else rng.randrange(len(changed))
    if rng.random() < 0.8 and isinstance(changed[key], dict | list) and changed[key]:
        changed[key] = retyped(changed[key], rng)
    elif rng.random() < 0.3:
        del changed[key]
    else:
        changed[key] = rng.choice(OTHER_VALUES)
    return changed


def lineage(rng: random.Random, folder: Path) -> str:
    """The history of the run."""
    whole = (finished() / "lineage.json").read_bytes()
    content = damaged_json(whole, rng)

    def explains(reader: str, found: Any) -> bool:
        said = json.loads(content)
        if reader == "history":
            return equal(found, said)
        if reader == "eta":
            return [entry["ranks"] for entry in said][-1:] != [entry["ranks"] for entry in json.loads(whole)][-1:]
        return reader == "page" and all(f"<td>{entry['tokens_seen']:,}</td>" in found for entry in said)

    return read_all(rng, folder, lambda run_dir: write(run_dir / "lineage.json", content), ("lineage.json",), explains)


def tables(rng: random.Random, folder: Path) -> str:
    """The tables of metrics and of scores."""
    name = rng.choice(("metrics.csv", "validation.csv"))
    whole = (finished() / name).read_bytes()
    content = damaged(whole, rng)
    if rng.random() < 0.3:  # a value
        rows = list(csv.reader(io.StringIO(whole.decode())))
        row = rng.choice(rows)
        row[rng.randrange(len(row))] = str(rng.choice(OTHER_VALUES))
        text = io.StringIO()
        csv.writer(text).writerows(rows)
        content = text.getvalue().encode()

    def explains(reader: str, found: Any) -> bool:
        rows = list(csv.DictReader(io.StringIO(content.decode(), newline="")))
        if (rows and None in rows[-1].values()) or not content.endswith(b"\n"):
            rows = rows[:-1]
        if reader == {"metrics.csv": "metrics", "validation.csv": "scores"}[name]:
            return found == rows
        if reader == "page" and name == "metrics.csv":
            last = [row for row in rows if row["objective"] == "masked_lm"][-1]
            return f"{int(last['tokens_seen']):,} of " in found and f"{float(last['loss']):.3f} nats" in found
        return reader in ("page", "eta") or (reader == "go_on" and False)

    return read_all(rng, folder, lambda run_dir: write(run_dir / name, content), (name,), explains)


def corpus(rng: random.Random, folder: Path) -> str:
    """The manifest and the tokenizer of the corpus in the run folder, and the plan, which nothing reads."""
    name = rng.choice(("corpus/manifest.json", "corpus/manifest.json", "corpus/tokenizer.json", "plan.txt"))
    whole = (finished() / name).read_bytes()
    content = damaged(whole, rng) if name == "plan.txt" else damaged_json(whole, rng)

    def explains(reader: str, found: Any) -> bool:
        if name != "corpus/manifest.json":
            return False
        said, before = json.loads(content), json.loads(whole)
        if reader == "export":
            return any(said["tokenizer"][key] != before["tokenizer"][key] for key in ("roles", "vocab_size"))
        return reader == "page" and all(
            f"<td>{source['validation']['unigram_nats']:.3f}</td>" in found for source in said["sources"].values()
        )

    names = (name, "manifest.json", str(folder / "run" / "corpus"))
    return read_all(rng, folder, lambda run_dir: write(run_dir / name, content), names, explains)


HUGE, TINY = ("9" * 19, "1e300", "1e18", str(1 << 62), "100000000", "1000001"), ("1e-300", "0.0001", "1e-9")
EDGES = (
    "0", "-1", "1", "2", "3", "7", "16", "64", "0.5", "0.999999", "1.5", "-0.0", *HUGE, *TINY, "nan", "inf", "-inf", "true",
    "false", "null", "x", "", "''", "none", "auto", "[]", "[1]", "[0.9,0.95]", "[1,2,3]", "{}", "{a: 1}", "{masked_lm: 1}",
    "../../x", "/", "'a b/ü\n.ckpt'", "https://example.org/x", "s3://bucket/x", "'${oc.env:HOME}'", "${seed}", "masked_lm",
    "stable", "decay", "fsdp", "gpu", "cosine", "???", "~", "1e5", "0x10", "1_000", "08", "\U0001f600", "a=b", "a,b", "'quoted",
    "modernenc.backbones.mega.Mega", "modernenc.model.optim.adamw", "os.system", "subprocess.Popen", "builtins.print",
)  # fmt: skip
ODD_KEYS = (
    "phases.extend.objectives.masked_lm", "+phases.extend.objectives.masked_lm", "+phases.extend.objectives.swag",
    "+phases.decay.backbone.global_rope_theta", "+phases.decay.backbone.local_rope_theta", "+phases.decay.backbone.hidden_size",
    "+phases.stable.mix.none", "phases.stable.mix.sums", "+phases.new.tokens", "+backbone.depth", "+optim.momentum",
    "+optim.ns_steps", "+backbone.init_std", "+backbone.norm_eps", "+backbone.attention_out_dropout", "backbone", "optim",
    "phases", "phases.stable", "+tasks.next.train", "+tasks", "data", "seed.x", "nothing", "+nothing.at.all",
    "backbone._target_", "optim._target_", "optim.betas", "phases.stable.ramp", "trainer",
    "+phases.stable.objectives.masked_lm",
)  # fmt: skip
TASK = [
    "+task@tasks.next=multiple_choice", "tasks.next.train=a.csv", "tasks.next.validation=b.csv", "tasks.next.seq_len=32",
    "tasks.next.batch_items=5", "+phases.decay.objectives={masked_lm: 3, next: 1}",
]  # fmt: skip


@lru_cache
def usual_run(task: bool, *more: str) -> Any:
    """Return the run that settings change."""
    from support.runs import composed

    return composed([*SETTINGS, *more, *(TASK if task else [])])


@lru_cache
def usual_values(task: bool) -> dict[str, Any]:
    """Return the value of each dotted key of the run, those that phases and tasks have included."""
    from modernenc.saved_config import plain

    found = {}

    def visit(value: Any, key: str) -> None:
        for name, item in value.items():
            found[f"{key}{name}"] = item
            if isinstance(item, dict):
                visit(item, f"{key}{name}.")

    visit(plain(usual_run(task)), "")
    return found


def given_setting(rng: random.Random, task: bool) -> str:
    """Return KEY=VALUE: mostly an edge case, or else near the usual value."""
    values = usual_values(task)
    key = rng.choice(list(values)) if rng.random() < 0.8 else rng.choice(ODD_KEYS)
    value = values.get(key)
    if rng.random() < 0.4 and isinstance(value, int | float) and not isinstance(value, bool):
        return f"{key}={rng.choice((value * 2, value // 2, value * 10, value + 1, value * 0.9, value))}"
    return f"{key}={rng.choice(EDGES)}"


def settings(rng: random.Random, folder: Path) -> str:
    """One to three settings, given on the command line or to a run that is there."""
    from modernenc.cli import one_line_errors
    from modernenc.planning.checks import check_settings
    from modernenc.planning.model_checks import check_backbone, check_optim
    from modernenc.planning.tables import plan_text
    from modernenc.saved_config import apply_overrides, plain
    from support.runs import composed

    task = rng.random() < 0.3
    given = [given_setting(rng, task) for _ in range(rng.choice((1, 1, 2, 3)))]
    at_once = rng.random() < 0.4
    before = [*SETTINGS, f"run_dir={folder / 'new'}", *(TASK if task else [])]
    said, usual = io.StringIO(), set(folder.iterdir())
    (folder / "here").mkdir(exist_ok=True)
    os.chdir(folder / "here")  # where a cache may be given
    run = curriculum = None
    try:
        with redirect_stderr(said), one_line_errors(verbose=False, composing=True):
            run = (
                composed([*before, *given])
                if at_once
                else apply_overrides(usual_run(task, before[-1 - len(TASK) * task]), given)
            )
            curriculum = check_settings(run)
            check_backbone(run)
            check_optim(run)
            plan_text(run, curriculum)
            for spec in (curriculum.at(0), curriculum.at(curriculum.total_tokens)):
                assert math.isfinite(spec.lr) and spec.step <= curriculum.total_steps
    except SystemExit:
        line = said.getvalue().strip()
        keys = [key.lstrip("+~") for key in (setting.partition("=")[0] for setting in given)]
        parts = {part for key in keys for part in (key, key.rpartition(".")[2], key.partition(".")[0])}
        if "\n" in line or (not any(part in line for part in parts) and "${" not in str(given)):
            raise Odd(f"{given} at once={at_once}: the line names none of them: {line}") from None
        return NAMED
    except Exception as error:
        raise Odd(f"{given} at once={at_once} task={task}: {type(error).__name__}: {error}") from error
    assert set(folder.iterdir()) - usual <= {folder / "here"}, f"{given} wrote {set(folder.iterdir()) - usual}"
    assert run is not None
    last = {key.lstrip("+~"): value for key, _, value in (setting.partition("=") for setting in given)}
    for key, value in last.items():
        holder: Any = plain(run)
        for part in key.split("."):
            holder = holder[part]
        expected = value if isinstance(holder, str) else yaml.safe_load(value)
        if "${" in value:  # the user's own reference to another value
            continue
        if isinstance(holder, str):
            expected = re.sub(r"^'(.*)'$", r"\1", value, flags=re.DOTALL)
            if holder == str(yaml.safe_load(value)) or holder == str(number_of(value)):  # OmegaConf writes 1e5 as 100000.0
                continue
        if key in ("data.lanes", "data.buffer_rows", "backbone.vocab_size") and expected in (0, 0.0):
            continue
        if not any(other.startswith(f"{key}.") for other in last) and not like(holder, expected):
            if isinstance(holder, dict) and isinstance(expected, dict) and expected.items() <= holder.items():
                continue
            raise Odd(f"{given} at once={at_once}: {key} became {holder!r}")
    return SAME


def number_of(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


DAMAGES = {function.__name__: function for function in (configuration, position, checkpoint, lineage, tables, corpus)}
TARGETS = {**DAMAGES, "settings": settings}

if __name__ == "__main__":
    main(TARGETS, 5_000)
