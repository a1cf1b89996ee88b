"""Report of an adapter: one HTML file that needs nothing else, and in which no text of the adapter is markup."""

import base64
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter.card import MOST_SETS, metrics, usage, warnings_of, without_paths
from ..adapter.describe import inspect_adapter
from ..adapter.notebook import STYLE, accuracy_bars, bars, byte_bars, facts, of_greatest, overview, shown
from ..adapter.read import MODEL_FILE, Adapter
from ..backbone.load import Backbone
from ..errors import ConfigError, DataError, as_text
from ..runtime.apply import unload_mask
from ..runtime.load import load_mask
from ..training.data.base import Data
from ..training.evaluate import adapter_logits
from ..training.features import by_class
from .figure import in_order

PAGE = """
:root { color-scheme: light dark; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; }
.wide { overflow-x: auto; }
.curves, .examples { display: flex; flex-wrap: wrap; gap: 1em; }
figure { margin: 0; width: 9em; }
figure.curve { width: 18em; }
figcaption { font-size: .85em; line-height: 1.3; }
figure img { width: 9em; height: 9em; object-fit: contain; image-rendering: auto; background: #8882; }
figure blockquote { margin: 0; height: 9em; overflow: hidden; background: #8882; padding: .3em; font-size: .85em; }
figure.wrong figcaption { border-top: 3px solid #d9731a; }
figure.right figcaption { border-top: 3px solid #3d7fc1; }
svg { width: 100%; display: block; }
polyline { fill: none; stroke: #3d7fc1; stroke-width: 1.5; vector-effect: non-scaling-stroke; }
.maskpack .confusion { overflow-wrap: normal; }
.maskpack .confusion td, .maskpack .confusion th { padding: .1em .45em; text-align: right; min-width: 0; }
pre { overflow-x: auto; background: #8882; padding: .8em; }
"""
# neither scripts nor requests, whatever a text might smuggle in
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
MOST_LAYERS = 400
MOST_CONFUSED = 12  # classes whose confusion is a matrix; of more the commonest errors are listed
LISTED = 20
MOST_EVENTS, MOST_LOG = 100_000, 64 << 20  # lines, bytes of a log
MOST_POINTS = 300  # of a curve
PIXELS = 144  # of the longer side of an example
LETTERS = 240  # of a text
CURVES = ("loss", "density", "mask_bytes", "lr", "train_loss", "validation_accuracy", "divergence", "agreement")
Points = list[tuple[float, float]]  # step, value


def adapter_report(
    adapter: Adapter,
    *,
    backbone: Backbone | None = None,
    data: Data | None = None,
    examples: int = 24,
    signature: Mapping[str, Any] | None = None,
    batch_size: int = 64,
) -> str:
    """Return the report of an adapter as the text of an HTML file.

    Args:
        backbone: its base. Masks that are packed with the base's weights are decoded, and with `data` the test split is
            measured; afterwards it is as before.
        data: from `load_data(…, class_names=adapter.about.class_names)`.
        examples: how many of the test split are shown with their predictions, a third of them errors if there are any.
        signature: what `describe_signature` gives.

    Raises:
        CorruptAdapterError: if a mask does not decode to what the file states.
        ConfigError, DataError, AdapterError: if the adapter cannot be measured on the data.

    Example:
        page = adapter_report(load_adapter("./my-mask"))
        Path("my-mask.html").write_text(page, encoding="utf-8")
    """
    if data is not None and backbone is None:
        raise ConfigError("the adapter is measured on data by its backbone, and none is given; give it beside the data")
    found = inspect_adapter(adapter)
    checked = adapter.verify(base=None if backbone is None else backbone.model)
    tested = "" if data is None or backbone is None else _tested(adapter, backbone, data, examples, batch_size)
    title, facts_checked = shown(_reference(adapter)), {**checked, "signature": signature}
    body = "".join(_sections(adapter, found, facts_checked, tested))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{title}</title><style>{STYLE}{PAGE}</style></head>\n<body class="maskpack">{body}</body></html>\n'
    )


def _reference(adapter: Adapter) -> str:
    """Return the name of an adapter: of a local one without the folders that it lies in."""
    if not Path(adapter.pinned).exists():
        return adapter.pinned
    path = Path(adapter.path)
    return f"./{path.resolve().parent.name if path.name == MODEL_FILE else path.name}"


