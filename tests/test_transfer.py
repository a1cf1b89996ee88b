"""train_transfer: what the source needs keeps its bits, the rest learns the target, and both networks load exactly."""

import itertools
import json
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from maskpack_cli.main import app
from PIL import Image
from torch import nn
from typer.testing import CliRunner, Result

from maskpack import load_adapter, load_mask, save_adapter
from maskpack.backbone.classifier import predictions
from maskpack.backbone.load import Backbone, load_weights
from maskpack.backbone.model import Embedding, same_size_int
from maskpack.errors import AdapterError, ConfigError, StateError, TrainingError
from maskpack.mask import MaskSet
from maskpack.preprocess import ImagePreprocess
from maskpack.training import TrainConfig, load_data, train_transfer
from maskpack.training.config import WEIGHT_LR
from maskpack.training.data.base import Data, loader, readable
from maskpack.training.evaluate import markdown, source_classes, transfer_table
from maskpack.training.run_folder import FILE, load_checkpoint
from maskpack.training.transfer import (
    SOURCE_FILE,
    STARTS,
    TransferResult,
    check_transfer,
    current_values,
    find_reuse,
    of_weights,
    start_values,
    train_reused,
    train_source,
)

from .conftest import TinyNet
from .helpers_cli import BACKBONE
from .helpers_models import bits, same

QUICK = TrainConfig(
    method="naive", epochs=4, batch_size=16, optimizer="sgd", head_lr=0.3, warmup=0.0, bn="freeze", augment="none"
)
RATE = 0.3  # of weights
LEARNED = replace(QUICK, method="threshold", lr=300.0, epochs=1)
NAMES = ["conv1.weight", "conv2.weight"]
X = torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def some(reference: str) -> Data:
    """A tenth of the training rows, a third of the test rows."""
    data = load_data(reference, labels_fraction=0.1)
    assert data.test is not None
    return replace(data, test=replace(data.test, indices=data.test.indices[::3]))


@pytest.fixture(scope="module")
def source() -> Data:
    return some("digits:5-9")


@pytest.fixture(scope="module")
def shifted(source: Data) -> Data:
    """The same images and class names, and other labels: what helps here hurts there."""

    def shift(examples: Any) -> Any:
        return replace(examples, labels=[(label + 1) % 5 for label in examples.labels])

    return replace(source, train=shift(source.train), test=shift(source.test), id="shifted", digest="shifted")


@pytest.fixture(scope="module")
def others() -> Data:
    return some("digits:0-3")


def tiny_net() -> Backbone:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TinyNet()
        model(torch.randn(32, 3, 8, 8))
    return Backbone(model.eval(), "tests:tiny", embedding=Embedding("fc"), preprocess=ImagePreprocess(8, 8))


def source_network(folder: Path) -> nn.Module:
    """The network of the file that a transfer left, in a model that has another head."""
    model = TinyNet()
    model.fc = nn.Linear(16, 99)
    load_weights(model, folder / SOURCE_FILE, "fc")
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    return predictions(model, [(X, torch.zeros(len(X), dtype=torch.long))])[0]


def measured(model: nn.Module, data: Data) -> float:
    assert data.test is not None
    right = [
        (model(x).argmax(1) == y).double() for x, y in readable(loader(data.test, ImagePreprocess(8, 8), batch_size=7))
    ]
    return float(torch.cat(right).mean())


@pytest.fixture(scope="module")
def trained(source: Data, shifted: Data, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TransferResult, Any]:
    """A transfer with its adapter, and the logits of the network at the end of the run on the target."""
    folder, backbone, seen = tmp_path_factory.mktemp("transfer"), tiny_net(), list[torch.Tensor]()

    def report(event: Mapping[str, Any]) -> None:
        if (event["part"], event["event"]) == ("target-source-start", "end"):
            seen.append(logits(backbone.model))

    result = train_transfer(
        backbone, source, shifted, QUICK, weight_lr=RATE, baseline=True, output=folder, report=report
    )
    save_adapter(folder, result.parts, result.base, result.about)
    return folder, result, seen[0]


