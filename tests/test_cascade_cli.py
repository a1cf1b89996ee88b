"""maskpack cascade: train, look, compare, predict, push and pull."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from maskpack_cli.main import app
from PIL import Image
from typer.testing import CliRunner, Result

from maskpack import load_backbone, load_cascade
from maskpack.adapter.read import read_adapter
from maskpack.training import load_data

from .helpers_cli import BACKBONE
from .helpers_html import checked
from .helpers_hub_fixtures import hub as hub
from .helpers_hub_fixtures import waits as waits
from .helpers_hub_server import WRITE_TOKEN, HubServer

DATA = ["--data", "digits:5-9", "--labels-fraction", "0.2"]
TRAIN = [
    *("cascade", "train", *BACKBONE, *DATA, "--experts", "2", "--epochs", "1", "--batch-size", "16"),
    *("--optimizer", "sgd", "--lr", "20", "--augment", "none", "--validation-fraction", "0"),
]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def ok(*arguments: object) -> Any:
    """Run with --json; return what it printed."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refused(*arguments: object, code: int = 1) -> str:
    result = run(*arguments)
    assert result.exit_code == code
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.replace("│", "").split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cascade") / "digits"
    found = ok(*TRAIN, "--output", folder)
    assert found["adapter"] == str(folder)
    assert found["file_bytes"] == (folder / "maskpack_model.safetensors").stat().st_size
    assert found["test_over_probe"] == found["test_accuracy"] - found["test_probe_accuracy"]
    assert found["test_accuracy_without_masks"] <= 1
    assert found["lora_rank_8_4bit_bytes"] > found["lora_rank_1_4bit_bytes"] > 0
    assert any("was not worth it" in one for one in found["warnings"]) == (found["test_over_probe"] <= 0)
    assert "On the test split a linear probe of the raw backbone has" in (folder / "README.md").read_text()
    assert {"expert_density", "dispatcher_mask_bytes", "expert_mask_bytes", "router_bytes", "head_bytes"} <= set(found)
    return folder


def test_what_training_leaves(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names == {"README.md", "maskpack_config.json", "maskpack_model.safetensors", "training"}
    runs = {path.name for path in (folder / "training").iterdir()}
    assert runs == {"clusters.json", "dispatcher", "expert-0", "expert-1", "router.safetensors"}
    adapter = read_adapter(folder)
    assert adapter.sets == ("dispatcher", "expert-0", "expert-1")
    assert adapter.about.class_names == tuple("56789")


def test_resumes_with_other_options_for_what_comes_last(folder: Path) -> None:
    result = run(*TRAIN, "--output", folder, "--resume", "--combine", "conditional", "--profile", "fast")
    assert "  combine: conditional" in result.stdout.splitlines()
    # what it names as the next command can be typed as it stands
    (following,) = re.findall("Next: maskpack (cascade eval .*)", result.stderr)
    assert following.startswith(f"cascade eval {folder} --data digits:5-9 --backbone ")
    assert len(ok(*shlex.split(following))["rows"]) == 8
    assert "belongs to another run: experts differ" in refused(*TRAIN, "--output", folder, "--resume", "--experts", "3")
    for words in ([], ["--dry-run"]):
        assert "is there already" in refused(*TRAIN, "--output", folder, *words)


def test_nothing_to_resume(tmp_path: Path) -> None:
    said = refused(*TRAIN, "--output", tmp_path / "typo", "--resume")
    assert f"needs the folder of an earlier run as output, got {tmp_path / 'typo'}/training" in said
    assert not (tmp_path / "typo").exists()


def test_settings_file_reduction_and_no_labels(folder: Path, tmp_path: Path) -> None:
    settings = tmp_path / "run.toml"
    settings.write_text(
        'experts = 2\ncombine = "unconditional"\nreduce = 9\nno-labels = true\nsteps = 2\nobjective = "swav"\n'
        'objective-option = ["prototypes=12", "small_crops=1", "queue=0"]\n'
    )
    words = [word for word in TRAIN if word not in ("--experts", "2", "--augment", "none")]
    found = ok(*words, "--config", settings, "--output", tmp_path / "x")
    assert found["reduction_bytes"] == 4 * (192 + 9 * 192 + 9)
    assert "head_bytes" not in found
    adapter = read_adapter(tmp_path / "x")
    assert adapter.cascade is not None
    assert (adapter.cascade.combine, adapter.cascade.weight, adapter.about.class_names) == ("unconditional", None, None)


def test_report_on_data(folder: Path, tmp_path: Path) -> None:
    """Its figures are those of the predictions."""
    page = tmp_path / "cascade.html"
    ok("report", folder, *BACKBONE, "--data", "digits:5-9", "--examples", "6", "--output", page)
    text = checked(page.read_text(encoding="utf-8")).text
    backbone, data = load_backbone(BACKBONE[1], random_weights=0), load_data("digits:5-9").test
    assert data is not None
    found = load_cascade(backbone.model, folder).predict([image for image, _ in data])
    right = sum(one.label == str(5 + label) for one, (_, label) in zip(found, data, strict=True))
    assert f"{right} of {len(data)} are right: {100 * right / len(data):.2f} %." in text


def test_dry_run_and_help(tmp_path: Path) -> None:
    result = run(*TRAIN, "--output", tmp_path / "x", "--dry-run")
    assert result.exit_code == 0
    assert "nothing was trained or written" in result.stdout
    assert "A dispatcher and 2 experts: about" in result.stdout
    assert not (tmp_path / "x").exists()
    shown = run("cascade", "train", "--help").stdout
    for option in ("--experts", "--combine", "--backbone", "--objective", "--resume", "maskpack cascade train"):
        assert option in shown
    assert run("cascade").exit_code in (0, 2)
    assert "got 99 experts" in refused(*TRAIN, "--output", tmp_path / "x", "--experts", "99", "--dry-run", code=2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--combine", "both"], "'both' is not one of 'conditional', 'unconditional'"),
        (["--reduce", "0"], "Invalid value for '--reduce'"),
        (["--experts", "1"], "at least 2 experts and a batch of rows for each; got 1 experts"),
        (["--bn", "maybe"], "'maybe' is not one of 'adapt', 'freeze'"),
        (["--objective", "swav"], "the objective 'swav' does not use --augment; leave out what is for labels"),
    ],
)
def test_impossible_settings(words: list[str], said: str, tmp_path: Path) -> None:
    assert said in refused(*TRAIN, "--output", tmp_path / "x", *words, code=2)


