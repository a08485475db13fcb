"""What a protocol declares about itself; commands, tables and pages take the rest from there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

# What is known about an image: its class, the boxes (and masks) of its objects, or the class of every pixel.
Kind: TypeAlias = Literal["classes", "boxes", "masks"]
KINDS: tuple[Kind, ...] = ("classes", "boxes", "masks")


class Protocol(NamedTuple):
    """A protocol: a function (backbone, data, config) -> scores, and what people may ask of it."""

    title: str  # for people
    config: type  # a frozen dataclass; its `version` grows whenever a change of the code changes a figure
    function: Callable[..., dict[str, Any]]
    settings: Mapping[str, Any] = {}  # name -> config; what users type, and what records are called
    measures: Mapping[str, str] = {}  # scores that summaries show -> label, the main one first
    kinds: tuple[Kind, ...] = ("classes",)  # of data that it takes, the preferred first
    check: Callable[[Any, Any], object] | None = None  # (data, config): refuses what cannot work, before hours of it
    repeats: str | None = None  # how it is run with several seeds: by this field, or, "record", once for each
    default: str = ""  # the setting that the protocol's own name stands for, if that is no setting's name
    quick: Mapping[Kind, tuple[str, ...]] = {}  # settings that "all" stands for, by the kind of data
    # Name of a record whose config is none of `settings`; default: the protocol's own name.
    name_of: Callable[[Any], str] | None = None
