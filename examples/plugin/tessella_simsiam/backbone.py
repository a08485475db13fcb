"""A plain network of four convolutions as a backbone."""

from __future__ import annotations

from torch import Tensor, nn

from tessella.modules.backbone import BackboneConfig


class Plain4(nn.Module):
    """Four convolutions, each with batch norm and ReLU, the last three of stride 2; then the mean over positions."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for number in range(4):
            width, stride = config.width << number, 1 if number == 0 else 2
            layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.layers = nn.Sequential(*layers)
        self.feature_dim = channels

    def feature_map(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) -> (b, feature_dim, h / 8, w / 8)."""
        return self.layers(x)

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) -> (b, feature_dim)."""
        return self.feature_map(x).mean(dim=(2, 3))
