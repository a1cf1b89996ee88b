"""Sets greater than memory: masks on demand, bounded memory, progress, threads, interruption."""

import _thread
import errno
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitarray import bitarray
from maskpack_cli import console
from rich.console import Console

from maskpack import threads
from maskpack.adapter import decode
from maskpack.adapter import write as payloads
from maskpack.adapter.read import read_adapter
from maskpack.adapter.write import Spooled, save_adapter
from maskpack.codecs.raw import Raw
from maskpack.errors import ConfigError, CorruptAdapterError, StateError, UnknownNameError
from maskpack.mask import MaskSet, PackedMask

from .helpers_adapter import base_of, random_masks, with_payload

SHAPES = {f"layer{i}.weight": (5 + i, 7) for i in range(12)}
MASKS = random_masks(SHAPES)
BASE = base_of(SHAPES)


def ternary(size: int = 40) -> MaskSet:
    bits, signs = (torch.rand(size) < share for share in (0.8, 0.5))
    signed = PackedMask(PackedMask.from_tensor(bits).bits, (size,), signs=PackedMask.from_tensor(signs).bits)
    return MaskSet({"a": signed, "b": PackedMask.from_tensor(bits)})


class TestStreamedSet:
    def test_is_a_mask_set_like_any_other(self) -> None:
        streamed = MaskSet.streamed(reversed(list(SHAPES)), MASKS.__getitem__)
        assert streamed == MASKS
        assert list(streamed) == sorted(SHAPES)
        assert (len(streamed), streamed.total, streamed.kept) == (len(MASKS), MASKS.total, MASKS.kept)
        assert streamed.density == MASKS.density
        assert streamed.get("layer1.weight") == MASKS["layer1.weight"]
        assert streamed.get("layer1", 3) == 3
        with pytest.raises(UnknownNameError, match="no mask for 'layer1'; the set has 12 parameters"):
            streamed["layer1"]

    def test_makes_masks_when_they_are_asked_for_and_keeps_none(self) -> None:
        made: list[str] = []

        def make(name: str) -> PackedMask:
            made.append(name)
            return MASKS[name]

        streamed = MaskSet.streamed(SHAPES, make, SHAPES)
        assert "layer1.weight" in streamed
        assert streamed.total == MASKS.total
        assert streamed.shapes == MASKS.shapes == SHAPES
        assert made == [], "nothing was asked for that needs a mask"
        assert MaskSet.streamed(SHAPES, make, {"layer1.weight": (6, 7)}).shapes == SHAPES
        assert made == sorted(SHAPES.keys() - {"layer1.weight"}), "shapes that are not known"
        made.clear()
        assert streamed["layer1.weight"] is streamed["layer1.weight"]
        assert made == ["layer1.weight"] * 2

    def test_shapes_that_are_stated_must_be_true(self) -> None:
        streamed = MaskSet.streamed(MASKS, MASKS.__getitem__, {"layer1.weight": (7, 6)})
        with pytest.raises(ConfigError, match=r"made for 'layer1.weight' has shape \(6, 7\), expected \(7, 6\)"):
            streamed["layer1.weight"]

    def test_an_error_of_its_source_goes_on(self, tmp_path: Path) -> None:
        streamed = MaskSet.streamed(SHAPES, {"layer0.weight": MASKS["layer0.weight"]}.__getitem__)
        with pytest.raises(KeyError, match=r"layer1\.weight"):
            streamed.get("layer1.weight")
        with pytest.raises(KeyError, match=r"layer1\.weight|layer10\.weight"):
            save_adapter(tmp_path / "new", streamed, BASE)
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_bytes_do_not_depend_on_threads_or_on_where_masks_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    save_adapter(tmp_path / "plain.safetensors", MASKS, BASE)
    monkeypatch.setattr(threads, "WORKERS", workers)
    monkeypatch.setattr(payloads, "WORTH", 1)
    calls: list[str] = []
    made: list[weakref.ref[bitarray]] = []
    most = 0

    def make(name: str) -> PackedMask:
        nonlocal most
        calls.append(name)
        mask = PackedMask(bitarray(MASKS[name].bits), SHAPES[name])
        made.append(weakref.ref(mask.bits))
        most = max(most, sum(one() is not None for one in made))
        return mask

    monkeypatch.setattr(threads, "AHEAD", 100)
    save_adapter(tmp_path / "streamed.safetensors", MaskSet.streamed(SHAPES, make), BASE, profile="default")
    assert (tmp_path / "plain.safetensors").read_bytes() == (tmp_path / "streamed.safetensors").read_bytes()
    assert calls == sorted(SHAPES), "one walk"
    assert most <= 6, "of 12"