def _sections(adapter: Adapter, found: Mapping[str, Any], checked: Mapping[str, Any], tested: str) -> Iterator[str]:
    """Yield the parts of the page."""
    record, sets = found["training"] or {}, found["sets"]
    masks = sum(one["payload_bytes"] for one in sets.values())
    weights = f"{found['weights']:,} weights in {sum(one['parameters'] for one in sets.values()):,} parameters"
    smaller = f"{found['times_smaller_than_float32']:.1f} times fewer than these weights in float32"
    yield f"<h1>{shown(_reference(adapter))}</h1><p>Binary weight masks for {shown(found['base']['id'])}: {weights}. "
    yield f"The file has {found['size']:,} bytes, {smaller}.</p>\n"
    yield facts(overview(found["base"], found))
    yield "".join(f'<p class="warn">Training warned: {shown(one)}.</p>' for one in warnings_of(record))
    if accuracies := accuracy_bars(record):
        yield f"<h2>Accuracy at the end of training</h2>{accuracies}\n"
    if results := metrics(record):
        lines = facts((key, as_text(results, key)) for key in results)
        yield f"<details><summary>all results of the training record</summary>{lines}</details>\n"
    yield f"<h2>Bytes, beside LoRA for the same weights</h2>{byte_bars(record, masks, found['size'])}\n"
    yield f"<h2>Bytes of the file, by part</h2>{bars(of_greatest(found['bytes']))}\n"
    if curves := "".join(_curve(name, one) for name, one in _logged(Path(adapter.path)).items()):
        yield f'<h2>Training</h2><div class="curves">{curves}</div>\n'
    for name, one in list(sets.items())[:MOST_SETS]:
        yield f"<h2>Density by layer{f', mask set {shown(name)}' if len(sets) > 1 else ''}</h2>{_layers(one)}\n"
    if len(sets) > MOST_SETS:
        yield f"<p>… and {len(sets) - MOST_SETS:,} more mask sets.</p>\n"
    yield tested
    yield f"<h2>Verification</h2>{facts(_verified(adapter, found, checked))}\n"
    code = usage(found["base"], _reference(adapter), found["cascade"] is not None, bool(found["class_names"]))
    yield f"<h2>Load it</h2><pre>{shown_lines(code)}</pre>\n"
    if record:
        text = json.dumps(without_paths(record), indent=2, sort_keys=True)
        yield f"<details><summary>training record</summary><pre>{shown_lines(text)}</pre></details>\n"


def shown_lines(text: str) -> str:
    """Return several lines as HTML that shows them."""
    return "\n".join(shown(line) for line in text.split("\n"))


def _layers(one: Mapping[str, Any]) -> str:
    rows = {row["name"]: row for row in one["payloads"]}  # of a ternary mask the zeros, which come last
    kept = f"{one['kept']:,} of {one['weights']:,} weights are kept, density {one['density']:.4f}."
    ordered = (rows[name] for name in islice(in_order(rows), MOST_LAYERS))
    lines = [
        (row["name"], row["density"], f"{row['density']:.4f} · {row['bytes']:,} bytes · {row['codec']}")
        for row in ordered
    ]
    more = f"<p>… and {len(rows) - MOST_LAYERS:,} more.</p>" if len(rows) > MOST_LAYERS else ""
    return f'<p>{kept}</p><div class="wide">{bars(lines)}</div>{more}'


