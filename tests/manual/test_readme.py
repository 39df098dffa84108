"""Every command that the README and the manual show works. The command itself decides how it is checked:

`python -m MODULE ...` is run, in the order of the pages and in one folder, where the demo's corpus suffices. It does not where
words in capitals stand for the reader's own names, or where another recipe is trained; such a command is composed by Hydra
and its run planned, or, for a module that takes no recipe, parsed by the module's own parser. Benchmarks are composed too.
`torchrun` is parsed by torch's parser, and what it launches is planned. Of `make` the target must exist, of `pip install` the
extra. Blocks of Python are run where they stand.
"""

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from modernenc.config import CONF_DIR
from modernenc.planning.checks import check_settings
from modernenc.planning.tables import plan_text
from support.commands import ROOT
from support.runs import composed

README = ROOT / "README.md"
PAGES = [README, *(ROOT / "docs" / name for name in re.findall(r'"(\w+\.md)"', (ROOT / "docs" / "zensical.toml").read_text()))]
SHORT = {
    "data_prep": ["sources.docstrings.limit_mb=2", "sources.reference.limit_mb=1", "sources.code.limit_mb=2"],
    "modernenc.train": [
        "phases.stable.tokens=30_000", "phases.stable.ramp.tokens=10_000", "phases.stable.warmup_tokens=10_000",
        "phases.extend.tokens=10_000", "phases.decay.tokens=10_000",
        "validation.tokens_per_source=2048", "checkpoint.every_tokens=0",
    ],
    "modernenc.evaluate": ["tokens_per_source=1000", "pseudo_targets=10", "mask_ratios=0.15", "shortest_context=512"],
}  # fmt: skip
"""Settings that cut budgets, by module."""
CAPITALS = re.compile(r"(?<![\w.])[A-Z]{3,}(?![\w=])")
"""A word that stands for a name of the reader's own."""
TAKES_A_RECIPE = ("modernenc.train", "modernenc.plan", "modernenc.launch")
OF_HYDRA = {"--help": 0, "--cfg": 1, "--multirun": 0, "--config-dir": 1}
"""Hydra's own flags, and how many values follow each."""


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Yield the language and content of each fenced block."""
    yield from re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.M | re.S)


def commands(bash: str) -> Iterator[str]:
    """Yield each command of a block, without comments, continuations, variables and `taskset`."""
    for line in bash.replace("\\\n", " ").splitlines():
        command = re.sub(r"^([A-Z_]+=\S+ +)*(taskset -c \S+ +)?", "", re.sub(r"(^|\s+)#.*", "", line).strip())
        if command:
            yield command


def module_of(command: str) -> str:
    return shlex.split(command)[2] if command.startswith("python -m ") else ""


def is_run(command: str) -> bool:
    """Return whether the demo's corpus suffices to run a command."""
    module = module_of(command)
    if not module or CAPITALS.search(command) or module.startswith("modernenc.bench"):
        return False
    small = "+recipe=demo" in shlex.split(command) or "smoke_test=" in command or "--help" in command
    return small if module in ("modernenc.train", "modernenc.launch") else True


ALL = [command for page in PAGES for language, content in blocks(page) if language == "bash" for command in commands(content)]


@pytest.mark.slow
def test_the_commands_run_in_order(tmp_path):
    ran = []
    for language, content in [block for page in PAGES for block in blocks_to_run(page)]:
        if (language, content) not in ran:
            arguments = ["-c", content] if language == "python" else shorten(shlex.split(content)[1:])
            result = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
            assert result.returncode == 0, f"{content}\n{result.stderr}"
            ran.append((language, content))
    modules = {module_of(content) for language, content in ran if language == "bash"}
    assert {
        f"modernenc.{name}" for name in ("train", "plan", "resume", "export", "evaluate", "compare", "report", "eta")
    } <= modules
    assert {"data_prep", "data_prep.verify"} <= modules


def blocks_to_run(page: Path) -> Iterator[tuple[str, str]]:
    """Yield commands and blocks of Python in the order of the page, each with its language."""
    for language, content in blocks(page):
        if language == "python":
            yield language, content
        elif language == "bash":
            yield from ((language, command) for command in commands(content) if is_run(command))


def shorten(words: list[str]) -> list[str]:
    """Return what follows `python`, with budgets cut; a smoke test cuts its own, and what only prints needs none."""
    whole = any(word.startswith(("smoke_test=", "--help", "--cfg")) for word in words)
    return words if whole else [*words, *SHORT.get(words[1], [])]


