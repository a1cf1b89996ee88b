"""Language models on the meta device, offloaded, sharded or quantised: it works, or the error says what to do."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from maskpack import fingerprint, load_mask, load_masked, save_adapter, unload_mask
from maskpack.errors import BackboneMismatchError, SelectionError, StateError
from maskpack.training import attach_scores

from .helpers_loops import CASES, bare_bert, tokens
from .helpers_models import bits, random_masks, same

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
INPUT = tokens(1, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, an encoder, and an adapter of each."""
    path = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    CASES["language_model"](path).model.save_pretrained(path / "llama")  # type: ignore[operator]
    bare_bert(path / "bert")
    for name, cls in (("llama", "LlamaForCausalLM"), ("bert", "BertModel")):
        model = loaded(path / name, cls)
        save_adapter(path / f"{name}-mask", random_masks(model), fingerprint(model, id=f"tests:{name}"))
    return path


def loaded(path: Path, cls: str = "LlamaForCausalLM", **options: Any) -> nn.Module:
    model: nn.Module = getattr(transformers, cls).from_pretrained(path, **options)
    return model.eval()


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(INPUT)[0]
    return found


@pytest.mark.parametrize(("name", "cls"), [("llama", "LlamaForCausalLM"), ("bert", "BertModel")])
@pytest.mark.parametrize(
    "context", [lambda: torch.device("meta"), accelerate.init_empty_weights], ids=["meta", "empty"]
)
def test_base_and_mask_onto_an_empty_model(name: str, cls: str, context: Callable[[], Any], folder: Path) -> None:
    whole = loaded(folder / name, cls)
    expected = output(load_mask(whole, folder / f"{name}-mask"))
    with context():
        empty = type(whole)(whole.config).eval()
    state = torch.get_rng_state()
    load_masked(empty, folder / name, folder / f"{name}-mask")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(output(empty), expected)
    assert same(bits(empty), bits(whole))
    if name == "llama":
        assert empty.lm_head.weight is empty.model.embed_tokens.weight  # type: ignore[union-attr]


def test_buffers_that_nothing_computes_stay_an_error(folder: Path) -> None:
    whole = loaded(folder / "llama")
    with torch.device("meta"):
        empty = type(whole)(whole.config)
        empty.model.register_buffer("own", torch.ones(2), persistent=False)
    with pytest.raises(StateError, match=r"1 buffers on the meta device that no file of weights holds, .*'model\.own'"):
        load_masked(empty, folder / "llama", folder / "llama-mask")


def test_loaded_then_offloaded(folder: Path) -> None:
    model = loaded(folder / "llama")
    before = bits(model)
    load_mask(model, folder / "llama-mask")
    expected = output(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert torch.equal(output(model), expected)
    with pytest.raises(StateError, match=r"quantised or offloaded since the .*remove_hook_from_submodules\(model\)"):
        unload_mask(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(output(model), expected)
    unload_mask(model, force=True)
    assert same(bits(model), before)


@pytest.mark.parametrize("how", ["cpu", "disk", "map"])
def test_offloaded_then_loaded(how: str, folder: Path, tmp_path: Path) -> None:
    if how == "map":
        places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
        model = loaded(folder / "llama", device_map={**places, "model.layers": "disk"}, offload_folder=tmp_path)
    else:
        model = loaded(folder / "llama")
        offload = {"cpu": accelerate.cpu_offload, "disk": lambda m, **o: accelerate.disk_offload(m, tmp_path, **o)}[how]
        offload(model, execution_device="cpu")
    for call in (lambda: load_mask(model, folder / "llama-mask"), lambda: fingerprint(model, id="x")):
        with pytest.raises(BackboneMismatchError, match="where accelerate offloads weights, call load_mask before it"):
            call()
    with pytest.raises(SelectionError, match="on the meta device"):
        attach_scores(model)


def test_device_map_in_memory(folder: Path) -> None:
    model = loaded(folder / "llama", device_map={"": "cpu"})
    before = bits(model)
    unload_mask(load_mask(model, folder / "llama-mask"))
    assert same(bits(model), before)


@pytest.fixture
def mesh() -> Iterator[Any]:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def refused(model: nn.Module, kind: str, ref: Path) -> None:
    before = copy.deepcopy(model.state_dict())
    for call in (lambda: load_mask(model, ref), lambda: fingerprint(model, id="x")):
        with pytest.raises(BackboneMismatchError, match=rf"is a {kind} and cannot be masked; .* quantise or shard"):
            call()
    with pytest.raises(SelectionError, match=f"is a {kind} and cannot be masked"):
        attach_scores(model)
    assert model.state_dict().keys() == before.keys()


def test_sharded_models(folder: Path, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    model, alone = loaded(folder / "llama"), loaded(folder / "llama")
    expected = output(alone)
    fully_shard(model, mesh=mesh)
    for _ in range(2):  # the second time after a pass, which leaves whole copies of the weights
        assert fingerprint(model, id="x") == fingerprint(alone, id="x")
        load_mask(model, folder / "llama-mask")
        masked = output(model)
        assert torch.equal(output(unload_mask(model)), expected)
    assert torch.equal(masked, output(load_mask(alone, folder / "llama-mask")))
    fully_shard(alone, mesh=mesh)
    assert torch.equal(output(alone), masked)
    assert torch.equal(output(unload_mask(alone)), expected)
    with pytest.raises(StateError, match="this model is sharded, and load_masked gives a model whole tensors"):
        load_masked(model, folder / "llama", folder / "llama-mask")
    attach_scores(model)
    with pytest.raises(StateError, match=r"a sharded model with scores is saved by save_adapter\(path, model\)"):
        model.save_pretrained(folder / "no")  # type: ignore[operator]


def test_quantised_models_are_refused(folder: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = loaded(folder / "llama")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    refused(model, "Int8Tensor", folder / "llama-mask")
    model = load_mask(loaded(folder / "llama"), folder / "llama-mask")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    output(model)
    with pytest.raises(StateError, match="quantised or offloaded since the mask was loaded"):
        unload_mask(model)
