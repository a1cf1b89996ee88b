"""Weights handed over step by step: to the bit, late readers, killed writers and readers, S3 and the Hub."""

import copy
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from maskpack import PatchReader, PatchWriter, load_mask
from maskpack.errors import BackboneMismatchError, ConfigError, CorruptAdapterError, HubError, StateError
from maskpack.hub.versions import Versions, patch_name, whole_name

from .helpers_hub_fixtures import hub as hub
from .helpers_hub_fixtures import waits as waits
from .helpers_hub_server import HubServer
from .helpers_hub_server.accounts import WRITE_TOKEN
from .helpers_models import bits, same


def made(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(50, 24), nn.Linear(24, 40), nn.Linear(40, 50, bias=False)).bfloat16()
    model[2].weight = nn.Parameter(torch.randn(50, 40).bfloat16())
    return model


@torch.no_grad()
def train(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Change a few weights, as a step does, and return the state."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * parameter.abs().float() * 2e-3
        parameter.copy_(parameter.float() + noise)
    return bits(model)


def run_of(where: Any, steps: int, **options: Any) -> list[dict[str, torch.Tensor]]:
    """Write versions, and return the states of a model from the first on."""
    model = made()
    states = [bits(model)]
    with PatchWriter(model, where, **options) as writer:
        for seed in range(steps):
            states.append(train(model, seed))
            assert writer.step() == seed + 1
    return states


def test_a_reader_follows_to_the_bit(tmp_path: Path) -> None:
    model, served = made(), made()
    reader = PatchReader(served, tmp_path / "run")
    assert reader.update() == 0
    with PatchWriter(model, tmp_path / "run") as writer:
        assert writer.step() == 0  # nothing changed
        for seed in range(4):
            state = train(model, seed)
            assert writer.step() == seed + 1
            if seed != 1:
                writer.wait()
                assert reader.update() == seed + 1
                assert same(bits(served), state)
    sizes = [one.stat().st_size for one in (tmp_path / "run").iterdir()]
    assert len(sizes) == 4
    late = made()
    load_mask(late, [tmp_path / "run" / patch_name(k) for k in range(1, 5)])
    assert same(bits(late), state)


def test_late_readers_begin_with_a_whole_checkpoint(tmp_path: Path) -> None:
    states = run_of(tmp_path, 7, every=3)
    assert sorted(Versions(tmp_path).look().wholes) == [3, 6]
    asked = list[int]()

    class Counted(Versions):
        def patch(self, number: int) -> Any:
            asked.append(number)
            return super().patch(number)

    for seed in (0, 5):  # the base, and weights of nowhere
        served = made(seed)
        reader = PatchReader(served, tmp_path)
        reader.versions = Counted(tmp_path)
        assert reader.update() == 7
        assert same(bits(served), states[7])
    assert asked == 2 * [7, 6]
    (tmp_path / whole_name(6)).unlink()
    (tmp_path / patch_name(2)).unlink()
    served = made()
    assert PatchReader(served, tmp_path).update() == 7
    assert same(bits(served), states[7])
    (tmp_path / whole_name(3)).unlink()
    with pytest.raises(BackboneMismatchError, match="from version 2 none that stands on"):
        PatchReader(made(), tmp_path).update()


def test_what_is_damaged_or_lies_changes_nothing(tmp_path: Path) -> None:
    states = run_of(tmp_path, 3)
    served = made()
    reader = PatchReader(served, tmp_path)
    whole = (tmp_path / patch_name(3)).read_bytes()
    (tmp_path / patch_name(3)).write_bytes(whole[:-7])  # a file system that does not write whole files
    assert reader.update() == 2
    assert reader.update() == 2
    assert same(bits(served), states[2])
    (tmp_path / patch_name(3)).write_bytes(whole)
    assert reader.update() == 3
    assert same(bits(served), states[3])
    (tmp_path / patch_name(2)).write_bytes(whole)
    with pytest.raises(BackboneMismatchError, match="a step back|does not stand on"):
        PatchReader(made(), tmp_path).update()
    (tmp_path / patch_name(2)).write_bytes(whole[:-7])
    with pytest.raises(CorruptAdapterError):
        PatchReader(made(), tmp_path).update()
    with torch.no_grad():
        served[1].bias.add_(1)  # type: ignore[operator, union-attr]
    before = bits(served)
    (tmp_path / patch_name(4)).write_bytes(whole)
    with pytest.raises(BackboneMismatchError):
        reader.update()
    assert same(bits(served), before)


def test_a_writer_goes_on_or_begins_anew(tmp_path: Path) -> None:
    states, model = run_of(tmp_path, 2), made()
    model.load_state_dict({name: one.view(torch.bfloat16) for name, one in states[2].items()})
    with PatchWriter(model, tmp_path) as writer:
        assert writer.version == 2
        state = train(model, 9)
        assert writer.step() == 3
    assert not Versions(tmp_path).look().wholes
    with PatchWriter(made(), tmp_path) as writer:  # from an older checkpoint
        assert writer.version == 4
    served = made(3)
    assert PatchReader(served, tmp_path).update() == 4
    assert same(bits(served), states[0])
    with PatchWriter(model, tmp_path) as first, PatchWriter(model, tmp_path) as second:
        assert (first.version, second.version) == (5, 6) or first.version == second.version == 5
        train(model, 10)
        second.step()
        second.wait()
        train(model, 11)
        first.step()
        with pytest.raises(StateError, match="somebody else writes there"):
            first.wait()
    assert state
    with pytest.raises(ConfigError, match="every must be 0 or more"):
        PatchWriter(model, tmp_path, every=-1)


def test_what_could_not_be_sent_is_in_the_next_patch(tmp_path: Path) -> None:
    model, served, run = made(), made(), tmp_path / "run"
    writer = PatchWriter(model, run)
    run.write_text("in the way")
    train(model, 0)
    writer.step()
    with pytest.raises(StateError):
        writer.wait()
    run.unlink()
    state = train(model, 1)
    assert writer.step() == 1
    writer.close()
    assert PatchReader(served, run).update() == 1
    assert same(bits(served), state)


def test_an_answer_that_never_came(tmp_path: Path) -> None:
    model, served = made(), made()
    writer = PatchWriter(model, tmp_path)

    class Lost(Versions):
        @contextmanager
        def adding(self, name: str) -> Iterator[Path]:
            with super().adding(name) as path:
                yield path
            raise HubError("the connection broke")

    writer.versions = Lost(tmp_path)
    for seed in range(2):
        state = train(model, seed)
        assert writer.step() == seed + 1
        writer.wait()
    assert PatchReader(served, tmp_path).update() == 2
    assert same(bits(served), state)


def test_float32_masters_are_handed_over_in_bfloat16(tmp_path: Path) -> None:
    model, served = made().float(), made()
    with PatchWriter(model, tmp_path, dtype=torch.bfloat16) as writer:
        with torch.no_grad():
            model[1].weight.mul_(1.0001)  # type: ignore[operator, union-attr]
        writer.step()
    PatchReader(served, tmp_path).update()
    assert same(bits(served), bits(copy.deepcopy(model).bfloat16()))


WRITER = """
import sys, torch
from tests.test_exchange import made, train
from maskpack import PatchWriter
model = made()
with PatchWriter(model, sys.argv[1], every=5) as writer:
    for seed in range(10_000):
        train(model, seed)
        print(writer.step(), flush=True)
"""
READER = """
import sys, time, torch
from tests.test_exchange import made
from maskpack import PatchReader
reader = PatchReader(made(), sys.argv[1])
while True:
    print(reader.update(), flush=True)
    time.sleep(0.02)
"""


def test_killed_writers_and_readers_lose_nothing(tmp_path: Path) -> None:
    def started(code: str, *arguments: object) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", code, *map(str, arguments)]
        root = Path(__file__).parent.parent
        return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=root, env={**os.environ})

    def wait_for(process: subprocess.Popen[str], version: int) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= version:
                return
        raise AssertionError(f"it ended at {process.wait()}")

    run, served = tmp_path / "run", made()
    late = PatchReader(served, run)
    writer, reader = started(WRITER, run), started(READER, run)
    wait_for(writer, 6)
    wait_for(reader, 1)
    for process in (writer, reader):
        process.send_signal(signal.SIGKILL)
        process.communicate()
    found = Versions(run).look()
    assert found.patches | found.wholes == frozenset(range(1, found.newest + 1))
    assert late.update() == found.newest
    again = made(7)
    assert PatchReader(again, run).update() == found.newest
    assert same(bits(again), bits(served))
    with PatchWriter(again, run) as follower:  # from where the killed one was
        state = train(again, 0)
        assert follower.step() == found.newest + 1
    assert late.update() == found.newest + 1
    assert same(bits(served), state)
    assert len([one for one in run.iterdir() if one.name.startswith(".")]) <= 2  # of what was being written then


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of a real S3 server on this machine."""
    server = pytest.importorskip("moto.server", reason="S3 is tested by `make s3`")
    s3fs = pytest.importorskip("s3fs", reason="S3 is tested by `make s3`")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    try:
        _, port = running.get_host_and_port()
        for name, value in {
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        }.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("weights")
        yield "s3://weights/run"
    finally:
        running.stop()


def test_through_s3(bucket: str) -> None:
    states = run_of(bucket, 5, every=4)
    for seed in (0, 8):
        served = made(seed)
        reader = PatchReader(served, bucket)
        assert reader.update() == 5
        assert same(bits(served), states[5])
    assert Versions(bucket).look().wholes == {4}
    with pytest.raises(HubError, match="cannot"):
        Versions("s3://no-such-bucket-here/run").patch(1)


@pytest.mark.transport("lfs")
def test_through_a_repository_of_the_hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi, HfFileSystem

    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    HfFileSystem.clear_instance_cache()
    HfApi(endpoint=hub.endpoint, token=WRITE_TOKEN).create_repo("alice/run")
    states = run_of("hf://alice/run", 5, every=4)
    for start, asked in ((4, ["5", "4", "4.full"]), (0, ["5", "4", "4.full"])):  # weights of nowhere, and the first
        served, before = made(start), len(hub.requests())
        assert PatchReader(served, "hf://alice/run").update() == 5
        assert same(bits(served), states[5])
        fetched = [one for one in hub.requests()[before:] if "/resolve/" in one]
        assert fetched == [f"GET hub:/alice/run/resolve/main/0000000{one}.safetensors" for one in asked]
    served, before = made(), len(hub.requests())
    served.load_state_dict({name: one.view(torch.bfloat16) for name, one in states[2].items()})
    HfApi(endpoint=hub.endpoint, token=WRITE_TOKEN).delete_file("00000004.full.safetensors", "alice/run")
    assert PatchReader(served, "hf://alice/run").update() == 5  # three versions behind
    assert same(bits(served), states[5])
    fetched = [one.rpartition("/")[2] for one in hub.requests()[before:] if "/resolve/" in one]
    assert fetched == [patch_name(5), patch_name(4), patch_name(3)]
    HfFileSystem.clear_instance_cache()
