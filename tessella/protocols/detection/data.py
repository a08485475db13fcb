"""The data of the detection protocol, and their check before hours of training."""

from __future__ import annotations

from dataclasses import dataclass

from tessella.data.boxes.layouts import AnnotatedImages
from tessella.errors import UserError
from tessella.protocols.dense import DenseData
from tessella.protocols.detection.recipes import DetectionConfig
from tessella.text import printable


@dataclass
class DetectionData(DenseData[AnnotatedImages]):
    """Images with objects."""

    @property
    def classes(self) -> list[str]:
        """Names of the classes of both splits; the training images' come first, in their order."""
        return list(dict.fromkeys([*self.train.classes, *self.test.classes]))


def check(data: DetectionData, config: DetectionConfig) -> list[str]:
    """Refuse what cannot be trained or scored; returns what a reader of the figures should know.

    Raises:
        UserError: there is nothing to train on or to score, or objects lack the masks that the setting needs.
    """
    train, test = data.train, data.test
    usable = len(train.with_objects())
    if not usable:
        raise UserError(f"{printable(train.name)}: no training image has an object with an area inside the image")
    ignored = test.table.crowd | test.table.difficult
    if ignored.all():
        raise UserError(f"{printable(test.name)}: the test images have no object to find")
    for part, with_crowd in ((train, False), (test, True)):
        lacking = part.lacking_masks(with_crowd) if config.masks else 0
        if lacking:
            raise UserError(
                f"{printable(part.name)}: {lacking} of {len(part.table.ids)} objects have no mask, which "
                f"{config.recipe} needs: give masks (segmentation), or use a recipe for boxes: jigclu, small"
            )
    notes = [f"train: {note}" for note in train.notes + train.flaws()] + [f"test: {note}" for note in test.notes]
    if usable < len(train) and not config.keep_empty:
        notes.append(f"train: {len(train) - usable} of {len(train)} images without objects are left out")
    unknown = [name for name in test.classes if name in test.classes_present() - train.classes_present()]
    if unknown:
        notes.append(
            f"{len(unknown)} classes of the test images have no training object: {printable(', '.join(unknown))}"
        )
    empty = int(((test.table.boxes[:, 2:] <= 0).any(axis=1) & ~ignored).sum())
    if empty:
        notes.append(f"{empty} objects of the test images have boxes without an area, which count as missed")
    if train.fingerprint == test.fingerprint:
        notes.append("train and test are the same images: the figures show how well they are remembered")
    if test.table.difficult.any():
        notes.append("difficult objects are ignored in scoring, by COCO's rules for crowds")
    return notes
