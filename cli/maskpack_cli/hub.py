"""maskpack push | pull | sign | search."""

import os
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

import maskpack
from maskpack.errors import ConfigError, MaskpackError

from .console import Output, app, complain, emit, hint, note, say, table
from .options import ARGUMENT, POSITIVE, Source, Token, Weights, group, verb

hub_verb = partial(verb, app, "Hub")
AdapterPath = Annotated[Path, "The adapter's folder, or its model file.", ARGUMENT]
Target = Annotated[str, "user/name on the Hub, or a folder as registry: ./registry/name.", ARGUMENT]
Refs = Annotated[
    tuple[str, ...], "user/name or user/name@revision, a folder, or a .safetensors file.", typer.Argument(metavar="REF")
]
Copies = Annotated[Path | None, "Folder for copies; of several, one each inside. Default: only the cache."]


@group("Options")
class Pushed:
    private: Annotated[bool | None, "Repository. Default: the account's.", typer.Option("--private/--public")] = None
    revision: Annotated[str | None, "Branch to push to; made if missing."] = None
    commit_message: Annotated[str | None, "Of the one commit.", typer.Option("--commit-message", "-m")] = None
    create_pr: Annotated[bool, "Open a pull request in place of a commit."] = False
    license: Annotated[str | None, "Of the masks, for the card: apache-2.0, mit, … (SPDX)"] = None
    tag: Annotated[str | None, "Give the commit this tag, as v1."] = None
    dry_run: Annotated[bool, "Say what would be sent, and send nothing."] = False
    sign: Annotated[tuple[str, ...], "Private key (PEM) to sign it with, or sigstore: with an identity."] = ()
    token: Token = None


@hub_verb(
    "maskpack push ./my-mask user/my-mask --private",
    "maskpack push ./my-mask user/my-mask --tag v1 --dry-run",
    "maskpack push ./my-mask user/my-mask --create-pr -m 'Trained longer'",
    "maskpack push ./my-mask user/my-mask --sign key.pem",
    "maskpack push ./my-mask ./registry/my-mask",
)
def push(folder: AdapterPath, ref: Target, how: Pushed) -> None:
    """Upload an adapter, in one commit of exactly its files."""
    note(f"Comparing {folder} with {ref} …" if how.dry_run else f"Pushing {folder} to {ref} …")
    done = maskpack.push(folder, ref, **vars(how))
    state = " (unchanged)" if done.unchanged else " (dry run: nothing was sent)" if how.dry_run else ""
    emit(asdict(done) | {"dry_run": how.dry_run}, f"{'-' if how.dry_run else '✓'} {done.url}{state}")
    for name, size in done.files.items():
        hint(f"  {'would send' if how.dry_run else 'sent'} {name}, {size:,} bytes")


@hub_verb(
    "maskpack pull user/my-mask",
    "maskpack pull user/my-mask@v1 --output ./my-mask",
    "maskpack pull user/one user/two@v1 --output ./masks",
    "maskpack pull user/my-mask --require-signature public.pem",
    "maskpack pull user/my-mask -q",
)
def pull(refs: Refs, trust: Source, output: Copies = None) -> None:
    """Download adapters and verify every byte of them; prints their folders and commits.

    Of several, one that fails does not stop the others; the errors come last, and the exit code is 1.
    """
    pulled: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    for ref, target in _targets(refs, output).items():
        try:
            done = maskpack.pull(ref, output=target, **vars(trust))
        except (MaskpackError, OSError) as error:
            if len(refs) == 1 or os.environ.get("MASKPACK_DEBUG"):
                raise
            failed.append({"ref": ref, "error": str(error)})
            continue
        pulled.append({"path": str(done.path), "commit": done.commit, "repo_id": done.repo_id})
        if Output.quiet:
            say(done.path)
        elif not Output.json:
            emit(pulled[-1], f"✓ {done.path}")
            if done.commit:
                note(f"Pinned: {done.pinned}")
            if done.signed_by:
                note(f"Signed by: {', '.join(done.signed_by)}")
    if Output.json:
        emit({"adapters": pulled, "errors": failed} if len(refs) > 1 else pulled[0])
    for one in failed:
        complain(f"{one['ref']}: {one['error']}")
    if failed:
        note(f"{len(failed)} of {len(refs)} adapters could not be pulled.")
        raise typer.Exit(1)


