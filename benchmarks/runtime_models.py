"""The models of `benchmarks.runtime`: random weights, masks at published densities, inputs of one forward pass."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maskpack import MaskSet, fingerprint, save_adapter
from maskpack.adapter.content import Parts
from maskpack.adapter.read import Adapter
from maskpack.backbone.select import select_parameters


@dataclass(frozen=True)
class Subject:
    """A model that is measured.

    Attributes:
        make: builds it with random weights. inputs: of a forward pass with this many examples, by keyword or alone.
        density: of its masks, drawn independently. head: module outside the body. targets: of LoRA, by name's end.
        batch: of the forward passes. train: whether a training step is measured.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor] | Tensor]
    density: float
    head: str
    targets: str
    batch: int = 4
    train: bool = False
    dtype: torch.dtype = torch.float32

    def names(self, model: nn.Module) -> list[str]:
        return [name for name in select_parameters(model) if not name.startswith(self.head)]

    def inputs_on(self, device: str, count: int) -> dict[str, Tensor] | Tensor:
        """Return the inputs of this many examples on a device, numbers in the model's dtype."""
        found = self.inputs(count)
        if isinstance(found, dict):
            return {name: tensor.to(device) for name, tensor in found.items()}
        return found.to(device, self.dtype)


def timm_model(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False)  # type: ignore[no-any-return]


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig())  # type: ignore[no-any-return]


def decoder() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)  # type: ignore[no-any-return]


def tokens(count: int, length: int, vocabulary: int) -> dict[str, Tensor]:
    ids = torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(0))


LINEARS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
CONVOLUTIONS = "conv1|conv2|conv3|downsample.0"
# densities: Self-Masking Networks' ResNet-50 on CIFAR-100 without labels, its CLIP ViT with labels; others are usual
SUBJECTS = {
    "ResNet-50": Subject(lambda: timm_model("resnet50"), images, 0.925, "fc", CONVOLUTIONS, train=True),
    "ViT-B/16": Subject(lambda: timm_model("vit_base_patch16_224"), images, 0.987, "head", "qkv|proj|fc1|fc2"),
    "BERT-base": Subject(
        bert, lambda n: tokens(n, 128, 30_000), 0.95, "classifier", "query|key|value|dense", train=True
    ),
    "decoder, 1.1 billion": Subject(
        decoder, lambda n: tokens(n, 32, 32_000), 0.95, "lm_head", LINEARS,
        batch=1, dtype=torch.bfloat16,
    ),
}  # fmt: skip


def drawn(subject: Subject, model: nn.Module, seed: int) -> MaskSet:
    """Return independent masks, packed one after the other."""
    from maskpack.mask import PackedMask

    parameters = dict(model.named_parameters())
    device = next(iter(parameters.values())).device
    generator = torch.Generator(device).manual_seed(seed)
    return MaskSet({
        name: PackedMask.from_tensor(
            torch.rand(parameters[name].shape, generator=generator, device=device) < subject.density
        )
        for name in subject.names(model)
    })  # fmt: skip


def adapter_at(path: Any, subject: Subject, model: nn.Module, seed: int, base: Any = None) -> Adapter:
    """Write an adapter with drawn masks."""
    base = base or fingerprint(model, id="benchmark", head=[subject.head])
    return save_adapter(path, Parts(drawn(subject, model, seed)), base, task="features")


def forward(model: nn.Module, inputs: dict[str, Tensor] | Tensor) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)
