"""Set before anything is imported: caches in a temporary folder, no telemetry, no network but loopback."""

import gc
import os
import socket
import tempfile
from pathlib import Path

_KEPT = tempfile.TemporaryDirectory(prefix="maskpack-tests-", ignore_cleanup_errors=True)
_HOME = _KEPT.name
os.environ.update(
    HF_HOME=_HOME,
    MASKPACK_CACHE=f"{_HOME}/maskpack",
    HF_DATASETS_CACHE=f"{_HOME}/datasets",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_UPDATE_CHECK="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_VERBOSITY="error",
    NO_PROXY="127.0.0.1,localhost",
    ACCELERATE_USE_CPU="true",
)

import pytest
import torch
from torch import nn

from maskpack.backbone.load import Backbone
from maskpack.backbone.model import Embedding
from maskpack.preprocess import ImagePreprocess

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Keep the garbage collector from going through all imported libraries again and again: a tenth of all time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


class TinyNet(nn.Module):
    """Two convolutions with BatchNorm and a linear head, for images of 8x8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse every connection that leaves this machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost", "::1"):
            raise OSError(f"a test tried to connect to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture
def tiny() -> nn.Module:
    """A TinyNet in evaluation mode with BatchNorm statistics that are not the defaults."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TinyNet()
        model(torch.randn(32, 3, 8, 8))
    return model.eval()


@pytest.fixture
def tiny_backbone(tiny: nn.Module) -> Backbone:
    """The tiny net as a backbone."""
    return Backbone(tiny, "tests:tiny", embedding=Embedding("fc"), preprocess=ImagePreprocess(8, 8))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data and weights; tests that need it skip where it is absent."""
    folder = os.environ.get("MASKPACK_DATA")
    if not folder or not (Path(folder) / "weights").is_dir():
        pytest.skip("MASKPACK_DATA is not set to a folder with real data and weights (see docs/results/index.md)")
    return Path(folder)
