"""CLIP-like backbones: the vision tower with its projection, and heads made of text embeddings."""

import string
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskpack.adapter.content import Parts
from maskpack.adapter.read import read_adapter
from maskpack.adapter.write import save_adapter
from maskpack.backbone.classifier import classifier_from, embeddings
from maskpack.backbone.fingerprint import fingerprint
from maskpack.backbone.load import Backbone, load_backbone, text_head
from maskpack.backbone.model import Embedding
from maskpack.backbone.select import select_parameters
from maskpack.errors import BackboneError
from maskpack.mask import MaskSet
from maskpack.preprocess import ImagePreprocess, preprocess_to_json
from maskpack.runtime.load import load_mask, unload_mask

from .helpers_models import TOWER, VISION
from .helpers_models import clip as clip

transformers = pytest.importorskip("transformers")

LABELS = ("cat", "dog", "apple pie")
TEMPLATE = "This is a photo of a {label}"


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SigLIP model with random weights and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("models") / "tiny-siglip"
    words = ["<pad>", "</s>", "<unk>", *TEMPLATE.split(), "cat", "dog", "apple", "pie"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "model_input_names": ["input_ids"]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = {**TOWER, "vocab_size": 20, "max_position_embeddings": 10}
        vision = {key: value for key, value in VISION.items() if key != "projection_dim"}
        config = transformers.SiglipConfig(text_config=text, vision_config=vision)
        transformers.SiglipModel(config).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    transformers.SiglipImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def zero_shot(folder: Path, model: Any, images: Tensor, **padding: Any) -> Tensor:
    """The probabilities as transformers computes them, (B, classes)."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [TEMPLATE.format(label=label) for label in LABELS]
    tokens = tokenizer(texts, return_tensors="pt", **padding)
    with torch.no_grad():
        logits: Tensor = model.from_pretrained(folder).eval()(pixel_values=images, **tokens).logits_per_image
    return logits.softmax(-1)


def save_untouched(path: Path, backbone: Backbone) -> None:
    """Write an adapter with a text head whose masks keep every weight."""
    names = select_parameters(backbone.model, head=backbone.outside)
    parameters = dict(backbone.model.named_parameters())
    masks = MaskSet.from_tensors({name: torch.ones(parameters[name].shape, dtype=torch.bool) for name in names})
    save_adapter(
        path,
        Parts(masks, text_head(backbone, LABELS, TEMPLATE)),
        fingerprint(backbone.model, id=backbone.id, head=backbone.outside),
        task=backbone.task,
        class_names=LABELS,
        preprocess=preprocess_to_json(backbone.preprocess),
    )


def test_the_backbone_is_the_vision_tower_with_its_projection(clip: Path) -> None:
    backbone = load_backbone(f"hf/{clip}")
    assert type(backbone.model).__name__ == "CLIPVisionModelWithProjection"
    assert (backbone.id, backbone.task, backbone.head, backbone.outside) == (
        "hf/tiny-clip", "image-classification", None, (),
    )  # fmt: skip
    assert (backbone.embedding, backbone.features) == (Embedding(None, "projection", True), 12)
    assert backbone.preprocess == ImagePreprocess(
        16, 20, "bicubic", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    )
    assert load_backbone(f"hf/{clip}", image_size=16).preprocess.resize == 16  # type: ignore[union-attr]
    names = select_parameters(backbone.model, head=backbone.outside)
    assert "visual_projection.weight" in names
    assert not any("text" in name for name, _ in backbone.model.named_parameters())
    assert len(names) == 2 * 6 + 2


def test_the_tower_alone_and_random_weights(clip: Path, tmp_path: Path) -> None:
    whole = load_backbone(f"hf/{clip}")
    whole.model.save_pretrained(tmp_path / "tower")
    transformers.CLIPImageProcessor(size={"shortest_edge": 16}).save_pretrained(tmp_path / "tower")
    alone = load_backbone(f"hf/{tmp_path / 'tower'}")
    assert fingerprint(alone.model, id="x").digests == fingerprint(whole.model, id="x").digests
    with pytest.raises(BackboneError, match="hf/tower has a vision tower only; a text head needs"):
        text_head(alone, LABELS, TEMPLATE)
    random = load_backbone(f"hf/{clip}", random_weights=1)
    assert (random.embedding.pooling, random.features) == ("projection", 12)
    assert fingerprint(random.model, id="x").digests != fingerprint(whole.model, id="x").digests


def test_an_untouched_mask_with_a_text_head_is_zero_shot_clip(clip: Path, tmp_path: Path) -> None:
    save_untouched(tmp_path, load_backbone(f"hf/{clip}"))
    model = transformers.CLIPVisionModelWithProjection.from_pretrained(clip)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randn(9, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    adapter = read_adapter(tmp_path)
    load_mask(model, adapter)
    expected = zero_shot(clip, transformers.CLIPModel, images, padding=True)
    found = adapter.predict(model, images)
    assert [one.label for one in found] == [LABELS[i] for i in expected.argmax(-1)]
    assert [one.score for one in found] == pytest.approx(expected.max(-1).values.tolist(), abs=1e-5)
    head = adapter.parts(stream=True).head
    assert head is not None
    with torch.no_grad():
        assert torch.allclose(classifier_from(model, head)(images).softmax(-1), expected, atol=1e-5)
    assert (expected.max(-1).values - expected.min(-1).values).max() > 0.01, "the test must be able to tell"
    unload_mask(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_features_are_the_image_embeddings(clip: Path) -> None:
    backbone, images = load_backbone(f"hf/{clip}"), torch.randn(5, 3, 16, 16)
    found, labels = embeddings(backbone, [(images, torch.arange(5))])
    with torch.no_grad():
        expected = transformers.CLIPModel.from_pretrained(clip).eval().get_image_features(images).pooler_output
    assert torch.allclose(found, nn.functional.normalize(expected, dim=-1), atol=1e-6)
    assert labels.tolist() == [0, 1, 2, 3, 4]


def test_siglip(siglip: Path, tmp_path: Path) -> None:
    backbone = load_backbone(f"hf/{siglip}")
    assert (type(backbone.model).__name__, backbone.embedding.pooling, backbone.features) == (
        "SiglipVisionModel",
        "projection",
        16,
    )
    save_untouched(tmp_path, backbone)
    adapter, images = read_adapter(tmp_path), torch.randn(5, 3, 16, 16)
    model = load_mask(transformers.SiglipVisionModel.from_pretrained(siglip), adapter)
    expected = zero_shot(siglip, transformers.SiglipModel, images, padding="max_length", max_length=10)
    found = adapter.predict(model, images)
    assert [one.score for one in found] == pytest.approx(expected.max(-1).values.tolist(), abs=1e-5)
    head = text_head(backbone, LABELS, TEMPLATE)
    assert head.bias is not None
    assert len(set(head.bias.tolist())) == 1


def test_more_classes_than_the_tower_gets_at_a_time(clip: Path) -> None:
    backbone = load_backbone(f"hf/{clip}")
    names = [string.ascii_lowercase[i % 26] + string.ascii_lowercase[i // 26] for i in range(70)]
    weight = text_head(backbone, names, TEMPLATE).weight
    assert weight.shape == (70, 12)
    assert torch.allclose(weight[66], text_head(backbone, names[66:67], TEMPLATE).weight[0], atol=1e-5)
    other = text_head(backbone, names[66:67], "a drawing of {label}, {label}").weight[0]
    assert not torch.allclose(weight[66], other, atol=1e-3)


def test_what_cannot_have_a_text_head(clip: Path, tiny_backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"needs a backbone of type clip, siglip, which "):
        text_head(tiny_backbone, LABELS, TEMPLATE)
    with pytest.raises(
        BackboneError, match="has its head behind the projection, not at 'visual_projection'; leave out"
    ):
        load_backbone(f"hf/{clip}", head="visual_projection")
    backbone = load_backbone(f"hf/{clip}", random_weights=0)
    backbone.model.config._name_or_path = str(tmp_path / "gone")
    backbone.model.name_or_path = str(tmp_path / "gone")
    with pytest.raises(
        BackboneError, match="cannot load the text tower of hf/tiny-clip from '.*gone', which needs the whole model"
    ):
        text_head(backbone, LABELS, TEMPLATE)


def test_other_vision_models_keep_their_classifier_and_state_their_resampling(tmp_path: Path) -> None:
    config = transformers.ViTConfig(**TOWER, image_size=16, patch_size=8, num_labels=3)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}, resample=3).save_pretrained(tmp_path)
    backbone = load_backbone(f"hf/{tmp_path}")
    assert (backbone.embedding, isinstance(backbone.model, nn.Module)) == (Embedding("classifier"), True)
    assert backbone.preprocess == ImagePreprocess(16, 16, "bicubic", (0.5,) * 3, (0.5,) * 3)
