"""What a hostile server may answer: changes to right answers, for `HubServer.fail("lie", …, change=…)`."""

import json
from collections.abc import Callable
from typing import Any

from .messages import Response

Change = Callable[[Response], None]

NAMES = (
    "../x",
    "../../../../x",
    "/etc/x",
    ".git/config",
    "..\\x",
    "C:\\x",
    "a\0b",
    "a\nb",
    "",
    ".",
    "con",
    "sub/maskpack_model.safetensors",
    "maskpack_model.safetensors/x",
    "model.pkl",
)
ETAGS = ("../../../../x", "/tmp/x", "..", "", "a\\b", 'W/"../x"')


def _edit(response: Response, edit: Callable[[Any], Any]) -> None:
    if response.status == 200:
        response.body = json.dumps(edit(json.loads(response.body))).encode()


def more_names(*names: str) -> Change:
    """List also files of these names, each a copy of the last right entry."""
    return lambda response: _edit(response, lambda listed: [*({**listed[-1], "path": n} for n in names), *listed])


def other_name(old: str, new: str) -> Change:
    """List a file under another name."""

    def edit(listed: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**entry, "path": new} if entry["path"] == old else entry for entry in listed]

    return lambda response: _edit(response, edit)


def body(value: object) -> Change:
    """Answer other JSON."""
    return lambda response: _edit(response, lambda _: value)


def field(name: str, value: object) -> Change:
    """Answer with another value for a field."""
    return lambda response: _edit(response, lambda described: described | {name: value})


def headers(**values: str) -> Change:
    """Answer with other headers; `_` in a name stands for `-`."""
    return lambda response: response.headers.update({name.replace("_", "-"): text for name, text in values.items()})
