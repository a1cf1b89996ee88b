"""The model card: Markdown with YAML front matter, made of a description and safe for text from anywhere.

Anybody may have written a training record, and places on a disk are not told.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import ConfigError, DataError, as_text, escape
from .content import FIGURES

CARD_FILE = "README.md"
BEGIN, END = "<!-- maskpack:begin -->", "<!-- maskpack:end -->"
FENCE = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
FRONT_MATTER = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
OWN_TAGS = ("maskpack:base:", "maskpack:base-id:")
STALE = ("base_model", "base_model_relation")  # these go where the new card has none: the base has changed
MERGED = ("tags", "datasets")  # lists that the card's owner may add to
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
OTHER_ID = re.compile(r"torchvision/[A-Za-z0-9][\w.-]*")  # the same weights everywhere, but no Hub repository
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
DIGEST = 12  # hexadecimal digits of the base's float32 digest in a tag
LONGEST_NAME = 100  # characters of a parameter's name in a sentence
MOST_SETS = 4  # whose densities are told
WITHOUT = "masks taken out"
MOST_CLASSES = 20
MOST_PARENTS = 50

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
    found = sorted(without_paths(member(record, "metrics")).items())
    return {key: value for key, value in found if type(value) in (int, float) and abs(value) < HUGE}


def data_of(record: Any) -> tuple[str | None, str | None]:
    """Return the name of the data in a training record, and their id if they are a data set of the Hub, or None."""
    found = member(record, "data")
    name = found.get("id") if found else record.get("data") if isinstance(record, dict) else None
    if not isinstance(name, str) or not name:
        return None, None
    return without_paths(name), name if found.get("source") == "hub" and DATASET.fullmatch(name) else None


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


def render_card(description: Mapping[str, Any], repo_id: str | None = None, *, license: str | None = None) -> str:
    """Return the model card of an adapter as Markdown with YAML front matter.

    Args:
        description: from `inspect_adapter`.
        repo_id: the Hub repository, for the title and the usage lines; else a placeholder.
        license: identifier of the licence, as in "apache-2.0"; None says nothing of one.

    Raises:
        ConfigError: if `license` cannot be an identifier of the Hub's.
    """
    if license is not None and not LICENSE.fullmatch(license):
        raise ConfigError(
            f"license must be an identifier as the Hub writes them, such as apache-2.0, mit or other, got {license!r}"
        )
    front = _to_yaml(_front_matter(description, repo_id, license))
    return f"---\n{front}---\n\n{BEGIN}\n{chr(10).join(_body(description, repo_id))}{END}\n"


def _front_matter(description: Mapping[str, Any], repo_id: str | None, license: str | None) -> dict[str, Any]:
    """Return our keys of the front matter, in their order."""
    base, task, record = description["base"], description["task"], description["training"]
    # a network of random weights shares nothing with the pretrained one but its shape
    hub = None if str(base["revision"]).startswith("random:") else base_model(base["id"])
    (name, dataset), results = data_of(record), None
    kinds = {key: kind for key in metrics(record) for kind in FIGURES if kind in key}
    figures = {key: value for key, value in metrics(record).items() if key in kinds}
    if figures and task is not None:
        result = {
            "task": {"type": _plain(task)},
            "dataset": {"name": _plain(name or "unknown"), "type": dataset or "unknown"},
            "metrics": [{"type": kinds[key], "name": _plain(key), "value": value} for key, value in figures.items()],
        }
        results = [{"name": repo_id or "maskpack adapter", "results": [result]}]
    tags = ("maskpack", "binary-mask", digest_tag(base["digests"]["float32"]), base_id_tag(base["id"]))
    front = {
        "library_name": "maskpack",
        "license": license,
        "base_model": hub,
        "base_model_relation": hub and "adapter",
        "tags": [tag for tag in tags if tag is not None],
        "pipeline_tag": task and _plain(task),
        "datasets": dataset and [dataset],
        "model-index": results,
    }
    return {key: value for key, value in front.items() if value is not None}


def _plain(text: str) -> str:
    return escape(text).replace("<!--", "<!- -")  # no begin or end of our block


def update_card(existing: str, new: str) -> str:
    """Return an existing card with our front matter keys and our fenced block taken from a new one.

    Text outside the block stays as it is, byte for byte, and so do the values of other keys. Tags and data sets are
    merged. Front matter that says the same already is not written again.

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
    text = found[1] if found else ""
    theirs, ours = _from_yaml(text), _from_yaml(front[1])
    merged = {key: value for key, value in theirs.items() if key not in STALE or key in ours}
    merged |= {key: _joined(value, theirs.get(key)) if key in MERGED else value for key, value in ours.items()}
    return f"---\n{text if merged == theirs else _to_yaml(merged)}---\n{body}"


def _to_yaml(front: Mapping[str, Any]) -> str:
    import yaml  # type: ignore[import-untyped]  # the Hub client brings it

    text: str = yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True, width=1000)
    return text


