"""maskpack analyze: tables, JSON, pictures, and errors by their words."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from maskpack_cli.main import app
from typer.testing import CliRunner

from maskpack import load_backbone, save_adapter
from maskpack.backbone.load import export_state
from maskpack.lab.networks import state_of, write_network
from maskpack.training import TrainConfig, load_data, train_mask
from maskpack.training.learn import body_parameters
from maskpack.training.trainer import train_dense

from .helpers_models import TINY_FACTORY as FACTORY

pytest.importorskip("matplotlib", reason="needs the extra `lab`")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, two fine-tuned networks and two masks of it."""
    root = tmp_path_factory.mktemp("analyze")
    (root / "nets.py").write_text(FACTORY)
    data = load_data("digits:0-4")
    for seed in (0, 1):
        config = TrainConfig(optimizer="sgd", lr=0.05, steps=3, batch_size=16, augment="none", seed=seed)
        made = load_backbone(f"{root}/nets.py:tiny", random_weights=0, image_size=8)
        if not seed:
            export_state(root / "base.safetensors", made.model)
        result = train_dense(made, data, config, lambda own, _: body_parameters(own))
        write_network(root / f"tuned-{seed}.safetensors", state_of(result.objective.module))
        made = load_backbone(f"{root}/nets.py:tiny", random_weights=0, image_size=8)
        masked = train_mask(made, data, replace(config, lr=1000.0))
        save_adapter(root / f"mask-{seed}", masked.parts, masked.base, masked.about)
    return root


@pytest.fixture(autouse=True)
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setenv("COLUMNS", "160")


BASE = ("--backbone", "nets.py:tiny", "--weights", "base.safetensors", "--data", "digits:0-4", "--limit", "40")
TUNED = ("tuned=tuned-0.safetensors", "tuned=tuned-1.safetensors")
MASKS = ("mask=./mask-0", "mask=./mask-1")


def run(*words: str, code: int = 0) -> Any:
    done = CliRunner().invoke(app, ["analyze", *words])
    assert done.exit_code == code, f"{done.stdout}\n{done.stderr}\n{done.exception!r}"
    return done


def answer(*words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*words, "--json", "--quiet").stdout)
    return found


@pytest.mark.parametrize("ref", ["tuned-0.safetensors", "./mask-0"])
def test_criticality(ref: str, tmp_path: Path) -> None:
    size = () if ref.startswith("./") else ("--image-size", "8")
    words = ("criticality", ref, *BASE, *size, "--plot", str(tmp_path / "a.svg"), "--output", str(tmp_path / "kept"))
    found = answer(*words)
    modules = {"0.0", "0.3"} if ref.startswith("./") else {"0.0", "0.3", "1"}
    assert {row["module"] for row in found["rows"]} == modules
    assert found["examples"] == 40
    assert len(list((tmp_path / "kept").glob("*.json"))) == len(modules) + 1
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    shown = run(*words, "--points", "2", "--noise", "1")
    assert "accuracy: " in shown.stdout
    header = next(line for line in shown.stdout.splitlines() if line.startswith("module"))
    assert header.split() == ["module", "parameters", "distance", "rewound", "drop", "radius", "criticality"]
    assert f"The picture is in {tmp_path / 'a.svg'}" in shown.stderr
    blocks = answer(*words, "--per", "block")
    assert {row["module"] for row in blocks["rows"]} == ({"0"} if ref.startswith("./") else {"0", "1"})


def test_barrier(tmp_path: Path) -> None:
    words = ("barrier", *TUNED, *MASKS, *BASE, "--points", "3", "--plot", str(tmp_path / "b.png"))
    found = answer(*words)
    assert [one["network"] for one in found["networks"]] == ["tuned 1", "tuned 2", "mask 1", "mask 2"]
    assert len(found["pairs"]) == 6
    assert set(found["deviations"]) == {"tuned", "mask"}
    shown = run(*words).stdout
    assert len([line for line in shown.splitlines() if line.startswith(("tuned ", "mask "))]) == 6
    assert "deviation of the accuracies of tuned: " in shown
    assert (tmp_path / "b.png").read_bytes()[1:4] == b"PNG"


def test_similarity(tmp_path: Path) -> None:
    words = ("similarity", *TUNED, *MASKS, *BASE, "--plot", str(tmp_path / "s.svg"))
    found = answer(*words)
    assert found["layers"] == ["0", "1"]
    kinds = {(row["first"], row["second"]): "masks" in row for row in found["distances"]}
    assert kinds == {(p["first"], p["second"]): p["kinds"] == "mask - mask" for p in found["pairs"]}
    done = run(*words)
    assert "Note: CKA of 40 examples; of fewer than 512 it comes out too high." in done.stderr
    assert "mask bits that differ" in done.stdout


