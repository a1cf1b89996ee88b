"""Pictures: what is drawn, read off the figure."""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pytest
import torch

from maskpack.lab import (
    agreement,
    bytes_figure,
    cluster_figure,
    confusion_figure,
    density_figure,
    label_figure,
    overlap_figure,
    score_figure,
)
from maskpack.mask import MaskSet

CURVES = {"LoRA": [(8000, 0.9, 0.01), (1000, 0.8, 0.02), (64_000, 0.92, None)], "mask": [(2000, 0.91, None)]}


def names_beside(axes) -> list[str]:  # type: ignore[no-untyped-def]
    return [text.get_text() for text in axes.get_yticklabels()]


def legend_of(figure) -> list[str]:  # type: ignore[no-untyped-def]
    return [text.get_text() for text in figure.legends[0].get_texts()]


def random_sets(*densities: float, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, MaskSet]:
    generator = torch.Generator().manual_seed(0)
    made = [{k: torch.rand(v, generator=generator) < one for k, v in shapes.items()} for one in densities]
    return {f"mask {at}": MaskSet.from_tensors(masks) for at, masks in enumerate(made)}


# densities
def test_density_of_one_adapter() -> None:
    figure = density_figure({"adapters": [{"l.10.weight": 0.25, "l.9.weight": 0.75}]})
    [axes] = figure.axes
    assert axes.get_xlabel() == "density (share of weights kept)"
    assert names_beside(axes) == ["l.9", "l.10"]
    assert axes.get_ylim() == (1.5, -0.5), "the first layer is on top"
    assert axes.lines[0].get_xydata().tolist() == [[0.75, 0], [0.25, 1]]
    assert not figure.legends


def test_density_of_two_groups() -> None:
    """Mean and sample deviation; a parameter that some adapters do not mask counts where it is masked."""
    many = [{"a": 0.2, "b": 0.5}, {"a": 0.4, "b": 0.5}, {"a": 0.9}]
    figure = density_figure({"labels": many, "none": [{"b": 0.7, "c.bias": 0.1}]})
    [axes] = figure.axes
    assert names_beside(axes) == ["a", "b", "c.bias"]
    assert legend_of(figure) == ["labels (3: mean ± deviation)", "none"]
    dots, other = (container.lines[0].get_xdata() for container in axes.containers)
    assert dots == pytest.approx([0.5, 0.5])
    assert other.tolist() == [0.7, 0.1]
    [bars] = axes.containers[0].lines[2]
    (low, _), (high, _) = bars.get_segments()[0]
    assert (low, high) == pytest.approx((0.5 - np.std([0.2, 0.4, 0.9], ddof=1), 0.5 + np.std([0.2, 0.4, 0.9], ddof=1)))
    heights = [container.lines[0].get_ydata() for container in axes.containers]
    assert heights[0].tolist() == [-0.125, 0.875]
    assert heights[1].tolist() == [1.125, 2.125]


def test_no_density_is_above_one() -> None:
    for densities in ((1.0, 1.0), (1.0, 0.9)):
        [axes] = density_figure({"a": [{"x": one} for one in densities]}).axes
        assert 1 < axes.get_xlim()[1] < 1.01


def test_names_of_many_layers_do_not_touch() -> None:
    for count, shown in ((60, 60), (400, 200)):
        figure = density_figure({"x": [{f"encoder.layers.{n}.weight": 0.5 for n in range(count)}]})
        [axes] = figure.axes
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in axes.get_yticklabels()]
        assert len(boxes) == shown
        assert all(above.y0 >= below.y1 for above, below in pairwise(boxes))
        assert all(box.x0 >= 0 for box in boxes)
        assert len(axes.lines[0].get_xdata()) == count


