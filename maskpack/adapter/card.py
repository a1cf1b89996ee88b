"""The model card: Markdown with YAML front matter, made of a description and safe for text from anywhere.

Anybody may have written a training record, and places on a disk are not told.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import ConfigError, DataError, escape

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
    # a network of random weights shares nothing with the pretrained one but its shape
    hub = None if str(base["revision"]).startswith("random:") else base_model(base["id"])
    dataset, results = hub_dataset(record), None
    accuracies = {key: value for key, value in metrics(record).items() if "accuracy" in key}
    if accuracies and task is not None:
        result = {
            "task": {"type": _plain(task)},
            "dataset": {"name": _plain(dataset_name(record) or "unknown"), "type": dataset or "unknown"},
            "metrics": [{"type": "accuracy", "name": _plain(key), "value": value} for key, value in accuracies.items()],
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


def render_card(description: Mapping[str, Any], repo_id: str | None = None, *, license: str | None = None) -> str:
    """Return the model card of an adapter as Markdown with YAML front matter.

    Args:
        description: from `inspect_adapter`.
        repo_id: the Hub repository, for the title and the usage lines; else a placeholder.
        license: identifier of the licence, as in "apache-2.0"; None says nothing of one.

    Raises:
        ConfigError: if `license` cannot be an identifier of the Hub's.
    """
    front = _to_yaml(front_matter(description, repo_id, license))
    return f"---\n{front}---\n\n{BEGIN}\n{chr(10).join(_body(description, repo_id))}{END}\n"


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
            f"{one['payload_bytes']:,} | {one['bits_per_weight']:.4f} |"
        )
    if (cascade := description["cascade"]) is not None:
        yield f"\n{_together(cascade)}"
    smaller = f"{description['times_smaller_than_float32']:.1f} times fewer than the masked weights in float32"
    yield f"\nThe file has {description['size']:,} bytes, {smaller}.\n"
    yield from _densities(sets)
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


def _densities(sets: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lowest and the highest density of each set."""
    for name, one in list(sets.items())[:MOST_SETS]:
        layers = parameter_densities(one)
        low, high = min(layers, key=lambda layer: layer[1]), max(layers, key=lambda layer: layer[1])
        where = f"Set {_code(name)}: d" if len(sets) > 1 else "D"
        span = f"lowest {low[1]:.4f} in {_code(low[0])}, highest {high[1]:.4f} in {_code(high[0])}"
        if low[1] == high[1]:
            span = f"{low[1]:.4f} in every one"
        yield f"{where}ensity of the {len(layers)} masked parameters: {span}.\n"


def _combined(record: Any) -> Iterator[str]:
    """Yield which adapters' masks were combined, and how."""
    found = member(record, "combined")
    if not isinstance(parents := found.get("parents"), list):
        return
    parents = [without_paths(one) for one in parents if isinstance(one, dict)]
    extra = "".join(f", {key} = {found[key]}" for key in ("k", "weights") if key in found)
    how = _code(without_paths(f"{found.get('operation')}{extra}"))
    yield f"## Combined\n\nThe masks are those of {len(parents)} adapters, combined by {how}, in this order:\n"
    yield "| mask_id | adapter |\n| --- | --- |"
    for one in parents[:MOST_PARENTS]:
        yield f"| {_code(one.get('mask_id', ''))} | {_code(one['reference']) if one.get('reference') else '-'} |"
    yield f"\n… and {len(parents) - MOST_PARENTS} more.\n" if len(parents) > MOST_PARENTS else ""


def _data(record: Any) -> Iterator[str]:
    """Yield what the masks were trained on."""
    if (name := dataset_name(record)) is None:
        return
    where = " of the Hugging Face Hub" if hub_dataset(record) else ""
    rows = without_paths(member(member(record, "data"), "rows"))
    counts = ", ".join(f"{escape(key, 'markdown')} {count:,}" for key, count in rows.items() if type(count) is int)
    yield f"Data: {_code(name)}{where}{f' (examples: {counts})' if counts else ''}.\n"


def _code(text: object) -> str:
    text = str(text)
    return escape(text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 1]}…", "code")


def _fenced(text: str) -> str:
    """Return a code block; `<` is written as JSON escapes it, so that the text cannot close our fence."""
    return "```json\n" + text.replace("<", "\\u003c").replace("`", "\\u0060") + "\n```"
