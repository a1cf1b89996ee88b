"""Short runs of the mutation fuzzers over whole files of every kind and codec; `make fuzz` runs them long."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the fuzzer limits its memory as Linux does")
@pytest.mark.parametrize("fuzzer", ["fuzz_reader", "fuzz_cli", "fuzz_logit", "fuzz_ulps"])
def test_spoiled_files_give_masks_or_errors_of_ours(fuzzer: str) -> None:
    words = [sys.executable, "-m", f"tests.fuzz.{fuzzer}", "--seconds", "3", "--seed", "7"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    executions, rest = done.stdout.split(" ", 1)
    assert int(executions) > 20
    assert "0 different failures" in rest
