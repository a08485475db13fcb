"""The ImageNet recipes against the papers' and official scripts' numbers, written down from the specifications.

Nothing here is computed from the recipes: a row is what a table of the specification says.
"""

from __future__ import annotations

import pytest

from tessella.data.views import CropGroup
from tessella.methods import views_of
from tessella.optim import learning_rate
from tessella.recipes import RECIPES, recipe
from tessella.run.config import RunConfig

# Learning rates: first step of the warm-up > after it > end of the cosine.
RUNS = """
recipe                                 network  width  epochs  batch  rule  lr                 warm-up  idle  decay
swav_imagenet_100ep                    resnet50    64     100   4096  larc  0.3>4.8>0.0048          10     0  1e-06
swav_imagenet_200ep                    resnet50    64     200   4096  larc  0.3>4.8>0.0048          10     0  1e-06
swav_imagenet_400ep                    resnet50    64     400   4096  larc  0.3>4.8>0.0048          10     0  1e-06
swav_imagenet_800ep                    resnet50    64     800   4096  larc  0.3>4.8>0.0048          10     0  1e-06
swav_imagenet_400ep_2x224              resnet50    64     400   4096  larc  0.3>4.8>0.0048          10     0  1e-06
swav_imagenet_200ep_bs256              resnet50    64     200    256  larc  0>0.6>0.0006             0     0  1e-06
swav_imagenet_400ep_bs256              resnet50    64     400    256  larc  0>0.6>0.0006             0     0  1e-06
swav_imagenet_w2_400ep                 resnet50   128     400   4096  larc  0.3>4.8>0.0048          10     0  1e-06
swav_imagenet_w4_400ep                 resnet50   256     400   2560  larc  0.3>4.8>0.0048          10     0  1e-06
jigclu_imagenet_200ep                  resnet50    64     200    256  sgd   0>0.03>0                 0     0  0.0001
mejigclu_imagenet_200ep                resnet50    64     200    256  sgd   0>0.03>0                 0     0  0.0001
mejigclu_imagenet_200ep_fixed_overlap  resnet50    64     200    256  sgd   0>0.03>0                 0     0  0.0001
smog_imagenet_400ep                    resnet50    64     400   4096  larc  0.01>4.8>0.0048         10     0  1e-06
smog_imagenet_w2_400ep                 resnet50   128     400   4096  larc  0.01>4.8>0.0048         10     0  1e-06
smog_imagenet_swin_tiny_400ep          swin-t      64     400   4096  adamw 4e-05>0.001>4e-05       10     0  0.05
coke_imagenet_1000ep_1x224             resnet50    64    1001   1024  lars  0>1.6>0                 10     1  1e-06
coke_imagenet_1000ep_2x224             resnet50    64    1001   1024  lars  0>1.6>0                 10     1  1e-06
coke_imagenet_800ep_multicrop          resnet50    64     801   1024  lars  0>1.6>0                 10     1  1e-06
"""

# Projector's hidden width, prototypes, temperature, epsilon and Sinkhorn iterations, steps at rest, queue from epoch.
SWAV = """
recipe                     hidden     K    D    T   eps  iterations  frozen  queue
swav_imagenet_100ep          2048  3000  128  0.1  0.05           3     313  none
swav_imagenet_200ep          2048  3000  128  0.1  0.05           3     313  none
swav_imagenet_400ep          2048  3000  128  0.1  0.05           3     313  none
swav_imagenet_800ep          2048  3000  128  0.1  0.05           3     313  none
swav_imagenet_400ep_2x224    2048  3000  128  0.1  0.05           3     313  none
swav_imagenet_200ep_bs256    2048  3000  128  0.1  0.05           3    5005  3840@15
swav_imagenet_400ep_bs256    2048  3000  128  0.1  0.05           3    5005  3840@15
swav_imagenet_w2_400ep       8192  3000  128  0.1  0.05           3     313  none
swav_imagenet_w4_400ep       8192  3000  128  0.1  0.05           3     313  2560@0
"""

