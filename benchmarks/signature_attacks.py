"""Random attacks on real files of signed adapters, and changes that must be accepted.

    python -m benchmarks.signature_attacks                       # prints the table and writes runs/signatures.jsonl
    python -m benchmarks.signature_attacks --write docs/reliability.md
    python -m benchmarks.signature_attacks --tries 100 --seed 7

Each attack spoils the files of an adapter of `alice/birds`, signed with an Ed25519 or a P-256 key in turn. They are
read with `load_adapter(folder, require_signature=…)`; those on a repository by `pull`, from a loopback Hub. Then the
same for a bundle that an identity signed, with sigstore's own client against an authority and logs in this process. An
error that is not one of maskpack's, or an adapter that is accepted although a signed byte of it is another one, is
wrong, and the exit status 1.
"""

import argparse
import base64
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.measured import rewrite
from benchmarks.report import table, write_between
from tests.helpers_hub import CARD, CONFIG, MODEL, saved, write_adapter
from tests.helpers_hub_server import WRITE_TOKEN, HubServer
from tests.helpers_signing import KINDS, SIGNATURE, new_key, restated, rewritten, write_key
from tests.helpers_sigstore import ALICE, BUNDLE, servers, token

BIRDS = "alice/birds"
Files = dict[str, bytes]


@dataclass(frozen=True)
class World:
    """A signed adapter and the means of an attacker: other adapters, other keys, other signatures."""

    files: Files
    trusted: Path | str
    key: Any
    others: list[Files]  # whole adapters, signed by the same key for another repository
    strangers: list[Files]  # whole adapters, signed by somebody else for this one
    wrong_kind: Any = None  # a key of the other algorithm
    signature: str = SIGNATURE


def make_world(folder: Path, kind: str) -> World:
    """Return a world whose trusted key is of a kind."""
    key = new_key(kind)
    private, public = write_key(folder, kind, key)
    stranger, _ = write_key(folder, f"{kind}-stranger", new_key(kind))
    others = [signed(folder, seed, private, f"alice/other{seed}") for seed in range(1, 6)]
    strangers = [signed(folder, seed, stranger, BIRDS) for seed in range(1, 6)]
    wrong_kind = new_key(next(k for k in KINDS if k != kind))
    return World(signed(folder, 0, private, BIRDS), public, key, others, strangers, wrong_kind)


def signed(folder: Path, seed: int, by: Path | str, repository: str) -> Files:
    """Return the files of an adapter that a key, or the identity that is logged in, has signed."""
    from maskpack.adapter.signature import sign_adapter

    place = write_adapter(Path(tempfile.mkdtemp(dir=folder)), saved(seed))
    sign_adapter(place, by, repository=repository, counter=seed + 1)
    return {path.name: path.read_bytes() for path in place.iterdir()}


def make_identity_world(folder: Path) -> World:
    """Return a world whose trusted signer is an identity."""
    files = signed(folder, 0, "sigstore", BIRDS)
    others = [signed(folder, seed, "sigstore", f"alice/other{seed}") for seed in range(1, 6)]
    with patch.dict(os.environ, SIGSTORE_IDENTITY_TOKEN=token(ALICE.replace("alice", "mallory"))):
        strangers = [signed(folder, seed, "sigstore", BIRDS) for seed in range(1, 4)]
    with servers():  # others, which vouch for the same name
        strangers += [signed(folder, seed, "sigstore", BIRDS) for seed in range(4, 6)]
    return World(files, ALICE, None, others, strangers, signature=BUNDLE)


Attack = Callable[[World, random.Random], Files]


def bit(name: str) -> Attack:
    """Return an attack that flips one bit of a file."""

    def attack(world: World, chance: random.Random) -> Files:
        content = bytearray(world.files[name])
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        return world.files | {name: bytes(content)}

    return attack


def stretch(name: str) -> Attack:
    """Return an attack that cuts out, repeats, overwrites or cuts off a stretch of a file."""

    def attack(world: World, chance: random.Random) -> Files:
        content = world.files[name]
        start = chance.randrange(len(content))
        end = min(len(content), start + 1 + chance.randrange(200))
        middle = chance.choice([b"", content[start:end] * 2, chance.randbytes(end - start)])
        spoiled = chance.choice([content[:start] + middle + content[end:], content[:start]])
        return world.files | {name: spoiled if spoiled != content else content + b"x"}

    return attack


