"""With the core dependencies alone: loading, undoing and looking work, and what does not work says which line helps."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from maskpack import MaskSet, fingerprint, save_adapter
from maskpack.adapter.predict import model_tokenizer
from maskpack.backbone.load import Backbone
from maskpack.backbone.model import Embedding
from maskpack.errors import MissingDependencyError
from maskpack.lab.baselines.base import find_baseline
from maskpack.preprocess import ImagePreprocess
from maskpack.training import TrainConfig, train_cascade, train_mask
from maskpack.training.cascade import fit_router, fit_whitening
from maskpack.training.data.base import Data
from maskpack.training.data.sources import ImageFolder
from maskpack.training.objectives.self_supervised import multi_crop
from maskpack.training.run_folder import RunFolder
from maskpack.training.trainer import train_dense

from .helpers_cascade import SETS, cascade_parts

EXTRAS = (
    "torchvision",
    "timm",
    "transformers",
    "datasets",
    "sklearn",
    "accelerate",
    "tensorboard",
    "matplotlib",
    "PIL",
    "cryptography",
)

BLOCKED = f"""
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
import torch

def refused(action):
    try:
        action()
    except ImportError as error:
        return f"{{type(error).__name__}}: {{error}}"
    raise AssertionError("it worked")

def linear():
    torch.manual_seed(0)
    return torch.nn.Linear(8, 4)
"""

EMPTY = Data(None, None, None, (), "image-classification", "x", "")
# commands one after another: importing torch is what takes time
CLI = """
import contextlib, io, json
from maskpack_cli.main import main

found = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["maskpack", *words]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    found.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("core") / "adapter"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 4)
    preprocess = {"kind": "image", "size": 8, "resize": 8}
    masks = MaskSet.from_tensors({"weight": model.weight.detach() > 0})
    save_adapter(folder, masks, fingerprint(model, id="linear"), preprocess=preprocess)
    return folder


def run(code: str, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-c", BLOCKED + code, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        check=False,
    )


