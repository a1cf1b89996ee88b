"""Models that several processes share (FSDP2, tensor parallelism): same masks and same bits as in one process."""

import json
import os
from pathlib import Path

import pytest

from maskpack.adapter.read import read_adapter

from . import helpers_sharded
from .helpers_process import together


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes",
    [2, pytest.param(4, marks=pytest.mark.skipif("MASKPACK_FOUR" not in os.environ, reason="minutes: make devices"))],
)
def test_several_processes_find_what_one_finds(processes: int, tmp_path: Path) -> None:
    with together(lambda: helpers_sharded.main(tmp_path), processes, tmp_path) as running:
        for one in running:
            ended = one.ended(240)
            assert ended.code == 0, ended.errors
    each = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(processes)]
    assert all(one == each[0] for one in each)
    mask_id = each[0].pop("page")
    assert len(each[0]) > 90
    assert [what for what, right in each[0].items() if not right] == []
    assert mask_id == read_adapter(tmp_path / "sharded-mask/maskpack_model.safetensors").mask_id
