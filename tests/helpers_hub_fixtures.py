"""The fixture `hub`: a loopback Hub, and this process' own client pointed at it."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants as constants
import pytest
from huggingface_hub import file_download
from huggingface_hub.utils import _http, _xet, disable_progress_bars

from .helpers_hub import contents, write_adapter
from .helpers_hub_server import HubServer

BIRDS = "alice/birds"
TRANSPORTS = ("lfs", "xet")
CONTENT = "signature="  # in the address of a large file's bytes at the store, on both transports


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the tests of a module that imports this over LFS and over Xet, or what their marker `transport` names."""
    if "hub" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("transport")
        metafunc.parametrize("hub", marker.args if marker else TRANSPORTS, indirect=True)


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
    from maskpack import network
    from maskpack.hub import client

    stand_in = NoWaiting()
    monkeypatch.setattr(_http, "time", NoWaiting())
    monkeypatch.setattr(file_download, "time", NoWaiting())
    monkeypatch.setattr(client, "time", stand_in)
    monkeypatch.setattr(network, "time", stand_in)
    monkeypatch.setattr(network, "_given_up", {})
    return stand_in


@pytest.fixture
def hub(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: NoWaiting
) -> Iterator[HubServer]:
    """A running loopback Hub that the client of this process uses, anonymously, with an empty cache; over LFS."""
    with HubServer(tmp_path / "hub", getattr(request, "param", "lfs")) as server:
        home = tmp_path / "home"
        # the client read its environment at import, so its constants are what has to change
        settings: dict[str, Any] = {
            "ENDPOINT": server.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": server.transport == "lfs",
            "HF_HUB_DISABLE_TELEMETRY": True,
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
            monkeypatch.delenv(name, raising=False)
        # a session of the Xet client reads its environment when it is made, and keeps what it knows of a store
        for name, text in server.env().items():
            if name.startswith(("HF_XET_", "NO_PROXY")):
                monkeypatch.setenv(name, text)
        monkeypatch.setattr(_xet, "_GLOBAL_XET_HOLDER", _xet.XetSessionHolder())
        _xet.XET_CONNECTION_INFO_CACHE.clear()
        disable_progress_bars()
        _http.close_session()  # a kept connection may belong to another test's server
        _http.get_session()  # client 1.31 makes several if threads ask at once, and loses all but one unclosed
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