def test_mistakes(tmp_path: Path) -> None:
    words = ("mistakes", *TUNED, "./mask-0", *BASE, "--plot", str(tmp_path / "m.svg"))
    found = answer(*words)
    assert [one["network"] for one in found["networks"]] == ["tuned 1", "tuned 2", "mask-0"]
    assert all({"overlap", "kappa", "both"} <= pair.keys() for pair in found["pairs"])
    assert "only first" in run(*words).stdout


TRAIN = (
    "--optimizer",
    "sgd",
    "--steps",
    "2",
    "--batch-size",
    "16",
    "--augment",
    "none",
    "--image-size",
    "8",
    "--seeds",
    "1",
)


def test_shuffle(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    words = ("shuffle", *BASE[:-2], *TRAIN, "--block", "8", "--block", "2", "--output", str(folder))
    done = run(*words, "--plot", str(tmp_path / "p.svg"))
    assert "gain of the pretrained start" in done.stdout
    assert "pretrained-8-0: accuracy " in done.stderr
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")}
    assert len(before) == 4
    found = answer(*words)
    assert [row["block"] for row in found["rows"]] == [8, 8, 2, 2]
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")}
    error = run(*words[:3], "--random-weights", "1", "--data", "digits:0-4", "--output", "x", code=2).stderr
    assert "--random-weights is the random start, which is there always; leave it out" in error
    assert "Invalid value for '--seeds'" in run(*words, "--seeds", "0", code=2).stderr


def test_checkpoints(tmp_path: Path) -> None:
    words = [
        "checkpoints",
        "--backbone",
        "nets.py:tiny",
        "--data",
        "digits:0-4",
        *TRAIN,
        "--output",
        str(tmp_path / "o"),
    ]
    given = [*words, "--checkpoints", "base*.safetensors"]
    found = answer(*given, "--baseline", "probe", "--pretraining", "digits:0-9", "--plot", str(tmp_path / "c.svg"))
    (row,) = found["rows"]
    assert row["checkpoint"] == "base"
    assert row["pretraining"] is not None
    other = run(*given, "--baseline", "full", code=1).stderr
    assert "holds results of other settings: baseline, lr" in " ".join(other.split())
    missing = run(*words, "--checkpoints", "none-*.safetensors", code=2).stderr
    assert "no file matches --checkpoints 'none-*.safetensors'; expected safetensors state dicts" in missing
    assert "Missing option '--checkpoints'" in run(*words, code=2).stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["criticality", "tuned-0.safetensors", "--data", "digits:0-4"], "weights do not tell what they started from"),
        (
            ["criticality", "./mask-0", *BASE, "--head", "5"],
            "--head and --image-size are for a backbone alone; an adapter",
        ),
        (["mistakes", "./mask-0", "./mask-1", *BASE, "--plot", "a.gif"], "ends in '.gif', expected .png or .svg"),
        (["mistakes", "./mask-0", "./mask-1", *BASE, "--split", "all"], "'all' is not one of 'test', 'train'"),
        (["barrier", "./mask-0", *BASE], "networks are compared in pairs; give at least two, got 1"),
    ],
)
def test_errors(words: Sequence[str], message: str) -> None:
    assert message in " ".join(run(*words, code=2).stderr.replace("│", "").split())


def test_pictures_of_nothing() -> None:
    from maskpack.errors import ConfigError
    from maskpack.lab import (
        barrier_figure,
        checkpoint_figure,
        criticality_figure,
        mistakes_figure,
        shuffle_figure,
        similarity_figure,
    )

    with pytest.raises(ConfigError, match="there is no module to draw; give rows of a criticality analysis"):
        criticality_figure([])
    with pytest.raises(ConfigError, match="no pair of networks to draw; give what a barrier analysis measured"):
        barrier_figure([])
    with pytest.raises(ConfigError, match="no layer or no pair of networks to draw"):
        similarity_figure([], [])
    with pytest.raises(ConfigError, match="no pair of networks to draw; give what an analysis of mistakes measured"):
        mistakes_figure([], [])
    with pytest.raises(ConfigError, match="there is no point to draw; give accuracies by block side"):
        shuffle_figure([])
    with pytest.raises(
        ConfigError, match="there is no checkpoint to draw; give what an analysis of checkpoints measured"
    ):
        checkpoint_figure([])
