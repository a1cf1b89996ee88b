"""docs/reader.py, which was written from docs/format.md alone: it reads what maskpack wrote, to the same masks."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maskpack.adapter.header import DICTIONARY
from maskpack.adapter.read import read_adapter
from maskpack.adapter.write import save_adapter
from maskpack.codecs.base import CODECS
from maskpack.mask import MaskSet
from maskpack.safetensors_io import write_tensors

from .fuzz.damage import File
from .helpers_adapter import base_of, with_header, write

READER = Path(__file__).parent.parent / "docs" / "reader.py"
GOLDEN = sorted((Path(__file__).parent / "golden").glob("v*/*.safetensors"))
NAMED = ["raw", "zstd", "gap", "nm", "logit", "logit-base"]
SHAPES = {"linear.weight": (300, 200), "conv.weight": (16, 8, 3, 3), "bias": (97,), "wide.weight": (2, 700)}


@pytest.fixture(scope="module")
def reader() -> Any:
    spec = importlib.util.spec_from_file_location("second_reader", READER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def base_beside(path: Path) -> Path:
    return path.parent / "base" / f"{'patch' if path.stem == 'patch' else 'weights'}.safetensors"


def hexed(masks: dict[Any, Any]) -> dict[Any, str]:
    return {key: np.packbits(mask.ravel(), bitorder="little").tobytes().hex() for key, mask in masks.items()}


def test_is_one_page_and_needs_no_torch() -> None:
    text = READER.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 235
    assert max(map(len, text.splitlines())) <= 120
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in found if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in found if isinstance(node, ast.ImportFrom)}
    libraries = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert libraries == {
        "blake3",
        "numpy",
        "safetensors",
        "zstandard",
    }


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_reads_what_releases_wrote(path: Path, reader: Any) -> None:
    expected = json.loads(path.with_suffix(".json").read_text())["sets"]
    needs_base = bool(read_adapter(path).verify()["needs_base"])
    found = reader.read(path, base_beside(path) if needs_base else None)
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        wanted = {(key, op): bits for key, mask in one["masks"].items() for op, bits in mask["payloads"]}
        assert hexed(found[name]) == wanted
        assert all(list(mask.shape) == one["masks"][key]["shape"] for (key, _), mask in found[name].items())


def test_reads_the_values_of_a_patch(reader: Any) -> None:
    path = next(path for path in GOLDEN if path.stem == "patch")
    expected = json.loads(path.with_suffix(".json").read_text())["sets"]["default"]["tensors"]
    found = reader.dense(path, base_beside(path))
    assert len(expected) == 4
    assert {name.removeprefix("default/"): one.tolist() for name, one in found.items()} == {
        name: values for name, (_, values) in expected.items()
    }
    header, _ = reader.opened(path)
    stored = [dtype for dtype, *_ in header["tensors"].values()]
    assert stored.count("U8") == 3


def test_golden_files_have_every_codec_of_the_page() -> None:
    assert {path.stem for path in GOLDEN} >= set(NAMED)


def uneven(seed: int, halves: bool) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Three sets that resemble each other, with more zeros in some rows and columns and by sign; and base weights."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    sets: dict[str, dict[str, torch.Tensor]] = {"a": {}, "b": {}, "c": {}}
    weights = {}
    for name, shape in SHAPES.items():
        weight = torch.randn(shape, generator=generator)
        weight.view(-1)[::17], weight.view(-1)[5::31] = 0.0, -0.0
        weight.view(-1)[:3] = torch.tensor([1.0, torch.inf, -torch.inf])
        weight.view(-1).view(torch.int32)[3:6] = torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF], dtype=torch.int32)
        weights[name] = weight.bfloat16() if halves else weight
        matrix = weight.reshape(shape[0] if len(shape) > 1 else 1, -1)
        rows, columns = matrix.shape
        rate = (0.02 + 0.3 * uniform(rows, 1) ** 3 * uniform(1, columns)) * torch.where(matrix.abs() < 0.5, 2, 0.5)
        zeros = uniform(rows, columns) < rate * (1 + 0.9 * matrix.sign() * (uniform(rows, 1) - 0.5).sign())
        sets["a"][name] = ~zeros.reshape(shape)
        sets["b"][name] = (~zeros ^ (uniform(rows, columns) < 0.02)).reshape(shape)
        sets["c"][name] = (zeros ^ (uniform(rows, columns) < 0.2 * rate)).reshape(shape)
    if seed == 2:  # N:M
        sets = {"a": {"linear.weight": torch.tensor([1, 0, 0, 1]).bool().repeat(300, 50)}}
        sets["a"]["linear.weight"][:, 2::4] = uniform(300, 50) < 0.5
        sets["a"]["linear.weight"][:, 3::4] = ~sets["a"]["linear.weight"][:, 2::4]
    return sets, weights


@pytest.mark.parametrize("halves", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("codec", [*NAMED, None])
def test_reads_larger_masks(codec: str | None, halves: bool, reader: Any, tmp_path: Path) -> None:
    assert set(NAMED) <= {cls.id for cls in CODECS.all()}
    sets, weights = uneven(2 if codec == "nm" else 1, halves)
    weights = {name: weights[name] for name in sets["a"]}
    path, base = tmp_path / "adapter.safetensors", tmp_path / "base.safetensors"
    write_tensors(base, weights, {"format": "pt"})
    parts = {name: MaskSet.from_tensors(masks) for name, masks in sets.items()}
    save_adapter(path, parts, base_of(weights, weights=weights), codec=codec, weights=weights, profile="max")
    adapter = read_adapter(path)
    needs_base = bool(adapter.verify()["needs_base"])
    found = reader.read(path, base if needs_base else None)
    for name, masks in sets.items():
        decoded = adapter.parts(name, weights if needs_base else None).masks
        for key, mask in masks.items():
            assert np.array_equal(found[name][key, "zero"], mask.numpy())
            assert np.array_equal(found[name][key, "zero"], decoded[key].tensor().numpy())


def test_low_rank_and_references_are_among_them(tmp_path: Path) -> None:
    sets, weights = uneven(1, False)
    path = tmp_path / "adapter.safetensors"
    parts = {name: MaskSet.from_tensors(masks) for name, masks in sets.items()}
    save_adapter(path, parts, base_of(weights, weights=weights), codec="logit-base", weights=weights, profile="max")
    file = File.of(path.read_bytes())
    firsts, referenced = set(), 0
    for name, one in file.inner["sets"].items():
        at = 0
        for coding, size in zip(one["coding"], one["size"], strict=True):
            firsts.add(file.data[f"{name}/payloads"][at] >> 1)
            referenced += "reference" in one["codings"][coding]
            at += size
    assert max(firsts) > 0, firsts
    assert referenced


def test_says_what_does_not_agree(reader: Any, tmp_path: Path) -> None:
    data = next(path for path in GOLDEN if path.stem == "raw").read_bytes()
    with pytest.raises(ValueError, match="its mask_id does not agree"):
        reader.read(write(tmp_path, with_header(data, lambda header: header.update(mask_id="0" * 64))))
    with pytest.raises(ValueError, match="is damaged: its digest does not agree"):
        reader.read(write(tmp_path, data[:-1] + bytes([data[-1] ^ 1])))


def test_the_dictionary_is_that_of_the_page(reader: Any) -> None:
    page = READER.with_name("format.md").read_text(encoding="utf-8")
    lines = page.partition("<!-- dictionary -->\n```text\n")[2].partition("\n```")[0]
    assert lines.replace("\n", "").encode() == DICTIONARY
    assert len(DICTIONARY) > 1000


def test_prints() -> None:
    path = next(path for path in GOLDEN if path.stem == "logit-base")
    words = [sys.executable, str(READER), str(path), str(base_beside(path))]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert "ternary vector flip [7] 4 0.5714" in lines
    assert lines[-1] == "digest and mask_id agree"
