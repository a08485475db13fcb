"""Optimisers with the published update rules, and learning rates as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser and its learning-rate schedule: a linear warm-up, then a cosine."""

    name: Literal["sgd", "larc", "adamw"] = "sgd"
    lr: float = 0.03  # after the warm-up, at the run's batch size; nothing is scaled behind your back
    momentum: float = 0.9  # of SGD and LARC; AdamW's first beta
    weight_decay: float = 1e-4
    decay_norm_and_bias: bool = True  # the official SwAV and JigClu decay every parameter
    trust: float = 0.001  # LARC's trust coefficient
    warmup_epochs: int = 0
    warmup_lr: float = 0.0  # at the first step of the warm-up
    final_lr: float = 0.0  # the cosine's end
    per_epoch: bool = False  # keep the learning rate constant within an epoch, as JigClu does


def learning_rate(config: OptimizerConfig, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Learning rate of one update.

    Warm-up: `linspace(warmup_lr, lr)` inclusive at both ends. Then `final + (lr - final) (1 + cos(pi t / T)) / 2`,
    t = 0 ... T - 1, in steps, or in epochs if `per_epoch`. SwAV, main_swav; JigClu, section 10 of its specification.

    Args:
        config: the schedule.
        step: from 0.
        steps_per_epoch: of the run.
        epochs: of the run.
    """
    now, unit = (step // steps_per_epoch, 1) if config.per_epoch else (step, steps_per_epoch)
    warmup, total = config.warmup_epochs * unit, epochs * unit
    if now < warmup:
        share = now / (warmup - 1) if warmup > 1 else 1.0
        return config.warmup_lr + share * (config.lr - config.warmup_lr)
    t = (now - warmup) / max(total - warmup, 1)
    return config.final_lr + 0.5 * (config.lr - config.final_lr) * (1 + math.cos(math.pi * t))


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser over all trainable parameters of `module`."""
    decayed = [p for p in module.parameters() if p.requires_grad and (p.dim() > 1 or config.decay_norm_and_bias)]
    plain = [p for p in module.parameters() if p.requires_grad and not (p.dim() > 1 or config.decay_norm_and_bias)]
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}] if plain else [{"params": decayed}]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), weight_decay=config.weight_decay)
    if config.name == "larc":
        return LARC(groups, config.lr, config.momentum, config.weight_decay, config.trust)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


class LARC(torch.optim.SGD):
    """SGD with momentum whose gradients are first scaled per tensor to the size of the weights.

    For each tensor with gradient: if both norms are non-zero, g <- a (g + wd p) with
    a = trust |p| / (|g| + wd |p| + 1e-8); otherwise g stays as it is, without decay and without scaling. The
    learning rate multiplies outside the momentum buffer. Lists of tensors are updated at once and nothing waits for
    the device.

    Source: You, Gitman, Ginsburg, "Large batch training of convolutional networks", 2017, in the variant of SwAV's
    official runs (scaling without clipping).
    """

    def __init__(
        self, params: Iterable[Any], lr: float, momentum: float, weight_decay: float, trust: float, eps: float = 1e-8
    ) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.trust, self.eps = trust, eps

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays, strict=True):
            self._scale_gradients([p for p in group["params"] if p.grad is not None], decay)
            group["weight_decay"] = 0.0  # already in the gradients
        try:
            return super().step(closure)
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay

    def _scale_gradients(self, params: list[Tensor], decay: float) -> None:
        if not params:
            return
        grads = [p.grad for p in params if p.grad is not None]
        p_norm = torch.stack(torch._foreach_norm(params))
        g_norm = torch.stack(torch._foreach_norm(grads))
        both = (p_norm != 0) & (g_norm != 0)
        scale = torch.where(both, self.trust * p_norm / (g_norm + decay * p_norm + self.eps), 1.0)
        decayed = torch._foreach_mul(params, list((decay * both).unbind()))
        torch._foreach_add_(grads, decayed)
        torch._foreach_mul_(grads, list(scale.unbind()))
