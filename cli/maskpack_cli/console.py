"""What people see: results on stdout, everything else on stderr, errors without tracebacks."""

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from maskpack.errors import ConfigError, MaskpackError, StoppedError, UnknownNameError, escape

notes = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
TRAINING = (
    *("loss", "train_loss", "density", "mask_bytes", "validation_accuracy", "validation_perplexity"),
    *("bits_per_changed_weight", "validation_r2", "divergence", "agreement"),
    *("prototype_usage", "feature_rank"),
)  # values of an event that are shown, the most important first


ACCURACIES = {"accuracy", "probe", "knn", "k-NN", "head"}  # words of the names of accuracies
FIGURES = ("accuracy", "r2", "perplexity")  # by which trials of a search are compared


class Output:
    """How the verb that runs was called: --json, --quiet, and the names of the options that were given."""

    json = False
    quiet = False
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
            say(f"  {key.replace('_', ' ')}: {readable(value, key)}")


def readable(value: Any, key: str = "") -> str:
    """Return a value as people read it; an accuracy, which the words of its key tell, in per cent."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{100 * value:.2f} %" if ACCURACIES & set(re.split(r"[ _(]", key)) else f"{value:.4f}"
    if isinstance(value, int):
        return f"{value:,}"
    return "-" if value is None else str(value)


def table(rows: Sequence[Mapping[str, Any]], columns: Iterable[str], **titles: str) -> None:
    """Print a table on stdout, numbers to the right; nothing under --json.

    Args:
        columns: keys of the rows. titles: of columns whose key is not the title.
    """
    if Output.json:
        return
    shown, columns = Table(box=None, pad_edge=False, header_style="bold"), list(columns)
    for i, column in enumerate(columns):
        title = titles.get(column, column.replace("bits_per_weight", "bits/weight").replace("_", " "))
        numbers = bool(rows) and all(row[column] is None or isinstance(row[column], int | float) for row in rows)
        # an address or a path that does not fit goes on in the next line: cut off it is of no use
        options: Any = {"justify": "right" if numbers else "left", "no_wrap": not numbers and i == 0}
        shown.add_column(Text(escape(title)), overflow="fold", **options)
    for row in rows:
        shown.add_row(*(Text(escape(readable(row[column], column))) for column in columns))
    Console(width=None if sys.stdout.isatty() else 160).print(shown)


def silent() -> bool:
    """Return True if no progress is to be seen."""
    return Output.quiet or Output.json or not sys.stderr.isatty()


def quiet_libraries() -> None:
    """Keep other libraries' progress bars and messages off the terminal."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1" if silent() else "0")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.ERROR)


@contextmanager
def progress_bar(what: str, percent: bool = True) -> Iterator[Callable[..., None]]:
    """Show a bar on stderr, if it is a terminal; give a function of (done, in all, and perhaps another text)."""
    from rich import progress

    many = progress.TaskProgressColumn() if percent else progress.TextColumn("{task.completed}/{task.total}")
    columns = (progress.TextColumn("{task.description}", markup=False), progress.BarColumn(), many)
    times = (progress.TimeElapsedColumn(), progress.TimeRemainingColumn())
    with progress.Progress(*columns, *times, console=notes, disable=silent()) as bar:
        task = bar.add_task(what, total=None)

        def moved(done: int, total: int | None, what: str | None = None) -> None:
            bar.update(task, completed=done, total=total, description=None if what is None else escape(what))

        yield moved


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Show the progress of passes over data."""
    from maskpack.training.data.base import watched

    with progress_bar(what, percent=False) as moved, watched(moved):
        yield


@contextmanager
def training_progress() -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Show the progress of trainings; give what they report to."""
    from maskpack.training.data.base import watched

    bar = progress_bar("training", percent=False)
    with bar as moved, watched(lambda done, total: moved(done, total, "evaluating, batches")):

        def report(event: Mapping[str, Any]) -> None:
            part = f"{event['part']}: " if "part" in event else ""
            words = [f"{key.replace('_', ' ')} {readable(event[key], key)}" for key in TRAINING if key in event]
            match event["event"]:
                case "warning":
                    warn(f"{part}{event['warning']}")
                case "resumed":
                    note(f"{part}{event['resumed']}")
                case "trial":
                    name = next(one for one in FIGURES if one in event)
                    note(f"{part}{name} {readable(event[name], name)}")
                case "end":
                    pass
                case kind:
                    if kind == "epoch" and sys.stderr.isatty():
                        hint(f"{part}epoch {event['epoch']}: {', '.join(words)}")
                    moved(event["step"], event["steps"], part + " ".join(words[:2]))

        yield report
