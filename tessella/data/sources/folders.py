"""A folder of images: every file below it with an image's suffix, at any depth, links followed once.

A class is the first folder below the root.
"""

from __future__ import annotations

import heapq
import os
import stat
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tessella.data.index import Evidence, Listing, cached_index, sample
from tessella.data.sources.files import IMAGE_SUFFIXES, FileImages, ending_of, names_in, read_file
from tessella.data.sources.images import ImageSet
from tessella.data.sources.messages import part_not_found
from tessella.errors import UserError


def open_folder(data: str, path: str, part: str | None, labels: bool, cache: Path) -> ImageSet:
    """Open what lies below a folder.

    Args:
        data: the source as given, for reports.
        path: of the folder.
        part: a folder within it, or None.
        labels: show the classes.
        cache: folder for the index.

    Raises:
        UserError: the part is no folder.
    """
    root = os.path.abspath(os.path.join(path, part) if part else path)
    if not os.path.isdir(root):
        raise UserError(part_not_found(data, str(part), names_in(path)))
    index = cached_index(["folder", root], [], partial(_list_folder, root), cache)
    return FileImages(data, index, labels, root)


def _list_folder(root: str) -> Listing:
    found = _walk(root)
    keys = found.keys
    first_parts = [key.partition("/")[0] if "/" in key else None for key in keys]
    classes = sorted({part for part in first_parts if part is not None})
    number = {name: label for label, name in enumerate(classes)}
    return Listing(
        keys=keys,
        read=lambda position, size: read_file(os.path.join(root, keys[position]), size),
        byte_sizes=found.sizes,
        labels=[-1 if part is None else number[part] for part in first_parts],
        classes=classes,
        unreadable=found.unreadable,
        inaccessible=found.inaccessible,
        file_of=lambda position: os.path.join(root, keys[position]),
        passed_over=found.passed_over,
        watched=found.watched + sample([os.path.join(root, key) for key in keys]),
    )


class _Found(NamedTuple):
    """What lies below a folder."""

    keys: list[str]
    sizes: list[int]  # bytes
    unreadable: list[tuple[str, str]]  # key, reason
    inaccessible: list[str]  # their paths
    passed_over: Counter[str]  # ending -> files
    watched: list[Evidence]  # of all folders


def _walk(root: str) -> _Found:
    """Files with an image's suffix below a folder.

    Every folder is visited once, however many links lead to it, and under its own path if that lies below the
    root: links to folders wait until all real folders are done.
    """
    keys, sizes, unreadable, inaccessible, passed_over, watched = result = _Found([], [], [], [], Counter(), [])
    visited: set[tuple[int, int]] = set()
    folders, links = [""], list[str]()
    while folders or links:
        if not folders:
            folders.append(f"{heapq.heappop(links)}/")
        prefix = folders.pop()
        path = os.path.join(root, prefix)
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            watched.append((path, -1, status.st_mtime_ns))  # before looking: later changes must show
            with os.scandir(path) as scan:
                entries = list(scan)
        except OSError as error:
            unreadable.append((prefix, f"the folder cannot be read: {error.strerror}"))
            inaccessible.append(path)
            continue
        for entry in entries:
            if entry.name.startswith("."):
                passed_over["hidden"] += 1
            elif _is_folder(entry):
                if entry.is_symlink():
                    heapq.heappush(links, prefix + entry.name)
                else:
                    folders.append(f"{prefix}{entry.name}/")
            elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                found = _size_of_regular(entry)
                if isinstance(found, str):
                    unreadable.append((prefix + entry.name, found))
                    inaccessible.append(entry.path)
                else:
                    keys.append(prefix + entry.name)
                    sizes.append(found)
            else:
                passed_over[ending_of(entry.name)] += 1
    return result


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is one or leads to one. Links that lead in a circle, or where nobody may look, lead nowhere."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _size_of_regular(entry: os.DirEntry[str]) -> int | str:
    """Bytes, or why it is no file. Looks from outside: opening a pipe would wait for ever."""
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
