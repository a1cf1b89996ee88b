"""The CIFAR-10 ResNets of He et al. (https://arxiv.org/abs/1512.03385, section 4.2), with option-A shortcuts."""

import torch
from torch import Tensor, nn
from torch.nn import functional

PREPROCESS = {"size": 32, "resize": 32, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


class Block(nn.Module):
    """Two convolutions and an identity shortcut, subsampled and zero-padded where the size changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return functional.relu(y + shortcut)


class CifarResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels, times a width."""

    def __init__(self, blocks: int, classes: int = 10, width: int = 1):
        super().__init__()
        widths = (16 * width, 16 * width, 32 * width, 64 * width)
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        for stage in (1, 2, 3):
            first = Block(widths[stage - 1], widths[stage], 1 if stage == 1 else 2)
            rest = [Block(widths[stage], widths[stage], 1) for _ in range(blocks - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        for stage in (1, 2, 3):
            x = self.get_submodule(f"layer{stage}")(x)
        logits: Tensor = self.linear(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))
        return logits


def resnet20() -> nn.Module:
    """ResNet-20 for images of 32x32 pixels and ten classes."""
    return CifarResNet(3)


def resnet20_wide() -> nn.Module:
    """ResNet-20 with twice the channels, and so nearly four times the weights."""
    return CifarResNet(3, width=2)


def resnet32() -> nn.Module:
    """ResNet-32 for images of 32x32 pixels and ten classes."""
    return CifarResNet(5)
