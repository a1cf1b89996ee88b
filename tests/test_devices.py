"""Models that several processes share (FSDP2, tensor parallelism): same masks and same bits as in one process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from maskpack.adapter.read import read_adapter

from . import helpers_sharded
from .helpers_process import together

FOUR = pytest.mark.skipif("MASKPACK_FOUR" not in os.environ, reason="minutes: make devices")


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes",
    [2, pytest.param(4, marks=FOUR)],
)
def test_several_processes_find_what_one_finds(processes: int, tmp_path: Path) -> None:
    for ended in together(processes, "-m", "tests.helpers_sharded", tmp_path, folder=tmp_path):
        assert ended.code == 0, ended.errors
    each = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(processes)]
    assert all(one == each[0] for one in each)
    mask_id = each[0].pop("page")
    assert len(each[0]) > 90
    assert [what for what, right in each[0].items() if not right] == []
    assert mask_id == read_adapter(tmp_path / "sharded-mask/maskpack_model.safetensors").mask_id


@FOUR
def test_launchers_start_what_the_page_says(tmp_path: Path) -> None:
    """The code of docs/devices.md gives one mask by torchrun and accelerate, in any number of processes."""
    script = tmp_path / "train.py"
    script.write_text(helpers_sharded.page_code() + "print('mask', adapter.mask_id)\n")
    accelerate = ("accelerate.commands.launch", "--mixed_precision=no", "--dynamo_backend=no", "--num_machines=1")
    found = set()
    for launcher in (
        ("torch.distributed.run", "--nproc-per-node=2"),
        (*accelerate, "--num_processes=1"),
        (*accelerate, "--num_processes=2", "--multi_gpu"),
        (*accelerate, "--num_processes=4", "--multi_gpu"),
    ):
        ended = subprocess.run(
            [sys.executable, "-m", *launcher, script],
            cwd=tmp_path,
            env={**os.environ, "ACCELERATE_USE_CPU": "true"},
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stderr
        found |= {line for line in ended.stdout.splitlines() if line.startswith("mask ")}
        for path in ("sharded-mask", "checkpoint"):
            shutil.rmtree(tmp_path / path)
    assert len(found) == 1
