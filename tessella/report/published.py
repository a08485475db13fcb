"""Published figures of the five methods, in per cent, to compare one's own with.

`PUBLISHED` has those of a recipe, whose docstring cites the same figures; a test compares the two. `reported` gives the
best figure that each method has published for a protocol with the usual network, and its setting.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from tessella.methods import METHODS

# As in `tessella evaluate` where that has the protocol: linear, knn, clustering. The others are fine-tuning of the
# whole network on a share of ImageNet's labels, and Faster R-CNN with an FPN on COCO.
Protocol: TypeAlias = Literal["linear", "knn", "clustering", "finetune-1%", "finetune-10%", "coco"]
Metric: TypeAlias = Literal["top1", "accuracy", "nmi", "ari", "box_ap"]


class Score(NamedTuple):
    """One published figure."""

    protocol: Protocol
    metric: Metric
    value: float  # per cent
    source: str  # who published it, and what is special about it
    same_run: bool = True  # False: another implementation or other settings, the nearest that there is


def _linear(value: float, source: str) -> Score:
    return Score("linear", "top1", value, source)


_SWAV_README, _VISSL = "README of the official code", "VISSL's rerun, with VISSL's probe"
_SMOG_README, _COKE_README = "README of the released code", "README of the official code"
_MEJIGCLU = "the paper's tables"

# The first figure of a recipe is its headline.
PUBLISHED: dict[str, tuple[Score, ...]] = {
    "swav_imagenet_100ep": (_linear(72.1, _SWAV_README), _linear(71.99, _VISSL)),
    "swav_imagenet_200ep": (_linear(73.9, _SWAV_README), _linear(73.85, _VISSL)),
    "swav_imagenet_400ep": (_linear(74.6, _SWAV_README), _linear(74.81, _VISSL)),
    "swav_imagenet_800ep": (
        _linear(75.3, _SWAV_README),
        _linear(74.92, _VISSL),
        Score("knn", "top1", 65.7, "the DINO paper, table 2, k 20"),
        Score("finetune-1%", "top1", 53.9, "the SwAV paper"),
        Score("finetune-10%", "top1", 70.2, "the SwAV paper"),
    ),
    "swav_imagenet_400ep_2x224": (_linear(70.1, _SWAV_README), _linear(69.53, _VISSL)),
    "swav_imagenet_200ep_bs256": (_linear(72.7, _SWAV_README), _linear(73.07, _VISSL)),
    "swav_imagenet_400ep_bs256": (_linear(74.3, _SWAV_README), _linear(74.3, _VISSL)),
    "swav_imagenet_w2_400ep": (_linear(77.3, _SWAV_README), _linear(77.01, _VISSL)),
    "swav_imagenet_w4_400ep": (_linear(77.9, _SWAV_README), _linear(77.03, _VISSL)),
    "swav_imagenet_w5_400ep": (
        Score("linear", "top1", 78.5, f"{_SWAV_README}; settings not published", same_run=False),
    ),
    "jigclu_imagenet_200ep": (
        _linear(66.4, "README of the official code"),
        Score("finetune-1%", "top1", 40.7, "README of the official code"),
        Score("finetune-10%", "top1", 63.0, "README of the official code"),
        Score("coco", "box_ap", 39.3, "README of the official code"),
    ),
    "mejigclu_imagenet_200ep": (
        _linear(66.8, _MEJIGCLU),
        Score("finetune-1%", "top1", 41.2, _MEJIGCLU),
        Score("finetune-10%", "top1", 63.2, _MEJIGCLU),
        Score("coco", "box_ap", 40.0, _MEJIGCLU),
    ),
    "mejigclu_imagenet_200ep_fixed_overlap": (Score("coco", "box_ap", 39.6, "the paper's ablation table"),),
    "smog_imagenet_400ep": (_linear(76.4, "the paper"), _linear(76.6, _SMOG_README)),
    "smog_imagenet_w2_400ep": (_linear(78.0, "the paper, low confidence"), _linear(78.3, _SMOG_README)),
    "smog_imagenet_swin_tiny_400ep": (_linear(77.7, "the paper"), _linear(77.5, _SMOG_README)),
    "coke_imagenet_1000ep_1x224": (_linear(72.5, _COKE_README),),
    "coke_imagenet_1000ep_2x224": (_linear(74.9, _COKE_README),),
    "coke_imagenet_800ep_multicrop": (_linear(76.4, _COKE_README),),
    "swav_cifar10": (
        Score("knn", "top1", 84.2, "lightly's benchmark, batch 512, k 200, best of its epochs", same_run=False),
    ),
    "smog_cifar10": (
        Score("knn", "top1", 74.3, "lightly's benchmark, batch 128, k 200, best of its epochs", same_run=False),
    ),
    "coke_cifar10_clustering": (
        Score("clustering", "accuracy", 85.7, "a benchmark archive's entry for the paper, train split", same_run=False),
        Score("clustering", "nmi", 76.6, "a benchmark archive's entry for the paper, train split", same_run=False),
        Score("clustering", "ari", 73.2, "a benchmark archive's entry for the paper, train split", same_run=False),
    ),
}

# Test images and classes by which published data are recognised.
_DATA = {
    "ImageNet": (50_000, 1000),
    "CIFAR-10": (10_000, 10),
    "COCO 2017": (5000, 80),
    "VOC2007": (4952, 20),
    "VOC07+12": (4952, 20),
    "VOC2012": (1449, 21),
    "Cityscapes": (500, 19),
    "ADE20K": (2000, 150),
}


class Reported(NamedTuple):
    """What a method has published for a protocol."""

    method: str  # its name
    value: float  # per cent
    setting: str  # data, network, length of the pretraining: where it differs from the reader's
    source: str

    def same_data(self, images: Any, classes: Any) -> bool:
        """Whether the figure is of a test set with so many images and classes."""
        return _DATA.get(self.setting.partition(",")[0]) == (images, classes)


def per_cent(value: float) -> str:
    """A published figure as it was published: with one decimal, or two."""
    return f"{value:.2f}".removesuffix("0")


# What belongs to no recipe, because the papers do not give all of its settings or others ran it:
# question -> figure -> published values.
_COCO, _R50 = "COCO 2017, ResNet-50", "ResNet-50"
_SWAV_800, _BARLOW = f"ImageNet, {_R50}, 800 epochs", "table of the Barlow Twins paper"
_FASTER = f"{_COCO}, Faster R-CNN FPN, 200 epochs on ImageNet"
_UNNAMED = "network not named"
_TABLES = "the paper's tables"
_LEADERBOARD = "a leaderboard of third parties, not verified"
_MASK_RCNN = f"{_COCO}, Mask R-CNN, FPN or C4 not named"
_MASK_RCNN_BOXES = Reported("smog", 40.1, _MASK_RCNN, _TABLES), Reported("coke", 40.9, _MASK_RCNN, _LEADERBOARD)
_MASK_RCNN_MASKS = Reported("smog", 36.9, _MASK_RCNN, _TABLES), Reported("coke", 37.2, _MASK_RCNN, _LEADERBOARD)
_FURTHER: dict[str, dict[str, tuple[Reported, ...]]] = {
    "finetune-1%": {"top1": (Reported("smog", 63.6, f"ImageNet, {_UNNAMED}", _TABLES),)},
    "finetune-100%": {
        "top1": (
            Reported("swav", 77.8, _SWAV_800, "the SwAV paper, not verified"),
            Reported("smog", 80.2, f"ImageNet, {_UNNAMED}", _TABLES),
        )
    },
    "svm": {"map": (Reported("swav", 88.9, f"VOC2007, {_R50}, 800 epochs on ImageNet", "the SwAV paper"),)},
    "coco": {
        "box_ap50": (
            Reported("jigclu", 59.4, _FASTER, _TABLES),
            Reported("mejigclu", 60.2, _FASTER, _TABLES),
        ),
        "box_ap75": (
            Reported("jigclu", 42.5, _FASTER, _TABLES),
            Reported("mejigclu", 43.9, _FASTER, _TABLES),
        ),
    },
    "coco-mask-fpn": {
        "box_ap": (
            Reported("swav", 41.6, f"{_COCO}, Mask R-CNN FPN", "the SwAV paper"),
            *_MASK_RCNN_BOXES,
        ),
        "mask_ap": (
            Reported("swav", 37.8, f"{_COCO}, Mask R-CNN FPN", "a benchmark archive's entry for the paper"),
            *_MASK_RCNN_MASKS,
        ),
    },
    "coco-mask-c4": {
        "box_ap": (
            Reported("swav", 38.4, f"{_COCO}, Mask R-CNN C4", _BARLOW),
            *_MASK_RCNN_BOXES,
        ),
        "mask_ap": (
            Reported("swav", 33.8, f"{_COCO}, Mask R-CNN C4", _BARLOW),
            *_MASK_RCNN_MASKS,
        ),
    },
    "voc": {
        "box_ap": (Reported("swav", 56.1, f"VOC07+12, {_R50} C4", _BARLOW),),
        "box_ap50": (Reported("swav", 82.6, f"VOC07+12, {_R50} C4", "the SwAV paper"),),
        "box_ap75": (Reported("swav", 62.7, f"VOC07+12, {_R50} C4", _BARLOW),),
    },
    "voc12": {
        "miou": (
            Reported("swav", 73.0, "VOC2012, head not named", "a run of third parties"),
            Reported("smog", 76.22, "VOC2012, head and schedule not named", _TABLES),
        )
    },
    "cityscapes": {"miou": (Reported("smog", 76.03, "Cityscapes, head and schedule not named", _TABLES),)},
    "ade20k": {"miou": (Reported("swav", 35.4, "ADE20K, head not named", "a run of third parties"),)},
}


def reported(protocol: str, settings: Mapping[str, Any], figure: str) -> list[Reported]:
    """What the methods have published for one figure of a record, one each, in the order of `METHODS`.

    Args:
        protocol: name of the record.
        settings: of the record.
        figure: name among its scores.
    """
    question = _question(protocol, settings)
    best: dict[str, tuple[Score, Reported]] = {}
    for recipe, scores in PUBLISHED.items():
        # A recipe's first figure of a kind is its headline; what follows are reruns by others.
        score = next((s for s in scores if (s.protocol, s.metric) == (question, figure)), None)
        if score is not None and _usual(recipe):
            method = recipe.partition("_")[0]
            one = Reported(method, score.value, _setting(recipe, question), score.source)
            if method not in best or (score.same_run, score.value) > (best[method][0].same_run, best[method][0].value):
                best[method] = score, one
    chosen = {one.method: one for one in _FURTHER.get(question, {}).get(figure, ())}
    chosen |= {method: one for method, (_, one) in best.items()}
    return [chosen[method] for method in METHODS if method in chosen]


def _question(protocol: str, settings: Mapping[str, Any]) -> str:
    """The question of a protocol in the tables above; empty for what nobody has published."""
    kind = protocol.partition("-")[0]
    if kind == "finetune":
        share = settings.get("labels") or (1.0 if settings.get("recipe") == "vissl-100" else 0.01)
        return "" if settings.get("label_list") else f"finetune-{100 * float(share):g}%"
    if kind == "detection":
        if settings.get("masks"):
            return f"coco-mask-{settings.get('neck')}"
        return "voc" if settings.get("neck") == "c4" or "voc" in str(settings.get("recipe")) else "coco"
    if kind == "segmentation":
        return next((data for data in ("cityscapes", "ade20k") if data in protocol), "voc12")
    return kind if kind in ("linear", "knn", "clustering", "svm") else ""


def _usual(recipe: str) -> bool:
    """Whether the recipe's network is the one that the methods share: ResNet-50, or ResNet-18 for small images."""
    return not re.search(r"_w\d_|_swin_|_fixed_overlap", recipe)


def _setting(recipe: str, question: str) -> str:
    """Data, network and length in words, from the recipe's name and the question's data."""
    if "_cifar10" in recipe:
        return "CIFAR-10, ResNet-18" + (", train split" if question == "clustering" else "")
    epochs = re.search(r"_(\d+)ep", recipe)
    length = f", {epochs[1]} epochs" if epochs else ""
    if question == "coco":
        return _FASTER
    views = {"1x224": ", one view", "2x224": ", two views", "multicrop": ", multi-crop"}
    return f"ImageNet, {_R50}{length}" + next((words for name, words in views.items() if recipe.endswith(name)), "")
