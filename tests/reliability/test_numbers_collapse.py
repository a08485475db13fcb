"""Runs that are made to collapse or to diverge are noticed within 200 steps; sound ones raise no alarm."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tessella.data.sources import ArrayImages, ImageSet, open_images
from tessella.engine.pretrain import pretrain
from tessella.errors import UserError
from tessella.recipes import recipe
from tessella.run.config import RunConfig

STEPS = 200
FIVE = ("swav", "jigclu", "mejigclu", "smog", "coke")


def small(name: str, side: int = 16, width: int = 8) -> RunConfig:
    """A CPU recipe on smaller views with a narrower network: what a test can afford."""
    config = recipe(f"{name}_cpu")
    if hasattr(config.method, "tile_size"):
        method = dataclasses.replace(config.method, tile_size=side // 2)
    else:
        groups = tuple(dataclasses.replace(group, size=side) for group in config.method.views.groups)
        method = dataclasses.replace(config.method, views=dataclasses.replace(config.method.views, groups=groups))
    network = dataclasses.replace(config.backbone, width=width)
    return dataclasses.replace(config, method=method, backbone=network, device="cpu", workers=1, max_steps=STEPS)


def with_method(name: str, **settings: Any) -> RunConfig:
    config = small(name)
    return dataclasses.replace(config, method=dataclasses.replace(config.method, **settings))


def with_rate(recipe_of: str, times: float, /, **settings: Any) -> RunConfig:
    config = small(recipe_of)
    rates = {"lr": times * config.optimizer.lr, "warmup_lr": times * config.optimizer.warmup_lr}
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **rates | settings))


def blank() -> ImageSet:
    return ArrayImages("blank", np.full((2000, 32, 32, 3), 117, np.uint8))


def alarms(config: RunConfig, images: ImageSet, out: Path) -> list[str]:
    """The names of what a run says; "stopped" if it ended with advice."""
    said = []
    try:
        pretrain(config, out, images)
    except UserError:
        said.append("stopped")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(line["step"] <= STEPS for line in lines)
    return said + [line["name"] for line in lines if line["kind"] == "alarm"]


FORCED: dict[str, Callable[[], RunConfig]] = {
    "swav, soft codes": lambda: with_method("swav", epsilon=1.0),
    "swav, one round of sinkhorn": lambda: with_method("swav", epsilon=0.5, sinkhorn_iterations=1),
    "swav, rate x 100": lambda: with_rate("swav", 100),
    "swav, sgd at 100": lambda: with_rate("swav", 100 / 3e-3, name="sgd", weight_decay=1e-4),
    "jigclu, rate x 100": lambda: with_rate("jigclu", 100),
    "jigclu, rate x 10,000": lambda: with_rate("jigclu", 1e4),
    "mejigclu, rate x 100": lambda: with_rate("mejigclu", 100),
    "smog, rate x 100": lambda: with_rate("smog", 100),
    "coke, rate x 100": lambda: with_rate("coke", 100, zero_lr_epochs=0),
}


def test_codes_that_say_nothing_are_noticed(tmp_path: Path):
    config = with_method("swav", epsilon=1.0)
    narrow = dataclasses.replace(config, batch_size=64, backbone=dataclasses.replace(config.backbone, width=4))
    assert alarms(narrow, open_images("digits::train"), tmp_path / "run") == ["loss_at_collapse"]


def test_a_learning_rate_100_times_too_high_is_noticed(tmp_path: Path):
    config = dataclasses.replace(with_rate("jigclu", 100), batch_size=64)
    narrow = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, width=4))
    assert "collapsed_embeddings" in alarms(narrow, open_images("digits::train"), tmp_path / "run")


def test_blank_images_are_noticed(tmp_path: Path):
    config = dataclasses.replace(small("smog", side=8, width=4), batch_size=32)
    assert alarms(config, blank(), tmp_path / "run") == ["blank_images"]


def test_a_sound_run_raises_no_alarm(tmp_path: Path):
    """It leaves the value of a collapse early and by far, so another processor's rounding does not matter."""
    narrow = dataclasses.replace(recipe("swav_digits").backbone, width=8)
    config = dataclasses.replace(recipe("swav_digits"), backbone=narrow, batch_size=64, seed=1)
    config = dataclasses.replace(config, device="cpu", workers=1, max_steps=STEPS)
    assert alarms(config, open_images("digits::train"), tmp_path / "run") == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("data", ["digits::train", "shapes::train"])
def test_nine_of_ten_forced_collapses_are_noticed(data: str, tmp_path: Path):
    images = open_images(data)
    said = {name: alarms(make(), images, tmp_path / name) for name, make in FORCED.items()}
    said |= {f"{name}, blank": alarms(small(name), blank(), tmp_path / f"{name} blank") for name in FIVE}
    missed = [name for name, names in said.items() if not names]
    print(json.dumps(said, indent=1))
    assert len(missed) <= len(said) // 10, said


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", FIVE)
@pytest.mark.parametrize(("data", "seed"), [("digits::train", 0), ("digits::train", 1), ("shapes::train", 0), ("", 0)])
def test_twenty_sound_runs_raise_no_alarm(name: str, data: str, seed: int, tmp_path: Path, shared_data: Path):
    photos = f"{shared_data / 'cifar10-small.tar.gz'}::cifar10-small/train"
    config = dataclasses.replace(small(name), seed=seed)
    assert alarms(config, open_images(data or photos), tmp_path / "run") == []
