"""The transform of images for a trained network.

    PIL image, uint8 tensor or decoded file -> shorter side to `resize` -> centre crop of `size` -> normalise

Evaluations, embeddings and users' own code all use it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tessella.data.decode import Unreadable, upright_rgb
from tessella.data.views import IMAGENET_MEAN, IMAGENET_STD
from tessella.errors import UserError
from tessella.ops.augment import normalise

MAX_SIDE = 4096  # pixels
LONGEST_STRIP = 16  # longer side / shorter side that is resized whole


Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class EvalTransform:
    """The transform of a trained network. Calling it works as with a transform of torchvision.

    Resizing is antialiased and rounds to whole levels: within one level of Pillow on photos (two on pure noise).
    """

    size: int  # pixels of the crop
    resize: int  # pixels of the shorter side before the crop; size / resize is the crop fraction
    mean: tuple[float, float, float] = IMAGENET_MEAN  # of each channel, values in [0, 1]
    std: tuple[float, float, float] = IMAGENET_STD
    # Which sides are resized to `resize`. VOC07's probes: the shorter side, and then both to `size`.
    fit: Literal["shorter side", "both sides", "shorter side, then both"] = "shorter side"
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        if not 1 <= self.size <= self.resize:
            raise UserError(f"resize={self.resize} is less than the crop size={self.size}: give resize={self.size}")
        if self.resize > MAX_SIDE:
            raise UserError(f"images are resized to {self.resize} pixels: give at most {MAX_SIDE}")
        if not (all(map(math.isfinite, self.mean)) and all(0 < s < math.inf for s in self.std)):
            raise UserError(f"mean={self.mean}, std={self.std}: give finite numbers, and std above 0")

    @classmethod
    def of(
        cls,
        size: int,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
    ) -> EvalTransform:
        """The usual transform: the whole of a small image (size <= 96), the inner 7/8 of a photo."""
        return cls(size, size if size <= 96 else round(size / 0.875), mean, std)

    def at(self, size: int) -> EvalTransform:
        """The same transform for another size of the crop, with the same crop fraction."""
        return replace(self, size=size, resize=round(size * self.resize / self.size))

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """Prepare images for the network, exactly as an evaluation does.

        Args:
            image: a PIL image of any mode, which is turned upright by its EXIF tag; or uint8 RGB pixels
                (3, h, w) or (b, 3, h, w) of any device, which are resized on the CPU.

        Returns:
            float32 (3, size, size), or (b, 3, size, size) for a batch, on the device of `image`.

        Raises:
            UserError: `image` is something else, or a PIL image that cannot be converted to 8-bit RGB.
        """
        if isinstance(image, Image.Image):
            try:
                return self.normalised(self.crop(upright_rgb(image))[None])[0]
            except (Unreadable, OSError) as error:
                raise UserError(f"the image cannot be converted to 8-bit RGB: {error}") from None
        if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.dim() not in (3, 4):
            shape = f"{image.dtype} tensor {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise UserError(f"transform takes a PIL image or a uint8 tensor (3, h, w) or (b, 3, h, w), not a {shape}")
        if image.shape[-3] != 3 or 0 in image.shape[-2:]:
            raise UserError(f"transform takes RGB pixels (3, h, w) or (b, 3, h, w), not {tuple(image.shape)}")
        arrays = image.detach().cpu().reshape(-1, *image.shape[-3:]).permute(0, 2, 3, 1).numpy()
        crops = torch.empty(len(arrays), self.size, self.size, 3, dtype=torch.uint8)
        for crop, array in zip(crops, arrays, strict=True):
            crop.copy_(self.crop(array))
        batch = self.normalised(crops.to(image.device))
        return batch if image.dim() == 4 else batch[0]

    def crop(self, image: NDArray[np.uint8]) -> Tensor:
        """(h, w, 3) pixels of any size -> (size, size, 3) uint8."""
        if self.fit == "both sides":
            return _centre(resize_pixels(image, self.resize, self.resize, self.interpolation), self.size)
        pixels = _shorter_side(image, self.resize, self.interpolation)
        if self.fit == "shorter side":
            return _centre(pixels, self.size)
        return resize_pixels(pixels.numpy(), self.size, self.size, self.interpolation)

    def normalised(self, crops: Tensor) -> Tensor:
        """(b, size, size, 3) uint8 -> (b, 3, size, size) float32 on the same device, in `image_layout`."""
        return normalise(crops.permute(0, 3, 1, 2).to(torch.float32).div_(255), self.mean, self.std)


def resize_pixels(image: NDArray[np.uint8], height: int, width: int, interpolation: str = "bilinear") -> Tensor:
    """(h, w, 3) -> (height, width, 3) uint8, antialiased.

    By torch's kernel for uint8 pixels, which is faster than Pillow's. Its weights have 16 bits, so it is within one
    level of Pillow on photos, two on pure noise.
    """
    writeable = image if image.flags.writeable else image.copy()  # torch warns of arrays that are read-only
    batch = torch.from_numpy(writeable).permute(2, 0, 1)[None]
    return F.interpolate(batch, (height, width), mode=interpolation, antialias=True)[0].permute(1, 2, 0)


def _centre(pixels: Tensor, size: int) -> Tensor:
    """The middle (size, size, 3), rounded as torchvision's CenterCrop does."""
    height, width, _ = pixels.shape
    top, left = round((height - size) / 2), round((width - size) / 2)
    return pixels[top : top + size, left : left + size]


def _shorter_side(image: NDArray[np.uint8], resize: int, interpolation: str) -> Tensor:
    """(h, w, 3) -> uint8 with the shorter side at `resize`; the other is rounded down, as torchvision does."""
    # Of an extreme strip only the middle, which contains the crop: 20000 x 1 pixels would become gigabytes.
    height, width, _ = image.shape
    shorter = min(height, width)
    top = max(0, height - LONGEST_STRIP * shorter) // 2
    left = max(0, width - LONGEST_STRIP * shorter) // 2
    image = image[top : height - top, left : width - left]
    height, width, _ = image.shape
    return resize_pixels(image, resize * height // shorter, resize * width // shorter, interpolation)
