"""Every verb that asks the Hub, as a command of its own, where the Hub cannot be reached or says nothing."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.report import table
from tests.helpers_hub import write_adapter

LIMIT = 20.0  # seconds from the first attempt to connect to the end of the process; a start takes some more
LONGEST = 300.0
AT_ONCE = 2
COMMAND = (sys.executable, "-m", "maskpack_cli.main")
TRAIN = ("train", "--quiet", "--output", "out", "--epochs", "1", "--data")
VERBS: dict[str, tuple[str, ...]] = {
    "pull": ("pull", "alice/birds"),
    "push": ("push", "--quiet", "adapter", "alice/birds"),
    "search": ("search", "birds"),
    "inspect": ("inspect", "alice/birds"),
    "load_mask": ("-c", "import torch, maskpack; maskpack.load_mask(torch.nn.Linear(2, 2), 'alice/birds')"),
    "eval": ("eval", "alice/birds", "--data", "digits:0-9"),
    "train, a backbone of timm": (*TRAIN, "digits:0-9", "--backbone", "timm/resnet18.a1_in1k"),
    "train, a backbone of transformers": (*TRAIN, "digits:0-9", "--backbone", "hf/alice/network"),
    "train, data of the Hub": (*TRAIN, "alice/pictures", "--backbone", "net.py:net"),
}
FACTORY = """from torch import nn
PREPROCESS = {"size": 8, "resize": 8}
def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
"""
# imported by Python when it starts: the time of the first attempt goes into a file
WATCH = """import os, pathlib, socket, time
connect = socket.create_connection
def watched(*args, **options):
    file = pathlib.Path(os.environ["FIRST_ATTEMPT"])
    if not file.exists():
        file.write_text(str(time.time()))
    return connect(*args, **options)
socket.create_connection = watched
"""
SLOW_NAMES = "socket.getaddrinfo = lambda *_, **__: time.sleep(600)\n"


@contextmanager
def silent(backlog: int, connections: int) -> Iterator[str]:
    """Yield the address of a server that never answers; with its backlog full it accepts no connection."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(backlog)
        waiting = [socket.socket() for _ in range(connections)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(server.getsockname())
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        for one in waiting:
            one.close()


def ask(verb: str, endpoint: str, folder: Path, slow_names: bool = False) -> dict[str, Any]:
    """Run a verb in a process of its own, with an empty cache, and return how long it took and what it said."""
    folder.mkdir(parents=True)
    write_adapter(folder / "adapter")
    (folder / "net.py").write_text(FACTORY)
    (folder / "sitecustomize.py").write_text(WATCH + SLOW_NAMES * slow_names)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "HF_ENDPOINT": endpoint, "HOME": str(folder)}
    environment |= {
        "HF_HOME": str(folder / "home"),
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_TOKEN": "hf_aliceMayWrite",
    }
    first = folder / "first.txt"
    environment["FIRST_ATTEMPT"] = str(first)
    words = VERBS[verb]
    command = [sys.executable, *words] if words[0] == "-c" else [*COMMAND, *words]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, timeout=LONGEST, text=True, stdout=subprocess.DEVNULL, stderr=-1
        )
    except subprocess.TimeoutExpired:
        return {"verb": verb, "seconds": LONGEST, "text": "", "wrong": [f"no end after {LONGEST:.0f} seconds"]}
    ended = time.time()
    seconds = ended - float(first.read_text()) if first.exists() else 0.0
    lines = done.stderr.strip().splitlines()
    wrong = [] if done.returncode == 1 else [f"exit code {done.returncode}"]
    if words[0] == "-c":  # a traceback of Python, whose last line is the error
        lines = lines[-1:] if lines and lines[0].startswith("Traceback") else [*lines, "no traceback"]
    if len(lines) != 1:
        wrong.append(f"{len(lines)} lines: {' / '.join(lines)[:500]}")
    if "hf_alice" in done.stderr:
        wrong.append("a token is shown")
    return {"verb": verb, "seconds": seconds, "text": lines[-1] if lines else "", "wrong": wrong}


def offline(folder: Path, only: str | None = None) -> list[dict[str, Any]]:
    """Run all verbs against every kind of unreachable Hub, several at once, since most of the time is start-up."""
    with silent(0, 4) as deaf, silent(64, 0) as mute, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: refused, and nobody else's
        hubs = {
            "connection refused": (f"http://127.0.0.1:{closed.getsockname()[1]}", AT_ONCE),
            "no such name": ("http://hub.invalid", AT_ONCE),
            "silent name server": ("http://hub.invalid", AT_ONCE),
            "no answer to connecting": (deaf, AT_ONCE),
            "connected, then silent": (mute, len(VERBS)),
        }
        rows = []
        for what, (endpoint, at_once) in hubs.items():
            if only and only not in what:
                continue
            with ThreadPoolExecutor(at_once) as pool:
                calls = [
                    pool.submit(ask, verb, endpoint, folder / what / verb, what == "silent name server")
                    for verb in VERBS
                ]
                for row in [call.result() for call in calls]:
                    if row["seconds"] > LIMIT and what != "connected, then silent":
                        row["wrong"].append(f"took {row['seconds']:.0f} seconds")
                    rows.append({"hub": what, **row})
                    print(what, row["verb"], f"{row['seconds']:.1f} s", row["text"][:200], *row["wrong"], flush=True)
    return rows


def offline_table(rows: list[dict[str, Any]]) -> str:
    """Return seconds until the error by verb and kind; in bold where something was wrong."""
    hubs = list(dict.fromkeys(row["hub"] for row in rows))
    cells = {
        (row["verb"], row["hub"]): f"**{row['seconds']:.0f}**" if row["wrong"] else f"{row['seconds']:.0f}"
        for row in rows
    }
    return table(("seconds", *hubs), [(verb, *(cells.get((verb, hub), "") for hub in hubs)) for verb in VERBS])


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as where:
        print(offline_table(offline(Path(where), *sys.argv[1:])))
