"""The benchmark of hostile files: it notices what must not be, and counts what may."""

import sys
from pathlib import Path

import pytest

from benchmarks import hostile
from maskpack.adapter.write import save_adapter
from maskpack.errors import CorruptAdapterError

from .helpers_adapter import base_of, many, random_masks

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is measured as Linux tells it")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    shapes = {"a.weight": (40, 3)}
    save_adapter(tmp_path / "x.safetensors", random_masks(shapes), base_of(shapes))
    return tmp_path / "x.safetensors"


def test_outcomes(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = hostile.measured(adapter)
    assert (row["outcome"], list(row["seconds"])) == ("read", ["read", *hostile.STAGES])

    def fail(error: Exception) -> None:
        raise error

    for error, outcome in ((CorruptAdapterError("x"), "CorruptAdapterError"), (KeyError("x"), "WRONG: KeyError('x')")):
        monkeypatch.setitem(hostile.STAGES, "verify", lambda _, error=error: fail(error))
        row = hostile.measured(adapter)
        assert (row["outcome"], row["stage"]) == (outcome, "verify")
    adapter.write_bytes(adapter.read_bytes()[:-1])
    assert hostile.measured(adapter)["stage"] == "read"


def test_memory_is_that_of_the_file(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[bytearray] = []  # kept: a kernel may count a process of many threads' passing peak too low
    monkeypatch.setitem(hostile.STAGES, "verify", lambda _: held.append(bytearray(b"x") * (200 << 20)))
    assert 150 << 20 < hostile.measured(adapter)["memory"] < 300 << 20
    held.clear()
    monkeypatch.setitem(hostile.STAGES, "verify", lambda _: None)
    assert min(hostile.measured(adapter)["memory"] for _ in range(3)) < 20 << 20


def test_a_process_that_dies_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    [row] = hostile.rows_of("bytes", 1, 0)
    assert row["outcome"].startswith("WRONG: the process ended with 1")
    table = hostile.markdown(
        hostile.grouped([row]), [{"way": "9 sets", "bytes": len(many()), "seconds": {}, "memory": 0}]
    )
    assert "1 spoiled files; wrong: 1." in table
