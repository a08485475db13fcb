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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NoReturn

from tessella.console import LossyStream
from tessella.engine.interrupt import EXIT_INTERRUPTED, EXIT_STOPPED, Interrupted, stoppable
from tessella.engine.ranks import place
from tessella.errors import EXIT_RANK_LOST, RankLost, UserError
from tessella.ranges import arguments_of
from tessella.text import printable

if TYPE_CHECKING:
    from tessella.run.config import RunConfig

EXIT_USER_ERROR = 2

_HELP = ("-h", "--help")
_WORK_GOES_TO_FILES = ("demo", "pack", "pretrain", "resume", "evaluate", "embed", "import", "report")
_SHOWN_UNREADABLE = 20  # files that `scan` lists with their reason


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
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):  # torch has no type for it
            raise
        _say("the machine has less memory than this needs: give a smaller network, or fewer images at a time")
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
    from tessella.recipes import RECIPES, recipe

    RECIPES.require(name)  # before torch is imported
    import tyro

    from tessella.engine.pretrain import pretrain as train

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
    for name in ("data", "init_from"):  # typed, even if as in config.yaml: then it may be downloaded
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
        print(f"Evaluate it: tessella evaluate {name} --train LABELLED --test LABELLED --baseline --out {name}")
        print(f"Look at it:  tessella report {name}")
    return 0


# --- what a command prints ------------------------------------------------------------------------------------


def recipes(name: str | None = None) -> None:
    """List the recipes, or show one with its source, cost, expected score and settings.

    Args:
        name: of a recipe; without it, all are listed.
    """
    from tessella.recipes import recipe
    from tessella.recipes.describe import listing, page

    print("\n".join(listing() if name is None else page(recipe(name))))


def _show_scan(found: Any, given: dict[str, Any]) -> None:
    print("\n".join(map(printable, found.lines(_SHOWN_UNREADABLE if sys.stdout.isatty() else None))))


def _show_bench(measured: Any, given: dict[str, Any]) -> None:
    print("\n".join(measured.lines()))


def _show_pack(packed: Any, given: dict[str, Any]) -> None:
    print("\n".join(packed.lines(given["out"])))
    _tell_written(given["out"], "" if packed.written else " (before, and whole)")


def _show_evaluation(records: Any, given: dict[str, Any]) -> None:
    from tessella.engine.launch import leave_ranks

    leave_ranks()
    page = given["out"] / "evaluation.html"
    _tell_written(page, ", and evaluation.json, evaluation.md and predictions beside it")


def _show_features(features: Any, given: dict[str, Any]) -> None:
    count, dim = features.x.shape
    skipped = f"; {len(features.skipped)} could not be read" if features.skipped else ""
    _tell_written(given["out"], f" ({count} images, {dim} values each{skipped})")


def _show_import(official: Any, given: dict[str, Any]) -> None:
    from tessella.weights.imported import report_lines

    print("\n".join(map(printable, report_lines(official))))
    print()
    _tell_written(given["out"])
    name = shlex.quote(str(given["out"]))
    print(f"Evaluate it:  tessella evaluate {name} --train LABELLED --test LABELLED --out DIR")
    print(f"Train on it:  tessella pretrain RECIPE --data DATA --out RUN --init-from {name}")


def _show_comparison(found: Any, given: dict[str, Any]) -> None:
    if given.get("out") is not None:
        _tell_written(given["out"])


def _show_page(page: Path, given: dict[str, Any]) -> None:
    _tell_written(page)


# --- words --------------------------------------------------------------------------------------------------


def _derived(
    name: str,
    words: tuple[str, ...] = (),
    show: Callable[[Any, dict[str, Any]], None] = lambda result, given: None,
    required: tuple[str, ...] = (),
) -> Callable[[list[str]], int]:
    """A command made from a function of `tessella.api`: its signature gives the options, its docstring the help.

    Args:
        name: of the function.
        words: its arguments that are given without a flag.
        show: prints the result; also gets the arguments.
        required: options that the command line wants although the function does not.
    """

    def run(given: list[str]) -> int:
        from tessella import api

        command = next(word for word, row in COMMANDS.items() if row.run is run)
        function = recipes if name == "recipes" else getattr(api, name)
        call = _parse(command, _recording(function, words, required), given)
        if "run" in call.keywords:
            _require_run(call.keywords["run"])  # before torch is imported
        try:
            result = call()
        except Interrupted:
            raise KeyboardInterrupt from None  # a demo's run could go on, but a demo begins again
        show(result, call.keywords)
        return 0

    return run


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


def _recording(
    function: Callable[..., Any], words: tuple[str, ...], required: tuple[str, ...]
) -> Callable[..., functools.partial[Any]]:
    """What tyro may call: it binds the arguments and leaves the command to be run outside of the parser."""
    import tyro

    def record(*args: Any, **kwargs: Any) -> functools.partial[Any]:
        return functools.partial(function, **dict(zip(words, args, strict=False)), **kwargs)

    hints = arguments_of(inspect.unwrap(function))
    parameters = []
    for name, parameter in inspect.signature(function).parameters.items():
        kind = parameter.POSITIONAL_ONLY if name in words else parameter.KEYWORD_ONLY
        hint, default = hints[name], parameter.default
        if name in words:
            hint = Annotated[hint, tyro.conf.arg(metavar=name.upper())]
        if name.endswith("_"):  # a word of Python
            hint = Annotated[hint, tyro.conf.arg(name=name.rstrip("_"))]
        if name in required:
            default = parameter.empty
        parameters.append(parameter.replace(kind=kind, annotation=hint, default=default))
    parameters.sort(key=lambda parameter: words.index(parameter.name) if parameter.name in words else len(words))
    record.__doc__ = function.__doc__
    record.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    record.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
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
        _derived("demo", show=_show_page),
    ),
    "scan": Command(
        "DATA [--headers-only]",
        "what is in a data set, what cannot be read, which recipe fits",
        _derived("scan", ("data",), _show_scan),
    ),
    "pack": Command(
        "DATA --out PACK [--short-side 320] [--quality 90]",
        "encode images again, smaller, once: every epoch reads and decodes less",
        _derived("pack", ("data",), _show_pack),
    ),
    "bench": Command(
        "[RECIPE] --data DATA [--seconds 60]",
        "what limits training here: decoding, views or the step; what a pack brings",
        _derived("bench", ("recipe",), _show_bench),
    ),
    "recipes": Command(
        "[NAME]",
        "list complete runs, or show one with its source and cost",
        _derived("recipes", ("name",)),
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
        _derived("evaluate", ("backbone",), _show_evaluation, required=("out",)),
    ),
    "compare": Command(
        "FOLDERS [--out FILE]",
        "evaluations side by side",
        _derived("compare", ("folders",), _show_comparison),
    ),
    "embed": Command(
        "BACKBONE DATA --out FILE",
        "write features as .parquet or .npy",
        _derived("embed", ("backbone", "data"), _show_features),
    ),
    "import": Command(
        "FILE --out DIR [--from PROJECT]",
        "official checkpoints of the five methods, and ResNets, in",
        _derived("import_weights", ("file",), _show_import),
    ),
    "report": Command(
        "RUN",
        "write a page about a run",
        _derived("write_report", ("run",), _show_page),
    ),
}
