"""Many tasks on one backbone: what is written, what stays when a task is added, and how a joint run goes on."""

import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from maskpack_cli.main import app
from torch import Tensor
from typer.testing import CliRunner, Result

from maskpack import MaskSet, load_adapter, load_mask
from maskpack.backbone.classifier import predictions
from maskpack.backbone.load import Backbone, load_weights
from maskpack.errors import ConfigError, DataError, StateError, TrainingError
from maskpack.lab import gate_figure
from maskpack.lab.pictures import over_time, users
from maskpack.safetensors_io import read_tensors, write_tensors
from maskpack.training import TrainConfig, load_data, train_tasks
from maskpack.training.config import JointConfig
from maskpack.training.data.base import loader, readable
from maskpack.training.features import probe_accuracies
from maskpack.training.gates import GatedWeight
from maskpack.training.multitask import BASE, CLAIM, HISTOGRAMS, RESULT, JointRun, Task, plan_tasks, train_jointly
from maskpack.training.run_folder import RunFolder
from maskpack.training.stored import recalibrate

from .helpers_loops import adapter_accuracy
from .helpers_models import StopHere, bits, same, tiny_net

QUICK = TrainConfig(epochs=2, batch_size=16, augment="none", warmup=0.0, bn="adapt")
FAST = JointConfig(weight_lr=0.01, gate_start=0.5, r1=1e-5, r2=1e-5)
FACTORY = f"{Path(__file__).parent.parent / 'cli/maskpack_cli/digits_backbone.py'}:digits_cnn"


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    """Three tasks: the classes of the first two differ in number."""
    found = {"low": "digits:0-4", "high": "digits:6-9", "odd": "digits:1-3"}
    tasks = {}
    for name, ref in found.items():
        data = load_data(ref, labels_fraction=0.06, validation_fraction=0.2)
        assert data.test is not None
        assert data.validation is not None
        validation = replace(data.validation, indices=data.validation.indices[:8])
        tasks[name] = Task(
            replace(data, validation=validation, test=replace(data.test, indices=data.test.indices[:32]))
        )
    return tasks


def two(tasks: Mapping[str, Task]) -> dict[str, Task]:
    return {name: tasks[name] for name in ("low", "high")}


def named() -> Backbone:
    return replace(tiny_net(), revision="r1")


def digests(folder: Path, *names: str) -> dict[str, str]:
    """The sha256 of every file of these tasks, and of the base."""
    files = [file for name in names for file in (folder / name).iterdir()] + [folder / BASE]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def logits_of(folder: Path, name: str, task: Task) -> Tensor:
    """What a network with the weights of the base and the task's adapter gives for the test rows."""
    backbone = tiny_net()
    load_weights(backbone.model, folder / BASE)
    load_mask(backbone.model, folder / name)
    assert task.data.test is not None
    return predictions(backbone.model, readable(loader(task.data.test, backbone.preprocess)))[0]


