"""Segmentation: published settings step by step, one confusion matrix, predictions that other scorers can read."""

from __future__ import annotations

import csv
import io
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchmetrics.classification import MulticlassJaccardIndex

from tessella.data.masks.layouts import IGNORE, ArrayMasks, open_masks
from tessella.errors import UserError
from tessella.modules.backbone import BackboneConfig, build_backbone
from tessella.protocols.features import tensor_digests
from tessella.protocols.segmentation.batches import WholeImage
from tessella.protocols.segmentation.data import SegmentationData
from tessella.protocols.segmentation.networks import Segmenter, SharedDropout2d, dilate
from tessella.protocols.segmentation.predictions import prediction_name
from tessella.protocols.segmentation.protocol import build_segmenter, schedule, segmentation, update_rule
from tessella.protocols.segmentation.recipes import RECIPES, CropSpec, SegmentationConfig
from tessella.protocols.segmentation.scores import figures, intersection_over_union, interval, judge, predict
from tests.ranks import on_ranks

TINY = SegmentationConfig(
    channels=16,
    convs=1,
    concatenate=False,
    auxiliary=0.4,
    auxiliary_channels=8,
    crops=CropSpec(size=32, resize=None, scale=(0.8, 1.2), distort=False),
    lr=0.05,
    iterations=6,
    batch_size=4,
)


def resnet(name="resnet10", width=8, seed=0, **options):
    torch.manual_seed(seed)
    return build_backbone(BackboneConfig(name, width, **options))


def stripes(n=6, *, seed=0, height=40, width=48, ignore=True):
    """Vertical thirds whose colour says their class, and a strip that does not count."""
    random = np.random.default_rng(seed)
    masks = np.zeros((n, height, width), dtype=np.uint8)
    for mask in masks:
        first, second = np.sort(random.choice(np.arange(8, width - 8), 2, replace=False))
        mask[:, first:second], mask[:, second:] = 1, 2
    colours = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])
    images = (colours[masks] + random.normal(0, 15, (*masks.shape, 3))).clip(0, 255).astype(np.uint8)
    if ignore:
        masks[:, :3] = IGNORE
    return ArrayMasks(f"stripes {seed}", images, masks, ["red", "green", "blue"])


# Published settings


def test_every_recipe_has_its_published_settings():
    published = {  # head, lr, weight decay, optimiser, iterations, batch, crop, output stride, auxiliary
        "fcn-voc12": ("fcn", 0.01, 5e-4, "sgd", 20_000, 16, 512, 8, 0.4),
        "fcn-cityscapes": ("fcn", 0.01, 5e-4, "sgd", 40_000, 8, 769, 8, 0.4),
        "fcn-moco-voc12": ("fcn", 0.003, 1e-4, "sgd", 30_000, 16, 513, 16, 0.0),
        "fcn-moco-cityscapes": ("fcn", 0.01, 1e-4, "sgd", 90_000, 16, 769, 16, 0.0),
        "upernet-ade20k": ("upernet", 0.01, 5e-4, "sgd", 160_000, 16, 512, 32, 0.4),
        "upernet-ade20k-transformer": ("upernet", 6e-5, 0.01, "adamw", 160_000, 16, 512, 32, 0.4),
        "linear-ade20k": ("linear", 1e-3, 1e-3, "adamw", 40_000, 16, 512, 16, 0.0),
    }
    assert published.keys() == RECIPES.keys() - {"small"}
    for name, expected in published.items():
        c = RECIPES[name]
        found = (c.head, c.lr, c.weight_decay, c.optimizer, c.iterations, c.batch_size)
        assert (*found, c.crops.size, c.output_stride, c.auxiliary) == expected, name
        rule = update_rule(c)
        assert (rule.name, rule.momentum, rule.weight_decay) == (c.optimizer, 0.9, c.weight_decay)
    assert (RECIPES["fcn-cityscapes"].window, RECIPES["fcn-cityscapes"].window_stride) == (769, 513)
    assert (RECIPES["linear-ade20k"].window, RECIPES["linear-ade20k"].window_stride) == (512, 341)
    assert RECIPES["fcn-cityscapes"].crops.resize == (2049, 1025) and RECIPES["fcn-cityscapes"].align_corners


