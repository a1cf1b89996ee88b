"""Text that strangers wrote: nothing in it acts on a terminal, in a message, in a log, in Markdown or in a picture."""

import ast
import json
import os
import pty
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from maskpack_cli.main import app
from typer.testing import CliRunner, Result

from maskpack.adapter.content import Parts
from maskpack.adapter.describe import config_text, inspect_adapter
from maskpack.adapter.write import save_adapter
from maskpack.backbone.model import Embedding, Head
from maskpack.errors import CorruptAdapterError, HubError, MaskpackError, escape

from .fuzz.fuzz_cli import written_to
from .helpers_adapter import base_of, random_masks, with_header, write

CLI = Path(__file__).parent.parent / "cli" / "maskpack_cli"
NAMES = ("a\\[/b].weight", "b[red]\u202egnp.\u200bweight", "c:cat: [link=http://x.org]y[/link]")
ESCAPES = (
    "\x1b]0;pwned\x07",
    "\x9b31m",
    "\x1b[32m✓ signature valid",
    "\u202e\u2066\u200f",
    "\u200b\ufeff\u2060",
    "\u2028",
)
Header = dict[str, Any]


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("valid") / "x.safetensors"
    parts = Parts(random_masks(dict.fromkeys(NAMES, (40,))), Head(Embedding("fc"), torch.rand(2, 2), torch.rand(2)))
    about: dict[str, Any] = {"class_names": ["x", "y"], "task": "image-classification", "preprocess": {"kind": "image"}}
    save_adapter(path, parts, base_of(NAMES), codec="zstd", training={"metrics": {"accuracy": 0.5}}, **about)
    return path.read_bytes()


def run(*arguments: object) -> Result:
    """Run a verb; a traceback, or anything that does more than show itself, fails the test."""
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    shown = {letter for letter in result.output if not letter.isprintable()}
    assert shown <= {"\n"}, f"{shown} in {result.output!r}"
    return result


@pytest.mark.parametrize("category", ["Cc", "Cf", "Cs", "Zl", "Zp"])
def test_no_letter_of_these_categories_is_left(category: str) -> None:
    letters = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) == category]
    shown = escape("".join(letters))
    assert shown.isprintable()
    for letter in letters:
        assert escape(letter) == (" " if letter in "\t\n\r" else letter.encode("unicode_escape").decode())
    assert escape(shown) == shown
    assert json.loads(escape(json.dumps(letters, ensure_ascii=False), "json")) == letters


def test_text_that_does_nothing_stays() -> None:
    for text in ("", "a b", "Größe 猫 🐈", "[red]", r"a\[/b]", "$x$", "<b>"):
        assert escape(text) == text


def test_markdown_shows_text_and_no_formulas() -> None:
    assert escape("$x$ a_b 0.5 <b>", "markdown") == r"\$x\$ a\_b 0.5 \<b\>"
    assert escape(r"\(x\)", "markdown") == r"`\(x\)`"
    assert escape("a|`<b", "code") == r"`a\u007c\u0060\u003cb`"
    assert escape("", "code") == "` `"


def test_messages_are_escaped_whoever_prints_them() -> None:
    for kind in (MaskpackError, CorruptAdapterError, HubError):
        assert str(kind("no \x1b[31m\u202e\n✓ valid")) == r"no \x1b[31m\u202e ✓ valid"


@pytest.mark.parametrize("text", ESCAPES)
@pytest.mark.parametrize("verb", ["inspect", "verify", "diff", "convert"])
def test_escapes_of_a_file_do_not_reach_the_terminal(verb: str, text: str, valid: bytes, tmp_path: Path) -> None:
    def change(header: Header) -> None:
        header["training"] = {"metrics": {f"{text}accuracy": 0.5, "loss": text, text: {"a": 1}}, text: text}
        header["preprocess"]["note"] = text
        header["class_names"] = ["x", "a" + "".join(one for one in text if ord(one) >= 0x200B and one != "\u2028")]

    path = write(tmp_path, with_header(valid, change))
    more = {"inspect": ["--parameters"], "diff": [path], "convert": [tmp_path / "new", "--overwrite"]}
    result = run(verb, path, *more.get(verb, []))
    assert result.exit_code == 0, result.output
    assert json.loads(run(verb, path, *more.get(verb, []), "--json").stdout)
    if verb == "inspect":
        assert escape(text) in result.stdout
        assert NAMES[0] in result.stdout
        assert r"b[red]\u202egnp.\u200bweight" in result.stdout
    if verb == "convert":
        files = [one.read_text() for one in (tmp_path / "new").iterdir() if one.suffix != ".safetensors"]
        assert len(files) == 2
        assert all(letter.isprintable() or letter == "\n" for letter in "".join(files))


