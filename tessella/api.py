"""The commands as functions. The command line is made from their signatures and docstrings; each is defined once, here.

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
(N, H, W, 3) or (N, H, W), where labels are needed as a pair (array, N integers), as a list of paths or PIL images, as a
data set of torch or Hugging Face or of your own class (`tessella.data.sources.objects`), or as an opened
`tessella.data.sources.ImageSet`. A backbone is given by name or as a torch module. What is wrong with an input is said
by `tessella.UserError`. torch's own random generators are left as they were.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, ParamSpec, TypeAlias, TypeVar

from tessella.errors import UserError
from tessella.ranges import (
    ForwardBatch,
    JpegQuality,
    PackedSide,
    Pixels,
    Port,
    Positive,
    PositiveInt,
    Range,
    Repeats,
    Seed,
    Threads,
    checked,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import ArrayLike, NDArray
    from torch import nn

    from tessella.atlas.assign import Assigned
    from tessella.atlas.classify import Classified
    from tessella.atlas.duplicates import Duplicates
    from tessella.atlas.label import Labelled
    from tessella.atlas.select import Selection
    from tessella.data.pack import Packed
    from tessella.data.sources import ImageSet
    from tessella.formats.export import Exported
    from tessella.modules.backbone import Backbone
    from tessella.protocols.features import Features
    from tessella.recipes.suggest import Scan
    from tessella.report.bench import Bench
    from tessella.report.compare import Comparison
    from tessella.report.evaluation import Records
    from tessella.run.config import RunConfig
    from tessella.weights.official import Official

    FilePath: TypeAlias = str | Path
    Folders: TypeAlias = Sequence[str | Path]
    Images: TypeAlias = str | Path | ImageSet | NDArray[np.uint8] | tuple[NDArray[np.uint8], ArrayLike] | Sequence[Any]
    Network: TypeAlias = str | Path | nn.Module
    Names: TypeAlias = str | Sequence[Any]
    Recipe: TypeAlias = str | RunConfig
else:  # as words of the command line; torch and numpy are not imported for it
    FilePath, Folders, Images, Network, Names, Recipe = Path, tuple[Path, ...], str, str, tuple[str, ...], str

P = ParamSpec("P")
T = TypeVar("T")
Formats: TypeAlias = tuple[Literal["hub", "onnx", "pt2", "torchvision", "safetensors"], ...]
Device: TypeAlias = Literal["auto", "cpu", "cuda", "mps"]


def _command(function: Callable[P, T]) -> Callable[P, T]:
    """Check the arguments' ranges, and leave torch's global generators as they were."""
    check_and_call = checked(function)

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> T:
        import torch

        gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(gpus):
            return check_and_call(*args, **options)

    return call


@_command
def demo(*, out: FilePath = Path("tessella-demo"), seeds: Repeats = 3, device: Device = "auto") -> Path:
    """Pretrain on embedded digits, evaluate, write a report: minutes on two cores, no network.

    Args:
        out: folder of the runs and the report; missing or empty.
        seeds: number of runs; the table shows their mean and spread.
        device: where to run.

    Returns:
        The report's path.
    """
    from tessella.recipes.demo import demo as run_demo

    return run_demo(Path(out), seeds=seeds, device=device)


@_command
def scan(data: Images, *, headers_only: bool = False, workers: Threads | None = None) -> Scan:
    """Look at images before training: how many, how large, what cannot be read, which recipe fits.

    Every image is decoded once, in processes of their own: one that crashes or hangs the decoder is listed as well.
    Into a file or pipe the list is complete.

    Args:
        data: the images.
        headers_only: decode nothing; quick, but files that end in the middle are not found.
        workers: decoding processes; default: the available cores.

    Returns:
        What was found; `lines()` is what the command prints.
    """
    from tessella.data.isolated import undecodable
    from tessella.data.sources.objects import images_of
    from tessella.recipes.suggest import scan_of

    images = images_of(data)
    return scan_of(images, [] if headers_only else undecodable(images, workers))


@_command
def pack(
    data: Images,
    *,
    out: FilePath,
    short_side: PackedSide = 320,
    quality: JpegQuality = 90,
    workers: Threads | None = None,
) -> Packed:
    """Encode images again, smaller, once: later every epoch reads and decodes fewer bytes.

    A pack is read like any other DATA; names, classes and the randomness of views stay. The pixels change: by the
    smaller size, and by the JPEG, whose loss is measured and printed. A killed pack goes on where it was; given again
    for a complete pack, the command reads all of it and compares its hashes.

    Args:
        data: the images.
        out: folder of the pack; missing or empty.
        short_side: pixels that the shorter side of an image has at most.
        quality: of the JPEGs, 1 to 100.
        workers: threads; default: the available cores.
    """
    from tessella.data.pack import pack as write_pack
    from tessella.data.sources.objects import images_of
    from tessella.engine.launch import cores_at_hand

    try:
        images = images_of(data, labels=True)
    except UserError:
        images = images_of(data)
    return write_pack(images, Path(out), short_side=short_side, quality=quality, workers=workers or cores_at_hand())


@_command
def bench(
    data: Images,
    recipe: str | None = None,
    *,
    device: Device = "auto",
    workers: Threads | None = None,
    batch_size: PositiveInt | None = None,
    seconds: Positive = 60.0,
) -> Bench:
    """Measure what limits training on this machine: reading, decoding, views, or the step.

    Args:
        data: the images.
        recipe: of the run that is planned; default: the one that `tessella scan` names.
        device: where to run.
        workers: decoding threads; default: the available cores.
        batch_size: images per update; default: the recipe's.
        seconds: about how long it may take.

    Returns:
        The rates; `lines()` is what the command prints.
    """
    import dataclasses

    from tessella.data.sources.objects import images_of
    from tessella.engine.bench import bench as measure
    from tessella.recipes import recipe as named
    from tessella.recipes.suggest import short_side, suggested_recipes
    from tessella.report.bench import Bench

    images = images_of(data)
    config = named(recipe or suggested_recipes(short_side(images))[0][0])
    config = dataclasses.replace(
        config, data=images.name, device=device, workers=workers, batch_size=batch_size or config.batch_size
    )
    return Bench(config, measure(config, images, seconds=seconds))


@_command
def pretrain(data: Images, recipe: Recipe, out: FilePath, **settings: Any) -> Path:
    """Train a backbone on unlabelled images.

    Args:
        data: the images; see the module. Labels are never read.
        recipe: a name in `tessella.recipes.RECIPES`, or a whole configuration.
        out: the run folder; missing or empty.
        **settings: any field of `RunConfig` in place of the recipe's value: `epochs=10`; parts as
            dictionaries (`optimizer={"lr": 0.1}`) or dotted names (`**{"method.views.groups.0.size": 160}`).

    Returns:
        `out`, with `backbone.safetensors` in it; a notebook shows a summary of the run.

    Raises:
        UserError: the input cannot be used; the text says what to change.
        tessella.engine.interrupt.Interrupted: Ctrl-C or SIGTERM; the run is saved and `resume` continues it.
    """
    from tessella.data.sources.objects import images_of
    from tessella.engine.pretrain import pretrain as train
    from tessella.recipes import recipe as named
    from tessella.report.run import RunPath
    from tessella.run.config import with_settings

    config = named(recipe) if isinstance(recipe, str) else recipe
    images = images_of(data)
    return RunPath(train(with_settings(config, settings | {"data": images.name}), Path(out), images))


@_command
def resume(run: FilePath, data: Images | None = None, *, allow: Collection[str] = (), **changes: Any) -> Path:
    """Continue a run exactly where it stopped.

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
    from tessella.data.sources.objects import images_of
    from tessella.engine.pretrain import resume as go_on
    from tessella.report.run import RunPath
    from tessella.run.config import different_fields, load_config, with_settings

    images = None if data is None else images_of(data)
    if images is not None:
        changes["data"] = images.name
    saved = load_config(Path(run) / "config.yaml")
    return RunPath(go_on(Path(run), different_fields(saved, with_settings(saved, changes)), images, allow=allow))


