"""maskpack: the command line. Verbs only: parse, call the public API, print."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

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
from .console import say


@contextmanager
def _escaped() -> Iterator[None]:
    """Escape what errors of usage quote of the arguments."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "format_message") and isinstance(getattr(error, "message", None), str):
            from maskpack.errors import escape

            error.message = escape(error.message)  # type: ignore[attr-defined]
        raise


class _Verbs(TyperGroup):
    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with _escaped():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        with _escaped():
            return super().invoke(ctx)


app = typer.Typer(
    name="maskpack",
    cls=_Verbs,
    help="Binary weight masks on frozen PyTorch backbones: train, pack, push, pull, apply, undo.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what the terminal's encoding lacks is shown as its number
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except KeyboardInterrupt:  # before a verb began
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
