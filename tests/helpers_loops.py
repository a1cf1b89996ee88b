"""Small models of every kind with random weights, and a loss of each, for tests of own loops."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maskpack.adapter.read import Adapter
from maskpack.backbone.load import Backbone
from maskpack.training.data.base import Examples
from maskpack.training.evaluate import adapter_logits
from maskpack.training.features import by_class

BERT = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "max_position_embeddings": 32}  # fmt: skip
LLAMA = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
         "num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": True}  # fmt: skip


class Case(NamedTuple):
    """A model, what goes into it, the loss of what comes out, and the head to name if it cannot be found."""

    model: nn.Module
    inputs: dict[str, Any]
    loss: Callable[[Any], Tensor] = lambda output: output.loss
    head: str | tuple[str, ...] | None = None
    outputs: Callable[[Any], Tensor] = lambda output: output.logits

    def __call__(self) -> Any:
        return self.model(**self.inputs)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(seed))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bare_bert(folder: Path) -> Path:
    """A BERT encoder as `save_pretrained` writes it."""
    from transformers import BertConfig, BertModel

    if not folder.exists():
        torch.manual_seed(0)
        BertModel(BertConfig(**BERT)).eval().save_pretrained(folder)
    return folder


def classification(folder: Path) -> Case:
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(bare_bert(folder / "bert"), num_labels=3)
    return Case(model, {"input_ids": tokens(4, 8), "labels": torch.tensor([0, 1, 2, 0])})


def token_classification(folder: Path) -> Case:
    from transformers import BertForTokenClassification

    model = BertForTokenClassification.from_pretrained(bare_bert(folder / "bert"), num_labels=5)
    return Case(model, {"input_ids": tokens(4, 8), "labels": tokens(4, 8) % 5})


def regression(folder: Path) -> Case:
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(bare_bert(folder / "bert"), num_labels=1)
    return Case(model, {"input_ids": tokens(4, 8), "labels": noise(4)})


def language_model(folder: Path) -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    ids = tokens(2, 12)
    return Case(LlamaForCausalLM(LlamaConfig(**LLAMA)), {"input_ids": ids, "labels": ids})


def experts(folder: Path) -> Case:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
    ids = tokens(2, 12)
    return Case(Qwen3MoeForCausalLM(Qwen3MoeConfig(**LLAMA, **more)), {"input_ids": ids, "labels": ids})


def sequence_to_sequence(folder: Path) -> Case:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    return Case(T5ForConditionalGeneration(config), {"input_ids": tokens(4, 8), "labels": tokens(4, 6, seed=1)})


class Retrieval(NamedTuple):
    """A sentence encoder of sentence-transformers, called with features."""

    features: dict[str, Tensor]


def numbered(words: list[str]) -> dict[str, int]:
    """The vocabulary of a tokenizer."""
    return {word: at for at, word in enumerate(words)}


def retrieval(folder: Path) -> Case:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertTokenizerFast

    path = bare_bert(folder / "bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(97, 123)), *(f"##{chr(one)}" for one in range(97, 123))]  # fmt: skip  # noqa: E501
    BertTokenizerFast(vocab=numbered(words)).save_pretrained(path)
    transformer = Transformer(str(path))
    model = SentenceTransformer(modules=[transformer, Pooling(16)], device="cpu")
    features = {"input_ids": tokens(4, 8), "attention_mask": torch.ones(4, 8, dtype=torch.long)}
    pair = lambda output: (output["sentence_embedding"] @ output["sentence_embedding"].T).logsumexp(1).mean()  # noqa: E731
    return Case(model, {"input": features}, pair, outputs=lambda output: output["sentence_embedding"])


def segmentation(folder: Path) -> Case:
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    labels = torch.zeros(2, 64, 64, dtype=torch.long)
    loss = lambda output: nn.functional.cross_entropy(output["out"], labels)  # noqa: E731
    return Case(model, {"input": noise(2, 3, 64, 64)}, loss, "classifier", lambda output: output["out"])


def detection(folder: Path) -> Case:
    from transformers import YolosConfig, YolosForObjectDetection, YolosModel

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if not (folder / "yolos").exists():
        torch.manual_seed(0)
        config = YolosConfig(**small, image_size=[32, 32], patch_size=8, num_detection_tokens=4)
        YolosModel(config, add_pooling_layer=False).save_pretrained(folder / "yolos")
    model = YolosForObjectDetection.from_pretrained(folder / "yolos", num_labels=3)
    loss = lambda output: output.logits.square().mean() + (output.pred_boxes - 0.5).abs().mean()  # noqa: E731
    both = lambda output: torch.cat([output.logits.flatten(), output.pred_boxes.flatten()])  # noqa: E731
    return Case(model, {"pixel_values": noise(2, 3, 32, 32)}, loss, outputs=both)


def clip(folder: Path) -> Case:
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text = {**tower, "vocab_size": 60, "max_position_embeddings": 16, "eos_token_id": 2}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    inputs = {"input_ids": tokens(3, 8), "pixel_values": noise(3, 3, 16, 16), "return_loss": True}
    return Case(model, inputs, outputs=lambda output: output.logits_per_image)


def whisper(folder: Path) -> Case:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    small = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
    small |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_source_positions": 16}
    ids = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    model = WhisperForConditionalGeneration(WhisperConfig(**small, **ids, num_mel_bins=8, max_target_positions=16))
    return Case(model, {"input_features": noise(2, 8, 32), "labels": tokens(2, 6)})


def unet(folder: Path) -> Case:
    from diffusers import UNet2DConditionModel

    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "cross_attention_dim": 16, "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}  # fmt: skip  # noqa: E501
    model = UNet2DConditionModel(sample_size=8, attention_head_dim=4, **sizes, **blocks)
    inputs = {"sample": noise(2, 4, 8, 8), "timestep": torch.tensor([3, 7]), "encoder_hidden_states": noise(2, 5, 16)}
    target = noise(2, 4, 8, 8, seed=1)
    return Case(model, inputs, lambda o: (o.sample - target).square().mean(), outputs=lambda o: o.sample)


def dit(folder: Path) -> Case:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4,
                                  num_layers=2, sample_size=8, norm_num_groups=4, num_embeds_ada_norm=10)  # fmt: skip
    inputs = {"hidden_states": noise(2, 4, 8, 8), "timestep": torch.tensor([3, 7])}
    inputs["class_labels"] = torch.tensor([1, 2])
    target = noise(2, 4, 8, 8, seed=1)
    return Case(model, inputs, lambda o: (o.sample - target).square().mean(), outputs=lambda o: o.sample)


def image_classification(folder: Path) -> Case:
    import timm

    model = timm.create_model("test_resnet", pretrained=False, num_classes=3)
    loss = lambda logits: nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0]))  # noqa: E731
    return Case(model, {"x": noise(4, 3, 32, 32)}, loss, outputs=lambda logits: logits)


CASES = {make.__name__: make for make in (
    classification, token_classification, regression, language_model, experts, sequence_to_sequence, retrieval,
    segmentation, detection, clip, whisper, unet, dit, image_classification)}  # fmt: skip


def adapter_accuracy(
    model: nn.Module, adapter: Adapter, examples: Examples, *, tokenizer: Any = None, batch_size: int = 64
) -> dict[str, Any]:
    """Evaluate the head of an adapter on a model that has it loaded, or a cascade."""
    backbone = Backbone(model, "the model", tokenizer=tokenizer)
    logits, y = adapter_logits(backbone, adapter, examples, batch_size)
    return {**by_class(logits, y), "examples": len(y), "unreadable": len(examples.unreadable)}
