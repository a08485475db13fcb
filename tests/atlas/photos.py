"""Small pictures that look like photos, from two that scikit-learn brings along; and copies of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_images

SIDE = 70


def patches(count: int) -> list[Image.Image]:
    """Pictures that do not overlap, 70 x 70 pixels; at most 108."""
    found = []
    for photo in load_sample_images().images:
        for top in range(0, photo.shape[0] - SIDE, SIDE):
            for left in range(0, photo.shape[1] - SIDE, SIDE):
                found.append(Image.fromarray(np.ascontiguousarray(photo[top : top + SIDE, left : left + SIDE])))
    lively = sorted(found, key=lambda picture: -np.asarray(picture).std())
    return lively[:count]


def jpeg(picture: Image.Image, quality: int) -> Image.Image:
    """Encoded and decoded."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "encoded again": lambda picture: jpeg(picture, 40),
    "smaller": lambda picture: picture.resize((40, 40)),
    "mirrored": lambda picture: picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "turned by 90 degrees": lambda picture: picture.transpose(Image.Transpose.ROTATE_90),
    "turned by 180 degrees": lambda picture: picture.transpose(Image.Transpose.ROTATE_180),
    "turned by 270 degrees": lambda picture: picture.transpose(Image.Transpose.ROTATE_270),
    "upside down": lambda picture: picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    "brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.2),
    "cropped": lambda picture: picture.crop((3, 3, 67, 67)),
}


def save(folder: Path, pictures: dict[str, Image.Image]) -> Path:
    """Each as NAME.png; a name may have folders."""
    for name, picture in pictures.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{name}.png")
    return folder
