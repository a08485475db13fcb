"""SwAV's official training step, rank by rank: every rank has its images, its queue and its loss."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tests.methods.reference_network import Momentum, Network, unit
from tests.methods.reference_run import State


def schedule(lr: float, start: float, final: float, warmup: int, epochs: int, steps: int) -> list[float]:
    """Learning rate of each step of the run."""
    t = np.arange(steps * (epochs - warmup))
    cosine = final + 0.5 * (lr - final) * (1 + np.cos(np.pi * t / (steps * (epochs - warmup))))
    return np.concatenate([np.linspace(start, lr, steps * warmup), cosine]).tolist()


def sinkhorn(parts: list[Tensor], epsilon: float, iterations: int) -> list[Tensor]:
    """Codes of each rank's (n, K) scores; what the ranks exchange is a sum over the list."""
    x = [(m / epsilon).exp().T for m in parts]
    k, samples = x[0].shape[0], sum(m.shape[1] for m in x)
    total = sum(m.sum() for m in x)
    x = [m / total for m in x]
    for _ in range(iterations):
        rows = sum(m.sum(dim=1, keepdim=True) for m in x)
        x = [m / rows / k for m in x]
        x = [m / m.sum(dim=0, keepdim=True) / samples for m in x]
    return [(m * samples).T for m in x]


class ReferenceSwav:
    """One training run on several simulated ranks.

    Args:
        start: state of a fresh run.
        rates: learning rate of each step.
        steps_per_epoch: of the run.
        ranks: number of processes.
        queue: total length, over the ranks.
        queue_from: epoch.
        freeze: steps for which the prototypes rest.
        code_crops: the crops that give codes.
    """

    temperature, epsilon, iterations = 0.1, 0.05, 3

    def __init__(
        self, start: State, rates: list[float], steps_per_epoch: int, ranks: int, queue: int, queue_from: int,
        freeze: int, code_crops: tuple[int, ...] = (0, 1), decay: float = 1e-6,
    ) -> None:  # fmt: skip
        self.net = Network(start, "backbone", "projector", "prototypes")
        self.optimizer = Momentum("larc", decay)
        self.rates, self.steps_per_epoch, self.ranks = rates, steps_per_epoch, ranks
        self.queue_length, self.queue_from, self.freeze, self.code_crops = queue, queue_from, freeze, code_crops
        self.queues: list[Tensor] | None = None  # of each rank: (code crops, length / ranks, D)
        self.queue_is_used = False
        self.iteration = 0

    def step(self, micro_batches: list[tuple[Tensor, ...]]) -> tuple[list[Tensor], State]:
        """One update. Views (v, B, 3, s, s) per size. Returns losses of the micro-batches, and gradients."""
        if self.queue_length and self.queues is None and self.iteration // self.steps_per_epoch >= self.queue_from:
            dim = self.net.weights["prototypes.weight"].shape[1]
            shape = len(self.code_crops), self.queue_length // self.ranks, dim
            self.queues = [self.net.weights["prototypes.weight"].new_zeros(shape) for _ in range(self.ranks)]
        losses, gradients = [], {name: torch.zeros_like(p) for name, p in self.net.weights.items()}
        for views in micro_batches:
            losses.append(self._loss(views))
            for name, gradient in self.net.gradients(losses[-1]).items():
                gradients[name] = gradients[name] + gradient / len(micro_batches)
        frozen = {"prototypes.weight": None} if self.iteration < self.freeze else {}
        self.optimizer.step(self.net, gradients | frozen, self.rates[self.iteration])
        self.iteration += 1
        return [loss.detach() for loss in losses], gradients

    def _loss(self, views: tuple[Tensor, ...]) -> Tensor:
        w = self.net.weights["prototypes.weight"]
        with torch.no_grad():
            w /= w.norm(dim=1, keepdim=True)
        features = torch.cat([self.net.resnet("backbone", group.flatten(0, 1)) for group in views])
        z = unit(self.net.head("projector", features))
        crops, share = sum(len(group) for group in views), views[0].shape[1] // self.ranks
        per_crop = z.unflatten(0, (crops, -1))  # (V, B, D)
        mine = [per_crop[:, r * share : (r + 1) * share] for r in range(self.ranks)]
        scores = [rows @ w.T for rows in mine]
        codes = self._codes([rows.detach() for rows in mine], [s.detach() for s in scores], w.detach())
        total = torch.zeros(())
        for rank in range(self.ranks):
            for i, crop in enumerate(self.code_crops):
                for other in set(range(crops)) - {crop}:
                    log_p = (scores[rank][other] / self.temperature).log_softmax(dim=1)
                    cross_entropy = -(codes[i][rank] * log_p).sum(dim=1).mean()
                    total = total + cross_entropy / (crops - 1) / len(self.code_crops) / self.ranks
        return total

    def _codes(self, z: list[Tensor], scores: list[Tensor], w: Tensor) -> list[list[Tensor]]:
        """For each crop that gives codes, each rank's (B / ranks, K)."""
        codes = []
        for i, crop in enumerate(self.code_crops):
            inputs, count = [s[crop] for s in scores], len(scores[0][crop])
            if self.queues is not None:
                if self.queue_is_used or all(bool(queue[i, -1].any()) for queue in self.queues):
                    self.queue_is_used = True
                    inputs = [torch.cat([q[i] @ w.T, s]) for q, s in zip(self.queues, inputs, strict=True)]
                for queue, rows in zip(self.queues, z, strict=True):
                    queue[i] = torch.cat([rows[crop], queue[i, :-count]])
            codes.append([q[-count:] for q in sinkhorn(inputs, self.epsilon, self.iterations)])
        return codes

    def state(self) -> State:
        """Weights, statistics, momentum."""
        return self.net.state() | self.optimizer.state()