def whole(world: World, chance: random.Random) -> Files:
    """Put another adapter under this signature, or this one under another's, by the same key."""
    other, name = chance.choice(world.others), world.signature
    return chance.choice([other | {name: world.files[name]}, world.files | {name: other[name]}])


def mixed(world: World, chance: random.Random) -> Files:
    """Take the model or the config of another adapter of the same key."""
    name = chance.choice([MODEL, CONFIG])
    return world.files | {name: chance.choice(world.others)[name]}


def another_key(world: World, chance: random.Random) -> Files:
    """Sign the whole adapter by another key; every second one names the trusted key."""
    from maskpack.adapter.signature import Envelope

    found = chance.choice(world.strangers)
    if chance.random() < 0.5:
        return found
    envelope = Envelope.from_bytes(found[SIGNATURE])
    (signature,) = envelope.signatures.values()
    return found | {SIGNATURE: Envelope(envelope.payload, {_id(world.key): signature}).to_bytes()}


def confused(world: World, chance: random.Random) -> Files:
    """Name the trusted key in a signature by a key of the other algorithm, or in random bytes."""
    from maskpack.adapter.signature import Envelope, pae, signature_of

    found = chance.choice(world.strangers)
    payload = Envelope.from_bytes(found[SIGNATURE]).payload
    by_other = signature_of(pae(payload), world.wrong_kind)
    signature = chance.choice([by_other, chance.randbytes(chance.choice([0, 1, 64, 70, 71, 72]))])
    return found | {SIGNATURE: Envelope(payload, {_id(world.key): signature}).to_bytes()}


def statement(world: World, chance: random.Random) -> Files:
    """Change the statement (counter, repository, digests, types), and keep the signature of the old one."""
    from blake3 import blake3

    found = chance.choice(world.strangers)

    def digests(one: dict[str, Any]) -> None:
        for subject in one["subject"]:
            content = found[subject["name"]]
            subject["digest"]["blake3"] = blake3(content).hexdigest()
            subject["annotations"]["size"] = len(content)

    changes: list[Callable[[dict[str, Any]], Any]] = [
        digests,
        lambda one: one["predicate"].update(counter=chance.randrange(2, 1 << 53)),
        lambda one: one["predicate"].update(repository=chance.choice([None, "mallory/birds", "alice/birds2"])),
        lambda one: one["predicate"].update(mask_id=chance.randbytes(32).hex()),
        lambda one: one.update(predicateType="urn:x"),
        lambda one: one["subject"].pop(chance.randrange(2)),
    ]
    change = chance.choice(changes)
    return (found if change is digests else world.files) | {SIGNATURE: restated(world.files[SIGNATURE], change)}


def forms(world: World, chance: random.Random) -> Files:
    """Write the same statement and signature in another envelope: repeated members, white space, other base64."""
    text = world.files[SIGNATURE]
    envelope = json.loads(text)
    at = chance.randrange(1, len(text))
    form: list[Callable[[], bytes]] = [
        lambda: text.replace(b'"payloadType"', b'"payload":"eA==","payloadType"'),
        lambda: text.replace(b'"payloadType"', b'"payloadType":"application/json","payloadType"'),
        lambda: json.dumps(envelope, indent=chance.randrange(4)).encode(),
        lambda: text[:at].replace(b",", b" ,") + b" " + text[at:] + chance.choice([b"\n", b" ", b"\t"]),
        lambda: rewritten(text, lambda one: one.update({f"x{chance.randrange(9)}": chance.random()})),
        lambda: rewritten(text, lambda one: one.update(signatures=one["signatures"] * chance.randrange(2, 9))),
        lambda: rewritten(text, lambda one: one.update(payloadType=chance.choice(["", "application/json", "text/x"]))),
        lambda: rewritten(text, lambda one: one.update(payload=_other_base64(one["payload"], chance))),
        lambda: rewritten(text, lambda one: _first(one).update(sig=_other_base64(_first(one)["sig"], chance))),
        lambda: rewritten(text, lambda one: _first(one).update(keyid=_first(one)["keyid"].upper())),
        lambda: text + b" " * chance.randrange(1, 1 << 17),
    ]
    return world.files | {SIGNATURE: chance.choice(form)()}


