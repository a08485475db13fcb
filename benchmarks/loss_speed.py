"""Assignment, loss and backward pass of the methods without a network, beside other code for the same figures.

    python benchmarks/loss_speed.py --out benchmarks/results/loss_speed_cpu.json

SwAV and SMoG stand beside lightly, where it is installed. Beside the others stands the plain way, written here from the
papers: log-softmax of every pair, masks of all pairs, a loop over groups. Before anything is timed, values and
gradients of all cases of a table are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from rich.table import Table
from side_by_side import compared, in_turn, installed, report, saved_bytes, table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tessella.ops.assignment import sinkhorn
from tessella.ops.grouping import group_loss, group_sums, moved_groups, nearest_group
from tessella.ops.losses import crop_prediction, supervised_contrastive, swapped_prediction


@dataclass(frozen=True)
class Options:
    """Sizes."""

    batch_size: int = 256
    views: int = 8  # of SwAV, of which the first two give codes
    prototypes: int = 3000
    queue: int = 3840
    dim: int = 128
    rounds: int = 5
    threads: int = 1
    seed: int = 0
    out: Path | None = None


Case = Callable[[], tuple[Tensor, Tensor | None]]  # one step: its value, and the gradient that reaches the embeddings


class _Calls(TorchDispatchMode):
    """Counts what reaches the dispatcher: on a GPU about as many kernels and their launches."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **kwargs or {})


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(shape), dim=-1)


# --- SwAV -----------------------------------------------------------------------------------------------------


def swav_cases(options: Options) -> dict[str, Case]:
    """From unit embeddings to their gradient: scores, codes of two views with a queue, loss, backward."""
    z = unit(options.views, options.batch_size, options.dim).requires_grad_()
    prototypes = unit(options.prototypes, options.dim).requires_grad_()
    queue = unit(2, options.queue, options.dim)

    def ours() -> Tensor:
        scores = z @ prototypes.T
        with torch.no_grad():
            codes = sinkhorn(scores[:2].detach(), 0.05, 3, queue @ prototypes.T)
        return swapped_prediction(scores, codes, (0, 1), 0.1)

    cases = {"tessella": _stepping(ours, z, prototypes)}
    if installed("lightly"):
        from lightly.loss import SwaVLoss

        criterion = SwaVLoss()

        def lightly() -> Tensor:
            scores = [view @ prototypes.T for view in z.flatten(0, 1).split(options.batch_size)]
            with torch.no_grad():
                past = [rows @ prototypes.T for rows in queue]
            return criterion(scores[:2], scores[2:], past).squeeze()

        cases = {"lightly": _stepping(lightly, z, prototypes)} | cases

    def products() -> Tensor:
        with torch.no_grad():
            queue @ prototypes.T
        return (z @ prototypes.T).sum()

    return cases | {"matrix products alone": _stepping(products, z, prototypes)}


def sinkhorn_cases(options: Options) -> dict[str, Case]:
    """The codes of one view alone, from scores that are there."""
    scores = unit(options.queue + options.batch_size, options.dim) @ unit(options.prototypes, options.dim).T
    batch = scores[: options.batch_size]

    def ours() -> tuple[Tensor, None]:
        return sinkhorn(batch, 0.05, 3, scores[options.batch_size :].clone()), None  # a step has no need to copy

    cases: dict[str, Case] = {"tessella": ours}
    if installed("lightly"):
        from lightly.loss.swav_loss import sinkhorn as theirs

        cases = {"lightly": lambda: (theirs(scores)[: options.batch_size], None)} | cases
    return cases


# --- SMoG -----------------------------------------------------------------------------------------------------


def smog_cases(options: Options, groups: int) -> dict[str, Case]:
    """One set of groups, one pair of views: move the groups by the batch, score against them, loss, backward."""
    momentum = 0.99
    z = unit(options.batch_size, options.dim)
    p = unit(options.batch_size, options.dim).requires_grad_()
    start = unit(groups, options.dim)

    def ours() -> Tensor:
        own = nearest_group(z, start)
        moved = moved_groups(start, *group_sums(z, own, groups), momentum)
        return group_loss(F.normalize(p, dim=1)[None], moved, own[None], 0.1)

    def loop() -> Tensor:
        own = (z @ start.T).argmax(dim=1)
        moved = start.clone()
        for group in own.unique():
            moved[group] = momentum * start[group] + (1 - momentum) * z[own == group].mean(dim=0)
        logits = F.normalize(p, dim=1) @ F.normalize(moved, dim=1).T / 0.1
        return F.cross_entropy(logits, own)

    cases = {"loop over groups": _stepping(loop, p), "tessella": _stepping(ours, p)}
    if installed("lightly"):
        from lightly.models.modules.heads import SMoGPrototypes

        module = SMoGPrototypes(start.clone(), momentum)

        def lightly() -> Tensor:
            own = module.assign_groups(z)
            moved = module.get_updated_group_features(z)
            return F.cross_entropy(module(p, moved, temperature=0.1), own)

        cases = {"lightly": _stepping(lightly, p)} | cases
    return cases


# --- CoKe -----------------------------------------------------------------------------------------------------


