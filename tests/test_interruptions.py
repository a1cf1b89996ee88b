"""Whatever fails at whatever place: the model is the base or has one whole adapter, and says which."""

import copy
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.interruption_cases import CASES
from benchmarks.interruption_faults import Fault, at_calls, at_lines, every, once, storm, twice
from benchmarks.interruption_world import OPS, Setting, World
from maskpack.runtime import apply as places

NAMED = {case.name: case for case in CASES}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is raised while a generator is collected is only printed, as Python does with any such error."""
    monkeypatch.setattr("sys.unraisablehook", lambda _: None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "setting", "step"),
    [
        ("load_mask", Setting("flip"), 1),
        ("unload_mask", Setting("flip", dtype=torch.bfloat16, contiguous=False), 1),
        ("bank.use, by places", Setting("replace", dtype=torch.float16), 4),  # the benchmark has every place of all
    ],
)
def test_a_failure_at_every_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, setting: Setting, step: int
) -> None:
    monkeypatch.setattr(places, "FEW_PLACES", setting.few)
    counts, wrong = every(World(setting, tmp_path), NAMED[name], step=step)
    assert wrong == []
    assert min(counts["at_lines"], counts["at_calls"]) > 50


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_some_failures_of_each_operation_and_of_the_way_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: object
) -> None:
    assert case in CASES
    number = [one is case for one in CASES].index(True)
    setting = Setting(OPS[number % 4], few=30)
    monkeypatch.setattr(places, "FEW_PLACES", setting.few)
    world = World(setting, tmp_path)
    _, wrong = every(world, CASES[number], step=41)
    _, worse = twice(world, CASES[number], 8, random.Random(0))
    assert wrong + worse == []


@pytest.mark.parametrize("op", ["zero", "flip"])
def test_masks_of_several_pieces_of_the_real_size(tmp_path: Path, op: str) -> None:
    """Of 73,700 zeros, so that each piece of 16,384 is read, noted and written before the next."""
    world = World(Setting(op, side=384, few=places.FEW_PLACES), tmp_path)
    for name in ("load_mask", "unload_mask"):
        case = NAMED[name]
        count = Fault()
        assert once(world, case, (at_calls, count)) is None
        for at in range(1, count.seen + 1, 13):
            assert once(world, case, (at_calls, Fault(at, KeyboardInterrupt))) is None


@pytest.mark.slow
def test_real_signals() -> None:
    counts, wrong = storm(60, random.Random(0))
    assert wrong == []
    assert sum(counts[name] for name in counts if name.endswith("met")) > 10


def test_a_fault_that_is_injected_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness itself: bits that are noted after they were overwritten are lost."""
    setting = Setting("flip")
    monkeypatch.setattr(places, "FEW_PLACES", setting.few)
    world = World(setting, tmp_path)

    def late(weight: torch.Tensor, mask: object, at: torch.Tensor, values: object, before: list[torch.Tensor]) -> None:
        old = places.read(weight, at)
        places.write(weight, at, places.inverted(old))
        before.append(old)

    monkeypatch.setattr("maskpack.runtime.apply.exchange", late)
    _, wrong = every(world, NAMED["load_mask"], step=3)
    assert any("damaged" in one for one in wrong)


def test_both_ways_raise_where_they_are_told() -> None:
    model = nn.Linear(2, 2)
    before = copy.deepcopy(model.state_dict())
    for way in (at_lines, at_calls):
        with pytest.raises(KeyboardInterrupt, match="injected at 2"), way(Fault(2, KeyboardInterrupt)):
            places.write(model.weight.detach(), torch.tensor([0]), torch.tensor([1], dtype=torch.int32))
    assert torch.equal(model.bias, before["bias"])
