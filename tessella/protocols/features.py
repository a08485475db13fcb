"""Frozen backbone + labelled images -> features and labels, computed once and shared by all protocols.

    images -> resize shorter side, centre crop, normalise -> backbone in eval mode -> (N, d) float32, CPU

With several ranks, rank r takes rows r, r + R, r + 2R, ...; afterwards every rank holds all rows in order. With a cache
folder, a later evaluation of the same weights and images reads them from there.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tessella import dist
from tessella.console import progress_bar
from tessella.data.evaluation import evaluation_batches
from tessella.data.sources import ImageSet
from tessella.data.transform import EvalTransform
from tessella.errors import UserError
from tessella.protocols import feature_cache
from tessella.protocols.feature_cache import Stored
from tessella.text import printable

T = TypeVar("T")

_GATHER_ROWS = 8192  # rows of one rank that travel at a time: the device never holds the whole result
_IN_MEMORY = 1 << 30  # bytes; a larger matrix of features lies in a file while it is made
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}  # no names of classes
_SPOT_CHECKS = 8  # images whose stored features are compared with new ones
_SPOT_TOLERANCE = 0.01  # relative; TF32 and other batch sizes move features by less


class Features(NamedTuple):
    """Features of every readable image, in row order, equal on every rank."""

    x: Tensor  # (N, d) float32 on the CPU, as the backbone gives them
    labels: Tensor | None  # (N,) int64
    rows: NDArray[np.int64]  # (N,) rows of the image set
    skipped: dict[str, str]  # key -> why the image could not be read


@dataclass
class ImageData:
    """Images to learn from and to be judged on; holds the features of each backbone."""

    train: ImageSet
    test: ImageSet
    transform: EvalTransform
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    workers: int = 2
    batch_size: int = 256
    title: str = ""  # of the protocol that runs: what its files are called
    predictions: Path | None = None  # folder that receives what each protocol predicts of the test images
    cache: Path | None = None  # folder that stores features for later evaluations
    # (split, transform, id of the backbone) -> the backbone, so that its id stays its own, its digests and features
    _held: dict[tuple[str, EvalTransform, int], tuple[nn.Module, dict[str, str], Features]] = field(
        default_factory=dict, init=False, repr=False
    )

    @property
    def same_images(self) -> bool:
        """Whether train and test are one set, so that an image must not be its own neighbour."""
        return self.train.fingerprint == self.test.fingerprint

    def file_name(self, default: str, more: str = "") -> str:
        """What a file of predictions is called: as the protocol, or `default` where that has no title; then `more`."""
        return (self.title or default) + more

    def images(self, split: str) -> ImageSet:
        """The images of "train" or "test"."""
        return self.train if split == "train" else self.test

    def skipped(self, split: str) -> dict[str, str] | None:
        """Key -> reason of the split's unreadable images; None before its features were asked for."""
        return next((held[-1].skipped for (name, *_), held in self._held.items() if name == split), None)

    def features(self, backbone: nn.Module, split: str, transform: EvalTransform | None = None) -> Features:
        """Features of "train" or "test" by a backbone with `feature_dim`, under this or the evaluation's transform.

        They are extracted once, and again when the weights have changed.
        """
        transform = transform or self.transform
        place, digests = (split, transform, id(backbone)), tensor_digests(backbone)
        if place not in self._held or self._held[place][1] != digests:
            self._held.pop(place, None)  # before the new ones take their memory
            features = self._labelled(self._load_or_extract(backbone, digests, split, transform), split)
            self._held[place] = backbone, digests, features
        return self._held[place][-1]

    def _load_or_extract(
        self, backbone: nn.Module, digests: dict[str, str], split: str, transform: EvalTransform
    ) -> Features:
        """Features from the cache, or extracted and then cached; the same on all ranks."""
        images, title = self.images(split), f"features of {split}"
        if self.cache is None:
            return extract(backbone, images, transform, title=title, **self._options)
        folder = self.cache / "features"
        key = feature_cache.feature_key(digests, repr(backbone), images.fingerprint, asdict(transform), self.device)
        stored = feature_cache.load(folder, key)
        if all(dist.gather_objects(stored is not None)):
            assert stored is not None
            if self._agrees(backbone, stored, images, transform):
                return Features(stored.x, None, stored.rows, stored.skipped)
        features = extract(backbone, images, transform, title=title, **self._options)
        if dist.rank() == 0:
            feature_cache.save(folder, key, Stored(features.x, features.rows, features.skipped))
        dist.barrier()
        stored = feature_cache.load(folder, key, verify=False)
        if stored is not None and stored.x.shape == features.x.shape:  # the file's map instead of a copy in memory
            features = features._replace(x=stored.x)
        return features

    def _agrees(self, backbone: nn.Module, stored: Stored, images: ImageSet, transform: EvalTransform) -> bool:
        """Compute a few features again and compare them with the stored ones.

        The key is not proof: tensors and names of modules do not determine a network, nor name and size an image file.
        """
        if not len(stored.rows):
            return False
        places = np.unique(np.linspace(0, len(stored.rows) - 1, _SPOT_CHECKS).round().astype(np.int64))
        try:
            new = extract(backbone, images, transform, rows=stored.rows[places], title="", **self._options)
        except UserError:  # unreadable images, which the extraction of all reports better
            return False
        old = stored.x[torch.from_numpy(places)]
        return new.x.shape == old.shape and bool((new.x - old).norm() <= _SPOT_TOLERANCE * old.norm())

    def apply(self, model: nn.Module, dim: int, split: str, rows: NDArray[np.int64] | None = None) -> Features:
        """A module's `dim` outputs, as they are, for the rows of a split; default: all rows."""
        return apply_to_images(model, dim, self.images(split), self.transform, rows=rows, title="", **self._options)

    @property
    def _options(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "device": self.device, "workers": self.workers}

    def _labelled(self, features: Features, split: str) -> Features:
        """The features with this data's labels, if it has any."""
        return features


