"""From an image set and a sampler to batches on the device.

    sampler -> rows -> plan (`views.draw`)
      threads decode, crop and resize -----------------------> uint8 views --+
      resident on a GPU: crops of a uint8 tensor there ------> uint8 views --+--> photometric --> Batch
      on a CPU: threads decode (unless resident), crop, resize and colour --------------------> Batch

All executions follow the same plan. Small images of one size become resident: they stay in the device's memory. Others
are decoded, each image once for all of its views. Threads, not processes: the JPEG decoder and the compiled kernels
(`ops.kernels`) release the interpreter's lock, threads start at once, share the index, and write straight into the
batch. On a CPU a view is coloured while it is still in the cache of the core that cut it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from tessella.data.batch import Batch
from tessella.data.decode import Unreadable
from tessella.data.sampler import Sampler, check_shares, share
from tessella.data.sources import ImageSet
from tessella.data.threads import Task, over_rows, portions, run_ahead
from tessella.data.views import CropGroup, ViewPlan, ViewSpec, draw
from tessella.errors import UserError
from tessella.ops.augment import crop_resize, photometric, to_device

_RESIDENT_IMAGES_PER_TASK = 32  # together they take less time than one decoding
_LARGE_PIXELS = 2**20  # from here on decoding at a fraction of the size is considered
_SHRINK = (8, 4, 2)  # JPEG decoders are faster at these; at 3/4 and the like they are slower
_SHRUNK_CROP = 2  # least pixels of a shrunk crop per pixel of its view, per side: see `_shrink`
_RESIDENT_SIDE = 96  # pixels; beyond it a decoded data set is rarely small
_RESIDENT_BYTES = 2 << 30
_RESIDENT_SHARE = 0.25  # of the GPU memory that is free at the start
_NONE_READABLE = "none of the data set's images can be decoded: check the files, or give another data set"


class _Draft(NamedTuple):
    """An unfinished batch. Threads fill `views`; for an unreadable image they change `rows` and `plan`."""

    rows: NDArray[np.int64]  # (B,)
    plan: ViewPlan
    views: list[Tensor]  # per crop group (v, B, 3, s, s): float32 if finished, else uint8, pinned for a GPU


class Loader:
    """Batches of one rank, whatever the number of threads and the step at which it starts.

    An image that cannot be decoded is replaced by the next row that can be (after the last comes the first),
    with the views drawn for that row, so that the result depends on (seed, epoch, row) only.

    Attributes:
        skipped: key -> reason of every image that could not be decoded so far.
        wait_seconds: time that the consumer has waited for batches.
        resident: whether the images are in the device's memory.
    """

    def __init__(
        self,
        images: ImageSet,
        spec: ViewSpec,
        sampler: Sampler,
        *,
        seed: int,
        device: torch.device | str,
        workers: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        max_unreadable: float = 0.01,
    ) -> None:
        """Check the shares of the batch; read all images if they become resident.

        Args:
            images: what to read.
            spec: the views.
            sampler: which rows make up each step.
            seed: of the run.
            device: where the batches go.
            workers: threads that decode, at least 1.
            rank: of this process.
            world_size: number of processes.
            accumulate: micro-batches per step.
            max_unreadable: largest share of the data set's files that may be unreadable, left out of its index or
                failing to decode; one file always may.

        Raises:
            UserError: if the batch cannot be shared equally, or too many images are unreadable.
        """
        check_shares(sampler.batch_size, world_size, accumulate)
        self.images, self.spec, self.sampler = images, spec, sampler
        self.seed, self.device, self.workers = seed, torch.device(device), max(1, workers)
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.max_unreadable = max_unreadable
        self.skipped: dict[str, str] = {}
        self.wait_seconds = 0.0
        self._unreadable: set[int] = set()
        self._lock = threading.Lock()
        self._check_share()
        self._kernels = _compiled_kernels()
        self._finishes = _threads_finish(self.device)
        self._mean, self._std = (np.asarray(numbers, dtype=np.float32) for numbers in (spec.mean, spec.std))
        self._sizes = np.repeat([group.size for group in spec.groups], [group.views for group in spec.groups])
        self.resident = _fits_device(images, self.device)
        if self.resident:
            self._pixels = self._read_all()

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """The steps of one epoch, from `first_step` on: the `accumulate` micro-batches of this rank.

        Closing the iterator stops its threads.

        Raises:
            UserError: more images than allowed could not be decoded.
        """
        produce = self._from_device if self.resident and not self._finishes else self._from_threads
        with closing(produce(epoch, first_step)) as batches:
            for _ in range(first_step, self.sampler.steps_per_epoch):
                start = time.perf_counter()
                step = [next(batches) for _ in range(self.accumulate)]
                self.wait_seconds += time.perf_counter() - start
                yield step

    def _micro_batches(self, epoch: int, first_step: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        for step in range(first_step, self.sampler.steps_per_epoch):
            for rows in share(self.sampler.batch(epoch, step), self.rank, self.world_size, self.accumulate):
                yield step, rows

    # By threads

    def _from_threads(self, epoch: int, first_step: int) -> Generator[Batch, None, None]:
        with closing(run_ahead(self._drafts(epoch, first_step), self.workers)) as drafts:
            for rows, plan, views in drafts:
                if self._finishes:
                    yield Batch(tuple(views), to_device(rows, self.device))
                else:
                    crops = [group.flatten(0, 1).to(self.device, non_blocking=True) for group in views]
                    yield self._finish(rows, plan, crops)

    def _drafts(self, epoch: int, first_step: int) -> Iterator[tuple[_Draft, Sequence[Task]]]:
        for step, rows in self._micro_batches(epoch, first_step):
            rows = self._row_shown[rows] if self.resident else rows.copy()
            draft = _Draft(rows, self._plan(epoch, rows, step), [self._empty(g, len(rows)) for g in self.spec.groups])
            if self.resident:
                parts = portions(len(rows), _RESIDENT_IMAGES_PER_TASK)
                yield draft, [partial(self._fill_from_memory, draft, positions) for positions in parts]
            else:
                parts = portions(len(rows))
                yield draft, [partial(self._fill, draft, epoch, step, positions) for positions in parts]

    def _empty(self, group: CropGroup, n: int) -> Tensor:
        """Memory for the views of a group."""
        shape = group.views, n, 3, group.size, group.size
        if self._finishes:
            return torch.empty(shape)
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def _fill(self, draft: _Draft, epoch: int, step: int, positions: list[int]) -> None:
        """Decode some images of a batch and cut their views; other threads fill other positions."""
        for position in positions:
            row = int(draft.rows[position])
            shrink = self._shrink(row, draft.plan.box[position])
            readable, image = self._read(row, shrink)
            if readable != row:
                draft.rows[position] = readable
                substitute = self._plan(epoch, [readable], step)
                for name in ViewPlan._fields:
                    getattr(draft.plan, name)[position] = getattr(substitute, name)[0]
                shrink = self._shrink(readable, draft.plan.box[position])
                image = self._decode(readable, shrink)
            whole = image.shape[1] == self.images.sizes[readable][0]
            self._cut(draft, np.ascontiguousarray(image)[None], position, 1 if whole else shrink)

    def _fill_from_memory(self, draft: _Draft, positions: list[int]) -> None:
        pixels = self._pixels.permute(0, 2, 3, 1).numpy()
        self._cut(draft, pixels[draft.rows[positions]], positions[0])

    def _cut(self, draft: _Draft, images: NDArray[np.uint8], first: int, shrink: int = 1) -> None:
        """Make the views of images (n, h, w, 3), the first of which is at position `first` of the batch."""
        for (_, slots), views in zip(self.spec.slices(), draft.views, strict=True):
            box, *colours = draft.plan.select(slice(first, first + len(images)), slots)
            scaled = box / shrink
            if self._finishes:
                self._kernels.cut_and_colour(images, scaled, *colours, self._mean, self._std, views.numpy(), first)
            else:
                self._kernels.cut(images, scaled, views.numpy(), first)

    def _shrink(self, row: int, boxes: NDArray[np.int32]) -> int:
        """At which fraction of its size a large image may be decoded for these crops: one of `_SHRINK`, or 1.

        Averaging blocks of pixels in the decoder and then resizing is not quite resizing the whole. If every crop keeps
        twice the pixels of its view, views differ by 0.7 to 0.9 levels in the mean, by 4 to 5 in one value of a hundred
        and by 25 at most; without that margin by 2.4, 15 and 75. This was measured on photos that are sharp in every
        pixel, which large ones are not. Photos of the size of most of ImageNet's are decoded whole.
        """
        if self.images.sizes[row].prod() < _LARGE_PIXELS:
            return 1
        spare = (boxes[:, 2:].min(axis=1) / self._sizes).min()
        return next((shrink for shrink in _SHRINK if spare >= _SHRUNK_CROP * shrink), 1)

    def _read(self, row: int, shrink: int) -> tuple[int, NDArray[np.uint8]]:
        """The first row from `row` on that can be decoded, and its pixels (h, w, 3)."""
        for candidate in range(row, row + len(self.images)):
            candidate %= len(self.images)
            if candidate in self._unreadable:
                continue
            try:
                return candidate, self._decode(candidate, shrink)
            except Unreadable as error:
                self._skip(candidate, error.reason)
        raise UserError(_NONE_READABLE)

    def _decode(self, row: int, shrink: int = 1) -> NDArray[np.uint8]:
        """Pixels of an image, whole or, where its format has a quick way to that, at 1/shrink of its size."""
        image = self.images.image(row, shrink) if shrink > 1 else self.images.image(row)
        width, height = self.images.sizes[row].tolist()
        if image.shape not in ((height, width, 3), (-(-height // shrink), -(-width // shrink), 3)):
            actual = f"{image.shape[1]} x {image.shape[0]}"
            raise Unreadable(f"{actual} pixels, but {width} x {height} when the data set was indexed")
        return image

    def _skip(self, row: int, reason: str) -> None:
        with self._lock:
            self._unreadable.add(row)
            self.skipped[str(self.images.key(row))] = reason
            self._check_share()

    def _check_share(self) -> None:
        """Stop when more of the data set's files are unreadable than allowed: half a data set is another one."""
        left_out = self.images.unreadable
        unreadable, files = len(left_out) + len(self._unreadable), len(left_out) + len(self.images)
        if unreadable > max(1, self.max_unreadable * files):
            reasons = [*self.skipped.items(), *left_out[:3]][:3]
            raise UserError(
                f"{unreadable:,} of {files:,} images could not be read or decoded, more than the allowed "
                f"{self.max_unreadable:.1%} ({'; '.join(f'{key}: {why}' for key, why in reasons)}): repair or remove "
                "them (`tessella scan` lists all), or allow a larger share (--max-unreadable 0.1 for a tenth)"
            )

    # Resident

    def _read_all(self) -> Tensor:
        """(N, 3, H, W) uint8 on the device; rows that cannot be decoded are black and never used."""
        width, height = self.images.sizes[0]
        pixels = np.zeros((len(self.images), height, width, 3), dtype=np.uint8)

        def read(rows: range) -> None:
            for row in rows:
                try:
                    pixels[row] = self._decode(row)
                except Unreadable as error:
                    self._skip(row, error.reason)

        over_rows(len(pixels), read, "reading images", self.workers)
        # The row that is shown for each row: itself, or the next that could be decoded.
        readable = np.setdiff1d(np.arange(len(pixels)), sorted(self._unreadable))
        if not len(readable):
            raise UserError(_NONE_READABLE)
        self._row_shown = readable[np.searchsorted(readable, np.arange(len(pixels))) % len(readable)]
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        return images if self._finishes else images.contiguous().to(self.device)

    def _from_device(self, epoch: int, first_step: int) -> Generator[Batch, None, None]:
        for step, rows in self._micro_batches(epoch, first_step):
            rows = self._row_shown[rows]
            plan = self._plan(epoch, rows, step)
            chosen, boxes = to_device(rows, self.device), to_device(plan.box, self.device)
            images = self._pixels.index_select(0, chosen)
            crops = [
                torch.cat([crop_resize(images, box, group.size) for box in boxes[:, views].unbind(1)])
                for group, views in self.spec.slices()
            ]
            yield self._finish(rows, plan, crops)

    # Both

    def _plan(self, epoch: int, rows: ArrayLike, step: int = 0) -> ViewPlan:
        rows = np.asarray(rows)
        return draw(self.spec, self.seed, epoch, self.images.ids[rows], self.images.sizes[rows], step)

    def _finish(self, rows: NDArray[np.int64], plan: ViewPlan, pixels: list[Tensor]) -> Batch:
        """A batch from its crops, (v * B, 3, s, s) uint8 per group, view after view."""
        views = []
        for (group, slots), crops in zip(self.spec.slices(), pixels, strict=True):
            # Crops are ordered by view, the plan by image.
            part = plan.select(slice(None), slots)._asdict()
            colours = {k: values.swapaxes(0, 1).reshape(len(crops), *values.shape[2:]) for k, values in part.items()}
            del colours["box"]
            coloured = photometric(crops, **colours, mean=self.spec.mean, std=self.spec.std)
            views.append(coloured.unflatten(0, (group.views, len(rows))))
        return Batch(tuple(views), to_device(rows, self.device))


def _fits_device(images: ImageSet, device: torch.device) -> bool:
    """Whether all images are small, of one size, and together leave the device most of its memory."""
    if images.uniform_size is None or max(images.uniform_size) > _RESIDENT_SIDE:
        return False
    width, height = images.uniform_size
    limit = float(_RESIDENT_BYTES)
    if device.type == "cuda":
        limit = min(limit, _RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0])
    return len(images) * width * height * 3 <= limit


def _threads_finish(device: torch.device) -> bool:
    """Whether threads also colour and normalise views, and do not only cut them."""
    return device.type == "cpu"


def _compiled_kernels() -> ModuleType:
    """`ops.kernels`. Importing it takes half a second; the first time on a machine, which compiles it, ten."""
    try:
        from tessella.ops import kernels
    except Exception as error:  # also NumPy's, LLVM's and the file system's
        raise UserError(
            f"the compiled kernels that make views cannot be loaded: {error}. If numba is missing, pip install numba; "
            "if its cache cannot be written, set NUMBA_CACHE_DIR to a folder that can"
        ) from error
    return kernels
