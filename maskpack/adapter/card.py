"""What a model card may say of a training record: anybody may have written it, and places on a disk are not told."""

import json
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np

from ..errors import ConfigError, DataError, escape
from .fields import UNPRINTABLE

HUGE = 1e300  # a result beyond is none, and a JSON integer may not even fit a float
# what stands for a place on somebody's disk, as a whole text or as a word in one; addresses of the web do not
PATH = re.compile(r"(hf/)?(/\S|~[\w-]*/|\.{1,2}[\\/]|[A-Za-z]:[\\/]|\\\\|file:)|.*\.py:\w")
PATH_WORD = re.compile(
    r"(?<![\w.~/\\*?-])(?:[A-Za-z]:[\\/]|\\\\|~[\w-]*/|\.{1,2}[\\/]|file:/|/(?=[\w.~-])|hf/[/.~]|[\w.-]+\\(?=\w))"
    r"[^\s\"'<>|,;)\]}]*"
)
REPLACED = "(local path)"
DATASET = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def without_paths(value: Any) -> Any:
    """Return a JSON value with its local paths replaced, in keys as well."""
    if isinstance(value, dict):
        return {without_paths(key): without_paths(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_paths(one) for one in value]
    if not isinstance(value, str):
        return value
    whole = PATH.match(value) or ("\\" in value and len(value.split()) == 1)
    return REPLACED if whole else PATH_WORD.sub(REPLACED, value)


def member(record: Any, key: str) -> dict[str, Any]:
    """Return a member that is an object; an empty one if it is missing or anything else."""
    found = record.get(key) if isinstance(record, dict) else None
    return found if isinstance(found, dict) else {}


def metrics(record: Any) -> dict[str, float]:
    """Return the numbers among the metrics of a training record, sorted by name."""
    found = without_paths(member(record, "metrics"))
    numbers = {key: value for key, value in found.items() if type(value) in (int, float)}
    return {key: value for key, value in sorted(numbers.items()) if abs(value) < HUGE}


def dataset_name(record: Any) -> str | None:
    """Return the name of the data in a training record, or None."""
    found = record.get("data") if isinstance(record, dict) else None
    name = found.get("id") if isinstance(found, dict) else found
    return without_paths(name) if isinstance(name, str) and name else None


def hub_dataset(record: Any) -> str | None:
    """Return the id of the data if they are a data set of the Hub, as the training record says, or None."""
    found = member(record, "data")
    if found.get("source") != "hub":
        return None
    return name if isinstance(name := found.get("id"), str) and DATASET.fullmatch(name) else None


def rows(record: Any) -> dict[str, int]:
    """Return the number of examples of each split of a training record."""
    counts = member(member(record, "data"), "rows")
    return {without_paths(key): value for key, value in counts.items() if type(value) is int}


def combination(record: Any) -> tuple[str, list[tuple[str, str]]] | None:
    """Return by which operation masks were combined, and (mask_id, reference or "") of each adapter; None if not."""
    found = member(record, "combined")
    parents = found.get("parents")
    if not isinstance(parents, list):
        return None
    rows = [one for one in parents if isinstance(one, dict)]
    of = [tuple(without_paths(str(one.get(key, ""))) for key in ("mask_id", "reference")) for one in rows]
    extra = "".join(f", {key} = {found[key]}" for key in ("k", "weights") if key in found)
    return without_paths(f"{found.get('operation')}{extra}"), [(id_, reference) for id_, reference in of]


Canvas: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]

