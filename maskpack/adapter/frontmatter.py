"""The YAML that a model card begins with: what the Hub reads and is searched by."""

import json
import re
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, DataError
from ..text import escape
from .fields import UNPRINTABLE
from .record import dataset_name, hub_dataset, metrics

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
