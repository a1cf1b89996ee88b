"""Fault injection: each request of pushes, pulls and a search fails once in every applicable way, on both transports.

    python -m benchmarks.faults                             # prints the tables and writes runs/faults.jsonl
    python -m benchmarks.faults --write docs/reliability.md
    python -m benchmarks.faults --only lfs --no-races

The verbs run in client processes against the loopback Hub of the tests. First each flow runs without faults, and its
requests are written down; then once for each request and kind of fault. Afterwards several processes push to one
repository, and pull into one cache, at the same time; and every verb runs, as a command of its own, where there is no
Hub. What must hold is in `fault_flows.py`, `fault_races.py` and `fault_offline.py`; the exit status is 1 if anything
does not.
"""

import argparse
import itertools
import json
import queue
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.fault_flows import FLOWS, SECRETS, Answer, Client, Flow, Run
from benchmarks.fault_matrix import markdown
from benchmarks.fault_offline import offline
from benchmarks.fault_races import races
from benchmarks.measured import rewrite
from benchmarks.report import write_between
from tests.helpers_hub_server import WRITE_TOKEN, Fault, HubServer
from tests.helpers_hub_server.messages import Request

TRANSPORTS = ("lfs", "xet")
PATIENCE = 5.0  # seconds until a call counts as hanging; time limits are cut to one second
FOREVER = 1_000_000
PLACEHOLDERS = {"HASH": r"[0-9a-f]{64}", "COMMIT": r"[0-9a-f]{40}"}
STATUSES: dict[str, dict[str, Any]] = {
    "503": {"status": 503},
    "503 for ever": {"status": 503, "times": FOREVER},
    "429": {"status": 429, "headers": {"Retry-After": "1"}},
}


@dataclass(frozen=True)
class Step:
    """A request of a flow: its label, its number among those of that label, and the faults that apply to it."""

    label: str
    occurrence: int
    kinds: tuple[str, ...]

    def fault(self, kind: str, repo_id: str) -> Fault:
        """Return the rule that lets this request of that repository go wrong."""
        method, _, place = self.label.partition(" ")
        path = re.escape(place).replace("REPOSITORY", re.escape(repo_id))
        for name, pattern in PLACEHOLDERS.items():
            path = path.replace(name, pattern)
        options = STATUSES.get(kind, {})
        return Fault("status" if options else kind, method, f"^{path}([?]|$)", skip=self.occurrence - 1, **options)


def steps_of(requests: list[Request], repo_id: str) -> list[Step]:
    """Return the steps of a flow that ran without a fault."""
    steps, seen = [], dict[str, int]()
    for request in requests:
        place = request.path.replace(repo_id, "REPOSITORY")
        for name, pattern in PLACEHOLDERS.items():
            place = re.sub(pattern, name, place)
        label = f"{request.method} {request.origin}:{place}"
        seen[label] = seen.get(label, 0) + 1
        steps.append(Step(label, seen[label], kinds_for(request)))
    return steps


def kinds_for(request: Request) -> tuple[str, ...]:
    """Return the faults that apply to a request: broken bodies need a body, a lost answer needs work done."""
    content = request.method == "GET" and (request.origin == "store" or "/resolve/" in request.path)
    body = request.method != "HEAD" and request.answer is not None and bool(request.answer.body)
    kinds = [*STATUSES, "drop", *(["lost"] if request.method in ("POST", "PUT") else [])]
    kinds += ["stall", "corrupt"] if body and content else ["silent"]
    return (*kinds, *(["close", "reset", "short"] if body else []))


