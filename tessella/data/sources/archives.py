"""One or several .tar archives as a set of images: their members, read in place (`tars` knows the format).

A class is the first folder within the archive, or within its part.
"""

from __future__ import annotations

import os
from collections import Counter
from functools import partial
from pathlib import Path

from tessella.data.decode import MAX_BYTES, Unreadable
from tessella.data.index import Index, Listing, cached_index
from tessella.data.sources.files import IMAGE_SUFFIXES, names_in
from tessella.data.sources.images import ImageSet
from tessella.data.sources.messages import part_not_found
from tessella.data.sources.tars import TAR_SUFFIXES, Archives, tar_on_disk, walk_tar
from tessella.errors import UserError


class TarImages(ImageSet):
    """Members of .tar archives, read in place."""

    def __init__(self, name: str, index: Index, labelled: bool, archives: Archives) -> None:
        super().__init__(name, index, labelled)
        self._archives = archives

    def read(self, row: int) -> bytes:  # noqa: D102
        archive, offset = int(self.index.column("archive")[row]), int(self.index.column("offset")[row])
        size = int(self.index.byte_sizes[row])
        if not (0 <= archive < len(self._archives.paths) and offset >= 0 and 0 <= size <= MAX_BYTES):
            raise Unreadable(f"the index places it at byte {offset} of archive {archive}, with {size} bytes")
        return self._archives.read(archive, offset, size)


def archives_in(folder: str) -> list[str]:
    """Paths of the archives in a folder, in order; folders below it are not searched."""
    paths = [os.path.join(folder, name) for name in names_in(folder) if name.lower().endswith(TAR_SUFFIXES)]
    return [path for path in paths if os.path.isfile(path)]


def open_archives(data: str, path: str, archives: list[str], part: str | None, labels: bool, cache: Path) -> ImageSet:
    """Open the images in archives as one set.

    Args:
        data: the source as given, for reports.
        path: of the archive, of the archives' folder, or the pattern that they match.
        archives: paths of all of them.
        part: a folder within each, or None.
        labels: show the classes.
        cache: folder for the index and for decompressed archives.

    Raises:
        UserError: an archive is damaged or has no room in the cache, or none has the part.
    """
    archives = [os.path.abspath(archive) for archive in archives]
    unpacked = [tar_on_disk(archive, cache) for archive in archives]
    if len(archives) > 1:
        common = os.path.commonpath([os.path.dirname(archive) for archive in archives])
        prefixes = [f"{os.path.relpath(archive, common)}/" for archive in archives]
    else:
        prefixes = [""]
    reader = Archives(unpacked)
    identity = ["tar", os.path.abspath(path), part or ""]
    index = cached_index(identity, archives, partial(_list_archives, data, reader, prefixes, part), cache)
    return TarImages(data, index, labels, reader)


def _list_archives(data: str, reader: Archives, prefixes: list[str], part: str | None) -> Listing:
    below = f"{part}/" if part else ""
    keys: list[str] = []
    class_names: list[str | None] = []
    table: list[tuple[int, int, int]] = []  # archive, offset, bytes
    unreadable: list[tuple[str, str]] = []
    folders: set[str] = set()
    passed_over: Counter[str] = Counter()
    for archive, prefix in enumerate(prefixes):
        members, failed = walk_tar(reader.paths[archive], IMAGE_SUFFIXES, passed_over)
        folders.update(os.path.dirname(member.name) for member in members)
        for member in members:
            if member.name.startswith(below):
                name = member.name.removeprefix(below)
                keys.append(prefix + name)
                class_names.append(name.partition("/")[0] if "/" in name else None)
                table.append((archive, member.offset, member.size))
        unreadable += [
            (prefix + name.removeprefix(below), reason) for name, reason in failed if not name or name.startswith(below)
        ]
    if part and folders and not keys:
        raise UserError(part_not_found(data, part, _with_parents(folders)))
    classes = sorted({name for name in class_names if name is not None})
    number = {name: label for label, name in enumerate(classes)}
    return Listing(
        keys=keys,
        read=lambda position, size: reader.read(*table[position][:2], size),
        byte_sizes=[size for _, _, size in table],
        labels=[-1 if name is None else number[name] for name in class_names],
        classes=classes,
        columns={"archive": [row[0] for row in table], "offset": [row[1] for row in table]},
        unreadable=unreadable,
        # Archives that cannot be opened now are tried again at each start.
        inaccessible=[path for path in reader.paths if not os.access(path, os.R_OK)],
        passed_over=passed_over,
    )


def _with_parents(folders: set[str]) -> list[str]:
    parts = (folder.split("/") for folder in folders if folder)
    return sorted({"/".join(names[: depth + 1]) for names in parts for depth in range(len(names))})
