"""The model card: a README.md whose front matter and fenced block are ours, and all else its owner's."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import DataError
from ..text import escape
from .frontmatter import OTHER_ID, base_model, from_yaml, front_matter, merge, to_yaml
from .picture import MAX_SETS, parameter_densities
from .record import combination, dataset_name, hub_dataset, metrics, rows, without_paths

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
