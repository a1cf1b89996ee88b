"""maskpack push | pull | sign | search."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from maskpack.errors import ConfigError, MaskpackError

from .console import Output, app, complain, emit, hint, note, say, table
from .options import Revision, Token, Trust, Weights, verb

PANEL = "Hub"


@verb(
    app,
    "maskpack push ./my-mask user/my-mask --private",
    "maskpack push ./my-mask user/my-mask --tag v1 --dry-run",
    "maskpack push ./my-mask user/my-mask --create-pr -m 'Trained longer'",
    "maskpack push ./my-mask user/my-mask --sign key.pem",
    "maskpack push ./my-mask ./registry/my-mask",
    panel=PANEL,
)
def push(
    folder: Annotated[Path, typer.Argument(help="The adapter's folder, or its model file.")],
    ref: Annotated[str, typer.Argument(help="user/name on the Hub, or a folder as registry: ./registry/name.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of the repository. Default: the account's.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made if missing.")] = None,
    commit_message: Annotated[str | None, typer.Option("--commit-message", "-m", help="Of the one commit.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request in place of a commit.")] = False,
    license: Annotated[str | None, typer.Option(help="Of the masks, for the card: apache-2.0, mit, … (SPDX)")] = None,
    tag: Annotated[str | None, typer.Option(help="Give the commit this tag, as v1.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent, and send nothing.")] = False,
    sign: Annotated[
        list[str] | None,
        typer.Option(help="Private key (PEM) to sign it with, or sigstore: with an identity; may be repeated."),
    ] = None,
    token: Token = None,
) -> None:
    """Upload an adapter, in one commit of exactly its files."""
    from maskpack import push as push_adapter

    note(f"{'Comparing' if dry_run else 'Pushing'} {folder} {'with' if dry_run else 'to'} {ref} …")
    done = push_adapter(
        folder,
        ref,
        private=private,
        revision=revision,
        commit_message=commit_message,
        create_pr=create_pr,
        license=license,
        tag=tag,
        dry_run=dry_run,
        sign=sign or (),
        token=token,
    )
    state = " (unchanged)" if done.unchanged else " (dry run: nothing was sent)" if dry_run else ""
    emit(asdict(done) | {"dry_run": dry_run}, f"{'-' if dry_run else '✓'} {done.url}{state}")
    for name, size in done.files.items():
        hint(f"  {'would send' if dry_run else 'sent'} {name}, {size:,} bytes")


@verb(
    app,
    "maskpack pull user/my-mask",
    "maskpack pull user/my-mask@v1 --output ./my-mask",
    "maskpack pull user/one user/two@v1 --output ./masks",
    "maskpack pull user/my-mask --require-signature public.pem",
    "maskpack pull user/my-mask -q",
    panel=PANEL,
)
def pull(
    refs: Annotated[
        list[str],
        typer.Argument(metavar="REF", help="user/name or user/name@revision, a folder, or a .safetensors file."),
    ],
    trust: Trust,
    revision: Revision = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder to copy the files to; for several, a folder each inside. Default: only the cache."),
    ] = None,
) -> None:
    """Download adapters and verify every byte of them; prints their folders and commits.

    Of several, one that fails does not stop the others; the errors come last, and the exit code is 1.
    """
    from maskpack import pull as pull_adapter

    pulled: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    for ref, target in zip(refs, _targets(refs, output), strict=True):
        try:
            done = pull_adapter(ref, revision=revision, output=target, **vars(trust))
        except (MaskpackError, OSError) as error:
            if len(refs) == 1 or os.environ.get("MASKPACK_DEBUG"):
                raise
            failed.append({"ref": ref, "error": str(error)})
            continue
        pulled.append({"path": str(done.path), "commit": done.commit, "repo_id": done.repo_id})
        if Output.json:
            continue
        if Output.quiet:
            say(done.path)
            continue
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


def _targets(refs: list[str], output: Path | None) -> list[Path | None]:
    """Return where each adapter is to be copied, or refuse before anything is fetched."""
    from maskpack.hub.reference import parse_reference

    if output is None or len(refs) == 1:
        return [output] * len(refs)
    targets: list[Path | None] = []
    taken: dict[str, str] = {}
    for ref in refs:
        try:
            reference = parse_reference(ref)
        except MaskpackError:
            targets.append(None)  # pulling it says what is wrong, when it is its turn
            continue
        if reference.path is not None:
            folder = reference.path.resolve().name.removesuffix(".safetensors")
        else:
            folder = str(reference.repo_id).replace("/", "--")
        key = folder.casefold()  # some file systems do not tell A from a
        if key in taken:
            raise ConfigError(
                f"{taken[key]} and {ref} would both be copied to {output / folder}; nothing was fetched: pull them one "
                "at a time, each with its own --output"
            )
        taken[key] = ref
        targets.append(output / folder)
    return targets


@verb(
    app,
    "openssl genpkey -algorithm ed25519 -out key.pem",
    "openssl pkey -in key.pem -pubout -out public.pem",
    "maskpack sign ./my-mask --key key.pem --repository user/my-mask",
    "maskpack verify ./my-mask --key public.pem",
    "maskpack sign ./my-mask --key sigstore",
    "maskpack verify ./my-mask --require-signature me@example.org@https://accounts.google.com",
    panel=PANEL,
)
def sign(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder, or its model file.")],
    key: Annotated[
        list[str],
        typer.Option(
            help="Private key (PEM): Ed25519 or P-256; or sigstore: an identity of a login or CI job. May be repeated."
        ),
    ],
    repository: Annotated[
        str | None, typer.Option(help="user/name on the Hub that it is for. Default: any; push --sign states it.")
    ] = None,
    counter: Annotated[
        int | None, typer.Option(min=1, help="Number of this version. Default: one more than in the signature there.")
    ] = None,
) -> None:
    """Sign an adapter on this disk: writes maskpack_model.sig, or maskpack_model.sigstore.json, beside its model."""
    from maskpack.adapter.signature import sign_adapter
    from maskpack.hub.reference import parse_reference

    if repository is not None and parse_reference(f"{repository}@main").repo_id != repository:
        raise ConfigError(f"--repository is a name on the Hub, user/name; got {repository!r}")
    signed = sign_adapter(adapter, key, repository=repository, counter=counter)
    facts = {"repository": repository, "counter": signed.statement.counter, "keys": list(signed.by)}
    emit(facts, f"✓ {adapter} is signed", facts | {"keys": ", ".join(signed.by)})


@verb(
    app,
    "maskpack search flowers",
    "maskpack search --base timm/resnet50.a1_in1k",
    "maskpack search --fits torchvision/resnet18 --json",
    panel=PANEL,
)
def search(
    weights: Weights,
    query: Annotated[str | None, typer.Argument(help="Text in the name of the repository.")] = None,
    base: Annotated[
        str | None, typer.Option(help="What they were made for: timm/NAME, hf/REPO or torchvision/NAME.")
    ] = None,
    fits: Annotated[
        str | None, typer.Option(help="Backbone whose weights they must fit, or digits of its float32 digest.")
    ] = None,
    author: Annotated[str | None, typer.Option(help="User or organisation.")] = None,
    limit: Annotated[int, typer.Option(help="How many at most.")] = 20,
    token: Token = None,
) -> None:
    """Find adapters on the Hub by name, base, or the weights that they fit."""
    from maskpack import search_adapters
    from maskpack.hub.search import HEX

    is_digest = fits is not None and HEX.fullmatch(fits) is not None
    if (fits is None or is_digest) and any(one is not None for one in vars(weights).values()):
        raise ConfigError("--weights and --random-weights are weights of the backbone in --fits, which is missing")
    digest = fits
    if fits is not None and not is_digest:
        from maskpack import fingerprint, load_backbone

        backbone = load_backbone(fits, **vars(weights))
        digest = fingerprint(backbone.model, id=backbone.id, head=backbone.outside).digests["float32"]
        note(f"Searching for adapters of weights with the digest {digest[:12]}…")
    found = search_adapters(query, base=base, fits=digest, author=author, limit=limit, token=token)
    emit({"adapters": [asdict(one) for one in found]}, shown={})
    if not found:
        return note("No adapter found; ask for less, as in: maskpack search --base timm/resnet50.a1_in1k")
    columns = ["adapter", "base", "task", "updated", "downloads", "likes", "private"]
    table(columns, [[o.repo_id, o.base, o.task, o.updated, o.downloads, o.likes, o.private] for o in found])
    if len(found) == limit:
        hint(f"There may be more than {limit}; --limit shows them.")
    return None
