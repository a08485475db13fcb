"""One run as a tree of frozen dataclasses, each defined beside the component that it configures."""

from __future__ import annotations

import dataclasses
import errno
import functools
import math
import textwrap
import types
import typing
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import yaml

from tessella import files
from tessella.errors import UserError
from tessella.files import FileError
from tessella.methods import METHODS, MethodConfig
from tessella.modules.backbone import BackboneConfig
from tessella.optim import OptimizerConfig
from tessella.ranges import (
    Fraction,
    NonNegative,
    NonNegativeInt,
    Pixels,
    PositiveInt,
    Range,
    Seed,
    Threads,
    check_ranges,
)
from tessella.text import plain_yaml, yaml_text

Device: TypeAlias = Literal["auto", "cpu", "cuda", "mps"]


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's result, and how it is executed. Each comment is the option's help."""

    method: MethodConfig
    backbone: BackboneConfig = BackboneConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    recipe: str = ""  # the name it started from
    data: str = ""  # images to train on; labels are never read
    init_from: str = ""  # weights to start from instead of random ones: a run, imported weights, timm:NAME, ...
    freeze_backbone_steps: NonNegativeInt = 0  # in which only the heads learn; batch norm goes on as in training
    epochs: PositiveInt = 200
    batch_size: PositiveInt = 256  # images per update, over all ranks and micro-batches
    seed: Seed = 0
    image_size: Pixels = 224  # pixels of a whole image at evaluation
    max_steps: PositiveInt | None = None  # stop here; the schedule still spans `epochs`
    accumulate: PositiveInt = 1  # micro-batches per update; codes and contrasts are computed within a micro-batch
    device: Device = "auto"
    precision: Literal["auto", "32", "bf16"] = "auto"  # auto: bf16 on a GPU that has it, else 32
    compile: bool = False  # torch.compile the backbone
    nodes: Annotated[int, Range(1, 65_536)] = 1  # machines, under torchrun or SLURM
    workers: Threads | None = None  # decoding threads per rank; default: the available cores
    max_unreadable: Fraction = 0.01  # share of images that may turn out unreadable before the run stops
    # Steps that may be left out because they produce NaN or infinite numbers; one more ends the run.
    max_left_out: NonNegativeInt = 3
    rank_timeout: NonNegative = 40.0  # seconds without a sign of life after which a rank counts as lost; 0: never
    log_every: PositiveInt = 20  # steps between log lines
    # Between checkpoints; an epoch's end saves too, unless the last save is fresh.
    checkpoint_minutes: NonNegative = 10.0

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.optimizer.zero_lr_epochs + self.optimizer.warmup_epochs > self.epochs:
            zero_lr = self.optimizer.zero_lr_epochs
            first = f"optimizer.zero_lr_epochs={zero_lr} with " if zero_lr else ""
            raise UserError(
                f"{first}optimizer.warmup_epochs={self.optimizer.warmup_epochs} is longer than the run of "
                f"{self.epochs} epochs: shorten the warm-up or lengthen the run"
            )


_LIMIT = 4 << 20  # bytes of config.yaml
_SHOWN_CHARACTERS = 60  # of a value in a message; views take hundreds
_RENAMED = {  # field in a config.yaml of an earlier version -> its name now
    "start_from": "init_from",
    "idle_epochs": "zero_lr_epochs",
    "photometry": "colors",
    "recompute": "activation_checkpointing",
}

# What may change when a run is resumed. Every field is in one class; `*` stands for the rest of a part.
#   free: how the run is executed, not what it computes
#   flag: changes what is computed from now on, so it must be allowed by name (`--allow epochs`)
#   fixed: decides what the saved state means: its tensors, or which images make up a step
OnResume: TypeAlias = Literal["free", "flag", "fixed"]
_CLASSES: dict[OnResume, tuple[str, ...]] = {
    "free": (
        *("data", "max_steps", "device", "nodes", "workers", "max_unreadable", "max_left_out", "rank_timeout"),
        *("log_every", "checkpoint_minutes"),
    ),
    "flag": (
        *("backbone.activation_checkpointing", "backbone.drop_path", "optimizer.lr", "optimizer.momentum"),
        *("optimizer.weight_decay", "optimizer.decay_norm_and_bias", "optimizer.trust", "optimizer.zero_lr_epochs"),
        *("optimizer.warmup_epochs", "optimizer.warmup_lr", "optimizer.warmup_end", "optimizer.final_lr"),
        *("optimizer.per_epoch", "freeze_backbone_steps", "epochs", "precision", "compile"),
    ),
    "fixed": (
        *("method.*", "backbone.name", "backbone.width", "backbone.stem", "backbone.pool", "optimizer.name"),
        *("recipe", "init_from", "batch_size", "seed", "image_size", "accumulate"),
    ),
}
ON_RESUME: dict[str, OnResume] = {name: kind for kind, names in _CLASSES.items() for name in names}
FREE_FIELDS = _CLASSES["free"]


def on_resume(field: str) -> OnResume:
    """The class of one field.

    Args:
        field: its dotted name, such as `optimizer.lr`.
    """
    kind = ON_RESUME.get(field) or ON_RESUME.get(field.partition(".")[0] + ".*")
    assert kind is not None, f"{field} has no class in ON_RESUME"
    return kind


def differences(before: RunConfig, after: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted names of the fields in which two configurations differ, with both values."""
    old, new = flat(to_dict(before)), flat(to_dict(after))
    changed = {name: (old.get(name), new.get(name)) for name in old | new if old.get(name) != new.get(name)}
    # The fields of another method, network or optimiser cannot be compared.
    replaced = tuple(name.removesuffix("name") for name in changed if name.endswith(".name"))
    return {name: v for name, v in changed.items() if name.endswith(".name") or not name.startswith(replaced or "-")}


