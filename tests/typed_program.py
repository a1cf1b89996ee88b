"""A user's program, for mypy --strict: every public object with the types that a reader of the docs expects."""

# ruff: noqa: T201

from pathlib import Path

import torch
from torch import Tensor, nn

from maskpack import (
    Adapter,
    Backbone,
    MaskBank,
    MaskpackError,
    MaskSet,
    Parts,
    Prediction,
    combine,
    fingerprint,
    identify,
    inspect_adapter,
    load_adapter,
    load_backbone,
    load_cascade,
    load_mask,
    load_masked,
    pull,
    push,
    save_adapter,
    search_adapters,
    unload_mask,
)
from maskpack.training import (
    Data,
    Task,
    TrainConfig,
    TrainResult,
    attach_gates,
    attach_scores,
    count_trainable,
    extract_masks,
    extract_parts,
    load_data,
    train_auto,
    train_cascade,
    train_mask,
    train_tasks,
    train_transfer,
)


class Network(nn.Module):
    """A network of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc(x)
        return found


def train(folder: Path) -> TrainResult:
    """Train, save and measure."""
    backbone: Backbone = load_backbone("timm/resnet18.a1_in1k", image_size=96)
    data: Data = load_data(folder, validation_fraction=0.1)
    result: TrainResult = train_mask(backbone, data, TrainConfig(steps=200), output=folder / "run", resume=False)
    adapter: Adapter = save_adapter(folder / "mask", result.parts, result.base, result.about)
    accuracy: float = result.metrics["test_accuracy"]
    print(adapter.size, accuracy, train_auto(backbone, data, search_steps=100).metrics)
    cascade = train_cascade(backbone, data, experts=3)
    save_adapter(folder / "cascade", cascade.parts, cascade.base, cascade.about, cascade=cascade.cascade)
    moved: TrainResult = train_transfer(backbone, data, data)
    train_tasks(backbone, {"one": Task(data), "two": Task(data, "crop")}, folder / "tasks")
    return moved


def use(images: list[str], batch: Tensor) -> list[Prediction]:
    """Load, predict, switch, undo."""
    model: Network = load_mask(Network(), "user/mask", head="keep", verify="warn", revision="main")
    model = unload_mask(model)
    model = load_masked(model, "base.safetensors", "user/mask", dtype=torch.bfloat16)
    adapter: Adapter = load_adapter("./mask")
    found: list[Prediction] = adapter.predict(model, images)
    label: str = found[0].label
    with MaskBank(model, max_host_bytes=1 << 30) as bank:
        name: str = bank.add(adapter, pin=True)
        outputs: list[Tensor] = bank(batch, masks=[name, None])
        print(label, outputs, identify(bank, batch).name, load_cascade(model, "./cascade").embed(batch))
    return found


def own_loop(model: Network) -> Parts:
    """Learn in a loop of one's own."""
    scores: dict[str, nn.Parameter] = attach_scores(model, "threshold", ["fc.weight"], top=0.1)
    optimizer = torch.optim.Adam(scores.values())
    optimizer.step()
    print(count_trainable(model), extract_masks(model).density, attach_gates(Network(), ["a", "b"]).tasks)
    return extract_parts(model)


def share(model: Network, parts: Parts) -> None:
    """Combine, save, publish and find."""
    masks: MaskSet = combine(
        "majority", [parts.masks, parts.masks, MaskSet.from_tensors({"fc.weight": torch.ones(2, 8)})]
    )
    try:
        save_adapter("./mine", masks, fingerprint(model, id="my-network"), class_names=("no", "yes"))
    except MaskpackError as error:
        print(error, inspect_adapter("./mine")["size"])
    url: str = push("./mine", "user/mine", private=True).url
    path: Path = pull("user/mine").path
    names: list[str] = [one.repo_id for one in search_adapters(base="timm/resnet18.a1_in1k")]
    print(url, path, names)
