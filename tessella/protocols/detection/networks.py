"""Faster R-CNN and Mask R-CNN on our backbones, from torchvision's detection parts, with detectron2's details.

    fpn   stage maps -> feature pyramid -> region proposals -> regions from all levels -> box head [, mask head]
    c4    the first three stages -> region proposals -> regions -> fourth stage + batch norm -> boxes [, masks]

A plain transformer has maps of one scale only: a simple pyramid makes four of its last map. Regions are aligned (half a
pixel, adaptive sampling), losses are L1 and divided as in detectron2. Randomness (which anchors and regions are trained
on) comes from a seed per image, and sums are divided by the counts of all ranks, so several ranks learn what one does:
the losses of the ranks add up.

What differs from detectron2: anchors are rounded to whole pixels, and targets of masks are sampled from painted masks,
not from polygons.

Sources: Ren et al., "Faster R-CNN", 2015; He et al., "Mask R-CNN", 2017; Lin et al., "Feature pyramid networks for
object detection", 2017; Li et al., "Exploring plain vision transformer backbones for object detection", 2022.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from tessella import dist
from tessella.errors import UserError
from tessella.modules.resnet import ResNet
from tessella.protocols.dense import stage_shapes
from tessella.protocols.detection.recipes import DetectionConfig

_FPN_BOX_SIDE, _FPN_MASK_SIDE, _C4_SIDE = 7, 14, 14  # positions along a region


class Detector(nn.Module):
    """Maps -> proposals -> boxes and masks.

    Attributes:
        divisor: sides of a batch of images must be multiples of it.
        finest: stride of the backbone's first map, 4 for a usual one.
    """

    def __init__(self, trunk: nn.Module, rpn: RegionProposals, heads: RegionHeads, divisor: int, finest: int) -> None:
        super().__init__()
        self.trunk, self.rpn, self.heads, self.divisor, self.finest = trunk, rpn, heads, divisor, finest

    def forward(
        self, images: Tensor, sizes: list[tuple[int, int]], targets: list[dict[str, Any]] | None = None
    ) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """Losses in training mode, else detections.

        Args:
            images: (b, 3, h, w) normalised, zero beyond each image's own size.
            sizes: height and width of each image within.
            targets: in training, per image: boxes (n, 4) corners in pixels, labels (n,) int64 from 1, seed (an int),
                and masks (n, h, w) uint8 for a detector of masks.

        Returns:
            Losses by name and []; or {} and, per image, boxes (n, 4), labels (n,) from 1, scores (n,) and masks
            (n, 1, 28, 28) (14 for c4), shares in [0, 1] of the box.
        """
        if targets is not None:
            seeds = [int(target["seed"]) for target in targets]
            self.rpn.fg_bg_sampler.begin(seeds)
            self.heads.fg_bg_sampler.begin(seeds)
        maps = self.trunk(images)
        proposals, rpn_losses = self.rpn(ImageList(images, sizes), maps, targets)
        detections, head_losses = self.heads(maps, proposals, sizes, targets)
        return rpn_losses | head_losses, detections


def build_detector(backbone: nn.Module, classes: int, config: DetectionConfig) -> Detector:
    """A detector of `classes` without the background, around a copy of the backbone.

    The backbone has `stage_maps`; for c4, it is one of our ResNets. New weights come from torch's global generator.

    Raises:
        UserError: the backbone has no maps of inner stages, or not the stages that c4 needs.
    """
    build = _c4_detector if config.neck == "c4" else _pyramid_detector
    return build(copy.deepcopy(backbone).cpu(), classes, config)


def _pyramid_detector(backbone: nn.Module, classes: int, config: DetectionConfig) -> Detector:
    channels, strides = stage_shapes(backbone)
    if len(set(strides)) == 1:
        trunk: nn.Module = SimplePyramid(backbone, channels[-1], config.channels)
        strides = [strides[0] // 4, strides[0] // 2, strides[0], 2 * strides[0]]
    else:
        trunk = Pyramid(backbone, channels, config.channels, norm=config.fpn_norm)
    all_strides = [*strides, 2 * strides[-1]]  # and the level above, for proposals only
    rpn = _proposals(config.channels, [(stride * config.anchor_scale,) for stride in all_strides], config)
    box_pool = RoiAlign(_FPN_BOX_SIDE, strides, config.anchor_scale)
    convolutions, connected = (4, 1) if config.box_head == "4conv1fc" else (0, 2)
    head = FastRCNNConvFCHead(
        (config.channels, _FPN_BOX_SIDE, _FPN_BOX_SIDE),
        [config.channels] * convolutions,
        [config.fc_dim] * connected,
        norm_layer=nn.BatchNorm2d,
    )
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
    masks: dict[str, Any] = {}
    if config.masks:
        masks["mask_roi_pool"] = RoiAlign(_FPN_MASK_SIDE, strides, config.anchor_scale)
        masks["mask_head"] = MaskRCNNHeads(config.channels, [config.channels] * 4, 1)
        masks["mask_predictor"] = _mask_predictor(config.channels, config.channels, classes)
    heads = RegionHeads(box_pool, head, _box_predictor(config.fc_dim, classes), config, masks)
    return Detector(trunk, rpn, heads, all_strides[-1], strides[0])


def _c4_detector(backbone: nn.Module, classes: int, config: DetectionConfig) -> Detector:
    if not isinstance(backbone, ResNet):
        raise UserError("the c4 detector takes a ResNet apart, and this backbone is none of ours: use an fpn recipe")
    channels, strides = stage_shapes(backbone)
    stage = backbone.get_submodule("layer4")
    backbone.add_module("layer4", nn.Identity())  # its place is the box head now
    stride = strides[2]
    sizes = tuple(stride * config.anchor_scale * share for share in (0.25, 0.5, 1, 2, 4))
    rpn = _proposals(channels[2], [sizes], config)
    masks: dict[str, Any] = {}
    if config.masks:
        masks["mask_predictor"] = _mask_predictor(channels[3], config.channels, classes)
    # The published detectors have this extra norm: the stage's own maps are not normalised.
    head = nn.Sequential(OrderedDict(stage=stage, norm=nn.BatchNorm2d(channels[3])))
    pool = RoiAlign(_C4_SIDE, [stride], config.anchor_scale)
    heads = RegionHeads(pool, head, _box_predictor(channels[3], classes), config, masks)
    return Detector(FirstStages(backbone), rpn, heads, stride, strides[0])


class Pyramid(nn.Module):
    """Feature pyramid, with batch norm or without, and the level above its last."""

    def __init__(self, backbone: nn.Module, channels: list[int], out: int, *, norm: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.fpn = FeaturePyramidNetwork(channels, out, LastLevelMaxPool(), nn.BatchNorm2d if norm else None)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(b, 3, h, w) -> maps, fine to coarse."""
        maps: Any = self.backbone.stage_maps(images)  # type: ignore[operator]
        return self.fpn(OrderedDict((str(i), x) for i, x in enumerate(maps)))


