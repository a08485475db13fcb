"""The protocols by name. A protocol is one file and one line here, or an entry point `tessella.protocols` of a package.

A protocol is a function (backbone, data, config) -> scores. Its file declares what people may ask of it: its title,
named settings, kinds of data and main figures (`protocols.protocol.Protocol`).
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from tessella.errors import UserError
from tessella.protocols.clustering import CLUSTERING
from tessella.protocols.detection.data import DetectionData
from tessella.protocols.detection.protocol import DETECTION
from tessella.protocols.duplicates import DUPLICATES
from tessella.protocols.features import EvalData
from tessella.protocols.finetune import FINETUNE
from tessella.protocols.knn import KNN
from tessella.protocols.linear import FEW_LABELS, LINEAR
from tessella.protocols.lowshot import LOW_SHOT, SVM, MultiLabelData
from tessella.protocols.protocol import KINDS, Kind, Protocol
from tessella.protocols.segmentation.data import SegmentationData
from tessella.protocols.segmentation.protocol import SEGMENTATION
from tessella.registry import Registry

__all__ = [
    "KINDS",
    "PROTOCOLS",
    "DetectionData",
    "EvalData",
    "Kind",
    "MultiLabelData",
    "Protocol",
    "SegmentationData",
    "default_config",
    "named_settings",
    "protocol_of",
    "quick_settings",
    "record_name",
]

PROTOCOLS: Registry[Protocol] = Registry(
    "protocols",
    {
        "duplicates": DUPLICATES,
        "knn": KNN,
        "linear": LINEAR,
        "fewlabels": FEW_LABELS,
        "clustering": CLUSTERING,
        "svm": SVM,
        "lowshot": LOW_SHOT,
        "finetune": FINETUNE,
        "detection": DETECTION,
        "segmentation": SEGMENTATION,
    },
)

_SEEDS = ("seed", "seeds", "repeats")  # fields that do not make another setting


def named_settings() -> dict[str, Any]:
    """Every setting of every protocol by its name, which is also what its records are called."""
    return {name: config for protocol in PROTOCOLS.values() for name, config in protocol.settings.items()}


def quick_settings(kind: Kind) -> tuple[str, ...]:
    """What "all" stands for on data of one kind. A published training is asked for by its name."""
    return tuple(name for protocol in PROTOCOLS.values() for name in protocol.quick.get(kind, ()))


def default_config(name: str) -> Any:
    """The config behind a name that a user may type.

    Args:
        name: of a setting; or of a protocol, for its default setting: "linear" is the fast probe.

    Raises:
        UserError: the name is unknown.
    """
    settings = named_settings()
    if name in PROTOCOLS and PROTOCOLS[name].default:
        name = PROTOCOLS[name].default
    if name in settings:
        return settings[name]
    if name in PROTOCOLS:  # detection, segmentation: there is none that would suit all
        choices = ", ".join(PROTOCOLS[name].settings)
        raise UserError(f"there are several kinds of {name}, and none suits all data: name one of {choices}")
    known = [*(name for name in PROTOCOLS if PROTOCOLS[name].default), *settings]
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"there is no protocol {name!r}{hint} Known: {', '.join(known)}")


def protocol_of(config: Any) -> Protocol:
    """The protocol that a config belongs to."""
    return next(protocol for protocol in PROTOCOLS.values() if type(config) is protocol.config)


def record_name(config: Any) -> str:
    """What a record of a config is called: the setting that it equals but for its seeds, else the nearest one."""
    for name, protocol in PROTOCOLS.items():
        if type(config) is not protocol.config:
            continue
        for setting, named in protocol.settings.items():
            if not changes(named, config):
                return setting
        return protocol.name_of(config) if protocol.name_of else name
    raise UserError(f"{type(config).__name__} is the config of no protocol; the protocols are {', '.join(PROTOCOLS)}")


def changes(setting: Any, config: Any) -> dict[str, Any]:
    """Fields in which a config differs from a setting, with its values; seeds are no difference."""
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in _SEEDS and getattr(config, field.name) != getattr(setting, field.name)
    }
