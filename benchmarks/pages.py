"""Tables that benchmarks write into pages of docs/, between two marker lines."""

from pathlib import Path


def write_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between the markers of a Markdown file, `<!-- begin: NAME -->` and `<!-- end: NAME -->`."""
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    before, found, rest = path.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise SystemExit(f"{path} lacks the markers {begin} and {end}")
    path.write_text(f"{before}{begin}\n{text}{end}{after}")
