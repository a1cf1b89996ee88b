"""What people see: results on stdout, everything else on stderr, errors without tracebacks."""

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, ParamSpec

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

P = ParamSpec("P")
notes = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the result only: no notes, no progress.")]
Token = Annotated[str | None, typer.Option(help="Hub token; better: `hf auth login` or the variable HF_TOKEN.")]


def command(function: Callable[P, None]) -> Callable[P, None]:
    """The one error boundary: known errors end with a message and exit code 1, wrong settings with 2, Ctrl-C with 130.

    A signal that training stopped for, with the message, ends with 128 and its number.

    With MASKPACK_DEBUG=1 the traceback is shown.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            from maskpack.errors import ConfigError, MaskpackError, StoppedError, UnknownNameError

            try:
                function(*args, **kwargs)
            except StoppedError as error:
                note(str(error))
                raise typer.Exit(128 + error.signal) from None
            except MaskpackError as error:
                if os.environ.get("MASKPACK_DEBUG"):
                    raise
                complain(str(error))
                raise typer.Exit(2 if isinstance(error, ConfigError | UnknownNameError) else 1) from None
            except OSError as error:
                # a path that cannot be read or written
                if os.environ.get("MASKPACK_DEBUG") or isinstance(error, BrokenPipeError):
                    raise
                remedy = "; give a path that is there or can be made, and that you may use" if error.filename else ""
                complain(f"{error}{remedy}")
                raise typer.Exit(1) from None
        except KeyboardInterrupt as error:
            note(". ".join(["Interrupted", *getattr(error, "__notes__", []), ""]).rstrip())
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # the reader of stdout went away, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None

    return run


def complain(text: str) -> None:
    """Print an error to stderr."""
    from maskpack.errors import escape

    notes.print(Text.assemble(("Error:", "bold red"), " ", escape(text)))


def main_process() -> bool:
    """Tell whether this is the process that writes and prints, where several train together."""
    return os.environ.get("RANK", "0") == "0"


def note(text: str, quiet: bool = False) -> None:
    """Print a note to stderr."""
    from maskpack.errors import escape

    if not quiet and main_process():
        notes.print(escape(text))


def say(*lines: object) -> None:
    """Print lines on stdout."""
    from maskpack.errors import escape

    for line in lines:
        typer.echo(escape(line))


def quiet_libraries(quiet: bool) -> None:
    """Keep other libraries' progress bars and chatter off the terminal; ours say what matters."""
    import logging

    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1" if quiet or not sys.stderr.isatty() else "0")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.ERROR)


@contextmanager
def progress_bar(what: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Give a function of (done, in all) that moves a bar on stderr; there is none if quiet or not on a terminal."""
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
    off = quiet or not sys.stderr.isatty()
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=notes, disable=off) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def emit(result: Mapping[str, Any], as_json: bool, title: str | None = None) -> None:
    """Print a result on stdout: as JSON, or its scalar values as lines `key: value`."""
    if as_json:
        typer.echo(json.dumps(result, indent=2, sort_keys=True, default=str))
        return
    if title:
        say(title)
    for key, value in result.items():
        if not isinstance(value, Mapping | list | tuple):
            say(f"  {key.replace('_', ' ')}: {readable(value)}")


def readable(value: Any) -> str:
    """Return a value as people read it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, int):
        return f"{value:,}"
    return "-" if value is None else str(value)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table on stdout; numbers to the right."""
    from maskpack.errors import escape

    shown = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        numbers = all(isinstance(row[i], int | float) or row[i] is None for row in rows)
        justify: Literal["left", "right"] = "right" if numbers and rows else "left"
        # an address or a path that does not fit goes on in the next line: cut off it is of no use
        shown.add_column(Text(escape(column)), justify=justify, no_wrap=not numbers and i == 0, overflow="fold")
    for row in rows:
        shown.add_row(*(Text(escape(readable(value))) for value in row))
    Console(width=None if sys.stdout.isatty() else 160).print(shown)


def examples(*lines: str) -> str:
    """Return the epilog of a command's help."""
    return "Examples:\n\n" + "\n\n".join(f"  {line}" for line in lines)