@_command
def explore(
    data: Images,
    *,
    out: FilePath | None = None,
    backbone: str | None = None,
    minutes: Positive = 5.0,
    clusters: PositiveInt | None = None,
    device: Device = "auto",
    workers: Threads | None = None,
    seed: Seed = 0,
) -> Path:
    """Show what is in a folder of images: clusters, copies, odd ones; a page to name clusters on.

    OUT/atlas.html is written after every stage, so that it can be opened within a minute; it needs no server and asks
    for nothing. A stage that was stopped goes on when the command is given again. `tessella label`, `classify`,
    `select` and `assign` work from OUT.

    Args:
        data: the images.
        out: folder of the atlas: missing, empty, or an atlas; default: the data's name with .atlas behind it.
        backbone: a run, weights, timm:NAME (which may download them), timm:FOLDER, ...; default: pretrained weights
            that a library has kept on this computer, or else a network that is trained on these images.
        minutes: for that training; with more than before, it goes on.
        clusters: how many on the middle level; default: as many as are stable.
        device: where to run.
        workers: decoding threads; default: the cores at hand.
        seed: of every random choice.

    Returns:
        The page's path.

    Raises:
        UserError: the input cannot be used; the text says what to change.
        tessella.engine.interrupt.Interrupted: Ctrl-C or SIGTERM during the training; the same command goes on.
    """
    from tessella.atlas.explore import explore as make_atlas
    from tessella.data.sources.objects import images_of

    images = images_of(data)
    folder = Path(out) if out is not None else Path(f"{Path(images.name.partition('::')[0]).name or 'images'}.atlas")
    return make_atlas(
        images,
        folder,
        backbone=backbone,
        minutes=minutes,
        clusters=clusters,
        device=device,
        workers=workers,
        seed=seed,
    )