PACK = """
import resource, sys
from pathlib import Path
import numpy as np
from maskpack.adapter.read import read_adapter; from maskpack.adapter.write import save_adapter
from maskpack.mask import MaskSet, PackedMask
from tests.helpers_adapter import base_of

def make(name):
    rows = np.zeros(1 << 20, np.uint8)
    rows[int(name) :: 97] = 255
    return PackedMask.from_bytes(rows, (8 << 20,))

names = [f"{i:04}" for i in range(int(sys.argv[1]))]
save_adapter(sys.argv[2], MaskSet.streamed(names, make), base_of(names), profile="fast")
adapter = read_adapter(sys.argv[2])
adapter.verify()
assert sum(len(mask.bits) for _, mask in adapter.iter_masks()) == len(names) << 23
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_set(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        words = [sys.executable, "-c", PACK, str(count), str(tmp_path / "x.safetensors")]
        done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
        return int(done.stdout)

    few, many = peak(20), peak(80)  # a mask takes a MiB
    assert many - few < 15 << 10, f"packing 60 MiB more of masks took {(many - few) >> 10} MiB more"


SLOW = """
import sys, time
import torch
from maskpack.adapter.write import save_adapter
from maskpack.mask import MaskSet, PackedMask
from tests.helpers_adapter import base_of

def make(name):
    if name == "0180":
        print("packing", flush=True)
        time.sleep(60)
    return PackedMask.from_tensor(torch.rand(1 << 16) < 0.9)

names = [f"{i:04}" for i in range(200)]
save_adapter(sys.argv[1], MaskSet.streamed(names, make), base_of(names), profile="fast")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are those of POSIX")
@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(tmp_path: Path, how: str) -> None:
    path = tmp_path / "x.safetensors"
    save_adapter(path, MASKS, BASE)
    before = path.read_bytes()
    words = [sys.executable, "-c", SLOW, str(path)]
    root = Path(__file__).parent.parent
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "packing\n"
        process.send_signal(getattr(signal, how))
        assert process.wait(30) != 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]
    assert path.read_bytes() == before


