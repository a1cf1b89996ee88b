"""What the prompt shows of public objects, and what wrong or swapped arguments are told."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import maskpack as mp
from maskpack import MaskSet, Parts
from maskpack.backbone.model import Embedding, Head
from maskpack.errors import ConfigError, MaskpackError, StateError
from maskpack.mask import PackedMask
from maskpack.preprocess import ImagePreprocess
from maskpack.training import Data, Task, attach_gates, attach_scores, extract_parts, load_data, train_mask, train_tasks

GOLDEN = Path(__file__).parent / "golden" / "v1"
LONGEST = 400  # characters, as in three lines of a terminal


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 2)).eval()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model, its masks, an adapter, data, and their like, by short names."""
    model, folder = network(), tmp_path_factory.mktemp("reprs")
    masks = MaskSet.from_tensors({"1.weight": torch.arange(64 * 192).reshape(64, 192) % 3 > 0})
    head = Head(Embedding("3"), *(one.detach().clone() for one in model[3].parameters()))
    parts = Parts(masks, head, parameters={f"p{i}": torch.zeros(1000) for i in range(100)})
    base = mp.fingerprint(model, id="tests:network", head="3")
    how = ImagePreprocess(8, 8)
    about: dict[str, Any] = {"task": "image-classification", "class_names": ["no", "yes"], "preprocess": how}
    adapter = mp.save_adapter(folder / "a.safetensors", Parts(masks, head), base, **about)
    backbone = mp.Backbone(model, "tests:network", embedding=Embedding("3"), preprocess=how)
    learning = copy.deepcopy(model)
    attach_scores(learning, select="1.weight")
    return {
        **{"mp": mp, "Path": Path, "m": model, "masks": masks, "parts": parts, "base": base, "a": adapter},
        **{"b": backbone, "d": load_data("digits:0-1"), "learning": learning, "image": torch.zeros(3, 8, 8)},
        **{"train_mask": train_mask, "train_tasks": train_tasks, "Task": Task, "load_data": load_data},
        **{
            "attach_gates": attach_gates,
            "attach_scores": attach_scores,
            "extract_parts": extract_parts,
            "out": folder / "out",
        },
    }


def test_packed_mask_and_mask_set(world: dict[str, Any]) -> None:
    assert repr(world["masks"]) == "MaskSet(1 parameter, 12,288 weights, density 0.6667)"
    assert repr(world["masks"]["1.weight"]) == "PackedMask(64x192, zero, density 0.6667)"
    asked = list[str]()

    def make(name: str) -> PackedMask:
        asked.append(name)
        return PackedMask.from_tensor(torch.ones(2, dtype=torch.bool))

    assert repr(MaskSet.streamed(["x", "y"], make)) == "MaskSet(2 parameters, streamed)"
    assert not asked


def test_reprs_are_short(world: dict[str, Any]) -> None:
    cascade, heads = (mp.load_adapter(GOLDEN / f"{name}.safetensors") for name in ("cascade", "heads"))
    bank = mp.MaskBank(network())
    bank.add(world["masks"], "first")
    parts = [heads.parts(name) for name in heads.sets]
    objects = [world[name] for name in ("masks", "parts", "base", "a", "b", "d")]
    objects += [
        cascade,
        cascade.cascade,
        cascade.base,
        cascade.header,
        cascade.about,
        heads,
        *parts,
        bank,
        bank.status(),
    ]
    objects += [world["d"].train, attach_gates(network(), ["a", "b"]), *(one.head for one in parts if one.head)]
    for one in objects:
        shown = repr(one)
        assert type(one).__name__ in shown.partition("(")[0]
        assert len(shown) <= LONGEST, shown
        assert "\n" not in shown
    assert "first" in repr(bank)
    assert repr(world["parts"]).startswith("Parts(MaskSet(1 parameter, 12,288 weights, density 0.6667), head ")
    assert repr(world["d"]) == "Data('digits:0-1', image-classification, 2 classes, train 290, test 70)"


