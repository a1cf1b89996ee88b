"""The public surface: its names, and what importing and using it drags in."""

import importlib
import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import maskpack
from maskpack import MaskSet, fingerprint, save_adapter

ROOT = Path(__file__).parent.parent
LATE = (
    "maskpack.training",
    "maskpack.training.methods",
    "maskpack.training.data",
    "maskpack.importers",
    "maskpack.lab",
)


def modules_after(code: str, *arguments: str) -> set[str]:
    """The modules that a fresh interpreter has imported when `code` has run."""
    ending = "\nimport sys, json\nsys.stderr.write('\\n' + json.dumps(sorted(sys.modules)))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code + ending, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


PUBLIC = {
    "maskpack": "load_mask unload_mask load_adapter load_masked load_cascade save_adapter Adapter Backbone Parts "
    "PatchReader PatchWriter Prediction MaskSet MaskBank combine inspect_adapter identify fingerprint push pull "
    "search_adapters load_backbone MaskpackError __version__",
    "maskpack.training": "Data Task TrainConfig TrainResult load_data train_mask train_auto train_cascade train_tasks "
    "train_transfer attach_scores count_trainable extract_parts extract_masks settle attach_gates",
}


@pytest.mark.parametrize("module", PUBLIC)
def test_names(module: str) -> None:
    package = importlib.import_module(module)
    assert package.__all__ == sorted(PUBLIC[module].split())
    assert dir(package) == package.__all__
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = package.no_such_name


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in PUBLIC for name in PUBLIC[module].split()])
def test_name_resolves(module: str, name: str) -> None:
    found = getattr(importlib.import_module(module), name)
    if name == "__version__":
        assert found == version("maskpack")
        return
    assert found.__name__ == name
    # a dataclass without a docstring gets its signature as one
    assert (found.__doc__ or "").strip()
    assert not found.__doc__.startswith(f"{name}(")


def test_typed_and_versioned() -> None:
    assert (Path(maskpack.__file__).parent / "py.typed").is_file()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert version("maskpack") == project["version"]
    assert f"## {project['version']} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_import_is_lazy() -> None:
    loaded = modules_after("import maskpack.training; dir(maskpack); dir(maskpack.training)")
    assert {one for one in loaded if one.startswith("maskpack")} == {"maskpack", "maskpack.training"}
    assert not loaded & {"torch", "numpy", "huggingface_hub", "safetensors"}


# every command, one after the other, in one interpreter: what was imported stays
COMMANDS = """
import json, sys
from maskpack_cli.main import app

heavy = set(sys.argv[2].split())
for words in json.loads(sys.argv[1]):
    try:
        app(words.split())
    except SystemExit as end:
        assert not end.code, words
    assert not heavy & set(sys.modules), (words, heavy & set(sys.modules))
"""


def test_help_and_lists_of_plugins_import_little() -> None:
    words = ["--help", "train --help", "--version", "list methods", "list codecs"]
    heavy = "torch numpy huggingface_hub transformers datasets rich.progress"
    assert "maskpack_cli.train" in modules_after(COMMANDS, json.dumps(words), heavy)


GOLDEN = ROOT / "tests" / "golden" / "v1"


def test_reading_and_listing_need_no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    files = [GOLDEN / f"{name}.safetensors" for name in ("heads", "cascade", "logit")]
    verbs = ["inspect", "inspect --parameters --json", "verify"]
    words = ["list", *(f"{verb} {file}" for verb in verbs for file in files)]
    loaded = modules_after(COMMANDS, json.dumps(words), "torch transformers datasets")
    assert {"maskpack.hub.cache", "maskpack.adapter.read"} <= loaded


def test_describing_needs_no_torch() -> None:
    code = "import sys, maskpack\nassert maskpack.inspect_adapter(sys.argv[1])['cascade']['experts']"
    assert "torch" not in modules_after(code, str(GOLDEN / "cascade.safetensors"))


def test_loading_needs_no_training(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 4)
    masks = MaskSet.from_tensors({"weight": model.weight.detach() > 0})
    save_adapter(tmp_path / "adapter", masks, fingerprint(model, id="linear"))
    code = (
        "import sys, torch, maskpack\n"
        "torch.manual_seed(0)\n"
        "model = torch.nn.Linear(8, 4)\n"
        "maskpack.load_mask(model, sys.argv[1])\n"
        "assert (model.weight >= 0).all()\n"
        "maskpack.unload_mask(model)\n"
        "assert not (model.weight >= 0).all()\n"
    )
    loaded = modules_after(code, str(tmp_path / "adapter"))
    assert {"torch", "maskpack.runtime.apply"} <= loaded
    assert not {one for one in loaded if one.startswith(LATE)}
    assert not loaded & {"huggingface_hub", "torchvision", "timm", "transformers", "datasets", "accelerate"}


@pytest.mark.slow
def test_training_needs_no_lab(tmp_path: Path) -> None:
    code = (
        "import sys, torch, maskpack\n"
        "from maskpack.backbone.load import Backbone\n"
        "from maskpack.backbone.model import Embedding\n"
        "from maskpack.training import TrainConfig, load_data, train_mask\n"
        "from maskpack.preprocess import ImagePreprocess\n"
        "model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 16), torch.nn.Linear(16, 2))\n"
        "backbone = Backbone(model, 'tests:tiny', embedding=Embedding('2'), preprocess=ImagePreprocess(8, 8))\n"
        "config = TrainConfig(steps=2, batch_size=8, augment='none', workers=0)\n"
        "result = train_mask(backbone, load_data('digits:0-1'), config)\n"
        "maskpack.save_adapter(sys.argv[1], result.parts, result.base, result.about, weights=model)\n"
        "maskpack.load_mask(model, sys.argv[1])\n"
    )
    loaded = modules_after(code, str(tmp_path / "adapter"))
    assert "maskpack.training.trainer" in loaded
    assert not {one for one in loaded if one.startswith("maskpack.lab")}


def test_names_of_the_lab() -> None:
    from maskpack import lab

    assert lab.__all__ == sorted(lab.__all__) == dir(lab)
    assert all(getattr(lab, name).__name__ == name for name in lab.__all__)
    with pytest.raises(AttributeError, match="module 'maskpack.lab' has no attribute 'no_such_name'"):
        _ = lab.no_such_name