# scores
def test_scores() -> None:
    scores = {"l.10.weight": torch.linspace(-1, 3, 4000).reshape(40, 100), "l.2.weight": torch.ones(1000)}
    above, below, bar = score_figure(scores, 0.5).axes
    counts = above.patches[0].get_data().values
    assert counts.sum() == 5000
    assert counts.max() >= 1000, "all the ones are in one bin"
    assert above.get_yscale() == "log"
    assert above.get_ylabel() == "weights"
    assert names_beside(below) == ["l.2", "l.10"]
    shares = below.images[0].get_array()
    assert shares.shape == (2, 80)
    assert shares[0].max() == 1
    assert shares[1].sum() == pytest.approx(1)
    assert below.get_xlabel().startswith("score ")
    assert bar.get_ylabel() == "share of the layer's scores"
    assert [line.get_xdata() for line in (*above.lines, *below.lines)] == [[0.5, 0.5]] * 2
    assert [text.get_text() for text in above.get_legend().get_texts()] == ["threshold 0.5"]


def test_scores_far_out_count_to_the_outermost_bins() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    values[:5] = 1e6
    above, below, _ = score_figure({"w": values}).axes
    data = above.patches[0].get_data()
    assert data.values.sum() == 10_000
    assert data.values[-1] >= 5
    assert data.edges[-1] < 10
    assert not above.lines
    assert below.get_xlim() == pytest.approx((data.edges[0], data.edges[-1]))


# overlaps
def test_agreement_is_what_it_is_said_to_be() -> None:
    """Against a slow reference, weight by weight."""
    shapes = {"a": (30, 7), "b": (11,), "empty": (0, 4)}
    masks = random_sets(0.9, 0.5, 0.2, shapes=shapes)
    shares, beyond = agreement(masks)
    for i, one in enumerate(masks.values()):
        for j, other in enumerate(masks.values()):
            same = expected = total = 0.0
            for name in shapes:
                x, y = one[name].tensor().flatten().tolist(), other[name].tensor().flatten().tolist()
                total += len(x)
                same += sum(p == q for p, q in zip(x, y, strict=True))
                expected += sum((p == q) for p in x for q in y) / max(len(x), 1)
            assert shares[i, j] == pytest.approx(same / total)
            assert beyond[i, j] == pytest.approx((same - expected) / (total - expected))


def test_chance_is_taken_out_of_the_overlap() -> None:
    """Unrelated masks agree on much if they are dense, and on nothing beyond chance."""
    masks = random_sets(0.95, 0.95, shapes={"a": (300, 300), "b": (100, 100)})
    masks["opposite"] = MaskSet.from_tensors({name: ~mask.tensor() for name, mask in masks["mask 0"].items()})
    shares, beyond = agreement(masks)
    assert shares[0, 1] == pytest.approx(0.905, abs=0.01)
    assert beyond[0, 1] == pytest.approx(0, abs=0.02)
    assert np.diag(shares).tolist() == [1, 1, 1]
    assert np.diag(beyond) == pytest.approx([1, 1, 1])
    assert shares[0, 2] == 0
    assert beyond[0, 2] < -0.1


def test_overlap_picture() -> None:
    left, right = overlap_figure(random_sets(0.9, 0.8, shapes={"a": (40, 50)})).axes
    assert left.get_title() == "agreement\n(share of the weights)"
    assert right.get_title() == "agreement beyond chance\n(0: unrelated, 1: equal)"
    for axes in (left, right):
        assert names_beside(axes) == ["mask 0", "mask 1"] == [text.get_text() for text in axes.get_xticklabels()]
        written = [text.get_text() for text in axes.texts]
        assert written[0] == written[3] == "1.000"
        assert float(written[1]) == pytest.approx(axes.images[0].get_array()[0, 1], abs=5e-4)


def test_overlap_of_many_masks_has_no_numbers() -> None:
    figure = overlap_figure(random_sets(*[0.5] * 21, shapes={"a": (40, 50)}))
    assert len(figure.axes) == 4, "two matrices, each with its scale"
    assert not any(axes.texts for axes in figure.axes)


def test_masks_that_keep_everything_have_no_overlap_beyond_chance() -> None:
    masks = random_sets(2, 2, shapes={"a": (8, 8)})
    shares, beyond = agreement(masks)
    assert (shares == 1).all()
    assert np.isnan(beyond).all()
    assert [text.get_text() for text in overlap_figure(masks).axes[1].texts] == ["-"] * 4