def flat(values: Any, name: str = "") -> dict[str, Any]:
    """The leaves of tables in tables by their dotted names, such as `optimizer.lr` and `method.views.groups.0.size`."""
    if isinstance(values, list) and any(isinstance(value, dict | list) for value in values):
        values = dict(enumerate(values))
    if not isinstance(values, dict):
        return {name: values}
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        leaves |= flat(value, f"{name}.{key}" if name else str(key))
    return leaves


def refuse_changes(before: RunConfig, after: RunConfig, allowed: Collection[str] = ()) -> dict[str, tuple[Any, Any]]:
    """Refuse changes that a resumed run may not have; see `ON_RESUME`.

    Args:
        before: what the run's state was computed with.
        after: what is to be computed now.
        allowed: dotted names of fields of the class "flag".

    Returns:
        The allowed differences that change what is computed, without those of free fields.

    Raises:
        UserError: other differences, all of them listed; or a name that cannot be allowed.
    """
    for name in allowed:
        if ON_RESUME.get(name) != "flag":
            raise UserError(f"--allow {name}: the fields that can be allowed are {', '.join(_CLASSES['flag'])}")
    changed = {name: values for name, values in differences(before, after).items() if on_resume(name) != "free"}
    fixed = [name for name in changed if on_resume(name) == "fixed"]
    flagged = [name for name in changed if on_resume(name) == "flag" and name not in allowed]
    if not (fixed or flagged):
        return changed
    problems = [f"{name} would change from {_short(changed[name][0])} to {_short(changed[name][1])}"
                for name in fixed + flagged]  # fmt: skip
    remedy = "put the old values back"
    if flagged:
        remedy += ", or allow what may change with " + " ".join(f"--allow {name}" for name in flagged)
    if fixed:
        remedy += f", or start a new run ({', '.join(fixed)} cannot change within one; --init-from takes over weights)"
    raise UserError(f"the run cannot be resumed as another one: {'; '.join(problems)}. Either {remedy}")


