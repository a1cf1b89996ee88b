"""Feature reuse: does a pretrained start still help where images are shuffled block by block? (arXiv 2008.11687)"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.load import load_backbone
from ..data.base import Data
from ..errors import ConfigError
from ..evaluate.rows.base import find_row
from ..preprocess import ImagePreprocess
from ..training.config import TrainConfig
from ..training.log import Report
from .trials import about_run, claim, peak_rate, trained_accuracy

STARTS = ("pretrained", "random")


def block_order(size: int, block: int, seed: int = 0) -> Tensor:
    """Return for each pixel of a shuffled image of size x size pixels which one it shows, (size * size,).

    Squares of block x block pixels are permuted, and keep their inside. One seed gives one permutation.

    Raises:
        ConfigError: if a side of the image is not a multiple of the block.
    """
    if not 1 <= block <= size or size % block:
        raise ConfigError(f"blocks of {block} pixels do not tile an image of {size}; take a side that divides it")
    count = size // block
    places = torch.arange(size * size).reshape(count, block, count, block).permute(0, 2, 1, 3)
    order = torch.randperm(count * count, generator=torch.Generator().manual_seed(seed))
    shuffled = places.reshape(-1, block, block)[order].reshape(count, count, block, block)
    return shuffled.permute(0, 2, 1, 3).reshape(-1)


@contextmanager
def shuffled_inputs(model: nn.Module, block: int, seed: int = 0) -> Iterator[None]:
    """As long as this lasts, a model sees every image, (B, C, H, H), shuffled by `block_order`, in every mode."""

    def shuffled(image: Tensor) -> Tensor:
        order = block_order(image.shape[-1], block, seed).to(image.device)
        return image.flatten(2)[:, :, order].reshape(image.shape)

    def before(_: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if inputs:
            return (shuffled(inputs[0]), *inputs[1:]), named
        return inputs, {**named, "pixel_values": shuffled(named["pixel_values"])}  # of a CLIP-like tower

    hook = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def feature_reuse(
    backbone: Mapping[str, Any],
    data: Data,
    output: str | Path,
    *,
    config: TrainConfig,
    blocks: Sequence[int] = (),
    seeds: Sequence[int] = (0,),
    row: str = "full",
    random_lr: float | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """Train a pretrained and a random start on shuffled images, from whole images to single pixels.

    One permutation for all images of both splits; there is nothing else that differs but the start. What is finished in
    `output` is not done again.

    Args:
        backbone: arguments of `load_backbone`, as {"reference": …}, for the pretrained start.
        blocks: sides in pixels; default: the image's side, halved as long as that is whole, and 1.
        seeds: of heads, orders, and the weights of random starts.
        row: what is trained, a row of `maskpack list rows`.
        config: its `lr` is the peak rate of what is trained; None: the middle one of the row's rates.
        random_lr: the same of random starts; default: the same rate.

    Returns:
        {"size", "rows": {"start", "block", "accuracy": mean, "deviation", "accuracies", "seeds"}, "gains": {"block",
        "gain": mean accuracy of pretrained starts less that of random ones}}.

    Raises:
        ConfigError: if the backbone reads no images, a block does not tile them, or there is no seed.
        StateError: if `output` holds trials with other settings. Others: as the rows raise.
    """
    first = load_backbone(**backbone)
    if not isinstance(first.preprocess, ImagePreprocess):
        raise ConfigError(f"{first.id} reads {first.preprocess.kind}; only images have blocks to shuffle")
    size, folder = first.preprocess.size, Path(output)
    blocks = list(blocks) or _halved(size)
    for block in blocks:
        block_order(size, block)
    if not seeds or len(set(seeds)) < len(seeds) or len(set(blocks)) < len(blocks):
        raise ConfigError(f"blocks and seeds must be given, each once; got {list(blocks)} and {list(seeds)}")
    find_row(row).check(first, config)
    rate = peak_rate(row, config)
    rates = {"pretrained": rate, "random": rate if random_lr is None else random_lr}
    claim(folder, {**about_run(data, config, row), "backbone": first.id, "rates": rates, "size": size})
    rows: list[dict[str, Any]] = []
    for block in sorted(blocks, reverse=True):
        for start in STARTS:
            found = []
            for seed in seeds:
                part = f"{start}-{block}-{seed}"
                random = {"weights": None, "random_weights": seed} if start == "random" else {}
                own = load_backbone(**{**backbone, **random})
                settings = replace(config, seed=seed, lr=rates[start])
                with shuffled_inputs(own.model, block):
                    found.append(trained_accuracy(row, own, data, settings, folder / part, part, report))
            spread = stdev(found) if len(found) > 1 else None
            rows.append({"start": start, "block": block, "accuracy": mean(found), "deviation": spread,
                         "accuracies": found, "seeds": list(seeds)})  # fmt: skip
    means: dict[tuple[Any, Any], float] = {(one["start"], one["block"]): one["accuracy"] for one in rows}
    gains = [
        {"block": block, "gain": means["pretrained", block] - means["random", block]}
        for block in sorted(blocks, reverse=True)
    ]
    return {"size": size, "rows": rows, "gains": gains}


def _halved(size: int) -> list[int]:
    found = [size]
    while found[-1] % 2 == 0:
        found.append(found[-1] // 2)
    return found if found[-1] == 1 else [*found, 1]
