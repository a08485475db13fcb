"""Names of one kind of thing: Tessella's own, and those that installed packages add through entry points.

A package adds a method by two lines of its pyproject.toml, without a change here:

    [project.entry-points."tessella.methods"]
    simsiam = "my_package.simsiam:SimSiam"
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from tessella.errors import UserError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A mapping from names to things, Tessella's own first. Entry points are imported when their name is looked up."""

    def __init__(self, kind: str, own: Mapping[str, T | EntryPoint]) -> None:
        """`kind` is what the things are, in the plural; the group of the entry points is `tessella.{kind}`."""
        self.kind, self._own = kind, own

    @cached_property
    def loaded(self) -> dict[str, T | EntryPoint]:
        """All things; those that have not been looked up are entry points. Names of Tessella's cannot be replaced."""
        foreign = {entry.name: entry for entry in entry_points(group=f"tessella.{self.kind}")}
        return {**self._own, **foreign, **self._own}

    def __getitem__(self, name: str) -> T:
        """The thing of that name.

        Raises:
            KeyError: there is none.
            UserError: the package that provides it cannot be imported.
        """
        thing = self.loaded[name]
        if not isinstance(thing, EntryPoint):
            return thing
        try:
            loaded: T = thing.load()
        except Exception as error:
            package = thing.dist.name if thing.dist else thing.value
            raise UserError(
                f"{name} of tessella.{self.kind} comes from {package}, which cannot be imported: "
                f"{type(error).__name__}: {error}. Repair or uninstall {package}"
            ) from error
        self.loaded[name] = loaded
        return loaded

    def __iter__(self) -> Iterator[str]:
        return iter(self.loaded)

    def __len__(self) -> int:
        return len(self.loaded)

    def __contains__(self, name: object) -> bool:
        return name in self.loaded

    def require(self, name: str) -> None:
        """Raise a UserError, with similar names, if a name is unknown; nothing is imported."""
        if name not in self:
            near = difflib.get_close_matches(name, self, 3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(self)}"
            raise UserError(f"there is no {name!r} among the {self.kind}; {hint}")

    def find(self, name: str) -> T:
        """The thing of a name that a user typed.

        Raises:
            UserError: there is none, or it cannot be imported.
        """
        self.require(name)
        return self[name]
