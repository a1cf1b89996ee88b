"""Text from files, servers and users, made harmless for the place where it is shown."""

import json
import re
from typing import Literal

Target = Literal["plain", "markdown", "code", "json"]

LINE_ENDS = re.compile(r"[\t\n\r]+")
MARKUP = re.compile(r"([`*_\[\]<>|&~$])")
# what some renderers make a link of although it is escaped: addresses, hosts, e-mail; a backslash may begin a formula
LINKS = re.compile(r"\\|@|//|\w\.[^\W\d]|mailto:|xmpp:", re.IGNORECASE)


def escape(text: object, target: Target = "plain") -> str:
    r"""Return text that shows itself and does nothing else.

    Characters that are not printable (controls, ESC, bidirectional and zero-width characters, separators of lines and
    paragraphs, halves of surrogate pairs, unusual spaces: `str.isprintable`) are shown as `\x1b` or `\u202e`, tabs and
    line ends as a space. Escaping twice changes nothing more, except in Markdown.

    Args:
        target: "plain" for terminals (print without markup), messages and logs. "markdown" for a line or a table's
            cell, without markup, HTML or links. "code" for a code span there. "json" for JSON text, whose meaning and
            line ends stay.
    """
    shown = str(text)
    if target == "json":
        return "".join(one if one.isprintable() or one == "\n" else json.dumps(one)[1:-1] for one in shown)
    shown = LINE_ENDS.sub(" ", shown)
    if not shown.isprintable():
        shown = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in shown)
    if target == "markdown" and not LINKS.search(shown):
        return MARKUP.sub(r"\\\1", shown)
    if target == "plain":
        return shown
    # neither the end of the span, nor of a table's cell, nor of a comment around it
    return f"`{re.sub('[`|<]', lambda found: f'{chr(92)}u{ord(found[0]):04x}', shown) or ' '}`"
