"""Detection: published settings step by step, the same figures from another scorer, from one rank and from two."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import replace
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn

from tessella.data.boxes.generated import annotated_scenes
from tessella.data.boxes.outlines import fold, unfold
from tessella.data.decode import Unreadable
from tessella.errors import UserError
from tessella.modules.backbone import BackboneConfig, build_backbone
from tessella.protocols.detection.batches import DetectionBatch, Stream, batches, resized
from tessella.protocols.detection.data import DetectionData
from tessella.protocols.detection.networks import RoiAlign, SeededSampler, build_detector
from tessella.protocols.detection.predictions import paste
from tessella.protocols.detection.protocol import build_optimizer, detection, renew_statistics, schedule
from tessella.protocols.detection.recipes import RECIPES, DetectionConfig
from tessella.protocols.detection.scores import average_precision
from tessella.protocols.features import tensor_digests
from tessella.ranges import check_ranges
from tests.ranks import on_ranks

TINY = replace(
    RECIPES["small"],
    channels=8,
    fc_dim=16,
    train_sizes=(64,),
    test_size=64,
    longest=96,
    batch_size=4,
    iterations=3,
    steps=(2,),
    precise_bn=1,
    box_samples=16,
    score_threshold=0.01,
)


def tiny_backbone(seed=0):
    torch.manual_seed(seed)
    return build_backbone(BackboneConfig("resnet10", width=8))


def scenes(train=12, test=5, **options):
    rows = np.arange(train + test)
    return DetectionData(
        annotated_scenes("train", rows[:train]), annotated_scenes("test", rows[train:]), workers=1, **options
    )


def scored_by_hand(folder, kind, file):
    """AP by a program that knows nothing but the saved files."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "ground_truth.json"))
        scorer = COCOeval(truth, truth.loadRes(str(folder / file)), kind)
        scorer.evaluate(), scorer.accumulate(), scorer.summarize()
    return scorer.stats


# --- Published settings


@pytest.mark.parametrize(
    ("name", "batch", "lr", "drops", "end", "warmup", "first"),
    [
        ("jigclu", 8, 0.01, (120_000, 160_000), 180_000, 1000, 1e-5),
        ("mejigclu", 8, 0.01, (120_000, 160_000), 180_000, 1000, 1e-5),
        ("jigclu-voc", 8, 0.01, (18_000, 22_000), 24_000, 100, 1e-5),
        ("moco-fpn", 16, 0.02, (60_000, 80_000), 90_000, 1000, 2e-5),
        ("moco-c4", 16, 0.02, (60_000, 80_000), 90_000, 1000, 2e-5),
        ("moco-c4-2x", 16, 0.02, (120_000, 160_000), 180_000, 1000, 2e-5),
        ("voc-c4", 16, 0.02, (18_000, 22_000), 24_000, 100, 2e-5),
        ("voc-c4-swav", 16, 0.1, (18_000, 22_000), 24_000, 1000, 0.1 / 3),
        ("swav-fpn", 16, 0.1, (60_000, 80_000), 90_000, 1000, 1e-4),
    ],
)
def test_published_learning_rates_step_by_step(name, batch, lr, drops, end, warmup, first):
    config = RECIPES[name]
    rates = [config.lr * schedule(config).factor(step) for step in range(config.iterations)]
    assert (config.recipe, config.batch_size, len(rates)) == (name, batch, end)
    assert rates[0] == pytest.approx(first)
    for step in range(0, warmup, max(1, warmup // 50)):
        assert rates[step] == pytest.approx(first + (lr - first) * step / warmup)
    changes = [warmup, drops[0] - 1, drops[0], drops[1] - 1, drops[1], end - 1]
    wanted = [lr, lr, lr / 10, lr / 10, lr / 100, lr / 100]
    assert [rates[step] for step in changes] == pytest.approx(wanted)


def test_published_detectors_have_the_published_parts():
    jigclu, fpn, c4, voc = (RECIPES[name] for name in ("jigclu", "moco-fpn", "moco-c4", "voc-c4"))
    assert not jigclu.masks and (jigclu.box_head, fpn.box_head) == ("4conv1fc", "2fc")
    assert (jigclu.pre_nms, jigclu.post_nms) == ((2000, 6000), (1000, 1000))
    assert (fpn.pre_nms, fpn.post_nms) == ((2000, 1000), (1000, 1000))
    assert (c4.pre_nms, c4.post_nms) == ((12_000, 6000), (2000, 1000))
    assert fpn.masks and c4.masks and not voc.masks
    assert jigclu.train_sizes == tuple(range(640, 801, 32)) and voc.train_sizes == tuple(range(480, 801, 32))
    for config in (jigclu, fpn, c4, voc):
        assert (config.test_size, config.longest, config.momentum, config.weight_decay) == (800, 1333, 0.9, 1e-4)
        assert (config.rpn_samples, config.box_samples, config.precise_bn, config.detections) == (256, 512, 200, 100)
        assert not config.keep_empty and config.optimizer == "sgd"


def test_every_layer_is_trained_and_norms_are_not_decayed():
    detector = build_detector(tiny_backbone(), 3, DetectionConfig(channels=8, fc_dim=16))
    optimizer = build_optimizer(detector, RECIPES["jigclu"])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(detector.parameters()))
    assert all(p.requires_grad for p in detector.parameters())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 0.0]
    assert all(group["momentum"] == 0.9 for group in optimizer.param_groups)
    spared = {id(p) for p in optimizer.param_groups[1]["params"]}
    for module in detector.modules():
        for p in module.parameters(recurse=False):
            assert (id(p) in spared) == isinstance(module, nn.BatchNorm2d)


