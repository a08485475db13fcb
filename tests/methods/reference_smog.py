"""SMoG's official epochs, rank by rank: each has its images, its bank and its loss; groups are summed over ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tests.methods.reference_network import Momentum, Network, unit
from tests.methods.reference_run import State

Views = tuple[Tensor, ...]  # (v, B, 3, s, s): large and small crops of pipeline A, then of pipeline B


def centroids(rows: list[Tensor], start: Tensor, iterations: int) -> Tensor:
    """Spherical k-means over the ranks' rows, from given centroids; empty clusters keep their vector."""
    centres = start.clone()
    for _ in range(iterations):
        nearest = [(part @ centres.T).argmax(dim=1) for part in rows]
        for k in range(len(centres)):
            count = sum(int((own == k).sum()) for own in nearest)
            if count:
                total = sum(part[own == k].sum(dim=0) for part, own in zip(rows, nearest, strict=True))
                centres[k] = unit(total / count)
    return centres


class ReferenceSmog:
    """One training run on several simulated ranks.

    Args:
        start: state of a fresh run.
        rates: learning rate of each step.
        ranks: number of processes.
        images: rows of the data set.
        sets: independent sets of groups.
        beta: momentum of the groups before the first step and in the last one.
        momentum: of the momentum encoder.
        label_crops: large crops that give labels.
        through_update: whether gradient flows through the groups.
    """

    temperature, kmeans_iterations = 0.1, 10

    def __init__(
        self, start: State, rates: list[float], ranks: int, images: int, sets: int, beta: tuple[float, float],
        momentum: float, label_crops: int, through_update: bool, decay: float = 1e-6,
    ) -> None:  # fmt: skip
        self.net = Network(start, "backbone", "projector", "predictor")
        k = {n.removeprefix("momentum_encoder."): t for n, t in start.items() if n.startswith("momentum_encoder.")}
        self.k_net = Network(k, "backbone", "projector")
        self.optimizer = Momentum("larc", decay)
        self.rates, self.ranks, self.sets, self.beta, self.momentum = rates, ranks, sets, beta, momentum
        self.label_crops, self.through_update = label_crops, through_update
        self.groups = list(start["groups"].clone())
        self.bank: list[dict[int, Tensor]] = [{} for _ in range(ranks)]  # image -> (large crops, D)
        self.iteration = 0

    # Epoch start

    def fill_bank(self, views: Views, instances: Tensor) -> None:
        """One batch of the pass before the first epoch: the large crops of pipeline A, each a pass of its own."""
        large = views[0]
        with torch.no_grad():
            z = torch.stack([unit(self.net.head("projector", self.net.resnet("backbone", crop))) for crop in large])
        self._write(z, instances)

    def regroup(self, first_rows: Mapping[int, list[int]]) -> None:
        """Groups from k-means of the bank, and the momentum encoder's weights from the online ones.

        Args:
            first_rows: for each set, the images whose rows the centroids start from: the random decision.
        """
        for h in range(self.sets):
            rows = [
                torch.stack([row for _, row in sorted(own.items())])[:, h % len(next(iter(own.values())))]
                for own in self.bank
            ]
            everywhere = {i: row for own in self.bank for i, row in own.items()}
            chosen = torch.stack([everywhere[i][h % len(everywhere[i])] for i in first_rows[h]])
            self.groups[h] = centroids(rows, chosen, self.kmeans_iterations)
        for name, p in self.k_net.weights.items():
            p.data = self.net.weights[name].detach().clone()

    def _write(self, z: Tensor, instances: Tensor) -> None:
        """(large crops, B, D) unit rows of the global batch; an image lives on one rank."""
        for n, image in enumerate(instances.tolist()):
            for own in self.bank:
                own.pop(image, None)
            self.bank[n * self.ranks // len(instances)][image] = z[:, n].detach()

    # Step

    def step(self, micro_batches: list[tuple[Views, Tensor]]) -> tuple[list[Tensor], State]:
        """One update of (views, instances). Returns the losses of the micro-batches, and gradients."""
        losses, features = [], []
        gradients = {name: torch.zeros_like(p) for name, p in self.net.weights.items()}
        with torch.no_grad():
            for name, p in self.k_net.weights.items():
                p.copy_(self.momentum * p + (1 - self.momentum) * self.net.weights[name])
        for number, (views, instances) in enumerate(micro_batches, start=1):
            loss, z = self._loss(views, features, last=number == len(micro_batches))
            losses.append(loss.detach())
            for name, gradient in self.net.gradients(loss).items():
                gradients[name] = gradients[name] + gradient / len(micro_batches)
            self._write(z, instances)
        self.optimizer.step(self.net, gradients, self.rates[self.iteration])
        self.iteration += 1
        return losses, gradients

    def _loss(self, views: Views, features: list[Tensor], last: bool) -> tuple[Tensor, Tensor]:
        half, total_steps = len(views) // 2, len(self.rates)
        a, b = views[:half], views[half:]
        q_views, k_views = (a, b) if self.iteration % 2 == 0 else (b, a)
        batch, large = views[0].shape[1], len(views[0])

        projected = self.net.head("projector", self.net.resnet("backbone", *(v.flatten(0, 1) for v in q_views)))
        p = unit(self.net.head("predictor", projected)).unflatten(0, (-1, batch))
        z = unit(projected).unflatten(0, (-1, batch))[:large]
        with torch.no_grad():
            seen = (k_views[0][: self.label_crops], *k_views[1:])
            zk = self.k_net.head("projector", self.k_net.resnet("backbone", *(v.flatten(0, 1) for v in seen)))
            zk = unit(zk).unflatten(0, (-1, batch))[: self.label_crops]

        old = [groups.clone() for groups in self.groups]
        features.append(z)
        new = old
        if last:  # only the newest features carry gradient
            everything = torch.cat([*(f.detach() for f in features[:-1]), z], dim=1)
            beta = self.beta[0] + (self.beta[1] - self.beta[0]) * (self.iteration + 1) / total_steps
            new = [self._moved(old[h], everything[h % large], beta) for h in range(self.sets)]
            self.groups = [groups.detach() for groups in new]
        scored = new if self.through_update else [groups.detach() for groups in new]

        share, total = batch // self.ranks, torch.zeros(())
        for rank in range(self.ranks):
            mine = slice(rank * share, (rank + 1) * share)
            for h in range(self.sets):
                for crop in range(self.label_crops):
                    y = (zk[crop, mine] @ old[h].T).argmax(dim=1)
                    for view in p[:, mine]:
                        log_p = (view @ scored[h].T / self.temperature).log_softmax(dim=1)
                        terms = self.ranks * self.sets * self.label_crops * len(p)
                        total = total - log_p[torch.arange(share), y].mean() / terms
        return total, z

    def _moved(self, groups: Tensor, rows: Tensor, beta: float) -> Tensor:
        nearest = (rows.detach() @ groups.T).argmax(dim=1)
        moved = []
        for k, group in enumerate(groups):
            mine = rows[nearest == k]
            moved.append(unit(beta * group + (1 - beta) * mine.sum(dim=0) / len(mine)) if len(mine) else group)
        return torch.stack(moved)

    def state(self) -> State:
        """Weights and statistics of both encoders, groups, momentum."""
        k = {f"momentum_encoder.{n}": t for n, t in self.k_net.state().items()}
        return self.net.state() | k | self.optimizer.state() | {"groups": torch.stack(self.groups)}

    def banked(self) -> dict[int, Tensor]:
        """Row of each known image."""
        return {image: row for own in self.bank for image, row in own.items()}
