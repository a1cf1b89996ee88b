"""`maskpack report` and what notebooks show: all facts, nothing from outside, no text of an adapter as markup."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from maskpack_cli.main import app
from torch import nn
from typer.testing import CliRunner

from maskpack import Adapter, Backbone, MaskSet, Parts, fingerprint, inspect_adapter, load_adapter, save_adapter
from maskpack.backbone.model import Embedding, Head
from maskpack.errors import ConfigError
from maskpack.lab import adapter_report
from maskpack.training import Data, TrainConfig, TrainResult, load_data, train_mask

from .helpers_html import checked
from .helpers_models import bits, same

MARKUP = "\"><img src=x onerror=alert(1)></title></style></pre><script>alert(2)</script>&lt;'`"
EVIL = f"{MARKUP}\u202e\x1b[31m"  # a record may have control characters, other texts not


@pytest.fixture(scope="module")
def data() -> Data:
    return load_data("digits:0-2", validation_fraction=0.1)


@pytest.fixture(scope="module")
def trained(data: Data, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, Backbone, Path]:
    """A mask of a small network on digits, its backbone, and the folder of adapter and run."""
    from maskpack.preprocess import ImagePreprocess

    folder = tmp_path_factory.mktemp("report") / "digits-mask"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    backbone = Backbone(model, "tests:tiny", embedding=Embedding("3"), preprocess=ImagePreprocess(8, 8))
    config = TrainConfig(steps=40, batch_size=16, augment="none", workers=0)
    result = train_mask(backbone, data, config, output=folder / "training")
    save_adapter(folder, result.parts, result.base, result.about)
    return result, backbone, folder


def test_report(trained: tuple[TrainResult, Backbone, Path], data: Data) -> None:
    result, backbone, folder = trained
    adapter, before = load_adapter(folder), bits(backbone.model)
    page = adapter_report(adapter, backbone=backbone, data=data, examples=9)
    assert same(bits(backbone.model), before)
    found, facts = checked(page), inspect_adapter(adapter)
    assert re.match(r"<!doctype html>\n<html lang=.en.><head><meta charset", page)
    for heading in ("Accuracy", "Bytes, beside LoRA", "by part", "Training", "Density", "Test split", "Verif", "Load"):
        assert re.search(rf"<h2>[^<]*{heading}", page), heading
    for text in (
        *(
            "./digits-mask",
            "tests:tiny",
            "image-classification",
            "0, 1, 2",
            "threshold",
            adapter.mask_id,
            adapter.digest,
        ),
        *(f"{100 * result.metrics[f'test_{name}']:.2f} %" for name in ("accuracy", "probe_accuracy")),
        *facts["base"]["digests"].values(),
        *(f"{size:,}" for size in facts["bytes"].values()),
        *(row["name"] for row in facts["sets"]["default"]["payloads"]),
        *("LoRA, rank 8, 4 bits", "loss: ", "all masks were decoded", 'load_mask(model, "./digits-mask")'),
    ):
        assert text in found.text, text
    assert str(folder.parent) not in page
    assert page.count('src="data:image/jpeg;base64,') == 9
    assert page.count("<polyline") >= 3
    wrong = round(len(data.test or ()) * (1 - result.metrics["test_accuracy"]))
    assert page.count('<figure class="wrong">') == min(3, wrong)


def test_report_of_an_adapter_alone(trained: tuple[TrainResult, Backbone, Path], tmp_path: Path) -> None:
    result, *_ = trained
    adapter = save_adapter(tmp_path / "alone.safetensors", result.parts, result.base)
    page = adapter_report(adapter)
    text = checked(page).text
    assert "./alone.safetensors" in text
    assert "Density by layer" in text
    assert all(name.replace(".", ".<wbr>") in page for name in result.parts.masks), "names break behind a point"
    assert not re.search("Accuracy|Test split|<img|<svg|training record", page)


def test_report_of_every_golden_adapter() -> None:
    for file in sorted((Path(__file__).parent / "golden" / "v1").glob("*.safetensors")):
        checked(adapter_report(load_adapter(file)))


def evil(path: Path) -> Adapter:
    """An adapter with markup wherever a text may stand."""
    model = nn.Linear(4, 3)
    masks = MaskSet.from_tensors({"weight": torch.ones(3, 4) > 0})
    record = {
        "metrics": {EVIL: 0.5, "test_accuracy": 0.5, "test_probe_accuracy": 0.7},
        "data": {"id": EVIL, "rows": {EVIL: 3}},
        "settings": {"method": EVIL, "objective": EVIL},
        "warnings": [EVIL],
        EVIL: [EVIL, {EVIL: EVIL}],
    }
    head = Head(Embedding("head"), torch.zeros(2, 4))
    about: dict[str, Any] = {"task": MARKUP, "class_names": [MARKUP, "b"], "training": record}
    return save_adapter(path, Parts(masks, head), fingerprint(model, id=MARKUP), **about)


def test_no_text_is_markup(tmp_path: Path) -> None:
    adapter = evil(tmp_path / "evil.safetensors")
    for page in (adapter_report(adapter), adapter._repr_html_()):
        text = checked(page).text
        assert "<script>alert(2)</script>" in text
        assert "&lt;'`\\u202e\\x1b[31m" in text


def test_log_that_is_none(trained: tuple[TrainResult, Backbone, Path], tmp_path: Path) -> None:
    result, *_ = trained
    adapter = save_adapter(tmp_path / "mask", result.parts, result.base)
    (tmp_path / "mask" / "training").mkdir()
    log = tmp_path / "mask" / "training" / "log.jsonl"
    lines = [
        "nonsense",
        "[1]",
        '{"step": "<b>", "loss": 1}',
        '{"step": 1e999, "loss": 1}',
        '{"step": 1, "loss": "<b>"}',
    ]
    log.write_text("\n".join(lines), encoding="utf-8")
    assert "<svg" not in adapter_report(adapter)
    log.write_text(
        '{"step": 1, "loss": 2}\n' * 3 + '{"step": 5, "loss": NaN}\n{"step": 9, "loss": 1}', encoding="utf-8"
    )
    assert "loss: 2 at step 1, 1 at step 9" in checked(adapter_report(adapter)).text


def test_notebooks(trained: tuple[TrainResult, Backbone, Path]) -> None:
    result, _, folder = trained
    for shown in (result, load_adapter(folder)):
        text = checked(shown._repr_html_()).text
        for expected in (
            "tests:tiny",
            f"{100 * result.metrics['test_accuracy']:.2f} %",
            "linear probe",
            "density",
            "LoRA",
        ):
            assert expected in text, expected


def test_command(trained: tuple[TrainResult, Backbone, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["report", str(trained[2])])
    assert done.exit_code == 0, done.output
    checked((tmp_path / "digits-mask.html").read_text(encoding="utf-8"))
    for words, said in (([], "--overwrite"), (["--output", "report.txt"], ".html")):
        done = CliRunner().invoke(app, ["report", str(trained[2]), *words])
        assert done.exit_code in (1, 2)
        assert said in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["digits-mask.html"]


def test_errors(trained: tuple[TrainResult, Backbone, Path], data: Data) -> None:
    with pytest.raises(ConfigError, match="backbone"):
        adapter_report(load_adapter(trained[2]), data=data)
