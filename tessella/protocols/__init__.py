"""The protocols: what each needs, and every setting that a user may name.

A protocol is a function (backbone, data, config) -> scores. `PROTOCOLS` is the only table of them and `SETTINGS` the
only one of their settings; a new protocol is one file and one line in each. A config carries a `version`, which grows
whenever a change of the code changes a figure.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

from tessella.errors import UserError
from tessella.protocols import finetune as finetuning
from tessella.protocols import linear as probes
from tessella.protocols.clustering import ClusteringConfig, clustering
from tessella.protocols.detection import protocol as detecting
from tessella.protocols.detection.protocol import DetectionConfig, DetectionData, detection
from tessella.protocols.duplicates import DuplicatesConfig, duplicates
from tessella.protocols.features import EvalData
from tessella.protocols.finetune import FinetuneConfig, finetune, finetune_name
from tessella.protocols.knn import KnnConfig, knn
from tessella.protocols.linear import FewLabelsConfig, LinearConfig, few_labels, linear
from tessella.protocols.lowshot import LowShotConfig, MultiLabelData, SvmConfig, lowshot, svm
from tessella.protocols.segmentation import protocol as segmenting
from tessella.protocols.segmentation.protocol import SegmentationConfig, SegmentationData, segmentation

__all__ = [
    "ALL",
    "PROTOCOLS",
    "SETTINGS",
    "DetectionData",
    "EvalData",
    "Kind",
    "MultiLabelData",
    "Protocol",
    "SegmentationData",
    "default_config",
    "protocol_of",
    "record_name",
]

# What is known about an image: its class, the boxes (and masks) of its objects, or the class of every pixel.
Kind: TypeAlias = Literal["classes", "boxes", "masks"]
KINDS: tuple[Kind, ...] = ("classes", "boxes", "masks")


class Protocol(NamedTuple):
    """One row of the table."""

    config: type
    function: Callable[..., dict[str, Any]]
    kinds: tuple[Kind, ...] = ("classes",)  # of data that it takes, the preferred first
    check: Callable[[Any, Any], object] | None = None  # (data, config): refuses what cannot work, before hours of it
    repeats: str | None = None  # how it is run with several seeds: by this field, or, "record", once for each


PROTOCOLS: dict[str, Protocol] = {
    "knn": Protocol(KnnConfig, knn),
    "linear": Protocol(LinearConfig, linear),
    "fewlabels": Protocol(FewLabelsConfig, few_labels),
    "clustering": Protocol(ClusteringConfig, clustering),
    "finetune": Protocol(FinetuneConfig, finetune, check=finetuning.check, repeats="repeats"),
    "svm": Protocol(SvmConfig, svm, ("boxes", "classes")),
    "lowshot": Protocol(LowShotConfig, lowshot, ("boxes", "classes")),
    "duplicates": Protocol(DuplicatesConfig, duplicates),
    "detection": Protocol(DetectionConfig, detection, ("boxes",), detecting.check, "record"),
    "segmentation": Protocol(
        SegmentationConfig, segmentation, ("masks",), lambda data, config: data.survey(), "record"
    ),
}

_FEW_COSTS = (0.001, 0.01, 0.1)

# Every setting by its name. A name is also what its records are called.
SETTINGS: dict[str, Any] = {
    "knn": KnnConfig(),
    "linear-fast": LinearConfig(recipe="fast"),
    "linear-lr-grid": LinearConfig(recipe="lr-grid"),
    **{f"linear-{name}": LinearConfig(recipe=name) for name in probes.RECIPES},  # type: ignore[arg-type]
    "fewlabels": FewLabelsConfig(),
    "clustering": ClusteringConfig(),
    "clustering-train": ClusteringConfig(split="train"),
    "overclustering": ClusteringConfig(clusters_per_class=10),
    **{
        f"finetune-{name}-{percent}": FinetuneConfig(recipe=name, labels=percent / 100)  # type: ignore[arg-type]
        for name in finetuning.RECIPES
        if name not in (*finetuning.FOR_ALL_LABELS, "small")
        for percent in (1, 10)
    },
    "finetune-vissl-100": FinetuneConfig(recipe="vissl-100"),
    "transfer": FinetuneConfig(recipe="transfer"),
    "svm": SvmConfig(),
    "lowshot": LowShotConfig(),
    "duplicates": DuplicatesConfig(),
    **{f"detection-{name}": config for name, config in detecting.RECIPES.items()},
    **{f"segmentation-{name}": config for name, config in segmenting.RECIPES.items()},
    # For small images and two cores: more and smaller steps, fewer values to try.
    "finetune-small-1": FinetuneConfig("small", labels=0.01, batch_size=32),
    "finetune-small-10": FinetuneConfig("small", labels=0.1, batch_size=32),
    "finetune-small-100": FinetuneConfig("small", labels=1.0, batch_size=64, epochs=5),
    "transfer-small": FinetuneConfig(
        recipe="transfer", batch_size=64, epochs=5, lrs=(0.1, 0.03), weight_decays=(5e-4,)
    ),
    "svm-small": SvmConfig(costs=_FEW_COSTS),
    "lowshot-small": LowShotConfig(positives=(1, 4, 16), draws=3, costs=_FEW_COSTS),
}

_SHORT = {"linear": "linear-fast", "finetune": "finetune-swav-1"}  # protocols whose name is not a setting's

# What "all" stands for, by the data that there are: the quick ones. A published training is asked for by its name.
ALL: dict[Kind, tuple[str, ...]] = {
    "classes": (
        *("duplicates", "knn", "linear-fast", "fewlabels", "clustering", "overclustering", "svm-small"),
        *("lowshot-small", "finetune-small-1", "finetune-small-10"),
    ),
    "boxes": ("svm-small", "lowshot-small", "detection-small"),
    "masks": ("segmentation-small",),
}

_SEEDS = ("seed", "seeds", "repeats")  # fields that do not make another setting


def default_config(name: str) -> Any:
    """The config behind a name that a user may type.

    Args:
        name: a key of `SETTINGS`; or "linear" for the fast probe, "finetune" for SwAV's with 1 % of the labels.

    Raises:
        UserError: the name is unknown.
    """
    name = _SHORT.get(name, name)
    if name in SETTINGS:
        return SETTINGS[name]
    if name in PROTOCOLS:  # detection, segmentation: there is none that would suit all
        choices = [known for known in SETTINGS if known.startswith(f"{name}-")]
        raise UserError(f"there are several kinds of {name}, and none suits all data: name one of {', '.join(choices)}")
    known = [*_SHORT, *SETTINGS]
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"there is no protocol {name!r}{hint} Known: {', '.join(known)}")


def protocol_of(config: Any) -> Protocol:
    """The protocol that a config belongs to."""
    return next(protocol for protocol in PROTOCOLS.values() if type(config) is protocol.config)


def record_name(config: Any) -> str:
    """What a record of a config is called: the setting that it equals but for its seeds, else the nearest one."""
    for name, setting in SETTINGS.items():
        if type(setting) is type(config) and not changes(setting, config):
            return name
    if isinstance(config, LinearConfig):
        return f"linear-{config.recipe}"
    if isinstance(config, FinetuneConfig):
        return finetune_name(config)
    if isinstance(config, ClusteringConfig):
        kind = "overclustering" if config.clusters_per_class > 1 else "clustering"
        return kind if config.split == "test" else f"{kind}-{config.split}"
    if isinstance(config, DetectionConfig):
        return f"detection-{config.recipe}"
    return next(name for name, protocol in PROTOCOLS.items() if type(config) is protocol.config)


def changes(setting: Any, config: Any) -> dict[str, Any]:
    """Fields in which a config differs from a setting, with its values; seeds are no difference."""
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in _SEEDS and getattr(config, field.name) != getattr(setting, field.name)
    }
