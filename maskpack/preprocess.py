"""Preprocessing of a backbone's inputs, which adapters store."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Literal, get_args

from .errors import ConfigError, DataError, require

if TYPE_CHECKING:
    from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Augment = Literal["none", "crop", "flip", "crop-flip"]
Interpolation = Literal["nearest", "bilinear", "bicubic"]
# what a network is for, as the Hub says it where it has a name
TaskName = Literal[
    "image-classification", "text-classification", "token-classification", "regression", "text-generation"
]
TASKS: tuple[TaskName, ...] = get_args(TaskName)
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
LARGEST = 8192  # pixels of a side, so that no file asks for more memory than such a picture takes


def _check(name: str, value: object, valid: bool, expected: str) -> None:
    if not valid:
        raise ConfigError(f"preprocess.{name} is {value!r:.80}, expected {expected}")


def _check_size(name: str, value: object, least: int, most: int) -> None:
    valid = type(value) is int and least <= value <= most
    _check(name, value, valid, f"an integer from {least} to {most}")


@dataclass(frozen=True, slots=True)
class ImagePreprocess:
    """Resize, centre crop, normalise.

    Attributes:
        size: height and width in pixels of what the backbone gets.
        resize: length in pixels of the shorter side before the crop.
        mean, std: per channel (red, green, blue), for values from 0 to 1.
    """

    size: int = 224
    resize: int = 256
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    kind: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        _check_size("size", self.size, 1, LARGEST)
        _check_size("resize", self.resize, self.size, LARGEST)  # the crop is no larger
        known = get_args(Interpolation)
        _check("interpolation", self.interpolation, self.interpolation in known, f"one of {', '.join(known)}")
        for name, above in (("mean", -math.inf), ("std", 0.0)):
            values: Any = getattr(self, name)
            three = isinstance(values, tuple) and len(values) == 3 and all(type(one) in (int, float) for one in values)
            valid = three and all(above < one < math.inf for one in values)
            _check(name, values, valid, "three finite numbers, of std above 0")

    def transform(self, augment: Augment = "none") -> "Callable[[Any], Tensor]":
        """Return a function from a PIL image of any mode to a float32 tensor (3, size, size).

        Args:
            augment: for training: "crop" moves the image by up to an eighth of its size, "flip" mirrors half of them.
        """
        import torch

        v2 = require("torchvision.transforms.v2", "train", "reading images")
        ops, mode = v2.functional, v2.InterpolationMode(self.interpolation)  # quicker, a small image, than its classes
        drawn: list[Any] = []
        if "crop" in augment:
            drawn.append(v2.RandomCrop(self.size, padding=self.size // 8, padding_mode="edge"))
        if "flip" in augment:
            drawn.append(v2.RandomHorizontalFlip())
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))

        def apply(image: Any) -> "Tensor":
            pixels = ops.pil_to_tensor(image.convert("RGB"))
            pixels = ops.resize(pixels, [self.resize], interpolation=mode, antialias=True)
            if "crop" not in augment:
                pixels = ops.center_crop(pixels, [self.size, self.size])
            for step in drawn:
                pixels = step(pixels)
            scaled: Tensor = ops.to_dtype(pixels, torch.float32, scale=True)
            return scaled.sub(mean).div_(std)

        return apply


@dataclass(frozen=True, slots=True)
class TextPreprocess:
    """Tokenise and truncate to `max_length` tokens; batches are padded to their longest text."""

    max_length: int = 128
    kind: ClassVar[str] = "text"

    def __post_init__(self) -> None:
        _check_size("max_length", self.max_length, 1, 1 << 31)


@dataclass(frozen=True, slots=True)
class ChatPreprocess(TextPreprocess):
    """As `TextPreprocess`, of texts that are put into the tokenizer's chat template, as what a user says."""

    kind: ClassVar[str] = "chat"


Preprocess = ImagePreprocess | TextPreprocess
KINDS: Mapping[str, type[Preprocess]] = {one.kind: one for one in (ImagePreprocess, TextPreprocess, ChatPreprocess)}


def open_image(source: str | os.PathLike[str] | BinaryIO) -> Any:
    """Return an image file as a PIL image in RGB, or raise DataError if it is missing, broken or beyond all sizes."""
    pillow = require("PIL.Image", "train", "reading images")
    try:
        with pillow.open(source) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, TypeError, pillow.DecompressionBombError) as error:
        # Pillow's errors for broken files, by format
        name = repr(os.fspath(source)) if isinstance(source, str | os.PathLike) else "in memory"
        raise DataError(f"cannot read the image {name}: {getattr(error, 'strerror', None) or error}") from None


def preprocess_to_json(preprocess: Preprocess) -> dict[str, Any]:
    """Return the JSON object in an adapter's header."""
    return {"kind": preprocess.kind, **asdict(preprocess)}


def preprocess_from_json(config: Mapping[str, Any]) -> Preprocess:
    """Read the JSON object of `preprocess_to_json`, without unknown keys; ConfigError names an impossible value."""
    cls = KINDS.get(str(config.get("kind")))
    if cls is None:
        raise ConfigError(f"unknown kind of preprocessing {config.get('kind')!r}; known: {', '.join(KINDS)}")
    given: dict[str, Any] = {one.name: config[one.name] for one in fields(cls) if one.name in config}
    for name, value in given.items():
        given[name] = tuple(value) if isinstance(value, list) else value
    return cls(**given)


def collate_text(tokenizer: Any, preprocess: TextPreprocess) -> "Callable[[Sequence[str]], dict[str, Tensor]]":
    """Return a function from texts to the tokenizer's tensors, padded to the longest text of the batch."""
    if tokenizer is None:
        raise DataError("texts need the backbone's tokenizer, and none was found; pass the tokenizer")
    options = {"padding": True, "truncation": True, "max_length": preprocess.max_length, "return_tensors": "pt"}
    return lambda texts: dict(tokenizer(list(texts), **options))
