"""The command line: words -> typed settings -> one call.

Exit codes: 0 done; 2 an error that the user can correct, in one line; 75 interrupted by Ctrl-C or SIGTERM, `tessella
resume` continues; 69 another rank was lost, `tessella resume` continues; 130 stopped where there was nothing to save;
1 an internal error, with its traceback.

Standard output and standard error may be closed, on a full disk, or a pipe whose reader has ended: a command that
writes files finishes all the same. Where the text is the result, a full disk is exit code 2.

`tessella --help` must be quick: torch, tyro and everything that needs them are imported within the commands.
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
_WORK_GOES_TO_FILES = (
    *("demo", "pack", "pretrain", "resume", "evaluate", "embed", "import", "export", "report"),
    *("explore", "assign"),
)


class Command(NamedTuple):
    """One row of the table of commands."""

    function: str  # of `tessella.api`, or `recipes` here; its docstring explains the command
    usage: str  # its words in short
    run: Callable[[list[str]], int]  # words -> exit code

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(_function(self.function)) or "").partition("\n")[0].removesuffix(".")


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
        if stream.error is not None:  # otherwise the interpreter fails at the same text when it ends
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
    except OSError as error:  # about a file that the user has named, or that should be usable
        _say(_about_file(error))
        return EXIT_USER_ERROR
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):  # torch has no type for it
            raise
        _say("the machine has less memory than this needs: give a smaller network, or fewer images at a time")
        return EXIT_USER_ERROR
    except RankLost:  # each rank has printed it
        return EXIT_RANK_LOST
    except SystemExit as stop:  # after a command's help
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt as stop:
        _say(str(stop) or "stopped by Ctrl-C")
        return EXIT_STOPPED


def _about_file(error: OSError) -> str:
    """The system's reason, the file, and what to check."""
    reason = error.strerror or str(error) or type(error).__name__
    if error.filename is None:
        return f"the system refuses: {reason}"
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
    return f"{name}: {reason}. Check that it is what was meant, and that this user may read and write it"


def program() -> NoReturn:
    """`main` as the program that people start.

    If it was stopped, it ends without the interpreter's clean-up: there, libraries that were half loaded have crashed,
    and a thread may wait for a lost rank.
    """
    _open_closed_descriptors()
    code = main()
    if code in (EXIT_STOPPED, EXIT_INTERRUPTED, EXIT_RANK_LOST):
        LossyStream(sys.stdout).flush()
        os._exit(code)
    sys.exit(code)


