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
    """A mapping from names to things. An entry point is imported when its name is looked up, not before."""

    def __init__(self, kind: str, own: Mapping[str, T]) -> None:
        """Start with Tessella's own.

        Args:
            kind: what the things are, in the plural; the group of the entry points is `tessella.{kind}`.
            own: Tessella's own things by name.
        """
        self.kind = kind
        self.loaded = dict(own)

    def __getitem__(self, name: str) -> T:
        """The thing of that name.

        Raises:
            KeyError: there is none.
            UserError: the package that provides it cannot be imported.
        """
        if name in self.loaded:
            return self.loaded[name]
        entry = self._added[name]
        try:
            thing: T = entry.load()
        except Exception as error:
            package = entry.dist.name if entry.dist else entry.value
            raise UserError(
                f"{name} of tessella.{self.kind} comes from {package}, which cannot be imported: "
                f"{type(error).__name__}: {error}. Repair or uninstall {package}"
            ) from error
        self.loaded[name] = thing
        return thing

    def __iter__(self) -> Iterator[str]:
        return iter({**self.loaded, **self._added})

    def __len__(self) -> int:
        return len({**self.loaded, **self._added})

    def __contains__(self, name: object) -> bool:
        return name in self.loaded or name in self._added

    @cached_property
    def _added(self) -> dict[str, EntryPoint]:
        """Entry points of installed packages. A name of ours cannot be taken."""
        return {
            entry.name: entry for entry in entry_points(group=f"tessella.{self.kind}") if entry.name not in self.loaded
        }

    def find(self, name: str) -> T:
        """The thing of that name, for a name that a user typed.

        Raises:
            UserError: there is none; the text names similar ones.
        """
        if name not in self:
            near = difflib.get_close_matches(name, self, 3)
            hint = f"did you mean {' or '.join(near)}? All" if near else "there"
            raise UserError(f"there is no {name!r} among the {self.kind}; {hint} are {', '.join(self)}")
        return self[name]
