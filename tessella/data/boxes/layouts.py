"""Where boxes and masks of objects come from: one function, `open_annotations`, for COCO and VOC formats.

    data                                              how they are read
    a folder with annotations/instances_*.json        COCO: the file of the split, images in the folder of its name
    one of its image folders, such as train2017       COCO: that folder's file
    a .json file                                      COCO: images beside it, or in the folder of its name
    a folder with _annotations.coco.json or the like  COCO: images beside it
    a folder with Annotations, JPEGImages, ImageSets  VOC: the lists of the split
    a folder of such folders (VOC2007, VOC2012)       VOC: all of them, joined
    VOC2007/trainval+VOC2012/trainval as a part       VOC: these lists
    shapes                                            generated, with masks

All but the last may lie in a .tar or .tar.gz, and a part of a folder or archive is named behind two colons, as in
coco-mini.tar::coco-mini.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Literal

from tessella.data.boxes.coco import read_coco
from tessella.data.boxes.generated import open_shapes
from tessella.data.boxes.images import AnnotatedImages, Objects
from tessella.data.boxes.voc import find_lists, is_voc, read_voc
from tessella.data.texts import AnnotationFiles, join
from tessella.errors import UserError
from tessella.text import printable

__all__ = ["AnnotatedImages", "Objects", "holds_annotations", "open_annotations"]

Split = Literal["train", "test"]
_SPLIT_NAMES = {"train": ("train",), "test": ("val", "valid", "minival", "test")}


def open_annotations(data: str, split: Split, images: str | None = None) -> AnnotatedImages:
    """Open images with the boxes, classes and, where they have them, masks of their objects.

    Args:
        data: see the module's table; what names one split alone (a .json file, an image folder) is taken whatever
            `split` says.
        split: which part of data that hold both: "train", or "test", which is the validation part where that is the
            labelled one.
        images: name of the images of a COCO file, if they are not near it.

    Raises:
        UserError: nothing of these formats is there, or what it says is wrong; the text says where.
    """
    if data.partition("::")[0] == "shapes":
        return open_shapes(data, split)
    files = AnnotationFiles(data)
    lists = find_lists(files, split)
    if lists and images is None:
        return read_voc(files, lists, split)
    json_name, folders = _find_coco(files, split)
    return read_coco(files, json_name, folders, images)


def holds_annotations(data: str) -> bool:
    """Whether `open_annotations` knows the format of these data; they may still hold mistakes.

    Args:
        data: as there, but for the embedded shapes, which are images of one class each as well.
    """
    try:
        files = AnnotationFiles(data)
        if is_voc(files, files.part) or find_lists(files, "train") or find_lists(files, "test"):
            return True
        _find_coco(files, "train")
    except UserError:
        return False
    return True


def _find_coco(files: AnnotationFiles, split: Split) -> tuple[str, list[str]]:
    """Name of the annotation file, and folders where its images may lie, the likeliest first."""
    here, texts = files.part, files.texts
    if here.endswith(".json"):
        return here, _image_folders(here)
    for folder in (join(here, "annotations"), here, *(join(here, name) for name in _SPLIT_NAMES[split])):
        file = _of_split([name for name in texts.names(folder) if name.endswith(".json")], split)
        if file:
            return join(folder, file), _image_folders(join(folder, file))
    parent, _, name = here.rpartition("/")
    file = f"instances_{name}.json"  # the part is one of COCO's image folders
    if name and file in texts.names(join(parent, "annotations")):
        return join(parent, "annotations", file), [here]
    if is_voc(files, here):
        raise UserError(
            f"{printable(files.data)} has no list of its images for this split: expected ImageSets/Main/train.txt, "
            "trainval.txt, val.txt or test.txt; or name a list as a part, such as ::VOC2007/trainval"
        )
    raise UserError(
        f"{printable(files.data)} holds no annotations of objects that are known here: give a folder (or a .tar, or a "
        "part of one behind ::) with annotations/instances_*.json in COCO's format, or with Annotations, JPEGImages "
        "and ImageSets/Main in VOC's format; or a COCO .json file; or shapes"
    )


def _of_split(names: list[str], split: Split) -> str | None:
    """The file of a split among the .json files of a folder; instances first, because COCO has captions as well."""
    names = [name for name in names if name.startswith("instances")] or names
    for word in _SPLIT_NAMES[split]:
        matching = [name for name in names if re.search(rf"(^|[^a-z]){word}([^a-z]|$)", name.lower())]
        if matching:
            return min(matching)
    return names[0] if len(names) == 1 else None


def _image_folders(json_name: str) -> list[str]:
    """COCO keeps annotations/instances_NAME.json and NAME/; others put images/NAME, images, or all in one folder."""
    path = PurePosixPath(json_name)
    root = path.parent.parent if path.parent.name == "annotations" else path.parent
    name = path.stem.removeprefix("instances_")
    folders = [root / name, root / "images" / name, root / "images", root]
    return ["" if str(folder) == "." else str(folder) for folder in folders]