@_command
def label(
    atlas: FilePath,
    *,
    names: FilePath | None = None,
    out: FilePath | None = None,
    folders: FilePath | None = None,
    copy: bool = False,
) -> Labelled:
    """Turn the names that clusters were given on the page of an atlas into labels of images.

    Args:
        atlas: the --out of `tessella explore`.
        names: the names.json that the page has saved; default: the one in the atlas.
        out: a .csv to write: path, label, where the label comes from, cluster.
        folders: a folder to make, with one folder per class.
        copy: copy the images into it; default: link to them.
    """
    from tessella.atlas.label import label as apply_names

    return apply_names(
        Path(atlas),
        None if names is None else Path(names),
        None if out is None else Path(out),
        None if folders is None else Path(folders),
        "copy" if copy else "link",
    )


@_command
def classify(
    atlas: FilePath,
    *,
    out: FilePath,
    labels: FilePath | None = None,
    precision: Annotated[float, Range(0.0, 1.0)] = 0.95,
    seed: Seed = 0,
) -> Classified:
    """Learn a classifier from labelled images of an atlas; it says how sure it is, and abstains where it is not.

    Its page shows what it confuses, how far its confidence can be believed, and which labels look wrong.

    Args:
        atlas: the --out of `tessella explore`.
        out: folder of the classifier; missing or empty.
        labels: a .csv with the columns path and label; default: the names given on the page.
        precision: share of its answers that should be right; where that cannot be had it gives no answer.
        seed: of the folds of the cross-validation.
    """
    from tessella.atlas.classify import classify as learn

    return learn(Path(atlas), None if labels is None else Path(labels), Path(out), precision=precision, seed=seed)


@_command
def select(atlas: FilePath, *, budget: PositiveInt = 100, out: FilePath | None = None) -> Selection:
    """Name the images of an atlas that are worth a look or a label next, and why.

    Args:
        atlas: the --out of `tessella explore`.
        budget: how many.
        out: a .csv to write: path, cluster, reason.
    """
    from tessella.atlas.select import select as choose

    return choose(Path(atlas), budget, None if out is None else Path(out))


@_command
def assign(
    model: FilePath,
    data: Images,
    *,
    out: FilePath,
    device: Device = "auto",
    workers: Threads | None = None,
) -> Assigned:
    """Say of new images which cluster and class they belong to, how sure that is, and how odd they are.

    Args:
        model: a classifier of `tessella classify`, an atlas, or a run.
        data: the images.
        out: NAME.parquet to write, one row per image.
        device: where to run.
        workers: decoding threads; default: the cores at hand.
    """
    from tessella.atlas.assign import assign as describe
    from tessella.data.sources.objects import images_of

    return describe(Path(model), images_of(data), Path(out), device=device, workers=workers)


@_command
def duplicates(data: Images, *, out: FilePath | None = None, workers: Threads | None = None) -> Duplicates:
    """Find exact and near copies: scaled, encoded again, brighter, mirrored, turned by quarters, slightly cropped.

    Args:
        data: the images.
        out: a .csv to write: group, path, which one to keep, and why they are copies.
        workers: decoding threads; default: the cores at hand.
    """
    from tessella.atlas.duplicates import duplicates as find
    from tessella.data.sources.objects import images_of

    return find(images_of(data), None if out is None else Path(out), workers=workers)


@_command
def load_backbone(source: FilePath) -> Backbone:
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
    from tessella.weights.resolve import resolve_backbone

    backbone: Backbone = resolve_backbone(str(source)).backbone
    return backbone.eval()


