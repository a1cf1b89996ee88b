"""The demo's backbone: a small convolutional network for images of 8x8 pixels."""

from torch import nn

PREPROCESS = {"size": 8, "resize": 8, "mean": (0.3, 0.3, 0.3), "std": (0.37, 0.37, 0.37)}


def _stage(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def digits_cnn() -> nn.Module:
    """Four convolutions and a linear head for the digits 0 to 4."""
    body = [*_stage(3, 32), *_stage(32, 64), nn.MaxPool2d(2), *_stage(64, 64), *_stage(64, 64)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5))
