"""What users type, and what they are told to type."""

import ast
import inspect
import random
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict

from data_prep.config import CorpusConfig
from data_prep.config import register as register_corpora
from modernenc.cli import to_schema
from modernenc.config import CONF_DIR, RECIPES_DIR, RENAMED, Data
from modernenc.quoting import quote_values
from modernenc.saved_config import CONFIG, apply_overrides, save
from support.commands import ROOT, error
from support.runs import composed, small

PARSER = OverridesParser.create()
RECIPES = sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))
PLACEHOLDERS = {"DIR": "somewhere", "PATH": "somewhere", "LICENCE": "CC0-1.0", "NAME": "demo", "CKPT": "somewhere.ckpt"}


def parsed(argument: str) -> Override:
    return PARSER.parse_overrides([argument])[0]


@pytest.mark.parametrize(
    "value",
    [
        "/data/größe", "runs/lr=1e-3,wd=0.1", "/data/c#", "a'b", "C:\\größe\\", "<bos>", "/My text (1)/x", "größe\\'s", "a=b",
        "日本語", "/data/a&b", "wie?", "größe\\", "a;b",
    ],
)  # fmt: skip
def test_a_value_that_hydra_could_not_read_is_taken_as_it_is_typed(value):
    (argument,) = quote_values([f"run_dir={value}"])
    assert parsed(argument).key_or_group == "run_dir" and parsed(argument).value() == value


FRAGMENTS = [
    "a", "é", "#", ",", "=", "/", " ", "'", '"', "\\", "[", "]", "{", "}", "(", ")", ":", "1", ".5", "$", "${", "range",
    "choice", "true", "null", "~", "+", "@", "%", "<", "|", "-", "_",
]  # fmt: skip


