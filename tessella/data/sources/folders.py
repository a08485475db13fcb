"""A folder of images: every file below it with an image's suffix, at any depth, links followed once.

A class is the first folder below the root.
"""

from __future__ import annotations

import heapq
import os
import stat
from functools import partial

from tessella.data.index import Listing, cached_index, labels_by_folder, sample
from tessella.data.sources.files import IMAGE_SUFFIXES, FileImages, ending_of, names_in, read_file
from tessella.data.sources.images import ImageSet, Request
from tessella.data.sources.messages import part_not_found
from tessella.errors import UserError


def open_folder(request: Request) -> ImageSet:
    """Open what lies below a folder, or below a part of it; UserError if the part is no folder."""
    root = os.path.abspath(os.path.join(request.path, request.part or ""))
    if not os.path.isdir(root):
        raise UserError(part_not_found(request.data, str(request.part), names_in(request.path)))
    index = cached_index(["folder", root], [], partial(_list_folder, root), request.cache)
    return FileImages(request.data, index, request.labels, root)


def _list_folder(root: str) -> Listing:
    """Files with an image's suffix below a folder.

    Every folder is visited once, however many links lead to it, and under its own path if that lies below the
    root: links to folders wait until all real folders are done.
    """
    keys, sizes = list[str](), list[int]()
    listing = Listing(
        keys=keys,
        read=lambda position, size: read_file(os.path.join(root, keys[position]), size),
        byte_sizes=sizes,
        labels=[],
        classes=[],
        file_of=lambda position: os.path.join(root, keys[position]),
    )
    visited: set[tuple[int, int]] = set()
    folders, links = [""], list[str]()
    while folders or links:
        prefix = folders.pop() if folders else f"{heapq.heappop(links)}/"
        path = os.path.join(root, prefix)
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            listing.watched.append((path, -1, status.st_mtime_ns))  # before looking: later changes must show
            with os.scandir(path) as scan:
                entries = list(scan)
        except OSError as error:
            listing.unreadable.append((prefix, f"the folder cannot be read: {error.strerror}"))
            listing.inaccessible.append(path)
            continue
        for entry in entries:
            if entry.name.startswith("."):
                listing.passed_over["hidden"] += 1
            elif _is_folder(entry):
                if entry.is_symlink():
                    heapq.heappush(links, prefix + entry.name)
                else:
                    folders.append(f"{prefix}{entry.name}/")
            elif not entry.name.lower().endswith(IMAGE_SUFFIXES):
                listing.passed_over[ending_of(entry.name)] += 1
            elif isinstance(size := _size_of_regular(entry), str):
                listing.unreadable.append((prefix + entry.name, size))
                listing.inaccessible.append(entry.path)
            else:
                keys.append(prefix + entry.name)
                sizes.append(size)
    listing.labels, listing.classes = labels_by_folder(keys)
    listing.watched += sample([os.path.join(root, key) for key in keys])
    return listing


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one, which can be followed."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _size_of_regular(entry: os.DirEntry[str]) -> int | str:
    """Bytes, or why it is no file. It is not opened: a pipe would make the process wait."""
    try:
        status = entry.stat()
    except OSError as error:
        return f"a link that leads nowhere: {error.strerror}" if entry.is_symlink() else str(error.strerror)
    return status.st_size if stat.S_ISREG(status.st_mode) else "not a regular file"


def holds_image(folder: str) -> bool:
    """Whether any image lies below a folder; hidden files do not count, links to folders are not followed."""
    folders = [folder]
    while folders:  # not os.walk, which calls itself for each level: a thousand of them end in an error
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if _is_folder(entry):
                        folders += [] if entry.is_symlink() else [entry.path]
                    elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                        return True
        except OSError:
            continue
    return False