def test_the_pyramid_detector_has_one_proposal_convolution_four_box_convolutions_and_norm_everywhere():
    detector = build_detector(tiny_backbone(), 3, DetectionConfig(channels=8, fc_dim=16, masks=True))
    head = [type(layer).__name__ for layer in detector.heads.box_head.modules() if not list(layer.children())]
    assert head == ["Conv2d", "BatchNorm2d", "ReLU"] * 4 + ["Flatten", "Linear", "ReLU"]
    assert (
        sum(isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3) for layer in detector.rpn.head.modules()) == 1
    )
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in detector.trunk.fpn.modules()) == 8
    assert [sizes[0] for sizes in detector.rpn.anchor_generator.sizes] == [32, 64, 128, 256, 512]
    assert detector.divisor == 64


def test_the_c4_detector_moves_the_last_stage_behind_the_regions():
    backbone = tiny_backbone()
    detector = build_detector(backbone, 3, DetectionConfig(neck="c4", masks=True, channels=8))
    assert detector.rpn.anchor_generator.sizes == ((32, 64, 128, 256, 512),)
    keys = [name for name, _ in detector.named_parameters() if "layer4" in name]
    assert not keys and torch.equal(detector.heads.box_head.stage[0].conv1.weight, backbone.layer4[0].conv1.weight)
    assert isinstance(detector.heads.box_head.norm, nn.BatchNorm2d)
    with pytest.raises(UserError, match="ResNet"):
        build_detector(build_backbone(BackboneConfig("timm:convnext_atto")), 3, DetectionConfig(neck="c4"))


def test_a_transformer_gets_a_pyramid_of_its_one_scale():
    detector = build_detector(
        build_backbone(BackboneConfig("timm:vit_tiny_patch16_224")), 3, DetectionConfig(channels=8)
    )
    maps = detector.trunk(torch.zeros(1, 3, 64, 128))
    assert [tuple(x.shape[1:]) for x in maps.values()] == [(8, 16, 32), (8, 8, 16), (8, 4, 8), (8, 2, 4), (8, 1, 2)]