# accuracies
def test_bytes() -> None:
    figure = bytes_figure(CURVES)
    [axes] = figure.axes
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "bytes stored beside the backbone"
    assert axes.get_ylabel() == "accuracy (mean ± deviation)"
    assert legend_of(figure) == ["LoRA", "mask"]
    lora, mask = axes.containers
    assert lora.lines[0].get_xydata().tolist() == [[1000, 0.8], [8000, 0.9], [64_000, 0.92]]
    [bars] = lora.lines[2]
    assert bars.get_segments()[0][:, 1] == pytest.approx([0.78, 0.82])
    assert mask.lines[0].get_xydata().tolist() == [[2000, 0.91]]
    assert mask.lines[2] == ()
    figure.draw_without_rendering()
    assert {"1 kB", "10 kB", "50 kB"} <= {text.get_text() for text in axes.get_xticklabels()}


def test_bytes_of_one_size_are_on_a_plain_axis() -> None:
    figure = bytes_figure({"a": [(300_000, 0.8, None)], "b": [(420_000, 0.9, None)]})
    figure.draw_without_rendering()
    [axes] = figure.axes
    assert axes.get_xscale() == "linear"
    assert axes.get_ylabel() == "accuracy"
    assert "400 kB" in {text.get_text() for text in axes.get_xticklabels()}


def test_no_deviation_makes_accuracies_above_one() -> None:
    [axes] = bytes_figure({"a": [(100, 0.98, 0.05), (300, 1.0, 0.02)]}).axes
    assert 1 < axes.get_ylim()[1] < 1.01
    [axes] = bytes_figure({"a": [(100, 0.9, 0.05)]}).axes
    assert axes.get_ylim()[1] < 1


def test_few_labels() -> None:
    shares = {"probe": [(1.0, 0.9, 0.01), (0.01, 0.4, 0.1)], "mask": [(0.04, 0.5, 0.1), (0.1, 0.6, 0.1)]}
    [axes] = label_figure(shares).axes
    assert axes.get_xlabel() == "share of the training labels"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1 %", "4 %", "10 %", "100 %"]
    assert axes.containers[0].lines[0].get_xydata().tolist() == [[0.01, 0.4], [1, 0.9]]


# clusters and confusions
def test_clusters() -> None:
    figure = cluster_figure([[0, 1], [2, 3], [4, 5]], [1, 0, 1])
    [axes] = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("first principal component", "second principal component")
    assert legend_of(figure) == ["0 (1)", "1 (2)"]
    assert figure.legends[0].get_title().get_text() == "expert (samples)"
    assert [dots.get_offsets().tolist() for dots in axes.collections] == [[[2, 3]], [[0, 1], [4, 5]]]


def test_confusion() -> None:
    axes, bar = confusion_figure([[3, 1, 0], [0, 0, 0], [0, 5, 5]], ["cat", "dog", "cow"]).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert bar.get_ylabel() == "share of the true class"
    assert names_beside(axes) == ["cat", "dog", "cow"]
    assert axes.images[0].get_array().tolist() == [[0.75, 0.25, 0], [0, 0, 0], [0, 0.5, 0.5]]
    assert [text.get_text() for text in axes.texts] == ["3", "1", "", "", "", "", "", "5", "5"]


def test_confusion_of_a_hundred_classes_is_legible() -> None:
    figure = confusion_figure(np.eye(100).tolist(), [f"class number {n}" for n in range(100)])
    axes = figure.axes[0]
    figure.draw_without_rendering()
    beside, below = (
        [t.get_window_extent() for t in labels] for labels in (axes.get_yticklabels(), axes.get_xticklabels())
    )
    assert all(above.y0 >= one.y1 for above, one in pairwise(beside))
    assert all(one.x1 <= right.x0 for one, right in pairwise(below))
    assert axes.get_yticklabels()[0].get_fontsize() >= 6
    assert not axes.texts
