"""The fixture `hub`: a loopback Hub, and this process' own client pointed at it."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants as constants
import pytest
from huggingface_hub import file_download
from huggingface_hub.utils import _http, disable_progress_bars

from .hub_adapters import contents, write_adapter
from .hub_server import HubServer

BIRDS = "alice/birds"


class NoWaiting:
    """Stands in for the module `time` where code backs off: remembers the sleeps instead of sleeping."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> NoWaiting:
    """Back-off without waiting, in the client and in maskpack; the sleeps are in `.slept`."""
    from maskpack.hub import client

    stand_in = NoWaiting()
    monkeypatch.setattr(_http, "time", NoWaiting())
    monkeypatch.setattr(file_download, "time", NoWaiting())
    monkeypatch.setattr(client, "time", stand_in)
    return stand_in


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: NoWaiting) -> Iterator[HubServer]:
    """A running loopback Hub that the client of this process uses, anonymously, with an empty cache."""
    # the client read its environment at import, so its constants are what has to change
    with HubServer(tmp_path / "hub") as server:
        home = tmp_path / "home"
        settings: dict[str, Any] = {
            "ENDPOINT": server.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        disable_progress_bars()
        _http.close_session()  # a kept connection may belong to another test's server
        yield server
        _http.close_session()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder with a small adapter."""
    return write_adapter(tmp_path / "adapter")


@pytest.fixture
def birds(hub: HubServer) -> HubServer:
    """The loopback Hub with the same adapter as `alice/birds`."""
    hub.add(BIRDS, contents())
    return hub