def different_fields(before: RunConfig, after: RunConfig) -> dict[str, Any]:
    """Fields in which `after` differs from `before`, with their values, as `dataclasses.replace` takes them."""
    return {name: value for name, value in vars(after).items() if value != getattr(before, name)}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def to_dict(config: Any) -> Any:
    """A config as plain dictionaries, lists and scalars."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple | list):
        return [to_dict(item) for item in config]
    return config


def from_dict(kind: Any, value: Any, path: str = "config") -> Any:
    """The inverse of `to_dict` for a typed dataclass tree.

    Raises:
        UserError: an unknown or missing field, or a value of another type; the text names the field.
    """
    if kind is MethodConfig:
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str) or name not in METHODS:
            raise UserError(f"{path}.name is {name!r}; known methods: {', '.join(METHODS)}")
        kind = METHODS[name].Config
    if dataclasses.is_dataclass(kind):
        hints = _type_hints(typing.cast(Any, kind))
        names = [f.name for f in dataclasses.fields(kind)]
        if not isinstance(value, dict) or set(value) - set(names):
            unknown = sorted(map(str, set(value) - set(names))) if isinstance(value, dict) else value
            raise UserError(f"{path} does not take {unknown!r}; its fields are {', '.join(names)}")
        try:
            return kind(**{k: from_dict(hints[k], v, f"{path}.{k}") for k, v in value.items()})  # type: ignore[operator]
        except TypeError as error:
            raise UserError(f"{path} is incomplete: {error}") from None
    members = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    sequence = next((member for member in members if typing.get_origin(member) is tuple), None)
    if sequence is None or (len(members) > 1 and not isinstance(value, list | tuple)):  # of int | tuple the int
        return _checked_scalar(members, value, path)
    inner = typing.get_args(sequence)
    if not isinstance(value, list | tuple) or (inner[-1] is not ... and len(value) != len(inner)):
        raise UserError(f"{path} is {value!r}; expected a list of {len(inner)} values")
    kinds = [inner[0]] * len(value) if inner[-1] is ... else inner
    return tuple(from_dict(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))


_type_hints = functools.cache(typing.get_type_hints)  # the classes of a configuration are few


def _checked_scalar(members: tuple[Any, ...], value: Any, path: str) -> Any:
    words = [word for m in members if typing.get_origin(m) is Literal for word in typing.get_args(m)]
    kinds = [member for member in members if typing.get_origin(member) is not Literal]
    if float in kinds and type(value) is int:
        value = float(value) if abs(value) < 2**1000 else math.inf
    if value not in words and type(value) not in kinds:
        expected = [*(getattr(member, "__name__", str(member)) for member in kinds), *words]
        raise UserError(f"{path} is {value!r}; expected {' or '.join(map(str, expected))}")
    return value


def to_yaml(config: RunConfig) -> str:
    """The text of a run's config.yaml."""
    return yaml_text(to_dict(config))


def load_config(path: Path) -> RunConfig:
    """Read a run's config.yaml.

    Raises:
        UserError: the file is missing, is not YAML, or does not describe a run.
    """
    try:
        value = plain_yaml(files.read_text(path, _LIMIT))
    except FileError as error:
        if error.errno != errno.ENOENT:
            raise
        if (path.parent / "import.json").exists():
            raise UserError(
                f"{path.parent} holds imported weights, not a run: there is nothing to resume. A new run starts from "
                f"them with `tessella pretrain RECIPE --data DATA --out RUN --init-from {path.parent}`"
            ) from None
        raise UserError(f"{path.parent} is not a run folder: it has no {path.name}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as YAML: {textwrap.shorten(str(error), 300)}") from None
    renamed = _RENAMED.keys() & {part for name in flat(value) for part in name.split(".")}
    if renamed:
        raise UserError(
            f"{path} was written by an earlier version of Tessella: "
            f"{', '.join(f'{name} is now called {_RENAMED[name]}' for name in sorted(renamed))}. This version cannot "
            "resume the run, because other settings may have another meaning too: use the version that "
            "environment.json names, or start a new run"
        )
    try:
        return from_dict(RunConfig, value, path.name)
    except UserError as error:
        if str(error).startswith(path.name):
            raise
        raise UserError(f"{path}: {error}") from None  # of a range, which names the field only


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
    """Set one value; a dictionary replaces only the fields that it names."""
    if isinstance(part, list):
        part[int(key)] = to_dict(value)
    elif isinstance(value, dict) and isinstance(part[key], dict):
        for inner, inner_value in value.items():
            _member(part[key], inner, f"{key}.{inner}")
            _put(part[key], inner, inner_value)
    else:
        part[key] = to_dict(value)
