"""maskpack plot: from files to pictures, whose words are read off the SVG, and errors without tracebacks."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from maskpack_cli.main import app
from typer.testing import CliRunner, Result

from maskpack import MaskSet, fingerprint, load_backbone, save_adapter
from maskpack.backbone.load import Backbone
from maskpack.training import load_data, train_mask
from maskpack.training.config import TrainConfig

from .helpers_adapter import base_of, random_masks

SHAPES = {"conv1.weight": (40, 90), "conv2.weight": (30, 90)}
FACTORY = f"{Path(__file__).parent.parent / 'cli/maskpack_cli/digits_backbone.py'}:digits_cnn"
ROWS = [
    {"method": "LoRA", "bytes": 1000, "labels_fraction": 0.01, "accuracy": 0.5, "deviation": 0.1, "seconds": 3},
    {"method": "mask", "bytes": 100, "labels_fraction": 1, "accuracy": 1, "deviation": None},
]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plot", *(str(one) for one in arguments)])


def drawn(folder: Path, *arguments: object) -> list[str]:
    """Run with an SVG as output; return the words in it."""
    picture = folder / "picture.svg"
    result = run(*arguments, "--output", picture, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {"file": str(picture), "bytes": picture.stat().st_size}
    texts = ElementTree.parse(picture).getroot().iter("{http://www.w3.org/2000/svg}text")
    return ["".join(text.itertext()) for text in texts]


def refused(*arguments: object, code: int = 1) -> str:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    return " ".join(result.stderr.split())


def file_with(folder: Path, value: Any) -> Path:
    path = folder / "values.json"
    path.write_text(json.dumps(value))
    return path


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    """Three files of random masks of one base."""
    paths = [tmp_path / f"{name}.safetensors" for name in ("one", "two", "three")]
    for seed, path in enumerate(paths):
        save_adapter(path, random_masks(SHAPES, 0.9 - 0.2 * seed, seed), base_of(SHAPES))
    return paths


@pytest.fixture
def cascade(tmp_path: Path) -> Path:
    sets = {name: random_masks(SHAPES, seed=seed) for seed, name in enumerate(("dispatcher", "expert-0"))}
    save_adapter(tmp_path / "cascade.safetensors", sets, base_of(SHAPES))
    return tmp_path / "cascade.safetensors"


# pictures
def test_density(adapters: list[Path], tmp_path: Path) -> None:
    one, two, three = adapters
    words = drawn(tmp_path, "density", one)
    assert {"conv1", "conv2", "density (share of weights kept)"} <= set(words)
    assert not [word for word in words if "adapters" in word], "one series needs no legend"
    assert "adapters (3: mean ± deviation)" in drawn(tmp_path, "density", *adapters)
    named = drawn(tmp_path, "density", f"labels={one}", f"none={three}", f"labels={two}")
    assert {"labels (2: mean ± deviation)", "none"} <= set(named)


def test_sets_of_one_file(cascade: Path, tmp_path: Path) -> None:
    assert {"dispatcher", "expert-0"} <= set(drawn(tmp_path, "density", cascade))
    words = drawn(tmp_path, "overlap", cascade)
    assert words.count("cascade dispatcher") == words.count("cascade expert-0") == 4


def test_overlap(adapters: list[Path], tmp_path: Path) -> None:
    words = drawn(tmp_path, "overlap", adapters[0], adapters[1], f"other={adapters[2]}")
    assert words.count("one") == words.count("two") == words.count("other") == 4
    assert words.count("1.000") == 6
    assert "agreement beyond chance" in " ".join(words)


def test_overlap_of_masks_that_need_their_base(tmp_path: Path) -> None:
    backbone = load_backbone(FACTORY, random_weights=0)
    weights = {name: w.detach() for name, w in backbone.model.named_parameters() if w.numel() > 5000}
    for name in ("one", "two"):
        masks = MaskSet.from_tensors({key: w.abs() > w.abs().median() for key, w in weights.items()})
        base = fingerprint(backbone.model, id=backbone.id, head=backbone.outside)
        saved = save_adapter(tmp_path / name, masks, base, codec="logit-base", weights=backbone.model)
        assert saved.size < masks.total // 8
    both = [tmp_path / "one", tmp_path / "two"]
    assert "base" in refused("overlap", *both, "--output", tmp_path / "x.svg")
    words = drawn(tmp_path, "overlap", *both, "--backbone", FACTORY, "--random-weights", "0")
    assert words.count("1.000") == 8


@pytest.mark.parametrize("objective", ["supervised", "self-supervised"])
def test_scores_of_a_run(tiny_backbone: Backbone, tmp_path: Path, objective: str) -> None:
    data = load_data("digits:5-9", labels_fraction=0.1)
    config = TrainConfig(steps=1, batch_size=16, method_options={"threshold": 0.25}, objective=objective)
    train_mask(tiny_backbone, data, config, output=tmp_path / "adapter" / "training")
    for folder in (tmp_path / "adapter", tmp_path / "adapter" / "training"):
        words = drawn(tmp_path, "scores", folder)
        assert {"conv1", "conv2", "threshold 0.25", "weights"} <= set(words)


def test_results(tmp_path: Path) -> None:
    file = file_with(tmp_path, {"rows": ROWS, "seeds": [0, 1]})
    words = drawn(tmp_path, "bytes", file)
    assert {"LoRA", "mask", "100 B", "1 kB", "bytes stored beside the backbone"} <= set(words)
    words = drawn(tmp_path, "labels", file)
    assert {"LoRA", "mask", "1 %", "100 %", "share of the training labels", "accuracy (mean ± deviation)"} <= set(words)


def test_bytes_are_of_the_greatest_share_of_labels(tmp_path: Path) -> None:
    few = {"method": "mask", "bytes": 90_000, "labels_fraction": 0.1, "accuracy": 0.9}
    words = drawn(tmp_path, "bytes", file_with(tmp_path, {"rows": [few, *ROWS, few]}))
    assert {"100 B", "1 kB"} <= set(words)
    assert not {"10 kB", "100 kB"} & set(words)
    said = refused("bytes", file_with(tmp_path, {"rows": [{**few, "labels_fraction": "x"}]}), "--output", "x.svg")
    assert "row 1 of" in said


def test_clusters(tmp_path: Path) -> None:
    file = file_with(tmp_path, {"points": [[0, 1], [0.5, 2], [1, 1]], "expert": [0, 1, 0]})
    assert {"0 (2)", "1 (1)", "expert (samples)"} <= set(drawn(tmp_path, "clusters", file))


def test_confusion_of_features(tmp_path: Path) -> None:
    one = {"measure": "knn", "confusion": [[3, 1], [0, 17]]}
    drawn(tmp_path, "confusion", file_with(tmp_path, {"features": [one], "class_names": ["cat", "dog"]}))
    file = file_with(tmp_path, {"features": [one, one], "class_names": ["cat", "dog"]})
    said = refused("confusion", file, "--output", tmp_path / "x.svg")
    assert "several measures; print it with --knn or --probe alone, of one share" in said


def test_confusion(tmp_path: Path) -> None:
    file = file_with(tmp_path, {"accuracy": 0.9, "confusion": [[3, 1], [0, 17]], "class_names": ["cat", "dog"]})
    words = drawn(tmp_path, "confusion", file)
    assert words.count("cat") == words.count("dog") == 2
    assert {"3", "17", "true class", "predicted class"} <= set(words)


def test_what_it_prints(adapters: list[Path], tmp_path: Path) -> None:
    result = run("density", *adapters, "--output", tmp_path / "x.png")
    assert result.stdout.splitlines()[0] == f"✓ {tmp_path / 'x.png'}"
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_help_shows_every_kind() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(kind in result.stdout for kind in "density scores overlap bytes labels clusters confusion".split())


# errors
def test_wrong_ending_is_said_before_anything_is_read(tmp_path: Path) -> None:
    said = refused("density", tmp_path / "nowhere", "--output", "x.pdf", code=2)
    assert said == "Error: x.pdf ends in '.pdf', expected .png or .svg; give the picture one of these endings"


def test_masks_of_one_name(adapters: list[Path], tmp_path: Path) -> None:
    said = refused("overlap", adapters[0], adapters[0], "--output", tmp_path / "x.svg", code=2)
    assert said == "Error: two masks would be called 'one'; name the adapters, as in first=REF second=REF"


def test_no_run(tmp_path: Path) -> None:
    said = refused("scores", tmp_path, "--output", tmp_path / "x.svg")
    assert f"there is no checkpoint.safetensors in {tmp_path} or in {tmp_path / 'training'}; give the folder" in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "as JSON: Expecting property name"),
        ("[" * 100_000, "as JSON: "),
        ("\xff", "as JSON: 'utf-8' codec"),
        ("[1]", "must have expert, points, it has a list; expected an object with the lists points and expert"),
        ('{"points": [], "size": 3}', "must have expert, points, it has points, size; expected an object"),
        ('{"points": 5, "expert": []}', "has no list 'points'"),
    ],
)
def test_file_that_is_not_as_needed(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "values.json").write_bytes(text.encode("latin-1"))
    assert words in refused("clusters", tmp_path / "values.json", "--output", tmp_path / "x.svg")
    assert not (tmp_path / "x.svg").exists()


def test_file_that_is_not_there(tmp_path: Path) -> None:
    said = refused("confusion", tmp_path / "nowhere.json", "--output", tmp_path / "x.svg")
    assert "there is no file" in said
    assert "nowhere.json; expected an object with the lists confusion and class_names" in said


@pytest.mark.parametrize(
    "row",
    [
        5,
        {},
        {"method": 3, "bytes": 1, "accuracy": 1},
        {"method": "x", "accuracy": 1},
        {"method": "x", "bytes": "1", "accuracy": 1},
        {"method": "x", "bytes": 1, "accuracy": 1, "deviation": [1]},
    ],
)
def test_row_that_is_none(tmp_path: Path, row: object) -> None:
    said = refused("bytes", file_with(tmp_path, {"rows": [*ROWS, row]}), "--output", tmp_path / "x.svg")
    assert said.startswith("Error: row 3 of ")
    assert "expected an object with a text under 'method' and numbers under 'bytes', 'accuracy' and perhaps" in said


def test_values_that_cannot_be_drawn(tmp_path: Path) -> None:
    file = file_with(tmp_path, {"confusion": [[1, "x"], [0, 1]], "class_names": ["a", "b"]})
    said = refused("confusion", file, "--output", tmp_path / "x.svg", code=2)
    assert "the counts of 2 classes must be rows of 2 finite numbers each" in said
