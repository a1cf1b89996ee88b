"""maskpack compare: a mask beside every alternative."""

import inspect
import sys
from pathlib import Path
from typing import Any

import typer

from . import training
from .console import command, emit, examples, note, quiet_libraries, table
from .progress import Progress, of_trials
from .settings import OWN, option, read_settings, take

PANEL = "Comparison"
# what a comparison decides itself, or has for every baseline
WITHOUT = (
    *("lr", "seed", "labels_fraction", "validation_fraction", "objective", "head_kind", "head_template", "profile"),
    *("resume", "dry_run", "checkpoint_every"),
)
BACKBONE = ("weights", "random_weights", "head", "image_size", "mean", "std")
DATA = ("input_column", "label_column")
OPTIONS = (
    option(
        PANEL,
        "baseline",
        list[str] | None,
        "ID or ID:ARGUMENT, repeatable: `maskpack list baselines`. (default: all)",
    ),
    option(PANEL, "seeds", int | None, "How many seeds: 0, 1, … (default: 3)"),
    option(PANEL, "labels_fraction", list[float] | None, "Share of the labels; may be repeated. (default: 1)"),
    option(PANEL, "lr", list[str] | None, "BASELINE=RATE,RATE,… to choose from, repeatable; one is taken as it is."),
)


def compare(**given: Any) -> None:
    """Compare a mask with every alternative: same backbone, data, splits and budget; each in a process of its own.

    Learning rates are chosen on a validation split. Called again, it does what is not done yet.
    """
    config, as_json, quiet = (given.pop(name) for name in OWN if name not in WITHOUT)
    given = {name: value for name, value in given.items() if value is not None and value != []}
    quiet_libraries(quiet)
    from maskpack.errors import ConfigError
    from maskpack.lab import compare as compared
    from maskpack.lab.comparison import COLUMNS, cells
    from maskpack.training.config import config_from

    settings = read_settings(compare, given, config)
    output, seeds = Path(settings.pop("output")), settings.pop("seeds", 3)
    names, fractions = _listed(settings, "baseline"), _listed(settings, "labels_fraction") or [1.0]
    rates = _rates(_listed(settings, "lr"))
    if not isinstance(seeds, int) or seeds < 1:
        raise ConfigError(f"--seeds must be a number of at least 1, got {seeds!r}")
    backbone = {"reference": settings.pop("backbone")} | take(settings, *BACKBONE)
    data = {"reference": settings.pop("data")} | take(settings, *DATA)
    with Progress(quiet or as_json or not sys.stderr.isatty()) as report:
        result = compared(
            backbone,
            data,
            output,
            baselines=names,
            seeds=range(seeds),
            fractions=fractions,
            rates=rates,
            config=config_from(settings),
            report=of_trials(report, quiet),
        )
    if as_json:
        emit(result, True)
        return
    table(COLUMNS, [cells(row) for row in result["rows"]])
    note(f"The same in {output / 'results.md'}, and all of it in {output / 'results.json'}", quiet)


def _listed(settings: dict[str, Any], name: str) -> list[Any]:
    """Take a setting that may be one value or several."""
    value = settings.pop(name, [])
    return list(value) if isinstance(value, list | tuple) else [value]


def _rates(texts: list[Any]) -> dict[str, list[float]]:
    from maskpack.errors import ConfigError

    rates = {}
    for text in texts:
        baseline, _, values = str(text).partition("=")
        try:
            rates[baseline] = [float(value) for value in values.split(",")]
        except ValueError:
            raise ConfigError(f"--lr must be BASELINE=RATE or BASELINE=RATE,RATE,…, got {text!r}") from None
    return rates


compare.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        *(parameter for name, parameter in inspect.signature(training.train).parameters.items() if name not in WITHOUT),
        *OPTIONS,
    ]
)


def register(app: typer.Typer) -> None:
    """Add this file's verb."""
    shared = "--backbone timm/resnet18.a1_in1k --data ./flowers"
    app.command(
        epilog=examples(
            f"maskpack compare {shared} --baseline full --baseline lora:8 --baseline mask --output ./comparison",
            f"maskpack compare {shared} --labels-fraction 1 --labels-fraction 0.1 --seeds 3 --output ./comparison",
            "maskpack compare --config run.toml --lr mask=0.02 --lr full=0.0003 --json",
        )
    )(command(compare))