# Overlap in shares of the image's side, weights of the clustering and of the other branch.
MONTAGES = """
recipe                                 tiles  overlap    T    D    scale     clustering  other  slots
jigclu_imagenet_200ep                      2  0.3        0.3  128  official           1      1  any
mejigclu_imagenet_200ep                    2  0.15-0.45  0.3  128  official           1      1  subsets
mejigclu_imagenet_200ep_fixed_overlap      2  0.3        0.3  128  official           1      1  subsets
"""

SMOG = """
recipe                         K     sets  D    T    ema    groups  labels  activation  clip  gradient  every
smog_imagenet_400ep            3000     3  128  0.1  0.999  1>0.99       2  relu        none  none      epoch
smog_imagenet_w2_400ep         3000     3  128  0.1  0.999  1>0.99       2  relu        none  none      epoch
smog_imagenet_swin_tiny_400ep  3000     3  256  0.1  0.999  1>0.99       1  gelu           3  none      epoch
"""

# alpha: weight of the one-hot label; beta: of the predictor's loss (one view), of the large crops (multi-crop).
COKE = """
recipe                         K               D    T     ratio  eta  alpha  beta  stage  slots  label-T
coke_imagenet_1000ep_1x224     3000,4000,5000  128  0.1     0.4   20      -     1    801      5      0.5
coke_imagenet_1000ep_2x224     3000,4000,5000  128  0.05    0.4   20    0.2     -      -      -        -
coke_imagenet_800ep_multicrop  3000,4000,5000  128  0.05    0.4   20    0.2   0.5      -      -        -
"""

