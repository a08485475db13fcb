"""The command line: words -> typed settings -> one engine call.

Exit codes: 0 done; 2 something to change, said in one line; 75 interrupted by Ctrl-C or SIGTERM, and `tessella resume`
goes on; 69 another rank was lost, and `tessella resume` goes on; 130 stopped where nothing was to be saved; 1 an
internal error, with its traceback.

Standard output and standard error may be closed, on a full disk, or a pipe whose reader has ended: work that goes into
files is done all the same. Where the text itself is the result, a full disk is exit code 2.

`tessella --help` answers at once: torch, tyro and all that needs them are imported within the commands.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import functools
import inspect
import io
import os
import shlex
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, NoReturn, TypeAlias

from tessella.console import LossyStream
from tessella.engine.interrupt import EXIT_INTERRUPTED, EXIT_STOPPED, Interrupted, stoppable
from tessella.engine.ranks import place
from tessella.errors import EXIT_RANK_LOST, RankLost, UserError
from tessella.ranges import (
    ForwardBatch,
    JpegQuality,
    PackedSide,
    Pixels,
    Positive,
    PositiveInt,
    Repeats,
    Seed,
    Threads,
    checked,
)
from tessella.text import printable

if TYPE_CHECKING:
    from tessella.data.sources import ImageSet
    from tessella.run.config import RunConfig

EXIT_USER_ERROR = 2

_HELP = ("-h", "--help")
_WORK_GOES_TO_FILES = ("demo", "pack", "pretrain", "resume", "evaluate", "embed", "import", "report")
_SHOWN_UNREADABLE = 20  # files that `scan` lists with their reason

Device: TypeAlias = Literal["auto", "cpu", "cuda", "mps"]


class Command(NamedTuple):
    """One row of the table of commands: its words in short, what it does, and who takes them."""

    usage: str
    summary: str
    run: Callable[[list[str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words behind `tessella`; default: this process's.

    Returns:
        The exit code; see the module.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    out, errors = LossyStream(sys.stdout), LossyStream(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = _exit_code(words)
        out.flush()
        lost = out.error
        text_is_the_result = "".join(words[:1]) not in _WORK_GOES_TO_FILES
        if code == 0 and lost is not None and lost.errno != errno.EPIPE and text_is_the_result:
            _say(f"cannot write to standard output: {lost.strerror}")
            code = EXIT_USER_ERROR
    for stream in (out, errors):
        if stream.error is not None:  # else the interpreter fails at the same text when it ends
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


def _exit_code(words: list[str]) -> int:
    try:
        with stoppable():
            return _dispatch(words)
    except UserError as error:
        _say(str(error))
        return EXIT_USER_ERROR
    except OSError as error:  # of the system, about a file that the user has named or that ought to be usable
        _say(_about_file(error))
        return EXIT_USER_ERROR
    except RankLost:  # each rank has said it
        return EXIT_RANK_LOST
    except SystemExit as stop:  # after a command's help
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt as stop:
        _say(str(stop) or "stopped by Ctrl-C")
        return EXIT_STOPPED


def _about_file(error: OSError) -> str:
    """What the system says, about which file, and what to look at."""
    reason = error.strerror or str(error) or type(error).__name__
    if error.filename is None:
        return f"the system refuses: {reason}"
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
    return f"{name}: {reason}. Check that it is what was meant, and that this user may read and write it"


def program() -> NoReturn:
    """`main` as the program that people start.

    One that was stopped ends without the interpreter's own clean-up, in which libraries that were half loaded have been
    seen to crash, and which may wait for a rank that is lost.
    """
    _open_closed_descriptors()
    code = main()
    if code in (EXIT_STOPPED, EXIT_INTERRUPTED, EXIT_RANK_LOST):
        LossyStream(sys.stdout).flush()
        os._exit(code)
    sys.exit(code)


def _open_closed_descriptors() -> None:
    """Point closed standard descriptors at /dev/null.

    Otherwise the next file that is opened, such as a checkpoint, gets a closed one's number, and what a library prints.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one