def test_the_adapter_gives_the_network_of_the_training_and_keeps_what_is_kept(trained: Any) -> None:
    folder, result, expected = trained
    model = source_network(folder)
    base = bits(model)
    load_mask(model, folder)
    assert torch.equal(logits(model), expected)
    now = bits(model)
    adapter = load_adapter(folder)
    moved = 0
    for name, mask in adapter.parts().masks.items():
        keep = mask.tensor()
        weight = same_size_int(base_weight(folder, name))
        assert (mask.op, name in NAMES) == ("replace", True)
        assert torch.equal(keep, far(base_weight(folder, name)))
        assert torch.equal(now[name][keep], weight[keep])
        moved += int((now[name] != weight)[~keep].sum())
    assert moved == sum((~mask.tensor()).sum() for mask in adapter.parts().masks.values())
    rest = {name: tensor for name, tensor in now.items() if name not in NAMES}
    assert same(rest, {name: tensor for name, tensor in base.items() if name not in NAMES})
    assert result.metrics["density"] == pytest.approx(adapter.parts().masks.density)
    assert same(bits(result.backbone.model), base), "the backbone is the source network afterwards"
    assert (adapter.base.id, adapter.base.revision) == ("source:tests:tiny", None)


def base_weight(folder: Path, name: str) -> torch.Tensor:
    return source_network(folder).get_parameter(name).detach()


def far(weight: torch.Tensor) -> torch.Tensor:
    wide = weight.double()
    return (weight - wide.mean().float()).abs() >= wide.std(correction=0).float()


def test_the_table_and_the_record(trained: Any, source: Data, shifted: Data) -> None:
    folder, result, _ = trained
    rows = transfer_table(result, source, shifted)
    found = {row["network"]: (row["source"], row["target"]) for row in rows}
    assert list(found) == ["source", "source through its mask", "transferred", "plain fine-tuning"]
    assert [one for one, _ in found.values() if one is None] == []
    assert [name for name, (_, one) in found.items() if one is None] == ["source", "source through its mask"]
    assert found["transferred"][1] == result.metrics["test_accuracy"]
    model = source_network(folder)
    assert found["source"][0] == measured(model, source)
    load_mask(model, folder)
    assert found["transferred"] == (measured(model, source), measured(model, shifted))
    assert len({one for one, _ in found.values()}) > 2, "else the test shows little"
    assert rows == transfer_table(result, source, shifted), "nothing stays applied"
    nothing = transfer_table(result, replace(source, test=None, validation=source.test), replace(shifted, test=None))
    assert [(row["source"], row["target"]) for row in nothing] == [(one, None) for one, _ in found.values()]
    assert markdown(rows[:1]).splitlines()[2] == f"| source | {100 * rows[0]['source']:.2f} | - |"
    record = result.about.training
    assert (record["data"]["id"], record["settings"]["lr"]) == ("shifted", RATE)
    assert record["settings"]["method_options"] == {"mask_id": load_adapter(folder).mask_id}
    assert record["transfer"]["source"]["class_names"] == list("56789")
    assert (record["transfer"]["method"], record["transfer"]["start"]) == ({"id": "naive"}, "source-start")
    assert result.baseline.masks.kept == 0
    assert sum(len(values) for values in result.baseline.values.values()) == result.parts.masks.total


