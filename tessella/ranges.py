"""Ranges of settings: declared in their types, checked in one place.

    lr: NonNegative = 0.03
    prototypes: Clusters | tuple[Clusters, ...] = 3000

NaN and infinity lie in no range.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias, TypeVar

from tessella.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`."""

    low: float
    high: float
    above: bool = False  # `low` itself is refused
    below: bool = False  # `high` itself is refused
    per_image: bool = False  # of a run: no more than it has images

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and (
            value < self.high if self.below else value <= self.high
        )

    def __str__(self) -> str:
        """In words, to follow "must be"."""
        low, high = "above" if self.above else "at least", "below" if self.below else "at most"
        return f"{low} {self.low:,} and {high} {self.high:,}"


PositiveInt: TypeAlias = Annotated[int, Range(1, 10**9)]
NonNegativeInt: TypeAlias = Annotated[int, Range(0, 10**9)]
Repeats: TypeAlias = Annotated[int, Range(1, 10_000)]  # of what is done one after the other
Clusters: TypeAlias = Annotated[int, Range(2, 10**9, per_image=True)]
Width: TypeAlias = Annotated[int, Range(1, 10**6)]  # values of a vector
Channels: TypeAlias = Annotated[int, Range(1, 8192)]  # of a map
Pixels: TypeAlias = Annotated[int, Range(1, 16_384)]
Threads: TypeAlias = Annotated[int, Range(1, 1024)]
ForwardBatch: TypeAlias = Annotated[int, Range(1, 65_536)]  # images per forward pass
Port: TypeAlias = Annotated[int, Range(0, 65_535)]  # of TCP; 0 for any that is free
PackedSide: TypeAlias = Annotated[int, Range(16, 16_384)]  # pixels
JpegQuality: TypeAlias = Annotated[int, Range(1, 100)]
Seed: TypeAlias = Annotated[int, Range(0, 2**64 - 1)]

Positive: TypeAlias = Annotated[float, Range(0, 10**6, above=True)]
NonNegative: TypeAlias = Annotated[float, Range(0, 10**6)]
Fraction: TypeAlias = Annotated[float, Range(0, 1)]
PositiveFraction: TypeAlias = Annotated[float, Range(0, 1, above=True)]
FractionBelowOne: TypeAlias = Annotated[float, Range(0, 1, below=True)]
ProperFraction: TypeAlias = Annotated[float, Range(0, 1, above=True, below=True)]
PixelMean: TypeAlias = Annotated[float, Range(-1000, 1000)]  # pixels lie in [0, 1]
PixelStd: TypeAlias = Annotated[float, Range(0, 1000, above=True)]


def check_ranges(settings: Any, path: str = "", images: int | None = None) -> None:
    """Check every number of a tree of dataclasses.

    Args:
        settings: a dataclass.
        path: prefix of its fields' names in messages, such as "optimizer.".
        images: number of images of the run, if known.

    Raises:
        UserError: a number is out of its range; the text names the field, its value and the range.
    """
    kind: Any = type(settings)
    for name, hint in _hints(kind).items():
        _check(hint, getattr(settings, name), path + name, images)


def checked(function: Callable[..., T]) -> Callable[..., T]:
    """A function that first checks its arguments by the ranges in their types, as `check_ranges` does."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def check_and_call(*args: Any, **kwargs: Any) -> T:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            _check(arguments_of(function).get(name), value, name, None)
        return function(*args, **kwargs)

    return check_and_call


def range_of(hint: Any) -> Range | None:
    """The range that a type declares for its numbers, at any depth; None if there is none."""
    if isinstance(hint, Range):
        return hint
    parts = (*typing.get_args(hint), *getattr(hint, "__metadata__", ()))
    return next(filter(None, map(range_of, parts)), None)


@functools.cache
def arguments_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The types of a function's arguments. Its result's type is left out, because it may not be imported."""
    hints = {name: hint for name, hint in function.__annotations__.items() if name != "return"}
    owner = type("Arguments", (), {"__annotations__": hints})
    return typing.get_type_hints(owner, inspect.unwrap(function).__globals__, include_extras=True)


@functools.cache
def _hints(owner: Any) -> dict[str, Any]:
    return typing.get_type_hints(owner, include_extras=True)


def _check(hint: Any, value: Any, name: str, images: int | None) -> None:
    if dataclasses.is_dataclass(value):
        check_ranges(value, f"{name}.", images)
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            _check(hint, item, f"{name}.{i}", images)
    elif isinstance(value, int | float) and not isinstance(value, bool) and (accepted := range_of(hint)):
        if value not in accepted:
            raise UserError(f"{name}={value} must be {accepted}")
        if accepted.per_image and images is not None and value > images:
            raise UserError(f"{name}={value} must be at most {images}, the number of images: there would be empty ones")
