"""Checkpoints: no changed bit, no missing and no misshapen member of one is taken."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from maskpack.backbone.fingerprint import tensor_digest
from maskpack.errors import StateError
from maskpack.safetensors_io import SEAL, UNSEALED, read_tensors, write_tensors
from maskpack.training.data.base import load_data
from maskpack.training.learn import borrowed
from maskpack.training.loop import Position
from maskpack.training.run_folder import (
    DIGESTS,
    FILE,
    RunFolder,
    load_checkpoint,
    read_sealed,
    take_over,
    write_sealed,
)
from maskpack.training.trainer import ObjectiveRun, train_mask

from .helpers_models import QUICK_CROPS as QUICK
from .helpers_models import dropout_net as net

CONFIG = replace(QUICK, epochs=1, bytes_budget=60)


@pytest.fixture(scope="module", params=["adam", "sgd"])
def resume(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A checkpoint, and a function that goes on from it."""
    folder, backbone = tmp_path_factory.mktemp("run"), net()
    data = replace(load_data("digits:5-9", labels_fraction=0.2, validation_fraction=0.1), test=None)
    config = replace(CONFIG, optimizer=request.param, lr=0.2)
    train_mask(backbone, data, config, output=folder)
    with borrowed(backbone):
        run = ObjectiveRun(backbone, data, config)
        run.folder = RunFolder({"output": folder})

        def go_on() -> None:
            run.resume()

        yield folder / FILE, go_on