def test_the_source_mode_knows_nothing_of_the_target(
    trained: Any, source: Data, shifted: Data, others: Data, tmp_path: Path
) -> None:
    folder, result, _ = trained
    model = source_network(folder)
    expected = source_network(folder)
    with torch.no_grad():
        for name in NAMES:
            weight = expected.get_parameter(name)
            weight.copy_(torch.where(far(weight), weight, 0.0))
    load_mask(model, folder, mode="source")
    assert same(bits(model), bits(expected))
    # another target: a head of its own, statistics of its own, another start, another run of the source
    config = replace(QUICK, bn="adapt")
    second = train_transfer(tiny_net(), source, others, config, weight_lr=RATE, start="random", output=tmp_path)
    save_adapter(tmp_path, second.parts, second.base, second.about)
    other = source_network(tmp_path)
    load_mask(other, tmp_path, mode="source")
    assert same(bits(other), bits(expected))
    assert torch.equal(logits(other), logits(expected))
    accuracies = [transfer_table(result, source, shifted)[1], transfer_table(second, source, others)[1]]
    assert accuracies[0] == accuracies[1]
    load_mask(other, tmp_path)
    assert other.fc.out_features == 4
    assert not torch.equal(other.bn1.weight, expected.bn1.weight)
    assert source_classes(load_adapter(tmp_path)) == tuple("56789")
    assert load_adapter(tmp_path).about.class_names == tuple("0123")
    load_mask(other, tmp_path, head="keep")
    assert other.fc.out_features == 5


def test_no_source_without_values(tmp_path: Path) -> None:
    backbone = tiny_net()
    masks = MaskSet.from_tensors({"conv1.weight": backbone.model.get_parameter("conv1.weight") > 0})
    from maskpack import fingerprint

    adapter = save_adapter(tmp_path, masks, fingerprint(backbone.model, id="tests:tiny", head=["fc"]))
    before = bits(backbone.model)
    with pytest.raises(AdapterError, match="replaces no weights; mode='source' is for"):
        load_mask(backbone.model, adapter, mode="source")
    with pytest.raises(ConfigError, match="mode must be one of target, source, got .both"):
        load_mask(backbone.model, adapter, mode="both")  # type: ignore[arg-type]
    assert same(bits(backbone.model), before)
    assert source_classes(adapter) is None


@pytest.mark.parametrize("start", STARTS)
def test_values_at_the_start(start: Any, source: Data, shifted: Data) -> None:
    backbone = tiny_net()
    before = current_values(backbone, NAMES)
    weights = of_weights(replace(QUICK, steps=1), 0.01)
    network = train_source(backbone, source, weights)
    after = current_values(network, NAMES)
    assert not any(torch.equal(before[name], after[name]) for name in NAMES)
    values = start_values(start, before, after, seed=3)
    masks = find_reuse(network, source, QUICK)
    # a rate so low that a step changes no bit
    still = replace(weights, lr=1e-30, head_kind="own")
    parts = train_reused(network, masks, values, shifted, still).parts
    for name, mask in masks.items():
        assert torch.equal(parts.values[name], values[name][~mask.tensor()])
        assert torch.equal(mask.tensor(), far(after[name]))
    if start == "random":
        wide = {"w": torch.randn(200, 300, generator=torch.Generator().manual_seed(0)) * 0.3 + 5}
        drawn = start_values(start, wide, {}, seed=3)["w"]
        assert drawn.mean() == pytest.approx(0, abs=0.01)
        assert drawn.std() == pytest.approx(0.3, rel=0.02)
        assert torch.equal(drawn, start_values(start, wide, {}, seed=3)["w"])
        assert not torch.equal(drawn, start_values(start, wide, {}, seed=4)["w"])
    else:
        assert values is (before if start == "source-start" else after)


@pytest.mark.parametrize(("method", "options", "lr"), [("gumbel", {}, 2.0), ("edit", {"share": 0.5}, 0.01)])
def test_learned_masks(method: str, options: dict[str, Any], lr: float, source: Data, shifted: Data) -> None:
    config = replace(QUICK, method=method, method_options=options, lr=lr, optimizer="adam", steps=3)
    result = train_transfer(tiny_net(), source, shifted, config, start="source-end")
    assert 0 < result.parts.masks.density < 1
    assert {mask.op for mask in result.parts.masks.values()} == {"replace"}
    assert result.about.training["settings"]["lr"] == WEIGHT_LR["adam"]
    assert result.about.training["transfer"]["lr"] == lr