class SimplePyramid(nn.Module):
    """Four scales of a transformer's last map, and the level above. Li et al. 2022, section 3."""

    def __init__(self, backbone: nn.Module, dim: int, out: int) -> None:
        super().__init__()
        self.backbone = backbone
        scales = [
            nn.Sequential(
                nn.ConvTranspose2d(dim, dim // 2, 2, 2),
                nn.GroupNorm(1, dim // 2),
                nn.GELU(),
                nn.ConvTranspose2d(dim // 2, dim // 4, 2, 2),
            ),
            nn.ConvTranspose2d(dim, dim // 2, 2, 2),
            nn.Identity(),
            nn.MaxPool2d(2),
        ]
        inputs = [dim // 4, dim // 2, dim, dim]
        self.levels = nn.ModuleList(
            nn.Sequential(
                scale,
                nn.Conv2d(channels, out, 1, bias=False),
                nn.GroupNorm(1, out),
                nn.Conv2d(out, out, 3, padding=1, bias=False),
                nn.GroupNorm(1, out),
            )
            for scale, channels in zip(scales, inputs, strict=True)
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(b, 3, h, w) -> maps, fine to coarse."""
        last: Tensor = self.backbone.stage_maps(images)[-1]  # type: ignore[operator]
        maps = [level(last) for level in self.levels]
        return OrderedDict((str(i), x) for i, x in enumerate([*maps, F.max_pool2d(maps[-1], 1, 2)]))


class FirstStages(nn.Module):
    """The first three stages of a ResNet."""

    def __init__(self, backbone: ResNet) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(b, 3, h, w) -> the third stage's map."""
        return OrderedDict([("0", self.backbone.stage_maps(images, 3)[-1])])


class RoiAlign(nn.Module):
    """Each region's features, from the level that fits its size.

    With the usual anchors a region of 224 x 224 pixels belongs to the level of stride 16, with smaller ones a region
    that is as much smaller; each halving is one level finer. Lin et al. 2017, equation 1.
    """

    def __init__(self, side: int, strides: list[int], anchor_scale: float) -> None:
        super().__init__()
        self.side, self.strides, self.canonical = side, strides, 28 * anchor_scale

    def forward(self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        """Maps and per image (n, 4) corners in pixels -> (sum of n, c, side, side)."""
        features = list(maps.values())[: len(self.strides)]
        images = torch.cat([box.new_full((len(box), 1), i) for i, box in enumerate(boxes)])
        rois = torch.cat([images, torch.cat(boxes)], dim=1)
        if len(features) == 1:
            return self._align(features[0], rois, self.strides[0])
        sides = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).clamp(min=0).sqrt()
        log2_stride = (torch.log2(16 * sides / self.canonical + 1e-8) + 1e-6).floor()
        level = (log2_stride - math.log2(self.strides[0])).clamp(0, len(features) - 1).long()
        pooled = features[0].new_zeros(len(rois), features[0].shape[1], self.side, self.side)
        for i, (feature, stride) in enumerate(zip(features, self.strides, strict=True)):
            rows = (level == i).nonzero()[:, 0]
            pooled = pooled.index_copy(0, rows, self._align(feature, rois[rows], stride))
        return pooled

    def _align(self, feature: Tensor, rois: Tensor, stride: int) -> Tensor:
        return roi_align(feature, rois, self.side, 1 / stride, sampling_ratio=0, aligned=True)


class SeededSampler:
    """Draws positives and negatives of each image from that image's seed, on any device and rank alike.

    Takes the place of torchvision's sampler, whose draws depend on what was drawn before.
    """

    def __init__(self, count: int, share: float, stream: int) -> None:
        self.count, self.share, self.stream = count, share, stream
        self._seeds: list[int] = []

    def begin(self, seeds: list[int]) -> None:
        """The images of the next call."""
        self._seeds = seeds

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Per image (n,) labels, positive, 0 or negative to ignore -> two lists of (n,) masks of what was drawn."""
        drawn: tuple[list[Tensor], list[Tensor]] = [], []
        for label, seed in zip(labels, self._seeds, strict=True):
            generator = torch.Generator().manual_seed(seed ^ self.stream)
            room = self.count
            for masks, candidates, share in zip(drawn, (label >= 1, label == 0), (self.share, 1.0), strict=True):
                rows = candidates.nonzero()[:, 0]
                rows = rows[torch.randperm(len(rows), generator=generator)[: int(room * share)].to(label.device)]
                room -= len(rows)
                masks.append(torch.zeros_like(label, dtype=torch.uint8).index_fill_(0, rows, 1))
        return drawn


class RegionProposals(RegionProposalNetwork):
    """torchvision's, with detectron2's losses: L1, divided by the number of anchors that each image should give."""

    fg_bg_sampler: SeededSampler

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Losses of objectness and of boxes; arguments as in torchvision."""
        count = self.fg_bg_sampler.count * len(labels) * dist.world_size()
        positive, negative = (torch.cat(masks) > 0 for masks in self.fg_bg_sampler(labels))
        drawn, scores = positive | negative, objectness.flatten()
        targets = torch.cat(regression_targets)
        box_loss = F.l1_loss(pred_bbox_deltas[positive], targets[positive], reduction="sum")
        loss = F.binary_cross_entropy_with_logits(scores[drawn], torch.cat(labels)[drawn], reduction="sum")
        return loss / count, box_loss / count


class RegionHeads(RoIHeads):
    """torchvision's selection and suppression, with detectron2's losses; masks of c4 share the box head's maps."""

    fg_bg_sampler: SeededSampler

    def __init__(
        self, pool: nn.Module, head: nn.Module, predictor: nn.Module, config: DetectionConfig, masks: dict[str, Any]
    ) -> None:
        super().__init__(
            pool,
            head,
            predictor,
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=config.box_samples,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=config.score_threshold,
            nms_thresh=0.5,
            detections_per_img=config.detections,
            **masks,
        )
        self.fg_bg_sampler = SeededSampler(config.box_samples, 0.25, stream=0x5A17)

    def has_mask(self) -> bool:
        """Whether masks are predicted."""
        return self.mask_predictor is not None

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Any]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections and {} in evaluation mode; [] and losses in training mode."""
        if self.training:
            assert targets is not None
            return [], self._losses(features, proposals, image_shapes, targets)
        scores, deltas, _ = self._classify(features, proposals, image_shapes)
        boxes, confidences, labels = self.postprocess_detections(scores, deltas, proposals, image_shapes)
        columns = {"boxes": boxes, "labels": labels, "scores": confidences}
        if self.has_mask():
            logits = self._mask_logits(self._mask_input(features, boxes, image_shapes), torch.cat(labels))
            columns["masks"] = logits.sigmoid()[:, None].split([len(box) for box in boxes])
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)], {}

    def _losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        sizes: list[tuple[int, int]],
        targets: list[dict[str, Any]],
    ) -> dict[str, Tensor]:
        regions, matched, labels, regression = self.select_training_samples(proposals, targets)
        scores, deltas, maps = self._classify(features, regions, sizes)
        classes = torch.cat(labels)
        positive = (classes > 0).nonzero()[:, 0]
        chosen = deltas.unflatten(1, (-1, 4))[positive, classes[positive]]
        box_loss = F.l1_loss(chosen, torch.cat(regression)[positive], reduction="sum")
        losses = {
            "loss_classifier": _part_of_mean(F.cross_entropy(scores, classes, reduction="sum"), len(classes)),
            "loss_box_reg": _part_of_mean(box_loss, len(classes)),
        }
        if self.has_mask():
            inside = [label > 0 for label in labels]
            boxes = [region[keep] for region, keep in zip(regions, inside, strict=True)]
            shared = maps[positive] if self.mask_head is None else self._mask_input(features, boxes, sizes)
            logits = self._mask_logits(shared, classes[positive])
            numbers = [number[keep] for number, keep in zip(matched, inside, strict=True)]
            expected = _mask_targets([target["masks"] for target in targets], boxes, numbers, logits.shape[-1])
            loss = F.binary_cross_entropy_with_logits(logits, expected, reduction="sum")
            losses["loss_mask"] = _part_of_mean(loss, expected.numel())
        return losses

    def _classify(
        self, features: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (n, classes + 1) and box deltas (n, 4 (classes + 1)), and what the box head made of the regions."""
        maps = self.box_head(self.box_roi_pool(features, boxes, sizes))
        pooled = maps if maps.dim() == 2 else maps.mean(dim=(2, 3))
        return *self.box_predictor(pooled), maps

    def _mask_input(self, features: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        """What masks are predicted from: the mask head's maps of the regions, or with c4 the box head's."""
        if self.mask_head is not None:
            return self.mask_head(self.mask_roi_pool(features, boxes, sizes))
        return self.box_head(self.box_roi_pool(features, boxes, sizes))

    def _mask_logits(self, maps: Tensor, classes: Tensor) -> Tensor:
        """(n, s, s): of each region the mask of its class."""
        logits = self.mask_predictor(maps)
        return logits[torch.arange(len(logits), device=logits.device), classes]


def _mask_targets(masks: list[Tensor], boxes: list[Tensor], matched: list[Tensor], side: int) -> Tensor:
    """(n, side, side) float32, 0 or 1: each region's part of the mask that it was matched with."""
    parts = []
    for mask, box, number in zip(masks, boxes, matched, strict=True):
        if len(box):
            rois = torch.cat([number[:, None].to(box), box], dim=1)
            parts.append(roi_align(mask[:, None].to(box), rois, side, 1.0, sampling_ratio=0, aligned=True)[:, 0])
    return (torch.cat(parts) >= 0.5).to(boxes[0]) if parts else boxes[0].new_zeros(0, side, side)


def _part_of_mean(total: Tensor, count: int) -> Tensor:
    """This rank's part of the mean over the rows of all ranks, from the sum over its `count` rows."""
    return total / dist.all_reduce_sum(torch.tensor(float(count), device=total.device)).clamp(min=1)


def _proposals(channels: int, sizes: list[tuple[float, ...]], config: DetectionConfig) -> RegionProposals:
    anchors: Any = AnchorGenerator(tuple(sizes), ((0.5, 1.0, 2.0),) * len(sizes))
    head = RPNHead(channels, anchors.num_anchors_per_location()[0], conv_depth=1)
    rpn = RegionProposals(
        anchors,
        head,
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=config.rpn_samples,
        positive_fraction=0.5,
        pre_nms_top_n=dict(zip(("training", "testing"), config.pre_nms, strict=True)),
        post_nms_top_n=dict(zip(("training", "testing"), config.post_nms, strict=True)),
        nms_thresh=0.7,
    )
    rpn.fg_bg_sampler = SeededSampler(config.rpn_samples, 0.5, stream=0x0A2C)
    return rpn


def _box_predictor(dim: int, classes: int) -> FastRCNNPredictor:
    predictor = FastRCNNPredictor(dim, classes + 1)
    _initialise(predictor.cls_score, 0.01)
    _initialise(predictor.bbox_pred, 0.001)
    return predictor


def _mask_predictor(dim: int, hidden: int, classes: int) -> MaskRCNNPredictor:
    predictor = MaskRCNNPredictor(dim, hidden, classes + 1)
    nn.init.zeros_(predictor.conv5_mask.bias)
    _initialise(predictor.mask_fcn_logits, 0.001)
    return predictor


def _initialise(layer: Any, std: float) -> None:
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
