"""maskpack: the command line. Verbs only: parse, call the public API, print."""

import gc
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from . import train, adapters, use, hub, lab, demo  # noqa: F401  # isort: skip (in the order of the help)
from .console import app, say


def _version(shown: bool) -> None:
    if shown:
        say(f"maskpack {version('maskpack')}")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Binary weight masks on frozen PyTorch backbones: train, pack, push, pull, apply, undo."""


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what the terminal's encoding lacks is shown as its number
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except KeyboardInterrupt:  # before a verb began
        raise SystemExit(130) from None
    finally:
        gc.freeze()  # at the exit too it is a long search


if __name__ == "__main__":
    main()
