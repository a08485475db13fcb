"""Runs whose network draws numbers of its own: they resume exactly, and unfit networks are refused before the data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tessella.data.views import CropGroup, ViewSpec
from tessella.engine.pretrain import pretrain, resume
from tessella.errors import UserError
from tessella.methods.smog import two_pipelines
from tessella.modules.backbone import BackboneConfig
from tessella.optim import OptimizerConfig
from tessella.run.config import RunConfig
from tessella.weights.resolve import resolve_backbone
from tests.engine.runs import assert_same, final_state, tiny_run

ADAMW = OptimizerConfig("adamw", lr=1e-3, weight_decay=0.05, decay_norm_and_bias=False)


def transformer_run(method: str, drop_path: float = 0.5, pool: str = "average", **changes: object) -> RunConfig:
    config = tiny_run(method, optimizer=ADAMW, epochs=1, accumulate=2, image_size=32, **changes)
    if method == "jigclu":
        settings = dataclasses.replace(config.method, tile_size=16)
    else:
        crops = (CropGroup(2, 32, (0.3, 1.0)), CropGroup(1, 16, (0.1, 0.3)))
        special = (
            {"views": two_pipelines(crops)} if method == "smog" else {"views": ViewSpec(crops), "prototypes": (20, 30)}
        )
        settings = dataclasses.replace(config.method, **special)
    backbone = BackboneConfig("timm:test_vit", drop_path=drop_path, activation_checkpointing=True, pool=pool)
    return dataclasses.replace(config, method=settings, backbone=backbone)


@pytest.mark.parametrize("method", ["swav", "jigclu", "smog"])
def test_a_run_with_drop_path_resumed_in_mid_epoch_equals_a_straight_one_bit_for_bit(method: str, tmp_path: Path):
    straight = pretrain(transformer_run(method), tmp_path / "straight")
    sliced = pretrain(transformer_run(method, max_steps=2), tmp_path / "sliced")
    torch.rand(5)  # what others draw in between
    resume(sliced, {"max_steps": None})
    assert_same(final_state(straight), final_state(sliced))
    kept = final_state(pretrain(transformer_run(method, drop_path=0.0, max_steps=1), tmp_path / "kept"))
    dropped = final_state(pretrain(transformer_run(method, max_steps=1), tmp_path / "dropped"))
    assert not torch.equal(kept["product.net.norm.weight"], dropped["product.net.norm.weight"])
    assert resolve_backbone(str(straight)).backbone(torch.randn(1, 3, 32, 32)).shape == (1, 64)


def test_a_network_that_the_method_cannot_use_is_refused_before_the_data_is_looked_for(tmp_path: Path):
    with pytest.raises(UserError, match=r"--backbone\.pool average"):
        pretrain(transformer_run("jigclu", pool="own", data="no/such/folder"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
