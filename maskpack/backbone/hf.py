"""Models of transformers: which class loads one, and what its image processor states."""

from collections.abc import Mapping
from typing import Any

import torch

from ..preprocess import IMAGENET_MEAN, IMAGENET_STD, ImagePreprocess, Interpolation

# CLIP-like models by type: the vision tower whose output has the image's embedding in the space of the texts'
TOWERS = {"clip": "CLIPVisionModelWithProjection", "siglip": "SiglipVisionModel"}
RESAMPLING: dict[int, Interpolation] = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def tower_name(config: Any) -> str | None:
    """Return the class of a CLIP-like model's vision tower, or None for all other models."""
    return TOWERS.get(config.model_type.removesuffix("_vision_model"))


def is_vision(transformers: Any, config: Any) -> bool:
    """Tell whether a model takes images."""
    known = transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    return tower_name(config) is not None or config.model_type in known


def load_model(transformers: Any, config: Any, repo: str, pretrained: bool, options: Mapping[str, Any]) -> Any:
    """Return a CLIP-like vision tower, an image classifier, or an encoder, with its weights or with random ones."""
    auto = transformers.AutoModelForImageClassification if is_vision(transformers, config) else transformers.AutoModel
    tower = tower_name(config)
    if pretrained:
        # float32 whatever the file holds: the scores learn from full-precision products
        return (getattr(transformers, tower) if tower else auto).from_pretrained(repo, dtype=torch.float32, **options)
    if tower:
        return getattr(transformers, tower)(getattr(config, "vision_config", config))
    return auto.from_config(config)


def stated_preprocess(processor: Any, image_size: int | None) -> ImagePreprocess:
    """Return what an image processor states; `image_size` in pixels goes before its sizes."""
    resize = image_size or processor.size.get("shortest_edge") or processor.size["height"]
    crop = processor.crop_size["height"] if not image_size and getattr(processor, "do_center_crop", False) else resize
    mean, std = tuple(processor.image_mean or IMAGENET_MEAN), tuple(processor.image_std or IMAGENET_STD)
    return ImagePreprocess(crop, max(resize, crop), RESAMPLING.get(int(processor.resample), "bilinear"), mean, std)
