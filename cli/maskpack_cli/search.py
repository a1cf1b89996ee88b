"""maskpack search."""

from dataclasses import asdict
from typing import Annotated

import typer

from .adapters import RandomWeights, Weights
from .console import Json, Quiet, Token, command, emit, examples, note, quiet_libraries, table


def search(
    query: Annotated[str | None, typer.Argument(help="Text in the name of the repository.")] = None,
    base: Annotated[
        str | None, typer.Option(help="What they were made for: timm/NAME, hf/REPO or torchvision/NAME.")
    ] = None,
    fits: Annotated[
        str | None, typer.Option(help="Backbone whose weights they must fit, or digits of its float32 digest.")
    ] = None,
    weights: Weights = None,
    random_weights: RandomWeights = None,
    author: Annotated[str | None, typer.Option(help="User or organisation.")] = None,
    limit: Annotated[int, typer.Option(help="How many at most.")] = 20,
    token: Token = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find adapters on the Hub by name, base, or the weights that they fit."""
    quiet_libraries(quiet or as_json)
    from maskpack import search_adapters
    from maskpack.errors import ConfigError
    from maskpack.hub.search import HEX

    is_digest = fits is not None and HEX.fullmatch(fits) is not None
    if (fits is None or is_digest) and (weights is not None or random_weights is not None):
        raise ConfigError("--weights and --random-weights are weights of the backbone in --fits, which is missing")
    digest = fits
    if fits is not None and not is_digest:
        from maskpack import fingerprint, load_backbone

        backbone = load_backbone(fits, weights=weights, random_weights=random_weights)
        digest = fingerprint(backbone.model, id=backbone.id, head=backbone.outside).digests["float32"]
        note(f"Searching for adapters of weights with the digest {digest[:12]}…", quiet)
    found = search_adapters(query, base=base, fits=digest, author=author, limit=limit, token=token)
    if as_json:
        emit({"adapters": [asdict(one) for one in found]}, True)
    elif found:
        columns = ["adapter", "base", "task", "updated", "downloads", "likes", "private"]
        rows = [[o.repo_id, o.base, o.task, o.updated, o.downloads, o.likes, o.private] for o in found]
        table(columns, rows)
        if len(found) == limit:
            note(f"There may be more than {limit}; --limit shows them.", quiet)
    if not found:
        note("No adapter found; ask for less, as in: maskpack search --base timm/resnet50.a1_in1k", quiet)


def register(app: typer.Typer) -> None:
    """Add this file's verb."""
    app.command(
        epilog=examples(
            "maskpack search flowers",
            "maskpack search --base timm/resnet50.a1_in1k",
            "maskpack search --fits torchvision/resnet18 --json",
        )
    )(command(search))
