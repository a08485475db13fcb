"""The recipes for small images against the specifications' proposals for small data."""

from __future__ import annotations

import pytest

from tessella.methods import METHODS, views_of
from tessella.recipes import RECIPES, recipe

# epoch 0 of CoKe is an idle one more
RUNS = """
recipe                   stem        size  epochs  batch  rule   lr          warm-up  idle  decay   views  area
swav_cifar10             small         32     200    512  adamw  0>0.004>0         0     0  1e-06   2x32   0.14-1
swav_cifar100            small         32     200    512  adamw  0>0.004>0         0     0  1e-06   2x32   0.14-1
swav_64px                small-pool    64     200    512  adamw  0>0.004>0         0     0  1e-06   2x64   0.14-1
jigclu_cifar10           small         32     400    256  sgd    0>0.06>0         10     0  0.0005  4x16   0.2-1
jigclu_cifar100          small         32     400    256  sgd    0>0.06>0         10     0  0.0005  4x16   0.2-1
jigclu_64px              small-pool    64     400    256  sgd    0>0.06>0         10     0  0.0005  4x32   0.2-1
mejigclu_cifar10         small         32     400    256  sgd    0>0.06>0         10     0  0.0005  4x16   0.2-1
mejigclu_cifar100        small         32     400    256  sgd    0>0.06>0         10     0  0.0005  4x16   0.2-1
mejigclu_64px            small-pool    64     400    256  sgd    0>0.06>0         10     0  0.0005  4x32   0.2-1
smog_cifar10             small         32     200    256  sgd    0>0.06>0         10     0  0.0005  4x32   0.2-1
smog_cifar100            small         32     200    256  sgd    0>0.06>0         10     0  0.0005  4x32   0.2-1
smog_64px                small-pool    64     200    256  sgd    0>0.06>0         10     0  0.0005  4x64   0.2-1
coke_cifar10             small         32     401    256  sgd    0>0.2>0          10     1  0.0001  2x32   0.3-1
coke_cifar100            small         32     401    256  sgd    0>0.2>0          10     1  0.0001  2x32   0.2-1
coke_64px                small-pool    64     401    256  sgd    0>0.2>0          10     1  0.0001  2x64   0.2-1
coke_cifar10_clustering  small         32     401    128  sgd    0>0.2>0          10     1  0.0001  2x32   0.3-1
"""


def rows() -> list[dict[str, str]]:
    head, *body = (line.split() for line in RUNS.strip().splitlines())
    return [dict(zip(head, line, strict=True)) for line in body]


@pytest.mark.parametrize("expected", rows(), ids=lambda row: row["recipe"])
def test_network_schedule_and_crops(expected: dict[str, str]):
    run = recipe(expected["recipe"])
    rates, groups = run.optimizer, views_of(run.method).groups
    areas = {f"{group.scale[0]:g}-{group.scale[1]:g}" for group in groups}
    sizes = {group.size for group in groups}
    assert expected == {
        "recipe": run.recipe,
        "stem": run.backbone.stem,
        "size": f"{run.image_size}",
        "epochs": f"{run.epochs}",
        "batch": f"{run.batch_size}",
        "rule": rates.name,
        "lr": f"{rates.warmup_lr:g}>{rates.lr:g}>{rates.final_lr:g}",
        "warm-up": f"{rates.warmup_epochs}",
        "idle": f"{rates.zero_lr_epochs}",
        "decay": f"{rates.weight_decay:g}",
        "views": f"{sum(group.views for group in groups)}x{','.join(map(str, sizes))}",
        "area": ",".join(areas),
    }
    assert (run.backbone.name, run.backbone.width, rates.momentum) == ("resnet18", 64, 0.9)


@pytest.mark.parametrize("method", METHODS if len(METHODS) == 5 else [m for m in METHODS if m != "deepcluster"])
@pytest.mark.parametrize("images", ["cpu", "cifar10", "cifar100", "64px"])
def test_every_method_has_a_recipe_for_every_kind_of_small_images(method: str, images: str):
    run = recipe(f"{method}_{images}")
    assert run.method.name == method
    assert run.data == (images if images.startswith("cifar") else "")


@pytest.mark.parametrize(("images", "mean", "std"), [
    ("cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    ("cifar100", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    ("64px", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
])  # fmt: skip
def test_pixels_are_normalised_by_the_statistics_of_their_own_data_set(images, mean, std):
    names = [name for name in RECIPES if name.partition("_")[2].removesuffix("_clustering") == images]
    assert len(names) >= 5
    assert all((views_of(recipe(name).method).mean, views_of(recipe(name).method).std) == (mean, std) for name in names)


@pytest.mark.parametrize("method", ["swav", "jigclu", "mejigclu", "smog", "coke"])
def test_32_pixels_are_not_blurred_and_64_only_a_little(method: str):
    for images in ("cifar10", "cifar100"):
        assert all(group.colors.blur == 0 for group in views_of(recipe(f"{method}_{images}").method).groups)
    for group in views_of(recipe(f"{method}_64px").method).groups:
        assert group.colors.blur > 0 and group.colors.blur_sigma[1] <= 1


def test_swav_has_lightly_s_settings_on_cifar10_and_ten_prototypes_per_class_on_cifar100():
    method = recipe("swav_cifar10").method
    photo = method.views.groups[0].colors
    assert (method.prototypes, method.hidden_dim, method.embedding_dim, method.queue_length) == (512, 512, 128, 0)
    assert (photo.brightness, photo.contrast, photo.saturation, photo.hue, photo.jitter) == (0.4, 0.4, 0.4, 0.1, 0.8)
    assert method.freeze_prototypes_steps == 50_000 // 512  # one epoch
    assert recipe("swav_cifar100").method.prototypes == 10 * 100


def test_smog_differs_between_its_pipelines_by_solarisation_alone_on_cifar():
    method = recipe("smog_cifar10").method
    a, b = (group.colors for group in method.views.groups)
    assert (a.solarize, b.solarize, a.blur, b.blur) == (0, 0.2, 0, 0)
    assert (method.groups, method.group_sets, method.embedding_dim) == (300, 3, 128)
    assert method.group_momentum == (1.0, 0.99) and method.regroup_every is None and method.momentum == 0.99
    assert 500 <= recipe("smog_cifar100").method.groups <= 1000


def test_coke_has_a_dual_rate_for_its_few_clusters_and_its_clustering_run_the_successor_s_settings():
    run = recipe("coke_cifar10").method
    assert (run.centres, run.ratio, run.temperature, run.dual_lr) == ((100, 150, 200), 0.4, 0.05, "auto")
    assert all(250 <= 100_000 / k <= 450 for k in recipe("coke_64px").method.centres)

    clustering = recipe("coke_cifar10_clustering").method
    first, second = (group.colors for group in clustering.views.groups)
    assert clustering.centres == (10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
    assert clustering.centres[clustering.assign_clustering] == 10  # the classes
    assert (clustering.ratio, clustering.dual_lr, clustering.temperature, clustering.label_weight) == (
        0.9,
        0.1,
        0.05,
        0.2,
    )
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1, 0, 0.1, 0.2)


@pytest.mark.parametrize("name", [row["recipe"] for row in rows()])
def test_a_docstring_says_that_we_have_not_run_it_to_its_end(name: str):
    text = " ".join((RECIPES[name].__doc__ or "").split())
    assert "not run to its end" in text or "Not run to its end by us" in text
