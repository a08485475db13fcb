"""CoKe's official epochs, rank by rank and image by image."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.methods.reference_network import Momentum, Network, unit
from tests.methods.reference_run import State


def schedule(lr: float, warmup: int, epochs: int, s: int) -> list[float]:
    """Learning rate of each of s steps per epoch: nothing in epoch 0, then a warm-up, then a cosine."""
    rates, end = [], (1 + warmup) * s
    for t in range(epochs * s):
        if t < s:
            rates.append(0.0)
        elif t < end:
            rates.append(lr * max(1, t - s) / (warmup * s))
        else:
            rates.append(lr * (1 + math.cos(math.pi * (t - end) / (epochs * s - end))) / 2)
    return rates


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch; target (B, K)."""
    return -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()


class Clustering:
    """One head: centres (D, K), duals, counters, and a memory of every image's labels."""

    def __init__(self, centres: Tensor, ratio: float, dual_lr: float, stage: int | None, slots: int) -> None:
        self.pre, self.cur = centres.T.clone(), centres.T.clone()
        self.k = self.pre.shape[1]
        self.dual, self.counter = centres.new_zeros(self.k), centres.new_zeros(self.k)
        self.ratio, self.dual_lr, self.stage, self.slots = ratio, dual_lr, stage, slots
        self.memory: dict[int, list[list[float]]] = {}  # image -> [label, weight] of each slot

    def assign(self, epoch: int, features: Tensor, images: list[int]) -> Tensor:
        """One step of the whole batch: labels, then duals, centres, memory; returns the loss's targets (B, K)."""
        second = self.stage is not None and epoch >= self.stage
        targets = [self.target(i) for i in images] if epoch > 0 else []
        labels = (features @ (self.pre if second else self.cur) + self.dual).argmax(dim=1).tolist()
        for j in range(self.k):
            mine = [f for f, label in zip(features, labels, strict=True) if label == j]
            self.dual[j] = self.dual[j] - self.dual_lr * len(mine) / len(labels) + self.dual_lr * self.ratio / self.k
            if self.ratio < 1:
                self.dual[j] = max(self.dual[j], 0.0)
            if mine:
                total = self.counter[j] + len(mine)
                self.cur[:, j] = self.cur[:, j] * self.counter[j] / total + sum(mine) / total
                self.counter[j] = total
                if not second:
                    self.cur[:, j] = unit(self.cur[:, j])
        for i, label in zip(images, labels, strict=True):
            self.store(epoch, i, label)
        return torch.stack(targets or [self.target(i) for i in images])

    def store(self, epoch: int, image: int, label: int) -> None:
        """Hard labels first; from the stage on an average of one-hot labels in a few slots."""
        if self.stage is None or epoch <= self.stage:
            self.memory[image] = [[label, 1.0]] + [[1, 0.0] for _ in range(self.slots - 1)]
            return
        f, slots = 1 / (epoch - self.stage + 1), self.memory[image]
        known = [slot for slot in slots if slot[0] == label and slot[1] > 0]
        slot = known[0] if known else min(slots, key=lambda s: s[1])
        evicted = 0.0 if known else slot[1]
        if not known:
            slot[:] = [label, 0.0]
        for other in slots:
            other[1] *= (1 - f) / (1 - evicted)
        slot[1] += f

    def target(self, image: int) -> Tensor:
        """(K,) softmax over the weights in use."""
        y = self.pre.new_zeros(self.k)
        for label, weight in self.memory[image]:
            if weight > 0:
                y[int(label)] = math.exp(weight / 0.5)
        return y / y.sum()

    def end_epoch(self, epoch: int) -> None:
        """This epoch's centres become those of the loss."""
        if self.stage is not None and epoch >= self.stage:
            f = 1 / (epoch - self.stage + 1)
            self.cur = unit(((1 - f) * self.pre + f * unit(self.cur.T).T).T).T
        self.pre, self.counter = self.cur.clone(), torch.zeros_like(self.counter)


class ReferenceCoke:
    """One training run on several simulated ranks.

    Args:
        start: state of a fresh run.
        rates: learning rate of each step.
        steps_per_epoch: of the run.
        ranks: number of processes.
        clusterings: one per head.
        temperature: of the loss.
        alpha: weight of the label, two views and more.
        beta: one view: of the prediction head; multi-crop: of the large crops.
    """

    def __init__(
        self, start: State, rates: list[float], steps_per_epoch: int, ranks: int, clusterings: list[Clustering],
        temperature: float, alpha: float, beta: float, decay: float = 1e-4,
    ) -> None:  # fmt: skip
        self.net = Network(start, "backbone", "projector", "predictor")
        self.optimizer = Momentum("lars", decay)
        self.rates, self.steps_per_epoch, self.ranks, self.clusterings = rates, steps_per_epoch, ranks, clusterings
        self.temperature, self.alpha, self.beta = temperature, alpha, beta
        self.iteration = 0

    def step(self, crops: list[Tensor], images: list[int]) -> tuple[Tensor, State]:
        """One update. (B, 3, s, s) per view, the large ones first. Returns the loss and gradients."""
        epoch = self.iteration // self.steps_per_epoch
        p, q = [], []
        for crop in crops:  # a forward of each view by itself
            z = self.net.head("projector", self.net.resnet("backbone", crop))
            p.append(unit(z))
            q.append(unit(self.net.head("predictor", z)))
        share, losses = len(images) // self.ranks, []
        features = torch.stack([x.detach() for x in p[:2]]).mean(dim=0)
        for head in self.clusterings:
            pre = head.pre.clone()
            targets = head.assign(epoch, features, images)
            for rank in range(self.ranks):
                mine = slice(rank * share, (rank + 1) * share)
                logits = [[x[mine] @ pre / self.temperature for x in branch] for branch in (p, q)]
                losses.append(self._loss(*logits, targets[mine]))
        loss = torch.stack(losses).mean()
        gradients = self.net.gradients(loss)
        self.optimizer.step(self.net, gradients, self.rates[self.iteration])
        self.iteration += 1
        if self.iteration % self.steps_per_epoch == 0:
            for head in self.clusterings:
                head.end_epoch(epoch)
        return loss.detach(), gradients

    def _loss(self, p: list[Tensor], q: list[Tensor], y: Tensor) -> Tensor:
        if len(p) == 1:
            return self.beta * cross_entropy(q[0], y) + (1 - self.beta) * cross_entropy(p[0], y)
        q1, q2, a = p[0].detach().softmax(dim=1), p[1].detach().softmax(dim=1), self.alpha
        large, small = torch.zeros(()), torch.zeros(())
        for z in (p, q):
            to_label = cross_entropy(z[0], y) + cross_entropy(z[1], y)
            to_view = cross_entropy(z[0], q2) + cross_entropy(z[1], q1)
            large = large + (a * to_label + (1 - a) * to_view) / 4
            for crop in z[2:]:
                to_views = cross_entropy(crop, q1) + cross_entropy(crop, q2)
                small = small + (2 * a * cross_entropy(crop, y) + (1 - a) * to_views) / 4 / (len(p) - 2)
        return large if len(p) == 2 else self.beta * large + (1 - self.beta) * small

    def state(self) -> State:
        """Weights, statistics, momentum."""
        return self.net.state() | self.optimizer.state()
