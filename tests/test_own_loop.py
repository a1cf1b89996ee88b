"""Own loops: what is saved from any model computes, loaded, what was trained, to the bit."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskpack import fingerprint, load_mask, save_adapter, unload_mask
from maskpack.errors import AdapterError, ConfigError, SelectionError, StateError
from maskpack.preprocess import TextPreprocess
from maskpack.runtime.apply import masked
from maskpack.training import attach_scores, count_trainable, extract_parts
from maskpack.training.methods.base import METHODS
from maskpack.training.scores import rounded

from .helpers_loops import CASES, Case, noise
from .helpers_models import bits, same

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def made(kind: str, folder: Path) -> Case:
    if kind == "retrieval":
        pytest.importorskip("sentence_transformers")
    if kind in ("unet", "dit"):
        pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CASES[kind](folder)


def train(case: Case, steps: int = 4, lr: float = 0.4) -> list[float]:
    """Train all that requires a gradient; the losses."""
    case.model.train()
    optimizer = torch.optim.Adam([one for one in case.model.parameters() if one.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = case.loss(case())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def outputs(case: Case) -> Tensor:
    case.model.eval()
    return case.outputs(case()).clone()


@pytest.mark.parametrize("kind", CASES)
def test_what_is_loaded_computes_what_was_trained(kind: str, folder: Path, tmp_path: Path) -> None:
    case = made(kind, folder)
    before, base = bits(case.model), outputs(case)
    torch.manual_seed(0)
    attach_scores(case.model, top=0.5, train=["norms", "biases"], head=case.head)
    train(case)
    trained = outputs(case)
    assert not torch.equal(trained, base)
    adapter = save_adapter(tmp_path / "adapter", case.model, task="anything")
    assert torch.equal(outputs(case), trained), "saving changes nothing"
    parts = extract_parts(case.model)
    assert same(bits(case.model), before)
    assert parts.masks == adapter.parts(base=case.model).masks
    assert 0 < parts.masks.density < 1
    load_mask(case.model, tmp_path / "adapter")
    assert torch.equal(outputs(case), trained)
    unload_mask(case.model)
    assert same(bits(case.model), before)


HEADS = {
    "classification": ("classifier", 3),
    "token_classification": ("classifier", 5),
    "regression": ("classifier", 1),
    "image_classification": ("fc", 3),
}


@pytest.mark.parametrize("kind", [*HEADS, "detection", "segmentation"])
def test_a_new_head_is_trained_and_not_masked(kind: str, folder: Path) -> None:
    case = made(kind, folder)
    scores = attach_scores(case.model, head=case.head)
    modules = ["bbox_predictor", "class_labels_classifier"] if kind == "detection" else ["classifier"]
    modules = ["fc"] if kind == "image_classification" else modules
    learning = {name for name, one in case.model.named_parameters() if one.requires_grad and "scores" not in name}
    assert learning == {n for n, _ in case.model.named_parameters() if n.split(".")[0] in modules}
    assert not any(name.split(".")[0] in modules for name in scores)
    parts = extract_parts(case.model)
    if kind in HEADS:
        assert parts.head is not None
        assert (parts.head.module, len(parts.head.weight)) == HEADS[kind]
        assert not parts.parameters
    else:
        assert parts.head is None
        assert set(parts.parameters) == learning


def test_an_adapter_of_an_own_loop_predicts(folder: Path, tmp_path: Path) -> None:
    case = made("retrieval", folder), made("classification", folder)[0]
    model, tokenizer = case[1], case[0].model.tokenizer
    attach_scores(model, top=0.5)
    train(Case(model, made("classification", folder).inputs))
    about = {"class_names": ["one", "two", "three"], "preprocess": TextPreprocess(16), "task": "text-classification"}
    adapter = save_adapter(tmp_path / "adapter", model, **about)
    assert adapter.about.preprocess == {"kind": "text", "max_length": 16}
    model.eval()
    logits = model(**tokenizer(["abc", "def g"], padding=True, return_tensors="pt")).logits
    extract_parts(model)
    load_mask(model, adapter)
    found = adapter.predict(model, ["abc", "def g"], tokenizer=tokenizer)
    assert [one.label for one in found] == [about["class_names"][int(row.argmax())] for row in logits]


def test_where_weights_come_from_is_what_the_model_says(folder: Path, tmp_path: Path) -> None:
    for kind, id_ in (("classification", "hf/bert"), ("image_classification", "timm/test_resnet"), ("unet", "UNet2DConditionModel")):  # fmt: skip  # noqa: E501
        case = made(kind, folder)
        attach_scores(case.model)
        assert save_adapter(tmp_path / "a.safetensors", case.model).base.id.startswith(id_)
        assert save_adapter(tmp_path / "a.safetensors", case.model, "mine").base.id == "mine"


# --- what scores take ------------------------------------------------------------------------------------------------


def test_scores_of_a_share_take_no_tensor_of_the_whole_size(folder: Path) -> None:
    case = made("language_model", folder)
    size, names = sum(one.numel() for one in case.model.parameters()), {n for n, _ in case.model.named_buffers()}
    scores = attach_scores(case.model, top=0.1, dtype=torch.bfloat16)
    added = {n: one for n, one in case.model.named_buffers() if n not in names}
    count = sum(one.numel() for one in scores.values())
    assert sum(one.numel() for one in added.values()) == count
    assert {one.dtype for one in added.values()} == {torch.int32}
    assert {one.dtype for one in scores.values()} == {torch.bfloat16}
    found = count_trainable(case.model)
    assert (found.scores, found.dense, found.total) == (count, 0, size)
    assert abs(found.scores - 0.1 * found.masked) < len(scores)
    assert str(found).startswith(f"{count:,} scores on {found.masked:,} masked weights, 0 parameters learn themselves")


def test_fused_experts_have_scores_too(folder: Path) -> None:
    case = made("experts", folder)
    fused = [f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in ("down_proj", "gate_up_proj")]
    scores = attach_scores(case.model, top=0.5)
    assert set(fused) <= set(scores)
    extract_parts(case.model)
    assert not set(fused) & set(attach_scores(case.model, experts=False))


# --- scores in bfloat16 ----------------------------------------------------------------------------------------------


def test_rounding_is_right_on_average_and_exact_where_it_can_be() -> None:
    torch.manual_seed(0)
    values = torch.tensor([1.0, -0.75, 1.001, -3.3, 1e-30, 0.0]).repeat(20_000, 1)
    found = rounded(values)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[:, [0, 1, 5]].float(), values[:, [0, 1, 5]])
    assert torch.allclose(found.double().mean(0), values[0].double(), rtol=2e-4, atol=0)
    for column in (2, 3, 4):
        nearest = values[0, column].to(torch.bfloat16)
        assert (found[:, column].unique() == nearest).any()
        assert len(found[:, column].unique()) == 2
    assert rounded(torch.tensor([float("inf"), -float("inf"), float("nan")])).isnan().tolist() == [False, False, True]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("closure", [False, True])
def test_small_steps_of_scores_in_bfloat16_count(tiny: nn.Module, optimizer: Any, closure: bool) -> None:
    torch.manual_seed(0)
    scores = attach_scores(tiny, select=["conv2.weight"], dtype=torch.bfloat16)["conv2.weight"]
    steps, lr = 200, 1e-3  # nearest rounding would leave every score at 1
    own = optimizer([scores], lr=lr)

    def loss() -> Tensor:
        own.zero_grad()
        assert scores.abs().max() > 0, "a closure computes with the scores"
        scores.grad = torch.ones_like(scores)
        return torch.zeros(())

    for _ in range(steps):
        if closure:
            own.step(loss)
        else:
            loss()
            own.step()
    assert abs(float(scores.detach().float().mean()) - (1 - steps * lr)) < 0.01
    assert scores.detach().unique().numel() > 1


def test_a_step_that_fails_leaves_scores_as_they_were(tiny: nn.Module) -> None:
    scores = attach_scores(tiny, select=["conv2.weight"], dtype=torch.bfloat16)["conv2.weight"]

    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise KeyboardInterrupt

    scores.grad = torch.ones_like(scores)
    with pytest.raises(KeyboardInterrupt):
        Failing([scores], lr=0.1).step()
    assert extract_parts(tiny).masks.density == 1


@pytest.mark.parametrize("method", [cls.id for cls in METHODS.all() if cls.learns])
def test_every_method_has_scores_in_bfloat16(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    scores = attach_scores(model, method, ["0.weight"], dtype=torch.bfloat16)
    optimizer = torch.optim.Adam(scores.values(), lr=0.5)
    for _ in range(3):
        model(noise(8, 16)).square().mean().backward()
        optimizer.step()
    expected = model.eval()(noise(8, 16))
    parts = extract_parts(model)
    with masked(model, parts):
        assert torch.equal(model(noise(8, 16)), expected)


# --- what others write of a model with scores ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["language_model", "unet", "retrieval", "experts", "whisper"])
def test_save_pretrained_writes_the_merged_model(kind: str, folder: Path, tmp_path: Path) -> None:
    case = made(kind, folder)
    keys = list(case.model.state_dict())
    attach_scores(case.model, top=0.5, train=["norms"])
    train(case)
    expected = outputs(case)
    case.model.save_pretrained(tmp_path / "merged")  # type: ignore[operator]
    if kind == "retrieval":
        from sentence_transformers import SentenceTransformer

        other = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    else:
        other, info = type(case.model).from_pretrained(tmp_path / "merged", output_loading_info=True)  # type: ignore[attr-defined]
        assert not any(info.values())
    assert torch.equal(outputs(case._replace(model=other)), expected)
    assert torch.equal(outputs(case), expected)
    extract_parts(case.model)
    assert list(case.model.state_dict()) == keys
    assert "save_pretrained" not in vars(case.model)


def test_checkpoints_of_an_own_loop_are_state_dicts(folder: Path) -> None:
    case, other = made("classification", folder), made("classification", folder)
    for one in (case, other):
        attach_scores(one.model, top=0.5)
    train(case)
    other.model.load_state_dict(copy.deepcopy(case.model.state_dict()))
    assert torch.equal(outputs(case), outputs(other))
    assert extract_parts(case.model).masks == extract_parts(other.model).masks


def test_a_copy_of_a_model_with_scores_is_its_own(folder: Path, tmp_path: Path) -> None:
    case = made("classification", folder)
    attach_scores(case.model, top=0.5)
    train(case)
    other = copy.deepcopy(case.model)
    expected = outputs(case)
    train(case)
    assert torch.equal(outputs(case._replace(model=other)), expected)
    other.save_pretrained(tmp_path / "merged")  # type: ignore[operator]
    again = type(other).from_pretrained(tmp_path / "merged")  # type: ignore[attr-defined]
    assert torch.equal(outputs(case._replace(model=again)), expected)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_a_module_under_two_names_has_one_set_of_scores(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    model = nn.ModuleDict({"left": encoder, "right": encoder})
    scores = attach_scores(model)
    assert list(scores) == ["left.0.weight", "left.2.weight"]
    with torch.no_grad():
        for one in scores.values():
            one.copy_(torch.randn(one.shape))
    x = noise(3, 4)
    expected = model["right"](x)
    save_adapter(tmp_path / "a", model)
    extract_parts(model)
    load_mask(model, tmp_path / "a")
    assert torch.equal(model["right"](x), expected)


def test_errors_of_own_loops(tiny: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(StateError, match="this model has no scores; call attach_scores"):
        save_adapter(tmp_path / "a", tiny)
    with pytest.raises(SelectionError, match="no module 'head' to be its head"):
        attach_scores(tiny, head="head")
    with pytest.raises(ConfigError, match=r"float32 or bfloat16, got torch\.float16"):
        attach_scores(tiny, dtype=torch.float16)
    with pytest.raises(ConfigError, match=r"top must be a share from 0 to 1, got 1\.5"):
        attach_scores(tiny, top=1.5)
    with pytest.raises(SelectionError, match="nothing is left to mask beside the head fc"):
        attach_scores(tiny, select=["fc.weight"], head="fc")
    attach_scores(tiny)
    with pytest.raises(ConfigError, match="takes its base's fingerprint itself"):
        save_adapter(tmp_path / "a", tiny, fingerprint(tiny, id="tiny"))
    adapter = save_adapter(tmp_path / "a", tiny)
    with pytest.raises(AdapterError, match="the base is None, expected the fingerprint of the frozen model"):
        save_adapter(tmp_path / "b", adapter.parts())
    with pytest.raises(StateError, match="this model has scores that learn; save_adapter"):
        load_mask(tiny, adapter)
    extract_parts(tiny)
    load_mask(tiny, adapter)
