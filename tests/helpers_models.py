"""Small models, masks and adapters for tests."""

import copy
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from maskpack.adapter.content import About, Parts
from maskpack.adapter.read import Adapter
from maskpack.adapter.write import save_adapter
from maskpack.backbone.fingerprint import fingerprint
from maskpack.backbone.load import Backbone
from maskpack.backbone.model import Embedding, Head, same_size_int
from maskpack.backbone.select import select_parameters
from maskpack.importers.base import import_file
from maskpack.mask import MaskSet, PackedMask
from maskpack.preprocess import ImagePreprocess
from maskpack.training import TrainConfig, load_data
from maskpack.training.trainer import train_mask

from .conftest import TinyNet

CLASSES = ("a", "b", "c", "d", "e", "f", "g")


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: same_size_int(t.clone()) if t.is_floating_point() else t.clone() for n, t in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def random_masks(model: nn.Module, seed: int = 0, scale: bool = False, density: float = 0.7) -> MaskSet:
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    names = [n for n in select_parameters(model) if not n.startswith("fc")]
    return MaskSet.from_tensors(
        {n: torch.rand(parameters[n].shape, generator=generator) < density for n in names}, scale=scale
    )


def make_adapter(path: Path, model: nn.Module, *, seed: int = 0, scale: bool = False, classes: int = 7) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(classes, 16, generator=generator), torch.randn(classes, generator=generator)
    head = Head(Embedding("fc"), weight, bias)
    statistics = {
        f"bn{i}.running_{what}": torch.rand(8 * i, generator=generator) for i in (1, 2) for what in ("mean", "var")
    }
    return save_adapter(
        path,
        Parts(random_masks(model, seed, scale), head, statistics),
        fingerprint(model, id="tests:tiny", head=["fc"]),
        task="image-classification",
        class_names=CLASSES[:classes],
        preprocess={"kind": "image", "size": 8, "resize": 8},
    )


KINDS = ("zero", "scaled", "flip", "replace", "ternary")


def masks_of(model: nn.Module, kind: str, seed: int, density: float = 0.7) -> Parts:
    """Masks of one kind on the body, with values where they replace."""
    masks = random_masks(model, seed, scale=kind == "scaled", density=density)
    if kind in ("flip", "replace"):
        masks = MaskSet({name: PackedMask(mask.bits, mask.shape, kind) for name, mask in masks.items()})  # type: ignore[arg-type]
    if kind == "ternary":
        signs = random_masks(model, seed + 100)
        masks = MaskSet({name: PackedMask(m.bits, m.shape, signs=signs[name].bits) for name, m in masks.items()})
    values = {name: torch.randn(mask.bits.count(0)) for name, mask in masks.items()} if kind == "replace" else {}
    return Parts(masks, values=values)


def adapter_of(path: Path, model: nn.Module, kind: str, seed: int, head: int | None = None) -> Path:
    """Write an adapter of a tiny net, with statistics for every other seed, and a head of `head` classes."""
    parts = masks_of(model, kind, seed)
    generator = torch.Generator().manual_seed(seed)
    layer = None if head is None else Head(Embedding("fc"), torch.randn(head, 16, generator=generator))
    if head == 5:
        weight, bias = torch.randn(5, 16, generator=generator), torch.randn(5, generator=generator)
        layer = Head(Embedding("fc"), weight, bias)
    statistics = {"bn1.running_mean": torch.rand(8, generator=generator)} if seed % 2 else {}
    whole = Parts(parts.masks, layer, statistics, {}, parts.values)
    names = None if layer is None else tuple("abcdefg"[: layer.weight.shape[0]])
    task = "image-classification" if layer is not None else "image-features"
    save_adapter(path, whole, fingerprint(model, id="tests:tiny", head=["fc"]), task=task, class_names=names)
    return path


QUICK = TrainConfig(epochs=2, batch_size=16, optimizer="sgd", lr=20.0, scale=True, augment="none", train=(), bn="adapt")


def tiny_net() -> Backbone:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TinyNet()
        model(torch.randn(32, 3, 8, 8))
    return Backbone(model.eval(), "tests:tiny", embedding=Embedding("fc"), preprocess=ImagePreprocess(8, 8))


class StopHere(Exception):  # noqa: N818
    pass


QUICK_CROPS = TrainConfig(epochs=2, batch_size=16, lr=0.2, augment="crop-flip", clip=1.0)  # 8 steps an epoch


def dropout_net() -> Backbone:
    """A small network with dropout and BatchNorm."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(TinyNet().conv1, nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.AdaptiveAvgPool2d(2),
                              nn.Flatten(), nn.Linear(32, 5))  # fmt: skip
    return Backbone(model.eval(), "tests:dropout", embedding=Embedding("6"), preprocess=ImagePreprocess(8, 8))


def resumable(folder: Path, resume: bool = False, report: Any = None) -> Any:
    """A run whose every part is random: dropout, augmentation, order."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(TinyNet().conv1, nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.AdaptiveAvgPool2d(2),
                              nn.Flatten(), nn.Linear(32, 5))  # fmt: skip
    from maskpack.preprocess import ImagePreprocess

    backbone = Backbone(model.eval(), "tests:resumable", embedding=Embedding("6"), preprocess=ImagePreprocess(8, 8))
    config = TrainConfig(epochs=4, batch_size=64, lr=0.05, augment="crop-flip", clip=1.0)
    return train_mask(backbone, load_data("digits:5-9"), config, output=folder, resume=resume, report=report)


TINY_FACTORY = """
from torch import nn

def tiny():
    body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1, bias=False))
    model = nn.Sequential(body, nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    model.pretrained_cfg = {"input_size": (3, 8, 8)}
    return model

def bare():
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
"""  # noqa: E501


def shard(folder: Path, state: dict[str, Tensor], size: str = "4KB") -> Path:
    """Write a state dict with the Hub's own writer; return the folder."""
    folder.mkdir()
    save_torch_state_dict(state, folder, max_shard_size=size)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


LETTERS = [*string.ascii_lowercase, *(c + "</w>" for c in string.ascii_lowercase), "<|startoftext|>", "<|endoftext|>"]


TOWER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


VISION = {**TOWER, "image_size": 16, "patch_size": 8, "projection_dim": 12}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model with random weights and a tokenizer of letters, as `save_pretrained` writes them."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("models") / "tiny-clip"
    text = {**TOWER, "vocab_size": 54, "max_position_embeddings": 48}
    text |= {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=12)
        transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPTokenizer(vocab={piece: i for i, piece in enumerate(LETTERS)}, merges=[]).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}
    transformers.CLIPImageProcessor(**sizes).save_pretrained(folder)
    return folder


def stepped(model: nn.Module, seed: int) -> nn.Module:
    """Return a copy after a small step, of one layer nearly all, of one nothing in every second step."""
    generator, tuned = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            step = 0.3 if name == "fc.weight" else 3e-4
            if name != "conv2.weight" or seed % 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_((parameter.float() + step * noise).to(parameter.dtype))
        tuned.bn1.running_mean.add_(0.5)  # type: ignore[union-attr]
    return tuned


def patch(path: Path, base: nn.Module, tuned: nn.Module) -> Adapter:
    file = path.with_name(f"{path.name}.tuned.safetensors")
    save_file(tuned.state_dict(), file)
    found = import_file(file, base, "checkpoint")
    parts = Parts(found.masks, statistics=found.statistics, values=found.values)
    about = About(result=fingerprint(tuned, id="x").digests)
    return save_adapter(path, parts, fingerprint(base, id="tests:tiny"), about, weights=base, profile="max")