class Bench:
    """All runs on one transport."""

    def __init__(self, transport: str, root: Path) -> None:
        self.server = HubServer(root / "hub", transport)
        self.root, self.numbers, self.restarts = root, itertools.count(1), itertools.count()
        self.rows: list[dict[str, Any]] = []

    def __enter__(self) -> "Bench":
        self.server.__enter__()
        self.client = self.new_client()
        self.client.call("pull", self.root)  # an error at once; what is imported is imported then
        return self

    def __exit__(self, *_: object) -> None:
        self.client.stop()
        self.server.stop()

    def new_client(self, real_time: bool = False) -> Client:
        return Client(self.server, self.root / f"client{next(self.restarts)}", real_time)

    def new_run(self) -> Run:
        number = next(self.numbers)
        folder = self.root / f"r{number}"
        folder.mkdir()
        return Run(self.server, self.client, folder, number, seed=2 * number)

    def flow(self, flow: Flow) -> None:
        """Run a flow without a fault, then with each fault."""
        run = self.new_run()
        wrong = self.run(flow, run, None)
        steps = steps_of(self.recorded, run.repo_id)
        self.rows.append({"flow": flow.name, "step": "-", "kind": "-", **wrong})
        for step in steps:
            for kind in step.kinds:
                run = self.new_run()
                found = self.run(flow, run, step.fault(kind, run.repo_id))
                label = step.label + (f" ({step.occurrence})" if step.occurrence > 1 else "")
                self.rows.append({"flow": flow.name, "step": label, "kind": kind, **found})
                print(self.server.transport, flow.name, label, kind, found["outcome"], *found["wrong"], flush=True)

    def run(self, flow: Flow, run: Run, fault: Fault | None) -> dict[str, Any]:
        """Make one run; return its outcome and the conditions that do not hold."""
        flow.prepare(run)
        self.server.log.clear()
        if fault:
            self.server.faults.rules.append(fault)
        began = time.monotonic()
        flow.start(run)
        answer, outcome = self.wait()
        run.client = self.client
        seconds = time.monotonic() - began
        self.recorded = list(self.server.log)
        self.server.faults.rules.clear()
        wrong = [] if outcome != "hangs" else [f"no answer after {PATIENCE:.0f} seconds"]
        if not answer.get("ours", True):
            wrong.append(f"{answer['error']} is not an error of ours")
        if fault and fault.met <= fault.skip:
            wrong.append("the fault was not met")
        wrong += flow.check(run, answer) + self.leaks(answer)
        run.folder.rename(run.folder.with_name(f".{run.folder.name}"))
        row = {"outcome": outcome, "text": answer.get("text", ""), "seconds": round(seconds, 2), "wrong": wrong}
        return {"transport": self.server.transport, **row}

    def wait(self) -> tuple[Answer, str]:
        """Return the client's answer and the outcome; a client that never answers is replaced."""
        try:
            answer = self.client.wait(PATIENCE)
            return answer, answer.get("error", "ok")
        except queue.Empty:
            self.server.faults.rules.clear()  # held connections are let go
        try:
            return self.client.wait(PATIENCE), "hangs"
        except queue.Empty:
            self.client.stop()
            self.client = self.new_client()
            self.client.call("pull", self.root)
            return {"error": "none", "ours": True, "text": "the client never answered"}, "hangs"

    def leaks(self, answer: Answer) -> list[str]:
        """Return the places where a token leaked."""
        sent = [one for one in self.server.log if one.origin == "store"]
        places = {
            "an answer": json.dumps(answer),
            "the client's output": self.client.log.read_text(errors="replace"),
        }
        found = [f"a token in {place}" for place, text in places.items() if SECRETS.search(text)]
        return found + ["the user's token at the store"] * any(WRITE_TOKEN in f"{one}" for one in sent)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TRANSPORTS, help="one transport")
    parser.add_argument("--flow", type=int, choices=range(len(FLOWS)), help="one flow")
    parser.add_argument("--no-races", action="store_true", help="leave out the processes that run at the same time")
    parser.add_argument("--no-offline", action="store_true", help="leave out the verbs without a Hub")
    parser.add_argument("--write", type=Path, help="Markdown file that gets the tables between its markers")
    parser.add_argument("--json", type=Path, default=Path("runs/faults.jsonl"))
    options = parser.parse_args()
    began = time.monotonic()
    rows: list[dict[str, Any]] = []
    raced: list[dict[str, Any]] = []
    for transport in [options.only] if options.only else TRANSPORTS:
        with tempfile.TemporaryDirectory() as folder, Bench(transport, Path(folder)) as bench:
            for flow in FLOWS if options.flow is None else [FLOWS[options.flow]]:
                bench.flow(flow)
            rows += bench.rows
            if not options.no_races:
                raced += races(bench.server, bench.new_client, Path(folder))
    away: list[dict[str, Any]] = []
    if not options.no_offline:
        with tempfile.TemporaryDirectory() as folder:
            away = offline(Path(folder))
    text = markdown(rows, raced, away)
    print(text)
    seconds = round(time.monotonic() - began)
    rewrite(options.json, [*rows, *raced, *away], "transport", "flow", "step", "kind", "what", "hub", "verb")
    if options.write:
        write_between(options.write, "make bench-faults", text)
    wrong = [f"{one}: {what}" for one in [*rows, *raced, *away] for what in one["wrong"]]
    print(f"{len(rows)} runs in {seconds} s; {len(wrong)} things that must not be", *wrong, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
