"""A ResNet, its heads and the official optimisers written out with tensor operations, by the names of the weights.

Nothing here uses a module of the package: batch norm is sums over pixels, updates are loops over tensors. Everything is
computed in the precision of the weights that come in, which in the tests is float64.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Network:
    """Weights with gradient, and batch statistics, by name."""

    def __init__(self, state: Mapping[str, Tensor], *parts: str) -> None:
        """Copy the tensors of `state` whose names begin with one of `parts`."""
        mine = {n: t.detach().clone() for n, t in state.items() if n.split(".")[0] in parts}
        self.statistics = {n: t for n, t in mine.items() if n.endswith(_STATISTICS)}
        self.weights = {n: t.requires_grad_() for n, t in mine.items() if n not in self.statistics}

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """Of every weight."""
        return dict(zip(self.weights, torch.autograd.grad(loss, list(self.weights.values())), strict=True))

    def state(self) -> dict[str, Tensor]:
        """Weights and statistics."""
        return {n: t.detach() for n, t in self.weights.items()} | self.statistics

    # Layers

    def norm(self, name: str, maps: list[Tensor]) -> list[Tensor]:
        """Batch norm in training mode over all maps, (n, c) or (n, c, h, w), as one batch of pixels."""
        columns = torch.cat([x.transpose(0, 1).flatten(1) for x in maps], dim=1)  # (c, pixels)
        count = columns.shape[1]
        mean = columns.sum(dim=1) / count
        variance = ((columns - mean[:, None]) ** 2).sum(dim=1) / count
        statistics = self.statistics
        statistics[f"{name}.running_mean"] = 0.9 * statistics[f"{name}.running_mean"] + 0.1 * mean.detach()
        unbiased = variance.detach() * count / (count - 1)
        statistics[f"{name}.running_var"] = 0.9 * statistics[f"{name}.running_var"] + 0.1 * unbiased
        statistics[f"{name}.num_batches_tracked"] = statistics[f"{name}.num_batches_tracked"] + 1
        weight = self.weights.get(f"{name}.weight", torch.ones_like(mean))
        bias = self.weights.get(f"{name}.bias", torch.zeros_like(mean))
        result = []
        for x in maps:
            shape = (1, -1, *[1] * (x.dim() - 2))
            standard = (x - mean.view(shape)) / (variance.view(shape) + 1e-5).sqrt()
            result.append(standard * weight.view(shape) + bias.view(shape))
        return result

    def head(self, name: str, x: Tensor) -> Tensor:
        """A Sequential of linear layers and batch norms; ReLU after every norm but one at the very end."""
        layers = sorted({int(n.split(".")[1]) for n in self.state() if n.startswith(f"{name}.")})
        for i in layers:
            if f"{name}.{i}.running_mean" in self.statistics:
                (x,) = self.norm(f"{name}.{i}", [x])
                x = x if i == layers[-1] else x.relu()
            else:
                x = x @ self.weights[f"{name}.{i}.weight"].T + self.weights[f"{name}.{i}.bias"]
        return x

    def resnet(self, name: str, *sizes: Tensor) -> Tensor:
        """Pooled features of a ResNet with the stem for small images; (n, 3, s, s) of each size, size after size.

        Several sizes pass together, with batch norm over all of their pixels, but for the shortcuts.
        """
        maps = [self._conv(f"{name}.conv1", x, 1, 1) for x in sizes]
        maps = [x.relu() for x in self.norm(f"{name}.bn1", maps)]
        for stage in (1, 2, 3, 4):
            block = 0
            while f"{name}.layer{stage}.{block}.conv1.weight" in self.weights:
                maps = self._block(f"{name}.layer{stage}.{block}", maps, 2 if stage > 1 and block == 0 else 1)
                block += 1
        return torch.cat([x.mean(dim=(2, 3)) for x in maps])

    def _block(self, name: str, maps: list[Tensor], stride: int) -> list[Tensor]:
        shortcuts = maps
        if f"{name}.downsample.0.weight" in self.weights:
            projected = [self._conv(f"{name}.downsample.0", x, stride, 0) for x in maps]
            shortcuts = [self.norm(f"{name}.downsample.1", [x])[0] for x in projected]  # one size after the other
        maps = [self._conv(f"{name}.conv1", x, stride, 1) for x in maps]
        maps = [x.relu() for x in self.norm(f"{name}.bn1", maps)]
        maps = self.norm(f"{name}.bn2", [self._conv(f"{name}.conv2", x, 1, 1) for x in maps])
        return [(x + shortcut).relu() for x, shortcut in zip(maps, shortcuts, strict=True)]

    def _conv(self, name: str, x: Tensor, stride: int, padding: int) -> Tensor:
        return F.conv2d(x, self.weights[f"{name}.weight"], stride=stride, padding=padding)


def unit(x: Tensor) -> Tensor:
    """Rows of length 1."""
    return x / (x * x).sum(dim=-1, keepdim=True).sqrt()


class Momentum:
    """SGD with momentum 0.9 whose gradients are first scaled by a rule of the tensor; its buffers are state."""

    def __init__(self, rule: str, decay: float) -> None:
        self.rule, self.decay = {"larc": larc, "lars": lars}[rule], decay
        self.buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self, network: Network, gradients: Mapping[str, Tensor | None], lr: float) -> None:
        """Move every weight that has a gradient, in place."""
        for name, gradient in gradients.items():
            if gradient is None:
                continue
            p = network.weights[name]
            scaled = self.rule(p, gradient, self.decay)
            self.buffers[name] = 0.9 * self.buffers[name] + scaled if name in self.buffers else scaled
            p -= lr * self.buffers[name]

    def state(self) -> dict[str, Tensor]:
        """Momentum by the name of the weight."""
        return {f"{name}/momentum_buffer": b for name, b in self.buffers.items()}


def larc(p: Tensor, g: Tensor, decay: float) -> Tensor:
    """Scaling without clipping; a weight or gradient of length 0 leaves the gradient as it is. SwAV and SMoG."""
    p_length, g_length = p.norm(), g.norm()
    if p_length == 0 or g_length == 0:
        return g
    return 0.001 * p_length / (g_length + decay * p_length + 1e-8) * (g + decay * p)


def lars(p: Tensor, g: Tensor, decay: float) -> Tensor:
    """Scaling of matrices and filters; vectors take the plain gradient. CoKe."""
    if p.dim() <= 1:
        return g
    g = g + decay * p
    p_length, g_length = p.norm(), g.norm()
    return g * (0.001 * p_length / g_length) if p_length > 0 and g_length > 0 else g
