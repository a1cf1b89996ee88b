"""The pages of benchmarks whose measuring takes hours: tables and pictures from results of a made-up run."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="needs the extra `lab`")

from benchmarks import method_pages, methods, runtime_pages
from benchmarks.runtime_pages import LOADING, SWITCHING


def page(folder: Path, *marks: str) -> Path:
    path = folder / "page.md"
    path.write_text("".join(f"<!-- begin: {mark} -->\nold\n<!-- end: {mark} -->\n" for mark in marks))
    return path


def line(accuracy: float, masks: int, **more: Any) -> dict[str, Any]:
    sizes = {"head": 100, "masks": masks, "index": 50}
    row = {"accuracy": accuracy, "deviation": 0.01, "bytes": masks + 150, "sizes": sizes, "rate": 0.02}
    return {**row, "densities": [0.5, 0.7], **more}


def test_methods(tmp_path: Path) -> None:
    marks = [f"{method_pages.MARK}: {name}" for name in ("methods", "selective", "bytes")]
    written = page(tmp_path, *marks)
    method_pages.write_pages(tmp_path, written)
    assert written.read_text().count("othing is finished yet") == 4
    found = {
        "sketch-naive": line(0.4, 900, rate=None),
        "minilm-nm": line(0.8, 700),
        "selective-random-0.1": line(0.7, 300),
        "selective-all": line(0.9, 1000),
        "bytes-mask": line(0.93, 2000),
        "bytes-mask-80kB": line(0.92, 800),
        "bytes-lora-4": line(0.91, 5000, densities=[]),
    }
    for name, content in found.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "line.json").write_text(json.dumps(content))
    method_pages.write_pages(tmp_path, written)
    text = written.read_text()
    for row in (
        "| naive | 40.0 ± 1.0 | 0.600 | 950 | - |",
        "| nm, 2:4 | 80.0 ± 1.0 | 0.600 | 750 | 0.02 |",
        "| random:0.1 | 70.0 ± 1.0 | 0.600 | 300 |",
        "| mask, 80 kB | 92.0 ± 1.0 | 850 | 0.600 |",
        "| LoRA, rank 4 | 91.0 ± 1.0 | 5,050 | - |",
    ):
        assert row in text, row
    assert "old" not in text
    assert all((tmp_path / name).read_text().startswith("<?xml") for name in ("selective.svg", "bytes-budget.svg"))


def test_lines_name_what_there_is() -> None:
    """Rates that another line found are those of a line before it, and every group has settings that are possible."""
    for group in methods.LINES.values():
        names = list(group)
        for name, one in group.items():
            assert one.whole.batch_size == 64
            assert bool(one.like) != bool(one.rates)
            assert not one.like or names.index(one.like) < names.index(name)


def test_runtime(tmp_path: Path) -> None:
    measured = {
        "model": "ResNet-50", "device": "CPU, 2 threads", "weights": 2_000_000, "density": 0.9,
        "model bytes": 8_000_000, "resident bytes": {"1": 1e6, "10": 2e6, "100": 9e6},
        "loading": {**dict.fromkeys(LOADING, 0.1), "load_mask": 0.3, "PEFT load and merge": 0.6,
                    "bytes": {"mask": 100_000, "full": 8_000_000, "lora": 400_000}},
        "switching": {**dict.fromkeys(SWITCHING, 0.2), "switch": 0.06, "switches": {}},
        "training": {"8": {"full": {"seconds": 1.0, "memory": 1e9}, "mask": {"seconds": 1.1, "memory": 1.2e9}}},
    }  # fmt: skip
    (tmp_path / "ResNet-50-cpu.json").write_text(json.dumps(measured))
    rows = {
        "one-shot, 16": {"accuracy": 0.9, "none": 0.1, "passes": 4},
        "one-shot, an eleventh permutation": {"none": 0.8},
    }
    runs = {"runs": [{"seed": 0, "accuracy": 0.95, "rows": rows}]}
    (tmp_path / "identification.json").write_text(json.dumps(runs))
    written = page(tmp_path, runtime_pages.MARK)
    runtime_pages.write_pages(tmp_path, written)
    text = written.read_text()
    ready = (100_000 * 8 / 1e8 + 0.3) / (8_000_000 * 8 / 1e8 + 0.1)
    for row in (
        f"| time to ready at 100 Mbit/s / full checkpoint | {ready:.2f} | ≤ 0.2 | ≤ 0.1 |",
        "| load_mask from a warm disk / PEFT LoRA r=8, load and merge | 0.50 | ≤ 1 | ≤ 0.5 |",
        "| switch / loading either | 0.20 | ≤ 0.5 | ≤ 0.2 |",
        "| training step of 8 examples / the same weights in full, Adam | 1.10 | ≤ 1.3 | ≤ 1.10 |",
        "| the same of 64 examples | - | ≤ 1.3 | ≤ 1.10 |",
        "| training step of 8, mask | 1,100.0 |",
        "| switch | 60.0 |",
        "| resident: 100 masks | 9.0 |",
        "| one-shot | 16 | 0.900 | 0.100 | 4 |",
        "| one-shot | an eleventh permutation | - | 0.800 | - |",
    ):
        assert row in text, row