def _from_yaml(text: str) -> dict[Any, Any]:
    import yaml

    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise DataError(f"the front matter of README.md is not YAML: {why}; correct it, or delete the file") from None
    if values is not None and not isinstance(values, dict):
        raise DataError("the front matter of README.md is not `key: value` lines; correct it, or delete the file")
    return values or {}


def _joined(ours: list[str], theirs: Any) -> Any:
    """Return the owner's list, less the tags that were ours, and what is missing in it; what is no list stays."""
    listed = theirs if isinstance(theirs, list) else [] if theirs is None else [theirs]
    if any(isinstance(one, dict | list) for one in listed):
        return theirs
    kept = [str(one) for one in listed if str(one) in ours or not str(one).startswith(OWN_TAGS)]
    return [*kept, *(one for one in ours if one not in kept)]


def parameter_densities(one: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return (name, density) of each masked parameter of a described set, in the file's order."""
    # the signs of a ternary mask come right before its zeros, under the same name; the zeros tell what is kept
    return list({row["name"]: row["density"] for row in one["payloads"]}.items())


def _body(description: Mapping[str, Any], repo_id: str | None) -> Iterator[str]:
    """Yield the paragraphs of our block, each with the line end after it."""
    base, sets, record = description["base"], description["sets"], description["training"]
    cascade, classes = description["cascade"], description["class_names"] or ()
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
    ref = repo_id or "USER/NAME"
    yield f"```python\n{usage(base, ref, cascade is not None, bool(classes))}\n```\n"
    yield f"```bash\nmaskpack pull {ref}  # fetches and verifies every byte\n```\n"
    yield "## Masks\n"
    columns = ("mask set", "parameters", "weights", "density", "bytes", "bits per weight")
    figures = "{parameters}", "{weights:,}", "{density:.4f}", "{payload_bytes:,}", "{bits_per_weight:.4f}"
    yield _table(columns, [[name, *(figure.format(**one) for figure in figures)] for name, one in sets.items()])
    if cascade is not None:
        sizes = ", ".join(f"{role} {size:,} bytes" for role, size in sorted(cascade["bytes"].items()))
        alone = cascade["combine"] == "conditional"
        how = "its block alone joins the dispatcher's" if alone else "every expert joins it"
        yield (
            f"A cascade: the embedding by {_code(cascade['dispatcher'])} says which of {len(cascade['experts'])} "
            f"experts an input is for ({cascade['combine']}: {how}). Beside the masks: {sizes}.\n"
        )
    smaller = f"{description['times_smaller_than_float32']:.1f} times fewer than the masked weights in float32"
    yield f"The file has {description['size']:,} bytes, {smaller}.\n"
    for name, one in list(sets.items())[:MOST_SETS]:
        layers = parameter_densities(one)
        low, high = min(layers, key=lambda layer: layer[1]), max(layers, key=lambda layer: layer[1])
        where = f"Set {_code(name)}: d" if len(sets) > 1 else "D"
        span = f"lowest {low[1]:.4f} in {_code(low[0])}, highest {high[1]:.4f} in {_code(high[0])}"
        if low[1] == high[1]:
            span = f"{low[1]:.4f} in every one"
        yield f"{where}ensity of the {len(layers)} masked parameters: {span}.\n"
    if results := metrics(record):
        rows = [[escape(key, "markdown"), as_text(results, key)] for key in results]
        yield f"## Results\n\n{_table(('result', 'value'), rows)}"
        yield from _worth(results, record, sum(one["payload_bytes"] for one in sets.values()))
    yield from _combined(member(record, "combined"))
    if record or classes:
        yield "## Training\n"
    name, dataset = data_of(record)
    if name is not None:
        rows = without_paths(member(member(record, "data"), "rows"))
        counts = ", ".join(f"{escape(key, 'markdown')} {count:,}" for key, count in rows.items() if type(count) is int)
        where = " of the Hugging Face Hub" if dataset else ""
        yield f"Data: {_code(name)}{where}{f' (examples: {counts})' if counts else ''}.\n"
    if classes:
        more = f", … ({len(classes)} in all)" if len(classes) > MOST_CLASSES else ""
        yield f"Classes: {', '.join(escape(name, 'markdown') for name in classes[:MOST_CLASSES])}{more}\n"
    if record:
        text = json.dumps(without_paths(record), indent=2, sort_keys=True)
        # written as JSON escapes them, so that the text cannot close our fence
        fenced = text.replace("<", "\\u003c").replace("`", "\\u0060")
        yield f"Training record:\n\n```json\n{fenced}\n```\n"
    digest = base["digests"]["float32"]
    yield f"mask_id {_code(description['mask_id'])}, base digest (float32) {_code(digest)}.\n"


def accuracies(results: Mapping[str, float]) -> tuple[str, dict[str, float]] | None:
    """Return a split, and the accuracies on it of the adapter, the raw backbone's probe, perhaps without the masks."""
    for split in ("test", "validation"):
        if f"{split}_accuracy" in results and f"{split}_probe_accuracy" in results:
            keys = {"this adapter": "accuracy", "linear probe": "probe_accuracy", WITHOUT: "accuracy_without_masks"}
            found = {name: results.get(f"{split}_{key}") for name, key in keys.items()}
            return split, {name: one for name, one in found.items() if one is not None}
    return None


def lora_sizes(record: Any) -> dict[int, int] | None:
    """Return the bytes of LoRA at 4 bits a number for the same weights, by rank, if a training record has them."""
    found = {rank: member(record, "lora_bytes").get(f"rank_{rank}_4bit") for rank in (8, 1)}
    known = {rank: size for rank, size in found.items() if type(size) is int and 0 <= size < HUGE}
    return known if len(known) == len(found) else None


def warnings_of(record: Mapping[str, Any]) -> list[str]:
    """Return the first warnings of a training record."""
    found = record.get("warnings")
    return [without_paths(one) for one in found[:MOST_SETS] if isinstance(one, str)] if isinstance(found, list) else []


def _worth(results: Mapping[str, float], record: Mapping[str, Any], mask_bytes: int) -> Iterator[str]:
    """Yield what the masks are worth beside their baseline, the network without them, and LoRA; and warnings."""
    if (found := accuracies(results)) is not None:
        split, by_name = found
        own, probe, without = by_name["this adapter"], by_name["linear probe"], by_name.get(WITHOUT)
        alone = "" if without is None else f", and {100 * without:.2f} % with the masks alone taken out"
        yield (
            f"On the {split} split a linear probe of the raw backbone has the accuracy {100 * probe:.2f} %. This "
            f"adapter has {100 * own:.2f} % ({100 * (own - probe):+.2f}){alone}.\n"
        )
    others = [(split, kind) for split in ("test", "validation") for kind in FIGURES if kind != "accuracy"]
    for split, kind in others:
        keys = f"{split}_{kind}", f"{split}_{FIGURES[kind].baseline}_{kind}"
        if all(key in results for key in keys):
            own, beside = (results[key] for key in keys)
            yield (
                f"On the {split} split {FIGURES[kind].words} has the {kind} {beside:.4f}. This adapter has {own:.4f} "
                f"({own - beside:+.4f}).\n"
            )
            break
    if (lora := lora_sizes(record)) is not None:
        yield (
            f"The masks take {mask_bytes:,} bytes; LoRA for the same weights, at 4 bits a number, takes {lora[8]:,} at "
            f"rank 8 and {lora[1]:,} at rank 1.\n"
        )
    for warning in warnings_of(record):
        yield f"Training warned: {escape(warning, 'markdown')}.\n"


def usage(base: Mapping[str, Any], name: str, is_cascade: bool, classifies: bool) -> str:
    """Return Python code that puts an adapter to use, given the described base and the adapter's reference."""
    id_, revision, reference = base["id"], base["revision"], json.dumps(name)
    known = base_model(id_) is not None or OTHER_ID.fullmatch(id_) is not None
    drawn = re.fullmatch(r"random:([\w:-]+)", revision or "")
    if known and revision and not id_.startswith("timm/") and re.fullmatch(r"[\w.-]+", revision):
        id_ = f"{id_}@{revision}"
    options = f', random_weights="{drawn[1]}"' if drawn else ""
    model = f'load_backbone("{id_}"{options}).model' if known else "...  # the base named above, with the same weights"
    use = [f"load_mask(model, {reference})  # in place; unload_mask(model) gives the base back, to the bit"]
    if is_cascade:
        use = [
            f"cascade = load_cascade(model, {reference})",
            "x = cascade.embed(inputs)  # by the dispatcher and experts; the model is as before, to the bit",
            *["print(cascade.predict(examples))  # images or their paths, or texts"] * classifies,
        ]
    names = ["load_backbone"] * known + ["load_cascade" if is_cascade else "load_mask"]
    return "\n".join([f"from maskpack import {', '.join(names)}", "", f"model = {model}", *use])


def _combined(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield which adapters' masks were combined, and how."""
    if not isinstance(parents := found.get("parents"), list):
        return
    parents = [without_paths(one) for one in parents if isinstance(one, dict)]
    extra = "".join(f", {key} = {found[key]}" for key in ("k", "weights") if key in found)
    how = _code(without_paths(f"{found.get('operation')}{extra}"))
    yield f"## Combined\n\nThe masks are those of {len(parents)} adapters, combined by {how}, in this order:\n"
    rows = [
        [_code(one.get("mask_id", "")), _code(one["reference"]) if one.get("reference") else "-"]
        for one in parents[:MOST_PARENTS]
    ]
    yield _table(("mask_id", "adapter"), rows)
    if len(parents) > MOST_PARENTS:
        yield f"… and {len(parents) - MOST_PARENTS} more.\n"


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _code(text: object) -> str:
    text = str(text)
    return escape(text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 1]}…", "code")
