"""The benchmarks' arithmetic, on masks of a few thousand weights: that they run at all, and count what they say."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from maskpack.backbone.fingerprint import fingerprint

from .helpers_adapter import base_of, random_masks
from .helpers_adapter import mixed as mixed

for library in ("brotli", "constriction", "lz4", "matplotlib", "snappy"):
    pytest.importorskip(library, reason="needs the extra `bench`")

from benchmarks import codecs, compression  # noqa: E402
from benchmarks.mask_sets import Case, binary_entropy  # noqa: E402

SHAPES = {"a.weight": (64, 32, 3, 3), "b.weight": (40, 90), "c.bias": (17,)}


@pytest.fixture(autouse=True)
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed here: what would be called for two seconds is called once."""
    monkeypatch.setattr(codecs, "seconds", lambda act: (act(), 0.001)[1])


@pytest.fixture
def case() -> Case:
    return Case("small", "trained", random_masks(SHAPES, 0.9), base_of(SHAPES))


def test_sizes_of_a_case(case: Case) -> None:
    assert binary_entropy(0.5) == 1
    assert binary_entropy(0.0) == binary_entropy(1.0) == 0
    assert case.entropy == pytest.approx(case.masks.total * binary_entropy(0.9) / 8, rel=0.03)
    assert case.lora_rank_bytes == 2 * (64 + 32 * 9 + 40 + 90)
    assert [len(one) for one in case.packed] == [64 * 32 * 9 // 8, 450, 3]


def test_every_figure_is_made_and_drawn(case: Case, tmp_path: Path) -> None:
    sizes = compression.Sizes(tmp_path / "sizes.json")
    row = codecs.measure(case, sizes)
    assert set(row["coded"]) >= {"fast", "default", "max", "raw", "zstd"} - set(row["refused"])
    assert row["coded"]["raw"]["bytes"] == 2304 + 450 + 3
    assert row["coded"]["raw"]["lora_rank"] == pytest.approx(2757 / case.lora_rank_bytes)
    assert row["coded"]["default"]["of_general"] == row["coded"]["default"]["bytes"] / row["best_general"]["bytes"]
    assert row["best_general"]["bytes"] == min(size for how in row["general"].values() for size in how.values())
    assert row["constriction"]["of_entropy"] == pytest.approx(1, abs=0.03)
    again = compression.Sizes(tmp_path / "sizes.json")
    assert again.known == sizes.known != {}
    measured = {"small": row, "small-drawn": {**row, "kind": "drawn"}}
    found = codecs.summarized(measured)
    assert found["trained"]["max"]["sum"] == pytest.approx(found["trained"]["max"]["geometric_mean"])
    assert "| small | 22,049 |" in codecs.markdown(measured, found)
    codecs.plot(measured, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.usefixtures("mixed")
def test_a_codec_with_base_is_measured(tmp_path: Path) -> None:
    layers = {"a": torch.nn.Conv2d(32, 64, 3, bias=False), "b": torch.nn.Linear(90, 40, bias=False)}
    model = torch.nn.ModuleDict(layers)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    case = Case("based", "trained", random_masks(shapes), fingerprint(model, id="timm/x"), model)
    coded = codecs.measure(case, compression.Sizes(tmp_path / "sizes.json"))["coded"]
    assert coded["test-mixed"]["with_base"]
    assert coded["test-mixed"]["chosen"] == {"test-mixed": 2}
    assert coded["max"]["bytes"] <= coded["test-mixed"]["bytes"]


def test_range_coder_gives_back_its_bits() -> None:
    bits = np.packbits(np.random.default_rng(0).random(8000) < 0.95, bitorder="little")
    coder = compression.RangeCoder([(bits, 0.95), (np.zeros(9, np.uint8), 0.0)])
    (again,) = coder.decode(coder.encode())
    assert np.array_equal(again, bits)


def test_layouts_hold_what_their_names_say(tmp_path: Path) -> None:
    mask = np.ones(8000, dtype=np.bool_)
    for name, (bits, lay) in compression.LAYOUTS.items():
        assert len(lay(mask)) == 1000 * bits, name
    assert "78.8x" in compression.derivation()
    assert compression.reductions(bytes(1000), compression.Sizes(tmp_path / "x"))["gzip"] > 90


def test_break_even_rank() -> None:
    for density in compression.DENSITIES:
        rank = compression.break_even(4096, density)
        assert math.isclose(2 * rank * 2 * 4096, compression.mask_bytes(4096, density))
    assert compression.break_even(64, 0.5) == 2
