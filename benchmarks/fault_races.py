"""Several processes at the same time: pushes to one repository, pulls into one cache."""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.fault_flows import Answer, Client, fsck, stored, without_card, wrong_adapter
from tests.helpers_hub import read_folder, write_adapter
from tests.helpers_hub_server import HubServer

PUSHERS, PULLERS, PULLS = 10, 2, 5
LARGE = 64_000_000  # weights: 8 MB
FIRST_SEED = 1_000_000
NewClient = Callable[..., Client]


def races(server: HubServer, new_client: NewClient, folder: Path) -> list[dict[str, Any]]:
    """Run all races on one transport."""
    clients = [new_client(real_time=True) for _ in range(PUSHERS)]
    try:
        for client in clients:  # imports are done before anything is timed to be at once
            client.call("pull", folder)
        found = [
            to_one_branch(server, clients, folder, "main of a new repository", range(FIRST_SEED, FIRST_SEED + PUSHERS)),
            to_own_branches(server, clients, folder),
            to_one_branch(server, clients, folder, "the same adapter to a new repository", [FIRST_SEED + 50] * PUSHERS),
            into_one_cache(server, clients[:PULLERS], folder),
        ]
    finally:
        for client in clients:
            client.stop()
    return [{"transport": server.transport, **one} for one in found]


def together(clients: Iterable[Client], calls: Iterable[tuple[Any, ...]], **options: Any) -> list[Answer]:
    """Make one call in each client at once and return the answers."""
    chosen = list(zip(clients, calls, strict=True))
    for client, call in chosen:
        client.start(*call, **options)
    return [client.wait(120) for client, _ in chosen]


def adapters(folder: Path, name: str, seeds: Iterable[int]) -> list[Path]:
    return [write_adapter(folder / f"{name}-{at}", without_card(seed)) for at, seed in enumerate(seeds)]


def outcome(answers: list[Answer]) -> str:
    counted = Counter(
        answer.get("error", "unchanged" if answer.get("unchanged") == "True" else "ok") for answer in answers
    )
    return ", ".join(f"{count} {name}" for name, count in sorted(counted.items()))


def named(answers: list[Answer]) -> list[str]:
    """Return the errors that are not ours."""
    return [f"{one['error']}: {one['text'][:200]}" for one in answers if not one.get("ours", True)]


def to_one_branch(
    server: HubServer, clients: list[Client], folder: Path, what: str, seeds: Iterable[int]
) -> dict[str, Any]:
    """Check pushes to one branch: each lands once or says that it did not; equal ones land once together."""
    seeds, repo_id = list(seeds), f"alice/race-{what.split()[0]}"
    folders = adapters(folder, what.split()[0], seeds)
    answers = together(clients, [("push", one, repo_id) for one in folders])
    repository = server.repositories[repo_id]
    history = repository.git.history(repository.head("main"))[:-1]
    held = [stored(server, repo_id, commit) for commit in history]
    wrong = named(answers) + fsck(server, repo_id)
    for seed, answer in zip(seeds, answers, strict=True):
        landed = [commit for commit, files in zip(history, held, strict=True) if not wrong_adapter(files, seed)]
        if len(landed) > 1:
            wrong.append(f"an adapter landed {len(landed)} times")
        if "error" not in answer and landed != [answer["commit"]]:
            wrong.append("a push succeeded and its commit is not in the history")
        if "error" in answer and "somebody else" not in answer["text"]:
            wrong.append(f"an error that does not say why: {answer['text'][:200]}")
        if "error" in answer and landed and len(set(seeds)) > 1:
            wrong.append("an adapter landed although its push failed")
    if not all(any(not wrong_adapter(files, seed) for seed in seeds) for files in held):
        wrong.append("a commit holds a mixture")
    if all("error" in answer for answer in answers):
        wrong.append("no push succeeded")
    what = f"{len(answers)} processes push {'different adapters to ' if len(set(seeds)) > 1 else ''}{what}"
    return {"what": what, "outcome": f"{outcome(answers)}; {len(history)} commits", "wrong": wrong}


def to_own_branches(server: HubServer, clients: list[Client], folder: Path) -> dict[str, Any]:
    """Check that pushes to branches of their own do not disturb each other."""
    seeds, repo_id = range(FIRST_SEED + 20, FIRST_SEED + 20 + len(clients)), "alice/race-branches"
    server.add(repo_id, {})
    folders = adapters(folder, "branches", seeds)
    calls = [("push", one, f"{repo_id}@b{n}") for n, one in enumerate(folders)]
    answers = together(clients, calls)
    wrong = named(answers) + fsck(server, repo_id)
    wrong += [answer["text"][:200] for answer in answers if "error" in answer]
    git = server.repositories[repo_id].git
    for n, (seed, answer) in enumerate(zip(seeds, answers, strict=True)):
        if "error" not in answer:
            made = len(git.history(str(git.resolve(f"b{n}")))) - 2
            right = git.resolve(f"b{n}") == answer["commit"] and not wrong_adapter(
                stored(server, repo_id, f"b{n}"), seed
            )
            wrong += [] if right and made == 1 else [f"the branch b{n} holds something else"]
    return {
        "what": f"{len(calls)} processes push to branches of their own",
        "outcome": outcome(answers),
        "wrong": wrong,
    }


def into_one_cache(server: HubServer, clients: list[Client], folder: Path) -> dict[str, Any]:
    """Check pulls into one cache, a new one each time: the bytes are right, and nothing unfinished is left."""
    wrong: list[str] = []
    answers: list[Answer] = []
    for number in range(PULLS):
        repo_id, cache = f"alice/large{number}", folder / f"cache{number}"
        files = without_card(FIRST_SEED + 100 + number, LARGE)
        commit = server.add(repo_id, files)
        found = together(clients, [("pull", repo_id)] * len(clients), cache_dir=str(cache))
        wrong += [answer["text"][:200] for answer in found if "error" in answer]
        for answer in found:
            if "error" not in answer and (answer["commit"], read_folder(Path(answer["path"]))) != (commit, files):
                wrong.append("a pull returned something else")
        wrong += [f"{path.name} was left" for path in cache.rglob("*.incomplete")]
        answers += found
    what = f"{len(clients)} processes pull 8 MB into one cache, {PULLS} times"
    return {"what": what, "outcome": outcome(answers), "wrong": wrong + named(answers)}
