"""maskpack transfer."""

import inspect
import sys
from pathlib import Path
from typing import Any, Literal

import typer

from . import training
from .console import command, emit, examples, main_process, note, quiet_libraries, say
from .progress import Progress
from .settings import DATA, OWN, option, read_settings

PANEL = "Transfer"
# what a transfer settles itself, see check_transfer
WITHOUT = (
    "data",
    "head_kind",
    "head_template",
    "objective",
    "objective_option",
    "scale",
    "train",
    "bytes_budget",
    "rate",
)
TABLE = "transfer.json"

OPTIONS = (
    option(PANEL, "source", str | None, "Data that the network learns first, as for --data of train."),
    option(PANEL, "target", str | None, "Data that it is carried to."),
    option(
        PANEL,
        "start",
        Literal["source-start", "source-end", "random"] | None,
        "Of the weights that learn the target: their values before the source, after it, or drawn anew. "
        "(default: source-start; source-end with --source-trained)",
    ),
    option(PANEL, "weight_lr", float | None, "Peak rate of weights. (default: 0.001; 0.05 for sgd)"),
    option(PANEL, "source_trained", bool | None, "The backbone knows the source already.", "--source-trained"),
    option(PANEL, "baseline", bool | None, "Fine-tune without a mask as well.", "--baseline"),
)


def transfer(**given: Any) -> None:
    """Train on a source, find the weights that it does not need, and let these alone learn a target.

    The options of `maskpack train` are here; they hold for every run.
    """
    config, resume, dry_run, as_json, quiet = (given.pop(name) for name in OWN)
    given = {name: value for name, value in given.items() if value is not None and value != []}
    quiet_libraries(quiet)
    from maskpack import save_adapter
    from maskpack.training import load_data, train_transfer
    from maskpack.training.evaluate import markdown, transfer_table
    from maskpack.training.run_folder import parse_every, write_json
    from maskpack.training.trainer import plan_training
    from maskpack.training.transfer import SOURCE_FILE, check_output, check_transfer

    settings = read_settings(transfer, given, config, needed=("backbone", "source", "target", "output"))
    output, profile = Path(settings.pop("output")), settings.pop("profile", "default")
    source_reference, target_reference = settings.pop("source"), settings.pop("target")
    source_trained, baseline = settings.pop("source_trained", False), settings.pop("baseline", False)
    start = settings.pop("start", "source-end" if source_trained else "source-start")
    every = settings.pop("checkpoint_every", None)
    parse_every(every)
    weight_lr = settings.pop("weight_lr", None)
    network: dict[str, Any] = {n: settings[n] for n in ("backbone", "weights", "random_weights") if n in settings}
    columns = {name: settings[name] for name in DATA if name in settings}
    settings.setdefault("bn", "freeze")
    check_output(output, resume)
    backbone, source, run_config = training.load_inputs({**settings, "data": source_reference}, quiet)
    note(f"Loading {target_reference} …", quiet)
    target = load_data(target_reference, seed=run_config.seed, **{"validation_fraction": 0.1, **columns})
    check_transfer(backbone, source, run_config, start, source_trained, weight_lr)
    plans = {}
    for name, data in (("source", source), ("target", target)):
        plans[name] = plan_training(backbone, data, run_config)
        note(f"The {name}, {data.id}:", quiet)
        training.describe_plan(plans[name], data, quiet)
    if dry_run:
        emit(plans, as_json, "Everything needed is there; nothing was trained or written.")
        return
    with Progress(quiet or as_json or not sys.stderr.isatty()) as report:
        result = train_transfer(
            backbone,
            source,
            target,
            run_config,
            start=start,
            weight_lr=weight_lr,
            source_trained=source_trained,
            baseline=baseline,
            output=output,
            resume=resume,
            checkpoint_every=every,
            report=report,
        )
    if not main_process():
        return
    rows = transfer_table(result, source, target, batch_size=run_config.batch_size)
    adapter = save_adapter(
        output, result.parts, result.base, result.about, profile=profile, weights=result.backbone.model
    )
    facts = {"adapter": str(output), "start": start, "density": result.metrics["density"], "file_bytes": adapter.size}
    facts |= {} if source_trained else {"source_weights": str(output / SOURCE_FILE)}
    write_json(output / TABLE, {**facts, "rows": rows})
    if as_json:
        emit({**facts, "rows": rows}, True)
        return
    emit(facts, False, f"✓ {output}")
    say("", *markdown(rows).splitlines())
    if not source_trained:
        network = {"backbone": network["backbone"], "weights": output / SOURCE_FILE}
    words = training.evaluated(output, {**network, **columns, "data": source_reference})
    note(f"Next: maskpack eval {words} --mode source", quiet)


transfer.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        *(one for name, one in inspect.signature(training.train).parameters.items() if name not in WITHOUT),
        *OPTIONS,
    ]
)


def register(app: typer.Typer) -> None:
    """Add this file's verb."""
    shared = "--backbone timm/resnet18.a1_in1k --source ./photos --target ./sketches"
    app.command(
        epilog=examples(
            f"maskpack transfer {shared} --method naive --output ./sketches-of-photos",
            f"maskpack transfer {shared} --method gumbel --start random --baseline --output ./sketches-of-photos",
            "maskpack transfer --config run.toml --start source-end --resume",
        )
    )(command(transfer))
