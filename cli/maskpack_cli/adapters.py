"""maskpack inspect | verify | list | combine | diff | pack | log | squash | convert."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import maskpack
from maskpack import training
from maskpack.errors import ConfigError, DataError, UnknownNameError
from maskpack.training.config import Bytes

from .console import Output, app, emit, hint, lines, note, progress_bar, reading, say, table
from .options import (
    ARGUMENT,
    Base,
    BatchSize,
    Columns,
    OutputRef,
    Overwrite,
    Packed,
    PackedBase,
    Packing,
    Ref,
    Source,
    TrainedBackbone,
    Trust,
    Without,
    check_free,
    group,
    reference,
    verb,
)

if TYPE_CHECKING:
    from maskpack.algebra import Overlap
    from maskpack.training.features import Measure

adapter_verb = partial(verb, app, "Adapters")
PLUGINS = {
    "methods": "maskpack.training.methods",
    "objectives": "maskpack.training.objectives",
    "codecs": "maskpack.codecs",
    "data": "maskpack.training.data",
    "importers": "maskpack.importers",
    "baselines": "maskpack.lab.baselines",
}
Missing = Annotated[
    Literal["error", "keep"], "Parameters that some adapters do not mask: an error, or kept whole there."
]
TrustedKey = Annotated[
    str | None,
    "Also check who signed it: a public key (PEM), a folder of keys, or an identity NAME@https://ISSUER.",
    typer.Option("--key", "--require-signature"),
]
Operation = Annotated[
    Literal["and", "or", "xor", "not", "majority", "weighted", "k-of-n", "difference"],
    "and, or, xor, not, majority, weighted, k-of-n or difference (kept by the first, not by the second).",
    typer.Argument(metavar="HOW"),
]
Several = Annotated[tuple[str, ...], "Adapters of one base: as for inspect.", typer.Argument(metavar="REF")]
PATCHES = ("bitdelta", "checkpoint", "emr", "shira", "tall", "wsp")  # their base is looked at once
MaskFile = Annotated[Path, "File with the masks, named as the parameters.", ARGUMENT]
Format = Annotated[str, "Format: `maskpack list importers`; masks: plain tensors.", typer.Option("--from")]
Scaled = Annotated[bool, "The masks were trained with weights / sqrt(density)."]
PackedBackbone = Annotated[TrainedBackbone, Without("image_size", "mean", "std")]
Target = Annotated[Path, "Folder to write, or a .safetensors file; may be the same.", ARGUMENT]
COUNTS = ("hamming", "share", "jaccard", "chance", "both", "first_only", "second_only", "neither")


def packed(adapter: "maskpack.Adapter", output: Path, **more: Any) -> dict[str, Any]:
    """Return the description of a written adapter with one mask set; `more` follows its path."""
    whole = maskpack.inspect_adapter(adapter)["sets"]["default"]
    totals = ("parameters", "weights", "density", "payload_bytes", "bits_per_weight")
    return {"adapter": reference(output), **more, **{name: whole[name] for name in totals}, "file_bytes": adapter.size}


@adapter_verb("maskpack inspect user/mask-cifar100 --parameters", "maskpack inspect ./my-mask --json")
def inspect(ref: Ref, trust: Source, parameters: Annotated[bool, "A line for every parameter."] = False) -> None:
    """Show what an adapter holds. Never needs the backbone, never runs anything from the file."""
    from maskpack.adapter.card import member
    from maskpack.adapter.signature import describe_signature
    from maskpack.hub.pull import open_adapter

    opened = open_adapter(ref, **vars(trust))
    adapter = opened.adapter
    about, signature = maskpack.inspect_adapter(adapter), describe_signature(opened.contents, opened.signed)
    classes = about.get("class_names") or ()
    facts: dict[str, Any] = {
        "file_bytes": about["size"],
        "mask_id": about["mask_id"],
        "base": about["base"]["id"],
        "base_revision": about["base"]["revision"],
        "base_dtype": about["base"]["dtype"],
        "task": about.get("task"),
        "classes": f"{len(classes)} ({', '.join(classes[:5])}{', …' if len(classes) > 5 else ''})" if classes else None,
    }
    emit({**about, "signature": signature}, adapter.pinned, facts)
    sections: dict[str, dict[str, Any]] = {}
    if signature is not None:
        sections["signature"] = {**signature, "keys": ", ".join(signature["keys"])}
    if metrics := member(about.get("training") or {}, "metrics"):  # whatever their names, none is a fact above
        sections["metrics, as the training record has them"] = metrics
    if (cascade := about["cascade"]) is not None:
        sizes = {f"{role}_bytes": size for role, size in cascade["bytes"].items()}
        sections["cascade"] = {**cascade, "experts": len(cascade["experts"]), **sizes}
    for title, section in sections.items():
        say(title)
        lines(section)
    say("bytes of the file")
    rows = [{"part": part, "bytes": size, "share": size / about["size"]} for part, size in about["bytes"].items()]
    table(rows, ("part", "bytes", "share"))
    for name, one in about["sets"].items():
        say(f"mask set {name}")
        lines({**one, **{f"{role}_bytes": size for role, size in one["dense_bytes"].items()}})
        if parameters:
            columns = ("name", "shape", "op", "codec", "density", "bytes", "bits_per_weight")
            table(one["payloads"], columns, name="parameter")


@adapter_verb("maskpack verify ./my-mask --backbone timm/resnet18.a1_in1k")
def verify(
    ref: Ref, base: PackedBase, trust: Annotated[Source, Without("require_signature")], key: TrustedKey = None
) -> None:
    """Check every byte, digest and mask of an adapter, its signature by --key, and its base: some masks need it."""
    from maskpack.adapter.signature import describe_signature
    from maskpack.hub.pull import open_adapter

    opened = open_adapter(ref, **{**vars(trust), "require_signature": key})
    adapter = opened.adapter
    report: dict[str, Any] = {"adapter": adapter.pinned}
    if opened.signed is not None:
        report["signature"] = describe_signature(opened.contents, opened.signed)
    model = base.model_of(adapter)
    if model is not None:
        from maskpack.backbone.fingerprint import check_fingerprint

        report["base_matches_as"] = check_fingerprint(model, adapter.base)
    with progress_bar("Verifying") as step:
        report |= adapter.verify(step, model)
    emit(report, f"✓ {adapter.pinned} is valid")
    if opened.signed is not None:
        say("✓ signed")
        lines(report["signature"] | {"keys": ", ".join(report["signature"]["keys"])})
    if left := report["needs_base"]:
        shown = ", ".join(left[:3]) + (", … (all: --json)" if len(left) > 3 else "")
        note(f"Not decoded, since they need the weights of {adapter.base.id} (--backbone): {shown}")


@adapter_verb("maskpack list", "maskpack list methods", name="list")
def listing(
    what: Annotated[str, f"adapters (cached from the Hub), or plug-ins: {', '.join(PLUGINS)}.", ARGUMENT] = "adapters",
) -> None:
    """List cached adapters, or the plug-ins of one kind."""
    if what == "adapters":
        from maskpack.hub.cache import cached_adapters

        columns = ["adapter", "commit", "bytes", "base", "density", "bits_per_weight", "path"]
        digits = None if Output.json else 12
        found: list[tuple[Any, ...]] = [
            (a.repo_id, a.commit[:digits], a.size, a.base, a.density, a.bits_per_weight, str(a.path))
            for a in cached_adapters()
        ]
    elif what in PLUGINS:
        from maskpack.registry import plugins

        columns, found = [what.removesuffix("s"), "what", "reference"], [*plugins(PLUGINS[what])]
    else:
        raise UnknownNameError(f"cannot list {what!r}; known: adapters, {', '.join(PLUGINS)}")
    rows = [dict(zip(columns, one, strict=True)) for one in found]
    emit({what: rows})
    if not rows:
        return note("No adapter is cached; fetch one with: maskpack pull USER/NAME")
    return table(rows, columns)


@group("Options")
class Votes:
    weight: Annotated[tuple[float, ...], "Vote of an adapter, for weighted: one for each, in their order."] = ()
    k: Annotated[int | None, "For k-of-n: how many adapters must keep a weight.", typer.Option("-k")] = None
    missing: Missing = "error"


@adapter_verb(
    "maskpack combine majority ./a ./b user/mask-c@v1 --output ./voted --data ./flowers",
    "maskpack combine k-of-n ./a ./b ./c -k 2 --output ./twice",
    "maskpack combine weighted ./a ./b --weight 0.7 --weight 0.3 --output ./voted",
)
def combine(
    how: Operation,
    refs: Several,
    output: OutputRef,
    base: PackedBase,
    packing: Packing,
    trust: Trust,
    votes: Votes,
    columns: Columns,
    data: Annotated[
        str | None,
        "Measure what is made, as for eval; without a head its features, by a linear probe.",
        typer.Option(rich_help_panel="Data"),
    ] = None,
    batch_size: BatchSize = 64,
    overwrite: Overwrite = False,
) -> None:
    """Combine the masks of adapters, bit by bit, into one adapter; head and all else are kept where all agree."""
    from maskpack.adapter.content import FEATURES
    from maskpack.adapter.edit import combine_adapters, left_out
    from maskpack.algebra import operation
    from maskpack.training.evaluate import figures

    from .use import tables

    weights = votes.weight or None
    operation(how, len(refs), weights, votes.k)
    check_free(output, overwrite)
    adapters = [trust.load(ref) for ref in refs]
    backbone = read = None
    if data is not None:
        backbone, names = base.of(adapters[0]), {one.about.class_names for one in adapters}
        common = names.pop() if len(names) == 1 else None
        read = training.load_data(data, class_names=common, task=backbone.task, **vars(columns))
        read.split("test")
    model = base.model_of(adapters[0]) if backbone is None else backbone.model
    options = {**vars(packing), "k": votes.k, "missing": votes.missing, "base": model}
    note(f"Combining {len(adapters)} adapters …")
    with progress_bar("Combining") as step:
        combined = combine_adapters(how, adapters, output, weights=weights, progress=step, **options)
    left = left_out(adapters)
    facts = packed(combined, output, operation=how, mask_id=combined.mask_id)
    headless = combined.parts(stream=True).head is None
    if backbone is not None and read is not None:
        measures: Sequence[Measure] = ["probe"] if headless and backbone.task in FEATURES else []
        with reading("evaluating, batches"):
            facts["evaluation"] = figures(backbone, combined, read, measures=measures, batch_size=batch_size)
    emit(facts | {"left_out": left}, f"✓ {output}")
    say(*(f"{'            ' if i else '  left out: '}{one}" for i, one in enumerate(left)))
    if "evaluation" in facts:
        lines({key: value for key, value in facts["evaluation"].items() if key != "adapter"})
        return tables(facts["evaluation"])
    return hint(f"Next: maskpack eval {facts['adapter']} --data DATA{' --probe' if headless else ''}")


@adapter_verb("maskpack diff ./a ./b", "maskpack diff user/mask-a ./b --json")
def diff(first: Ref, second: Ref, base: PackedBase, trust: Trust, missing: Missing = "error") -> None:
    """Compare the masks of two adapters of one base: how many bits differ, in all and by parameter.

    jaccard: of the weights that at least one mask removes, the share that both remove; chance: what it would be for
    unrelated masks with as many zeros in each parameter.
    """
    from maskpack.adapter.edit import mask_sets
    from maskpack.algebra import Overlap, overlaps

    def facts(one: "Overlap") -> dict[str, Any]:
        return asdict(one) | {key: getattr(one, key) for key in COUNTS}

    adapters = [trust.load(ref) for ref in (first, second)]
    found = dict(overlaps(*mask_sets(adapters, base.model_of(adapters[0])), missing=missing))
    whole = sum(found.values(), Overlap())
    about = {"first": adapters[0].pinned, "second": adapters[1].pinned, **facts(whole)}
    rows = [{"name": name, **facts(one)} for name, one in found.items()]
    emit({**about, "parameters": rows}, f"≠ {whole.hamming:,} bits differ" if whole.hamming else "= all bits are equal")
    table(rows, ["name", *COUNTS], name="parameter")


@group("Packing")
class Less:
    """Options of a patch that is not exact."""

    keep: Annotated[float | None, "Of a checkpoint: only this share of the changes, the largest. Not exact."] = None
    budget: Annotated[Bytes | None, "Of a checkpoint: as many of the largest changes as this takes. Not exact."] = None
    ternary: Annotated[bool, "Of a checkpoint: of each change the sign, times one size for its row. Not exact."] = False

    @property
    def any(self) -> bool:
        """Whether the patch is not exact."""
        return self.ternary or self.keep is not None or self.budget is not None


@adapter_verb(
    "maskpack pack masks.safetensors --backbone timm/resnet18.a1_in1k --output ./my-mask",
    "maskpack pack pruned.safetensors --from zeros --backbone timm/resnet18.a1_in1k --output ./my-mask",
    "maskpack pack ./tuned --from checkpoint --backbone hf/HuggingFaceTB/SmolLM2-135M --output ./patch",
)
def pack(
    masks: MaskFile,
    backbone: PackedBackbone,
    output: OutputRef,
    packing: Packing,
    less: Less,
    source: Format = "masks",
    scale: Scaled = False,
    overwrite: Overwrite = False,
) -> None:
    """Make an adapter from masks trained elsewhere, from a pruned network, or from a checkpoint trained further.

    --from checkpoint stores the exact change from the backbone to a safetensors checkpoint: which weights differ, and
    what stands there. Its profile is max where none is given: whoever applies it has the backbone.
    """
    from maskpack.adapter.content import About
    from maskpack.backbone.fingerprint import fingerprint_of, remember_backbone
    from maskpack.backbone.model import body, inside, named_parameters
    from maskpack.importers.base import Imported, check_format, import_file
    from maskpack.importers.checkpoint import Largest
    from maskpack.importers.merged import task_of
    from maskpack.runtime.apply import check_masks

    check_format(source, scale)
    if source != "checkpoint" and less.any:
        raise ConfigError(
            f"--keep, --budget and --ternary are for --from checkpoint, and this is --from {source}; leave them out"
        )
    check_free(output, overwrite)
    if not (masks.exists() or task_of(masks)[0].exists()):  # before the backbone is loaded
        raise DataError(f"there is no file {masks}; give the path of the {source} to pack")
    loaded = backbone.load(mapped=source in PATCHES)
    imported = import_file(masks, loaded.model, source, scale=scale)
    found, patch = imported.masks, bool(imported.values)
    check_masks(loaded.model, found.shapes)
    options = vars(packing) | ({"profile": "max"} if patch and "profile" not in Output.given else {})
    # a head that is masked belongs to the body, and so does all that a patch was compared with
    outside = [one for one in loaded.outside if not patch and not any(inside(name, [one]) for name in found)]
    base = maskpack.fingerprint(loaded.model, id=loaded.id, revision=loaded.revision, head=outside)
    left = [name for name, weight in body(loaded.model, outside).items() if weight.ndim > 1 and name not in found]
    note(f"Packing {len(found)} masks, {found.total:,} weights …")
    if left and not patch:
        note(f"Without a mask: {len(left)} tensors of the body with several dimensions, first {left[0]!r}.")
    facts: dict[str, Any] = {}
    if patch and not less.any:
        after = {name: imported.after.get(name, one) for name, one in body(loaded.model, outside).items()}
        options["about"] = About(result=fingerprint_of(after, base.id, None, base.head).digests)

    def save(path: Path, one: Imported, **said: Any) -> maskpack.Adapter:
        parts = maskpack.Parts(one.masks, statistics=one.statistics, values=one.values)
        own = dict(options) if not said else {**options, "about": About(training={"lossy": said})}
        with progress_bar("Packing") as step:
            own |= {"weights": loaded.model, "progress": step, "overwrite": True}
            return maskpack.save_adapter(path, parts, base, **own)

    if not less.any:
        adapter = save(output, imported)
    else:
        changes = Largest(imported, named_parameters(loaded.model), less.ternary)
        share = 1.0 if less.keep is None else less.keep
        if less.budget is not None:
            with tempfile.TemporaryDirectory() as folder:
                tried = Path(folder) / "patch.safetensors"
                share = changes.within(less.budget, share, lambda some: save(tried, some).size)
        largest, error, count = changes.take(share)
        facts = {"changes": changes.changed, "kept_changes": count, "error": error}
        adapter = save(output, largest, **facts)
    remember_backbone(base.digests["float32"], backbone.arguments())
    emit(packed(adapter, output, **facts), f"✓ {output}")


Chain = Annotated[
    tuple[str, ...],
    "Patches, oldest first; or one: a folder or URL of versions (s3://…, hf://…), or user/name with a patch a commit.",
    typer.Argument(metavar="REF"),
]


def chain_of(refs: tuple[str, ...], trust: Trust) -> "list[maskpack.Adapter]":
    """Return patches, oldest first: those named, or what one reference leads to."""
    from maskpack.hub.versions import patches_behind

    return [trust.load(ref) for ref in refs] if len(refs) > 1 else [*patches_behind(refs[0], **vars(trust))][::-1]


@adapter_verb(
    "maskpack log user/name", "maskpack log s3://bucket/run", "maskpack log ./first ./second --json", name="log"
)
def lineage(refs: Chain, trust: Trust) -> None:
    """Show patches, newest first: what each stands on, what it makes, and what it changes."""
    from maskpack.adapter import chain

    rows = [chain.lineage(one) for one in chain_of(refs, trust)[::-1]]
    for row, before in zip(rows, [*rows[1:], None], strict=True):
        row["stands_on"] = None if before is None or row["base"] != before["result"] else before["patch"]
    emit({"patches": rows})
    short = [row | {key: (row[key] or "")[:12] for key in ("base", "result")} for row in rows]
    gaps = [row["patch"] for row in rows[:-1] if row["stands_on"] is None]
    table(short, ["patch", "base", "result", "changed", "bytes"])
    if gaps:
        note(f"{len(gaps)} of them do not stand on the one below, first {gaps[0]}.")


@adapter_verb(
    "maskpack squash ./first ./second --backbone hf/./smollm2 --output ./both",
    "maskpack squash s3://bucket/run --backbone hf/./smollm2 --output ./run",
)
def squash(
    refs: Chain,
    output: OutputRef,
    base: Base,
    packing: Annotated[Packed, Without(profile="max")],
    trust: Trust,
    overwrite: Overwrite = False,
) -> None:
    """Merge a chain of patches into one, which does what they do; --backbone: what the first of them stands on."""
    from maskpack.adapter.chain import base_of_chain, check_chain, squash_adapters
    from maskpack.backbone.fingerprint import check_fingerprint

    check_free(output, overwrite)
    chain = chain_of(refs, trust)
    check_chain(chain)
    model = base.of(chain[0], mapped=True).model
    check_fingerprint(model, base_of_chain(chain))
    note(f"Merging {len(chain)} patches …")
    with progress_bar("Packing") as step:
        adapter = squash_adapters(chain, output, model, progress=step, **vars(packing))
    emit(packed(adapter, output, patches=len(chain)), f"✓ {output}")


@adapter_verb(
    "maskpack convert ./my-mask ./smaller --profile max --backbone timm/resnet18.a1_in1k",
    "maskpack convert ./my-mask ./my-mask --codec raw",
)
def convert(
    ref: Ref, output: Target, base: PackedBase, packing: Packing, trust: Source, overwrite: Overwrite = False
) -> None:
    """Pack an adapter again with another profile or codec; masks, head and all else stay the same."""
    from maskpack.adapter.edit import convert_adapter
    from maskpack.adapter.read import MODEL_FILE

    adapter = trust.load(ref)
    itself = Path(adapter.path).absolute() in (output.absolute(), (output / MODEL_FILE).absolute())
    check_free(output, overwrite or itself)
    model = base.model_of(adapter)
    note(f"Packing {len(adapter.sets)} mask sets of {ref} anew …")
    with progress_bar("Packing") as step:
        converted = convert_adapter(adapter, output, base=model, progress=step, **vars(packing))
    facts: dict[str, Any] = {"adapter": reference(output), "mask_id": converted.mask_id}
    for key, one in (("before", adapter), ("after", converted)):
        sets = maskpack.inspect_adapter(one)["sets"].values()
        facts[f"mask_bytes_{key}"] = sum(each["payload_bytes"] for each in sets)
        facts[f"file_bytes_{key}"] = one.size
    emit(facts, f"✓ {output}")