def test_stage_maps_go_from_fine_to_coarse_and_end_in_the_feature_map():
    x = torch.randn(1, 3, 64, 96)
    for name in ("resnet10", "timm:convnext_atto"):
        backbone = build_backbone(BackboneConfig(name)).eval()
        maps = backbone.stage_maps(x)
        assert [tuple(m.shape[2:]) for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
        if name == "resnet10":
            assert torch.equal(maps[-1], backbone.feature_map(x)) and torch.equal(
                backbone.stage_maps(x, 2)[-1], maps[1]
            )


def test_a_backbone_without_maps_is_refused():
    with pytest.raises(UserError, match="feature maps"):
        build_detector(nn.Linear(1, 1), 3, DetectionConfig())


# --- Parts


def test_the_shorter_side_is_resized_unless_the_longer_one_would_be_too_long():
    assert resized((640, 480), 800, 1333) == (800, 1067)
    assert resized((2000, 500), 800, 1333) == (333, 1333)
    assert resized((1, 900), 64, 96) == (96, 1)


def test_regions_are_pooled_from_the_level_of_their_size():
    maps = {str(i): torch.full((1, 1, 256 >> i, 256 >> i), float(i)) for i in range(4)}
    pool = RoiAlign(2, [4, 8, 16, 32], 8.0)
    boxes = torch.tensor([[0.0, 0, side, side] for side in (10, 111, 112, 223, 224, 447, 448, 900)])
    found = pool(maps, [boxes], [(1024, 1024)])[:, 0, 0, 0]
    assert found.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_drawn_anchors_depend_on_their_image_alone_and_keep_their_share():
    labels = [torch.tensor([1.0] * 30 + [0.0] * 100 + [-1.0] * 20), torch.tensor([1.0] * 3 + [0.0] * 10)]
    sampler = SeededSampler(40, 0.5, stream=1)
    sampler.begin([7, 8])
    positive, negative = sampler(labels)
    assert [int(mask.sum()) for mask in (*positive, *negative)] == [20, 3, 20, 10]
    assert not (positive[0].bool() & (labels[0] < 1)).any() and not (negative[0].bool() & (labels[0] != 0)).any()
    sampler.begin([8, 7])
    again, _ = sampler(labels[::-1])
    assert torch.equal(again[1], positive[0])


def test_every_image_is_seen_once_an_epoch_by_one_rank_and_batches_cross_epochs():
    data = annotated_scenes("train", np.arange(7))
    stream = Stream(data, data.with_objects(), (64, 80), 96, 0.5, seed=1)
    seen = [sample.position for step in range(7) for sample in stream.batch(step, 2)]
    assert sorted(seen[:7]) == sorted(seen[7:]) == list(range(7)) and seen[:7] != seen[7:]
    whole = [mine for _, mine in islice(stream.plans(2, 4), 3)]
    halves = [list(islice(stream.plans(2, 4, rank, 2), 3)) for rank in (0, 1)]
    assert [one[1] + other[1] for one, other in zip(*halves, strict=True)] == whole
    assert {sample.height for mine in whole for sample in mine} == {64, 80}
    assert {sample.mirror for mine in whole for sample in mine} == {False, True}


def test_boxes_and_masks_follow_the_pixels_when_mirrored_and_resized():
    data = annotated_scenes("train", np.arange(4))
    stream = Stream(data, data.with_objects(), (256,), 256, mirror=1.0, seed=0)
    whole = DetectionData(data, data, mean=(0, 0, 0), std=(1, 1, 1), workers=1)
    (batch,) = batches(data, islice(stream.plans(0, 4), 1), whole, divisor=96, masks=True, skipped={})
    assert batch.pixels.shape == (4, 3, 288, 288) and not batch.pixels[:, :, 256:].any()
    for sample, pixels, target in zip(batch.samples, batch.pixels, batch.targets, strict=True):
        assert sample.mirror and (sample.height, sample.width) == (256, 256)
        original = data.images.image(int(data.rows[sample.position]))[:, ::-1].astype(np.float32) / 255
        shown = nn.functional.avg_pool2d(pixels[:, :256, :256], 2).permute(1, 2, 0).numpy()
        assert np.abs(shown - original).mean() < 0.02
        _, labels, outlines = data.objects(sample.position)
        assert target["labels"].tolist() == (labels + 1).tolist()
        for box, mask, outline in zip(target["boxes"], target["masks"], outlines, strict=True):
            ys, xs = mask.nonzero().unbind(1)
            drawn = [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]
            assert np.abs(box.numpy() - drawn).max() <= 1
            np.testing.assert_array_equal(mask[::2, ::2], unfold(outline, 128, 128)[:, ::-1])


def test_renewed_statistics_are_those_of_all_batches_together():
    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(2)

        def forward(self, x, sizes, targets):
            return self.norm(x), []

    torch.manual_seed(0)
    net, x = Watched(), torch.randn(6, 4, 2, 30, 30) * 3 + torch.randn(6, 1, 2, 1, 1)
    renew_statistics(net, (DetectionBatch(part, [], [], [], []) for part in x))
    everything = x.permute(2, 0, 1, 3, 4).flatten(1)
    torch.testing.assert_close(net.norm.running_mean, everything.mean(dim=1))
    torch.testing.assert_close(net.norm.running_var, everything.var(dim=1), rtol=1e-3, atol=0)
    assert net.norm.momentum == 0.1


def test_a_pasted_mask_fills_its_box_and_nothing_else():
    whole = paste(torch.ones(28, 28), torch.tensor([10.0, 5.0, 30.0, 25.0]), 40, 50)
    assert whole.shape == (40, 50) and whole[5:25, 10:30].all() and whole.sum() == 400
    half = torch.zeros(28, 28)
    half[:, 14:] = 1
    assert paste(half, torch.tensor([-10.0, 0.0, 10.0, 8.0]), 8, 12).sum() == 80  # the right half is inside the image
    for box in ([3.0, 3, 3, 9], [60, 60, 70, 70], [-9, -9, -1, -1]):
        assert not paste(torch.ones(28, 28), torch.tensor(box, dtype=torch.float32), 40, 50).any()


# --- Scores


def test_perfect_detections_score_one_and_none_score_zero():
    from pycocotools import mask as coder

    data = annotated_scenes("scenes", np.arange(6))
    truth = data.truth(range(6), masks=True)
    names = ("image_id", "category_id", "bbox", "segmentation")
    perfect = [{name: a[name] for name in names} | {"score": 1.0} for a in truth["annotations"]]
    figures, per_class = average_precision(truth, perfect, "bbox")
    assert figures["ap"] == pytest.approx(1) and set(per_class) <= set(data.classes)
    encode = partial(coder.frPyObjects, h=128, w=128)
    masks = [{name: entry[name] for name in entry if name != "bbox"} for entry in perfect]
    masks = [entry | {"segmentation": encode(entry["segmentation"])} for entry in masks]
    assert average_precision(truth, masks, "segm")[0]["ap"] == pytest.approx(1)
    assert average_precision(truth, [], "bbox")[0]["ap"] == 0
    assert perfect[0].keys() == {*names, "score"}  # the scorer's own fields stay out of it


def test_a_detection_inside_a_crowd_is_neither_right_nor_wrong():
    data = annotated_scenes("scenes", np.arange(6))
    table = data.table
    crowd = np.zeros(len(table.ids), dtype=bool)
    crowd[0] = True
    data.table = table._replace(crowd=crowd)
    truth = data.truth(range(6))
    assert [a["iscrowd"] for a in truth["annotations"]].count(1) == 1
    perfect = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 1.0}
        for a in truth["annotations"]
    ]
    assert average_precision(truth, perfect, "bbox")[0]["ap"] == pytest.approx(1)