def test_what_hydra_reads_stays_as_it_is_and_what_it_does_not_is_plain_text_or_named():
    """With and without --multirun, lists, dicts, sweeps, functions and interpolations among them."""
    rng, seen = random.Random(0), Counter()
    for _ in range(3_000):
        value = "".join(rng.choices(FRAGMENTS, k=rng.randrange(9)))
        argument = f"{rng.choice(['', '+', '++'])}key={value}"
        flags = rng.choice([[], ["--multirun"]])
        try:
            parsed(argument)
        except HydraException:
            try:
                result = quote_values([*flags, argument])[-1]
            except ValueError as named:
                seen["named"] += 1
                assert str(named).startswith(f"{argument}: ")
                proposed = shlex.split(str(named).split("write ")[1])[0]
                assert parsed(proposed).value() == value
            else:
                seen["plain text"] += 1
                assert parsed(result).value() == value
        else:
            seen["as it is"] += 1
            assert quote_values([*flags, argument])[-1] == argument
    assert set(seen) == {"as it is", "plain text", "named"} and min(seen.values()) > 300, seen


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["größe=3"], "größe=3: größe is no key"),
        (["optim.betas=[0.9"], "optim.betas=[0.9: the value begins like a list"),
        (["--multirun", "run_dir=größe,b"], "run_dir=größe,b: one value, or, with --multirun, several? write"),
    ],
)
def test_what_could_mean_several_things_is_named(arguments, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        quote_values(arguments)


def test_values_of_flags_are_left_alone():
    assert quote_values(["--config-dir", "größe=1", "--multirun", "a=b,c"]) == [
        "--config-dir",
        "größe=1",
        "--multirun",
        "a=b,c",
    ]


def test_paths_of_all_kinds_reach_every_command(corpus_root, tmp_path):
    """Each command is asked for something that it refuses by name, further on than the grammar."""
    strange = tmp_path / "größe #1, lr=1e-3"
    assert f"data.root={strange}" in error("modernenc.train", *small(strange, tmp_path / "run"))
    assert f"{strange} does not exist" in error("data_prep", "+corpus=jsonl", f"input={strange}", "sources.text.licence=x")
    launched = error("modernenc.launch", "+recipe=demo", "+cluster=cpu_node", f"+from={strange}", "--dry-run", "data.lanes=0x")
    assert "data.lanes" in launched
    planned = error("modernenc.plan", *small(corpus_root, tmp_path / "run", f"+from={strange}"))
    assert f"+from={strange}: no checkpoint" in planned


@pytest.mark.parametrize("value", ["/data/größe #1=2", "a: b: c", "one,two", "[CLS", "it's", "yes"])
def test_a_resumed_run_takes_settings_by_the_same_grammar(value):
    run = composed(["+recipe=demo"])
    if value.startswith("["):
        with pytest.raises(ValueError, match=re.escape("data.root=[CLS: the value begins like a list")):
            apply_overrides(run, [f"data.root={value}"])
    else:
        assert apply_overrides(run, [f"data.root={value}", "optim.lr=1e-4"]).data.root == value
    with pytest.raises(ValueError, match="trainer: expected KEY=VALUE"):
        apply_overrides(run, ["trainer"])
    other = apply_overrides(run, ["phases.decay.mix={code: 5}", "trainer.devices=2", "phases.decay.tokens=1_000"])
    assert other.phases["decay"].mix == {**run.phases["decay"].mix, "code": 5} and other.trainer.devices == 2


def commands(text: str) -> list[list[str]]:
    """What follows `python -m` in a text, by words, to where a command ends; names in capitals are replaced."""
    found = re.findall(r"python -m ((?:data_prep|modernenc)[^`;|)\n\[]*)", text)
    capitals = re.compile("|".join(PLACEHOLDERS))
    return [[capitals.sub(lambda name: PLACEHOLDERS[name[0]], word) for word in shlex.split(line)] for line in found]


def prepared_by(words: list[str]) -> CorpusConfig:
    """The corpus that a command prepares."""
    module, *overrides = words
    assert module == "data_prep"
    return composed_corpus(overrides)


def composed_corpus(overrides: list[str]) -> CorpusConfig:
    """What `python -m data_prep` makes of its arguments; ValueError for an unknown key or a missing value."""
    register_corpora()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("prepare", quote_values(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
            cfg["name"] = "any"  # Hydra fills in the corpus's, outside of tests
        return to_schema(cfg, CorpusConfig, ("corpus",))


@pytest.mark.parametrize("recipe", sorted({*RECIPES} - {"adapt"}))  # whose own command prepares what it reads
def test_the_hint_of_a_recipe_is_a_command_that_prepares_what_it_reads(recipe):
    run = composed([f"+recipe={recipe}", "data.root=elsewhere"])
    (words,) = commands(run.data.hint)
    corpus = prepared_by(words)
    assert corpus.out == "elsewhere"
    sources = {source.partition("/")[0] for phase in run.phases.values() for source in phase.mix}
    assert sources <= set(corpus.sources)


def test_so_are_the_hints_where_no_recipe_has_one():
    for hint in (Data.hint, OmegaConf.load(CONF_DIR / "train.yaml").data.hint.replace("${data.root}", "DIR")):
        (words,) = commands(hint)
        assert prepared_by(words).sources


def strings(path: Path) -> Iterator[str]:
    """Strings of a Python file, with 1 for what is filled in, but for recipes; comments of a YAML."""
    if path.suffix == ".yaml":
        yield path.read_text().replace("\\\n#", "").replace('"', "")
        return
    nodes = list(ast.walk(ast.parse(path.read_text())))
    parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "demo" if "recipe" in ast.unparse(part) else "1"
                for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.value.replace("%s", "1")


def messages() -> list[tuple[str, list[str]]]:
    """Commands in what the package says."""
    paths = [*(ROOT / "modernenc").rglob("*.py"), *RECIPES_DIR.glob("*.yaml")]
    return [(path.name, words) for path in paths for text in strings(path) for words in commands(text)]


@pytest.mark.parametrize(("file", "words"), messages(), ids=lambda value: value if isinstance(value, str) else value[0])
def test_commands_in_messages_have_modules_flags_and_keys_that_exist(file, words):
    module, *rest = words
    assert find_spec(module) or find_spec(f"{module}.__main__")
    text = Path(inspect.getfile(__import__(module, fromlist=["x"]))).read_text()
    keys = [word for word in rest if re.match(r"\+?[\w.]+=", word) and "..." not in word]
    for flag in (word for word in rest if word.startswith("--") and word != "--multirun"):
        assert f'"{flag.rstrip(".,")}"' in text, (file, words)
    if module in ("modernenc.train", "modernenc.plan", "modernenc.launch"):
        chosen = [key for key in keys if key.startswith("+recipe=")]
        assert chosen or not rest or rest[0].startswith("--multirun"), (file, words)
    for key in keys:
        name = key.partition("=")[0].lstrip("+")
        if module.startswith("modernenc") and name not in ("recipe", "from", "rehearse", "cluster", "parts"):
            run = composed(["+recipe=large" if file == "large.yaml" else "+recipe=demo"])
            assert OmegaConf.select(OmegaConf.structured(run), name) is not None, (file, words)


@pytest.mark.parametrize("former", RENAMED)
def test_a_former_name_of_a_key_is_answered_with_the_present_one(former):
    assert (
        error("modernenc.plan", "+recipe=demo", f"{former}=1")
        == f"error: {former} is now called {RENAMED[former]}: use that name"
    )


def test_a_run_of_another_version_is_named(tmp_path):
    run = composed(["+recipe=demo", f"run_dir={tmp_path}"])
    save(run)
    file = tmp_path / CONFIG
    file.write_text(file.read_text().replace("smoke_test:", "rehearse:"))
    assert f"{file} was written by another version of modernenc: rehearse is no key here" in error(
        "modernenc.resume", str(tmp_path)
    )
