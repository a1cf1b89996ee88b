"""Local adapters: verified like fetched ones, copied, and a folder as registry."""

from pathlib import Path

import pytest

from maskpack.errors import AdapterError, CorruptAdapterError, StateError
from maskpack.hub.pull import pull
from maskpack.hub.push import PushedAdapter, push

from .helpers_hub import CARD, CONFIG, MODEL, NAMES, contents, read_folder, write_adapter


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


def test_local_adapters(tmp_path: Path, adapter: Path) -> None:
    pulled = pull(adapter)
    assert (pulled.path, pulled.commit, pulled.repo_id, pulled.signed_by) == (adapter, None, None, ())
    assert pull(str(adapter / MODEL)).path == adapter / MODEL
    assert pull(adapter, output=tmp_path / "copy").path == tmp_path / "copy"
    assert read_folder(tmp_path / "copy") == contents()
    assert pull(adapter / MODEL, output=tmp_path / "one").path == tmp_path / "one" / MODEL
    with pytest.raises(AdapterError, match=r"gone does not exist; expected a folder with maskpack_model"):
        pull(tmp_path / "gone")
    with pytest.raises(AdapterError, match=r"gone\.safetensors does not exist; expected an adapter's model file"):
        pull(tmp_path / "gone.safetensors")
    (adapter / MODEL).write_bytes(b"other")
    with pytest.raises(CorruptAdapterError, match=r"has 5 bytes and states a header of"):
        pull(adapter)
    (adapter / MODEL).unlink()
    with pytest.raises(AdapterError, match=r"has no maskpack_model\.safetensors, it has: maskpack_config\.json"):
        pull(adapter)
    with pytest.raises(AdapterError, match=r"is not a folder; expected a folder"):
        pull(adapter / CONFIG)


@pytest.mark.parametrize("record", [b"{}", b"[]", b'{"blake3": "AB", "size": 3}', b'{"blake3": 5, "size": true}'])
def test_config_without_a_record(adapter: Path, record: bytes) -> None:
    (adapter / CONFIG).write_bytes(record)
    with pytest.raises(CorruptAdapterError, match=r"maskpack_config\.json.* (expected|names a model file)"):
        pull(adapter)


@pytest.mark.parametrize("record", [b"{", b"\xff", b"[" * 100_000])
def test_config_that_is_no_json(adapter: Path, record: bytes) -> None:
    (adapter / CONFIG).write_bytes(record)
    with pytest.raises(CorruptAdapterError, match="is not valid JSON"):
        pull(adapter)


def test_folder_as_registry(tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (adapter / "secret.env").touch()
    target = Path("registry/birds")
    pushed = push(adapter, "./registry/birds")
    sizes = {name: len(data) for name, data in read_folder(target).items()}
    assert set(sizes) == set(NAMES)
    assert pushed == PushedAdapter(None, str(target), None, created=True, unchanged=False, files=sizes)
    assert push(adapter, "./registry/birds").unchanged
    (target / CARD).write_text((target / CARD).read_text() + "mine\n")
    write_adapter(adapter, contents(1))
    assert not (pushed := push(adapter, target)).unchanged
    assert not pushed.created
    assert (target / CARD).read_text().endswith("mine\n")
    assert pull("./registry/birds").path == target
    assert read_folder(target)[MODEL] == contents(1)[MODEL]
    (tmp_path / "work").mkdir()
    (tmp_path / "work/thesis.tex").touch()
    with pytest.raises(StateError, match=r"holds other files, first thesis\.tex"):
        push(adapter, "./work")
