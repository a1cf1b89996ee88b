"""Progress: lines now and then where there is no terminal, and what a training in Python shows by itself."""

import io
import logging
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from maskpack_cli.main import app
from rich.console import Console
from typer.testing import CliRunner

from maskpack.backbone.load import Backbone
from maskpack.errors import as_text
from maskpack.training import TrainConfig, load_data, progress, train_mask
from maskpack.training.progress import Lines, Seen, seen_by_default

from .helpers_cli import TRAIN

SHORT = TrainConfig(steps=20, batch_size=32, augment="none")


def test_lines_come_in_ever_longer_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [0.0], list[str]()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    lines = Lines(lambda text: said.append(f"{now[0]:.0f}: {text}"))
    lines.begin("training")
    for step in range(1, 1001):
        now[0] += 1
        lines.moved(step, 1000)
    assert said[:3] == [
        "2: training, 2 of 1,000, 2 s, about 998 s left",
        "12: training, 12 of 1,000, 12 s, about 988 s left",
        "22: training, 22 of 1,000, 22 s, about 978 s left",
    ]
    assert len(said) < 40
    assert said[-2].split(":")[0] < "890"
    lines.begin("evaluating")  # what is not counted is told as well
    now[0] += 200
    lines.look()
    assert said[-1] == "1200: evaluating, 1200 s"


def test_without_a_terminal_the_logger_has_the_lines(
    tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "FIRST", 0.0)
    data = load_data("digits:0-1")
    with caplog.at_level(logging.INFO, "maskpack"):
        train_mask(tiny_backbone, data, SHORT)
    assert any(one.message.startswith("training") and " of 20, " in one.message for one in caplog.records)
    caplog.clear()
    with caplog.at_level(logging.INFO, "maskpack"):
        train_mask(tiny_backbone, data, SHORT, report=None)
    assert not caplog.records


@pytest.mark.parametrize("level", [logging.WARNING, logging.ERROR])
def test_a_terminal_has_a_bar_unless_the_logger_is_silent(level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    logger = logging.getLogger("maskpack")
    monkeypatch.setattr(logger, "level", level)
    logger.manager._clear_cache()  # type: ignore[attr-defined]
    seen = seen_by_default()
    logger.manager._clear_cache()  # type: ignore[attr-defined]
    assert (seen is not None and seen.console is not None) == (level == logging.WARNING)


def test_verbs_say_plain_lines_in_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST", 0.0)
    monkeypatch.setattr(progress, "LEAST", 0.0)
    done = CliRunner().invoke(app, [*TRAIN, "--output", str(tmp_path)])
    assert done.exit_code == 0
    assert re.search(r"^training.* of 3, ", done.stderr, re.MULTILINE)
    assert not {"\r", "\x1b"} & set(done.stderr)
    quiet = CliRunner().invoke(app, ["verify", str(tmp_path), "--quiet"])
    assert not quiet.stderr


def test_verbs_that_count_nothing_say_that_they_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST", 0.1)
    monkeypatch.setattr("maskpack.hub.cache.cached_adapters", lambda: time.sleep(0.7) or [])
    done = CliRunner().invoke(app, ["list"])
    assert re.match(r"maskpack list …, \d s\n", done.stderr), done.stderr


def test_a_bar_counts_what_is_known_and_says_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now, shown = [0.0], io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Seen(Console(file=shown, force_terminal=True, width=100), Lines(str), print, print).bar("", False) as moved:
        moved(0, None)
        for step in range(1, 601):
            now[0] += 1
            moved(step, 1200, "a long name of what is done, " * 5)
            if step % 100 == 50:
                moved(2, 2)  # an evaluation
    assert "None" not in shown.getvalue()
    assert "600/1,200" in shown.getvalue()
    assert "0:10:00 left" in shown.getvalue()


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ({"test_accuracy": 0.8, "test_over_probe": -0.05}, ["80.00 %", "-5.00 points"]),
        ({"test_r2": 0.8, "test_probe_r2": 0.75, "test_over_probe": 0.05}, ["0.8000", "0.7500", "0.0500"]),
        ({"test_perplexity": 33.25, "test_over_raw": 2.5}, ["33.2500", "2.5000"]),
        (
            {"k-NN (k = 20)": 0.5, "loss": 0.00001234, "bytes": 12345, "zero": 0.0},
            ["50.00 %", "1.234e-05", "12,345", "0.0000"],
        ),
        ({"signed": True, "revision": None, "codec": "logit"}, ["yes", "-", "logit"]),
    ],
)
def test_figures_as_text(values: dict[str, Any], shown: list[str]) -> None:
    assert [as_text(values, key) for key in values] == shown