# One line per crop group: share of the area; brightness/contrast/saturation/hue; chances of blur and of solarisation.
# Flip .5, jitter .8, gray .2, ratio 3/4 to 4/3 and blur sigma .1 to 2 hold for all.
VIEWS = """
recipe                                 crops  area       colours          blur  solarize  std-red
swav_imagenet_100ep                    2x224  0.14-1     0.8/0.8/0.8/0.2   0.5         0    0.228
swav_imagenet_100ep                    6x96   0.05-0.14  0.8/0.8/0.8/0.2   0.5         0    0.228
swav_imagenet_200ep                    2x224  0.14-1     0.8/0.8/0.8/0.2   0.5         0    0.228
swav_imagenet_200ep                    6x96   0.05-0.14  0.8/0.8/0.8/0.2   0.5         0    0.228
swav_imagenet_400ep                    2x224  0.14-1     0.8/0.8/0.8/0.2   0.5         0    0.228
swav_imagenet_400ep                    6x96   0.05-0.14  0.8/0.8/0.8/0.2   0.5         0    0.228
swav_imagenet_800ep                    2x224  0.14-1     0.8/0.8/0.8/0.2   0.5         0    0.228
swav_imagenet_800ep                    6x96   0.05-0.14  0.8/0.8/0.8/0.2   0.5         0    0.228
swav_imagenet_400ep_2x224              2x224  0.08-1     0.8/0.8/0.8/0.2   0.5         0    0.228
swav_imagenet_200ep_bs256              2x224  0.14-1     0.8/0.8/0.8/0.2   0.5         0    0.228
swav_imagenet_200ep_bs256              6x96   0.05-0.14  0.8/0.8/0.8/0.2   0.5         0    0.228
swav_imagenet_400ep_bs256              2x224  0.14-1     0.8/0.8/0.8/0.2   0.5         0    0.228
swav_imagenet_400ep_bs256              6x96   0.05-0.14  0.8/0.8/0.8/0.2   0.5         0    0.228
swav_imagenet_w2_400ep                 2x224  0.14-1     0.8/0.8/0.8/0.2   0.5         0    0.228
swav_imagenet_w2_400ep                 4x96   0.05-0.14  0.8/0.8/0.8/0.2   0.5         0    0.228
swav_imagenet_w4_400ep                 2x224  0.08-1     0.8/0.8/0.8/0.2   0.5         0    0.228
swav_imagenet_w4_400ep                 4x96   0.08-0.14  0.8/0.8/0.8/0.2   0.5         0    0.228
jigclu_imagenet_200ep                  4x112  0.2-1      0.4/0.4/0.4/0.1   0.5         0    0.229
mejigclu_imagenet_200ep                4x112  0.2-1      0.4/0.4/0.4/0.1   0.5         0    0.229
mejigclu_imagenet_200ep_fixed_overlap  4x112  0.2-1      0.4/0.4/0.4/0.1   0.5         0    0.229
smog_imagenet_400ep                    2x224  0.2-1      0.4/0.4/0.2/0.1     1         0    0.228
smog_imagenet_400ep                    4x96   0.05-0.2   0.4/0.4/0.2/0.1     1         0    0.228
smog_imagenet_400ep                    2x224  0.2-1      0.4/0.4/0.2/0.1   0.1       0.2    0.228
smog_imagenet_400ep                    4x96   0.05-0.2   0.4/0.4/0.2/0.1   0.1       0.2    0.228
smog_imagenet_w2_400ep                 2x224  0.2-1      0.4/0.4/0.2/0.1     1         0    0.228
smog_imagenet_w2_400ep                 4x96   0.05-0.2   0.4/0.4/0.2/0.1     1         0    0.228
smog_imagenet_w2_400ep                 2x224  0.2-1      0.4/0.4/0.2/0.1   0.1       0.2    0.228
smog_imagenet_w2_400ep                 4x96   0.05-0.2   0.4/0.4/0.2/0.1   0.1       0.2    0.228
smog_imagenet_swin_tiny_400ep          2x224  0.2-1      0.4/0.4/0.2/0.1     1         0    0.228
smog_imagenet_swin_tiny_400ep          4x96   0.05-0.2   0.4/0.4/0.2/0.1     1         0    0.228
smog_imagenet_swin_tiny_400ep          2x224  0.2-1      0.4/0.4/0.2/0.1   0.1       0.2    0.228
smog_imagenet_swin_tiny_400ep          4x96   0.05-0.2   0.4/0.4/0.2/0.1   0.1       0.2    0.228
coke_imagenet_1000ep_1x224             1x224  0.08-1     0.8/0.8/0.8/0.2   0.5         0    0.229
coke_imagenet_1000ep_2x224             1x224  0.08-1     0.4/0.4/0.2/0.1     1         0    0.229
coke_imagenet_1000ep_2x224             1x224  0.08-1     0.4/0.4/0.2/0.1   0.1       0.2    0.229
coke_imagenet_800ep_multicrop          1x224  0.08-1     0.4/0.4/0.2/0.1     1         0    0.229
coke_imagenet_800ep_multicrop          1x224  0.08-1     0.4/0.4/0.2/0.1   0.1       0.2    0.229
coke_imagenet_800ep_multicrop          6x96   0.05-0.6   0.8/0.8/0.8/0.2   0.5         0    0.229
"""

# Their settings are not published in full: what is known is in their docstrings.
NOT_TABULATED = {"swav_imagenet_w5_400ep", "swav_imagenet_deit_b_300ep"}


def rows(table: str) -> list[dict[str, str]]:
    head, *body = (line.split() for line in table.strip().splitlines())
    return [dict(zip(head, line, strict=True)) for line in body]


def by_name(row: dict[str, str]) -> str:
    return row["recipe"]


@pytest.mark.parametrize("expected", rows(RUNS), ids=by_name)
def test_network_length_batch_and_schedule_are_the_published_ones(expected: dict[str, str]):
    run = recipe(expected["recipe"])
    rates, names = run.optimizer, {"timm:swin_tiny_patch4_window7_224": "swin-t"}
    assert expected == {
        "recipe": run.recipe,
        "network": names.get(run.backbone.name, run.backbone.name),
        "width": f"{run.backbone.width}",
        "epochs": f"{run.epochs}",
        "batch": f"{run.batch_size}",
        "rule": rates.name,
        "lr": f"{rates.warmup_lr:g}>{rates.lr:g}>{rates.final_lr:g}",
        "warm-up": f"{rates.warmup_epochs}",
        "idle": f"{rates.zero_lr_epochs}",
        "decay": f"{rates.weight_decay:g}",
    }
    assert rates.momentum == 0.9 and run.image_size == 224 and run.backbone.stem == "imagenet"
    assert rates.trust == 0.001  # of LARC and LARS
    assert rates.decay_norm_and_bias == (rates.name != "adamw")
    assert run.backbone.drop_path == (0.2 if "swin" in run.recipe else 0)


