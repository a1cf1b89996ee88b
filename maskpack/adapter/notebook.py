"""What a notebook shows of an adapter or a training, and the pieces of reports: HTML in which every text is escaped."""

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import escape
from .card import MOST_CLASSES, accuracies, data_of, lora_sizes, member, metrics, warnings_of, without_paths

Row = tuple[str, float, str]  # name, share of the longest bar, figure
# colours of the page itself are the viewer's, light or dark; bars are told apart from both
STYLE = """
.maskpack { font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
.maskpack h1 { font-size: 1.6em; line-height: 1.2; margin: 0 0 .3em; }
.maskpack h2 { font-size: 1.2em; margin: 2em 0 .5em; border-bottom: 1px solid #8886; }
.maskpack table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.maskpack th, .maskpack td { padding: .1em .8em .1em 0; text-align: left; vertical-align: top; }
.maskpack th { font-weight: 600; min-width: 6em; }
.maskpack caption { text-align: left; color: inherit; opacity: .7; padding: .4em 0 0; }
.maskpack td.n { text-align: right; white-space: nowrap; }
.maskpack .bar { width: 14em; max-width: 22vw; padding-top: .45em; }
.maskpack .bar i { display: block; height: .8em; min-width: 1px; background: #3d7fc1; border-radius: 2px; }
.maskpack .bar i.own { background: #d9731a; }
@media (max-width: 34em) {
  .maskpack .bars, .maskpack .bars caption, .maskpack .bars tbody { display: block; }
  .maskpack .bars tr { display: grid; grid-template-columns: 2fr 3fr; padding-bottom: .3em; }
  .maskpack .bars th { grid-column: 1 / -1; }
  .maskpack .bars td.n { white-space: normal; }
  .maskpack .bars .bar { width: auto; max-width: none; }
}
.maskpack .warn { border-left: 4px solid #d9731a; padding-left: .8em; }
.maskpack code, .maskpack pre { font: .9em/1.45 ui-monospace, monospace; }
"""


def shown(text: object) -> str:
    """Return text from anywhere as HTML that shows it and has no other effect, also as the value of an attribute."""
    return html.escape(escape(text))


def facts(rows: Iterable[tuple[str, object]]) -> str:
    """Return a table of names and values."""
    lines = (f"<tr><th>{shown(name)}</th><td>{shown(value)}</td></tr>" for name, value in rows)
    return f"<table>{''.join(lines)}</table>"


def bars(rows: Iterable[Row], own: Sequence[str] = (), title: str = "") -> str:
    """Return a table with a bar in each row, perhaps under a title; those named `own` have the other colour."""
    lines = []
    for name, share, figure in rows:
        kind = ' class="own"' if name in own else ""
        bar = f'<div class="bar"><i{kind} style="width:{100 * min(max(share, 0.0), 1.0):.1f}%"></i></div>'
        label = shown(name).replace(".", ".<wbr>")  # where a long name may go on in the next line
        lines.append(f'<tr><th>{label}</th><td>{bar}</td><td class="n">{shown(figure)}</td></tr>')
    caption = f"<caption>{shown(title)}</caption>" if title else ""
    return f'<table class="bars">{caption}{"".join(lines)}</table>'


def of_greatest(values: Mapping[str, float]) -> list[Row]:
    """Return rows for `bars` of counts, the greatest with the longest bar."""
    most = max(values.values(), default=0) or 1
    return [(name, value / most, f"{value:,}") for name, value in values.items()]


def accuracy_bars(record: Any) -> str:
    """Return bars of what the adapter is worth beside a probe of the raw backbone and without its masks; or nothing."""
    found = accuracies(metrics(record))
    if found is None:
        return ""
    rows = [(name, one, f"{100 * one:.2f} %") for name, one in found[1].items()]
    return bars(rows, ["this adapter"], f"accuracy on the {found[0]} split")


def byte_bars(record: Any, mask_bytes: int | None, size: int | None) -> str:
    """Return bars of the bytes of masks and file beside those of LoRA for the same weights."""
    own = {"masks": mask_bytes, "whole file": size}
    lora = {f"LoRA, rank {rank}, 4 bits": size for rank, size in sorted((lora_sizes(record) or {}).items())}
    known = {name: one for name, one in {**own, **lora}.items() if one is not None}
    return bars(of_greatest(known), list(own), "bytes") if known else ""


def overview(base: Mapping[str, Any], about: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Yield what was trained on what: names and values, from a described base and what an adapter says."""
    record, classes = about["training"] or {}, about["class_names"] or ()
    yield "base", f"{base['id']}{' at ' + base['revision'] if base['revision'] else ''}, {base['dtype']}"
    if about["task"] is not None:
        yield "task", about["task"]
    if (name := data_of(record)[0]) is not None:
        rows = without_paths(member(member(record, "data"), "rows"))
        counts = [f"{key} {count:,}" for key, count in rows.items() if type(count) is int]
        yield "data", ", ".join([name, *counts])
    if classes:
        more = f", … ({len(classes):,} in all)" if len(classes) > MOST_CLASSES else ""
        yield "classes", ", ".join(classes[:MOST_CLASSES]) + more
    settings = member(record, "settings")
    how = [str(settings[key]) for key in ("method", "objective") if isinstance(settings.get(key), str)]
    steps = record.get("steps")
    how += [f"{steps:,} steps"] if type(steps) is int else []
    if how:
        yield "training", without_paths(", ".join(how))


def summary(
    title: str,
    base: Mapping[str, Any],
    about: Mapping[str, Any],
    sets: Mapping[str, tuple[int, int]],
    mask_bytes: int | None = None,
    size: int | None = None,
) -> str:
    """Return the short form for a notebook.

    Args:
        base, about: as `overview` takes them. sets: weights and kept weights, by the name of the mask set.
        mask_bytes, size: of masks and whole file, if there is one.
    """
    record = about["training"] or {}
    rows = [*overview(base, about)]
    for name, (weights, kept) in list(sets.items())[:MOST_CLASSES]:
        label = "masks" if len(sets) == 1 else f"masks {name}"
        rows.append((label, f"{kept:,} of {weights:,} weights kept, density {kept / weights if weights else 1.0:.4f}"))
    parts = [f"<b>{shown(title)}</b>", facts(rows), accuracy_bars(record), byte_bars(record, mask_bytes, size)]
    parts += [f'<p class="warn">Training warned: {shown(one)}.</p>' for one in warnings_of(record)]
    return f'<style>{STYLE}</style><div class="maskpack">{"".join(parts)}</div>'
