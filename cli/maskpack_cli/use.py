"""maskpack predict | export: an adapter on its backbone."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .adapters import RandomWeights, Ref, RequireRevision, RequireSignature, Revision, Weights
from .console import Json, Quiet, Token, command, emit, examples, note, quiet_libraries, table

if TYPE_CHECKING:
    from maskpack import Adapter
    from maskpack.backbone.load import Backbone
    from maskpack.runtime.load import Mode

BackboneOption = Annotated[
    str | None,
    typer.Option(
        help="timm/NAME, torchvision/NAME, hf/REPO, hf/FOLDER or PATH.py:FUNCTION. (default: the adapter's base)"
    ),
]
ModeOption = Annotated[
    Literal["target", "source"],
    typer.Option(help="Of an adapter of `maskpack transfer`: which of its two networks."),
]


def loaded(
    ref: str,
    revision: str | None,
    require_revision: bool,
    require_signature: str | None,
    token: str | None,
    reference: str | None,
    weights: Path | None,
    random: str | None,
    mode: "Mode" = "target",
) -> "tuple[Backbone, Adapter]":
    """Return the backbone with the adapter applied, on the GPU where there is one."""
    from maskpack import load_mask

    backbone, adapter = opened(ref, revision, require_revision, require_signature, token, reference, weights, random)
    load_mask(backbone.model, adapter, mode=mode)
    return backbone, adapter


def opened(
    ref: str,
    revision: str | None,
    require_revision: bool,
    require_signature: str | None,
    token: str | None,
    reference: str | None,
    weights: Path | None,
    random: str | None,
) -> "tuple[Backbone, Adapter]":
    """Return the adapter and the backbone that it is for, on the GPU where there is one; nothing is applied."""
    from maskpack import load_adapter

    adapter = load_adapter(
        ref,
        revision=revision,
        require_revision=require_revision,
        require_signature=require_signature,
        token=token,
    )
    return on_gpu(base_of(adapter, reference, weights, random)), adapter


def on_gpu(backbone: "Backbone") -> "Backbone":
    """Move a backbone, before anything is loaded into it, to the GPU where there is one and training would use it."""
    import torch

    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t")
    if torch.cuda.is_available() and not on_cpu:
        backbone.model.cuda()
    return backbone


def base_of(adapter: "Adapter", reference: str | None, weights: Path | None, random: str | None) -> "Backbone":
    """The backbone that an adapter is for, as the options name it; random weights as the adapter does, without any."""
    from maskpack import load_backbone
    from maskpack.errors import BackboneError

    base, revision = adapter.base.id, adapter.base.revision or ""
    drawn = revision.startswith("random:")
    if drawn and weights is None:
        random = random or revision.removeprefix("random:")
    if reference is None:
        # only libraries' own models: a file's factory is never run because an adapter names it
        if not base.startswith(("timm/", "torchvision/", "hf/")) or (base.startswith("hf/") and base.count("/") != 2):
            raise BackboneError(f"the adapter's base {base!r} cannot be fetched by its name; give it with --backbone")
        reference = f"{base}@{revision}" if revision and not drawn and not base.startswith("timm/") else base
    size = (adapter.about.preprocess or {}).get("size")
    return load_backbone(reference, weights=weights, random_weights=random, image_size=size)


def predict(
    ref: Ref,
    files: Annotated[
        list[str], typer.Argument(help="Image files; for text adapters, text files with one text a line.")
    ],
    backbone: BackboneOption = None,
    weights: Weights = None,
    random_weights: RandomWeights = None,
    mode: ModeOption = "target",
    revision: Revision = None,
    require_revision: RequireRevision = False,
    require_signature: RequireSignature = None,
    token: Token = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Classify files with an adapter."""
    quiet_libraries(quiet)
    from maskpack import load_cascade, load_mask
    from maskpack.errors import ConfigError, DataError
    from maskpack.training.evaluate import source_classes

    masked, adapter = opened(
        ref, revision, require_revision, require_signature, token, backbone, weights, random_weights
    )
    if adapter.cascade is not None and mode != "target":
        raise ConfigError(f"--mode is for adapters of `maskpack transfer`, and {ref} is a cascade; leave it out")
    together = None if adapter.cascade is None else load_cascade(masked.model, adapter)
    if together is None:
        load_mask(masked.model, adapter, mode=mode)
    inputs: list[str] = []
    if adapter.about.task == "text-classification":
        for file in files:
            try:
                inputs += [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"cannot read the text file {file!r}: {error}") from None
    else:
        inputs = files
    note(f"Adapter: {adapter.pinned}", quiet or as_json)
    if together is None:
        names = source_classes(adapter) if mode == "source" else None
        found = adapter.predict(masked.model, inputs, class_names=names, tokenizer=masked.tokenizer)
    else:
        found = together.predict(inputs, tokenizer=masked.tokenizer)
    rows: list[list[Any]] = [[x, p.label, p.score] for x, p in zip(inputs, found, strict=True)]
    if as_json:
        emit({"predictions": [dict(zip(("input", "label", "score"), row, strict=True)) for row in rows]}, True)
    else:
        table(["input", "label", "score"], rows)


def export(
    ref: Ref,
    output: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    backbone: BackboneOption = None,
    weights: Weights = None,
    random_weights: RandomWeights = None,
    revision: Revision = None,
    require_revision: RequireRevision = False,
    require_signature: RequireSignature = None,
    token: Token = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the masked dense model as a safetensors state dict, for tools that know nothing of masks."""
    quiet_libraries(quiet)
    from maskpack.backbone.load import export_state

    masked, adapter = loaded(
        ref, revision, require_revision, require_signature, token, backbone, weights, random_weights
    )
    count = export_state(output, masked.model, {"maskpack_mask_id": adapter.mask_id})
    note(f"Adapter: {adapter.pinned}", quiet or as_json)
    note("The weights are in the file whole: it is as large as the backbone.", quiet or as_json)
    emit({"file": str(output), "tensors": count, "bytes": output.stat().st_size}, as_json, f"✓ {output}")


def register(app: typer.Typer) -> None:
    """Add this file's verbs."""
    app.command(epilog=examples("maskpack predict user/mask-flowers a.jpg b.jpg"))(command(predict))
    app.command(epilog=examples("maskpack export user/mask-flowers --output flowers.safetensors"))(command(export))