def test_the_tables_know_every_imagenet_recipe():
    imagenet = {name for name in RECIPES if "_imagenet_" in name} - {n for n in RECIPES if n.startswith("deepcluster")}
    assert {row["recipe"] for row in rows(RUNS)} | NOT_TABULATED == imagenet
    assert {row["recipe"] for row in rows(VIEWS)} == {row["recipe"] for row in rows(RUNS)}


@pytest.mark.parametrize("expected", rows(SWAV), ids=by_name)
def test_swav(expected: dict[str, str]):
    method = recipe(expected["recipe"]).method
    assert expected == {
        "recipe": expected["recipe"],
        "hidden": f"{method.hidden_dim}",
        "K": f"{method.prototypes}",
        "D": f"{method.embedding_dim}",
        "T": f"{method.temperature:g}",
        "eps": f"{method.epsilon:g}",
        "iterations": f"{method.sinkhorn_iterations}",
        "frozen": f"{method.freeze_prototypes_steps}",
        "queue": f"{method.queue_length}@{method.queue_from_epoch}" if method.queue_length else "none",
    }


@pytest.mark.parametrize("expected", rows(MONTAGES), ids=by_name)
def test_jigclu_and_mejigclu(expected: dict[str, str]):
    method = recipe(expected["recipe"]).method
    group = views_of(method).groups[0]
    jigclu = method.name == "jigclu"
    assert expected == {
        "recipe": expected["recipe"],
        "tiles": f"{method.tiles}",
        "overlap": f"{group.overlap:g}" + (f"-{group.overlap_max:g}" if group.overlap_max else ""),
        "T": f"{method.temperature:g}",
        "D": f"{method.embedding_dim}",
        "scale": method.cluster_scale,
        "clustering": f"{method.cluster_weight:g}",
        "other": f"{method.location_weight if jigclu else method.category_weight:g}",
        "slots": "any" if jigclu else method.slots,
    }
    assert jigclu or method.categories is None  # as many as images in a batch


@pytest.mark.parametrize("expected", rows(SMOG), ids=by_name)
def test_smog(expected: dict[str, str]):
    method = recipe(expected["recipe"]).method
    assert expected == {
        "recipe": expected["recipe"],
        "K": f"{method.groups}",
        "sets": f"{method.group_sets}",
        "D": f"{method.embedding_dim}",
        "T": f"{method.temperature:g}",
        "ema": f"{method.momentum:g}",
        "groups": ">".join(f"{x:g}" for x in method.group_momentum),
        "labels": f"{method.label_crops}",
        "activation": method.activation,
        "clip": "none" if method.max_gradient_norm is None else f"{method.max_gradient_norm:g}",
        "gradient": method.group_grad,
        "every": "epoch" if method.regroup_every is None else f"{method.regroup_every}",
    }
    assert method.hidden_dim == 2048 and method.kmeans_iterations == 10


@pytest.mark.parametrize("expected", rows(COKE), ids=by_name)
def test_coke(expected: dict[str, str]):
    run = recipe(expected["recipe"])
    method, views = run.method, views_of(run.method).views
    one = views == 1
    assert expected == {
        "recipe": expected["recipe"],
        "K": ",".join(map(str, method.centres)),
        "D": f"{method.embedding_dim}",
        "T": f"{method.temperature:g}",
        "ratio": f"{method.ratio:g}",
        "eta": f"{method.dual_lr:g}",
        "alpha": "-" if one else f"{method.label_weight:g}",
        "beta": {1: f"{method.prediction_weight:g}", 2: "-"}.get(views, f"{method.large_weight:g}"),
        "stage": f"{method.average_from_epoch}" if one else "-",
        "slots": f"{method.label_slots}" if one else "-",
        "label-T": f"{method.label_temperature:g}" if one else "-",
    }


