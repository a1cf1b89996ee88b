"""Multi-crop augmentation: several random views of an image, some large and some small (Caron et al., 2020)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, require
from ...preprocess import ImagePreprocess

JITTER = (0.8, 0.8, 0.8, 0.2)  # brightness, contrast, saturation, hue
BLUR = (0.1, 2.0)  # standard deviation in pixels


@dataclass(frozen=True)
class Crops:
    """Crops of one size.

    Attributes:
        count: views of each image. size: height and width in pixels.
        scale: least and greatest share of the image's area.
    """

    count: int
    size: int
    scale: tuple[float, float]

    def __post_init__(self) -> None:
        if self.count < 0 or self.size < 1 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(
                f"{self.count} crops of {self.size} pixels and of {self.scale[0]} to {self.scale[1]} of the area are "
                f"not possible; expected a count of at least 0, a size of at least 1 and shares 0 < A <= B <= 1"
            )


def multi_crop(preprocess: ImagePreprocess, kinds: Sequence[Crops]) -> Callable[[Any], list[Tensor]]:
    """Return a function from a PIL image of any size and mode to its views, one tensor (count, 3, size, size) a kind.

    Every view on its own: a crop of random place, size and aspect, mirrored or not, with jittered colours (8 of 10),
    in grey (2 of 10), blurred (5 of 10); normalised as the backbone expects.
    """
    pillow = require("PIL.ImageFilter", "train", "reading images")  # first: torchvision needs it as well
    v2 = require("torchvision.transforms.v2", "train", "reading images")

    def blur(image: Any) -> Any:
        # Pillow's, as in the reference: torchvision's takes thirty times as long
        return image.filter(pillow.GaussianBlur(float(torch.empty(()).uniform_(*BLUR))))

    def augmented(kind: Crops) -> Any:
        return v2.Compose(
            [
                v2.RandomResizedCrop(kind.size, scale=kind.scale, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(*JITTER)], p=0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.Lambda(blur)], p=0.5),
                v2.ToImage(),
            ]
        )

    pipelines = [(kind.count, augmented(kind)) for kind in kinds if kind.count]
    finish = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(preprocess.mean, preprocess.std)])

    def views(image: Any) -> list[Tensor]:
        image = image.convert("RGB")
        stacks = (
            torch.stack([torch.Tensor.as_subclass(one(image), Tensor) for _ in range(count)])
            for count, one in pipelines
        )
        return [finish(stack) for stack in stacks]

    return views


def stack_views(images: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return the views of B images: for each kind (count * B, 3, size, size), the first view of all images first."""
    return [torch.stack(list(kind), dim=1).flatten(0, 1) for kind in zip(*images, strict=True)]
