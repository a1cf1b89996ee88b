"""Fuzz the command line: `python -m tests.fuzz.fuzz_cli --seconds 120`; make fuzz runs it, the test suite a short one.

Runs verbs on spoiled adapter files (mutations.py) most of which have good digests, half of them with text that acts on
terminals in some member of the header. Every run must end with a known exit status and without a traceback, and may
write nothing but printable characters and line ends. Every few cases the verb runs in a child process on a
pseudo-terminal, one that is not styled (TERM=dumb) or one that is, where rich's own colours and cursor movements are
allowed too. `--seed S --case N` repeats a case.
"""

import os

os.environ.update(NO_PROXY="127.0.0.1", HF_HUB_OFFLINE="1", COLUMNS="200", OMP_NUM_THREADS="1")

import contextlib
import io
import json
import pty
import random
import re
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from maskpack_cli.main import app
from maskpack_cli.main import main as command_line
from PIL import Image
from torch import nn
from typer.main import get_command

from maskpack.adapter.card import CARD_FILE, render_card
from maskpack.adapter.content import Parts
from maskpack.adapter.describe import config_text, inspect_adapter
from maskpack.adapter.read import CONFIG_FILE, MODEL_FILE, read_adapter
from maskpack.adapter.write import save_adapter
from maskpack.backbone.fingerprint import fingerprint
from maskpack.backbone.model import Embedding, Head
from maskpack.errors import AdapterError
from maskpack.mask import MaskSet

from .damage import File
from .fuzz_reader import SLOW, fuzz, valid_files
from .mutations import ACTING, edit, mutated

