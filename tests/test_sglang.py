"""SGLang on a CPU, with the weight loader of the examples and by its HTTP calls: `make sglang`."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from maskpack import push

from .helpers_hub_fixtures import hub as hub
from .helpers_hub_fixtures import waits as waits
from .helpers_hub_server import HubServer
from .helpers_hub_server.accounts import WRITE_TOKEN
from .helpers_served import call, mask, merged, network, patch, running

if importlib.util.find_spec("sglang") is None:
    pytest.skip("SGLang is not installed; make sglang has an environment with it", allow_module_level=True)

SMOLLM2 = os.environ.get("MASKPACK_SMOLLM2")  # a folder, as benchmarks/smollm2.py makes it
ROOT, OWN = Path(__file__).parent.parent, Path(__file__).parent / "helpers_sglang"
QUESTIONS = ("What is the capital of France?", "Name three colours.", "What is 2 + 3?")
SAMPLING = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
LONG = 60  # tokens
OPTIONS = {
    "device": "cpu", "attention_backend": "torch_native", "dtype": "bfloat16", "mem_fraction_static": 0.3,
    "max_total_tokens": 2048, "context_length": 512, "disable_cuda_graph": True, "disable_overlap_schedule": True,
}  # fmt: skip
IN_PROCESS = """
import json, sys, time
import sglang, torch

def main():
    base, options, questions, sampling, refs, checkpoints, file = json.loads(sys.argv[1])
    engine, found = sglang.Engine(model_path=base, custom_weight_loader=["sglang_loader.switch"], **options), []

    def ask(name):
        found.append([name, [engine.generate(one, sampling)["text"] for one in questions]])  # one by one, as below

    ask("base")
    def flush(done, message, *_):  # the request that has just been answered may still count as running
        assert done or "Weights were updated, but the cache was not flushed" in message, message
        while not engine.flush_cache().success:
            time.sleep(0.1)

    for name in ("mask", "patch", "nothing", "mask", "base"):
        engine.begin_weight_update()
        zero = torch.zeros(1)
        flush(*engine.update_weights_from_tensor([(refs[name], zero)], load_format="sglang_loader.switch"))
        engine.end_weight_update()
        ask(name)
    for name, path in checkpoints.items():
        flush(*engine.update_weights_from_disk(path))
        ask("merged " + name)
    with open(file, "w") as out:
        json.dump(found, out)
    engine.shutdown()

if __name__ == "__main__":
    main()
"""


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(map(str, (OWN, ROOT / "examples")))
    return {**os.environ, "PYTHONPATH": path, "SGLANG_USE_CPU_ENGINE": "1", "PYTHONWARNINGS": "ignore", **more}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert SMOLLM2 is not None
    folder = shutil.copytree(SMOLLM2, tmp_path_factory.mktemp("world") / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    return folder


@pytest.mark.skipif(SMOLLM2 is None, reason="MASKPACK_SMOLLM2 names no model; make sglang does")
@pytest.mark.slow
@pytest.mark.timeout(6000)
@pytest.mark.transport("lfs")
def test_an_engine_and_a_server(tmp_path: Path, base: Path, hub: HubServer) -> None:
    model = network(base)
    paths = {"mask": mask(tmp_path / "mask", model), "patch": patch(tmp_path / "patch", model)}
    wanted = in_place(tmp_path, base, paths, hub)
    # whole checkpoints by HTTP, as docs/serving.md has it
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    words = [sys.executable, "-m", "maskpack_cli.main", "export", str(paths["patch"]), "--backbone", f"hf/{base}"]
    subprocess.run([*words, "--output", str(tuned / "model.safetensors")], check=True, capture_output=True)
    for file in base.glob("*.json"):
        shutil.copy(file, tuned)
    words = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(base)]
    for name, value in OPTIONS.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    with running(words, tmp_path, environment(), "/health_generate") as url:

        def answers() -> list[str]:
            return [call(f"{url}/generate", {"text": one, "sampling_params": SAMPLING})["text"] for one in QUESTIONS]

        assert answers() == wanted["base"]
        found = list[Any]()
        long = {"text": QUESTIONS[0], "sampling_params": {**SAMPLING, "max_new_tokens": LONG}}
        asking = threading.Thread(target=lambda: found.append(call(f"{url}/generate", long)))
        asking.start()
        time.sleep(1)
        call(f"{url}/pause_generation", {"mode": "retract"})
        assert asking.is_alive()
        call(f"{url}/update_weights_from_disk", {"model_path": str(tuned), "weight_version": "user/patch@4f2c"})
        call(f"{url}/continue_generation", {})
        asking.join()
        assert found[0]["meta_info"]["completion_tokens"] == LONG
        assert found[0]["meta_info"]["weight_version"] == "user/patch@4f2c"
        assert answers() == wanted["patch"]


def in_place(folder: Path, base: Path, paths: dict[str, Path], hub: HubServer) -> dict[str, list[str]]:
    """Switch in an engine, compare with whole checkpoints there, and return the answers with each adapter."""
    commit = push(paths["patch"], "alice/patch", token=WRITE_TOKEN).commit
    refs = {"mask": str(paths["mask"]), "patch": f"alice/patch@{commit}", "nothing": "./nothing", "base": "base"}
    checkpoints = {name: str(merged(folder / f"merged-{name}", base, path)) for name, path in paths.items()}
    (folder / "run.py").write_text(IN_PROCESS)
    given = [str(base), OPTIONS, QUESTIONS, SAMPLING, refs, checkpoints, str(folder / "found.json")]
    done = subprocess.run(
        [sys.executable, str(folder / "run.py"), json.dumps(given)], capture_output=True, text=True, check=False,
        env=environment(**hub.env(), MASKPACK_CHECKPOINT=str(base), HF_HUB_OFFLINE="0"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "./nothing is refused: " in done.stdout + done.stderr
    found = json.loads((folder / "found.json").read_text())
    assert [name for name, _ in found][1:6] == ["mask", "patch", "nothing", "mask", "base"]
    wanted = {name.removeprefix("merged "): said for name, said in found[-3:]}
    assert len({tuple(said) for said in wanted.values()}) == 3
    before = "base"
    for name, said in found:
        before = before if name == "nothing" else name.removeprefix("merged ")
        assert said == wanted[before], name
    return wanted
