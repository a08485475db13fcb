"""Frozen backbone + labelled images -> features and labels, computed once and shared by all protocols.

    images -> resize shorter side, centre crop, normalise -> backbone in eval mode -> (N, d) float32, CPU

With several ranks, rank r takes rows r, r + R, r + 2R, ...; afterwards every rank holds all rows in order.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as torch_dist
from numpy.typing import NDArray
from torch import Tensor, nn

from tessella import dist
from tessella.data.loader import evaluation_batches
from tessella.data.sources import ImageSet
from tessella.data.views import IMAGENET_MEAN, IMAGENET_STD
from tessella.errors import UserError

T = TypeVar("T")

_GATHER_ROWS = 8192  # rows of one rank that travel at a time: the device never holds the whole result


@dataclass(frozen=True)
class EvalTransform:
    """What happens to an image before it is judged: shorter side to `resize`, centre crop, normalise."""

    size: int  # pixels of the crop
    resize: int  # pixels of the shorter side (bilinear, antialiased)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    @classmethod
    def of(
        cls,
        size: int,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> EvalTransform:
        """The usual transform: the whole of a small image (size <= 96), the inner 7/8 of a photo."""
        return cls(size, size if size <= 96 else round(size / 0.875), mean, std)


class Features(NamedTuple):
    """Features of every readable image, in row order, equal on every rank."""

    x: Tensor  # (N, d) float32 on the CPU, as the backbone gives them
    labels: Tensor | None  # (N,) int64
    rows: NDArray[np.int64]  # (N,) rows of the image set
    skipped: dict[str, str]  # key -> why the image could not be read


class _Kept(NamedTuple):
    backbone: nn.Module
    digests: dict[str, str]
    features: Features


@dataclass
class EvalData:
    """What a protocol is given besides the backbone; it remembers the last backbone's features."""

    train: ImageSet
    test: ImageSet
    transform: EvalTransform
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    workers: int = 2
    batch_size: int = 256
    _kept: dict[str, _Kept] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for images in (self.train, self.test):
            if images.labels is None or (np.asarray(images.labels) < 0).any():
                raise UserError(
                    f"{images.name} has images without a label: an evaluation needs one folder per class, "
                    "or a list with a label for every image"
                )
        self.classes, self._labels = _common_classes(self.train, self.test)

    @property
    def same_images(self) -> bool:
        """Whether train and test are one set, so that an image must not be its own neighbour."""
        return self.train.fingerprint == self.test.fingerprint

    def labels(self, split: str) -> Tensor:
        """(rows of the set,) int64 in [0, len(classes)), numbered alike in "train" and "test"."""
        return self._labels[split]

    def skipped(self, split: str) -> dict[str, str] | None:
        """Key -> reason of the split's unreadable images; None before its features were asked for."""
        return self._kept[split].features.skipped if split in self._kept else None

    def features(self, backbone: nn.Module, split: str) -> Features:
        """Features of "train" or "test"; extracted once, and again when the weights have changed."""
        digests = tensor_digests(backbone)
        kept = self._kept.get(split)
        if kept is None or kept.backbone is not backbone or kept.digests != digests:
            images = self.train if split == "train" else self.test
            found = extract(
                backbone,
                images,
                self.transform,
                batch_size=self.batch_size,
                device=self.device,
                workers=self.workers,
                title=f"features of {split}",
            )
            found = found._replace(labels=self._labels[split][torch.from_numpy(found.rows)])
            kept = self._kept[split] = _Kept(backbone, digests, found)
        return kept.features


