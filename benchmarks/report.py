"""What the codec benchmark prints and draws."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from maskpack.codecs.base import PROFILES

Row = Mapping[str, Any]
MUST = {"default": 0.95, "max": 0.90}  # of the best general compressor, over the trained masks together
GOAL = {"default": 0.88, "max": 0.80}
MUST_DECODE, GOAL_DECODE = 100e6, 500e6  # weights a second, default profile
STRUCTURELESS = (1.02, 1000)  # never over this share of the entropy, plus these bytes
COLOURS = {"best general": "tab:red", "constriction": "black", "fast": "tab:olive", "default": "tab:blue"}
MARKERS = {"best general": "s", "constriction": "|"}


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines) + "\n"


def millions(value: float | None) -> str:
    """Return weights a second in millions: two digits below ten, none behind the point above."""
    if value is None:
        return "-"
    scaled = value / 1e6
    return f"{scaled:,.0f}" if scaled >= 10 else f"{scaled:.2g}"


def case(name: str, row: Row) -> str:
    """Return the tables of one mask set."""
    best, entropy = row["best_general"], row["entropy_bytes"]
    title = (
        f"\n## {name}\n\n{row['kind']}, {row['parameters']} parameters, {row['weights']:,} weights, density "
        f"{row['density']:.4f}; entropy of the tensors {entropy:,.0f} bytes; best general compressor {best['name']} "
        f"({best['how']}) {best['bytes']:,} bytes"
    )
    if row["floor_bytes"]:
        title += f"; what the bits were drawn from has {row['floor_bytes']:,.0f} bytes"
    general = [
        (what, f"{how['stream']:,}", f"{how['each']:,}", f"{8 * min(how.values()) / row['weights']:.4f}",
         f"{min(how.values()) / entropy:.3f}")
        for what, how in row["general"].items()
    ]  # fmt: skip
    made = row["constriction"]
    coded = [
        (
            what,
            f"{one['bytes']:,}",
            f"{one['bytes'] + one['index_bytes']:,} ({one['index_of_allowance']:.2f} of the allowance)",
            f"{one['bits_per_weight']:.4f}",
            f"{one['of_general']:.3f}",
            f"{one['of_entropy']:.3f}",
            millions(one["save_rate"]),
            millions(one["codec_encode_rate"]),
            millions(one["decode_rate"]),
            millions(one["codec_decode_rate"]),
            f"{one['lora_rank']:.3f}",
            ", ".join(f"{codec} {count}" for codec, count in sorted(one["chosen"].items())),
        )
        for what, one in row["coded"].items()
    ]
    coded.append(
        ("constriction", f"{made['bytes']:,}", "-", f"{made['bits_per_weight']:.4f}",
         f"{made['bytes'] / best['bytes']:.3f}", f"{made['of_entropy']:.3f}", "-",
         millions(made["codec_encode_rate"]), "-",
         millions(made["codec_decode_rate"]), f"{made['bytes'] / row['lora_rank_bytes']:.3f}", "-")
    )  # fmt: skip
    refused = "".join(f"\n{what} refused: {why}\n" for what, why in row["refused"].items())
    return "\n".join([
        title,
        "",
        table(("compressor", "bytes, one stream", "bytes, each parameter", "bits per weight", "of entropy"), general),
        table(
            ("profile or codec", "bytes", "with index and digests", "bits per weight", "of best general", "of entropy",
             "save M/s", "encode M/s", "open file decode M/s", "codec decode M/s", "LoRA rank", "chosen"),
            coded,
        ),
        refused,
    ])  # fmt: skip


def summary(measured: Mapping[str, Row]) -> dict[str, Any]:
    """Return the figures that decide: trained masks together, decoding, and the promise for structureless masks."""
    trained = [row for row in measured.values() if row["kind"] == "trained"]
    found: dict[str, Any] = {"trained": {}, "structureless": {}, "trained_masks": len(trained)}
    for profile in PROFILES if trained else ():
        rows = [(one["coded"][profile], one) for one in trained]
        found["trained"][profile] = {
            "sum": sum(own["bytes"] for own, _ in rows) / sum(one["best_general"]["bytes"] for _, one in rows),
            "geometric_mean": math.exp(sum(math.log(own["of_general"]) for own, _ in rows) / len(rows)),
            "worst": max(own["of_general"] for own, _ in rows),
            "decode_rate": sum(one["weights"] for _, one in rows)
            / sum(one["weights"] / own["decode_rate"] for own, one in rows),
            "slowest_decode_rate": min(own["decode_rate"] for own, _ in rows),
        }
    share, extra = STRUCTURELESS
    for name, row in measured.items():
        if row["kind"] == "drawn":
            for bounded in MUST:
                size = row["coded"][bounded]["bytes"]
                found["structureless"].setdefault(bounded, {})[name] = {
                    "of_entropy": size / row["entropy_bytes"],
                    "of_limit": size / (share * row["entropy_bytes"] + extra),
                }
    return found


def verdict(value: float, must: float | None, goal: float | None) -> str:
    """Say which bound a ratio keeps; less is better."""
    if must is None or goal is None:
        return "no bound"
    return "goal" if value <= goal else "must" if value <= must else "MISSED"


def overview(measured: Mapping[str, Row], found: Mapping[str, Any]) -> str:
    """Return the tables over all mask sets."""
    head = ("mask set", "weights", "density", "entropy", "best general", "constriction", *PROFILES,
            "LoRA rank of default", "decode M/s, default")  # fmt: skip
    rows = [
        (name, f"{row['weights']:,}", f"{row['density']:.3f}", f"{8 * row['entropy_bytes'] / row['weights']:.4f}",
         f"{8 * row['best_general']['bytes'] / row['weights']:.4f} ({row['best_general']['name']})",
         f"{row['constriction']['bits_per_weight']:.4f}",
         *(f"{row['coded'][p]['bits_per_weight']:.4f}" for p in PROFILES),
         f"{row['coded']['default']['lora_rank']:.2f}", millions(row["coded"]["default"]["decode_rate"]))
        for name, row in measured.items()
    ]  # fmt: skip
    lines = ["\n## Bits per weight\n", table(head, rows), f"## The {found['trained_masks']} trained masks together\n"]
    ratios = [
        (p, f"{one['sum']:.3f}", f"{one['geometric_mean']:.3f}", f"{one['worst']:.3f}",
         verdict(one["sum"], MUST.get(p), GOAL.get(p)), verdict(one["geometric_mean"], MUST.get(p), GOAL.get(p)),
         millions(one["decode_rate"]), millions(one["slowest_decode_rate"]))
        for p, one in found["trained"].items()
    ]  # fmt: skip
    lines.append(
        table(
            ("profile", "bytes of best general bytes", "geometric mean over adapters", "worst", "bound kept by the sum",
             "by the mean", "decode M/s", "slowest"),
            ratios,
        )
    )  # fmt: skip
    if "default" in found["trained"]:
        reached = found["trained"]["default"]["decode_rate"]
        bound = verdict(-reached, -MUST_DECODE, -GOAL_DECODE)
        lines.append(f"Decoding, default profile: {millions(reached)} M weights/s on one core: {bound}.\n")
    for profile, each in found["structureless"].items():
        for name, one in each.items():
            kept = "kept" if one["of_limit"] <= 1 else "MISSED"
            lines.append(f"{name}, {profile}: {one['of_entropy']:.4f} of the entropy, at most 1.02 + 1 kB: {kept}.")
    return "\n".join(lines)


def plot(measured: Mapping[str, Row], path: Path) -> None:
    """Draw bytes in shares of the entropy, and decode rates, for every mask set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 1.6 + 0.4 * len(measured)), sharey=True)
    colours = {**COLOURS, "max": "tab:green"}
    for place, row in enumerate(measured.values()):
        sizes = {"best general": row["best_general"]["bytes"], "constriction": row["constriction"]["bytes"]}
        sizes.update({profile: row["coded"][profile]["bytes"] for profile in PROFILES})
        rates = {"constriction": row["constriction"]["codec_decode_rate"]}
        rates.update({profile: row["coded"][profile]["decode_rate"] for profile in PROFILES})
        for axis, values, unit in ((left, sizes, row["entropy_bytes"]), (right, rates, 1e6)):
            axis.axhline(place, color="0.92", zorder=0)
            for what, value in values.items():
                # the ring of "max" leaves a dot of "default" in the same place to be seen
                fill = (
                    {"facecolors": "none", "edgecolors": colours[what]} if what == "max" else {"color": colours[what]}
                )
                size = 90 if what == "max" else 36
                axis.scatter(value / unit, place, marker=MARKERS.get(what, "o"), s=size, label=what, zorder=2, **fill)
    left.set_yticks(range(len(measured)), [f"{name} ({row['density']:.3f})" for name, row in measured.items()])
    left.invert_yaxis()
    left.axvline(1, color="0.5", linewidth=0.8, linestyle=":")
    left.set_xlabel("bytes of the masks / entropy of the tensors' densities")
    right.set_xscale("log")
    right.axvline(MUST_DECODE / 1e6, color="0.5", linewidth=0.8, linestyle=":")
    right.set_xlabel("decoding, million weights a second, one core (dotted: 100)")
    left.set_title("mask set (density)", loc="left", fontsize=9)
    handles, labels = left.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="upper center", ncols=len(unique), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
