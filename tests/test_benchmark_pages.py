"""The pages of benchmarks whose measuring takes hours: tables and pictures from results of a made-up run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="needs the extra `lab`")

from benchmarks import comparisons, imagenet, many_tasks, measured, methods, runtime
from benchmarks.runtime import LOADING, SWITCHING
from maskpack.training import TrainConfig


@pytest.fixture(autouse=True)
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials are recorded in a temporary folder."""
    monkeypatch.setattr(measured, "FOLDER", tmp_path / "measured")


def page(folder: Path, *marks: str) -> Path:
    path = folder / "page.md"
    path.write_text("".join(f"<!-- begin: {mark} -->\nold\n<!-- end: {mark} -->\n" for mark in marks))
    return path


def record(
    experiment: str,
    name: str,
    baseline: str,
    accuracy: float,
    masks: int,
    share: float = 1.0,
    rate: float | None = 0.02,
) -> None:
    """Record the trials of three seeds, and a search in which this rate is the best; knn and probe have one seed."""
    about = {"comparison": name, "baseline": baseline, "labels_fraction": share}
    rest = {
        "trained": 9,
        "bytes": masks + 150,
        "steps": 3,
        "labels": 5,
        "seconds": 1.0,
        "peak_memory": 1,
        "controls": {},
    }
    for seed in (0, 1, 2):
        found = {"accuracy": accuracy + 0.01 * (seed - 1), "sizes": {"head": 100, "masks": masks, "index": 50}, **rest}
        measured.record(experiment, {**about, "search": False, "rate": rate, "seed": seed}, found)
        if share == 1 and baseline in ("mask", "self-supervised"):
            density = {"density": 0.5 + 0.1 * seed, "layers": {"a": 0.5, "b": 0.7}}
            measured.record("densities", {"comparison": name, "baseline": baseline, "seed": seed}, density)
    for tried in () if rate is None or share < 1 else (rate / 2, rate, 2 * rate):
        found = {"accuracy": 0.9 - abs(tried - rate), "sizes": {}, **rest}
        measured.record(experiment, {**about, "search": True, "rate": tried, "seed": 0}, found)


def test_methods(tmp_path: Path) -> None:
    marks = [f"{methods.MARK}: {name}" for name in ("methods", "selective", "bytes")]
    written = page(tmp_path, *marks)
    methods.write_pages(written)
    assert written.read_text().count("othing is finished yet") == 6
    record("methods", "sketch-naive", "mask", 0.4, 900, rate=None)
    for name, accuracy, masks in (
        ("minilm-nm", 0.8, 700),
        ("selective-random-0.1", 0.7, 300),
        ("selective-all", 0.9, 1000),
        ("bytes-mask", 0.93, 2000),
        ("bytes-mask-80kB", 0.92, 800),
    ):
        record("methods", name, "mask", accuracy, masks)
    record("methods", "bytes-lora-4", "lora:4", 0.91, 5000)
    methods.write_pages(written)
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


def test_comparisons(tmp_path: Path) -> None:
    names = ("few labels", "cascades", "tables", "ablations", "densities")
    written = page(tmp_path, *(f"{comparisons.MARK}: {name}" for name in names))
    comparisons.write_pages(written)
    assert written.read_text().count("Nothing is finished yet") == 5
    for share in (1.0, 0.1, 0.04, 0.01):
        for baseline, accuracy in (("probe", 0.6), ("full", 0.9), ("mask", 0.8)):
            record("comparisons", "cartoon", baseline, accuracy * share, 700, share)
    record("comparisons", "cartoon", "self-supervised", 0.5, 90)
    record("comparisons", "ablation-masked-all", "self-supervised", 0.4, 90)
    row = {"embedding": "dispatcher", "whitened": True, "dimensions": 64, "passes": 1, "steps": 9, "bytes": 1000}
    about = {"comparison": "photo", "baseline": "mask", "seed": 0}
    measured.record("densities", about, {"density": 0.7, "layers": {"a": 0.7, "b": 0.7}})
    raw = {**row, "embedding": "raw", "whitened": False, "steps": 0, "bytes": 100, "knn": 0.4, "probe": 0.5}
    measured.record("cascades", {"control": "raw"}, {"rows": [raw]})
    for seed in (0, 1):
        measured.record("cascades", {"seed": seed}, {"rows": [{**row, "knn": 0.5 + 0.1 * seed, "probe": 0.6}]})
    comparisons.write_pages(written)
    text = written.read_text()
    for row in (
        "| cartoon | probe | 59.0 | 6.0 ± 1.0 | 2.4 ± 1.0 | 0.6 ± 1.0 |",  # without a seed where all labels are used
        "| cartoon | mask | 80.0 ± 1.0 | 8.0 ± 1.0 | 3.2 ± 1.0 | 0.8 ± 1.0 |",
        "| dispatcher, whitened | 64 | 55.0 ± 7.1 | 60.0 ± 0.0 | 1 | 9 | 1,000 |",
        "**ResNet-20, cartoon**",
        "| self-supervised: norm weights and biases masked too | 39.0 |",
        "| raw | 64 | 40.0 | 50.0 | 1 | 0 | 100 |",
        "| mask | cartoon | 60.0 | 50.0 | a |",
        "| mask | all 2 | 65.0 ± 7.1 | 60.0 ± 14.1 | a |",
    ):
        assert row in text, row
    assert (tmp_path / "few-labels-cartoon.svg").exists()


