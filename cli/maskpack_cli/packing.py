"""maskpack pack | convert."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .adapters import PROFILES, Profile, RandomWeights, Ref, RequireSignature, Revision, Weights
from .console import Json, Quiet, Token, command, emit, examples, note, progress_bar, quiet_libraries
from .use import base_of

Hardness = Annotated[Profile, typer.Option(help=PROFILES)]
Codec = Annotated[str | None, typer.Option(help="Only this codec: `maskpack list codecs`.")]


def pack(
    masks: Annotated[Path, typer.Argument(help="File with the masks, named as the parameters.")],
    backbone: Annotated[str, typer.Option(help="timm/NAME, torchvision/NAME, hf/REPO, hf/FOLDER or PATH.py:FUNCTION.")],
    output: Annotated[Path, typer.Option(help="Folder to write, or a .safetensors file.")],
    source: Annotated[
        str, typer.Option("--from", help="What wrote the file: `maskpack list importers`; masks: plain tensors.")
    ] = "masks",
    weights: Weights = None,
    random_weights: RandomWeights = None,
    head: Annotated[str | None, typer.Option(help="Module that is not part of the body.")] = None,
    profile: Hardness = "default",
    codec: Codec = None,
    scale: Annotated[
        bool, typer.Option("--scale", help="The masks were trained with weights / sqrt(density).")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make an adapter from masks trained elsewhere, or from a pruned network."""
    quiet_libraries(quiet)
    from maskpack import fingerprint, inspect_adapter, load_backbone, save_adapter
    from maskpack.backbone.model import body, inside
    from maskpack.importers.base import check_format, import_masks
    from maskpack.runtime.apply import check_masks

    check_format(source, scale)
    loaded = load_backbone(backbone, weights=weights, random_weights=random_weights, head=head)
    found = import_masks(masks, loaded.model, source, scale=scale)
    check_masks(loaded.model, found.shapes)
    # a head that is masked belongs to the body
    outside = [module for module in loaded.outside if not any(inside(name, [module]) for name in found)]
    base = fingerprint(loaded.model, id=loaded.id, revision=loaded.revision, head=outside)
    left = [name for name, weight in body(loaded.model, outside).items() if weight.ndim > 1 and name not in found]
    note(f"Packing {len(found)} masks, {found.total:,} weights …", quiet)
    if left:
        note(f"Without a mask: {len(left)} tensors of the body with several dimensions, first {left[0]!r}.", quiet)
    with progress_bar("Packing", quiet or as_json) as step:
        adapter = save_adapter(output, found, base, profile=profile, codec=codec, weights=loaded.model, progress=step)
    whole = inspect_adapter(adapter)["sets"]["default"]
    totals = {key: whole[key] for key in ("parameters", "weights", "density", "payload_bytes", "bits_per_weight")}
    emit({"adapter": str(output), **totals, "file_bytes": adapter.size}, as_json, f"✓ {output}")


def convert(
    ref: Ref,
    output: Annotated[Path, typer.Argument(help="Folder to write, or a .safetensors file; may be the same.")],
    profile: Hardness = "default",
    codec: Codec = None,
    backbone: Annotated[
        str | None, typer.Option(help="The adapter's base, for codecs that use its weights: as for pack.")
    ] = None,
    weights: Weights = None,
    random_weights: RandomWeights = None,
    revision: Revision = None,
    require_signature: RequireSignature = None,
    token: Token = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Pack an adapter anew with another profile or codec: the same masks, and all that travels with them."""
    quiet_libraries(quiet)
    from maskpack import inspect_adapter, load_adapter
    from maskpack.adapter.edit import convert_adapter

    adapter = load_adapter(ref, revision=revision, require_signature=require_signature, token=token)
    base = None if backbone is None else base_of(adapter, backbone, weights, random_weights).model
    note(f"Packing {len(adapter.sets)} mask sets of {ref} anew …", quiet)
    with progress_bar("Packing", quiet or as_json) as step:
        converted = convert_adapter(adapter, output, profile=profile, codec=codec, base=base, progress=step)
    facts: dict[str, Any] = {"adapter": str(output), "mask_id": converted.mask_id}
    for key, one in (("before", adapter), ("after", converted)):
        sets = inspect_adapter(one)["sets"].values()
        facts[f"mask_bytes_{key}"] = sum(each["payload_bytes"] for each in sets)
        facts[f"file_bytes_{key}"] = one.size
    emit(facts, as_json, f"✓ {output}")


def register(app: typer.Typer) -> None:
    """Add this file's verbs."""
    app.command(
        epilog=examples(
            "maskpack pack masks.safetensors --backbone timm/resnet18.a1_in1k --output ./my-mask",
            "maskpack pack pruned.safetensors --from zeros --backbone timm/resnet18.a1_in1k --output ./my-mask",
        )
    )(command(pack))
    app.command(
        epilog=examples(
            "maskpack convert ./my-mask ./smaller --profile max --backbone timm/resnet18.a1_in1k",
            "maskpack convert ./my-mask ./my-mask --codec raw",
        )
    )(command(convert))
