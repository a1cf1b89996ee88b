"""The tables of the fault benchmark."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.fault_offline import offline_table
from benchmarks.report import table

Row = Mapping[str, Any]

KINDS = ("503", "503 for ever", "429", "drop", "lost", "stall", "close", "reset", "short", "corrupt")
NAMES = {"push": "pushes", "pull": "pulls, `load_mask` and search among them"}
TITLES = {"lfs": "LFS", "xet": "Xet"}


def cell(row: Row) -> str:
    """Return the outcome of a run; in bold if something was wrong."""
    return f"**{row['outcome']}**" if row["wrong"] else str(row["outcome"])


def flow_table(rows: Iterable[Row]) -> str:
    """Return the table of one flow on one transport: requests by kinds of fault."""
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["step"] != "-":
            kind = "stall" if row["kind"] == "silent" else row["kind"]
            found.setdefault(row["step"], {})[kind] = cell(row)
    return table(
        ("request", *KINDS), [(f"`{step}`", *(of.get(kind, "") for kind in KINDS)) for step, of in found.items()]
    )


def summary(rows: Sequence[Row]) -> str:
    """Return one sentence about pushes and one about pulls: number, transports, outcomes."""
    sentences = []
    for what in ("push", "pull"):
        chosen = [row for row in rows if row["flow"].startswith("push") == (what == "push")]
        where = Counter(TITLES[row["transport"]] for row in chosen)
        outcomes = Counter(row["outcome"] for row in chosen).most_common()
        by = ", ".join(f"{count} by {name}" for name, count in where.items())
        counted = ", ".join(f"{count} `{name}`" for name, count in outcomes)
        sentences.append(f"{len(chosen)} runs of {NAMES[what]} ({by}), at most one fault each: {counted}.")
    return " ".join(sentences)


def markdown(rows: list[dict[str, Any]], raced: list[dict[str, Any]], away: list[dict[str, Any]]) -> str:
    """Return all tables and a summary."""
    bad = sum(bool(row["wrong"]) for row in [*rows, *raced, *away])
    parts = [f"{summary(rows)} Runs in which something was wrong: {bad}.\n"]
    for transport, title in TITLES.items():
        for flow in dict.fromkeys(row["flow"] for row in rows):
            chosen = [row for row in rows if (row["transport"], row["flow"]) == (transport, flow)]
            if chosen:
                parts.append(f"**{title}: {flow}**\n\n{flow_table(chosen)}")
    if raced:
        lines = [
            (TITLES[one["transport"]], one["what"], one["outcome"], "; ".join(one["wrong"]) or "no") for one in raced
        ]
        parts.append("**At the same time**\n\n" + table(("transport", "what", "outcome", "anything wrong"), lines))
    if away:
        parts.append(f"**Without a Hub**: seconds to the error\n\n{offline_table(away)}")
    return "\n".join(parts)