@pytest.fixture(scope="module")
def gated(tasks: dict[str, Task], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gated")
    return folder, train_tasks(tiny_net(), two(tasks), folder, mode="gated", config=QUICK, joint=FAST)


def test_gated_adapters_are_the_hardened_network(gated: Any, tasks: dict[str, Task]) -> None:
    folder, result = gated
    backbone = tiny_net()
    run = JointRun(backbone, two(tasks), QUICK, FAST, gated=True)
    run.train(RunFolder({}))
    assert run.gates is not None
    soft = run.accuracies("test")
    run.gates.hard = True
    for name, task in two(tasks).items():
        module = run.use(name).module
        assert task.data.train is not None
        recalibrate(module, readable(loader(task.data.train, backbone.preprocess, batch_size=QUICK.batch_size)))
    run.settle()
    for row, (name, task) in zip(result["rows"], two(tasks).items(), strict=True):
        module = run.use(name).module
        assert task.data.test is not None
        hard = predictions(module, readable(loader(task.data.test, backbone.preprocess)))[0]
        assert torch.equal(logits_of(folder, name, task), hard)
        assert row["task"] == name
        assert row["soft_accuracy"] == soft[f"test_accuracy_{name}"]
        assert row["jointly"]
        labels = torch.tensor([task.data.test.labels[i] for i in task.data.test.indices])
        assert row["accuracy"] == pytest.approx(float((hard.argmax(1) == labels).double().mean()))
        adapter = load_adapter(folder / name)
        assert adapter.parts().masks == run.gates.masks(name)
        assert sorted(adapter.parts().masks) == ["conv1.weight", "conv2.weight"]
        assert list(adapter.parts().norms) == ["bn1", "bn2"]
        assert not adapter.parts().dense
        assert adapter.about.training is not None
        assert adapter.about.training["joint"]["gate_factor"] == 8
    run.close()
    shared = tiny_net()
    load_weights(shared.model, folder / BASE)
    for name, weight in backbone.model.named_parameters():
        assert torch.equal(weight, shared.model.get_parameter(name)), "the file has the weights as they are"
    assert not torch.equal(tiny_net().model.conv1.weight, shared.model.conv1.weight)
    assert not torch.equal(tiny_net().model.bn1.weight, shared.model.bn1.weight), "norms learn as well"
    assert torch.equal(tiny_net().model.fc.weight, shared.model.fc.weight), "its own head does not"


def test_accuracy_of_the_loaded_adapter(gated: Any, tasks: dict[str, Task]) -> None:
    folder, result = gated
    backbone = tiny_net()
    load_weights(backbone.model, folder / BASE)
    adapter = load_adapter(folder / "high")
    load_mask(backbone.model, adapter)
    assert tasks["high"].data.test is not None
    found = adapter_accuracy(backbone.model, adapter, tasks["high"].data.test)
    assert found["accuracy"] == result["rows"][1]["accuracy"]
    assert json.loads((folder / RESULT).read_text()) == result


def test_histograms_of_a_run(gated: Any) -> None:
    history = json.loads((gated[0] / "training/jointly" / HISTOGRAMS).read_text())
    assert len(history["rows"]) == QUICK.epochs + 1
    steps = [row["step"] for row in history["rows"]]
    assert steps[0] == 0 < steps[1] < steps[2]
    for row in history["rows"]:
        for kind in ("gates", "weights"):
            assert {n: sum(c) for n, c in row[kind]["high"].items()} == {"conv1.weight": 216, "conv2.weight": 1152}
    first = history["rows"][0]["gates"]["low"]["conv1.weight"]
    assert max(first) == 216, "all gates start at the same value"
    for task in ("low", "high"):
        assert max(history["rows"][2]["gates"][task]["conv1.weight"]) < 216, "every task is drawn"


@pytest.mark.parametrize("mode", ["sequential", "gated"])
def test_a_task_that_is_added_leaves_the_others_alone(
    mode: Any, gated: Any, tasks: dict[str, Task], tmp_path: Path
) -> None:
    options = {"mode": mode, "config": replace(QUICK, epochs=1)}
    if mode == "gated":
        options |= {"joint": FAST, "config": QUICK}
        folder = gated[0]
    else:
        folder = tmp_path
        train_tasks(named(), two(tasks), folder, **options)
    before = digests(folder, "low", "high")
    logits = logits_of(folder, "low", tasks["low"])
    events = list[Mapping[str, Any]]()
    result = train_tasks(named(), tasks, folder, report=events.append, **options)
    assert {event["part"] for event in events} == {"odd"}
    assert digests(folder, "low", "high") == before
    assert torch.equal(logits_of(folder, "low", tasks["low"]), logits)
    assert [row["task"] for row in result["rows"]] == list(tasks)
    assert [row["jointly"] for row in result["rows"]] == [mode == "gated"] * 2 + [False]
    bases = [load_adapter(folder / name).base for name in tasks]
    assert bases[0].digests == bases[1].digests == bases[2].digests
    # weights that learned are not those that the backbone's name and revision stand for
    known = ("tests:tiny", "r1") if mode == "sequential" else ("trained:tests:tiny", None)
    assert {(base.id, base.revision) for base in bases} == {known}
    assert logits_of(folder, "odd", tasks["odd"]).shape[1] == 3
    plan = plan_tasks(tiny_net(), tasks, folder, **{"joint": JointConfig(), **options})
    assert (plan["missing"], plan["steps"]) == ([], 0)


def test_in_a_row_the_backbone_stays_as_it_is(tasks: dict[str, Task], tmp_path: Path) -> None:
    backbone = tiny_net()
    before = bits(backbone.model)
    train_tasks(backbone, {"odd": tasks["odd"]}, tmp_path, config=replace(QUICK, epochs=1))
    assert same(bits(backbone.model), before)
    other = tiny_net()
    load_weights(other.model, tmp_path / BASE)
    assert same(bits(other.model), before)


def test_a_joint_run_goes_on_where_it_stopped(gated: Any, tasks: dict[str, Task], tmp_path: Path) -> None:
    def report(event: Mapping[str, Any]) -> None:
        if event["event"] == "epoch" and event["epoch"] == 2:
            raise StopHere

    def run(**options: Any) -> dict[str, Any]:
        config = options.pop("config", QUICK)
        return train_tasks(tiny_net(), two(tasks), tmp_path, mode="gated", config=config, joint=FAST, **options)

    with pytest.raises(StopHere):
        run(report=report)
    assert not (tmp_path / "low").exists()
    with pytest.raises(StateError, match="holds the checkpoint of an earlier run; continue it with resume"):
        run()
    with pytest.raises(StateError, match=r"jointly belongs to another run: epochs differ; resume with the same"):
        run(config=replace(QUICK, epochs=3), resume=True)
    events = list[Mapping[str, Any]]()
    run(resume=True, report=events.append)
    assert [event["epoch"] for event in events if event["event"] == "epoch"] == [2]
    assert digests(tmp_path, "low", "high") == digests(gated[0], "low", "high")
    histograms = [folder / "training/jointly" / HISTOGRAMS for folder in (tmp_path, gated[0])]
    assert histograms[0].read_bytes() == histograms[1].read_bytes()
    # what is lost can be made again from the run's checkpoint
    before = digests(tmp_path, "low", "high")
    (tmp_path / BASE).unlink()
    run(resume=True)
    assert digests(tmp_path, "low", "high") == before


def test_a_finished_task_is_not_trained_otherwise(gated: Any, tasks: dict[str, Task]) -> None:
    folder = gated[0]

    def again(backbone: Backbone | None = None, own: Mapping[str, Task] | None = None, **options: Any) -> None:
        options = {"mode": "gated", "config": QUICK, "joint": FAST, **options}
        train_tasks(backbone or tiny_net(), own or two(tasks), folder, **options)

    kept = digests(folder, "low", "high")
    start = "the task 'low' in .* is finished, and was trained with other settings or data: "
    with pytest.raises(StateError, match=start + "epochs 2, now 3; take the earlier ones, another name, or another"):
        again(config=replace(QUICK, epochs=3))
    with pytest.raises(
        StateError, match=start + "weight_lr 0.01, now 0.02; gate_start 0.5, now 2.0; r1 1e-05, now 0.0; take"
    ):
        again(joint=JointConfig(weight_lr=0.02, r2=1e-5))
    with pytest.raises(StateError, match=start + "augment none, now flip; take"):
        again(own={"low": Task(tasks["low"].data, "flip")})
    with pytest.raises(StateError, match=start + "data; rows; classes; take"):
        again(own={"low": tasks["high"]})
    with pytest.raises(StateError, match="holds results of other settings: mode;"):
        again(mode="shared", joint=JointConfig(weight_lr=0.01))
    changed = tiny_net()
    with torch.no_grad():
        changed.model.conv1.weight += 1
    with pytest.raises(StateError, match="holds results of other settings: weights;"):
        again(changed)
    base = (folder / BASE).read_bytes()
    try:
        tensors = read_tensors(folder / BASE)
        write_tensors(folder / BASE, {**tensors, "conv1.weight": -tensors["conv1.weight"]}, {})
        with pytest.raises(StateError, match=r"safetensors is not the base of the task 'low': one of them was ch"):
            again()
    finally:
        (folder / BASE).write_bytes(base)
    assert digests(folder, "low", "high") == kept
    claim = (folder / CLAIM).read_text()
    try:
        (folder / CLAIM).write_text("{}")
        with pytest.raises(StateError, match="multitask.json must have .*; choose another folder"):
            again()
    finally:
        (folder / CLAIM).write_text(claim)


@pytest.mark.parametrize("mode", ["shared", "separate"])
def test_baselines(mode: Any, tasks: dict[str, Task], tmp_path: Path) -> None:
    joint, config = JointConfig(weight_lr=0.01), replace(QUICK, steps=5)
    result = train_tasks(tiny_net(), two(tasks), tmp_path, mode=mode, config=config, joint=joint)
    for row in result["rows"]:
        assert (row["density"], row["soft_accuracy"]) == (1.0, None)
        place = tmp_path if mode == "shared" else tmp_path / row["task"]
        backbone = tiny_net()
        load_weights(backbone.model, place / BASE)
        adapter = load_adapter(tmp_path / row["task"])
        load_mask(backbone.model, adapter)
        examples = tasks[row["task"]].data.test
        assert examples is not None
        assert adapter_accuracy(backbone.model, adapter, examples)["accuracy"] == row["accuracy"]
        assert adapter.about.training is not None
        assert adapter.about.training["steps"] == (10 if mode == "shared" else 5)
        assert adapter.about.training["joint"]["tasks"] == (["low", "high"] if mode == "shared" else [row["task"]])
    bases = {load_adapter(tmp_path / row["task"]).base.digests["float32"] for row in result["rows"]}
    assert len(bases) == (1 if mode == "shared" else 2)
    assert not list(tmp_path.rglob(HISTOGRAMS))
    kept = {file: file.read_bytes() for file in tmp_path.rglob("*.safetensors")}
    train_tasks(tiny_net(), two(tasks), tmp_path, mode=mode, config=config, joint=joint)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.safetensors")} == kept


def test_the_backbone_comes_back_whole(tasks: dict[str, Task]) -> None:
    backbone = tiny_net()
    head, before = backbone.model.fc, dict(backbone.model.named_buffers())
    flags = {name: p.requires_grad for name, p in backbone.model.named_parameters()}
    seen = {name: buffer.clone() for name, buffer in before.items()}
    result = train_jointly(backbone, two(tasks), replace(QUICK, steps=4, store="float32"), FAST)
    assert backbone.model.fc is head
    assert not any(isinstance(one, GatedWeight) for one in backbone.model.modules())
    assert {name: p.requires_grad for name, p in backbone.model.named_parameters()} == flags
    statistics = [one.parts.statistics["bn1.running_mean"] for one in result.values()]
    assert not torch.equal(*statistics), "each task has its own"
    assert torch.allclose(backbone.model.bn1.running_mean, (statistics[0] + statistics[1]) / 2)
    assert all(backbone.model.get_buffer(name) is buffer for name, buffer in before.items())
    assert torch.equal(seen["bn1.num_batches_tracked"], backbone.model.bn1.num_batches_tracked)
    frozen = train_jointly(tiny_net(), two(tasks), replace(QUICK, steps=2, bn="freeze"), FAST)
    assert not frozen["low"].parts.statistics


def test_masks_that_keep_everything_are_said(tasks: dict[str, Task]) -> None:
    events = list[Mapping[str, Any]]()
    train_jointly(tiny_net(), two(tasks), replace(QUICK, steps=1), report=events.append)
    warnings = [event["warning"] for event in events if event["event"] == "warning"]
    said = "no gate has closed, so that the mask keeps everything; take more steps, a g"
    assert [one.partition(": ")[0] for one in warnings if said in one] == ["low", "high"]


@pytest.mark.parametrize("gated", [True, False])
def test_joint_training_says_what_it_was_worth(tasks: dict[str, Task], gated: bool) -> None:
    backbone = tiny_net()
    probes = {name: probe_accuracies(backbone, task.data, 16) for name, task in two(tasks).items()}
    # gates that close by themselves, so that the network without them is another one
    config, joint = replace(QUICK, steps=20), replace(FAST, gate_start=0.05)
    found = train_jointly(backbone, two(tasks), config, joint if gated else None, gated=gated)
    for name, one in found.items():
        assert one.metrics["test_probe_accuracy"] == probes[name]["test_probe_accuracy"]
        assert one.metrics["test_over_probe"] == one.metrics["test_accuracy"] - one.metrics["test_probe_accuracy"]
        assert ("test_accuracy_without_masks" in one.metrics) == gated
        assert one.about.training is not None
        assert one.about.training["lora_bytes"] == {"rank_1_4bit": 17 + 44, "rank_8_4bit": 8 * 123 // 2}
        low = one.metrics["test_over_probe"] <= 0
        assert any("was not worth it" in text for text in one.about.training.get("warnings", [])) == low
    if gated:
        assert any(one.metrics["test_accuracy_without_masks"] != one.metrics["test_accuracy"] for one in found.values())


def test_accumulated_batches_are_one_step(tasks: dict[str, Task]) -> None:
    weights = []
    for batch_size, accumulate in ((16, 1), (8, 2)):
        config = replace(QUICK, steps=1, batch_size=batch_size, accumulate=accumulate, optimizer="sgd", bn="freeze")
        backbone = tiny_net()
        result = train_jointly(backbone, {"low": tasks["low"]}, config, JointConfig(gate_start=0.5))
        assert result["low"].about.training["steps"] == 1
        weights.append(backbone.model.conv1.weight.detach())
    assert torch.allclose(*weights, atol=1e-6)
    assert float((weights[0] - tiny_net().model.conv1.weight.detach()).abs().max()) > 1e-4
    train_jointly(tiny_net(), two(tasks), replace(QUICK, steps=1, clip=1.0), FAST)


def test_impossible_settings(tasks: dict[str, Task], tmp_path: Path) -> None:
    def run(own: Mapping[str, Task] | None = None, **options: Any) -> None:
        folder = tmp_path / "new" / str(options.get("mode"))
        train_tasks(tiny_net(), two(tasks) if own is None else own, folder, **{"config": QUICK, **options})

    for name in ("training", "jointly", "a/b", ".a", "", "ä"):
        with pytest.raises(ConfigError, match="a task cannot be called '.*': its folder has this name; take letters"):
            run({name: tasks["low"]})
    with pytest.raises(ConfigError, match="a task cannot be called 'LOW': .* another name for each task"):
        run({"low": tasks["low"], "LOW": tasks["high"]})
    with pytest.raises(ConfigError, match="mode must be one of sequential, gated, shared, separate, got 'both'"):
        run(mode="both")
    with pytest.raises(ConfigError, match="there is no task; name at least one"):
        run({})
    with pytest.raises(ConfigError, match="are for weights that learn; in sequence only masks do"):
        run(joint=FAST)
    with pytest.raises(
        ConfigError, match="gate_start, r1 and r2 are for gates, and the mode 'shared' has none; leave them out"
    ):
        run(mode="shared", joint=FAST)
    with pytest.raises(ConfigError, match="tasks learn together with the objective 'supervised' and linear heads, got"):
        run(mode="gated", config=replace(QUICK, head_kind="masked"))
    for name, value, shown in (
        ("train", ("bn1.bias",), r"\('bn1.bias',\)"),
        ("selective", "random:0.5", "'random:0.5'"),
        ("scale", True, "True"),
        ("bytes_budget", 100, "100"),
        ("rate", 0.5, "0.5"),
    ):
        for mode in ("gated", "shared", "separate"):
            said = f"{name} is for masks on frozen weights, and here all weights learn; leave it out, got {shown}"
            with pytest.raises(ConfigError, match=said):
                run(mode=mode, config=replace(QUICK, **{name: value}))
    for name, value in (("weight_lr", 0.0), ("gate_factor", -1.0), ("gate_start", 0.0)):
        with pytest.raises(ConfigError, match=f"{name} must be a finite number above 0, got {value}"):
            JointConfig(**{name: value})
    with pytest.raises(ConfigError, match=r"r2 must be a finite number at least 0, got -1.0"):
        JointConfig(r2=-1.0)
    with pytest.raises(StateError, match="resume needs the folder of the run in `output`"):
        train_jointly(tiny_net(), two(tasks), QUICK, resume=True)
    with pytest.raises(TrainingError, match="the loss of '.*' is .* lower the learning rates .* or clip gradients"):
        train_jointly(tiny_net(), two(tasks), replace(QUICK, head_lr=1e37))
    low = tasks["low"].data
    assert low.train is not None
    broken = replace(low, train=replace(low.train, unreadable=set(low.train.indices)))
    with pytest.raises(TrainingError, match="no example of the training split of 'low' can be read"):
        train_jointly(tiny_net(), {"low": Task(broken)}, QUICK)
    with pytest.raises(DataError, match="have no training split"):
        train_jointly(tiny_net(), {"low": Task(replace(low, train=None))}, QUICK)
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").rglob("*.safetensors"))


# --- the command line ------------------------------------------------------------------------------------------------

COMMON = f"""
backbone = "{FACTORY}"
random-weights = 0
epochs = 1
batch-size = 32
labels-fraction = 0.1
validation-fraction = 0.05
weight-lr = 0.01
mode = "gated"
"""


def task_table(name: str, data: str, more: str = "") -> str:
    return f'\n[[task]]\nname = "{name}"\ndata = "{data}"\n{more}\n'


def cli(folder: Path, text: str, *words: str) -> Result:
    (folder / "tasks.toml").write_text(text)
    return CliRunner().invoke(app, ["multitask", str(folder / "tasks.toml"), "--output", str(folder / "out"), *words])


def test_verb(tmp_path: Path) -> None:
    first = COMMON + task_table("low", "digits:0-1") + task_table("high", "digits:2-3", 'augment = "crop"')
    planned = cli(tmp_path, first, "--dry-run", "--json")
    assert planned.exit_code == 0, planned.stderr
    assert json.loads(planned.stdout)["missing"] == ["low", "high"]
    assert not (tmp_path / "out").exists()
    done = cli(tmp_path, first)
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    shares = "accuracy | before hardening | without the masks | linear probe"
    assert lines[0] == f"| task | {shares} | density | mask bytes | file bytes |"
    assert [line.split()[1] for line in lines[2:]] == ["low", "high"]
    # what it names as the next command can be typed as it stands
    (following,) = re.findall("Next: maskpack (eval .*)", done.stderr)
    shown = CliRunner().invoke(app, [*shlex.split(following), "--json"])
    assert (
        json.loads(shown.stdout)["accuracy"]
        == load_adapter(tmp_path / "out/low").about.training["metrics"]["test_accuracy"]
    )  # type: ignore[index]
    settings = load_adapter(tmp_path / "out/high").about.training["settings"]  # type: ignore[index]
    assert (settings["augment"], settings["epochs"]) == ("crop", 1)
    before = digests(tmp_path / "out", "low", "high")
    more = cli(tmp_path, first + task_table("few", "digits:4-5", "labels-fraction = 0.2"), "--json")
    assert more.exit_code == 0, more.stderr
    assert "To train: few, " in more.stderr
    assert "finished before: low, high" in more.stderr
    rows = json.loads(more.stdout)["rows"]
    assert [(row["task"], row["jointly"]) for row in rows] == [("low", True), ("high", True), ("few", False)]
    assert digests(tmp_path / "out", "low", "high") == before
    changed = cli(tmp_path, first, "--epochs", "2")
    assert changed.exit_code == 1
    assert "epochs 1, now 2" in changed.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (COMMON, "has no tasks; write a table [[task]] with name and data for each"),
        (COMMON + "task = 3", "has no tasks; write a table [[task]]"),
        (
            COMMON + "[tasks.a]\ndata='x'",
            "the setting 'tasks', which cannot stand there; known: the tables [[task]], bac",
        ),
        (COMMON + "[[task]]\nname = 'a'", "task 1 of .* lacks data; give each task a name and data"),
        (
            COMMON + "[[task]]\nname = 'a'\ndata='x'\nepochs = 3",
            "task 1 of .* has the setting 'epochs', which",
        ),
        (COMMON + "[[task]]\nname = 3\ndata='x'", "task 1 of .*: name must be a text, got 3"),
        (COMMON + 2 * task_table("a", "digits:0-4"), "has several tasks called 'a'; give each a name of its own"),
        ("data = 'x'\n" + task_table("a", "x"), "has the setting 'data', which cannot stand there"),
        (task_table("a", "digits:0-4"), "Missing option '--backbone'"),
        (
            COMMON.replace('"gated"', '"both"') + task_table("a", "digits:0-4"),
            "'both' is not one of",
        ),
        (
            COMMON + 'objective = "swav"\n' + task_table("a", "digits:0-4", 'augment = "flip"'),
            "the objective 'swav' does not use --augment; leave out what is for labels",
        ),
        (
            COMMON + 'objective = "swav"\nlabel-smoothing = 0.1\n' + task_table("a", "digits:0-4"),
            "the objective 'swav' does not use --label-smoothing; leave out",
        ),
    ],
)
def test_wrong_tables(text: str, expected: str, tmp_path: Path) -> None:
    result = cli(tmp_path, text)
    assert result.exit_code == 2, result.output
    assert re.search(
        expected.replace("[[", r"\[\[").replace("]]", r"\]\]"), " ".join(result.stderr.replace("│", "").split())
    )
    assert not (tmp_path / "out").exists()