@_command
def evaluate(
    backbone: Network,
    train: Images | None = None,
    test: Images | None = None,
    *,
    data: FilePath | None = None,
    protocols: Names = (),
    out: FilePath | None = None,
    baseline: bool = False,
    supervised: str | None = None,
    seeds: Repeats | None = None,
    again: bool = False,
    label_map: FilePath | None = None,
    images: str | None = None,
    device: Device = "auto",
    workers: Threads | None = None,
    seed: Seed = 0,
    image_size: Pixels | None = None,
    interpolation: Literal["bilinear", "bicubic"] | None = None,
    batch_size: ForwardBatch = 256,
) -> Records:
    """Judge a backbone on labelled images: by classes, boxes of objects, or masks.

    Each protocol's record is written to OUT/evaluation.json when it is done, and is not computed again. At the end
    OUT/evaluation.md and OUT/evaluation.html show all of them beside published figures; OUT/predictions holds what
    was predicted for each test image.

    Args:
        backbone: a run, imported or official weights, torchvision:NAME, timm:NAME, or random:NAME.
        train: images to learn from, in the format that the protocols need.
        test: images to be judged on.
        data: instead of both, a .yaml file that says which data serve which protocol.
        protocols: knn, linear, linear-swav, fewlabels, clustering, svm, finetune-swav-1, transfer, detection-small,
            segmentation-small, ... (a wrong name lists all); or all, for the quick ones that the data allow. Default:
            knn linear fewlabels clustering; with --data, all.
        out: folder of the results; in the run's own folder, `tessella report` shows them too.
        baseline: also score the same network at random init.
        supervised: a second backbone to stand beside, such as torchvision:resnet50.
        seeds: trainings of each protocol that trains a network, for a mean and a spread.
        again: compute what OUT has already once more.
        label_map: a .csv of class,superclass; the superclasses count.
        images: of COCO files that do not lie near them: their folder or archive.
        device: where to run.
        workers: decoding threads; default: the available cores.
        seed: of every random choice of the protocols.
        image_size: pixels of the evaluated crop; default: the run's.
        interpolation: bilinear or bicubic, to resize images for every backbone; default: as each was trained.
        batch_size: images per forward pass; changes the speed, not the result.

    Returns:
        One record per protocol; the figures are under `scores`.

    Raises:
        UserError: the input cannot be used; the text says what to change.
    """
    from tessella import dist
    from tessella.evaluation.evaluate import evaluate as score
    from tessella.report.evaluation import Records, print_scores, write_pages

    records = score(
        _network(backbone, image_size),
        _named_or_opened(train),
        _named_or_opened(test),
        data=None if data is None else Path(data),
        label_map=None if label_map is None else Path(label_map),
        images=None if images is None else str(images),
        protocols=[protocols] if isinstance(protocols, str) else protocols,
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
    return Records(records)


@_command
def embed(
    backbone: Network,
    data: Images,
    out: FilePath,
    *,
    labels: bool = False,
    device: Device = "auto",
    workers: Threads | None = None,
    image_size: Pixels | None = None,
    batch_size: ForwardBatch = 256,
) -> Features:
    """Write the features of images to a file.

    Args:
        backbone: a run, imported or official weights, torchvision:NAME, timm:NAME, or random:NAME.
        data: the images.
        out: NAME.parquet, or NAME.npy with the images' names and ids in files beside it.
        labels: write class labels too (parquet only).
        device: where to run.
        workers: decoding threads; default: the available cores.
        image_size: pixels of the evaluated crop; default: the run's.
        batch_size: images per forward pass; changes the speed, not the result.

    Returns:
        Features with `x` (N, feature_dim) float32 and the rows they belong to.

    Raises:
        UserError: the input cannot be used, or a file is in the way.
    """
    from tessella.data.sources.objects import images_of
    from tessella.evaluation.embed import embed as write_features

    return write_features(
        _network(backbone, image_size),
        images_of(data, labels),
        Path(out),
        labels=labels,
        device=device,
        workers=workers,
        image_size=image_size,
        batch_size=batch_size,
    )


@_command
def write_report(run: FilePath, *, data: str | None = None) -> Path:
    """Write RUN/report.html: figures, curves, views as the method saw them, settings.

    Args:
        run: a run folder.
        data: the images, if they lie elsewhere now, or must be downloaded.

    Returns:
        The page's path.
    """
    from tessella.report.run import report

    return report(Path(run), data=data)


@_command
def compare(folders: Folders, *, out: FilePath | None = None) -> Comparison:
    """Put evaluations side by side: the same protocols on the same images, differences to the first.

    Args:
        folders: of runs or evaluations, each with an evaluation.json.
        out: NAME.html or NAME.md to write as well.
    """
    from tessella.report.compare import compare as side_by_side

    return side_by_side([Path(folder) for folder in folders], None if out is None else Path(out))


@_command
def import_weights(file: FilePath, *, out: FilePath, from_: str = "auto") -> Official:
    """Read an official checkpoint, and write it as a folder that other commands take as a backbone.

    What the file is, is seen from its keys and shapes: SwAV (its own files and VISSL's), DeepCluster-v2, JigClu,
    MEJigClu, CoKe, SMoG, or a ResNet in torchvision's layout. Nothing in the file is executed. A tensor that does not
    fit is an error; what is left out is listed with its reason.

    Args:
        file: .pth, .pth.tar, .pt, .torch or .safetensors.
        out: folder for the weights; missing or empty.
        from_: accept only this project's layout.
    """
    from tessella.weights.imported import import_weights as convert

    return convert(Path(file), Path(out), from_)


@_command
def export(
    backbone: FilePath,
    out: FilePath,
    *,
    to: Formats = (),
    data: Images | None = None,
    push: str | None = None,
) -> Exported:
    """Write a backbone for other libraries; each of them loads it back, and what it computes is compared.

    OUT/README.md is a model card, OUT/check.json the largest differences on real images. Above 1e-5 relative, nothing
    is written.

    Args:
        backbone: a run, imported or official weights, torchvision:NAME, timm:NAME, random:NAME; or a classifier of
            `tessella classify`, with its classes.
        out: folder of the files; missing or empty.
        to: hub (timm and transformers), onnx, pt2 (torch.export), torchvision, safetensors; default: all that can
            carry the network.
        data: images to compare on; default: two photographs that scikit-learn brings.
        push: OWNER/NAME of a repository on the Hugging Face hub to upload OUT to, with the login of huggingface-hub;
            a new repository is private.

    Returns:
        The differences; `grid()` is what the command prints.

    Raises:
        UserError: a format cannot carry the network (the text says which can), or a tool computes something else.
    """
    from tessella.data.sources.objects import images_of
    from tessella.formats.export import export as write_formats
    from tessella.formats.model import model_of

    model = model_of(str(backbone))
    images = None if data is None else images_of(data)
    return write_formats(model, Path(out), to, source=Path(backbone), images=images, push=push)


@_command
def serve(
    backbone: FilePath,
    *,
    host: str = "127.0.0.1",
    port: Port = 8000,
    token: bool = True,
    device: Device = "auto",
    workers: Threads | None = None,
) -> None:
    """Answer HTTP requests: an image in; features, cluster and class out. Until Ctrl-C.

    The address is printed with an example, /openapi.json describes the interface. Requests need a random token, or
    that of the environment variable TESSELLA_TOKEN.

    Args:
        backbone: a classifier, an atlas, a run, imported or official weights, torchvision:NAME, timm:NAME, or
            random:NAME. The first three answer as `tessella assign` does; the others with features alone.
        host: address to listen at; by default only this machine can reach it.
        port: 0 for any that is free.
        token: whether requests need one.
        device: where to run.
        workers: decoding threads; default: the cores at hand.
    """
    import os
    import secrets

    from tessella.engine.launch import cores_at_hand, pick_device
    from tessella.formats.table import require

    require("tessella serve", ("starlette", "uvicorn"), extra="serve")
    from tessella import server

    served = server.network(str(backbone), pick_device(device))
    wanted = os.environ.get("TESSELLA_TOKEN") or secrets.token_urlsafe(24)
    server.serve(served, host, port, wanted if token else None, workers or cores_at_hand())


def _network(backbone: Network, image_size: int | None) -> Any:
    """A name stays a name; a module gets what an evaluation needs to know of it."""
    from torch import nn

    from tessella.weights.resolve import loaded_module

    return loaded_module(backbone, image_size) if isinstance(backbone, nn.Module) else str(backbone)


def _named_or_opened(data: Images | None) -> Any:
    """Names stay names, because a protocol may open them as images with boxes or masks."""
    from tessella.data.sources.objects import images_of

    if data is None or isinstance(data, str | Path):
        return None if data is None else str(data)
    return images_of(data, labels=True)
