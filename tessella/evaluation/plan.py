"""What an evaluation runs, and on which data: from words, or from a file that names the data of each kind.

    classes: {train: photos/train, test: photos/test, label_map: superclasses.csv}
    boxes: {train: train.json, test: val.json, images: photos}
    masks: {train: streets, test: streets}
    protocols:
      linear-swav: {epochs: 20}
      detection-small: {train: mine.json, test: theirs.json, iterations: 100}

Names are those of the command line. Data with boxes or masks may hold both splits, so that one name will do. Below
`protocols`, a protocol gets other values for any field of its config, and data of its own.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tessella import files
from tessella.data.boxes.layouts import AnnotatedImages, holds_annotations
from tessella.data.masks.layouts import MaskedImages, open_masks
from tessella.errors import UserError
from tessella.files import FileError
from tessella.protocols import (
    KINDS,
    Kind,
    Protocol,
    changes,
    default_config,
    named_settings,
    protocol_of,
    quick_settings,
    record_name,
)
from tessella.ranges import Repeats, check_ranges, checked
from tessella.run.config import from_dict, to_dict
from tessella.text import plain_yaml, printable

DEFAULT = ("knn", "linear", "fewlabels", "clustering")  # without a data file, where nothing is asked for
_FILE_LIMIT = 4 << 20  # bytes
_DATA_FIELDS: dict[Kind, tuple[str, ...]] = {
    "classes": ("train", "test", "label_map"),
    "boxes": ("train", "test", "images"),
    "masks": ("train", "test"),
}
_ALL_DATA_FIELDS = ("train", "test", "label_map", "images")
_KNOWN_BY = {  # kind -> what the data must say
    "classes": "the class of each image: one folder per class, or a list with labels",
    "boxes": "boxes of objects: a folder or archive in COCO's or VOC's format",
    "masks": "the class of every pixel: images/ and masks/, VOC, Cityscapes or ADE20K",
}


@dataclass(frozen=True)
class Source:
    """Where images to learn from and to be judged on come from: names, or sets that were opened before."""

    train: Any
    test: Any
    label_map: str | None = None  # of classes; see `data.label_map`
    images: str | None = None  # of a COCO file, where they are not near it


class Section(NamedTuple):
    """What a data file says about one protocol."""

    settings: dict[str, Any]
    source: Source | None


class DataFile(NamedTuple):
    """A data file, read but not opened."""

    name: str
    sources: dict[Kind, Source]
    sections: dict[str, Section]


class Task(NamedTuple):
    """One protocol to run on some data."""

    name: str  # of its record
    config: Any
    protocol: Protocol
    kind: Kind
    source: Source
    seed: int
    required: bool = True  # asked for by name; else it is left out where it does not work with the data

    @property
    def changed(self) -> dict[str, Any]:
        """What differs from the setting that the name stands for, as JSON has it."""
        setting = named_settings().get(self.name)
        different = {} if type(setting) is not type(self.config) else changes(setting, self.config)
        return {name: to_dict(value) for name, value in different.items()}


@checked
def plan(
    protocols: Sequence[Any], source: Source | None, file: DataFile | None, *, seed: int, seeds: Repeats | None = None
) -> list[Task]:
    """The tasks that were asked for, in order.

    Args:
        protocols: names as in `protocols.default_config`, "all", or configs; none for what is usual: all that a file's
            data allow, else `DEFAULT`.
        source: data for all of them, or
        file: data by kind.
        seed: of every random choice.
        seeds: trainings of each protocol that trains a network, from `seed` on; default: as its setting says.

    Raises:
        UserError: a name is unknown, there is no data for a protocol, or a setting does not fit.
    """
    assert (source is None) != (file is None)
    planner = _Planner(source, file or DataFile("", {}, {}), seed, seeds)
    tasks: list[Task] = []
    for protocol in protocols or (("all",) if file else DEFAULT):
        tasks += planner.all() if isinstance(protocol, str) and protocol == "all" else planner.named(protocol)
    unique: dict[Any, Task] = {}
    for task in tasks:  # "all knn" names knn twice
        check_ranges(task.config, f"protocols.{task.name}.")
        key = task.name, repr(task.config), task.kind, id(task.source.train), id(task.source.test), task.seed
        unique[key] = task if key not in unique or task.required else unique[key]
    return list(unique.values())


def read_data_file(path: Path) -> DataFile:
    """Read which data serves which protocol.

    Raises:
        UserError: the file cannot be read, or names something unknown.
    """
    try:
        content = plain_yaml(files.read_text(path, _FILE_LIMIT))
    except FileError as error:
        raise UserError(f"the data file {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"the data file {path} is not YAML: {textwrap.shorten(str(error), 300)}") from None
    name = path.name
    content = _table(content, name, (*KINDS, "protocols"))
    sources = {kind: _source(content[kind], f"{name}: {kind}", kind) for kind in KINDS if kind in content}
    sections = {}
    for title, section in _table(content.get("protocols") or {}, f"{name}: protocols").items():
        setting = record_name(default_config(title))
        sections[setting] = _section(section, f"{name}: protocols.{title}", protocol_of(default_config(title)))
    if not sources and not any(section.source for section in sections.values()):
        raise UserError(f"{name} names no data: give classes, boxes or masks, each with train and test")
    return DataFile(name, sources, sections)


def _table(value: Any, path: str, known: Sequence[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{path} is no table of names and values")
    unknown = [key for key in value if known is not None and key not in known]
    if unknown:
        raise UserError(f"{path} does not take {printable(unknown[0])!r}: it takes {', '.join(known or ())}")
    return value


def _source(value: Any, path: str, kind: Kind) -> Source:
    if isinstance(value, str) and kind != "classes":  # one name: these formats hold their own splits
        return Source(value, value)
    if not isinstance(value, dict):
        raise UserError(f"{path} is {value!r}; expected train: DATA and test: DATA")
    value = _table(value, path, _DATA_FIELDS[kind])
    for name in ("train", "test"):
        if not isinstance(value.get(name), str):
            raise UserError(f"{path}.{name} is {value.get(name)!r}; expected the name of a data set")
    return Source(value["train"], value["test"], _name(value, path, "label_map"), _name(value, path, "images"))


def _section(value: Any, path: str, protocol: Protocol) -> Section:
    value = {} if value is None else _table(value, path)
    fields = [field.name for field in dataclasses.fields(protocol.config)]
    settings = {name: setting for name, setting in value.items() if name not in _ALL_DATA_FIELDS}
    for name in settings:
        if name not in fields:
            raise UserError(
                f"{path} does not take {printable(name)!r}: it takes train, test and {', '.join(fields) or 'nothing'}"
            )
    if "seed" in settings:
        raise UserError(f"{path}.seed: seeds are given for the whole evaluation, by --seed and --seeds")
    source = None
    if "train" in value or "test" in value:
        data = {name: value[name] for name in _ALL_DATA_FIELDS if name in value}
        source = _source(data, path, "classes" if "classes" in protocol.kinds else protocol.kinds[0])
    return Section(settings, source)


def _name(value: dict[str, Any], path: str, field: str) -> str | None:
    name = value.get(field)
    if name is not None and not isinstance(name, str):
        raise UserError(f"{path}.{field} is {name!r}; expected the name of a file or folder")
    return name


class _Planner(NamedTuple):
    """Makes tasks from names."""

    source: Source | None  # of all tasks; without it
    file: DataFile  # says which data each kind and each protocol has
    seed: int
    seeds: int | None

    def all(self) -> list[Task]:
        """What the data allow, and all that the file has a section for."""
        sources = self.file.sources
        if self.source is not None:
            sources = dict.fromkeys(_kinds_of(self.source), self.source)
        quick = [(name, kind) for kind in sources for name in quick_settings(kind) if name not in self.file.sections]
        tasks = [
            task._replace(required=False)
            for name, kind in quick
            for task in self._tasks(name, named_settings()[name], kind, sources[kind])
        ]
        return tasks + [task for name in self.file.sections for task in self.named(name)]

    def named(self, protocol: Any) -> list[Task]:
        """The tasks of a protocol's name or config."""
        config = default_config(protocol) if isinstance(protocol, str) else protocol
        name = record_name(config)
        section = self.file.sections.get(name, Section({}, None))
        if section.settings:
            settings = _merged(to_dict(config), section.settings)
            config = from_dict(type(config), settings, f"{self.file.name}: protocols.{name}")
        return self._tasks(name, config, *self._data(name, protocol_of(config).kinds, section.source or self.source))

    def _data(self, name: str, kinds: tuple[Kind, ...], source: Source | None) -> tuple[Kind, Source]:
        """The kind and the place of a protocol's data."""
        if source is not None:
            present = kinds if len(kinds) == 1 else _kinds_of(source)
            return next((kind for kind in present if kind in kinds), kinds[-1]), source
        for kind in kinds:
            if kind in self.file.sources:
                return kind, self.file.sources[kind]
        raise UserError(
            f"{name} needs {' or '.join(_KNOWN_BY[kind] for kind in kinds)}; {self.file.name} has "
            f"{', '.join(self.file.sources) or 'no data'} only: add {' or '.join(kinds)}"
        )

    def _tasks(self, name: str, config: Any, kind: Kind, source: Source) -> list[Task]:
        """The task, or one for each seed."""
        protocol, fields = protocol_of(config), {field.name for field in dataclasses.fields(config)}
        seeds = [self.seed + i for i in range(self.seeds or 1)] if protocol.repeats == "record" else [self.seed]
        changes: dict[str, Any] = {}
        if protocol.repeats not in (None, "record") and self.seeds is not None:
            changes[protocol.repeats] = self.seeds
        if "seeds" in fields:  # k-means takes several, from the first on
            changes["seeds"] = tuple(self.seed + i for i in range(len(config.seeds)))
        return [
            Task(name, dataclasses.replace(config, **changes, **({"seed": seed} if "seed" in fields else {})),
                 protocol, kind, source, seed)
            for seed in seeds
        ]  # fmt: skip


def _kinds_of(source: Source) -> list[Kind]:
    """What the data say about their images: boxes, masks, or else the classes of their folders."""
    data = source.train
    if isinstance(data, AnnotatedImages):
        return ["boxes"]
    if isinstance(data, MaskedImages):
        return ["masks"]
    kinds: list[Kind] = []
    if isinstance(data, str) and data.partition("::")[0].lower() != "shapes":
        if holds_annotations(data):
            kinds.append("boxes")
        try:
            open_masks(data, "train")
            kinds.append("masks")
        except UserError:
            pass
    return kinds or ["classes"]


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`old` with the values of `new`; tables within are merged alike."""
    both = {
        key: _merged(old[key], value) if isinstance(value, dict) and isinstance(old.get(key), dict) else value
        for key, value in new.items()
    }
    return old | both
