"""A short run of the mutation fuzzer over whole files of every kind and codec; `make fuzz` is the long one."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the fuzzer limits its memory as Linux does")
def test_spoiled_files_give_masks_or_errors_of_ours() -> None:
    words = [sys.executable, "-m", "tests.fuzz.fuzz_reader", "--seconds", "4", "--seed", "7"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    executions, rest = done.stdout.split(" ", 1)
    assert int(executions) > 100
    assert "0 different failures" in rest
