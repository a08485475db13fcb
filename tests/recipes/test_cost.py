"""What a recipe costs: passes as the methods really make them, operations as they are known."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from torch import nn

from tessella.data.batch import Batch
from tessella.data.views import CropGroup
from tessella.methods import METHODS, build_method, views_of
from tessella.methods.method import Progress, Setting
from tessella.methods.smog import two_pipelines
from tessella.modules.backbone import BackboneConfig, build_backbone
from tessella.recipes import recipe
from tessella.recipes.cost import Pass, forward_flops, forwards, gpu_hours, images_of, passes, training_flops
from tessella.run.config import RunConfig

# Below 16 channels torch (2.11 and 2.15, CPU) crashes in the gradient of strided 1x1 convolutions of large maps.
TINY = BackboneConfig("resnet10", 16)
IMAGES = 4
SMALL_PIPELINES = two_pipelines((CropGroup(2, 64, (0.2, 1.0)), CropGroup(4, 32, (0.05, 0.2))))


def passes_seen(config: RunConfig) -> Counter[tuple[int, bool]]:
    """Images per training image that enter a network's first convolution in one step, by (size, with gradient)."""
    torch.manual_seed(0)
    method = build_method(config.method, build_backbone(config.backbone), Setting(IMAGES, IMAGES, 0)).train()
    seen: Counter[tuple[int, bool]] = Counter()
    encoders = [module for name, module in method.named_modules() if name.split(".")[-1] == "backbone"]
    for encoder in encoders:
        first = next(module for module in encoder.modules() if isinstance(module, nn.Conv2d))
        first.register_forward_pre_hook(
            lambda _, inputs: seen.update({(inputs[0].shape[-1], torch.is_grad_enabled()): len(inputs[0]) / IMAGES})
        )
    groups = views_of(config.method).groups
    views = tuple(torch.randn(g.views, IMAGES, 3, g.size, g.size) for g in groups)
    method(Batch(views, torch.arange(IMAGES)), Progress(0, 10, 100)).loss.backward()
    return seen


def passes_told(config: RunConfig) -> Counter[tuple[int, bool]]:
    told: Counter[tuple[int, bool]] = Counter()
    for p in passes(config):
        told[p.size, p.trained] += p.images
    return told


@pytest.mark.parametrize("name", [
    "jigclu_imagenet_200ep", "mejigclu_64px", "swav_imagenet_200ep", "smog_imagenet_400ep",
    "coke_imagenet_1000ep_1x224", "coke_imagenet_800ep_multicrop",
])  # fmt: skip
def test_the_passes_are_those_that_the_method_makes(name: str):
    config = dataclasses.replace(recipe(name), backbone=TINY)
    assert passes_seen(config) == passes_told(config)


@pytest.mark.parametrize("group_grad", ["none", "through_update"])
def test_a_transformer_with_stochastic_depth_looks_twice(group_grad):
    config = recipe("smog_imagenet_swin_tiny_400ep")
    config = dataclasses.replace(
        config,
        method=dataclasses.replace(config.method, group_grad=group_grad, groups=20, views=SMALL_PIPELINES),
        backbone=BackboneConfig("timm:vit_tiny_patch16_224", drop_path=0.1),
    )
    told = passes_told(config)
    assert passes_seen(config) == told
    again = 2 if group_grad == "through_update" else 0  # the second look at the two large crops
    assert told == {(64, True): 2 + again, (32, True): 4, (64, False): 1 + 2 - again}


def test_every_method_is_counted():
    assert {recipe(f"{name}_cpu").method.name for name in METHODS if name != "deepcluster"} >= {
        "swav", "jigclu", "mejigclu", "smog", "coke",
    }  # fmt: skip


def test_forwards_are_in_units_of_the_first_pass_s_pixels():
    assert forwards([Pass(2, 224, True), Pass(6, 96, True)]) == pytest.approx(2 + 6 * (96 / 224) ** 2)
    assert forwards(passes(recipe("jigclu_imagenet_200ep"))) == 1


@pytest.mark.parametrize(("network", "size", "giga_multiply_adds"), [
    (BackboneConfig("resnet50"), 224, 4.09),        # known of torchvision's, its classifier's 0.002 left out
    (BackboneConfig("resnet18"), 224, 1.81),
    (BackboneConfig("resnet18", stem="small"), 32, 0.556),
    (BackboneConfig("timm:swin_tiny_patch4_window7_224"), 224, 4.5),
    (BackboneConfig("timm:deit_base_patch16_224"), 224, 17.5),
])  # fmt: skip
def test_operations_of_known_networks(network: BackboneConfig, size: int, giga_multiply_adds: float):
    assert forward_flops(network, size) / 2e9 == pytest.approx(giga_multiply_adds, rel=0.015)


def test_counting_leaves_the_random_numbers_alone():
    forward_flops.cache_clear()
    before = torch.get_rng_state()
    forward_flops(TINY, 32)
    assert torch.equal(before, torch.get_rng_state())


def test_a_backward_pass_is_two_forwards_and_recomputation_one_more():
    swav, smog = recipe("swav_imagenet_200ep"), recipe("smog_imagenet_400ep")
    large, small = (forward_flops(swav.backbone, size) for size in (224, 96))
    assert training_flops(swav) == 3 * (2 * large + 6 * small)
    assert training_flops(smog) == (3 + 1) * (2 * large + 4 * small)
    recomputed = dataclasses.replace(swav, backbone=BackboneConfig("resnet50", activation_checkpointing=True))
    assert training_flops(recomputed) == 4 * (2 * large + 6 * small)


def test_hours_are_operations_by_throughput():
    run = recipe("jigclu_imagenet_200ep")
    assert gpu_hours(run, 1_281_167) == pytest.approx(200 * 1_281_167 * 3 * 8.17e9 / 60e12 / 3600, rel=0.01)


def test_a_recipe_knows_how_many_images_it_is_made_for():
    assert images_of(recipe("coke_imagenet_800ep_multicrop")) == 1_281_167
    assert images_of(recipe("coke_cifar100")) == 50_000
    assert images_of(recipe("swav_digits")) == 1437
    assert images_of(recipe("swav_64px")) is None
