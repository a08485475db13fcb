"""CoKe in the engine: exact resume of its label tables, an idle first epoch, a method rebuilt without its images."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tessella.data.views import CropGroup, ViewSpec
from tessella.engine.pretrain import pretrain, resume
from tessella.errors import UserError
from tessella.methods.coke import CokeConfig
from tessella.recipes import RECIPES, recipe
from tessella.run.config import RunConfig, from_dict, to_dict
from tessella.weights.resolve import resolve_backbone
from tests.engine.runs import assert_same, final_state, tiny_run

ONE = ViewSpec((CropGroup(1, 16, (0.3, 1.0)),))
MULTI = ViewSpec((CropGroup(2, 16, (0.3, 1.0)), CropGroup(1, 8, (0.1, 0.3))))


def tiny(views: ViewSpec, **changes: object) -> RunConfig:
    method = CokeConfig(
        centres=(8, 12),
        embedding_dim=16,
        temperature=0.05,
        dual_lr="auto",
        average_from_epoch=1,
        label_slots=2,
        views=views,
    )
    config = tiny_run("jigclu", epochs=3, **changes)
    optimizer = dataclasses.replace(
        config.optimizer, name="lars", lr=0.5, zero_lr_epochs=1, warmup_epochs=1, warmup_end="next", per_epoch=False
    )
    return dataclasses.replace(config, method=method, optimizer=optimizer)


@pytest.mark.parametrize("views", [ONE, MULTI], ids=["one", "multi"])
def test_a_run_resumed_in_mid_epoch_equals_a_straight_one_bit_for_bit(views: ViewSpec, tmp_path: Path):
    straight = pretrain(tiny(views), tmp_path / "straight")
    sliced = pretrain(tiny(views, max_steps=3), tmp_path / "sliced")  # of five per epoch
    for step in (5, 7, 12):
        resume(sliced, {"max_steps": step})
    resume(sliced, {"max_steps": None})
    assert_same(final_state(straight), final_state(sliced))


def test_the_first_epoch_clusters_and_trains_nothing(tmp_path: Path):
    start = final_state(pretrain(tiny(ONE, max_steps=1), tmp_path / "start"))
    end = final_state(pretrain(tiny(ONE, max_steps=5), tmp_path / "end"))
    after = final_state(pretrain(tiny(ONE, max_steps=7), tmp_path / "after"))
    weight = "method.backbone.conv1.weight"
    assert torch.equal(start[weight], end[weight]) and not torch.equal(end[weight], after[weight])
    assert (end["method.labels.rows"][..., 0] >= 0).sum() == 2 * 5 * 64
    assert not torch.equal(start["method.clusterings.0.previous"], end["method.clusterings.0.previous"])


def test_a_finished_run_is_rebuilt_without_its_images_and_assigns(tmp_path: Path):
    run = pretrain(tiny(ONE, max_steps=6), tmp_path / "run")
    method = resolve_backbone(str(run)).method
    assert method is not None and method.clusters == 8
    assert torch.equal(method.labels.rows, final_state(run)["method.labels.rows"])
    assert method.assign(torch.randn(5, method.backbone.feature_dim)).shape == (5,)


def test_every_recipe_survives_its_file_and_a_dual_learning_rate_is_a_number_or_auto():
    names = [name for name in RECIPES if name.startswith("coke_")]
    assert len(names) >= 4
    for name in names:
        assert from_dict(RunConfig, to_dict(recipe(name))) == recipe(name)
    for given, taken in (("auto", "auto"), (3, 3.0), (0.5, 0.5)):
        assert from_dict(CokeConfig, {"dual_lr": given}).dual_lr == taken
    for wrong in ("x", None, True, [1.0]):
        with pytest.raises(UserError, match=r"dual_lr is .*; expected float or auto"):
            from_dict(CokeConfig, {"dual_lr": wrong})


def test_zero_lr_epochs_and_warm_up_must_fit_into_the_run():
    with pytest.raises(UserError, match=r"optimizer\.zero_lr_epochs=1 with optimizer\.warmup_epochs=10 is longer"):
        dataclasses.replace(recipe("coke_imagenet_1000ep_1x224"), epochs=10)
    dataclasses.replace(recipe("coke_imagenet_1000ep_1x224"), epochs=11)