def stepwise(name):
    """The learning rate of every step of OpenMMLab's poly: each from the one before, as its scheduler computes it."""
    c = RECIPES[name]
    lr = c.lr
    for step in range(c.iterations):
        yield lr
        left = c.iterations - step
        lr = (lr - c.final_lr) * (1 - 1 / left) ** c.power + c.final_lr


def rates(name):
    config, factor = RECIPES[name], schedule(RECIPES[name]).factor
    return [config.lr * factor(step) for step in range(config.iterations)]


@pytest.mark.parametrize("name", ["fcn-voc12", "fcn-cityscapes", "upernet-ade20k"])
def test_poly_schedules_equal_the_recursive_scheduler_step_by_step(name):
    np.testing.assert_allclose(rates(name), list(stepwise(name)), rtol=1e-6)


def test_mocos_schedules_drop_at_seven_and_nine_tenths_step_by_step():
    for name, base, drops in (("voc12", 0.003, (21_000, 27_000)), ("cityscapes", 0.01, (63_000, 81_000))):
        found = rates(f"fcn-moco-{name}")
        steps = np.arange(len(found))
        expected = base * 0.1 ** ((steps >= drops[0]).astype(float) + (steps >= drops[1]))
        np.testing.assert_allclose(found, expected)


def test_warm_ups_rise_linearly_onto_the_schedule_step_by_step():
    transformer, linear = rates("upernet-ade20k-transformer"), rates("linear-ade20k")
    for step in range(0, 160_000, 7):
        warm = 1e-6 + (1 - 1e-6) * step / 1500 if step < 1500 else 1
        assert transformer[step] == pytest.approx(6e-5 * (1 - step / 160_000) * warm)
    for step in range(40_000):
        warm = 1e-6 + (1 - 1e-6) * step / 1500 if step < 1500 else 1
        assert linear[step] == pytest.approx(warm * 1e-3 * np.cos(np.pi * step / 80_000) ** 2)


# Networks


