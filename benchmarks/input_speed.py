"""From files to batches of views, beside the pipelines that others use: images per second of one processor core.

    python benchmarks/input_speed.py --data FOLDER --out benchmarks/results/input_speed_cpu.json

Peers are written here from what their papers and documentation say, as their users run them: Pillow and torchvision's
transforms, one image after the other, or the package's own transform (lightly, albumentations). All read the same files
in the same process with one thread, draw their own random numbers, and make batches of normalised float32 views; "crops
only" stops at uint8 views, which is what a GPU gets. A table's ratios are to its first row.
"""

from __future__ import annotations

import random
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image, ImageFilter
from side_by_side import compared, in_turn, installed, report, table
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from tessella.data.decode import decode
from tessella.data.loader import Loader
from tessella.data.pack import pack
from tessella.data.sampler import EpochSampler
from tessella.data.sources import ImageSet, open_images
from tessella.data.sources.images import ArrayImages
from tessella.data.threads import run_ahead
from tessella.data.views import IMAGENET_MEAN, IMAGENET_STD, ColorAugmentation, CropGroup, ViewSpec, draw
from tessella.methods import views_of
from tessella.ops import kernels
from tessella.recipes import recipe


@dataclass(frozen=True)
class Options:
    """What is measured."""

    data: Path  # a folder of JPEG photos, or a tar of one
    images: int = 96  # of them per round, evenly spread
    small_images: int = 1024  # of 32 x 32 pixels, made from the photos
    like_imagenet: bool = False  # photos resized to ImageNet's mean of 188,000 pixels and encoded anew at quality 96
    batch_size: int = 32  # of photos
    small_batch_size: int = 256
    rounds: int = 5
    seed: int = 0
    out: Path | None = None


PACKED_SIDES = (320, 256)
IMAGENET_PIXELS = 468 * 401  # of its mean image
SMALL = ViewSpec((CropGroup(2, 32, (0.08, 1.0), colors=ColorAugmentation(0.5, 0.8, 0.4, 0.4, 0.4, 0.1, blur=0.0)),))
Case = Callable[[], Any]


# --- peers ----------------------------------------------------------------------------------------------------


class Views(Dataset):
    """One item per image: the list of its views."""

    def __init__(self, files: list[Path], views: Callable[[Any], Any], read: Callable[[Any], Any]) -> None:
        self.files, self.views, self.read = files, views, read

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        return self.views(self.read(self.files[index]))


def by_pillow(path: Path) -> Image.Image:
    with open(path, "rb") as file:
        return Image.open(file).convert("RGB")


class PillowBlur:
    """Pillow's approximation, of a random radius, half of the time."""

    def __call__(self, image: Image.Image) -> Image.Image:
        """The image, or a blurred one."""
        if random.random() < 0.5:
            return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
        return image


def colours(brightness: float, hue: float) -> list[Callable[[Any], Any]]:
    jitter = T.ColorJitter(brightness, brightness, brightness, hue)
    return [T.RandomApply([jitter], p=0.8), T.RandomGrayscale(p=0.2)]


def tensor() -> list[Callable[[Any], Any]]:
    return [T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)]


def official_swav() -> Callable[[Any], Any]:
    def crop(size: int, scale: tuple[float, float]) -> Callable[[Any], Any]:
        first = [T.RandomResizedCrop(size, scale=scale), T.RandomHorizontalFlip()]
        return T.Compose([*first, *colours(0.8, 0.2), PillowBlur(), *tensor()])

    crops = [crop(224, (0.14, 1.0))] * 2 + [crop(96, (0.05, 0.14))] * 6
    return lambda image: [one(image) for one in crops]


def official_jigclu() -> Callable[[Any], Any]:
    first, rest = T.RandomResizedCrop(112, scale=(0.2, 1.0)), [PillowBlur(), T.RandomHorizontalFlip(), *tensor()]
    tile = T.Compose([first, *colours(0.4, 0.1), *rest])

    def tiles(image: Image.Image) -> list[torch.Tensor]:
        width, height = image.size
        x, y = int(0.3 * width), int(0.3 * height)
        spans_x = (0, width // 2 + x), (width // 2 - x, width)
        spans_y = (0, height // 2 + y), (height // 2 - y, height)
        return [tile(image.crop((left, top, right, low))) for left, right in spans_x for top, low in spans_y]

    return tiles


def pillow_crops() -> Callable[[Any], Any]:
    """Crops only: Pillow's resize of a box, the quickest that Pillow offers."""
    spec = [(224, (0.14, 1.0))] * 2 + [(96, (0.05, 0.14))] * 6

    def crops(image: Image.Image) -> list[torch.Tensor]:
        found = []
        for size, scale in spec:
            top, left, h, w = T.RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3])
            box = (left, top, left + w, top + h)
            found.append(torch.from_numpy(np.array(image.resize((size, size), Image.Resampling.BILINEAR, box))))
        return found

    return crops


