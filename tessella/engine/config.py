"""One run as a tree of frozen dataclasses, each defined beside the component that it configures."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml

from tessella.errors import UserError
from tessella.methods import METHODS, MethodConfig
from tessella.modules.backbone import BackboneConfig
from tessella.optim import OptimizerConfig

Device: TypeAlias = Literal["auto", "cpu", "cuda", "mps"]


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's result, and how it is executed."""

    method: MethodConfig
    backbone: BackboneConfig = BackboneConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    recipe: str = ""  # the name it started from
    data: str = ""  # images to train on; labels are never read
    start_from: str = ""  # weights to start from instead of random ones: a run, imported weights, timm:NAME, ...
    freeze_backbone_steps: int = 0  # in which only the heads learn; batch norm goes on as in training
    epochs: int = 200
    batch_size: int = 256  # images per update, over all ranks and micro-batches
    seed: int = 0
    image_size: int = 224  # pixels of a whole image at evaluation
    max_steps: int | None = None  # stop here; the schedule still spans `epochs`
    accumulate: int = 1  # micro-batches per update; codes and contrasts are computed within a micro-batch
    device: Device = "auto"
    precision: Literal["auto", "32", "bf16"] = "auto"  # auto: bf16 on a GPU that has it, else 32
    compile: bool = False  # torch.compile the backbone
    nodes: int = 1  # machines, under torchrun or SLURM
    workers: int | None = None  # decoding threads per rank; default: the cores at hand
    max_unreadable: float = 0.01  # share of images that may turn out unreadable before the run stops
    log_every: int = 20  # steps between log lines
    checkpoint_minutes: float = 10.0  # between checkpoints; an epoch's end saves too, unless the last save is fresh

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "nodes", "log_every", "image_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.freeze_backbone_steps < 0:
            raise UserError(f"freeze_backbone_steps={self.freeze_backbone_steps} must be at least 0")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed={self.seed} must lie in [0, 2**64)")
        if self.optimizer.idle_epochs + self.optimizer.warmup_epochs > self.epochs:
            idle = f"optimizer.idle_epochs={self.optimizer.idle_epochs} with " if self.optimizer.idle_epochs else ""
            raise UserError(
                f"{idle}optimizer.warmup_epochs={self.optimizer.warmup_epochs} is longer than the run of {self.epochs} "
                "epochs: shorten the warm-up or lengthen the run"
            )
        if self.max_steps is not None and self.max_steps < 1:
            raise UserError(f"max_steps={self.max_steps} must be at least 1, or left out")


# What a resumed run may be given anew: how it is executed, not what it computes.
FREE_FIELDS = ("data", "max_steps", "device", "workers", "log_every", "checkpoint_minutes", "max_unreadable", "nodes")


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
    if kind is MethodConfig or (typing.get_origin(kind) is types.UnionType and _all_dataclasses(kind)):
        name = value.get("name") if isinstance(value, dict) else None
        if name not in METHODS:
            raise UserError(f"{path}.name is {name!r}; known methods: {', '.join(METHODS)}")
        kind = METHODS[name][0]
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        names = [f.name for f in dataclasses.fields(kind)]
        if not isinstance(value, dict) or set(value) - set(names):
            strange = sorted(set(value) - set(names)) if isinstance(value, dict) else value
            raise UserError(f"{path} does not take {strange!r}; its fields are {', '.join(names)}")
        try:
            return kind(**{k: from_dict(hints[k], v, f"{path}.{k}") for k, v in value.items()})  # type: ignore[operator]
        except TypeError as error:
            raise UserError(f"{path} is incomplete: {error}") from None
    if typing.get_origin(kind) is types.UnionType and isinstance(value, list | tuple):  # of int | tuple the tuple
        kind = next((member for member in typing.get_args(kind) if typing.get_origin(member) is tuple), kind)
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        if not isinstance(value, list | tuple) or (inner[-1] is not ... and len(value) != len(inner)):
            raise UserError(f"{path} is {value!r}; expected a list of {len(inner)} values")
        kinds = [inner[0]] * len(value) if inner[-1] is ... else inner
        return tuple(from_dict(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    return _checked_scalar(kind, value, path)


def _all_dataclasses(kind: Any) -> bool:
    return all(dataclasses.is_dataclass(member) for member in typing.get_args(kind))


def _checked_scalar(kind: Any, value: Any, path: str) -> Any:
    members = (kind,) if typing.get_origin(kind) is Literal else typing.get_args(kind) or (kind,)
    words = [word for m in members if typing.get_origin(m) is Literal for word in typing.get_args(m)]
    kinds = [member for member in members if typing.get_origin(member) is not Literal]
    if float in kinds and type(value) is int:
        value = float(value)
    if value not in words and type(value) not in kinds:
        allowed = [*(getattr(member, "__name__", str(member)) for member in kinds), *words]
        raise UserError(f"{path} is {value!r}; expected {' or '.join(map(str, allowed))}")
    return value


def to_yaml(config: RunConfig) -> str:
    """The text of a run's config.yaml."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def load_config(path: Path) -> RunConfig:
    """Read a run's config.yaml.

    Raises:
        UserError: the file is missing, is not YAML, or does not describe a run.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (path.parent / "import.json").exists():
            raise UserError(
                f"{path.parent} holds imported weights, not a run: there is nothing to go on with. A new run starts "
                f"from them with `tessella pretrain RECIPE --data DATA --out RUN --start-from {path.parent}`"
            ) from None
        raise UserError(f"{path.parent} is not a run folder: it has no {path.name}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as YAML: {error}") from None
    return from_dict(RunConfig, value, path.name)
