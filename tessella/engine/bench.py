"""What limits a run on this machine: reading, decoding, cutting views, or the training step.

    some images of the data, in memory --> decode --> views ---------+
    random numbers in the shape of a batch --> training step --------+--> the slower of both, and what would help

Rates per core are measured in processor time, so they hold on a busy machine. Nothing is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Generator
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tessella.data.batch import Batch
from tessella.data.decode import Unreadable
from tessella.data.index import Index
from tessella.data.loader import Loader
from tessella.data.pack import encode_for_pack
from tessella.data.sampler import EpochSampler
from tessella.data.sources import ImageSet
from tessella.engine.build import build_state
from tessella.engine.launch import cores_at_hand, pick_device, repeatable
from tessella.errors import UserError
from tessella.methods import views_of
from tessella.methods.method import Progress
from tessella.run.config import RunConfig

PACKED_SIDE, PACKED_QUALITY = 320, 90  # of the pack that is tried: the command's defaults

_SAMPLED_BYTES = 64 << 20  # of encoded images in memory
_SAMPLED_IMAGES = 1024
_PACKED_IMAGES = 96
_LOADED_BATCH = 16
_FIRST_BATCH = 4  # images of the first training step that is tried
_LONG_STEP = 1.5  # seconds; a batch is doubled until a step takes so long


class Rates(NamedTuple):
    """Images per second, for one core where it is written."""

    images: int  # in the sample
    mean_bytes: float  # of an encoded image; 0 for pixels in memory
    resident: bool  # whether all images are on the device: no files, no decoding
    device: str
    workers: int
    read: float | None  # for the first time, in one thread
    decode: float | None  # per core
    views: float  # per core, from encoded images to batches
    loader: float  # batches on the device, with all workers
    step: float  # training only
    step_batch: int  # images of a measured step
    packed_share: float | None  # bytes of a pack / bytes now
    packed_views: float | None  # per core, from a pack

    @property
    def limit(self) -> str:
        """The slower of both sides: "images" or "training"."""
        return "images" if self.loader < self.step else "training"

    @property
    def workers_needed(self) -> int:
        """Threads that feed the step, if each has a core."""
        return max(1, int(np.ceil(self.step / self.views)))


def bench(config: RunConfig, images: ImageSet, *, seconds: float = 60.0) -> Rates:
    """Measure, on one device.

    Args:
        config: of the planned run.
        images: its data.
        seconds: about how long it may take.

    Raises:
        UserError: no image of the sample can be read, or the device's memory is too small for the smallest batch.
    """
    device, workers = pick_device(config.device), config.workers or cores_at_hand()
    share = seconds / 10
    sample, read = _sample(images)
    decode = None if sample.encoded is None else _rate(_decoded(sample), share).per_core
    views, resident = _view_rate(config, sample, device, 1, 2 * share)
    all_views = views if workers == 1 else _view_rate(config, sample, device, workers, 2 * share)[0]
    packed = None if sample.encoded is None or resident else sample.packed()
    step, step_batch = _step_rate(config, len(images), device, 3 * share)
    return Rates(
        images=len(sample),
        mean_bytes=sample.mean_bytes,
        resident=resident,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        workers=workers,
        read=read,
        decode=decode,
        views=views.per_core,
        loader=all_views.wall,
        step=step,
        step_batch=step_batch,
        packed_share=None if packed is None else packed.mean_bytes / sample.mean_bytes,
        packed_views=None if packed is None else _view_rate(config, packed, device, 1, share)[0].per_core,
    )


class _Rate(NamedTuple):
    wall: float
    per_core: float


def _rate(work: Generator[int, None, None], seconds: float) -> _Rate:
    """Images per second of a generator that works and gives the number of images of each portion.

    The first portion starts threads and fills caches; it counts only if there is no time for another.
    """
    start, count = (time.perf_counter(), time.process_time()), 0
    stop = start[0] + seconds
    with closing(work):
        for number, done in enumerate(work):
            now = time.perf_counter(), time.process_time()
            if number == 0 and now[0] < stop:
                start = now
                continue
            count += done
            if now[0] > stop:
                break
    return _Rate(count / max(now[0] - start[0], 1e-9), count / max(now[1] - start[1], 1e-9))


# --- images -------------------------------------------------------------------------------------------------


class _Sample(ImageSet):
    """Some images of a set, held in memory as they are stored."""

    def __init__(self, name: str, keys: list[str], sizes: NDArray[np.int32], stored: list[bytes | NDArray[np.uint8]]):
        lengths = [len(one) if isinstance(one, bytes) else 0 for one in stored]
        super().__init__(name, Index.of(keys, sizes, byte_sizes=lengths), False)
        self.stored = stored

    @property
    def encoded(self) -> list[bytes] | None:
        """The files; None for pixels."""
        return self.stored if all(isinstance(one, bytes) for one in self.stored) else None  # type: ignore[return-value]

    @property
    def mean_bytes(self) -> float:
        """Of a file; 0 for pixels."""
        return float(self.index.byte_sizes.mean())

    def read(self, row: int) -> bytes | NDArray[np.uint8]:
        return self.stored[row]

    def packed(self) -> _Sample | None:
        """Some of them as `tessella pack` would store them; None if it would copy each unchanged."""
        packed = {}
        for row in range(min(len(self), _PACKED_IMAGES)):
            with contextlib.suppress(Unreadable):
                packed[row] = encode_for_pack(self, row, PACKED_SIDE, PACKED_QUALITY)
        if all(image.kept for image in packed.values()):
            return None
        sizes = np.array([(image.width, image.height) for image in packed.values()], np.int32)
        return _Sample(self.name, list(map(self.key, packed)), sizes, [image.encoded for image in packed.values()])


def _sample(images: ImageSet) -> tuple[_Sample, float | None]:
    """Images spread over the set, and how many were read per second; None for pixels in memory."""
    chosen = np.unique(np.linspace(0, len(images) - 1, min(len(images), _SAMPLED_IMAGES)).round().astype(int))
    stored: dict[int, bytes | NDArray[np.uint8]] = {}
    total, start = 0, time.perf_counter()
    for row in np.random.default_rng(0).permutation(chosen).tolist():
        with contextlib.suppress(Unreadable):
            stored[row] = image = images.read(row)
            total += len(image) if isinstance(image, bytes) else image.nbytes
        if total > _SAMPLED_BYTES:
            break
    seconds = time.perf_counter() - start
    if not stored:
        raise UserError(f"none of {len(chosen)} images of {images.name} can be read")
    rows = sorted(stored)
    sample = _Sample(images.name, [images.key(row) for row in rows], images.sizes[rows], [stored[row] for row in rows])
    return sample, None if sample.encoded is None else len(rows) / max(seconds, 1e-9)


def _decoded(sample: _Sample) -> Generator[int, None, None]:
    while True:
        for row in range(len(sample)):
            with contextlib.suppress(Unreadable):
                sample.image(row)
                yield 1


def _view_rate(
    config: RunConfig, sample: ImageSet, device: torch.device, workers: int, seconds: float
) -> tuple[_Rate, bool]:
    """The rate of the loader in small batches, so that it makes many; and whether the images are on the device."""
    sampler = EpochSampler(len(sample), min(_LOADED_BATCH, config.batch_size, len(sample)), config.seed)
    views = views_of(config.method)
    loader = Loader(sample, views, sampler, seed=config.seed, device=device, workers=workers, max_unreadable=1.0)

    def batches() -> Generator[int, None, None]:
        for epoch in itertools.count():
            with closing(loader.epoch(epoch)) as steps:  # type: ignore[type-var]
                for (batch,) in steps:
                    _wait_for(device)
                    yield len(batch.instances)

    return _rate(batches(), seconds), loader.resident


# --- training -----------------------------------------------------------------------------------------------


def _step_rate(config: RunConfig, images: int, device: torch.device, seconds: float) -> tuple[float, int]:
    """Images per second of the training step only, and the batch size that it was measured with.

    The batch grows up to the run's while steps are short and memory suffices: on a CPU a few images show the rate.
    """
    rate, batch = None, min(_FIRST_BATCH, config.batch_size)
    stop = time.perf_counter() + seconds
    while True:
        try:
            trial = _TrialStep(dataclasses.replace(config, batch_size=batch, accumulate=1), images, device)
            taken = trial.run()
            if time.perf_counter() + taken < stop:  # the first step allocates and chooses kernels
                taken = trial.run()
        except torch.OutOfMemoryError:
            if rate is None:
                raise UserError(
                    f"the device's memory is too small for a step of {batch} images: try a smaller network"
                ) from None
            return rate
        rate = batch / taken, batch
        if batch == config.batch_size or taken > _LONG_STEP or time.perf_counter() + 4 * taken > stop:
            break
        batch = min(2 * batch, config.batch_size)
    runs = [taken]
    while time.perf_counter() + taken < stop and len(runs) < 20:
        runs.append(trial.run())
    return batch / float(np.median(runs)), batch


class _TrialStep:
    """A training step on random numbers."""

    def __init__(self, config: RunConfig, images: int, device: torch.device) -> None:
        self.method, self.optimizer, _ = build_state(config, range(max(images, config.batch_size)), device)
        self.progress, self.device = Progress(0, 100, config.epochs), device
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        self.half = config.precision == "bf16" or (config.precision == "auto" and bf16)
        groups, n = views_of(config.method).groups, config.batch_size
        views = tuple(torch.randn(g.views, n, 3, g.size, g.size, device=device) for g in groups)
        self.batch = Batch(views, torch.arange(n, device=device))

    def run(self) -> float:
        """One step; its seconds."""
        _wait_for(self.device)
        start = time.perf_counter()
        with repeatable(self.device):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
                loss = self.method(self.batch, self.progress).loss
            loss.backward()
            self.method.before_update(self.progress)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.method.after_update(self.progress)
            _wait_for(self.device)
        self.progress = self.progress.next()
        return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
