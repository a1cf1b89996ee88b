"""What is transferred: every quantity against a slow reference, on small networks and real digits."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from maskpack import MaskSet, fingerprint, save_adapter
from maskpack.adapter.content import Parts
from maskpack.backbone.classifier import Classifier
from maskpack.backbone.load import Backbone, export_state
from maskpack.backbone.model import Embedding, Head
from maskpack.errors import AdapterError, BackboneError, ConfigError, DataError, StateError
from maskpack.lab import networks as evaluations_file
from maskpack.lab.networks import (
    Evaluations,
    Network,
    grouped,
    kept,
    put_state,
    read_networks,
    some,
    state_of,
    tensors_of,
    write_network,
)
from maskpack.lab.pairs import (
    Noise,
    barrier,
    barriers,
    common_mistakes,
    criticality,
    distances,
    interpolated,
    layer_features,
    linear_cka,
    mask_distance,
    mistakes,
    parameter_distance,
    rewound,
    similarities,
)
from maskpack.lab.starts import block_order, feature_reuse, from_checkpoints, shuffle_inputs
from maskpack.preprocess import ImagePreprocess
from maskpack.safetensors_io import write_tensors
from maskpack.training import TrainConfig, load_data
from maskpack.training.data.base import Data, loader, readable

from .conftest import TinyNet
from .helpers_models import TINY_FACTORY as FACTORY

CLASSES = 5
PREPROCESS = ImagePreprocess(8, 8)


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TinyNet().eval()


@pytest.fixture(scope="module")
def digits() -> Data:
    data = load_data("digits:0-4")
    assert data.train is not None
    assert data.test is not None
    return replace(data, train=some(data.train, 48), test=some(data.test, 60))


@pytest.fixture
def backbone() -> Backbone:
    return Backbone(network(0), "tests:tiny", embedding=Embedding("fc"), preprocess=PREPROCESS)


@pytest.fixture
def measured(backbone: Backbone, digits: Data, tmp_path: Path) -> Evaluations:
    return Evaluations(backbone.model, backbone, digits, folder=tmp_path / "evaluations")


def inputs(backbone: Backbone, examples: Any) -> tuple[Tensor, Tensor]:
    batches = list(readable(loader(examples, backbone.preprocess, batch_size=1000)))
    return batches[0]


def reference(backbone: Backbone, data: Data, state: Mapping[str, Tensor]) -> dict[str, float]:
    """Accuracy and loss with BatchNorm statistics computed layer by layer, in a copy of the model."""
    model: Any = copy.deepcopy(backbone.model)
    model.load_state_dict(state, strict=True)
    (x, _), (test, y) = inputs(backbone, data.train), inputs(backbone, data.test)
    with torch.no_grad():
        for conv, norm in ((model.conv1, model.bn1), (model.conv2, model.bn2)):
            x = conv(x)
            norm.running_mean.copy_(x.mean((0, 2, 3)))
            norm.running_var.copy_(x.var((0, 2, 3)))
            x = torch.relu(norm.eval()(x))
        logits = model.eval()(test)
    accuracy = float((logits.argmax(1) == y).double().mean())
    return {"accuracy": accuracy, "loss": float(functional.cross_entropy(logits, y))}


def agrees(found: Mapping[str, Any], expected: Mapping[str, float]) -> bool:
    return found["accuracy"] == expected["accuracy"] and math.isclose(found["loss"], expected["loss"], rel_tol=1e-4)


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- modules and states ----------------------------------------------------------------------------------------------


def test_modules_take_the_norm_behind_them() -> None:
    from benchmarks.backbones import CifarResNet

    assert grouped(network(0)) == {
        "conv1": ["conv1.weight", "bn1.weight", "bn1.bias"],
        "conv2": ["conv2.weight", "conv2.bias", "bn2.weight", "bn2.bias"],
        "fc": ["fc.weight", "fc.bias"],
    }
    deep = CifarResNet(2)
    blocks = grouped(deep, "block")
    assert list(blocks) == ["conv1", *(f"layer{stage}.{at}" for stage in (1, 2, 3) for at in (0, 1)), "linear"]
    assert blocks["layer1.0"] == [f"layer1.0.{n}" for n in ("conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight",
                                                             "bn2.weight", "bn2.bias")]  # fmt: skip
    everything = {name for names in blocks.values() for name in names}
    assert everything == {name for name, _ in deep.named_parameters()}, "every parameter is in one block"

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 1, 4))
            self.norm1 = nn.LayerNorm(4)
            self.attention = nn.MultiheadAttention(4, 2)
            self.norm2 = nn.LayerNorm(4)
            self.one, self.between, self.norm3 = nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4)

    odd = grouped(Odd())
    assert list(odd) == ["token", "norm1", "attention.in_proj_weight", "attention.in_proj_bias", "attention.out_proj",
                         "norm2", "one", "norm3"]  # fmt: skip
    assert grouped(Odd(), names=["one.weight"]) == {"one": ["one.weight"]}
    with pytest.raises(ConfigError, match="per must be one of module, block, got 'stage'"):
        grouped(Odd(), "stage")  # type: ignore[arg-type]


def test_states(backbone: Backbone) -> None:
    model = backbone.model
    state = state_of(model)
    assert same(state, bits(model))
    with kept(model):
        put_state(model, {name: tensor + 1 for name, tensor in state.items()})
        assert not same(state, bits(model))
    assert same(state, bits(model))
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert list(tensors_of(tied)) == ["0.weight", "0.bias", "1.bias"], "a tied tensor is one tensor"
    encoder = Classifier(nn.Linear(3, 4), nn.Linear(4, 2), Embedding(None, "mean"))
    assert list(tensors_of(encoder)) == ["weight", "bias", "head.weight", "head.bias"]
    with pytest.raises(StateError, match=r"1 of 1 tensors do not fit .* of shape \(3, 16\) .* has \(5, 16\)"):
        put_state(model, {"fc.weight": torch.zeros(3, 16)})
    with pytest.raises(StateError, match="first 'odd' of shape .* where the model has none"):
        put_state(model, {"odd": torch.zeros(1)})


# --- evaluations -----------------------------------------------------------------------------------------------------


def test_evaluation(measured: Evaluations, backbone: Backbone, digits: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    state, other = state_of(network(1)), state_of(network(2))
    found = measured.of(state)
    assert agrees(found, reference(backbone, digits, state))
    assert found["examples"] == 60
    assert measured.of(other) != found
    rows = measured.of(state, rows=True)
    assert sum(rows["right"]) / 60 == found["accuracy"]
    assert len(list((measured.folder or Path()).glob("*.json"))) == 3
    monkeypatch.setattr(evaluations_file, "predictions", None)
    again = Evaluations(measured.module, backbone, digits, folder=measured.folder)
    assert again.of(state) == found, "read back, not computed"
    few = Evaluations(measured.module, backbone, digits, folder=measured.folder, limit=10)
    with pytest.raises(TypeError):
        few.of(state)  # other rows are another evaluation
    for file in (measured.folder or Path()).glob("*.json"):
        file.write_text("{")
    with pytest.raises(StateError, match="cannot read .* as JSON: .*; delete it, and it is measured again"):
        again.of(state)


def test_without_a_folder_nothing_is_written(backbone: Backbone, digits: Data, tmp_path: Path) -> None:
    evaluations = Evaluations(backbone.model, backbone, digits, split="train")
    assert evaluations.of(state_of(backbone.model))["examples"] == 48
    assert not list(tmp_path.iterdir())


def test_batches_are_read_again_where_they_do_not_fit(
    measured: Evaluations, backbone: Backbone, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = state_of(network(1))
    found = measured.of(state)
    assert measured.batches.kept is not None
    monkeypatch.setattr(evaluations_file, "IN_MEMORY", 1000)
    tight = Evaluations(backbone.model, backbone, digits, batch_size=7)
    assert agrees(tight.of(state), found)
    assert tight.batches.kept is None


def test_evaluations_refuse(backbone: Backbone, digits: Data) -> None:
    with pytest.raises(ConfigError, match="split must be one of test, train, got 'validation'"):
        Evaluations(backbone.model, backbone, digits, split="validation")
    with pytest.raises(DataError, match="have no test split, which an analysis needs"):
        Evaluations(backbone.model, backbone, replace(digits, test=None))
    with pytest.raises(DataError, match="have no train split, which an analysis needs"):
        Evaluations(backbone.model, backbone, replace(digits, train=None))
    with pytest.raises(DataError, match="have no labels"):
        Evaluations(backbone.model, backbone, replace(digits, class_names=()))
    with pytest.raises(ConfigError, match="the number of examples must be at least 1, got 0"):
        Evaluations(backbone.model, backbone, digits, limit=0)
    backbone.model.fc = nn.Linear(16, 3)
    with pytest.raises(DataError, match=r"the network has 3 classes, and the data have a class 4 \(from 0\)"):
        Evaluations(backbone.model, backbone, digits).of(state_of(backbone.model))


# --- criticality -----------------------------------------------------------------------------------------------------


def test_criticality(measured: Evaluations, backbone: Backbone, digits: Data) -> None:
    before, state, initial = bits(backbone.model), state_of(network(1)), state_of(network(2))
    groups, told = grouped(backbone.model), list[tuple[int, int]]()
    found = criticality(measured, state, initial, groups, points=2, report=lambda *at: told.append(at))
    assert same(before, bits(backbone.model)), "the model is as it was"
    assert told == [(1, 3), (2, 3), (3, 3)]
    own = reference(backbone, digits, state)
    assert agrees(found, own)
    assert {row["module"] for row in found["rows"]} == set(groups)
    drops = [row["drop"] for row in found["rows"]]
    assert drops == sorted(drops, reverse=True)
    for row in found["rows"]:
        names = groups[row["module"]]
        mixed = {
            share: {n: (1 - share) * initial[n] + share * t if n in names else t for n, t in state.items()}
            for share in (0.0, 0.5, 1.0)
        }
        for point in row["path"]:
            assert agrees(point, reference(backbone, digits, mixed[point["a"]]))
        assert row["drop"] == own["accuracy"] - row["path"][0]["accuracy"]
        assert row["distance"] ** 2 == pytest.approx(sum(float((state[n] - initial[n]).square().sum()) for n in names))
        assert row["parameters"] == sum(state[n].numel() for n in names)
        assert "radius" not in row
    assert torch.equal(rewound(state, initial, ["fc.bias"])["fc.bias"], initial["fc.bias"])


def test_noise(measured: Evaluations, backbone: Backbone, digits: Data) -> None:
    """The radius and the formal measure are those that a search of every scale finds."""
    state = state_of(network(1))
    initial = {name: tensor + 0.3 * torch.ones_like(tensor) for name, tensor in state.items()}
    groups = {"conv1": ["conv1.weight"], "fc": ["fc.weight", "fc.bias"]}
    noise = Noise(draws=2, excess=0.05, scales=(0.1, 4.0, 0.5), seed=3)
    found = criticality(measured, state, initial, groups, noise=noise)
    limit = reference(backbone, digits, state)["loss"] + 0.05
    for row in found["rows"]:
        names = groups[row["module"]]
        flat = torch.cat([state[name].flatten() for name in names])
        unit, moved = float(flat.square().mean().sqrt()), float(0.3 * math.sqrt(len(flat)))
        borne: list[tuple[float, float]] = []
        for share in (0.0, 1.0):
            for scale in noise.scales:
                losses = []
                for draw in range(2):
                    generator = torch.Generator().manual_seed(3 * 1_000_003 + draw)
                    mixed = dict(state)
                    for name in names:
                        drawn = torch.randn(state[name].shape, generator=generator)
                        mixed[name] = initial[name] + share * (state[name] - initial[name]) + scale * unit * drawn
                    losses.append(reference(backbone, digits, mixed)["loss"])
                if sum(losses) / 2 <= limit:
                    borne.append((share, scale))
        assert borne, "the test would see nothing"
        assert row["criticality"] == pytest.approx(min((a * moved / (s * unit)) ** 2 for a, s in borne), rel=1e-4)
        assert row["radius"] == max((s for a, s in borne if a == 1), default=None)
    assert found["criticality"] == pytest.approx(sum(row["criticality"] for row in found["rows"]))


def test_criticality_goes_on(measured: Evaluations, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    state, initial, groups = state_of(network(1)), state_of(network(2)), grouped(backbone.model)
    passes, counted = [0], evaluations_file.predictions

    def counting(*given: Any) -> Any:
        passes[0] += 1
        return counted(*given)

    def interrupted(done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluations_file, "predictions", counting)
    before = bits(backbone.model)
    with pytest.raises(KeyboardInterrupt):
        criticality(measured, state, initial, groups, report=interrupted)
    assert same(before, bits(backbone.model))
    assert passes == [3]
    criticality(measured, state, initial, groups)
    assert passes == [4], "the network itself and two modules were there"


def test_criticality_refuses(measured: Evaluations, backbone: Backbone) -> None:
    state = state_of(backbone.model)
    with pytest.raises(ConfigError, match="points must be at least 1, got 0"):
        criticality(measured, state, state, {"fc": ["fc.weight"]}, points=0)
    with pytest.raises(ConfigError, match="there is no module to rewind"):
        criticality(measured, state, state, {})
    for wrong in ({"draws": 0}, {"excess": 0.0}, {"scales": ()}, {"scales": (0.0,)}):
        with pytest.raises(ConfigError, match="noise needs at least one draw, an excess above 0 and scales above 0"):
            Noise(**wrong)  # type: ignore[arg-type]


# --- barriers --------------------------------------------------------------------------------------------------------


def named(*kinds: str) -> list[Network]:
    return [Network(f"{kind} {at}", kind, state_of(network(at)), {}) for at, kind in enumerate(kinds)]


def test_barrier(measured: Evaluations, backbone: Backbone, digits: Data) -> None:
    before, (first, second) = bits(backbone.model), named("one", "two")
    found = barrier(measured, first.state, second.state, points=5)
    assert same(before, bits(backbone.model))
    expected = []
    for at in range(5):
        t = at / 4
        state = {n: (1 - t) * a + t * second.state[n] if a.is_floating_point() else a for n, a in first.state.items()}
        expected.append(reference(backbone, digits, state))
        assert found["points"][at]["t"] == t
        assert agrees(found["points"][at], expected[at])
    for key, name, sign in (("accuracy", "barrier", 1), ("loss", "loss_barrier", -1)):
        ends = expected[0][key], expected[-1][key]
        gaps = [sign * ((1 - at / 4) * ends[0] + at / 4 * ends[1] - one[key]) for at, one in enumerate(expected)]
        assert found[name] == pytest.approx(max(gaps), abs=1e-4)
    assert same(interpolated(first.state, second.state, 0), first.state)
    assert same(interpolated(first.state, second.state, 1), second.state)
    own = barrier(measured, first.state, first.state, points=3)
    assert own["barrier"] == 0, "from a network to itself there is none"
    assert own["loss_barrier"] == 0


def test_barriers(measured: Evaluations) -> None:
    told: list[tuple[int, int]] = []
    found = barriers(measured, named("b", "a", "a"), 3, lambda *at: told.append(at))
    assert [(p["first"], p["second"], p["kinds"]) for p in found["pairs"]] == [
        ("b 0", "a 1", "a - b"), ("b 0", "a 2", "a - b"), ("a 1", "a 2", "a - a")
    ]  # fmt: skip
    assert told[-1] == (9, 9)
    ends = [row["accuracy"] for row in found["networks"]]
    assert ends == [measured.of(one.state)["accuracy"] for one in named("b", "a", "a")]
    assert found["deviations"] == {"a": pytest.approx(abs(ends[1] - ends[2]) / math.sqrt(2))}
    with pytest.raises(ConfigError, match="networks are compared in pairs; give at least two, got 1"):
        barriers(measured, named("a"))
    state = named("a")[0].state
    with pytest.raises(ConfigError, match="a barrier needs at least 3 points, .*; got 2"):
        barrier(measured, state, state, points=2)
    with pytest.raises(ConfigError, match="other entries, first 'fc.bias'"):
        barrier(measured, state, {name: one for name, one in state.items() if name != "fc.bias"})


# --- similarity ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "q"), [(5, 7), (5, 90), (90, 110)])
def test_linear_cka(p: int, q: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(40, size, generator=generator) + 3 for size in (p, q))
    y[:, :3] += x[:, :3]
    centre = torch.eye(40, dtype=torch.float64) - 1 / 40
    k, m = (centre @ one.double() @ one.double().T @ centre for one in (x, y))
    expected = float((k @ m).trace() / ((k @ k).trace() * (m @ m).trace()).sqrt())
    assert linear_cka(x, y) == pytest.approx(expected, rel=1e-9)
    rotated = torch.linalg.qr(torch.randn(p, p, generator=generator)).Q
    assert linear_cka(x, 7 * x @ rotated + 2) == pytest.approx(1, abs=1e-5)
    assert linear_cka(x, torch.ones(40, 2)) is None
    with pytest.raises(ConfigError, match="CKA compares rows of the same examples"):
        linear_cka(x, y[1:])


def test_similarities(measured: Evaluations, backbone: Backbone, digits: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    before, networks = bits(backbone.model), named("a", "a", "b")
    names = grouped(backbone.model)
    found = similarities(measured, networks, [*names, "no-module"])
    assert same(before, bits(backbone.model))
    assert found["layers"] == ["conv1", "conv2", "fc"]
    assert found["examples"] == 60
    features = []
    for one in networks[:2]:
        measured.put(one.state)
        model: Any = backbone.model
        x, _ = inputs(backbone, digits.test)
        with torch.no_grad():
            features.append(model.conv1(x).mean((2, 3)))
    assert found["pairs"][0]["cka"][0] == pytest.approx(linear_cka(*features), abs=1e-5)
    monkeypatch.setattr("maskpack.lab.pairs.predictions", None)
    assert similarities(measured, networks, names) == found, "read back"
    with pytest.raises(ConfigError, match="give at least two, got 1"):
        similarities(measured, networks[:1], names)


def test_features_of_tokens_leave_padding_out(backbone: Backbone) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.body = nn.Embedding(9, 4), nn.Linear(4, 4)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            from types import SimpleNamespace

            return SimpleNamespace(last_hidden_state=self.body(self.embedding(input_ids)))

    ids, attention = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    classifier = Classifier(Encoder(), nn.Linear(4, 2), Embedding(None, "mean"))

    class Given:
        module, batches = classifier, [({"input_ids": ids, "attention_mask": attention}, torch.tensor([0, 1]))]

        def put(self, state: Any) -> None:
            put_state(self.module, state)

        def content(self, state: Any) -> None:
            """Nothing is kept."""

    encoder: Any = classifier.model
    found = layer_features(Given(), state_of(classifier), ["body"])["body"]  # type: ignore[arg-type]
    hidden = encoder.body(encoder.embedding(ids))
    assert torch.allclose(found[0], hidden[0].mean(0))
    assert torch.allclose(found[1], hidden[1, :2].mean(0))


def test_parameter_distance() -> None:
    first, second, initial = ({"a": torch.tensor([3.0, 0.0]) * k, "b": torch.full((2, 2), 1.0) * k} for k in (1, 2, 4))
    found = parameter_distance(first, second, {"x": ["a"], "y": ["b"]}, {"b": initial["b"]})
    assert found["distance"] == pytest.approx(math.sqrt(9 + 4))
    assert found["modules"]["y"] == {"distance": pytest.approx(2), "relative": pytest.approx(2 / 8)}
    assert found["modules"]["x"] == {"distance": pytest.approx(3), "relative": None}
    assert found["relative"] == pytest.approx(2 / 8), "of the parameters whose start is known"


def test_mask_distance() -> None:
    weight = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    zero = MaskSet.from_tensors({"w": torch.tensor([[True, False], [True, True]])})
    flip = MaskSet.from_tensors({"w": torch.tensor([[False, True], [True, True]])}, op="flip")
    found = mask_distance(zero, flip, {"w": weight})
    assert found["hamming"] == 0.5
    assert found["weighted"] == pytest.approx(math.sqrt(2**2 + 2**2)), "1 becomes -1, and -2 is removed in one"
    assert found["relative"] == pytest.approx(math.sqrt(8 / 30))
    assert found["parameters"] == {"w": {key: found[key] for key in ("hamming", "weighted", "relative")}}
    whole = MaskSet.from_tensors({"v": torch.zeros(3, dtype=torch.bool)})
    both = mask_distance(zero, whole, {"w": weight, "v": torch.ones(3)})
    assert both["hamming"] == 4 / 7, "what is not masked is kept"
    with pytest.raises(ConfigError, match="the masks of 'w' are not for the weights given; give masks of one base"):
        mask_distance(zero, flip, {"w": weight[0]})
    with pytest.raises(ConfigError, match="there is no mask to compare"):
        mask_distance(MaskSet({}), MaskSet({}), {})
    networks = [Network(str(at), "m", {"w": weight}, {}, masks) for at, masks in enumerate((zero, flip))]
    (row,) = distances([*networks], {"w": ["w"]}, {"w": weight})
    assert row["masks"] == found
    assert "masks" not in distances([networks[0], replace(networks[1], masks=None)], {"w": ["w"]}, {"w": weight})[0]


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_common_mistakes(measured: Evaluations) -> None:
    from sklearn.metrics import cohen_kappa_score

    generator = torch.Generator().manual_seed(0)
    first, second = (torch.rand(200, generator=generator) > share for share in (0.3, 0.2))
    found = common_mistakes(first, second)
    wrong = [set((~one).nonzero().flatten().tolist()) for one in (first, second)]
    assert found["both"] == len(wrong[0] & wrong[1])
    assert (found["only_first"], found["only_second"]) == (len(wrong[0] - wrong[1]), len(wrong[1] - wrong[0]))
    assert found["overlap"] == len(wrong[0] & wrong[1]) / len(wrong[0] | wrong[1])
    assert found["kappa"] == pytest.approx(cohen_kappa_score(first, second))
    right = torch.ones(4, dtype=torch.bool)
    assert common_mistakes(right, right) == {
        "both": 0,
        "only_first": 0,
        "only_second": 0,
        "overlap": None,
        "kappa": None,
    }
    with pytest.raises(ConfigError, match="mistakes are compared on the same examples, got 200 and 4"):
        common_mistakes(first, right)
    networks = named("a", "b", "b")
    whole = mistakes(measured, networks)
    rows = [torch.tensor(measured.of(one.state, rows=True)["right"]) for one in networks]
    assert whole["pairs"][1] == {"first": "a 0", "second": "b 2", "kinds": "a - b", **common_mistakes(rows[0], rows[2])}
    with pytest.raises(ConfigError, match="give at least two, got 1"):
        mistakes(measured, networks[:1])


# --- networks that are read ------------------------------------------------------------------------------------------


def adapter_of(model: nn.Module, path: Path, classes: int = CLASSES, size: int = 8, **changes: Any) -> Path:
    """An adapter for a TinyNet with random masks, a head without bias, and the scale."""
    generator = torch.Generator().manual_seed(7)
    names = ("conv1.weight", "conv2.weight")
    tensors = {n: torch.rand(model.get_parameter(n).shape, generator=generator) > 0.4 for n in names}
    masks = MaskSet.from_tensors(tensors, scale=True)
    head = Head(Embedding("fc"), torch.randn(classes, 16, generator=generator))
    base = fingerprint(model, id="tests:tiny", head=("fc",))
    about = {"class_names": [str(at) for at in range(classes)], "task": "image-classification", **changes}
    preprocess = {"kind": "image", "size": size, "resize": size, "interpolation": "bilinear",
                  "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}  # fmt: skip
    parts = Parts(masks, head)
    base = replace(base, tensors={name: base.tensors[name] for name in tensors})
    save_adapter(path, parts, base, preprocess=preprocess, **about)
    return path


def test_networks_are_read(backbone: Backbone, tmp_path: Path) -> None:
    before, tuned = bits(backbone.model), network(3)
    export_state(tmp_path / "tuned.safetensors", tuned)
    path = adapter_of(backbone.model, tmp_path / "mask.safetensors")
    used, classifier, (first, second, third) = read_networks(
        backbone,
        [
            ("kind", str(tmp_path / "tuned.safetensors")),
            ("mask", str(path)),
            ("kind", str(tmp_path / "tuned.safetensors")),
        ],
    )
    assert (first.name, second.name, third.name) == ("kind 1", "mask", "kind 2")
    assert same(first.state, bits(tuned))
    body = {name for name in before if not name.startswith("fc.")}
    assert all(torch.equal(before[name], classifier.model.state_dict()[name]) for name in body), "the base is back"
    assert set(first.initial) == {name for name, _ in network(0).named_parameters()} - {"fc.weight", "fc.bias"}
    assert all(torch.equal(first.initial[name], before[name]) for name in first.initial)
    assert second.masks is not None
    for name, mask in second.masks.items():
        alpha = torch.tensor(mask.alpha)
        expected = torch.where(mask.tensor(), before[name] / alpha, 0)
        assert torch.equal(second.state[name], expected)
        assert torch.equal(second.initial[name], before[name]), "of a mask the start is the whole weight"
    assert set(second.initial) == set(second.masks)
    assert torch.equal(second.state["fc.bias"], torch.zeros(CLASSES))
    put_state(classifier, second.state)
    assert torch.equal(classifier.linear.weight, second.state["fc.weight"])
    assert used.head == "fc"


def test_networks_that_do_not_fit(backbone: Backbone, tmp_path: Path) -> None:
    state = state_of(backbone.model)
    write_network(tmp_path / "own.safetensors", state)
    own = ("own", str(tmp_path / "own.safetensors"))
    write_tensors(
        tmp_path / "wide.safetensors", {**state, "fc.weight": torch.zeros(9, 16), "fc.bias": torch.zeros(9)}, {}
    )
    with pytest.raises(ConfigError, match=r"wide has a head of shape \(9, 16\), own one of \(5, 16\); compare"):
        read_networks(backbone, [own, ("wide", str(tmp_path / "wide.safetensors"))])
    without = {name: tensor for name, tensor in state.items() if not name.startswith("fc")}
    write_tensors(tmp_path / "bare.safetensors", without, {})
    with pytest.raises(ConfigError, match="has no fc.weight, so the network has no head; write it beside the weights"):
        read_networks(backbone, [("bare", str(tmp_path / "bare.safetensors"))])
    write_tensors(tmp_path / "odd.safetensors", {**state, "odd": torch.zeros(1)}, {})
    with pytest.raises(BackboneError, match=r"do not fit the model: 0 missing \[\], 1 unexpected \['odd'\]"):
        read_networks(backbone, [("odd", str(tmp_path / "odd.safetensors"))])
    assert same(state, bits(backbone.model)), "after an error the model is the base"
    mask, other = (adapter_of(backbone.model, tmp_path / f"{n}.safetensors", size=s) for n, s in (("a", 8), ("b", 16)))
    with pytest.raises(ConfigError, match="b expects other inputs than the networks before it"):
        read_networks(backbone, [("a", str(mask)), ("b", str(other))])
    save_adapter(tmp_path / "headless.safetensors", MaskSet.from_tensors({"conv1.weight": state["conv1.weight"] > 0}),
                 fingerprint(backbone.model, id="tests:tiny", head=("fc",)))  # fmt: skip
    with pytest.raises(AdapterError, match="has no head, or several mask sets; give adapters that classify"):
        read_networks(backbone, [("x", str(tmp_path / "headless.safetensors"))])


def test_an_encoder_has_its_head_in_the_file(tmp_path: Path) -> None:
    import transformers

    config = transformers.BertConfig(vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=8)  # fmt: skip
    encoder = Backbone(transformers.BertModel(config).eval(), "tests:bert", embedding=Embedding(None, "mean", True))
    classifier = Classifier(encoder.model, nn.Linear(8, 3), encoder.embedding)
    state = {
        name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in state_of(classifier).items()
    }
    write_network(tmp_path / "a.safetensors", state)
    before = bits(encoder.model)
    _, made, (one,) = read_networks(encoder, [("a", str(tmp_path / "a.safetensors"))])
    assert same(one.state, state)
    assert same(bits(encoder.model), before)
    assert not [name for name in one.initial if name.startswith(("head", "pooler"))]
    groups = grouped(made, "block")
    assert "encoder.layer.0" in groups
    assert groups["head"] == ["head.weight", "head.bias"]
    assert grouped(made)["encoder.layer.0.output.dense"] == [
        f"encoder.layer.0.output.{n}" for n in ("dense.weight", "dense.bias", "LayerNorm.weight", "LayerNorm.bias")
    ]


def test_tied_tensors_are_in_the_file_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.fc = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.two.weight = self.one.weight

    backbone = Backbone(Tied(), "tests:tied", embedding=Embedding("fc"))
    state = state_of(Tied())
    write_network(tmp_path / "a.safetensors", state)
    _, _, (one,) = read_networks(backbone, [("a", str(tmp_path / "a.safetensors"))])
    assert same(one.state, state)


def test_a_mask_rewound_is_the_base(backbone: Backbone, digits: Data, tmp_path: Path) -> None:
    path = adapter_of(backbone.model, tmp_path / "mask.safetensors")
    before = state_of(backbone.model)
    used, classifier, (one,) = read_networks(backbone, [("mask", str(path))])
    groups = grouped(classifier, names=one.initial)
    assert groups == {"conv1": ["conv1.weight"], "conv2": ["conv2.weight"]}
    found = criticality(Evaluations(classifier, used, digits), one.state, one.initial, groups)
    assert len(found["rows"]) == 2
    whole = rewound(one.state, one.initial, [name for names in groups.values() for name in names])
    assert all(torch.equal(whole[name], before[name]) for name in one.initial)


# --- shuffled blocks and checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 2, 4, 8])
def test_blocks(block: int) -> None:
    order = block_order(8, block, seed=3)
    image = torch.arange(64).reshape(8, 8)
    shuffled = image.flatten()[order].reshape(8, 8)
    assert sorted(order.tolist()) == list(range(64)), "every pixel once"
    corners = list[int]()
    for top in range(0, 8, block):
        for left in range(0, 8, block):
            piece = shuffled[top : top + block, left : left + block]
            y, x = divmod(int(piece[0, 0]), 8)
            assert y % block == x % block == 0
            assert torch.equal(piece, image[y : y + block, x : x + block]), "a block keeps its inside"
            corners.append(int(piece[0, 0]))
    assert (corners == sorted(corners)) == (block == 8)
    assert torch.equal(order, block_order(8, block, seed=3))
    for wrong in (0, 3, 16):
        with pytest.raises(ConfigError, match=f"blocks of {wrong} pixels do not tile an image of 8; take a side that"):
            block_order(8, wrong)


def test_a_model_sees_shuffled_images() -> None:
    model, x = network(0), torch.rand(2, 3, 8, 8)
    order = block_order(8, 2)
    plain = model(x)
    expected = model(x.reshape(2, 3, 64)[:, :, order].reshape(2, 3, 8, 8))
    shuffle_inputs(model, 2)
    assert torch.equal(model(x), expected)
    assert not torch.equal(plain, expected)
    model.train()
    assert not torch.equal(model(x), expected)

    class Tower(nn.Module):
        def forward(self, pixel_values: Tensor, flag: bool) -> Tensor:
            assert flag
            return pixel_values

    tower = Tower()
    shuffle_inputs(tower, 2)
    assert torch.equal(tower(pixel_values=x, flag=True), x.flatten(2)[:, :, order].reshape(x.shape))


@pytest.fixture(scope="module")
def reference_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("factory") / "nets.py"
    path.write_text(FACTORY)
    return {"reference": f"{path}:tiny", "image_size": 8}


QUICK = TrainConfig(optimizer="sgd", lr=0.05, steps=2, batch_size=16, augment="none")


def trained(events: Sequence[Mapping[str, Any]]) -> int:
    return sum(event["event"] == "end" for event in events)


def test_feature_reuse(reference_of: dict[str, Any], digits: Data, tmp_path: Path) -> None:
    events: list[Mapping[str, Any]] = []
    given = {**reference_of, "random_weights": 5}  # stands for pretrained weights
    settings: dict[str, Any] = {"config": QUICK, "blocks": (8, 1), "report": events.append}
    found = feature_reuse(given, digits, tmp_path / "out", **settings)
    assert trained(events) == 4
    assert [(row["start"], row["block"]) for row in found["rows"]] == [
        ("pretrained", 8), ("random", 8), ("pretrained", 1), ("random", 1)
    ]  # fmt: skip
    accuracy = {(row["start"], row["block"]): row["accuracy"] for row in found["rows"]}
    for one in found["gains"]:
        assert one["gain"] == accuracy["pretrained", one["block"]] - accuracy["random", one["block"]]
    events.clear()
    again = feature_reuse(given, digits, tmp_path / "out", **settings, seeds=(0, 1))
    assert trained(events) == 4, "only the second seed is trained"
    assert [row["accuracies"][0] for row in again["rows"]] == [row["accuracy"] for row in found["rows"]]
    other = {**settings, "config": replace(QUICK, steps=3)}
    with pytest.raises(StateError, match=r"holds results of other settings: settings \(steps\); choose another folder"):
        feature_reuse(given, digits, tmp_path / "out", **other)
    with pytest.raises(StateError, match="training from other weights than nets:tiny has now; choose another folder"):
        feature_reuse({**reference_of, "random_weights": 6}, digits, tmp_path / "out", **settings)
    for wrong in ({"blocks": (8, 8)}, {"seeds": ()}):
        with pytest.raises(ConfigError, match="(blocks|seeds) must be at least one, each once"):
            feature_reuse(given, digits, tmp_path / "new", **{**settings, **wrong})
    assert not (tmp_path / "new").exists()


def test_shuffling_is_all_that_differs(reference_of: dict[str, Any], digits: Data, tmp_path: Path) -> None:
    """A run on whole images is a plain run."""
    from maskpack.backbone.load import load_backbone
    from maskpack.lab.starts import Trainings

    given = {**reference_of, "random_weights": 5}
    config = replace(QUICK, steps=6)
    found = feature_reuse(given, digits, tmp_path / "out", config=config, blocks=(8,))
    plain = Trainings(tmp_path, "full", digits, config, (0,)).train("plain", load_backbone(**given), config)
    assert found["rows"][0]["accuracy"] == plain


def test_texts_have_no_blocks(digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from maskpack.preprocess import TextPreprocess

    made = Backbone(network(0), "tests:text", preprocess=TextPreprocess(8), embedding=Embedding(None, "mean"))
    monkeypatch.setattr("maskpack.lab.starts.load_backbone", lambda **_: made)
    with pytest.raises(ConfigError, match="tests:text reads text; only images have blocks to shuffle"):
        feature_reuse({"reference": "x"}, digits, tmp_path, config=QUICK)


def test_checkpoints(
    reference_of: dict[str, Any], digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from maskpack.backbone.load import load_backbone

    files = []
    for seed in (0, 1):
        files.append(tmp_path / f"epoch-{seed}.safetensors")
        export_state(files[-1], load_backbone(**reference_of, random_weights=seed).model)
    ten = load_data("digits:0-9")
    events: list[Mapping[str, Any]] = []
    settings: dict[str, Any] = {"config": QUICK, "report": events.append, "seeds": (0, 1)}
    found = from_checkpoints(reference_of, files, digits, tmp_path / "out", pretraining=ten, **settings)
    assert [row["checkpoint"] for row in found["rows"]] == ["epoch-0", "epoch-1"]
    assert trained(events) == 4
    for row, file in zip(found["rows"], files, strict=True):
        own = load_backbone(**reference_of, weights=file)
        x, y = inputs(own, ten.test)
        with torch.no_grad():
            assert row["pretraining"] == pytest.approx(float((own.model(x).argmax(1) == y).double().mean()))
        assert row["accuracy"] == sum(row["accuracies"]) / 2
    events.clear()
    monkeypatch.setattr("maskpack.lab.starts.held_out_accuracy", None)
    again = from_checkpoints(reference_of, files, digits, tmp_path / "out", pretraining=ten, **settings)
    assert again == found, "nothing is measured twice"
    monkeypatch.setattr("maskpack.lab.starts.held_out_accuracy", lambda *_: None)
    for file in (tmp_path / "out/pretraining").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="the data of pretraining digits:0-9 have no test split; leave them out"):
        from_checkpoints(reference_of, files, digits, tmp_path / "out", pretraining=ten, **settings)
    events.clear()
    plain = from_checkpoints(reference_of, files[:1], digits, tmp_path / "out", **settings)
    assert trained(events) == 0
    assert plain["rows"][0]["pretraining"] is None
    with pytest.raises(
        ConfigError,
        match="the checkpoint epoch-0 is measured on .* digits:0-4 .* has a head for 10 classes, the data have 5",
    ):
        from_checkpoints(reference_of, files, digits, tmp_path / "out", pretraining=digits, **settings)
    with pytest.raises(ConfigError, match="checkpoints must be at least one, each once; got none"):
        from_checkpoints(reference_of, [], digits, tmp_path / "out", **settings)
    with pytest.raises(ConfigError, match=r"seeds must be at least one, each once; got 0, 0"):
        from_checkpoints(reference_of, files, digits, tmp_path / "out", **{**settings, "seeds": (0, 0)})
