"""Flows of the fault benchmark: the call, the state of the Hub before it, and the conditions after it."""

import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers_hub import CARD, NAMES, read_folder, saved, write_adapter
from tests.helpers_hub_server import WRITE_TOKEN, HubServer

ROOT = Path(__file__).parents[1]
SECRETS = re.compile(r"hf_alice\w+|xet_(?:read|write)_\w+")
WEIGHTS, TAG = 12_000, "v1"
SMALL = 24  # parameters, so that no two runs send the same picture, which would not be sent again
Answer = dict[str, Any]
DAMAGES: tuple[Callable[[Path], object], ...] = (
    os.mkfifo,
    Path.mkdir,
    Path.touch,
    lambda path: path.write_bytes(b"\0" * 5000),
    lambda path: path.symlink_to("gone"),
)


def adapter(seed: int, weights: int = WEIGHTS) -> dict[str, bytes]:
    """Return the files of an adapter that has nothing in common with those of other seeds."""
    return saved(seed, weights, SMALL)


def without_card(seed: int, weights: int = WEIGHTS) -> dict[str, bytes]:
    """Return the files of an adapter without its card."""
    return {name: data for name, data in adapter(seed, weights).items() if name != CARD}


class Client:
    """A process that pushes and pulls."""

    def __init__(self, server: HubServer, home: Path, real_time: bool = False) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.log = home / "stderr.txt"
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        environment |= server.env(WRITE_TOKEN) | {"HF_HOME": str(home), "HF_XET_CACHE": str(home / "xet")}
        # as many attempts as by default, without the waits
        environment |= {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "5", "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"}
        environment |= {"HF_XET_CLIENT_READ_TIMEOUT": "1s"}
        command = [sys.executable, "-m", "benchmarks.fault_client", *(["--real-time"] if real_time else [])]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=ROOT
            )
        self.answers: queue.Queue[Answer] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.answers.put(json.loads(line))

    def start(self, call: str, *args: object, **options: object) -> None:
        """Begin a call; `wait` returns what comes of it."""
        assert self.process.stdin is not None
        command = {"call": call, "args": [str(one) for one in args], "options": options}
        self.process.stdin.write(json.dumps(command, default=str) + "\n")
        self.process.stdin.flush()

    def wait(self, seconds: float = 60) -> Answer:
        """Return the answer; queue.Empty if there is none in time."""
        return self.answers.get(timeout=seconds)

    def call(self, call: str, *args: object, **options: object) -> Answer:
        self.start(call, *args, **options)
        return self.wait()

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


@dataclass
class Run:
    """One run of a flow: its own repository, adapter, cache and folder."""

    server: HubServer
    client: Client
    folder: Path
    number: int
    seed: int
    commit: str = ""
    before: list[str] = field(default_factory=list)

    @property
    def repo_id(self) -> str:
        return f"alice/r{self.number}"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def history(self) -> list[str]:
        """Return the commits of main, newest first; none if there is no repository."""
        repository = self.server.repositories.get(self.repo_id)
        return repository.git.history(repository.head("main")) if repository else []


def wrong_adapter(found: dict[str, bytes], seed: int) -> list[str]:
    """Return the names of files that differ from the seed's adapter; its card may."""
    return [name for name, data in without_card(seed).items() if found.get(name) != data]


def stored(server: HubServer, repo_id: str, revision: str) -> dict[str, bytes]:
    """Return an adapter's files at the Hub, as far as they are there."""
    repository = server.repositories[repo_id]
    there = repository.entries(repository.head(revision))
    return {name: server.file(repo_id, name, revision) for name in NAMES if name in there}


def fsck(server: HubServer, repo_id: str) -> list[str]:
    """Return the output of `git fsck` for a repository."""
    repository = server.repositories.get(repo_id)
    if repository is None:
        return []
    command = ["git", "-C", str(repository.git.path), "fsck", "--strict", "--no-dangling"]
    done = subprocess.run(command, capture_output=True, text=True)
    return [f"git fsck: {done.stdout}{done.stderr}"] if done.returncode or done.stdout else []


@dataclass(frozen=True)
class Flow:
    """A call that is run again and again with one fault each.

    Attributes:
        prepare: sets up what stands before. start: begins the call. check: returns what does not hold afterwards.
    """

    name: str
    prepare: Callable[[Run], None]
    start: Callable[[Run], None]
    check: Callable[[Run, Answer], list[str]]


def prepare_push(run: Run) -> None:
    write_adapter(run.folder / "adapter", without_card(run.seed))


def prepare_update(run: Run) -> None:
    run.server.add(run.repo_id, adapter(run.seed + 1))
    run.before = run.history()
    prepare_push(run)


def start_push(run: Run) -> None:
    run.client.start("push", run.folder / "adapter", run.repo_id)


def check_push(run: Run, answer: Answer) -> list[str]:
    """Check a push: at most one commit, a whole one, and just one if it succeeded; a repetition ends with one."""
    wrong = _look_at_push(run, answer)
    if "error" in answer and not wrong:
        again = run.client.call("push", run.folder / "adapter", run.repo_id)
        wrong = [f"pushed again: {one}" for one in _look_at_push(run, again)]
        if "error" in again:
            wrong.append(f"pushed again: {again['text']}")
    return wrong + fsck(run.server, run.repo_id)


