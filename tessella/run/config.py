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
    """Everything that decides a run's result, and how it is executed."""

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
    workers: Threads | None = None  # decoding threads per rank; default: the cores at hand
    max_unreadable: Fraction = 0.01  # share of images that may turn out unreadable before the run stops
    # Steps that may be left out because they make NaN or infinite numbers; one more ends the run.
    max_left_out: NonNegativeInt = 3
    rank_timeout: NonNegative = 40.0  # seconds without a sign of life after which the other ranks give one up; 0: never
    log_every: PositiveInt = 20  # steps between log lines
    # Between checkpoints; an epoch's end saves too, unless the last save is fresh.
    checkpoint_minutes: NonNegative = 10.0

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.optimizer.zero_lr_epochs + self.optimizer.warmup_epochs > self.epochs:
            first = self.optimizer.zero_lr_epochs
            idle = f"optimizer.zero_lr_epochs={first} with " if first else ""
            raise UserError(
                f"{idle}optimizer.warmup_epochs={self.optimizer.warmup_epochs} is longer than the run of {self.epochs} "
                "epochs: shorten the warm-up or lengthen the run"
            )


_LIMIT = 4 << 20  # bytes of config.yaml
_SHOWN_CHARACTERS = 60  # of a value in a message; views take hundreds

# What a resumed run may be given anew. Every field is in one class; `*` stands for the rest of a part.
#   free: how the run is executed, not what it computes
#   flag: changes what is computed from now on, so that it has to be allowed by name (`--allow epochs`)
#   fixed: decides what the saved state means: its tensors, or which images make up a step
OnResume: TypeAlias = Literal["free", "flag", "fixed"]
ON_RESUME: dict[str, OnResume] = {
    "method.*": "fixed",
    "backbone.name": "fixed",
    "backbone.width": "fixed",
    "backbone.stem": "fixed",
    "backbone.activation_checkpointing": "flag",
    "backbone.drop_path": "flag",
    "backbone.pool": "fixed",
    "optimizer.name": "fixed",
    "optimizer.lr": "flag",
    "optimizer.momentum": "flag",
    "optimizer.weight_decay": "flag",
    "optimizer.decay_norm_and_bias": "flag",
    "optimizer.trust": "flag",
    "optimizer.zero_lr_epochs": "flag",
    "optimizer.warmup_epochs": "flag",
    "optimizer.warmup_lr": "flag",
    "optimizer.warmup_end": "flag",
    "optimizer.final_lr": "flag",
    "optimizer.per_epoch": "flag",
    "recipe": "fixed",
    "data": "free",
    "init_from": "fixed",
    "freeze_backbone_steps": "flag",
    "epochs": "flag",
    "batch_size": "fixed",
    "seed": "fixed",
    "image_size": "fixed",
    "max_steps": "free",
    "accumulate": "fixed",
    "device": "free",
    "precision": "flag",
    "compile": "flag",
    "nodes": "free",
    "workers": "free",
    "max_unreadable": "free",
    "max_left_out": "free",
    "rank_timeout": "free",
    "log_every": "free",
    "checkpoint_minutes": "free",
}
FREE_FIELDS = tuple(name for name, kind in ON_RESUME.items() if kind == "free")


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
    """What a run that goes on may and may not change; see `ON_RESUME`.

    Args:
        before: what the run's state was computed with.
        after: what is to be computed now.
        allowed: dotted names of fields of the class "flag".

    Returns:
        The allowed differences that change what is computed; those of free fields are left out.

    Raises:
        UserError: other differences, all of them listed; or a name that cannot be allowed.
    """
    for name in allowed:
        if ON_RESUME.get(name) != "flag":
            can = ", ".join(field for field, kind in ON_RESUME.items() if kind == "flag")
            raise UserError(f"--allow {name}: what can be allowed is {can}")
    changed = {name: values for name, values in differences(before, after).items() if on_resume(name) != "free"}
    fixed = {name: values for name, values in changed.items() if on_resume(name) == "fixed"}
    asked = {name: values for name, values in changed.items() if on_resume(name) == "flag" and name not in allowed}
    if not (fixed or asked):
        return changed
    told = (fixed | asked).items()
    problems = [f"{name} would change from {_shown(old)} to {_shown(new)}" for name, (old, new) in told]
    remedy = "put the old values back"
    if asked:
        remedy += ", or accept what may change with " + " ".join(f"--allow {name}" for name in asked)
    if fixed:
        remedy += f", or start a new run ({', '.join(fixed)} cannot change within one; --init-from takes over weights)"
    raise UserError(f"the run cannot go on as another one: {'; '.join(problems)}. Either {remedy}")


def different_fields(before: RunConfig, after: RunConfig) -> dict[str, Any]:
    """Fields of `after` that `before` has otherwise, as `dataclasses.replace` takes them."""
    values = {field.name: getattr(after, field.name) for field in dataclasses.fields(after)}
    return {name: value for name, value in values.items() if value != getattr(before, name)}


def _shown(value: Any) -> str:
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
            strange = sorted(map(str, set(value) - set(names))) if isinstance(value, dict) else value
            raise UserError(f"{path} does not take {strange!r}; its fields are {', '.join(names)}")
        try:
            return kind(**{k: from_dict(hints[k], v, f"{path}.{k}") for k, v in value.items()})  # type: ignore[operator]
        except TypeError as error:
            raise UserError(f"{path} is incomplete: {error}") from None
    if typing.get_origin(kind) in (types.UnionType, typing.Union) and isinstance(
        value, list | tuple
    ):  # of int | tuple the tuple
        kind = next((member for member in typing.get_args(kind) if typing.get_origin(member) is tuple), kind)
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        if not isinstance(value, list | tuple) or (inner[-1] is not ... and len(value) != len(inner)):
            raise UserError(f"{path} is {value!r}; expected a list of {len(inner)} values")
        kinds = [inner[0]] * len(value) if inner[-1] is ... else inner
        return tuple(from_dict(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    return _checked_scalar(kind, value, path)


_type_hints = functools.cache(typing.get_type_hints)  # of a tree's classes, which are few


def _checked_scalar(kind: Any, value: Any, path: str) -> Any:
    members = (kind,) if typing.get_origin(kind) is Literal else typing.get_args(kind) or (kind,)
    words = [word for m in members if typing.get_origin(m) is Literal for word in typing.get_args(m)]
    kinds = [member for member in members if typing.get_origin(member) is not Literal]
    if float in kinds and type(value) is int:
        value = float(value) if abs(value) < 2**1000 else math.inf
    if value not in words and type(value) not in kinds:
        allowed = [*(getattr(member, "__name__", str(member)) for member in kinds), *words]
        raise UserError(f"{path} is {value!r}; expected {' or '.join(map(str, allowed))}")
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
                f"{path.parent} holds imported weights, not a run: there is nothing to go on with. A new run starts "
                f"from them with `tessella pretrain RECIPE --data DATA --out RUN --init-from {path.parent}`"
            ) from None
        raise UserError(f"{path.parent} is not a run folder: it has no {path.name}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as YAML: {textwrap.shorten(str(error), 300)}") from None
    try:
        return from_dict(RunConfig, value, path.name)
    except UserError as error:
        if str(error).startswith(path.name):
            raise
        raise UserError(f"{path}: {error}") from None  # of a range, which names the field alone


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
