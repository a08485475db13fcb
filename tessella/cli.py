"""The command line: words -> typed settings -> one engine call.

Exit codes: 0 done; 2 a user error, told in one line; 75 interrupted and saved (`tessella resume` goes on);
130 Ctrl-C where nothing was to be saved; 1 an internal error, with its traceback.

`tessella --help` answers at once: torch, tyro and all that needs them are imported within the commands.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from tessella.errors import UserError

if TYPE_CHECKING:
    from tessella.data.sources import ImageSet
    from tessella.engine.config import RunConfig

EXIT_USER_ERROR = 2
EXIT_CTRL_C = 130

_HELP = ("-h", "--help")
_SHOWN_UNREADABLE = 20  # files that `scan` lists with their reason
Device = Literal["auto", "cpu", "cuda", "mps"]


class Command(NamedTuple):
    """One row of the table of commands: its arguments in short, what it does, and the function of its words."""

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
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except UserError as error:
        _say(str(error))
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        _say("stopped by Ctrl-C")
        return EXIT_CTRL_C
    except BrokenPipeError:  # `tessella recipes | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(words: list[str]) -> int:
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if name in (*_HELP, "help"):
        print(_overview())
        return 0
    if name == "--version":
        from importlib.metadata import version

        print(f"tessella {version('tessella')}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"there is no command {name!r}; {hint}The commands are {', '.join(COMMANDS)}")
    return COMMANDS[name].run(rest)


def _overview() -> str:
    lines = [f"  {name:<10}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "Learn visual representations from unlabelled images by clustering.",
            "",
            "usage: tessella COMMAND ...        `tessella COMMAND --help` explains one command",
            "",
            *lines,
            "",
            "DATA is a folder of images, a .csv or .parquet list, .tar archives, a torchvision data set (cifar10 ...),",
            "hf:NAME, digits or shapes. First steps: `tessella demo`, then `tessella scan DATA`.",
        ]
    )


# --- train ----------------------------------------------------------------------------------------------------------


def _pretrain(words: list[str]) -> int:
    name, rest = _first_word("pretrain", words, "RECIPE")
    if name is None:
        print(_pretrain_help())
        return 0
    import tyro

    from tessella.engine.pretrain import pretrain
    from tessella.recipes import recipe

    start = dataclasses.replace(recipe(name), data=tyro.MISSING)  # a setting that must be given
    options = dataclasses.make_dataclass(
        "Options",
        [
            ("out", Annotated[Path, tyro.conf.arg(help="run folder; missing or empty")]),
            ("config", Annotated[type(start), tyro.conf.arg(name="")], start),
        ],
    )
    given = _parse(
        "pretrain", options, rest, prog=f"tessella pretrain {name}", description=_pretrain_help(short=True)
    )
    if given.config.recipe != name:
        raise UserError(
            f"--recipe {given.config.recipe} contradicts the recipe {name}: name one recipe, as first word"
        )
    code = _until_interrupted(given.out, lambda: pretrain(given.config, given.out))
    if code == 0 and _rank() == 0:
        run = shlex.quote(str(given.out))
        print(f"Judge it:   tessella evaluate {run} --train LABELLED --test LABELLED --baseline --out {run}")
        print(f"Look at it: tessella report {run}")
    return code


def _pretrain_help(short: bool = False) -> str:
    if short:
        return "Train a backbone. Settings that are not given are the recipe's."
    return "\n".join(
        [
            f"usage: tessella pretrain {COMMANDS['pretrain'].usage}",
            "",
            "Train a backbone on unlabelled images. RUN must be missing or empty. A setting is any field of the run,",
            "for example --epochs 3 --method.temperature 0.2; `tessella pretrain RECIPE --help` shows all.",
            "",
            *_recipe_lines(),
        ]
    )


def _resume(words: list[str]) -> int:
    name, rest = _first_word("resume", words, "RUN")
    if name is None or any(word in _HELP for word in rest):
        print(_resume_help())
        return 0
    from tessella.engine.config import load_config
    from tessella.engine.pretrain import resume

    run = Path(name)
    saved = load_config(run / "config.yaml")
    given: RunConfig = _parse("resume", type(saved), rest, default=saved)
    changes = {
        field.name: getattr(given, field.name)
        for field in dataclasses.fields(given)
        if getattr(given, field.name) != getattr(saved, field.name)
    }
    return _until_interrupted(run, lambda: resume(run, changes))


def _resume_help() -> str:
    from tessella.engine.config import FREE_FIELDS

    flags = " ".join(f"--{name.replace('_', '-')}" for name in FREE_FIELDS)
    return "\n".join(
        [
            f"usage: tessella resume {COMMANDS['resume'].usage}",
            "",
            "Go on exactly where the run stopped, from its newest valid checkpoint. What decides the result stays as it",
            f"was; how the run is executed may change: {flags}.",
            "A run that --max-steps cut short goes on to its end with --max-steps None.",
        ]
    )


def _until_interrupted(run: Path, train: Callable[[], object]) -> int:
    from tessella.engine.interrupt import EXIT_INTERRUPTED, Interrupted

    try:
        train()
    except Interrupted as stop:
        _say(f"{stop}; `tessella resume {shlex.quote(str(run))}` goes on")
        return EXIT_INTERRUPTED
    return 0


def _demo(words: list[str]) -> int:
    def demo(*, out: Path = Path("tessella-demo"), seeds: int = 3, device: Device = "auto") -> int:
        """Pretrain on embedded digits, evaluate, write a report: minutes on two cores, no network.

        Args:
            out: folder for the runs and the report; missing or empty.
            seeds: number of runs; the table shows their mean and spread.
            device: where to run.
        """
        from tessella.engine.interrupt import Interrupted
        from tessella.recipes.demo import demo as run_demo

        try:
            run_demo(out, seeds=seeds, device=device)
        except Interrupted:
            raise KeyboardInterrupt from None  # its first run alone could go on, but a demo is started anew
        return 0

    return _parse("demo", demo, words)()


# --- use ------------------------------------------------------------------------------------------------------------


def _evaluate(words: list[str]) -> int:
    def evaluate(
        backbone: str,
        /,
        *,
        train: str,
        test: str,
        out: Path,
        protocols: tuple[str, ...] = ("knn", "linear", "fewlabels", "clustering"),
        baseline: bool = False,
        device: Device = "auto",
        workers: int | None = None,
        seed: int = 0,
        image_size: int | None = None,
        batch_size: int = 256,
    ) -> int:
        """Judge a backbone by labelled images that it did not need for training.

        Args:
            backbone: a run folder, a .safetensors file of a ResNet, or random:NETWORK.
            train: labelled images to learn from.
            test: labelled images to be judged on.
            out: folder of evaluation.json; the run's own folder is a good place.
            protocols: any of knn, linear, linear-swav, linear-jigclu, fewlabels, clustering.
            baseline: also score the same network at random init.
            device: where to run.
            workers: decoding threads; default: the cores at hand.
            seed: of every random choice of the protocols.
            image_size: pixels of the evaluated crop; default: the run's.
            batch_size: images per forward pass; changes the speed, not the result.
        """
        from tessella.engine.evaluate import evaluate as run_evaluation

        run_evaluation(
            backbone,
            train,
            test,
            protocols=protocols,
            out=out,
            baseline=baseline,
            device=device,
            workers=workers,
            seed=seed,
            image_size=image_size,
            batch_size=batch_size,
        )
        _tell_written(out / "evaluation.json")
        return 0

    return _parse("evaluate", evaluate, words)()


def _embed(words: list[str]) -> int:
    def embed(
        backbone: str,
        data: str,
        /,
        *,
        out: Path,
        labels: bool = False,
        device: Device = "auto",
        workers: int | None = None,
        image_size: int | None = None,
        batch_size: int = 256,
    ) -> int:
        """Write the features of images to a file.

        Args:
            backbone: a run folder, a .safetensors file of a ResNet, or random:NETWORK.
            data: the images.
            out: NAME.parquet, or NAME.npy with the images' names and ids in files beside it.
            labels: write class labels too (parquet only).
            device: where to run.
            workers: decoding threads; default: the cores at hand.
            image_size: pixels of the evaluated crop; default: the run's.
            batch_size: images per forward pass; changes the speed, not the result.
        """
        from tessella.engine.embed import embed as write_embedding

        features = write_embedding(
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

    return _parse("embed", embed, words)()


def _report(words: list[str]) -> int:
    def report(run: Path, /) -> int:
        """Write RUN/report.html: curves, views as the method saw them, clusters, settings.

        Args:
            run: a run folder.
        """
        from tessella.engine.config import load_config
        from tessella.report.run import write_report

        load_config(run / "config.yaml")  # says so, if this is no run
        _tell_written(write_report(run))
        return 0

    return _parse("report", report, words)()


# --- look -----------------------------------------------------------------------------------------------------------


def _recipes(words: list[str]) -> int:
    def recipes(name: str | None = None, /) -> int:
        """List the recipes, or show one with its source, cost and settings.

        Args:
            name: of a recipe; without it, all are listed.
        """
        print("\n".join(_recipe_lines() if name is None else _recipe_page(name)))
        return 0

    return _parse("recipes", recipes, words)()


def _recipe_lines() -> list[str]:
    from tessella.recipes import RECIPES

    width = max(map(len, RECIPES))
    return [f"{name:<{width}}  {(run.__doc__ or '').partition('\n')[0]}" for name, run in RECIPES.items()]


def _recipe_page(name: str) -> list[str]:
    import inspect

    from tessella.engine.config import to_yaml
    from tessella.recipes import RECIPES, recipe

    config = recipe(name)
    return [
        inspect.getdoc(RECIPES[name]) or "",
        "",
        f"Command: tessella pretrain {name} --data DATA --out RUN",
        f"Cost:    {_cost(config)}",
        "",
        "Settings, each of which the command takes (method.temperature as --method.temperature VALUE):",
        "",
        to_yaml(config).rstrip(),
    ]


def _cost(config: RunConfig) -> str:
    """Forwards per image, counted in images of the first view's size; a montage of m x m tiles is one image."""
    from tessella.methods import METHODS

    groups = METHODS[config.method.name][1].view_spec(config.method).groups
    side = groups[0].size * groups[0].tiles
    forwards = sum(group.views * group.size**2 for group in groups) / side**2
    views = " + ".join(f"{group.views} x {group.size}" for group in groups)
    kind = "one montage of its tiles" if groups[0].tiles > 1 else "its crops"
    return f"{forwards:.3g} forwards of {side} x {side} pixels per image and epoch: {kind}, {views} pixels"