def test_imagenet(tmp_path: Path) -> None:
    names = ("labels", "few labels", "convergence", "cascades", "selective", "starts", "densities")
    written = page(tmp_path, *(f"{imagenet.MARK}: {name}" for name in names))
    imagenet.write_pages(written)
    assert written.read_text().count("Nothing is finished yet") == 7
    record("imagenet", "sign_digits: mask, default", "mask", 0.9, 700)
    record("imagenet", "eurosat: mask, default", "mask", 0.8, 500)
    for share in comparisons.SHARES:
        record("imagenet", "sign_digits: linear probe", "probe", 0.6 * share, 0, share, rate=None)

    def without(steps: int, seed: int, accuracy: float, **changes: Any) -> None:
        about = {"data": "sign_digits", "start": imagenet.LITE, "steps": steps, "seed": seed, **changes}
        found = {
            measure: {f"{share:g}": accuracy * share for share in comparisons.SHARES} for measure in ("knn", "probe")
        }
        mask = {"density": 0.9, "layers": {"a": 0.9}, "weights": 200 if "include" in changes else 1000, "bytes": 50}
        measured.record("imagenet-unlabelled", about, {**found, **(mask if steps else {})})

    for seed in (0, 1):
        without(0, seed, 0.5)
        without(1000, seed, 0.7 + 0.1 * seed, lr=5.0)
    without(2000, 0, 0.75, lr=5.0)
    without(150, 0, 0.99, lr=5.0, bn="freeze", validation=True)
    for rule, changes in imagenet.RULES.items():
        without(imagenet.SOME_STEPS, 0, 0.4, lr=5.0, bn="adapt", **changes)
        about = {"data": "sign_digits", "rule": rule, "steps": 240}
        measured.record("imagenet-selective", about, {"accuracy": 0.6, "bytes": 40})
    imagenet.write_pages(written)
    text = written.read_text()
    for row in (
        "| mask, default | 90.0 ± 1.0 | 80.0 ± 1.0 | - | - | - | 650 |",
        "| sign_digits | linear probe | 59.0 | 6.0 ± 1.0 | 2.4 ± 1.0 | 0.6 ± 1.0 |",
        "| sign_digits | raw, then k-NN | 50.0 | 5.0 ± 0.0 | 2.0 ± 0.0 | 0.5 ± 0.0 |",
        "| sign_digits | without labels, then probe | 75.0 ± 7.1 | 7.5 ± 0.7 | 3.0 ± 0.3 | 0.8 ± 0.1 |",
        "| 0 | 50.0 | 50.0 | - |",
        "| 2000 | 75.0 | 75.0 | 0.9000 |",
        "| random:0.1 | 10.0 % | 40.0 | 40.0 | 50 | 60.0 | 40 |",
        "| stem and 2 of 7 blocks | 20.0 % | 40.0 | 40.0 | 50 | 60.0 | 40 |",
        "| EfficientNet-Lite0, ImageNet | 50.0 | 40.0 | 50.0 | 40.0 | 0.9000 |",
        "| mask, default | all 2 | 60.0 ± 0.0 | 50.0 ± 0.0 | a |",
        "| without labels | all 1 | 90.0 | 90.0 | a |",
    ):
        assert row in text, row
    assert "old" not in text


