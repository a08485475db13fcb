"""Small runs that tests share: seconds on one core."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tessella.data.views import ColorAugmentation, CropGroup, ViewSpec
from tessella.methods.jigclu import JigcluConfig
from tessella.methods.mejigclu import MejigcluConfig
from tessella.methods.smog import SmogConfig, two_pipelines
from tessella.methods.swav import SwavConfig
from tessella.modules.backbone import BackboneConfig
from tessella.optim import OptimizerConfig
from tessella.run.checkpoints import load
from tessella.run.config import RunConfig
from tests.newest import newest

_COLORS = ColorAugmentation(blur=0.3)
_CROPS = ViewSpec((CropGroup(2, 16, (0.3, 1.0), colors=_COLORS), CropGroup(1, 8, (0.1, 0.3))))


def tiny_run(method: str = "swav", data: str = "digits::test", **changes: Any) -> RunConfig:
    """Two epochs of five steps of 64 digits."""
    if method == "swav":
        settings: Any = SwavConfig(
            prototypes=20, embedding_dim=16, hidden_dim=32, queue_length=128, queue_from_epoch=0,
            freeze_prototypes_steps=2, views=_CROPS,
        )  # fmt: skip
        optimizer = OptimizerConfig("larc", lr=0.6, weight_decay=1e-6, warmup_epochs=1, warmup_lr=0.1)
    elif method == "smog":
        settings = SmogConfig(
            groups=20, embedding_dim=16, hidden_dim=32, momentum=0.9, group_momentum=(0.9, 0.8),
            views=two_pipelines(_CROPS.groups),
        )  # fmt: skip
        optimizer = OptimizerConfig("larc", lr=0.6, weight_decay=1e-6, warmup_epochs=1, warmup_lr=0.1)
    else:
        kind = {"jigclu": JigcluConfig, "mejigclu": MejigcluConfig}[method]
        settings = kind(tile_size=8, embedding_dim=16, colors=_COLORS)
        optimizer = OptimizerConfig("sgd", lr=0.03, per_epoch=True)
    config = RunConfig(
        settings, BackboneConfig("resnet10", 4, "small"), optimizer, data=data, epochs=2, batch_size=64,
        image_size=16, device="cpu", workers=1, log_every=2,
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def final_state(run: Path) -> dict[str, Tensor]:
    """Every tensor of a run's newest checkpoint and of its product."""
    checkpoint = newest(run / "checkpoints")
    assert checkpoint is not None
    tensors, facts = load(checkpoint)
    named = {f"{part}.{name}": tensor for part, group in tensors.items() for name, tensor in group.items()}
    product = {f"product.{name}": tensor for name, tensor in load_file(run / "backbone.safetensors").items()}
    return named | product | {"step": torch.tensor(facts["step"])}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert set(a) == set(b)
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different
