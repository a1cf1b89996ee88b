"""Short runs of the mutation fuzzers over whole files of every kind and codec; `make fuzz` runs them long."""

import importlib
import sys

import pytest

from .helpers_process import Forked


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the fuzzer limits its memory as Linux does")
@pytest.mark.parametrize("fuzzer", ["fuzz_reader", "fuzz_cli", "fuzz_logit", "fuzz_ulps"])
def test_spoiled_files_give_masks_or_errors_of_ours(fuzzer: str) -> None:
    main = importlib.import_module(f"tests.fuzz.{fuzzer}").main

    def run() -> None:
        sys.argv = [fuzzer, "--seconds", "2", "--seed", "7"]
        sys.exit(main())

    with Forked(run) as process:
        code, output, errors = process.ended()
    assert code == 0, output[-4000:] + errors[-4000:]
    executions, rest = output.split(" ", 1)
    assert int(executions) > 5
    assert "0 different failures" in rest
