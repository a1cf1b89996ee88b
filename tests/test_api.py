"""The public surface: its names, and what importing and using it drags in."""

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


def test_names() -> None:
    assert maskpack.__all__ == sorted(maskpack.__all__)
    assert len(maskpack.__all__) <= 30
    assert set(maskpack.__all__) == set(maskpack._WHERE)
    assert dir(maskpack) == maskpack.__all__
    with pytest.raises(AttributeError, match="module 'maskpack' has no attribute 'no_such_name'"):
        _ = maskpack.no_such_name


@pytest.mark.parametrize("name", maskpack.__all__)
def test_name_resolves(name: str) -> None:
    found = getattr(maskpack, name)
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
    loaded = modules_after("import maskpack; dir(maskpack)")
    assert "maskpack" in loaded
    assert not {one for one in loaded if one.startswith("maskpack.")}
    assert not loaded & {"torch", "numpy", "huggingface_hub", "safetensors"}


def test_the_check_can_fail() -> None:
    assert "torch" in modules_after("import maskpack; maskpack.load_mask")
    assert "maskpack.training" in modules_after("import maskpack; maskpack.train_mask")


@pytest.mark.parametrize("words", ["--help", "train --help", "--version"])
def test_help_needs_no_torch(words: str) -> None:
    code = "from maskpack_cli.main import app\ntry:\n    app()\nexcept SystemExit as end:\n    assert not end.code"
    loaded = modules_after(code, *words.split())
    assert "maskpack_cli.training" in loaded
    assert not loaded & {"torch", "numpy", "huggingface_hub", "transformers", "datasets", "rich.progress"}


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
    assert "maskpack.runtime.apply" in loaded
    assert not {one for one in loaded if one.startswith(LATE)}
    assert not loaded & {"huggingface_hub", "torchvision", "timm", "transformers", "datasets", "accelerate"}


def test_training_needs_no_lab(tmp_path: Path) -> None:
    code = (
        "import sys, torch, maskpack\n"
        "from maskpack.backbone.load import Backbone\n"
        "from maskpack.preprocess import ImagePreprocess\n"
        "model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 16), torch.nn.Linear(16, 2))\n"
        "backbone = Backbone(model, 'tests:tiny', head='2', preprocess=ImagePreprocess(8, 8))\n"
        "config = maskpack.TrainConfig(steps=2, batch_size=8, augment='none', workers=0)\n"
        "result = maskpack.train_mask(backbone, maskpack.load_data('digits:0-1'), config)\n"
        "path = maskpack.save_adapter(sys.argv[1], result.parts, result.base, weights=model, **result.about).path\n"
        "maskpack.load_mask(model, str(path))\n"
    )
    loaded = modules_after(code, str(tmp_path / "adapter"))
    assert "maskpack.training.trainer" in loaded
    assert not {one for one in loaded if one.startswith("maskpack.lab")}


def test_names_of_the_lab() -> None:
    from maskpack import lab

    assert lab.__all__ == sorted(lab.__all__) == sorted(lab._WHERE)
    assert all(getattr(lab, name).__name__ == name for name in lab.__all__)
    assert lab.compare is maskpack.compare
    with pytest.raises(AttributeError, match="module 'maskpack.lab' has no attribute 'no_such_name'"):
        _ = lab.no_such_name