def albumentations_swav() -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    import albumentations as A
    import cv2
    from albumentations.pytorch import ToTensorV2

    cv2.setNumThreads(0)

    def crop(size: int, scale: tuple[float, float]) -> A.Compose:
        weak = (0.2, 1.8)
        return A.Compose(
            [
                A.RandomResizedCrop(size=(size, size), scale=scale),
                A.HorizontalFlip(p=0.5),
                A.ColorJitter(brightness=weak, contrast=weak, saturation=weak, hue=(-0.2, 0.2), p=0.8),
                A.ToGray(p=0.2),
                A.GaussianBlur(sigma_limit=(0.1, 2.0), blur_limit=0, p=0.5),
                A.Normalize(IMAGENET_MEAN, IMAGENET_STD),
                ToTensorV2(),
            ]
        )

    large, small = crop(224, (0.14, 1.0)), crop(96, (0.05, 0.14))

    def views(image: np.ndarray) -> list[torch.Tensor]:
        return [one(image=image)["image"] for one in [large] * 2 + [small] * 6]

    return views, lambda path: cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)


def run_peer(files: list[Any], views: Callable[[Any], Any], options: Options, read: Callable[[Any], Any]) -> Case:
    batches = DataLoader(Views(files, views, read), options.batch_size, num_workers=0)
    return lambda: [None for _ in batches]


# --- ours -----------------------------------------------------------------------------------------------------


def run_ours(images: ImageSet, spec: ViewSpec, options: Options, crops: bool = False) -> Case:
    """Epochs of our loader with one thread, each with views of its own."""
    order = EpochSampler(len(images), options.batch_size, options.seed)
    loader = Loader(images, spec, order, seed=options.seed, device="cpu", workers=1)
    if crops:
        loader._finishes = False
    epochs = iter(range(10**6))

    def run() -> None:
        if crops:
            with closing(run_ahead(loader._drafts(next(epochs), 0), 1)) as drafts:
                for _ in drafts:
                    pass
        else:
            for _ in loader.epoch(next(epochs)):
                pass

    return run


def stages(images: ImageSet, spec: ViewSpec, seed: int) -> dict[str, float]:
    """Milliseconds of the processor per image that each part of our pipeline takes alone."""
    plan = draw(spec, seed, 0, images.ids, images.sizes)
    mean, std = np.float32(spec.mean), np.float32(spec.std)
    levels = [torch.empty(g.views, 1, 3, g.size, g.size, dtype=torch.uint8).numpy() for g in spec.groups]
    floats = [torch.empty(g.views, 1, 3, g.size, g.size).numpy() for g in spec.groups]
    seconds = dict.fromkeys(("read", "decode", "draw", "cut", "cut and colour"), 0.0)

    def timed(stage: str, run: Callable[[], Any]) -> Any:
        start = time.thread_time()
        result = run()
        seconds[stage] += time.thread_time() - start
        return result

    def each_group(row: int) -> Iterator[tuple[int, np.ndarray, list[np.ndarray]]]:
        first = 0
        for number, group in enumerate(spec.groups):
            part = slice(first, first + group.views)
            box, *rest = plan.select(slice(row, row + 1), part)
            yield number, box / 1, rest
            first += group.views

    timed("draw", lambda: draw(spec, seed, 1, images.ids, images.sizes))
    for row in range(len(images)):
        stored = timed("read", lambda row=row: images.read(row))
        image = timed("decode", lambda stored=stored: decode(stored))[None]
        for number, box, rest in each_group(row):
            timed("cut", lambda n=number, box=box, image=image: kernels.cut(image, box, levels[n], 0))
            timed(
                "cut and colour",
                lambda n=number, box=box, rest=rest, image=image: kernels.cut_and_colour(
                    image, box, *rest, mean, std, floats[n], 0
                ),
            )
    in_ms = {stage: 1000 * value / len(images) for stage, value in seconds.items()}
    in_ms["colour"] = in_ms.pop("cut and colour") - in_ms["cut"]
    return in_ms


# --- tables ---------------------------------------------------------------------------------------------------


