"""Published figures: one table, and docstrings that say the same."""

from __future__ import annotations

import re

import pytest

from tessella.recipes import RECIPES
from tessella.report.published import PUBLISHED

# Top-1 of the linear probe on ImageNet, as the specification's table of the five methods has it.
LINEAR = {
    "swav_imagenet_100ep": 72.1,
    "swav_imagenet_200ep": 73.9,
    "swav_imagenet_400ep": 74.6,
    "swav_imagenet_800ep": 75.3,
    "swav_imagenet_400ep_2x224": 70.1,
    "swav_imagenet_200ep_bs256": 72.7,
    "swav_imagenet_400ep_bs256": 74.3,
    "swav_imagenet_w2_400ep": 77.3,
    "swav_imagenet_w4_400ep": 77.9,
    "swav_imagenet_w5_400ep": 78.5,
    "jigclu_imagenet_200ep": 66.4,
    "mejigclu_imagenet_200ep": 66.8,
    "smog_imagenet_400ep": 76.4,
    "smog_imagenet_w2_400ep": 78.0,
    "smog_imagenet_swin_tiny_400ep": 77.7,
    "coke_imagenet_1000ep_1x224": 72.5,
    "coke_imagenet_1000ep_2x224": 74.9,
    "coke_imagenet_800ep_multicrop": 76.4,
}


def test_the_headlines_are_the_specification_s():
    found = {name: scores[0].value for name, scores in PUBLISHED.items() if scores[0].protocol == "linear"}
    assert {name: found.get(name) for name in LINEAR} == LINEAR


def test_the_figures_to_pass_on_cifar10_are_the_specification_s():
    found = {(name, score.metric): score.value for name in PUBLISHED if "cifar10" in name for score in PUBLISHED[name]}
    assert found == {
        ("swav_cifar10", "top1"): 84.2,
        ("smog_cifar10", "top1"): 74.3,
        ("coke_cifar10_clustering", "accuracy"): 85.7,
        ("coke_cifar10_clustering", "nmi"): 76.6,
        ("coke_cifar10_clustering", "ari"): 73.2,
    }
    assert not any(score.same_run for name in PUBLISHED if "cifar" in name for score in PUBLISHED[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_docstring_cites_every_figure(name: str):
    cited = {float(number) for number in re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*\d)", RECIPES[name].__doc__ or "")}
    assert {score.value for score in PUBLISHED[name]} <= cited


@pytest.mark.parametrize("name", [name for name in RECIPES if "_imagenet_" in name])
def test_an_imagenet_recipe_has_a_figure_or_says_that_there_is_none(name: str):
    assert name in PUBLISHED or "Published: no accuracy" in (RECIPES[name].__doc__ or "")
    assert "Source: " in (RECIPES[name].__doc__ or "")
