"""What cannot be drawn, by the words of the error."""

import math
import sys

import pytest
import torch

from maskpack.errors import ConfigError, MissingDependencyError
from maskpack.lab import (
    agreement,
    bytes_figure,
    cluster_figure,
    confusion_figure,
    density_figure,
    label_figure,
    score_figure,
)
from maskpack.mask import MaskSet


@pytest.mark.parametrize(
    "draw",
    [
        lambda: bytes_figure({"a": [(1, 0.5, None)]}),
        lambda: confusion_figure([[1]], ["a"]),
        lambda: density_figure({"": [{"a": 1}]}),
    ],
)
def test_without_matplotlib(draw, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = r"drawing pictures needs the library 'matplotlib', .* install it with: pip install \"maskpack\[lab\]\""
    with pytest.raises(MissingDependencyError, match=words):
        draw()


POINTS, EXPERTS, COUNTS = "the points of a cluster map", "the experts of a cluster map", "the counts of 2 classes"
ROWS = "must be rows of 2 finite numbers each, and they are not; correct them"
ONE = {"mask": MaskSet.from_tensors({"a": torch.ones(2, 3, dtype=torch.bool)})}
EMPTY = MaskSet.from_tensors({"a": torch.ones(0, dtype=torch.bool)})


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda: density_figure({}), "there is no masked parameter to draw; give adapters that have masks"),
        (lambda: density_figure({"a": [{}]}), "there is no masked parameter to draw"),
        (lambda: score_figure({"a": torch.empty(0)}), "there are no scores to draw; give the run of a"),
        (lambda: score_figure({"a": torch.tensor([math.nan])}), "the scores of 'a' are not all finite; the run"),
        (lambda: agreement({}), "an overlap needs at least two masks, got 0"),
        (
            lambda: agreement({"x": ONE["mask"], "y": MaskSet({})}),
            r"x and y mask other parameters: 1 differ, first 'a'; compare masks of one",
        ),
        (lambda: agreement({"x": EMPTY, "y": EMPTY}), "the masks of x have no weights to compare"),
        (lambda: bytes_figure({}), "there is no point to draw; give accuracies by bytes"),
        (lambda: bytes_figure({"a": [(0, 0.5, None)]}), "'a' has the accuracy 0.5 and deviation None at the bytes 0"),
        (lambda: bytes_figure({"a": [(1, 50, None)]}), "expected an accuracy from 0 to 1"),
        (lambda: bytes_figure({"a": [(1, 0.5, -1)]}), "a deviation of 0 or more or None, and bytes above 0"),
        (lambda: bytes_figure({"a": [(1, math.nan, 0)]}), "has the accuracy nan"),
        (lambda: label_figure({"a": [(10, 0.5, 0)]}), "a share of labels is 10; expected 0 to 1"),
        (lambda: cluster_figure([], []), "a cluster map needs an expert for each point; got 0 and 0 experts"),
        (lambda: cluster_figure([[0, 1]], [0, 1]), "got 1 and 2 experts"),
        (lambda: cluster_figure([[0, "x"]], [0]), f"{POINTS} {ROWS}"),
        (lambda: cluster_figure([[0, math.inf]], [0]), f"{POINTS} {ROWS}"),
        (lambda: cluster_figure([[0, 10**400]], [0]), f"{POINTS} {ROWS}"),
        (lambda: cluster_figure([[0, 1], [2]], [0, 0]), f"{POINTS} {ROWS}"),
        (lambda: cluster_figure([[0, 1]], [[0, 1]]), f"{EXPERTS} must be rows of 1 finite numbers"),
        (lambda: cluster_figure([[0, 1]], [-1]), f"{EXPERTS} must be integers from 0, and they are not"),
        (lambda: cluster_figure([[0, 1]], [0.5]), f"{EXPERTS} must be integers from 0, and they are not"),
        (lambda: confusion_figure([], []), "a confusion picture has 1 to 200 classes, got 0"),
        (lambda: confusion_figure([], ["a"] * 201), "a confusion picture has 1 to 200 classes, got 201"),
        (lambda: confusion_figure([[1]], [5]), r"class names must be texts, got \[5\]"),
        (lambda: confusion_figure([[1, 2]], ["a", "b"]), "2 class names need 2 rows of counts of 0 or more, got 1"),
        (lambda: confusion_figure([[1, 2], [3]], ["a", "b"]), f"{COUNTS} {ROWS}"),
        (lambda: confusion_figure([[1, -2], [3, 4]], ["a", "b"]), "need 2 rows of counts of 0 or more"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn(draw, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=words):
        draw()
