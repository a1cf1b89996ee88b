"""examples/: every script runs, in a process of its own, on small data; the app where gradio is installed."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from pathlib import Path
from typing import IO
from urllib.request import Request, urlopen

import pytest

import maskpack
from maskpack.backbone.load import export_state
from maskpack.training import TrainConfig, load_data, train_mask

from .helpers_process import Forked

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
SPACE = os.environ.get("MASKPACK_GRADIO", sys.executable)  # a Python that has gradio and maskpack
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what `maskpack demo` leaves, less trained, a table of texts, and a small encoder."""
    from sklearn.datasets import load_digits
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("examples")
    demo = root / "demo-output"
    demo.mkdir()
    shutil.copyfile(ROOT / "cli/maskpack_cli/digits_backbone.py", demo / "backbone.py")
    backbone = maskpack.load_backbone(f"{demo}/backbone.py:digits_cnn", random_weights=0)
    export_state(demo / "backbone.safetensors", backbone.model)
    result = train_mask(backbone, load_data("digits:5-9"), TrainConfig(steps=20, batch_size=32))
    maskpack.save_adapter(demo / "adapter", result.parts, result.base, result.about)

    from PIL import Image

    Image.fromarray((load_digits().images[5] * 15).astype("uint8")).save(root / "digit.png")
    words = {"card": "delivery", "rate": "exchange"}
    (root / "questions").mkdir()
    for split, times in (("train", 24), ("test", 4)):
        rows = [f"where is my {word} {at},{label}" for at in range(times) for word, label in words.items()]
        (root / "questions" / f"{split}.csv").write_text("\n".join(["text,label", *rows]))
    known = ["[PAD]", "[UNK]", "where", "is", "my", *words]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(known)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    options = {"pad_token": "[PAD]", "unk_token": "[UNK]", "model_max_length": 32}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options).save_pretrained(root / "encoder")
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(known), **size)).save_pretrained(root / "encoder")
    return root


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("images.py --steps 30", r"bytes, test accuracy \d\.\d+\n(.|\n)*the base is back, to the bit"),
        (
            "texts.py --backbone hf/./encoder --data questions --steps 30",
            r"bytes, test accuracy (.|\n)*true \w+: where",
        ),
        ("own_loop.py --model encoder --data questions --steps 20", "computes what was trained: "),
        ("many_tasks.py --steps 10", r"middle: accuracy(.|\n)*most: predicted \d, true \d\n[\d,]+ bytes in memory"),
    ],
    ids=lambda words: words.split(".")[0],
)
def test_example(words: str, said: str, folder: Path) -> None:
    with Forked(script(*words.split()), folder) as process:
        code, output, errors = process.ended()
    assert code == 0, errors
    assert re.search(said, output), output


def script(name: str, *words: str) -> Callable[[], None]:
    """Return a call of an example, for a process of its own."""

    def call() -> None:
        sys.argv = [name, *words]
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return call


def printed(output: IO[str], expected: str) -> str:
    """Return the first group of what a server prints, once it has printed it."""
    lines = ""
    while not (found := re.search(expected, lines)):
        line = output.readline()
        assert line, f"it ended: {lines}"
        lines += line
    return found[1]


def test_server(folder: Path) -> None:
    with Forked(script("serve.py", "--port", "0"), folder) as process:
        address = printed(process.output, r"http://(\S+)")

        def ask(**asked: str) -> tuple[int, dict[str, object]]:
            with closing(HTTPConnection(address, timeout=60)) as connection:
                connection.request("POST", "/", json.dumps(asked))
                with connection.getresponse() as answer:
                    return answer.status, json.loads(answer.read())

        status, answer = ask(mask="digits", image="digit.png")
        assert status == 200
        assert answer["label"] in set("56789")
        assert ask(mask="unknown", image="digit.png")[0] == 400
        assert ask(mask="digits", image="none.png")[0] == 400


def test_space(folder: Path) -> None:
    """The real app, called over HTTP as Gradio's own client does it."""
    if subprocess.run([SPACE, "-c", "import gradio"], capture_output=True, check=False).returncode:
        pytest.skip("needs gradio, or MASKPACK_GRADIO: a Python that has it")
    ready = r"(?s)(http://127\S+?)/?\s.*public link"  # the app looks at itself first, and gives itself three seconds
    quiet = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SERVER_PORT": "7931", "PYTHONUNBUFFERED": "1"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "cli")])
    where = {**os.environ, **quiet, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    program = [SPACE, EXAMPLES / "space" / "app.py"]
    with (
        subprocess.Popen(program, cwd=folder, env=where, stdout=subprocess.PIPE, text=True) as process,
        ExitStack() as ends,
    ):
        import base64

        ends.callback(process.terminate)
        assert process.stdout
        address = printed(process.stdout, ready)

        url = "data:image/png;base64," + base64.b64encode((folder / "digit.png").read_bytes()).decode()
        asked = json.dumps({"data": ["digits 5-9", {"url": url, "meta": {"_type": "gradio.FileData"}}]}).encode()
        head = {"Content-Type": "application/json"}
        with urlopen(Request(f"{address}/gradio_api/call/classify", asked, head), timeout=60) as answer:
            event = json.load(answer)["event_id"]
        with urlopen(f"{address}/gradio_api/call/classify/{event}", timeout=60) as answer:
            text = answer.read().decode()
        assert "event: complete" in text, text
        label, took = json.loads(text.split("data: ")[-1])
        assert label["label"] in set("56789")
        assert "switched in" in took
