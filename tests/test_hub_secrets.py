"""A server that repeats the credentials: no message, traceback, log line or output shows them."""

import base64
import json
import logging
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import huggingface_hub.constants as constants
import pytest
import torch

from maskpack import load_mask
from maskpack.backbone.load import load_backbone
from maskpack.errors import MaskpackError
from maskpack.hub.pull import pull
from maskpack.hub.push import push
from maskpack.hub.search import search_adapters
from maskpack.network import chain, redact

from .helpers_hub import contents
from .helpers_hub_fixtures import BIRDS, CONTENT
from .helpers_hub_fixtures import adapter as adapter
from .helpers_hub_fixtures import birds as birds
from .helpers_hub_fixtures import hub as hub
from .helpers_hub_fixtures import pytest_generate_tests as pytest_generate_tests
from .helpers_hub_fixtures import waits as waits
from .helpers_hub_server import WRITE_TOKEN, HubServer, lies

TOKENS = {
    "user": "hf_AbCdEfGhIjKlMnOpQrStUvWxYz",
    "oauth": "hf_oauth_x-y.z_0123456789abcdef",
    "web token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhbGljZSJ9.c2lnbmF0dXJlLXBhcnQ",
    "arbitrary": 'p@ss/w0rd+"x=\\y?&%',
}


def forms(token: str) -> dict[str, str]:
    return {
        "plain": token,
        "percent": quote(token, safe=""),
        "lower percent": quote(token, safe="").replace("%2F", "%2f").replace("%2B", "%2b"),
        "json": json.dumps(token)[1:-1],
        "base64": base64.b64encode(token.encode()).decode(),
        "base64 of a pair": base64.b64encode(f"user:{token}".encode()).decode(),
        "url-safe base64": base64.urlsafe_b64encode(f"al:{token}".encode()).decode(),
    }


def shown(error: BaseException) -> str:
    """All that anybody can print of an error."""
    words = [f"{one} {one.args} {vars(one)}" for one in chain(error)]
    return "\n".join([*words, *traceback.format_exception(error)])


