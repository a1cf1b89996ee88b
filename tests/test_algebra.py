"""Set algebra on masks: every operation beside a slow one on Python lists, the laws, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskpack.algebra import CHUNK, OPERATIONS, Overlap, combine, overlaps, whole_votes
from maskpack.errors import ConfigError, UnknownNameError
from maskpack.mask import MaskSet, PackedMask

from .helpers_adapter import random_masks

Rows = list[list[bool]]  # one row of bits for each set

SLOW: dict[str, Callable[[list[bool], Any], bool]] = {
    "and": lambda column, _: all(column),
    "or": lambda column, _: any(column),
    "xor": lambda column, _: column.count(True) in (1, 3, 5, 7, 9),
    "not": lambda column, _: not column[0],
    "difference": lambda column, _: column == [True, False],
    "majority": lambda column, _: column.count(True) > column.count(False),
    "k-of-n": lambda column, k: column.count(True) >= k,
    "weighted": lambda column, weights: (
        sum(Fraction(str(w)) for w, kept in zip(weights, column, strict=True) if kept)
        > sum(Fraction(str(w)) for w, kept in zip(weights, column, strict=True) if not kept)
    ),
}
WEIGHTS = st.integers(0, 50) | st.floats(0, 1e6).map(lambda value: round(value, 3)) | st.sampled_from([0.1, 0.2, 0.3])


def masks_of(rows: Rows, name: str = "w", **options: Any) -> list[MaskSet]:
    return [MaskSet.from_tensors({name: torch.tensor(row, dtype=torch.bool)}, **options) for row in rows]


def bits_of(masks: MaskSet, name: str = "w") -> list[bool]:
    return masks[name].tensor().tolist()


def streamed(masks: MaskSet) -> MaskSet:
    return MaskSet.streamed(masks, lambda name: masks[name], masks.shapes)


@st.composite
def rows(draw: st.DrawFn, least: int = 2, most: int = 9) -> Rows:
    count, length = draw(st.integers(least, most)), draw(st.integers(0, 40))
    return [draw(st.lists(st.booleans(), min_size=length, max_size=length)) for _ in range(count)]


def check(how: str, given_rows: Rows, options: dict[str, Any]) -> None:
    masks = masks_of(given_rows)
    expected = [SLOW[how](list(column), next(iter(options.values()), None)) for column in zip(*given_rows, strict=True)]
    found = combine(how, masks, **options)
    assert bits_of(found) == expected
    assert found["w"].kept == sum(expected)
    assert combine(how, [streamed(one) for one in masks], **options) == found


@given(rows=rows(), how=st.sampled_from(["and", "or", "xor", "majority"]))
def test_of_any_number(rows: Rows, how: str) -> None:
    check(how, rows, {})


@given(rows=rows(1, 1))
def test_not(rows: Rows) -> None:
    check("not", rows, {})


@given(rows=rows(2, 2))
def test_difference(rows: Rows) -> None:
    check("difference", rows, {})


@given(data=st.data(), rows=rows())
def test_k_of_n(data: st.DataObject, rows: Rows) -> None:
    check("k-of-n", rows, {"k": data.draw(st.integers(1, len(rows)))})


@given(data=st.data(), rows=rows())
def test_weighted(data: st.DataObject, rows: Rows) -> None:
    weights = data.draw(st.lists(WEIGHTS, min_size=len(rows), max_size=len(rows)).filter(any))
    check("weighted", rows, {"weights": weights})


def test_every_operation_has_a_slow_one() -> None:
    assert set(SLOW) == set(OPERATIONS)


def test_an_even_split_removes_and_weights_are_decimal() -> None:
    two = masks_of([[True, True, False], [True, False, False]])
    assert bits_of(combine("majority", two)) == [True, False, False]
    three = masks_of([[True], [True], [False]])
    assert bits_of(combine("weighted", three, weights=[0.1, 0.2, 0.3])) == [False]
    assert bits_of(combine("weighted", three, weights=[0.1, 0.2, 0.29])) == [True]
    assert bits_of(combine("weighted", three, weights=[0, 0, 7])) == [False]


def test_votes_are_the_smallest_whole_numbers_in_their_ratios() -> None:
    assert whole_votes([4, 6], 2) == [2, 3]
    assert whole_votes([0.5, 0, 0.25], 3) == [2, 0, 1]
    assert whole_votes([1 << 63, (1 << 63) - 1], 2) == [1 << 63, (1 << 63) - 1]  # a sum of 64 binary digits
    with pytest.raises(ConfigError, match=r"2\^64"):
        whole_votes([(1 << 64) - 1, 1], 2)


@given(rows=rows(2, 2))
def test_de_morgan_and_involution(rows: Rows) -> None:
    a, b = masks_of(rows)
    inverted = [combine("not", [one]) for one in (a, b)]
    assert combine("not", [combine("and", [a, b])]) == combine("or", inverted)
    assert combine("not", [combine("or", [a, b])]) == combine("and", inverted)
    assert combine("not", [inverted[0]]) == a
    assert combine("difference", [a, b]) == combine("and", [a, inverted[1]])
    assert combine("xor", [combine("xor", [a, b]), b]) == a


@given(rows=rows(3, 3))
def test_majority_of_three(rows: Rows) -> None:
    a, b, c = masks_of(rows)
    pairs = [combine("and", pair) for pair in ([a, b], [b, c], [a, c])]
    assert combine("majority", [a, b, c]) == combine("or", pairs) == combine("k-of-n", [a, b, c], k=2)
    assert combine("majority", [a, b, c]) == combine("weighted", [a, b, c], weights=[2, 2, 2])


@given(rows=rows(2, 6))
def test_k_of_n_is_monotone_from_or_to_and(rows: Rows) -> None:
    masks = masks_of(rows)
    every = [combine("k-of-n", masks, k=k) for k in range(1, len(masks) + 1)]
    assert every[0] == combine("or", masks)
    assert every[-1] == combine("and", masks)
    for less, more in pairwise(every):
        assert combine("and", [less, more]) == more


@given(data=st.data(), rows=rows(2, 5))
def test_votes_do_not_depend_on_order(data: st.DataObject, rows: Rows) -> None:
    weights = data.draw(st.lists(st.integers(1, 9), min_size=len(rows), max_size=len(rows)))
    order = data.draw(st.permutations(range(len(rows))))
    masks = masks_of(rows)
    found = combine("weighted", masks, weights=weights)
    assert combine("weighted", [masks[i] for i in order], weights=[weights[i] for i in order]) == found


def test_votes_over_a_mask_of_several_chunks() -> None:
    shape = (8 * CHUNK + 13, 3)
    masks = [random_masks({"w": shape}, 0.5, seed) for seed in range(4)]
    summed = torch.stack([one["w"].tensor() for one in masks]).sum(0)
    for k in (1, 2, 4):
        assert torch.equal(combine("k-of-n", masks, k=k)["w"].tensor(), summed >= k)


def test_several_parameters_scalars_and_empty_ones() -> None:
    shapes = {"a": (3, 5), "b": (), "c": (0, 4), "d": (17,)}
    a, b = (random_masks(shapes, 0.5, seed) for seed in (0, 1))
    found = combine("and", [a, b])
    assert found.shapes == shapes
    assert all(torch.equal(found[n].tensor(), a[n].tensor() & b[n].tensor()) for n in shapes)


def test_streamed_sets_are_not_held() -> None:
    asked: list[str] = []
    masks = random_masks({"a": (9,), "b": (9,)}, 0.5)

    def make(name: str) -> PackedMask:
        asked.append(name)
        return masks[name]

    found = combine("and", [MaskSet.streamed(masks, make, masks.shapes), masks])
    assert asked == []
    assert found.shapes == masks.shapes
    assert found["b"] == masks["b"]
    assert asked == ["b"]
    assert found == masks
    assert asked == ["b", "a", "b"]


def test_alpha_is_that_of_the_sets_and_must_be_one() -> None:
    a, b = masks_of([[True, False, True, False], [True, True, False, False]], scale=True)
    found = combine("and", [a, b])
    assert found["w"].alpha == a["w"].alpha
    assert found.density == 0.25
    assert combine("not", [a])["w"].alpha == a["w"].alpha
    other = masks_of([[True, True, True, False]], scale=True)
    with pytest.raises(ConfigError, match=r"masks of 'w' scale the kept weights differently, by the alphas 0\.7.*0\.8"):
        combine("or", [a, *other])
    with pytest.raises(ConfigError, match=r"by the alphas 0\.7\d*, none; masks can be combined where their"):
        combine("or", [a, *masks_of([[True] * 4])])
    unscaled = MaskSet({"v": PackedMask.from_tensor(torch.tensor([True]))})
    with pytest.raises(ConfigError, match=r"masks of 'w' scale the kept weights differently"):
        combine("or", [a, MaskSet({**unscaled})], missing="keep")


def test_op_stays_and_must_be_one() -> None:
    flips = masks_of([[True, False], [True, True]], op="flip")
    assert combine("and", flips)["w"].op == "flip"
    with pytest.raises(ConfigError, match=r"the masks of 'w' have the ops flip and zero; give masks whose bits mean"):
        combine("and", [flips[0], *masks_of([[True, False]])])
    ternary = replace(flips[0]["w"], op="zero", signs=flips[1]["w"].bits)
    with pytest.raises(ConfigError, match=r"the masks of 'w' have signs, as ternary masks do; give .* without"):
        combine("not", [MaskSet({"w": ternary})])
    with pytest.raises(ConfigError, match="have the ops flip and zero"):
        dict(overlaps(flips[0], *masks_of([[True, False]])))


def test_sets_over_different_parameters() -> None:
    a = random_masks({"x": (5,), "y": (4,)}, 0.5)
    b = random_masks({"y": (4,), "z": (3,)}, 0.5, seed=1)
    said = (
        r"the mask sets are over different parameters: 2 of 3 are not in all of them, first 'x', which number 2 of 2 "
        r"lacks; with missing='keep' \(--missing keep\) a set keeps every weight of a parameter that it does not mask"
    )
    with pytest.raises(ConfigError, match=said):
        combine("and", [a, b])
    with pytest.raises(ConfigError, match="2 of 3 are not in all of them, first 'x'"):
        dict(overlaps(a, b))
    joined = combine("and", [a, b], missing="keep")
    assert (joined["x"], joined["z"]) == (a["x"], b["z"])
    assert combine("or", [a, b], missing="keep")["x"].density == 1
    assert combine("difference", [a, b], missing="keep")["x"].density == 0
    found = dict(overlaps(a, b, missing="keep"))
    assert (found["x"].second_only, found["z"].first_only) == (5 - a["x"].kept, 3 - b["z"].kept)
    with pytest.raises(ConfigError, match=r"the masks of 'y' have the shapes \(4,\) and \(2, 2\); give masks of"):
        combine("and", [a, random_masks({"x": (5,), "y": (2, 2)})])


@pytest.mark.parametrize(
    ("how", "count", "options", "said"),
    [
        ("and", 1, {}, r"'and' takes 2 or more mask sets, got 1"),
        ("not", 2, {}, r"'not' takes exactly 1 mask set, got 2"),
        ("difference", 3, {}, r"'difference' takes exactly 2 mask sets, got 3"),
        ("majority", 0, {}, r"'majority' takes 2 or more mask sets, got 0"),
        ("weighted", 2, {}, r"weights go with 'weighted' and with no other operation, got none for 'weighted'"),
        ("and", 2, {"weights": [1, 2]}, r"weights go with 'weighted' and with no other .*, got 1, 2 for 'and'"),
        ("k-of-n", 2, {}, r"k goes with 'k-of-n' and with no other operation, got none for 'k-of-n'"),
        ("majority", 2, {"k": 1}, r"k goes with 'k-of-n' and with no other operation, got 1 for 'majority'"),
        ("k-of-n", 2, {"k": 3}, r"k must be from 1 to 2, the number of mask sets; got 3"),
        ("k-of-n", 2, {"k": 0}, r"k must be from 1 to 2, the number of mask sets; got 0"),
        ("weighted", 2, {"weights": [1]}, r"from 0 for each of the 2 mask sets, not all of them 0; got 1$"),
        ("weighted", 2, {"weights": []}, r"for each of the 2 mask sets, not all of them 0; got none"),
        ("weighted", 2, {"weights": [0, 0.0]}, r"not all of them 0; got 0, 0\.0"),
        ("weighted", 2, {"weights": [1, -1]}, r"a finite weight from 0 .* got 1, -1"),
        ("weighted", 2, {"weights": [1, float("nan")]}, r"a finite weight from 0 .* got 1, nan"),
        ("weighted", 2, {"weights": [float("inf"), 1]}, r"a finite weight from 0 .* got inf, 1"),
        ("weighted", 2, {"weights": [1, 1e-300]}, r"1, 1e-300 are in the ratios of .* a sum of over 2\^64; round"),
        ("and", 2, {"missing": "drop"}, r"missing must be one of error, keep, got 'drop'"),
    ],
)  # fmt: skip
def test_refuses(how: str, count: int, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        combine(how, [random_masks({"w": (3,)})] * count, **options)


def test_refuses_an_unknown_operation() -> None:
    known = "and, difference, k-of-n, majority, not, or, weighted, xor"
    with pytest.raises(UnknownNameError, match=f"unknown operation 'nand'; known: {known}"):
        combine("nand", [random_masks({"w": (3,)})])


@given(rows=rows(2, 2), length=st.integers(0, 5))
def test_overlaps_beside_python_sets(rows: Rows, length: int) -> None:
    extra = [[True] * length, [False] * length]
    names = {"w": rows, "x": extra}
    a, b = (MaskSet.from_tensors({n: torch.tensor(r[i], dtype=torch.bool) for n, r in names.items()}) for i in (0, 1))
    found = dict(overlaps(a, b))
    expected = 0.0
    removed = [{(n, j) for n, r in names.items() for j, kept in enumerate(r[i]) if not kept} for i in (0, 1)]
    kept = [{(n, j) for n, r in names.items() for j, kept in enumerate(r[i]) if kept} for i in (0, 1)]
    for name, each in names.items():
        counts = [one.count(False) for one in each]
        expected += counts[0] * counts[1] / len(each[0]) if each[0] else 0
        assert found[name].weights == len(each[0])
    whole = sum(found.values(), Overlap())
    assert (whole.both, whole.first_only, whole.second_only, whole.neither) == (
        len(kept[0] & kept[1]), len(kept[0] - kept[1]), len(kept[1] - kept[0]), len(removed[0] & removed[1]),
    )  # fmt: skip
    assert whole.hamming == len(kept[0] ^ kept[1])
    assert whole.share == (whole.hamming / whole.weights if whole.weights else 0)
    either = removed[0] | removed[1]
    assert whole.jaccard == (len(removed[0] & removed[1]) / len(either) if either else None)
    assert whole.expected == pytest.approx(expected)
    if either:
        assert whole.chance == pytest.approx(expected / (len(removed[0]) + len(removed[1]) - expected))


def test_chance_is_what_independent_masks_have() -> None:
    masks = [random_masks({"a": (200, 200), "b": (100, 100)}, 0.7, seed) for seed in (0, 1)]
    whole = sum((one for _, one in overlaps(*masks)), Overlap())
    assert whole.chance is not None
    assert whole.jaccard == pytest.approx(whole.chance, rel=0.03)
    assert whole.chance == pytest.approx(0.3**2 / (0.6 - 0.3**2), rel=0.03)


def test_overlaps_of_equal_masks_and_of_other_scales() -> None:
    a, b = masks_of([[True, False, True], [True, True, True]], scale=True)
    same, other = dict(overlaps(a, a))["w"], dict(overlaps(a, b))["w"]
    assert (same.hamming, same.jaccard, same.rescaled) == (0, 1.0, 0)
    assert (other.hamming, other.rescaled) == (1, 1)
    every = dict(overlaps(b, b))["w"]
    assert (every.jaccard, every.chance) == (None, None)
