"""Our JigClu and MEJigClu driven beside `reference_jigclu`: equal weights, equal tiles, equal permutation.

In double precision: in single precision two correct programs part as soon as rounding moves one activation over the
kink of a ReLU, and a wrong constant could hide behind the tolerance that this asks for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tessella import dist
from tessella.data.batch import Batch
from tessella.methods.jigclu import Jigclu
from tessella.methods.mejigclu import Mejigclu
from tessella.methods.method import Progress
from tessella.ops.montage import tile_order
from tessella.optim import OptimizerConfig, build_optimizer, learning_rate
from tests.methods import reference_jigclu as official
from tests.methods.tiny import BATCH, averaged_gradients, on_this_rank, this_ranks_share

STEPS_PER_EPOCH, EPOCHS = 2, 3
STEPS = STEPS_PER_EPOCH * EPOCHS
OPTIMIZER = OptimizerConfig("sgd", lr=0.03, momentum=0.9, weight_decay=1e-4, per_epoch=True)
OFFICIAL = {"backbone.": "", "cluster_head.": "fc_clu.", "location_head.": "fc_loc.", "category_head.": "fc_cls."}

Jig = Jigclu | Mejigclu


def official_name(name: str) -> str:
    """Key of one of our tensors in the official encoder."""
    ours = next(prefix for prefix in OFFICIAL if name.startswith(prefix))
    return OFFICIAL[ours] + name.removeprefix(ours)


def official_network(method: Jig, stem_stride: int = 1) -> official.Network:
    """A copy of the method's present state."""
    weights = {official_name(n): p.detach().clone().requires_grad_() for n, p in method.named_parameters()}
    running = {f"backbone.{n}": b for n, b in method.backbone.named_buffers() if "running" in n}
    statistics = {official_name(n): b.clone() for n, b in running.items()}
    return official.Network(weights, statistics, stem_stride)


def tiles_of(step: int, size: int, n: int = BATCH) -> Tensor:
    """(4, n, 3, size, size): smooth patterns of an image with noise of each tile, so that there is something to learn.

    A function of the step: every rank draws the whole batch and takes its share.
    """
    generator = torch.Generator().manual_seed(step)
    scenes = torch.nn.functional.interpolate(torch.randn(n, 3, 4, 4, generator=generator), size, mode="bilinear")
    return scenes + 0.3 * torch.randn(4, n, 3, size, size, generator=generator)


def train_ours(make: Callable[[], Jig], rows: Callable[[int], Tensor], size: int) -> list[dict[str, Tensor]]:
    """What the engine does with the method, on this rank: losses, gradients and state of every step.

    Args:
        make: the method at its start.
        rows: of the images of a step's batch.
        size: of a tile in pixels.
    """
    method = on_this_rank(make())
    optimizer = build_optimizer(method, OPTIMIZER)
    history = []
    for step in range(STEPS):
        progress = Progress(step, STEPS_PER_EPOCH, EPOCHS)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(OPTIMIZER, *progress)
        done = method(this_ranks_share(Batch((tiles_of(step, size),), rows(step))), progress)
        done.loss.backward()
        gradients = averaged_gradients(method)
        for name, parameter in method.named_parameters():
            parameter.grad = gradients[name]
        optimizer.step()
        optimizer.zero_grad()
        second = done.metrics["location_loss" if isinstance(method, Jigclu) else "category_loss"]
        scale = method.cluster_weight / method.config.cluster_weight  # of the official code, which reports it scaled
        losses = torch.stack([done.loss.detach(), scale * done.metrics["cluster_loss"], second])
        losses = dist.all_reduce_sum(losses) / dist.world_size()
        state = {f"state {official_name(n)}": v.clone() for n, v in method.state_dict().items() if "partition" not in n}
        history.append(
            dict(zip(("loss", "cluster", "second"), losses, strict=True))
            | {f"gradient {official_name(n)}": g.clone() for n, g in gradients.items()}
            | {name: value for name, value in state.items() if "num_batches" not in name}
        )
    return history


def train_official(
    network: official.Network, size: int, world_size: int = 1, **settings: object
) -> list[dict[str, Tensor]]:
    """The same steps by the reference, on `world_size` imagined ranks."""
    history = []
    for step in range(STEPS):
        ranks = [list(tiles) for tiles in tiles_of(step, size).chunk(world_size, dim=1)]
        losses = official.step(network, ranks, tile_order(0, step, 4 * BATCH), **settings)  # type: ignore[arg-type]
        gradients = {f"gradient {n}": p.grad.clone() for n, p in network.weights.items() if p.grad is not None}
        network.sgd(official.official_rate(step // STEPS_PER_EPOCH, EPOCHS))
        state = {f"state {n}": v.detach().clone() for n, v in (network.weights | network.statistics).items()}
        history.append(losses | gradients | state)
    return history


def worst(ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]]) -> tuple[float, str]:
    """Largest relative error of any tensor of any step, in the maximum norm, and where."""
    assert len(ours) == len(theirs) == STEPS
    errors = []
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert set(mine) == set(other), set(mine) ^ set(other)
        for name, value in other.items():
            error = (mine[name] - value).abs().max() / value.abs().max().clamp_min(1e-12)
            errors.append((float(error), f"{name} of step {step}"))
    return max(errors)