def coke_cases(options: Options) -> dict[str, Case]:
    """Two large and six small crops, three clusterings: scores, loss, backward."""
    views, batch, share, temperature = options.views, options.batch_size // 2, 0.2, 0.05
    z = unit(2, views, batch, options.dim).requires_grad_()  # from the projector and from the predictor
    clusterings = [unit(k, options.dim) for k in (3000, 4000, 5000)]
    labels = [torch.randint(len(centres), (batch, 1)) for centres in clusterings]
    ones = torch.ones(batch, 1)

    def ours() -> Tensor:
        losses = []
        for centres, label in zip(clusterings, labels, strict=True):
            losses.append(crop_prediction(z @ centres.T, label, ones, temperature, share, 0.5))
        return torch.stack(losses).mean()

    def plain() -> Tensor:
        losses = []
        for centres, label in zip(clusterings, labels, strict=True):
            logits = [[view @ centres.T / temperature for view in head] for head in z]
            with torch.no_grad():
                first, second = (view.softmax(dim=1) for view in logits[0][:2])
            targets = [second, first, *[(first + second) / 2] * (views - 2)]
            for head in logits:
                for number, (view, target) in enumerate(zip(head, targets, strict=True)):
                    soft = -(target * F.log_softmax(view, dim=1)).sum(dim=1).mean()
                    loss = share * F.cross_entropy(view, label[:, 0]) + (1 - share) * soft
                    losses.append(loss / (2 if number < 2 else views - 2) / 4 / len(clusterings))
        return torch.stack(losses).sum()

    return {"plain": _stepping(plain, z), "tessella": _stepping(ours, z)}


# --- JigClu ---------------------------------------------------------------------------------------------------


def jigclu_cases(options: Options) -> dict[str, Case]:
    """The contrast of four tiles per image."""
    n = 4 * options.batch_size
    z, image = unit(n, options.dim).requires_grad_(), torch.randperm(n) % options.batch_size

    def ours() -> Tensor:
        return supervised_contrastive(z, image, 0.3)

    def masks() -> Tensor:
        logits = z @ z.T / 0.3
        logits = logits - logits.max(dim=1, keepdim=True).values.detach()
        others = 1 - torch.eye(n)
        positive = (image[:, None] == image).float() * others
        log_p = logits - (logits.exp() * others).sum(dim=1, keepdim=True).log()
        return -((positive * log_p).sum(dim=1) / positive.sum(dim=1)).mean()

    return {"masks": _stepping(masks, z), "tessella": _stepping(ours, z)}


# --- measuring ------------------------------------------------------------------------------------------------


def _stepping(loss_of: Callable[[], Tensor], *leaves: Tensor) -> Case:
    def step() -> tuple[Tensor, Tensor | None]:
        for leaf in leaves:
            leaf.grad = None
        loss = loss_of()
        loss.backward()
        return loss.detach(), leaves[0].grad

    return step


def measure(cases: dict[str, Case], options: Options) -> list[dict[str, Any]]:
    """Time, operator calls and memory kept for the backward pass of each case, the first one being the base."""
    _agree(cases)
    rows = compared(in_turn(cases, options.rounds), base=next(iter(cases)))
    for row in rows:
        run = cases[row["case"]]
        with _Calls() as calls:
            run()
        row |= {"calls": calls.count, "saved_mb": saved_bytes(run) / 1e6}
    return rows


def _agree(cases: dict[str, Case]) -> None:
    """That all cases compute the same value and gradient; one that computes only a part is named so."""
    values = {name: run() for name, run in cases.items() if not name.endswith("alone")}
    ours, our_gradient = values["tessella"]
    for value, gradient in values.values():
        torch.testing.assert_close(value, ours, atol=1e-5, rtol=1e-4)
        if gradient is not None and our_gradient is not None:
            torch.testing.assert_close(gradient, our_gradient, atol=1e-3 * float(our_gradient.abs().max()), rtol=0)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    found = {
        f"SwAV: {options.batch_size} x {options.views}, K {options.prototypes}, queue {options.queue}": swav_cases,
        f"Sinkhorn alone: {options.queue + options.batch_size} x {options.prototypes}": sinkhorn_cases,
        f"SMoG: batch {options.batch_size}, 300 groups": partial(smog_cases, groups=300),
        f"SMoG: batch {options.batch_size}, 3000 groups": partial(smog_cases, groups=3000),
        f"CoKe: batch {options.batch_size // 2} x {options.views}, K 3000 + 4000 + 5000": coke_cases,
        f"JigClu: {4 * options.batch_size} tiles": jigclu_cases,
    }
    results = {title: measure(make(options), options) for title, make in found.items()}
    more = {"calls": "calls", "saved_mb": "MB kept for backward"}
    tables: list[Table] = [table(title, rows, more) for title, rows in results.items()]
    settings = {key: value for key, value in asdict(options).items() if key != "out"}
    missing = [] if installed("lightly") else ["lightly"]
    report(tables, {"options": settings, "missing_peers": missing, "tables": results}, "loss_speed.py", options.out)
    if missing:
        print("lightly is not installed: it would stand beside SwAV and SMoG (pip install lightly)")


if __name__ == "__main__":
    main()