BAD: list[tuple[Callable[[Header], Any], str]] = [
    (lambda h: h.update(preprocess={"kind": "image", "interpolation": "evil"}), r"preprocess\.interpolation .*'evil"),
    (lambda h: h.update(preprocess={"kind": "image", "size": "big"}), r"\$\.preprocess\.size .*'big'"),
    (lambda h: h.update(preprocess={"kind": "image", "size": True}), r"\$\.preprocess\.size .*True"),
    (lambda h: h.update(preprocess={"kind": "image", "size": 1 << 40}), r"\$\.preprocess\.size .*8192"),
    (lambda h: h.update(preprocess={"kind": "image", "size": 99, "resize": 9}), r"\$\.preprocess.*99"),
    (lambda h: h.update(preprocess={"kind": "image", "mean": [0, 0]}), r"\$\.preprocess\.mean .*\(0, 0\)"),
    (lambda h: h.update(preprocess={"kind": "image", "mean": 0.5}), r"\$\.preprocess\.mean .*0\.5"),
    (lambda h: h.update(preprocess={"kind": "image", "std": [1, 1, 0]}), r"\$\.preprocess\.std .*\(1, 1, 0\)"),
    (lambda h: h.update(preprocess={"kind": "image", "std": [1, 1, "x"]}), r"\$\.preprocess\.std .*'x'"),
    (lambda h: h.update(preprocess={"kind": "text", "max_length": 0}), r"\$\.preprocess\.max_length .*0"),
    (lambda h: h.update(preprocess={"kind": "text", "max_length": None}), r"\$\.preprocess\.max_length .*None"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "match"), BAD, ids=[match for _, match in BAD])
def test_preprocessing_is_checked_on_reading(
    change: Callable[[Header], Any], match: str, valid: bytes, tmp_path: Path
) -> None:
    path = write(tmp_path, with_header(valid, change))
    with pytest.raises(CorruptAdapterError, match=match):
        inspect_adapter(path)
    assert run("inspect", path).exit_code == 1


@pytest.mark.parametrize("metrics", [[1], "x", 3, None, {}, {"accuracy": [1], "f1": {"a": 1}, "x": None, "y": 10**400}])
def test_a_training_record_is_for_information(metrics: Any, valid: bytes, tmp_path: Path) -> None:
    """Whatever types it has, masks are read, shown and written anew."""
    record = {"metrics": metrics, "data": 5, "combined": {"parents": [3]}, "transfer": []}
    path = write(tmp_path, with_header(valid, lambda header: header.update(training=record)))
    for words in (["inspect", path], ["verify", path], ["convert", path, tmp_path / "new", "--overwrite"]):
        assert run(*words).exit_code == 0


def test_codec_ids_and_settings_are_shown_as_they_are(valid: bytes, tmp_path: Path) -> None:
    def codec(header: Header) -> None:
        header["sets"]["default"]["codings"][0].update(codec=r"\[/b]")

    result = run("verify", write(tmp_path, with_header(valid, codec)))
    assert (result.exit_code, r"'\\[/b]'" in result.stderr) == (1, True)
    more = with_header(valid, lambda header: header["sets"]["default"]["codings"][0].update({"[/b]\x1b[2J": "\x9b"}))
    result = run("verify", write(tmp_path, more))
    assert (result.exit_code, r"[/b]\x1b[2J" in result.stderr) == (1, True)


def test_arguments_of_the_user_are_escaped(tmp_path: Path) -> None:
    for words in (["inspect", f"{tmp_path}/[/b]\x1b]0;x\x07"], ["list", "\x1b[31m[/x]"], ["diff", "\u202ea/b", "c"]):
        assert run(*words).exit_code in (1, 2)
    for more in (
        ["inspect", "x", "\x1b[31mextra"],
        ["--\x1b[31mno"],
        ["\x1b[31mno"],
        ["list", "--\u202e"],
        ["list", "-\x9b"],
    ):
        assert run(*more).exit_code == 2


def test_config_shows_names_as_they_are(valid: bytes, tmp_path: Path) -> None:
    path = write(tmp_path, with_header(valid, lambda header: header.update(class_names=["Größe 猫", "\u202e"])))
    text = config_text(inspect_adapter(path), path.name)
    assert "Größe 猫" in text
    assert "\u202e" not in text
    assert json.loads(text)["class_names"] == ["Größe 猫", "\u202e"]


def test_a_terminal_shows_names_as_they_are(valid: bytes, tmp_path: Path) -> None:
    """A real process on a real pseudo-terminal, with colours."""
    training = {"metrics": {text: text for text in ESCAPES}}
    path = write(tmp_path, with_header(valid, lambda header: header.update(training=training)))
    words = [sys.executable, "-m", "maskpack_cli.main", "inspect", str(path), "--parameters"]
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        words, stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | {"TERM": "xterm"}
    ) as child:
        os.close(theirs)
        shown = written_to(ours)
    text = re.sub(r"\x1b\[[01]m", "", shown.decode()).replace("\r\n", "\n")
    assert child.returncode == 0, text
    assert all(letter.isprintable() or letter == "\n" for letter in text), repr(text)
    for one in (*NAMES, *ESCAPES):
        assert escape(one) in text


@pytest.mark.parametrize("path", sorted(CLI.glob("*.py")), ids=lambda path: path.name)
def test_only_the_console_prints(path: Path) -> None:
    if path.name == "console.py":
        return
    calls = [ast.unparse(one.func) for one in ast.walk(ast.parse(path.read_text())) if isinstance(one, ast.Call)]
    assert not {"typer.echo", "typer.secho", "Console", "Text", "Text.from_markup"} & set(calls)
    assert not [one for one in calls if one.endswith((".write", ".print")) and "sys." in one]