@pytest.mark.parametrize("name", {row["recipe"]: None for row in rows(VIEWS)})
def test_views(name: str):
    spec = views_of(recipe(name).method)
    assert [row for row in rows(VIEWS) if row["recipe"] == name] == [
        {
            "recipe": name,
            "crops": f"{group.views}x{group.size}",
            "area": "-".join(f"{x:g}" for x in group.scale),
            "colours": "/".join(f"{x:g}" for x in _colours(group)),
            "blur": f"{group.colors.blur:g}",
            "solarize": f"{group.colors.solarize:g}",
            "std-red": f"{spec.std[0]:g}",
        }
        for group in spec.groups
    ]
    assert spec.mean == (0.485, 0.456, 0.406) and spec.std[1:] == (0.224, 0.225)
    for group in spec.groups:
        photo = group.colors
        assert (photo.flip, photo.jitter, photo.gray, photo.blur_sigma) == (0.5, 0.8, 0.2, (0.1, 2.0))
        assert group.ratio == (3 / 4, 4 / 3)


def _colours(group: CropGroup) -> tuple[float, ...]:
    photo = group.colors
    return photo.brightness, photo.contrast, photo.saturation, photo.hue


# --- learning rates at the steps that the specifications name --------------------------------------------------


def rate(run: RunConfig, step: int, steps_per_epoch: int) -> float:
    return learning_rate(run.optimizer, step, steps_per_epoch, run.epochs)


def test_swav_warms_up_to_both_ends_inclusive_and_ends_above_its_final_rate():
    run, s = recipe("swav_imagenet_800ep"), 312
    assert rate(run, 0, s) == 0.3
    assert rate(run, 10 * s - 1, s) == rate(run, 10 * s, s) == 4.8
    assert 0.0048 < rate(run, 800 * s - 1, s) < 0.0048 * 1.001
    small = recipe("swav_imagenet_200ep_bs256")
    assert rate(small, 0, 5004) == 0.6 and 0.0006 < rate(small, 200 * 5004 - 1, 5004) < 0.000601


@pytest.mark.parametrize("name", ["jigclu_imagenet_200ep", "mejigclu_imagenet_200ep"])
def test_jigclu_halves_its_rate_in_the_middle_and_keeps_it_within_an_epoch(name: str):
    run, s = recipe(name), 5004
    assert rate(run, 0, s) == rate(run, s - 1, s) == 0.03 > rate(run, s, s)
    assert rate(run, 100 * s, s) == pytest.approx(0.015)
    assert rate(run, 200 * s - 1, s) < 1e-5


@pytest.mark.parametrize("name", ["coke_imagenet_1000ep_1x224", "coke_imagenet_800ep_multicrop"])
def test_coke_idles_for_an_epoch_and_has_its_full_rate_in_epoch_11(name: str):
    run, s = recipe(name), 1251
    assert rate(run, 0, s) == rate(run, s - 1, s) == 0
    assert rate(run, s, s) == pytest.approx(1.6 / (10 * s))
    assert rate(run, 11 * s - 1, s) < rate(run, 11 * s, s) == 1.6
    assert rate(run, run.epochs * s - 1, s) < 1e-6


def test_the_deit_recipe_has_both_ends_of_the_schedule_as_its_framework_scales_them_for_batch_256():
    run, s = recipe("swav_imagenet_deit_b_300ep"), 5004
    assert (rate(run, 0, s), rate(run, 15 * s, s)) == (1.25e-4, 2.5e-4)
    assert 5e-7 < rate(run, 300 * s - 1, s) < 5.001e-7


def test_smog_starts_at_a_hundredth():
    run, s = recipe("smog_imagenet_400ep"), 312
    assert (rate(run, 0, s), rate(run, 10 * s - 1, s)) == (0.01, 4.8)
