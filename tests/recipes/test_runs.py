"""Every recipe runs: a step on a tiny network always, on the real one in `make test-slow`."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tessella.cli import main
from tessella.data.sources import ArrayImages
from tessella.engine.pretrain import pretrain
from tessella.modules.backbone import BackboneConfig
from tessella.recipes import RECIPES, recipe
from tessella.run.config import RunConfig, load_config, to_yaml


def shortened(name: str, **changes: object) -> RunConfig:
    config = dataclasses.replace(recipe(name), batch_size=4, device="cpu", workers=1, log_every=1)
    return dataclasses.replace(config, **changes)


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def with_its_own_settings() -> list[str]:
    """Recipes that differ in more than epochs and the network's width."""
    kinds: dict[str, str] = {}
    for name in RECIPES:
        config = recipe(name)
        kinds.setdefault(repr((config.method, config.optimizer, config.backbone.stem)), name)
    return list(kinds.values())


@pytest.mark.parametrize("name", with_its_own_settings())
def test_a_recipe_takes_a_step_with_a_tiny_network(name: str, tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 48, 48, 3), dtype=np.uint8)
    config = shortened(name, data="pixels", max_steps=1)
    few = {"prototypes": 4, "centres": (4,), "groups": 4}  # no more clusters than images
    few = {name: clusters for name, clusters in few.items() if hasattr(config.method, name)}
    method = dataclasses.replace(config.method, **few)
    config = dataclasses.replace(config, method=method, backbone=BackboneConfig("resnet10", 16, config.backbone.stem))
    out = pretrain(config, tmp_path / "run", ArrayImages("pixels", pixels))
    assert len(losses(out)) == 1 and math.isfinite(losses(out)[0])
    assert load_config(out / "config.yaml") == config


def test_a_recipe_for_a_known_data_set_needs_no_data_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs: list[RunConfig] = []
    monkeypatch.setattr("tessella.engine.pretrain.pretrain", lambda config, out: runs.append(config))
    for words in (["swav_cifar10"], ["swav_cifar10", "--data", "mine"]):
        assert main(["pretrain", *words, "--out", str(tmp_path / "run")]) == 0
    assert [run.data for run in runs] == ["cifar10", "mine"]


@pytest.fixture(scope="module")
def photos(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    with tarfile.open(shared_data / "imagenet-sample.tar") as tar:
        for member in [member for member in tar.getmembers() if member.isfile()][:8]:
            (folder / Path(member.name).name).write_bytes(tar.extractfile(member).read())
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)  # seconds on an idle core, minutes on a busy one
@pytest.mark.parametrize("name", [name for name in RECIPES if "_imagenet_" in name])
def test_an_imagenet_recipe_takes_a_step_unchanged_on_real_photos(name: str, photos: Path, tmp_path: Path):
    config = shortened(name, data=str(photos), max_steps=1)
    try:
        out = pretrain(config, tmp_path / "run")
        assert len(losses(out)) == 1 and math.isfinite(losses(out)[0])
        assert (out / "backbone.safetensors").stat().st_size > 80e6
        changed = {"data", "batch_size", "max_steps", "device", "workers", "log_every"}
        kept = [line for line in to_yaml(recipe(name)).splitlines() if line.split(":")[0] not in changed]
        assert kept == [line for line in to_yaml(config).splitlines() if line.split(":")[0] not in changed]
    finally:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)  # up to a gigabyte each
