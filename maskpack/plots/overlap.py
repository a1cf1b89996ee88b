"""How much several masks of one backbone have in common."""

import math
from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from bitarray.util import count_xor

from ..errors import ConfigError
from ..mask import MaskSet
from .figure import Matrix, new_figure
from .matrix import draw_matrix

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE = 0.55  # inches of a square with a number in it
NUMBERED = 20  # masks; more than that are squares without numbers


def agreement(masks: Mapping[str, MaskSet]) -> tuple[Matrix, Matrix]:
    """Compare masks pair by pair; signs of ternary masks are not looked at.

    Returns:
        Two symmetric (n, n) matrices in the order of `masks`. The first is the share of weights on which two masks
        agree: both keep the weight, or neither does. It is high for any two masks that keep nearly everything. The
        second takes out what chance explains: (agreement - expected) / (1 - expected), where two masks of densities
        d₁ and d₂ in a parameter, drawn independently, are expected to agree on d₁d₂ + (1 - d₁)(1 - d₂) of its weights
        (the kappa of Cohen, 1960, with the chance of each parameter). It is 1 for equal masks, 0 for unrelated ones,
        negative where each removes what the other keeps, and NaN where chance explains all, as where all weights are
        kept.

    Raises:
        ConfigError: if there are fewer than two masks, or they are of other parameters or shapes.
    """
    if len(masks) < 2:
        raise ConfigError(f"an overlap needs at least two masks, got {len(masks)}")
    (first, shapes), *others = ((name, one.shapes) for name, one in masks.items())
    for name, found in others:
        differing = sorted(key for key in shapes.keys() | found.keys() if shapes.get(key) != found.get(key))
        if differing:
            raise ConfigError(
                f"{first} and {name} mask other parameters: {len(differing)} differ, first {differing[0]!r} "
                f"({shapes.get(differing[0], 'absent')} and {found.get(differing[0], 'absent')}); compare masks of one "
                "backbone with the same selection"
            )
    total = sum(math.prod(shape) for shape in shapes.values())
    if not total:
        raise ConfigError(f"the masks of {first} have no weights to compare")
    count = len(masks)
    agreed, expected = np.full((count, count), float(total)), np.zeros((count, count))
    for parameter in shapes:
        bits = [one[parameter].bits for one in masks.values()]
        density = np.array([one.count() / max(len(one), 1) for one in bits])
        expected += len(bits[0]) * (np.outer(density, density) + np.outer(1 - density, 1 - density))
        for i, j in combinations(range(count), 2):
            differ = count_xor(bits[i], bits[j])
            agreed[i, j] -= differ
            agreed[j, i] -= differ
    room = total - expected
    beyond = np.divide(agreed - expected, room, out=np.full_like(room, np.nan), where=room > 1e-9 * total)
    return agreed / total, beyond


def overlap_figure(masks: Mapping[str, MaskSet]) -> "Figure":
    """Draw the two matrices of `agreement` beside each other. Raises as that."""
    shares, beyond = agreement(masks)
    names, count = list(masks), len(masks)
    numbered = count <= NUMBERED
    side = SIDE if numbered else SIDE / 2
    figure = new_figure(2 * (side * count + 2.2), side * count + 2.6)
    panels = (
        (shares, min(float(shares.min()), 0.99), "agreement\n(share of the weights)"),
        (beyond, min(float(np.nan_to_num(beyond).min()), 0.0), "agreement beyond chance\n(0: unrelated, 1: equal)"),
    )
    for axes, (values, low, title) in zip(figure.subplots(1, 2), panels, strict=True):
        texts = [["-" if np.isnan(value) else f"{value:.3f}" for value in row] for row in values]
        image = draw_matrix(axes, values, names, side, (low, 1.0), texts if numbered else None)
        axes.set_title(title, fontsize="medium")
        if not numbered:
            figure.colorbar(image, ax=axes, shrink=0.6)
    return figure