def _targets(refs: tuple[str, ...], output: Path | None) -> dict[str, Path | None]:
    """Return where each adapter is to be copied, or refuse before anything is fetched."""
    from maskpack.hub.reference import parse_reference

    targets: dict[str, Path | None] = dict.fromkeys(refs, output)
    if output is None or len(refs) == 1:
        return targets
    taken: dict[str, str] = {}
    for ref in refs:
        try:
            reference = parse_reference(ref)
        except MaskpackError:
            continue  # pulling it says what is wrong, when it is its turn
        folder = str(reference.repo_id).replace("/", "--")
        if reference.path is not None:
            folder = reference.path.resolve().name.removesuffix(".safetensors")
        key = folder.casefold()  # some file systems do not tell A from a
        if key in taken:
            both = f"{taken[key]} and {ref} would both be copied to {output / folder}"
            raise ConfigError(f"{both}; nothing was fetched: pull them one at a time, each with its own --output")
        taken[key], targets[ref] = ref, output / folder
    return targets


@hub_verb(
    "openssl genpkey -algorithm ed25519 -out key.pem",
    "openssl pkey -in key.pem -pubout -out public.pem",
    "maskpack sign ./my-mask --key key.pem --repository user/my-mask",
    "maskpack verify ./my-mask --key public.pem",
    "maskpack sign ./my-mask --key sigstore",
    "maskpack verify ./my-mask --require-signature me@example.org@https://accounts.google.com",
)
def sign(
    adapter: AdapterPath,
    key: Annotated[tuple[str, ...], "Private key (PEM): Ed25519 or P-256; or sigstore: identity of a login or CI job."],
    repository: Annotated[str | None, "user/name on the Hub that it is for. Default: any; push --sign says it."] = None,
    counter: Annotated[int | None, "Number of this version. Default: one above the signature there.", POSITIVE] = None,
) -> None:
    """Sign an adapter on this disk: writes maskpack_model.sig, or maskpack_model.sigstore.json, beside its model."""
    from maskpack.adapter.signature import sign_adapter
    from maskpack.hub.reference import parse_reference

    if repository is not None and parse_reference(f"{repository}@main").repo_id != repository:
        raise ConfigError(f"--repository is a name on the Hub, user/name; got {repository!r}")
    signed = sign_adapter(adapter, key, repository=repository, counter=counter)
    facts = {"repository": repository, "counter": signed.statement.counter, "keys": list(signed.by)}
    emit(facts, f"✓ {adapter} is signed", facts | {"keys": ", ".join(signed.by)})


@hub_verb(
    "maskpack search flowers",
    "maskpack search --base timm/resnet50.a1_in1k",
    "maskpack search --fits torchvision/resnet18 --json",
)
def search(
    weights: Weights,
    query: Annotated[str | None, "Text in the name of the repository.", ARGUMENT] = None,
    base: Annotated[str | None, "What they were made for: timm/NAME, hf/REPO or torchvision/NAME."] = None,
    fits: Annotated[str | None, "Backbone whose weights they must fit, or digits of its float32 digest."] = None,
    author: Annotated[str | None, "User or organisation."] = None,
    limit: Annotated[int, "How many at most."] = 20,
    token: Token = None,
) -> None:
    """Find adapters on the Hub by name, base, or the weights that they fit."""
    from maskpack.hub.search import HEX

    is_digest = fits is not None and HEX.fullmatch(fits) is not None
    if (fits is None or is_digest) and any(one is not None for one in vars(weights).values()):
        raise ConfigError("--weights and --random-weights are weights of the backbone in --fits, which is missing")
    if fits is not None and not is_digest:
        backbone = maskpack.load_backbone(fits, **vars(weights))
        fits = maskpack.fingerprint(backbone.model, id=backbone.id, head=backbone.outside).digests["float32"]
        note(f"Searching for adapters of weights with the digest {fits[:12]}…")
    found = maskpack.search_adapters(query, base=base, fits=fits, author=author, limit=limit, token=token)
    rows = [asdict(one) for one in found]
    emit({"adapters": rows})
    if not found:
        return note("No adapter found; ask for less, as in: maskpack search --base timm/resnet50.a1_in1k")
    table(rows, ["repo_id", "base", "task", "updated", "downloads", "likes", "private"], repo_id="adapter")
    if len(found) == limit:
        hint(f"There may be more than {limit}; --limit shows them.")
    return None
