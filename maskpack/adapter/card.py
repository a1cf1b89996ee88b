"""The model card: a README.md whose front matter and fenced block are ours, and all else its owner's."""

import json
import re
from collections.abc import Mapping
from typing import Any

from ..errors import DataError
from .fields import UNPRINTABLE

BEGIN, END = "<!-- maskpack:begin -->", "<!-- maskpack:end -->"
FENCE = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
FRONT_MATTER = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
OWN_TAG = "maskpack:base:"
STALE = ("base_model", "base_model_relation")  # these go where the new card has none: the base has changed
HUGE = 1e300  # a result beyond is none, and a JSON integer may not even fit a float
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def render_card(description: Mapping[str, Any], repo_id: str | None = None) -> str:
    """Return the model card of an adapter as Markdown with YAML front matter.

    Args:
        description: from `describe` or `inspect_adapter`.
        repo_id: the Hub repository, for the title and the usage lines; else a placeholder.
    """
    front = "".join(_yaml(key, value) for key, value in _front_matter(description, repo_id).items())
    return f"---\n{front}---\n\n{BEGIN}\n{_body(description, repo_id)}\n{END}\n"


def update_card(existing: str, new: str) -> str:
    """Return an existing card with our front matter keys and our fenced block taken from a new one.

    Everything else stays as it is, byte for byte: other keys, comments, text around the block. Tags are merged.

    Raises:
        DataError: if the existing front matter is not a YAML mapping, or the begin of our block has no end.
    """
    front, block = FRONT_MATTER.match(new), FENCE.search(new)
    assert front is not None
    assert block is not None
    ours = {key: json.loads(value) for key, _, value in (line.partition(": ") for line in front[1].split("\n") if line)}
    found = FRONT_MATTER.match(existing)
    body = existing[found.end() :] if found else existing
    if FENCE.search(body):
        body = FENCE.sub(lambda _: block[0], body, count=1)
    elif BEGIN in body or END in body:
        raise DataError(f"README.md has only one of {BEGIN} and {END}; restore the other, or delete that line")
    else:
        body = f"{body}{'' if not body or body.endswith(chr(10)) else chr(10)}\n{block[0]}\n"
    return f"---\n{_merge(found[1] if found else '', ours)}---\n{body}"


def _merge(text: str, ours: Mapping[str, Any]) -> str:
    """Replace our keys in YAML text where they stand, and append those that are missing."""
    import yaml  # type: ignore[import-untyped]  # only cards that exist already need it

    try:
        node, values = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        why = " ".join(str(error).split())
        raise DataError(f"the front matter of README.md is not YAML: {why}; correct it, or delete the file") from None
    if values is not None and (not isinstance(values, dict) or node.flow_style):
        raise DataError(
            "the front matter of README.md is not a block of `key: value` lines; correct it, or delete the file"
        )
    values = values or {}
    lines = text.splitlines(keepends=True)
    # a key's lines end where the next key begins, less the comments and empty lines that stand before that one
    keys = [key.value for key, _ in node.value] if node is not None else []
    starts = [key.start_mark.line for key, _ in node.value] if node is not None else []
    result = lines[: starts[0]] if starts else lines
    written = set()
    for key, start, end in zip(keys, starts, [*starts[1:], len(lines)][: len(keys)], strict=True):
        if key not in ours and key not in STALE:
            result += lines[start:end]
            continue
        rest = end
        while rest > start + 1 and (not lines[rest - 1].strip() or lines[rest - 1].startswith("#")):
            rest -= 1
        if key in ours and key not in written:
            result.append(_line(key, ours[key], values))
        written.add(key)
        result += lines[rest:end]
    result += [_line(key, value, values) for key, value in ours.items() if key not in written]
    return "".join(result)


def _line(key: str, value: Any, values: Mapping[str, Any]) -> str:
    if key == "tags":
        theirs = values.get("tags") or []
        theirs = map(str, theirs if isinstance(theirs, list) else [theirs])
        kept = [tag for tag in theirs if not tag.startswith(OWN_TAG)]
        value = [*kept, *(tag for tag in value if tag not in kept)]
    return _yaml(key, value)


def _yaml(key: str, value: Any) -> str:
    """Return a line of YAML: JSON is YAML once the characters that YAML does not allow are escaped."""
    text = json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")  # no end of our fence inside a text
    return f"{key}: {UNPRINTABLE.sub(lambda found: f'{chr(92)}u{ord(found[0]):04x}', text)}\n"


