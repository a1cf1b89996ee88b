"""Command line, Markdown tables and pages of the benchmarks."""

import argparse
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

NOTHING = "Nothing is finished yet.\n"


def command(
    about: str | None,
    jobs: Mapping[str, Callable[[], object]],
    write: Callable[[Path], None],
    default: Sequence[str] | None = None,
) -> None:
    """Run the command line of a resumable benchmark: named jobs, or the tables of a page from what is recorded.

    Args:
        about: the script's docstring.
        write: writes tables and pictures into a page.
        default: jobs that run if none is named; None: all.
    """
    import torch

    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(default or jobs)}; default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, help="only write tables and pictures of what is recorded into this page")
    given = parser.parse_args()
    if given.write is not None:
        write(given.write)
        return
    if unknown := [name for name in given.names if name not in jobs]:
        parser.error(f"there is no experiment {unknown[0]!r}; known: {', '.join(jobs)}")
    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    torch.set_num_threads(given.threads)
    for name in given.names or default or jobs:
        jobs[name]()


def write_between(path: Path, name: str, text: str) -> None:
    """Replace the text between two markers of a Markdown file, `<!-- begin: NAME -->` and `<!-- end: NAME -->`."""
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise SystemExit(f"{path} lacks the markers {begin} and {end}")
    path.write_text(f"{before}{begin}\n{text}{end}{after}", encoding="utf-8")


def table(columns: Sequence[object], rows: Iterable[Sequence[object]], words: int | None = None) -> str:
    """Return a Markdown table; all columns after the first `words` ones are numbers, set to the right."""
    marks = ["---" if words is None or at < words else "---:" for at in range(len(columns))]
    return "".join(f"| {' | '.join(map(str, cells))} |\n" for cells in (columns, marks, *rows))


def percent(values: Sequence[float], digits: int = 1) -> str:
    """Return the mean of shares in per cent, with the sample deviation if there are several."""
    spread = f" ± {100 * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.{digits}f}{spread}"