@pytest.mark.parametrize(("name", "stem"), [("resnet18", "imagenet"), ("resnet50", "imagenet"), ("resnet18", "small")])
@pytest.mark.parametrize("removed", [1, 2, 3])
def test_a_dilated_resnet_equals_the_given_one_at_the_pixels_that_its_strides_keep(name, stem, removed):
    net = resnet(name, stem=stem).eval()
    native = 32 if stem == "imagenet" else 8
    x = torch.randn(1, 3, 2 * native + 3, 3 * native - 5)
    fine = dilate(net, native // 2**removed)
    assert fine.state_dict().keys() == net.state_dict().keys()
    with torch.no_grad():
        expected, found = net.feature_map(x), fine.feature_map(x)
    assert found.shape[-1] == -(-x.shape[-1] * 2**removed // native)
    atol = 1e-5 * float(expected.abs().max())  # sums are taken in another order
    torch.testing.assert_close(found[..., :: 2**removed, :: 2**removed], expected, atol=atol, rtol=1e-4)


def test_dilating_leaves_the_given_network_alone_and_refuses_what_cannot_be():
    net = resnet()
    assert dilate(net, 8).feature_map(torch.zeros(1, 3, 64, 64)).shape[-1] == 8
    assert net.feature_map(torch.zeros(1, 3, 64, 64)).shape[-1] == 2
    assert dilate(resnet(stem="small"), 16).feature_map(torch.zeros(1, 3, 64, 64)).shape[-1] == 8  # as fine already
    for stride in (2, 12):
        with pytest.raises(UserError, match=r"use one of 32, 16, 8, 4"):
            dilate(net, stride)


@pytest.mark.parametrize("head", ["fcn", "upernet", "linear"])
@pytest.mark.parametrize("network", ["resnet10", "timm:vit_tiny_patch16_224", "timm:convnext_atto"])
def test_every_head_gives_scores_of_every_pixel_on_every_kind_of_backbone(head, network):
    width = 8 if network == "resnet10" else 64
    net = build_backbone(BackboneConfig(network, width))
    config = replace(TINY, head=head, channels=8)
    segmenter = build_segmenter(net, 5, config)
    x = torch.randn(2, 3, 50, 70)
    outputs = segmenter.train()(x)
    assert [tuple(y.shape) for y in outputs] == [(2, 5, 50, 70)] * (1 if head == "linear" else 2)
    sum(y.square().mean() for y in outputs).backward()
    learned = [name for name, p in segmenter.named_parameters() if p.grad is not None]
    heads = {name for name, _ in segmenter.named_parameters() if not name.startswith("backbone.")}
    assert heads <= set(learned)
    assert (head == "linear") == (not any(name.startswith("backbone.") for name in learned))
    assert [y.shape for y in segmenter.eval()(x)] == [(2, 5, 50, 70)]


def test_a_head_is_a_function_of_the_seed_and_leaves_torchs_own_generator_alone():
    net, state = resnet(), torch.get_rng_state()
    one, same, other = (build_segmenter(net, 3, replace(TINY, seed=seed)) for seed in (1, 1, 2))
    assert tensor_digests(one) == tensor_digests(same) != tensor_digests(other)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_best_class_does_not_depend_on_how_many_are_enlarged_at_a_time():
    segmenter = build_segmenter(resnet(), 40, TINY)
    scores = torch.randn(1, 40, 6, 7)
    whole = segmenter.enlarge(scores, (31, 29)).argmax(dim=1)[0]
    assert torch.equal(segmenter.best(scores, 31, 29), whole)


def test_dropout_drops_the_same_channels_of_an_image_at_the_same_step_only():
    dropout, x = SharedDropout2d(0.5), torch.ones(4, 50, 2, 2)
    first = dropout(x)
    assert torch.equal(first, dropout(x)) and set(first.unique().tolist()) == {0.0, 2.0}
    assert (first == first[..., :1, :1]).all()  # whole channels
    dropout.step = 1
    assert not torch.equal(first, dropout(x))
    assert torch.equal(dropout.eval()(x), x)


# Figures


class Fixed(Segmenter):
    """Gives every pixel the class that its red value names."""

    def __init__(self, classes):
        nn.Module.__init__(self)
        self.classes, self.align_corners, self.frozen = classes, False, False

    def forward(self, x):
        wanted = (x[:, 0] * 255 / 10).round().long()
        return [nn.functional.one_hot(wanted, self.classes).permute(0, 3, 1, 2).float()]


def coloured(masks, classes, wrong=0.0, name="coloured"):
    """Images that tell `Fixed` the class, or another one at a share of the pixels."""
    random = np.random.default_rng(1)
    told = np.where(random.random(masks.shape) < wrong, random.integers(0, classes, masks.shape), masks % 255)
    images = np.repeat((told * 10).astype(np.uint8)[..., None], 3, axis=-1)
    return ArrayMasks(name, images, masks, [f"class {i}" for i in range(classes)]), told


def plain(images, **options):
    return SegmentationData(images, images, workers=1, mean=(0, 0, 0), std=(1, 1, 1), **options)


WHOLE = SegmentationConfig(crops=CropSpec(resize=None))


def random_masks(n=5, classes=6, seed=0):
    masks = np.random.default_rng(seed).integers(0, classes - 1, (n, 12, 9), dtype=np.uint8)  # the last never occurs
    masks[:, 0] = IGNORE
    return masks


def test_a_perfect_prediction_scores_one_and_classes_that_are_not_there_do_not_count():
    images, _ = coloured(random_masks(), 6)
    found = judge(Fixed(6), plain(images), WHOLE)
    scores = figures(found, images.classes)
    assert scores["miou"] == scores["pixel_accuracy"] == scores["mean_accuracy"] == 1.0
    assert list(scores["per_class"]) == [f"class {i}" for i in range(5)]
    assert interval(found.per_image, 0) == [1.0, 1.0]


def test_figures_equal_a_pixel_by_pixel_count_over_the_whole_set():
    masks = random_masks(classes=6)
    images, told = coloured(masks, 6, wrong=0.4)
    scores = figures(judge(Fixed(6), plain(images), WHOLE), images.classes)
    counted = masks != IGNORE
    ious = []
    for label in range(6):
        true, predicted = (masks == label) & counted, (told == label) & counted
        if (true | predicted).any():
            ious.append((true & predicted).sum() / (true | predicted).sum())
            assert scores["per_class"][f"class {label}"] == pytest.approx(ious[-1])
    assert scores["miou"] == pytest.approx(np.mean(ious))
    assert scores["pixel_accuracy"] == pytest.approx((masks == told)[counted].mean())


def test_mean_iou_equals_torchmetrics_jaccard_index():
    masks = random_masks(classes=6)
    images, told = coloured(masks, 6, wrong=0.4)
    theirs = MulticlassJaccardIndex(6, ignore_index=IGNORE)(torch.tensor(told), torch.tensor(masks).long())
    ours = figures(judge(Fixed(6), plain(images), WHOLE), images.classes)["miou"]
    assert ours == pytest.approx(float(theirs), abs=1e-6)


def test_intersection_over_union_of_nothing_is_no_number():
    found = intersection_over_union(np.array([[1, 0, 0], [2, 0, 0], [2, 0, 3]]))
    assert found[0] == pytest.approx(1 / 3) and np.isnan(found[1]) and found[2] == 0


def test_the_interval_holds_the_figure_and_narrows_with_more_images():
    def width(n):
        images, _ = coloured(random_masks(n), 6, wrong=0.4)
        found = judge(Fixed(6), plain(images), WHOLE)
        low, high = interval(found.per_image, 0)
        assert low < figures(found, images.classes)["miou"] < high
        return high - low

    assert width(40) < width(6)


def test_windows_cover_every_pixel_and_overlaps_are_averaged():
    class Place(Fixed):
        """Both edges of each window vote for class 1, more than the rest votes for class 0."""

        def forward(self, x):
            scores = torch.zeros(1, 2, *x.shape[-2:])
            scores[:, 0] = 1.0
            scores[:, 1, :, [0, -1]] = 1.5
            return [scores]

    image = WholeImage(0, torch.zeros(1, 3, 10, 23), np.zeros((10, 23), np.uint8))
    found = predict(Place(2), image, window=10, stride=6)
    # Windows begin at 0, 6, 12 and 13; an edge inside lies in two of them, so that its vote is 0.75 against 1.
    assert found.sum(dim=0).nonzero()[:, 0].tolist() == [0, 22]
    assert torch.equal(predict(Place(2), image, window=100, stride=50), predict(Place(2), image))


# The whole protocol


@pytest.fixture(scope="module")
def shapes_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predictions")
    torch.manual_seed(0)
    net = resnet(width=8)
    before = tensor_digests(net)
    data = SegmentationData(stripes(8), stripes(5, seed=1), workers=1, predictions=folder)
    config = replace(TINY, lr=0.1, iterations=60, evaluations=2)
    return segmentation(net, data, config), data, folder / "segmentation", before == tensor_digests(net), net, config


def test_training_lowers_the_loss_learns_the_classes_and_leaves_the_backbone_as_it_was(shapes_run):
    scores, _, _, unchanged, _, _ = shapes_run
    assert unchanged
    assert np.mean(scores["loss"][-3:]) < 0.5 * scores["loss"][0]
    assert scores["miou"] > 0.5 and scores["miou_interval"][0] <= scores["miou"] <= scores["miou_interval"][1]
    assert scores["best_test_miou"] >= scores["miou"] and scores["best_test_iteration"] in (30, 60)
    assert scores["images"] == 5 and scores["skipped"] == 0 and scores["notes"] == []


def test_figures_can_be_counted_again_from_the_saved_masks(shapes_run):
    scores, data, folder, *_ = shapes_run
    classes = (folder / "classes.txt").read_text().splitlines()
    assert classes == ["red", "green", "blue"]
    confusion = np.zeros((3, 3), dtype=np.int64)
    for row, key in enumerate(data.test.keys):
        with Image.open(folder / f"{key}.png") as picture:
            assert picture.mode == "L"
            predicted = np.asarray(picture)
        for truth, found in zip(data.test.mask(row).ravel().tolist(), predicted.ravel().tolist(), strict=True):
            if truth != IGNORE:
                confusion[truth, found] += 1
    right = np.diag(confusion)
    ious = right / (confusion.sum(axis=0) + confusion.sum(axis=1) - right)
    assert scores["miou"] == pytest.approx(ious.mean())
    assert scores["per_class"] == pytest.approx(dict(zip(classes, ious, strict=True)))
    rows = list(csv.reader(io.StringIO((folder / "confusion.csv").read_text())))
    assert np.array([row[1:] for row in rows[1:]], dtype=np.int64).tolist() == confusion.tolist()
    assert len((folder / "files.csv").read_text().splitlines()) == 6


def test_a_second_run_gives_the_same_figures_whatever_torchs_generator_says(shapes_run):
    scores, data, _, _, net, config = shapes_run
    torch.manual_seed(99)
    again = segmentation(net, replace(data, predictions=None), config)
    assert again == scores


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "changes", [{"evaluations": 3, "auxiliary": 0.4, "dropout": 0.3}, {"head": "linear", "optimizer": "adamw"}]
)
def test_a_killed_training_goes_on_and_gives_bit_for_bit_the_same(tmp_path, monkeypatch, changes):
    monkeypatch.setattr(sys.modules["tessella.protocols.training"], "_SNAPSHOT_SECONDS", 0.0)
    module = sys.modules["tessella.protocols.training"]
    config = replace(TINY, **changes)
    straight = segmentation(resnet(), stripes_data(tmp_path / "straight"), config)
    update, steps = module._update, []

    def dies(*args):
        steps.append(1)
        if len(steps) == 5:
            raise Killed
        return update(*args)

    monkeypatch.setattr(module, "_update", dies)
    with pytest.raises(Killed):
        segmentation(resnet(), stripes_data(tmp_path / "killed"), config)
    assert len(list((tmp_path / "killed").rglob("*.safetensors"))) == 1
    steps.clear()
    assert segmentation(resnet(), stripes_data(tmp_path / "killed"), config) == straight
    assert len(steps) == 2  # of six
    files = [{p.relative_to(d): p.read_bytes() for p in d.rglob("*.*")} for d in sorted(tmp_path.iterdir())]
    assert files[0] == files[1] and not any("training" in str(name) for name in files[0])


def stripes_data(folder):
    return SegmentationData(stripes(), stripes(3, seed=1), workers=1, predictions=folder)


def test_the_linear_head_trains_nothing_of_the_backbone():
    net = resnet(width=8)
    before = tensor_digests(net)
    linear = replace(RECIPES["linear-ade20k"], crops=TINY.crops, window=32, window_stride=20, batch_size=4)
    linear = replace(linear, lr=0.05, warmup_iterations=0, iterations=20)
    scores = segmentation(net, SegmentationData(stripes(), stripes(seed=1), workers=1), linear)
    assert tensor_digests(net) == before
    assert scores["loss"][-1] < scores["loss"][0]


def test_a_transformer_is_trained_and_it_is_said_that_it_is_not_dilated():
    net = build_backbone(BackboneConfig("timm:vit_tiny_patch16_224"))
    config = replace(TINY, iterations=1, batch_size=2)
    scores = segmentation(net, SegmentationData(stripes(2), stripes(1, seed=1), workers=1), config)
    assert 0 <= scores["miou"] <= 1 and "not dilated" in scores["notes"][0]


def test_unreadable_test_images_are_left_out_and_named():
    from tessella.data.decode import Unreadable

    test = stripes(3, seed=1)
    read = test.image

    def image(row):
        if row == 1:
            raise Unreadable("a hole in it")
        return read(row)

    test.image = image
    lost = stripes(3, seed=1)
    lost.image = lambda row: image(1)
    config = replace(TINY, iterations=1)
    scores = segmentation(resnet(), SegmentationData(stripes(), test, workers=1), config)
    assert scores["images"] == 2 and scores["skipped"] == 1 and "a hole in it" in scores["notes"][0]
    with pytest.raises(UserError, match=r"none of the labelled images.*a hole in it"):
        segmentation(resnet(), SegmentationData(stripes(), lost, workers=1), config)


def test_masks_that_teach_nothing_are_refused_before_training():
    images = np.zeros((4, 8, 8, 3), np.uint8)
    objects = np.zeros((4, 8, 8), np.uint8)
    objects[:, :4] = 255
    only = ArrayMasks("only", images, objects, ["background", "object"])
    with pytest.raises(UserError, match=r"only the class 0, and 255 means.*store 1 instead"):
        SegmentationData(only, only, workers=1).survey()
    blank = ArrayMasks("blank", images, np.full((4, 8, 8), IGNORE, np.uint8), ["red", "green", "blue"])
    with pytest.raises(UserError, match="blank has no labelled pixel"):
        SegmentationData(stripes(), blank, workers=1).survey()


def test_train_and_test_must_mean_the_same_classes_and_unnamed_ones_are_counted():
    other = stripes()
    other.classes = ["red", "blue", "green"]
    with pytest.raises(UserError, match="the same classes, in the same order"):
        SegmentationData(stripes(), other)
    unnamed, more = stripes(), stripes(seed=1)
    unnamed.classes = more.classes = None
    assert SegmentationData(unnamed, more, workers=1).survey().classes == ["0", "1", "2"]


def test_the_same_images_for_both_are_allowed_and_said():
    images = stripes()
    scores = segmentation(resnet(), SegmentationData(images, images, workers=1), replace(TINY, iterations=1))
    assert "remembered" in scores["notes"][0]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"window": 32, "window_stride": 0}, "window_stride=0"),
        ({"evaluations": 7}, "evaluations=7"),
        ({"batch_size": 64}, "batch_size=64"),
        ({"lr": 1e12}, "training loss became"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, problem):
    with pytest.raises(UserError, match=problem):
        segmentation(resnet(), SegmentationData(stripes(), stripes(seed=1), workers=1), replace(TINY, **change))


