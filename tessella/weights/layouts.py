"""How the projects name their tensors: one table for each, and what its shapes tell of the settings.

Stars in a name stand for any part of it, the same in our name and in theirs.

Source: the checkpoint sections of the methods' specifications.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor

from tessella.data.views import CropGroup, ViewSpec
from tessella.errors import UserError
from tessella.methods import MethodConfig
from tessella.methods.coke import CokeConfig
from tessella.methods.jigclu import JigcluConfig
from tessella.methods.mejigclu import MejigcluConfig
from tessella.methods.smog import SmogConfig
from tessella.methods.swav import SwavConfig

Origin: TypeAlias = Literal["swav", "deepclusterv2", "jigclu", "mejigclu", "coke", "smog", "torchvision"]


class OfficialFile(NamedTuple):
    """Tensors under their official names."""

    name: str
    wrapping: str
    tensors: dict[str, Tensor]
    others: dict[str, str]  # what lies around them -> why it is left out

    def size(self, key: str, dim: int = 0) -> int:
        """One side of one tensor."""
        if key not in self.tensors:
            raise UserError(f"{self.name} lacks {key}, which its layout asks for")
        if self.tensors[key].dim() <= dim:
            raise UserError(f"{self.name}: {key} has shape {tuple(self.tensors[key].shape)}, too few dimensions")
        return self.tensors[key].shape[dim]

    def count(self, pattern: str) -> int:
        """How many keys match."""
        return sum(fnmatchcase(key, pattern) for key in self.tensors)


class Layout(NamedTuple):
    """How a project names its tensors."""

    sign: str  # a pattern that some key matches and no key of the layouts further down the table
    names: Mapping[str, str]  # ours -> official; the first that matches counts
    settings: Callable[[OfficialFile], tuple[str, MethodConfig | None]]  # title, and config from the shapes
    left: Mapping[str, str] = {}  # official -> why it is left out
    anew: Mapping[str, str] = {}  # ours -> why the file has none
    transposed: tuple[str, ...] = ()  # ours that are columns there
    unit_rows: tuple[str, ...] = ()  # ours that are scaled to unit rows
    whole: bool = True  # see Official


def _swav(file: OfficialFile) -> tuple[str, SwavConfig]:
    heads = file.count("prototypes.prototypes*.weight")
    keys = [f"prototypes.prototypes{i}.weight" for i in range(heads)] or ["prototypes.weight"]
    counts = tuple(file.size(key) for key in keys)
    config = SwavConfig(
        prototypes=counts if heads else counts[0],
        embedding_dim=file.size(keys[0], 1),
        hidden_dim=file.size("projection_head.0.weight"),
        head_norm="projection_head.1.weight" in file.tensors,
    )
    if heads:
        return "DeepCluster-v2 (SeLa-v2 and SwAV with several heads look the same)", config
    return "SwAV" if config.head_norm else "SwAV without norm in its head (w5)", config


def _jigclu(file: OfficialFile) -> tuple[str, JigcluConfig]:
    tiles = math.isqrt(file.size("encoder.fc_loc.weight"))
    return "JigClu", JigcluConfig(tiles=tiles, embedding_dim=file.size("encoder.fc_clu.2.weight"))


def _mejigclu(file: OfficialFile) -> tuple[str, MejigcluConfig]:
    config = MejigcluConfig(
        embedding_dim=file.size("encoder.fc_clu.2.weight"),
        category_hidden=file.size("encoder.fc_cls.0.weight"),
        categories=file.size("encoder.fc_cls.2.weight"),
    )
    return "MEJigClu", config


def _coke(file: OfficialFile) -> tuple[str, CokeConfig]:
    counts = tuple(file.size(f"pre_center_{i}", 1) for i in range(file.count("pre_center_*")))
    dim = file.size("encoder.fc.6.weight")
    if "label_val" in file.tensors:
        return "CoKe with one view", CokeConfig(centres=counts, embedding_dim=dim)
    pair = ViewSpec((CropGroup(2, 224, (0.08, 1.0)),))
    config = CokeConfig(centres=counts, embedding_dim=dim, temperature=0.05, views=pair)
    return "CoKe with two views or multi-crop (their files look the same)", config


def _smog(file: OfficialFile) -> tuple[str, SmogConfig]:
    config = SmogConfig(
        embedding_dim=file.size("q_encoder.projection_head.3.weight"),
        hidden_dim=file.size("q_encoder.projection_head.0.weight"),
    )
    return "SMoG", config


def _torchvision(file: OfficialFile) -> tuple[str, None]:
    return "a ResNet in torchvision's layout", None


_OTHER_IMAGES = "about the images of the run that made the file, in its order"
_SWAV_NAMES = {
    "backbone.*": "*",
    "projector.*": "projection_head.*",
    "prototypes.weight": "prototypes.weight",
    "prototypes.*": "prototypes.*",
}

# In this order: a sign may also match layouts further down.
LAYOUTS: dict[Origin, Layout] = {
    "smog": Layout(
        sign="q_encoder.*",
        names={
            "backbone.*": "q_encoder.*",
            "projector.*": "q_encoder.projection_head.*",
            "predictor.*": "q_encoder.predictor_head.*",
            "momentum_encoder.backbone.*": "k_encoder.*",
            "momentum_encoder.projector.*": "k_encoder.projection_head.*",
        },
        settings=_smog,
        anew={
            "groups": "in no file of the release; a run computes them before its first step",
            "bank.*": "in a file of its own for each rank; a run fills it before its first step",
        },
        whole=False,
    ),
    "mejigclu": Layout(
        sign="encoder.fc_cls.*",
        names={
            "backbone.*": "encoder.*",
            "cluster_head.*": "encoder.fc_clu.*",
            "category_head.*": "encoder.fc_cls.*",
        },
        settings=_mejigclu,
        left={"*subset_*": _OTHER_IMAGES},
        anew={"partition.*": "the split into categories is of the new run's images"},
    ),
    "jigclu": Layout(
        sign="encoder.fc_clu.*",
        names={
            "backbone.*": "encoder.*",
            "cluster_head.*": "encoder.fc_clu.*",
            "location_head.*": "encoder.fc_loc.*",  # rows in the order of our tiles: column by column
        },
        settings=_jigclu,
    ),
    "coke": Layout(
        sign="encoder.fc.*",
        names={
            "backbone.*": "encoder.*",
            "projector.*": "encoder.fc.*",
            "predictor.*": "predictor.*",
            "clusterings.*.previous": "pre_center_*",
            "clusterings.*.current": "cur_center_*",
        },
        settings=_coke,
        left={
            "assign_labels": _OTHER_IMAGES,
            "label_val": _OTHER_IMAGES,
            "label_idx": _OTHER_IMAGES,
            "dual_*": "belongs to those labels; a run finds its own in its first epoch",
            "counter_*": "counts of an epoch that is over",
        },
        anew={
            "clusterings.*.duals": "0, as before a first epoch",
            "clusterings.*.seen": "0, as before a first epoch",
            "label*.rows": "no image has a label yet",
        },
        transposed=("clusterings.*.previous", "clusterings.*.current"),
    ),
    "deepclusterv2": Layout("prototypes.prototypes*", _SWAV_NAMES, _swav, unit_rows=("prototypes.*",)),
    "swav": Layout("projection_head.*", _SWAV_NAMES, _swav, unit_rows=("prototypes.weight",)),
    "torchvision": Layout(
        sign="layer1.*", names={"backbone.*": "*"}, settings=_torchvision,
        left={"fc.*": "a classifier of the classes that it was trained on"},
    ),
}  # fmt: skip

# Files that are no pre-trained network, or one that cannot be computed here.
REFUSED = {
    "q_encoder.*patch_embed*": "is SMoG's Swin. Its blocks put a batch norm on the residual path, which no network "
    "here does, and no such weights were published: a standard Swin would compute something else with these tensors",
    "linear.*": "holds a linear classifier and no network: import the pre-trained file that it was trained on, and "
    "`tessella evaluate` trains a probe of its own",
    "local_memory_*": "holds one rank's memory of SMoG and no network: import the checkpoint.pth.tar beside it",
    "queue": "holds one rank's queue of SwAV and no network: import the checkpoint.pth.tar beside it",
}