def another_identity(world: World, chance: random.Random) -> Files:
    """Sign the whole adapter by another identity, or by the same name that other servers vouch for."""
    return chance.choice(world.strangers)


def statement_in_bundle(world: World, chance: random.Random) -> Files:
    """Put another bundle's statement, signature, certificate or log entry into the bundle."""
    bundle, other = (json.loads(one[BUNDLE]) for one in (world.files, chance.choice(world.strangers)))
    envelope, material = bundle["dsseEnvelope"], bundle["verificationMaterial"]
    (entry,) = material["tlogEntries"]

    def counter() -> None:
        text = json.loads(base64.b64decode(envelope["payload"]))
        text["predicate"]["counter"] = chance.randrange(2, 1 << 53)
        envelope["payload"] = base64.b64encode(json.dumps(text).encode()).decode()

    changes: list[Callable[[], Any]] = [
        counter,
        lambda: envelope.update(payload=other["dsseEnvelope"]["payload"]),
        lambda: envelope.update(signatures=other["dsseEnvelope"]["signatures"]),
        lambda: bundle.update(dsseEnvelope=other["dsseEnvelope"]),
        lambda: material.update(certificate=other["verificationMaterial"]["certificate"]),
        lambda: material.update(tlogEntries=other["verificationMaterial"]["tlogEntries"]),
        lambda: material.update(tlogEntries=[]),
        lambda: entry.pop("inclusionPromise"),
        lambda: entry.pop("inclusionProof"),
        lambda: entry.update(integratedTime=str(int(entry["integratedTime"]) + chance.choice([-1, 1]) * 86400)),
        lambda: bundle.pop(chance.choice(sorted(bundle))),
    ]
    chance.choice(changes)()
    return world.files | {BUNDLE: json.dumps(bundle).encode()}


def set_of_files(world: World, chance: random.Random) -> Files:
    """Remove the signature or the config, or add a file under a name of the format's."""
    files = dict(world.files)
    name = chance.choice([world.signature, CONFIG, "maskpack_"])
    if name == "maskpack_":
        return files | {name + chance.choice(["more.safetensors", "model.bin", "model_2.safetensors"]): b"x"}
    del files[name]
    return files


def card(world: World, chance: random.Random) -> Files:
    """Change the card, and add files that are none of an adapter's: these are to be accepted."""
    return world.files | {CARD: chance.randbytes(chance.randrange(300)), "notes.txt": chance.randbytes(9)}


ATTACKS: dict[str, tuple[Attack, bool | None]] = {  # True: has to be refused; False: accepted; None: either
    "one bit of the model file": (bit(MODEL), True),
    "one bit of the config": (bit(CONFIG), True),
    "one bit of the signature file": (bit(SIGNATURE), True),
    "a stretch of the model file cut out, repeated, overwritten, cut off": (stretch(MODEL), True),
    "the same of the config": (stretch(CONFIG), True),
    "the same of the signature file": (stretch(SIGNATURE), True),
    "another whole adapter by the same key, under this signature, or the other way round": (whole, True),
    "model or config of another adapter by the same key": (mixed, True),
    "another whole adapter, signed by another key, or in this one's name": (another_key, True),
    "a signature by the other algorithm, or random bytes": (confused, True),
    "counter, repository, digests or types of the statement changed": (statement, True),
    "the envelope in another form: members twice or more, white space, other base64, another type": (forms, True),
    "signature or config removed, a `maskpack_…` file added": (set_of_files, True),
    "another card, files that are not the adapter's": (card, False),
}
# a bundle has names and addresses that mean nothing to who verifies it
BUNDLE_ATTACKS: dict[str, tuple[Attack, bool | None]] = {
    "bundle: one bit of the model file": (bit(MODEL), True),
    "bundle: one bit of the config": (bit(CONFIG), True),
    "bundle: one bit of the bundle; accepted where it means nothing": (bit(BUNDLE), None),
    "bundle: a stretch of the model file cut out, repeated, overwritten, cut off": (stretch(MODEL), True),
    "bundle: the same of the bundle": (stretch(BUNDLE), True),
    "bundle: another whole adapter by the same identity, under this bundle, or the other way round": (whole, True),
    "bundle: model or config of another adapter by the same identity": (mixed, True),
    "bundle: another identity, or this name by other servers": (another_identity, True),
    "bundle: statement, signature, certificate or log entry changed": (statement_in_bundle, True),
    "bundle: removed, the config removed, a `maskpack_…` file added": (set_of_files, True),
    "bundle: another card, files that are not the adapter's": (card, False),
}


