"""One or several .tar archives as a set of images: their members, read in place (`tars` knows the format).

A class is the first folder within the archive, or within its part.
"""

from __future__ import annotations

import os
from functools import partial

from tessella.data.decode import MAX_BYTES, Unreadable
from tessella.data.index import Index, Listing, cache_folder, cached_index, labels_by_folder
from tessella.data.sources.files import IMAGE_SUFFIXES, names_in
from tessella.data.sources.images import ImageSet, Request
from tessella.data.sources.messages import part_not_found, with_parents
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


def open_archives(request: Request, archives: list[str]) -> ImageSet:
    """Open the images in archives as one set.

    Args:
        request: its path is that of the archive, of the archives' folder, or the pattern that they match; its part is
            a folder within each archive.
        archives: paths of all of them.

    Raises:
        UserError: an archive is damaged or the cache has no room for it, or none has the part.
    """
    archives = [os.path.abspath(archive) for archive in archives]
    unpacked = [tar_on_disk(archive, request.cache or cache_folder()) for archive in archives]
    prefixes = [""]
    if len(archives) > 1:
        common = os.path.commonpath([os.path.dirname(archive) for archive in archives])
        prefixes = [f"{os.path.relpath(archive, common)}/" for archive in archives]
    reader = Archives(unpacked)
    identity = ["tar", os.path.abspath(request.path), request.part or ""]
    index = cached_index(identity, archives, partial(_list_archives, request, reader, prefixes), request.cache)
    return TarImages(request.data, index, request.labels, reader)


def _list_archives(request: Request, reader: Archives, prefixes: list[str]) -> Listing:
    below = f"{request.part}/" if request.part else ""
    names, table = list[str](), list[tuple[int, int, int]]()  # within the part; archive, offset, bytes
    listing = Listing(
        keys=[],
        read=lambda position, size: reader.read(*table[position][:2], size),
        byte_sizes=[],
        labels=[],
        classes=[],
        # Archives that cannot be opened now are tried again at each start.
        inaccessible=[path for path in reader.paths if not os.access(path, os.R_OK)],
    )
    folders: set[str] = set()
    for archive, prefix in enumerate(prefixes):
        members, failed = walk_tar(reader.paths[archive], IMAGE_SUFFIXES, listing.passed_over)
        folders.update(os.path.dirname(member.name) for member in members)
        for member in members:
            if member.name.startswith(below):
                names.append(member.name.removeprefix(below))
                listing.keys.append(prefix + names[-1])
                table.append((archive, member.offset, member.size))
        listing.unreadable += [
            (prefix + name.removeprefix(below), reason) for name, reason in failed if not name or name.startswith(below)
        ]
    if request.part and folders and not names:
        raise UserError(part_not_found(request.data, request.part, with_parents(folders)))
    listing.labels, listing.classes = labels_by_folder(names)
    listing.byte_sizes = [size for _, _, size in table]
    listing.columns = {"archive": [row[0] for row in table], "offset": [row[1] for row in table]}
    return listing
