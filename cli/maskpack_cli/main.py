"""maskpack: the command line. Verbs only: parse, call the public API, print."""

from importlib.metadata import version
from typing import Annotated

import typer

from . import (
    adapters,
    algebra,
    analyze,
    cascade,
    compare,
    demo,
    distribute,
    evaluate,
    multitask,
    packing,
    plot,
    search,
    training,
    transfer,
    use,
)

app = typer.Typer(
    name="maskpack",
    help="Binary weight masks on frozen PyTorch backbones: train, pack, push, pull, apply, undo.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(shown: bool) -> None:
    if shown:
        typer.echo(f"maskpack {version('maskpack')}")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Binary weight masks on frozen PyTorch backbones: train, pack, push, pull, apply, undo."""


for verbs in (
    training,
    cascade,
    transfer,
    multitask,
    packing,
    algebra,
    adapters,
    evaluate,
    compare,
    analyze,
    use,
    plot,
    distribute,
    search,
    demo,
):
    verbs.register(app)


def main() -> None:
    """Run the command line."""
    try:
        app()
    except KeyboardInterrupt:  # before a verb began
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