@pytest.mark.parametrize("command", [command for command in dict.fromkeys(ALL) if not is_run(command)])
def test_a_command_that_is_not_run_would_be_accepted(command, monkeypatch):
    first, *rest = shlex.split(command)
    if first == "make":
        targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.M)
        assert {word for word in rest if "=" not in word} <= set(targets)
    elif first == "pip":
        check_extras(command)
    elif first == "torchrun":
        from torch.distributed.run import get_args_parser

        arguments = get_args_parser().parse_args([CAPITALS.sub("base", word) for word in rest])
        assert arguments.module
        check_planned(arguments.training_script, arguments.training_script_args)
    elif first == "source":
        assert rest == [".venv/bin/activate"] and "BIN := .venv/bin" in (ROOT / "Makefile").read_text()
    else:
        module = module_of(command)
        words = CAPITALS.sub("base", command)
        if module in TAKES_A_RECIPE:
            check_planned(module, shlex.split(words)[3:])
        elif module in ("data_prep", "modernenc.bench"):
            check_composed(module, shlex.split(words)[3:])
        else:
            check_parsed(module, shlex.split(words)[3:], monkeypatch)


def test_every_extra_that_is_named_in_the_text_exists():
    for page in PAGES:
        check_extras(page.read_text())


def check_extras(text: str) -> None:
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1], re.M)
    assert set(re.findall(r"modernenc\[(\w+)\]", text)) <= set(extras)


def check_planned(module: str, arguments: list[str]) -> None:
    """Compose the run of a command, and plan it."""
    overrides = settings(module, arguments)
    own = any(argument == "--config-dir" for argument in arguments)
    overrides = ["+recipe=base" if own and override.startswith("+recipe=") else override for override in overrides]
    absent = r"\+from=|data\.root=\w+://|data\.cache="  # neither a checkpoint nor a bucket is at hand
    overrides = [override for override in overrides if not re.match(absent, override)]
    run = composed(overrides, "launch" if module == "modernenc.launch" else "train")
    assert plan_text(run, check_settings(run))


def check_composed(module: str, arguments: list[str]) -> None:
    """Compose the configuration of a corpus or a benchmark; nothing may lack a value."""
    from data_prep.config import register
    from modernenc.bench.settings import PARTS, Bench

    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        more = ["name=any"] if module == "data_prep" else []
        values = [argument for argument in arguments if module == "data_prep" or argument not in PARTS]
        config = compose("prepare" if more else "bench", [*settings(module, values), *more])
    config = config if more else OmegaConf.merge(OmegaConf.structured(Bench), config)
    assert not OmegaConf.missing_keys(config)


def settings(module: str, arguments: list[str]) -> list[str]:
    """Return the overrides among the arguments; each flag must be Hydra's or stand in the module."""
    source = Path(str(import_module(module if module != "data_prep" else "data_prep.__main__").__file__)).read_text()
    overrides, sweep, values = [], "--multirun" in arguments, 0
    for argument in arguments:
        if argument.startswith("--"):
            assert argument in OF_HYDRA or f'"{argument}"' in source, argument
            values = OF_HYDRA.get(argument, 0)
        elif values:
            values -= 1
        else:
            overrides.append(argument.split(",")[0] if sweep else argument)
    return overrides


class Parsed(Exception):
    """Carries what a parser made of a command line."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__()
        self.arguments = arguments


def check_parsed(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the module's own parser read the arguments, and go no further; the settings among them must exist."""
    for name in ("parse_args", "parse_intermixed_args"):
        parse = getattr(argparse.ArgumentParser, name)

        def stop(parser: argparse.ArgumentParser, *given: Any, parse: Any = parse) -> None:
            raise Parsed(parse(parser, *given))

        monkeypatch.setattr(argparse.ArgumentParser, name, stop)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(Parsed) as parsed:
        import_module(module).main()
    run = OmegaConf.structured(composed(["+recipe=demo"]))
    for override in getattr(parsed.value.arguments, "overrides", []):
        assert OmegaConf.select(run, override.partition("=")[0]) is not None, override


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_of_yaml_are_yaml(page):
    for language, content in blocks(page):
        if language == "yaml":
            assert yaml.safe_load(content)


def test_every_recipe_is_in_the_table():
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert f"`{path.stem}`" in README.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_that_it_names_exists(page):
    for name in re.findall(r"\]\(([\w./]+)(?:#[\w-]+)?\)", page.read_text()):
        assert (page.parent / name).exists(), name


def test_the_map_of_folders_is_the_tree():
    folders = re.findall(r"^  (\w+)/ ", README.read_text().split("## Folders")[1], re.M)
    assert set(folders) == {path.parent.name for path in (ROOT / "modernenc").glob("*/__init__.py")}


def test_the_readme_is_short():
    assert len(README.read_text().split()) <= 1_300