def cases(options: Options, folder: Path, cache: Path) -> tuple[dict[str, dict[str, Case]], list[str], dict[str, Any]]:
    """The cases of each table, what is not installed, and our stages."""
    images = open_images(str(folder), cache=cache)
    files = sorted(folder.iterdir())
    packs = {f"pack {side}": packed(images, cache, side) for side in PACKED_SIDES}
    swav, jigclu = (views_of(recipe(name).method) for name in ("swav_imagenet_200ep", "jigclu_imagenet_200ep"))
    missing = [name for name in ("lightly", "albumentations") if not installed(name)]

    multi_crop = {"official SwAV: Pillow": run_peer(files, official_swav(), options, by_pillow)}
    small = _small_images(files, options.small_images)
    pictures = [Image.fromarray(pixels) for pixels in small]
    two_views = T.Compose(
        [T.RandomResizedCrop(32, scale=(0.08, 1.0)), T.RandomHorizontalFlip(), *colours(0.4, 0.1), *tensor()]
    )
    in_memory: dict[str, Case] = {}
    if "lightly" not in missing:
        from lightly.transforms import SimCLRTransform, SwaVTransform

        multi_crop["lightly SwaVTransform"] = run_peer(files, SwaVTransform(), options, by_pillow)
        twice = SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0)
        in_memory["lightly SimCLRTransform"] = run_peer(pictures, twice, options, lambda image: image)
    if "albumentations" not in missing:
        views, read = albumentations_swav()
        multi_crop["albumentations"] = run_peer(files, views, options, read)
    multi_crop |= {
        "Pillow, crops only": run_peer(files, pillow_crops(), options, by_pillow),
        "tessella": run_ours(images, swav, options),
        "tessella, crops only": run_ours(images, swav, options, crops=True),
        **{f"tessella, {name}": run_ours(pack, swav, options) for name, pack in packs.items()},
        **{f"tessella, crops only, {name}": run_ours(pack, swav, options, crops=True) for name, pack in packs.items()},
    }
    in_memory |= {
        "Pillow, torchvision": run_peer(pictures, lambda x: [two_views(x), two_views(x)], options, lambda x: x),
        "tessella": run_ours(ArrayImages("small", small), SMALL, options),
    }
    tiles = {
        "official JigClu: Pillow": run_peer(files, official_jigclu(), options, by_pillow),
        "tessella": run_ours(images, jigclu, options),
        "tessella, crops only": run_ours(images, jigclu, options, crops=True),
        **{f"tessella, {name}": run_ours(pack, jigclu, options) for name, pack in packs.items()},
    }
    parts = {"SwAV": stages(images, swav, options.seed), "JigClu": stages(images, jigclu, options.seed)}
    found = {
        "2 x 224 + 6 x 96 from JPEG files": multi_crop,
        "JigClu's 4 tiles of 112 from JPEG files": tiles,
        "2 views of 32 x 32 from memory": in_memory,
    }
    return found, missing, parts


def packed(images: ImageSet, folder: Path, side: int) -> ImageSet:
    """The photos as `tessella pack --short-side SIDE` stores them."""
    out = folder / f"pack-{side}"
    pack(images, out, short_side=side, quality=90, workers=1)
    return open_images(str(out))


def _small_images(files: list[Path], number: int) -> np.ndarray:
    """(number, 32, 32, 3) uint8: the photos' middle squares, again and again."""
    squares = [np.asarray(T.CenterCrop(32)(T.Resize(32)(by_pillow(path)))) for path in files]
    return np.stack([squares[i % len(squares)] for i in range(number)])


def some_files(data: Path, number: int, into: Path, like_imagenet: bool) -> None:
    """Some photos, evenly spread over the source, in one flat folder; copied, or encoded anew."""
    if data.is_file():
        with tarfile.open(data) as archive:
            archive.extractall(into / "all", filter="data")
        data = into / "all"
    files = sorted(p for p in data.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    assert files, f"no .jpg or .jpeg file below {data}"
    (into / "photos").mkdir()
    for count, path in enumerate(files[:: max(1, len(files) // number)][:number]):
        copy = into / "photos" / f"{path.parent.name}_{path.name}"
        if not like_imagenet:
            shutil.copyfile(path, copy)
            continue
        image = by_pillow(path)
        scale = (IMAGENET_PIXELS / (image.width * image.height)) ** 0.5
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        image.save(copy, "JPEG", quality=96, subsampling=0 if count % 4 else 2)  # three quarters are 4:4:4 there too


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)
    random.seed(options.seed)
    torch.manual_seed(options.seed)
    tables, result = [], {"options": {k: str(v) for k, v in asdict(options).items()}, "tables": {}}
    with tempfile.TemporaryDirectory() as scratch:
        some_files(options.data, options.images, Path(scratch), options.like_imagenet)
        found, missing, parts = cases(options, Path(scratch) / "photos", Path(scratch) / "cache")
        photos = list((Path(scratch) / "photos").iterdir())
        result["photos"] = {"number": len(photos), "mean_bytes": np.mean([p.stat().st_size for p in photos])}
        for title, some in found.items():
            number = options.small_images if "memory" in title else len(photos)
            rows = compared(in_turn(some, options.rounds), next(iter(some)))
            for row in rows:
                row["images_per_second"] = 1000 * number / row["ms"]
            result["tables"][title] = rows
            tables.append(table(title, rows, {"images_per_second": "images/s and core"}))
    result |= {"not_installed": missing, "ms_per_image": parts}
    report(tables, result, "input_speed.py", options.out)
    for name, stage in parts.items():
        print(f"{name}, ms per image alone: " + ", ".join(f"{part} {ms:.2f}" for part, ms in stage.items()))
    for name in missing:
        print(f"not installed, so not measured: {name}")


if __name__ == "__main__":
    main()