def test_a_mask_is_learned_with_the_sources_head_and_statistics(source: Data, tmp_path: Path) -> None:
    config = replace(QUICK, method="gumbel", lr=2.0, optimizer="adam", steps=2, bn="adapt")
    find_reuse(tiny_net(), source, config, output=tmp_path)
    tensors, facts = load_checkpoint(tmp_path / FILE)
    assert (facts["run"]["config"]["head_kind"], facts["run"]["config"]["bn"]) == ("own", "freeze")
    assert not any("linear" in name for name in tensors), "the head is frozen"
    assert torch.equal(tensors["model/model.bn1.running_mean"], tiny_net().model.bn1.running_mean)


def test_where_the_runs_on_the_target_start(
    source: Data, shifted: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[Mapping[str, torch.Tensor]] = []

    def noted(backbone: Backbone, masks: MaskSet, values: Any, *rest: Any, **options: Any) -> Any:
        starts.append({name: value.clone() for name, value in values.items()})
        return train_reused(backbone, masks, values, *rest, **options)

    monkeypatch.setattr("maskpack.training.transfer.train_reused", noted)
    backbone, before = tiny_net(), current_values(tiny_net(), NAMES)
    config = replace(QUICK, seed=5, steps=1, method="gumbel", method_options={"init": 0.01}, lr=50.0)
    config = replace(config, selective="random:0.9")
    result = train_transfer(backbone, source, shifted, config, start="random", baseline=True, output=tmp_path)
    drawn, plain = starts
    assert all(torch.equal(drawn[n], one) for n, one in start_values("random", before, {}, 5).items())
    assert all(torch.equal(plain[n], one) for n, one in current_values(result.backbone, NAMES).items())
    settings = load_checkpoint(tmp_path / "training/source" / FILE)[1]["run"]["config"]
    assert (settings["selective"], settings["method"]) == ("all", "threshold"), "one source network serves any mask"


class StopHere(Exception):  # noqa: N818
    pass


@pytest.fixture(scope="module")
def whole(source: Data, shifted: Data, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a transfer that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return files(folder, train_transfer(tiny_net(), source, shifted, LEARNED, output=folder))


def files(folder: Path, result: TransferResult) -> dict[str, bytes]:
    save_adapter(folder, result.parts, result.base, result.about)
    return {name: (folder / name).read_bytes() for name in (SOURCE_FILE, "maskpack_model.safetensors")}


@pytest.mark.parametrize("stop", [("source", "end"), ("mask", "end"), ("target-source-start", "epoch")])
def test_resumes_wherever_it_stopped(
    stop: tuple[str, str], whole: dict[str, bytes], source: Data, shifted: Data, tmp_path: Path
) -> None:
    def report(event: Mapping[str, Any]) -> None:
        # an epoch is reported before its checkpoint is written, the end after the last one
        if (event["part"], event["event"]) == stop:
            raise StopHere

    with pytest.raises(StopHere):
        train_transfer(tiny_net(), source, shifted, LEARNED, output=tmp_path, report=report)
    assert (tmp_path / SOURCE_FILE).exists() == (stop[0] != "source")
    parts = list[tuple[str, str]]()
    result = train_transfer(
        tiny_net(),
        source,
        shifted,
        LEARNED,
        output=tmp_path,
        resume=True,
        report=lambda event: parts.append((event["part"], event["event"])),
    )
    assert parts.count((stop[0], "epoch")) == (stop[1] == "epoch"), "what is finished is read back"
    assert parts.count(("target-source-start", "epoch")) == 1
    assert files(tmp_path, result) == whole


def test_values_are_not_read_back_for_another_mask(
    whole: dict[str, bytes], source: Data, shifted: Data, tmp_path: Path
) -> None:
    train_transfer(tiny_net(), source, shifted, LEARNED, output=tmp_path)
    shutil.rmtree(tmp_path / "training/mask")
    with pytest.raises(StateError, match="target-source-start belongs to another run: method_options differ; resume"):
        train_transfer(tiny_net(), source, shifted, replace(LEARNED, lr=600.0), output=tmp_path, resume=True)
    shutil.rmtree(tmp_path / "training/mask")
    result = train_transfer(tiny_net(), source, shifted, LEARNED, output=tmp_path, resume=True)
    assert files(tmp_path, result) == whole


def test_what_may_differ_when_it_goes_on(trained: Any, source: Data, shifted: Data) -> None:
    folder, result, _ = trained
    parts = list[Any]()
    again = train_transfer(
        tiny_net(),
        source,
        shifted,
        QUICK,
        weight_lr=RATE,
        start="source-end",
        output=folder,
        resume=True,
        report=lambda event: parts.append(event["part"]) if event["event"] != "begin" else None,
    )
    assert again.parts.masks == result.parts.masks
    assert parts.count("source") == 1, "its end"
    assert again.baseline is None
    with pytest.raises(StateError, match="holds the checkpoint of an earlier run; continue it with resume"):
        train_transfer(tiny_net(), source, shifted, QUICK, output=folder)
    with pytest.raises(StateError, match="belongs to another run: epochs differ; resume with the same"):
        train_transfer(
            tiny_net(), source, shifted, replace(QUICK, epochs=5), weight_lr=RATE, output=folder, resume=True
        )
    with pytest.raises(StateError, match="needs the folder of an earlier run as output, got None; without"):
        train_transfer(tiny_net(), source, shifted, QUICK, resume=True)


def test_a_network_that_knows_the_source(trained: Any, source: Data, shifted: Data, tmp_path: Path) -> None:
    folder, result, _ = trained
    known = replace(tiny_net(), model=source_network(folder), id="tests:known", revision="r1")
    before = bits(known.model)
    found = train_transfer(known, source, shifted, QUICK, start="random", source_trained=True, output=tmp_path)
    assert found.parts.masks == result.parts.masks
    assert same(bits(known.model), before)
    assert (found.base.id, found.base.revision) == ("tests:known", "r1")
    assert not (tmp_path / SOURCE_FILE).exists()
    assert sorted(path.name for path in (tmp_path / "training").iterdir()) == ["target-random"]
    with pytest.raises(ConfigError, match="start must be one of source-end, random where the source was trained befor"):
        train_transfer(known, source, shifted, QUICK, source_trained=True)
    fewer = replace(known, model=TinyNet())
    fewer.model.fc = nn.Linear(16, 3)
    with pytest.raises(
        ConfigError, match="a backbone that was trained on the source .* tests:known has a head for .*the data have 5 c"
    ):
        check_transfer(fewer, source, QUICK, "random", source_trained=True)
    fewer.model.fc = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(
        ConfigError, match="tests:known has no linear head, .*; give its weights, or train on the source first"
    ):
        check_transfer(fewer, source, QUICK, "random", source_trained=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scale": True}, "scale is False in a transfer, got True: it is supervised, with the head of the source"),
        ({"train": ("bn1.*",)}, r"train is None in a transfer, got \('bn1.*',\): .* all that the source needs"),
        (
            {"bytes_budget": 500},
            "bytes_budget is None in a transfer, got 500: .* and values are most of what is stored",
        ),
        ({"rate": 0.1}, "rate is None in a transfer, got 0.1"),
        ({"head_kind": "masked"}, "head_kind is 'linear' in a transfer, got 'masked'"),
        ({"objective": "swav"}, "objective is 'supervised' in a transfer, got 'swav'"),
        ({"method": "flip"}, "the method 'flip' changes signs, so its mask does not tell which weights the source nee"),
        ({"method": "ternary"}, "the method 'ternary' changes signs"),
        ({"start": "end"}, "start must be one of source-start, source-end, random, got 'end'"),
        ({"weight_lr": 0.0}, "weight_lr must be a finite number above 0, got 0.0"),
        ({"weight_lr": float("nan")}, "weight_lr must be a finite number above 0, got nan"),
        ({"backbone": None}, "tests:tiny is an encoder without a head inside, which the source network needs; take"),
    ],
)
def test_impossible_settings(changes: dict[str, Any], said: str, source: Data, shifted: Data) -> None:
    backbone = tiny_net()
    before = bits(backbone.model)
    options = {name: changes.pop(name) for name in ("start", "weight_lr") if name in changes}
    if "backbone" in changes:
        backbone = replace(backbone, embedding=Embedding(changes.pop("backbone")))
    with pytest.raises(ConfigError, match=said):
        train_transfer(backbone, source, shifted, replace(QUICK, **changes), **options)
    assert same(bits(backbone.model), before)


def test_a_mask_that_keeps_everything_is_an_error(source: Data, shifted: Data) -> None:
    config = replace(LEARNED, steps=1, lr=1e-6)
    with pytest.raises(TrainingError, match="the mask keeps all 1368 weights, so that none is left for the target; tr"):
        train_transfer(tiny_net(), source, shifted, config)


def test_tables_of_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `lab`")
    from benchmarks import measured, transfer

    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    assert transfer.tables(tmp_path) == ""
    for seed in (0, 1):
        about = {"source": "photo", "seed": seed}
        for method in transfer.MASKS:
            found = {"source": 0.9, "through_mask": 0.7 + 0.1 * seed, "density": 0.5, "layers": {"a": 0.25, "b": 0.75}}
            measured.record("transfer", {**about, "mask": method}, found)
        for number, target in enumerate(transfer.targets("photo")):
            plain = {"source": 0.5, "target": 0.8}
            measured.record("transfer", {**about, "target": target}, plain)
            for method, start in itertools.product(transfer.MASKS, STARTS):
                gain = 0.3 * number if (method, start) == ("gumbel", "random") else 0.0
                own = {"source": 0.5 + gain, "target": 0.8 - 0.1 * seed}
                assert transfer.finished("photo") == [0] * seed
                measured.record("transfer", {**about, "target": target, "mask": method, "start": start}, own)
    lines = transfer.tables(tmp_path).splitlines()
    assert "| mask | start | photo S | photo T |" in lines
    assert "| gumbel | random | +0.300 ± 0.000 | -0.050 ± 0.071 |" in lines
    assert "| naive | source-end | +0.000 ± 0.000 | -0.050 ± 0.071 |" in lines
    assert "| source network on S | 0.900 ± 0.000 |" in lines
    assert "| S through the mask, edit | 0.750 ± 0.071 |" in lines
    assert "| density, gumbel | 0.500 ± 0.000 |" in lines
    assert "| plain fine-tuning on T | 0.800 ± 0.000 |" in lines
    assert "Means over targets ± sample deviation of the seeds; of these there are: photo 2." in lines
    # best where the others are not better, and above plain fine-tuning with the targets whose gain is above 0
    assert "| frozen | random | source | 2, 0 | 4, 4 | 0, 0 | 0 | 6 |" in transfer.claims().splitlines()
    assert (tmp_path / transfer.PICTURE).stat().st_size > 1000


# --- the command line ------------------------------------------------------------------------------------------------

TRANSFER = [
    *("transfer", *BACKBONE, "--source", "digits:5-9", "--target", "digits:0-3", "--method", "naive"),
    *("--labels-fraction", "0.1", "--steps", "6", "--batch-size", "16", "--optimizer", "sgd", "--augment", "none"),
    *("--validation-fraction", "0", "--weight-lr", "0.3", "--head-lr", "0.3", "--warmup", "0"),
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


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    dry = run(*TRANSFER, "--output", folder, "--dry-run")
    assert dry.exit_code == 0
    assert "The target, digits:0-3:" in dry.stdout
    assert "nothing was trained or written" in dry.stdout
    assert not folder.exists()
    found = ok(*TRANSFER, "--output", folder, "--baseline")
    names = {"README.md", "maskpack_config.json", "maskpack_model.safetensors", "source.safetensors", "training"}
    assert {path.name for path in folder.iterdir()} == {*names, "transfer.json"}
    assert json.loads((folder / "transfer.json").read_text()) == found
    source, through, transferred, plain = found["rows"]
    assert found["test_accuracy"] == transferred["target"]
    assert found["test_over_probe"] == found["test_accuracy"] - found["test_probe_accuracy"]
    assert {"test_accuracy_without_masks", "lora_rank_8_4bit_bytes", "warnings"} <= found.keys()
    assert plain["network"] == "plain fine-tuning"
    assert found["file_bytes"] == (folder / "maskpack_model.safetensors").stat().st_size
    weights = ["--backbone", BACKBONE[1], "--weights", folder / "source.safetensors"]
    assert ok("eval", folder, *weights, "--data", "digits:0-3")["accuracy"] == transferred["target"]
    assert ok("verify", folder, *weights)["mask_id"] is True

    said = refused(*TRANSFER, "--output", folder, "--dry-run")
    assert "is there already; choose another name" in said
    result = run(*TRANSFER, "--output", folder, "--resume")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[0] == f"✓ {folder}"
    assert f"| source through its mask | {100 * through['source']:.2f} | - |" in result.stdout.splitlines()
    # what it names as the next command can be typed as it stands
    (following,) = re.findall("Next: maskpack (eval .*)", result.stderr)
    shown = ok(*shlex.split(following))
    assert (shown["accuracy"], shown["class_names"]) == (through["source"], list("56789"))
    assert source["source"] != through["source"], "else the test shows little"
    images = [tmp_path / f"{digit}.png" for digit in range(3)]
    for digit, image in enumerate(images):
        Image.new("L", (8, 8), 80 * digit).save(image)
    for mode, classes in (("target", "0123"), ("source", "56789")):
        said = ok("predict", folder, *images, *weights, "--mode", mode)["predictions"]
        assert {one["label"] for one in said} <= set(classes)
    assert "labels that the class names lack" in refused("eval", folder, *weights, "--data", "digits:5-9")

    settings = tmp_path / "run.toml"
    settings.write_text('start = "random"\nsource-trained = true\n')
    words = [*TRANSFER[:1], *weights, *TRANSFER[5:], "--config", settings, "--output", tmp_path / "y"]
    assert "source_weights" not in ok(*words)
    assert not (tmp_path / "y" / "source.safetensors").exists()


def test_wrong_commands(tmp_path: Path) -> None:
    said = refused("transfer", *BACKBONE, "--source", "digits:5-9", "--output", tmp_path / "x", code=2)
    assert "Missing option '--target'" in said
    said = refused(*TRANSFER, "--output", tmp_path / "x", "--resume")
    assert f"needs the folder of an earlier run as output, got {tmp_path / 'x/training'}; without it" in said
    assert "start must be one of source-end, random where" in refused(
        *TRANSFER, "--output", tmp_path / "x", "--source-trained", "--start", "source-start", code=2
    )
    said = refused(*TRANSFER, "--output", tmp_path / "x", "--weight-lr", "nan", "--dry-run", code=2)
    assert "weight_lr must be a finite number above 0, got nan" in said
    assert not (tmp_path / "x").exists()
    said = refused("eval", *BACKBONE, "--data", "digits:5-9", "--probe", "--mode", "source", code=2)
    assert "--mode is for an adapter, a backbone alone has one network" in said
    shown = run("transfer", "--help").stdout
    for option in ("--source", "--target", "--start", "--source-trained", "--baseline", "--method-option"):
        assert option in shown
    assert "--objective" not in shown