def extract(
    backbone: nn.Module,
    images: ImageSet,
    transform: EvalTransform,
    *,
    rows: NDArray[np.int64] | None = None,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    workers: int = 2,
    title: str = "features",
) -> Features:
    """Features of every image, each computed once over all ranks.

    Args:
        backbone: has `feature_dim`; maps (b, 3, size, size) to (b, feature_dim). It is moved to `device`,
            used in eval mode and given back as it was.
        images: what to embed; its labels, if any, are passed on.
        transform: applied to each image.
        rows: ascending rows of the images to embed; default: all.
        batch_size: images per forward pass of a rank; changes the speed, not the result.
        device: where the backbone runs.
        workers: decoding threads of this rank.
        title: what the progress bar says.

    Raises:
        UserError: no image can be read, or a feature is NaN or infinite.
    """
    device = torch.device(device)
    backbone.to(device)
    wanted = np.arange(len(images)) if rows is None else rows
    mine = wanted[rank_rows(len(wanted))]
    found = torch.zeros(len(mine), int(backbone.feature_dim))  # type: ignore[arg-type]
    seen = torch.zeros(len(mine), dtype=torch.uint8)
    skipped: dict[str, str] = {}
    batches = evaluation_batches(
        images,
        mine,
        size=transform.size,
        resize=transform.resize,
        mean=transform.mean,
        std=transform.std,
        batch_size=batch_size,
        device=device,
        workers=workers,
        skipped=skipped,
    )
    with frozen(backbone):
        for pixels, shown in progress(batches, title, -(-len(mine) // batch_size)):
            if len(shown):  # none, when no image of the batch could be read
                places = torch.from_numpy(np.searchsorted(mine, shown))
                # Inference mode here, not around the loop: the loader's threads write into its tensors.
                with torch.inference_mode():
                    found[places] = backbone(pixels).float().cpu()
                seen[places] = 1
    found, seen = gather_rows(found, len(wanted), device), gather_rows(seen, len(wanted), device)
    readable = seen.nonzero()[:, 0]
    found, rows = found[readable], wanted[readable.numpy()]
    _check_features(found, images)
    labels = None if images.labels is None else torch.as_tensor(np.asarray(images.labels)[rows]).long()
    return Features(found, labels, rows, _gather_reasons(skipped))


def rank_rows(n: int) -> NDArray[np.int64]:
    """This rank's share of rows 0 .. n - 1: every world_size-th."""
    return np.arange(dist.rank(), n, dist.world_size(), dtype=np.int64)


def gather_rows(mine: Tensor, n: int, device: torch.device) -> Tensor:
    """Put the ranks' shares back into row order, the inverse of `rank_rows`.

    Args:
        mine: (len(rank_rows(n)), ...) on the CPU.
        n: rows in all.
        device: where the collectives run; the result travels over it in parts.

    Returns:
        (n, ...) on the CPU, equal on every rank.
    """
    ranks = dist.world_size()
    if ranks == 1:
        return mine
    whole = mine.new_empty((n, *mine.shape[1:]))
    longest = -(-n // ranks)
    for start in range(0, longest, _GATHER_ROWS):
        stop = min(start + _GATHER_ROWS, longest)
        part = mine.new_zeros((stop - start, *mine.shape[1:]))  # ranks may differ by one row, a gather may not
        own = mine[start:stop]
        part[: len(own)] = own
        parts = dist.gather(part.to(device)).cpu().unflatten(0, (ranks, -1)).transpose(0, 1).flatten(0, 1)
        rows = whole[start * ranks : stop * ranks]
        rows.copy_(parts[: len(rows)])
    return whole


@contextmanager
def frozen(backbone: nn.Module) -> Iterator[None]:
    """Eval mode inside; on the way out the modes come back and every tensor must be bit-equal.

    Raises:
        AssertionError: a parameter or buffer has changed; the text names it.
    """
    modes = [(module, module.training) for module in backbone.modules()]
    before = tensor_digests(backbone)
    backbone.eval()
    try:
        yield
        assert_unchanged(backbone, before)
    finally:
        for module, training in modes:
            module.training = training


def assert_unchanged(backbone: nn.Module, before: dict[str, str]) -> None:
    """Compare the backbone with earlier `tensor_digests`.

    Raises:
        AssertionError: a parameter or buffer has changed, come or gone; the text names it.
    """
    after = tensor_digests(backbone)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    assert not changed, f"the frozen backbone changed during an evaluation: {', '.join(changed[:5])}"


def tensor_digests(module: nn.Module) -> dict[str, str]:
    """Hash of every parameter and buffer (name, type, shape, bytes), also of those that are not saved."""
    digests = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        head = f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode()
        digests[name] = hashlib.sha256(head + raw.tobytes()).hexdigest()
    return digests


def progress(items: Iterable[T], title: str, total: int) -> Iterator[T]:
    """The items, with a progress bar on rank 0 when stderr is a terminal."""
    if dist.rank() != 0 or not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, title, total=total, console=Console(stderr=True), transient=True)


def _check_features(x: Tensor, images: ImageSet) -> None:
    if not len(x):
        raise UserError(f"{images.name}: none of its {len(images)} images can be read, so there is nothing to evaluate")
    broken = int((~x.isfinite().all(dim=1)).sum())
    if broken:
        raise UserError(
            f"the features of {broken} of {len(x)} images of {images.name} are NaN or infinite: the "
            "backbone's weights have diverged; use an earlier checkpoint, or train with a lower learning rate"
        )


def _gather_reasons(skipped: dict[str, str]) -> dict[str, str]:
    if dist.world_size() == 1:
        return skipped
    parts: list[dict[str, str]] = [{} for _ in range(dist.world_size())]
    torch_dist.all_gather_object(parts, skipped)
    return {key: reason for part in parts for key, reason in part.items()}


def _common_classes(train: ImageSet, test: ImageSet) -> tuple[list[str], dict[str, Tensor]]:
    """One numbering for both splits: each numbers its own classes, so one number may mean two names."""
    numbers = {"train": np.array(train.labels, np.int64), "test": np.array(test.labels, np.int64)}
    if train.classes is None or test.classes is None:
        most = max(int(labels.max(initial=-1)) for labels in numbers.values())
        names = [str(i) for i in range(most + 1)]
        return names, {split: torch.from_numpy(labels) for split, labels in numbers.items()}
    classes = [*train.classes, *(name for name in test.classes if name not in set(train.classes))]
    position = {name: i for i, name in enumerate(classes)}
    to_common = np.array([position[name] for name in test.classes], dtype=np.int64)
    return classes, {
        "train": torch.from_numpy(numbers["train"]),
        "test": torch.from_numpy(to_common[numbers["test"]]),
    }