# File names


def test_predictions_keep_names_that_are_safe_and_never_leave_their_folder():
    assert prediction_name("0016E5_07959") == "0016E5_07959.png"
    assert prediction_name("city/été 1.b") == "city/été 1.b.png"
    keys = [
        "../../x",
        "/etc/x",
        "a/./b",
        "a/../b",
        "a//b",
        "x:y",
        "x%3Ay",
        "x\ny",
        "x\udcff",
        "y" * 300,
        "y" * 301,
        ".",
        "-x",
        "%2Dx",
        "=1+1",
        " x",
    ]
    names = [prediction_name(key) for key in keys]
    assert len(set(names)) == len(keys)
    for name in names:
        path = Path("/out") / name
        assert path.resolve().is_relative_to("/out") and path.parent.resolve() == Path("/out") / Path(name).parent
        assert all(0 < len(part.encode()) < 255 for part in name.split("/"))
        assert name[0] not in "=+-@' "  # neither an option of a shell nor a formula of a spreadsheet


# Ranks


def work_of_this_rank(folder):
    config = replace(TINY, iterations=3, head="upernet")
    data = SegmentationData(stripes(5), stripes(3, seed=1), workers=1, predictions=Path(folder))
    scores = segmentation(resnet(), data, config)
    wrong = stripes(5)
    wrong._masks[1, 0, 0] = 9  # rank 1's
    with pytest.raises(UserError, match="value 9"):  # every rank hears of it, or the others would wait for ever
        SegmentationData(wrong, stripes(3, seed=1), workers=1).survey()
    return {name: scores[name] for name in ("loss", "miou", "images", "miou_interval")}