def base_model(id_: str) -> str | None:
    """Return the Hub id of a base, or None if it does not come from the Hub."""
    name = id_.removeprefix("hf/")
    if id_.startswith("torchvision/") or not HUB_ID.fullmatch(name):
        return None
    return name if id_.startswith(("hf/", "timm/")) else None


def _front_matter(description: Mapping[str, Any], repo_id: str | None) -> dict[str, Any]:
    base = description["base"]
    front: dict[str, Any] = {"library_name": "maskpack"}
    if (hub := base_model(base["id"])) is not None:
        front |= {"base_model": hub, "base_model_relation": "adapter"}
    front["tags"] = ["maskpack", "binary-mask", f"{OWN_TAG}{base['digests']['float32'][:12]}"]
    if description["task"] is not None:
        front["pipeline_tag"] = description["task"]
    accuracies = {key: value for key, value in _metrics(description).items() if "accuracy" in key}
    if accuracies and description["task"] is not None:
        data = (description["training"] or {}).get("data")
        data_name = (
            data.get("id", "unknown") if isinstance(data, dict) else data if isinstance(data, str) else "unknown"
        )
        front["model-index"] = [
            {
                "name": repo_id or "maskpack adapter",
                "results": [
                    {
                        "task": {"type": description["task"]},
                        "dataset": {"name": str(data_name), "type": str(data_name)},
                        "metrics": [{"type": "accuracy", "name": k, "value": v} for k, v in sorted(accuracies.items())],
                    }
                ],
            }
        ]
    return front


def _metrics(description: Mapping[str, Any]) -> dict[str, float]:
    metrics = (description["training"] or {}).get("metrics")
    if not isinstance(metrics, dict):
        return {}
    numbers = {key: value for key, value in metrics.items() if type(value) in (int, float)}
    return {key: value for key, value in numbers.items() if abs(value) < HUGE}


def _body(description: Mapping[str, Any], repo_id: str | None) -> str:
    base, sets = description["base"], description["sets"]
    revision = f" at revision {_code(base['revision'])}" if base["revision"] else ""
    parts = [
        f"# {_escape(repo_id or 'maskpack adapter')}",
        f"Binary weight masks for {_code(base['id'])}{revision}: one bit for each weight of the frozen network.",
        "```python\nfrom maskpack import load_mask\n\n"
        f"model = load_mask(model, {json.dumps(repo_id or 'USER/NAME')})\n```\n\n"
        "`model` has to be the base named above, with the same weights.",
        "| mask set | parameters | weights | density | bytes | bits per weight |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        + "\n".join(
            f"| {name} | {one['parameters']} | {one['weights']:,} | {one['density']:.4f} | "
            f"{one['payload_bytes'] + one['table_bytes']:,} | {one['bits_per_weight']:.4f} |"
            for name, one in sets.items()
        ),
        f"The file has {description['size']:,} bytes, {description['times_smaller_than_float32']:.1f} times fewer than "
        f"the masked weights in float32.",
    ]
    if metrics := _metrics(description):
        rows = "\n".join(f"| {_escape(key)} | {value:.4g} |" for key, value in sorted(metrics.items()))
        parts.append(f"| result | value |\n| --- | --- |\n{rows}")
    if description["class_names"]:
        names = description["class_names"]
        more = f", … ({len(names)} in all)" if len(names) > 20 else ""
        parts.append(f"Classes: {', '.join(map(_escape, names[:20]))}{more}")
    if description["training"]:
        record = json.dumps(description["training"], indent=2, sort_keys=True)
        parts.append(f"Training record:\n\n{_fenced(record)}")
    digest = base["digests"]["float32"]
    parts.append(f"mask_id {_code(description['mask_id'])}, base digest (float32) {_code(digest)}.")
    return "\n\n".join(parts)


def _escape(text: object) -> str:
    """Make text from an adapter harmless in Markdown: no markup, no HTML, no end of our fence."""
    return re.sub(r"([\\`*_{}\[\]<>#|!&~])", r"\\\1", re.sub(r"\s+", " ", str(text)))


def _code(text: object) -> str:
    text = re.sub(r"[`|<>]|\s+", " ", str(text))
    return f"`{text}`"


def _fenced(text: str) -> str:
    """Return a code block; `<` is written as JSON escapes it, so that the text cannot close our fence."""
    return "```json\n" + text.replace("<", "\\u003c").replace("`", "\\u0060") + "\n```"