class TestProgress:
    @pytest.mark.parametrize("shapes", [{"a": (40,), "b": (40,)}, None])
    def test_of_saving_counts_weights(self, tmp_path: Path, shapes: Any) -> None:
        masks, seen = ternary(), list[tuple[int, int]]()
        sets = {"x": MaskSet.streamed("ba", masks.__getitem__, shapes), "y": masks}
        adapter = save_adapter(tmp_path, sets, base_of("ab"), progress=lambda *step: seen.append(step))
        assert seen == [(40, 160), (80, 160), (120, 160), (160, 160)]
        seen.clear()
        adapter.verify(lambda *step: seen.append(step))
        assert seen == [(40 * done, 240) for done in range(1, 7)], "signs are payloads of their own"

    def test_bar_is_for_terminals(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for quiet, terminal in [(False, True), (True, True), (False, False)]:
            out = io.StringIO()
            monkeypatch.setattr(console.Output, "quiet", quiet)
            monkeypatch.setattr(console.Output, "json", False)
            monkeypatch.setattr(console, "notes", Console(file=out, force_terminal=True, width=100))
            monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
            with console.progress_bar("Verifying") as step:
                step(30, 40)
            assert ("Verifying" in out.getvalue()) == ("75%" in out.getvalue()) == (terminal and not quiet)


class TestThreads:
    @pytest.fixture(autouse=True)
    def several(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(threads, "WORKERS", 4)
        monkeypatch.setattr(decode, "WORTH", 1)
        self.before = _thread._count()

    def running(self) -> int:
        """Threads that are more than at the start, within a second."""
        until = time.monotonic() + 1
        while (more := _thread._count() - self.before) > 0 and time.monotonic() < until:
            time.sleep(0.01)
        return max(more, 0)  # fewer, if one of an earlier test has ended since

    def test_a_consumer_may_stop_early(self, tmp_path: Path) -> None:
        masks = save_adapter(tmp_path / "x.safetensors", MASKS, BASE).iter_masks()
        assert next(masks) == next(iter(MASKS.items()))
        assert self.running()
        del masks
        assert not self.running()

    def test_decoding_goes_a_bounded_way_ahead(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        adapter = save_adapter(tmp_path / "x.safetensors", MASKS, BASE, codec="raw")
        decoded = []
        original = Raw.decode
        monkeypatch.setattr(Raw, "decode", lambda *given: decoded.append(1) or original(*given))
        monkeypatch.setattr(threads, "AHEAD", 150)
        masks = adapter.iter_masks()
        assert not decoded, "nothing is decoded before it is asked for"
        next(masks)
        time.sleep(0.1)
        assert 1 <= len(decoded) <= 4
        assert MaskSet(dict(masks)).keys() == MASKS.keys() - {next(iter(MASKS))}

    def test_an_error_comes_where_the_mask_would(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        save_adapter(path, MASKS, BASE, codec="raw")
        path.write_bytes(with_payload(path.read_bytes(), b"\0", 2))
        seen = []

        def walk() -> None:
            for name, _ in read_adapter(path).iter_masks():
                seen.append(name)

        with pytest.raises(CorruptAdapterError, match=r"the mask of 'layer10\.weight' in set 'default' does not"):
            walk()
        assert seen == ["layer0.weight", "layer1.weight"]
        assert not self.running()

    def test_small_items_need_no_thread(self) -> None:
        here = _thread.get_ident()
        assert set(threads.in_order(lambda _: _thread.get_ident(), range(9), lambda _: 5, 6)) == {here}
        assert here not in set(threads.in_order(lambda _: _thread.get_ident(), range(9), lambda _: 6, 6))

    def test_results_are_in_order(self) -> None:
        def wait(item: int) -> int:
            time.sleep(0.002 * (item % 5))
            return item

        assert list(threads.in_order(wait, range(40), lambda item: item, 7)) == list(range(40))

    def test_an_error_of_the_items_ends_the_threads(self) -> None:
        def items() -> Iterator[int]:
            yield 1
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            list(threads.in_order(lambda item: item, items(), lambda item: item, 0))
        assert not self.running()


class TestSpooled:
    def test_gives_itself_back_any_number_of_times(self, tmp_path: Path) -> None:
        great = os.urandom(2_500_000)
        with tempfile.TemporaryFile(dir=tmp_path) as file:
            first = Spooled(file, tmp_path)
            for data in (b"one", b"", great):
                first.append(data)
            second = Spooled(file, tmp_path)
            second.append(b"two")
            for _ in range(2):
                assert b"".join(first) == b"one" + great
                assert b"".join(second) == b"two"
            assert (first.size, second.size) == (3 + len(great), 3)
            assert max(map(len, first)) <= 1 << 20

    def test_what_is_said_when_it_cannot_be_written(self, tmp_path: Path) -> None:
        class Full(io.BytesIO):
            def write(self, data: object) -> int:
                raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.raises(StateError, match=r"No space left on device; nothing was changed there; free space"):
            Spooled(Full(), tmp_path).append(b"x")
        with pytest.raises(StateError, match=r"cannot write .*none: No such file or directory; nothing was changed"):
            save_adapter(tmp_path / "none" / "x.safetensors", MASKS, BASE)