def _dispatch(words: list[str]) -> int:
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if name in _HELP:
        print(_overview())
        return 0
    if name == "--version":
        from importlib.metadata import version

        print(f"tessella {version('tessella')}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise UserError(f"there is no command {name!r}{hint} The commands are {', '.join(COMMANDS)}")
    return COMMANDS[name].run(rest)


def _overview() -> str:
    lines = "\n".join(f"  {name:<10}{command.summary}" for name, command in COMMANDS.items())
    return f"""\
Learn visual representations from unlabelled images by clustering.

usage: tessella COMMAND ...        `tessella COMMAND --help` explains one command

{lines}

DATA is a folder of images, a .csv or .parquet list, .tar archives, a data set of torchvision (cifar10, ...),
hf:NAME, digits or shapes; a part is named behind two colons, as in digits::train.
First steps: `tessella demo`, then `tessella scan DATA` on your own images."""


# --- train --------------------------------------------------------------------------------------------------


def pretrain(words: list[str]) -> int:
    """Train a backbone: RECIPE --data DATA --out RUN, and any other field of the run."""
    if words and words[0] in _HELP:
        print(_pretrain_help())
        return 0
    name, rest = _first_word("pretrain", "RECIPE", words)
    import tyro

    from tessella.engine.pretrain import pretrain as train
    from tessella.recipes import recipe

    start = recipe(name)
    if not start.data:
        start = dataclasses.replace(start, data=tyro.MISSING_NONPROP)  # a setting that must be given
    options = dataclasses.make_dataclass(
        "Options",
        [
            ("out", Annotated[Path, tyro.conf.arg(help="run folder; missing or empty")]),
            ("config", Annotated[type(start), tyro.conf.arg(name="")], start),
        ],
    )
    options.__doc__ = "Train a backbone on unlabelled images. What is not given is as in the recipe."
    given = _parse("pretrain", options, rest, prog=f"tessella pretrain {name}")
    out, config = given.out, given.config
    if config.recipe != name:
        raise UserError(f"--recipe {config.recipe} contradicts the first word, {name}: leave --recipe out")
    if not any(word.startswith("--optimizer.lr") for word in rest):
        _tell_batch_rule(recipe(name), config)
    return _until_done(out, lambda: train(config, out))


def _tell_batch_rule(made: RunConfig, given: RunConfig) -> None:
    """What a recipe's rule for another batch size says beyond what was given; nothing is scaled unasked."""
    if (given.batch_size, given.accumulate) == (made.batch_size, made.accumulate) or _rank():
        return
    from tessella.recipes.batch import at_batch_size, flags

    chosen = flags(made, given)
    rule = flags(made, at_batch_size(made, given.batch_size, given.accumulate))
    words = [flag for name, flag in rule.items() if name not in chosen]
    if words and "optimizer.name" not in chosen:
        size = f"{given.batch_size}" + (f" in {given.accumulate} parts" if given.accumulate > 1 else "")
        _say(
            f"note: {made.recipe} is made for batches of {made.batch_size}, and nothing is scaled unasked; for {size} "
            f"its rule would add {' '.join(words)} (`tessella recipes {made.recipe}` says why)"
        )


def _pretrain_help() -> str:
    from tessella.recipes.describe import listing

    recipes = "\n".join(listing())
    return f"""\
usage: tessella pretrain {COMMANDS["pretrain"].usage}

Train a backbone on unlabelled images. RUN must be missing or empty. A setting is any field of the run, for
example --epochs 3 --method.temperature 0.2; `tessella pretrain RECIPE --help` shows all. The recipes:

{recipes}"""


def resume(words: list[str]) -> int:
    """Go on with a run: RUN, and what may change about its execution."""
    if any(word in _HELP for word in words):
        print(_resume_help())
        return 0
    name, rest = _first_word("resume", "RUN", words)
    return _until_done(Path(name), lambda: _go_on(Path(name), rest))


def _go_on(run: Path, words: list[str]) -> None:
    from tessella.run.lock import refuse_second_writer

    _require_run(run)  # both at once, before torch is imported
    refuse_second_writer(run)
    from tessella.engine.pretrain import resume as go_on
    from tessella.run.config import different_fields, load_config

    saved = load_config(run / "config.yaml")
    allow, words = _taken_out("--allow", words)
    given = _parse("resume", type(saved), words, default=saved)
    allow = [name.replace("-", "_") for name in allow]
    changes = different_fields(saved, given)
    for name in ("data", "start_from"):  # typed, even if as in config.yaml: then it may be downloaded
        if any(word.partition("=")[0].replace("-", "_") == f"__{name}" for word in words):
            changes[name] = getattr(given, name)
    go_on(run, changes, allow=allow)


def _require_run(folder: Path) -> None:
    if not any((folder / name).is_file() for name in ("config.yaml", "import.json")):  # imported weights: said later
        raise UserError(f"{folder} is not a run folder: it has no config.yaml; give the --out of a run")


def _taken_out(flag: str, words: list[str]) -> tuple[list[str], list[str]]:
    """The values of a flag that may be given several times, and the words without them."""
    values, rest, left = [], [], iter(words)
    for word in left:
        if word.startswith(f"{flag}="):
            values.append(word.partition("=")[2])
        elif word == flag:
            values.append(next(left, ""))
        else:
            rest.append(word)
    return values, rest


def _resume_help() -> str:
    from tessella.run.config import ON_RESUME

    free, flag = (
        " ".join(f"--{name.replace('_', '-')}" for name, kind in ON_RESUME.items() if kind == wanted)
        for wanted in ("free", "flag")
    )
    return f"""\
usage: tessella resume {COMMANDS["resume"].usage}

Go on exactly where the run stopped, from its newest valid checkpoint. How the run is executed may change:
{free}

What changes the result has to be allowed by name as well, as in `--epochs 300 --allow epochs`, on the command line as
in config.yaml. All else stays as it was:
{flag}

Images that were added, removed or encoded again since are noticed, and refused.

A run that --max-steps cut short goes on to its end with --max-steps None."""


def _until_done(run: Path, train: Callable[[], object]) -> int:
    """Train, and say what to do next.

    Args:
        run: the run folder.
        train: may also be stopped before or after its loop, where there is nothing to save.
    """
    name = shlex.quote(str(run))
    try:
        train()
    except Interrupted as stop:
        _say(f"{stop}; `tessella resume {name}` goes on")
        return EXIT_INTERRUPTED
    except KeyboardInterrupt as stop:
        if not (run / "config.yaml").exists():  # nothing was begun that could be gone on with
            raise
        _say(f"{str(stop) or 'stopped by Ctrl-C'}; `tessella resume {name}` goes on from what was saved last")
        return EXIT_INTERRUPTED
    if _rank() == 0:
        print(printable(f"Written:    {run}, with backbone.safetensors and the figures of its steps in metrics.jsonl"))
        print(f"Judge it:   tessella evaluate {name} --train LABELLED --test LABELLED --baseline --out {name}")
        print(f"Look at it: tessella report {name}")
    return 0


def demo(*, out: Path = Path("tessella-demo"), seeds: Repeats = 3, device: Device = "auto") -> int:
    """Pretrain on embedded digits, evaluate, write a report: minutes on two cores, no network.

    Args:
        out: folder of the runs and the report; missing or empty.
        seeds: number of runs; the table shows their mean and spread.
        device: where to run.
    """
    from tessella.recipes.demo import demo as run_demo

    try:
        run_demo(out, seeds=seeds, device=device)
    except Interrupted:
        raise KeyboardInterrupt from None  # one of its runs could go on, but a demo is started anew
    return 0


# --- use ----------------------------------------------------------------------------------------------------


def evaluate(
    backbone: str,
    /,
    *,
    out: Path,
    train: str | None = None,
    test: str | None = None,
    data: Path | None = None,
    protocols: tuple[str, ...] = (),
    baseline: bool = False,
    supervised: str | None = None,
    seeds: Repeats | None = None,
    again: bool = False,
    label_map: Path | None = None,
    images: str | None = None,
    device: Device = "auto",
    workers: Threads | None = None,
    seed: Seed = 0,
    image_size: Pixels | None = None,
    interpolation: Literal["bilinear", "bicubic"] | None = None,
    batch_size: ForwardBatch = 256,
) -> int:
    """Judge a backbone on labelled images: by classes, boxes of objects, or masks.

    Each protocol's record is written to OUT/evaluation.json when it is done, and is not computed again. At the end
    OUT/evaluation.md and OUT/evaluation.html show all of them beside published figures; OUT/predictions holds what
    was predicted for each test image.

    Args:
        backbone: a run, imported or official weights, torchvision:NAME, timm:NAME, or random:NAME.
        out: folder of the results; in the run's own folder, `tessella report` shows them too.
        train: images to learn from, in the format that the protocols need.
        test: images to be judged on.
        data: instead of both, a .yaml file that says which data serve which protocol.
        protocols: knn, linear, linear-swav, fewlabels, clustering, svm, finetune-swav-1, transfer, detection-small,
            segmentation-small, ... (a wrong name lists all); or all, for the quick ones that the data allow. Default:
            knn linear fewlabels clustering; with --data, all.
        baseline: also score the same network at random init.
        supervised: a second backbone to stand beside, such as torchvision:resnet50.
        seeds: trainings of each protocol that trains a network, for a mean and a spread.
        again: compute anew what OUT has already.
        label_map: a .csv of class,superclass; the superclasses count.
        images: of COCO files that do not lie near them: their folder or archive.
        device: where to run.
        workers: decoding threads; default: the cores at hand.
        seed: of every random choice of the protocols.
        image_size: pixels of the evaluated crop; default: the run's.
        interpolation: bilinear or bicubic, to resize images for every backbone; default: as each was trained.
        batch_size: images per forward pass; changes the speed, not the result.
    """
    from tessella.engine.launch import leave_ranks
    from tessella.evaluation.evaluate import evaluate as score
    from tessella.report.evaluation import print_scores, write_pages

    records = score(
        backbone,
        train,
        test,
        data=data,
        label_map=label_map,
        images=images,
        protocols=protocols,
        out=out,
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
    leave_ranks()
    if _rank() == 0:
        print_scores(records)
        _, page = write_pages(out)
        _tell_written(page, ", and evaluation.json, evaluation.md and predictions beside it")
    return 0


def embed(
    backbone: str,
    data: str,
    /,
    *,
    out: Path,
    labels: bool = False,
    device: Device = "auto",
    workers: Threads | None = None,
    image_size: Pixels | None = None,
    batch_size: ForwardBatch = 256,
) -> int:
    """Write the features of images to a file.

    Args:
        backbone: a run, imported or official weights, torchvision:NAME, timm:NAME, or random:NAME.
        data: the images.
        out: NAME.parquet, or NAME.npy with the images' names and ids in files beside it.
        labels: write class labels too (parquet only).
        device: where to run.
        workers: decoding threads; default: the cores at hand.
        image_size: pixels of the evaluated crop; default: the run's.
        batch_size: images per forward pass; changes the speed, not the result.
    """
    from tessella.evaluation.embed import embed as write_features

    features = write_features(
        backbone,
        data,
        out,
        labels=labels,
        device=device,
        workers=workers,
        image_size=image_size,
        batch_size=batch_size,
    )
    count, dim = features.x.shape
    skipped = f"; {len(features.skipped)} could not be read" if features.skipped else ""
    _tell_written(out, f" ({count} images, {dim} values each{skipped})")
    return 0


def report(run: Path, /, *, data: str | None = None) -> int:
    """Write RUN/report.html: figures, curves, views as the method saw them, settings.

    Args:
        run: a run folder.
        data: the images, if they lie elsewhere now, or must be downloaded.
    """
    _require_run(run)
    from tessella.report.of_run import report as write_report

    _tell_written(write_report(run, data=data))
    return 0


def compare(folders: tuple[Path, ...], /, *, out: Path | None = None) -> int:
    """Put evaluations side by side: the same protocols on the same images, differences to the first.

    Args:
        folders: of runs or evaluations, each with an evaluation.json.
        out: NAME.html or NAME.md to write as well.
    """
    from tessella.report.compare import compare as side_by_side

    side_by_side(folders, out)
    if out is not None:
        _tell_written(out)
    return 0


def import_weights(file: Path, /, *, out: Path, from_: str = "auto") -> int:
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
    from tessella.weights.imported import report_lines

    official = convert(file, out, from_)
    print("\n".join(map(printable, report_lines(official))))
    print()
    _tell_written(out)
    name = shlex.quote(str(out))
    print(f"Judge it:     tessella evaluate {name} --train LABELLED --test LABELLED --out DIR")
    print(f"Train on it:  tessella pretrain RECIPE --data DATA --out RUN --start-from {name}")
    return 0


# --- look ---------------------------------------------------------------------------------------------------


def recipes(name: str | None = None, /) -> int:
    """List the recipes, or show one with its source, cost, expected score and settings.

    Args:
        name: of a recipe; without it, all are listed.
    """
    from tessella.recipes import recipe
    from tessella.recipes.describe import listing, page

    print("\n".join(listing() if name is None else page(recipe(name))))
    return 0


def scan(data: str, /, *, headers_only: bool = False, workers: Threads | None = None) -> int:
    """Look at images before training: how many, how large, what cannot be read, which recipe fits.

    Every image is decoded once, in processes of their own: one that crashes or hangs the decoder is listed as well.
    Into a file or pipe the list is complete.

    Args:
        data: the images.
        headers_only: decode nothing; quick, but files that end in the middle are not found.
        workers: decoding processes; default: the cores at hand.
    """
    from tessella.data.isolated import undecodable
    from tessella.data.sources import open_images

    images = open_images(data)
    failed = images.unreadable if headers_only else images.unreadable + undecodable(images, workers)
    print("\n".join(map(printable, _scan_lines(images, sorted(failed)))))
    return 0


def bench(
    recipe_: str | None = None,
    /,
    *,
    data: str,
    device: Device = "auto",
    workers: Threads | None = None,
    batch_size: PositiveInt | None = None,
    seconds: Positive = 60.0,
) -> int:
    """Measure what limits training on this machine: reading, decoding, views, or the step.

    Args:
        recipe_: of the run that is planned; default: the one that `tessella scan` names.
        data: the images.
        device: where to run.
        workers: decoding threads; default: the cores at hand.
        batch_size: images per update; default: the recipe's.
        seconds: about how long it may take.
    """
    from tessella.data.sources import open_images
    from tessella.engine.bench import bench as measure
    from tessella.recipes import recipe
    from tessella.report.bench import bench_lines

    images = open_images(data)
    config = recipe(recipe_ or suggested_recipes(_short_side(images))[0][0])
    config = dataclasses.replace(
        config, data=data, device=device, workers=workers, batch_size=batch_size or config.batch_size
    )
    rates = measure(config, images, seconds=seconds)
    print("\n".join(bench_lines(rates, config.recipe, config.backbone.name)))
    return 0


def pack(
    data: str, /, *, out: Path, short_side: PackedSide = 320, quality: JpegQuality = 90, workers: Threads | None = None
) -> int:
    """Encode images anew, smaller, once: later every epoch reads and decodes fewer bytes.

    A pack is read like any other DATA; names, classes and the randomness of views stay. The pixels change: by the
    smaller size, and by the JPEG, whose loss is measured and told. A killed pack goes on where it was; given again for
    a complete pack, the command reads all of it and compares its hashes.

    Args:
        data: the images.
        out: folder of the pack; missing or empty.
        short_side: pixels that the shorter side of an image has at most.
        quality: of the JPEGs, 1 to 100.
        workers: threads; default: the cores at hand.
    """
    from tessella.data.pack import pack as write_pack
    from tessella.engine.launch import cores_at_hand

    images = _with_labels_if_any(data)
    packed = write_pack(images, out, short_side=short_side, quality=quality, workers=workers or cores_at_hand())
    share = f" ({packed.bytes / packed.source_bytes:.0%} of {packed.source_bytes:,})" if packed.source_bytes else ""
    loss = "" if packed.psnr is None else f"; encoding costs {packed.psnr:.1f} dB PSNR in the mean of a sample"
    kept = f", {packed.kept:,} of them as they were" if packed.kept else ""
    failed = f"; {packed.unreadable:,} could not be read, {out / 'pack.json'} says why" if packed.unreadable else ""
    print(f"{packed.images:,} images{kept}, {packed.bytes:,} bytes{share}{loss}{failed}; verified")
    if images.uniform_size and max(images.uniform_size) <= short_side and not packed.source_bytes:
        print("These images are small and all of one size: a run keeps them in memory, and is as fast without a pack")
    _tell_written(out, "" if packed.written else " (before, and whole)")
    return 0


def _with_labels_if_any(data: str) -> ImageSet:
    from tessella.data.sources import open_images

    try:
        return open_images(data, labels=True)
    except UserError:
        return open_images(data)


def _scan_lines(images: ImageSet, failed: list[tuple[str, str]]) -> list[str]:
    import numpy as np

    from tessella.data.sources.messages import not_read

    widths, heights = np.asarray(images.sizes).T
    short = _short_side(images)
    if images.uniform_size:
        sizes = f"all {widths[0]} x {heights[0]} pixels"
    else:
        sizes = (
            f"{widths.min()} to {widths.max()} pixels wide, {heights.min()} to {heights.max()} high; "
            f"the shorter side has {short} in the median"
        )
    shown = _SHOWN_UNREADABLE if sys.stdout.isatty() else len(failed)
    names, reason = suggested_recipes(short)
    return [
        f"images      {len(images) - (len(failed) - len(images.unreadable)):,}",
        f"sizes       {sizes}",
        *([f"passed over {not_read(images.passed_over)}"] if images.passed_over else []),
        f"unreadable  {len(failed):,}",
        *(f"            {key}: {why}" for key, why in failed[:shown]),
        *([f"            and {len(failed) - shown:,} more: tessella scan DATA > FILE"] if len(failed) > shown else []),
        f"recipe      {' or '.join(names)}: {reason}",
    ]


def _short_side(images: ImageSet) -> int:
    """Of an image in the median, in pixels."""
    import numpy as np

    return int(np.median(np.min(images.sizes, axis=1)))


def suggested_recipes(short_side: int) -> tuple[tuple[str, ...], str]:
    """Recipes for images of a size, and why.

    Args:
        short_side: pixels, in the median.
    """
    if short_side <= 64:
        return ("swav_cpu", "jigclu_cpu"), "made for images of about 32 pixels, minutes on two cores"
    return (
        ("swav_imagenet_200ep_bs256", "jigclu_imagenet_200ep"),
        "made for photos, on GPUs; on a CPU, try things out with swav_cpu",
    )


# --- words --------------------------------------------------------------------------------------------------


def _typed(function: Callable[..., int]) -> Callable[[list[str]], int]:
    """A command whose words are its function's arguments: positional before `/`, options after `*`."""
    return lambda words: _parse(function.__name__, function, words)()


def _first_word(command: str, what: str, words: list[str]) -> tuple[str, list[str]]:
    """The word that decides what the options mean, and the options."""
    if not words or words[0].startswith("-"):
        raise UserError(f"{what} comes first: tessella {command} {COMMANDS[command].usage}")
    return words[0], words[1:]


def _parse(command: str, target: Any, words: list[str], *, prog: str | None = None, default: Any = None) -> Any:
    """Typed settings from words.

    Args:
        command: for the usage in messages.
        target: a function or a dataclass; its docstring and comments are the help.
        words: the options.
        prog: what the help calls the command.
        default: of a dataclass.

    Returns:
        The function with its arguments bound, ready to be called, or an instance of the dataclass.

    Raises:
        UserError: the words do not fit.
        SystemExit: help was asked for, and shown.
    """
    import tyro

    prog = prog or f"tessella {command}"
    target = target if isinstance(target, type) else _recording(target)
    boxes = io.StringIO()  # tyro shows an error in a box of many lines; a user error is one line
    try:
        with contextlib.redirect_stderr(boxes):
            return tyro.cli(
                target,
                prog=prog,
                args=words,
                default=tyro.MISSING_NONPROP if default is None else default,
                config=(tyro.conf.AvoidSubcommands,),  # a run's method is its recipe's
            )
    except SystemExit as stop:
        if stop.code in (None, 0):
            raise
    usage = f"tessella {command} {COMMANDS[command].usage}"
    raise UserError(f"{_in_one_line(boxes.getvalue())}. Usage: {usage}; `{prog} --help` explains all")


def _recording(function: Callable[..., int]) -> Callable[..., Callable[[], int]]:
    """What tyro may call: it binds the arguments and leaves the command to be run outside of the parser."""
    import tyro

    def record(*args: Any, **kwargs: Any) -> Callable[[], int]:
        return functools.partial(checked(function), *args, **kwargs)

    signature, hints = inspect.signature(function), typing.get_type_hints(function)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            hints[name] = Annotated[hints[name], tyro.conf.arg(metavar=name.upper())]
        if name.endswith("_"):  # a word of Python
            hints[name] = Annotated[hints[name], tyro.conf.arg(name=name.rstrip("_"))]
    typed = [parameter.replace(annotation=hints[name]) for name, parameter in signature.parameters.items()]
    record.__doc__, record.__annotations__ = function.__doc__, hints
    record.__signature__ = signature.replace(parameters=typed)  # type: ignore[attr-defined]
    return record


def _in_one_line(box: str) -> str:
    """What a box of tyro says, without its frame; its sections behind semicolons."""
    lines = [line.strip(" │|") for line in box.splitlines()[1:-1]]
    words = " ".join(line if line.strip("─-") else ";" for line in lines).replace(" ;", ";")
    return words.partition("; For full helptext")[0].strip(" ;").rstrip(".")


# --- console ------------------------------------------------------------------------------------------------


def _tell_written(path: Path, more: str = "") -> None:
    if _rank() == 0:
        print(printable(f"Written: {path}{more}"))


def _say(text: str) -> None:
    """One line on standard error, once per machine: another machine's trouble may be its own."""
    if place().local_rank == 0:
        who = f"tessella (rank {_rank()})" if _rank() else "tessella"
        print(f"{who}: {printable(text)}", file=sys.stderr)


def _rank() -> int:
    """This process's rank; torch may not be loaded."""
    return place().rank


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "[--out DIR] [--seeds N]",
        "embedded digits, no network: pretrain, evaluate, report",
        _typed(demo),
    ),
    "scan": Command(
        "DATA [--headers-only]",
        "what is in a data set, what cannot be read, which recipe fits",
        _typed(scan),
    ),
    "pack": Command(
        "DATA --out PACK [--short-side 320] [--quality 90]",
        "encode images anew, smaller, once: epochs read and decode less",
        _typed(pack),
    ),
    "bench": Command(
        "[RECIPE] --data DATA [--seconds 60]",
        "what limits training here: decoding, views or the step; what a pack brings",
        _typed(bench),
    ),
    "recipes": Command(
        "[NAME]",
        "list complete runs, or show one with its source and cost",
        _typed(recipes),
    ),
    "pretrain": Command(
        "RECIPE --data DATA --out RUN [--SETTING VALUE ...]",
        "train a backbone on unlabelled images",
        pretrain,
    ),
    "resume": Command(
        "RUN [--SETTING VALUE ...]",
        "go on exactly where a run stopped",
        resume,
    ),
    "evaluate": Command(
        "BACKBONE (--train DATA --test DATA | --data FILE) --out DIR [--protocols NAME ...] [--baseline]",
        "judge a backbone: probes, few labels, transfer, detection, segmentation",
        _typed(evaluate),
    ),
    "compare": Command(
        "FOLDERS [--out FILE]",
        "evaluations side by side",
        _typed(compare),
    ),
    "embed": Command(
        "BACKBONE DATA --out FILE",
        "write features as .parquet or .npy",
        _typed(embed),
    ),
    "import": Command(
        "FILE --out DIR [--from PROJECT]",
        "official checkpoints of the five methods, and ResNets, in",
        lambda words: _parse("import", import_weights, words)(),
    ),
    "report": Command(
        "RUN",
        "write a page about a run",
        _typed(report),
    ),
}
