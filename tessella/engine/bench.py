"""What limits a run on this machine: reading, decoding, cutting views, or the training step.

    some images of the data, in memory --> decode --> views ---------+
    random numbers in the shape of a batch --> training step --------+--> which is slower, and what would help

Rates per core are of processor time, so that they hold on a busy machine. Nothing is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tessella.data.batch import Batch
from tessella.data.decode import Unreadable
from tessella.data.index import Index, columns_of
from tessella.data.loader import Loader
from tessella.data.pack import encode_for_pack
from tessella.data.sampler import EpochSampler
from tessella.data.sources import ImageSet
from tessella.engine.launch import cores_at_hand, pick_device, repeatable
from tessella.errors import UserError
from tessella.methods import build_method, views_of
from tessella.methods.method import Progress, Setting
from tessella.modules.backbone import build_backbone
from tessella.ops.layout import image_layout
from tessella.optim import build_optimizer
from tessella.run.config import RunConfig

PACKED_SIDE, PACKED_QUALITY = 320, 90  # of the pack that is tried: the command's defaults

_SAMPLED_BYTES = 64 << 20  # of encoded images that are kept in memory
_SAMPLED_IMAGES = 1024
_PACKED_IMAGES = 96
_LOADED_BATCH = 16
_FIRST_BATCH = 4  # images of the first training step that is tried
_LONG_STEP = 1.5  # seconds; a batch is doubled until a step takes so long


class Rates(NamedTuple):
    """Images per second; of one core where it says so."""

    images: int  # that were tried
    mean_bytes: float  # of an encoded image; 0 for pixels in memory
    resident: bool  # the data live on the device: no files, no decoding
    device: str
    workers: int
    read: float | None  # the first time, in one thread
    decode: float | None  # per core
    views: float  # per core, from encoded images to batches
    loader: float  # batches on the device, with all workers
    step: float  # training alone
    step_batch: int  # images of the steps that were measured
    packed_share: float | None  # bytes of a pack over bytes now
    packed_views: float | None  # per core, from a pack

    @property
    def limit(self) -> str:
        """The slower of both sides: "images" or "training"."""
        return "images" if self.loader < self.step else "training"

    @property
    def workers_needed(self) -> int:
        """Threads whose views feed the step, if each has a core of its own."""
        return max(1, int(np.ceil(self.step / self.views)))


def bench(config: RunConfig, images: ImageSet, *, seconds: float = 60.0) -> Rates:
    """Measure, on one device.

    Args:
        config: of the run that is planned.
        images: its data.
        seconds: about how long it may take.

    Raises:
        UserError: no image of the sample can be read, or the device does not hold a step of the smallest batch.
    """
    device, workers = pick_device(config.device), config.workers or cores_at_hand()
    share = seconds / 10
    sample, read = _sample(images)
    decode = None if sample.encoded is None else _rate(partial(_decoded, sample), share)
    loader = _loader(config, sample, device, 1)
    views = _rate(partial(_batches, loader), 2 * share)
    wall = views if workers == 1 else _rate(partial(_batches, _loader(config, sample, device, workers)), 2 * share)
    packed = None if sample.encoded is None or loader.resident else sample.packed()
    step, step_batch = _step_rate(config, len(images), device, 3 * share)
    return Rates(
        images=len(sample),
        mean_bytes=sample.mean_bytes,
        resident=loader.resident,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        workers=workers,
        read=read,
        decode=None if decode is None else decode.per_core,
        views=views.per_core,
        loader=wall.wall,
        step=step,
        step_batch=step_batch,
        packed_share=None if packed is None else packed.mean_bytes / sample.mean_bytes,
        packed_views=None
        if packed is None
        else _rate(partial(_batches, _loader(config, packed, device, 1)), share).per_core,
    )


class _Rate(NamedTuple):
    wall: float
    per_core: float


def _rate(work: Callable[[], Iterator[int]], seconds: float) -> _Rate:
    """Images per second of a kind of work, which gives the number of images after each portion.

    The first portion starts threads and fills caches; it counts only if there is time for no other.
    """
    start, count = (time.perf_counter(), time.process_time()), 0
    stop = start[0] + seconds
    with closing(work()) as portions:  # type: ignore[type-var]
        for number, done in enumerate(portions):
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
        names = [key.encode("utf-8", "surrogateescape") for key in keys]
        nothing = np.full(len(keys), -1)
        lengths = np.array([len(one) if isinstance(one, bytes) else 0 for one in stored])
        super().__init__(name, Index.of_columns(columns_of(names, sizes, lengths, nothing), [], []), False)
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
        """Some of them as `tessella pack` would store them; None if it would take over each as it is."""
        found = []
        for row in range(min(len(self), _PACKED_IMAGES)):
            with contextlib.suppress(Unreadable):
                found.append((row, encode_for_pack(self, row, PACKED_SIDE, PACKED_QUALITY)))
        if all(one.kept for _, one in found):
            return None
        sizes = np.array([(one.width, one.height) for _, one in found], np.int32)
        return _Sample(self.name, [self.key(row) for row, _ in found], sizes, [one.encoded for _, one in found])


def _sample(images: ImageSet) -> tuple[_Sample, float | None]:
    """Images spread over the set, and how many were read per second."""
    chosen = np.unique(np.linspace(0, len(images) - 1, min(len(images), _SAMPLED_IMAGES)).round().astype(int))
    order = np.random.default_rng(0).permutation(chosen)
    stored: dict[int, bytes | NDArray[np.uint8]] = {}
    total, start = 0, time.perf_counter()
    for row in order.tolist():
        try:
            one = images.read(row)
        except Unreadable:
            continue
        stored[row] = one
        total += len(one) if isinstance(one, bytes) else one.nbytes
        if total > _SAMPLED_BYTES:
            break
    seconds = time.perf_counter() - start
    if not stored:
        raise UserError(f"none of {len(chosen)} images of {images.name} can be read")
    rows = sorted(stored)
    sample = _Sample(images.name, [images.key(row) for row in rows], images.sizes[rows], [stored[row] for row in rows])
    return sample, None if sample.encoded is None else len(rows) / max(seconds, 1e-9)


def _decoded(sample: _Sample) -> Iterator[int]:
    while True:
        for row in range(len(sample)):
            try:
                sample.image(row)
            except Unreadable:
                continue
            yield 1


def _loader(config: RunConfig, sample: ImageSet, device: torch.device, workers: int) -> Loader:
    """Small batches, so that many are seen in a short time."""
    order = EpochSampler(len(sample), min(_LOADED_BATCH, config.batch_size, len(sample)), config.seed)
    views = views_of(config.method)
    return Loader(sample, views, order, seed=config.seed, device=device, workers=workers, max_unreadable=1.0)


def _batches(loader: Loader) -> Iterator[int]:
    epoch = 0
    while True:
        with closing(loader.epoch(epoch)) as steps:  # type: ignore[type-var]
            for (batch,) in steps:
                if loader.device.type == "cuda":
                    torch.cuda.synchronize(loader.device)
                yield len(batch.instances)
        epoch += 1


# --- training -----------------------------------------------------------------------------------------------


def _step_rate(config: RunConfig, images: int, device: torch.device, seconds: float) -> tuple[float, int]:
    """Images per second of the training step alone, and the batch that it was measured with.

    The batch grows towards the run's while steps are short and memory lasts: on a CPU a few images tell the rate.
    """
    found, batch = None, min(_FIRST_BATCH, config.batch_size)
    stop = time.perf_counter() + seconds
    while True:
        try:
            trial = _TrialStep(dataclasses.replace(config, batch_size=batch, accumulate=1), images, device)
            taken = trial.run()
            if time.perf_counter() + taken < stop:  # the first step allocates and chooses kernels
                taken = trial.run()
        except torch.OutOfMemoryError:
            if found is None:
                raise UserError(f"the device does not hold a step of {batch} images: try a smaller network") from None
            return found
        found = batch / taken, batch
        if batch == config.batch_size or taken > _LONG_STEP or time.perf_counter() + 4 * taken > stop:
            break
        batch = min(2 * batch, config.batch_size)
    runs = [taken]
    while time.perf_counter() + taken < stop and len(runs) < 20:
        runs.append(trial.run())
    return batch / float(np.median(runs)), batch


class _TrialStep:
    """All that a training step does on the device, on random numbers."""

    def __init__(self, config: RunConfig, images: int, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        setting = Setting(max(images, config.batch_size), config.batch_size, config.seed)
        self.method = build_method(config.method, build_backbone(config.backbone), setting)
        self.method.to(device).to(memory_format=image_layout(device)).train()
        self.optimizer = build_optimizer(self.method, config.optimizer)
        self.progress, self.device = Progress(0, 100, config.epochs), device
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        self.half = config.precision == "bf16" or (config.precision == "auto" and bf16)
        groups, n = views_of(config.method).groups, config.batch_size
        views = tuple(torch.randn(g.views, n, 3, g.size, g.size, device=device) for g in groups)
        self.batch = Batch(views, torch.arange(n, device=device))

    def run(self) -> float:
        """One step; its seconds."""
        self._wait()
        start = time.perf_counter()
        with repeatable(self.device):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
                loss = self.method(self.batch, self.progress).loss
            loss.backward()
            self.method.before_update(self.progress)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.method.after_update(self.progress)
            self._wait()
        self.progress = self.progress.next()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