def test_flipped_bits(resume: tuple[Path, Callable[[], None]]) -> None:
    path = resume[0]
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    assert whole[header - 1 : header] in (b" ", b"}")
    drawn = random.Random(0)
    places = [*range(8 * 16), *range(8 * header - 64, 8 * header + 64), *range(8 * len(whole) - 64, 8 * len(whole))]
    places += [drawn.randrange(8 * header) for _ in range(150)] + [drawn.randrange(8 * len(whole)) for _ in range(300)]
    try:
        for place in places:
            spoiled = bytearray(whole)
            spoiled[place // 8] ^= 1 << place % 8
            path.write_bytes(spoiled)
            with pytest.raises(StateError, match=f"{path} is damaged: .+; delete it and train without --resume"):
                load_checkpoint(path)
        for length in (0, 7, 8, 100, header, header + 1, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(StateError, match=f"{path} is damaged"):
                load_checkpoint(path)
        path.write_bytes(whole + b"\0")
        with pytest.raises(StateError, match=f"{path} is damaged"):
            load_checkpoint(path)
    finally:
        path.write_bytes(whole)
    resume[1]()


def test_a_flipped_bit_of_a_tensor_is_told_with_its_name(resume: tuple[Path, Callable[[], None]]) -> None:
    path = resume[0]
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    entries = json.loads(whole[8:start])
    entries.pop("__metadata__")
    for name, entry in entries.items():
        spoiled = bytearray(whole)
        spoiled[start + entry["data_offsets"][0]] ^= 1
        path.write_bytes(spoiled)
        with pytest.raises(StateError) as caught:
            load_checkpoint(path)
        assert repr(name) in str(caught.value)
    path.write_bytes(whole)


def test_members_that_are_missing_or_misshapen(resume: tuple[Path, Callable[[], None]]) -> None:
    path, go_on = resume
    whole = path.read_bytes()
    tensors, facts = read_sealed(path, "")
    assert {name.partition("/")[0] for name in tensors} == {"model", "optimizer"}
    try:
        for name, tensor in tensors.items():
            others = {key: one for key, one in tensors.items() if key != name}
            longer, other = torch.cat([tensor.reshape(-1)] * 2), tensor.double() if tensor.is_floating_point() else None
            for changed in (
                others,
                {**others, name: longer},
                *([{**others, name: other}] if other is not None else []),
            ):
                write_sealed(path, changed, facts)
                with pytest.raises(StateError) as caught:
                    go_on()
                assert f"{path} is damaged" in str(caught.value)
                assert repr(name.removeprefix("model/")) in str(caught.value)
        for name in ("model/more", "optimizer/0/more", "optimizer/99/step", "optimizer/x/step", "other/more", "more"):
            write_sealed(path, {**tensors, name: torch.zeros(1)}, facts)
            with pytest.raises(StateError, match="is damaged: .*more|is damaged: .*step"):
                go_on()
        write_sealed(path, {}, facts)
        with pytest.raises(StateError, match=f"{path} is damaged"):
            go_on()
    finally:
        path.write_bytes(whole)
    go_on()


def test_facts_that_are_missing_or_of_another_kind(resume: tuple[Path, Callable[[], None]]) -> None:
    path, go_on = resume
    whole = path.read_bytes()
    tensors, facts = read_sealed(path, "")
    wrong: list[tuple[str, dict[str, Any]]] = []
    for name in (*(one.name for one in fields(Position)), "more", "scaler", "log", "optimizer"):
        wrong += [(name, {key: value for key, value in facts.items() if key != name}), (name, {**facts, name: "x"})]
    wrong.append(("metrics", {**facts, "metrics": {**facts["metrics"], "density": "x"}}))
    more = facts["more"]
    control, unreadable = more["control"], more["unreadable"]
    for key in control:
        wrong.append((f"more.control.{key}", {**facts, "more": {**more, "control": {**control, key: None}}}))
    for key in unreadable:
        for value in ({}, [1.5], [10**9], [["x"]]):
            wrong.append(("unreadable", {**facts, "more": {**more, "unreadable": {**unreadable, key: value}}}))
    wrong += [("more.control", {**facts, "more": {**more, "control": None}})]
    wrong += [("batches", {**facts, "batches": {"train": value}}) for value in (3, [1], [0, "x"])]
    wrong += [("optimizer", {**facts, "optimizer": [*facts["optimizer"], "x"]})]
    try:
        for name, changed in wrong:
            write_sealed(path, tensors, changed)
            with pytest.raises(StateError) as caught:
                go_on()
            assert f"{path} is damaged" in str(caught.value)
            assert name.partition(".")[0] in str(caught.value)
        for run in (None, {}, {**facts["run"], "config": 3}, {**facts["run"], "base": None}):
            write_sealed(path, tensors, {**facts, "run": run})
            with pytest.raises(StateError, match="another run"):
                go_on()
        for text in ("[]", "3", "null", "{", "\0", "[" * 10**5):
            rewrite(path, tensors, torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8))
            with pytest.raises(StateError, match=f"{path} is damaged: its facts are "):
                go_on()
    finally:
        path.write_bytes(whole)
    go_on()


def rewrite(path: Path, tensors: dict[str, torch.Tensor], text: torch.Tensor) -> None:
    """Write a file with right digests whose facts are any bytes."""
    tensors = {**tensors, "facts": text}
    digests = json.dumps({name: tensor_digest(one, one.dtype).hex() for name, one in tensors.items()})
    write_tensors(path, tensors, {DIGESTS: digests, SEAL: UNSEALED})


def test_a_file_without_digests_is_no_checkpoint(resume: tuple[Path, Callable[[], None]], tmp_path: Path) -> None:
    save_file(read_tensors(resume[0]), tmp_path / FILE)
    with pytest.raises(StateError, match="is damaged: the header"):
        load_checkpoint(tmp_path / FILE)
    (tmp_path / FILE).unlink()
    (tmp_path / FILE).mkdir()
    with pytest.raises(StateError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / FILE)


def test_a_start_has_the_dtypes_of_the_run(resume: tuple[Path, Callable[[], None]]) -> None:
    tensors, facts = load_checkpoint(resume[0])
    ours = {name: tensor.clone() for name, tensor in tensors.items()}
    take_over(ours, resume[0], facts["run"]["base"], ())
    name = next(name for name in ours if name.startswith("model/"))
    ours[name] = ours[name].double()
    with pytest.raises(StateError, match=f"1 differ, first {name.removeprefix('model/')!r}"):
        take_over(ours, resume[0], facts["run"]["base"], ())
