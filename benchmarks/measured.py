"""Recorded trials: a JSON-lines file for each experiment in benchmarks/measured, one line a trial.

A line is a JSON object: the settings of the trial, and under "result" what was measured. A trial that is recorded is
not run again; delete its line to repeat it.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("measured")
Trial = dict[str, Any]


def trials(experiment: str, /, **settings: Any) -> list[Trial]:
    """Return the recorded trials with these settings, in the order of recording; None matches a missing setting."""
    path = FOLDER / f"{experiment}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found: list[Trial] = [json.loads(line) for line in lines]
    return [one for one in found if all(one.get(key) == value for key, value in settings.items())]


def record(experiment: str, settings: Mapping[str, Any], result: Any) -> None:
    """Append one trial. Several processes may record into one file; a line is never written in part."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / f"{experiment}.jsonl").open("ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size, line = os.fstat(file.fileno()).st_size, _line(settings, result)
        if file.write(line) != len(line):  # a full disk
            file.truncate(size)
            raise OSError(f"{file.name}: no space for another line")


def trial(experiment: str, settings: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
    """Return the recorded result of a trial; if there is none, measure and record it."""
    wanted = json.loads(json.dumps(settings))
    for one in trials(experiment):
        result = one.pop("result")
        if one == wanted:
            return result
    record(experiment, settings, measure())
    print(experiment, *(f"{key}={value}" for key, value in settings.items()), flush=True)
    return trial(experiment, settings, measure)


def rewrite(path: Path, rows: Iterable[Mapping[str, Any]], *settings: str) -> None:
    """Replace a file by the trials of one whole run; these keys of a row are its settings, the others its result."""
    lines = []
    for row in rows:
        about = {key: row[key] for key in settings if key in row}
        lines.append(_line(about, {key: value for key, value in row.items() if key not in settings}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(lines))


def _line(settings: Mapping[str, Any], result: Any) -> bytes:
    return (json.dumps({**settings, "result": result}, ensure_ascii=False) + "\n").encode()