def _scan(words: list[str]) -> int:
    def scan(data: str, /) -> int:
        """Look at images before training: how many, how large, what cannot be read, which recipe fits.

        Args:
            data: the images.
        """
        from tessella.data.sources import open_images

        print("\n".join(map(_printable, _scan_lines(open_images(data)))))
        return 0

    return _parse("scan", scan, words)()


def _scan_lines(images: ImageSet) -> list[str]:
    import numpy as np

    widths, heights = images.sizes[:, 0], images.sizes[:, 1]
    short = int(np.median(images.sizes.min(axis=1)))
    if images.uniform_size:
        sizes = "all {} x {} pixels".format(*images.uniform_size)
    else:
        sizes = (
            f"{widths.min()} to {widths.max()} pixels wide, {heights.min()} to {heights.max()} high; "
            f"shorter side {short} in the median"
        )
    lines = [
        f"images      {len(images):,}",
        f"sizes       {sizes}",
        f"unreadable  {len(images.unreadable):,}",
    ]
    lines += [f"            {key}: {reason}" for key, reason in images.unreadable[:_SHOWN_UNREADABLE]]
    if len(images.unreadable) > _SHOWN_UNREADABLE:
        lines.append(f"            and {len(images.unreadable) - _SHOWN_UNREADABLE:,} more")
    names, reason = suggested_recipes(short)
    return [*lines, f"recipe      {' or '.join(names)}: {reason}"]