# --- The protocol


@pytest.mark.parametrize("changes", [{"masks": True}, {"neck": "c4", "masks": True}])
def test_the_figures_equal_another_scorers_on_the_saved_detections_and_the_backbone_stays(tmp_path, changes):
    backbone = tiny_backbone()
    before = tensor_digests(backbone)
    scores = detection(backbone, scenes(predictions=tmp_path), replace(TINY, **changes))
    assert tensor_digests(backbone) == before and backbone.training
    for name, kind, file in (("box", "bbox", "detections.json"), ("mask", "segm", "masks.json")):
        stats = scored_by_hand(tmp_path, kind, file)
        figures = {"ap": 0, "ap50": 1, "ap75": 2, "ar100": 8}
        assert {figure: scores[f"{name}_{figure}"] for figure in figures} == {
            figure: stats[i] for figure, i in figures.items()
        }
        assert 0 < scores[f"{name}_ar100"] < 1
    assert scores["images"] == 5 and json.loads(json.dumps(scores, allow_nan=False)) == scores


def test_the_same_seed_gives_the_same_detector_and_another_seed_another():
    one, again, other = (detection(tiny_backbone(), scenes(6, 2), replace(TINY, seed=seed)) for seed in (0, 0, 1))
    assert one == again and one["loss"] != other["loss"]