def test_tasks_in_a_row(tmp_path: Path) -> None:
    written = page(tmp_path, *(f"{many_tasks.MARK}: {name}" for name in ("row", "unseen")))
    many_tasks.write_pages(written)
    assert written.read_text().count("Nothing is finished yet") == 2
    sizes = {"probe_accuracy": 0.5, "mask_bytes": 1000, "file_bytes": 3000}
    for seed in (0, 1):
        rows = [{"task": name, "accuracy": 0.8, "end": 0.8, **sizes} for name in many_tasks.TASKS]
        measured.record("many-tasks", {"way": "masks", "seed": seed}, rows)
    tuned = [{"task": name, "accuracy": 0.9, "end": 0.1 * at} for at, name in enumerate(many_tasks.TASKS)]
    measured.record("many-tasks", {"way": "fine-tuned", "seed": 0}, tuned)
    ways = {way: {"accuracy": 0.5} for way in many_tasks.WAYS}
    about = {"way": "unseen", "domain": "photo", "seed": 0}
    measured.record("many-tasks", about, {"single": {"a": 0.2, "b": 0.4}, **ways})
    many_tasks.write_pages(written)
    text = written.read_text()
    for row in (
        "| photo | 50.0 ± 0.0 | 80.0 ± 0.0 | 80.0 ± 0.0 | 1,000 | 3,000 | 90.0 | 10.0 |",
        "| mean | 50.0 ± 0.0 | 80.0 ± 0.0 | 80.0 ± 0.0 | 1,000 | 3,000 | 90.0 | 45.0 |",
        "| photo | 40.0 | 30.0 | 50.0 | 50.0 | 50.0 |",
    ):
        assert row in text, row


def test_recorded_trials_are_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[dict[str, Any]] = []

    def compare(*_: object, report: Callable[[dict[str, Any]], None], **options: Any) -> dict[str, Any]:
        called.append(options)
        for seed in options["seeds"]:
            about = {"baseline": "mask", "search": False, "labels_fraction": 1.0, "rate": 0.1, "seed": seed}
            report({"event": "trial", "settings": about, "result": {"accuracy": 0.5}, "folder": "gone"})
        return {"settings": {"steps": 3}, "rows": []}

    monkeypatch.setattr(comparisons, "compare", compare)
    for _ in range(2):
        comparisons.compared("comparisons", "x", {}, Path(), ["mask"], {"mask": [0.1]}, TrainConfig())
    assert len(called) == 1
    assert called[0]["rates"] == {"mask": [0.1]}
    assert [one["seed"] for one in measured.trials("comparisons", comparison="x", rate=0.1)] == [0, 1, 2]
    (settings,) = measured.trials("settings", experiment="comparisons")
    assert settings["result"] == {"settings": {"steps": 3}}


def test_runtime(tmp_path: Path) -> None:
    found = {
        "device": "CPU, 2 threads", "weights": 2_000_000, "density": 0.9,
        "model bytes": 8_000_000, "resident bytes": {"1": 1e6, "10": 2e6, "100": 9e6},
        "loading": {**dict.fromkeys(LOADING, 0.1), "load_mask": 0.3, "PEFT load and merge": 0.6,
                    "bytes": {"mask": 100_000, "full": 8_000_000, "lora": 400_000}},
        "switching": {**dict.fromkeys(SWITCHING, 0.2), "switch": 0.06, "switches": {}},
        "training": {"8": {"full": {"seconds": 1.0, "memory": 1e9}, "mask": {"seconds": 1.1, "memory": 1.2e9}}},
    }  # fmt: skip
    measured.record("runtime", {"model": "ResNet-50", "device": "cpu"}, found)
    rows = {
        "one-shot, 16": {"accuracy": 0.9, "none": 0.1, "passes": 4},
        "one-shot, an eleventh permutation": {"none": 0.8},
    }
    measured.record("identification", {"seed": 0}, {"accuracy": 0.95, "rows": rows})
    written = page(tmp_path, runtime.MARK)
    runtime.write_pages(written)
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