# --- pictures --------------------------------------------------------------------------------------------------------


def picture(folder: Path, *words: str) -> list[str]:
    """Draw with the command line; return the words in the picture."""
    path = folder / "picture.svg"
    done = CliRunner().invoke(app, ["plot", *words, "--output", str(path)])
    assert done.exit_code == 0, done.stderr
    texts = ElementTree.parse(path).getroot().iter("{http://www.w3.org/2000/svg}text")
    return ["".join(text.itertext()) for text in texts]


def test_pictures(gated: Any, tmp_path: Path) -> None:
    folder = gated[0]
    words = picture(tmp_path, "gates", str(folder))
    assert {"low", "high", "gate", "effective weight", "share of the values", "0"} <= set(words)
    words = picture(tmp_path, "features", str(folder / "low"), str(folder / "high"))
    assert {"conv1", "conv2", "no task", "one task", "all 2 tasks"} <= set(words)


def test_gates_that_move_over_time(gated: Any) -> None:
    history = json.loads((gated[0] / "training/jointly" / HISTOGRAMS).read_text())
    shares = over_time(history["rows"], "gates", "low")
    assert shares.shape == (QUICK.epochs + 1, history["bins"])
    assert shares.sum(1) == pytest.approx(1)
    assert shares[0].max() == 1
    assert shares[1].max() < 1
    counts = history["rows"][2]["gates"]["low"]
    total = [a + b for a, b in zip(counts["conv1.weight"], counts["conv2.weight"], strict=True)]
    assert shares[2] == pytest.approx([one / sum(total) for one in total])


