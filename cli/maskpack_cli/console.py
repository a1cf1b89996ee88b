"""Output of the command line: results on stdout, everything else on stderr, errors without tracebacks."""

import gc
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from maskpack.errors import ConfigError, MaskpackError, StoppedError, UnknownNameError, as_text, escape
from maskpack.training.progress import FIRST, Lines, Seen

WIDEST = 100_000  # characters of a line where there is no terminal: nothing is folded
notes = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


class Output:
    """How the verb that runs was called: --json, --quiet, and the names of the options that were given."""

    json = False
    quiet = False
    lines = Lines(lambda _: None)
    given: frozenset[str] = frozenset()


@contextmanager
def errors_shown() -> Iterator[None]:
    """Show known errors as a message, and end: code 2 if the command was wrong, 130 for Ctrl-C, else 1.

    A signal that training stopped for ends with 128 and its number. With MASKPACK_DEBUG=1 the traceback is shown.
    """
    debug = bool(os.environ.get("MASKPACK_DEBUG"))
    try:
        yield
    except StoppedError as error:
        note(str(error))
        raise typer.Exit(128 + error.signal) from None
    except BrokenPipeError:
        # the reader of stdout went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except (MaskpackError, OSError) as error:
        if debug:
            raise
        is_path = isinstance(error, OSError) and not isinstance(error, MaskpackError) and error.filename
        complain(f"{error}; give a path that is there or can be made, and that you may use" if is_path else str(error))
        raise typer.Exit(2 if isinstance(error, ConfigError | UnknownNameError) else 1) from None
    except KeyboardInterrupt as error:
        note(". ".join(["Interrupted", *getattr(error, "__notes__", []), ""]).rstrip())
        raise typer.Exit(130) from None
    except Exception as error:
        if hasattr(error, "format_message") and isinstance(getattr(error, "message", None), str):
            error.message = escape(error.message)  # type: ignore[attr-defined]  # typer's error quotes the arguments
        raise


class Verbs(TyperGroup):
    """The verbs of the command line, with the one place where errors are shown."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        Output.json = Output.quiet = False  # several calls in one process
        with errors_shown():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        with errors_shown():
            return super().invoke(ctx)


app = typer.Typer(
    name="maskpack",
    cls=Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main_process() -> bool:
    """Return True in the process that writes and prints, where several train together."""
    return os.environ.get("RANK", "0") == "0"


def complain(text: str) -> None:
    """Print an error to stderr."""
    notes.print(Text.assemble(("Error:", "bold red"), " ", escape(text)))


def warn(text: str) -> None:
    """Print a warning to stderr."""
    if main_process():
        notes.print(escape(f"Warning: {text}"))


def note(text: str) -> None:
    """Print a note to stderr, unless --quiet."""
    if not Output.quiet and main_process():
        notes.print(escape(text))
        if text.endswith("…"):
            Output.lines.begin(text)


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Name an activity in the verb's lines of progress within the context."""
    before = Output.lines.what
    Output.lines.begin(what)
    try:
        yield
    finally:
        Output.lines.begin(before)


def hint(text: str) -> None:
    """Print a note for people to stderr, unless --quiet or --json."""
    if not Output.json:
        note(text)


def say(*lines: object) -> None:
    """Print lines on stdout, unless --json, which prints the result alone."""
    for line in lines if not Output.json else ():
        typer.echo(escape(line))


def emit(result: Mapping[str, Any], title: str | None = None, shown: Mapping[str, Any] | None = None) -> None:
    """Print a result on stdout: under --json all of it, else the title, if there is one, and a line for each scalar.

    Args:
        shown: what has lines, in place of `result`.
    """
    if Output.json:
        typer.echo(json.dumps(result, indent=2, sort_keys=True, default=str))
    elif title is not None:
        say(title)
        lines(result if shown is None else shown)


def lines(values: Mapping[str, Any]) -> None:
    """Print a line for each scalar; nothing under --json."""
    for key, value in values.items():
        if not isinstance(value, Mapping | list | tuple):
            say(f"  {key.replace('_', ' ')}: {as_text(values, key)}")


def table(rows: Sequence[Mapping[str, Any]], columns: Iterable[str], **titles: str) -> None:
    """Print a table on stdout, numbers to the right; nothing under --json.

    In a terminal that is too narrow for names and numbers each row is printed as lines.

    Args:
        columns: keys of the rows. titles: of columns whose key is not the title.
    """
    if Output.json:
        return
    shown, columns = Table(box=None, pad_edge=False, header_style="bold"), list(columns)
    cells = [[escape(as_text(row, column)) for column in columns] for row in rows]
    heads, least = list[str](), 2 * len(columns) - 2
    for i, column in enumerate(columns):
        heads.append(titles.get(column, column.replace("bits_per_weight", "bits/weight").replace("_", " ")))
        numbers = bool(rows) and all(row[column] is None or isinstance(row[column], int | float) for row in rows)
        least += max(map(len, [*escape(heads[i]).split(), *(row[i] for row in cells if numbers or i == 0)]), default=0)
        # an address or a path that does not fit goes on in the next line: cut off it is of no use
        options: Any = {"justify": "right" if numbers else "left", "no_wrap": numbers or i == 0}
        shown.add_column(Text(escape(heads[i])), overflow="fold", **options)
    console = Console(width=None if sys.stdout.isatty() else WIDEST)
    for row in cells:
        shown.add_row(*map(Text, row))
        if least > console.width:
            say(row[0], *(f"  {head}: {text}" for head, text in zip(heads[1:], row[1:], strict=True)))
    if least <= console.width:
        console.print(shown)


def silent() -> bool:
    """Return True if no progress is to be seen."""
    return Output.quiet or Output.json or not sys.stderr.isatty() or not main_process()


def quiet_libraries() -> None:
    """Keep other libraries' progress bars and messages off the terminal."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1" if silent() else "0")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.ERROR)


def seen() -> Seen:
    """Return where progress is seen: in a bar, or in the verb's lines where there is no terminal."""
    return Seen(None if silent() else notes, Output.lines, warn, note)


def progress_bar(what: str, percent: bool = True) -> AbstractContextManager[Callable[..., None]]:
    """Show how much of something is done."""
    return seen().bar(what, percent)


def training_progress() -> AbstractContextManager[Callable[[Mapping[str, Any]], None]]:
    """Show the progress of trainings."""
    return seen().training()


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Show the progress of passes over data."""
    from maskpack.training.data.base import watched

    with progress_bar(what, percent=False) as moved, watched(moved):
        yield


@contextmanager
def importing() -> Iterator[None]:
    """Turn garbage collection off while libraries are imported, which takes a quarter less time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def heard(verb: str) -> Iterator[None]:
    """Print a line now and then with what a verb is doing, where no bar shows it."""
    Output.lines, ended = Lines(note), threading.Event()
    Output.lines.begin(f"{verb} …")

    def listen() -> None:
        while not ended.wait(FIRST / 4):
            Output.lines.look()

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        Output.lines = Lines(lambda _: None)
