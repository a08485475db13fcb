"""Optimisers with the published update rules, and learning rates as pure functions of the step."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tessella.ranges import FractionBelowOne, NonNegative, NonNegativeInt, Positive


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser and its learning-rate schedule: a linear warm-up, then a cosine."""

    name: Literal["sgd", "larc", "lars", "adamw"] = "sgd"
    lr: NonNegative = 0.03  # after the warm-up, at the run's batch size; it is not scaled
    momentum: FractionBelowOne = 0.9  # of SGD, LARC and LARS; AdamW's first beta
    weight_decay: NonNegative = 1e-4
    # The official SwAV and JigClu decay every parameter. False: no decay of norms and biases, nor of a transformer's
    # position embeddings, class tokens and tables of relative positions.
    decay_norm_and_bias: bool = True
    trust: Positive = 0.001  # trust coefficient of LARC and LARS
    zero_lr_epochs: NonNegativeInt = 0  # at learning rate 0 before the warm-up, while CoKe finds its first clusters
    warmup_epochs: NonNegativeInt = 0
    warmup_lr: NonNegative = 0.0  # at the first step of the warm-up
    warmup_end: Literal["last", "next"] = "last"  # step that has the full rate: the warm-up's last, or the one after it
    final_lr: NonNegative = 0.0  # the cosine's end
    per_epoch: bool = False  # keep the learning rate constant within an epoch, as JigClu does


def scaled(config: OptimizerConfig, factor: float) -> OptimizerConfig:
    """The schedule with all learning rates multiplied, rounded to six digits."""
    lr, warmup_lr, final_lr = (float(f"{factor * x:.6g}") for x in (config.lr, config.warmup_lr, config.final_lr))
    return dataclasses.replace(config, lr=lr, warmup_lr=warmup_lr, final_lr=final_lr)


def learning_rate(config: OptimizerConfig, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Learning rate of one update of a run; `step` counts from 0.

    Warm-up over W: `linspace(warmup_lr, lr)` inclusive at both ends; or, if `warmup_end` is "next", in shares
    max(t, 1) / W, t = 0 ... W - 1. Then `final + (lr - final) (1 + cos(pi t / T)) / 2`, t = 0 ... T - 1. In steps, or
    in epochs if `per_epoch`. SwAV, main_swav; JigClu, section 10 of its specification; CoKe, main_*.
    """
    now, unit = (step // steps_per_epoch, 1) if config.per_epoch else (step, steps_per_epoch)
    warmup, total = config.warmup_epochs * unit, (epochs - config.zero_lr_epochs) * unit
    now -= config.zero_lr_epochs * unit
    if now < 0:
        return 0.0
    if now < warmup:
        inclusive = now / (warmup - 1) if warmup > 1 else 1.0
        share = inclusive if config.warmup_end == "last" else max(now, 1) / warmup
        return config.warmup_lr + share * (config.lr - config.warmup_lr)
    t = (now - warmup) / max(total - warmup, 1)
    return config.final_lr + 0.5 * (config.lr - config.final_lr) * (1 + math.cos(math.pi * t))


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser over all trainable parameters of `module`."""
    spared = set() if config.decay_norm_and_bias else _spared_from_decay(module)
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [p for name, p in trained if name not in spared]}]
    if plain := [p for name, p in trained if name in spared]:
        groups.append({"params": plain, "weight_decay": 0.0})
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), weight_decay=config.weight_decay)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    kind = LARS if config.name == "lars" else LARC
    return kind(groups, config.lr, config.momentum, config.weight_decay, config.trust)


def _spared_from_decay(module: nn.Module) -> set[str]:
    """Names of norms, biases, and of what timm networks list in their `no_weight_decay()`."""
    names = [name for name, _ in module.named_parameters()]
    spared = {name for name, p in module.named_parameters() if p.dim() < 2}
    for prefix, part in module.named_modules():
        listed: Any = getattr(part, "no_weight_decay", None)
        for pattern in listed() if callable(listed) else ():
            spared.update(fnmatch.filter(names, f"{prefix}.{pattern}" if prefix else pattern))
    return spared


class LARC(torch.optim.SGD):
    """SGD with momentum whose gradients are first scaled per tensor to the size of the weights.

    For each tensor with gradient: if both norms are non-zero, g <- a (g + wd p) with
    a = trust |p| / (|g| + wd |p| + 1e-8); otherwise g stays as it is, without decay and without scaling. The
    learning rate multiplies outside the momentum buffer. Nothing waits for the device.

    Source: You, Gitman, Ginsburg, "Large batch training of convolutional networks", 2017, in the variant of SwAV's
    official runs (scaling without clipping).
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float, weight_decay: float, trust: float) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.trust = trust

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
        scale = torch.where(both, self.trust * p_norm / (g_norm + decay * p_norm + 1e-8), 1.0)
        decayed = torch._foreach_mul(params, list((decay * both).unbind()))
        torch._foreach_add_(grads, decayed)
        torch._foreach_mul_(grads, list(scale.unbind()))


class LARS(LARC):
    """SGD with momentum whose gradients of matrices and filters are first scaled to the size of the weights.

    For each tensor with gradient and more than one dimension: g <- a (g + wd p) with a = trust |p| / |g + wd p|, or 1
    if either norm is 0. Biases and norms get neither decay nor scaling.

    Source: You, Gitman, Ginsburg, 2017, in the variant of CoKe's official runs.
    """

    def _scale_gradients(self, params: list[Tensor], decay: float) -> None:
        params = [p for p in params if p.dim() > 1]
        if not params:
            return
        grads = [p.grad for p in params if p.grad is not None]
        torch._foreach_add_(grads, params, alpha=decay)
        p_norm = torch.stack(torch._foreach_norm(params))
        g_norm = torch.stack(torch._foreach_norm(grads))
        scale = torch.where((p_norm > 0) & (g_norm > 0), self.trust * p_norm / g_norm, 1.0)
        torch._foreach_mul_(grads, list(scale.unbind()))
