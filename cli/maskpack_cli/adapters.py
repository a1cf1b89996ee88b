"""maskpack inspect | verify | list."""

import importlib
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .console import Json, Quiet, Token, command, emit, examples, note, progress_bar, quiet_libraries, table

Profile = Literal["fast", "default", "max"]
PROFILES = "fast: quick. default: small, decodes quickly. max: smallest, slow, may need the backbone to decode."
Ref = Annotated[str, typer.Argument(help="user/name or user/name@revision, a folder, or a .safetensors file.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
RequireRevision = Annotated[
    bool, typer.Option("--require-revision", help="Refuse what can change: branches, and no revision at all.")
]
RequireSignature = Annotated[
    str | None,
    typer.Option(
        help="Who must have signed it: a public key (PEM), a folder of keys, or an identity NAME@https://ISSUER. "
        "(default: MASKPACK_REQUIRE_SIGNATURE's)"
    ),
]
Weights = Annotated[Path | None, typer.Option(help="Safetensors state dict, loaded strictly: file, index or folder.")]
RandomWeights = Annotated[
    str | None, typer.Option(help="SEED, kaiming:SEED or signed-constant:SEED of random weights.")
]


def inspect(
    ref: Ref,
    revision: Revision = None,
    require_signature: RequireSignature = None,
    parameters: Annotated[bool, typer.Option("--parameters", help="A line for every parameter.")] = False,
    token: Token = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what an adapter holds. Never needs the backbone, never runs anything from the file."""
    quiet_libraries(quiet)
    from maskpack import inspect_adapter
    from maskpack.adapter.card import member
    from maskpack.adapter.signature import describe_signature
    from maskpack.hub.pull import open_adapter

    opened = open_adapter(ref, revision=revision, require_signature=require_signature, token=token)
    adapter = opened.adapter
    about, signature = inspect_adapter(adapter), describe_signature(opened.contents, opened.signed)
    if as_json:
        emit({**about, "signature": signature}, True)
        return
    classes = about.get("class_names") or ()
    training = about.get("training") or {}
    facts: dict[str, Any] = {
        "file_bytes": about["size"],
        "mask_id": about["mask_id"],
        "base": about["base"]["id"],
        "base_revision": about["base"]["revision"],
        "base_dtype": about["base"]["dtype"],
        "task": about.get("task"),
        "classes": f"{len(classes)} ({', '.join(classes[:5])}{', …' if len(classes) > 5 else ''})" if classes else None,
    }
    emit(facts, False, adapter.pinned)
    if signature is not None:
        emit({**signature, "keys": ", ".join(signature["keys"])}, False, "signature")
    if metrics := member(training, "metrics"):  # whatever their names, none is a fact above
        emit(metrics, False, "metrics, as the training record has them")
    if (cascade := about["cascade"]) is not None:
        sizes = {f"{role}_bytes": size for role, size in cascade["bytes"].items()}
        emit({**cascade, "experts": len(cascade["experts"]), **sizes}, False, "cascade")
    for name, one in about["sets"].items():
        dense = {f"{role}_bytes": size for role, size in one["dense_bytes"].items()}
        emit({**one, **dense}, False, f"mask set {name}")
        if parameters:
            rows = [[r[k] for k in ("name", "shape", "op", "codec", "density", "bytes", "bits_per_weight")]
                    for r in one["payloads"]]  # fmt: skip
            table(["parameter", "shape", "op", "codec", "density", "bytes", "bits/weight"], rows)


def verify(
    ref: Ref,
    backbone: Annotated[str | None, typer.Option(help="Also check that this is the adapter's base.")] = None,
    weights: Weights = None,
    random_weights: RandomWeights = None,
    revision: Revision = None,
    require_revision: RequireRevision = False,
    key: Annotated[
        str | None,
        typer.Option(
            "--key",
            "--require-signature",
            help="Also check who signed it: a public key (PEM), a folder of keys, or an identity NAME@https://ISSUER.",
        ),
    ] = None,
    token: Token = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check every byte, digest and mask of an adapter, its signature by --key, and its base: some masks need it."""
    quiet_libraries(quiet)
    from maskpack.adapter.signature import describe_signature
    from maskpack.hub.pull import open_adapter

    opened = open_adapter(ref, revision=revision, require_revision=require_revision, require_signature=key, token=token)
    adapter = opened.adapter
    report: dict[str, Any] = {"adapter": adapter.pinned}
    if opened.signed is not None:
        report["signature"] = describe_signature(opened.contents, opened.signed)
    base = None
    if backbone is not None:
        from maskpack.backbone.fingerprint import check_fingerprint

        from .use import base_of  # which takes its options from here

        base = base_of(adapter, backbone, weights, random_weights).model
        report["base_matches_as"] = check_fingerprint(base, adapter.base)
    with progress_bar("Verifying", quiet or as_json) as step:
        report |= adapter.verify(step, base)
    emit(report, as_json, f"✓ {adapter.pinned} is valid")
    if opened.signed is not None and not as_json:
        emit(report["signature"] | {"keys": ", ".join(report["signature"]["keys"])}, False, "✓ signed")
    if left := report["needs_base"]:
        shown = ", ".join(left[:3]) + (", … (all: --json)" if len(left) > 3 else "")
        note(f"Not decoded, since they need the weights of {adapter.base.id} (--backbone): {shown}", quiet)


REGISTRIES = {  # where the plug-ins of a kind are registered
    "methods": ("maskpack.training.methods.base", "METHODS"),
    "objectives": ("maskpack.training.objectives.base", "OBJECTIVES"),
    "codecs": ("maskpack.codecs.base", "CODECS"),
    "data": ("maskpack.training.data.base", "SOURCES"),
    "importers": ("maskpack.importers.base", "IMPORTERS"),
    "baselines": ("maskpack.lab.baselines.base", "BASELINES"),
}


def listing(
    what: Annotated[
        str,
        typer.Argument(help="adapters (cached ones), methods, objectives, codecs, data, importers or baselines."),
    ] = "adapters",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List cached adapters, or the plug-ins of one kind."""
    from maskpack.errors import UnknownNameError

    if what == "adapters":
        from maskpack.hub.cache import cached_adapters

        digits = None if as_json else 12
        rows = [
            [a.repo_id, a.commit[:digits], a.size, a.base, a.density, a.bits_per_weight, str(a.path)]
            for a in cached_adapters()
        ]
        columns = ["adapter", "commit", "bytes", "base", "density", "bits_per_weight", "path"]
    elif what in REGISTRIES:
        module, name = REGISTRIES[what]
        registry: Any = getattr(importlib.import_module(module), name)
        rows = [[c.id, (c.__doc__ or "").strip().splitlines()[0], c.reference] for c in registry.all()]
        columns = [what.removesuffix("s"), "what", "reference"]
    else:
        raise UnknownNameError(f"cannot list {what!r}; known: adapters, {', '.join(REGISTRIES)}")
    if as_json:
        emit({what: [dict(zip(columns, row, strict=True)) for row in rows]}, True)
    elif rows:
        table([column.replace("bits_per_weight", "bits/weight") for column in columns], rows)
    else:
        note("No adapter is cached; fetch one with: maskpack pull USER/NAME", quiet)


def register(app: typer.Typer) -> None:
    """Add this file's verbs."""
    app.command(
        epilog=examples("maskpack inspect user/mask-cifar100 --parameters", "maskpack inspect ./my-mask --json")
    )(command(inspect))
    app.command(epilog=examples("maskpack verify ./my-mask --backbone timm/resnet18.a1_in1k"))(command(verify))
    app.command("list", epilog=examples("maskpack list", "maskpack list methods"))(command(listing))
