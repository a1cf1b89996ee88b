"""maskpack combine | diff."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .adapters import RandomWeights, Ref, RequireRevision, RequireSignature, Weights
from .console import Json, Quiet, Token, command, emit, examples, note, progress_bar, quiet_libraries, say, table
from .packing import Codec, Hardness
from .use import base_of

if TYPE_CHECKING:
    from maskpack.algebra import Overlap

Operation = Literal["and", "or", "xor", "not", "majority", "weighted", "k-of-n", "difference"]
BaseOption = Annotated[
    str | None, typer.Option(help="The adapters' base, for masks packed with its weights: as for pack.")
]
MissingOption = Annotated[
    Literal["error", "keep"],
    typer.Option(help="Parameters that not all adapters mask: an error, or kept whole by those that do not."),
]
COLUMNS = (
    "parameter",
    "weights",
    "hamming",
    "share",
    "jaccard",
    "chance",
    "both",
    "first_only",
    "second_only",
    "neither",
)


def combine(
    how: Annotated[Operation, typer.Argument(metavar="HOW", help="and, or, xor, not, majority, weighted, k-of-n or "
                                             "difference (kept by the first and not by the second).")],
    refs: Annotated[list[str], typer.Argument(metavar="REF", help="Adapters of one base: as for inspect.")],
    output: Annotated[Path, typer.Option(help="Folder to write, or a .safetensors file.")],
    weight: Annotated[
        list[float] | None, typer.Option(help="Of a vote, for weighted: one for each adapter, in their order.")
    ] = None,
    k: Annotated[int | None, typer.Option("-k", help="For k-of-n: how many adapters must keep a weight.")] = None,
    missing: MissingOption = "error",
    backbone: BaseOption = None,
    weights: Weights = None,
    random_weights: RandomWeights = None,
    require_revision: RequireRevision = False,
    require_signature: RequireSignature = None,
    profile: Hardness = "default",
    codec: Codec = None,
    token: Token = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Combine the masks of adapters, bit by bit, into one adapter. Heads and all else but masks are left out."""
    quiet_libraries(quiet)
    from maskpack import inspect_adapter, load_adapter
    from maskpack.adapter.edit import combine_adapters, left_out
    from maskpack.algebra import operation

    operation(how, len(refs), weight, k)
    options: Any = {"require_revision": require_revision, "require_signature": require_signature, "token": token}
    adapters = [load_adapter(ref, **options) for ref in refs]
    base = None if backbone is None else base_of(adapters[0], backbone, weights, random_weights).model
    note(f"Combining {len(adapters)} adapters …", quiet)
    with progress_bar("Combining", quiet or as_json) as step:
        combined = combine_adapters(
            how,
            adapters,
            output,
            weights=weight,
            k=k,
            missing=missing,
            base=base,
            profile=profile,
            codec=codec,
            progress=step,
        )
    whole = inspect_adapter(combined)["sets"]["default"]
    totals = {key: whole[key] for key in ("parameters", "weights", "density", "payload_bytes", "bits_per_weight")}
    facts: dict[str, Any] = {"adapter": str(output), "operation": how, "mask_id": combined.mask_id, **totals}
    left = left_out(adapters)
    emit(facts | {"file_bytes": combined.size, "left_out": left}, as_json, f"✓ {output}")
    if left and not as_json:
        say(*(f"{'            ' if i else '  left out: '}{one}" for i, one in enumerate(left)))


def diff(
    first: Ref,
    second: Ref,
    missing: MissingOption = "error",
    backbone: BaseOption = None,
    weights: Weights = None,
    random_weights: RandomWeights = None,
    require_revision: RequireRevision = False,
    require_signature: RequireSignature = None,
    token: Token = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare the masks of two adapters of one base: how many bits differ, in all and by parameter.

    jaccard: of the weights that at least one mask removes, the share that both remove; chance: what it would be for
    unrelated masks with as many zeros in each parameter.
    """
    quiet_libraries(quiet)
    from maskpack import load_adapter
    from maskpack.adapter.edit import mask_sets
    from maskpack.algebra import Overlap, overlaps

    options: Any = {"require_revision": require_revision, "require_signature": require_signature, "token": token}
    adapters = [load_adapter(ref, **options) for ref in (first, second)]
    base = None if backbone is None else base_of(adapters[0], backbone, weights, random_weights).model
    sets = mask_sets(adapters, base)
    found = dict(overlaps(*sets, missing=missing))
    whole = sum(found.values(), Overlap())
    facts = {"first": adapters[0].pinned, "second": adapters[1].pinned, **_facts(whole)}
    if as_json:
        rows = [{"name": name, **_facts(one)} for name, one in found.items()]
        emit({**facts, "parameters": rows}, True)
        return
    emit(facts, False, "= all bits are equal" if not whole.hamming else f"≠ {whole.hamming:,} bits differ")
    table(
        [column.replace("_", " ") for column in COLUMNS],
        [[name, *(_facts(one)[key] for key in COLUMNS[1:])] for name, one in found.items()],
    )


def _facts(one: "Overlap") -> dict[str, Any]:
    """Return counts and shares of an overlap."""
    derived = {key: getattr(one, key) for key in ("hamming", "share", "jaccard", "chance", "neither")}
    return {**asdict(one), **derived}


def register(app: typer.Typer) -> None:
    """Add this file's verbs."""
    app.command(
        epilog=examples(
            "maskpack combine majority ./a ./b user/mask-c@v1 --output ./voted",
            "maskpack combine k-of-n ./a ./b ./c -k 2 --output ./twice",
            "maskpack combine weighted ./a ./b --weight 0.7 --weight 0.3 --output ./voted",
        )
    )(command(combine))
    app.command(epilog=examples("maskpack diff ./a ./b", "maskpack diff user/mask-a ./b --json"))(command(diff))