def test_inspect_and_verify(folder: Path) -> None:
    shown = run("inspect", folder).stdout
    for line in (
        "cascade",
        "dispatcher: dispatcher",
        "experts: 2",
        "combine: conditional",
        "router bytes:",
        "head bytes: ",
    ):
        assert line in shown
    assert ok("inspect", folder)["cascade"]["embedding"] == {"kind": "linear", "module": "15"}
    assert ok("verify", folder, *BACKBONE)["mask_id"] is True


def test_eval_is_a_table(folder: Path) -> None:
    rows = ok("cascade", "eval", folder, *BACKBONE, *DATA)["rows"]
    assert [(row["embedding"], row["whitened"]) for row in rows][1:3] == [("raw", True), ("dispatcher", False)]
    result = run("cascade", "eval", folder, *BACKBONE, *DATA, "--whiten", "10")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split()[:5] == ["embedding", "dimensions", "knn", "probe", "passes"]
    assert any(line.startswith("unconditional, whitened") and " 10 " in line for line in lines)
    assert len(lines) == 9


def test_predict(folder: Path, tmp_path: Path) -> None:
    Image.new("L", (8, 8), 200).save(tmp_path / "x.png")
    (found,) = ok("predict", folder, tmp_path / "x.png", *BACKBONE)["predictions"]
    assert found["label"] in "56789"


def test_verbs_for_one_mask_say_what_to_use(folder: Path, tmp_path: Path) -> None:
    assert "is a cascade; leave it out" in refused("predict", folder, "x.png", *BACKBONE, "--mode", "source", code=2)
    said = "it is a cascade: use load_cascade, or `maskpack cascade eval` and `maskpack predict`"
    assert said in refused("export", folder, "--output", tmp_path / "x.safetensors", *BACKBONE)
    assert not (tmp_path / "x").exists()


@pytest.mark.transport("lfs")
def test_goes_over_the_hub(folder: Path, hub: HubServer, tmp_path: Path) -> None:
    backbone = load_backbone(BACKBONE[1], random_weights=0)
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = load_cascade(backbone.model, folder).embed(x)
    ok("push", folder, "alice/cascade", "--token", WRITE_TOKEN)
    found = ok("pull", "alice/cascade", "--output", tmp_path / "copy")
    assert (tmp_path / "copy" / "README.md").read_text().count('load_cascade(model, "alice/cascade")') == 1
    assert "cascade.predict(examples)" in (tmp_path / "copy" / "README.md").read_text()
    cascade = load_cascade(backbone.model, "alice/cascade", revision=found["commit"])
    assert torch.equal(cascade.embed(x), expected)
    assert [row["base"] for row in ok("list")["adapters"]] == [read_adapter(folder).base.id]
