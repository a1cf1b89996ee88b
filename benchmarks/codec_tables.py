"""The tables of docs/results.md about codecs, from what `benchmarks.codecs` measured."""

from collections.abc import Mapping
from typing import Any

from maskpack.codecs.base import CODECS, PROFILES

from .report import GOAL, MUST, Row, millions, table

EACH_CODEC = ("sketch-1", "banking77-1", "drawn-DTD", "vit-b16-made")  # one mask set of each kind


def markdown(measured: Mapping[str, Row], found: Mapping[str, Any]) -> str:
    """Return every table: bits per weight, bytes, the trained masks together, each codec alone."""
    return "\n".join([_bits(measured), _bytes(measured), _together(found), _codecs(measured)])


def _bits(measured: Mapping[str, Row]) -> str:
    head = ("mask set", "weights", "density", "entropy", "best general", "constriction",
            *(f"`{p}`" for p in PROFILES), "`default` / best general", "`max` / best general", "LoRA rank",
            "decode, M weights/s: `fast`, `default`, `max`")  # fmt: skip
    return table(head, [
        (name, f"{row['weights']:,}", f"{row['density']:.3f}", f"{8 * row['entropy_bytes'] / row['weights']:.4f}",
         f"{8 * row['best_general']['bytes'] / row['weights']:.4f} ({row['best_general']['name']})",
         f"{row['constriction']['bits_per_weight']:.4f}",
         *(f"{row['coded'][p]['bits_per_weight']:.4f}" for p in PROFILES),
         *(f"{row['coded'][p]['of_general']:.3f}" for p in ("default", "max")),
         f"{row['coded']['default']['lora_rank']:.2f}",
         "; ".join(millions(row["coded"][p]["decode_rate"]) for p in PROFILES))
        for name, row in measured.items()
    ])  # fmt: skip


def _bytes(measured: Mapping[str, Row]) -> str:
    head = ("mask set", *(f"`{p}` bytes; with index and digests" for p in PROFILES), "index of allowance",
            "bytes / entropy: `default`; `max`", "packing, M weights/s: `fast`; `default`; `max`")  # fmt: skip
    return table(head, [
        (name,
         *(f"{row['coded'][p]['bytes']:,}; {row['coded'][p]['bytes'] + row['coded'][p]['index_bytes']:,}"
           for p in PROFILES),
         f"{row['coded']['default']['index_of_allowance']:.2f}",
         "; ".join(f"{row['coded'][p]['of_entropy']:.3f}" for p in ("default", "max")),
         "; ".join(millions(row["coded"][p]["save_rate"]) for p in PROFILES))
        for name, row in measured.items()
    ])  # fmt: skip


def _together(found: Mapping[str, Any]) -> str:
    together = found["trained"]
    if not together:
        return ""

    def line(what: str, key: str, bounds: tuple[str, str] = ("", "")) -> tuple[str, ...]:
        return (what, *(f"{together[p][key]:.4f}" for p in PROFILES), *bounds)

    must, goal = (", ".join(f"≤ {bound[p]:.2f}" for p in ("default", "max")) for bound in (MUST, GOAL))
    rows = [
        line("bytes / bytes of the best general compressors, sums", "sum", (must, goal)),
        line("the same, geometric mean over the masks", "geometric_mean"),
        line("the worst", "worst"),
        ("decoding, M weights/s, all weights / all time", *(millions(together[p]["decode_rate"]) for p in PROFILES),
         "≥ 100 (`default`)", "≥ 500"),
        ("the slowest", *(millions(together[p]["slowest_decode_rate"]) for p in PROFILES), "", ""),
    ]  # fmt: skip
    head = (f"over the {found['trained_masks']} trained masks", *(f"`{p}`" for p in PROFILES),
            "must (`default`, `max`)", "goal")  # fmt: skip
    return table(head, rows)


def _codecs(measured: Mapping[str, Row]) -> str:
    shown = [name for name in EACH_CODEC if name in measured]

    def cell(row: Row, codec: str) -> str:
        one = row["coded"].get(codec)
        if one is None:
            return "-"
        return f"{one['of_general']:.3f}; {millions(one['codec_encode_rate'])}, {millions(one['codec_decode_rate'])}"

    def reference(row: Row) -> str:
        made = row["constriction"]
        rates = f"{millions(made['codec_encode_rate'])}, {millions(made['codec_decode_rate'])}"
        return f"{made['bytes'] / row['best_general']['bytes']:.3f}; {rates}"

    rows = [(f"`{cls.id}`", *(cell(measured[name], cls.id) for name in shown)) for cls in CODECS.all()]
    rows.append(("constriction", *(reference(measured[name]) for name in shown)))
    return table(("codec alone: bytes / best general; encode, decode, M weights/s", *shown), rows)
