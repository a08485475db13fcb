"""Every number that a user may set has a range: outside of it, it is refused by name; within it, it works."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tessella import api
from tessella.engine import memory
from tessella.engine.pretrain import pretrain
from tessella.errors import UserError
from tessella.methods.coke import CokeConfig
from tessella.protocols import named_settings
from tessella.ranges import Range, arguments_of, check_ranges, checked, range_of
from tessella.recipes import recipe
from tessella.run.config import RunConfig, from_dict, to_dict, to_yaml
from tessella.text import plain_yaml
from tests.engine.runs import tiny_run

VALUES = (0, -1, math.inf, -math.inf, math.nan, 10**9)
METHODS = ("swav", "jigclu", "mejigclu", "smog", "coke")
COMMANDS = (api.demo, api.evaluate, api.embed, api.scan, api.bench, api.pack)


def numbers(settings: Any, seen: set[tuple[type, str]], path: tuple[str | int, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """Place and type of every number in a tree of settings, each field of a class once."""
    for name, hint in typing.get_type_hints(type(settings), include_extras=True).items():
        value, place = getattr(settings, name), (*path, name)
        if (type(settings), name) in seen:
            continue
        parts = [(place, value)] if dataclasses.is_dataclass(value) else []
        if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            parts = [((*place, i), part) for i, part in enumerate(value)]
        for inner, part in parts:
            yield from numbers(part, seen, inner)
        if not parts and holds_numbers(hint):
            seen.add((type(settings), name))
            yield place, hint


def holds_numbers(hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.ClassVar, typing.Literal):
        return False
    return hint in (int, float) or any(map(holds_numbers, typing.get_args(hint)))


def changed(settings: Any, place: tuple[str | int, ...], value: float) -> Any:
    """The settings with another number in one place; with several numbers there, in all of them."""
    tree = to_dict(settings)
    *parents, last = place
    part = tree
    for parent in parents:
        part = part[parent]
    part[last] = [value] * len(part[last]) if isinstance(part[last], list) else value
    return from_dict(type(settings), tree, "settings")


def refused_or_whole(settings: Any, place: tuple[str | int, ...], value: float) -> Any:
    """The changed settings, if they are accepted and can be written and read; None if refused by name in one line."""
    try:
        new = changed(settings, place, value)
        check_ranges(new)
    except UserError as error:
        assert str(place[-1]) in str(error) and "\n" not in str(error), (place, value, str(error))
        return None
    assert from_dict(type(new), json.loads(json.dumps(to_dict(new), allow_nan=False))) == new, (place, value)
    return new


def settings_of_runs() -> list[RunConfig]:
    imagenet = "swav_imagenet_200ep jigclu_imagenet_200ep mejigclu_imagenet_200ep smog_imagenet_400ep"
    return [recipe(name) for name in (*imagenet.split(), "coke_imagenet_800ep_multicrop", "swav_imagenet_w5_400ep")]


def test_every_number_has_a_range_and_what_lies_outside_is_refused_by_name():
    seen: set[tuple[type, str]] = set()
    for settings in (*settings_of_runs(), *named_settings().values()):
        for place, hint in numbers(settings, seen):
            assert range_of(hint), f"{place} of {type(settings).__name__} declares no range"
            for value in VALUES:
                new = refused_or_whole(settings, place, value)
                assert new is None or math.isfinite(value)
    assert len(seen) > 150


def test_a_number_is_in_its_range_within_the_bounds_and_never_if_it_is_none():
    half_open = Range(0, 1, above=True)
    assert [value in half_open for value in (0, 1e-9, 1, 1.1, math.nan, math.inf)] == [False, True, True, *[False] * 3]
    assert str(half_open) == "above 0 and at most 1" and str(Range(1, 10**6, below=True)).endswith("below 1,000,000")


def test_clusters_may_be_no_more_than_images():
    run = RunConfig(CokeConfig(centres=(10, 300)))
    check_ranges(run, images=300)
    with pytest.raises(UserError, match=r"method\.centres\.1=300 must be at most 299, the number of images"):
        check_ranges(run, images=299)


def test_numbers_in_config_yaml_are_numbers_and_texts_that_look_like_them_stay_texts():
    run = dataclasses.replace(recipe("swav_cpu"), data="1e5", init_from="5e-4")
    text = to_yaml(run).replace("weight_decay: 0.0001", "weight_decay: 1e-4")
    assert from_dict(RunConfig, plain_yaml(text)) == run
    assert plain_yaml("[5e-4, 1E3, .5e1, -2.e+3]") == [5e-4, 1e3, 5.0, -2e3]


# --- arguments of commands and functions --------------------------------------------------------------------


def test_a_function_checks_its_arguments_before_it_does_anything():
    @checked
    def work(seconds: typing.Annotated[float, Range(0, 10)] = 3.0) -> float:
        return seconds

    assert work() == 3.0 and work(10) == 10
    with pytest.raises(UserError, match=r"seconds=11 must be at least 0 and at most 10"):
        work(11)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_every_number_of_a_command_has_a_range_that_is_checked(command: Callable[..., int]):
    parameters = inspect.signature(command).parameters.values()
    hints = arguments_of(inspect.unwrap(command))
    needed = {p.name: "x" for p in parameters if p.default is p.empty}
    for name in (p.name for p in parameters if holds_numbers(hints[p.name])):
        accepted = range_of(hints[name])
        assert accepted, f"{name} of {command.__name__} declares no range"
        for value in (value for value in VALUES if value not in accepted):
            with pytest.raises(UserError, match=f"{name}=.* must be"):
                command(**needed | {name: value})


# --- what is accepted starts --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_number_that_is_accepted_starts_or_is_refused_with_a_reason(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory, "machine_bytes", lambda: 1 << 30)
    base = tiny_run(method, max_steps=1) if method != "coke" else dataclasses.replace(
        tiny_run(max_steps=1), method=dataclasses.replace(recipe("coke_cpu").method, centres=(10, 20))
    )  # fmt: skip
    number = 0
    for place, _ in numbers(base, set()):
        for value in VALUES:
            new = refused_or_whole(base, place, value)
            if new is None or place == ("max_steps",):
                continue
            number += 1
            try:
                pretrain(new, tmp_path / str(number))
            except UserError as error:
                assert "\n" not in str(error)
