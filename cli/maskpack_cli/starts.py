"""maskpack analyze shuffle | checkpoints: what a start is worth, by trainings from several."""

import glob
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer

from . import training
from .compare import BACKBONE, DATA
from .compare import WITHOUT as SETTLED
from .console import command, emit, examples, note, quiet_libraries, say, table
from .progress import Progress, of_trials
from .settings import OWN, option, read_settings, take

PANEL = "Analysis"
WITHOUT = tuple(name for name in SETTLED if name != "lr")
SHARED = (
    option(PANEL, "baseline", str | None, "What is trained: `maskpack list baselines`. (default: full)"),
    option(PANEL, "seeds", int | None, "How many seeds: 0, 1, … (default: 3)"),
    option(PANEL, "plot", Path | None, "Picture to write: .png or .svg."),
)
BLOCKS = (
    option(
        PANEL, "block", list[int] | None, "Side of the blocks in pixels; may be repeated. (default: image, half, …, 1)"
    ),
    option(PANEL, "random_lr", float | None, "Peak rate of random starts. (default: --lr)"),
)
CHECKPOINTS = (
    option(
        PANEL, "checkpoints", str | None, "Glob of the checkpoints: safetensors state dicts, in the order of names."
    ),
    option(PANEL, "pretraining", str | None, "Data of pretraining, to measure the checkpoints on, as --data."),
)


def shuffle(**given: Any) -> None:
    """Train a pretrained and a random start on images whose blocks are shuffled, from whole images to pixels.

    Called again with the same folder, it does what is not done yet.
    """
    settings, backbone, run = _begun(shuffle, given)
    from maskpack.errors import ConfigError
    from maskpack.lab import shuffle_figure
    from maskpack.lab.analysis.starts import feature_reuse

    if "random_weights" in backbone:
        raise ConfigError("--random-weights is the random start, which is there always; leave it out")
    blocks = settings.pop("block", [])
    options = {"blocks": blocks if isinstance(blocks, list) else [blocks], **take(settings, "random_lr")}
    result = run(settings, lambda data, **shared: feature_reuse(backbone, data, **shared, **options), shuffle_figure)
    if result is not None:
        table(["block", "start", "accuracy", "deviation"],
              [[row["block"], row["start"], row["accuracy"], row["deviation"]] for row in result["rows"]])  # fmt: skip
        say("")
        table(["block", "gain of the pretrained start"], [[one["block"], one["gain"]] for one in result["gains"]])


def checkpoints(**given: Any) -> None:
    """Train one target from several checkpoints of a pretraining run.

    Called again with the same folder, it does what is not done yet.
    """
    settings, backbone, run = _begun(checkpoints, given)
    from maskpack.errors import ConfigError
    from maskpack.lab import checkpoint_figure
    from maskpack.lab.analysis.starts import from_checkpoints
    from maskpack.lab.plots.figure import in_order
    from maskpack.training import load_data

    pattern = settings.pop("checkpoints", None)
    if pattern is None or {"weights", "random_weights"} & backbone.keys():
        raise ConfigError("the weights to start from are those of --checkpoints GLOB; give it, and no other weights")
    found = in_order(glob.glob(pattern))  # noqa: PTH207 (a pattern may be absolute)
    if not found:
        raise ConfigError(f"no file matches --checkpoints {pattern!r}; expected safetensors state dicts")
    before = settings.pop("pretraining", None)
    options: dict[str, Any] = {"pretraining": None if before is None else load_data(before)}
    result = run(
        settings, lambda data, **shared: from_checkpoints(backbone, found, data, **shared, **options), checkpoint_figure
    )
    if result is not None:
        columns = ["checkpoint", "pretraining", "accuracy", "deviation"]
        table(columns, [[row[name] for name in columns] for row in result["rows"]])


Analysis = Callable[..., dict[str, Any]]
Draw = Callable[[list[Mapping[str, Any]]], Any]
Run = Callable[[dict[str, Any], Analysis, Draw], dict[str, Any] | None]


def _begun(verb: Callable[..., None], given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], Run]:
    """Return settings, what names the backbone, and what runs an analysis and returns it, if it is to be a table."""
    config, as_json, quiet = (given.pop(name) for name in OWN if name not in WITHOUT)
    given = {name: value for name, value in given.items() if value is not None and value != []}
    quiet_libraries(quiet)
    from maskpack.errors import ConfigError
    from maskpack.lab import save_figure
    from maskpack.lab.plots.figure import image_suffix
    from maskpack.training import load_data
    from maskpack.training.config import config_from

    settings = read_settings(verb, given, config)
    output, seeds, plot = Path(settings.pop("output")), settings.pop("seeds", 3), settings.pop("plot", None)
    if not isinstance(seeds, int) or seeds < 1:
        raise ConfigError(f"--seeds must be a number of at least 1, got {seeds!r}")
    if plot is not None:
        image_suffix(plot)
    backbone = {"reference": settings.pop("backbone")} | take(settings, *BACKBONE)

    def run(settings: dict[str, Any], analysis: Analysis, draw: Draw) -> dict[str, Any] | None:
        data = load_data(settings.pop("data"), **take(settings, *DATA))
        baseline = settings.pop("baseline", "full")
        with Progress(quiet or as_json or not sys.stderr.isatty()) as report:
            shared = {
                "seeds": range(seeds),
                "baseline": baseline,
                "config": config_from(settings),
                "report": of_trials(report, quiet),
            }
            result = analysis(data, output=output, **shared)
        if plot is not None:
            save_figure(draw(result["rows"]), plot)
            note(f"The picture is in {plot}", quiet)
        if as_json:
            emit(result, True)
        return None if as_json else result

    return settings, backbone, run


def _signed(verb: Callable[..., None], own: tuple[inspect.Parameter, ...]) -> Callable[..., None]:
    """Give a verb the options of `train` that hold for its trainings, and its own."""
    trained = inspect.signature(training.train).parameters.items()
    kept = [parameter for name, parameter in trained if name not in WITHOUT]
    verb.__signature__ = inspect.Signature([*kept, *SHARED, *own])  # type: ignore[attr-defined]
    return verb


def register(app: typer.Typer) -> None:
    """Add this file's kinds of analysis."""
    shared = "--backbone timm/resnet18.a1_in1k --data ./flowers"
    app.command(
        "shuffle", epilog=examples(f"maskpack analyze shuffle {shared} --block 224 --block 8 --output ./shuffled")
    )(command(_signed(shuffle, BLOCKS)))
    line = f"maskpack analyze checkpoints {shared} --checkpoints 'run/epoch-*.safetensors' --output ./curve"
    app.command("checkpoints", epilog=examples(line))(command(_signed(checkpoints, CHECKPOINTS)))
