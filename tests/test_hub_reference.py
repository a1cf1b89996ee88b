"""References: every form, and a clear error for everything else."""

from pathlib import Path

import pytest

from maskpack.errors import AdapterError, ConfigError
from maskpack.hub.reference import Reference, parse_reference

from .helpers_hub import write_adapter

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("user/name", Reference("user/name")),
        ("User_1/na.me-2", Reference("User_1/na.me-2")),
        ("user/name@main", Reference("user/name", "main")),
        ("user/name@v1.0", Reference("user/name", "v1.0")),
        ("user/name@dev/one", Reference("user/name", "dev/one")),
        ("user/name@refs/pr/1", Reference("user/name", "refs/pr/1")),
        (f"user/name@{COMMIT}", Reference("user/name", COMMIT)),
        ("./folder", Reference(path=Path("folder"))),
        ("../folder", Reference(path=Path("../folder"))),
        ("..", Reference(path=Path(".."))),
        ("/folder/deep", Reference(path=Path("/folder/deep"))),
        ("~/folder", Reference(path=Path.home() / "folder")),
        ("./user/name@main", Reference(path=Path("user/name@main"))),
        ("file.safetensors", Reference(path=Path("file.safetensors"))),
        ("some/deep/file.safetensors", Reference(path=Path("some/deep/file.safetensors"))),
        (Path("user/name"), Reference(path=Path("user/name"))),
    ],
)
def test_forms(text: str | Path, expected: Reference) -> None:
    assert parse_reference(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected user/name, user/name@revision, ./folder"),
        ("name", "'name' is not a reference to an adapter; expected user/name"),
        ("name@main", "'name@main' is not a reference"),
        ("a/b/c", "'a/b/c' has too many slashes"),
        ("https://huggingface.co/user/name", "too many slashes"),
        ("user/", "'user/' has '', which cannot be a name on the Hub"),
        ("user/na me", "'user/na me' has 'na me', which cannot be a name on the Hub"),
        ("user/näme", "cannot be a name on the Hub: letters, digits"),
        ("user/name\n", "cannot be a name on the Hub"),
        ("user/-name", "cannot be a name on the Hub"),
        ("user/name.", "cannot be a name on the Hub"),
        ("user/na--me", "no '--'"),
        ("user/na..me", "no '--'"),
        ("user/name.git", "final '.git'"),
        ("user/" + "n" * 100, "has 105 characters; a Hub repository has at most 96"),
        ("user/name@", "'' in 'user/name@' cannot be a revision"),
        ("user/name@../main", "cannot be a revision; give a branch, tag or commit"),
        ("user/name@a..b", "cannot be a revision"),
        ("user/name@a b", "cannot be a revision"),
        ("user/name@a@b", "cannot be a revision"),
        ("user/name@/a", "cannot be a revision"),
        ("user/name@-a", "cannot be a revision"),
    ],
)
def test_refused(text: str, words: str) -> None:
    with pytest.raises(AdapterError) as caught:
        parse_reference(text)
    assert words in str(caught.value)


def test_revision_given_apart() -> None:
    assert parse_reference("user/name", "v1") == Reference("user/name", "v1")
    assert parse_reference("user/name@v1", "v1") == Reference("user/name", "v1")
    with pytest.raises(ConfigError, match="names the revision 'v1', but revision='v2' was given; give one of them"):
        parse_reference("user/name@v1", "v2")
    with pytest.raises(ConfigError, match=r"revision='v1' was given with the local path '\./folder'"):
        parse_reference("./folder", "v1")


def test_local_adapter_makes_it_ambiguous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user/name").mkdir(parents=True)
    assert parse_reference("user/name") == Reference("user/name")
    write_adapter(tmp_path / "user/name")
    words = r"is ambiguous.*write \./user/name for the folder here, or user/name@main for the Hub"
    with pytest.raises(AdapterError, match=words):
        parse_reference("user/name")
    assert parse_reference("user/name@main") == Reference("user/name", "main")
    assert parse_reference("user/name", "main") == Reference("user/name", "main")
    assert parse_reference("./user/name") == Reference(path=Path("user/name"))
    (tmp_path / "plain").mkdir()
    with pytest.raises(AdapterError, match=r"for the local one write \./plain"):
        parse_reference("plain")


def test_words() -> None:
    assert str(parse_reference("user/name@v1")) == "user/name@v1"
    assert str(parse_reference("./folder")) == "folder"
    assert parse_reference(f"user/name@{COMMIT}").is_pinned
    assert not parse_reference("user/name@main").is_pinned