@dataclass
class EvalData(ImageData):
    """Images of which each has one class."""

    label_map: Mapping[str, str] | None = None  # class -> the class that counts instead, as CIFAR-100's superclasses

    def __post_init__(self) -> None:
        for images in (self.train, self.test):
            if images.labels is None or (np.asarray(images.labels) < 0).any():
                raise UserError(
                    f"{images.name} has images without a label: an evaluation needs one folder per class, "
                    "or a list with a label for every image"
                )
        self.classes, self._labels = _common_classes(self.train, self.test)
        if self.label_map is not None:
            self.classes, self._labels = _mapped_classes(self.classes, self._labels, self.label_map)
        self.warnings = self._check_classes()

    def _check_classes(self) -> list[str]:
        """Warnings about the classes, for the reader of the figures.

        Raises:
            UserError: train and test have no class in common.
        """
        train, test = ({self.classes[i] for i in self._labels[split].unique().tolist()} for split in ("train", "test"))
        if not train & test:
            raise UserError(
                f"{self.train.name} and {self.test.name} have no class in common: train has {_some(train)}, test has "
                f"{_some(test)}. Give both the same names of classes, or a label map"
            )
        warnings = []
        if self.same_images:
            warnings.append(
                "train and test are the same images: kNN leaves each image out of its own neighbours, but every probe "
                "has learned from the images that it is judged on"
            )
        for mine, others, here, there in ((train, test, "train", "test"), (test, train, "test", "train")):
            if mine - others:
                warnings.append(f"classes of {here} that {there} lacks: {_some(mine - others)}")
        if {name.lower() for name in train | test} <= _SPLITS:
            warnings.append(
                f"the classes are {_some(train | test)}, which are usual names of parts of a data set: "
                "name those folders as --train and --test, not the one above them"
            )
        return warnings

    def labels(self, split: str) -> Tensor:
        """(rows of the set,) int64 in [0, len(classes)), numbered alike in "train" and "test"."""
        return self._labels[split]

    def labels_sha256(self) -> str:
        """Hash of the classes' names and of all labels."""
        text = json.dumps([self.classes, *(self._labels[split].tolist() for split in ("train", "test"))])
        return hashlib.sha256(text.encode()).hexdigest()

    def _labelled(self, features: Features, split: str) -> Features:
        return features._replace(labels=self._labels[split][torch.from_numpy(features.rows)])


def _some(names: set[str]) -> str:
    """A few of the names."""
    shown = sorted(names)[:5]
    return printable(", ".join(shown)) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


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
            used in eval mode, and its modes are restored.
        images: what to embed; its labels, if any, are passed on.
        transform: applied to each image.
        rows: ascending rows of the images to embed; default: all.
        batch_size: images per forward pass of a rank; changes the speed, not the result.
        device: where the backbone runs.
        workers: decoding threads of this rank.
        title: what the progress bar says; "" for no bar.

    Raises:
        UserError: no image can be read, or a feature is NaN or infinite.
    """
    options = {"rows": rows, "batch_size": batch_size, "device": device, "workers": workers, "title": title}
    features = apply_to_images(backbone, int(backbone.feature_dim), images, transform, **options)  # type: ignore[arg-type]
    _check_features(features.x, images)
    return features


def apply_to_images(
    backbone: nn.Module,
    dim: int,
    images: ImageSet,
    transform: EvalTransform,
    *,
    rows: NDArray[np.int64] | None,
    batch_size: int,
    device: torch.device | str,
    workers: int,
    title: str,
) -> Features:
    """As `extract`, for any module with `dim` outputs, which may be NaN or infinite."""
    device = torch.device(device)
    backbone.to(device)
    rows = np.arange(len(images)) if rows is None else rows
    mine = rows[rank_rows(len(rows))]
    outputs = _matrix(len(mine), dim)
    seen = torch.zeros(len(mine), dtype=torch.uint8)
    skipped: dict[str, str] = {}
    options = {"batch_size": batch_size, "device": device, "workers": workers, "skipped": skipped}
    batches = evaluation_batches(images, mine, transform, **options)  # type: ignore[arg-type]
    with frozen(backbone):
        for pixels, shown in progress(batches, title, -(-len(mine) // batch_size)):
            if len(shown):  # none, when no image of the batch could be read
                places = torch.from_numpy(np.searchsorted(mine, shown))
                # Inference mode here, not around the loop: the loader's threads write into its tensors.
                with torch.inference_mode():
                    outputs[places] = backbone(pixels).float().cpu()
                seen[places] = 1
    outputs, seen = gather_rows(outputs, len(rows), device), gather_rows(seen, len(rows), device)
    readable = seen.nonzero()[:, 0]
    if len(readable) < len(outputs):
        outputs = outputs[readable]
    rows = rows[readable.numpy()]
    labels = None if images.labels is None else torch.as_tensor(np.asarray(images.labels)[rows]).long()
    return Features(outputs, labels, rows, dict(from_all_ranks(list(skipped.items()))))


def rank_rows(n: int) -> NDArray[np.int64]:
    """This rank's share of rows 0 .. n - 1: every world_size-th."""
    return np.arange(dist.rank(), n, dist.world_size(), dtype=np.int64)