def test_load_look_unload(adapter: Path, tmp_path: Path) -> None:
    code = """
import json
from maskpack import inspect_adapter, load_adapter, load_mask, pull, unload_mask

model = linear()
found = pull(sys.argv[1], output="copy")
load_mask(model, "./copy")
assert (model.weight >= 0).all()
unload_mask(model)
assert not (model.weight >= 0).all()
opened = load_adapter("./copy")
parameters = inspect_adapter(opened)["sets"]["default"]["parameters"]
print(json.dumps([str(found.path), parameters, opened.verify()["mask_id"]]))
print(refused(opened.preprocess))
"""
    done = run(code, str(adapter), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    facts, refusal = done.stdout.splitlines()
    assert json.loads(facts) == ["copy", 1, True]
    assert refusal == (
        "MissingDependencyError: reading images needs the library 'torchvision', which is not installed; "
        'install it with: pip install "maskpack[train]"'
    )


def test_a_cascade_needs_no_scikit_learn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    parts = cascade_parts(8, embedding=Embedding("0"))
    masks = {name: MaskSet.from_tensors({"0.weight": torch.rand(4, 8) < 0.5}) for name in SETS}
    save_adapter(tmp_path / "cascade", masks, fingerprint(model, id="linear"), cascade=parts)
    code = """
from maskpack import load_cascade

cascade = load_cascade(torch.nn.Sequential(linear()), "./cascade")
print(cascade.embed(torch.randn(5, 8)).shape, cascade.route(torch.randn(5, 8))[1].shape)
late = ("maskpack.training", "maskpack.training.data", "maskpack.lab")
print(sorted(name for name in sys.modules if name.startswith(late)))
"""
    done = run(code, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["torch.Size([5, 24]) torch.Size([5, 2])", "[]"]


def test_command_line(adapter: Path, tmp_path: Path) -> None:
    looks = [
        ["inspect", str(adapter), "--json"],
        ["inspect", str(adapter), "--parameters"],
        ["verify", str(adapter)],
        ["verify", str(adapter), "--json"],
    ]
    train = ["train", "--backbone", "timm/resnet18", "--data", "digits:0-4", "--output", str(tmp_path / "m")]
    plot = ["plot", "density", str(adapter), "--output", str(tmp_path / "x.svg")]
    done = run(CLI, json.dumps([*looks, train, plot]))
    assert done.returncode == 0, done.stderr
    *looked, trained, plotted = json.loads(done.stdout)
    for words, (code, out, err) in zip(looks, looked, strict=True):
        assert (code, err) == (0, ""), words
        assert "--json" not in words or json.loads(out)["mask_id"]
    for code, out, _ in (trained, plotted):
        assert (code, out) == (1, "")
    assert 'pip install "maskpack[train]"' in trained[2]
    assert plotted[2].strip() == (
        "Error: drawing pictures needs the library 'matplotlib', which is not installed; "
        'install it with: pip install "maskpack[lab]"'
    )
    assert not any("Traceback" in err for _, _, err in (trained, plotted))
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_said() -> None:
    calls = {
        "load_backbone('timm/resnet18')": "timm",
        "load_backbone('torchvision/resnet18')": "torchvision",
        "load_backbone('hf/user/name')": "transformers",
        "training.load_data('digits:0-4')": "datasets",
        "training.load_data('user/name')": "datasets",
    }
    code = f"for name in {EXTRAS!r}:\n    print(refused(lambda: __import__(name)))\n"
    code += "import maskpack, maskpack.training, numpy, rich\n"
    done = run(code + "".join(f"print(refused(lambda: maskpack.{call}))\n" for call in calls))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    hidden = [f"ModuleNotFoundError: No module named '{name}'" for name in EXTRAS]
    assert lines[: len(EXTRAS)] == hidden, "what hides the libraries works"
    for said, library in zip(lines[len(EXTRAS) :], calls.values(), strict=True):
        assert said.startswith("MissingDependencyError: ")
        assert said.endswith(
            f'the library {library!r}, which is not installed; install it with: pip install "maskpack[train]"'
        )


def log(folder: Path) -> None:
    with RunFolder({"output": folder}).opened():
        pass


@pytest.mark.parametrize(
    ("module", "said", "call"),
    [
        ("accelerate", "training", lambda: train_mask(nn.Linear(2, 2), EMPTY)),
        ("accelerate", "training", lambda: train_dense(Backbone(nn.Linear(2, 2), "x"), EMPTY, TrainConfig(), None)),
        ("accelerate", "training", lambda: train_cascade(nn.Linear(2, 2), EMPTY)),
        ("sklearn.decomposition", "principal components", lambda: fit_whitening(torch.rand(5, 3), 2)),
        ("sklearn.mixture", "the router of a cascade", lambda: fit_router(torch.rand(5, 3), 2, 0)),
        ("torchvision.transforms.v2", "reading images", lambda: multi_crop(ImagePreprocess(8, 8), [])),
        ("PIL.ImageFilter", "reading images", lambda: multi_crop(ImagePreprocess(8, 8), [])),
        ("tensorboard", "writing TensorBoard logs", lambda: log(Path())),
        ("transformers", "tokenising texts", lambda: model_tokenizer(nn.Linear(2, 2))),
        ("datasets", "reading data", lambda: ImageFolder.load(".")),
        (
            "peft",
            "the baseline 'lora'",
            lambda: find_baseline("lora").check(None, None),
        ),  # before anything else is looked at
    ],
)
def test_what_a_library_is_needed_for(
    module: str, said: str, call: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    extra = "lab" if module == "peft" else "train"
    with pytest.raises(MissingDependencyError) as caught:
        call()
    assert str(caught.value) == (
        f'{said} needs the library {module!r}, which is not installed; install it with: pip install "maskpack[{extra}]"'
    )