MAX_SETS = 4
WIDEST = 1120  # pixels for the bars of a set; more parameters than that share a bar
HEIGHT = 240  # pixels from density 0 to 1
LEFT, RIGHT, ABOVE, BELOW = 64, 16, 24, 36
SCALE = 2  # pixels of the screen for one of a digit
BACKGROUND, GRID, AXIS, BAR, EXTREME, CROSSING = range(6)
PALETTE = bytes.fromhex("ffffff dfe3e8 57606a 4c78a8 e07b39 6f95bf")  # white behind it all, so that dark pages show it
# digits of 3 x 5 dots, a row in three bits
GLYPHS = {
    "0": (7, 5, 5, 5, 7),
    "1": (2, 6, 2, 2, 7),
    "2": (7, 1, 7, 4, 7),
    "3": (7, 1, 3, 1, 7),
    "4": (5, 5, 7, 1, 1),
    "5": (7, 4, 7, 1, 7),
    "6": (7, 4, 7, 5, 7),
    "7": (7, 1, 2, 2, 2),
    "8": (7, 5, 7, 5, 7),
    "9": (7, 5, 7, 1, 7),
    ".": (0, 0, 0, 0, 2),
}


def parameter_densities(one: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return (name, density) of each masked parameter of a described set, in the file's order."""
    # the signs of a ternary mask come right before its zeros, under the same name; the zeros tell what is kept
    return list({row["name"]: row["density"] for row in one["payloads"]}.items())


def density_picture(description: Mapping[str, Any]) -> bytes:
    """Return a PNG of the densities of the first sets, one below the other.

    A set is at most 1200 x 300 pixels: a bar from 0 to 1 for each masked parameter, in the file's order, with lines at
    the quarters and the parameters' numbers below, from 1. The lowest and the highest bar have another colour. The same
    description gives the same pixels, and with the same zlib the same bytes.

    Args:
        description: from `describe` or `inspect_adapter`.
    """
    shown = list(description["sets"].values())[:MAX_SETS]
    panels = [_panel(np.array([density for _, density in parameter_densities(one)])) for one in shown]
    width = max(panel.shape[1] for panel in panels)
    whole = np.full((sum(panel.shape[0] for panel in panels), width), BACKGROUND, np.uint8)
    top = 0
    for panel in panels:
        whole[top : top + panel.shape[0], : panel.shape[1]] = panel
        top += panel.shape[0]
    return _png(whole)


def _panel(densities: "np.ndarray[Any, np.dtype[np.float64]]") -> Canvas:
    """Draw the bars of one set."""
    count = len(densities)
    bars = min(count, WIDEST)
    step = min(40, WIDEST // bars)
    gap = step // 4
    bottom = ABOVE + HEIGHT
    canvas = np.full((bottom + BELOW, LEFT + max(bars * step, 120) + RIGHT), BACKGROUND, np.uint8)
    lines = [bottom - HEIGHT * quarter // 4 for quarter in range(1, 5)]
    for y in lines:
        canvas[y, LEFT:-RIGHT] = GRID
    lowest, highest = int(np.argmin(densities)), int(np.argmax(densities))
    for bar in range(bars):
        start, end = bar * count // bars, (bar + 1) * count // bars
        extreme = densities[lowest] < densities[highest] and (start <= lowest < end or start <= highest < end)
        x, height = LEFT + bar * step, round(HEIGHT * float(np.mean(densities[start:end])))
        canvas[bottom - height : bottom, x : x + step - gap] = EXTREME if extreme else BAR
    for y in lines[:-1]:
        canvas[y][canvas[y] == BAR] = CROSSING
    canvas[bottom : bottom + 2, LEFT:-RIGHT] = AXIS
    for quarter, y in enumerate([bottom, *lines]):
        _write(canvas, f"{quarter / 4:.2f}", LEFT - 8, y)
    for number in _numbered(count, bars * step):
        x = LEFT + (number - 1) * bars // count * step + (step - gap) // 2
        canvas[bottom + 2 : bottom + 6, x] = AXIS
        _write(canvas, str(number), x + _width(str(number)) // 2, bottom + 16)
    return canvas


def _numbered(count: int, pixels: int) -> list[int]:
    """Return which parameters get their number below, far enough from each other."""
    apart = next(one for one in (1, 5, 10, 20, 50, *(100 * 2**k for k in range(40))) if one * pixels >= 40 * count)
    return [number for number in range(1, count + 1) if number == 1 or number % apart == 0]


def _width(text: str) -> int:
    return 4 * SCALE * len(text) - SCALE


def _write(canvas: Canvas, text: str, right: int, middle: int) -> None:
    """Write digits so that they end left of `right`, around the line `middle`."""
    x, y = right - _width(text), middle - 5 * SCALE // 2
    for letter in text:
        for row, bits in enumerate(GLYPHS[letter]):
            for column in range(3):
                if bits >> (2 - column) & 1:
                    top, left = y + row * SCALE, x + column * SCALE
                    canvas[top : top + SCALE, left : left + SCALE] = AXIS
        x += 4 * SCALE


def _png(canvas: Canvas) -> bytes:
    """Return a canvas of palette indices as a PNG file."""
    rows, columns = canvas.shape
    header = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)  # 8 bits a pixel, with a palette
    lines = np.concatenate([np.zeros((rows, 1), np.uint8), canvas], axis=1)  # every line begins with its filter: none
    chunks = ((b"IHDR", header), (b"PLTE", PALETTE), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


OWN_TAGS = ("maskpack:base:", "maskpack:base-id:")
STALE = ("base_model", "base_model_relation")  # these go where the new card has none: the base has changed
MERGED = ("tags", "datasets")  # lists that the card's owner may add to
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
OTHER_ID = re.compile(
    r"torchvision/[A-Za-z0-9][\w.-]*"
)  # ids that name the same weights everywhere, but no Hub repository
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
DIGEST = 12  # hexadecimal digits of the base's float32 digest in a tag


def base_model(id_: str) -> str | None:
    """Return the Hub id of a base, or None if it does not come from the Hub."""
    name = id_.removeprefix("hf/")
    if OTHER_ID.fullmatch(id_) or not HUB_ID.fullmatch(name):
        return None
    return name if id_.startswith(("hf/", "timm/")) else None


def base_id_tag(id_: str) -> str | None:
    """Return the tag by which adapters of a base that is not on the Hub are found; None for a user's own network."""
    return f"maskpack:base-id:{id_}" if OTHER_ID.fullmatch(id_) else None


def digest_tag(digest: str) -> str:
    """Return the tag by which adapters are found that fit the weights with this float32 digest."""
    return f"maskpack:base:{digest[:DIGEST]}"


def front_matter(description: Mapping[str, Any], repo_id: str | None, license: str | None) -> dict[str, Any]:
    """Return our keys of the front matter, in their order; see `render_card`.

    Raises:
        ConfigError: if `license` cannot be the identifier of a licence.
    """
    if license is not None and not LICENSE.fullmatch(license):
        raise ConfigError(
            f"license must be an identifier as the Hub writes them, such as apache-2.0, mit or other, got {license!r}"
        )
    base, task, record = description["base"], description["task"], description["training"]
    front: dict[str, Any] = {"library_name": "maskpack"}
    if license is not None:
        front["license"] = license
    # a network of random weights shares nothing with the pretrained one but its shape
    if (hub := base_model(base["id"])) is not None and not str(base["revision"]).startswith("random:"):
        front |= {"base_model": hub, "base_model_relation": "adapter"}
    tags = ("maskpack", "binary-mask", digest_tag(base["digests"]["float32"]), base_id_tag(base["id"]))
    front["tags"] = [tag for tag in tags if tag is not None]
    if task is not None:
        front["pipeline_tag"] = escape(task)
    if (dataset := hub_dataset(record)) is not None:
        front["datasets"] = [dataset]
    accuracies = {key: value for key, value in metrics(record).items() if "accuracy" in key}
    if accuracies and task is not None:
        result = {
            "task": {"type": task},
            "dataset": {"name": escape(dataset_name(record) or "unknown"), "type": dataset or "unknown"},
            "metrics": [{"type": "accuracy", "name": escape(key), "value": value} for key, value in accuracies.items()],
        }
        front["model-index"] = [{"name": repo_id or "maskpack adapter", "results": [result]}]
    return front


def to_yaml(front: Mapping[str, Any]) -> str:
    """Return the keys as lines of YAML, one each; `from_yaml` reads them back."""
    return "".join(_line(key, value) for key, value in front.items())


def from_yaml(lines: str) -> dict[str, Any]:
    """Return the keys of lines that `to_yaml` wrote."""
    return {key: json.loads(value) for key, _, value in (line.partition(": ") for line in lines.split("\n") if line)}


def _line(key: str, value: Any) -> str:
    """Return a line of YAML: JSON is YAML once the characters that YAML does not allow are escaped."""
    text = json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")  # no end of our fence inside a text
    return f"{key}: {UNPRINTABLE.sub(lambda found: f'{chr(92)}u{ord(found[0]):04x}', text)}\n"


def merge(text: str, ours: Mapping[str, Any]) -> str:
    """Replace our keys in YAML text where they stand and say something else, and append those that are missing.

    Tags and data sets of the owner's stay beside ours. A key that we do not have stays, except for the base.

    Raises:
        DataError: if the text is not a YAML mapping, written one key a line.
    """
    import yaml  # type: ignore[import-untyped]  # only cards that exist already need it

    try:
        node, values = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise DataError(f"the front matter of README.md is not YAML: {why}; correct it, or delete the file") from None
    if values is not None and (not isinstance(values, dict) or node.flow_style):
        raise DataError(
            "the front matter of README.md is not a block of `key: value` lines; correct it, or delete the file"
        )
    values = values or {}
    ours = {key: _joined(value, values.get(key)) if key in MERGED else value for key, value in ours.items()}
    lines = text.splitlines(keepends=True)
    # a key's lines end where the next key begins, less the comments and empty lines that stand before that one
    keys = [key.value for key, _ in node.value] if node is not None else []
    starts = [key.start_mark.line for key, _ in node.value] if node is not None else []
    result = lines[: starts[0]] if starts else lines
    written = set()
    for key, start, end in zip(keys, starts, [*starts[1:], len(lines)][: len(keys)], strict=True):
        said = key in ours and values.get(key) == ours[key] and keys.count(key) == 1
        if said or (key not in ours and key not in STALE):
            result += lines[start:end]
            written.add(key)
            continue
        rest = end
        while rest > start + 1 and (not lines[rest - 1].strip() or lines[rest - 1].startswith("#")):
            rest -= 1
        if key in ours and key not in written:
            result.append(_line(key, ours[key]))
        written.add(key)
        result += lines[rest:end]
    return "".join(result) + to_yaml({key: value for key, value in ours.items() if key not in written})


def _joined(ours: list[str], theirs: Any) -> Any:
    """Return the owner's list, less the tags that were ours, and what is missing in it; what is no list stays."""
    listed = theirs if isinstance(theirs, list) else [] if theirs is None else [theirs]
    if any(isinstance(one, dict | list) for one in listed):
        return theirs
    kept = [str(one) for one in listed if str(one) in ours or not str(one).startswith(OWN_TAGS)]
    return [*kept, *(one for one in ours if one not in kept)]


CARD_FILE = "README.md"
BEGIN, END = "<!-- maskpack:begin -->", "<!-- maskpack:end -->"
FENCE = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
FRONT_MATTER = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
PICTURE_FILE = "maskpack_density.png"
LONGEST_NAME = 100  # characters of a parameter's name in a sentence
MOST_CLASSES = 20
MOST_PARENTS = 50


def render_card(
    description: Mapping[str, Any],
    repo_id: str | None = None,
    *,
    license: str | None = None,
    picture: str | None = None,
) -> str:
    """Return the model card of an adapter as Markdown with YAML front matter.

    Args:
        description: from `describe` or `inspect_adapter`.
        repo_id: the Hub repository, for the title and the usage lines; else a placeholder.
        license: identifier of the licence, as in "apache-2.0"; None says nothing of one.
        picture: file name of the densities' picture beside the card; None if there is none.

    Raises:
        ConfigError: if `license` cannot be an identifier of the Hub's.
    """
    front = to_yaml(front_matter(description, repo_id, license))
    return f"---\n{front}---\n\n{BEGIN}\n{chr(10).join(_body(description, repo_id, picture))}{END}\n"


def update_card(existing: str, new: str) -> str:
    """Return an existing card with our front matter keys and our fenced block taken from a new one.

    Everything else stays as it is, byte for byte: other keys, comments, text around the block. Tags and data sets are
    merged.

    Raises:
        DataError: if the existing front matter is not a YAML mapping, or the begin of our block has no end.
    """
    front, block = FRONT_MATTER.match(new), FENCE.search(new)
    assert front is not None
    assert block is not None
    found = FRONT_MATTER.match(existing)
    body = existing[found.end() :] if found else existing
    if FENCE.search(body):
        body = FENCE.sub(lambda _: block[0], body, count=1)
    elif BEGIN in body or END in body:
        raise DataError(f"README.md has only one of {BEGIN} and {END}; restore the other, or delete that line")
    else:
        body = f"{body}{'' if not body or body.endswith(chr(10)) else chr(10)}\n{block[0]}\n"
    return f"---\n{merge(found[1] if found else '', from_yaml(front[1]))}---\n{body}"


def _body(description: Mapping[str, Any], repo_id: str | None, picture: str | None) -> Iterator[str]:
    """Yield the paragraphs of our block."""
    base, sets, record = description["base"], description["sets"], description["training"]
    revision = f" at revision {_code(base['revision'])}" if base["revision"] else ""
    yield f"# {escape(repo_id or 'maskpack adapter', 'markdown')}\n"
    yield f"Binary weight masks for {_code(base['id'])}{revision}: one bit for each weight of the frozen network.\n"
    if values := sum(one["dense_bytes"].get("values", 0) for one in sets.values()):
        yield (
            f"It holds two networks. Weights whose bit is 0 are replaced by stored values ({values:,} bytes): this is "
            f'the target. With `load_mask(…, mode="source")` they are 0 instead, and the model keeps its head and '
            f"statistics: this is the source.\n"
        )
    if str(description["task"]).endswith("feature-extraction"):
        yield "It has no head: what it gives is features, for nearest neighbours or a linear probe.\n"
    yield from _usage(base, repo_id or "USER/NAME", description["cascade"], bool(description["class_names"]))
    yield "## Masks\n"
    yield "| mask set | parameters | weights | density | bytes | bits per weight |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, one in sets.items():
        yield (
            f"| {name} | {one['parameters']} | {one['weights']:,} | {one['density']:.4f} | "
            f"{one['payload_bytes'] + one['table_bytes']:,} | {one['bits_per_weight']:.4f} |"
        )
    if (cascade := description["cascade"]) is not None:
        yield f"\n{_together(cascade)}"
    smaller = f"{description['times_smaller_than_float32']:.1f} times fewer than the masked weights in float32"
    yield f"\nThe file has {description['size']:,} bytes, {smaller}.\n"
    if picture is not None:
        yield f"![Density of every masked layer]({picture})\n"
    yield from _densities(sets, picture)
    if results := metrics(record):
        yield "## Results\n\n| result | value |\n| --- | --- |"
        yield "".join(f"| {escape(key, 'markdown')} | {value:.4g} |\n" for key, value in results.items())
    yield from _combined(record)
    if record or description["class_names"]:
        yield "## Training\n"
    yield from _data(record)
    if names := description["class_names"]:
        more = f", … ({len(names)} in all)" if len(names) > MOST_CLASSES else ""
        yield f"Classes: {', '.join(escape(name, 'markdown') for name in names[:MOST_CLASSES])}{more}\n"
    if record:
        yield f"Training record:\n\n{_fenced(json.dumps(without_paths(record), indent=2, sort_keys=True))}\n"
    digest = base["digests"]["float32"]
    yield f"mask_id {_code(description['mask_id'])}, base digest (float32) {_code(digest)}.\n"


def _usage(base: Mapping[str, Any], name: str, cascade: Mapping[str, Any] | None, classifies: bool) -> Iterator[str]:
    id_, revision = base["id"], base["revision"]
    known = base_model(id_) is not None or OTHER_ID.fullmatch(id_) is not None
    drawn = re.fullmatch(r"random:([\w:-]+)", revision or "")
    if known and revision and not id_.startswith("timm/") and re.fullmatch(r"[\w.-]+", revision):
        id_ = f"{id_}@{revision}"
    options = f', random_weights="{drawn[1]}"' if drawn else ""
    model = f'load_backbone("{id_}"{options}).model' if known else "...  # the base named above, with the same weights"
    yield "```python"
    load = "load_mask" if cascade is None else "load_cascade"
    yield f"from maskpack import {'load_backbone, ' if known else ''}{load}\n"
    yield f"model = {model}"
    reference = json.dumps(name)
    if cascade is None:
        yield f"load_mask(model, {reference})  # in place; unload_mask(model) gives the base back, to the bit\n```\n"
    else:
        yield f"cascade = load_cascade(model, {reference})"
        yield "x = cascade.embed(inputs)  # by the dispatcher and experts; the model is as before, to the bit"
        if classifies:
            yield "print(cascade.predict(examples))  # images or their paths, or texts"
        yield "```\n"
    yield f"```bash\nmaskpack pull {name}  # fetches and verifies every byte\n```\n"


def _together(cascade: Mapping[str, Any]) -> str:
    """Return what the sets of a cascade do together, and what it stores beside them."""
    sizes = ", ".join(f"{role} {size:,} bytes" for role, size in sorted(cascade["bytes"].items()))
    how = "its block alone joins the dispatcher's" if cascade["combine"] == "conditional" else "every expert joins it"
    return (
        f"A cascade: the embedding by {_code(cascade['dispatcher'])} says which of {len(cascade['experts'])} experts "
        f"an input is for ({cascade['combine']}: {how}). Beside the masks: {sizes}."
    )


def _densities(sets: Mapping[str, Any], picture: str | None) -> Iterator[str]:
    """Yield the lowest and the highest density of each set: what the picture shows, in words."""
    for name, one in list(sets.items())[:MAX_SETS]:
        layers = parameter_densities(one)
        low, high = min(layers, key=lambda layer: layer[1]), max(layers, key=lambda layer: layer[1])
        where = f"Set {_code(name)}: d" if len(sets) > 1 else "D"
        span = f"lowest {low[1]:.4f} in {_code(low[0])}, highest {high[1]:.4f} in {_code(high[0])}"
        if low[1] == high[1]:
            span = f"{low[1]:.4f} in every one"
        yield f"{where}ensity of the {len(layers)} masked parameters: {span}.\n"
    if picture is not None:
        several = f" Sets stand one below the other{f', the first {MAX_SETS}' if len(sets) > MAX_SETS else ''}."
        yield (
            "Each bar of the picture is a masked parameter, in the file's order; the lowest and the highest are orange."
            f"{several if len(sets) > 1 else ''}\n"
        )


def _combined(record: Any) -> Iterator[str]:
    """Yield which adapters' masks were combined, and how."""
    if (found := combination(record)) is None:
        return
    how, parents = found
    yield f"## Combined\n\nThe masks are those of {len(parents)} adapters, combined by {_code(how)}, in this order:\n"
    yield "| mask_id | adapter |\n| --- | --- |"
    for id_, reference in parents[:MOST_PARENTS]:
        yield f"| {_code(id_)} | {_code(reference) if reference else '-'} |"
    yield f"\n… and {len(parents) - MOST_PARENTS} more.\n" if len(parents) > MOST_PARENTS else ""


def _data(record: Any) -> Iterator[str]:
    """Yield what the masks were trained on."""
    if (name := dataset_name(record)) is None:
        return
    where = " of the Hugging Face Hub" if hub_dataset(record) else ""
    counts = ", ".join(f"{escape(split, 'markdown')} {count:,}" for split, count in rows(record).items())
    yield f"Data: {_code(name)}{where}{f' (examples: {counts})' if counts else ''}.\n"


def _code(text: object) -> str:
    text = str(text)
    return escape(text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 1]}…", "code")


def _fenced(text: str) -> str:
    """Return a code block; `<` is written as JSON escapes it, so that the text cannot close our fence."""
    return "```json\n" + text.replace("<", "\\u003c").replace("`", "\\u0060") + "\n```"