def _look_at_push(run: Run, answer: Answer) -> list[str]:
    before = run.before or run.history()[-1:]  # a new repository begins with a commit of the Hub's
    made = [commit for commit in run.history() if commit not in before]
    wrong = [f"{len(made)} commits"] if len(made) > 1 else []
    if made:
        found = stored(run.server, run.repo_id, made[0])
        wrong += [f"{name} at the Hub has other bytes" for name in wrong_adapter(found, run.seed)]
        wrong += [] if found.get(CARD, b"").startswith(b"---\n") else ["no model card at the Hub"]
    if "error" not in answer and made[:1] != [answer["commit"]]:
        wrong.append("success without that commit")
    if made and "nothing of yours was" in answer.get("text", ""):
        wrong.append("the commit landed and the error says that nothing was written")
    return wrong


def prepare_pull(run: Run) -> None:
    run.commit = run.server.add(run.repo_id, adapter(run.seed))


def start_pull_branch(run: Run) -> None:
    run.client.start("pull", run.repo_id, cache_dir=run.cache, output=run.folder / "output")


def start_pull_commit(run: Run) -> None:
    run.client.start("pull", f"{run.repo_id}@{run.commit}", cache_dir=run.cache)


def check_pull(run: Run, answer: Answer) -> list[str]:
    """Check a pull: right bytes or an error; cache and folder are then right or refused; a repetition works."""
    wrong = _look_at_pull(run, answer)
    if "error" in answer:
        left = [run.client.call("pull", f"{run.repo_id}@{run.commit}", cache_dir=run.cache, local_files_only=True)]
        if (run.folder / "output").exists():
            left.append(run.client.call("pull", run.folder / "output"))
        wrong += [f"left behind: {one}" for found in left for one in _look_at_pull(run, found)]
        start_pull_branch(run)
        again = run.client.wait()
        wrong += [f"pulled again: {one}" for one in _look_at_pull(run, again)]
        if "error" in again:
            wrong.append(f"pulled again: {again['text']}")
    return wrong


def _look_at_pull(run: Run, answer: Answer) -> list[str]:
    if "error" in answer:
        return []
    found = read_folder(Path(answer["path"]))
    wrong = [f"{name} has other bytes" for name in wrong_adapter(found, run.seed)]
    if found.get(CARD) != adapter(run.seed)[CARD]:
        wrong.append(f"{CARD} has other bytes")
    if answer["commit"] not in (run.commit, None):
        wrong.append("another commit")
    return wrong + [f"{name} is no file of an adapter" for name in set(found) - set(adapter(run.seed))]


def prepare_tag(run: Run) -> None:
    """Make a tag, and have another commit of the repository in the cache."""
    run.server.add(run.repo_id, adapter(run.seed + 1))
    run.client.call("pull", run.repo_id, cache_dir=run.cache)
    prepare_pull(run)
    repository = run.server.repositories[run.repo_id]
    repository.git.set_ref(f"refs/tags/{TAG}", run.commit)


def start_pull_tag(run: Run) -> None:
    options = {"cache_dir": run.cache, "output": run.folder / "output", "require_revision": True}
    run.client.start("pull", f"{run.repo_id}@{TAG}", **options)


def prepare_damaged(run: Run) -> None:
    """Damage everything of a commit in the cache, and leave there what a killed pull leaves."""
    prepare_pull(run)
    run.client.call("pull", f"{run.repo_id}@{run.commit}", cache_dir=run.cache)
    shutil.rmtree(
        run.cache / "blobs", ignore_errors=True
    )  # Xet's, from which it would be whole again without a request
    blobs = next(run.cache.glob("models--*/blobs"))
    for number, blob in enumerate(sorted(blobs.iterdir())):
        blob.unlink()
        DAMAGES[(run.number + number) % len(DAMAGES)](blob)
    (blobs / f"{'0' * 64}.01234567.incomplete").write_bytes(b"half of it")


def start_load(run: Run) -> None:
    reference = f"{run.repo_id}@{run.commit}"
    run.client.start("load_mask", reference, weights=WEIGHTS, small=SMALL, cache_dir=run.cache)


def check_load(run: Run, answer: Answer) -> list[str]:
    """Check a load: right weights or an error, also when repeated; nothing unfinished is left in the cache."""
    local = write_adapter(run.folder / "local", adapter(run.seed))
    right = run.client.call("load_mask", local, weights=WEIGHTS, small=SMALL)
    wrong = [] if "error" in answer or answer == right else ["the weights are others"]
    if "error" in answer:
        start_load(run)
        again = run.client.wait()
        wrong += [] if again == right else [f"loaded again: {again}"]
    return wrong + [f"{path.name} was left" for path in run.cache.rglob("*.incomplete")]


def start_search(run: Run) -> None:
    run.client.start("search_adapters", f"r{run.number}")


def check_search(run: Run, answer: Answer) -> list[str]:
    """Check a search: it gives the repository or an error, and a repetition finds it."""
    found = answer if "error" not in answer else run.client.call("search_adapters", f"r{run.number}")
    return [] if run.repo_id in found.get("found", []) else [f"{run.repo_id} was not found: {found}"]


FLOWS = (
    # first: with many repositories the server takes long to look at them all
    Flow("search", prepare_pull, start_search, check_search),
    Flow("push to a new repository", prepare_push, start_push, check_push),
    Flow("push an update", prepare_update, start_push, check_push),
    Flow("pull a branch into a folder", prepare_pull, start_pull_branch, check_pull),
    Flow("pull a commit", prepare_pull, start_pull_commit, check_pull),
    Flow("pull a tag, which is required, another commit being cached", prepare_tag, start_pull_tag, check_pull),
    Flow("load a commit over a damaged cache, after a killed pull", prepare_damaged, start_load, check_load),
)
