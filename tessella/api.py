"""What `import tessella` offers: the commands as functions, on names of data as well as on arrays in memory.

    import tessella

    run = tessella.pretrain("photos/", recipe="swav_cpu", out="runs/first", epochs=10)
    run = tessella.pretrain(pixels, recipe="jigclu_cpu", out="runs/mine", **{"method.temperature": 0.2})
    run = tessella.resume("runs/first")

    backbone = tessella.load_backbone(run)  # a torch module: (b, 3, h, w) -> (b, backbone.feature_dim)
    features = backbone(backbone.transform(image)[None])  # of a PIL image or uint8 pixels (3, h, w)
    records = tessella.evaluate(run, train="digits::train", test="digits::test", protocols=["knn"])
    features = tessella.embed(run, "photos/", out="photos.parquet").x

    list(tessella.recipes.RECIPES)  # names for `recipe`
    tessella.recipes.recipe("swav_cpu")  # all its settings

Images are given as on the command line (a folder, a list, archives, a data set's name), as a uint8 array
(N, H, W, 3) or (N, H, W), where labels are needed as a pair (array, N integers), or as an opened
`tessella.data.sources.ImageSet`. What is wrong with an input is said by `tessella.UserError`. torch's own random
generators are left as they were.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from tessella import dist
from tessella.data.sources import ArrayImages, ImageSet, open_images
from tessella.engine import pretrain as _pretrain
from tessella.errors import UserError
from tessella.evaluation import embed as _embed
from tessella.evaluation import evaluate as _evaluate
from tessella.modules.backbone import Backbone
from tessella.protocols.features import Features
from tessella.ranges import ForwardBatch, Pixels, Repeats, Seed, Threads, checked
from tessella.recipes import recipe as _recipe
from tessella.report.evaluation import print_scores, write_pages
from tessella.run.config import RunConfig, different_fields, from_dict, load_config, to_dict
from tessella.weights.resolve import resolve_backbone

P = ParamSpec("P")
T = TypeVar("T")
Images: TypeAlias = str | Path | ImageSet | NDArray[np.uint8] | tuple[NDArray[np.uint8], ArrayLike]


def _generators_restored(function: Callable[P, T]) -> Callable[P, T]:
    """Leave torch's global generators as they were: a caller's own draws do not depend on ours."""

    @functools.wraps(function)
    def restored(*args: P.args, **options: P.kwargs) -> T:
        gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(gpus):
            return function(*args, **options)

    return restored


@_generators_restored
def pretrain(data: Images, recipe: str, out: str | Path, **settings: Any) -> Path:
    """Train a backbone on unlabelled images.

    Args:
        data: the images; see the module. Labels are never read.
        recipe: a name in `tessella.recipes.RECIPES`.
        out: the run folder; missing or empty.
        **settings: any field of `RunConfig` in place of the recipe's value: `epochs=10`; parts as
            dictionaries (`optimizer={"lr": 0.1}`) or dotted names (`**{"method.views.groups.0.size": 160}`).

    Returns:
        `out`, with `backbone.safetensors` in it.

    Raises:
        UserError: the input cannot be used; the text says what to change.
        tessella.engine.interrupt.Interrupted: Ctrl-C or SIGTERM; the run is saved and `resume` goes on.
    """
    images = _opened(data)
    config = with_settings(_recipe(recipe), settings | {"data": images.name})
    return _pretrain.pretrain(config, Path(out), images)


@_generators_restored
def resume(run: str | Path, data: Images | None = None, *, allow: Collection[str] = (), **changes: Any) -> Path:
    """Go on exactly where a run stopped.

    Args:
        run: its folder.
        data: the images, if they were an array or lie elsewhere now; they must be the same ones.
        allow: settings that may have another value from now on although that changes the result: `allow=["epochs"]`.
        **changes: settings, in the notation of `pretrain`; how the run is executed (`workers=4`), or what
            `allow` names. `tessella.run.config.ON_RESUME` has the class of each.

    Returns:
        `run`.

    Raises:
        UserError: there is no such run, its images have changed, or a change would alter its result.
        tessella.engine.interrupt.Interrupted: as in `pretrain`.
    """
    images = None if data is None else _opened(data)
    if images is not None:
        changes["data"] = images.name
    saved = load_config(Path(run) / "config.yaml")
    return _pretrain.resume(Path(run), different_fields(saved, with_settings(saved, changes)), images, allow=allow)


@_generators_restored
def load_backbone(source: str | Path) -> Backbone:
    """A backbone as a torch module in eval mode, on the CPU.

    Args:
        source: a run, imported or official weights, `torchvision:NAME`, `timm:NAME`, `timm:FOLDER`,
            `timm:NAME=FILE`, or `random:NAME`.

    Returns:
        A module that maps images (b, 3, h, w) to features (b, `feature_dim`). Its `transform` makes such images of PIL
        images and uint8 tensors, exactly as `evaluate` and `embed` do; `transform.size`, `.resize`, `.mean`, `.std`,
        `.fit` and `.interpolation` are the numbers.

    Raises:
        UserError: `source` names no backbone.
    """
    backbone: Backbone = resolve_backbone(str(source)).backbone
    return backbone.eval()


@_generators_restored
@checked
def evaluate(
    backbone: str | Path,
    train: Images | None = None,
    test: Images | None = None,
    *,
    data: str | Path | None = None,
    protocols: Sequence[Any] = (),
    out: str | Path | None = None,
    baseline: bool = False,
    supervised: str | None = None,
    seeds: Repeats | None = None,
    again: bool = False,
    label_map: str | Path | None = None,
    images: str | Path | None = None,
    device: str = "auto",
    workers: Threads | None = None,
    seed: Seed = 0,
    image_size: Pixels | None = None,
    interpolation: Literal["bilinear", "bicubic"] | None = None,
    batch_size: ForwardBatch = 256,
) -> list[dict[str, Any]]:
    """Score a backbone by some protocols and print the main figures.

    Args:
        backbone: a run, imported or official weights, `torchvision:NAME`, `timm:NAME`, or `random:NAME`.
        train: images to learn from, with classes, boxes or masks, as the protocols need.
        test: images to be judged on.
        data: instead of both, a .yaml file that says which data serve which protocol.
        protocols: names of `tessella.protocols.named_settings()`, configs of protocols, or "all" for the quick ones
            that the data allow; by default kNN, linear, few labels and clustering, with `data` all.
        out: folder of `evaluation.json`, `evaluation.md`, `evaluation.html` and `predictions`; nothing is written
            without it. What it has already is not computed again.
        baseline: add the scores of the same network at random init.
        supervised: a second backbone to stand beside.
        seeds: trainings of each protocol that trains a network.
        again: compute anew what `out` has already.
        label_map: a .csv of class,superclass; the superclasses count.
        images: of COCO files that do not lie near them: their folder or archive.
        device: auto, cpu, cuda or mps.
        workers: decoding threads; default: the cores at hand.
        seed: of every random choice of the protocols.
        image_size: pixels of the evaluated crop; default: the run's.
        interpolation: bilinear or bicubic, to resize images for every backbone; default: as each was trained.
        batch_size: images per forward pass; changes the speed, not the result.

    Returns:
        One record per protocol; the figures are under `scores`.

    Raises:
        UserError: the input cannot be used; the text says what to change.
    """
    records = _evaluate.evaluate(
        str(backbone),
        _named_or_opened(train),
        _named_or_opened(test),
        data=None if data is None else Path(data),
        label_map=None if label_map is None else Path(label_map),
        images=None if images is None else str(images),
        protocols=protocols,
        out=None if out is None else Path(out),
        baseline=baseline,
        supervised=supervised,
        device=device,
        workers=workers,
        seed=seed,
        seeds=seeds,
        image_size=image_size,
        interpolation=interpolation,
        batch_size=batch_size,
        again=again,
    )
    if dist.rank() == 0:
        print_scores(records)
        if out is not None:
            write_pages(Path(out))
    return records


@_generators_restored
@checked
def embed(
    backbone: str | Path,
    data: Images,
    out: str | Path,
    *,
    labels: bool = False,
    device: str = "auto",
    workers: Threads | None = None,
    image_size: Pixels | None = None,
    batch_size: ForwardBatch = 256,
) -> Features:
    """Write the features of images to a file, and return them.

    Args:
        backbone: a run, imported or official weights, `torchvision:NAME`, `timm:NAME`, or `random:NAME`.
        data: the images.
        out: NAME.parquet or NAME.npy; must not exist.
        labels: write class labels too (parquet only).
        device: auto, cpu, cuda or mps.
        workers: decoding threads; default: the cores at hand.
        image_size: pixels of the evaluated crop; default: the run's.
        batch_size: images per forward pass; changes the speed, not the result.

    Returns:
        Features with `x` (N, feature_dim) float32 and the rows they belong to.

    Raises:
        UserError: the input cannot be used, or a file is in the way.
    """
    return _embed.embed(
        str(backbone),
        _opened(data, labels=labels),
        Path(out),
        labels=labels,
        device=device,
        workers=workers,
        image_size=image_size,
        batch_size=batch_size,
    )


def with_settings(config: RunConfig, settings: dict[str, Any]) -> RunConfig:
    """The run with some fields replaced.

    Args:
        config: where the other values come from.
        settings: field -> value; parts as dictionaries or under dotted names, members of a list by number.

    Raises:
        UserError: there is no such field, or it does not take the value.
    """
    tree = to_dict(config)
    for name, value in settings.items():
        *parents, last = name.split(".")
        part = tree
        for parent in parents:
            part = _member(part, parent, name)
        _member(part, last, name)
        _put(part, last, value)
    return from_dict(RunConfig, tree, "settings")


def _member(part: Any, key: str, name: str) -> Any:
    try:
        return part[int(key)] if isinstance(part, list) else part[key]
    except (KeyError, IndexError, ValueError, TypeError):
        known = range(len(part)) if isinstance(part, list) else part if isinstance(part, dict) else ()
        choices = ", ".join(map(str, known)) or "nothing below it"
        raise UserError(f"a run has no setting {name!r}: in place of {key!r} there is {choices}") from None


def _put(part: Any, key: str, value: Any) -> None:
    """Set one value; a dictionary only replaces what it names."""
    if isinstance(part, list):
        part[int(key)] = to_dict(value)
    elif isinstance(value, dict) and isinstance(part[key], dict):
        for inner, inner_value in value.items():
            _member(part[key], inner, f"{key}.{inner}")
            _put(part[key], inner, inner_value)
    else:
        part[key] = to_dict(value)


def _named_or_opened(data: Images | None) -> Any:
    """Names stay names, because a protocol may open them as images with boxes or masks."""
    if data is None or isinstance(data, str | Path):
        return None if data is None else str(data)
    return _opened(data, labels=True) if isinstance(data, np.ndarray | tuple) else data


def _opened(data: Images, labels: bool = False) -> ImageSet:
    if isinstance(data, ImageSet):
        return data
    if isinstance(data, str | Path):
        return open_images(str(data), labels=labels)
    pixels, targets = data if isinstance(data, tuple) else (data, None)
    if labels and targets is None:
        raise UserError("labels are needed here: give the images as a pair (array, labels)")
    return ArrayImages("array", pixels, targets if labels else None)
