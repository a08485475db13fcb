"""The base of all methods: a module whose `forward` returns the loss, with declarations and hooks.

A method is one file: a frozen config, and a class that declares what the rest of the package needs to know (views,
sampler, cost, rule for other batch sizes, official checkpoints). `tessella.methods` and the entry points
`tessella.methods` of other packages list the classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from tessella.data.batch import Batch
from tessella.data.sampler import EpochSampler, Sampler
from tessella.data.views import ViewSpec
from tessella.methods.layout import Layout
from tessella.modules.backbone import Backbone, BackboneConfig
from tessella.optim import OptimizerConfig, scaled


class Progress(NamedTuple):
    """The only clock of a run. `step` is the number of complete optimiser updates.

    A named tuple, because Lightning Fabric refuses frozen dataclasses as inputs.
    """

    step: int
    steps_per_epoch: int
    epochs: int

    @property
    def epoch(self) -> int:
        """Epoch of the next step, from 0."""
        return self.step // self.steps_per_epoch

    @property
    def step_in_epoch(self) -> int:
        """Position of the next step in its epoch, from 0."""
        return self.step % self.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps_per_epoch * self.epochs

    def next(self) -> Progress:
        """The clock after one more update."""
        return Progress(self.step + 1, self.steps_per_epoch, self.epochs)


class Setting(NamedTuple):
    """What a method needs to know about its run."""

    images: int  # rows of per-image state; 0 when the method is rebuilt for an evaluation
    batch_size: int  # images of one forward over all ranks (a micro-batch when gradients are accumulated)
    seed: int
    accumulate: int = 1  # micro-batches per update


class MethodOutput(NamedTuple):
    """What `forward` returns. A named tuple, because Lightning Fabric refuses frozen dataclasses as outputs."""

    loss: Tensor  # scalar, float32; the mean over ranks is the objective
    metrics: dict[str, Tensor]  # scalars for the log, detached, on the device
    embeddings: Tensor  # (n, D) unit rows, detached: the monitor's view of collapse
    assignments: Tensor | None = None  # (n,) int64 index of the nearest prototype, centre or group


def joined(outputs: Sequence[MethodOutput]) -> MethodOutput:
    """The outputs of an update's micro-batches as one: means of loss and metrics, all embeddings and assignments."""
    if len(outputs) == 1:
        return outputs[0]
    assignments = [output.assignments for output in outputs if output.assignments is not None]
    return MethodOutput(
        torch.stack([output.loss.detach() for output in outputs]).mean(),
        {name: torch.stack([output.metrics[name] for output in outputs]).mean() for name in outputs[0].metrics},
        torch.cat([output.embeddings for output in outputs]),
        torch.cat(assignments) if assignments else None,
    )


class Pass(NamedTuple):
    """Images of one size that go through the backbone together."""

    images: int  # for each training image
    size: int  # pixels, square
    trained: bool  # with a backward pass


class BatchChange(NamedTuple):
    """From the batch size that settings were made for to another one."""

    old: int  # images per update
    new: int
    together: int  # new images of one forward, a micro-batch


@dataclass(frozen=True)
class MethodConfig:
    """Base of the methods' settings. A method's own config gives `name` a default and adds its fields."""

    name: str


class Method(nn.Module):
    """Base of the methods. State is parameters and buffers made in the constructor, equal on all ranks."""

    title: ClassVar[str]  # the method's name as people write it
    Config: ClassVar[type[MethodConfig]]  # its settings, a frozen dataclass; a run's `method.name` is its `name`
    batch_rule: ClassVar[str] = "learning rates in proportion to the batch"  # what `at_batch_size` does, and why
    layouts: ClassVar[tuple[Layout, ...]] = ()  # of official checkpoints
    # Patterns of state that is never taken from another run's weights: a new run starts it as the constructor does.
    not_transferred: ClassVar[tuple[str, ...]] = ()
    pipelines: ClassVar[int] = 1  # sets of crop groups that differ only in their colours
    clusters: int | None = None  # how many prototypes, centres or groups `assign` chooses from; None: it cannot

    def __init__(self, config: Any, backbone: Backbone, setting: Setting) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.setting = setting

    @property
    def embedding_dim(self) -> int:
        """Columns of `MethodOutput.embeddings`."""
        return int(self.config.embedding_dim)

    @classmethod
    def view_spec(cls, config: Any) -> ViewSpec:
        """The views of one image that `forward` expects, in order."""
        spec: ViewSpec = config.views
        return spec

    @classmethod
    def passes(cls, config: Any, backbone: BackboneConfig) -> list[Pass]:
        """Passes through the backbone, or a copy of it, per training image in one step, the first one trained.

        A montage of m x m tiles is one image of its own size. Passes before the first step are left out.
        """
        return [Pass(g.views // g.tiles**2, g.size * g.tiles, trained=True) for g in cls.view_spec(config).groups]

    @classmethod
    def at_batch_size(cls, config: Any, rates: OptimizerConfig, change: BatchChange) -> tuple[Any, OptimizerConfig]:
        """The method's settings and the learning rates at another batch size; `batch_rule` says why."""
        return config, scaled(rates, change.new / change.old)

    @classmethod
    def sampler(cls, config: Any, images: int, batch_size: int, seed: int) -> Sampler:
        """Which of `images` make up each step of `batch_size` images, over all ranks and micro-batches.

        Every image once per epoch, unless a method needs another order. `seed` is the run's.
        """
        return EpochSampler(images, batch_size, seed)

    def collapse_loss(self) -> float | None:
        """The value of the loss when all embeddings are equal; None if it is not known."""
        return None

    def forward(self, batch: Batch, progress: Progress) -> MethodOutput:
        """Loss of one (micro-)batch of this rank."""
        raise NotImplementedError

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Called on every rank before the first step of a run.

        `batches` are this rank's, one pass over the images that is not trained on; they are read only when iterated.
        """

    def epoch_start(self, progress: Progress) -> None:
        """Called on every rank before the first step of an epoch."""

    def before_update(self, progress: Progress) -> None:
        """Called between backward and the optimiser's step."""

    def after_update(self, progress: Progress) -> None:
        """Called after the optimiser's step, with the progress of the step just made."""

    def epoch_end(self, progress: Progress) -> None:
        """Called on every rank after the last step of an epoch; `progress` is that of the next epoch's first step."""

    def assign(self, features: Tensor) -> Tensor:
        """Cluster of each image from its backbone features: (n, feature_dim) -> (n,) int64."""
        raise NotImplementedError
