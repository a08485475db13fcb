"""Everything that changes while a run trains is in its checkpoint: each attribute of each part is looked at.

Who adds `self.counter += 1` to a method and does not save it is told here, for any method, by the attribute's name.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tessella.engine import build, session
from tessella.engine import pretrain as engine
from tessella.methods.method import Method, Progress
from tessella.run.config import RunConfig
from tests.engine.runs import tiny_run
from tests.engine.test_ranks_resume import config as coke_or_tiny_run

METHODS = ("swav", "smog", "jigclu", "mejigclu", "coke")
STOP = 7  # steps done, in the middle of the second epoch

# What may differ between a process that has trained and one that has loaded the checkpoint, and why.
DERIVED = {
    "monitor._loss": "of the last step; the next one is observed before anything is reported",
    "monitor._embeddings": "as _loss",
    "monitor._views": "as _loss",
    "loader.wait_seconds": "time of this process",
    "method.*._pushed_on_host": "a copy of a buffer, read again when it is None",
    "optimizer.lr": "a function of the step, set before each update",
}


def parts_of(run: Any, *args: Any) -> dict[str, Any]:
    """What a call of the engine has built and trained."""
    parts: dict[str, Any] = {}

    def keep(name: str, original: Any) -> Any:
        def function(*args: Any, **kwargs: Any) -> Any:
            parts[name] = original(*args, **kwargs)
            return parts[name]

        return function

    with (
        mock.patch.object(engine, "build_state", keep("state", engine.build_state)),
        mock.patch.object(session, "build_loader", keep("loader", session.build_loader)),
    ):
        run(*args)
    return {**parts.pop("state")._asdict(), **parts}


def forgotten(config: RunConfig, folder: Path) -> list[str]:
    """Attributes that a process which has trained has otherwise than one that has loaded its checkpoint."""
    trained = parts_of(engine.pretrain, config, folder)
    loaded = parts_of(engine.resume, folder)
    found = []
    for name in ("method", "optimizer", "monitor", "loader"):
        found += list(differences(trained[name], loaded[name], name, set()))
    return [path for path in found if not any(fnmatch(path, pattern) for pattern in DERIVED)]


def differences(a: Any, b: Any, path: str, seen: set[int]) -> Iterator[str]:
    """Paths of attributes, at any depth, in which two objects differ."""
    if id(a) in seen:
        return
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or not torch.equal(a.nan_to_num(), b.nan_to_num()):
            yield path
    elif isinstance(a, np.ndarray):
        if not np.array_equal(a, b):
            yield path
    elif a is None or isinstance(a, bool | int | float | str | bytes | torch.dtype | torch.device):
        if type(a) is not type(b) or (a != b and not (isinstance(a, float) and math.isnan(a))):
            yield path
    elif isinstance(a, torch.optim.Optimizer):
        yield from differences(a.state_dict()["state"], b.state_dict()["state"], f"{path}.state", seen)
        for ours, theirs in zip(a.param_groups, b.param_groups, strict=True):
            yield from differences(ours, theirs, path, seen)
        rest = {"state", "param_groups", "_zero_grad_profile_name", "_patch_step_function"}
        yield from _of_dictionaries(vars(a), vars(b), path, seen, rest)
    elif type(a) is not type(b):
        yield path
    elif isinstance(a, dict):
        yield from _of_dictionaries(a, b, path, seen)
    elif isinstance(a, set | frozenset):
        if a != b:
            yield path
    elif isinstance(a, list | tuple | deque):
        if len(a) != len(b):
            yield path
        for number, (one, other) in enumerate(zip(a, b, strict=False)):
            yield from differences(one, other, f"{path}.{number}", seen)
    elif type(a).__module__.startswith(("tessella", "torch")) and (not callable(a) or isinstance(a, nn.Module)):
        seen.add(id(a))
        yield from _of_dictionaries(getattr(a, "__dict__", {}), getattr(b, "__dict__", {}), path, seen)


def _of_dictionaries(
    a: dict[Any, Any], b: dict[Any, Any], path: str, seen: set[int], without: set[str] | None = None
) -> Iterator[str]:
    for key in [*a, *(key for key in b if key not in a)]:
        name = f"{path}.{key}".replace("._parameters", "").replace("._buffers", "").replace("._modules", "")
        if key in (without or ()) or "_hooks" in str(key):  # numbered over all modules of a process
            continue
        if key not in a or key not in b:
            yield name
        else:
            yield from differences(a[key], b[key], name, seen)


def config(method: str) -> RunConfig:
    made = coke_or_tiny_run(method) if method == "coke" else tiny_run(method)
    return dataclasses.replace(made, max_steps=STOP)


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_brings_back_everything_that_training_changes(method: str, tmp_path: Path):
    assert forgotten(config(method), tmp_path / "run") == []


def with_hook(original: Any, hook: Any) -> Any:
    """`build_method`, whose methods also call `hook` after each update."""

    def build(*args: Any) -> Method:
        method = original(*args)
        of_the_class = method.after_update

        def after_update(progress: Progress) -> None:
            of_the_class(progress)
            hook(method)

        method.after_update = after_update
        method.register_buffer("unsaved", torch.zeros(3), persistent=False)
        method.counter = 0
        return method

    return build


def counts(method: Any) -> None:
    method.counter += 1


def fills_a_buffer_that_is_not_saved(method: Any) -> None:
    method.unsaved += 1


def adds_an_attribute(method: Any) -> None:
    method.backbone.last = method.backbone.conv1.weight.detach().clone()


def replaces_a_setting(method: Any) -> None:
    method.setting = method.setting._replace(seed=3)


@pytest.mark.parametrize(
    ("hook", "told"),
    [
        (counts, "method.counter"),
        (fills_a_buffer_that_is_not_saved, "method.unsaved"),
        (adds_an_attribute, "method.backbone.last"),
        (replaces_a_setting, "method.setting.2"),
    ],
)
def test_state_that_somebody_forgot_to_save_is_named(hook: Any, told: str, tmp_path: Path):
    with mock.patch.object(build, "build_method", with_hook(build.build_method, hook)):
        assert told in forgotten(config("jigclu"), tmp_path / "run")
