"""config.yaml: what is read, and what is said about a file that cannot be."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tessella.errors import UserError
from tessella.methods.smog import SmogConfig
from tessella.recipes import recipe
from tessella.run.config import differences, flat, load_config, to_yaml


@pytest.mark.parametrize(
    ("now", "before"),
    [
        ("init_from", "start_from"),
        ("zero_lr_epochs", "idle_epochs"),
        ("colors", "photometry"),
        ("activation_checkpointing", "recompute"),
    ],
)
def test_a_field_of_an_earlier_version_is_named_with_its_name_now(now: str, before: str, tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(recipe("swav_cpu")).replace(f"{now}:", f"{before}:"))
    with pytest.raises(
        UserError, match=rf"earlier version .*: {before} is now called {now}\. This version cannot resume"
    ):
        load_config(path)


def test_leaves_of_a_tree_have_dotted_names():
    tree = {"a": {"b": 1, "c": [2, 3]}, "d": [{"e": 4}, {"e": None}], "f": {}}
    assert flat(tree) == {"a.b": 1, "a.c": [2, 3], "d.0.e": 4, "d.1.e": None}


def test_of_another_method_only_the_name_differs():
    before = recipe("swav_cpu")
    after = dataclasses.replace(before, method=SmogConfig(), epochs=7)
    assert differences(before, after) == {"method.name": ("swav", "smog"), "epochs": (60, 7)}