def gather_rows(mine: Tensor, n: int, device: torch.device) -> Tensor:
    """Put the ranks' shares of n rows back into order, the inverse of `rank_rows`; equal on every rank.

    (len(rank_rows(n)), ...) on the CPU -> (n, ...) on the CPU, in parts over the device, where the collectives run.
    """
    ranks = dist.world_size()
    if ranks == 1:
        return mine
    features = mine.dim() == 2 and mine.dtype == torch.float32
    whole = _matrix(n, mine.shape[1]) if features else mine.new_empty((n, *mine.shape[1:]))
    longest = -(-n // ranks)
    for start in range(0, longest, _GATHER_ROWS):
        stop = min(start + _GATHER_ROWS, longest)
        part = mine.new_zeros((stop - start, *mine.shape[1:]))  # ranks may differ by one row, a gather may not
        part[: len(mine[start:stop])] = mine[start:stop]
        parts = dist.gather(part.to(device)).cpu().unflatten(0, (ranks, -1)).transpose(0, 1).flatten(0, 1)
        rows = whole[start * ranks : stop * ranks]
        rows.copy_(parts[: len(rows)])
    return whole


def from_all_ranks(mine: list[T]) -> list[T]:
    """The ranks' lists of small objects, joined in rank order."""
    return [item for part in dist.gather_objects(mine) for item in part]


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
    """The items, while rank 0 shows how far they are and how long the rest will take; not without a title."""
    if not title or dist.rank() != 0:
        yield from items
        return
    with progress_bar(title, total) as advance:
        for item in items:
            yield item
            advance(1)


def _check_features(x: Tensor, images: ImageSet) -> None:
    if not len(x):
        raise UserError(f"{images.name}: none of its {len(images)} images can be read, so there is nothing to evaluate")
    broken = sum(int((~part.isfinite().all(dim=1)).sum()) for part in x.split(_GATHER_ROWS))
    if broken:
        raise UserError(
            f"the features of {broken} of {len(x)} images of {images.name} are NaN or infinite: the "
            "backbone's weights have diverged; use an earlier checkpoint, or train with a lower learning rate"
        )


def _matrix(rows: int, dim: int) -> Tensor:
    """(rows, dim) float32 zeros; a large one lies in an unnamed file, so that memory does not grow with the images."""
    if rows * dim * 4 <= _IN_MEMORY:
        return torch.zeros(rows, dim)
    with tempfile.TemporaryFile() as file:  # its map keeps it
        return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=(rows, dim)))


def _common_classes(train: ImageSet, test: ImageSet) -> tuple[list[str], dict[str, Tensor]]:
    """One numbering for both splits: each numbers its own classes, so one number may mean two names."""
    numbers = {"train": np.array(train.labels, np.int64), "test": np.array(test.labels, np.int64)}
    if train.classes is None or test.classes is None:
        most = max(int(labels.max(initial=-1)) for labels in numbers.values())
        names = [str(i) for i in range(most + 1)]
        return names, {split: torch.from_numpy(labels) for split, labels in numbers.items()}
    classes = list(dict.fromkeys([*train.classes, *test.classes]))
    position = {name: i for i, name in enumerate(classes)}
    numbers["test"] = np.array([position[name] for name in test.classes], dtype=np.int64)[numbers["test"]]
    return classes, {split: torch.from_numpy(labels) for split, labels in numbers.items()}


def _mapped_classes(
    classes: list[str], labels: dict[str, Tensor], mapping: Mapping[str, str]
) -> tuple[list[str], dict[str, Tensor]]:
    """The classes that others are mapped to, in sorted order, and labels that count them."""
    present = sorted({int(i) for split in labels.values() for i in split.unique()})
    missing = [classes[i] for i in present if classes[i] not in mapping]
    if missing:
        raise UserError(
            f"the label map names no class for {missing[0]!r} and {len(missing) - 1} other classes of the images: give "
            "one line for each class"
        )
    names = sorted({mapping[classes[i]] for i in present})
    number = {name: i for i, name in enumerate(names)}
    to_new = torch.tensor([number.get(mapping.get(name, ""), -1) for name in classes])
    return names, {split: to_new[old] for split, old in labels.items()}