# a call, and what its message has: what was wrong, what was expected, what to do
WRONG: dict[str, tuple[str, ...]] = {
    "mp.load_mask('timm/resnet18', a)": ("'timm/resnet18'", "expected a torch.nn.Module", "load_backbone"),
    "mp.load_mask(a, m)": ("the model is Adapter(", "expected a torch.nn.Module", "load_mask(model, ref)"),
    "mp.load_mask('x.safetensors', m)": ("the model is 'x.safetensors'", "load_mask(model, ref)"),
    "mp.load_mask(b, a)": ("the model is Backbone(", "`.model`"),
    "mp.load_mask(m, masks)": ("the reference is MaskSet(", "user/name", "save_adapter"),
    "mp.load_mask(m, None)": ("the reference is None", "user/name"),
    "mp.unload_mask(a)": ("the model is Adapter(",),
    "mp.load_masked(m, a, 'x')": ("weights is Adapter(", "safetensors", "before the adapter"),
    "mp.load_cascade(a, m)": ("the model is Adapter(",),
    "mp.MaskBank(b)": ("the model is Backbone(", "`.model`"),
    "mp.identify(m, image)": ("the bank is Sequential(", "MaskBank(model)"),
    "mp.fingerprint('x', id='y')": ("the model is 'x'",),
    "mp.save_adapter(masks, 'x')": ("path is MaskSet(", "before the parts"),
    "mp.save_adapter('x', {'1.weight': image}, base)": ("what to save is Tensor float32 (3, 8, 8)", "from_tensors"),
    "mp.save_adapter('x', a)": ("what to save is Adapter(",),
    "mp.save_adapter('x', masks, m)": ("the base is Sequential(", "fingerprint(model, id="),
    "mp.combine([masks], 'and')": ("how is [MaskSet(", "majority"),
    "mp.combine('and', [a, a])": ("Adapter(", "adapter.parts().masks"),
    "mp.load_backbone(m)": ("the backbone is Sequential(", "timm/NAME"),
    "mp.load_adapter(a)": ("the reference is Adapter(",),
    "mp.inspect_adapter(m)": ("the adapter is Sequential(", "load_adapter"),
    "mp.MaskSet({'x': image})": ("mask 'x' is Tensor", "MaskSet.from_tensors"),
    "mp.MaskSet.from_tensors([image])": ("masks is", "dictionary"),
    "mp.push(a, 'user/x')": ("the folder is Adapter(", "save_adapter"),
    "mp.push('x', a)": ("the reference is Adapter(",),
    "train_mask(b, './x')": ("the data is './x'", "load_data('./x')"),
    "train_mask('timm/resnet18', d)": ("'timm/resnet18'", "load_backbone('timm/resnet18')"),
    "train_mask(d, b)": ("the model is Data(", "before the data"),
    "train_mask(b, d, {'steps': 2})": ("config is {'steps': 2}", "TrainConfig(steps=200)"),
    "train_tasks(b, {'t': d}, out)": ("the task 't' is Data(", "Task(load_data"),
    "train_tasks(b, {'t': Task('./x')}, out)": ("the data is './x'", "load_data('./x')"),
    "load_data(b)": ("the data is Backbone(", "folder"),
    "attach_scores(b)": ("the model is Backbone(", "`.model`"),
    "attach_gates(m, 2)": ("tasks is 2", "a list of names", "['birds', 'ships']"),
    "attach_gates(m, 'birds')": ("tasks is 'birds'", "a list of names"),
    "a.verify(m)": ("progress is Sequential(", "verify(base=model)"),
    "extract_parts(a)": ("the model is Adapter(",),
    "a.predict(m, image)": ("inputs are Tensor float32 (3, 8, 8)", "(B, 3, H, W)", "image[None]"),
    "a.predict(m, 'a.jpg')": ("inputs are 'a.jpg'", "a list", "[input]"),
    "a.predict(m, Path('a.jpg'))": ("a.jpg", "a list", "[input]"),
    "a.predict(m, [image])": ("an input is Tensor", "PIL image"),
    "a.predict(image, m)": ("the model is Tensor",),
}


@pytest.mark.parametrize("call", WRONG)
def test_wrong_arguments(call: str, world: dict[str, Any]) -> None:
    with pytest.raises(ConfigError if "masks, m)" not in call else MaskpackError) as caught:
        eval(call, dict(world))
    message = str(caught.value)
    assert all(piece in message for piece in WRONG[call]), message
    assert "; " in message
    assert not world["out"].exists()


def test_a_model_with_scores_or_one_image(world: dict[str, Any]) -> None:
    with pytest.raises(StateError, match="has scores that learn; save_adapter"):
        mp.load_mask(world["learning"], world["a"])
    from PIL import Image

    with pytest.raises(ConfigError, match=r"inputs are <PIL.*expected a list of images.*give \[input\]"):
        world["a"].predict(world["m"], Image.new("RGB", (8, 8)))
    [found] = world["a"].predict(world["m"], world["image"][None])
    assert isinstance(found, mp.Prediction)


def test_one_pattern_and_one_head(world: dict[str, Any]) -> None:
    assert isinstance(world["d"], Data)
    assert world["base"].head == ("3",)
    assert list(attach_scores(network(), select="1.w*")) == ["1.weight"]
    maker: Callable[..., Any] = load_data
    assert maker(Path("digits:0-1")).digest == world["d"].digest
