"""Preprocessing: what a backbone expects of its inputs, and what an adapter therefore carries."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Literal

from .errors import ConfigError, DataError, require

if TYPE_CHECKING:
    from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Augment = Literal["none", "crop", "flip", "crop-flip"]
AUGMENTS: tuple[Augment, ...] = ("none", "crop", "flip", "crop-flip")
Interpolation = Literal["nearest", "bilinear", "bicubic"]
INTERPOLATIONS: tuple[Interpolation, ...] = ("nearest", "bilinear", "bicubic")
LARGEST = 8192  # pixels of a side: a file must not ask for more memory than a picture of that size takes


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
        for name in ("size", "resize"):
            _check_integer(name, getattr(self, name), LARGEST)
        if self.resize < self.size:
            raise _refused("resize", self.resize, f"at least the size, {self.size}")
        if self.interpolation not in INTERPOLATIONS:
            raise _refused("interpolation", self.interpolation, f"one of {', '.join(INTERPOLATIONS)}")
        for name, lowest in (("mean", -math.inf), ("std", 0.0)):
            values = getattr(self, name)
            of_type = isinstance(values, tuple) and all(type(one) in (int, float) for one in values)
            if not of_type or len(values) != 3 or not all(lowest < one < math.inf for one in values):
                raise _refused(name, values, "three finite numbers, of std above 0")

    def transform(self, augment: Augment = "none") -> "Callable[[Any], Tensor]":
        """Return a function from a PIL image of any mode to a float32 tensor (3, size, size).

        Args:
            augment: for training: "crop" moves the image by up to an eighth of its size, "flip" mirrors half of them.

        Raises:
            MissingDependencyError: if torchvision is not installed.
        """
        import torch

        v2 = require("torchvision.transforms.v2", "train", "reading images")
        mode = v2.InterpolationMode(self.interpolation)
        crop = (
            [v2.RandomCrop(self.size, padding=self.size // 8, padding_mode="edge")]
            if "crop" in augment
            else [v2.CenterCrop(self.size)]
        )
        steps = [v2.Resize(self.resize, interpolation=mode, antialias=True), *crop]
        if "flip" in augment:
            steps.append(v2.RandomHorizontalFlip())
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)]
        pipeline = v2.Compose([v2.ToImage(), *steps])

        def apply(image: Any) -> "Tensor":
            return torch.Tensor.as_subclass(pipeline(image.convert("RGB")), torch.Tensor)

        return apply


@dataclass(frozen=True, slots=True)
class TextPreprocess:
    """Tokenise, truncate to `max_length` tokens; batches are padded to their longest text."""

    max_length: int = 128
    kind: ClassVar[str] = "text"

    def __post_init__(self) -> None:
        _check_integer("max_length", self.max_length, 1 << 31)


Preprocess = ImagePreprocess | TextPreprocess
KINDS: Mapping[str, type[ImagePreprocess] | type[TextPreprocess]] = {"image": ImagePreprocess, "text": TextPreprocess}


def _check_integer(name: str, value: object, largest: int) -> None:
    if type(value) is not int or not 1 <= value <= largest:
        raise _refused(name, value, f"an integer from 1 to {largest}")


def _refused(name: str, value: object, expected: str) -> ConfigError:
    return ConfigError(f"preprocess.{name} is {value!r:.80}, expected {expected}; give such a value")


def open_image(source: str | os.PathLike[str] | BinaryIO) -> Any:
    """Open an image file of any mode with Pillow; return it in RGB.

    Raises:
        DataError: if it is missing, cannot be decoded, or is so large that it must be an attack.
    """
    pillow = require("PIL.Image", "train", "reading images")
    try:
        with pillow.open(source) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, TypeError, pillow.DecompressionBombError) as error:
        # what Pillow raises for broken files, by format
        name = repr(os.fspath(source)) if isinstance(source, str | os.PathLike) else "in memory"
        raise DataError(f"cannot read the image {name}: {getattr(error, 'strerror', None) or error}") from None


def preprocess_to_json(preprocess: Preprocess) -> dict[str, Any]:
    """Return the JSON object that an adapter's header keeps."""
    return {"kind": preprocess.kind, **asdict(preprocess)}


def preprocess_from_json(config: Mapping[str, Any]) -> Preprocess:
    """Read what `preprocess_to_json` wrote; unknown keys are ignored.

    Raises:
        ConfigError: if the kind is unknown, or a value cannot be; the message names it.
    """
    cls = KINDS.get(str(config.get("kind")))
    if cls is None:
        raise ConfigError(f"unknown kind of preprocessing {config.get('kind')!r}; known: {', '.join(KINDS)}")
    values: dict[str, Any] = {}
    for field in fields(cls):
        if field.name in config:
            value = config[field.name]
            values[field.name] = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
    return cls(**values)


def collate_text(tokenizer: Any, preprocess: TextPreprocess) -> "Callable[[Sequence[str]], dict[str, Tensor]]":
    """Return a function from texts to the tokenizer's tensors, padded to the longest text of the batch."""
    if tokenizer is None:
        raise DataError("texts need the backbone's tokenizer, and none was found; pass the tokenizer")

    def apply(texts: Sequence[str]) -> "dict[str, Tensor]":
        return dict(
            tokenizer(list(texts), padding=True, truncation=True, max_length=preprocess.max_length, return_tensors="pt")
        )

    return apply