def test_two_ranks_give_the_figures_and_masks_of_one_and_hear_of_each_others_problems(tmp_path):
    alone = work_of_this_rank(tmp_path / "one")
    for rank in on_ranks(2, work_of_this_rank, str(tmp_path / "two")):
        assert rank["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        assert rank["miou"] == pytest.approx(alone["miou"], abs=2e-3)
        assert rank["miou_interval"] == pytest.approx(alone["miou_interval"], abs=5e-3)
        assert rank["images"] == alone["images"] == 3
    names = [sorted(path.name for path in (tmp_path / n / "segmentation").iterdir()) for n in ("one", "two")]
    assert names[0] == names[1] and len(names[0]) == 6


# Real and generated data, minutes


@pytest.mark.slow
def test_drawn_shapes_are_segmented_well_within_minutes():
    data = SegmentationData(open_masks("shapes"), open_masks("shapes", "test"), workers=1)
    scores = segmentation(resnet("resnet18", 16), data, RECIPES["small"])
    assert scores["miou"] >= 0.6 and scores["loss"][-1] < 0.3 * scores["loss"][0]


@pytest.mark.slow
def test_camvid_is_learned(shared_data):
    train, test = (open_masks(f"{shared_data}/camvid.tar::camvid", split) for split in ("train", "test"))
    scores = segmentation(resnet("resnet18", 16), SegmentationData(train, test, workers=1), RECIPES["small"])
    assert scores["loss"][-1] < 0.5 * scores["loss"][0] and scores["miou"] > 0.2
