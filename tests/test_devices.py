"""Models that several processes share (FSDP2, tensor parallelism): same masks and same bits as in one process."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from maskpack.adapter.read import read_adapter

ROOT = Path(__file__).parent.parent


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def found_by(processes: int, folder: Path) -> dict[str, bool]:
    """What `helpers_sharded` found in so many processes, which must all have found the same."""
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.helpers_sharded", str(folder)],
            cwd=ROOT,
            env={**os.environ, **own, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        said = [one.communicate(timeout=240)[1] for one in running]
    finally:
        for one in running:
            one.kill()
    assert not any(one.returncode for one in running), "\n".join(said)
    each = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
    assert all(one == each[0] for one in each)
    return dict(each[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes",
    [2, pytest.param(4, marks=pytest.mark.skipif("MASKPACK_FOUR" not in os.environ, reason="minutes: make devices"))],
)
def test_several_processes_find_what_one_finds(processes: int, tmp_path: Path) -> None:
    found = found_by(processes, tmp_path)
    assert len(found) > 90
    assert [what for what, right in found.items() if not right] == []


@pytest.mark.slow
def test_the_page_runs_in_two_processes(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/devices.md").read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "train.py").write_text("\n".join([*blocks[:3], "print('saved', adapter.mask_id)"]))
    start = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    command = [sys.executable, "-m", *start, "train.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    said = re.findall("saved (.+)", done.stdout)
    assert len(said) == 2
    assert said[0] == said[1] == read_adapter(tmp_path / "sharded-mask/maskpack_model.safetensors").mask_id