def _open_closed_descriptors() -> None:
    """Point closed standard descriptors at /dev/null.

    Otherwise the next file that is opened, such as a checkpoint, gets the number of a closed one, and with it what
    libraries print.
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
    lines = "\n".join(f"  {name:<12}{command.summary}" for name, command in COMMANDS.items())
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
    out = ("out", Annotated[Path, tyro.conf.arg(help="run folder; missing or empty")])
    doc = "Train a backbone on unlabelled images. What is not given is as in the recipe."
    options = _parse_settings("pretrain", start, out, rest, doc, prog=f"tessella pretrain {name}")
    config: RunConfig = options.config
    if config.recipe != name:
        raise UserError(f"--recipe {config.recipe} contradicts the first word, {name}: leave --recipe out")
    if not any(word.startswith("--optimizer.lr") for word in rest):
        _show_batch_rule(recipe(name), config)
    return _until_done(options.out, lambda: train(config, options.out))


def _parse_settings(
    command: str, start: RunConfig, option: tuple[Any, ...], words: list[str], doc: str, prog: str | None = None
) -> Any:
    """Any field of a run, and one further option: an object with `config` and that option."""
    import tyro

    config = ("config", Annotated[type(start), tyro.conf.arg(name="")], start)
    options = dataclasses.make_dataclass("Options", [option, config], kw_only=True)
    options.__doc__ = doc
    return _parse(command, options, words, prog=prog)


def _show_batch_rule(original: RunConfig, config: RunConfig) -> None:
    """What the recipe's rule for another batch size would change besides; nothing is scaled automatically."""
    if (config.batch_size, config.accumulate) == (original.batch_size, original.accumulate) or place().rank:
        return
    from tessella.recipes.batch import at_batch_size, flags

    chosen = flags(original, config)
    rule = flags(original, at_batch_size(original, config.batch_size, config.accumulate))
    words = [flag for name, flag in rule.items() if name not in chosen]
    if words and "optimizer.name" not in chosen:
        size = f"{config.batch_size}" + (f" in {config.accumulate} parts" if config.accumulate > 1 else "")
        _say(
            f"note: {original.recipe} is made for batches of {original.batch_size}, and nothing is scaled "
            f"automatically; for {size} its rule would add {' '.join(words)} (`tessella recipes {original.recipe}` "
            "explains it)"
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
    """Continue a run: RUN, and settings that may change."""
    if any(word in _HELP for word in words):
        print(_resume_help())
        return 0
    name, rest = _first_word("resume", "RUN", words)
    return _until_done(Path(name), lambda: _continue(Path(name), rest))


def _continue(run: Path, words: list[str]) -> None:
    from tessella.run.lock import refuse_second_writer

    _require_run(run)  # both at once, before torch is imported
    refuse_second_writer(run)
    import tyro

    from tessella.engine.pretrain import resume as train
    from tessella.run.config import different_fields, load_config

    saved = load_config(run / "config.yaml")
    allow = ("allow", tyro.conf.UseAppendAction[tuple[str, ...]], ())
    options = _parse_settings("resume", saved, allow, words, "Continue a run.")
    changes = different_fields(saved, options.config)
    for name in ("data", "init_from"):  # if given at all, even as in config.yaml: then it may be downloaded
        if any(word.partition("=")[0].replace("-", "_") == f"__{name}" for word in words):
            changes[name] = getattr(options.config, name)
    train(run, changes, allow=[name.replace("-", "_") for name in options.allow])


def _require_run(folder: Path) -> None:
    if not any((folder / name).is_file() for name in ("config.yaml", "import.json")):  # imported weights: said later
        raise UserError(f"{folder} is not a run folder: it has no config.yaml; give the --out of a run")


def _resume_help() -> str:
    from tessella.run.config import ON_RESUME

    free, flag = (
        " ".join(f"--{name.replace('_', '-')}" for name, kind in ON_RESUME.items() if kind == wanted)
        for wanted in ("free", "flag")
    )
    return f"""\
usage: tessella resume {COMMANDS["resume"].usage}

Continue a run exactly where it stopped, from its newest valid checkpoint. How it is executed may change:
{free}

What changes the result must also be allowed by name, as in `--epochs 300 --allow epochs`, also where it was changed in
config.yaml:
{flag}

All other settings are fixed. A run whose images were added, removed or encoded again since is refused.

A run that --max-steps cut short continues to its end with --max-steps None."""


def _until_done(run: Path, train: Callable[[], object]) -> int:
    """Train, and print what to do next.

    Args:
        run: the run folder.
        train: may also be stopped before or after its loop, where there is nothing to save.
    """
    name = shlex.quote(str(run))
    try:
        train()
    except Interrupted as stop:
        _say(f"{stop}; `tessella resume {name}` continues the run")
        return EXIT_INTERRUPTED
    except KeyboardInterrupt as stop:
        if not (run / "config.yaml").exists():  # there is no run to resume
            raise
        _say(f"{str(stop) or 'stopped by Ctrl-C'}; `tessella resume {name}` continues from the last checkpoint")
        return EXIT_INTERRUPTED
    if place().rank == 0:
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


def _show_scan(scan: Any, options: dict[str, Any]) -> None:
    print("\n".join(map(printable, scan.lines(brief=sys.stdout.isatty()))))


def _show_pack(packed: Any, options: dict[str, Any]) -> None:
    print("\n".join(packed.lines(options["out"])))
    _show_written(options["out"], options, "" if packed.written else " (before, and whole)")


def _show_evaluation(records: Any, options: dict[str, Any]) -> None:
    from tessella.engine.launch import leave_ranks

    leave_ranks()
    page = options["out"] / "evaluation.html"
    _show_written(page, options, ", and evaluation.json, evaluation.md and predictions beside it")


def _show_features(features: Any, options: dict[str, Any]) -> None:
    count, dim = features.x.shape
    skipped = f"; {len(features.skipped)} could not be read" if features.skipped else ""
    _show_written(options["out"], options, f" ({count} images, {dim} values each{skipped})")


def _show_import(official: Any, options: dict[str, Any]) -> None:
    from tessella.weights.imported import report_lines

    print("\n".join(map(printable, report_lines(official))) + "\n")
    _show_written(options["out"], options)
    name = shlex.quote(str(options["out"]))
    print(f"Evaluate it:  tessella evaluate {name} --train LABELLED --test LABELLED --out DIR")
    print(f"Train on it:  tessella pretrain RECIPE --data DATA --out RUN --init-from {name}")


def _show_export(exported: Any, options: dict[str, Any]) -> None:
    exported.grid().show()
    _show_written(options["out"], options, ", with README.md and check.json")
    if exported.page:
        print(printable(f"On the hub: {exported.page}"))


def _show_comparison(comparison: Any, options: dict[str, Any]) -> None:
    if options.get("out") is not None:
        _show_written(options["out"], options)


def _show_written(path: Path, options: dict[str, Any], more: str = "") -> None:
    if place().rank == 0:
        print(printable(f"Written: {path}{more}"))


def _show_lines(result: Any, options: dict[str, Any]) -> None:
    """A result that can describe itself, and the files that were written."""
    print("\n".join(map(printable, result.lines())))
    for name in ("out", "folders"):
        if options.get(name) is not None:
            _show_written(options[name], options)


# --- words --------------------------------------------------------------------------------------------------


def _function(name: str) -> Callable[..., Any]:
    from tessella import api

    function: Callable[..., Any] = recipes if name == "recipes" else getattr(api, name)
    return function


def _derived(
    name: str,
    usage: str,
    words: tuple[str, ...] = (),
    show: Callable[[Any, dict[str, Any]], None] = lambda result, options: None,
    required: tuple[str, ...] = (),
) -> Command:
    """A command made from a function of `tessella.api`: its signature gives the options, its docstring the help.

    Args:
        name: of the function.
        usage: the words of the command in short.
        words: arguments that are given without a flag.
        show: prints the result; it also gets the arguments.
        required: options that are optional in Python only.
    """

    def run(arguments: list[str]) -> int:
        command = next(word for word, row in COMMANDS.items() if row.run is run)
        call = _parse(command, _recording(_function(name), words, required), arguments)
        if "run" in call.keywords:
            _require_run(call.keywords["run"])  # before torch is imported
        try:
            result = call()
        except Interrupted:
            raise KeyboardInterrupt from None  # the run of a demo could be resumed, but a demo starts again
        show(result, call.keywords)
        return 0

    return Command(name, usage, run)


def _first_word(command: str, what: str, words: list[str]) -> tuple[str, list[str]]:
    """The word that decides what the options mean, and the options."""
    if not words or words[0].startswith("-"):
        raise UserError(f"{what} comes first: tessella {command} {COMMANDS[command].usage}")
    return words[0], words[1:]


def _parse(command: str, target: Any, words: list[str], prog: str | None = None) -> Any:
    """Typed settings from words.

    Args:
        command: for the usage in messages.
        target: a function or a dataclass; its docstring and comments are the help.
        words: the options.
        prog: the command's name in the help.

    Returns:
        The result of the function, or an instance of the dataclass.

    Raises:
        UserError: the words do not fit.
        SystemExit: help was asked for, and shown.
    """
    import tyro

    prog = prog or f"tessella {command}"
    boxes = io.StringIO()  # tyro shows an error in a box of many lines; a user error is one line
    try:
        with contextlib.redirect_stderr(boxes):
            # Without subcommands: a run's method is that of its recipe.
            return tyro.cli(target, prog=prog, args=words, config=(tyro.conf.AvoidSubcommands,))
    except SystemExit as stop:
        if stop.code in (None, 0):
            raise
    usage = f"tessella {command} {COMMANDS[command].usage}"
    raise UserError(f"{_in_one_line(boxes.getvalue())}. Usage: {usage}; `{prog} --help` explains all")


def _recording(
    function: Callable[..., Any], words: tuple[str, ...], required: tuple[str, ...]
) -> Callable[..., functools.partial[Any]]:
    """A function for tyro that only binds the arguments: the command is run outside of the parser."""
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
    """The text in a box of tyro; its sections are separated by semicolons."""
    lines = [line.strip(" │|") for line in box.splitlines()[1:-1]]
    words = " ".join(line if line.strip("─-") else ";" for line in lines).replace(" ;", ";")
    return words.partition("; For full helptext")[0].strip(" ;").rstrip(".")


# --- console ------------------------------------------------------------------------------------------------


def _say(text: str) -> None:
    """One line on standard error, once per machine: another machine's trouble may be its own."""
    if place().local_rank == 0:
        who = f"tessella (rank {place().rank})" if place().rank else "tessella"
        print(f"{who}: {printable(text)}", file=sys.stderr)


COMMANDS = {
    "demo": _derived("demo", "[--out DIR] [--seeds N]", show=_show_written),
    "scan": _derived("scan", "DATA [--headers-only]", ("data",), _show_scan),
    "pack": _derived("pack", "DATA --out PACK [--short-side 320] [--quality 90]", ("data",), _show_pack),
    "bench": _derived("bench", "[RECIPE] --data DATA [--seconds 60]", ("recipe",), _show_lines),
    "explore": _derived("explore", "DATA [--out ATLAS] [--backbone BACKBONE] [--minutes 5]", ("data",), _show_written),
    "label": _derived(
        "label", "ATLAS [--names names.json] (--out LABELS.csv | --folders DIR)", ("atlas",), _show_lines
    ),
    "classify": _derived("classify", "ATLAS --out DIR [--labels LABELS.csv]", ("atlas",), _show_lines),
    "select": _derived("select", "ATLAS [--budget 100] [--out FILE.csv]", ("atlas",), _show_lines),
    "assign": _derived("assign", "MODEL DATA --out FILE.parquet", ("model", "data"), _show_lines),
    "duplicates": _derived("duplicates", "DATA [--out FILE.csv]", ("data",), _show_lines),
    "recipes": _derived("recipes", "[NAME]", ("name",)),
    "pretrain": Command("pretrain", "RECIPE --data DATA --out RUN [--SETTING VALUE ...]", pretrain),
    "resume": Command("resume", "RUN [--SETTING VALUE ...]", resume),
    "evaluate": _derived(
        "evaluate",
        "BACKBONE (--train DATA --test DATA | --data FILE) --out DIR [--protocols NAME ...] [--baseline]",
        ("backbone",),
        _show_evaluation,
        required=("out",),
    ),
    "compare": _derived("compare", "FOLDERS [--out FILE]", ("folders",), _show_comparison),
    "embed": _derived("embed", "BACKBONE DATA --out FILE", ("backbone", "data"), _show_features),
    "import": _derived("import_weights", "FILE --out DIR [--from PROJECT]", ("file",), _show_import),
    "export": _derived(
        "export",
        "BACKBONE --out FOLDER [--to hub onnx pt2 torchvision safetensors] [--push OWNER/NAME]",
        ("backbone",),
        _show_export,
    ),
    "serve": _derived("serve", "BACKBONE [--port 8000]", ("backbone",)),
    "report": _derived("write_report", "RUN", ("run",), _show_written),
}