def suggested_recipes(short_side: int) -> tuple[tuple[str, ...], str]:
    """Recipes for images of a size, and why.

    Args:
        short_side: pixels, in the median.
    """
    if short_side <= 64:
        return ("swav_cpu", "jigclu_cpu"), "made for images of about 32 pixels; minutes on two cores"
    return (
        ("swav_imagenet_200ep_bs256", "jigclu_imagenet_200ep"),
        "made for photos, on a GPU; JigClu makes one forward per image. To try things out on a CPU: swav_cpu",
    )


# --- words ----------------------------------------------------------------------------------------------------------


def _first_word(command: str, words: list[str], what: str) -> tuple[str | None, list[str]]:
    """The word that says what the options mean, and the options; None for a question for help."""
    if words and words[0] in _HELP:
        return None, []
    if not words or words[0].startswith("-"):
        raise UserError(f"{what} comes first: tessella {command} {COMMANDS[command].usage}")
    return words[0], words[1:]


def _parse(
    command: str,
    target: Any,
    words: list[str],
    *,
    prog: str | None = None,
    default: Any = None,
    description: str = "",
) -> Any:
    """Typed settings from words.

    Args:
        command: for the usage in messages.
        target: a function, or a dataclass.
        words: the options.
        prog: what the help calls the command.
        default: of a dataclass.
        description: of a dataclass; a function has its docstring.

    Returns:
        The function with its arguments bound, to be called, or an instance of the dataclass.

    Raises:
        UserError: the words do not fit. tyro says so in a box of many lines; here it becomes one.
        SystemExit: help was asked for, and shown.
    """
    import tyro

    parsed = (
        target if isinstance(target, type) else functools.wraps(target)(functools.partial(_bound, target))
    )
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                parsed,
                prog=prog or f"tessella {command}",
                description=description or None,
                args=words,
                default=tyro.MISSING_NONPROP if default is None else default,
                config=(tyro.conf.AvoidSubcommands,),  # a run's method is the recipe's
            )
    except SystemExit as stop:
        if stop.code in (None, 0):
            raise
        raise UserError(
            f"{_in_one_line(said.getvalue())}; usage: tessella {command} {COMMANDS[command].usage}"
        ) from None