def run(world: World, attack: Attack, chance: random.Random, folder: Path) -> str:
    """Write what an attack makes and read it; return the error's name, or "accepted"."""
    from maskpack import load_adapter
    from maskpack.errors import MaskpackError

    for path in folder.iterdir():
        path.unlink()
    write_adapter(folder, attack(world, chance))
    try:
        load_adapter(folder, require_signature=world.trusted)
    except MaskpackError as error:
        return type(error).__name__
    except Exception as error:  # what must not come out
        return f"not ours: {type(error).__name__}: {error}"
    return "accepted"


def on_disk(
    worlds: list[World], attacks: dict[str, tuple[Attack, bool | None]], tries: int, seed: int, folder: Path
) -> Iterator[dict[str, Any]]:
    """Yield a row for each kind of attack on files."""
    place = Path(tempfile.mkdtemp(dir=folder))
    for name, (attack, hostile) in attacks.items():
        chance = random.Random(f"{seed} {name}")
        outcomes = Counter(run(worlds[number % len(worlds)], attack, chance, place) for number in range(tries))
        yield row(name, outcomes, hostile)


def on_hub(worlds: list[World], tries: int, server: HubServer) -> Iterator[dict[str, Any]]:
    """Yield a row for each kind of attack by somebody who can write to the repository, or runs the Hub."""
    from maskpack import pull, push
    from maskpack.errors import MaskpackError

    def outcome(ref: str, world: World) -> str:
        try:
            pull(ref, require_signature=world.trusted)
        except MaskpackError as error:
            return type(error).__name__
        return "accepted"

    older, foreign, unsigned, good = (Counter[str]() for _ in range(4))
    for number, world in enumerate(worlds):
        folder, chance = server.root / f"folder{number}", random.Random(number)
        private = write_key(folder, "key", world.key)[0]
        for attempt in range(tries // 2):
            name = f"alice/birds{number}x{attempt // 20}"
            write_adapter(folder / "adapter", {n: one for n, one in saved(attempt % 7).items() if n != CARD})
            before = push(folder / "adapter", name, sign=private, token=WRITE_TOKEN).commit
            good[outcome(name, world)] += 1
            files = {file: server.file(name, file) for file in (CARD, CONFIG, MODEL, SIGNATURE)}
            write_adapter(folder / "adapter", {n: one for n, one in saved(attempt % 7 + 9).items() if n != CARD})
            push(
                folder / "adapter", name, sign=private, license=chance.choice(["mit", "apache-2.0"]), token=WRITE_TOKEN
            )
            good[outcome(name, world)] += 1
            server.add(name, files)  # the version before, put back
            older[outcome(name, world)] += 1
            good[outcome(f"{name}@{before}", world)] += 1  # its commit, named by the reader
            foreign[outcome(_copied(server, f"mallory/m{number}x{attempt}", files), world)] += 1
            del files[SIGNATURE]
            unsigned[outcome(_copied(server, f"mallory/u{number}x{attempt}", files), world)] += 1
    yield row("on the Hub: an older version, signed by the same key for this repository, put back", older, True)
    yield row("on the Hub: an adapter signed by the same key for another repository", foreign, True)
    yield row("on the Hub: the signature removed", unsigned, True)
    yield row(
        "on the Hub: signed versions one after another, each with another card; an older commit by name", good, False
    )


def row(name: str, outcomes: Counter[str], hostile: bool | None) -> dict[str, Any]:
    """Return a line of the table; `wrong` counts what must not be."""
    accepted = outcomes.get("accepted", 0)
    strange = sum(count for what, count in outcomes.items() if what.startswith("not ours"))
    tried = outcomes.total()
    wrong = strange + {True: accepted, False: tried - accepted - strange, None: 0}[hostile]
    return {"attack": name, "tried": tried, "accepted": accepted, "wrong": wrong, "outcomes": dict(outcomes)}


def times(worlds: list[World]) -> str:
    """Return how long signing and verifying take, in milliseconds."""
    from maskpack.adapter.signature import check_signature, pae, public_keys, signature_of

    said = []
    for kind, world in zip(KINDS, worlds, strict=True):
        keys = public_keys(world.trusted)
        found: dict[str, list[float]] = {"sign": [], "verify": []}
        for _ in range(200):
            began = time.perf_counter()
            signature_of(pae(world.files[SIGNATURE]), world.key)
            found["sign"].append(time.perf_counter() - began)
            began = time.perf_counter()
            check_signature(world.files, keys, BIRDS)
            found["verify"].append(time.perf_counter() - began)
        sign, verify = (1000 * statistics.median(found[one]) for one in ("sign", "verify"))
        size = len(world.files[SIGNATURE])
        said.append(f"{kind} {sign:.2f} ms to sign, {verify:.2f} ms to verify, {size:,} bytes")
    return "; ".join(said)


def markdown(rows: list[dict[str, Any]], timing: str) -> str:
    """Return the table and a summary."""
    tried, wrong = sum(one["tried"] for one in rows), sum(one["wrong"] for one in rows)
    lines = [
        (one["attack"], f"{one['tried']:,}", f"{one['tried'] - one['accepted']:,}", f"{one['accepted']:,}")
        for one in rows
    ]
    text = f"{tried:,} tries, {wrong} with a wrong outcome. Medians: {timing} (adapter of 4 kB).\n\n"
    return text + table(("what was done", "tried", "refused", "accepted"), lines)


def _id(key: Any) -> str:
    from maskpack.adapter.signature import key_id

    return key_id(key.public_key())


def _first(envelope: dict[str, Any]) -> dict[str, Any]:
    first: dict[str, Any] = envelope["signatures"][0]
    return first


def _other_base64(text: str, chance: random.Random) -> str:
    """Return another text that a lenient decoder may take for the same, or for more, bytes."""
    at = chance.randrange(len(text))
    return chance.choice(
        [
            text[:at] + chance.choice(["\n", " ", "=", "-", "%"]) + text[at:],
            base64.b64encode(base64.b64decode(text) + chance.randbytes(1)).decode(),
            text + "=",
            text.rstrip("=") if text.endswith("=") else f"{text}====",
        ]
    )


def _copied(server: HubServer, repo_id: str, files: Files) -> str:
    server.add(repo_id, files)
    return repo_id


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tries", type=int, default=4000, help="of each kind on files; a tenth of it on bundles and on the Hub"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="Markdown file that gets the table between its markers")
    parser.add_argument("--json", type=Path, default=Path("runs/signatures.jsonl"))
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, HubServer(Path(folder) / "hub") as server, servers():
        os.environ.update(server.env())  # before the client is imported
        os.environ.pop("MASKPACK_REQUIRE_SIGNATURE", None)
        worlds = [make_world(Path(folder), kind) for kind in KINDS]
        identity = make_identity_world(Path(folder))
        rows = []
        for found in (
            on_disk(worlds, ATTACKS, options.tries, options.seed, Path(folder)),
            on_disk([identity], BUNDLE_ATTACKS, options.tries // 10, options.seed, Path(folder)),
            on_hub(worlds, options.tries // 10, server),
        ):
            for one in found:
                rows.append(one)
                print(f"{one['tried']:6} {one['accepted']:6} {one['attack']}: {one['outcomes']}", flush=True)
        text = markdown(rows, times(worlds))
    print(text)
    seconds, wrong = round(time.monotonic() - began), sum(one["wrong"] for one in rows)
    recorded = [{**one, "seed": options.seed} for one in [*rows, {"attack": "all", "seconds": seconds}]]
    rewrite(options.json, recorded, "attack", "seed")
    if options.write:
        write_between(options.write, "make bench-signatures", text)
    print(f"{seconds} s; {wrong} things that must not be")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
