"""The health of a run: does it learn, or has it collapsed?

A collapsed run looks like a slow one: its loss stays at ln K, and nothing fails. The monitor knows no method. It
observes the embeddings, assignments and loss of every step at the cost of two small kernels, and turns them every few
steps into figures (`report`) and into warnings that name the remedy (`alarms`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tessella import dist
from tessella.methods.method import MethodOutput, Progress
from tessella.ops.metrics import effective_rank

# A run starts where a collapsed one ends: loss near ln K, embeddings in a narrow cone, few clusters in use. So an alarm
# is raised only after a warm-up, and only for a condition that has lasted for some steps and some reports. With a
# report every 20 steps, that is step 100 at the earliest; with one every 50, step 150.
WARMUP_STEPS = 100
LASTING_STEPS = 80
LASTING_REPORTS = 3

# The std of a unit vector's D components over the batch, times sqrt(D), is sqrt(1 - |mean|^2): 0.05 means a mean cosine
# of 0.9975 between images. A random network has 0.1 and more, a trained one about 1.
COLLAPSED_STD = 0.05
# Embeddings on a line have rank 1, on a plane at most 2. In 128 dimensions a random network has 50 and more. Of 46 runs
# of small recipes and of variants, 45 stayed above 14 and one fell to 7 for a moment; with a learning rate 100 times
# too high most fell below 6.
COLLAPSED_RANK = 2.0
COLLAPSED_RANK_OF_MANY = 8.0  # from 128 dimensions on; in proportion below
# Views whose pixels are all equal. Crops of digits on black have some; a data set of blank images has nothing else.
MOST_BLANK = 0.9
_BLANK = 0.01  # range of a blank view's pixels, normalised
# Collapsed runs that users reported stayed within 1e-4 of ln K, and approached it from above. A healthy loss crosses ln
# K early on: SwAV on small images stayed this close for 20 steps, narrow networks for up to 80. A loss that is below by
# more than rounding has learned something.
COLLAPSED_LOSS = 3e-4
BELOW_COLLAPSE = 5e-5
# Assignments spread as if over less than 5 % of the clusters. Uneven clusters are normal, and so are some empty ones.
FEW_CLUSTERS = 0.05
MOST_DEAD = 0.95
# Below ten images per cluster an empty one means nothing: with one image per cluster a third is empty by chance.
IMAGES_PER_CLUSTER = 10

_REMEDY = (
    "check that the images differ from each other; then, one at a time: lower the learning rate or lengthen "
    "its warm-up, weaken the augmentation (larger crops, less colour)"
)
_CLUSTER_REMEDY = (
    "sharper codes (SwAV: --method.epsilon 0.03, or hard codes), prototypes frozen for longer, a queue that "
    "starts later, a larger batch"
)
_IDENTICAL = (
    "the embeddings of all images are equal, and so are the images: the files that were compared hold the same bytes. "
    "The network has not collapsed, but there is nothing to learn: give images that differ"
)


class Alarm(NamedTuple):
    """A warning for people."""

    name: str
    text: str  # observation, normal value, remedy


class Monitor(nn.Module):
    """Figures and alarms of one run. All state is in buffers: a resumed run reports the same as an uninterrupted one.

    Call `observe` after every forward pass, `epoch_start` between epochs, and on all ranks together `report` every few
    steps and `merge` before the state is saved (not needed with one process). `engine.numbers` handles NaN and infinite
    numbers; the monitor counts them, and stores its decisions.
    """

    assigned: Tensor
    assigned_here: Tensor
    nonfinite_here: Tensor
    left_out: Tensor
    close_until: Tensor
    streaks: Tensor
    since: Tensor
    raised: Tensor
    ALARMS = ("collapsed_embeddings", "loss_at_collapse", "few_clusters", "blank_images")

    def __init__(self, collapse_loss: float | None, clusters: int | None, embedding_dim: int) -> None:
        """Start without observations.

        Args:
            collapse_loss: the loss when all embeddings are equal; None if it is not known.
            clusters: number K of prototypes, centres or groups; None for a method without.
            embedding_dim: D.
        """
        super().__init__()
        self.collapse_loss = collapse_loss
        self.clusters = clusters
        self.embedding_dim = embedding_dim
        self.identical_images = False  # whether the files have the same content: then equal embeddings are right
        # Images per cluster since the epoch's start, of all ranks.
        self._count("assigned", clusters or 0)
        # This rank's part of them since the last merge, and its NaN or infinite losses since the last check. They
        # differ between ranks, so they are not saved.
        self._count("assigned_here", clusters or 0, persistent=False)
        self._count("nonfinite_here", persistent=False)
        # Steps that were left out, and the step up to which every step is checked.
        self._count("left_out")
        self._count("close_until")
        # For each alarm: consecutive reports in which its condition held, the step of the first of them, and whether
        # the alarm was raised and has not cleared.
        self._count("streaks", len(self.ALARMS))
        self._count("since", len(self.ALARMS))
        self._count("raised", len(self.ALARMS))
        self.register_state_dict_pre_hook(_merge_if_alone)
        self._loss: Tensor | None = None
        self._embeddings: Tensor | None = None
        self._views: Tensor | None = None

    def _count(self, name: str, *shape: int, persistent: bool = True) -> None:
        self.register_buffer(name, torch.zeros(shape, dtype=torch.long), persistent=persistent)

    @torch.no_grad()
    def epoch_start(self) -> None:
        """Forget the assignments of the last epoch."""
        self.assigned.zero_()
        self.assigned_here.zero_()

    @torch.no_grad()
    def forget_unmerged(self) -> None:
        """Forget what was observed and not merged: the run returns to an earlier state."""
        self.assigned_here.zero_()
        self.nonfinite_here.zero_()

    @torch.no_grad()
    def observe(self, step: MethodOutput, views: Tensor | None = None, left_out: bool = False) -> None:
        """Record one forward pass of this rank. Nothing waits for the device.

        Args:
            step: the method's output; embeddings (n, D), assignments (n,) in [0, K).
            views: (B, 3, s, s), one view of each image.
            left_out: whether the step was undone: then it is reported, but not counted.
        """
        self._loss = step.loss.detach()
        self._embeddings = step.embeddings.detach()
        self._views = views
        if left_out:
            return
        self.nonfinite_here += ~torch.isfinite(self._loss)
        if self.clusters and step.assignments is not None:
            self.assigned_here.index_add_(0, step.assignments, torch.ones_like(step.assignments))

    @torch.no_grad()
    def merge(self) -> None:
        """Add up the counts of all ranks, so that the buffers of each hold the sum. On all ranks together."""
        self.assigned += dist.all_reduce_sum(self.assigned_here)
        self.assigned_here.zero_()

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """Figures of the last step and of the epoch so far. On all ranks together; waits for the device.

        Returns:
            Those of the following that apply, equal on all ranks:
            `loss_to_collapse`: 1 - loss / collapse loss, 0 when collapsed, 1 at loss 0, negative above.
            `embedding_std`: mean over dimensions of the std over the batch, times sqrt(D): 1 isotropic, 0 collapsed.
            `effective_rank`: of the embeddings, in [1, D], 0 when they are all equal; see `ops.metrics`.
            `cluster_evenness`: perplexity of the epoch's assignments / K, in (0, 1].
            `dead_clusters`: share of clusters without an image since the epoch's start; only after ten images per
                cluster.
            `blank_images`: share of the step's images whose view has one colour only.
        """
        assert self._loss is not None and self._embeddings is not None, "report before the first observe"
        self.merge()
        figures: dict[str, float] = {}
        if self.collapse_loss:
            loss = dist.all_reduce_sum(self._loss.float()).item() / dist.world_size()
            figures["loss_to_collapse"] = 1.0 - loss / self.collapse_loss
        figures |= self._embedding_figures(self._embeddings)
        figures |= self._cluster_figures()
        if self._views is not None:
            pixels = self._views.flatten(2)  # (B, 3, s * s)
            blank = ((pixels.amax(dim=2) - pixels.amin(dim=2)) < _BLANK).all(dim=1).float().mean()
            figures["blank_images"] = dist.all_reduce_sum(blank).item() / dist.world_size()
        return figures

    def _embedding_figures(self, embeddings: Tensor) -> dict[str, float]:
        rows = dist.gather(embeddings).cpu().double()
        if not torch.isfinite(rows).all():
            return {"embedding_std": math.nan, "effective_rank": math.nan}
        std = rows.std(dim=0, correction=0).mean().item() * math.sqrt(self.embedding_dim)
        return {"embedding_std": std, "effective_rank": effective_rank(rows)}

    def _cluster_figures(self) -> dict[str, float]:
        counts = self.assigned.cpu().double() if self.clusters else torch.zeros(0)
        seen = counts.sum().item()
        if not seen:
            return {}
        entropy = torch.special.entr(counts / seen).sum()
        figures = {"cluster_evenness": entropy.exp().item() / len(counts)}
        if seen >= IMAGES_PER_CLUSTER * len(counts):
            figures["dead_clusters"] = (counts == 0).double().mean().item()
        return figures

    @torch.no_grad()
    def alarms(self, report: dict[str, float], progress: Progress) -> list[Alarm]:
        """The alarms that this step's report raises, usually none: each once, and again only after it has cleared.

        A condition must have lasted for three reports and 80 steps, and the run for 100 steps.
        """
        buffers = self.streaks, self.since, self.raised
        streaks, since, raised = (buffer.tolist() for buffer in buffers)
        new = []
        for i, (name, text) in enumerate(self._conditions(report).items()):
            if text is None:
                continue  # unknown at this report, such as dead clusters early in an epoch
            if not text:
                streaks[i] = raised[i] = 0
                continue
            since[i] = since[i] if streaks[i] else progress.step
            streaks[i] += 1
            due = max(WARMUP_STEPS, since[i] + LASTING_STEPS)
            lasting = streaks[i] >= LASTING_REPORTS and progress.step >= due
            if lasting and not raised[i]:
                raised[i] = 1
                new.append(Alarm(name, text))
        for buffer, values in zip(buffers, (streaks, since, raised), strict=True):
            buffer.copy_(torch.tensor(values))
        return new

    def _conditions(self, report: dict[str, float]) -> dict[str, str | None]:
        """For each alarm, in the order of `ALARMS`: its text, "" if the condition does not hold, None if unknown."""
        collapsed = _collapsed_embeddings(report, self.embedding_dim)
        return {
            "collapsed_embeddings": collapsed and _IDENTICAL if self.identical_images else collapsed,
            "loss_at_collapse": None if self.identical_images else _loss_at_collapse(report),
            "few_clusters": None if self.identical_images else _few_clusters(report),
            "blank_images": _blank_images(report),
        }


def _merge_if_alone(monitor: Monitor, prefix: str, keep_vars: bool) -> None:
    """Merge before the state is saved, which one process can do without the others."""
    if dist.world_size() == 1:
        monitor.merge()


def _collapsed_embeddings(report: dict[str, float], dim: int) -> str | None:
    std, rank = report["embedding_std"], report["effective_rank"]
    if math.isnan(std) or math.isnan(rank):
        return None  # such a step is left out, with an alarm of its own
    if std >= COLLAPSED_STD and rank >= max(COLLAPSED_RANK, min(COLLAPSED_RANK_OF_MANY, dim / 16)):
        return ""
    return (
        f"the embeddings of different images are almost equal: std {std:.3f}, effective rank {rank:.1f} of {dim}, "
        f"where a healthy run has a std near 1 and a rank of ten and more: {_REMEDY}; {_CLUSTER_REMEDY}"
    )


def _loss_at_collapse(report: dict[str, float]) -> str | None:
    distance = report.get("loss_to_collapse")
    if distance is None or math.isnan(distance):
        return None
    if not -COLLAPSED_LOSS < distance < BELOW_COLLAPSE:
        return ""
    return (
        "the loss stays at the value of a network that gives every image the same answer (relative distance "
        f"{distance:.5f}), where a healthy one falls below it within the first epochs: {_CLUSTER_REMEDY}; "
        f"{_REMEDY}"
    )


def _few_clusters(report: dict[str, float]) -> str | None:
    if "dead_clusters" not in report:
        return None
    used, dead = report["cluster_evenness"], report["dead_clusters"]
    if used >= FEW_CLUSTERS and dead <= MOST_DEAD:
        return ""
    return (
        f"nearly all images fall into a few clusters: they spread as over {used:.1%} of the clusters and "
        f"{dead:.1%} are empty, where a healthy run uses most: {_CLUSTER_REMEDY}, fewer clusters; {_REMEDY}"
    )


def _blank_images(report: dict[str, float]) -> str | None:
    blank = report.get("blank_images")
    if blank is None:
        return None
    if blank <= MOST_BLANK:
        return ""
    return (
        f"{blank:.0%} of the images that the network sees have one colour only, where a healthy run has few of them: "
        "check the files (`tessella scan`) and the views on the run's page (`tessella report`); if only the views are "
        "blank, make the crops larger"
    )