def _bound(function: Callable[..., int], *args: Any, **kwargs: Any) -> Callable[[], int]:
    return functools.partial(function, *args, **kwargs)


def _in_one_line(box: str) -> str:
    """What a box of tyro says: its first section, and the options that it thinks were meant."""
    text = re.sub(r"[─│╭╮╰╯|+]|-{3,}", " ", box.partition("\n")[2])
    message = re.split(r"Argument helptext:|For full helptext|Perhaps you meant:|Similar arguments:", text)
    meant = re.findall(r"(?<!\S)--[a-z][\w.-]*", text.partition("Perhaps you meant:")[2])
    hint = f" (did you mean {' or '.join(dict.fromkeys(meant))}?)" if meant else ""
    return " ".join(message[0].split()).rstrip(".") + hint


# --- console --------------------------------------------------------------------------------------------------------


def _tell_written(path: Path, more: str = "") -> None:
    if _rank() == 0:
        print(_printable(f"Written: {path}{more}"))


def _say(text: str) -> None:
    """One line on standard error: once per machine, because another machine's trouble may be its own."""
    if int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))) == 0:
        who = f"tessella (rank {_rank()})" if _rank() else "tessella"
        print(f"{who}: {_printable(text)}", file=sys.stderr)


def _rank() -> int:
    """This process's rank, as the launcher says, because torch may not be loaded."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", 0))))


def _printable(text: str) -> str:
    """Text for a terminal: foreign names may hold control characters."""
    text = " ".join(text.splitlines())
    return "".join(character if character.isprintable() else "?" for character in text)


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "[--out DIR] [--seeds N]", "embedded digits, no network: pretrain, evaluate, report", _demo
    ),
    "scan": Command("DATA", "what is in a data set, what cannot be read, which recipe fits", _scan),
    "recipes": Command("[NAME]", "list complete runs, or show one with its source and cost", _recipes),
    "pretrain": Command(
        "RECIPE --data DATA --out RUN [--SETTING VALUE ...]", "train a backbone on images", _pretrain
    ),
    "resume": Command("RUN [--SETTING VALUE ...]", "go on exactly where a run stopped", _resume),
    "evaluate": Command(
        "BACKBONE --train DATA --test DATA --out DIR [--protocols NAME ...] [--baseline]",
        "judge a backbone: kNN, linear probe, few labels, clustering",
        _evaluate,
    ),
    "embed": Command("BACKBONE DATA --out FILE", "write features as .parquet or .npy", _embed),
    "report": Command("RUN", "write a page about a run", _report),
}
