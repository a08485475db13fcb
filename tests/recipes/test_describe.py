"""What `tessella recipes` shows."""

from __future__ import annotations

import inspect
import re

import pytest
import yaml

from tessella.methods import METHODS
from tessella.recipes import RECIPES, imagenet, recipe, small
from tessella.recipes.describe import listing, page
from tessella.report.published import PUBLISHED
from tessella.run.config import to_dict

# --- the list -----------------------------------------------------------------------------------------------


def test_every_recipe_has_one_line_under_its_method():
    lines, found, title = listing(), {}, ""
    for line in lines[1:-2]:
        if line.startswith("  "):
            found[line.split()[0]] = title
        else:
            title = line
    assert found == {name: METHODS[recipe(name).method.name].title for name in RECIPES}
    assert max(map(len, lines)) <= 140


@pytest.mark.parametrize("line", [
    "swav_imagenet_w2_400ep  resnet50, width 128  2x224 + 4x96  4096  400  linear 77.3",
    "jigclu_imagenet_200ep  resnet50  2x2 tiles of 112  256  200  linear 66.4",
    "smog_imagenet_w2_400ep  resnet50, width 128  2 x (2x224 + 4x96)  4096  400  linear 78.0",
    "coke_imagenet_800ep_multicrop  resnet50  2x224 + 6x96  1024  801  linear 76.4",
    "swav_cifar10  resnet18  2x32  512  200  (kNN 84.2)",
])  # fmt: skip
def test_a_line_says_network_views_batch_epochs_and_score(line: str):
    assert line in [re.sub("  +", "  ", told.strip()) for told in listing()]


def test_small_images_come_first():
    order = [line.split()[0] for line in listing() if line.startswith("  smog")]
    assert (
        order.index("smog_cpu")
        < order.index("smog_cifar10")
        < order.index("smog_64px")
        < order.index("smog_imagenet_400ep")
    )


# --- one recipe ---------------------------------------------------------------------------------------------


def told(name: str) -> str:
    return " ".join(" ".join(page(recipe(name))).partition("Settings;")[0].split())


@pytest.mark.parametrize("name", RECIPES)
def test_a_page_holds_docstring_command_scores_rule_and_settings(name: str):
    config, lines = recipe(name), page(recipe(name))
    text, _, settings = "\n".join(lines).partition("temperature 0.2:")
    assert text.startswith((RECIPES[name].__doc__ or "").splitlines()[0])
    assert all(f"\n{title}" in text for title in ("Command: ", "Cost:    ", "Score:   ", "Batch:   "))
    assert all(f"{score.value:g}" in text for score in PUBLISHED.get(name, ()))
    assert f"Batch:   {config.batch_size} images per update" in text and "--optimizer.lr" in text
    assert yaml.safe_load(settings) == yaml.safe_load(yaml.safe_dump(to_dict(config)))


def test_the_command_asks_for_data_only_where_the_recipe_has_none():
    assert "tessella pretrain swav_cpu --data DATA --out RUN" in told("swav_cpu")
    assert "tessella pretrain swav_cifar10 --out RUN" in told("swav_cifar10")


@pytest.mark.parametrize(("name", "cost"), [
    ("jigclu_imagenet_200ep", "1 forward of 224 x 224 pixels per image and epoch (one montage)"),
    ("swav_imagenet_200ep", "3.1 forwards of 224 x 224 pixels per image and epoch (2x224 + 6x96)"),
    ("coke_imagenet_1000ep_1x224", "1 forward of 224 x 224 pixels per image and epoch (1x224)"),
    ("smog_imagenet_400ep", "5.47 forwards of 224 x 224 pixels per image and epoch, 2.73 of them without a backward"),
    ("jigclu_imagenet_200ep", "24.5 GFLOP to train on an image once"),
    ("swav_imagenet_200ep", "about 90 GPU-hours on one NVIDIA H100 for 200 epochs of 1,281,167 images"),
    ("swav_imagenet_200ep", "An estimate, not measured: it assumes 60 TFLOP/s"),
    ("swav_cifar10", "for 200 epochs of 50,000 images. An estimate, not measured: it assumes 20 TFLOP/s"),
    ("coke_64px", "for 401 epochs of each 100,000 images"),
])  # fmt: skip
def test_costs_are_told_with_what_they_assume(name: str, cost: str):
    assert cost in told(name)


def test_a_run_for_two_cores_has_no_gpu_hours():
    assert "GPU-hours" not in told("jigclu_cpu")


def test_scores_are_told_with_their_source():
    assert "Score: linear 73.9 (README of the official code) linear 73.85 (VISSL's rerun" in told("swav_imagenet_200ep")
    assert "Score: nothing is published for these settings" in told("coke_64px")
    assert "best of its epochs; not the same run)" in told("swav_cifar10")


def test_the_rule_for_other_batch_sizes_has_an_example():
    assert "For example --batch-size 512 --method.dual-lr auto --optimizer.lr 0.8" in told(
        "coke_imagenet_800ep_multicrop"
    )


def test_every_function_of_the_recipe_modules_is_listed_under_its_name():
    for module in (small, imagenet):
        functions = inspect.getmembers(module, inspect.isfunction)
        defined = {name for name, f in functions if f.__module__ == module.__name__ and not name.startswith("_")}
        assert defined == {name for name in RECIPES if RECIPES[name].__module__ == module.__name__}
