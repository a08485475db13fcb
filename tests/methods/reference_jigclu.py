"""The whole official step of JigClu and MEJigClu on plain tensors, written for reading and not for speed.

Nothing of the package is used: a network is a dictionary of leaf tensors under the official names, ranks are lists,
every sum is written out. It makes one process do what R processes of the official code do together: synchronised
batch norm over R processes is batch norm over their concatenated montages, a gather whose backward sums followed by
a mean over processes is the gradient of the whole batch.

Sources: sections 3 to 10 of JigClu's and 3 to 9 of MEJigClu's specification.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

STAGES = (1, 2, 3, 4)


@dataclass
class Network:
    """A ResNet of one basic block per stage with the heads on top: what the official code calls `encoder`."""

    weights: dict[str, Tensor]  # leaves with gradient
    statistics: dict[str, Tensor]  # running means and variances
    stem_stride: int  # 1: 3 x 3 stem without pooling; 2: 7 x 7 stem and max-pool
    momenta: dict[str, Tensor] = field(default_factory=dict)

    def norm(self, x: Tensor, name: str) -> Tensor:
        """Batch norm in training mode."""
        mean = x.mean(dim=(0, 2, 3))
        variance = (x - mean[:, None, None]).square().mean(dim=(0, 2, 3))
        count = x.numel() // x.shape[1]
        with torch.no_grad():
            for kind, value in (("mean", mean), ("var", variance * count / (count - 1))):
                running = self.statistics[f"{name}.running_{kind}"]
                running.copy_(0.9 * running + 0.1 * value)
        x = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        return x * self.weights[f"{name}.weight"][:, None, None] + self.weights[f"{name}.bias"][:, None, None]

    def map(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) -> (b, d, h', w')."""
        w = self.weights
        if self.stem_stride == 1:
            x = F.relu(self.norm(F.conv2d(x, w["conv1.weight"], padding=1), "bn1"))
        else:
            x = F.relu(self.norm(F.conv2d(x, w["conv1.weight"], stride=2, padding=3), "bn1"))
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        for stage in STAGES:
            name, stride = f"layer{stage}.0", 1 if stage == 1 else 2
            y = F.relu(self.norm(F.conv2d(x, w[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1"))
            y = self.norm(F.conv2d(y, w[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
            if f"{name}.downsample.0.weight" in w:
                x = self.norm(F.conv2d(x, w[f"{name}.downsample.0.weight"], stride=stride), f"{name}.downsample.1")
            x = F.relu(y + x)
        return x

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def mlp(self, x: Tensor, name: str) -> Tensor:
        return self.linear(self.linear(x, f"{name}.0").clamp(min=0), f"{name}.2")

    def sgd(self, lr: float, momentum: float = 0.9, decay: float = 1e-4) -> None:
        """Momentum with the decay of every parameter in the gradient; then no gradients."""
        with torch.no_grad():
            for name, p in self.weights.items():
                g = p.grad + decay * p
                self.momenta[name] = momentum * self.momenta.get(name, torch.zeros_like(p)) + g
                p -= lr * self.momenta[name]
                p.grad = None


def official_rate(epoch: int, epochs: int, lr: float = 0.03) -> float:
    """Constant within an epoch, no warm-up."""
    return lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def montages(tiles_of_ranks: list[list[Tensor]], perm: Tensor) -> list[Tensor]:
    """Each rank's montages: gather place by place in rank order, concatenate, permute, stitch, cut.

    Args:
        tiles_of_ranks: for each rank four (n / R, 3, s, s), places top-left, bottom-left, top-right, bottom-right.
        perm: (4 n,).
    """
    ranks = len(tiles_of_ranks)
    gathered = [torch.cat([tiles[place] for tiles in tiles_of_ranks]) for place in range(4)]
    n = len(gathered[0])
    shuffled = torch.cat(gathered)[perm]
    top = torch.cat([shuffled[:n], shuffled[n : 2 * n]], dim=3)
    bottom = torch.cat([shuffled[2 * n : 3 * n], shuffled[3 * n :]], dim=3)
    whole = torch.cat([top, bottom], dim=2)
    return [whole[rank * n // ranks : (rank + 1) * n // ranks] for rank in range(ranks)]


def official_cells(maps: Tensor) -> Tensor:
    """(n, d, 7 or 8, 7 or 8) -> (4 n, d): enlarged to 8 x 8, quarters averaged, all top-left vectors first."""
    maps = F.interpolate(maps, size=(8, 8), mode="bilinear", align_corners=False)
    quarters = [maps[:, :, row : row + 4, column : column + 4] for row in (0, 4) for column in (0, 4)]
    return torch.cat([quarter.mean(dim=(2, 3)) for quarter in quarters])


def block_cells(maps: Tensor, m: int) -> Tensor:
    """(n, d, h, h) with h a multiple of m -> (m * m * n, d): the rule for maps that can be cut as they are."""
    s = maps.shape[-1] // m
    blocks = [maps[:, :, r * s : (r + 1) * s, c * s : (c + 1) * s] for r in range(m) for c in range(m)]
    return torch.cat([block.mean(dim=(2, 3)) for block in blocks])


def contrastive(z: Tensor, images: Tensor, temperature: float, base_temperature: float) -> Tensor:
    """Masks of N x N, as in the official code, whose factor temperature / base_temperature stays in."""
    itself = torch.eye(len(z), dtype=torch.bool)
    positive = (images[:, None] == images[None, :]) & ~itself
    scores = z @ z.T / temperature
    scores = scores - scores.max(dim=1, keepdim=True).values.detach()
    log_p = scores - (scores.exp() * ~itself).sum(dim=1, keepdim=True).log()
    return (-(log_p * positive).sum(dim=1) / positive.sum(dim=1)).mean() * temperature / base_temperature


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return -torch.stack([row.log_softmax(0)[label] for row, label in zip(logits, labels, strict=True)]).mean()


def step(
    network: Network,
    tiles_of_ranks: list[list[Tensor]],
    perm: Tensor,
    *,
    second: str,
    temperature: float = 0.3,
    base_temperature: float = 0.07,
    alpha: float = 1.0,
    beta: float = 1.0,
    official_pooling: bool = True,
) -> dict[str, Tensor]:
    """Losses of one step; gradients are left in `network.weights`.

    Args:
        network: weights and statistics.
        tiles_of_ranks: see `montages`.
        perm: (4 n,), what rank 0 broadcasts.
        second: "loc": corner of the cut; "cls": image slot (MEJigClu).
        temperature: of the contrastive loss.
        base_temperature: 0.07 in the official code; equal to `temperature`: the paper's equation.
        alpha: weight of the second loss.
        beta: weight of the contrastive loss.
        official_pooling: resize to 8 x 8; else cut the map as it is.
    """
    n = sum(len(tiles[0]) for tiles in tiles_of_ranks)
    maps = network.map(torch.cat(montages(tiles_of_ranks, perm)))
    vectors = official_cells(maps) if official_pooling else block_cells(maps, 2)
    image, place = perm % n, perm // n
    z = network.mlp(vectors, "fc_clu")
    z = z / z.norm(dim=1, keepdim=True)
    cluster_loss = contrastive(z, image, temperature, base_temperature)
    if second == "loc":
        second_loss = cross_entropy(network.linear(vectors, "fc_loc"), place)
    else:
        second_loss = cross_entropy(network.mlp(vectors, "fc_cls"), image)
    loss = alpha * second_loss + beta * cluster_loss
    loss.backward()
    return {"loss": loss.detach(), "cluster": cluster_loss.detach(), "second": second_loss.detach()}


def subset_order(split: list[list[int]], shuffles: list[list[int]], steps: int, wrap: bool) -> list[list[int]]:
    """An epoch of MEJigClu's sampler: at step t slot k reads subset k at its shuffled position t.

    Args:
        split: n lists of images.
        shuffles: n permutations of the subsets' positions.
        steps: of the epoch.
        wrap: whether short subsets start again.
    """
    batches = []
    for t in range(steps):
        batch = []
        for subset, shuffle in zip(split, shuffles, strict=True):
            assert wrap or t < len(subset)
            batch.append(subset[shuffle[t % len(subset)]])
        batches.append(batch)
    return batches
