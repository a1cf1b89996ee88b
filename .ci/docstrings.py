"""An extension of griffe for the site: the code under "Example:" in a docstring is shown as code."""

import re
import textwrap
from typing import Any

import griffe

EXAMPLE = re.compile(r"^Example:\n((?:(?:    .*)?\n?)+)\Z", re.MULTILINE)


class Examples(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(_fenced, obj.docstring.value)


def _fenced(found: re.Match[str]) -> str:
    return f"**Example**\n\n```python\n{textwrap.dedent(found[1]).strip()}\n```\n"
