"""The example in the docstring of every public object runs."""

import importlib
import inspect
import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import maskpack
import maskpack.lab
import maskpack.training
from maskpack import Backbone, MaskSet, fingerprint, save_adapter
from maskpack.backbone.load import export_state
from maskpack.backbone.model import Embedding, Head
from maskpack.lab import Evaluations, read_networks
from maskpack.preprocess import ImagePreprocess
from maskpack.training import load_data

from .conftest import TinyNet
from .helpers_cascade import SETS, cascade_parts
from .helpers_cli import FACTORY
from .helpers_hub_fixtures import hub as hub
from .helpers_hub_fixtures import waits as waits
from .helpers_hub_server import WRITE_TOKEN, HubServer
from .helpers_models import make_adapter, random_masks

TRAINS = ("train_", "compare", "feature_reuse", "from_checkpoints")
PUBLIC = [
    pytest.param(module, name, marks=[pytest.mark.slow] if name.startswith(TRAINS) else [])
    for module in ("maskpack", "maskpack.training", "maskpack.lab")
    for name in importlib.import_module(module).__all__
    if name != "__version__"
]


def example_of(thing: Any) -> str:
    """The code under "Example:" in a docstring; nothing where there is none."""
    found = re.search(r"^Example:\n((?:(?:    .*)?\n?)+)\Z", inspect.getdoc(thing) or "", re.MULTILINE)
    return textwrap.dedent(found[1]) if found else ""


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_example(
    module: str, name: str, hub: HubServer, tiny: TinyNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    import timm

    create = timm.create_model  # pretrained weights would have to be downloaded
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False: create(name))
    code = example_of(getattr(importlib.import_module(module), name))
    assert code, f"the docstring of {module}.{name} ends in no example"
    make_adapter(tmp_path / "my-mask", tiny)
    if "user/my-mask" in code:
        maskpack.push(tmp_path / "my-mask", "alice/my-mask")
    if "other-mask" in code:
        make_adapter(tmp_path / "other-mask", tiny, seed=1)
    if "my-cascade" in code:
        sets = {one: random_masks(tiny, seed) for seed, one in enumerate(SETS)}
        base = fingerprint(tiny, id="tests:tiny", head="fc")
        save_adapter(tmp_path / "my-cascade", sets, base, cascade=cascade_parts(16))
    if ".jpg" in code:
        from PIL import Image

        for flower in ("rose", "daisy"):
            Image.new("RGB", (40, 30)).save(f"{flower}.jpg")
    export_state(tmp_path / "base.safetensors", tiny)
    if "backbone.py" in code:
        shutil.copyfile(FACTORY, tmp_path / "backbone.py")
        digits = maskpack.load_backbone("backbone.py:digits_cnn", random_weights=0)
        export_state(tmp_path / "backbone.safetensors", digits.model)
    given: dict[str, Any] = {
        **{one: getattr(maskpack, one) for one in maskpack.__all__},
        **{one: getattr(maskpack.training, one) for one in maskpack.training.__all__},
        **{one: getattr(maskpack.lab, one) for one in maskpack.lab.__all__},
        **{"torch": torch, "Path": Path, "Embedding": Embedding, "Head": Head, "ImagePreprocess": ImagePreprocess},
        **{"Network": TinyNet, "model": tiny, "images": torch.rand(2, 3, 8, 8), "masks": random_masks(tiny)},
        **{one: random_masks(tiny, seed) for seed, one in enumerate(("first", "second", "third"))},
        "adapter": maskpack.load_adapter(tmp_path / "my-mask"),
        "backbone": Backbone(tiny, "tests:tiny", embedding=Embedding("fc"), preprocess=ImagePreprocess(8, 8)),
    }
    if re.search(r"\bdata\b", code):
        given["data"] = load_data("digits:0-1")
    if re.search(r"\b(networks|evaluations)\b", code):
        export_state(tmp_path / "tuned.safetensors", tiny)
        both = [(one, "tuned.safetensors") for one in ("first", "second")]
        given["backbone"], given["classifier"], given["networks"] = read_networks(given["backbone"], both)
        given["data"] = load_data("digits:0-1")
        given["evaluations"] = Evaluations(given["classifier"], given["backbone"], given["data"])
    exec(compile(code.replace("user/", "alice/"), name, "exec"), given)
    assert isinstance(given["masks"], MaskSet)


def test_an_example_has_to_be_there() -> None:
    assert example_of(fingerprint).startswith("base = fingerprint(model")
    assert not example_of(test_an_example_has_to_be_there)
