"""A network of one's own, trained by one of Tessella's methods in a loop of one's own, then evaluated.

    python examples/own_backbone.py photos/train photos/test --epochs 10

A network needs a forward from images (b, 3, h, w) to features (b, d), and `feature_dim`, which is d.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch
from torch import Tensor, nn

import tessella
from tessella.data.loader import Loader
from tessella.data.sources import open_images
from tessella.data.transform import EvalTransform
from tessella.data.views import CropGroup, ViewSpec
from tessella.methods.method import Progress, Setting
from tessella.methods.swav import Swav, SwavConfig


class MyNetwork(nn.Module):
    """Three convolutions and a mean."""

    def __init__(self, size: int, width: int = 32) -> None:
        super().__init__()
        channels = [3, width, 2 * width, 4 * width]
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU())
                for before, after in itertools.pairwise(channels)
            )
        )
        self.feature_dim = channels[-1]
        self.transform = EvalTransform.of(size)  # how evaluations resize and normalise images

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) -> (b, feature_dim)."""
        return self.layers(x).mean(dim=(2, 3))


def main(words: list[str] | None = None) -> list[dict[str, Any]]:
    """Train and evaluate; returns the records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", help="labelled images; pretraining does not read the labels")
    parser.add_argument("test")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--size", type=int, default=32, help="pixels of a crop")
    parser.add_argument("--batch-size", type=int, default=128)
    options = parser.parse_args(words)

    torch.manual_seed(0)
    images = open_images(options.train)
    network = MyNetwork(options.size)
    config = SwavConfig(prototypes=50, hidden_dim=512, views=ViewSpec((CropGroup(2, options.size, (0.3, 1.0)),)))
    method = Swav(config, network, Setting(len(images), options.batch_size, seed=0))
    sampler = method.sampler(config, len(images), options.batch_size, 0)
    loader = Loader(images, Swav.view_spec(config), sampler, seed=0, device="cpu", workers=2)
    optimizer = torch.optim.AdamW(method.parameters(), lr=2e-3)
    progress = Progress(0, sampler.steps_per_epoch, options.epochs)
    for epoch in range(options.epochs):
        method.epoch_start(progress)
        for [batch] in loader.epoch(epoch):  # one micro-batch per step
            output = method(batch, progress)
            optimizer.zero_grad()
            output.loss.backward()
            method.before_update(progress)
            optimizer.step()
            method.after_update(progress)
            progress = progress.next()
        method.epoch_end(progress)
        print(f"epoch {epoch + 1}: loss {output.loss.item():.3f}")
    return tessella.evaluate(network, options.train, options.test, protocols=["knn"])


if __name__ == "__main__":
    main()