class Killed(Exception):
    pass


@pytest.mark.parametrize("changes", [{"masks": True}, {"optimizer": "sgd", "lr": 0.02}])
def test_a_killed_training_goes_on_and_detects_bit_for_bit_the_same(tmp_path, monkeypatch, changes):
    monkeypatch.setattr(sys.modules["tessella.protocols.training"], "_SNAPSHOT_SECONDS", 0.0)
    module = sys.modules["tessella.protocols.training"]
    config = replace(TINY, iterations=6, steps=(4,), **changes)
    straight = detection(tiny_backbone(), scenes(10, 3, predictions=tmp_path / "straight"), config)
    update, steps = module._update, []

    def dies(*args):
        steps.append(1)
        if len(steps) == 4:
            raise Killed
        return update(*args)

    monkeypatch.setattr(module, "_update", dies)
    killed = scenes(10, 3, predictions=tmp_path / "killed")
    with pytest.raises(Killed):
        detection(tiny_backbone(), killed, config)
    monkeypatch.setattr(module, "_update", lambda *args: steps.append(1) or update(*args))
    steps.clear()
    detection(tiny_backbone(), killed, replace(config, seed=1))  # another question finds nothing to go on from
    assert len(steps) == 6
    steps.clear()
    torch.manual_seed(99)
    assert detection(tiny_backbone(), killed, config) == straight
    assert len(steps) == 3
    files = sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "straight").iterdir())
    for name in files:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_a_training_that_was_killed_in_the_test_is_not_trained_again(tmp_path, monkeypatch):
    module = sys.modules["tessella.protocols.detection.scores"]
    detect = module.detect
    monkeypatch.setattr(module, "detect", lambda *args: (_ for _ in ()).throw(Killed))
    data = scenes(6, 2, predictions=tmp_path)
    with pytest.raises(Killed):
        detection(tiny_backbone(), data, TINY)
    monkeypatch.setattr(module, "detect", detect)
    training = sys.modules["tessella.protocols.training"]
    monkeypatch.setattr(training, "_update", lambda *args: pytest.fail("trained again"))
    assert detection(tiny_backbone(), data, TINY)["images"] == 2


def figures_of_this_rank():
    scores = detection(tiny_backbone(), scenes(10, 5), replace(TINY, masks=True))
    return scores["loss"] | {"images": scores["images"], "box_ar100": scores["box_ar100"]}


def test_two_ranks_learn_what_one_does_and_see_each_test_image_once():
    alone = figures_of_this_rank()
    for rank in on_ranks(2, figures_of_this_rank):
        assert rank["images"] == 5
        assert rank["first"] == pytest.approx(alone["first"], rel=1e-5)
        assert rank["last"] == pytest.approx(alone["last"], rel=1e-2)


def test_the_loss_falls_in_a_few_steps():
    config = replace(TINY, iterations=24, steps=(), batch_size=4, precise_bn=0, warmup_iterations=4)
    loss = detection(tiny_backbone(), scenes(8, 1), config)["loss"]
    assert loss["last"] < 0.85 * loss["first"]


def test_masks_are_refused_where_objects_have_none():
    data = scenes(6, 2)
    data.train.table = data.train.table._replace(outlines=[None, *data.train.table.outlines[1:]])
    with pytest.raises(UserError, match=r"train: 1 of \d+ objects have no mask"):
        detection(tiny_backbone(), data, replace(TINY, masks=True))
    detection(tiny_backbone(), data, replace(TINY, iterations=1))


def test_what_cannot_be_trained_or_scored_is_refused():
    data = scenes(6, 2)
    everything = np.ones(len(data.test.table.ids), dtype=bool)
    data.test.table = data.test.table._replace(crowd=everything)
    with pytest.raises(UserError, match="no object to find"):
        detection(tiny_backbone(), data, TINY)
    data.train.table = data.train.table._replace(boxes=data.train.table.boxes * [1, 1, 0, 1])
    with pytest.raises(UserError, match="no training image has an object"):
        detection(tiny_backbone(), data, TINY)
    with pytest.raises(UserError, match="loss became"):
        detection(tiny_backbone(), scenes(6, 2), replace(TINY, lr=1e30, warmup_iterations=0, iterations=6))
    with pytest.raises(UserError, match=r"lr=-1\.0 must be"):
        check_ranges(DetectionConfig(lr=-1.0))


