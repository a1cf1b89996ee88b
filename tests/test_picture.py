"""The picture of densities: a PNG that others can read, with bars as high as the densities."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitarray import bitarray
from PIL import Image

from maskpack import MaskSet, inspect_adapter, save_adapter
from maskpack.adapter.card import ABOVE, BELOW, HEIGHT, LEFT, density_picture, parameter_densities
from maskpack.mask import PackedMask

from .helpers_adapter import base_of

BLUE, PALE, ORANGE, WHITE = (0x4C, 0x78, 0xA8), (0x6F, 0x95, 0xBF), (0xE0, 0x7B, 0x39), (255, 255, 255)
PANEL = ABOVE + HEIGHT + BELOW


def described(*sets: list[float]) -> dict[str, Any]:
    rows = [[{"name": f"p{i}", "density": density} for i, density in enumerate(one)] for one in sets]
    return {"sets": {f"s{i}": {"payloads": one} for i, one in enumerate(rows)}}


def pixels(data: bytes) -> "np.ndarray[Any, Any]":
    image = Image.open(io.BytesIO(data))
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB"))


def is_colour(image: "np.ndarray[Any, Any]", *colours: tuple[int, int, int]) -> "np.ndarray[Any, Any]":
    return np.any([np.all(image == colour, axis=-1) for colour in colours], axis=0)


def heights(image: "np.ndarray[Any, Any]") -> list[int]:
    """The height of each bar from left to right, the axis' two lines included."""
    inside = is_colour(image, BLUE, PALE, ORANGE)[:, LEFT:].sum(axis=0)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], inside > 0, [0]])))
    return [int(inside[start]) for start in edges[::2]]


def test_bars_are_as_high_as_the_densities() -> None:
    image = pixels(density_picture(described([0.5, 1.0, 0.25, 0.75])))
    assert image.shape[0] == PANEL
    assert heights(image) == [HEIGHT // 2, HEIGHT, HEIGHT // 4, HEIGHT * 3 // 4]
    orange = is_colour(image, ORANGE)
    assert np.flatnonzero(orange.any(axis=0)).min() > LEFT + 30, "the first bar is blue"
    assert sorted({int(n) for n in orange.sum(axis=0) if n}) == [HEIGHT // 4, HEIGHT]


@pytest.mark.parametrize("count", [1, 2, 7, 19, 53, 300, 1120])
def test_every_parameter_has_a_bar(count: int) -> None:
    densities = [0.5 + 0.25 * (i % 2) for i in range(count)]
    image = pixels(density_picture(described(densities)))
    assert image.shape[0] <= 300
    assert image.shape[1] <= 1200
    bars = is_colour(image, BLUE, PALE, ORANGE)[ABOVE + HEIGHT * 3 // 8, LEFT:]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], bars, [0]]).astype(int)))
    assert len(edges[::2]) == count // 2, "every second one is so high"
    assert is_colour(image, WHITE)[:ABOVE].mean() > 0.9


def test_more_parameters_than_pixels_share_bars() -> None:
    image = pixels(density_picture(described([0.25, 0.75] * 3000)))
    assert image.shape[1] <= 1200
    assert image.shape[0] <= 300
    filled = is_colour(image, BLUE, PALE, ORANGE)[:, LEFT:].sum(axis=0)
    assert filled[:1120].min() >= HEIGHT // 4
    assert abs(filled[:1120].mean() - HEIGHT / 2) < HEIGHT / 40


def test_equal_densities_have_one_colour() -> None:
    image = pixels(density_picture(described([0.5, 0.5, 0.5])))
    assert not is_colour(image, ORANGE).any()
    assert heights(image) == [HEIGHT // 2] * 3


def test_nothing_kept_is_no_bar() -> None:
    assert heights(pixels(density_picture(described([0.0, 1.0])))) == [HEIGHT]


def test_sets_stand_one_below_the_other() -> None:
    one, two = [0.5, 1.0], [1.0, 0.25, 0.75]
    image = pixels(density_picture(described(one, two)))
    assert heights(image[:PANEL]) == [HEIGHT // 2, HEIGHT]
    assert heights(image[PANEL:]) == [HEIGHT, HEIGHT // 4, HEIGHT * 3 // 4]
    assert pixels(density_picture(described(*[one] * 7))).shape[0] == 4 * PANEL


def test_digits_are_told_apart() -> None:
    image = pixels(density_picture(described([0.5] * 28)))
    labels = [
        ~is_colour(image[y - 6 : y + 6, : LEFT - 4], WHITE) for y in range(ABOVE, ABOVE + HEIGHT + 1, HEIGHT // 4)
    ]
    assert all(label.any() for label in labels)
    assert len({label.tobytes() for label in labels}) == 5
    numbers = ~is_colour(image[ABOVE + HEIGHT + 8 :, LEFT:], WHITE)
    assert numbers.any()


def test_same_description_same_bytes() -> None:
    assert density_picture(described([0.3, 0.9])) == density_picture(described([0.3, 0.9]))
    assert density_picture(described([0.3, 0.9])) != density_picture(described([0.9, 0.3]))


def test_ternary_masks_have_one_bar_each(tmp_path: Path) -> None:
    ternary = PackedMask(bitarray("1110", endian="little"), (4,), signs=bitarray("1100", endian="little"))
    masks = {"a": ternary, "b": PackedMask.from_tensor(torch.tensor([True, False]))}
    save_adapter(tmp_path / "x.safetensors", MaskSet(masks), base_of(masks))
    what = inspect_adapter(tmp_path / "x.safetensors")
    assert [row["name"] for row in what["sets"]["default"]["payloads"]] == ["a", "a", "b"]
    assert parameter_densities(what["sets"]["default"]) == [("a", 0.75), ("b", 0.5)]
    assert heights(pixels(density_picture(what))) == [HEIGHT * 3 // 4, HEIGHT // 2]