ON_TERMINAL = 10  # of so many cases one runs on a pseudo-terminal
STATUSES = (0, 1, 2)
torch.set_num_threads(1)  # children are forked
VERBS = get_command(app)  # which takes a tenth of a second to make
STYLE = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\?25[hl]|\x1b\[2K|\x1b\[1A|\r")  # what rich writes by itself
NET = """
from torch import nn, random, manual_seed

def make():
    with random.fork_rng():
        manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
"""
Case = list[str]


def loadable(net: Path) -> bytes:
    """Return an adapter file of the network in a file, which has all that `predict` and `export` need."""
    scope: dict[str, Any] = {}
    exec(NET, scope)
    net.write_text(NET)
    model: nn.Module = scope["make"]()
    masks = MaskSet.from_tensors({"0.weight": torch.rand(4, 3, 3, 3) < 0.8})
    head = Head(Embedding("3"), torch.rand(2, 4), torch.rand(2))
    about: dict[str, Any] = {"preprocess": {"kind": "image", "size": 8, "resize": 8}, "class_names": ["x", "y"]}
    about |= {"task": "image-classification", "training": {"metrics": {"accuracy": 0.5}, "data": {"id": "x"}}}
    path = net.with_suffix(".safetensors")
    save_adapter(path, Parts(masks, head), fingerprint(model, id="net:make", head=["3"]), codec="raw", **about)
    return path.read_bytes()


def spoiled(seeds: list[bytes], rng: random.Random) -> bytes:
    """Return a file in which members of the header have text that acts, or one that is spoiled in any way."""
    return mutated(seeds, rng) if rng.random() < 0.5 else with_text(rng.choice(seeds), rng)


def with_text(raw: bytes, rng: random.Random) -> bytes:
    """Return a file in which members of the header have text that acts, with good digests."""
    file = File.of(raw)
    try:
        for _ in range(rng.choice((1, 3))):
            act(file.inner, "".join(rng.choice((*ACTING, "a", " ")) for _ in range(rng.choice((1, 3)))), rng)
        return file.joined()
    except (KeyError, TypeError, IndexError, AttributeError, ValueError):
        return raw  # an earlier change took away what a later one works on


def act(inner: dict[str, Any], text: str, rng: random.Random) -> None:
    """Put text into a member of an adapter's header."""
    one = rng.choice(list(inner["sets"].values()))
    match rng.randrange(5):
        case 0:
            inner["training"] = {"metrics": {text: rng.choice((text, 0.5, [text]))}, text: text}
        case 1:
            inner["class_names"] = [text, f"{text}b"]
        case 2:
            rng.choice(one["codings"])[rng.choice(("codec", "op", text))] = text
        case 3:
            one["names"] = one["names"].replace(".weight", f"{text}.weight")
        case _:
            edit(inner, rng)


def cases(folder: Path) -> list[Callable[[Path, random.Random], Case]]:
    """Return what makes the words of each verb, given the file."""
    net = ["--backbone", f"{folder / 'net.py'}:make"]
    new, good, image = folder / "new", folder / "net.safetensors", folder / "x.png"
    Image.new("RGB", (9, 9)).save(image)
    return [
        lambda path, rng: ["inspect", str(path), *rng.choice(([], ["--parameters"], ["--json"], ["--quiet"]))],
        lambda path, rng: ["verify", str(path), *rng.choice(([], net, ["--json"]))],
        lambda path, rng: ["diff", str(path), str(rng.choice((path, good))), *rng.choice(([], ["--json"]))],
        lambda path, rng: ["convert", str(path), str(new), "--codec", "raw", *rng.choice(([], ["--json"]))],
        lambda path, rng: ["combine", "and", str(path), str(rng.choice((path, good))), "--output", str(new)],
        lambda path, rng: ["export", str(path), *net, "--output", f"{new}.safetensors"],
        lambda path, rng: ["predict", str(path), str(image), *net],
        lambda path, rng: ["push", str(path), str(folder / "registry/x"), *rng.choice(([], ["--dry-run"]))],
        lambda path, rng: ["pull", str(path), "--output", str(new)],
        lambda path, rng: ["list", *rng.choice(([], ["--json"], [rng.choice(ACTING)]))],
        lambda path, rng: ["inspect", rng.choice(ACTING).replace("\0", "") or "x"],
    ]


def check_text(text: str) -> None:
    """Raise AssertionError if text does more than show itself."""
    acting = sorted({letter for letter in text if not letter.isprintable() and letter != "\n"})
    assert not acting, f"{acting} in {text[:2000]!r}"
    assert "Traceback" not in text, text[-3000:]


def in_this_process(words: Case) -> None:
    shown, status = io.StringIO(), 0
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        try:
            VERBS(words, "maskpack")
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0
    assert status in STATUSES, status
    check_text(shown.getvalue())


def written_to(terminal: int) -> bytes:
    """Return all that a child writes to a pseudo-terminal until it ends; this side of it is closed then."""
    shown = b""
    try:
        while piece := os.read(terminal, 1 << 16):
            shown += piece
    except OSError:  # how Linux says that the child has ended
        pass
    finally:
        os.close(terminal)
    return shown


def on_terminal(words: Case, terminal: str) -> None:
    """Run the command line in a child whose standard streams are a pseudo-terminal."""
    child, descriptor = pty.fork()
    if child == 0:
        status = 70
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(SLOW - 2)
            os.environ["TERM"] = terminal
            sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
            sys.argv = ["maskpack", *words]
            command_line()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    try:
        shown = written_to(descriptor)
    finally:
        _, status = os.waitpid(child, 0)
    text = shown.decode(errors="backslashreplace").replace("\r\n", "\n")
    check_text(STYLE.sub("", text) if terminal != "dumb" else text)
    assert os.waitstatus_to_exitcode(status) in STATUSES, (status, text)


def check_files(path: Path) -> None:
    """Check the card and the config of a file that can be read, as they would be pushed."""
    try:
        description = inspect_adapter(read_adapter(path))
    except AdapterError:
        return
    check_text(render_card(description, "user/name"))
    check_text(config_text(description, path.name))


def cache_config(folder: Path, text: str) -> None:
    """Put an adapter with this config into the Hub's cache, which `list` reads."""
    snapshot = folder / "hub/models--user--name/snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True, exist_ok=True)
    (snapshot / MODEL_FILE).write_bytes(b"x")
    (snapshot / CONFIG_FILE).write_text(text)
    (snapshot / CARD_FILE).write_text("x")


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        constants.HF_HUB_CACHE = str(folder / "hub")
        seeds = [*([loadable(folder / "net.py")] * 5), *valid_files(folder)[::3]]
        config = config_text(inspect_adapter(read_adapter(folder / "net.safetensors")), MODEL_FILE)
        verbs = cases(folder)

        def run(data: bytes, path: Path, rng: random.Random) -> None:
            path.write_bytes(data)
            for left in (folder / "new", folder / "registry"):
                shutil.rmtree(left, ignore_errors=True)
            words = rng.choice(verbs)(path, rng)
            if words[0] == "list":
                about = json.loads(config)
                edit(about, rng)
                cache_config(folder, json.dumps(about))
            if rng.randrange(ON_TERMINAL):
                in_this_process(words)
                check_files(path)
            else:
                on_terminal(words, rng.choice(("dumb", "xterm-256color")))

        return fuzz(__doc__, seeds, spoiled, run)


if __name__ == "__main__":
    sys.exit(main())
