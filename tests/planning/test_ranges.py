"""Every number in a configuration has a range, which is checked before anything else."""

import math
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest
from annotated_types import Ge, Interval, MultipleOf

from modernenc import ranges
from modernenc.config import Run
from modernenc.planning.checks import check_settings
from modernenc.saved_config import apply_overrides
from support.commands import error
from support.runs import composed


def numbers(kind: Any, key: str = "") -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Yield the key, the type and the constraints of each number in a schema; `*` stands for the keys of a mapping."""
    constraints: tuple[Any, ...] = ()
    if get_origin(kind) is Annotated:
        kind, constraints = get_args(kind)[0], get_args(kind)[1:]
    if is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        for one in fields(kind):
            yield from numbers(hints[one.name], f"{key}.{one.name}" if key else one.name)
    elif get_origin(kind) in (dict, list):
        yield from numbers(get_args(kind)[-1], f"{key}.*")
    elif kind in (int, float):
        yield key, kind, tuple(constraints)


def test_every_number_of_a_run_has_a_range():
    assert [key for key, _, constraints in numbers(Run) if not constraints] == []
    assert len(list(numbers(Run))) > 40


@pytest.mark.parametrize("value", ["-1", ".nan", ".inf", "-.inf", "1e400", "1e19", "-9223372036854775809"])
def test_a_number_that_no_setting_can_have_is_refused_by_its_key(value):
    run = composed(["+recipe=demo", "data.root=nowhere"])
    for key, kind, _ in numbers(Run):
        if key.startswith(("tasks", "rollbacks")) or (kind is int and not value.lstrip("-").isdigit()):
            continue
        key = (
            key.replace("phases.*", "phases.stable")
            .replace("mix.*", "mix.code")
            .replace("objectives.*", "objectives.masked_lm")
        )
        with pytest.raises(ValueError, match=key.replace(".", r"\.")):
            check_settings(apply_overrides(run, [f"{key}={value.replace('.', '', 1) if 'n' in value else value}"]))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("phases.extend.backbone.global_rope_theta=0", r"phases\.extend\.backbone\.global_rope_theta=0: expected more than 0"),
        ("backbone.num_hidden_layers=0", r"backbone\.num_hidden_layers=0: expected 1 to 1000"),
        ("backbone.hidden_size=1.5", r"backbone\.hidden_size=1.5: expected a whole number"),
        ("backbone.attention_out_dropout=1.5", r"backbone\.attention_out_dropout=1.5: expected"),
        ("optim.lr=0", r"optim\.lr=0: expected more than 0"),
        ("optim.betas=[0.9,1.5]", r"optim\.betas\[1\]=1.5: expected"),
        ("trainer.strategy=dp", r"trainer\.strategy=dp: expected one of auto, ddp, fsdp"),
        ("data.workers=2", r"data\.workers=2: expected one of 0, 1"),
    ],
)
def test_backbones_optimizers_and_phases_are_checked_as_a_run_is(setting, message):
    with pytest.raises(ValueError, match=message):
        check_settings(apply_overrides(composed(["+recipe=demo", "data.root=nowhere"]), [setting]))


@pytest.mark.parametrize("name", ["", ".", "../elsewhere", "a/b", "a b", "p" * 300, "-"])
def test_a_phase_whose_name_is_no_file_name_is_refused(name):
    run = composed(["+recipe=demo", "data.root=nowhere"])
    with pytest.raises(ValueError, match="expected a name of up to 64 letters"):
        check_settings(replace(run, phases={name: run.phases["stable"]}))


def test_conditions_read_as_words():
    for kind, value, message in (
        (Annotated[int, Ge(1)], 0, "size=0: expected 1 or more"),
        (Annotated[float, Interval(gt=0, le=1)], 2, "size=2: expected more than 0 and 1 or less"),
        (Annotated[float, Ge(0), MultipleOf(1)], 0.5, "size=0.5: expected 0 or more and a whole number"),
        (Annotated[str, Literal["a", "b"]], "c", "size=c: expected one of a, b"),
        (bool, "yes", "size=yes: expected true or false"),
        (int, True, "size=True: expected a whole number"),
        (float, math.nan, "size=nan: expected a number"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            ranges.check("size", kind, value)


def test_a_run_cannot_be_changed_in_place():
    run = composed(["+recipe=demo", "data.root=nowhere"])
    with pytest.raises(FrozenInstanceError, match=r"Run\.seed cannot be changed: make a copy"):
        run.seed = 3  # pyright: ignore[reportAttributeAccessIssue]
    assert replace(run, seed=3).seed == 3


@pytest.mark.parametrize(
    ("kind", "value"), [(dict[str, int], [1]), (str | None, 1), (list[str] | None, ["a", 2]), (dict[str, int], {"a": None})]
)
def test_a_value_of_another_type_is_named(kind, value):
    ranges.check("key", kind, None if kind == str | None else {} if kind == dict[str, int] else [])
    with pytest.raises(ValueError, match=r"^key(\.a|\[1\])?=.*: expected"):
        ranges.check("key", kind, value)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("phases.stable=0.5", r"^phases\.stable=0\.5: "),
        ("trainer=stable", r"^trainer=stable: "),
        ("phases.extend.first_lr_factor=???", r"first_lr_factor=\?\?\?: expected a value"),
        ("data=???", r"^data=\?\?\?: expected a value"),
        ("optim._target_=0.5", r"optim\._target_=0\.5: there is no module"),
        ("optim._target_=a..b", r"optim\._target_=a\.\.b: there is no module"),
        ("phases.stable.objectives={masked_lm: 1000001}", r"objectives\.masked_lm=1000001: expected"),
        ("phases.stable.batch_rows=9999999999", r"ramp\.step_rows=.*at most"),
        ("phases.extend.batch_rows=9999999999999999999", r"batch_rows=9+: expected a whole number below 2\^63"),
        ("backbone.num_hidden_layers=100000000", r"backbone\.num_hidden_layers=100000000: expected"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_its_key_at_once(setting, said):
    run = composed(["+recipe=demo", "data.root=nowhere"])
    with pytest.raises(ValueError, match=said):
        check_settings(apply_overrides(run, [setting]))


@pytest.mark.parametrize("setting", ["phases.extend.first_lr_factor=???", "backbone=1", "optim=1e-3"])
def test_a_choice_that_is_no_name_and_a_value_that_is_none_are_named_on_the_command_line(setting, tmp_path):
    said = error("modernenc.plan", "+recipe=demo", f"data.root={tmp_path}", setting)
    assert setting.partition("=")[0] in said
