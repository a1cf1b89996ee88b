"""maskpack cascade train | eval."""

import inspect
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import training
from .adapters import RandomWeights, Ref, RequireRevision, RequireSignature, Revision, Weights
from .console import Json, Quiet, Token, command, emit, examples, main_process, note, quiet_libraries, table
from .progress import Progress
from .settings import OWN, option, read_settings
from .use import BackboneOption, opened

verbs = typer.Typer(help="A dispatcher, and an expert for each cluster of the data: train them, compare them.")
PANEL = "Cascade"


OPTIONS = (
    option(PANEL, "experts", int | None, "Experts, one for each cluster. (default: 5)"),
    option(
        PANEL, "combine", str | None, "conditional (2 passes for an input) or unconditional. (default: conditional)"
    ),
    option(PANEL, "reduce", int | None, "Numbers that embeddings are reduced to. (default: not reduced)"),
    option(PANEL, "no_labels", bool | None, "The data have no labels: the cascade gets no head.", "--no-labels"),
)


def train(**given: Any) -> None:
    """Train a dispatcher, a router and experts on a frozen backbone, and write them as one adapter.

    All options of `maskpack train` are here; they hold for the dispatcher and for every expert.
    """
    config, resume, dry_run, as_json, quiet = (given.pop(name) for name in OWN)
    given = {name: value for name, value in given.items() if value is not None and value != []}
    quiet_libraries(quiet)
    from maskpack import inspect_adapter, save_adapter
    from maskpack.adapter.content import COMBINES
    from maskpack.errors import ConfigError
    from maskpack.training import train_cascade
    from maskpack.training.cascade import DISPATCHER, check_cascade, fit_cascade_head
    from maskpack.training.run_folder import check_untaken, parse_every
    from maskpack.training.trainer import plan_training

    settings = read_settings(train, given, config)
    output, profile = Path(settings.pop("output")), settings.pop("profile", "default")
    every = settings.pop("checkpoint_every", None)
    parse_every(every)
    experts, combine = settings.pop("experts", 5), settings.pop("combine", "conditional")
    reduce, labelled = settings.pop("reduce", None), not settings.pop("no_labels", False)
    if combine not in COMBINES or (reduce is not None and reduce < 1):
        raise ConfigError(
            f"--combine must be {' or '.join(COMBINES)} and --reduce at least 1; got {combine!r} and {reduce!r}"
        )
    folder = output / training.RUN_FOLDER
    check_untaken(folder / DISPATCHER, resume)
    inputs = training.evaluated(output, settings)
    backbone, data, run_config = training.load_inputs(settings, quiet, labelled)
    check_cascade(data, run_config, experts)
    plan = plan_training(backbone, data, run_config)
    training.describe_plan(plan, data, quiet)
    note(f"A dispatcher and {experts} experts: about {(experts + 1) * plan['steps']:,} steps in all", quiet)
    if dry_run:
        emit({**plan, "experts": experts}, as_json, "Everything needed is there; nothing was trained or written.")
        return
    with Progress(quiet or as_json or not sys.stderr.isatty()) as report:
        result = train_cascade(
            backbone,
            data,
            run_config,
            experts=experts,
            output=folder,
            resume=resume,
            checkpoint_every=every,
            report=report,
        )
    if not main_process():
        return
    result = fit_cascade_head(backbone, data, result, combine=combine, reduce=reduce)
    adapter = save_adapter(
        output, result.parts, result.base, result.about, cascade=result.cascade, profile=profile, weights=backbone.model
    )
    about = inspect_adapter(adapter)
    facts = {
        "adapter": str(output),
        **result.metrics,
        "combine": combine,
        "cluster_rows": ", ".join(map(str, (result.about.training or {})["cascade"]["rows"])),
        "dispatcher_mask_bytes": about["sets"]["dispatcher"]["payload_bytes"],
        "expert_mask_bytes": sum(about["sets"][name]["payload_bytes"] for name in about["cascade"]["experts"]),
        **{f"{role}_bytes": size for role, size in about["cascade"]["bytes"].items()},
        "file_bytes": adapter.size,
    }
    emit(facts, as_json, f"✓ {output}")
    if labelled:
        note(f"Next: maskpack cascade eval {inputs}", quiet or as_json)
    note(f"Next: maskpack push {training.reference(output)} USER/NAME", quiet or as_json)


# the verb has the options of `maskpack train` and those above: they are written down once
train.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [*inspect.signature(training.train).parameters.values(), *OPTIONS]
)


def evaluate(
    ref: Ref,
    data: Annotated[str, typer.Option(help="Hub data set, folder (parquet, csv, images), or digits:0-9.")],
    backbone: BackboneOption = None,
    weights: Weights = None,
    random_weights: RandomWeights = None,
    whiten: Annotated[
        int | None, typer.Option(min=1, help="Numbers of a whitened embedding. (default: those of one set)")
    ] = None,
    input_column: Annotated[str | None, typer.Option(help="Column of images or texts, where it is not found.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of labels, where it is not found.")] = None,
    labels_fraction: Annotated[float, typer.Option(help="Share of the training rows to use.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per forward pass.")] = 64,
    revision: Revision = None,
    require_revision: RequireRevision = False,
    require_signature: RequireSignature = None,
    token: Token = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare a cascade with its dispatcher alone: nearest neighbours, linear probes, passes, steps and bytes."""
    quiet_libraries(quiet)
    from maskpack.training import load_data
    from maskpack.training.cascade import cascade_table
    from maskpack.training.data.load import LABELS_SEED

    base, adapter = opened(ref, revision, require_revision, require_signature, token, backbone, weights, random_weights)
    found = load_data(
        data,
        input_column=input_column,
        label_column=label_column,
        labels_fraction=labels_fraction,
        seed=LABELS_SEED,
    )
    note("Embedding the training and the test rows by every set …", quiet)
    result = cascade_table(base, adapter, found, whiten=whiten, batch_size=batch_size)
    if as_json:
        emit({"adapter": adapter.pinned, "data": found.id, **result}, True)
        return
    rows = [
        {**row, "embedding": row["embedding"] + (", whitened" if row["whitened"] else "")} for row in result["rows"]
    ]
    columns = [name for name in rows[0] if name != "whitened"]
    table([name.replace("_bytes", "").replace("_", " ") for name in columns], [[r[c] for c in columns] for r in rows])
    note("knn, probe: accuracies on the test split. Columns behind steps: bytes.", quiet)


def register(app: typer.Typer) -> None:
    """Add this file's verbs."""
    shared = "--backbone timm/resnet18.a1_in1k --data ./flowers"
    verbs.command(
        "train",
        epilog=examples(
            f"maskpack cascade train {shared} --objective self-supervised --experts 4 --output ./cascade",
            "maskpack cascade train --config run.toml --combine unconditional --resume",
        ),
    )(command(train))
    verbs.command("eval", epilog=examples("maskpack cascade eval ./cascade --data ./flowers --json"))(command(evaluate))
    app.add_typer(verbs, name="cascade", no_args_is_help=True)
