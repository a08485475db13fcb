"""Small text files (.json, .xml, .txt) below a folder or in archives, and the images beside them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tessella.data.decode import Unreadable
from tessella.data.index import cache_folder
from tessella.data.sources import ImageSet, open_images
from tessella.data.sources.files import read_file
from tessella.data.sources.tars import TAR_SUFFIXES, Archives, tar_on_disk, walk_tar
from tessella.errors import UserError
from tessella.text import printable

_SUFFIXES = (".json", ".xml", ".txt")
_MAX_BYTES = 2**31  # of one text file; the largest of COCO has 2**29


class FolderTexts:
    """The text files below a folder. Names are relative to it, '/' between parts; hidden files are left out."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self, folder: str) -> list[str]:
        """Names of the text files in a folder, in order; nothing if there is no such folder."""
        return sorted(entry.name for entry in self._entries(folder) if entry.name.endswith(_SUFFIXES))

    def folders(self, folder: str) -> list[str]:
        """Names of the folders in a folder, in order."""
        return sorted(entry.name for entry in self._entries(folder) if entry.is_dir())

    def read(self, name: str) -> bytes:
        """A whole file.

        Raises:
            UserError: it is missing, cannot be read, or lies outside the folder.
        """
        if ".." in name.split("/") or name.startswith("/"):  # lists of foreign data sets name files
            raise UserError(f"{printable(name)} leads out of the data set: remove it from the list")
        try:
            return read_file(str(self.root / name), limit=_MAX_BYTES)
        except Unreadable as error:
            raise UserError(f"{printable(str(self.root / name))}: {error.reason}") from None

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.root / folder) as entries:
                return [entry for entry in entries if not entry.name.startswith(".")]
        except OSError:
            return []


class ArchiveTexts:
    """The text files in .tar archives; methods as of `FolderTexts`, but folders that hold no text are unknown.

    Args:
        archives: uncompressed.
        below: only what lies in this folder, which the names then leave out; "" for all.
    """

    def __init__(self, archives: Archives, below: str = "") -> None:
        self._archives, self._below = archives, f"{below}/" if below else ""

    @cached_property
    def _members(self) -> dict[str, tuple[int, int, int]]:
        """Name -> archive, offset and size."""
        members = {}
        for number, path in enumerate(self._archives.paths):
            listed, failed = walk_tar(path, _SUFFIXES)
            if failed:
                name, reason = failed[0]
                raise UserError(f"{printable(path)}: {printable(name or 'the archive')}: {reason}")
            for name, offset, size in listed:
                if name.startswith(self._below):
                    members[name.removeprefix(self._below)] = number, offset, size
        return members

    @cached_property
    def _tree(self) -> dict[str, tuple[list[str], set[str]]]:
        """Folder -> files and folders in it."""
        tree: dict[str, tuple[list[str], set[str]]] = {}
        for name in sorted(self._members):
            folder, _, file = name.rpartition("/")
            tree.setdefault(folder, ([], set()))[0].append(file)
            while folder:
                folder, _, below = folder.rpartition("/")
                tree.setdefault(folder, ([], set()))[1].add(below)
        return tree

    def names(self, folder: str) -> list[str]:  # noqa: D102
        return self._tree.get(folder, ([], set()))[0]

    def folders(self, folder: str) -> list[str]:  # noqa: D102
        return sorted(self._tree.get(folder, ([], set()))[1])

    def read(self, name: str) -> bytes:  # noqa: D102
        archive, offset, size = self._members.get(name, (0, 0, -1))
        if size < 0:
            raise UserError(f"{printable(self._archives.paths[archive])} holds no file {printable(name)}")
        if size > _MAX_BYTES:
            raise UserError(f"{printable(name)} has {size:,} bytes, more than the limit of {_MAX_BYTES:,}")
        try:
            return self._archives.read(archive, offset, size)
        except Unreadable as error:
            raise UserError(f"{printable(name)}: {error.reason}") from None


Texts = FolderTexts | ArchiveTexts


def part_of(data: str) -> str:
    """What is named behind two colons; "" for all."""
    return data.rpartition("::")[2] if "::" in data and not os.path.exists(data) else ""


def join(*parts: str) -> str:
    """Names joined by '/', without empty ones."""
    return "/".join(part for part in parts if part)


def first_text(texts: Texts, names: Sequence[str]) -> str | None:
    """Text of the first of these files that is there. Bytes that are not UTF-8 are kept as in file names."""
    for name in names:
        folder, _, file = name.rpartition("/")
        if file in texts.names(folder):
            return texts.read(name).decode("utf-8-sig", "surrogateescape")
    return None


class AnnotationFiles:
    """A folder or an archive with annotations and images.

    Attributes:
        data: the name as given.
        part: the part of it that was named, "" for all.
        texts: the annotations; names are relative to the folder or archive.
    """

    def __init__(self, data: str) -> None:
        """Find the files.

        Args:
            data: FOLDER, FILE.json, ARCHIVE.tar, ARCHIVE.tar.gz; a part behind two colons.

        Raises:
            UserError: there is nothing of that name.
        """
        self.data, part = data, part_of(data)
        self.part = part.strip("/")
        path = Path(os.path.expanduser(data.removesuffix(f"::{part}")))
        # os.path, because Path fails over names that are too long or hold a zero byte.
        if os.path.isfile(path) and path.name.lower().endswith(TAR_SUFFIXES):
            self._images, separator = str(path.absolute()), "::"
            self.texts: Texts = ArchiveTexts(Archives([tar_on_disk(str(path), cache_folder())]))
        elif os.path.isdir(path) or (os.path.isfile(path) and path.suffix == ".json"):
            root, separator = self._enter(path.absolute()), "/"
            self._images, self.texts = str(root), FolderTexts(root)
        else:
            raise UserError(f"{printable(data)} is no folder, .json file or .tar archive: check the path")
        self._separator = separator

    def _enter(self, path: Path) -> Path:
        """The root of a folder's files, which may lie above it: an image folder's annotations are beside it."""
        if path.suffix == ".json" and path.is_file():
            root = path.parent.parent if path.parent.name == "annotations" else path.parent
            self.part = path.relative_to(root).as_posix()
            return root
        beside = path / self.part
        if not beside.exists() and not beside.parent.exists() and "+" not in self.part:
            raise UserError(f"{printable(self.data)} has no part {printable(self.part)}: there is no such folder")
        inside = FolderTexts(path).names("annotations")
        if not self.part and not inside and (path.parent / "annotations").is_dir():
            self.part, path = path.name, path.parent
        return path

    def images(self, folder: str) -> ImageSet:
        """The images below a folder.

        Raises:
            UserError: there are none.
        """
        return open_images(f"{self._images}{self._separator}{folder}" if folder else self._images)