def test_users_of_weights() -> None:
    torch.manual_seed(0)
    bits_of = {task: {"a": torch.rand(5, 7) < 0.5, "b": torch.rand(9) < 0.8} for task in ("x", "y", "z")}
    masks = {task: MaskSet.from_tensors(own) for task, own in bits_of.items()}
    expected = {
        name: [int((sum(own[name].int() for own in bits_of.values()) == k).sum()) for k in range(4)]
        for name in ("a", "b")
    }
    assert users(masks) == expected
    assert sum(expected["a"][1:3]) > 0
    # a task without a mask there uses all of it
    masks["z"] = MaskSet.from_tensors({"a": bits_of["z"]["a"]})
    b = bits_of["x"]["b"].int() + bits_of["y"]["b"].int() + 1
    assert users(masks)["b"] == torch.bincount(b, minlength=4).tolist()


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no masked parameter to draw"):
        users({})
    one, other = (MaskSet.from_tensors({"a": torch.ones(n, dtype=torch.bool)}) for n in (3, 4))
    with pytest.raises(ConfigError, match=r"'a' have the shapes \(3,\) and \(4,\)"):
        users({"x": one, "y": other})
    empty = {"weight_end": 1, "rows": [{"step": 0, "gates": {"a": {"w": [0]}}, "weights": {"a": {"w": [0]}}}]}
    for wrong in ({}, [], {"weight_end": 1, "rows": []}, {"weight_end": 1, "rows": [{"gates": 3}]}, empty):
        with pytest.raises(
            ConfigError, match="there are no histograms of gates to draw; give the histograms.json of a"
        ):
            gate_figure(wrong)
    refused = CliRunner().invoke(app, ["plot", "gates", str(tmp_path), "--output", str(tmp_path / "x.svg")])
    assert refused.exit_code == 1
    assert "expected the histograms.json of a gated run; give its output folder" in " ".join(refused.stderr.split())