def test_damaged_images_and_images_without_objects_are_told_and_do_no_harm():
    data = scenes(8, 4)
    for part, row in ((data.train, 2), (data.test, 1)):
        image = part.images.image

        def read(wanted, image=image, row=row):
            if wanted == row:
                raise Unreadable("a hole in it")
            return image(wanted)

        part.images.image = read
    boxes = data.train.table.boxes.copy()
    boxes[: data.train.table.first[1], 2] = 0  # the first image keeps nothing
    data.train.table = data.train.table._replace(boxes=boxes)
    for keep in (False, True):
        scores = detection(tiny_backbone(), data, replace(TINY, masks=True, keep_empty=keep))
        notes = " ".join(scores["notes"])
        assert scores["images"] == 3 and "1 test images could not be decoded" in notes
        assert "1 training images could not be decoded" in notes and "without an area" in notes
        assert ("1 of 8 images without objects are left out" in notes) != keep


def test_classes_that_only_one_split_knows_are_told_and_scored_honestly(tmp_path):
    data = scenes(8, 4, predictions=tmp_path)
    data.test.classes, data.test.category_ids = ["square", "lion", "circle"], [40, 2, 9]
    scores = detection(tiny_backbone(), data, TINY)
    assert data.classes == ["circle", "square", "triangle", "lion"]
    assert any("lion" in note for note in scores["notes"]) and scores["box_per_class"].keys() == {
        "square",
        "lion",
        "circle",
    }
    found = json.loads((tmp_path / "detections.json").read_text())
    assert found and {entry["category_id"] for entry in found} == {40, 2, 9}


def test_objects_that_cannot_be_learned_or_found_are_told():
    data = scenes(8, 4)
    table = data.train.table
    square = data.train.classes.index("square")
    data.train.table = table._replace(crowd=table.labels == square)  # the class has a name, and nothing to learn from
    boxes = data.test.table.boxes.copy()
    boxes[:2, 2] = 0
    data.test.table = data.test.table._replace(boxes=boxes)
    notes = detection(tiny_backbone(), data, replace(TINY, iterations=1))["notes"]
    assert "1 classes of the test images have no training object: square" in notes
    assert "2 objects of the test images have boxes without an area, which count as missed" in notes


def test_a_backbone_for_small_images_is_told_to_be_slow_and_refused_on_large_ones(capsys):
    backbone = build_backbone(BackboneConfig("resnet10", width=8, stem="small"))
    scores = detection(backbone, scenes(6, 2), replace(TINY, iterations=1))
    assert "16 times the usual positions" in scores["notes"][-1] and scores["notes"][-1] in capsys.readouterr().err
    large = {"train_sizes": (800,), "test_size": 800, "longest": 1333}
    for neck in ("fpn", "c4"):
        with pytest.raises(UserError, match=r"too many for images of 800 x 1333 pixels.*--backbone.stem imagenet"):
            detection(backbone, scenes(6, 2), replace(TINY, neck=neck, **large))


def test_a_mask_of_runs_survives_the_way_through_the_truth():
    data = annotated_scenes("scenes", np.arange(2))
    annotation = data.truth([0], masks=True)["annotations"][0]
    runs = np.array(annotation["segmentation"]["counts"])
    np.testing.assert_array_equal(fold(unfold(runs, 128, 128)), runs)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_generated_shapes_reach_fifty_box_ap_from_scratch():
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig("resnet18", width=32))
    data = DetectionData(annotated_scenes("train", np.arange(400)), annotated_scenes("test", np.arange(400, 500)))
    assert detection(backbone, data, RECIPES["small"])["box_ap"] >= 0.5


def test_the_published_pyramid_of_swav_has_no_norm():
    for name, expected in (("swav-fpn", False), ("moco-fpn", True)):
        detector = build_detector(build_backbone(BackboneConfig("resnet18", width=8)), 3, RECIPES[name])
        norms = [module for module in detector.trunk.fpn.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        assert bool(norms) == expected, name
