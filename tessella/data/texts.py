"""Small text files (.json, .xml, .txt) below a folder or in an archive, and the images beside them."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Protocol

from tessella.data.decode import Unreadable
from tessella.data.index import cache_folder
from tessella.data.sources import ImageSet, open_images
from tessella.data.sources.files import read_file
from tessella.data.sources.tars import TAR_SUFFIXES, Archives, Member, tar_on_disk, walk_tar
from tessella.errors import UserError
from tessella.text import printable

_SUFFIXES = (".json", ".xml", ".txt")
_MAX_BYTES = 2**31  # of one text file; the largest of COCO has 2**29


class TextFiles(Protocol):
    """What the readers of formats ask for. Names are relative to the base, '/' between parts."""

    data: str  # as given
    part: str  # the part that was named, "" for all

    def names(self, folder: str) -> list[str]:
        """Names of the text files in a folder, in order; nothing if there is no such folder."""
        ...

    def folders(self, folder: str) -> list[str]:
        """Names of the folders in a folder, in order."""
        ...

    def has_folder(self, folder: str) -> bool:
        """Whether there is a folder of that name; in an archive, one that holds a text file."""
        ...

    def read(self, name: str) -> bytes:
        """A whole file.

        Raises:
            UserError: it cannot be read.
        """
        ...

    def images(self, folder: str) -> ImageSet:
        """The images below a folder.

        Raises:
            UserError: there are none.
        """
        ...


def open_files(data: str) -> TextFiles:
    """The files of a folder, archive, or part of one.

    Args:
        data: FOLDER, FILE.json, ARCHIVE.tar, ARCHIVE.tar.gz; a part behind two colons.

    Raises:
        UserError: there is nothing of that name.
    """
    base, part = data, ""
    if "::" in data and not os.path.exists(data):
        base, _, part = data.rpartition("::")
    path = Path(os.path.expanduser(base))
    # os.path, because Path fails over names that are too long or hold a zero byte.
    if os.path.isdir(path):
        return _Folder(data, path, part.strip("/"))
    if os.path.isfile(path) and path.name.lower().endswith(TAR_SUFFIXES):
        return _Archive(data, path, part.strip("/"))
    if os.path.isfile(path) and path.suffix == ".json":
        root = path.parent.parent if path.parent.name == "annotations" else path.parent
        return _Folder(data, root, path.relative_to(root).as_posix())
    raise UserError(f"{printable(data)} is no folder, .json file or .tar archive: check the path")


class _Folder:
    def __init__(self, data: str, root: Path, part: str) -> None:
        self.data, self.root, self.part = data, root.absolute(), part
        beside = self.root / self.part
        if not beside.exists() and not beside.parent.exists() and "+" not in part:
            raise UserError(f"{printable(data)} has no part {printable(part)}: there is no such folder")
        # An image folder's annotations lie beside it: the base goes up, so that a name can reach them.
        if not part and not self.names("annotations") and (self.root.parent / "annotations").is_dir():
            self.root, self.part = self.root.parent, self.root.name

    def names(self, folder: str) -> list[str]:
        return sorted(entry.name for entry in self._entries(folder) if entry.name.endswith(_SUFFIXES))

    def folders(self, folder: str) -> list[str]:
        return sorted(entry.name for entry in self._entries(folder) if entry.is_dir())

    def has_folder(self, folder: str) -> bool:
        return (self.root / folder).is_dir()

    def read(self, name: str) -> bytes:
        if ".." in name.split("/") or name.startswith("/"):  # lists of foreign data sets name files
            raise UserError(
                f"{printable(self.data)}: {printable(name)} leads out of the data set: remove it from the list"
            )
        try:
            return read_file(str(self.root / name), limit=_MAX_BYTES)
        except Unreadable as error:
            raise UserError(f"{printable(str(self.root / name))}: {error.reason}") from None

    def images(self, folder: str) -> ImageSet:
        return open_images(str(self.root / folder))

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.root / folder) as entries:
                return [entry for entry in entries if not entry.name.startswith(".")]
        except OSError:
            return []


class _Archive:
    def __init__(self, data: str, path: Path, part: str) -> None:
        self.data, self.part, self._path = data, part, path
        self._reader = Archives([tar_on_disk(str(path), cache_folder())])

    @cached_property
    def _members(self) -> dict[str, Member]:
        members, failed = walk_tar(self._reader.paths[0], _SUFFIXES)
        if failed:
            name, reason = failed[0]
            raise UserError(f"{printable(self.data)}: {printable(name or 'the archive')}: {reason}")
        return {member.name: member for member in members}

    @cached_property
    def _tree(self) -> dict[str, tuple[list[str], set[str]]]:
        """Folder -> files and folders in it. Folders that hold nothing but images are not known."""
        tree: dict[str, tuple[list[str], set[str]]] = {}
        for name in sorted(self._members):
            folder, _, file = name.rpartition("/")
            tree.setdefault(folder, ([], set()))[0].append(file)
            while folder:
                folder, _, below = folder.rpartition("/")
                tree.setdefault(folder, ([], set()))[1].add(below)
        return tree

    def names(self, folder: str) -> list[str]:
        return self._tree.get(folder, ([], set()))[0]

    def folders(self, folder: str) -> list[str]:
        return sorted(self._tree.get(folder, ([], set()))[1])

    def has_folder(self, folder: str) -> bool:
        return folder in self._tree

    def read(self, name: str) -> bytes:
        member = self._members.get(name)
        if member is None:
            raise UserError(f"{printable(self.data)} holds no file {printable(name)}")
        if member.size > _MAX_BYTES:
            raise UserError(f"{printable(name)} has {member.size:,} bytes, more than the limit of {_MAX_BYTES:,}")
        try:
            return self._reader.read(0, member.offset, member.size)
        except Unreadable as error:
            raise UserError(f"{printable(self.data)}: {printable(name)}: {error.reason}") from None

    def images(self, folder: str) -> ImageSet:
        path = str(self._path.absolute())
        return open_images(f"{path}::{folder}" if folder else path)
