"""maskpack push | pull."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .adapters import Ref, Revision
from .console import Json, Quiet, Token, command, emit, examples, note, quiet_libraries


def push(
    folder: Annotated[Path, typer.Argument(help="The adapter's folder, or its model file.")],
    ref: Annotated[str, typer.Argument(help="user/name on the Hub, or a folder as registry: ./registry/name.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of the repository. (default: the account's)")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made if missing.")] = None,
    commit_message: Annotated[str | None, typer.Option("--commit-message", "-m", help="Of the one commit.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request in place of a commit.")] = False,
    tag: Annotated[str | None, typer.Option(help="Give the commit this tag, as v1.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent, and send nothing.")] = False,
    token: Token = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Upload an adapter, in one commit of exactly its files."""
    quiet_libraries(quiet or as_json)
    from maskpack import push as push_adapter

    note(f"{'Comparing' if dry_run else 'Pushing'} {folder} {'with' if dry_run else 'to'} {ref} …", quiet)
    done = push_adapter(
        folder,
        ref,
        private=private,
        revision=revision,
        commit_message=commit_message,
        create_pr=create_pr,
        tag=tag,
        dry_run=dry_run,
        token=token,
    )
    state = " (unchanged)" if done.unchanged else " (dry run: nothing was sent)" if dry_run else ""
    emit(asdict(done) | {"dry_run": dry_run}, as_json, f"{'-' if dry_run else '✓'} {done.url}{state}")
    for name, size in done.files.items():
        note(f"  {'would send' if dry_run else 'sent'} {name}, {size:,} bytes", quiet or as_json)


def pull(
    ref: Ref,
    revision: Revision = None,
    output: Annotated[Path | None, typer.Option(help="Folder to copy the files to. (default: only the cache)")] = None,
    token: Token = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Download an adapter and verify every byte of it; prints the folder and the commit."""
    quiet_libraries(quiet or as_json)
    from maskpack import pull as pull_adapter

    done = pull_adapter(ref, revision=revision, output=output, token=token)
    facts = {"path": str(done.path), "commit": done.commit, "repo_id": done.repo_id}
    if quiet and not as_json:
        typer.echo(done.path)
        return
    emit(facts, as_json, f"✓ {done.path}")
    if done.commit and not as_json:
        note(f"Pinned: {done.repo_id}@{done.commit}")


def register(app: typer.Typer) -> None:
    """Add this file's verbs."""
    app.command(
        epilog=examples(
            "maskpack push ./my-mask user/my-mask --private",
            "maskpack push ./my-mask user/my-mask --tag v1 --dry-run",
            "maskpack push ./my-mask user/my-mask --create-pr -m 'Trained longer'",
            "maskpack push ./my-mask ./registry/my-mask",
        )
    )(command(push))
    app.command(
        epilog=examples(
            "maskpack pull user/my-mask",
            "maskpack pull user/my-mask@v1 --output ./my-mask",
            "maskpack pull user/my-mask -q",
        )
    )(command(pull))
