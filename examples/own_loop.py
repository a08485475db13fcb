"""SwAV on a folder of images, in a training loop of one's own: plain PyTorch, with Tessella's parts.

    python examples/own_loop.py photos/ --epochs 10 --size 32

What `tessella pretrain` adds to this: exact resume, several GPUs, alarms, a log and a page.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from tessella.data.loader import Loader
from tessella.data.sampler import EpochSampler
from tessella.data.sources import open_images
from tessella.data.views import CropGroup, ViewSpec
from tessella.modules.backbone import BackboneConfig, build_backbone
from tessella.modules.heads import Projector, Prototypes
from tessella.ops.assignment import sinkhorn
from tessella.ops.losses import swapped_prediction


class MySwav(nn.Module):
    """Backbone, projector and prototypes; the loss of one batch."""

    def __init__(self, backbone: nn.Module, feature_dim: int, prototypes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = Projector(feature_dim, 512, 128, norm=True)
        self.prototypes = Prototypes(128, prototypes)

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        """Crops of B images, (V, B, 3, s, s) -> the loss, a scalar."""
        self.prototypes.normalize_()
        embeddings = self.projector(self.backbone(crops.flatten(0, 1))).unflatten(0, crops.shape[:2])  # (V, B, D)
        scores = self.prototypes(embeddings)  # (V, B, K)
        codes = sinkhorn(scores.detach(), epsilon=0.05, iterations=3)
        return swapped_prediction(scores, codes, range(len(crops)), temperature=0.1)


def main(words: list[str] | None = None) -> list[float]:
    """Train; returns the mean loss of each epoch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="a folder of images, or anything else that `tessella pretrain` takes")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--size", type=int, default=32, help="pixels of a crop")
    parser.add_argument("--prototypes", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("backbone.pth"))
    given = parser.parse_args(words)

    images = open_images(given.data)
    views = ViewSpec((CropGroup(2, given.size, (0.25, 1.0)),))
    order = EpochSampler(len(images), given.batch_size, seed=0)
    loader = Loader(images, views, order, seed=0, device="cpu", workers=2)

    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig("resnet10", width=16, stem="small"))  # or any module of your own
    model = MySwav(backbone, backbone.feature_dim, given.prototypes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    losses = []
    for epoch in range(given.epochs):
        total = 0.0
        for [batch] in loader.epoch(epoch):  # one micro-batch per step
            loss = model(batch.views[0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        losses.append(total / order.steps_per_epoch)
        print(f"epoch {epoch + 1}: loss {losses[-1]:.3f}")
    torch.save(backbone.state_dict(), given.out)
    print(f"Evaluate it: tessella evaluate {given.out} --train LABELLED --test LABELLED --out figures")
    return losses


if __name__ == "__main__":
    main()