def _verified(adapter: Adapter, found: Mapping[str, Any], checked: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    yield "file digest (BLAKE3)", f"{found['blake3']}, its bytes agree with what the file states"
    left = len(checked["needs_base"])
    agrees = "all masks were decoded and agree with it" if checked["mask_id"] else f"{left:,} masks need the base"
    yield "mask_id", f"{found['mask_id']}: {agrees}"
    for dtype, digest in found["base"]["digests"].items():
        yield f"base digest, {dtype}", digest
    signature = checked["signature"]
    keys = "not signed, or no trusted key was given" if signature is None else ", ".join(map(str, signature["keys"]))
    yield "signature", keys
    yield "made by", found["producer"]


def _logged(model_file: Path) -> dict[str, Points]:
    """Return the curves of the run that wrote an adapter, if its log lies beside it: `training/log.jsonl`."""
    log = model_file.parent / "training" / "log.jsonl"
    if model_file.name != MODEL_FILE or not log.is_file() or log.stat().st_size > MOST_LOG:
        return {}
    found: dict[str, dict[float, float]] = {}
    with log.open(encoding="utf-8", errors="replace") as file:
        for line in islice(file, MOST_EVENTS):
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                continue
            numbers = {k: v for k, v in event.items() if _is_number(v)} if isinstance(event, dict) else {}
            for name in CURVES:
                if name in numbers and "step" in numbers:  # a step that was made again counts as it was last
                    found.setdefault(name, {})[numbers["step"]] = numbers[name]
    return {name: sorted(found[name].items()) for name in CURVES if len(found.get(name, ())) > 1}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _curve(name: str, points: Points) -> str:
    """Return a curve as SVG, with the first and last value and step in its caption."""
    thinned = points[:: math.ceil(len(points) / MOST_POINTS)] + points[-1:]
    (first, *_, last), values = [x for x, _ in thinned], [y for _, y in thinned]
    low, high = min(values), max(values)
    across, up = last - first or 1, high - low or 1
    drawn = " ".join(f"{300 * (x - first) / across:.1f},{95 - 90 * (y - low) / up:.1f}" for x, y in thinned)
    start, end, least, most = (as_text({name: value}, name) for value in (values[0], values[-1], low, high))
    caption = f"{name.replace('_', ' ')}: {start} at step {first:g}, {end} at step {last:g}"
    label = shown(f"{caption}, between {least} and {most}")
    svg = f'<svg viewBox="0 0 300 100" preserveAspectRatio="none" height="100" role="img" aria-label="{label}">'
    line = f'{svg}<polyline points="{drawn}"/></svg>'
    return f'<figure class="curve">{line}<figcaption>{shown(caption)}</figcaption></figure>'


def _tested(adapter: Adapter, backbone: Backbone, data: Data, examples: int, batch_size: int) -> str:
    """Return accuracy, confusion and examples of the test split."""
    if data.test is None:
        raise DataError(f"the data {data.id!r} have no test split, so that nothing can be measured; leave them out")
    with ExitStack() as stack:
        if adapter.cascade is None:  # which puts its masks on itself
            load_mask(backbone.model, adapter)
            stack.callback(unload_mask, backbone.model)
        logits, y = adapter_logits(backbone, adapter, data.test, batch_size)
    names = list(data.class_names) or [str(i) for i in range(logits.shape[1])]
    found = by_class(logits, y)
    counts = [sum(row) for row in found["confusion"]]
    right = sum(row[i] for i, row in enumerate(found["confusion"]))
    each = [
        (name, one or 0.0, f"{'-' if one is None else f'{100 * one:.2f} %'} of {count:,}")
        for name, one, count in zip(names, found["per_class"], counts, strict=True)
    ]
    summed = f"{right:,} of {len(y):,} are right: {100 * found['accuracy']:.2f} %."
    parts = [
        f"<h2>Test split of {shown(data.id)}</h2><p>{summed}</p>",
        f'<div class="wide">{bars(each)}</div>',
        f"<h3>What is taken for what</h3>{_confusion(found['confusion'], names)}",
    ]
    if chosen := _chosen(logits, y, examples):
        read = [place for place, row in enumerate(data.test.indices) if row not in data.test.unreadable]
        shares, best = logits.softmax(1).max(1)
        figures = (_example(data.test[read[i]], names, int(best[i]), float(shares[i])) for i in chosen)
        parts.append(f'<h3>Examples</h3><div class="examples">{"".join(figures)}</div>\n')
    return "".join(parts)


def _confusion(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Return a table of counts, of many classes of the commonest errors."""
    if len(names) > MOST_CONFUSED:
        errors = {(i, j): n for i, row in enumerate(counts) for j, n in enumerate(row) if n and i != j}
        common = sorted(errors.items(), key=lambda one: -one[1])[:LISTED]
        listed = {f"{names[i]} → {names[j]}": n for (i, j), n in common}
        return f'<p>Class → prediction, the commonest errors:</p><div class="wide">{bars(of_greatest(listed))}</div>'
    head = "".join(f"<th>{shown(name)}</th>" for name in names)
    lines = []
    for name, row in zip(names, counts, strict=True):
        cells = (f'<td style="background:rgba(61,127,193,{n / (sum(row) or 1):.2f})">{n or ""}</td>' for n in row)
        lines.append(f"<tr><th>{shown(name)}</th>{''.join(cells)}</tr>")
    table = f'<table class="confusion"><tr><th>class \\ prediction</th>{head}</tr>{"".join(lines)}</table>'
    return f'<div class="wide">{table}</div>'


def _chosen(logits: Tensor, y: Tensor, count: int) -> list[int]:
    """Return places of examples: a third of them errors, if there are so many, the others right, spread evenly."""
    correct = logits.argmax(1) == y
    wrong, right = (~correct).nonzero()[:, 0].tolist(), correct.nonzero()[:, 0].tolist()
    errors = min(len(wrong), count // 3)
    return [*_spread(wrong, errors), *_spread(right, min(len(right), count - errors))]


def _spread(places: Sequence[int], count: int) -> Iterable[int]:
    return (places[i * len(places) // count] for i in range(count))


def _example(item: Any, names: Sequence[str], best: int, share: float) -> str:
    """Return an input with its class, its prediction and that one's probability."""
    content, label = item
    told = f"{names[best]}, {share:.2f}"
    kind, caption = ("right", told) if best == label else ("wrong", f"{told}; it is {names[label]}")
    if isinstance(content, str):
        text = content if len(content) <= LETTERS else f"{content[:LETTERS]}…"
        inner = f"<blockquote>{shown(text)}</blockquote>"
    else:
        content.thumbnail((PIXELS, PIXELS))
        inner = f'<img alt="{shown(names[label])}" src="data:image/jpeg;base64,{_jpeg(content)}">'
    return f'<figure class="{kind}">{inner}<figcaption>{shown(caption)}</figcaption></figure>'


def _jpeg(image: Any) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return base64.b64encode(file.getvalue()).decode()
