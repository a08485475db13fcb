"""Where images come from: one function, `open_images`, for folders, lists, archives and data sets by name.

    given               how it is read                                       keys
    a folder            files below it, at any depth                         path below the folder
    .csv, .parquet      files that it lists                                  path as listed
    .tar[.gz], several  in place, by offset (a .gz: from a copy in the       member name, behind the archive's
                        cache)                                               name if there are several
    a pack              smaller images, stored by `tessella pack`            as in its source
    cifar10, stl10 ...  torchvision's arrays, in memory                      split/number
    hf:NAME             Hugging Face `datasets`                              split/number
    digits, shapes      embedded, no download                                split/number
    NAME:...            by a package's entry point `tessella.sources`        the package's
    anything::PART      a folder within a folder or archive; a split of      relative to the part
                        a data set by name

Class labels are part of a set only if they were asked for.
"""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tessella.data.sources.archives import archives_in, open_archives
from tessella.data.sources.files import IMAGE_SUFFIXES, ending_of, names_in
from tessella.data.sources.folders import holds_image, open_folder
from tessella.data.sources.images import ArrayImages, ImageSet, Request
from tessella.data.sources.lists import LIST_SUFFIXES, open_list
from tessella.data.sources.messages import not_read
from tessella.data.sources.named import EMBEDDED, TORCHVISION, open_hugging_face, open_torchvision
from tessella.data.sources.packs import is_pack, open_pack
from tessella.data.sources.tars import TAR_SUFFIXES
from tessella.errors import UserError
from tessella.registry import Registry
from tessella.text import printable

__all__ = ["ACCEPTED", "IMAGE_SUFFIXES", "ArrayImages", "ImageSet", "open_images"]

ACCEPTED = "a folder, a .csv or .parquet list, .tar archives or the name of a data set"  # all of it: docs/data.md
_REMEDIES = {  # ending of a file that cannot be opened -> what to do
    **dict.fromkeys((".zip", ".7z", ".rar"), "unpack it and give the folder, or pack the images as .tar"),
    ".txt": "a list of one path per line is read when it is called .csv",
    **dict.fromkeys((".tsv", ".xlsx"), "save the list as .csv"),
    **dict.fromkeys(IMAGE_SUFFIXES, "it is a single image: give the folder that holds it"),
}

# Openers of other packages by the word before the colon: (data as given, whether to show the classes) -> images.
SOURCES: Registry[Callable[[str, bool], ImageSet]] = Registry("sources", {})


def open_images(data: str, *, labels: bool = False, cache: Path | None = None, download: bool = True) -> ImageSet:
    """Open a set of images. The first time its headers are read; after that its index comes from the cache.

    A known name wins over a folder of the same name in the working folder, which is written ./NAME.

    Args:
        data: see the module's table.
        labels: also give classes: the first folder below `data` (or below its part), the list's column, or
            what the data set by name has.
        cache: folder for indexes and decompressed archives; by default $TESSELLA_CACHE or ~/.cache/tessella.
        download: whether a data set by name may be fetched; False for names that no user has typed.

    Raises:
        UserError: nothing there, nothing readable in it, or labels asked for that it does not have.
    """
    path, part = data, None
    if "::" in data and not os.path.exists(data):
        path, _, part = data.rpartition("::")
    name, (prefix, colon, rest) = path.lower(), path.partition(":")
    by_package = bool(colon) and prefix in SOURCES
    if not download and (by_package or data.startswith("hf:")):
        raise UserError(
            f"{printable(data)} may be fetched over the network: give --data {printable(data)} to allow it."
        )
    request = Request(data, name, (part and part.strip("/")) or None, labels, cache, download)
    if by_package:
        images = SOURCES[prefix](data, labels)
    elif data.startswith("hf:"):
        images = open_hugging_face(request._replace(path=rest))
    elif name in EMBEDDED:
        return EMBEDDED[name](request)
    elif name in TORCHVISION:
        return open_torchvision(request)
    else:
        images = _open_path(request._replace(path=os.path.expanduser(path)))
    _check_not_empty(images)
    if labels:
        _check_labels(images)
    return images


def _open_path(request: Request) -> ImageSet:
    path = request.path
    if os.path.isdir(path):
        if is_pack(path):
            return open_pack(request)
        archives = archives_in(path)
        return open_archives(request, archives) if archives and not holds_image(path) else open_folder(request)
    if os.path.isfile(path):
        if path.lower().endswith(TAR_SUFFIXES):
            return open_archives(request, [path])
        if path.lower().endswith(LIST_SUFFIXES):
            return open_list(request)
    elif not os.path.lexists(path):
        archives = sorted(name for name in glob.glob(path) if name.lower().endswith(TAR_SUFFIXES))
        if archives:
            return open_archives(request, archives)
    raise UserError(_not_found(request.data, path))


def _not_found(data: str, path: str) -> str:
    if os.path.exists(path):
        problem = f"{printable(data)} is not a folder, list or archive that can be read"
        remedy = _REMEDIES.get(ending_of(path))
        return f"{problem}: {remedy}" if remedy else f"{problem}. Give {ACCEPTED}"
    problem = f"{printable(data)} does not exist"
    folder, name = os.path.split(path.rstrip("/"))
    near = difflib.get_close_matches(name, names_in(folder or "."), 2)
    known = difflib.get_close_matches(data.partition("::")[0].lower(), [*EMBEDDED, *TORCHVISION], 2)
    choices = [os.path.join(folder, other) for other in near] + known
    hint = f"; near it is {' or '.join(map(printable, choices))}" if choices else ""
    return f"{problem}{hint}. Give {ACCEPTED}"


def _check_not_empty(images: ImageSet) -> None:
    if len(images):
        return
    if images.unreadable:
        key, reason = images.unreadable[0]
        raise UserError(
            f"{printable(images.name)} has no readable image: all {len(images.unreadable)} files failed,"
            f" the first is {printable(key) or 'the whole'}: {printable(reason)}"
        )
    others = f" It holds {not_read(images.passed_over)}." if images.passed_over else ""
    raise UserError(
        f"{printable(images.name)} holds no images: files ending in {' '.join(IMAGE_SUFFIXES)} are looked for, at any"
        f" depth.{others}"
    )


def _check_labels(images: ImageSet) -> None:
    parts = images.key(0).split("/")
    if len(images.index.classes) == 1 and len(parts) > 2:
        joint = "/" if "::" in images.name else "::"
        raise UserError(
            f"{printable(images.name)} has all its images in one class, {printable(parts[0])}: name the folder that"
            f" holds the classes' folders, for example {printable(images.name + joint + '/'.join(parts[:-2]))}"
        )
    missing = np.flatnonzero(images.index.labels < 0)
    if len(missing):
        raise UserError(
            f"{printable(images.name)} has no class for {len(missing)} of its {len(images)} images, for example"
            f" {printable(images.key(int(missing[0])))}: put each image in a folder named after its class, or"
            " give a .csv list with the columns path and label"
        )