def assert_hidden(token: str, text: str) -> None:
    for name, form in forms(token).items():
        for part in (form, form[: len(form) // 2], form[len(form) // 2 :]):  # nor is a half of it
            at = text.find(part)
            assert at < 0, f"{name}: {text[max(0, at - 200) : at + 200]}"


VERBS: dict[str, Callable[[Path, str | None], object]] = {
    "pull": lambda _, token: pull(BIRDS, token=token),
    "push": lambda adapter, token: push(adapter, BIRDS, token=token),
    "search": lambda _, token: search_adapters("birds", token=token),
    "load_mask": lambda _, token: load_mask(torch.nn.Linear(2, 2), BIRDS, token=token),
}


def use_token(source: str, token: str, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Make a token the one in force: the environment's, the login's or an argument, which is returned."""
    if source == "environment":
        monkeypatch.setenv("HF_TOKEN", token)
    if source == "login":
        Path(constants.HF_TOKEN_PATH).parent.mkdir(parents=True, exist_ok=True)
        Path(constants.HF_TOKEN_PATH).write_text(token)
    return token if source == "argument" else None


@pytest.mark.parametrize(
    ("kind", "source"),
    [*((kind, "argument") for kind in TOKENS), ("arbitrary", "environment"), ("arbitrary", "login")],
)
@pytest.mark.transport("lfs")
def test_token_in_an_answer(
    birds: HubServer,
    adapter: Path,
    kind: str,
    source: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    token = TOKENS[kind]
    given = use_token(source, token, monkeypatch)
    caplog.set_level(logging.DEBUG)
    repeated = forms(token).values()
    # behind much else the words are cut off, in the middle of it
    messages = [", ".join(repeated), *(f"{'x' * 180} Bearer {form}" for form in repeated)]
    for call in VERBS.values():
        for number, message in enumerate(messages):
            birds.faults.rules.clear()
            for method in ("GET", "POST"):
                birds.fail("status", method, "hub:", status=(401, 500, 429)[number % 3], message=message, times=99)
            with pytest.raises(MaskpackError) as caught:
                call(adapter, given)
            assert_hidden(token, shown(caught.value))
    output = capfd.readouterr()
    assert_hidden(token, caplog.text + output.out + output.err)


@pytest.mark.parametrize("kind", TOKENS)
@pytest.mark.transport("lfs")
def test_token_in_an_address_or_a_right_answer(birds: HubServer, kind: str) -> None:
    token = TOKENS[kind]
    for target in (f"{birds.endpoint}/gone/{quote(token)}?key={quote(token)}", f"gopher://x/{quote(token)}"):
        birds.faults.rules.clear()
        birds.fail("status", "GET", "hub:", status=302, headers={"Location": target}, times=9)
        for call in (VERBS["pull"], VERBS["search"]):
            with pytest.raises(MaskpackError) as caught:
                call(Path(), token)
            assert_hidden(token, shown(caught.value))
    birds.faults.rules.clear()
    token = WRITE_TOKEN
    birds.fail("lie", "GET", "hub:/api/models", times=9, change=lies.field("sha", token))
    with pytest.raises(MaskpackError, match="is said to be at commit") as caught:
        pull(BIRDS, token=token)
    assert_hidden(token, shown(caught.value))
    quoting = contents() | {"maskpack_config.json": json.dumps({"size": token, "sha256": token}).encode()}
    birds.faults.rules.clear()
    birds.add(BIRDS, quoting)
    with pytest.raises(MaskpackError) as caught:
        pull(BIRDS, token=token)
    assert_hidden(token, shown(caught.value))


def test_short_lived_tokens_and_signatures(birds: HubServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    birds.fail(
        "status", "GET", "store:", status=403, message="<SignatureProvided>SIGNATURE</SignatureProvided>", times=99
    )
    with pytest.raises(MaskpackError) as caught:
        pull(BIRDS, token=WRITE_TOKEN)
    text = shown(caught.value) + caplog.text
    sent = [line for line in birds.requests("GET", "store:") if CONTENT in line]
    assert sent or birds.transport == "xet"
    for line in sent:
        assert line.partition("signature=")[2] not in text
    assert "signature=" not in text.replace("signature=***", "")
    assert not [word for word in ("xet_read_", "xet_write_") if word in text]


@pytest.mark.transport("lfs")
def test_token_in_the_error_of_another_library(birds: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_TOKEN", TOKENS["arbitrary"])
    for form in forms(TOKENS["arbitrary"]).values():
        birds.faults.rules.clear()
        for method in ("GET", "HEAD"):
            birds.fail("status", method, "hub:", status=401, message=f"refused {form}", times=99)
        with pytest.raises(MaskpackError) as caught:
            load_backbone("hf/alice/network")
        assert_hidden(TOKENS["arbitrary"], shown(caught.value))


@pytest.mark.transport("lfs")
@pytest.mark.parametrize("debug", ["", "1"])
def test_token_in_the_output_of_a_command(birds: HubServer, tmp_path: Path, debug: str) -> None:
    token = TOKENS["oauth"]
    birds.fail("status", "GET", "hub:", status=401, message=f"refused {token}", times=99)
    command = [sys.executable, "-m", "maskpack_cli.main", "pull", BIRDS, "--json", "--token", token]
    environment = birds.env() | {"MASKPACK_DEBUG": debug}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "the token is refused" in done.stderr
    assert_hidden(token, done.stdout + done.stderr)


def test_what_is_no_secret_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "abc")  # too short to be told from words
    text = "cannot pull user/name@v1: https://huggingface.co/user/name has no hf_xet, basic tokens, abc; signature: off"
    assert redact(text) == text
    assert redact("at https://user:word@host/x?a=b&c=d, see") == "at https://***@host/x?*** see"
